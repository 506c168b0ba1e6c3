//! `cargo xtask versions`: the program of the first landed state, this one and one with a raised record format, on one ledger.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use replank_testbed::{images, process, sample, setup};

use crate::build::{Build, Profile};
use crate::tied::tied;
use crate::world::World;

/// The first landed state of this repository.
const FIRST: &str = "ecca014ef843c2119c7a4058f92ff48c322647de";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Put up with a clone that does not have the first landed state, and test the rest.
    #[arg(long)]
    without_first: bool,
    /// Keep the ledger that the first landed state has written, before anything newer writes to it, in this new file.
    #[arg(long, value_name = "FILE")]
    keep_ledger: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure()?;
    let build = Build::new()?;
    let programs = programs(&build, options.without_first)?;
    let world = World::start(build.replank(Profile::Dev)?, sample::SampleOptions::small().units)?;
    let mut tests = tied(&build.cargo(&["test", "--package", "replank-faults", "--test", "versions"]));
    tests.args(["--", "--test-threads", "1", "--nocapture"]).envs(world.environment()).envs(programs);
    if let Some(file) = &options.keep_ledger {
        tests.env("REPLANK_KEEP_LEDGER", std::path::absolute(file)?);
    }
    let status = tests.status().context("cannot start the tests")?;
    drop(world);
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Builds the other programs; each with the variable by which the tests know it.
///
/// # Errors
/// When one does not build, or the first landed state is not here and is not done without.
pub(crate) fn programs(build: &Build, without_first: bool) -> Result<Vec<(&'static str, PathBuf)>> {
    let first = first(build, without_first)?.map(|program| ("REPLANK_FIRST_BIN", program));
    let raised = ("REPLANK_RAISED_BIN", raised(build)?);
    Ok(first.into_iter().chain([raised]).collect())
}

/// Kept below the target directory, as it never changes.
fn directory() -> PathBuf {
    images::target().join("versions")
}

fn first(build: &Build, without_first: bool) -> Result<Option<PathBuf>> {
    let commit = format!("{FIRST}^{{commit}}");
    let here = images::workspace();
    let is_here = process::run(Command::new("git").arg("-C").arg(&here).args(["cat-file", "-e", &commit])).is_ok();
    if !is_here {
        let what = format!("this clone does not have the first landed state, {FIRST}");
        if !without_first {
            bail!("{what}: fetch the whole history (git fetch --unshallow), or give --without-first");
        }
        eprintln!("SKIPPED: {what}; nothing is said about it");
        return Ok(None);
    }
    let kept = directory().join("replank-first");
    if kept.exists() {
        return Ok(Some(kept));
    }
    let source = directory().join("first");
    std::fs::create_dir_all(&source)?;
    let tar = directory().join("first.tar");
    process::run(Command::new("git").arg("-C").arg(&here).args(["archive", "-o"]).arg(&tar).arg(FIRST))?;
    process::run(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&source))?;
    let target = directory().join("target");
    let mut cargo = build.cargo(&["build", "--package", "replank", "--bin", "replank"]);
    cargo.arg("--target-dir").arg(&target).current_dir(&source);
    if !cargo.status()?.success() {
        bail!("the first landed state does not build");
    }
    std::fs::copy(target.join(build.triple()).join("debug").join("replank"), &kept)?;
    Ok(Some(kept))
}

/// In a directory of its own, so that no test takes it for this state's program.
fn raised(build: &Build) -> Result<PathBuf> {
    let target = directory().join("target");
    let mut cargo = build.cargo(&["build", "--package", "replank", "--bin", "replank", "--features", "raised-format"]);
    if !cargo.arg("--target-dir").arg(&target).status()?.success() {
        bail!("this state does not build with a raised record format");
    }
    let kept = directory().join("replank-raised");
    std::fs::copy(target.join(build.triple()).join("debug").join("replank"), &kept)?;
    Ok(kept)
}
