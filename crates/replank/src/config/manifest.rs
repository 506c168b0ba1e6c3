//! `.replank.toml`: what a release may say about itself, and nothing more (the trust boundary).
//!
//! The file is written by whoever can push a tag. Mounts, ports, networks, privileges, secrets, registry, remote, keys and
//! policy come from the operator's file alone; here they are unknown keys, refused by name.

use std::collections::BTreeMap;

use replank_adapters::platform::docker::config::{PROBE_TIMEOUT_MS, StatusRange, VersionProof};
use replank_core::data::Schema;
use replank_core::phase::Recipe;
use replank_core::words::{BadWord, ComponentName, ContainerName, Version};
use serde::{Deserialize, Serialize};

use super::check::{PATH_ADVICE, inside, is_env_name};
use super::reader::Document;
use super::{Problems, Settings};

pub const FILE: &str = ".replank.toml";
/// Largest manifest: it is text written by people.
pub const SIZE_MAX: usize = 256 * 1024;
/// The build argument that tells a build its version (contract §5).
pub const VERSION_ARG: &str = "APP_VERSION";
/// Longest notes: they are shown on a page, and the manifest is stored with the job.
pub const NOTES_MAX: usize = 16 * 1024;
/// Most arguments, probes or names of a list: a manifest is stored in every record.
const ENTRIES_MAX: usize = 64;
const VALUE_MAX: usize = 4 * 1024;

const UNKNOWN: &str = "a release may not set it: take it out, or let the operator set it in replank.toml";

/// The manifest of one release, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub components: BTreeMap<ComponentName, ComponentWish>,
    /// By container. The platform bends its own probes by these, within its bounds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub probes: BTreeMap<ContainerName, ProbeWish>,
    /// By component: the command of a one-off container of the new image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub migrate: BTreeMap<ComponentName, Vec<String>>,
    #[serde(default, skip_serializing_if = "Schema::is_default")]
    pub schema: Schema,
    /// The oldest version that can use the data once this one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to: Option<Version>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub notes: String,
    /// The oldest version that can be upgraded to this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade_from: Option<Version>,
    #[serde(default, skip_serializing_if = "Requires::is_empty")]
    pub requires: Requires,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComponentWish {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dockerfile: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeWish {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect_status: Option<StatusRange>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<VersionProof>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requires {
    /// Names of variables that the operator must have set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// The lowest Replank version that can carry this release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replank: Option<Version>,
}

impl Requires {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Manifest {
    /// Reads a release's manifest. Every problem is told; a manifest with one is refused as a whole.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        let doc = Document::parse(FILE, text, UNKNOWN).map_err(Problems)?;
        let manifest = doc.read::<Self>();
        if let Some(manifest) = &manifest {
            manifest.check(&doc);
        }
        let problems = doc.problems();
        match manifest {
            Some(manifest) if problems.is_empty() => Ok(manifest),
            _ => Err(Problems(problems)),
        }
    }

    /// As [`Manifest::parse`], from a file that may not be UTF-8.
    pub fn parse_bytes(bytes: &[u8]) -> Result<Self, Problems> {
        Self::parse(&String::from_utf8_lossy(bytes))
    }

    /// What `Fetched.manifest` stores.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn check(&self, doc: &Document) {
        let too_many =
            self.components.len().max(self.probes.len()).max(self.migrate.len()).max(self.requires.environment.len())
                > ENTRIES_MAX;
        if too_many || self.components.values().any(|c| c.args.len() > ENTRIES_MAX) {
            doc.problem(&[], format!("more than {ENTRIES_MAX} entries of one kind"), "make it smaller");
        }
        for (name, wish) in &self.components {
            for (key, path) in [("dockerfile", &wish.dockerfile), ("context", &wish.context)] {
                if let Some(Err(rule)) = path.as_deref().map(inside) {
                    let what = format!("{:?} {rule}", path.as_deref().unwrap_or_default());
                    doc.problem(&["components", name.as_str(), key], what, PATH_ADVICE);
                }
            }
            if wish.target.as_deref().is_some_and(|t| t.is_empty() || t.len() > 128 || t.contains(char::is_whitespace))
            {
                doc.problem(
                    &["components", name.as_str(), "target"],
                    "this is no stage's name",
                    "name a stage of the Dockerfile",
                );
            }
            for (arg, value) in &wish.args {
                if !is_env_name(arg) {
                    let what = format!("build argument {arg:?} is not a name");
                    doc.problem(&["components", name.as_str(), "args"], what, "use letters, digits and '_'");
                } else if arg == VERSION_ARG {
                    let what = format!("{VERSION_ARG} is set by Replank");
                    doc.problem(&["components", name.as_str(), "args", arg], what, "take it out");
                } else if arg.starts_with("BUILDKIT_") || arg.to_ascii_uppercase().ends_with("_PROXY") {
                    // These two steer the builder and its network rather than the Dockerfile.
                    doc.problem(&["components", name.as_str(), "args", arg], "this steers the builder itself", UNKNOWN);
                } else if value.len() > VALUE_MAX || value.contains('\0') {
                    doc.problem(
                        &["components", name.as_str(), "args", arg],
                        "the value is too long",
                        "at most 4096 bytes",
                    );
                }
            }
        }
        for (name, wish) in &self.probes {
            if wish.timeout_ms.is_some_and(|ms| !PROBE_TIMEOUT_MS.contains(&ms)) {
                let advice = format!("choose {} to {} ms", PROBE_TIMEOUT_MS.start(), PROBE_TIMEOUT_MS.end());
                doc.problem(&["probes", name.as_str(), "timeout_ms"], "this is out of range", advice);
            }
        }
        for (name, command) in &self.migrate {
            let too_long = command.len() > ENTRIES_MAX || command.iter().map(String::len).sum::<usize>() > VALUE_MAX;
            if command.is_empty() || too_long || command.iter().any(|word| word.contains('\0')) {
                doc.problem(
                    &["migrate", name.as_str()],
                    "this is no command",
                    format!("give 1 to {ENTRIES_MAX} words, {VALUE_MAX} bytes in all"),
                );
            }
        }
        if self.notes.len() > NOTES_MAX {
            doc.problem(&["notes"], format!("the notes have more than {NOTES_MAX} bytes"), "make them shorter");
        }
        for name in self.requires.environment.iter().filter(|name| !is_env_name(name)) {
            doc.problem(
                &["requires", "environment"],
                format!("{name:?} is no variable's name"),
                "use letters, digits and '_'",
            );
        }
    }

    /// What the operator lacks for this release; empty where it can start. `running` is `None` at a first deployment.
    pub fn missing(&self, settings: &Settings, running: Option<&Version>) -> Vec<String> {
        let mut missing = Vec::new();
        let containers = &settings.platform.containers;
        for name in &self.requires.environment {
            if !containers.values().any(|c| c.env.contains_key(name) || c.secrets.contains_key(name)) {
                missing.push(format!(
                    "the release needs the variable {name}: set it in [containers.NAME.env] of replank.toml"
                ));
            }
        }
        let own = env!("CARGO_PKG_VERSION").parse::<Version>().ok();
        if let (Some(needs), Some(own)) = (&self.requires.replank, own)
            && needs.base() > own.base()
        {
            missing.push(format!("the release needs Replank {needs} and this is {own}: upgrade Replank first"));
        }
        if let (Some(oldest), Some(running)) = (&self.upgrade_from, running)
            && running.base() < oldest.base()
        {
            missing.push(format!(
                "the release can come from {oldest} or newer and {running} runs: upgrade to {oldest} first"
            ));
        }
        missing
    }
}

/// How each component of a release is built: the operator's settings, bent by the release where it may.
/// Fails where the release names a component that the operator does not have.
pub fn recipes(
    settings: &Settings,
    manifest: &Manifest,
    version: &Version,
) -> Result<BTreeMap<ComponentName, Recipe>, BadWord> {
    let named = manifest.components.keys().chain(manifest.migrate.keys());
    if let Some(unknown) = named.into_iter().find(|name| !settings.components.contains_key(*name)) {
        return Err(BadWord {
            what: "component of the release's manifest",
            value: unknown.to_string(),
            rule: "the operator's replank.toml must have a table of that name under [components]",
        });
    }
    let none = ComponentWish::default();
    let recipe = |(name, own): (&ComponentName, &super::ComponentSettings)| {
        let wish = manifest.components.get(name).unwrap_or(&none);
        let mut args = wish.args.clone();
        // The operator's word stands where both name an argument.
        args.extend(own.args.clone());
        args.insert(VERSION_ARG.to_owned(), version.to_string());
        if let (Some(arg), Some(commit)) = (&own.commit_arg, &version.commit) {
            args.insert(arg.clone(), commit.clone());
        }
        let recipe = Recipe {
            dockerfile: wish.dockerfile.clone().unwrap_or_else(|| own.dockerfile.clone()),
            context: wish.context.clone().unwrap_or_else(|| own.context.clone()),
            target: wish.target.clone().or_else(|| own.target.clone()),
            args,
            platform: own.platform.clone(),
            secrets: own.secrets.clone(),
            repository: own.repository.clone(),
            unlabelled: settings.build.builder == super::Builder::AzExec,
        };
        (name.clone(), recipe)
    };
    Ok(settings.components.iter().map(recipe).collect())
}
