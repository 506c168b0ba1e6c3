//! The one binary, with fault points between the service and its ports.

use std::process::ExitCode;

fn main() -> ExitCode {
    let env = replank::config::env::Environment::of_process();
    replank::cli::main_with(std::env::args_os(), &env, replank_faults::doors::with_faults)
}
