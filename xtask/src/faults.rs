//! `cargo xtask faults`: every step of every kind of job, struck by every fault, on the real parts.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use replank_testbed::{images, sample, setup};

use crate::build::Build;
use crate::tied::tied;
use crate::world::World;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only faults whose line contains this, such as "kill before" or "blue-green stop after record claimed".
    #[arg(long, value_name = "PATTERN", default_value = "")]
    only: String,
    /// Only every Nth fault.
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Only tell which faults there are, as undisturbed jobs show them.
    #[arg(long)]
    list: bool,
    /// The result as one JSON line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure()?;
    let build = Build::new()?;
    // All of it: naming one package would choose other features, and build everything twice.
    if !build.cargo(&["build", "--workspace"]).status()?.success() {
        bail!("the service with fault points does not build");
    }
    let directory = images::target().join(build.triple()).join("debug");
    let program = directory.join("replank-with-faults");
    let world = World::start(program.clone(), sample::SampleOptions::small().units)?;
    // The thread that starts it must live as long as it does; and it cleans up by itself when it is told to end.
    let mut matrix = std::process::Command::new(directory.join("replank-faults"));
    matrix.arg("--program").arg(&program).args(["--only", &options.only, "--every", &options.every.to_string()]);
    if options.list {
        matrix.arg("--list");
    }
    if options.json {
        matrix.arg("--json");
    }
    let mut matrix = tied(&matrix);
    let status = matrix.envs(world.environment()).status().context("cannot start the matrix")?;
    drop(world);
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
