//! Source `az-exec`: what the remote has is asked directly, as the git source does; the clone is made by git in another container,
//! through the exec channel, where the Azure CLI will pack it.
//!
//! The channel runs git and reads no file. So what is in the commit is asked by name, and a file's content, where one is
//! needed, is read from a clone of this machine's own.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use replank_core::fault::{Class, Fault};
use replank_core::ports::{Log, Peeked, Refs, Source, Stream, Tree};
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, JobId};
use replank_exec::protocol::{Credential, Outcome, Request};

use super::git::tree::check_relative;
use super::git::{GitSource, not_here, same};
use super::signed::{Said, judge, lightweight};
use crate::exec_channel::Channel;

/// Below the fetching budget of 600 s.
const CLONE_SECONDS: u64 = 540;
const LOCAL_SECONDS: u64 = 60;
/// A clone that was killed half-way cannot be removed through the channel, so the next one takes another name.
const PLACES: u32 = 3;
/// Longest part of git's last words in a fault.
const TAIL_MAX: usize = 600;

#[derive(Debug)]
pub struct AzExecSource {
    git: GitSource,
    channel: Channel,
    clone_root: PathBuf,
    /// A server that does not take credentials apart gets them in the remote's URL, in git's arguments.
    credential_in_url: bool,
    /// What was fetched last: a clone of our own is made of it when a file has to be read.
    last: Mutex<Option<(JobId, Target)>>,
}

impl AzExecSource {
    #[must_use]
    pub fn new(git: GitSource, channel: Channel, clone_root: PathBuf, credential_in_url: bool) -> Self {
        Self { git, channel, clone_root, credential_in_url, last: Mutex::default() }
    }

    /// Runs git in a clone.
    async fn git_in(&self, clone: &Path, words: &[&str]) -> Result<Outcome, Fault> {
        let clone = clone.display().to_string();
        let argv = ["git", "-C", &clone].into_iter().chain(words.iter().copied()).map(str::to_owned).collect();
        let request = Request { argv, timeout_seconds: Some(LOCAL_SECONDS), ..Request::default() };
        let verb = words.first().copied().unwrap_or_default();
        let outcome = self.channel.run(&request, &format!("git {verb} was to run in the clone")).await?;
        if outcome.timed_out {
            return Err(Fault::transient(format!("git {verb} took longer than {LOCAL_SECONDS} s in the clone")));
        }
        Ok(outcome)
    }

    /// What git says of a name in a clone; `None` where there is no such thing.
    async fn object(&self, clone: &Path, name: &str) -> Result<Option<String>, Fault> {
        let outcome = self.git_in(clone, &["rev-parse", "--verify", "--quiet", name]).await?;
        let text = outcome.stdout.trim();
        Ok((outcome.exit_code == 0 && !text.is_empty()).then(|| text.to_owned()))
    }

    /// The clone has the pinned commit, nothing but it, and a remote without a credential.
    async fn is_whole(&self, clone: &Path, target: &Target) -> Result<bool, Fault> {
        if self.object(clone, "HEAD^{commit}").await?.as_deref() != Some(target.commit.as_str()) {
            return Ok(false);
        }
        Ok(self.dirt(clone).await?.is_empty() && self.kept_remote(clone).await? == self.git.remote())
    }

    async fn dirt(&self, clone: &Path) -> Result<String, Fault> {
        let words = ["status", "--porcelain", "--ignored", "--untracked-files=all"];
        let outcome = self.git_in(clone, &words).await?;
        if outcome.exit_code == 0 { Ok(outcome.stdout) } else { Err(failed("git status", &outcome)) }
    }

    async fn kept_remote(&self, clone: &Path) -> Result<String, Fault> {
        let outcome = self.git_in(clone, &["config", "--get", "remote.origin.url"]).await?;
        Ok(outcome.stdout.trim().to_owned())
    }

    /// The remote as git is to be given it, and the credential beside it.
    async fn remote_for_git(&self) -> Result<(String, Option<Credential>), Fault> {
        let shown = self.git.remote();
        let Some(credential) = self.git.credential() else { return Ok((shown, None)) };
        let apart = Credential { username: credential.username.clone(), password: credential.password.clone() };
        if self.channel.about().await?.takes_credentials {
            return Ok((shown, Some(apart)));
        }
        if !self.credential_in_url {
            return Err(Fault::permanent("the exec server is too old to be given the remote's credential apart from its address")
                .advice(
                    "upgrade the container that runs the exec server; or set exec.credential_in_url (EXEC_CREDENTIAL_IN_URL=true), \
                     which shows the credential to whoever can list that container's processes",
                ));
        }
        with_credential(&shown, &apart).map(|url| (url, None))
    }

    async fn clone(&self, clone: &Path, target: &Target, log: &dyn Log) -> Result<(), Fault> {
        let (remote, credential) = self.remote_for_git().await?;
        let (tag, to) = (target.version.tag(), clone.display().to_string());
        let sha = target.commit.as_str();
        match target.kind {
            TargetKind::Release => {
                let words = ["clone", "--depth", "1", "--single-branch", "--branch", &tag, &remote, &to];
                self.network(&words, credential, log).await
            }
            TargetKind::Commit => {
                let branch = self.git.tracking_branch();
                let words =
                    ["clone", "--depth", "1", "--single-branch", "--branch", branch, "--no-checkout", &remote, &to];
                self.network(&words, credential.clone(), log).await?;
                self.network(&["-C", &to, "fetch", "--depth", "1", "origin", sha], credential, log).await?;
                self.network(&["-C", &to, "checkout", "--detach", sha], None, log).await
            }
        }
    }

    async fn network(&self, words: &[&str], credential: Option<Credential>, log: &dyn Log) -> Result<(), Fault> {
        let argv = ["git"].into_iter().chain(words.iter().copied()).map(str::to_owned).collect();
        let request =
            Request { argv, timeout_seconds: Some(CLONE_SECONDS), git_credential: credential, ..Request::default() };
        let verb = words.iter().find(|word| ["clone", "fetch", "checkout"].contains(*word)).copied().unwrap_or("git");
        let outcome = self.channel.run(&request, &format!("git {verb} was to run on the exec server")).await?;
        for text in [&outcome.stdout, &outcome.stderr] {
            log.write(Stream::Stderr, text.as_bytes());
        }
        if outcome.timed_out {
            return Err(Fault::transient(format!("git {verb} took longer than {CLONE_SECONDS} s"))
                .advice("check the network from the exec server to the git server"));
        }
        if outcome.exit_code == 0 { Ok(()) } else { Err(failed(&format!("git {verb}"), &outcome)) }
    }

    /// Nothing that git wrote down may hold a credential (contract §5): the kept address is written anew, and looked at.
    async fn scrub(&self, clone: &Path) -> Result<(), Fault> {
        let shown = self.git.remote();
        let outcome = self.git_in(clone, &["config", "remote.origin.url", &shown]).await?;
        if outcome.exit_code == 0 && self.kept_remote(clone).await? == shown {
            return Ok(());
        }
        if self.git.credential().is_none() {
            // There is nothing to hide.
            return Ok(());
        }
        Err(Fault::permanent("it cannot be shown that the clone's configuration holds no credential")
            .advice("look at the exec server's disk and its version of git; nothing was built"))
    }

    async fn verify(&self, clone: &Path, target: &Target) -> Result<(), Fault> {
        let head = self.object(clone, "HEAD^{commit}").await?.unwrap_or_else(|| "none".to_owned());
        same(&target.commit, &head, "the clone")?;
        if target.kind == TargetKind::Release {
            let tagged = self.object(clone, &format!("{}^{{commit}}", target.raw_ref)).await?;
            same(&target.commit, &tagged.unwrap_or_else(|| "none".to_owned()), &target.raw_ref)?;
        }
        let dirt = self.dirt(clone).await?;
        if !dirt.is_empty() {
            let first: String = dirt.lines().next().unwrap_or_default().chars().take(100).collect();
            return Err(Fault::permanent(format!("the clone is not what the commit holds: {first:?}"))
                .advice("look at the exec server's disk and at its git: something changes what it writes"));
        }
        if self.object(clone, "HEAD:.gitmodules").await?.is_some() {
            return Err(Fault::permanent("submodules are not supported (.gitmodules)")
                .advice("put the submodule's files into the repository"));
        }
        Ok(())
    }

    /// The signer of the clone's tag, by the keys that the exec server's operator gave it; `None` where nobody asks. The server's
    /// git says whether the signature is good; what is signed, and that somebody is named, is judged here.
    async fn signer(&self, clone: &Path, target: &Target) -> Result<Option<String>, Fault> {
        if !self.git.wants_signatures() {
            return Ok(None);
        }
        let object = self.object(clone, &target.raw_ref).await?;
        let annotated = self.object(clone, &format!("{}^{{tag}}", target.raw_ref)).await?;
        let Some(object) = annotated.filter(|annotated| Some(annotated) == object.as_ref()) else {
            return Err(Fault::permanent(lightweight(&target.version.tag()))
                .advice("ask the release's maintainer for a signed tag; nothing was built"));
        };
        let outcome = self.git_in(clone, &["verify-tag", "--raw", "--verbose", &object]).await?;
        if outcome.exit_code == replank_exec::protocol::EXIT_NOT_STARTED {
            return Err(failed("git verify-tag", &outcome));
        }
        let said = Said { object: outcome.stdout.as_bytes(), is_good: outcome.exit_code == 0, words: &outcome.stderr };
        judge(target, &said, &[]).map(Some).map_err(|fault| {
            let advice =
                "the exec server's EXEC_ALLOWED_SIGNERS_FILE or EXEC_OPENPGP_KEYRING_FILE says whose signature counts";
            let before = fault.advice.clone();
            fault.advice(format!("{before}; {advice}"))
        })
    }

    /// What a file holds, from a clone on this machine.
    async fn read_here(&self, path: &str, max: usize) -> Result<Option<Vec<u8>>, Fault> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (job, target) = last.ok_or_else(|| Fault::transient("the release was not fetched yet"))?;
        let here = self.git.fetch(&job, &target, &replank_core::ports::NoLog).await.map_err(|fault| {
            let class = fault.class;
            Fault { class, ..Fault::permanent(format!("the release has a file {path}, which cannot be read")) }
                .advice("install git 2.37 or later where Replank runs: the exec channel runs git and reads no file")
                .because(fault.told().sentence())
        })?;
        self.git.read(&here, path, max).await
    }

    async fn require(&self, clone: &Path, what: &str, path: &str, kind: &str, name: &str) -> Result<(), Fault> {
        let advice = "correct the path in the configuration or in the release";
        let bad = |why: &str| Fault::permanent(format!("{what}, {path:?}, {why}")).advice(advice);
        check_relative(path).map_err(|fault| bad("is not a usable path").because(fault))?;
        let plain: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if plain.is_empty() {
            return if kind == "tree" { Ok(()) } else { Err(bad(&format!("is not {name}"))) };
        }
        let Some(object) = self.object(clone, &format!("HEAD:{}", plain.join("/"))).await? else {
            return Err(bad("is not in the release"));
        };
        match self.object(clone, &format!("{object}^{{{kind}}}")).await? {
            Some(_) => Ok(()),
            None => Err(bad(&format!("is not {name}"))),
        }
    }
}

/// git's exit codes do not tell what went wrong, and the remote answered well just before: it may pass.
fn failed(what: &str, outcome: &Outcome) -> Fault {
    let said = if outcome.stderr.trim().is_empty() { &outcome.stdout } else { &outcome.stderr };
    let said: Vec<char> = said.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let tail: String = said[said.len().saturating_sub(TAIL_MAX)..].iter().collect();
    let class =
        if outcome.exit_code == replank_exec::protocol::EXIT_NOT_STARTED { Class::Permanent } else { Class::Transient };
    Fault::new(class, format!("{what} failed on the exec server with exit code {}", outcome.exit_code))
        .advice("check the exec server's git, its disk and its network to the git server")
        .because(format!("git says: {}", replank_core::mask::mask_text(&tail)))
}

fn with_credential(shown: &str, credential: &Credential) -> Result<String, Fault> {
    let bad = || Fault::permanent("the remote's credential cannot be put into its address");
    let mut url = reqwest::Url::parse(shown).map_err(|_| bad())?;
    let put = url.set_username(&credential.username).and_then(|()| url.set_password(Some(&credential.password)));
    put.map_err(|()| bad())?;
    Ok(url.to_string())
}

#[async_trait]
impl Source for AzExecSource {
    fn remote(&self) -> String {
        self.git.remote()
    }

    fn refuses_commits(&self) -> Option<String> {
        self.git.refuses_commits()
    }

    async fn refs(&self) -> Result<Refs, Fault> {
        self.git.refs().await
    }

    /// The channel's git may clone, and nothing of a clone can be read or removed through it. So a look is made by this machine's
    /// own git; where there is none, nothing can be said before the fetch.
    async fn peek(&self, target: &Target, since: Option<&CommitSha>, path: &str, max: usize) -> Result<Peeked, Fault> {
        self.git.look(target, since, path, max).await.map_err(|fault| match fault.class {
            Class::Permanent => not_here(&fault),
            Class::Transient | Class::Conflict | Class::Indeterminate => fault,
        })
    }

    async fn fetch(&self, job: &JobId, target: &Target, log: &dyn Log) -> Result<Tree, Fault> {
        self.git.check_target(job, target).await?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((job.clone(), target.clone()));
        for place in 1..=PLACES {
            let name = if place == 1 { job.to_string() } else { format!("{job}.{place}") };
            let clone = self.clone_root.join(name);
            let is_taken = self.git_in(&clone, &["rev-parse", "--is-inside-work-tree"]).await?.exit_code == 0;
            let tree = |signed_by| Tree { path: clone.clone(), commit: target.commit.clone(), signed_by };
            if is_taken && self.is_whole(&clone, target).await? {
                return Ok(tree(self.signer(&clone, target).await?));
            }
            if is_taken {
                continue;
            }
            self.clone(&clone, target, log).await?;
            self.scrub(&clone).await?;
            self.verify(&clone, target).await?;
            return Ok(tree(self.signer(&clone, target).await?));
        }
        Err(Fault::permanent(format!("{PLACES} clones of this job were begun on the exec server, and none is whole"))
            .advice("start the upgrade again: a new job has a place of its own"))
    }

    async fn read(&self, tree: &Tree, path: &str, max: usize) -> Result<Option<Vec<u8>>, Fault> {
        check_relative(path)?;
        match self.object(&tree.path, &format!("HEAD:{path}")).await? {
            Some(_) => self.read_here(path, max).await,
            None => Ok(None),
        }
    }

    async fn check_paths(&self, tree: &Tree, component: &str, dockerfile: &str, context: &str) -> Result<(), Fault> {
        let what = format!("the Dockerfile of {component}");
        self.require(&tree.path, &what, dockerfile, "blob", "a regular file").await?;
        self.require(&tree.path, &format!("the build context of {component}"), context, "tree", "a directory").await
    }

    /// The exec server sweeps its own disk; the channel removes nothing.
    async fn discard_all_but(&self, job: Option<&JobId>) -> Result<(), Fault> {
        self.git.discard_all_but(job).await
    }
}
