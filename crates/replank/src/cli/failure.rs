//! How a command fails: the exit code, and one line that says what, why and what next.

use std::fmt;
use std::process::ExitCode;

use replank_core::fault::Fault;

/// Exit codes, as `--help` documents them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A job ended failed, or something here broke.
    Failed = 1,
    Usage = 2,
    /// The service understood and said no.
    Refused = 3,
    /// The service does not answer, or cannot now.
    Unreachable = 4,
    Forbidden = 5,
    TimedOut = 6,
    /// The person pressed Ctrl-C while watching; the job goes on.
    Interrupted = 130,
}

#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }

    pub fn exit(&self) -> ExitCode {
        ExitCode::from(self.code as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<anyhow::Error> for Failure {
    /// The cause chain on one line, and the advice of the fault in it: what failed alone helps nobody at 2 a.m.
    fn from(error: anyhow::Error) -> Self {
        let chain = format!("{error:#}");
        let words: Vec<&str> = chain.split_whitespace().collect();
        let mut message = words.join(" ");
        let advice = error.chain().filter_map(|cause| cause.downcast_ref::<Fault>()).find(|f| !f.advice.is_empty());
        if let Some(fault) = advice {
            message.push_str("; ");
            message.push_str(&fault.advice);
        }
        Self::new(Code::Failed, message)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(Code::Failed, format!("the output could not be written: {error}"))
    }
}
