//! What a program finds in its environment: never the channel's token, and for git nothing that somebody else could have set.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;

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

/// Settings that a clone's own cannot override. None is needed for what the policy allows; each closes a way to run a program
/// or to reach another place.
fn settings(remote_is_plain: bool, allowed_signers: Option<&Path>) -> Vec<(&'static str, OsString)> {
    let mut all: Vec<(&str, OsString)> = [
        ("protocol.allow", "never"),
        ("protocol.https.allow", "always"),
        ("http.followRedirects", "false"),
        ("core.hooksPath", "/dev/null"),
        ("core.fsmonitor", "false"),
        ("core.sshCommand", "false"),
        ("core.pager", "cat"),
        ("credential.helper", ""),
        ("safe.bareRepository", "explicit"),
        ("submodule.recurse", "false"),
        ("gc.auto", "0"),
        ("maintenance.auto", "false"),
    ]
    .into_iter()
    .map(|(key, value)| (key, value.into()))
    .collect();
    if remote_is_plain {
        all.push(("protocol.http.allow", "always".into()));
    }
    if let Some(file) = allowed_signers {
        all.push(("gpg.format", "ssh".into()));
        all.push(("gpg.ssh.allowedSignersFile", file.into()));
    }
    all
}

/// What the environment is made from.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// The server's own environment.
    pub own: &'a BTreeMap<OsString, OsString>,
    /// The request's fresh directory.
    pub fresh: &'a Path,
    pub clone_root: &'a Path,
    /// The configured remote speaks plain HTTP: a development setting.
    pub remote_is_plain: bool,
    pub allowed_signers: Option<&'a Path>,
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
            // Started in a clone, Python would take modules from it.
            all.insert("PYTHONSAFEPATH".into(), "1".into());
            all.insert("AZURE_CORE_COLLECT_TELEMETRY".into(), "no".into());
            all.insert("AZURE_EXTENSION_USE_DYNAMIC_INSTALL".into(), "no".into());
            all
        }
        _ => inherited(around),
    }
}

fn inherited(around: &Surroundings<'_>) -> BTreeMap<OsString, OsString> {
    let is_own = |name: &OsStr| name.as_encoded_bytes().starts_with(OWN.as_bytes());
    around.own.iter().filter(|(name, _)| !is_own(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn git(around: &Surroundings<'_>) -> BTreeMap<OsString, OsString> {
    let mut all: BTreeMap<OsString, OsString> = FOR_GIT
        .iter()
        .filter_map(|name| Some((OsString::from(name), around.own.get(OsStr::new(name))?.clone())))
        .collect();
    let fixed: [(&str, &OsStr); 11] = [
        ("HOME", around.fresh.as_os_str()),
        ("XDG_CONFIG_HOME", around.fresh.as_os_str()),
        ("TMPDIR", around.fresh.as_os_str()),
        // A directory that is no clone is not to be taken for a part of one around it.
        ("GIT_CEILING_DIRECTORIES", around.clone_root.as_os_str()),
        ("LC_ALL", OsStr::new("C")),
        ("GIT_CONFIG_NOSYSTEM", OsStr::new("1")),
        ("GIT_CONFIG_GLOBAL", OsStr::new("/dev/null")),
        ("GIT_ATTR_NOSYSTEM", OsStr::new("1")),
        ("GIT_TERMINAL_PROMPT", OsStr::new("0")),
        ("GIT_TEMPLATE_DIR", OsStr::new("")),
        ("GIT_ASKPASS", around.askpass.map_or(OsStr::new(""), Path::as_os_str)),
    ];
    all.extend(fixed.into_iter().map(|(name, value)| (name.into(), value.to_owned())));
    let settings = settings(around.remote_is_plain, around.allowed_signers);
    all.insert("GIT_CONFIG_COUNT".into(), settings.len().to_string().into());
    for (at, (key, value)) in settings.into_iter().enumerate() {
        all.insert(format!("GIT_CONFIG_KEY_{at}").into(), key.into());
        all.insert(format!("GIT_CONFIG_VALUE_{at}").into(), value);
    }
    all
}
