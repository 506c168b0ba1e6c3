//! `cargo xtask faults`: every step of every kind of job, struck by every fault, on the real parts.

use std::path::Path;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
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
    /// How many faults are struck at the same time, each on an engine of its own: a job waits more than it computes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    at_once: u8,
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
    // A list is short, and its order is that of one job.
    let parts = if options.list { 1 } else { options.at_once };
    // One after the other: the first one makes what all of them share.
    let worlds = (0..parts)
        .map(|_| World::start(program.clone(), sample::SampleOptions::small().units))
        .collect::<Result<Vec<_>>>()?;
    let ended: Vec<Result<Ended>> = std::thread::scope(|scope| {
        let strike = |(world, part): (&World, u8)| {
            let part = format!("{part}/{parts}");
            let (program, directory, environment) = (&program, &directory, world.environment());
            scope.spawn(move || strike(options, directory, program, environment, &part))
        };
        let threads: Vec<_> = worlds.iter().zip(1..).map(strike).collect();
        threads.into_iter().map(|one| one.join().unwrap_or_else(|_| bail!("a part of the matrix panicked"))).collect()
    });
    drop(worlds);
    let mut all = Ended::default();
    for one in ended {
        let one = one?;
        all = Ended {
            runs: all.runs + one.runs,
            violations: all.violations + one.violations,
            worst_resume_s: all.worst_resume_s.max(one.worst_resume_s),
        };
    }
    if options.json {
        println!("{}", serde_json::to_string(&all)?);
    } else if !options.list {
        let Ended { runs, violations, worst_resume_s } = all;
        println!("{runs} runs, {violations} violations, the longest way to the next step took {worst_resume_s:.1} s");
    }
    Ok(if all.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What one part, or all of them, came to.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
struct Ended {
    runs: usize,
    violations: usize,
    /// Seconds from a fault to the next recorded step.
    worst_resume_s: f64,
}

fn strike(
    options: &Options,
    directory: &Path,
    program: &Path,
    environment: Vec<(&'static str, String)>,
    part: &str,
) -> Result<Ended> {
    let mut matrix = std::process::Command::new(directory.join("replank-faults"));
    matrix.arg("--program").arg(program).args(["--only", &options.only, "--every", &options.every.to_string()]);
    matrix.args(["--part", part]);
    // This thread lives as long as the program, which cleans up by itself when it is told to end.
    if options.list {
        let status = tied(matrix.arg("--list")).envs(environment).status().context("cannot start the matrix")?;
        ensure!(status.success(), "the faults cannot be listed");
        return Ok(Ended::default());
    }
    let mut matrix = tied(matrix.arg("--json"));
    let output = matrix.envs(environment).stderr(Stdio::inherit()).output().context("cannot start the matrix")?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("part {part} of the matrix ended without a result ({})", output.status))
}
