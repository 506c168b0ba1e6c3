//! `volumes`, `tmpfs` and `secrets` of a service: which of the host's data a container sees.

use std::collections::{BTreeMap, BTreeSet};

use replank_adapters::platform::docker::config::MountConfig;

use super::reading::{Reading, is_extension};
use super::yaml::{Node, Value};

/// What the file says about volumes and secrets as a whole.
#[derive(Debug, Default)]
pub struct Stores {
    /// Volumes by compose's name: what the engine calls them.
    pub volumes: BTreeMap<String, String>,
    /// Secrets by name: the absolute path of the file.
    pub secrets: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
pub struct Mounts {
    pub mounts: Vec<MountConfig>,
    pub tmpfs: BTreeSet<String>,
}

/// The `volumes` table of the file. Compose puts the project before a name, unless `name` or `external` says otherwise.
pub fn volumes(reading: &Reading<'_>, node: &Node) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (name, volume) in reading.table(node, "volumes") {
        let key = format!("volumes.{name}");
        let mut real = None;
        let mut external = false;
        for (option, value) in reading.table(volume, &key) {
            let at = format!("{key}.{option}");
            match option.as_str() {
                "name" => real = reading.text(value, &at),
                "external" => external = reading.truth(value, &at),
                "driver" if reading.text(value, &at).is_none_or(|driver| driver == "local") => {}
                "driver" | "driver_opts" if value.is_nothing() => {}
                "driver" | "driver_opts" => reading.refuse(
                    value.line,
                    at,
                    "Replank does not make volumes with a driver",
                    "make it with `docker volume create`, and write `external: true` and its `name` here",
                ),
                "labels" => {}
                other if is_extension(other) => {}
                _ => reading.unknown(value.line, at),
            }
        }
        let usual = if external { name.clone() } else { format!("{}_{name}", reading.project) };
        all.insert(name.clone(), real.unwrap_or(usual));
    }
    all
}

/// The `secrets` table of the file: files only, as the engine has no other place for them.
pub fn secrets(reading: &Reading<'_>, node: &Node) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (name, secret) in reading.table(node, "secrets") {
        let key = format!("secrets.{name}");
        for (option, value) in reading.table(secret, &key) {
            let at = format!("{key}.{option}");
            match option.as_str() {
                "file" => {
                    if let Some(path) = reading.text(value, &at).and_then(|p| host_path(reading, &p, value.line, &at)) {
                        all.insert(name.clone(), path);
                    }
                }
                "name" => {}
                other if is_extension(other) => {}
                "external" | "environment" | "driver" | "template_driver" => reading.refuse(
                    value.line,
                    at,
                    format!("a secret of kind {option:?} cannot be reproduced"),
                    "put it into a file and write `file: PATH`",
                ),
                _ => reading.unknown(value.line, at),
            }
        }
    }
    all
}

pub fn read(reading: &Reading<'_>, service: &str, node: &Node, key: &str, stores: &Stores, into: &mut Mounts) {
    let Value::List(items) = &node.value else {
        if !node.is_nothing() {
            reading.refuse(node.line, key, "this is not a list", "write each volume on a line of its own");
        }
        return;
    };
    for item in items {
        match &item.value {
            Value::Map(_) => long(reading, service, item, key, stores, into),
            Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => {
                if let Some(text) = reading.text(item, key) {
                    short(reading, service, &text, item.line, key, stores, into);
                }
            }
        }
    }
}

fn short(reading: &Reading<'_>, service: &str, text: &str, line: u64, key: &str, stores: &Stores, into: &mut Mounts) {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [source, target] => (*source, *target, ""),
        [source, target, options] => (*source, *target, *options),
        [_] => return anonymous(reading, text, line, key),
        _ => {
            let advice = "write it as SOURCE:TARGET or SOURCE:TARGET:ro";
            return reading.refuse(line, key, format!("{text:?} is not a volume"), advice);
        }
    };
    let mut read_only = false;
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => read_only = true,
            // How far a write may lag on a desktop; an engine on Linux knows no difference.
            "rw" | "cached" | "delegated" | "consistent" => {}
            _ => reading.refuse(line, key, format!("volume option {option:?} cannot be reproduced"), "take it out"),
        }
    }
    let is_path = source.starts_with(['.', '/', '~']);
    let mount =
        if is_path { bind(reading, service, source, line, key) } else { named(reading, source, line, key, stores) };
    if let Some(source) = mount {
        into.mounts.push(MountConfig { source, target: target.to_owned(), read_only });
    }
}

fn long(reading: &Reading<'_>, service: &str, item: &Node, key: &str, stores: &Stores, into: &mut Mounts) {
    let (mut kind, mut source, mut target, mut read_only) = (None, None, None, false);
    for (name, node) in item.entries() {
        let at = format!("{key}.{name}");
        match name.as_str() {
            "type" => kind = reading.text(node, &at),
            "source" => source = reading.text(node, &at),
            "target" => target = reading.text(node, &at),
            "read_only" => read_only = reading.truth(node, &at),
            "consistency" => {}
            "bind" | "volume" | "tmpfs" | "image" => {
                for (option, value) in node.entries().iter().filter(|(_, value)| !value.is_nothing()) {
                    // A missing directory is made by the engine in any case.
                    if option != "create_host_path" && !is_extension(option) {
                        let what = "this option of a mount cannot be reproduced";
                        reading.refuse(value.line, format!("{at}.{option}"), what, "take it out");
                    }
                }
            }
            other if is_extension(other) => {}
            _ => reading.unknown(node.line, at),
        }
    }
    let Some(target) = target else {
        return reading.refuse(item.line, key, "a mount has no `target`", "say where it is in the container");
    };
    let mount = match (kind.as_deref(), source) {
        (Some("tmpfs"), _) => {
            into.tmpfs.insert(target);
            return;
        }
        (Some("bind"), Some(source)) => bind(reading, service, &source, item.line, key),
        (Some("volume") | None, Some(source)) => named(reading, &source, item.line, key, stores),
        (Some("volume" | "bind") | None, None) => return anonymous(reading, &target, item.line, key),
        (Some(other), _) => {
            let what = format!("a mount of type {other:?} cannot be reproduced");
            return reading.refuse(item.line, key, what, "use a volume, a directory of the host or tmpfs");
        }
    };
    if let Some(source) = mount {
        into.mounts.push(MountConfig { source, target, read_only });
    }
}

fn anonymous(reading: &Reading<'_>, target: &str, line: u64, key: &str) {
    reading.refuse(
        line,
        key,
        format!("{target:?} is a volume without a name, and every upgrade would begin with an empty one"),
        "give it a name, such as - data:/PATH, and the name a place under `volumes`",
    );
}

fn named(reading: &Reading<'_>, name: &str, line: u64, key: &str, stores: &Stores) -> Option<String> {
    let found = stores.volumes.get(name).cloned();
    if found.is_none() {
        let what = format!("volume {name:?} is not declared");
        reading.refuse(line, key, what, format!("add `volumes: {{ {name}: {{}} }}` to the file"));
    }
    found
}

/// A directory of the host. What belongs to the release must not come from this checkout: then something else would run than
/// what was chosen.
fn bind(reading: &Reading<'_>, service: &str, source: &str, line: u64, key: &str) -> Option<String> {
    let path = host_path(reading, source, line, key)?;
    let socket = path.ends_with("/docker.sock") || path.ends_with("/podman.sock");
    let plain = path.trim_end_matches('/');
    if socket {
        let advice = "take it out: whoever has the socket owns the host. Replank's controller gets it by itself";
        reading.refuse(line, key, "the engine's socket is mounted", advice);
        return None;
    }
    if plain.is_empty() || ["/proc", "/sys", "/dev", "/var/lib/docker"].contains(&plain) {
        reading.refuse(
            line,
            key,
            format!("{path} of the host is mounted"),
            "mount the directory that is needed, not all of them",
        );
        return None;
    }
    let root = reading.repo.root();
    if let Ok(inner) = std::path::Path::new(plain).strip_prefix(root) {
        let inner = inner.to_string_lossy().into_owned();
        let is_code = inner.is_empty()
            || reading.repo.is_file(&inner)
            || ["Dockerfile", "package.json", "Cargo.toml", "pyproject.toml", "go.mod", ".git"]
                .iter()
                .any(|sign| reading.repo.is_file(&format!("{inner}/{sign}")));
        if is_code {
            let what =
                format!("{source:?} is part of this checkout, so the container would not run what the release holds");
            reading.refuse(line, key, what, "copy it into the image, or give the absolute path of a directory outside");
            return None;
        }
        let note = format!(
            "{source} is compose's directory in this checkout; move it and change the path if the checkout may go"
        );
        reading.note(service, note);
    }
    Some(path)
}

/// A path of the host as an absolute one. Compose's relative paths begin at its file, and must not lead out of the repository.
fn host_path(reading: &Reading<'_>, path: &str, line: u64, key: &str) -> Option<String> {
    if path.starts_with('~') {
        reading.refuse(line, key, format!("{path:?} depends on who runs compose"), "write the absolute path");
        return None;
    }
    let clean = |p: &str| !p.split('/').any(|part| part == "..") && !p.contains([',', '\n', '\0']);
    if path.starts_with('/') {
        if !clean(path) {
            reading.refuse(
                line,
                key,
                format!("{path:?} is not a plain path"),
                "write the absolute path without '..' and ','",
            );
            return None;
        }
        return Some(path.to_owned());
    }
    match reading.repo.inside(&reading.base, path) {
        Ok(inner) => {
            let root = reading.repo.root().to_string_lossy();
            Some(if inner == "." { root.into_owned() } else { format!("{root}/{inner}") })
        }
        Err(why) => {
            reading.refuse(line, key, format!("{path:?} {why}"), "write the absolute path of a directory of the host");
            None
        }
    }
}

pub fn tmpfs(reading: &Reading<'_>, node: &Node, key: &str, into: &mut Mounts) {
    for path in reading.texts(node, key) {
        if path.contains(':') {
            reading.refuse(
                node.line,
                key,
                format!("the options of {path:?} cannot be reproduced"),
                "give the path alone",
            );
        } else {
            into.tmpfs.insert(path);
        }
    }
}

/// `secrets` of a service: each a file below `/run/secrets`.
pub fn secret_files(reading: &Reading<'_>, node: &Node, key: &str, stores: &Stores, into: &mut Mounts) {
    let Value::List(items) = &node.value else {
        if !node.is_nothing() {
            reading.refuse(node.line, key, "this is not a list", "write each secret's name on a line of its own");
        }
        return;
    };
    for item in items {
        let (mut source, mut target) = (None, None);
        match &item.value {
            Value::Map(entries) => {
                for (name, value) in entries {
                    let at = format!("{key}.{name}");
                    match name.as_str() {
                        "source" => source = reading.text(value, &at),
                        "target" => target = reading.text(value, &at),
                        "uid" | "gid" | "mode" => reading.refuse(
                            value.line,
                            at,
                            "the owner of a mounted file cannot be changed",
                            "set it on the host's file, and take it out",
                        ),
                        _ => reading.unknown(value.line, at),
                    }
                }
            }
            Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => {
                source = reading.text(item, key);
            }
        }
        let Some(name) = source else { continue };
        match stores.secrets.get(&name) {
            Some(file) => {
                let target = target.unwrap_or_else(|| name.clone());
                let target = if target.starts_with('/') { target } else { format!("/run/secrets/{target}") };
                into.mounts.push(MountConfig { source: file.clone(), target, read_only: true });
            }
            None => reading.refuse(
                item.line,
                key,
                format!("secret {name:?} has no file"),
                "give it `file: PATH` under `secrets` at the top",
            ),
        }
    }
}
