//! `ledger`: commits of a record with its history line, against the bare statements that such a commit is made of, on the
//! same file, with one writer and with sixteen. Each writer has a record of its own: what is measured is the way to the disk,
//! and not who loses a race.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::{FILE, Store};
use replank_core::history::{Audit, seal};
use replank_core::ports::Ledger as _;
use replank_core::record::Record;
use replank_core::words::{AppName, InstallationId, Millis};
use replank_testbed::remains::Scratch;
use replank_testbed::{cleanup, images};
use rusqlite::{Connection, TransactionBehavior, params};
use serde_json::{Map, Value};

use super::{Options, median, percentile, round};

/// Writers at once.
const WRITERS: [usize; 2] = [1, WRITERS_MAX];
const WRITERS_MAX: usize = 16;
/// Interleaved pairs for each; odd, so that a median is one of them. Many and short: a disk that others use, or whose owner
/// limits it, changes its pace from one second to the next, and both halves of a pair are to meet the same.
const PAIRS: usize = 21;
const MEASURED: Duration = Duration::from_millis(400);
/// As long as the product's own connection waits.
const BUSY: Duration = Duration::from_secs(5);

pub(super) fn run(options: &Options) -> Result<ExitCode> {
    if cfg!(debug_assertions) {
        return as_released(options);
    }
    cleanup::on_signals()?;
    let scratch = Scratch::create()?;
    let directory = scratch.path().join("ledger");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ledgers = runtime.block_on(open(&directory))?;
    let file = directory.join(FILE);
    let body = prepare_bare(&file)?;
    let mut figures = Map::new();
    let mut worst: f64 = 0.0;
    for writers in WRITERS {
        let (mut ours, mut theirs, mut ratios, mut latency) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for pair in 1..=PAIRS {
            let baseline_first = pair % 2 == 0;
            let before = if baseline_first { Some(bare(&file, &body, writers)?) } else { None };
            let took = runtime.block_on(commits(&ledgers[..writers]))?;
            let them = match before {
                Some(count) => count,
                None => bare(&file, &body, writers)?,
            };
            let per_second = |count: usize| count as f64 / MEASURED.as_secs_f64();
            let (us, them) = (per_second(took.len()), per_second(them));
            eprintln!("bench: {writers} writers, pair {pair} of {PAIRS}: ours {us:.0}, baseline {them:.0} commits/s");
            latency.extend(took);
            ours.push(us);
            theirs.push(them);
            ratios.push(them / us);
        }
        let ratio = median(&mut ratios);
        worst = worst.max(ratio);
        let mut figure = |name: &str, value: f64| figures.insert(format!("{name}_{writers}"), round(value).into());
        figure("commits_per_s", median(&mut ours));
        figure("p99_ms", percentile(&mut latency, 0.99));
        figure("baseline_commits_per_s", median(&mut theirs));
        figure("ratio", ratio);
    }
    // Time of a commit over that of the statements in the same pair, where it is worse.
    figures.insert("ratio".to_owned(), round(worst).into());
    if options.json {
        println!("{}", Value::Object(figures));
    } else {
        figures.iter().for_each(|(name, value)| println!("{name:28} {value}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The same by an xtask that is built as the product is: here the ledger is part of this program, and what is measured is small.
fn as_released(options: &Options) -> Result<ExitCode> {
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--quiet", "--release", "--package", "xtask", "--", "bench", "ledger"]);
    if options.json {
        cargo.arg("--json");
    }
    // Linking as the product is linked takes minutes, and gains nothing that a disk would notice.
    cargo.env("CARGO_PROFILE_RELEASE_LTO", "off");
    let ended = cargo.current_dir(images::workspace()).status()?;
    Ok(if ended.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The ledgers of as many applications, in one file and through one connection, as a service has it.
async fn open(directory: &Path) -> Result<Vec<SqliteLedger>> {
    let store = Store::open(directory).await?;
    let mut ledgers = Vec::new();
    for writer in 0..WRITERS_MAX {
        let app = AppName::new(format!("bench-{writer}"))?;
        let ledger = SqliteLedger::new(store.clone(), app.clone());
        let record = Record::new(InstallationId::new("0".repeat(16))?, app, Millis(0));
        ledger.commit(None, &record, &[]).await?;
        ledgers.push(ledger);
    }
    Ok(ledgers)
}

/// Milliseconds of each commit.
async fn commits(ledgers: &[SqliteLedger]) -> Result<Vec<f64>> {
    let end = Instant::now() + MEASURED;
    let writers: Vec<_> = ledgers
        .iter()
        .cloned()
        .map(|ledger| {
            tokio::spawn(async move {
                let (record, mut etag) = ledger.load().await?.context("the ledger is empty")?;
                let mut record = Arc::unwrap_or_clone(record);
                let mut took = Vec::new();
                while Instant::now() < end {
                    let begun = Instant::now();
                    let (lines, head) = seal(&record.history, &[audit()]);
                    record.history = head;
                    etag = ledger.commit(Some(&etag), &record, &lines).await?;
                    took.push(begun.elapsed().as_secs_f64() * 1_000.0);
                }
                Ok::<_, anyhow::Error>(took)
            })
        })
        .collect();
    let mut all = Vec::new();
    for writer in writers {
        all.extend(writer.await??);
    }
    Ok(all)
}

fn audit() -> Audit {
    Audit::new(Millis(0), None, "track_commits").with("on", true)
}

/// A connection as the product's own is set up.
fn connect(file: &Path) -> Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;")?;
    Ok(connection)
}

/// The first rows of the bare statements: the bytes of a ledger's own record.
fn prepare_bare(file: &Path) -> Result<Vec<u8>> {
    let connection = connect(file)?;
    let body: Vec<u8> = connection.query_row("SELECT body FROM record LIMIT 1", [], |row| row.get(0))?;
    for writer in 0..WRITERS_MAX {
        connection.execute(
            "INSERT INTO record (app, version, format, min_reader, body) VALUES (?1, 1, 1, 1, ?2)",
            params![format!("bare-{writer}"), body],
        )?;
    }
    Ok(body)
}

/// How many times the statements of a commit went through.
fn bare(file: &Path, body: &[u8], writers: usize) -> Result<usize> {
    let line = seal(&Default::default(), &[audit()]).0.remove(0).bytes;
    let over = AtomicBool::new(false);
    let (over_ref, line) = (&over, &line);
    let write = |writer: usize| -> Result<usize> {
        let (mut connection, app, mut count) = (connect(file)?, format!("bare-{writer}"), 0);
        while !over_ref.load(Ordering::Relaxed) {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction
                .execute("UPDATE record SET version = version + 1, body = ?2 WHERE app = ?1", params![app, body])?;
            transaction.execute(
                "INSERT INTO history (app, seq, bytes) SELECT ?1, coalesce(max(seq) + 1, 0), ?2 FROM history WHERE app = ?1",
                params![app, line],
            )?;
            transaction.commit()?;
            count += 1;
        }
        Ok(count)
    };
    let write = &write;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers).map(|writer| scope.spawn(move || write(writer))).collect();
        std::thread::sleep(MEASURED);
        over.store(true, Ordering::Relaxed);
        let mut all = 0;
        for thread in threads {
            all += thread.join().map_err(|_| anyhow!("a writer broke"))??;
        }
        ensure!(all > 0, "nothing was written");
        Ok(all)
    })
}
