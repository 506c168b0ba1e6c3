//! The plan as a commented `replank.toml`, and the controller's Dockerfile.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use replank_adapters::platform::docker::config::{ContainerConfig, SecretSource};
use replank_adapters::platform::docker::proxy_api::Protocol;
use replank_core::format::{FORMAT, FORMATS_LABEL};
use replank_core::record::Overlap;
use replank_core::words::ContainerName;

use super::plan::{Kind, Plan, Port, Service};
use super::reading::Reading;
use crate::plain;

/// Where comments are wrapped.
const WIDTH: usize = 110;
/// Port of the controller in its container.
const CONTROLLER_PORT: u16 = 8086;

/// A port that the proxy owns.
#[derive(Debug)]
pub struct Listener {
    pub name: String,
    pub container: ContainerName,
    pub port: Port,
    /// Port inside the proxy, where the published one is taken there.
    pub listen: Option<u16>,
}

/// All ports that users reach, each under a name of its own. The controller's is not among them.
pub fn listeners(plan: &Plan) -> Vec<Listener> {
    let mut all: Vec<Listener> = Vec::new();
    let mut inside: BTreeSet<u16> = BTreeSet::from([plan.controller.publish]);
    for service in &plan.services {
        let Some((container, _)) = &service.container else { continue };
        for port in &service.ports {
            let name = match service.ports.as_slice() {
                [_] => container.to_string(),
                _ => {
                    let end = format!("-{}", port.publish);
                    let start: String = container.as_str().chars().take(32 - end.len()).collect();
                    format!("{}{end}", start.trim_end_matches('-'))
                }
            };
            let taken = |name: &String| all.iter().any(|listener| listener.name == *name);
            let name = if taken(&name) { format!("port-{}-{}", port.publish, all.len()) } else { name };
            let listen = if inside.insert(port.publish) { None } else { (10_000..).find(|p| inside.insert(*p)) };
            all.push(Listener { name, container: container.clone(), port: port.clone(), listen });
        }
    }
    all
}

pub fn toml(plan: &Plan, reading: &Reading<'_>) -> String {
    let mut out = Text::default();
    head(&mut out, plan, reading);
    out.line(&format!("application = {}", quoted(plan.application.as_str())));
    if !plan.networks.is_empty() {
        out.blank();
        out.comment(
            "Networks that compose made, with what it goes on running. They must exist before the first deployment.",
        );
        out.line(&format!("networks = {}", list(plan.networks.iter())));
    }
    source(&mut out, plan);
    out.table("server");
    out.comment("Inside the controller's container; the listener below publishes it.");
    out.line(&format!("listen = \"0.0.0.0:{CONTROLLER_PORT}\""));
    out.comment("public_hosts = [\"upgrade.example.com\"]   # names under which people reach it, beside localhost");
    policy(&mut out, plan);
    if !plan.build_secrets.is_empty() {
        out.table("build.secrets");
        for (name, file) in &plan.build_secrets {
            out.line(&format!("{} = {{ file = {} }}", key(name), quoted(file)));
        }
    }
    for (index, (name, build)) in plan.components.iter().enumerate() {
        out.table(&format!("components.{name}"));
        out.line(&format!("dockerfile = {}", quoted(&build.dockerfile)));
        out.line(&format!("context = {}", quoted(&build.context)));
        for (setting, value) in [("target", &build.target), ("platform", &build.platform)] {
            if let Some(value) = value {
                out.line(&format!("{setting} = {}", quoted(value)));
            }
        }
        if !build.secrets.is_empty() {
            out.line(&format!("secrets = {}", list(build.secrets.iter())));
        }
        if index == 0 {
            out.comment("What prepares or saves data belongs to the component whose image does it: see `migrate` and `backup` in docs/configuration.md. None was made up here.");
        }
        map(&mut out, &format!("components.{name}.args"), "", build.args.iter().map(|(k, v)| (k, quoted(v))));
    }
    out.blank();
    out.comment("Replank itself: built and upgraded with the application.");
    out.line(&format!("[components.{}]", plan.controller.component));
    out.line(&format!("dockerfile = {}", quoted(&plan.controller.dockerfile())));
    for service in &plan.services {
        if let Some((name, run)) = &service.container {
            container(&mut out, plan, reading, service, name, run);
        }
    }
    out.table(&format!("containers.{}", plan.controller.name));
    out.line(&format!("component = {}", quoted(plan.controller.component.as_str())));
    out.line("controller = true");
    out.line("command = [\"serve\"]");
    out.line(&format!("probe = {{ port = {CONTROLLER_PORT}, path = \"/livez\" }}"));
    all_listeners(&mut out, plan);
    out.text
}

fn head(out: &mut Text, plan: &Plan, reading: &Reading<'_>) {
    let from = plan.compose.clone().unwrap_or_else(|| "the repository's Dockerfiles".to_owned());
    out.comment(&format!("Written by `replank init` from {from}. Read it, then run `replank deploy`; docs/configuration.md has every setting."));
    out.comment(
        "The directory of this file is the application's home: its ledger, tokens and secrets are kept beside it.",
    );
    out.comment("");
    for service in &plan.services {
        let what = if service.image.is_empty() || service.kind != Kind::ThirdParty {
            service.kind.words().to_owned()
        } else {
            format!("{}: {}", service.kind.words(), service.image)
        };
        out.comment(&format!("  {:<16} {what}", service.name));
    }
    let names = |wanted: fn(Kind) -> bool| plan.of_kind(wanted).map(|s| s.name.as_str()).collect::<Vec<_>>().join(" ");
    let compose = match plan.compose.as_deref() {
        Some(file) if !super::compose::FILES.contains(&file) => format!("docker compose -f {file}"),
        Some(_) | None => "docker compose".to_owned(),
    };
    let third = names(|kind| kind == Kind::ThirdParty);
    if !third.is_empty() {
        out.comment("");
        out.comment(&format!(
            "Third-party images are not upgraded by Replank and stay with compose: {compose} up -d --no-deps {third}"
        ));
        out.comment(
            "By their names, and never all: what is built here would start a second time, and want the same ports.",
        );
        if !plan.networks.is_empty() {
            out.comment("They and the application meet on the networks below.");
        }
    }
    let jobs = names(|kind| kind == Kind::Job);
    if !jobs.is_empty() {
        out.comment("");
        out.comment(&format!("One-off jobs are not run by Replank: {jobs}. Run them by hand, or let the image do their work when it starts; a job that prepares data for each release belongs into a `migrate` step of the component that it shares its image with."));
    }
    if plan.compose.is_some() {
        let run = names(Kind::is_run);
        out.comment("");
        out.comment(&format!("Before the first deployment, end what Replank takes over, as both want the same ports: {compose} stop {run}"));
    }
    for note in reading.notes("") {
        out.comment("");
        out.comment(&note);
    }
    if !plan.unused.is_empty() {
        out.comment("");
        out.comment(&format!("Dockerfiles that nothing here builds: {}", plan.unused.join(", ")));
    }
    out.blank();
}

fn source(out: &mut Text, plan: &Plan) {
    out.table("source");
    match &plan.remote {
        Some(remote) => out.line(&format!("remote = {}", quoted(remote))),
        None => {
            out.comment("Change this: the repository has no remote that can be reached over https.");
            out.line(&format!("remote = \"https://git.example.com/acme/{}.git\"", plan.application));
        }
    }
    if let Some(branch) = &plan.branch {
        out.line(&format!("branch = {}", quoted(branch)));
    }
    out.comment("credential = { username = \"bot\", password_file = \"git.secret\" }   # for a private repository");
}

fn policy(out: &mut Text, plan: &Plan) {
    out.table("policy");
    let has_proof = plan.services.iter().filter_map(|s| s.container.as_ref()).any(|(_, run)| run.probe.is_some());
    if has_proof {
        out.comment("\"blue-green\": both versions run through a confirm window, and traffic goes back by itself.");
    } else {
        out.comment(
            "\"blue-green\" is worth it once a container has a probe: without one nothing tells good from bad.",
        );
    }
    out.line("mode = \"single\"");
    out.comment("\"rollback\": go back at once when the new version does not come up.");
    out.line("on_rollout_failure = \"hold\"");
}

fn container(
    out: &mut Text,
    plan: &Plan,
    reading: &Reading<'_>,
    service: &Service,
    name: &ContainerName,
    run: &ContainerConfig,
) {
    out.blank();
    let place = match (&plan.compose, service.line) {
        (Some(file), line) if line > 0 => format!(" ({file}:{line})"),
        (Some(_) | None, _) => String::new(),
    };
    out.comment(&format!("{}{place}: {}", service.name, service.kind.words()));
    for note in reading.notes(&service.name) {
        out.comment(&format!("- {note}"));
    }
    out.line(&format!("[containers.{name}]"));
    out.line(&format!("component = {}", quoted(run.component.as_str())));
    for (setting, words) in [("entrypoint", &run.entrypoint), ("command", &run.command)] {
        if let Some(words) = words {
            out.line(&format!("{setting} = {}", list(words.iter())));
        }
    }
    match &run.probe {
        Some(probe) if probe.tcp => out.line(&format!("probe = {{ port = {}, tcp = true }}", probe.port)),
        Some(probe) => {
            out.line(&format!(
                "probe = {{ port = {}, path = {}, timeout_ms = {} }}",
                probe.port,
                quoted(&probe.path),
                probe.timeout_ms
            ));
            out.comment("Add the proof that the right version answers: version = { header = \"X-App-Version\" }");
        }
        None => match service.kind {
            Kind::Web | Kind::Internal => {
                let port = service.hint.unwrap_or(8080);
                out.comment(&format!(
                    "No probe: to run is enough. Better: probe = {{ port = {port}, path = \"/healthz\" }}"
                ));
            }
            Kind::Worker | Kind::Cron | Kind::Job | Kind::ThirdParty => {
                out.comment("No probe: to run is enough as proof that it works.");
            }
        },
    }
    overlap(out, service, run);
    if !run.mounts.is_empty() {
        out.line("mounts = [");
        for mount in &run.mounts {
            let end = if mount.read_only { ", read_only = true" } else { "" };
            out.line(&format!("  {{ source = {}, target = {}{end} }},", quoted(&mount.source), quoted(&mount.target)));
        }
        out.line("]");
    }
    if let Some(user) = &run.user {
        out.line(&format!("user = {}", quoted(user)));
    }
    if run.stop_grace_seconds != ContainerConfig::of(run.component.clone()).stop_grace_seconds {
        out.line(&format!("stop_grace_seconds = {}", run.stop_grace_seconds));
    }
    if let Some(millis) = run.cpu_millis {
        out.line(&format!("cpu_millis = {millis}"));
    }
    if let Some(bytes) = run.memory_bytes {
        out.line(&format!("memory_bytes = {bytes}"));
    }
    if run.read_only_root {
        out.line("read_only_root = true");
    }
    for (setting, words) in [("cap_add", &run.cap_add), ("tmpfs", &run.tmpfs), ("networks", &run.networks)] {
        if !words.is_empty() {
            out.line(&format!("{setting} = {}", list(words.iter())));
        }
    }
    if !run.depends_on.is_empty() {
        out.line(&format!("depends_on = {}", list(run.depends_on.iter().map(ContainerName::as_str))));
    }
    map(out, &format!("containers.{name}.env"), "", run.env.iter().map(|(k, v)| (k, quoted(v))));
    let source = |from: &SecretSource| match from {
        SecretSource::File(path) => format!("{{ file = {} }}", quoted(&path.to_string_lossy())),
        SecretSource::Env(variable) => format!("{{ env = {} }}", quoted(variable)),
    };
    let comment = "The values are in files of their own, which only the controller reads.";
    map(out, &format!("containers.{name}.secrets"), comment, run.secrets.iter().map(|(k, v)| (k, source(v))));
}

/// What the configuration's own rule makes of it, said, so that nobody is surprised by two workers or by a gap.
fn overlap(out: &mut Text, service: &Service, run: &ContainerConfig) {
    match (run.overlap, run.overlap_rule()) {
        (Some(_), _) => {
            out.comment("Two of a kind would do everything twice: the old one stops before the new one starts.");
            out.line("overlap = \"stop_old_first\"");
        }
        (None, Overlap::Allowed) => {
            out.comment("Old and new run side by side: it has an HTTP probe and writes no volume.")
        }
        (None, Overlap::StopOldFirst | Overlap::StartAfterCutover) => {
            let why = match service.kind {
                Kind::Web | Kind::Internal => {
                    "so there is a gap in each upgrade; overlap = \"allowed\" closes it where two may run"
                }
                Kind::Worker | Kind::Cron | Kind::Job | Kind::ThirdParty => "since two might do their work twice",
            };
            let cause = if run.mounts.iter().any(|m| !m.read_only) { "a writable mount" } else { "no HTTP probe" };
            out.comment(&format!("The old one stops before the new one starts ({cause}), {why}."));
        }
    }
}

fn all_listeners(out: &mut Text, plan: &Plan) {
    let all = listeners(plan);
    for listener in &all {
        out.table(&format!("listeners.{}", listener.name));
        out.line(&format!("publish = {}", listener.port.publish));
        out.line(&format!("bind = {}", quoted(&listener.port.bind.to_string())));
        if let Some(listen) = listener.listen {
            out.line(&format!("listen = {listen}"));
        }
        out.line(&format!("container = {}", quoted(listener.container.as_str())));
        out.line(&format!("port = {}", listener.port.port));
        if listener.port.protocol == Protocol::Tcp {
            out.comment("Bytes are passed on as they are; an upgrade ends open connections after their grace.");
            out.line("protocol = \"tcp\"");
        }
    }
    let name = ["upgrade", "replank-upgrade"].into_iter().find(|name| !all.iter().any(|l| l.name == *name));
    out.blank();
    out.comment("The upgrade page and API. On loopback: put your ingress in front of it, or set `bind`.");
    out.line(&format!("[listeners.{}]", name.unwrap_or("replank-upgrade-page")));
    out.line(&format!("publish = {}", plan.controller.publish));
    out.line(&format!("container = {}", quoted(plan.controller.name.as_str())));
    out.line(&format!("port = {CONTROLLER_PORT}"));
}

/// `controller/Dockerfile`.
pub fn dockerfile(image: &str) -> String {
    let image = plain::line(image, false).replace(' ', "");
    format!(
        "# Replank as a part of the application: built from each release, and upgraded with it.\n\
         # The base needs git, CA certificates, and the static `replank` binary as its entry point.\n\
         FROM {image}\n\
         ARG APP_VERSION\n\
         ENV APP_VERSION=$APP_VERSION\n\
         # Which stored records this Replank reads; asked before an upgrade moves to it.\n\
         LABEL {FORMATS_LABEL}={FORMAT}\n"
    )
}

#[derive(Debug, Default)]
struct Text {
    text: String,
}

impl Text {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn blank(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }

    fn table(&mut self, name: &str) {
        self.blank();
        self.line(&format!("[{name}]"));
    }

    /// Other people's words are in it: what would end the line is made visible, so that a comment stays one.
    fn comment(&mut self, text: &str) {
        let text = plain::line(text, false).replace('\t', " ");
        let indent: String = text.chars().take_while(|c| *c == ' ').collect();
        let mut line = format!("# {indent}");
        let mut is_begun = false;
        for word in text.trim_start().split(' ') {
            if is_begun && line.chars().count() + 1 + word.chars().count() > WIDTH {
                self.line(line.trim_end());
                line = format!("# {indent}  ");
                is_begun = false;
            }
            if is_begun {
                line.push(' ');
            }
            line.push_str(word);
            is_begun = true;
        }
        self.line(line.trim_end());
    }
}

/// A table of names and values with a comment above it, where there are any.
fn map<'a>(out: &mut Text, table: &str, comment: &str, entries: impl Iterator<Item = (&'a String, String)>) {
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() {
        return;
    }
    out.blank();
    if !comment.is_empty() {
        out.comment(comment);
    }
    out.line(&format!("[{table}]"));
    for (name, value) in entries {
        out.line(&format!("{} = {value}", key(name)));
    }
}

fn list<T: AsRef<str>>(words: impl Iterator<Item = T>) -> String {
    let mut text = String::from("[");
    for (index, word) in words.enumerate() {
        // Writing to a text cannot fail.
        let _ = write!(text, "{}{}", if index == 0 { "" } else { ", " }, quoted(word.as_ref()));
    }
    text.push(']');
    text
}

fn key(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if bare { name.to_owned() } else { quoted(name) }
}

/// A basic string. JSON's escapes are TOML's too; DEL needs one more, and so does what would make a line look like another.
fn quoted(text: &str) -> String {
    let json = serde_json::Value::from(text).to_string();
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}' => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            _ => out.push(c),
        }
    }
    out
}

/// Where each Dockerfile of a component is, for what is not used.
pub fn used(components: &BTreeMap<replank_core::words::ComponentName, super::plan::BuildPlan>) -> BTreeSet<&str> {
    components.values().map(|build| build.dockerfile.as_str()).collect()
}
