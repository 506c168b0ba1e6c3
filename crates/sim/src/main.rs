//! Plays universes until enough jobs have ended, and says what did not fit.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use clap::Parser;
use replank_sim::{Outcome, play};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Simulated upgrades: the production loop under virtual time, with ports that fail in every way.
#[derive(Debug, Parser)]
struct Args {
    /// How many jobs have to end.
    #[arg(long, default_value_t = 100_000)]
    jobs: u64,
    /// Where the seeds of the universes begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Jobs in one universe.
    #[arg(long, default_value_t = 10)]
    each: u64,
    /// Play the universe of one seed and print what happens in it.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// Threads; as many as there are processors unless given.
    #[arg(long)]
    threads: Option<usize>,
    /// The result as one JSON line.
    #[arg(long)]
    json: bool,
}

/// Failing universes that are told; the others are counted.
const TOLD: usize = 10;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.replay {
        let outcome = play(seed, args.each, true, None);
        outcome.trace.iter().for_each(|line| println!("{line}"));
        return verdict(outcome.violations.is_empty());
    }
    let begun = Instant::now();
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let (next, ended) = (Arc::new(AtomicU64::new(args.seed)), Arc::new(AtomicU64::new(0)));
    let outcomes: Arc<Mutex<Vec<Outcome>>> = Arc::default();
    let (jobs, each) = (args.jobs, args.each);
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            let (next, ended, outcomes) = (next.clone(), ended.clone(), outcomes.clone());
            std::thread::spawn(move || {
                while ended.load(Ordering::Relaxed) < jobs {
                    let outcome = play(next.fetch_add(1, Ordering::Relaxed), each, false, None);
                    ended.fetch_add(outcome.jobs.max(1), Ordering::Relaxed);
                    outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
                }
            })
        })
        .collect();
    let mut sound = true;
    for worker in workers {
        sound &= worker.join().is_ok();
    }
    let outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
    let seconds = begun.elapsed().as_secs_f64();
    let (mut jobs, mut faults, mut violations) = (0, 0, 0);
    let mut ends: BTreeMap<&str, u64> = BTreeMap::new();
    let mut told = 0;
    for outcome in outcomes.iter() {
        jobs += outcome.jobs;
        faults += outcome.faults;
        violations += outcome.violations.len();
        for (end, count) in &outcome.ends {
            *ends.entry(end).or_default() += count;
        }
        if !outcome.violations.is_empty() && told < TOLD {
            told += 1;
            for violation in &outcome.violations {
                eprintln!("seed {}: {violation}", outcome.seed);
            }
            eprintln!("  play it again: cargo xtask sim --replay {} --each {}", outcome.seed, each);
        }
    }
    if args.json {
        let line = serde_json::json!({"jobs": jobs, "faults": faults, "violations": violations,
            "seconds": (seconds * 10.0).round() / 10.0, "universes": outcomes.len(), "ends": ends});
        println!("{line}");
    } else {
        let ends: Vec<String> = ends.iter().map(|(end, count)| format!("{count} {end}")).collect();
        println!("{jobs} jobs in {} universes with {faults} faults: {}", outcomes.len(), ends.join(", "));
        println!("{violations} violations, {seconds:.1} s");
    }
    verdict(sound && violations == 0)
}

fn verdict(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
