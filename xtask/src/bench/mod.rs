//! `cargo xtask bench NAME`: ours, the baseline, and their ratio, from one run on one machine.

mod exec_client;
mod exec_input;
mod exec_server;
mod exec_stream;
mod pipeline;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::build::{Build, Profile};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What to measure: `pipeline` or `exec-stream`.
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
        other => bail!("there is no benchmark called {other}; there are: pipeline, exec-stream"),
    };
    run(options, Build::replank_or(options.replank.as_deref(), Profile::Release)?)
}

/// Of an odd number of values.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What is printed: beyond thousandths there is only noise.
fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}
