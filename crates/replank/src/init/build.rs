//! `build` of a service: how its image is made from the release's tree.

use std::collections::BTreeMap;

use super::environment::is_secret;
use super::mounts::Stores;
use super::plan::BuildPlan;
use super::reading::{Reading, is_extension};
use super::yaml::{Node, Value};

/// Speed and labels: a build without them makes the same image.
const IGNORED: [(&str, &str); 8] = [
    ("cache_from", "the engine keeps its own build cache"),
    ("cache_to", "the engine keeps its own build cache"),
    ("no_cache", "the engine keeps its own build cache"),
    ("pull", "base images are pulled when the engine has none"),
    ("tags", "Replank names images itself"),
    ("labels", "Replank labels images itself"),
    ("provenance", "images carry no attestations"),
    ("sbom", "images carry no attestations"),
];

/// `None` where something about it is refused.
pub fn read(
    reading: &Reading<'_>,
    service: &str,
    node: &Node,
    stores: &Stores,
    secrets: &mut BTreeMap<String, String>,
) -> Option<BuildPlan> {
    let key = format!("services.{service}.build");
    let mut plan = BuildPlan::default();
    let (mut context, mut dockerfile) = (".".to_owned(), "Dockerfile".to_owned());
    match &node.value {
        Value::Map(entries) => {
            for (name, value) in entries {
                let at = format!("{key}.{name}");
                match name.as_str() {
                    "context" => context = reading.text(value, &at)?,
                    "dockerfile" => dockerfile = reading.text(value, &at)?,
                    "target" => plan.target = Some(reading.text(value, &at)?),
                    "args" => plan.args = args(reading, service, value, &at),
                    "platforms" => match reading.texts(value, &at).as_slice() {
                        [] => {}
                        [one] => plan.platform = Some(one.clone()),
                        _ => reading.refuse(
                            value.line,
                            at,
                            "Replank builds for one platform",
                            "name the one that the engine runs",
                        ),
                    },
                    "secrets" => plan.secrets = build_secrets(reading, value, &at, stores, secrets),
                    "network" if matches!(&value.value, Value::Text(text) if text == "default") => {}
                    "network" => reading.refuse(
                        value.line,
                        at,
                        "a build gets no network of its choice: it would run a release's commands beside production",
                        "take it out, and fetch what the build needs over the default network",
                    ),
                    ignored if IGNORED.iter().any(|(name, _)| *name == ignored) => {
                        let why = IGNORED.iter().find(|(name, _)| *name == ignored).map_or("", |(_, why)| why);
                        reading.note(service, format!("build.{ignored} is left out: {why}"));
                    }
                    "dockerfile_inline" => reading.refuse(
                        value.line,
                        at,
                        "a Dockerfile inside the compose file is not built",
                        "write it into a file of the repository",
                    ),
                    "additional_contexts"
                    | "entitlements"
                    | "extra_hosts"
                    | "isolation"
                    | "privileged"
                    | "shm_size"
                    | "ssh"
                    | "ulimits" => {
                        if !value.is_nothing() {
                            let what = "builds by Replank have no such setting";
                            reading.refuse(value.line, at, what, "take it out, and make the Dockerfile do without");
                        }
                    }
                    other if is_extension(other) => {}
                    _ => reading.unknown(value.line, at),
                }
            }
        }
        Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => {
            context = reading.text(node, &key)?;
        }
    }
    if context.contains("://") || context.starts_with("git@") || context.starts_with("github.com/") {
        let advice = "build from a directory of the repository: a release is one commit of it";
        reading.refuse(node.line, key, format!("the context {context:?} is not in this repository"), advice);
        return None;
    }
    let outside = |what: &str, path: &str, why: String| {
        let advice = "Replank builds from the release's tree alone: give a path inside the repository";
        reading.refuse(node.line, key.clone(), format!("the {what} {path:?} {why}"), advice);
    };
    plan.context =
        reading.repo.inside(&reading.base, &context).map_err(|why| outside("context", &context, why)).ok()?;
    plan.dockerfile =
        reading.repo.inside(&plan.context, &dockerfile).map_err(|why| outside("Dockerfile", &dockerfile, why)).ok()?;
    if !reading.repo.is_dir(&plan.context) {
        outside("context", &plan.context, "does not exist here".to_owned());
        return None;
    }
    if !reading.repo.is_file(&plan.dockerfile) {
        outside("Dockerfile", &plan.dockerfile, "does not exist here".to_owned());
        return None;
    }
    Some(plan)
}

fn args(reading: &Reading<'_>, service: &str, node: &Node, key: &str) -> BTreeMap<String, String> {
    let mut args = BTreeMap::new();
    for (name, value, line) in reading.pairs(node, key) {
        if name == "APP_VERSION" {
            reading.note(service, "build argument APP_VERSION is left out: Replank sets it to the release's version");
            continue;
        }
        match value.or_else(|| reading.vars.get(&name).cloned()) {
            Some(value) if is_secret(&name, &value) => reading.refuse(
                line,
                format!("{key}.{name}"),
                "this build argument looks like a secret, and everybody who has the image could read it",
                "give it as a build secret: `secrets` under `build`, with a file under `secrets` at the top",
            ),
            Some(value) => {
                args.insert(name, value);
            }
            None => reading.refuse(
                line,
                format!("{key}.{name}"),
                "this build argument has no value",
                "give it one, here or in .env",
            ),
        }
    }
    args
}

fn build_secrets(
    reading: &Reading<'_>,
    node: &Node,
    key: &str,
    stores: &Stores,
    into: &mut BTreeMap<String, String>,
) -> Vec<String> {
    let mut names = Vec::new();
    let Value::List(items) = &node.value else { return names };
    for item in items {
        let name = match &item.value {
            Value::Map(_) => {
                reading.refuse(
                    item.line,
                    key,
                    "a build secret with options cannot be reproduced",
                    "give its name alone",
                );
                continue;
            }
            Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => {
                let Some(name) = reading.text(item, key) else { continue };
                name
            }
        };
        match stores.secrets.get(&name) {
            Some(file) => {
                into.insert(name.clone(), file.clone());
                names.push(name);
            }
            None => reading.refuse(
                item.line,
                key,
                format!("secret {name:?} has no file"),
                "give it `file: PATH` under `secrets` at the top",
            ),
        }
    }
    names
}
