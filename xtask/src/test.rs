//! `cargo xtask test`: every check, then every test with the runner's own summary as the last words.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use replank_testbed::{process, sample, setup};

use crate::build::Build;
use crate::tied::tied;
use crate::world::World;
use crate::{api, fuzz, sim, tidy, versions};

/// For each fuzz target: long enough for what a change breaks at once; `cargo xtask fuzz` takes all the time it is given.
const FUZZ_SECONDS: u64 = 8;

/// Jobs in every run: under two minutes on two processors.
const SIMULATION: u64 = 100_000;
/// ... and in a long one.
const FULL_SIMULATION: u64 = 3_000_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Also the campaigns that take hours.
    #[arg(long)]
    full: bool,
    /// Only the tests: no formatting, lints or static checks.
    #[arg(long)]
    only_tests: bool,
    /// For the test runner, such as a filter.
    #[arg(last = true)]
    runner: Vec<String>,
}

/// Answers the runner's exit code.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    // First, as it says early what a machine lacks.
    setup::ensure()?;
    let build = Build::new()?;
    if !options.only_tests {
        step("formatting", build_free(&["fmt", "--all", "--check"]))?;
        if tidy::run()? != ExitCode::SUCCESS {
            bail!("the static checks failed");
        }
        let mut clippy = build.cargo(&["clippy", "--workspace", "--all-targets"]);
        clippy.args(["--", "--deny", "warnings"]);
        step("lints", clippy)?;
        fuzz_targets(&build)?;
        // Building it takes longer than all tests, and its advisories need the network: where it is, it is used.
        if process::run(Command::new("cargo").args(["deny", "--version"])).is_ok() {
            step(
                "licences, bans and sources of dependencies",
                build_free(&["deny", "check", "bans", "licenses", "sources"]),
            )?;
        } else {
            eprintln!("cargo-deny is not installed: dependencies are held to xtask's own list alone");
        }
    }
    // All of it in one go, as the test runner builds it: naming one package would choose other features, and build twice.
    step("that everything builds", build.cargo(&["build", "--workspace", "--all-targets"]))?;
    // Who names tests wants those alone.
    if options.runner.is_empty() {
        let jobs = if options.full { FULL_SIMULATION } else { SIMULATION };
        let options = sim::Options { jobs, seed: 1, each: 10, replay: None, json: false };
        step("simulated upgrades", tied(&sim::command(&build, &options)))?;
    }
    let replank = build.program(crate::build::Profile::Dev);
    let world = World::start(replank, sample::FULL_UNITS)?;
    // From here on signals clean up.
    if !options.only_tests && options.runner.is_empty() {
        api::step(&world.replank)?;
    }

    let has_nextest = process::run(Command::new("cargo").args(["nextest", "--version"])).is_ok();
    let runner = if has_nextest {
        build.cargo(&["nextest", "run", "--workspace", "--no-fail-fast"])
    } else {
        eprintln!("cargo-nextest is not installed: tests run one binary after the other");
        build.cargo(&["test", "--workspace", "--no-fail-fast"])
    };
    let mut runner = tied(&runner);
    runner.args(&options.runner).envs(world.environment());
    if options.full {
        runner.env("REPLANK_FULL", "1").envs(versions::programs(&build, false)?);
    }
    let status = runner.status().context("cannot start the test runner")?;
    drop(world);
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Their crate is no member of the workspace, so nothing above has seen it.
fn fuzz_targets(build: &Build) -> Result<()> {
    let mut formatting = build_free(&["fmt", "--check", "--manifest-path"]);
    formatting.arg(fuzz::manifest());
    step("formatting of the fuzz targets", formatting)?;
    let mut clippy = fuzz::command(build, "clippy");
    clippy.args(["--", "--deny", "warnings"]);
    step("lints of the fuzz targets", clippy)?;
    fuzz::run(&fuzz::Options { seconds: FUZZ_SECONDS, names: vec![] })?;
    Ok(())
}

fn build_free(words: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(words).current_dir(replank_testbed::images::workspace());
    command
}

fn step(what: &str, mut command: Command) -> Result<()> {
    eprintln!("checking {what}");
    if !command.status()?.success() {
        bail!("the check of {what} failed");
    }
    Ok(())
}
