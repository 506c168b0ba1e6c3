//! One service that Replank is to run: each of its keys is mapped, left out with a note, or refused by name.

use std::collections::{BTreeMap, BTreeSet};

use replank_adapters::platform::docker::config::{
    ContainerConfig, PROBE_TIMEOUT_MS, ProbeConfig, STOP_GRACE_MAX_SECONDS,
};
use replank_core::words::ComponentName;

use super::environment::{self, Variables};
use super::health::{self, Check};
use super::mounts::{self, Mounts, Stores};
use super::plan::Port;
use super::ports;
use super::reading::{Reading, is_extension};
use super::yaml::{Node, Value};

/// What is left out, since Replank does it itself or nothing depends on it.
const IGNORED: [(&str, &str); 14] = [
    ("annotations", "Replank labels containers itself"),
    ("attach", "it concerns compose's own output"),
    ("container_name", "Replank names containers itself; other containers know this one by the table's name"),
    ("develop", "it concerns development alone"),
    ("expose", "inside a revision every port is open"),
    ("logging", "the engine's own settings for logs apply"),
    ("mem_reservation", "only limits are set"),
    ("pull_policy", "the image is built"),
    ("restart", "Replank keeps the serving revision running, and starts nothing else again"),
    ("stdin_open", "nobody types into it"),
    ("tty", "nobody types into it"),
    ("labels", "Replank labels containers itself"),
    ("label_file", "Replank labels containers itself"),
    ("profiles", "it is part of the application here"),
];

/// What cannot be reproduced, and what to do instead.
const REFUSED: [(&str, &str); 49] = [
    ("network_mode", "take it out: each revision has a network of its own, and `networks` are joined"),
    ("privileged", "take it out, and name the capabilities that it needs in `cap_add`"),
    ("pid", "take it out: a container sees its own processes"),
    ("ipc", "take it out"),
    ("uts", "take it out"),
    ("userns_mode", "take it out"),
    ("cgroup", "take it out"),
    ("cgroup_parent", "take it out"),
    ("devices", "leave what needs a device to compose, as a service with a ready image"),
    ("device_cgroup_rules", "leave what needs a device to compose, as a service with a ready image"),
    ("gpus", "leave what needs a device to compose, as a service with a ready image"),
    ("runtime", "make it the engine's default runtime"),
    ("extends", "write the service out, or share parts with a YAML anchor"),
    ("configs", "copy the file into the image, or mount it from a directory of the host"),
    ("credential_spec", "take it out"),
    ("cap_drop", "take it out, and drop them in the image's entry point"),
    ("security_opt", "take it out, or set it for the whole engine"),
    ("sysctls", "set it on the host"),
    ("ulimits", "set it for the whole engine, in its `default-ulimits`"),
    ("shm_size", "set it for the whole engine, in its `default-shm-size`"),
    ("dns", "set it for the whole engine"),
    ("dns_opt", "set it for the whole engine"),
    ("dns_search", "set it for the whole engine"),
    ("domainname", "take it out"),
    ("hostname", "take it out: other containers know it by its service's name"),
    ("extra_hosts", "use a name that the name service knows"),
    ("external_links", "join the network that the other container is on"),
    ("group_add", "make the user a member in the image"),
    ("init", "put an init such as tini into the image's entry point"),
    ("mac_address", "take it out"),
    ("volumes_from", "mount the same volumes by their names"),
    ("working_dir", "set it in the Dockerfile with WORKDIR"),
    ("stop_signal", "set it in the Dockerfile with STOPSIGNAL"),
    ("storage_opt", "set it for the whole engine"),
    ("isolation", "take it out"),
    ("blkio_config", "take it out: processors and memory can be limited"),
    ("cpu_count", "use `cpus`"),
    ("cpu_percent", "use `cpus`"),
    ("cpu_period", "use `cpus`"),
    ("cpu_quota", "use `cpus`"),
    ("cpu_rt_period", "use `cpus`"),
    ("cpu_rt_runtime", "use `cpus`"),
    ("cpu_shares", "use `cpus`"),
    ("cpuset", "use `cpus`"),
    ("mem_swappiness", "use `mem_limit`"),
    ("memswap_limit", "use `mem_limit`"),
    ("oom_kill_disable", "use `mem_limit`"),
    ("oom_score_adj", "use `mem_limit`"),
    ("pids_limit", "take it out: processors and memory can be limited"),
];
const REFUSED_TOO: [(&str, &str); 6] = [
    ("models", "leave it to compose"),
    ("provider", "leave it to compose"),
    ("use_api_socket", "take it out: whoever has the socket owns the host"),
    ("volume_driver", "name the driver of an external volume when you make it"),
    ("post_start", "do it in the image's entry point"),
    ("pre_stop", "do it when the image gets its stop signal"),
];

/// A service as far as it stands by itself.
#[derive(Debug)]
pub struct Draft {
    pub run: ContainerConfig,
    pub ports: Vec<Port>,
    pub check: Option<Check>,
    pub variables: Variables,
    /// Networks by compose's names; none: the project's own.
    pub networks: Vec<String>,
    pub depends_on: BTreeSet<String>,
    pub platform: Option<String>,
    pub exposes: bool,
}

pub fn read(reading: &Reading<'_>, name: &str, node: &Node, component: &ComponentName, stores: &Stores) -> Draft {
    let mut draft = Draft {
        run: ContainerConfig::of(component.clone()),
        ports: Vec::new(),
        check: None,
        variables: BTreeMap::new(),
        networks: Vec::new(),
        depends_on: BTreeSet::new(),
        platform: None,
        exposes: false,
    };
    let mut in_file = Variables::new();
    let mut mounts = Mounts::default();
    let mut timeout = None;
    for (key, value) in node.entries() {
        let at = format!("services.{name}.{key}");
        match key.as_str() {
            // Read with all services before.
            "build" | "image" => {}
            "command" => draft.run.command = words(reading, value, &at),
            "entrypoint" => draft.run.entrypoint = words(reading, value, &at),
            "environment" => environment::read(reading, value, &at, &mut in_file),
            "env_file" => environment::files(reading, name, value, &at, &mut draft.variables),
            "ports" => draft.ports = ports::read(reading, value, &at),
            "volumes" => mounts::read(reading, name, value, &at, stores, &mut mounts),
            "tmpfs" => mounts::tmpfs(reading, value, &at, &mut mounts),
            "secrets" => mounts::secret_files(reading, value, &at, stores, &mut mounts),
            "networks" => draft.networks = networks(reading, name, value, &at),
            "depends_on" => draft.depends_on.extend(depends_on(reading, name, value, &at)),
            "links" => draft.depends_on.extend(links(reading, value, &at)),
            "healthcheck" => draft.check = healthcheck(reading, name, value, &at, &mut timeout),
            "deploy" => deploy(reading, name, value, &at, &mut draft.run),
            "cpus" => draft.run.cpu_millis = cpus(reading, value, &at),
            "mem_limit" => draft.run.memory_bytes = bytes(reading, value, &at),
            "user" => draft.run.user = reading.text(value, &at).filter(|user| !user.is_empty()),
            "read_only" => draft.run.read_only_root = reading.truth(value, &at),
            "cap_add" => {
                let names = reading.texts(value, &at).into_iter();
                draft.run.cap_add = names.map(|c| c.trim_start_matches("CAP_").to_owned()).collect();
            }
            "stop_grace_period" => {
                if let Some(seconds) = duration_ms(reading, value, &at).map(|ms| ms.div_ceil(1_000)) {
                    match u32::try_from(seconds).ok().filter(|s| *s <= STOP_GRACE_MAX_SECONDS) {
                        Some(seconds) => draft.run.stop_grace_seconds = seconds,
                        None => reading.refuse(
                            value.line,
                            at,
                            "this is too long",
                            format!("at most {STOP_GRACE_MAX_SECONDS}s"),
                        ),
                    }
                }
            }
            "platform" => draft.platform = reading.text(value, &at),
            // As Replank keeps what serves.
            "restart" if matches!(&value.value, Value::Text(t) if t == "always" || t == "unless-stopped") => {}
            "scale" => single(reading, value, &at),
            "labels" if routes(value) => reading.refuse(
                value.line,
                at,
                "labels that another proxy routes by cannot be reproduced: traffic goes through Replank's proxy",
                "publish the port with `ports`, let that proxy send its traffic there, and take the labels out",
            ),
            other if is_extension(other) => {}
            other => unmapped(reading, name, other, value, at),
        }
        draft.exposes |= key == "expose" && !value.is_nothing();
    }
    draft.variables.extend(in_file);
    draft.run.mounts = mounts.mounts;
    draft.run.tmpfs = mounts.tmpfs;
    if let (Some(Check::Http { port, path }), Some(ms)) = (&draft.check, timeout) {
        let mut probe = ProbeConfig::http(*port, path);
        probe.timeout_ms = ms;
        draft.run.probe = Some(probe);
    }
    draft
}

fn unmapped(reading: &Reading<'_>, name: &str, key: &str, value: &Node, at: String) {
    if let Some((_, why)) = IGNORED.iter().find(|(known, _)| *known == key) {
        if !value.is_nothing() {
            reading.note(name, format!("{key} is left out: {why}"));
        }
    } else if let Some((_, advice)) = REFUSED.iter().chain(&REFUSED_TOO).find(|(known, _)| *known == key) {
        if !value.is_nothing() {
            reading.refuse(value.line, at, "this cannot be reproduced", *advice);
        }
    } else {
        reading.unknown(value.line, at);
    }
}

/// Labels by which a proxy of another kind finds its targets.
fn routes(node: &Node) -> bool {
    let is_one = |text: &str| {
        let text = text.to_ascii_lowercase();
        ["traefik.", "caddy", "com.github.jrcs", "virtual_host", "haproxy."].iter().any(|start| text.starts_with(start))
    };
    match &node.value {
        Value::Map(entries) => entries.iter().any(|(name, _)| is_one(name)),
        Value::List(items) => items.iter().any(|item| matches!(&item.value, Value::Text(text) if is_one(text))),
        Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) => false,
    }
}

/// A command: a list of words, or one text that is split as a shell would, without running one.
pub fn words(reading: &Reading<'_>, node: &Node, key: &str) -> Option<Vec<String>> {
    match &node.value {
        Value::Null => None,
        Value::List(_) => Some(reading.texts(node, key)),
        Value::Text(_) | Value::Whole(_) | Value::Truth(_) | Value::Real(_) | Value::Map(_) => {
            let text = reading.text(node, key)?;
            let words = shlex::split(&text);
            if words.is_none() {
                reading.refuse(node.line, key, "a quote in this command does not end", "write it as a list of words");
            }
            words
        }
    }
}

fn networks(reading: &Reading<'_>, name: &str, node: &Node, key: &str) -> Vec<String> {
    let Value::Map(entries) = &node.value else {
        return reading.texts(node, key);
    };
    for (network, options) in entries {
        for (option, value) in reading.table(options, &format!("{key}.{network}")) {
            let at = format!("{key}.{network}.{option}");
            match option.as_str() {
                "aliases" if reading.texts(value, &at).iter().all(|alias| alias == name) => {}
                // Where several networks compete; inside a revision its own comes first.
                "priority" | "gw_priority" => {}
                other if is_extension(other) => {}
                _ if value.is_nothing() => {}
                _ => reading.refuse(
                    value.line,
                    at,
                    "Replank gives a container its addresses and its one name",
                    "take it out, and let others use the service's name",
                ),
            }
        }
    }
    entries.iter().map(|(network, _)| network.clone()).collect()
}

/// Names of the services; what is waited for is left out with a note.
pub fn depends_on(reading: &Reading<'_>, name: &str, node: &Node, key: &str) -> Vec<String> {
    let Value::Map(entries) = &node.value else {
        return reading.texts(node, key);
    };
    for (other, options) in entries {
        for (option, value) in reading.table(options, &format!("{key}.{other}")) {
            match option.as_str() {
                "condition" if matches!(&value.value, Value::Text(t) if t == "service_healthy") => reading.note(
                    name,
                    format!("depends_on {other}: it starts after {other} and does not wait for its health; let it try again by itself"),
                ),
                "condition" | "restart" | "required" => {}
                other if is_extension(other) => {}
                _ => reading.unknown(value.line, format!("{key}.{other}.{option}")),
            }
        }
    }
    entries.iter().map(|(other, _)| other.clone()).collect()
}

fn links(reading: &Reading<'_>, node: &Node, key: &str) -> Vec<String> {
    let one = |link: String| match link.split_once(':') {
        Some((service, alias)) if service != alias => {
            reading.refuse(
                node.line,
                key,
                format!("{link:?} gives another name to a service"),
                "use the service's own name",
            );
            None
        }
        Some((service, _)) => Some(service.to_owned()),
        None => Some(link),
    };
    reading.texts(node, key).into_iter().filter_map(one).collect()
}

fn healthcheck(reading: &Reading<'_>, name: &str, node: &Node, key: &str, timeout: &mut Option<u64>) -> Option<Check> {
    let mut check = None;
    let mut patience = ProbeConfig::http(1, "/").timeout_ms;
    for (option, value) in reading.table(node, key) {
        let at = format!("{key}.{option}");
        match option.as_str() {
            "test" => {
                check = match &value.value {
                    Value::List(_) => match reading.texts(value, &at).split_first() {
                        Some((kind, _)) if kind == "NONE" => Some(Check::Off),
                        Some((kind, rest)) if kind == "CMD" => Some(health::of_words(rest)),
                        Some((kind, rest)) if kind == "CMD-SHELL" => Some(health::of_shell(&rest.join(" "))),
                        Some((kind, _)) => {
                            reading.refuse(
                                value.line,
                                at,
                                format!("{kind:?} is no kind of check"),
                                "begin with CMD or CMD-SHELL",
                            );
                            None
                        }
                        None => None,
                    },
                    Value::Null => None,
                    Value::Text(_) | Value::Whole(_) | Value::Truth(_) | Value::Real(_) | Value::Map(_) => {
                        reading.text(value, &at).map(|command| health::of_shell(&command))
                    }
                }
            }
            "disable" if reading.truth(value, &at) => check = Some(Check::Off),
            "disable" => {}
            "timeout" => {
                let given = duration_ms(reading, value, &at).unwrap_or(patience);
                patience = given.clamp(*PROBE_TIMEOUT_MS.start(), *PROBE_TIMEOUT_MS.end());
            }
            "interval" | "retries" | "start_period" | "start_interval" => {
                reading.note(
                    name,
                    format!("healthcheck.{option} is left out: Replank asks often and counts answers in a row"),
                );
            }
            other if is_extension(other) => {}
            _ => reading.unknown(value.line, at),
        }
    }
    *timeout = Some(patience);
    check
}

fn deploy(reading: &Reading<'_>, name: &str, node: &Node, key: &str, run: &mut ContainerConfig) {
    for (option, value) in reading.table(node, key) {
        let at = format!("{key}.{option}");
        match option.as_str() {
            "replicas" => single(reading, value, &at),
            "mode" if reading.text(value, &at).is_none_or(|mode| mode == "replicated") => {}
            "mode" => reading.refuse(value.line, at, "Replank runs one container of a service", "use mode replicated"),
            "resources" => {
                for (part, limits) in reading.table(value, &at) {
                    if part != "limits" {
                        reading.note(name, format!("deploy.resources.{part} is left out: only limits are set"));
                        continue;
                    }
                    for (what, limit) in reading.table(limits, &format!("{at}.limits")) {
                        let at = format!("{at}.limits.{what}");
                        match what.as_str() {
                            "cpus" => run.cpu_millis = cpus(reading, limit, &at),
                            "memory" => run.memory_bytes = bytes(reading, limit, &at),
                            _ => reading.refuse(
                                limit.line,
                                at,
                                "this limit cannot be reproduced",
                                "limit `cpus` and `memory`",
                            ),
                        }
                    }
                }
            }
            "endpoint_mode" | "labels" | "restart_policy" | "rollback_config" | "update_config" => {
                reading.note(
                    name,
                    format!("deploy.{option} is left out: upgrades and restarts are Replank's, by [policy]"),
                );
            }
            "placement" => reading.refuse(value.line, at, "Replank runs everything on one machine", "take it out"),
            other if is_extension(other) => {}
            _ => reading.unknown(value.line, at),
        }
    }
}

fn single(reading: &Reading<'_>, node: &Node, key: &str) {
    if reading.number(node, key).is_some_and(|count| count != 1) {
        let advice = "run 1, and let the program itself use several processes";
        reading.refuse(node.line, key, "Replank runs one container of a service", advice);
    }
}

fn cpus(reading: &Reading<'_>, node: &Node, key: &str) -> Option<u32> {
    let text = reading.text(node, key)?;
    let cpus = text.parse::<f64>().ok().filter(|cpus| (0.001..=1024.0).contains(cpus));
    if cpus.is_none() {
        reading.refuse(node.line, key, format!("{text:?} is not a number of processors"), "write a number such as 0.5");
    }
    // A float cast saturates, and the range was checked.
    cpus.map(|cpus| (cpus * 1000.0).round() as u32)
}

fn bytes(reading: &Reading<'_>, node: &Node, key: &str) -> Option<u64> {
    let text = reading.text(node, key)?;
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, unit) = text.split_at(digits);
    let factor: Option<f64> = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => Some(1.0),
        "k" | "kb" | "kib" => Some(1024.0),
        "m" | "mb" | "mib" => Some(1024.0 * 1024.0),
        "g" | "gb" | "gib" => Some(1024.0 * 1024.0 * 1024.0),
        _ => None,
    };
    let size = factor.and_then(|factor| Some(number.parse::<f64>().ok()? * factor));
    if size.is_none() {
        reading.refuse(node.line, key, format!("{text:?} is not a size"), "write a size such as 512m");
    }
    size.map(|size| size as u64)
}

/// `1m30s`, `500ms`, `10s`; a number alone counts as seconds.
fn duration_ms(reading: &Reading<'_>, node: &Node, key: &str) -> Option<u64> {
    let text = reading.text(node, key)?;
    let parsed = milliseconds(&text);
    if parsed.is_none() {
        reading.refuse(node.line, key, format!("{text:?} is not a length of time"), "write one such as 1m30s");
    }
    parsed
}

fn milliseconds(text: &str) -> Option<u64> {
    if let Ok(seconds) = text.parse::<u64>() {
        return seconds.checked_mul(1_000);
    }
    let (mut total, mut rest) = (0.0, text);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(letters);
        let factor = match unit {
            "us" => 0.001,
            "ms" => 1.0,
            "s" => 1_000.0,
            "m" => 60_000.0,
            "h" => 3_600_000.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * factor;
        rest = after;
    }
    (total > 0.0 && total < 1e12).then_some(total as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read() {
        for (text, expect) in [
            ("1m30s", Some(90_000)),
            ("500ms", Some(500)),
            ("10", Some(10_000)),
            ("1.5s", Some(1_500)),
            ("s", None),
            ("1d", None),
            ("é", None),
        ] {
            assert_eq!(milliseconds(text), expect, "{text}");
        }
    }
}
