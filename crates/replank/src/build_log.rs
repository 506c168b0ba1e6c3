//! One build's log on its way from the builder to the store: masked at once, batched, kept while the store is down.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replank_core::mask::{Masker, mask_text_with};
use replank_core::ports::{Clock, Log, LogError, LogId, LogStore, LogWriter, Progress, Stream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};

/// Contract §4: flushed at 64 KiB …
const FLUSH_BYTES: usize = 64 * 1024;
/// … or 2 s. A local file takes a batch in milliseconds, and a line is to be on the page within a quarter of a second.
const FLUSH_AFTER: Duration = Duration::from_millis(100);
/// Contract §4: at most 3 MiB per append.
const APPEND_MAX: usize = 3 * 1024 * 1024;
/// Contract §4: up to 16 MiB are held per log while the store is down.
const HELD_MAX: usize = 16 * 1024 * 1024;
/// A log beyond this no longer follows the build: a build that prints without end must not fill the disk.
const STORED_MAX: u64 = 64 * 1024 * 1024;
/// What is kept of the end of such a log.
const TAIL_MAX: usize = 1024 * 1024;
/// Bytes masked under one lock, so that the task that stores is never kept waiting long.
const PIECE: usize = 32 * 1024;
/// A line that could be the beginning of a wrapped secret is shown after this much silence.
const IDLE_AFTER: Duration = Duration::from_millis(500);
/// Waits between attempts on a store that is down.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long the end of a build waits for a store that is down; the job does not hang on its log.
const FINISH_MAX: Duration = Duration::from_secs(10);

/// How a log ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ended {
    /// Everything that was not dropped is stored, and the log is closed.
    pub complete: bool,
    /// Another attempt took the log over.
    pub fenced: bool,
    pub dropped_lines: u64,
    pub dropped_bytes: u64,
}

/// Which log, and how its attempt begins.
#[derive(Debug, Clone)]
pub struct Begin {
    pub id: LogId,
    pub attempt: u32,
    /// The operation key.
    pub key: String,
    /// The exact command or request; masked here.
    pub request: String,
}

/// The limits, apart so that a test can reach them.
#[derive(Debug, Clone, Copy)]
struct Limits {
    held: usize,
    stored: u64,
    tail: usize,
    finish: Duration,
}

/// Masked whole lines that wait for the store.
#[derive(Debug, Default)]
struct Held {
    blocks: VecDeque<Vec<u8>>,
    bytes: usize,
    limit: usize,
    /// Dropped since the last marker, and in all.
    gap: (u64, u64),
    dropped: (u64, u64),
}

impl Held {
    fn add(&mut self, block: Vec<u8>) {
        if block.is_empty() {
            return;
        }
        self.bytes += block.len();
        self.blocks.push_back(block);
        self.shrink();
    }

    /// The oldest go first: what a failed build says last is what its reader needs.
    fn shrink(&mut self) {
        while self.bytes > self.limit && self.blocks.len() > 1 {
            let Some(old) = self.blocks.pop_front() else { break };
            self.bytes -= old.len();
            let (lines, bytes) = (old.iter().filter(|b| **b == b'\n').count() as u64, old.len() as u64);
            self.gap = (self.gap.0 + lines, self.gap.1 + bytes);
            self.dropped = (self.dropped.0 + lines, self.dropped.1 + bytes);
        }
    }

    /// The next append: whole lines, and before them what is missing.
    fn batch(&mut self) -> Vec<u8> {
        let mut batch = Vec::new();
        if self.gap != (0, 0) {
            let (lines, bytes) = std::mem::take(&mut self.gap);
            batch = format!(
                "--- {lines} lines ({bytes} bytes) are missing here: the log store did not take them in time\n"
            )
            .into_bytes();
        }
        while let Some(block) = self.blocks.front() {
            if !batch.is_empty() && batch.len() + block.len() > APPEND_MAX {
                break;
            }
            self.bytes -= block.len();
            batch.extend(self.blocks.pop_front().unwrap_or_default());
        }
        batch
    }
}

#[derive(Debug)]
struct State {
    stdout: Masker,
    stderr: Masker,
    held: Held,
    last_write: Instant,
    done: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to store, or the end has come.
    news: Notify,
    names: Masker,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves whole lines behind; the log goes on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log of one attempt at one build. Dropped without [`BuildLog::finish`] it still stores what it holds, and closes.
pub struct BuildLog {
    shared: Arc<Shared>,
    progress: watch::Sender<Option<Progress>>,
    task: Option<JoinHandle<Ended>>,
}

impl fmt::Debug for BuildLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuildLog").finish_non_exhaustive()
    }
}

impl BuildLog {
    /// Begins at once and never fails: while the store is down, lines are held. `secrets` never appear in the log.
    pub fn begin(store: Arc<dyn LogStore>, clock: &dyn Clock, begin: &Begin, secrets: &[String]) -> Self {
        // The batch on its way counts too.
        let limits = Limits { held: HELD_MAX - APPEND_MAX, stored: STORED_MAX, tail: TAIL_MAX, finish: FINISH_MAX };
        Self::with(store, clock, begin, secrets, limits)
    }

    fn with(store: Arc<dyn LogStore>, clock: &dyn Clock, begin: &Begin, secrets: &[String], limits: Limits) -> Self {
        let masker = Masker::new(secrets);
        let marker = format!("--- attempt {}, key {}, {}\n", begin.attempt, begin.key, clock.now().rfc3339());
        let mut held = Held { limit: limits.held, ..Held::default() };
        // One line, whatever is in it: it is to be copied as a command.
        let request = begin.request.replace(['\r', '\n'], " ");
        // A builder that knows its exact request only later writes it itself, as its first line.
        if !request.is_empty() {
            held.add(format!("{}\n", mask_text_with(&masker, &request)).into_bytes());
        }
        let state =
            State { stdout: masker.fresh(), stderr: masker.fresh(), held, last_write: Instant::now(), done: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), news: Notify::new(), names: masker });
        let writer = Flusher {
            shared: shared.clone(),
            store,
            id: begin.id.clone(),
            marker: marker.into_bytes(),
            writer: None,
            batch: Vec::new(),
            limits,
        };
        let task = tokio::spawn(writer.run());
        Self { shared, progress: watch::Sender::new(None), task: Some(task) }
    }

    /// The newest step; only the newest.
    pub fn progress_of(&self) -> watch::Receiver<Option<Progress>> {
        self.progress.subscribe()
    }

    /// Stores the rest and closes the log. Returns after ten seconds at the latest.
    pub async fn finish(mut self) -> Ended {
        self.end();
        match self.task.take() {
            Some(task) => task.await.unwrap_or_default(),
            None => Ended::default(),
        }
    }

    fn end(&self) {
        let mut state = self.shared.state();
        if !state.done {
            state.done = true;
            let rest = [state.stdout.finish(), state.stderr.finish()].concat();
            state.held.add(rest);
            self.shared.news.notify_one();
        }
    }
}

impl Drop for BuildLog {
    fn drop(&mut self) {
        self.end();
    }
}

impl Log for BuildLog {
    /// Masks on the caller's thread, which is what slows a builder down that prints faster than can be masked; never
    /// waits for the store.
    fn write(&self, stream: Stream, bytes: &[u8]) {
        for piece in bytes.chunks(PIECE) {
            let mut state = self.shared.state();
            state.last_write = Instant::now();
            let lines = match stream {
                Stream::Stdout => state.stdout.push(piece),
                Stream::Stderr => state.stderr.push(piece),
            };
            state.held.add(lines);
        }
        self.shared.news.notify_one();
    }

    fn progress(&self, mut progress: Progress) {
        progress.step = mask_text_with(&self.shared.names, &progress.step);
        self.progress.send_replace(Some(progress));
    }
}

/// The task that stores. Only it touches the store.
struct Flusher {
    shared: Arc<Shared>,
    store: Arc<dyn LogStore>,
    id: LogId,
    marker: Vec<u8>,
    writer: Option<LogWriter>,
    /// Taken from what is held and not yet known to be stored.
    batch: Vec<u8>,
    limits: Limits,
}

/// What one attempt to store came to.
enum Went {
    Stored,
    /// Nothing is known to be stored; later again.
    Down,
    Fenced,
}

impl Flusher {
    async fn run(mut self) -> Ended {
        let mut retry = RETRY_MIN;
        let mut give_up: Option<Instant> = None;
        let fenced = loop {
            let done = self.wait().await;
            if done {
                give_up.get_or_insert_with(|| Instant::now() + self.limits.finish);
            }
            let went = match give_up {
                None => self.step().await,
                // A store that hangs must not hang the job.
                Some(at) => match timeout_at(at, self.step()).await {
                    Ok(went) => went,
                    Err(_elapsed) => break false,
                },
            };
            match went {
                Went::Fenced => break true,
                Went::Stored => {
                    retry = RETRY_MIN;
                    if done && self.batch.is_empty() && self.shared.state().held.blocks.is_empty() {
                        return self.close(give_up).await;
                    }
                }
                Went::Down => {
                    if give_up.is_some_and(|at| Instant::now() + retry >= at) {
                        break false;
                    }
                    self.pause(retry, done).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        };
        Ended { fenced, ..self.ended() }
    }

    fn ended(&self) -> Ended {
        let (dropped_lines, dropped_bytes) = self.shared.state().held.dropped;
        Ended { complete: false, fenced: false, dropped_lines, dropped_bytes }
    }

    /// Waits out a store that is down, but not beyond the build's end: what is then left gets its chance at once.
    async fn pause(&self, retry: Duration, done: bool) {
        let until = Instant::now() + retry;
        loop {
            tokio::select! {
                biased;
                () = sleep_until(until) => return,
                () = self.shared.news.notified() => {
                    if !done && self.shared.state().done {
                        // The end waits on us: keep the wake-up for the next turn.
                        self.shared.news.notify_one();
                        return;
                    }
                }
            }
        }
    }

    /// Returns when there is a batch to store; true where the build has ended.
    async fn wait(&mut self) -> bool {
        if self.writer.is_none() || !self.batch.is_empty() {
            return self.shared.state().done;
        }
        let mut due: Option<Instant> = None;
        loop {
            let now = Instant::now();
            {
                let mut state = self.shared.state();
                let state = &mut *state;
                if state.done {
                    return true;
                }
                if now.duration_since(state.last_write) >= IDLE_AFTER {
                    let mut lines = Vec::new();
                    state.stdout.idle(&mut lines);
                    state.stderr.idle(&mut lines);
                    state.held.add(lines);
                }
                let full = self.writer.as_ref().is_some_and(|writer| writer.offset >= self.limits.stored);
                if full && state.held.limit != self.limits.tail {
                    state.held.limit = self.limits.tail;
                    state.held.shrink();
                    self.batch =
                        b"--- this log is too long to follow: only its end is shown, after the build\n".to_vec();
                    return false;
                }
                if !full && state.held.bytes > 0 {
                    let due = *due.get_or_insert(now + FLUSH_AFTER);
                    if now >= due || state.held.bytes >= FLUSH_BYTES {
                        return false;
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.shared.news.notified() => {}
                () = sleep_until(due.unwrap_or(now + IDLE_AFTER)) => {}
            }
        }
    }

    async fn step(&mut self) -> Went {
        let Some(writer) = &mut self.writer else {
            return match self.store.begin(&self.id, &self.marker).await {
                Ok(writer) => {
                    self.writer = Some(writer);
                    Went::Stored
                }
                Err(LogError::Fenced) => Went::Fenced,
                // Where it was taken after all, the next attempt adds a second marker, which is no loss.
                Err(LogError::Unavailable(_) | LogError::Indeterminate(_) | LogError::Offset { .. }) => Went::Down,
            };
        };
        if self.batch.is_empty() {
            self.batch = self.shared.state().held.batch();
        }
        if self.batch.is_empty() {
            return Went::Stored;
        }
        // One block can be longer than an append where a line is: then it goes in parts.
        let part = self.batch.len().min(APPEND_MAX);
        match self.store.append(writer, &self.batch[..part]).await {
            Ok(()) => {
                self.batch.drain(..part);
                Went::Stored
            }
            Err(LogError::Fenced) => Went::Fenced,
            Err(LogError::Unavailable(_)) => Went::Down,
            Err(LogError::Offset { actual }) if actual < writer.offset => {
                // The store went back to an earlier state, a restored backup: what it lost is lost, the log goes on.
                writer.offset = actual;
                Went::Down
            }
            Err(LogError::Offset { .. } | LogError::Indeterminate(_)) => self.compare().await,
        }
    }

    /// Finds out how much of the batch is stored already: nobody else can have written at this fence.
    async fn compare(&mut self) -> Went {
        let Some(writer) = &mut self.writer else { return Went::Down };
        let stored = match self.store.read(&self.id, writer.offset, self.batch.len()).await {
            Ok(Some(chunk)) => chunk.bytes,
            // Pruned away under us: there is no log to go on with.
            Ok(None) => return Went::Fenced,
            Err(LogError::Fenced) => return Went::Fenced,
            Err(LogError::Unavailable(_) | LogError::Indeterminate(_) | LogError::Offset { .. }) => return Went::Down,
        };
        if stored.is_empty() || !self.batch.starts_with(&stored) {
            // Nothing of ours is there: either it was not taken, and the next append goes well, or the log is another's.
            return if stored.is_empty() { Went::Down } else { Went::Fenced };
        }
        writer.offset += stored.len() as u64;
        self.batch.drain(..stored.len());
        Went::Stored
    }

    async fn close(&self, give_up: Option<Instant>) -> Ended {
        let mut ended = self.ended();
        let (Some(writer), Some(at)) = (&self.writer, give_up) else { return ended };
        let mut retry = RETRY_MIN;
        while Instant::now() < at {
            match timeout_at(at, self.store.close(writer)).await {
                Ok(Ok(())) => {
                    ended.complete = true;
                    return ended;
                }
                Ok(Err(LogError::Fenced)) => {
                    ended.fenced = true;
                    return ended;
                }
                Ok(Err(LogError::Unavailable(_) | LogError::Indeterminate(_) | LogError::Offset { .. })) => {
                    sleep_until((Instant::now() + retry).min(at)).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
                Err(_elapsed) => break,
            }
        }
        ended
    }
}

#[cfg(test)]
#[path = "build_log_tests.rs"]
mod tests;
