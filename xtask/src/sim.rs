//! `cargo xtask sim`: upgrades under virtual time, with ports that fail in every way.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use replank_testbed::images;

use crate::build::Build;
use crate::tied::tied;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many jobs have to end.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) jobs: u64,
    /// Where the seeds of the universes begin.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Jobs in one universe.
    #[arg(long, default_value_t = 10)]
    pub(crate) each: u64,
    /// Play the universe of one seed again, and print what happens in it.
    #[arg(long, value_name = "SEED")]
    pub(crate) replay: Option<u64>,
    /// The result as one JSON line.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let build = Build::new()?;
    if !build.cargo(&["build", "--package", "replank-sim"]).status()?.success() {
        bail!("the simulation does not build");
    }
    let status = tied(&command(&build, options)).status().context("cannot start the simulation")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The simulation, once it was built.
pub(crate) fn command(build: &Build, options: &Options) -> Command {
    let mut command = Command::new(images::target().join(build.triple()).join("debug").join("replank-sim"));
    for (name, value) in [("--jobs", options.jobs), ("--seed", options.seed), ("--each", options.each)] {
        command.args([name, &value.to_string()]);
    }
    if let Some(seed) = options.replay {
        command.args(["--replay", &seed.to_string()]);
    }
    if options.json {
        command.arg("--json");
    }
    command
}
