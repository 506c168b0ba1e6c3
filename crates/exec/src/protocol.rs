//! What the two ends of the channel say to each other. Other clients and servers speak it too, so every name is fixed.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// Header with the token.
pub const TOKEN_HEADER: &str = "X-Exec-Token";
/// Header of `GET /healthz` that names what a server does beyond the contract, separated by commas. The body stays as it is:
/// clients compare it.
pub const FEATURES_HEADER: &str = "x-exec-features";
/// The server gives a request's `git_credential` to git.
pub const CREDENTIAL_FEATURE: &str = "git-credential";
/// Where a server listens unless told otherwise.
pub const DEFAULT_PORT: u16 = 7682;
/// Seconds that a program may take where the request does not say; what it says is clamped to [`TIMEOUT_SECONDS`].
pub const TIMEOUT_DEFAULT_SECONDS: u64 = 60;
pub const TIMEOUT_SECONDS: std::ops::RangeInclusive<u64> = 1..=1_800;
/// Exit code of a program that ran out of time, and of one that could not be started.
pub const EXIT_TIMED_OUT: i32 = 124;
pub const EXIT_NOT_STARTED: i32 = 127;
/// What git itself exits with when it cannot go on, such as for want of an address.
pub const EXIT_UNREACHED: i32 = 128;
/// What a line ends in that was cut.
pub const CUT_MARK: &str = " [truncated:line-over-cap]";

/// The body of `POST /exec` and `POST /exec/stream`. Unknown fields are ignored: a newer client may send them.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Request {
    /// The program's bare name and its arguments. No shell sees them.
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// A file below the request's fresh directory that gets `stdin` instead of the program's standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_file: Option<String>,
    /// Absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(default, deserialize_with = "seconds", skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
    /// Given to git when it asks. A server that does not know the field ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_credential: Option<Credential>,
}

/// Arguments, input and credential may be secret: what is printed says how much there is.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("program", &self.argv.first())
            .field("arguments", &self.argv.len().saturating_sub(1))
            .field("stdin_bytes", &self.stdin.as_ref().map(String::len))
            .field("timeout_seconds", &self.timeout_seconds)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").finish_non_exhaustive()
    }
}

/// Any number is a time, since the contract clamps and does not refuse: below zero or beyond what an integer holds, too.
fn seconds<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(from)?;
    // The conversion of a float ends at the bounds of the integer.
    Ok(number.map(|number| number.as_u64().unwrap_or_else(|| number.as_f64().unwrap_or_default() as u64)))
}

impl Request {
    /// Seconds that the program may take.
    #[must_use]
    pub fn timeout(&self) -> u64 {
        self.timeout_seconds.unwrap_or(TIMEOUT_DEFAULT_SECONDS).clamp(*TIMEOUT_SECONDS.start(), *TIMEOUT_SECONDS.end())
    }

    /// Reads the body of a request and holds it to [`check`](Self::check).
    ///
    /// # Errors
    /// With what is wrong; nothing of the request is in it.
    pub fn read(body: &[u8]) -> Result<Self, Malformed> {
        // The parser's own words could repeat a part of the request.
        let no_request = |error: serde_json::Error| Malformed::NoRequest { line: error.line(), column: error.column() };
        let request: Self = serde_json::from_slice(body).map_err(no_request)?;
        request.check()?;
        Ok(request)
    }

    /// The rules that hold for every program and every policy. A request that breaks one is malformed.
    ///
    /// # Errors
    /// With the rule that is broken; nothing of the request is in it.
    pub fn check(&self) -> Result<(), Malformed> {
        let program = self.argv.first().ok_or(Malformed::NoProgram)?;
        if program.is_empty() || program.contains(['/', '\0']) || program == "." || program == ".." {
            return Err(Malformed::NotBare);
        }
        if self.argv.iter().any(|word| word.contains('\0')) {
            return Err(Malformed::ZeroByte);
        }
        if let Some(file) = &self.stdin_file {
            if self.stdin.is_none() {
                return Err(Malformed::FileWithoutInput);
            }
            let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
            if !file.split('/').all(plain) {
                return Err(Malformed::BadFile);
            }
        }
        match &self.cwd {
            Some(cwd) if !cwd.starts_with('/') || cwd.contains('\0') => Err(Malformed::RelativeDirectory),
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the body is no request: line {line}, column {column}")]
    NoRequest { line: usize, column: usize },
    #[error("argv is empty: its first word names the program")]
    NoProgram,
    #[error("argv[0] must be a program's bare name, without a path")]
    NotBare,
    #[error("a word of argv has a zero byte")]
    ZeroByte,
    #[error("stdin_file needs stdin")]
    FileWithoutInput,
    #[error("stdin_file must be a relative path without '.' and '..'")]
    BadFile,
    #[error("cwd must be an absolute path")]
    RelativeDirectory,
}

/// The answer of `POST /exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub exit_code: i32,
    pub stdout: String,
    pub stderr: String,
    pub stdout_truncated: bool,
    pub stderr_truncated: bool,
    pub duration_ms: u64,
    pub timed_out: bool,
}

/// One line of the answer of `POST /exec/stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Event {
    Line { stream: Stream, line: String },
    Summary(Summary),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// The last line of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub exit_code: i32,
    pub duration_ms: u64,
    pub timed_out: bool,
    pub client_aborted: bool,
}

/// The answer of `GET /healthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub status: String,
    pub max_concurrency: usize,
}
