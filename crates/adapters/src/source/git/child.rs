//! Runs the git binary: no shell, an environment made from nothing, its own process group, and limits on everything.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use replank_core::fault::Fault;
use replank_core::ports::{Log, Stream};
use replank_exec::disk;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};

use super::refs::tame;

/// Where git and the shell-less helpers that it starts are looked for.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const READ_BUFFER: usize = 16 * 1024;
/// What is kept of a failed child's last words.
const TAIL: usize = 1_000;

/// One run of git.
pub(super) struct Run<'a> {
    pub(super) git: &'a Path,
    pub(super) args: &'a [&'a str],
    pub(super) cwd: &'a Path,
    /// An empty directory: home and template of the child.
    pub(super) home: &'a Path,
    /// Given by environment: neither on disk nor in argv.
    pub(super) config: &'a [(String, String)],
    /// Whole time of the run.
    pub(super) time: Duration,
    /// The directory that may not grow beyond so many bytes.
    pub(super) disk: Option<(&'a Path, u64)>,
    /// Keep up to so many bytes of standard output instead of logging them.
    pub(super) capture: Option<usize>,
}

/// How a run ended, short of not starting.
#[derive(Debug)]
pub(super) enum Ended {
    /// Exit code 0; captured output.
    Fine(Vec<u8>),
    /// Another exit code (`None`: killed by a signal), and the last words, fit to be shown.
    Failed {
        code: Option<i32>,
        tail: String,
    },
    TimedOut,
    DiskFull,
    /// More output than may be captured.
    TooMuch,
    /// Reading its output or waiting for it failed.
    Lost(io::Error),
}

/// Kills the child's whole group unless it was waited for: git's helpers must not outlive a cancelled future.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0
            && let Err(error) = kill_process_group(pid, Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(%error, "a git process group could not be killed");
        }
    }
}

impl Run<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(self.git);
        command.args(self.args).current_dir(self.cwd).env_clear();
        let home = self.home.as_os_str();
        let fixed: [(&str, &OsStr); 16] = [
            ("PATH", PATH.as_ref()),
            ("HOME", home),
            ("XDG_CONFIG_HOME", home),
            ("TMPDIR", home),
            ("GIT_TEMPLATE_DIR", home),
            // A directory that is no repository must not be taken for a part of one that lies around it.
            ("GIT_CEILING_DIRECTORIES", self.cwd.parent().unwrap_or(self.cwd).as_os_str()),
            ("LC_ALL", "C".as_ref()),
            ("GIT_CONFIG_NOSYSTEM", "1".as_ref()),
            ("GIT_CONFIG_SYSTEM", "/dev/null".as_ref()),
            ("GIT_CONFIG_GLOBAL", "/dev/null".as_ref()),
            ("GIT_ATTR_NOSYSTEM", "1".as_ref()),
            ("GIT_TERMINAL_PROMPT", "0".as_ref()),
            ("GIT_ASKPASS", "".as_ref()),
            ("GIT_LITERAL_PATHSPECS", "1".as_ref()),
            ("GIT_NO_REPLACE_OBJECTS", "1".as_ref()),
            ("GIT_OPTIONAL_LOCKS", "0".as_ref()),
        ];
        command.envs(fixed);
        command.env("GIT_CONFIG_COUNT", self.config.len().to_string());
        for (at, (key, value)) in self.config.iter().enumerate() {
            command.env(format!("GIT_CONFIG_KEY_{at}"), key).env(format!("GIT_CONFIG_VALUE_{at}"), value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
        command
    }

    /// Runs to the end or to a limit. Dropping the future kills the group.
    pub(super) async fn go(&self, log: &dyn Log) -> Result<Ended, Fault> {
        let mut child = self.command().spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                Fault::permanent(format!("{} cannot be run", self.git.display()))
                    .advice("install git 2.37 or later where Replank runs")
                    .because(e)
            }
            _ => Fault::transient("git could not be started").because(e),
        })?;
        let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
        let ended = tokio::select! {
            ended = tokio::time::timeout(self.time, self.follow(&mut child, log)) => ended.unwrap_or(Ended::TimedOut),
            () = self.outgrow() => Ended::DiskFull,
        };
        if matches!(ended, Ended::Fine(_) | Ended::Failed { .. }) {
            // Waited for and both pipes at their end: the number may belong to somebody else by now.
            group.0 = None;
        }
        drop(group);
        Ok(ended)
    }

    async fn follow(&self, child: &mut Child, log: &dyn Log) -> Ended {
        let mut captured = Vec::new();
        let mut tail = Vec::new();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let out = pump(stdout, |bytes| match self.capture {
            Some(limit) if captured.len() + bytes.len() > limit => false,
            Some(_) => {
                captured.extend_from_slice(bytes);
                true
            }
            None => {
                log.write(Stream::Stdout, bytes);
                true
            }
        });
        let err = pump(stderr, |bytes| {
            log.write(Stream::Stderr, bytes);
            tail.extend_from_slice(bytes);
            let over = tail.len().saturating_sub(TAIL);
            tail.drain(..over);
            true
        });
        match tokio::try_join!(out, err) {
            Ok((true, _)) => {}
            Ok((false, _)) => return Ended::TooMuch,
            Err(error) => return Ended::Lost(error),
        }
        match child.wait().await {
            Ok(status) if status.success() => Ended::Fine(captured),
            Ok(status) => Ended::Failed { code: status.code(), tail: last_line(&tail) },
            Err(error) => Ended::Lost(error),
        }
    }

    /// Returns when the watched directory is over its limit; never where none is watched.
    async fn outgrow(&self) {
        let Some((path, limit)) = self.disk else {
            return std::future::pending().await;
        };
        disk::outgrown(path, limit).await;
    }
}

/// Hands on everything that is read until the end; false where `take` wanted no more.
async fn pump<R: AsyncRead + Unpin>(pipe: Option<R>, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let Some(mut pipe) = pipe else {
        return Ok(true);
    };
    let mut buffer = vec![0; READ_BUFFER];
    loop {
        match pipe.read(&mut buffer).await? {
            0 => return Ok(true),
            n if !take(&buffer[..n]) => return Ok(false),
            _ => {}
        }
    }
}

fn last_line(tail: &[u8]) -> String {
    tail.trim_ascii_end().rsplit(|b| *b == b'\n').next().map(tame).unwrap_or_default()
}

/// A command line for the log: what was run, word by word.
pub(super) fn line(git: &Path, args: &[&str]) -> String {
    format!("$ {} {}\n", git.display(), args.join(" "))
}
