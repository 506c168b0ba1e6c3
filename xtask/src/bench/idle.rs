//! `idle`: what a service costs that has nothing to do, and how soon it is ready.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use replank_testbed::cleanup;
use replank_testbed::remains::Scratch;
use serde_json::json;

use super::service::Service;
use super::{Options, median, round};

/// Starts of one run; odd, so that a median is one of them.
const STARTS: usize = 7;
/// The loop has turned some times by then, and what the start needed is given back.
const SETTLED: Duration = Duration::from_secs(10);

pub(super) fn run(options: &Options, replank: PathBuf) -> Result<ExitCode> {
    cleanup::on_signals()?;
    let scratch = Scratch::create()?;
    let mut ready = Vec::new();
    let mut memory = 0.0;
    for number in 0..STARTS {
        let service = Service::start(&replank, &scratch.path().join(format!("home-{number}")), None)?;
        let took = service.ready.as_secs_f64() * 1_000.0;
        eprintln!("bench: start {} of {STARTS}: ready after {took:.1} ms", number + 1);
        ready.push(took);
        if number + 1 == STARTS {
            std::thread::sleep(SETTLED);
            memory = service.memory()?;
        }
    }
    let (rss_mib, ready_ms) = (round(memory), round(median(&mut ready)));
    if options.json {
        println!("{}", json!({"rss_mib": rss_mib, "ready_ms": ready_ms}));
    } else {
        println!("{rss_mib} MiB, ready after {ready_ms} ms (median of {STARTS} starts)");
    }
    Ok(ExitCode::SUCCESS)
}
