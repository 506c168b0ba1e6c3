//! What a program finds in its environment: never the channel's token, and for git nothing that somebody else could have set.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::signers;

/// Variables that are this server's own affair.
const OWN: &str = "EXEC_";
/// What git is given from the server's environment: where programs are, and the way out of a network with a proxy.
const FOR_GIT: [&str; 9] = [
    "PATH",
    "https_proxy",
    "HTTPS_PROXY",
    "http_proxy",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
];

/// Lists of directories. An entry that is empty or relative means the directory that a program is started in, which is a
/// clone: a release would choose the programs, libraries and modules. `PYTHONPATH=` and a colon too many are common.
const LISTS: [&str; 3] = ["PATH", "LD_LIBRARY_PATH", "PYTHONPATH"];

/// Settings that a clone's own cannot override. None is needed for what the policy allows; each closes a way to run a program
/// or to reach another place.
fn settings(around: &Surroundings<'_>) -> Vec<(&'static str, OsString)> {
    let mut all: Vec<(&str, OsString)> = [
        ("http.followRedirects", "false"),
        ("transfer.bundleURI", "false"),
        ("core.hooksPath", "/dev/null"),
        ("core.fsmonitor", "false"),
        ("core.sshCommand", "false"),
        ("core.pager", "cat"),
        ("credential.helper", ""),
        ("safe.bareRepository", "explicit"),
        ("submodule.recurse", "false"),
        ("fetch.recurseSubmodules", "false"),
        ("gc.auto", "0"),
        ("maintenance.auto", "false"),
    ]
    .into_iter()
    .map(|(key, value)| (key, value.into()))
    .collect();
    if let Some(pin) = around.pin {
        all.push(("http.curloptResolve", pin.into()));
    }
    all.extend(around.signers.map_or_else(signers::nobody, |ready| ready.settings.clone()));
    all
}

/// What the environment is made from.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// The server's own environment.
    pub own: &'a BTreeMap<OsString, OsString>,
    /// The part of the request's directory where nothing of the request gets by its name.
    pub home: &'a Path,
    /// Where the request's own files are.
    pub work: &'a Path,
    pub clone_root: &'a Path,
    /// The configured remote speaks plain HTTP: a development setting.
    pub remote_is_plain: bool,
    /// The remote's addresses, as git's `http.curloptResolve` wants them.
    pub pin: Option<&'a str>,
    /// Whose signatures count; nobody's, where there is none.
    pub signers: Option<&'a signers::Ready>,
    /// Answers git when it asks who the user is.
    pub askpass: Option<&'a Path>,
}

/// The whole environment of a program.
#[must_use]
pub fn of(program: &str, around: &Surroundings<'_>) -> BTreeMap<OsString, OsString> {
    match program {
        "git" => git(around),
        "az" => {
            let mut all = inherited(around);
            // Started in a clone, Python would take modules from it. Before 3.11 it does not know this.
            all.insert("PYTHONSAFEPATH".into(), "1".into());
            // What it packs goes with the request, also when it is killed.
            all.insert("TMPDIR".into(), around.home.into());
            all.insert("AZURE_CORE_COLLECT_TELEMETRY".into(), "no".into());
            all.insert("AZURE_EXTENSION_USE_DYNAMIC_INSTALL".into(), "no".into());
            all
        }
        _ => inherited(around),
    }
}

fn inherited(around: &Surroundings<'_>) -> BTreeMap<OsString, OsString> {
    let is_own = |name: &OsStr| name.as_encoded_bytes().starts_with(OWN.as_bytes());
    let all = around.own.iter().filter(|(name, _)| !is_own(name));
    all.filter_map(|(name, value)| Some((name.clone(), safe(name, value)?))).collect()
}

/// The variable's value without entries that mean the current directory; nothing, where nothing is left.
fn safe(name: &OsStr, value: &OsStr) -> Option<OsString> {
    if !LISTS.iter().any(|list| name == *list) {
        return Some(value.to_owned());
    }
    let kept: Vec<PathBuf> = std::env::split_paths(value).filter(|entry| entry.is_absolute()).collect();
    std::env::join_paths(kept).ok().filter(|list| !list.is_empty())
}

fn git(around: &Surroundings<'_>) -> BTreeMap<OsString, OsString> {
    let mut all: BTreeMap<OsString, OsString> = FOR_GIT
        .iter()
        .filter_map(|name| {
            let name = OsStr::new(name);
            Some((name.to_owned(), safe(name, around.own.get(name)?)?))
        })
        .collect();
    // A directory that is no clone is not to be taken for a part of one around it.
    let ceilings = std::env::join_paths([Some(around.clone_root), around.work.parent()].into_iter().flatten());
    let fixed: [(&str, &OsStr); 12] = [
        ("HOME", around.home.as_os_str()),
        ("XDG_CONFIG_HOME", around.home.as_os_str()),
        ("TMPDIR", around.home.as_os_str()),
        ("GIT_CEILING_DIRECTORIES", ceilings.as_deref().unwrap_or(around.clone_root.as_os_str())),
        // Beats every setting about protocols, also those of a clone.
        ("GIT_ALLOW_PROTOCOL", OsStr::new(if around.remote_is_plain { "http" } else { "https" })),
        ("LC_ALL", OsStr::new("C")),
        ("GIT_CONFIG_NOSYSTEM", OsStr::new("1")),
        ("GIT_CONFIG_GLOBAL", OsStr::new("/dev/null")),
        ("GIT_ATTR_NOSYSTEM", OsStr::new("1")),
        ("GIT_TERMINAL_PROMPT", OsStr::new("0")),
        ("GIT_TEMPLATE_DIR", OsStr::new("")),
        ("GIT_ASKPASS", around.askpass.map_or(OsStr::new(""), Path::as_os_str)),
    ];
    all.extend(fixed.into_iter().map(|(name, value)| (name.into(), value.to_owned())));
    let settings = settings(around);
    all.insert("GIT_CONFIG_COUNT".into(), settings.len().to_string().into());
    for (at, (key, value)) in settings.into_iter().enumerate() {
        all.insert(format!("GIT_CONFIG_KEY_{at}").into(), key.into());
        all.insert(format!("GIT_CONFIG_VALUE_{at}").into(), value);
    }
    all
}
