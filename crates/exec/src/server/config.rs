//! The server's settings, from its environment and nowhere else.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::remote::Remote;
use crate::outbound::Reach;
use crate::policy::{PROGRAMS, Rules};
use crate::protocol::DEFAULT_PORT;
use crate::signers::Signers;

const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=1_024;
/// As much as the git source allows.
const CLONE_BYTES: u64 = 4 * 1024 * 1024 * 1024;
const MEBIBYTE: usize = 1024 * 1024;

/// Whether what the policy refuses is refused, or only reported so that an existing deployment can move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Enforce,
    Audit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub listen: SocketAddr,
    pub token: Token,
    pub rules: Rules,
    /// The same one as in the rules, as somewhere to connect to.
    pub remote: Option<Remote>,
    /// What the operator opens beyond public addresses.
    pub reach: Reach,
    pub mode: Mode,
    /// Keys that `git verify-tag` trusts.
    pub signers: Signers,
    /// Programs at the same time.
    pub max_concurrency: usize,
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Bytes of each output that `POST /exec` answers.
    pub max_output: usize,
    /// Bytes of a line that `POST /exec/stream` sends.
    pub max_line: usize,
    /// Bytes that a clone may take on the disk.
    pub max_clone: u64,
    /// `None`: no limit.
    pub rate: Option<Rate>,
}

/// Starts of each program in a window of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub starts: u32,
    pub window: Duration,
}

/// Shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// A variable that keeps the server from starting. No value is in it, as it may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} {what}")]
pub struct Unusable {
    pub name: &'static str,
    pub what: String,
}

fn unusable<T>(name: &'static str, what: impl Into<String>) -> Result<T, Unusable> {
    Err(Unusable { name, what: what.into() })
}

impl Config {
    /// Reads the settings. `get` answers a variable of the environment; an empty one counts as absent.
    ///
    /// # Errors
    /// With the first variable that cannot be used.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, Unusable> {
        let get = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let token = match get("EXEC_TOKEN") {
            Some(token) if TOKEN_LENGTH.contains(&token.chars().count()) => Token(token),
            Some(_) => {
                let (least, most) = (TOKEN_LENGTH.start(), TOKEN_LENGTH.end());
                return unusable("EXEC_TOKEN", format!("must have {least} to {most} characters"));
            }
            None => return unusable("EXEC_TOKEN", "is not set: give the server a token of 16 to 1024 characters"),
        };
        let host = match get("EXEC_HOST").as_deref() {
            None | Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(text) => match text.parse() {
                Ok(host) => host,
                Err(_) => return unusable("EXEC_HOST", "is not an IP address"),
            },
        };
        let container_app = get("CONTAINER_APP_NAME");
        if container_app.is_some() && !host.is_loopback() {
            return unusable("EXEC_HOST", "must be a loopback address where CONTAINER_APP_NAME is set");
        }
        let port = number(&get, "EXEC_PORT", DEFAULT_PORT, 0..=u16::MAX)?;
        let clone_root = get("EXEC_CLONE_ROOT").map_or_else(|| Rules::default().clone_root, PathBuf::from);
        let is_plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        if !clone_root.is_absolute() || clone_root == Path::new("/") || !clone_root.components().all(is_plain) {
            return unusable("EXEC_CLONE_ROOT", "must be an absolute path below /, without '..'");
        }
        let loopback = switch(&get, "EXEC_ALLOW_LOOPBACK_REMOTE")?;
        // Development: a git server in a container next door has a private address.
        let reach = Reach { loopback, private: loopback || switch(&get, "EXEC_ALLOW_PRIVATE_REMOTE")? };
        let rules = Rules {
            programs: programs(get("EXEC_ALLOWED_BINARIES").as_deref())?,
            clone_root,
            remote: get("UPGRADE_GIT_REMOTE"),
            registry: get("PLATFORM_ACR_NAME"),
            container_app,
            resource_group: get("AZURE_RESOURCE_GROUP"),
        };
        let remote = match rules.remote.as_deref().map(|url| Remote::read(url, reach)).transpose() {
            Ok(remote) => remote,
            Err(what) => return unusable("UPGRADE_GIT_REMOTE", what),
        };
        let mode = match get("EXEC_POLICY").as_deref() {
            None | Some("enforce") => Mode::Enforce,
            Some("audit") => Mode::Audit,
            Some(_) => return unusable("EXEC_POLICY", "must be enforce or audit"),
        };
        let signers = Signers {
            allowed: absolute(&get, "EXEC_ALLOWED_SIGNERS_FILE")?,
            revoked: absolute(&get, "EXEC_REVOKED_SIGNERS_FILE")?,
            openpgp: absolute(&get, "EXEC_OPENPGP_KEYRING_FILE")?,
        };
        let limited = switch(&get, "STRICT_EXEC_RATE_LIMIT")?;
        let starts = number(&get, "EXEC_RATE_LIMIT_PER_WINDOW", 120, 1..=1_000_000)?;
        let window = number(&get, "EXEC_RATE_LIMIT_WINDOW_SECONDS", 60, 1..=86_400)?;
        Ok(Self {
            listen: SocketAddr::new(host, port),
            token,
            rules,
            remote,
            reach,
            mode,
            signers,
            max_concurrency: number(&get, "EXEC_MAX_CONCURRENCY", 4, 1..=256)?,
            max_body: number(&get, "EXEC_MAX_BODY_BYTES", 8 * MEBIBYTE, 1024..=64 * MEBIBYTE)?,
            max_output: number(&get, "EXEC_RUN_MAX_OUTPUT_BYTES", 8 * MEBIBYTE, 1024..=64 * MEBIBYTE)?,
            max_line: number(&get, "EXEC_STREAM_LINE_MAX_BYTES", 64 * 1024, 64..=MEBIBYTE)?,
            max_clone: number(&get, "EXEC_CLONE_MAX_BYTES", CLONE_BYTES, 1024 * 1024..=1 << 40)?,
            rate: limited.then(|| Rate { starts, window: Duration::from_secs(window) }),
        })
    }
}

/// Names separated by commas or space, each one that the channel knows: the list can only be made shorter.
fn programs(text: Option<&str>) -> Result<BTreeSet<String>, Unusable> {
    const NAME: &str = "EXEC_ALLOWED_BINARIES";
    let Some(text) = text else { return Ok(Rules::default().programs) };
    let given: BTreeSet<String> = text.split([',', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if given.is_empty() || !given.iter().all(|name| PROGRAMS.contains(&name.as_str())) {
        return unusable(NAME, format!("must name some of {}", PROGRAMS.join(" ")));
    }
    Ok(given)
}

/// A file that means the same in whatever directory a program is started: a clone's own would let a release say who may sign it.
fn absolute(get: &impl Fn(&str) -> Option<String>, name: &'static str) -> Result<Option<PathBuf>, Unusable> {
    match get(name).map(PathBuf::from) {
        Some(path) if !path.is_absolute() => unusable(name, "must be an absolute path"),
        path => Ok(path),
    }
}

/// Off unless it is set.
fn switch(get: &impl Fn(&str) -> Option<String>, name: &'static str) -> Result<bool, Unusable> {
    match get(name) {
        Some(text) if text.eq_ignore_ascii_case("true") || text == "1" => Ok(true),
        None => Ok(false),
        Some(text) if text.eq_ignore_ascii_case("false") || text == "0" => Ok(false),
        Some(_) => unusable(name, "must be true or false"),
    }
}

fn number<N>(
    get: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    default: N,
    range: std::ops::RangeInclusive<N>,
) -> Result<N, Unusable>
where
    N: FromStr + PartialOrd + fmt::Display,
{
    let Some(text) = get(name) else { return Ok(default) };
    match text.parse() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => unusable(name, format!("must be a number from {} to {}", range.start(), range.end())),
    }
}
