//! `cargo xtask bench NAME`: ours, the baseline, and their ratio, from one run on one machine.

mod exec_client;
mod exec_input;
mod exec_server;
mod exec_stream;
mod idle;
mod ledger;
mod log_latency;
mod pipeline;
mod service;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::build::{Build, Profile};

const NAMES: &str = "pipeline, exec-stream, log-latency, status, idle, ledger";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What to measure: `pipeline`, `exec-stream`, `log-latency`, `status`, `idle` or `ledger`.
    name: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Tell on the error output where our time goes: what was recorded when (`pipeline`).
    #[arg(long)]
    profile: bool,
    /// The static replank binary to use instead of building one.
    #[arg(long)]
    replank: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let run = match options.name.as_str() {
        "pipeline" => pipeline::run,
        "exec-stream" => exec_stream::run,
        "log-latency" => log_latency::run,
        "status" => status::run,
        "idle" => idle::run,
        // It measures no process.
        "ledger" => return ledger::run(options),
        other => bail!("there is no benchmark called {other}; there are: {NAMES}"),
    };
    run(options, Build::replank_or(options.replank.as_deref(), Profile::Release)?)
}

/// Of an odd number of values.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value that so great a share of them does not exceed.
fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// What is printed: beyond thousandths there is only noise.
fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}
