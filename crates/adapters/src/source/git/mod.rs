//! The `Source` port over a git remote: discovery by smart HTTP, fetching by the git binary.
//!
//! A remote is named by configuration only. Its name is resolved once per call, the addresses are judged ([`outbound`]) and
//! pinned for everything that the call connects to.

mod advert;
mod capabilities;
mod child;
mod clone;
mod look;
mod pkt;
mod refs;
mod remote;
mod signed;
pub mod tree;
mod verify;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use replank_core::fault::Fault;
use replank_core::ports::{Clock, Log, NoLog, Peeked, Refs, Source, Tree};
use replank_core::record::Target;
use replank_core::words::{CommitSha, JobId, Millis};

use super::signed::NO_COMMITS;
pub(super) use clone::same;
pub(super) use look::not_here;
use outbound::{RESOLVE_TIME, Reach, Resolver, SystemResolver};
pub(super) use refs::tame;
use remote::Host;
pub use remote::{Credential, Remote};
pub use verify::Verify;
// The rule is the exec channel's too, which cannot see this crate.
pub use replank_exec::outbound;
pub use replank_exec::signers::Signers;

/// Longest branch name that is accepted; git's own limit is a file name's.
const MAX_BRANCH: usize = 200;

/// What one remote may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body of one answer of the remote (contract §2).
    pub advert_bytes: usize,
    /// Whole time for listing refs.
    pub refs_time: Duration,
    /// Whole time of one network command of git; below the fetching budget of 600 s.
    pub clone_time: Duration,
    /// A transfer below 1,000 bytes a second for so long is given up.
    pub quiet_time: Duration,
    /// Time for one local command of git.
    pub local_time: Duration,
    /// Disk space that a clone may take, its checkout included.
    pub disk_bytes: u64,
    /// Time for each command of git in a look without a job, and the disk space that such a look may take.
    pub look_time: Duration,
    pub look_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            advert_bytes: 4 * 1024 * 1024,
            refs_time: Duration::from_secs(30),
            clone_time: Duration::from_secs(540),
            quiet_time: Duration::from_secs(30),
            local_time: Duration::from_secs(60),
            disk_bytes: 4 * 1024 * 1024 * 1024,
            look_time: Duration::from_secs(30),
            look_bytes: 1024 * 1024 * 1024,
        }
    }
}

/// A git source as configuration gives it; [`GitSource::new`] validates it.
#[derive(Debug, Clone)]
pub struct GitConfig {
    /// `https://HOST/PATH.git`; may carry userinfo, which is cut off and becomes the credential.
    pub remote: String,
    pub credential: Option<Credential>,
    pub tracking_branch: String,
    /// Development: loopback remotes, and http on loopback and private networks.
    pub allow_loopback: bool,
    /// A git server on the operator's own network.
    pub allow_private: bool,
    /// PEM certificates that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// Each job's tree is `<work_dir>/<job>/src`.
    pub work_dir: PathBuf,
    /// The git binary: a path, or a name that is looked up in the usual directories.
    pub git: PathBuf,
    /// Whether tags must be signed, and with which keys.
    pub verify: Verify,
    /// What the ends of those keys are held against; without one no signature is ever good.
    pub clock: Option<Arc<dyn Clock>>,
    pub limits: Limits,
}

impl GitConfig {
    pub fn new(remote: impl Into<String>, work_dir: impl Into<PathBuf>) -> Self {
        Self {
            remote: remote.into(),
            credential: None,
            tracking_branch: "main".to_owned(),
            allow_loopback: false,
            allow_private: false,
            ca_file: None,
            work_dir: work_dir.into(),
            git: "git".into(),
            verify: Verify::default(),
            clock: None,
            limits: Limits::default(),
        }
    }
}

/// A validated git remote.
#[derive(Debug)]
pub struct GitSource {
    remote: Remote,
    tracking: String,
    reach: Reach,
    ca_file: Option<PathBuf>,
    work_dir: PathBuf,
    git: PathBuf,
    verify: Verify,
    clock: Option<Arc<dyn Clock>>,
    limits: Limits,
    resolver: Arc<dyn Resolver>,
}

impl GitSource {
    /// Validates a configuration. Faults are permanent and show no secret.
    pub fn new(config: GitConfig) -> Result<Self, Fault> {
        Self::with_resolver(config, Arc::new(SystemResolver))
    }

    /// As [`GitSource::new`], with another name service.
    pub fn with_resolver(config: GitConfig, resolver: Arc<dyn Resolver>) -> Result<Self, Fault> {
        let reach = Reach { loopback: config.allow_loopback, private: config.allow_private };
        let remote = Remote::parse(&config.remote, config.credential, reach)?;
        if !is_branch(&config.tracking_branch) {
            return Err(Fault::permanent("the tracking branch's name cannot be used").advice(format!(
                "use at most {MAX_BRANCH} of A-Z, a-z, 0-9, '.', '_', '-' and '/', not beginning with '-'"
            )));
        }
        config.verify.check(config.clock.as_deref())?;
        let absolute = |what: &str, path: &PathBuf| {
            std::path::absolute(path).map_err(|e| Fault::permanent(format!("the {what} cannot be found")).because(e))
        };
        Ok(Self {
            remote,
            tracking: config.tracking_branch,
            reach,
            // Children run in other directories.
            ca_file: config.ca_file.map(|path| absolute("CA file", &path)).transpose()?,
            work_dir: absolute("work directory", &config.work_dir)?,
            git: config.git,
            verify: config.verify,
            clock: config.clock,
            limits: config.limits,
            resolver,
        })
    }

    /// Resolves the remote once and judges every answer.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, Fault> {
        let port = self.remote.port();
        let name = match self.remote.host() {
            Host::Literal(ip) => return Ok(vec![SocketAddr::new(*ip, port)]),
            Host::Name(name) => name,
        };
        let failed = || {
            Fault::transient(format!("the git remote's host {} cannot be resolved", self.remote.host_text()))
                .advice("check the host's name and this machine's name service")
        };
        let answers = tokio::time::timeout(RESOLVE_TIME, self.resolver.resolve(name, port)).await;
        let answers = answers.map_err(|e| failed().because(e))?.map_err(|e| failed().because(e))?;
        let answers = outbound::admit_all(name, answers, self.reach).map_err(remote::refused)?;
        for answer in &answers {
            self.remote.admit(outbound::admit(answer.ip(), self.reach))?;
        }
        Ok(answers)
    }

    /// What time the remote says that it is, to a second; `None` where it says nothing about it.
    pub async fn time(&self) -> Result<Option<Millis>, Fault> {
        let addresses = self.addresses().await?;
        advert::Asker::new(&self.remote, &addresses, self.ca_file.as_deref(), &self.limits)?.time().await
    }

    /// For a source that clones elsewhere: everything that the remote can be asked about a target without cloning it.
    pub(in crate::source) async fn check_target(&self, job: &JobId, target: &Target) -> Result<(), Fault> {
        let fetch = clone::Fetch { source: self, job, target, log: &NoLog };
        fetch.check_target()?;
        fetch.precheck(&self.addresses().await?).await
    }

    pub(in crate::source) fn credential(&self) -> Option<&Credential> {
        self.remote.credential()
    }

    /// The branch that commit targets are heads of.
    pub(in crate::source) fn tracking_branch(&self) -> &str {
        &self.tracking
    }

    pub(in crate::source) fn wants_signatures(&self) -> bool {
        self.verify.wants_signatures()
    }

    async fn ask(&self, addresses: &[SocketAddr], prefixes: &[String]) -> Result<Refs, Fault> {
        let asker = advert::Asker::new(&self.remote, addresses, self.ca_file.as_deref(), &self.limits)?;
        Ok(refs::choose(&asker.ls_refs(prefixes).await?, &self.tracking, self.verify.wants_signatures()))
    }
}

/// A conservative part of `git check-ref-format`: what a person calls a branch.
fn is_branch(name: &str) -> bool {
    (1..=MAX_BRANCH).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/'))
        && !name.starts_with('-')
        && !name.contains("..")
        && !name.ends_with(".lock")
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.'))
}

#[async_trait]
impl Source for GitSource {
    fn remote(&self) -> String {
        self.remote.shown().to_owned()
    }

    fn refuses_commits(&self) -> Option<String> {
        self.verify.wants_signatures().then(|| NO_COMMITS.to_owned())
    }

    async fn refs(&self) -> Result<Refs, Fault> {
        let addresses = self.addresses().await?;
        // Branches named like release tags are asked for, since `clone --branch` would prefer them.
        let prefixes = ["refs/tags/v".to_owned(), "refs/heads/v".to_owned(), format!("refs/heads/{}", self.tracking)];
        self.ask(&addresses, &prefixes).await
    }

    async fn peek(&self, target: &Target, since: Option<&CommitSha>, path: &str, max: usize) -> Result<Peeked, Fault> {
        self.look(target, since, path, max).await
    }

    async fn fetch(&self, job: &JobId, target: &Target, log: &dyn Log) -> Result<Tree, Fault> {
        clone::Fetch { source: self, job, target, log }.go().await
    }

    async fn read(&self, tree: &Tree, path: &str, max: usize) -> Result<Option<Vec<u8>>, Fault> {
        let (root, path) = (tree.path.clone(), path.to_owned());
        let read = tokio::task::spawn_blocking(move || tree::read_file(&root, &path, max)).await;
        read.unwrap_or_else(|e| Err(Fault::transient("a file of the release could not be read").because(e)))
    }

    async fn check_paths(&self, tree: &Tree, component: &str, dockerfile: &str, context: &str) -> Result<(), Fault> {
        self.check_on_disk(tree, component, dockerfile, context).await
    }

    async fn discard_all_but(&self, job: Option<&JobId>) -> Result<(), Fault> {
        let (work_dir, keep) = (self.work_dir.clone(), job.cloned());
        let done = tokio::task::spawn_blocking(move || clone::remove_all_but(&work_dir, keep.as_ref())).await;
        done.unwrap_or_else(|e| Err(Fault::transient("old trees could not be removed").because(e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branch_names_are_checked() {
        for (name, expect) in [
            ("main", true),
            ("release/1.x", true),
            ("", false),
            ("-x", false),
            ("--upload-pack=x", false),
            ("a..b", false),
            ("a//b", false),
            ("/a", false),
            ("a/", false),
            (".a", false),
            ("a.", false),
            ("a.lock", false),
            ("a b", false),
            ("a\nb", false),
            ("a:b", false),
            ("@{-1}", false),
        ] {
            assert_eq!(is_branch(name), expect, "{name:?}");
        }
    }
}
