//! The rules between settings, and the merge with the environment. Every problem is told, each at its place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use replank_adapters::platform::docker::config::SecretSource;
use replank_core::phase::Mode;
use replank_core::policy::Policy;
use replank_core::record::OnRolloutFailure;
use replank_core::words::{ComponentName, InstallationId};

use super::data::data;
use super::env::Environment;
use super::outward;
use super::places::{az_exec_rules, exec, is_listed, registry};
use super::reader::{Document, Problem, nearest};
use super::{
    BuildSettings, Builder, ComponentSettings, CredentialSettings, LISTEN, PlatformSettings, Problems,
    RegistrySettings, ServerSettings, Settings, SourceSettings, raw, signed,
};

/// Contract §1: a validation that may take less than a minute fails healthy revisions on a busy machine.
const VALIDATING_MIN_SECONDS: u64 = 60;
/// No budget is longer than a week: a larger number is a unit mistaken.
const SECONDS_MAX: u64 = 7 * 24 * 3_600;
/// Ten years; more is a unit mistaken.
const KEEP_DAYS_MAX: u64 = 3_650;
const KEEP_COUNT_MAX: usize = 10_000;
const PARALLEL_MAX: u32 = 32;
/// Least memory that any real build gets by with.
const MEMORY_MIN: u64 = 64 * 1024 * 1024;
const PROOFS_MAX: u32 = 100;

pub fn settings(doc: &Document, file: &Path, env: &Environment) -> Result<Settings, Problems> {
    let Some(raw) = doc.read::<raw::Raw>() else {
        return Err(Problems(doc.problems()));
    };
    let home = file.parent().unwrap_or(Path::new("/")).to_path_buf();
    let mut outside = Vec::new();
    let at = |path: PathBuf| home.join(path);

    let builder = raw.build.builder;
    let registry = registry(doc, raw.registry, builder, env, &mut outside, &at);
    let exec = (builder == Builder::AzExec).then(|| exec(doc, raw.exec, env, &mut outside, &at));
    let data_seconds = raw.policy.budgets.data_seconds;
    let data = data(doc, &raw.components, &raw.containers, raw.backup, data_seconds);
    let components = components(doc, raw.components, &raw.build.secrets, registry.as_ref(), raw.application.as_ref());
    let mut platform = PlatformSettings {
        runs: runs(doc, raw.platform, !raw.containers.is_empty() || !raw.listeners.is_empty()),
        socket: raw.docker.socket.map_or_else(|| PathBuf::from("/var/run/docker.sock"), &at),
        containers: raw.containers,
        listeners: raw.listeners,
        networks: raw.networks,
        proxy: raw.proxy,
        data,
    };
    resolve(&mut platform, &at);
    references(doc, &platform);
    let source = source(doc, raw.source, builder, env, &mut outside, &at);
    let server = server(doc, raw.server);
    az_exec_rules(doc, builder, platform.runs, &components);
    let build = build(doc, raw.build, &at);
    let (policy, mode, on_rollout_failure) = policy(doc, raw.policy, build.parallel, env, &mut outside);
    if doc.keys(&["components"]).is_empty() {
        doc.problem(
            &["components"],
            "no component is configured",
            "add a table `[components.NAME]` for each image to build",
        );
    }
    if !doc.has(&["application"]) {
        doc.problem(
            &["application"],
            "`application` is missing",
            "add `application = \"NAME\"` at the top of the file",
        );
    }
    let telemetry = outward::telemetry(doc, raw.telemetry);
    let webhooks = outward::webhooks(doc, raw.webhooks, &at);
    let mut problems = doc.problems();
    problems.extend(outside);
    let Some(application) = raw.application.filter(|_| problems.is_empty()) else {
        return Err(Problems(problems));
    };
    let settings = Settings {
        file: file.to_path_buf(),
        home: home.clone(),
        application,
        source,
        server,
        build,
        registry,
        exec: exec.flatten(),
        components,
        platform,
        policy,
        mode,
        on_rollout_failure,
        telemetry,
        webhooks,
        admin_oids: list(env.get("UPGRADE_ADMIN_OIDS")),
        app_version: env.get("APP_VERSION").map(str::to_owned),
        container_app: env.get("CONTAINER_APP_NAME").map(str::to_owned),
        revision: env.get("REPLANK_REVISION").map(str::to_owned),
        auth_dev_bypass: env.get("AUTH_DEV_BYPASS").is_some_and(is_true),
    };
    platform_rules(doc, &settings)?;
    Ok(settings)
}

/// The platform's own rules come last: it stops at its first, and most of what it would say was said above with a place.
fn platform_rules(doc: &Document, settings: &Settings) -> Result<(), Problems> {
    if !settings.platform.runs {
        return Ok(());
    }
    // The rules do not depend on which installation it is.
    let Ok(any) = InstallationId::new("0".repeat(16)) else {
        return Ok(());
    };
    if let Err(fault) = settings.docker(any).validate() {
        let told = fault.told();
        doc.problem(&[], told.what, told.advice);
        return Err(Problems(doc.problems()));
    }
    Ok(())
}

/// Whether anything is run. Without a word about it: where there is something to run.
fn runs(doc: &Document, platform: Option<raw::Platform>, has_something: bool) -> bool {
    match platform {
        Some(raw::Platform::None) if has_something => {
            doc.problem(&["platform"], "nothing runs on platform \"none\"", "take out [containers] and [listeners]");
            false
        }
        Some(raw::Platform::None) => false,
        Some(raw::Platform::Docker) => true,
        None => has_something,
    }
}

fn components(
    doc: &Document,
    raw: BTreeMap<ComponentName, raw::Component>,
    secrets: &BTreeMap<String, SecretSource>,
    registry: Option<&RegistrySettings>,
    application: Option<&replank_core::words::AppName>,
) -> BTreeMap<ComponentName, ComponentSettings> {
    let known_secrets = doc.keys(&["build", "secrets"]);
    let one = |(name, c): (ComponentName, raw::Component)| {
        let dockerfile = c.dockerfile.unwrap_or_else(|| "Dockerfile".to_owned());
        let context = c.context.unwrap_or_else(|| ".".to_owned());
        for (key, value) in [("dockerfile", &dockerfile), ("context", &context)] {
            if let Err(rule) = inside(value) {
                doc.problem(&["components", name.as_str(), key], format!("{value:?} {rule}"), PATH_ADVICE);
            }
        }
        for secret in &c.secrets {
            if !secrets.contains_key(secret) && !known_secrets.contains(&secret.as_str()) {
                let advice =
                    meant(secret, &known_secrets, &format!("add `secrets.{secret} = {{ file = \"…\" }}` to [build]"));
                let what = format!("build secret {secret:?} is not configured");
                doc.problem(&["components", name.as_str(), "secrets"], what, advice);
            }
        }
        if let Some(arg) = c.commit_arg.as_ref().filter(|arg| !is_env_name(arg)) {
            let what = format!("build argument {arg:?} is not a name");
            doc.problem(&["components", name.as_str(), "commit_arg"], what, "use letters, digits and '_'");
        }
        if let Some(arg) = c.args.keys().find(|arg| !is_env_name(arg)) {
            let what = format!("build argument {arg:?} is not a name");
            doc.problem(&["components", name.as_str(), "args"], what, "use letters, digits and '_'");
        }
        let default = || match application {
            Some(application) => format!("{application}-{name}"),
            None => name.to_string(),
        };
        let short = c.repository.unwrap_or_else(default);
        if !is_repository(&short) {
            let what = format!("{short:?} is not a repository");
            doc.problem(
                &["components", name.as_str(), "repository"],
                what,
                "use lower case, digits, '.', '-', '_' and '/', and no tag",
            );
        }
        let repository = match registry {
            Some(r) if !short.starts_with(&format!("{}/", r.host)) => format!("{}/{short}", r.host),
            _ => short,
        };
        let settings = ComponentSettings {
            dockerfile,
            context,
            target: c.target,
            args: c.args,
            platform: c.platform,
            secrets: c.secrets,
            commit_arg: c.commit_arg,
            repository,
        };
        (name, settings)
    };
    let all: BTreeMap<_, _> = raw.into_iter().map(one).collect();
    let mut owners = BTreeMap::new();
    for (name, component) in &all {
        if let Some(other) = owners.insert(&component.repository, name) {
            let what = format!("components {other} and {name} share the repository {:?}", component.repository);
            doc.problem(
                &["components", name.as_str(), "repository"],
                what,
                "give each its own: tags of one would overwrite the other",
            );
        }
    }
    all
}

/// Checks that need only names, so that they also work beside entries that could not be read.
fn references(doc: &Document, platform: &PlatformSettings) {
    let components = doc.keys(&["components"]);
    let containers = doc.keys(&["containers"]);
    for (name, container) in &platform.containers {
        let wanted = container.component.as_str();
        if !components.contains(&wanted) {
            let advice = meant(wanted, &components, &format!("add `[components.{wanted}]`, or name one that exists"));
            let what = format!("there is no component {wanted:?}");
            doc.problem(&["containers", name.as_str(), "component"], what, advice);
        }
        for other in &container.depends_on {
            if !containers.contains(&other.as_str()) {
                let advice = meant(other.as_str(), &containers, "name one of the configured containers");
                let what = format!("there is no container {:?}", other.as_str());
                doc.problem(&["containers", name.as_str(), "depends_on"], what, advice);
            }
        }
        for network in container.networks.difference(&platform.networks) {
            let what = format!("network {network:?} is not declared");
            doc.problem(
                &["containers", name.as_str(), "networks"],
                what,
                format!("add it to `networks = [{network:?}]` at the top"),
            );
        }
    }
    let mut published = BTreeMap::new();
    let mut inside = BTreeMap::new();
    for (name, listener) in &platform.listeners {
        let wanted = listener.container.as_str();
        if !containers.contains(&wanted) {
            let advice = meant(wanted, &containers, "name one of the configured containers");
            doc.problem(&["listeners", name, "container"], format!("there is no container {wanted:?}"), advice);
        }
        if let Some(other) = published.insert((listener.bind, listener.publish), name) {
            let what = format!("port {} is already published by listener {other}", listener.publish);
            doc.problem(&["listeners", name, "publish"], what, "give one of them another port or address");
        } else if let Some(other) = inside.insert(listener.inside(), name) {
            let what = format!("port {} inside the proxy is already listener {other}'s", listener.inside());
            doc.problem(&["listeners", name], what, "give one of them another `listen` port");
        }
    }
}

/// Relative host paths are relative to the file.
fn resolve(platform: &mut PlatformSettings, at: &impl Fn(PathBuf) -> PathBuf) {
    for container in platform.containers.values_mut() {
        for mount in &mut container.mounts {
            if let Some(rest) = mount.source.strip_prefix("./") {
                mount.source = at(PathBuf::from(rest)).display().to_string();
            }
        }
        container.secrets.values_mut().for_each(|secret| resolve_secret(secret, at));
    }
    for tls in platform.listeners.values_mut().filter_map(|listener| listener.tls.as_mut()) {
        tls.certificate = at(tls.certificate.clone());
        tls.key = at(tls.key.clone());
    }
}

fn resolve_secret(secret: &mut SecretSource, at: &impl Fn(PathBuf) -> PathBuf) {
    if let SecretSource::File(path) = secret {
        *path = at(path.clone());
    }
}

fn source(
    doc: &Document,
    raw: Option<raw::Source>,
    builder: Builder,
    env: &Environment,
    outside: &mut Vec<Problem>,
    at: &impl Fn(PathBuf) -> PathBuf,
) -> Option<SourceSettings> {
    let from_env = env.get("UPGRADE_GIT_REMOTE").map(str::to_owned);
    let raw = raw.or_else(|| {
        from_env.as_ref().map(|_| raw::Source {
            remote: None,
            branch: "main".to_owned(),
            credential: None,
            allow_loopback: false,
            allow_private: false,
            ca_file: None,
            verify: None,
            allowed_signers_file: None,
            revoked_signers_file: None,
            openpgp_keyring_file: None,
        })
    })?;
    let verify = signed::verify(doc, &raw, builder, env, outside, at);
    let credential = raw.credential.and_then(|c| {
        let password = match (c.password_file, c.password_env) {
            (Some(file), None) => SecretSource::File(at(file)),
            (None, Some(name)) => SecretSource::Env(name),
            _ => {
                let advice = "give exactly one of password_file and password_env";
                doc.problem(&["source", "credential"], "the password has no single source", advice);
                return None;
            }
        };
        Some(CredentialSettings { username: c.username, password })
    });
    let allow_loopback = raw.allow_loopback || env.get("UPGRADE_GIT_ALLOW_LOOPBACK").is_some_and(is_true);
    // The environment wins, as everywhere: it is what a deployment changes without a new file.
    let from_file = from_env.is_none();
    let Some(remote) = from_env.or(raw.remote) else {
        doc.problem(&["source"], "`remote` is missing", "add `remote = \"https://HOST/PATH.git\"`, or remove [source]");
        return None;
    };
    let authority = remote.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or(""));
    let key = ["source", "remote"];
    // The text may hold a password, so no problem repeats it.
    if authority.is_empty() || !(remote.starts_with("https://") || (remote.starts_with("http://") && allow_loopback)) {
        doc.problem(&key, "the remote is not an https URL", "set it to https://HOST/PATH.git");
    } else if !remote.ends_with(".git") {
        doc.problem(&key, "the remote does not end in \".git\"", "set it to https://HOST/PATH.git");
    } else if from_file && authority.contains('@') {
        let advice = "take it out and use `[source.credential]` with password_file or password_env";
        doc.problem(&key, "the remote carries a credential", advice);
    }
    if let Some(allowed) = env.get("UPGRADE_GIT_REMOTE_ALLOWLIST")
        && !is_listed(allowed, &remote)
    {
        let what = "the git remote is not in it".to_owned();
        outside.push(variable(
            "UPGRADE_GIT_REMOTE_ALLOWLIST",
            what,
            "add its host or its URL, or take the list away".to_owned(),
        ));
    }
    Some(SourceSettings {
        remote,
        branch: raw.branch,
        credential,
        allow_loopback,
        allow_private: raw.allow_private,
        ca_file: raw.ca_file.map(at),
        verify,
    })
}

fn server(doc: &Document, raw: raw::Server) -> ServerSettings {
    let listen = match raw.listen.as_deref().map(str::parse) {
        None => LISTEN,
        Some(Ok(listen)) => listen,
        Some(Err(_)) => {
            doc.problem(&["server", "listen"], "expected an address and a port", "write it as \"127.0.0.1:8086\"");
            LISTEN
        }
    };
    for host in &raw.public_hosts {
        let wild = host.is_empty() || host.contains('*');
        if wild || http::uri::Authority::try_from(host.as_str()).is_err() || host.contains('@') {
            let what = format!("{host:?} is not a host or host:port");
            doc.problem(
                &["server", "public_hosts"],
                what,
                "write \"upgrade.example.org\", without scheme, path or '*'",
            );
        }
    }
    ServerSettings { listen, public_hosts: raw.public_hosts.iter().map(|host| host.to_ascii_lowercase()).collect() }
}

fn build(doc: &Document, raw: raw::Build, at: &impl Fn(PathBuf) -> PathBuf) -> BuildSettings {
    // One after the other, as the first customer's own way to build is; an engine of our own has room for more.
    let usual = if raw.builder == Builder::AzExec { 1 } else { 4 };
    let parallel = raw.parallel.unwrap_or(usual);
    if !(1..=PARALLEL_MAX).contains(&parallel) {
        doc.problem(
            &["build", "parallel"],
            format!("{parallel} builds at once are not possible"),
            format!("choose 1 to {PARALLEL_MAX}"),
        );
    }
    if raw.memory.is_some_and(|size| size.0 < MEMORY_MIN) {
        doc.problem(&["build", "memory"], "this is too little for any build", "give at least \"64MiB\"");
    }
    let cpu_millis = raw.cpus.map(|cpus| {
        if !(0.05..=1024.0).contains(&cpus) {
            doc.problem(&["build", "cpus"], format!("{cpus} is not a number of processors"), "choose 0.05 to 1024");
        }
        // A float cast saturates, and the range was checked.
        (cpus * 1000.0) as u32
    });
    let mut secrets = raw.secrets;
    secrets.values_mut().for_each(|secret| resolve_secret(secret, at));
    BuildSettings {
        builder: raw.builder,
        parallel: parallel as usize,
        memory_bytes: raw.memory.map(|size| size.0),
        cpu_millis,
        secrets,
    }
}

fn policy(
    doc: &Document,
    raw: raw::Policy,
    parallel: usize,
    env: &Environment,
    outside: &mut Vec<Problem>,
) -> (Policy, Mode, OnRolloutFailure) {
    let mut policy = Policy { parallel_builds: parallel, ..Policy::default() };
    let b = raw.budgets;
    let budgets = &mut policy.budgets;
    for (key, given, into, least) in [
        ("queued_seconds", b.queued_seconds, &mut budgets.queued, 1),
        ("fetching_seconds", b.fetching_seconds, &mut budgets.fetching, 1),
        ("building_seconds", b.building_seconds, &mut budgets.building, 1),
        ("patching_seconds", b.patching_seconds, &mut budgets.patching, 1),
        ("rolling_out_seconds", b.rolling_out_seconds, &mut budgets.rolling_out, 1),
        ("landing_seconds", b.landing_seconds, &mut budgets.landing, 1),
        ("validating_seconds", b.validating_seconds, &mut budgets.validating, VALIDATING_MIN_SECONDS),
        ("convergence_seconds", b.convergence_seconds, &mut budgets.convergence, 1),
        ("rolling_back_seconds", b.rolling_back_seconds, &mut budgets.rolling_back, 1),
    ] {
        seconds(doc, &["policy", "budgets", key], given, into, least);
    }
    seconds(doc, &["policy", "confirm_window_seconds"], raw.confirm_window_seconds, &mut budgets.confirm_window, 1);
    for (name, into, least) in [
        ("UPGRADE_CONFIRM_WINDOW_SECONDS", &mut budgets.confirm_window, 1),
        ("UPGRADE_VALIDATING_TIMEOUT_SECONDS", &mut budgets.validating, VALIDATING_MIN_SECONDS),
    ] {
        let Some(text) = env.get(name) else { continue };
        match text.parse::<u64>() {
            Ok(given) if (least..=SECONDS_MAX).contains(&given) => *into = given * 1_000,
            _ => outside.push(variable(
                name,
                format!("{text:?} is not usable"),
                format!("give {least} to {SECONDS_MAX} seconds"),
            )),
        }
    }
    seconds(doc, &["policy", "drift_after_seconds"], raw.drift_after_seconds, &mut policy.drift_after, 1);
    if let Some(proofs) = raw.proofs {
        if !(1..=PROOFS_MAX).contains(&proofs) {
            doc.problem(
                &["policy", "proofs"],
                format!("{proofs} is out of range"),
                format!("choose 1 to {PROOFS_MAX}"),
            );
        }
        policy.proofs = proofs;
    }
    if let Some(hours) = raw.keep_containers_hours {
        if hours > KEEP_DAYS_MAX * 24 {
            doc.problem(
                &["policy", "keep_containers_hours"],
                "this is out of range",
                format!("at most {}", KEEP_DAYS_MAX * 24),
            );
        }
        policy.keep_containers = hours.saturating_mul(3_600_000);
    }
    if let Some(days) = raw.keep_images_days {
        if !(1..=KEEP_DAYS_MAX).contains(&days) {
            doc.problem(
                &["policy", "keep_images_days"],
                "this is out of range",
                format!("choose 1 to {KEEP_DAYS_MAX}"),
            );
        }
        policy.keep_images = days.saturating_mul(24 * 3_600_000);
    }
    for (key, given, into) in [
        ("keep_builds", raw.keep_builds, &mut policy.keep_builds),
        ("keep_failed", raw.keep_failed, &mut policy.keep_failed),
        ("keep_logs", raw.keep_logs, &mut policy.keep_logs),
    ] {
        let Some(count) = given else { continue };
        if !(1..=KEEP_COUNT_MAX).contains(&count) {
            doc.problem(&["policy", key], "this is out of range", format!("choose 1 to {KEEP_COUNT_MAX}"));
        }
        *into = count;
    }
    let mode = match env.get("STRICT_BLUEGREEN") {
        Some(text) if is_true(text) => Mode::BlueGreen,
        Some("false" | "0") => raw.mode.unwrap_or(Mode::Single),
        Some(text) => {
            outside.push(variable(
                "STRICT_BLUEGREEN",
                format!("{text:?} is not usable"),
                "set it to true or false".to_owned(),
            ));
            Mode::Single
        }
        None => raw.mode.unwrap_or(Mode::Single),
    };
    (policy, mode, raw.on_rollout_failure.unwrap_or(OnRolloutFailure::Hold))
}

pub(super) fn seconds(doc: &Document, path: &[&str], given: Option<u64>, into: &mut u64, least: u64) {
    let Some(given) = given else { return };
    if (least..=SECONDS_MAX).contains(&given) {
        *into = given * 1_000;
    } else {
        doc.problem(path, format!("{given} s is out of range"), format!("choose {least} to {SECONDS_MAX}"));
    }
}

pub(super) fn variable(name: &str, what: String, advice: String) -> Problem {
    Problem { file: "environment".to_owned(), line: 0, column: 0, key: name.to_owned(), what, advice }
}

pub(super) fn list(text: Option<&str>) -> BTreeSet<String> {
    text.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

pub(super) fn is_true(text: &str) -> bool {
    text.eq_ignore_ascii_case("true") || text == "1"
}

fn meant(name: &str, known: &[&str], otherwise: &str) -> String {
    match nearest(name, known.iter().copied()) {
        Some(known) => format!("did you mean {known:?}?"),
        None => otherwise.to_owned(),
    }
}

pub(super) const PATH_ADVICE: &str = "give a path inside the release's tree";

/// A relative path that stays where it begins.
pub(super) fn inside(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        Err("is empty")
    } else if path.starts_with('/') {
        Err("is absolute")
    } else if path.split('/').any(|part| part == "..") {
        Err("leaves the tree with \"..\"")
    } else if path.chars().any(|c| c.is_control() || c == '\\') || path.len() > 512 {
        Err("is not a plain path")
    } else {
        Ok(())
    }
}

pub(super) fn is_env_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    first && name.len() <= 128 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn is_repository(text: &str) -> bool {
    let part = |p: &str| {
        p.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_:".contains(&b))
    };
    // A colon may stand in the first part only: a registry's port, never a tag.
    let colon = text.split('/').skip(1).any(|p| p.contains(':')) || (!text.contains('/') && text.contains(':'));
    !text.is_empty() && text.len() <= 200 && !colon && text.split('/').all(part)
}
