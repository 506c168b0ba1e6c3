//! `cargo xtask fuzz`: the fuzz targets in `fuzz/`, each for a bounded time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replank_testbed::{images, process};

use crate::build::Build;
use crate::tied::tied;

/// A target is a file in `fuzz/src/bin` and a line here.
const TARGETS: [Target; 7] = [
    Target { name: "advert", seeds: "fuzz/seeds/advert.txt", apart: Apart::Rules },
    Target { name: "bodies", seeds: "fuzz/seeds/bodies.txt", apart: Apart::Lines },
    Target { name: "config", seeds: "fuzz/seeds/config.toml", apart: Apart::Rules },
    Target { name: "manifest", seeds: "fuzz/seeds/manifest.toml", apart: Apart::Rules },
    Target { name: "mask", seeds: "fuzz/seeds/mask.txt", apart: Apart::Lines },
    Target { name: "policy", seeds: "crates/exec/tests/policy.txt", apart: Apart::Lines },
    Target { name: "request", seeds: "fuzz/seeds/request.txt", apart: Apart::Lines },
];

struct Target {
    name: &'static str,
    /// A file of the workspace with inputs to begin with.
    seeds: &'static str,
    apart: Apart,
}

/// What stands between two inputs of a file.
enum Apart {
    Lines,
    /// A line of three hyphens.
    Rules,
}

/// What makes the compiler count which code an input reaches and what it is compared with. libFuzzer reads the counters; no
/// sanitizer is among them, as those need another toolchain, and the code has no `unsafe` for them to watch.
const INSTRUMENTS: &str = "-Cpasses=sancov-module \
     -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares \
     --cfg fuzzing";

/// Bytes of an input: room for some sequences of words, and still fast.
const INPUT_MAX: usize = 4096;
/// An input that takes longer, or more memory, is a finding.
const INPUT_SECONDS: u64 = 10;
const MEMORY_MIB: u64 = 512;
/// What a target may take beyond its time: reading what earlier runs found, and the last input.
const GRACE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 20)]
    pub(crate) seconds: u64,
    /// Only these.
    pub(crate) names: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let known = TARGETS.map(|target| target.name);
    if let Some(unknown) = options.names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no fuzz target called {unknown}; there are: {}", known.join(", "));
    }
    let build = Build::new()?;
    let mut cargo = command(&build, "build");
    cargo.args(["--release", "--bins"]);
    ensure!(cargo.status()?.success(), "the fuzz targets do not build");
    let chosen = |target: &&Target| options.names.is_empty() || options.names.iter().any(|name| name == target.name);
    let waiting = Mutex::new(TARGETS.iter().filter(chosen));
    let programs = directory().join(build.triple()).join("release");
    let turn = || -> Result<()> {
        loop {
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(target) = next else { return Ok(()) };
            fuzz(target, &programs.join(target.name), options.seconds)?;
        }
    };
    // A fuzzer keeps one processor busy. Each thread sees its fuzzers to their end, so that what is tied to it may go with it.
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..thread::available_parallelism().map_or(1, usize::from)).map(|_| scope.spawn(turn)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a fuzzer's thread panicked")))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// `cargo WORD` for the fuzz targets, which are a workspace of their own.
pub(crate) fn command(build: &Build, word: &str) -> Command {
    let mut cargo = build.cargo_with(INSTRUMENTS, &[word]);
    cargo.arg("--manifest-path").arg(manifest()).arg("--target-dir").arg(directory());
    cargo
}

pub(crate) fn manifest() -> PathBuf {
    images::workspace().join("fuzz/Cargo.toml")
}

/// Programs, what they have found so far, and what broke them.
fn directory() -> PathBuf {
    images::target().join("fuzz")
}

fn fuzz(target: &Target, program: &Path, seconds: u64) -> Result<()> {
    let name = target.name;
    let (seeds, corpus) = (directory().join("seeds").join(name), directory().join("corpus").join(name));
    write_seeds(target, &seeds)?;
    fs::create_dir_all(&corpus)?;
    let broken = directory().join("broken");
    fs::create_dir_all(&broken)?;
    let mut command = Command::new(program);
    command
        // What is new goes to the first.
        .args([&corpus, &seeds])
        .arg(format!("-artifact_prefix={}/{name}-", broken.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg("-print_final_stats=1");
    let begun = Instant::now();
    let output = process::output(&mut tied(&command), Duration::from_secs(seconds) + GRACE)?;
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        const WRITTEN: &str = "Test unit written to ";
        let log = directory().join(format!("{name}.log"));
        fs::write(&log, told.as_bytes())?;
        let Some(input) = told.lines().find_map(|line| line.split_once(WRITTEN)).map(|(_, path)| path.trim()) else {
            bail!("fuzz target {name} ended with {}; see {}", output.status, log.display());
        };
        // A panic's message comes before the fuzzer's own words; without one it was the time or the memory.
        let why = told.lines().skip_while(|line| !line.contains("panicked at")).nth(1).unwrap_or("it takes too much");
        bail!(
            "fuzz target {name}: {why}\n  input:  {input}\n  log:    {}\n  replay: {} {input}",
            log.display(),
            program.display()
        );
    }
    let runs = number_after(&told, "stat::number_of_executed_units:").context("the fuzzer does not say its runs")?;
    // Without the instruments it would try blindly, and find nothing.
    let coverage = number_after(&told, " cov: ").context("the fuzzer sees no coverage: its instruments are missing")?;
    eprintln!("fuzz: {name}: {runs} runs, coverage {coverage}, {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// One file for each input. From scratch: what is no longer among them must not come back.
fn write_seeds(target: &Target, directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    let path = images::workspace().join(target.seeds);
    // Inputs are bytes, also such as no text has.
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let lines = bytes.split(|byte| *byte == b'\n');
    let inputs: Vec<Vec<u8>> = match target.apart {
        Apart::Lines => lines.map(<[u8]>::to_vec).collect(),
        Apart::Rules => {
            let lines: Vec<&[u8]> = lines.collect();
            lines.split(|line| *line == b"---").map(|lines| lines.join(&b'\n')).collect()
        }
    };
    for (number, input) in inputs.iter().enumerate().filter(|(_, input)| !input.is_empty()) {
        fs::write(directory.join(number.to_string()), input)?;
    }
    Ok(())
}

/// The last number that is said with these words before it.
fn number_after(told: &str, words: &str) -> Option<u64> {
    let (_, rest) = told.rsplit_once(words)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_run() -> Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(images::workspace().join("fuzz/src/bin"))? {
            files.push(entry?.path().file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
        files.sort();
        assert_eq!(files, TARGETS.map(|target| target.name));
        Ok(())
    }

    #[test]
    fn the_fuzzer_s_figures_are_read() {
        let told = "#1 INITED cov: 992 ft: 1\n#9 DONE   cov: 1050 ft: 4 corp: 3\nDone 9 runs\nstat::number_of_executed_units: 9\n";
        assert_eq!(number_after(told, " cov: "), Some(1050));
        assert_eq!(number_after(told, "stat::number_of_executed_units:"), Some(9));
        assert_eq!(number_after("#1 INITED exec/s: 0", " cov: "), None);
    }
}
