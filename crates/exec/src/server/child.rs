//! One program: started without a shell in a process group of its own, read as fast as its reader takes it, and ended together
//! with everything that it started.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{ChildStdin, Command};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::audit;
use crate::disk;
use crate::protocol::{EXIT_TIMED_OUT, EXIT_UNREACHED, Stream};

/// Between SIGTERM and SIGKILL (contract §5).
const GRACE: Duration = Duration::from_secs(5);
/// How long what a program has left behind may hold its outputs open once the program itself has ended.
const LINGER: Duration = Duration::from_secs(2);
/// How long a client may take for what is left when the program was killed.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What a program that filled its directory is said to have said last.
const FULL: &str = "fatal: the clone takes more of the disk than EXEC_CLONE_MAX_BYTES allows\n";
/// As much as a pipe holds: one read empties it.
const BUFFER: usize = 64 * 1024;
/// Who was killed is gone within milliseconds, unless a disk holds it up.
const DYING: Duration = Duration::from_secs(1);
/// How often it is looked whether those who were told to end have ended; only where some are left and say nothing.
const RECHECK: Duration = Duration::from_millis(20);

/// What is to be run. The program has been judged before.
#[derive(Debug)]
pub struct Order {
    pub argv: Vec<String>,
    pub directory: PathBuf,
    pub environment: BTreeMap<OsString, OsString>,
    /// Given to the program's standard input, which is empty otherwise.
    pub input: Option<Vec<u8>>,
    pub timeout: Duration,
    /// A directory that may not take more than so many bytes of the disk.
    pub room: Option<(PathBuf, u64)>,
}

/// Who takes the output.
pub trait Sink {
    /// Takes bytes, as slowly as it likes: the program waits meanwhile. False when nobody wants more.
    fn take(&mut self, stream: Stream, bytes: &[u8]) -> impl Future<Output = bool> + Send;
    /// Ready when nobody wants more.
    fn gone(&mut self) -> impl Future<Output = ()> + Send;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// As a shell says it: 128 and the number of a signal; 124 when the time was over.
    pub exit_code: i32,
    pub timed_out: bool,
    /// The client went away, and the program was killed.
    pub client_gone: bool,
    pub took: Duration,
}

impl Ended {
    /// As answers and the audit trail say it.
    #[must_use]
    pub fn duration_ms(&self) -> u64 {
        u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX)
    }
}

/// The program and everything that it started, unless they leave the group on purpose. Dropped, they are killed.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        // A group that is gone is what is wanted.
        if let Some(pid) = self.0
            && let Err(error) = kill_process_group(pid, signal)
            && error != rustix::io::Errno::SRCH
        {
            audit::event("exec_error", json!({"error": format!("a process group could not be signalled: {error}")}));
        }
    }

    /// Asked once the program itself was waited for: while somebody else is left, the group's number belongs to nobody new.
    /// A group that is empty is let go, so that its number is never signalled again.
    fn is_empty(&mut self) -> bool {
        if let Some(pid) = self.0
            && (test_kill_process_group(pid) == Err(rustix::io::Errno::SRCH) || !lives(pid))
        {
            // As a container's first process we inherit those whose parent has ended; unless somebody waits for them, they
            // stay as dead entries for ever. Elsewhere there is nobody to wait for, which is an error of no interest.
            while let Ok(Some(_)) = waitpgid(pid, WaitOptions::NOHANG) {}
            self.0 = None;
        }
        self.0.is_none()
    }

    /// Waits until nobody is left, and no longer than until `end`.
    async fn empties(&mut self, end: Instant) {
        while !self.is_empty() && Instant::now() < end {
            sleep(RECHECK).await;
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// When the program's time is over, and what has been done about it.
struct Limit<'a> {
    sleep: Pin<&'a mut Sleep>,
    /// The end of the time that the request was given.
    end: Instant,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    InTime,
    /// The program has ended in time, and somebody whom it started still holds its outputs.
    Lingering,
    Asked,
    Killed,
    Over,
}

impl Limit<'_> {
    /// The next step towards the end, taken when `sleep` is ready. True when it is the first one: the time is over.
    fn step(&mut self, group: &Group) -> bool {
        let is_first = self.stage == Stage::InTime;
        let pause = match self.stage {
            Stage::InTime => {
                group.signal(Signal::TERM);
                self.stage = Stage::Asked;
                GRACE
            }
            Stage::Lingering | Stage::Asked => {
                group.signal(Signal::KILL);
                self.stage = Stage::Killed;
                LAST_WORDS
            }
            Stage::Killed | Stage::Over => {
                self.stage = Stage::Over;
                LAST_WORDS
            }
        };
        self.sleep.as_mut().reset(Instant::now() + pause);
        is_first
    }

    /// The time is over now, whatever is left of it.
    fn stop(&mut self) {
        if self.stage == Stage::InTime {
            self.sleep.as_mut().reset(Instant::now());
        }
    }

    /// The program itself has ended: what counts from now on is how long others hold its outputs.
    fn linger(&mut self) {
        if self.stage == Stage::InTime {
            self.stage = Stage::Lingering;
            self.sleep.as_mut().reset(Instant::now() + LINGER);
        }
    }

    /// Hands bytes on. A client that takes its time does not stop the request's clock, and yet what it takes is not counted
    /// against those who linger: otherwise a slow client would lose the end of what the program said.
    async fn take(&mut self, group: &Group, sink: &mut impl Sink, stream: Stream, bytes: &[u8]) -> Taken {
        let left = self.sleep.deadline().saturating_duration_since(Instant::now());
        let is_lingering = self.stage == Stage::Lingering;
        if is_lingering {
            self.sleep.as_mut().reset(self.end.max(Instant::now() + LINGER));
        }
        let mut taken = Taken { is_wanted: false, timed_out: false };
        let mut taking = pin!(sink.take(stream, bytes));
        loop {
            tokio::select! {
                is_wanted = &mut taking => {
                    taken.is_wanted = is_wanted;
                    break;
                }
                () = self.sleep.as_mut() => {
                    taken.timed_out |= self.step(group);
                    if self.stage == Stage::Over {
                        break;
                    }
                }
            }
        }
        if is_lingering && self.stage == Stage::Lingering {
            self.sleep.as_mut().reset(Instant::now() + left);
        }
        taken
    }
}

struct Taken {
    is_wanted: bool,
    timed_out: bool,
}

/// Runs a program to its end, its time-out, or its client's departure. Whatever it has started ends with it. Dropping the
/// future kills the whole group.
///
/// # Errors
/// When the program cannot be started.
pub async fn run(order: Order, sink: &mut (impl Sink + Send)) -> io::Result<Ended> {
    let begun = Instant::now();
    let (program, arguments) = order.argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&order.directory).env_clear().envs(&order.environment);
    command.stdin(if order.input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));

    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out_buffer, mut err_buffer) = (vec![0; BUFFER], vec![0; BUFFER]);
    let mut feeding = pin!(feed(child.stdin.take(), order.input));
    let mut is_fed = false;
    let end = begun + order.timeout;
    let mut limit = Limit { sleep: pin!(sleep_until(end)), end, stage: Stage::InTime };
    let mut status: Option<ExitStatus> = None;
    let (mut is_gone, mut timed_out, mut is_full) = (false, false, false);
    let mut outgrown = pin!(outgrown(order.room.as_ref()));

    while (status.is_none() || stdout.is_some() || stderr.is_some()) && limit.stage != Stage::Over {
        let (stream, count) = tokio::select! {
            count = read(stdout.as_mut(), &mut out_buffer) => (Stream::Stdout, count?),
            count = read(stderr.as_mut(), &mut err_buffer) => (Stream::Stderr, count?),
            ended = child.wait(), if status.is_none() => {
                status = Some(ended?);
                limit.linger();
                continue;
            }
            () = &mut feeding, if !is_fed => {
                is_fed = true;
                continue;
            }
            () = sink.gone() => {
                is_gone = true;
                break;
            }
            () = &mut outgrown, if !is_full => {
                is_full = true;
                limit.stop();
                continue;
            }
            () = limit.sleep.as_mut() => {
                timed_out |= limit.step(&group);
                continue;
            }
        };
        if count == 0 {
            match stream {
                Stream::Stdout => stdout = None,
                Stream::Stderr => stderr = None,
            }
            continue;
        }
        let bytes = match stream {
            Stream::Stdout => &out_buffer[..count],
            Stream::Stderr => &err_buffer[..count],
        };
        let taken = limit.take(&group, sink, stream, bytes).await;
        timed_out |= taken.timed_out;
        if !taken.is_wanted {
            is_gone = true;
            break;
        }
    }
    if timed_out && !is_gone && limit.stage == Stage::Asked {
        // The program heard SIGTERM. Those who have not, and say nothing, have the rest of their grace.
        tokio::select! {
            () = group.empties(limit.sleep.deadline()) => {}
            () = sink.gone() => is_gone = true,
        }
    }
    let status = match status {
        Some(status) => status,
        None => {
            group.signal(Signal::KILL);
            child.wait().await?
        }
    };
    if !group.is_empty() {
        group.signal(Signal::KILL);
        // Their directory is removed next, and who still writes there would keep it from going.
        group.empties(Instant::now() + DYING).await;
    }
    // Stopped as if its time were over, so that it could take away what it had begun; and yet it is another reason.
    if is_full && timed_out && !is_gone {
        timed_out = false;
        is_gone = !sink.take(Stream::Stderr, FULL.as_bytes()).await;
        let took = begun.elapsed();
        return Ok(Ended { exit_code: EXIT_UNREACHED, timed_out, client_gone: is_gone, took });
    }
    Ok(Ended {
        exit_code: if timed_out { EXIT_TIMED_OUT } else { code(status) },
        timed_out,
        client_gone: is_gone,
        took: begun.elapsed(),
    })
}

/// Whether somebody in the group is more than a dead entry, which first processes of some containers never take away. Looked
/// at only where the group has members.
fn lives(group: Pid) -> bool {
    // Where nothing can be read, nobody can be said to be dead.
    let Ok(all) = std::fs::read_dir("/proc") else { return true };
    all.flatten().filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()).any(|entry| {
        // `pid (name) state parent group ...`, and the name may hold anything. Who ends meanwhile cannot be read.
        let stat = std::fs::read(entry.path().join("stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
        let (state, number) = (fields.next(), fields.nth(1));
        state != Some("Z") && number.and_then(|number| number.parse().ok()) == Some(group.as_raw_nonzero().get())
    })
}

/// Never ready where nothing is watched.
async fn outgrown(room: Option<&(PathBuf, u64)>) {
    match room {
        Some((path, limit)) => disk::outgrown(path, *limit).await,
        None => std::future::pending().await,
    }
}

/// Writes the input beside everything else: a program may answer before it has read it all, or never read it.
async fn feed(stdin: Option<ChildStdin>, input: Option<Vec<u8>>) {
    if let (Some(mut stdin), Some(input)) = (stdin, input) {
        // A program that closes its input early has had enough.
        let _enough = stdin.write_all(&input).await;
    }
}

/// Never ready where there is nothing to read from any more.
async fn read(from: Option<&mut (impl AsyncRead + Unpin)>, into: &mut [u8]) -> io::Result<usize> {
    match from {
        Some(from) => from.read(into).await,
        None => std::future::pending().await,
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}
