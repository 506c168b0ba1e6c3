//! Brings the pinned commit to this machine's disk: into a scratch directory, checked there, renamed when it is whole.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use replank_core::fault::Fault;
use replank_core::ports::{Log, NoLog, Stream, Tree};
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, JobId};

use super::advert::authorization;
use super::child::{self, Ended, Run};
use super::remote::Host;
use super::{GitSource, outbound, tree};
use crate::source::signed::NO_COMMITS;

/// Output of git's plumbing that is kept: paths of about half a million files.
const CAPTURE: usize = 64 * 1024 * 1024;
/// A line of `git rev-parse` or of a path's entry, with room.
const CAPTURE_SMALL: usize = 16 * 1024;
/// Larger attributes files are no attributes files.
const ATTRIBUTES_MAX: usize = 1024 * 1024;
/// Shortest password that is looked for in git's configuration.
const SECRET_MIN: usize = 8;
/// Less than this left on the disk explains a failed clone.
const LOW_SPACE: u64 = 32 * 1024 * 1024;
/// First version that pins addresses (`http.curloptResolve`).
const OLDEST_GIT: (u32, u32) = (2, 37);
const SRC: &str = "src";
const SCRATCH: &str = "tmp-";

/// A directory that disappears with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(error = %error.chain(), "a scratch directory stays behind until the next fetch or discard");
        }
    }
}

pub(super) fn remove(path: &Path) -> Result<(), Fault> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(disk("a job's tree cannot be removed", path, e)),
    }
}

/// Every job's directory but this one's.
pub(super) fn remove_all_but(work_dir: &Path, keep: Option<&JobId>) -> Result<(), Fault> {
    let entries = match fs::read_dir(work_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(disk("old trees cannot be looked for", work_dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| disk("old trees cannot be looked for", work_dir, e))?;
        let is_job = entry.file_name().to_str().is_some_and(|name| JobId::new(name).is_ok());
        if is_job && keep.is_none_or(|keep| entry.file_name() != keep.as_str()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn disk(what: &str, path: &Path, error: io::Error) -> Fault {
    Fault::transient(format!("{what} ({})", path.display()))
        .advice("check the work directory's permissions and free space")
        .because(error)
}

pub(super) fn make(path: &Path) -> Result<(), Fault> {
    // Only for this user: a tree may be private.
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| disk("a directory cannot be made", path, e))
}

/// One job's fetch.
pub(super) struct Fetch<'a> {
    pub(super) source: &'a GitSource,
    pub(super) job: &'a JobId,
    pub(super) target: &'a Target,
    pub(super) log: &'a dyn Log,
}

impl Fetch<'_> {
    fn job_dir(&self) -> PathBuf {
        self.source.work_dir.join(self.job.as_str())
    }

    fn tree(&self, signed_by: Option<String>) -> Tree {
        Tree { path: self.job_dir().join(SRC), commit: self.target.commit.clone(), signed_by }
    }

    pub(super) async fn go(&self) -> Result<Tree, Fault> {
        self.check_target()?;
        let job_dir = self.job_dir();
        make(&job_dir)?;
        clear_scratch(&job_dir)?;
        let scratch = Scratch(job_dir.join(format!("{SCRATCH}{}", std::process::id())));
        let home = scratch.0.join("home");
        make(&home)?;
        self.source.check_git(&home).await?;
        let path = job_dir.join(SRC);
        if path.symlink_metadata().is_ok() {
            if self.is_whole(&path, &home).await? {
                let signed_by = self.signer(&path, &home).await?;
                self.say(&format!("found the tree of {} that was fetched before\n", self.target.commit));
                return Ok(self.tree(signed_by));
            }
            self.say("the tree that was fetched before is not what was pinned, or was changed; fetching again\n");
            remove(&path)?;
        }
        let addresses = self.source.addresses().await?;
        self.precheck(&addresses).await?;
        let src = scratch.0.join(SRC);
        self.clone(&src, &home, &addresses).await?;
        self.verify(&src, &home).await?;
        let signed_by = self.signer(&src, &home).await?;
        match fs::rename(&src, &path) {
            Ok(()) => Ok(self.tree(signed_by)),
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                Err(Fault::conflict("another fetch of the same job was faster").because(e))
            }
            Err(e) => Err(disk("the fetched tree cannot be moved into place", &path, e)),
        }
    }

    pub(super) fn say(&self, line: &str) {
        self.log.write(Stream::Stdout, line.as_bytes());
    }

    pub(super) fn check_target(&self) -> Result<(), Fault> {
        let target = self.target;
        let expect = match target.kind {
            TargetKind::Release => format!("refs/tags/{}", target.version.tag()),
            TargetKind::Commit => format!("refs/heads/{}", self.source.tracking),
        };
        if target.kind == TargetKind::Commit && self.source.wants_signatures() {
            return Err(Fault::permanent(format!("commit {} is refused: {NO_COMMITS}", target.commit))
                .advice("choose a release from the list of candidates"));
        }
        if target.raw_ref == expect {
            return Ok(());
        }
        Err(Fault::permanent(format!("the target's ref is {:?} and should be {expect}", target.raw_ref))
            .advice("choose the target again from the list of candidates"))
    }

    /// Asks the remote before git does: its answer has a status code, git's has only words.
    pub(super) async fn precheck(&self, addresses: &[SocketAddr]) -> Result<(), Fault> {
        let tag = self.target.version.tag();
        let prefixes = match self.target.kind {
            TargetKind::Release => vec![format!("refs/tags/{tag}"), format!("refs/heads/{tag}")],
            TargetKind::Commit => vec![self.target.raw_ref.clone()],
        };
        let refs = self.source.ask(addresses, &prefixes).await?;
        match self.target.kind {
            TargetKind::Release => {
                let found = refs.tags.into_iter().find(|t| t.raw_ref == self.target.raw_ref).ok_or_else(|| {
                    Fault::permanent(format!("the tag {tag} is no longer on the remote"))
                        .advice("ask the release's maintainer; then choose another release")
                })?;
                if let Some(why) = found.refused {
                    return Err(Fault::permanent(format!("the release {tag} is refused: {why}"))
                        .advice("have the remote put in order, then start again"));
                }
                same(&self.target.commit, found.commit.as_str(), &format!("the tag {tag}"))
            }
            TargetKind::Commit if refs.branch.is_none() => {
                Err(Fault::permanent(format!("the branch {} is no longer on the remote", self.source.tracking))
                    .advice("check the tracking branch in the configuration"))
            }
            TargetKind::Commit => Ok(()),
        }
    }

    async fn clone(&self, src: &Path, home: &Path, addresses: &[SocketAddr]) -> Result<(), Fault> {
        let config = self.network_config(src, addresses)?;
        let to = src.to_str().ok_or_else(|| Fault::permanent("the work directory's path is not UTF-8"))?;
        let url = self.source.remote.shown();
        let (tag, sha) = (self.target.version.tag(), self.target.commit.as_str());
        match self.target.kind {
            TargetKind::Release => {
                let args = ["clone", "--depth", "1", "--single-branch", "--branch", &tag, url, to];
                self.network(&args, home, home, &config, src).await
            }
            TargetKind::Commit => {
                let branch = &self.source.tracking;
                let args = ["clone", "--no-checkout", "--depth", "1", "--single-branch", "--branch", branch, url, to];
                self.network(&args, home, home, &config, src).await?;
                self.network(&["fetch", "--depth", "1", "origin", sha], src, home, &config, src).await?;
                self.network(&["checkout", "--detach", sha], src, home, &config, src).await
            }
        }
    }

    /// What every child is told, whatever the repository says.
    pub(super) fn local_config(&self, src: &Path) -> Vec<(String, String)> {
        [
            ("protocol.allow", "never"),
            ("core.hooksPath", "/dev/null"),
            ("core.fsmonitor", "false"),
            ("core.attributesFile", "/dev/null"),
            ("core.excludesFile", "/dev/null"),
            ("core.autocrlf", "false"),
            ("core.symlinks", "true"),
            ("core.protectNTFS", "true"),
            ("core.protectHFS", "true"),
            // Larger objects are streamed, so that one file cannot take all memory.
            ("core.bigFileThreshold", "16m"),
            ("core.askPass", ""),
            ("credential.helper", ""),
            ("submodule.recurse", "false"),
            ("gc.auto", "0"),
            ("maintenance.auto", "false"),
            ("advice.detachedHead", "false"),
            ("core.quotePath", "false"),
            // The tree may belong to another user after a restart in another container.
            ("safe.directory", &src.to_string_lossy()),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// What the children that speak with the remote are told beyond that. Holds the credential: environment only.
    pub(super) fn network_config(&self, src: &Path, addresses: &[SocketAddr]) -> Result<Vec<(String, String)>, Fault> {
        let remote = &self.source.remote;
        let mut config = self.local_config(src);
        let mut add = |key: &str, value: &str| config.push((key.to_owned(), value.to_owned()));
        add(if remote.is_plain() { "protocol.http.allow" } else { "protocol.https.allow" }, "always");
        add("protocol.version", "2");
        add("http.followRedirects", "false");
        add("http.proxy", "");
        add("http.sslVerify", "true");
        add("http.lowSpeedLimit", "1000");
        add("http.lowSpeedTime", &self.source.limits.quiet_time.as_secs().max(1).to_string());
        add("transfer.fsckObjects", "true");
        add("transfer.bundleURI", "false");
        add("transfer.credentialsInUrl", "die");
        // One pack instead of thousands of loose files.
        add("fetch.unpackLimit", "1");
        add("fetch.recurseSubmodules", "false");
        if let Some(path) = &self.source.ca_file {
            add("http.sslCAInfo", &path.to_string_lossy());
        }
        if let Host::Name(name) = remote.host() {
            add("http.curloptResolve", &outbound::pin(name, remote.port(), addresses));
        }
        if let Some(credential) = remote.credential() {
            let header = authorization(&credential.username, &credential.password)?;
            add(&format!("http.{}.extraHeader", remote.shown()), &format!("Authorization: {header}"));
        }
        Ok(config)
    }

    async fn network(
        &self,
        args: &[&str],
        cwd: &Path,
        home: &Path,
        config: &[(String, String)],
        src: &Path,
    ) -> Result<(), Fault> {
        let limits = &self.source.limits;
        let scratch = home.parent().unwrap_or(home);
        self.say(&child::line(&self.source.git, args));
        let run = Run {
            git: &self.source.git,
            args,
            cwd,
            home,
            config,
            time: limits.clone_time,
            disk: Some((scratch, limits.disk_bytes)),
            capture: None,
        };
        let verb = args.first().copied().unwrap_or("git");
        match run.go(self.log).await? {
            Ended::Fine(_) => Ok(()),
            Ended::TimedOut => {
                Err(Fault::transient(format!("git {verb} took longer than {} s", limits.clone_time.as_secs()))
                    .advice("check the network to the git server, or raise the time limit for fetching"))
            }
            Ended::DiskFull => Err(Fault::permanent(format!(
                "the release takes more than {} MiB on disk",
                limits.disk_bytes / 1_048_576
            ))
            .advice("raise the disk limit for fetching, or make the repository smaller")),
            Ended::TooMuch => Err(Fault::permanent(format!("git {verb} printed too much"))),
            Ended::Lost(error) => Err(Fault::transient(format!("git {verb} was lost")).because(error)),
            Ended::Failed { code, tail } => Err(self.why_failed(verb, code, tail, src, home).await),
        }
    }

    /// The remote answered well just before, so that what went wrong since may pass; unless the disk or the tag says otherwise.
    async fn why_failed(&self, verb: &str, code: Option<i32>, tail: String, src: &Path, home: &Path) -> Fault {
        let how = code.map_or_else(|| "was killed".to_owned(), |code| format!("failed with exit code {code}"));
        let fault = Fault::transient(format!("git {verb} {how}")).because(format!("git says: {tail}"));
        if let Ok(space) = rustix::fs::statvfs(home)
            && space.f_bavail.saturating_mul(space.f_frsize) < LOW_SPACE
        {
            return fault.advice(format!("free some space on the disk of {}", self.source.work_dir.display()));
        }
        // git itself crashes on a shallow clone of a tag that names a tree; what it left behind tells.
        let sha = self.target.commit.as_str();
        if let Ok(kind) = self.ask_git(&["cat-file", "-t", sha], src, home, CAPTURE_SMALL).await
            && kind.trim_ascii() != b"commit"
        {
            return not_a_commit(&self.target.raw_ref, sha);
        }
        fault.advice("look at the lines of the fetch in the controller's log (level info); Replank tries again")
    }

    pub(super) async fn ask_git(
        &self,
        args: &[&str],
        src: &Path,
        home: &Path,
        capture: usize,
    ) -> Result<Vec<u8>, Fault> {
        self.source.plumb(args, src, home, &self.local_config(src), capture).await
    }

    /// The commit is the pinned one, and everything on disk is as it was checked out.
    async fn is_whole(&self, src: &Path, home: &Path) -> Result<bool, Fault> {
        let head = self.ask_git(&["rev-parse", "--verify", "HEAD^{commit}"], src, home, CAPTURE_SMALL).await;
        // A tree that git cannot read is no whole tree; the fault itself says nothing more.
        if !head.is_ok_and(|head| head.trim_ascii() == self.target.commit.as_str().as_bytes()) {
            return Ok(false);
        }
        let args = ["status", "--porcelain", "--ignored", "--untracked-files=all"];
        Ok(self.ask_git(&args, src, home, CAPTURE_SMALL).await.is_ok_and(|dirt| dirt.is_empty()))
    }

    async fn verify(&self, src: &Path, home: &Path) -> Result<(), Fault> {
        let head = self.ask_git(&["rev-parse", "--verify", "HEAD^{commit}"], src, home, CAPTURE_SMALL).await?;
        same(&self.target.commit, &String::from_utf8_lossy(head.trim_ascii()), "the clone")?;
        if self.target.kind == TargetKind::Release {
            let tag = format!("{}^{{commit}}", self.target.raw_ref);
            let tagged = self.ask_git(&["rev-parse", "--verify", &tag], src, home, CAPTURE_SMALL).await?;
            same(&self.target.commit, &String::from_utf8_lossy(tagged.trim_ascii()), &self.target.raw_ref)?;
        }
        self.verify_config(src)?;
        let listing = self.ask_git(&["ls-tree", "-r", "-z", "HEAD"], src, home, CAPTURE).await?;
        for entry in listing.split(|b| *b == 0).filter(|e| !e.is_empty()) {
            self.verify_entry(src, entry)?;
        }
        Ok(())
    }

    /// Nothing that git wrote down may hold a credential.
    fn verify_config(&self, src: &Path) -> Result<(), Fault> {
        let path = src.join(".git/config");
        let text = fs::read_to_string(&path).map_err(|e| disk("the clone's configuration cannot be read", &path, e))?;
        let url = format!("url = {}", self.source.remote.shown());
        // Shorter ones stand in any file by chance; the address itself is compared as a whole below.
        let secret = self.source.remote.credential().map(|c| c.password.as_str()).filter(|p| p.len() >= SECRET_MIN);
        let leaks = text.to_ascii_lowercase().contains("extraheader") || secret.is_some_and(|s| text.contains(s));
        if !leaks && text.lines().any(|line| line.trim() == url) {
            return Ok(());
        }
        Err(Fault::permanent("the clone's configuration does not hold the remote without its credential")
            .advice("use a release of git that does not rewrite the remote's address"))
    }

    /// Refuses by name what Replank does not fetch: submodules and LFS.
    fn verify_entry(&self, src: &Path, entry: &[u8]) -> Result<(), Fault> {
        let Some(tab) = entry.iter().position(|b| *b == b'\t') else {
            return Ok(());
        };
        let (mode, name) = (entry.get(..6).unwrap_or_default(), &entry[tab + 1..]);
        if mode == b"160000" || name == b".gitmodules" {
            return Err(Fault::permanent(format!("submodules are not supported ({})", super::refs::tame(name)))
                .advice("put the submodule's files into the repository"));
        }
        let is_attributes = name == b".gitattributes" || name.ends_with(b"/.gitattributes");
        let Some(name) = std::str::from_utf8(name).ok().filter(|_| is_attributes && mode != b"120000") else {
            return Ok(());
        };
        let attributes = tree::read_file(src, name, ATTRIBUTES_MAX)?.unwrap_or_default();
        if attributes.windows(b"filter=lfs".len()).any(|w| w == b"filter=lfs") {
            return Err(Fault::permanent(format!("git LFS is not supported ({name})"))
                .advice("keep the files in the repository itself, or let the build fetch them"));
        }
        Ok(())
    }
}

fn not_a_commit(what: &str, sha: &str) -> Fault {
    Fault::permanent(format!("{what} leads to {sha}, which is not a commit"))
        .advice("have the tag made again on a commit, as a new version")
}

pub(in crate::source) fn same(pinned: &CommitSha, found: &str, what: &str) -> Result<(), Fault> {
    if pinned.as_str() == found {
        return Ok(());
    }
    Err(Fault::permanent(format!("{what} is at commit {found}, and {pinned} was chosen"))
        .advice("find out who moved it; a moved tag needs an administrator's override"))
}

/// What a killed fetch of the same job left behind.
fn clear_scratch(job_dir: &Path) -> Result<(), Fault> {
    let entries = fs::read_dir(job_dir).map_err(|e| disk("the job's directory cannot be read", job_dir, e))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(SCRATCH) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

impl GitSource {
    /// Permanent where git is missing, or too old to be pinned to judged addresses. `home` is a directory that exists; nothing
    /// is written into it.
    pub async fn check_git(&self, home: &Path) -> Result<(), Fault> {
        let said = self.plumb(&["version"], home, home, &[], CAPTURE_SMALL).await?;
        let said = String::from_utf8_lossy(&said);
        let mut numbers =
            said.trim().trim_start_matches("git version ").split('.').map_while(|n| n.parse::<u32>().ok());
        if let (Some(major), Some(minor)) = (numbers.next(), numbers.next())
            && (major, minor) >= OLDEST_GIT
        {
            return Ok(());
        }
        Err(Fault::permanent(format!("{:?} is too old", said.trim()))
            .advice("install git 2.37 or later where Replank runs"))
    }

    /// Runs a local git command and returns its output.
    async fn plumb(
        &self,
        args: &[&str],
        cwd: &Path,
        home: &Path,
        config: &[(String, String)],
        capture: usize,
    ) -> Result<Vec<u8>, Fault> {
        let time = self.limits.local_time;
        let run = Run { git: &self.git, args, cwd, home, config, time, disk: None, capture: Some(capture) };
        let verb = args.first().copied().unwrap_or("git");
        match run.go(&NoLog).await? {
            Ended::Fine(out) => Ok(out),
            Ended::Failed { tail, .. } => {
                Err(Fault::transient(format!("git {verb} failed on the fetched tree"))
                    .because(format!("git says: {tail}")))
            }
            Ended::TimedOut | Ended::DiskFull => Err(Fault::transient(format!("git {verb} took too long"))),
            Ended::TooMuch => Err(Fault::permanent(format!("git {verb} printed more than {capture} bytes"))
                .advice("make the repository smaller: it has too many files")),
            Ended::Lost(error) => Err(Fault::transient(format!("git {verb} was lost")).because(error)),
        }
    }

    /// The port's check, on this machine's disk.
    pub(super) async fn check_on_disk(
        &self,
        tree: &Tree,
        component: &str,
        dockerfile: &str,
        context: &str,
    ) -> Result<(), Fault> {
        let file = tree::require_file(&tree.path, dockerfile, &format!("the Dockerfile of {component}"))?;
        let dir = tree::require_dir(&tree.path, context, &format!("the build context of {component}"))?;
        for (what, path, kind) in [("Dockerfile", file, "blob"), ("build context", dir, "tree")] {
            let Some(text) = path.to_str().filter(|p| !p.is_empty()) else {
                continue;
            };
            let config = [("core.fsmonitor".to_owned(), "false".to_owned()), safe(&tree.path)];
            let args = ["ls-tree", "-z", tree.commit.as_str(), "--", text];
            let home = tree.path.parent().unwrap_or(&tree.path);
            let entry = self.plumb(&args, &tree.path, home, &config, CAPTURE_SMALL).await?;
            let entry = String::from_utf8_lossy(&entry);
            if entry.split_ascii_whitespace().nth(1) != Some(kind) {
                return Err(Fault::permanent(format!(
                    "the {what} of {component}, {text:?}, is on disk but not in the commit"
                ))
                .advice("commit the file in the release"));
            }
        }
        Ok(())
    }
}

fn safe(path: &Path) -> (String, String) {
    ("safe.directory".to_owned(), path.to_string_lossy().into_owned())
}
