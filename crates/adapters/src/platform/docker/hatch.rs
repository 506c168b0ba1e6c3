//! The way back by hand: commands of the plain `docker` and `curl` tools that work with Replank gone.
//!
//! They hold references to secrets, never values, and each one is a whole shell command, so that they can be pasted one
//! by one, again, or from the middle.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use replank_core::ports::EscapeHatch;
use replank_core::record::Deployment;
use replank_core::words::ContainerName;

use super::config::{ContainerConfig, SecretSource};
use super::spec::RunSpec;
use super::{DockerPlatform, create, labels, names};

const DEFAULT_SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/run/docker.sock"];

pub(super) fn escape_hatch(
    platform: &DockerPlatform,
    to: &Deployment,
    from: Option<&Deployment>,
    generation: u64,
) -> EscapeHatch {
    let config = &platform.config;
    let proxy = names::proxy(&config.application);
    let facts = BTreeMap::from([
        ("platform".to_owned(), "docker".to_owned()),
        ("application".to_owned(), config.application.to_string()),
        ("revision".to_owned(), to.revision.to_string()),
        ("version".to_owned(), to.version.to_string()),
        ("proxy".to_owned(), proxy.clone()),
    ]);
    let hatch = Hatch { platform, docker: docker(platform) };
    let mut commands = Vec::new();
    let Ok(spec) = RunSpec::of(&to.plan) else {
        commands
            .push("# the stored run spec needs another Replank version: no commands can be made from it".to_owned());
        return EscapeHatch { commands, facts };
    };
    // Controllers stay down until traffic has moved: one that came back early would carry its record out.
    let controllers = |deployment: &Deployment| -> Vec<String> { hatch.names(deployment, true) };
    let mut quiet = controllers(to);
    quiet.extend(from.map(controllers).unwrap_or_default());
    if !quiet.is_empty() {
        commands.extend(hatch.stop(&quiet));
    }
    // Containers that must not run twice stop before their counterparts start.
    if let Some(from) = from {
        let single: Vec<String> = from
            .plan
            .containers
            .iter()
            .filter(|(_, plan)| !plan.controller && plan.overlap != replank_core::record::Overlap::Allowed)
            .map(|(name, _)| names::container(&config.application, &from.revision, name))
            .collect();
        commands.extend(hatch.stop(&single));
    }
    commands.push(format!("{} start {proxy}", hatch.docker));
    commands.extend(hatch.network(to));
    let is_wanted = |name: &ContainerName| to.plan.containers.get(name).is_some_and(|plan| !plan.controller);
    let order = spec.waves(is_wanted).unwrap_or_default().concat();
    for name in &order {
        commands.push(hatch.create(to, name, &spec));
        for network in &spec.containers[name].run.networks {
            let full = names::container(&config.application, &to.revision, name);
            commands.push(format!("{} network connect {network} {full} 2>/dev/null || true", hatch.docker));
        }
    }
    let mine = hatch.names(to, false);
    let started: Vec<String> =
        order.iter().map(|name| names::container(&config.application, &to.revision, name)).collect();
    if !started.is_empty() {
        commands.push(format!("{} start {}", hatch.docker, started.join(" ")));
        commands.push(format!("{} update --restart always {}", hatch.docker, mine.join(" ")));
    }
    commands.push(hatch.route(to, &spec, generation));
    if let Some(from) = from {
        commands.extend(hatch.stop(&hatch.names(from, false)));
    }
    for controller in controllers(to) {
        commands.push(format!(
            "# when Replank is to come back: {docker} start {controller} && {docker} update --restart always {controller}",
            docker = hatch.docker
        ));
    }
    EscapeHatch { commands, facts }
}

fn docker(platform: &DockerPlatform) -> String {
    let socket = platform.config.socket.display().to_string();
    if DEFAULT_SOCKETS.contains(&socket.as_str()) {
        "docker".to_owned()
    } else {
        format!("docker -H {}", quote(&format!("unix://{socket}")))
    }
}

struct Hatch<'a> {
    platform: &'a DockerPlatform,
    docker: String,
}

impl Hatch<'_> {
    /// Names of a deployment's controllers, or of everything else in it.
    fn names(&self, deployment: &Deployment, controllers: bool) -> Vec<String> {
        let application = &self.platform.config.application;
        let wanted = deployment.plan.containers.iter().filter(|(_, plan)| plan.controller == controllers);
        wanted.map(|(name, _)| names::container(application, &deployment.revision, name)).collect()
    }

    /// Stopping what is gone or stopped already is no failure.
    fn stop(&self, names: &[String]) -> Vec<String> {
        let one = |name: &String| {
            let docker = &self.docker;
            format!(
                "if {docker} container inspect {name} >/dev/null 2>&1; then \
                 {docker} update --restart no {name} && {docker} stop {name}; fi"
            )
        };
        names.iter().map(one).collect()
    }

    fn network(&self, to: &Deployment) -> Vec<String> {
        let application = &self.platform.config.application;
        let network = names::network(application, &to.revision);
        let labels = flags("--label", &self.platform.owner.network(&to.revision));
        let docker = &self.docker;
        vec![
            format!("{docker} network inspect {network} >/dev/null 2>&1 || {docker} network create{labels} {network}"),
            format!("{docker} network connect {network} {} 2>/dev/null || true", names::proxy(application)),
        ]
    }

    /// Creates a container anew where it is gone.
    fn create(&self, to: &Deployment, name: &ContainerName, spec: &RunSpec) -> String {
        let config = &self.platform.config;
        let run = &spec.containers[name].run;
        let full = names::container(&config.application, &to.revision, name);
        let Ok(image) = create::image(to, &run.component) else {
            return format!("# the record names no image for {name}");
        };
        let mut labels = self.platform.owner.container(to, name, &run.component, image);
        if let replank_core::image::ImageId::Engine { id, .. } = image {
            labels.insert(labels::IMAGE_ID.to_owned(), id.to_string());
        }
        let network = names::network(&config.application, &to.revision);
        let mut text = format!("--name {full} --restart no --network {network} --network-alias {name}");
        text.push_str(&flags("--label", &labels));
        text.push_str(&flags("--env", &run.env));
        self.options(&mut text, run);
        let mut words: Vec<String> = Vec::new();
        if let Some(entrypoint) = &run.entrypoint {
            // The tool takes one word here; the others go before the command.
            let _ = write!(text, " --entrypoint {}", quote(entrypoint.first().map_or("", |word| word)));
            words.extend(entrypoint.iter().skip(1).cloned());
        }
        words.extend(run.command.iter().flatten().cloned());
        let words: String = words.iter().map(|word| format!(" {}", quote(word))).collect();
        format!(
            "{docker} container inspect {full} >/dev/null 2>&1 || {docker} create {text} {image}{words}",
            docker = self.docker,
            image = quote(&image.reference())
        )
    }

    fn options(&self, text: &mut String, run: &ContainerConfig) {
        let mut add = |flag: &str, value: String| {
            let _ = write!(text, " {flag} {value}");
        };
        for (key, source) in &run.secrets {
            match source {
                // Read by the shell when the command runs.
                SecretSource::File(path) => {
                    add("--env", format!("{key}=\"$(cat {})\"", quote(&path.display().to_string())));
                }
                SecretSource::Env(variable) => add("--env", format!("{key}=\"${{{variable}:?is not set}}\"")),
            }
        }
        for (source, target, read_only) in create::mounts(&self.platform.config, run) {
            let kind = if source.starts_with('/') { "bind" } else { "volume" };
            let end = if read_only { ",readonly" } else { "" };
            add("--mount", quote(&format!("type={kind},source={source},target={target}{end}")));
        }
        if let Some(user) = &run.user {
            add("--user", quote(user));
        }
        if let Some(millis) = run.cpu_millis {
            add("--cpus", format!("{}.{:03}", millis / 1000, millis % 1000));
        }
        if let Some(bytes) = run.memory_bytes {
            add("--memory", bytes.to_string());
        }
        for capability in &run.cap_add {
            add("--cap-add", quote(capability));
        }
        for path in &run.tmpfs {
            add("--tmpfs", quote(path));
        }
        if run.read_only_root {
            add("--read-only", String::new());
        }
        add("--stop-timeout", run.stop_grace_seconds.to_string());
    }

    /// Moves traffic: a generation above both what the proxy holds and what Replank may still have meant to send.
    fn route(&self, to: &Deployment, spec: &RunSpec, generation: u64) -> String {
        let config = &self.platform.config;
        let curl = format!("curl -fsS --unix-socket {}", quote(&config.control_socket().display().to_string()));
        let backends: Vec<String> = spec
            .listeners
            .iter()
            // A controller is not started here, so nothing can be routed to it yet.
            .filter(|(_, up)| to.plan.containers.get(&up.container).is_none_or(|plan| !plan.controller))
            .map(|(listener, up)| {
                let full = names::container(&config.application, &to.revision, &up.container);
                format!(
                    r#"\"{listener}\":{{\"container\":\"$({} inspect -f '{{{{.Id}}}}' {full})\",\"port\":{}}}"#,
                    self.docker, up.port
                )
            })
            .collect();
        format!(
            "G=$({curl} http://proxy/state | grep -o '\"generation\":[0-9]*' | head -n 1 | cut -d : -f 2); \
             [ \"${{G:-0}}\" -gt {generation} ] || G={generation}; \
             {curl} -X PUT http://proxy/routes -H 'content-type: application/json' \
             -d \"{{\\\"generation\\\":$((G+1)),\\\"primary\\\":{{\\\"revision\\\":\\\"{revision}\\\",\\\"backends\\\":{{{backends}}}}}}}\"",
            revision = to.revision,
            backends = backends.join(",")
        )
    }
}

fn flags(flag: &str, values: &BTreeMap<String, String>) -> String {
    values.iter().map(|(key, value)| format!(" {flag} {}", quote(&format!("{key}={value}")))).collect()
}

/// One word for a POSIX shell.
fn quote(text: &str) -> String {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./:=@,%+".contains(&b));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        for (text, expect) in [
            ("plain-1.2/x", "plain-1.2/x"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$(x) `y` \"z\"", "'$(x) `y` \"z\"'"),
        ] {
            assert_eq!(quote(text), expect);
        }
    }
}
