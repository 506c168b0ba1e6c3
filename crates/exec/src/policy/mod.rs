//! What may be run: a pure judgement of one request against the operator's rules.
//!
//! Each request is judged alone, and yet sequences are safe: no allowed call can leave something behind that makes a later
//! one run a program, because the only setting that can be written is the remote's URL, and only to the configured remote.
//! What somebody else may have left, a release in its tree or an earlier server in its clones, only the file system can tell:
//! [`Allowed`] says what has to be looked at before the request runs.

mod az;
mod git;
mod options;
pub(crate) mod url;

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::protocol::Request;

/// Programs that the channel knows, unless the operator leaves some out.
pub const PROGRAMS: [&str; 6] = ["az", "azcopy", "elastic-blast", "elb", "git", "kubectl"];
/// Where clones go unless told otherwise.
pub const CLONE_ROOT: &str = "/tmp/elb-upgrade";

/// What requests are bound to. A binding that is not set refuses what would need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub programs: BTreeSet<String>,
    /// Absolute, without `..`.
    pub clone_root: PathBuf,
    /// The one remote that git may talk to.
    pub remote: Option<String>,
    /// Name of the one container registry.
    pub registry: Option<String>,
    pub container_app: Option<String>,
    pub resource_group: Option<String>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            programs: PROGRAMS.iter().map(|name| (*name).to_owned()).collect(),
            clone_root: PathBuf::from(CLONE_ROOT),
            remote: None,
            registry: None,
            container_app: None,
            resource_group: None,
        }
    }
}

/// A request that may run, if the file system agrees.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Paths that must lie below the clone root after every symbolic link is followed, as far as they exist: words alone
    /// cannot tell, since a release's own tree may hold links.
    pub inside: Vec<PathBuf>,
    /// Clones that git is run in: their settings must be such as git itself writes.
    pub clones: Vec<PathBuf>,
    /// The context of a build. It must be a directory: the CLI takes a path that is not there for a remote one.
    pub context: Option<PathBuf>,
    /// A clone that it fills.
    pub fills: Option<PathBuf>,
    /// It talks to the remote, whose addresses are to be judged first.
    pub talks: bool,
}

/// Why a request may not run. It says the rule and nothing of the request, so that it can be logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("the program is not in the allowlist")]
    Program,
    #[error("{0}")]
    Rule(&'static str),
}

type Judged<T> = Result<T, Denied>;

fn rule<T>(text: &'static str) -> Judged<T> {
    Err(Denied::Rule(text))
}

/// Whether the program itself may be run, whatever its arguments. Holds in every mode.
///
/// # Errors
/// [`Denied::Program`].
pub fn program(rules: &Rules, request: &Request) -> Result<(), Denied> {
    let known = request.argv.first().is_some_and(|name| rules.programs.contains(name));
    if known { Ok(()) } else { Err(Denied::Program) }
}

/// Whether a well-formed request may run.
///
/// # Errors
/// With the rule that it breaks.
pub fn judge(rules: &Rules, request: &Request) -> Result<Allowed, Denied> {
    program(rules, request)?;
    let words: Vec<&str> = request.argv.iter().skip(1).map(String::as_str).collect();
    let cwd = request.cwd.as_deref().map(Path::new);
    let name = request.argv.first().map(String::as_str);
    if matches!(name, Some("git" | "az")) && request.stdin_file.is_some() {
        // Both take settings from where they are started: `.git`, which may lead to any directory, and `.azure`.
        return rule("git and az take no file");
    }
    match name {
        Some("git") => git::judge(rules, &words, cwd),
        Some("az") => az::judge(rules, &words, cwd),
        // Whoever may run these may run anything: the allowlist is all there is to say.
        _ => Ok(Allowed::default()),
    }
}

/// A path below the clone root by its words: absolute, plain, and not the root itself.
fn below_root<'a>(rules: &Rules, path: &'a Path) -> Judged<&'a Path> {
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    // `components` drops "." in the middle and doubled slashes, which mean the same place to everybody.
    let inside = path.strip_prefix(&rules.clone_root).is_ok_and(|rest| rest.components().next().is_some());
    if plain && path.is_absolute() && inside { Ok(path) } else { rule("the directory must lie below the clone root") }
}

/// A path that stays below where it is taken from, and is nothing but a path to everybody who reads it.
fn relative(path: &str) -> Judged<()> {
    let plain = |part: Component<'_>| match part {
        // What git keeps of a clone may hold a credential.
        Component::Normal(name) => !name.eq_ignore_ascii_case(".git"),
        part => part == Component::CurDir,
    };
    let character = |c: char| c.is_alphanumeric() || "._/+,= -".contains(c);
    // The CLI takes this beginning for a remote repository.
    let is_remote = path.get(..11).is_some_and(|start| start.eq_ignore_ascii_case("github.com/"));
    let begins_well = !path.is_empty() && !path.starts_with(['-', ' ']) && !is_remote;
    if begins_well && path.chars().all(character) && Path::new(path).components().all(plain) {
        Ok(())
    } else {
        rule("the path must be relative and stay in the clone")
    }
}

fn bound<'a>(binding: Option<&'a String>, unset: &'static str) -> Judged<&'a str> {
    binding.map_or(rule(unset), |value| Ok(value.as_str()))
}
