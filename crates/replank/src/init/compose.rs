//! The compose file as a whole: what each service is, which of them share an image, and which networks and volumes they mean.

use std::collections::{BTreeMap, BTreeSet};

use replank_adapters::platform::docker::config::ProbeConfig;
use replank_core::record::Overlap;
use replank_core::words::{ComponentName, ContainerName};

use super::health::Check;
use super::mounts::{self, Stores};
use super::plan::{BuildPlan, Kind, Service, label};
use super::reading::{Reading, is_extension};
use super::service::{self, Draft};
use super::yaml::{Node, Value};
use super::{build, environment};

/// Compose's own order.
pub const FILES: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];
/// Merged by compose without being asked.
const OVERRIDES: [&str; 4] =
    ["compose.override.yaml", "compose.override.yml", "docker-compose.override.yaml", "docker-compose.override.yml"];
/// Most services that are read: Replank runs at most 64 containers.
const SERVICES_MAX: usize = 256;

/// Words in a name or a command that mean: it starts work by the clock, and two of them would start it twice.
const CRON_WORDS: [&str; 8] = ["cron", "crond", "supercronic", "beat", "scheduler", "schedule", "ofelia", "crontab"];
/// Words in the name of what runs once before the others.
const JOB_WORDS: [&str; 8] = ["migrate", "migration", "migrations", "migrator", "seed", "init", "setup", "bootstrap"];

/// What the compose file comes to.
#[derive(Debug, Default)]
pub struct Composed {
    pub components: BTreeMap<ComponentName, BuildPlan>,
    pub services: Vec<Service>,
    pub networks: BTreeSet<String>,
    pub build_secrets: BTreeMap<String, String>,
    pub secret_files: BTreeMap<String, String>,
}

/// The networks of the file: what the engine calls each, and whether it is there without compose.
type Networks = BTreeMap<String, (String, bool)>;

pub fn read(reading: &Reading<'_>, root: &Node) -> Composed {
    let empty = Node { line: 0, value: Value::Null };
    let (mut services, mut networks, mut stores) = (&empty, &empty, Stores::default());
    for (key, value) in reading.table(root, "") {
        match key.as_str() {
            "name" => {}
            "services" => services = value,
            "networks" => networks = value,
            "volumes" => stores.volumes = mounts::volumes(reading, value),
            "secrets" => stores.secrets = mounts::secrets(reading, value),
            "version" => reading.note("", "version is left out: compose itself has no use for it any more"),
            // Refused where a service uses one.
            "configs" => {}
            "include" => reading.refuse(
                value.line,
                "include",
                "parts in other files are not read",
                "write the services into this file",
            ),
            "models" => reading.refuse(
                value.line,
                "models",
                "this cannot be reproduced",
                "leave it to compose, in a file of its own",
            ),
            other if is_extension(other) => {}
            _ => reading.unknown(value.line, key.clone()),
        }
    }
    let services = reading.table(services, "services");
    if services.is_empty() {
        reading.refuse(0, "services", "the file has no services", "name the right file with --file");
    }
    if services.len() > SERVICES_MAX {
        reading.refuse(
            0,
            "services",
            format!("there are {} services", services.len()),
            format!("at most {SERVICES_MAX} are read"),
        );
        return Composed::default();
    }
    for file in OVERRIDES.iter().chain(&FILES).filter(|file| reading.base == "." && **file != reading.file) {
        if reading.repo.is_file(file) {
            reading.note("", format!("{file} is not read: only {} is", reading.file));
        }
    }
    let networks = declared(reading, networks);
    assemble(reading, services, &networks, &stores)
}

fn declared(reading: &Reading<'_>, node: &Node) -> Networks {
    let mut all = Networks::from([("default".to_owned(), (format!("{}_default", reading.project), false))]);
    for (name, network) in reading.table(node, "networks") {
        let key = format!("networks.{name}");
        let (mut real, mut external) = (None, false);
        // Everything else is compose's affair: it makes the network.
        for (option, value) in reading.table(network, &key) {
            match option.as_str() {
                "name" => real = reading.text(value, &format!("{key}.name")),
                "external" => external = reading.truth(value, &format!("{key}.external")),
                _ => {}
            }
        }
        let usual = if external { name.clone() } else { format!("{}_{name}", reading.project) };
        all.insert(name.clone(), (real.unwrap_or(usual), external));
    }
    all
}

/// A service before its keys are read.
struct Raw<'n> {
    name: &'n str,
    node: &'n Node,
    kind: Option<Kind>,
    build: Option<BuildPlan>,
}

fn assemble(reading: &Reading<'_>, services: &[(String, Node)], networks: &Networks, stores: &Stores) -> Composed {
    let mut composed = Composed::default();
    let mut raws: Vec<Raw<'_>> =
        services.iter().map(|(name, node)| Raw { name, node, kind: None, build: None }).collect();
    classify(reading, services, &mut raws);
    for raw in &mut raws {
        if raw.kind.is_some() {
            continue;
        }
        let (name, node) = built_by(services, raw.name, raw.node);
        raw.build = node.get("build").and_then(|b| build::read(reading, name, b, stores, &mut composed.build_secrets));
        if let (Some(plan), Some(platform)) = (&mut raw.build, raw.node.get("platform")) {
            let key = format!("services.{}.platform", raw.name);
            plan.platform = plan.platform.take().or_else(|| reading.text(platform, &key));
        }
    }
    let dockerfile = |path: &str| reading.repo.dockerfile(path).ok().flatten().unwrap_or_default();
    raws.retain(|raw| {
        let is_replank = raw.build.as_ref().is_some_and(|plan| dockerfile(&plan.dockerfile).is_controller);
        if is_replank {
            reading.note("", format!("service {} is Replank itself: the controller below takes its place", raw.name));
        }
        !is_replank
    });
    let names = components(reading, &raws, &mut composed.components);
    let left_alone = |raw: &&Raw<'_>| raw.kind == Some(Kind::ThirdParty);
    let foreign: BTreeSet<String> = raws.iter().filter(left_alone).flat_map(|raw| raw_networks(raw.node)).collect();

    let mut containers: BTreeMap<ContainerName, &str> = BTreeMap::new();
    for raw in &raws {
        let image = raw.node.get("image").map(|image| shown(reading, image)).unwrap_or_default();
        let mut service = Service {
            name: raw.name.to_owned(),
            line: raw.node.line,
            kind: raw.kind.unwrap_or(Kind::Worker),
            image,
            container: None,
            ports: Vec::new(),
            hint: None,
        };
        if raw.kind.is_some() {
            if service.kind == Kind::ThirdParty && raw.node.get("network_mode").is_some() {
                let note = format!(
                    "{} is on no network that the application could join: it is reached through the host",
                    raw.name
                );
                reading.note("", note);
            }
            composed.services.push(service);
            continue;
        }
        // Before anything else: a name that cannot be one has no component either.
        let Some(container) = container_name(reading, raw) else { continue };
        let (Some(plan), Some(component)) = (&raw.build, names.get(raw.name)) else {
            composed.services.push(service);
            continue;
        };
        if let Some(other) = containers.insert(container.clone(), raw.name) {
            let what = format!("services {other} and {} would both be container {container}", raw.name);
            reading.refuse(raw.node.line, format!("services.{}", raw.name), what, "rename one of them");
        }
        let mut draft = service::read(reading, raw.name, raw.node, component, stores);
        let image = dockerfile(&plan.dockerfile);
        draft.check = draft.check.take().or_else(|| image.check.clone());
        probe(reading, raw.name, &mut draft);
        service.kind = kind(raw.name, &draft);
        if service.kind == Kind::Cron {
            draft.run.overlap = Some(Overlap::StopOldFirst);
        }
        service.hint = draft.ports.first().map(|p| p.port).or(image.ports.first().copied());
        let mut run = draft.run;
        run.networks = shared_networks(reading, raw, &draft.networks, networks, &foreign);
        run.depends_on = started_before(reading, raw, &draft.depends_on, &raws);
        composed.networks.extend(run.networks.iter().cloned());
        environment::place(draft.variables, container.as_str(), &mut run, &mut composed.secret_files);
        service.ports = draft.ports;
        service.container = Some((container, run));
        composed.services.push(service);
    }
    composed
}

/// Sorts out what Replank does not run. What is left without a kind is built here.
fn classify(reading: &Reading<'_>, services: &[(String, Node)], raws: &mut [Raw<'_>]) {
    let waited_for: BTreeSet<&str> = services.iter().flat_map(|(_, node)| completed(node)).collect();
    for raw in raws {
        let key = |part: &str| format!("services.{}{part}", raw.name);
        if let Some(extends) = raw.node.get("extends") {
            let advice = "write the service out, or share parts with a YAML anchor";
            reading.refuse(extends.line, key(".extends"), "a service that extends another is not read", advice);
            raw.kind = Some(Kind::Job);
            continue;
        }
        let (_, node) = built_by(services, raw.name, raw.node);
        let is_built = node.get("build").is_some_and(|build| build.value != Value::Null);
        if !is_built && raw.node.get("image").is_none() {
            let advice = "give it `build` if this repository has its Dockerfile, or else `image`";
            reading.refuse(raw.node.line, key(""), "it has neither `build` nor `image`", advice);
            raw.kind = Some(Kind::Job);
            continue;
        }
        if !is_built {
            raw.kind = Some(Kind::ThirdParty);
            continue;
        }
        let has_profile = raw.node.get("profiles").is_some_and(|profiles| !profiles.is_nothing());
        let never_again = matches!(raw.node.get("restart").map(|r| &r.value), None | Some(Value::Truth(false)))
            || raw.node.get("restart").is_some_and(|r| r.value == Value::Text("no".into()));
        let named_so = words(raw.name).any(|word| JOB_WORDS.contains(&word.as_str()));
        let answers = raw.node.get("ports").is_some_and(|ports| !ports.is_nothing());
        if waited_for.contains(raw.name) || has_profile || (named_so && never_again && !answers) {
            raw.kind = Some(Kind::Job);
        }
    }
}

/// The service that builds the image which this one runs, itself or another.
fn built_by<'n>(services: &'n [(String, Node)], name: &'n str, node: &'n Node) -> (&'n str, &'n Node) {
    if node.get("build").is_some_and(|build| build.value != Value::Null) {
        return (name, node);
    }
    let image = node.get("image").map(|image| &image.value);
    services
        .iter()
        .filter(|(_, other)| other.get("build").is_some_and(|build| build.value != Value::Null))
        .find(|(_, other)| image.is_some() && other.get("image").map(|image| &image.value) == image)
        .map_or((name, node), |(name, other)| (name.as_str(), other))
}

/// Services whose end this one waits for.
fn completed(node: &Node) -> Vec<&str> {
    let depends = node.get("depends_on").map(Node::entries).unwrap_or_default();
    let is_completed = |options: &Node| {
        options.get("condition").is_some_and(|c| c.value == Value::Text("service_completed_successfully".into()))
    };
    depends.iter().filter(|(_, options)| is_completed(options)).map(|(name, _)| name.as_str()).collect()
}

/// Equal builds are one component, named after the first service that users reach, or else the first.
fn components<'n>(
    reading: &Reading<'_>,
    raws: &[Raw<'n>],
    into: &mut BTreeMap<ComponentName, BuildPlan>,
) -> BTreeMap<&'n str, ComponentName> {
    let mut names: BTreeMap<&str, ComponentName> = BTreeMap::new();
    let is_run = |raw: &&Raw<'n>| raw.kind.is_none() && raw.build.is_some();
    for raw in raws.iter().filter(is_run) {
        if names.contains_key(raw.name) {
            continue;
        }
        let alike: Vec<&Raw<'n>> = raws.iter().filter(is_run).filter(|other| other.build == raw.build).collect();
        let face = alike.iter().find(|r| r.node.get("ports").is_some_and(|p| !p.is_nothing())).unwrap_or(&alike[0]);
        let Ok(name) = ComponentName::new(label(face.name)) else { continue };
        if let Some(build) = &raw.build
            && into.insert(name.clone(), build.clone()).is_some_and(|other| other != *build)
        {
            let what = format!("two images would both be component {name}");
            reading.refuse(face.node.line, format!("services.{}", face.name), what, "rename one of the services");
        }
        names.extend(alike.iter().map(|r| (r.name, name.clone())));
    }
    names
}

fn container_name(reading: &Reading<'_>, raw: &Raw<'_>) -> Option<ContainerName> {
    let made = label(raw.name);
    let is_compose_s = raw.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    match ContainerName::new(made.clone()) {
        Ok(name) if is_compose_s => {
            if made != raw.name {
                let note =
                    format!("{} is called {made} here: whoever calls it by the old name has to use this one", raw.name);
                reading.note(raw.name, note);
            }
            Some(name)
        }
        Ok(_) | Err(_) => {
            let what = format!("{:?} cannot be a container's name", raw.name);
            let advice = "rename the service: 1 to 32 of a-z, 0-9 and '-', beginning with a letter";
            reading.refuse(raw.node.line, format!("services.{}", raw.name), what, advice);
            None
        }
    }
}

fn probe(reading: &Reading<'_>, name: &str, draft: &mut Draft) {
    match draft.check.take() {
        Some(Check::Http { port, path }) if draft.run.probe.is_none() => {
            draft.run.probe = Some(ProbeConfig::http(port, &path))
        }
        Some(Check::Http { .. }) | None => {}
        Some(Check::Tcp { port }) => {
            let mut probe = ProbeConfig::http(port, "/");
            probe.tcp = true;
            draft.run.probe = Some(probe);
        }
        Some(Check::Off) => reading.note(name, "its health check is switched off, so nothing proves that it works"),
        Some(Check::Other(command)) => {
            reading.note(name, format!("its health check is left out, as no probe can ask this: {command}"));
        }
    }
}

fn kind(name: &str, draft: &Draft) -> Kind {
    let command = draft.run.entrypoint.iter().chain(&draft.run.command).flatten();
    let mut spoken = words(name).chain(command.flat_map(|word| words(word)));
    if !draft.ports.is_empty() {
        Kind::Web
    } else if spoken.any(|word| CRON_WORDS.contains(&word.as_str())) {
        Kind::Cron
    } else if draft.exposes || draft.run.probe.is_some() {
        Kind::Internal
    } else {
        Kind::Worker
    }
}

fn words(text: &str) -> impl Iterator<Item = String> {
    let split = |c: char| !c.is_ascii_alphanumeric();
    text.split(split).filter(|word| !word.is_empty()).map(str::to_ascii_lowercase).collect::<Vec<_>>().into_iter()
}

/// Networks that a service is on, by compose's names.
fn raw_networks(node: &Node) -> Vec<String> {
    if node.get("network_mode").is_some() {
        return Vec::new();
    }
    match node.get("networks").map(|networks| &networks.value) {
        Some(Value::Map(entries)) => entries.iter().map(|(name, _)| name.clone()).collect(),
        Some(Value::List(items)) => items.iter().filter_map(|item| text(item).map(str::to_owned)).collect(),
        Some(Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_)) | None => {
            vec!["default".to_owned()]
        }
    }
}

/// Those of its networks that are worth joining: where somebody else is. Among themselves, containers of a revision have one.
fn shared_networks(
    reading: &Reading<'_>,
    raw: &Raw<'_>,
    named: &[String],
    networks: &Networks,
    foreign: &BTreeSet<String>,
) -> BTreeSet<String> {
    let usual = ["default".to_owned()];
    let mut joined = BTreeSet::new();
    for network in if named.is_empty() { &usual } else { named } {
        match networks.get(network) {
            Some((real, external)) if *external || foreign.contains(network) => {
                joined.insert(real.clone());
            }
            Some(_) if network == "default" => {}
            Some(_) => {
                reading.note(raw.name, format!("network {network} is left out: nothing but this application is on it"))
            }
            None => reading.refuse(
                raw.node.line,
                format!("services.{}.networks", raw.name),
                format!("network {network:?} is not declared"),
                "add it to `networks` at the top of the file",
            ),
        }
    }
    joined
}

fn started_before(
    reading: &Reading<'_>,
    raw: &Raw<'_>,
    named: &BTreeSet<String>,
    raws: &[Raw<'_>],
) -> BTreeSet<ContainerName> {
    let mut before = BTreeSet::new();
    for other in named {
        match raws.iter().find(|r| r.name == other) {
            Some(found) if found.kind.is_none() => before.extend(ContainerName::new(label(other)).ok()),
            Some(found) if found.kind == Some(Kind::Job) => {
                reading.note(
                    raw.name,
                    format!("depends_on {other} is left out: {other} is a one-off job, which Replank does not run"),
                );
            }
            Some(_) => {}
            None => reading.refuse(
                raw.node.line,
                format!("services.{}.depends_on", raw.name),
                format!("there is no service {other:?}"),
                "name a service of this file",
            ),
        }
    }
    before
}

fn text(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Text(text) => Some(text),
        Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::List(_) | Value::Map(_) => None,
    }
}

/// A text for people: where a variable of it has no value it is shown as written, since nothing depends on it.
fn shown(reading: &Reading<'_>, node: &Node) -> String {
    let written = text(node).unwrap_or_default();
    super::vars::interpolate(written, &reading.vars).unwrap_or_else(|_| written.to_owned())
}

/// The project's name, as compose makes it: from the file, from `.env`, or from the directory.
pub fn project(reading: &Reading<'_>, root: &Node, wished: Option<&str>) -> String {
    let in_file = root.get("name").and_then(|node| reading.text(node, "name"));
    let in_env = reading.vars.get("COMPOSE_PROJECT_NAME").filter(|name| !name.is_empty());
    let directory = if reading.base == "." {
        reading.repo.root().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    } else {
        reading.base.rsplit('/').next().unwrap_or_default().to_owned()
    };
    let name = wished.map(str::to_owned).or_else(|| in_env.cloned()).or(in_file).unwrap_or(directory);
    let plain: String = name
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        .collect();
    plain.trim_start_matches(['-', '_']).to_owned()
}
