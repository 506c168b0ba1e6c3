//! `ledger`: commits of a record with its history line, against the bare statements that such a commit is made of, on the
//! same file, with one writer and with sixteen.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::{FILE, Store};
use replank_core::history::{Audit, seal};
use replank_core::ports::{Ledger as _, LedgerError};
use replank_core::record::Record;
use replank_core::words::{AppName, InstallationId, Millis};
use replank_testbed::remains::Scratch;
use replank_testbed::{cleanup, images};
use rusqlite::{Connection, TransactionBehavior, params};
use serde_json::{Map, Value};

use super::{Options, median, percentile, round};

/// Writers at once.
const WRITERS: [usize; 2] = [1, 16];
/// Interleaved pairs for each; odd, so that a median is one of them.
const PAIRS: usize = 5;
const MEASURED: Duration = Duration::from_secs(2);
/// As long as the product's own connection waits.
const BUSY: Duration = Duration::from_secs(5);
/// The rows that the bare statements write, beside those of the ledger.
const BARE: &str = "bare";

pub(super) fn run(options: &Options) -> Result<ExitCode> {
    if cfg!(debug_assertions) {
        return as_released(options);
    }
    cleanup::on_signals()?;
    let scratch = Scratch::create()?;
    let directory = scratch.path().join("ledger");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ledger = runtime.block_on(open(&directory))?;
    let file = directory.join(FILE);
    let body = prepare_bare(&file)?;
    let mut figures = Map::new();
    let mut worst: f64 = 0.0;
    for writers in WRITERS {
        let (mut ours, mut theirs, mut latency) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 1..=PAIRS {
            let took = runtime.block_on(commits(&ledger, writers))?;
            ours.push(took.len() as f64 / MEASURED.as_secs_f64());
            latency.extend(took);
            theirs.push(bare(&file, &body, writers)? as f64 / MEASURED.as_secs_f64());
            eprintln!(
                "bench: {writers} writers, pair {pair} of {PAIRS}: ours {:.0}, baseline {:.0} commits/s",
                ours[pair - 1],
                theirs[pair - 1]
            );
        }
        let (ours, theirs) = (median(&mut ours), median(&mut theirs));
        worst = worst.max(theirs / ours);
        let mut figure = |name: &str, value: f64| figures.insert(format!("{name}_{writers}"), round(value).into());
        figure("commits_per_s", ours);
        figure("p99_ms", percentile(&mut latency, 0.99));
        figure("baseline_commits_per_s", theirs);
        figure("ratio", theirs / ours);
    }
    // Time of a commit over that of the statements, where it is worst.
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
    let ended = cargo.current_dir(images::workspace()).status()?;
    Ok(if ended.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn open(directory: &Path) -> Result<Arc<SqliteLedger>> {
    let app = AppName::new("bench")?;
    let ledger = SqliteLedger::new(Store::open(directory).await?, app.clone());
    let record = Record::new(InstallationId::new("0".repeat(16))?, app, Millis(0));
    ledger.commit(None, &record, &[]).await?;
    Ok(Arc::new(ledger))
}

/// Milliseconds of each commit that went through, what it lost to others included.
async fn commits(ledger: &Arc<SqliteLedger>, writers: usize) -> Result<Vec<f64>> {
    let end = Instant::now() + MEASURED;
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                while Instant::now() < end {
                    let begun = Instant::now();
                    commit(&ledger).await?;
                    took.push(begun.elapsed().as_secs_f64() * 1_000.0);
                }
                Ok::<_, anyhow::Error>(took)
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}

/// One change as the engine makes it: read, decide, compare and swap; again when somebody was faster.
async fn commit(ledger: &SqliteLedger) -> Result<()> {
    loop {
        let (mut record, etag) = ledger.load().await?.context("the ledger is empty")?;
        let (lines, head) = seal(&record.history, &[audit()]);
        record.history = head;
        match ledger.commit(Some(&etag), &record, &lines).await {
            Ok(_) => return Ok(()),
            Err(LedgerError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
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

/// The first row of the bare statements: the bytes of the ledger's own record.
fn prepare_bare(file: &Path) -> Result<Vec<u8>> {
    let connection = connect(file)?;
    let body: Vec<u8> = connection.query_row("SELECT body FROM record WHERE app = 'bench'", [], |row| row.get(0))?;
    connection.execute(
        "INSERT INTO record (app, version, format, min_reader, body) VALUES (?1, 1, 1, 1, ?2)",
        params![BARE, body],
    )?;
    Ok(body)
}

/// How many times the statements of a commit went through.
fn bare(file: &Path, body: &[u8], writers: usize) -> Result<usize> {
    let line = seal(&Default::default(), &[audit()]).0.remove(0).bytes;
    let over = AtomicBool::new(false);
    let write = || -> Result<usize> {
        let (mut connection, mut count) = (connect(file)?, 0);
        while !over.load(Ordering::Relaxed) {
            let version: i64 =
                connection.query_row("SELECT version FROM record WHERE app = ?1", [BARE], |row| row.get(0))?;
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let swapped = transaction.execute(
                "UPDATE record SET version = version + 1, body = ?3 WHERE app = ?1 AND version = ?2",
                params![BARE, version, body],
            )?;
            if swapped == 0 {
                // Somebody was faster.
                continue;
            }
            transaction.execute(
                "INSERT INTO history (app, seq, bytes) SELECT ?1, coalesce(max(seq) + 1, 0), ?2 FROM history WHERE app = ?1",
                params![BARE, line],
            )?;
            transaction.commit()?;
            count += 1;
        }
        Ok(count)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers).map(|_| scope.spawn(write)).collect();
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
