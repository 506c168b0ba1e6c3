//! Runs the matrix, or part of it, against the engine that the environment names: `cargo xtask faults` starts both.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use replank_faults::matrix::{Scenario, Stage};
use replank_faults::point::Point;
use replank_testbed::Engine;

#[derive(Debug, Parser)]
#[command(name = "replank-faults", about = "Strikes every step of an upgrade with every fault")]
struct Arguments {
    /// Static program with fault points.
    #[arg(long)]
    program: PathBuf,
    /// Only faults whose line ("blue-green kill before record claimed") contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Every Nth fault, from the first one.
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// One part of several, each on an engine of its own: "2/3".
    #[arg(long, default_value = "1/1")]
    part: Part,
    /// Only tell which there are.
    #[arg(long)]
    list: bool,
    /// The result as one JSON line.
    #[arg(long)]
    json: bool,
}

/// Which share of the faults this process strikes.
#[derive(Debug, Clone, Copy)]
struct Part {
    this: u64,
    of: u64,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(this, of)| Some((this.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((this, of)) if this >= 1 && this <= of => Ok(Self { this, of }),
            Some(_) | None => Err("a part is named like 1/3, 2/3 or 3/3".to_owned()),
        }
    }
}

impl Part {
    /// By what the fault is, not by where it stands: other processes see builds side by side in another order.
    fn has(self, point: &Point) -> bool {
        let mut hasher = DefaultHasher::new();
        (point.step.kind(), point.side, point.effect).hash(&mut hasher);
        hasher.finish() % self.of == self.this - 1
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let run = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("no runtime")
        .and_then(|runtime| runtime.block_on(run(&arguments)));
    match run {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("replank-faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Answers how many violations there were.
async fn run(arguments: &Arguments) -> Result<usize> {
    let (mut runs, mut violations, mut worst) = (0_usize, 0_usize, 0.0_f64);
    let mut stage: Option<Stage> = None;
    for scenario in Scenario::ALL {
        // A pattern that begins with a scenario's name leaves the others out before anything is installed.
        let named = Scenario::ALL.iter().find(|one| arguments.only.starts_with(one.name()));
        if named.is_some_and(|named| *named != scenario) {
            continue;
        }
        if !stage.as_mut().is_some_and(|stage| stage.turn_to(scenario)) {
            drop(stage.take());
            stage = Some(fresh(arguments, scenario)?);
        }
        let Some(current) = stage.as_mut() else { continue };
        let points = current.points().await.with_context(|| format!("{} undisturbed", scenario.name()))?;
        let line = |point: &Point| format!("{} {point}", scenario.name());
        let asked = points.iter().filter(|point| line(point).contains(&arguments.only));
        let asked: Vec<&Point> = asked.step_by(arguments.every.max(1)).collect();
        let chosen: Vec<&Point> = asked.iter().copied().filter(|point| arguments.part.has(point)).collect();
        eprintln!("{}: {} faults, {} of them here", scenario.name(), points.len(), chosen.len());
        for (number, point) in chosen.iter().enumerate() {
            if arguments.list {
                println!("{}", line(point));
                continue;
            }
            let begun = Instant::now();
            let Some(current) = stage.as_mut() else { break };
            let (found, resumed) = match current.strike(point).await {
                Ok(outcome) => (outcome.violations, outcome.resumed_s),
                Err(error) => (vec![format!("{error:#}")], None),
            };
            runs += 1;
            worst = worst.max(resumed.unwrap_or_default());
            let told = resumed.map_or(String::new(), |resumed| format!(", went on after {resumed:.1} s"));
            let verdict = if found.is_empty() { "ok" } else { "VIOLATION" };
            eprintln!(
                "{verdict} {}/{} {} ({:.1} s{told})",
                number + 1,
                chosen.len(),
                line(point),
                begun.elapsed().as_secs_f64()
            );
            for one in &found {
                eprintln!("    {one}");
            }
            if !found.is_empty() {
                violations += 1;
                // What a violation leaves must not be blamed on the next fault.
                drop(stage.take());
                stage = Some(fresh(arguments, scenario)?);
            }
        }
    }
    let result =
        serde_json::json!({ "runs": runs, "violations": violations, "worst_resume_s": (worst * 10.0).round() / 10.0 });
    if arguments.json {
        println!("{result}");
    } else if !arguments.list {
        println!("{runs} runs, {violations} violations, the longest way to the next step took {worst:.1} s");
    }
    Ok(violations)
}

fn fresh(arguments: &Arguments, scenario: Scenario) -> Result<Stage> {
    Stage::start(Engine::from_env()?, arguments.program.clone(), scenario)
}
