//! `cargo xtask`: everything a developer of Replank types.

mod api;
mod bench;
mod build;
mod demo;
mod faults;
mod fuzz;
mod named;
mod sim;
mod test;
mod tidy;
mod tied;
mod versions;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use replank_testbed::cleanup::leave_it_to_the_signal;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Everything a developer of Replank types")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Shows the sample application upgrading itself.
    Demo(demo::Options),
    /// Runs every check and every test, against a real engine, registry and git server.
    Test(test::Options),
    /// Measures something; prints one JSON object.
    Bench(bench::Options),
    /// Feeds made-up input to what reads input, for a bounded time.
    Fuzz(fuzz::Options),
    /// Checks the HTTP API against its own document, with made-up requests to a real server.
    Api(api::Options),
    /// Plays upgrades under virtual time, with ports that fail in every way, and judges what each leaves.
    Sim(sim::Options),
    /// Strikes every recorded step and every effect of real upgrades with every fault, and judges what each leaves.
    Faults(faults::Options),
    /// Lets the first landed state, this one and one with a raised record format hand one ledger to each other.
    Versions(versions::Options),
    /// Checks what the compiler does not: dependencies, imports, sizes of files.
    Tidy,
    /// Starts what tests and experiments need (engine, registry, git server, images, sample), prints the environment
    /// that leads there, and takes everything away on Ctrl-C.
    Engine(world::Options),
}

fn main() -> ExitCode {
    let ended = run();
    leave_it_to_the_signal();
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    match Arguments::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Api(options) => api::run(&options),
        Task::Sim(options) => sim::run(&options),
        Task::Faults(options) => faults::run(&options),
        Task::Versions(options) => versions::run(&options),
        Task::Tidy => tidy::run(),
        Task::Engine(options) => world::run(&options).map(|()| ExitCode::SUCCESS),
    }
}
