//! The ledger's risk test: two writers, one SQLite file, random SIGKILLs, and every acknowledged commit exactly once.
//!
//! The writers are this very binary, run again with a filter that selects [`writer`]: as two processes, and as two
//! containers of an image that holds nothing else.
//!
//! How long a synchronous commit takes is the disk's to say: 100,000 of them took 50 to 63 s on a busy machine with two
//! processors. So the two containers make 100,000 in every run, but no more than fit into [`ENOUGH_TIME`], and the two
//! processes 10,000; with `--full` both make 100,000 however long that takes.

#![expect(clippy::disallowed_methods, reason = "its processes know no clock port")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use replank_adapters::ledger::SqliteLedger;
use replank_adapters::sqlite::{FILE, Store};
use replank_core::history::{Audit, Verifier, seal};
use replank_core::ports::{Ledger as _, LedgerError};
use replank_core::record::Record;
use replank_core::words::{AppName, InstallationId, Millis};

const DIR: &str = "REPLANK_CAS_DIR";
const NAME: &str = "REPLANK_CAS_NAME";

/// Made once there are enough commits and enough kills have hit: the writers stop there.
const ENOUGH: &str = "enough";

/// On a disk that is slower than 1,000 commits a second the whole test command must still end in time.
const ENOUGH_TIME: Duration = Duration::from_secs(100);
/// ... but not before so many.
const LEAST: u64 = 10_000;
const MOST: u64 = 100_000;

/// Nothing here may hang for ever, whatever is broken.
const TOO_LONG: Duration = Duration::from_secs(1_500);

fn is_full() -> bool {
    std::env::var_os("REPLANK_FULL").is_some()
}

fn app() -> AppName {
    AppName::new("app").expect("app")
}

// --- The writer ------------------------------------------------------------------------------------------------

/// Commits until there is [`ENOUGH`]. What it intends and what was
/// acknowledged goes to two files with one write each, which outlive the process.
#[test]
#[ignore = "a part of the other tests, run by them"]
fn writer() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let name = std::env::var(NAME).expect("a name");
    let dir = Path::new(&dir);
    let run = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos();
    let file = |kind: &str| {
        let path = dir.join(format!("{kind}-{name}"));
        fs::OpenOptions::new().create(true).append(true).open(path).expect("open")
    };
    let (mut intents, mut acks) = (file("intents"), file("acks"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let ledger = SqliteLedger::new(Store::open(dir.join("ledger")).await.expect("open"), app());
        for n in 0u64.. {
            let id = format!("{name}.{run}.{n}");
            intents.write_all(format!("{id}\n").as_bytes()).expect("intent");
            // A conflict is no commit: the same id goes on until it is taken.
            loop {
                let (old, etag) = ledger.load().await.expect("load").expect("record");
                if dir.join(ENOUGH).exists() {
                    return;
                }
                let (lines, head) = seal(&old.history, &[Audit::new(Millis(1), None, "cas").with("id", id.clone())]);
                let next = Record { generation: old.generation + 1, history: head, ..Record::clone(&old) };
                match ledger.commit(Some(&etag), &next, &lines).await {
                    Ok(_) => break,
                    Err(LedgerError::Conflict) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            acks.write_all(format!("{id}\n").as_bytes()).expect("ack");
        }
    });
}

// --- Whom the tests run it as ----------------------------------------------------------------------------------

/// A writer that can be killed at any moment and started again.
trait Killable {
    fn start(&mut self);
    fn kill(&mut self);
    /// `Some(true)` where it ended well.
    fn ended(&mut self) -> Option<bool>;
}

struct Process {
    dir: std::path::PathBuf,
    name: String,
    child: Option<Child>,
}

impl Killable for Process {
    fn start(&mut self) {
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["writer", "--exact", "--ignored"])
            .env(DIR, &self.dir)
            .env(NAME, &self.name)
            .stdout(Stdio::null())
            .spawn()
            .expect("start");
        self.child = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; then there is nothing to kill.
            let _gone = child.kill();
            child.wait().expect("wait");
        }
    }

    fn ended(&mut self) -> Option<bool> {
        self.child.as_mut()?.try_wait().expect("wait").map(|status| status.success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Container {
    engine: Engine,
    name: String,
}

#[derive(Clone)]
struct Engine(String);

impl Engine {
    fn docker(&self, args: &[&str]) -> Result<String, String> {
        let out = Command::new("/usr/bin/docker").args(["-H", &format!("unix://{}", self.0)]).args(args).output();
        let out = out.expect("the docker client runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    }
}

impl Killable for Container {
    fn start(&mut self) {
        self.engine.docker(&["start", &self.name]).expect("start");
    }

    fn kill(&mut self) {
        // It may have ended by itself; what counts is that it does not run.
        let _gone = self.engine.docker(&["kill", "--signal", "KILL", &self.name]);
        let waited = self.engine.docker(&["wait", &self.name]).expect("wait");
        assert!(waited == "137" || waited == "0", "it ended with {waited}");
    }

    fn ended(&mut self) -> Option<bool> {
        let state = self.engine.docker(&["inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", &self.name]);
        let state = state.expect("inspect");
        (!state.starts_with("true")).then(|| state == "false 0")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _gone = self.engine.docker(&["rm", "--force", &self.name]);
    }
}

// --- The campaign ----------------------------------------------------------------------------------------------

/// A connection of its own for each look, so that after a double kill the file is really without any process.
async fn open(dir: &Path) -> SqliteLedger {
    SqliteLedger::new(Store::open(dir.join("ledger")).await.expect("open"), app())
}

async fn prepare(dir: &Path) {
    let ledger = open(dir).await;
    let record = Record::new(InstallationId::new("0123456789abcdef").expect("id"), app(), Millis(1));
    ledger.commit(None, &record, &[]).await.expect("first commit");
}

/// Kills one writer or the other at random until there are `total` commits and at least `least` kills have hit.
async fn campaign(
    dir: &Path,
    writers: &mut [Box<dyn Killable>],
    total: u64,
    pause_ms: std::ops::Range<u64>,
    least: usize,
) {
    let mut random = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64 | 1;
    println!("seed {random}");
    let mut next = move || {
        // xorshift: enough to be uneven, and the seed is printed.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let begun = Instant::now();
    let mut kills = 0;
    writers.iter_mut().for_each(|writer| writer.start());
    loop {
        assert!(begun.elapsed() < TOO_LONG, "the campaign hangs");
        let pause = pause_ms.start + next() % (pause_ms.end - pause_ms.start);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let generation = open(dir).await.load().await.expect("load").expect("record").0.generation;
        let late = begun.elapsed() >= ENOUGH_TIME && !is_full();
        let done = generation >= if late { LEAST } else { total } && kills >= least;
        if done {
            fs::write(dir.join(ENOUGH), "").expect("write");
        }
        if done && writers.iter_mut().all(|writer| writer.ended().is_some()) {
            break;
        }
        for writer in writers.iter_mut() {
            assert_ne!(writer.ended(), Some(false), "a writer failed by itself");
        }
        let victim = (next() % writers.len() as u64) as usize;
        if !done {
            // Both at once in one of four cases: the file is then left without any process.
            let both = next() % 4 == 0;
            for (at, writer) in writers.iter_mut().enumerate() {
                if at == victim || both {
                    kills += usize::from(writer.ended().is_none());
                    writer.kill();
                }
            }
            for (at, writer) in writers.iter_mut().enumerate() {
                if at == victim || both {
                    writer.start();
                }
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let commits = open(dir).await.load().await.expect("load").expect("record").0.generation;
    println!("{commits} commits, {kills} kills, {seconds:.1} s, {:.0} commits/s", commits as f64 / seconds);
}

fn ids(dir: &Path, kind: &str) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("list") {
        let entry = entry.expect("entry");
        let name = entry.file_name().into_string().expect("utf-8");
        if let Some(writer) = name.strip_prefix(kind) {
            let text = fs::read_to_string(entry.path()).expect("read");
            found.insert(writer.to_owned(), text.lines().map(str::to_owned).collect());
        }
    }
    found
}

/// Integrity, chain, count, and each commit exactly once: acknowledged, or the last intent of a run whose answer was lost.
async fn examine(dir: &Path) {
    let ledger = open(dir).await;
    let check = rusqlite::Connection::open(dir.join("ledger").join(FILE)).expect("open");
    let verdict: String = check.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("check");
    assert_eq!(verdict, "ok");
    let (record, etag) = ledger.load().await.expect("load").expect("record");
    let (mut verifier, mut committed, mut from) = (Verifier::default(), BTreeSet::new(), 0);
    loop {
        let page = ledger.history(from, 5_000).await.expect("history");
        if page.is_empty() {
            break;
        }
        from += page.len() as u64;
        for line in &page {
            verifier.line(line).expect("an unbroken chain");
            let value: serde_json::Value = serde_json::from_slice(&line.bytes).expect("json");
            let id = value["id"].as_str().expect("id").to_owned();
            assert!(committed.insert(id.clone()), "{id} is there twice");
        }
    }
    let count = verifier.finish(&record.history).expect("consistent with the anchor");
    assert!(count >= LEAST, "only {count} commits");
    assert_eq!(count, record.generation);
    // The first commit made version 1 and had no line.
    assert_eq!(etag.0, (count + 1).to_string());

    let acked: Vec<String> = ids(dir, "acks-").into_values().flatten().collect();
    for id in &acked {
        assert!(committed.contains(id), "{id} was acknowledged and is not there");
    }
    let acked: BTreeSet<String> = acked.into_iter().collect();
    let run = |id: &str| id.rsplit_once('.').map(|(run, _)| run.to_owned()).expect("an id");
    let mut last = BTreeMap::new();
    for id in ids(dir, "intents-").into_values().flatten() {
        last.insert(run(&id), id);
    }
    let lost: Vec<&String> = committed.difference(&acked).collect();
    for id in &lost {
        assert_eq!(last.get(&run(id)), Some(*id), "{id} was never acknowledged, and its writer went on");
    }
    println!("{} acknowledged, {} committed with the answer lost", acked.len(), lost.len());
}

#[tokio::test]
async fn two_processes_with_random_kills_lose_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    prepare(dir.path()).await;
    let process = |name: &str| -> Box<dyn Killable> {
        Box::new(Process { dir: dir.path().to_owned(), name: name.to_owned(), child: None })
    };
    let mut writers = [process("blue"), process("green")];
    let total = if is_full() { MOST } else { LEAST };
    campaign(dir.path(), &mut writers, total, 20..400, 5).await;
    examine(dir.path()).await;
}

#[tokio::test]
async fn two_containers_with_random_kills_lose_nothing() {
    let socket = std::env::var("REPLANK_TEST_DOCKER").expect(
        "REPLANK_TEST_DOCKER must name the socket of a container engine; `cargo xtask test` starts one and sets it",
    );
    let engine = Engine(socket);
    let dir = tempfile::tempdir().expect("dir");
    // Nothing but this static binary, and a directory for its temporary files.
    let root = dir.path().join("image");
    fs::create_dir_all(root.join("tmp")).expect("mkdir");
    fs::copy(std::env::current_exe().expect("this binary"), root.join("writer")).expect("copy");
    let tar = dir.path().join("image.tar");
    let packed = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status().expect("tar runs");
    assert!(packed.success());
    let unique = format!("{}", SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos());
    let image = format!("replank-cas-test:{unique}");
    engine.docker(&["import", tar.to_str().expect("utf-8"), &image]).expect("import");

    prepare(dir.path()).await;
    let mount = format!("{}:/data", dir.path().display());
    let container = |name: &str| -> Box<dyn Killable> {
        let full = format!("replank-cas-{name}-{unique}");
        let set = [format!("{DIR}=/data"), format!("{NAME}={name}")];
        let mut args = vec!["create", "--name", &full, "--network", "none", "--volume", &mount];
        set.iter().for_each(|pair| args.extend(["--env", pair]));
        args.extend([image.as_str(), "/writer", "writer", "--exact", "--ignored"]);
        engine.docker(&args).expect("create");
        Box::new(Container { engine: engine.clone(), name: full })
    };
    let mut writers = vec![container("blue"), container("green")];
    campaign(dir.path(), &mut writers, MOST, 200..2_000, 4).await;
    examine(dir.path()).await;
    drop(writers);
    engine.docker(&["rmi", &image]).expect("rmi");
}
