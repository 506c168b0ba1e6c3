//! A build's log on a store that fails on command, and on a real disk that is full.

use std::sync::atomic::{AtomicU8, Ordering};

use async_trait::async_trait;
use replank_adapters::logs::SqliteLogs;
use replank_adapters::sqlite::Store;
use replank_core::fault::Fault;
use replank_core::ports::LogChunk;
use replank_core::words::{ComponentName, JobId, Millis};

use super::*;

#[derive(Debug)]
struct FixedClock;

impl Clock for FixedClock {
    fn now(&self) -> Millis {
        Millis(0)
    }
}

const WELL: u8 = 0;
const DOWN: u8 = 1;
/// Appends are taken, and the answer is lost.
const TAKEN: u8 = 2;
/// Appends are not taken, and the answer is lost.
const NOT_TAKEN: u8 = 3;
const HANGING: u8 = 4;

/// The real store, failing on command.
#[derive(Debug)]
struct Flaky {
    inner: SqliteLogs,
    mode: AtomicU8,
}

impl Flaky {
    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
    }

    async fn fail(&self) -> Result<(), LogError> {
        match self.mode.load(Ordering::SeqCst) {
            DOWN => Err(LogError::Unavailable(Fault::transient("down"))),
            NOT_TAKEN => Err(LogError::Indeterminate(Fault::indeterminate("lost"))),
            HANGING => std::future::pending().await,
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl LogStore for Flaky {
    async fn begin(&self, id: &LogId, marker: &[u8]) -> Result<LogWriter, LogError> {
        self.fail().await?;
        self.inner.begin(id, marker).await
    }

    async fn append(&self, writer: &mut LogWriter, bytes: &[u8]) -> Result<(), LogError> {
        self.fail().await?;
        if self.mode.load(Ordering::SeqCst) == TAKEN {
            self.inner.append(&mut writer.clone(), bytes).await?;
            return Err(LogError::Indeterminate(Fault::indeterminate("lost")));
        }
        self.inner.append(writer, bytes).await
    }

    async fn close(&self, writer: &LogWriter) -> Result<(), LogError> {
        self.fail().await?;
        self.inner.close(writer).await
    }

    async fn read(&self, id: &LogId, from: u64, max: usize) -> Result<Option<LogChunk>, LogError> {
        self.inner.read(id, from, max).await
    }

    async fn prune(&self, keep_jobs: usize) -> Result<usize, LogError> {
        self.inner.prune(keep_jobs).await
    }

    async fn changed(&self, id: &LogId, from: u64) -> Result<(), LogError> {
        self.inner.changed(id, from).await
    }
}

const LIMITS: Limits =
    Limits { held: 13 * 1024 * 1024, stored: STORED_MAX, tail: TAIL_MAX, finish: Duration::from_secs(10) };

const HEAD: &str = "--- attempt 1, key k1, 1970-01-01T00:00:00.000Z\ndocker build --build-arg TOKEN=*** .\n";

fn begin(job: &str) -> Begin {
    Begin {
        id: LogId { job: JobId::new(job).expect("job"), component: ComponentName::new("api").expect("component") },
        attempt: 1,
        key: "k1".to_owned(),
        request: "docker build --build-arg TOKEN=abc .".to_owned(),
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    store: Arc<Flaky>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let inner = SqliteLogs::new(Store::open(dir.path()).await.expect("open"));
        Self { _dir: dir, store: Arc::new(Flaky { inner, mode: AtomicU8::new(WELL) }) }
    }

    fn log(&self, limits: Limits) -> BuildLog {
        let secrets = ["correct-horse-battery".to_owned()];
        BuildLog::with(self.store.clone(), &FixedClock, &begin("job1"), &secrets, limits)
    }

    async fn text(&self) -> (String, bool) {
        read_all(&self.store.inner).await
    }

    /// Waits for a text to be stored, bounded.
    async fn until(&self, text: &str) -> Duration {
        let begun = std::time::Instant::now();
        loop {
            if self.text().await.0.contains(text) {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{text:?} never came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn read_all(logs: &SqliteLogs) -> (String, bool) {
    let (mut bytes, mut from) = (Vec::new(), 0);
    while let Some(chunk) = logs.read(&begin("job1").id, from, 1 << 20).await.expect("read") {
        bytes.extend_from_slice(&chunk.bytes);
        if chunk.bytes.is_empty() {
            return (String::from_utf8(bytes).expect("utf-8"), chunk.closed);
        }
        from = chunk.next;
    }
    (String::new(), false)
}

#[tokio::test]
async fn lines_are_masked_and_both_streams_stay_whole() {
    let bench = Bench::new().await;
    let log = bench.log(LIMITS);
    log.write(Stream::Stdout, b"step one corr");
    log.write(Stream::Stderr, b"warning: pass");
    log.write(Stream::Stdout, b"ect-horse-battery end\nlast without end");
    log.write(Stream::Stderr, b"word=hunter2\n");
    let mut progress = log.progress_of();
    log.progress(Progress { done: 1, total: 3, step: "RUN x --password y".to_owned() });
    assert_eq!(progress.borrow_and_update().as_ref().expect("progress").step, "RUN x --password ***");
    let ended = log.finish().await;
    assert_eq!(ended, Ended { complete: true, ..Ended::default() });
    let expect = format!("{HEAD}step one *** end\nwarning: password=***\nlast without end\n");
    assert_eq!(bench.text().await, (expect, true));
}

#[tokio::test]
async fn a_line_is_stored_within_a_second() {
    let bench = Bench::new().await;
    let log = bench.log(LIMITS);
    for n in 0..3 {
        // Ends like the beginning of the known value, which must not keep it back for ever.
        log.write(Stream::Stdout, format!("line {n} c\n").as_bytes());
        let took = bench.until(&format!("line {n} c\n")).await;
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    log.finish().await;
}

#[tokio::test]
async fn a_store_that_was_down_gets_everything() {
    let bench = Bench::new().await;
    bench.store.set(DOWN);
    let log = bench.log(LIMITS);
    let mut expect = HEAD.to_owned();
    for n in 0..100 {
        if n == 50 {
            bench.store.set(WELL);
            bench.until("line 49\n").await;
            bench.store.set(DOWN);
        }
        log.write(Stream::Stdout, format!("line {n}\n").as_bytes());
        expect.push_str(&format!("line {n}\n"));
    }
    let finishing = tokio::spawn(log.finish());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!finishing.is_finished(), "the end waits for the store");
    bench.store.set(WELL);
    assert_eq!(finishing.await.expect("join"), Ended { complete: true, ..Ended::default() });
    assert_eq!(bench.text().await, (expect, true));
}

#[tokio::test]
async fn what_does_not_fit_goes_from_the_front_and_says_so() {
    let bench = Bench::new().await;
    bench.store.set(DOWN);
    let log = bench.log(Limits { held: 20_000, ..LIMITS });
    for n in 0..10_000 {
        log.write(Stream::Stdout, format!("line {n}\n").as_bytes());
    }
    bench.store.set(WELL);
    let ended = log.finish().await;
    assert!(ended.complete && ended.dropped_lines > 5_000, "{ended:?}");
    let (text, closed) = bench.text().await;
    assert!(closed && text.ends_with("line 9999\n"), "the tail survives");
    let marker = format!("--- {} lines ({} bytes) are missing here", ended.dropped_lines, ended.dropped_bytes);
    assert!(text.contains(&marker), "{ended:?}: {}", &text[..300]);
    assert_eq!(text.lines().filter(|l| l.starts_with("line ")).count() as u64 + ended.dropped_lines, 10_001);
    assert!(text.len() < 21_000);
}

#[tokio::test]
async fn a_lost_answer_neither_doubles_nor_loses_a_line() {
    for mode in [TAKEN, NOT_TAKEN] {
        let bench = Bench::new().await;
        let log = bench.log(LIMITS);
        let mut expect = HEAD.to_owned();
        bench.until("docker build").await;
        for n in 0..6 {
            bench.store.set(if n % 2 == 0 { mode } else { WELL });
            let line = format!("line {n}\n");
            log.write(Stream::Stdout, line.as_bytes());
            expect.push_str(&line);
            if mode == TAKEN || n % 2 == 1 {
                bench.until(&line).await;
            } else {
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
        }
        bench.store.set(WELL);
        assert!(log.finish().await.complete);
        assert_eq!(bench.text().await, (expect, true), "mode {mode}");
    }
}

#[tokio::test]
async fn a_fenced_log_stops() {
    let bench = Bench::new().await;
    let log = bench.log(LIMITS);
    bench.until("docker build").await;
    bench.store.begin(&begin("job1").id, b"--- attempt 2\n").await.expect("begin");
    log.write(Stream::Stdout, b"late\n");
    let ended = log.finish().await;
    assert!(ended.fenced && !ended.complete, "{ended:?}");
    assert_eq!(bench.text().await, (format!("{HEAD}--- attempt 2\n"), false));
}

#[tokio::test]
async fn a_store_that_hangs_does_not_hang_the_job() {
    let bench = Bench::new().await;
    let log = bench.log(Limits { finish: Duration::from_millis(300), ..LIMITS });
    bench.until("docker build").await;
    bench.store.set(HANGING);
    let begun = std::time::Instant::now();
    // Nothing of the build waits: this returns although the store never will.
    for _ in 0..1_000 {
        log.write(Stream::Stdout, b"line\n");
    }
    assert!(!log.finish().await.complete);
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_log_without_end_keeps_its_end() {
    let bench = Bench::new().await;
    let log = bench.log(Limits { stored: 100_000, tail: 5_000, ..LIMITS });
    for n in 0..60_000 {
        log.write(Stream::Stdout, format!("line {n}\n").as_bytes());
        if n % 5_000 == 0 {
            bench.until("docker").await;
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
    bench.until("too long to follow").await;
    log.write(Stream::Stdout, b"the end\n");
    let ended = log.finish().await;
    assert!(ended.complete && ended.dropped_lines > 0, "{ended:?}");
    let (text, _) = bench.text().await;
    assert!(text.ends_with("line 59999\nthe end\n"), "{}", &text[text.len() - 200..]);
    assert!(text.contains("are missing here"));
}

#[tokio::test]
async fn a_dropped_log_is_stored_and_closed() {
    let bench = Bench::new().await;
    let log = bench.log(LIMITS);
    log.write(Stream::Stdout, b"cancelled here\n");
    drop(log);
    bench.until("cancelled here\n").await;
    for _ in 0..1_000 {
        if bench.text().await.1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never closed");
}

/// A small file system of its own, gone with the value.
struct Small(tempfile::TempDir);

impl Drop for Small {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(done.is_ok_and(|s| s.success()), "umount {}", self.0.path().display());
    }
}

#[tokio::test]
async fn a_full_disk_holds_lines_until_there_is_room() {
    let small = Small(tempfile::tempdir().expect("dir"));
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "replank-test"])
        .arg(small.0.path())
        .status()
        .expect("mount(8) runs");
    assert!(mounted.success(), "a small tmpfs is needed for the full disk; run the tests as root");
    let logs = SqliteLogs::new(Store::open(small.0.path().join("ledger")).await.expect("open"));
    let log = BuildLog::with(Arc::new(logs.clone()), &FixedClock, &begin("job1"), &[], LIMITS);
    let filler = small.0.path().join("filler");
    let mut expect = HEAD.to_owned();
    let text = "x".repeat(200);
    for n in 0..2_000 {
        if n == 100 {
            tokio::time::sleep(Duration::from_millis(600)).await;
            assert!(std::fs::write(&filler, vec![0; 8 << 20]).is_err(), "the disk is full");
        }
        let line = format!("{n} {text}\n");
        log.write(Stream::Stdout, line.as_bytes());
        expect.push_str(&line);
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(read_all(&logs).await.0.len() < expect.len(), "the disk was not full");
    std::fs::remove_file(&filler).expect("free");
    assert_eq!(log.finish().await, Ended { complete: true, ..Ended::default() });
    assert_eq!(read_all(&logs).await, (expect, true));
}
