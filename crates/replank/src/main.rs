//! The binary's entry: hands the command line and the environment to the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    replank::cli::main(std::env::args_os(), &replank::config::env::Environment::of_process())
}
