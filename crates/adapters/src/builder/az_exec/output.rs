//! What can be seen in the output of `az acr build`: steps, and time spent waiting for an agent. For people alone: nothing
//! is decided by it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use replank_core::ports::{Log, Progress, Stream};

/// Longest last words in a fault.
const WORDS_MAX: usize = 300;
const STEP_MAX: usize = 120;

/// Passes everything on, and keeps an eye on it.
pub(super) struct Watch<'a> {
    log: &'a dyn Log,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    waits_since: Option<Instant>,
    queued: Duration,
    last: String,
    /// The last complaint: what az itself says is on its standard error, beside how the queue is.
    complaint: String,
}

impl<'a> Watch<'a> {
    pub(super) fn new(log: &'a dyn Log) -> Self {
        Self { log, seen: Mutex::default() }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time spent waiting for an agent so far (lesson 29).
    pub(super) fn queued(&self) -> Duration {
        let seen = self.seen();
        seen.queued + seen.waits_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The last complaint, or where there is none the last line that says anything; masked. The two streams come by themselves, so
    /// that which of their lines is the very last is chance.
    pub(super) fn last_words(&self) -> String {
        let seen = self.seen();
        replank_core::mask::mask_text(if seen.complaint.is_empty() { &seen.last } else { &seen.complaint })
    }

    fn look(&self, stream: Stream, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        let step = {
            let mut seen = self.seen();
            let waits = line.contains("Waiting for an agent");
            match (waits, seen.waits_since) {
                (true, None) => seen.waits_since = Some(Instant::now()),
                (false, Some(since)) => {
                    seen.queued += since.elapsed();
                    seen.waits_since = None;
                }
                (true, Some(_)) | (false, None) => {}
            }
            seen.last = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MAX).collect();
            let chatters = waits || line.starts_with("Queued a build") || line.starts_with("WARNING:");
            if stream == Stream::Stderr && !chatters {
                seen.complaint = seen.last.clone();
            }
            if waits {
                Some(Progress { done: 0, total: 0, step: "waiting for an agent".to_owned() })
            } else {
                step(line)
            }
        };
        if let Some(step) = step {
            self.log.progress(step);
        }
    }
}

/// `Step 3/10 : RUN make`, as the classic builder prints it: two of ten are done.
fn step(line: &str) -> Option<Progress> {
    let (numbers, what) = line.strip_prefix("Step ")?.split_once(" : ")?;
    let (at, total) = numbers.split_once('/')?;
    let (at, total) = (at.parse::<u32>().ok()?, total.parse::<u32>().ok()?);
    ((1..=total).contains(&at)).then(|| Progress { done: at - 1, total, step: what.chars().take(STEP_MAX).collect() })
}

impl Log for Watch<'_> {
    /// The channel gives whole lines.
    fn write(&self, stream: Stream, bytes: &[u8]) {
        self.log.write(stream, bytes);
        self.look(stream, &String::from_utf8_lossy(bytes));
    }

    fn progress(&self, progress: Progress) {
        self.log.progress(progress);
    }
}

#[cfg(test)]
mod tests {
    use replank_core::ports::NoLog;

    use super::*;

    #[test]
    fn steps_are_read_and_nothing_else() {
        for (line, expect) in [
            ("Step 1/4 : FROM scratch", Some((0, 4, "FROM scratch"))),
            ("Step 4/4 : CMD [\"a\"]", Some((3, 4, "CMD [\"a\"]"))),
            ("Step 0/4 : x", None),
            ("Step 5/4 : x", None),
            ("Step a/b : x", None),
            ("Step 1/4", None),
            (" ---> abc", None),
        ] {
            let found = step(line).map(|p| (p.done, p.total, p.step));
            assert_eq!(found, expect.map(|(done, total, text)| (done, total, text.to_owned())), "{line}");
        }
    }

    #[test]
    fn waiting_is_counted_until_something_else_is_said() {
        let watch = Watch::new(&NoLog);
        watch.write(Stream::Stderr, b"Queued a build with ID: cf1\n");
        assert_eq!(watch.queued(), Duration::ZERO);
        watch.write(Stream::Stderr, b"Waiting for an agent...\n");
        watch.write(Stream::Stderr, b"\n");
        assert!(watch.seen().waits_since.is_some());
        watch.write(Stream::Stdout, b"Step 1/1 : FROM scratch\n");
        let queued = watch.queued();
        assert!(watch.seen().waits_since.is_none() && queued > Duration::ZERO);
        assert_eq!(watch.queued(), queued);
        watch.write(Stream::Stderr, b"failed: password=hunter2secret\n");
        assert!(watch.last_words().contains("failed") && !watch.last_words().contains("hunter2secret"));
    }

    #[test]
    fn the_last_words_do_not_depend_on_which_stream_is_faster() {
        let words = |lines: &[(Stream, &str)]| {
            let watch = Watch::new(&NoLog);
            lines.iter().for_each(|(stream, line)| watch.write(*stream, line.as_bytes()));
            watch.last_words()
        };
        let (step, complaint) = ((Stream::Stdout, "Step 1/2 : RUN make"), (Stream::Stderr, "ERROR: the step failed"));
        assert_eq!(words(&[step, complaint]), "ERROR: the step failed");
        assert_eq!(words(&[complaint, step]), "ERROR: the step failed");
        let chatter = (Stream::Stderr, "Waiting for an agent...");
        assert_eq!(
            words(&[step, chatter, (Stream::Stdout, "Run ID: cf1 was successful")]),
            "Run ID: cf1 was successful"
        );
    }
}
