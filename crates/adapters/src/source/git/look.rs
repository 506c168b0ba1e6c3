//! A look into one commit without a job: a bare repository of its own, filled with as little as the server lets be asked for,
//! read by git's plumbing, and removed at the end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use replank_core::fault::{Fault, Told};
use replank_core::ports::{COMMITS_MAX, CommitSeen, CommitsSeen, FileSeen, NoLog, Peeked};
use replank_core::record::Target;
use replank_core::words::{CommitSha, JobId, Millis};
use rustix::fs::{FlockOperation, flock};

use super::child::{Ended, Run};
use super::clone::{Fetch, disk, make, remove};
use super::tree::check_relative;
use super::{GitSource, tame};

/// Where looks are made, below the work directory. No job has this name, so that nobody takes it for a job's tree.
const PLACE: &str = "@look";
/// Directories of looks that may lie there at a time: those of other processes, and those that dead ones left.
const PLACES_MAX: u32 = 1_000;
/// One line of `ls-tree`.
const ENTRY_MAX: usize = 16 * 1024;
/// What the commits may say in all. They are cut much shorter; more than this is no history for people.
const LOG_MAX: usize = 1024 * 1024;
/// Longest author and subject, in characters, that are handed on.
const AUTHOR_MAX: usize = 100;
const SUBJECT_MAX: usize = 300;
/// Between the fields of a commit. Where somebody's name has it, that name is cut there.
const FIELD: char = '\u{1f}';

/// A directory of one look, which goes with its owner. The lock tells other processes that it is in use.
struct Place {
    path: PathBuf,
    _lock: File,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(error = %error.chain(), "the directory of a look stays behind until the next one");
        }
    }
}

impl Place {
    /// Makes one, and removes what killed looks have left.
    fn take(work_dir: &Path) -> Result<Self, Fault> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = work_dir.join(PLACE);
        make(&parent)?;
        let failed = |error: io::Error| disk("a directory for a look cannot be made", &parent, error);
        // Held while a directory is made and locked, so that nobody sweeps it away in between.
        let gate = File::open(&parent).map_err(failed)?;
        flock(&gate, FlockOperation::LockExclusive).map_err(|e| failed(e.into()))?;
        sweep(&parent)?;
        for _ in 0..PLACES_MAX {
            // Two processes in two containers may have the same number.
            let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = parent.join(name);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    let lock = File::open(&path).map_err(failed)?;
                    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| failed(e.into()))?;
                    return Ok(Self { path, _lock: lock });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(Fault::transient(format!("{PLACES_MAX} looks at the remote are under way")).advice("look again later"))
    }
}

fn sweep(parent: &Path) -> Result<(), Fault> {
    let failed = |error| disk("what earlier looks have left cannot be looked for", parent, error);
    for entry in fs::read_dir(parent).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // One that has just gone was its owner's to remove.
        let Ok(lock) = File::open(&path) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            remove(&path)?;
        }
    }
    Ok(())
}

impl GitSource {
    /// The port's look.
    pub(in crate::source) async fn look(
        &self,
        target: &Target,
        since: Option<&CommitSha>,
        path: &str,
        max: usize,
    ) -> Result<Peeked, Fault> {
        check_relative(path)?;
        let work_dir = self.work_dir.clone();
        let place = tokio::task::spawn_blocking(move || Place::take(&work_dir)).await;
        let place = place.unwrap_or_else(|e| Err(Fault::transient("a look could not be begun").because(e)))?;
        let home = place.path.join("home");
        make(&home)?;
        self.check_git(&home).await?;
        let job = JobId::new("look").map_err(|bad| Fault::permanent("a look cannot be named").because(bad))?;
        let fetch = Fetch { source: self, job: &job, target, log: &NoLog };
        fetch.check_target()?;
        let repo = place.path.join("repo.git");
        let mut config = fetch.network_config(&repo, &self.addresses().await?)?;
        for (key, value) in [("remote.origin.url", self.remote.shown()), ("remote.origin.promisor", "true")] {
            config.push((key.to_owned(), value.to_owned()));
        }
        let look = Look { source: self, place: &place.path, home: &home, repo: &repo, config: &config };
        look.run(&["init", "--quiet", "--bare", "repo.git"], &place.path, 0).await?;
        let sha = target.commit.as_str();
        // A server that knows no filters sends the files of this one commit too, which then is what a clone costs.
        look.fetch(&["--depth", "1", "--filter=blob:none"], sha).await?;
        let file = look.file(sha, path, max).await?;
        let commits = match since {
            None => Ok(CommitsSeen::default()),
            Some(since) => look.commits(sha, since).await.map_err(|fault| fault.told().sentence()),
        };
        Ok(Peeked { file, commits })
    }
}

struct Look<'a> {
    source: &'a GitSource,
    place: &'a Path,
    home: &'a Path,
    repo: &'a Path,
    config: &'a [(String, String)],
}

impl Look<'_> {
    async fn fetch(&self, how: &[&str], sha: &str) -> Result<(), Fault> {
        let args = [&["fetch", "--quiet", "--no-tags", "--no-write-fetch-head"], how, &["origin", sha]].concat();
        self.run(&args, self.repo, 0).await.map(drop)
    }

    /// What the commit has under this path.
    async fn file(&self, sha: &str, path: &str, max: usize) -> Result<FileSeen, Fault> {
        let listed = self.run(&["ls-tree", "-z", sha, "--", path], self.repo, ENTRY_MAX).await?;
        let entry = String::from_utf8_lossy(&listed);
        let mut words = entry.split(|c: char| c.is_ascii_whitespace());
        let (mode, object) = match (words.next(), words.next(), words.next()) {
            (Some(mode), Some("blob"), Some(object)) => (mode, object),
            (Some(""), None, None) | (None, ..) => return Ok(FileSeen::Absent),
            _ => {
                let what = format!("{path:?} is not a regular file");
                return Ok(FileSeen::Unfit(Told::permanent(what, "put a regular file there")));
            }
        };
        if mode == "120000" {
            return Ok(FileSeen::Unknown(format!(
                "{path:?} is a symbolic link, which is followed in the fetched tree only"
            )));
        }
        match self.go(&["cat-file", "blob", object], self.repo, max).await? {
            Ended::Fine(bytes) => Ok(FileSeen::Holds(bytes)),
            Ended::TooMuch => {
                let what = format!("{path:?} is larger than {max} bytes");
                Ok(FileSeen::Unfit(Told::permanent(what, "make the file smaller")))
            }
            ended @ (Ended::Failed { .. } | Ended::TimedOut | Ended::DiskFull | Ended::Lost(_)) => {
                Err(self.fault("cat-file", ended))
            }
        }
    }

    async fn commits(&self, sha: &str, since: &CommitSha) -> Result<CommitsSeen, Fault> {
        // Where `since` is the last of so many, its parents must not look like commits after it: one more than is shown.
        let depth = (COMMITS_MAX + 1).to_string();
        self.fetch(&["--depth", &depth, "--filter=tree:0"], sha).await?;
        // Whether it was met is asked of the list: to ask for the object would fetch it.
        let met = self.log(&[sha]).await?.iter().any(|commit| commit.id == *since);
        let range = format!("{since}..{sha}");
        let mut commits = if met { self.log(&[&range]).await? } else { self.log(&[sha]).await? };
        let more = !met || commits.len() > COMMITS_MAX;
        commits.truncate(COMMITS_MAX);
        Ok(CommitsSeen { commits, more })
    }

    async fn log(&self, what: &[&str]) -> Result<Vec<CommitSeen>, Fault> {
        let count = format!("--max-count={}", COMMITS_MAX + 1);
        let format = "--format=%H%x1f%ct%x1f%an%x1f%s";
        let how = ["log", "-z", "--no-mailmap", "--no-show-signature", "--encoding=UTF-8", format, &count];
        let out = self.run(&[&how[..], what].concat(), self.repo, LOG_MAX).await?;
        Ok(String::from_utf8_lossy(&out).split('\0').filter_map(commit).collect())
    }

    /// Runs git to a good end and gives up to `capture` bytes of what it prints.
    async fn run(&self, args: &[&str], cwd: &Path, capture: usize) -> Result<Vec<u8>, Fault> {
        match self.go(args, cwd, capture).await? {
            Ended::Fine(out) => Ok(out),
            ended @ (Ended::Failed { .. } | Ended::TimedOut | Ended::DiskFull | Ended::TooMuch | Ended::Lost(_)) => {
                Err(self.fault(args.first().copied().unwrap_or("git"), ended))
            }
        }
    }

    /// Every one of them may speak with the remote: what a filter left out is fetched by whoever reads it.
    async fn go(&self, args: &[&str], cwd: &Path, capture: usize) -> Result<Ended, Fault> {
        let limits = &self.source.limits;
        let run = Run {
            git: &self.source.git,
            args,
            cwd,
            home: self.home,
            config: self.config,
            time: limits.look_time,
            disk: Some((self.place, limits.look_bytes)),
            capture: Some(capture),
        };
        run.go(&NoLog).await
    }

    fn fault(&self, verb: &str, ended: Ended) -> Fault {
        let limits = &self.source.limits;
        let what = |how: &str| format!("git {verb} {how} in a look at the remote");
        match ended {
            Ended::Failed { tail, .. } => Fault::transient(what("failed")).because(format!("git says: {tail}")),
            Ended::TimedOut => Fault::transient(what(&format!("took longer than {}", seconds(limits.look_time)))),
            Ended::DiskFull => {
                Fault::transient(what(&format!("took more than {} MiB on disk", limits.look_bytes / 1_048_576)))
            }
            Ended::Fine(_) | Ended::TooMuch => Fault::transient(what("printed too much")),
            Ended::Lost(error) => Fault::transient(what("was lost")).because(error),
        }
    }
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs())
}

fn commit(line: &str) -> Option<CommitSeen> {
    let mut fields = line.splitn(4, FIELD);
    let (id, at, author) = (fields.next()?, fields.next()?, fields.next()?);
    let at = at.parse::<i64>().ok()?.checked_mul(1_000)?;
    let cut = |text: &str, max: usize| -> String { text.chars().take(max).collect() };
    Some(CommitSeen {
        id: CommitSha::new(id).ok()?,
        author: cut(author, AUTHOR_MAX),
        at: Millis(at),
        subject: cut(fields.next().unwrap_or_default(), SUBJECT_MAX),
    })
}

/// As a fault tells it: nothing of a release's words steers a terminal.
pub(in crate::source) fn not_here(fault: &Fault) -> Fault {
    Fault::permanent(tame(fault.chain().as_bytes())).advice(
        "install git 2.37 or later where Replank runs, or leave it to the fetch: the exec channel reads no file",
    )
}
