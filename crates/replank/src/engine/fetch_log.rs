//! What a fetch says: masked, into the controller's log, and its last lines into the fault when it fails.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use replank_core::fault::{Class, Fault};
use replank_core::mask::Masker;
use replank_core::ports::{Log, Progress, Stream};
use replank_core::words::JobId;

/// Lines of one fetch that go to the log as it usually is; a remote may say as much as it likes, and the rest is for those who
/// ask for more.
const SHOWN_MAX: usize = 200;
/// Lines, and characters of each, that a fault takes along: enough for what git says before it gives up.
const TAIL_LINES: usize = 5;
const TAIL_CHARS: usize = 200;

/// The log of one fetch. Nothing of it is stored: a build log's place is a build's, and a fetch that went well is over.
#[derive(Debug)]
pub(super) struct FetchLog {
    job: JobId,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stdout: Masker,
    stderr: Masker,
    said: usize,
    tail: VecDeque<String>,
}

impl State {
    fn take(&mut self, job: &JobId, lines: &[u8]) {
        for line in String::from_utf8_lossy(lines).lines().filter(|line| !line.trim().is_empty()) {
            self.said += 1;
            if self.said <= SHOWN_MAX {
                tracing::info!(%job, "fetch: {line}");
            } else {
                tracing::debug!(%job, "fetch: {line}");
            }
            if self.tail.len() == TAIL_LINES {
                self.tail.pop_front();
            }
            self.tail.push_back(line.chars().take(TAIL_CHARS).collect());
        }
    }
}

impl FetchLog {
    pub(super) fn new(job: &JobId, secrets: &[String]) -> Self {
        let stdout = Masker::new(secrets);
        let stderr = stdout.fresh();
        Self { job: job.clone(), state: Mutex::new(State { stdout, stderr, said: 0, tail: VecDeque::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves whole lines behind; the log goes on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what has no line end yet, too.
    pub(super) fn finish(&self) {
        let mut state = self.state();
        let rest = [state.stdout.finish(), state.stderr.finish()].concat();
        state.take(&self.job, &rest);
    }

    /// The fault with the log's last lines as its last cause: the controller whose log has them all may be gone when somebody
    /// asks. A fault that only tells of somebody who was faster needs none.
    pub(super) fn explain(&self, fault: Fault) -> Fault {
        self.finish();
        let Fault { class, what, advice, .. } = &fault;
        let whole = fault.chain();
        // What a cause says already is not said again.
        let tail: Vec<String> = self.state().tail.iter().filter(|line| !whole.contains(*line)).cloned().collect();
        if tail.is_empty() || *class == Class::Conflict {
            return fault;
        }
        let causes = whole.strip_prefix(what.as_str()).unwrap_or_default().trim_start_matches(": ");
        let said = format!("the fetch said last: {}", tail.join(" | "));
        let cause = if causes.is_empty() { said } else { format!("{causes}: {said}") };
        Fault::new(*class, what.clone()).advice(advice.clone()).because(cause)
    }
}

impl Log for FetchLog {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        let mut state = self.state();
        let lines = match stream {
            Stream::Stdout => state.stdout.push(bytes),
            Stream::Stderr => state.stderr.push(bytes),
        };
        state.take(&self.job, &lines);
    }

    fn progress(&self, _: Progress) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "hunter2-of-the-remote";

    fn log() -> FetchLog {
        FetchLog::new(&JobId::new("job-1").expect("an id"), &[SECRET.to_owned()])
    }

    #[test]
    fn a_failed_fetch_takes_its_last_lines_along_and_no_secret() {
        let log = log();
        for n in 0..1_000 {
            log.write(Stream::Stderr, format!("remote: line {n}\n").as_bytes());
        }
        // In pieces, as pipes give it, and without a line end.
        log.write(Stream::Stderr, b"fatal: the password hunter2-of");
        log.write(Stream::Stdout, b"$ git clone\n");
        log.write(Stream::Stderr, b"-the-remote is wrong\x1b[2J");
        let fault = Fault::transient("git clone failed").advice("look").because("git says: remote: line 998");
        let told = log.explain(fault).told();
        assert_eq!((told.class, told.advice.as_str()), (Class::Transient, "look"));
        let expect = "git clone failed: git says: remote: line 998: the fetch said last: remote: line 997 | \
                      remote: line 999 | $ git clone | fatal: the password *** is wrong";
        assert!(told.what.starts_with(expect), "{}", told.what);
        assert!(!told.what.contains(SECRET) && !told.what.contains('\x1b'), "{}", told.what);
    }

    #[test]
    fn a_fault_without_a_log_and_a_faster_fetch_stay_as_they_are() {
        let fault = || Fault::permanent("the tag was moved").because("a cause");
        assert_eq!(log().explain(fault()).chain(), fault().chain());
        let log = log();
        log.write(Stream::Stdout, b"$ git clone\n");
        let faster = || Fault::conflict("another fetch was faster");
        assert_eq!(log.explain(faster()).chain(), faster().chain());
        // Without a cause of its own, the log is the cause; a line that is too long is cut.
        log.write(Stream::Stderr, format!("{}\n", "x".repeat(10_000)).as_bytes());
        let chain = log.explain(Fault::transient("git was lost")).chain();
        assert_eq!(chain, format!("git was lost: the fetch said last: $ git clone | {}", "x".repeat(TAIL_CHARS)));
    }
}
