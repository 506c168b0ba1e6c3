//! Programs that end with us, also when we are killed: tests and servers must not go on against parts that are gone.

use std::process::Command;

/// The same command, told to end when the thread that starts it does. To be started from the main thread, which lives as long
/// as the process.
#[must_use]
pub(crate) fn tied(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "TERM"]).arg(command.get_program()).args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        tied.current_dir(directory);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    tied
}
