//! Running programs with a time limit, and programs that must not outlive us.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A cold image build or a package download on a slow, shared machine; more means that it hangs.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(900);

/// How much of a failed program's output goes into the error; the end is what tells.
const ERROR_TAIL_BYTES: usize = 4096;

/// Between two looks at a running program.
const POLL: Duration = Duration::from_millis(5);

/// Runs to the end and answers the output; an exit code other than 0 is an error with the end of what was printed.
///
/// # Errors
/// When it cannot start, fails, or takes longer than [`COMMAND_LIMIT`].
pub fn run(command: &mut Command) -> Result<Output> {
    let output = output(command, COMMAND_LIMIT)?;
    if !output.status.success() {
        let printed = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        bail!("{} ended with {}: {}", shown(command), output.status, tail(printed));
    }
    Ok(output)
}

/// [`run`], and the standard output as trimmed text.
///
/// # Errors
/// As [`run`].
pub fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&run(command)?.stdout).trim().to_owned())
}

/// Runs to the end whatever the exit code is; killed after `limit`. Standard input is empty unless the caller set one.
///
/// # Errors
/// When it cannot start or takes longer than `limit`.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = shown(command);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let status = match wait(&mut child, limit)? {
        Some(status) => status,
        None => {
            // It may have ended by itself in between; either way it is reaped next.
            child.kill().ok();
            child.wait()?;
            bail!("{name} did not end within {} s", limit.as_secs());
        }
    };
    let read = |reader: Option<thread::JoinHandle<Vec<u8>>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
    Ok(Output { status, stdout: read(stdout), stderr: read(stderr) })
}

/// Waits for the end, at most `limit`; `None` when it still runs.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Starts a server that the kernel kills when this process dies, however it dies. It gets its own process group, so that a
/// Ctrl-C on the terminal reaches us alone and the order of the end is ours. Output is appended to `log`.
///
/// The kernel ties the child to the thread that forked it, so all of them are forked by one thread that never ends:
/// otherwise a server started from a test's or a runtime's thread would die with that thread.
pub(crate) fn spawn_tied(program: &Path, args: &[String], log: &Path) -> Result<Child> {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (send, orders) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in orders {
                // Whoever asked may have been killed meanwhile; then nobody wants the child.
                if let Err(mpsc::SendError(Ok(mut child))) = answer.send(command.spawn()) {
                    child.kill().ok();
                }
            }
        });
        send
    });

    let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0);
    let (send, answer) = mpsc::channel();
    spawner.send((command, send)).ok().context("the thread that starts servers is gone")?;
    let child = answer.recv().context("the thread that starts servers is gone")?;
    child.with_context(|| format!("cannot start {} (is setpriv of util-linux there?)", program.display()))
}

/// Sends a signal; a process that is gone already is fine.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        kill_process(pid, signal).ok();
    }
}

/// When the process started, in clock ticks since boot: tells a process from a later one with the same id.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself hold spaces and parentheses; the start is field 22, the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The first of the absolute `candidates` that exists, else the program of that name on PATH.
pub fn find(name: &str, candidates: &[&str]) -> Option<std::path::PathBuf> {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    candidates
        .iter()
        .map(std::path::PathBuf::from)
        .chain(std::env::split_paths(&on_path).map(|dir| dir.join(name)))
        .find(|path| path.is_file())
}

/// The end of some output, as text.
pub(crate) fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(ERROR_TAIL_BYTES);
    String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
}

fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        // A read error ends the output early; the exit code still tells.
        from.read_to_end(&mut all).ok();
        all
    })
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}
