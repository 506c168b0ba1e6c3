//! Where else things are: the registry, the exec server, the remotes that are allowed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use replank_adapters::platform::docker::config::SecretSource;
use replank_core::words::ComponentName;
use replank_exec::client::Client;
use replank_exec::policy::CLONE_ROOT;
use replank_exec::protocol::DEFAULT_PORT;

use super::check::{is_true, list, seconds, variable};
use super::env::Environment;
use super::reader::{Document, Problem};
use super::{Builder, ComponentSettings, ExecSettings, RegistrySettings, raw};

/// Most builds in a registry's own service are over by then; beginning another one is no harm, only a waste.
const WAIT_OUT_SECONDS: u64 = 300;

/// Until a platform stands that these images run on.
pub(super) fn az_exec_rules(
    doc: &Document,
    builder: Builder,
    runs: bool,
    components: &BTreeMap<ComponentName, ComponentSettings>,
) {
    if builder != Builder::AzExec {
        if doc.has(&["exec"]) {
            doc.problem(
                &["exec"],
                "nothing uses the exec channel",
                "set `builder = \"az-exec\"` in [build], or take it out",
            );
        }
        return;
    }
    if runs {
        let advice = "set `platform = \"none\"` and take out [containers] and [listeners], or use builder \"docker\"";
        doc.problem(&["build", "builder"], "the Docker platform runs only what builder \"docker\" builds", advice);
    }
    for (name, _) in components.iter().filter(|(_, component)| !component.secrets.is_empty()) {
        let advice = "take them out: `az acr build` would show them in its arguments";
        doc.problem(&["components", name.as_str(), "secrets"], "builder \"az-exec\" gives no build secrets", advice);
    }
}

/// The host of the Azure registry that the environment names.
pub(super) fn login_server(env: &Environment) -> Option<String> {
    let given = env.get("PLATFORM_ACR_LOGIN_SERVER").map(str::to_owned);
    given.or_else(|| env.get("PLATFORM_ACR_NAME").map(|name| format!("{}.azurecr.io", name.to_ascii_lowercase())))
}

pub(super) fn registry(
    doc: &Document,
    raw: Option<raw::Registry>,
    builder: Builder,
    env: &Environment,
    outside: &mut Vec<Problem>,
    at: &impl Fn(PathBuf) -> PathBuf,
) -> Option<RegistrySettings> {
    let is_azure = builder == Builder::AzExec;
    let from_env = env.get("PLATFORM_ACR_NAME").filter(|_| is_azure).map(str::to_owned);
    if raw.is_none() && !is_azure {
        return None;
    }
    let raw = raw.unwrap_or_default();
    let acr = from_env.or(raw.acr);
    let is_name = |name: &String| (5..=50).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric());
    let whose = if doc.has(&["registry", "acr"]) { "registry.acr" } else { "PLATFORM_ACR_NAME" };
    match &acr {
        None if is_azure => {
            let advice = "set it to the container registry's name, without .azurecr.io";
            outside.push(variable(
                "PLATFORM_ACR_NAME",
                "is not set, and [registry] has no `acr`".to_owned(),
                advice.to_owned(),
            ));
        }
        Some(name) if !is_name(name) => {
            let advice = "give 5 to 50 letters and digits, without .azurecr.io";
            outside.push(variable(whose, format!("{name:?} is not a container registry's name"), advice.to_owned()));
        }
        Some(_) | None => {}
    }
    let of_name = || acr.as_ref().map(|name| format!("{}.azurecr.io", name.to_ascii_lowercase()));
    let from_env = login_server(env).filter(|_| is_azure && env.get("PLATFORM_ACR_LOGIN_SERVER").is_some());
    let host = from_env.or(raw.host).or_else(of_name).unwrap_or_default();
    let host_ok = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
    if !host_ok && !is_azure {
        let what = if host.is_empty() {
            "`host` is missing".to_owned()
        } else {
            format!("{host:?} is not a host or host:port")
        };
        doc.problem(&["registry", "host"], what, "write a host or host:port, without scheme and path");
    }
    if raw.username.is_some() != raw.password_file.is_some() {
        doc.problem(&["registry"], "username and password_file go together", "give both or neither");
    }
    Some(RegistrySettings {
        host,
        acr,
        push: raw.push.unwrap_or(true),
        insecure: raw.insecure,
        username: raw.username,
        password_file: raw.password_file.map(at),
    })
}

pub(super) fn exec(
    doc: &Document,
    raw: Option<raw::Exec>,
    env: &Environment,
    outside: &mut Vec<Problem>,
    at: &impl Fn(PathBuf) -> PathBuf,
) -> Option<ExecSettings> {
    let raw = raw.unwrap_or_default();
    let from_env = env.get("TERMINAL_EXEC_UPSTREAM").map(str::to_owned);
    let (is_from_env, url) = (from_env.is_some(), from_env.or(raw.url));
    let url = url.unwrap_or_else(|| format!("http://127.0.0.1:{DEFAULT_PORT}"));
    if Client::new(&url, "").is_err() {
        let (what, advice) = ("this is not an exec server's address", "write it as http://HOST:PORT");
        if is_from_env {
            outside.push(variable("TERMINAL_EXEC_UPSTREAM", what.to_owned(), advice.to_owned()));
        } else {
            doc.problem(&["exec", "url"], what, advice);
        }
    }
    let token = match (env.get("EXEC_TOKEN"), raw.token_file, raw.token_env) {
        (Some(_), _, _) => Some(SecretSource::Env("EXEC_TOKEN".to_owned())),
        (None, Some(file), None) => Some(SecretSource::File(at(file))),
        (None, None, Some(name)) => Some(SecretSource::Env(name)),
        (None, None, None) => {
            let advice = "give this service and the exec server the same token of 16 to 1024 characters";
            outside.push(variable("EXEC_TOKEN", "is not set".to_owned(), advice.to_owned()));
            None
        }
        (None, Some(_), Some(_)) => {
            doc.problem(&["exec"], "the token has two sources", "give one of token_file and token_env");
            None
        }
    };
    let clone_root = env.get("EXEC_CLONE_ROOT").map(PathBuf::from).or(raw.clone_root);
    let clone_root = clone_root.unwrap_or_else(|| PathBuf::from(CLONE_ROOT));
    if !clone_root.is_absolute() {
        doc.problem(&["exec", "clone_root"], "this is not an absolute path", "give the exec server's EXEC_CLONE_ROOT");
    }
    let mut wait_out = WAIT_OUT_SECONDS * 1_000;
    seconds(doc, &["exec", "wait_out_seconds"], raw.wait_out_seconds, &mut wait_out, 0);
    Some(ExecSettings {
        url,
        token: token?,
        clone_root,
        credential_in_url: raw.credential_in_url || env.get("EXEC_CREDENTIAL_IN_URL").is_some_and(is_true),
        wait_out: Duration::from_millis(wait_out),
        client_id: env.get("AZURE_CLIENT_ID").map(str::to_owned).or(raw.client_id),
    })
}

/// Entries are hosts or beginnings of URLs, separated by commas. Neither user nor case of the host counts.
pub(super) fn is_listed(allowed: &str, remote: &str) -> bool {
    let plain = super::shown(remote);
    let host = plain.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default();
    list(Some(allowed)).iter().any(|entry| match entry.split_once("://") {
        // A beginning ends where a part of the path does: `…/acme` is not the beginning of `…/acme-evil/x.git`.
        Some(_) => plain
            .strip_prefix(entry.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || entry.ends_with('/')),
        None => host.eq_ignore_ascii_case(entry),
    })
}
