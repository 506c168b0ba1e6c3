//! What `Plan.spec` stores for this platform: everything needed to run a revision again, secrets by reference and hash.

use std::collections::BTreeMap;

use replank_core::fault::Fault;
use replank_core::image::Images;
use replank_core::phase::Fetched;
use replank_core::record::{ContainerPlan, Plan};
use replank_core::words::{ContainerName, Digest, InstallationId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::config::{self, ContainerConfig, DockerConfig, ProbeConfig, SecretSource, StatusRange, VersionProof};
use super::data;

/// Longest secret: an environment of a process has room for 128 KiB in one string on Linux.
pub const SECRET_MAX: u64 = 64 * 1024;

/// Unknown fields are refused, here and below: a run spec that is understood in part must not be run in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    pub containers: BTreeMap<ContainerName, ContainerSpec>,
    /// By listener name.
    pub listeners: BTreeMap<String, Upstream>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    pub run: ContainerConfig,
    /// Salted hashes of the secrets as they were when the plan was made, to tell that one has changed since.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secret_hashes: BTreeMap<String, Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    pub container: ContainerName,
    pub port: u16,
}

impl RunSpec {
    pub fn of(plan: &Plan) -> Result<Self, Fault> {
        Self::deserialize(&plan.spec).map_err(|error| {
            Fault::permanent("the stored run spec is not one that this Replank understands")
                .advice("use the Replank version that wrote it, or a newer one")
                .because(error)
        })
    }

    /// Containers in the waves in which they start: all of one wave at the same time.
    pub fn waves(&self, wanted: impl Fn(&ContainerName) -> bool) -> Result<Vec<Vec<ContainerName>>, Fault> {
        let runs = self.containers.iter().map(|(name, spec)| (name.clone(), spec.run.clone())).collect();
        config::waves(&runs, wanted)
    }
}

/// What a release may say about its own probes. Ports, and everything else about running, are the operator's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProbeWish {
    path: Option<String>,
    expect_status: Option<StatusRange>,
    version: Option<VersionProof>,
    timeout_ms: Option<u64>,
}

/// The plan of a release: the operator's configuration, bent by the release's manifest within its bounds.
pub fn plan(config: &DockerConfig, fetched: &Fetched, images: &Images) -> Result<Plan, Fault> {
    let mut runs = config.containers.clone();
    for (name, wish) in wishes(&fetched.manifest)? {
        let at = |what: String| Fault::permanent(format!("the release's probe of {name} {what}"));
        let probe = ContainerName::new(name.as_str())
            .ok()
            .and_then(|name| runs.get_mut(&name))
            .and_then(|container| container.probe.as_mut())
            .ok_or_else(|| {
                at("is for a container without one".to_owned())
                    .advice("configure a probe for it in the operator's configuration, or take it out of the release's manifest")
            })?;
        bend(probe, wish).map_err(|(what, advice)| at(what).advice(advice))?;
    }
    let mut containers = BTreeMap::new();
    let mut specs = BTreeMap::new();
    for (name, run) in runs {
        if !images.contains_key(&run.component) {
            return Err(Fault::permanent(format!(
                "container {name} needs an image of {}, which is not built",
                run.component
            ))
            .advice("add the component to the configuration, or correct the container's component"));
        }
        let overlap = run.overlap_rule();
        let plan = ContainerPlan { component: run.component.clone(), overlap, controller: run.controller };
        let secret_hashes = secret_hashes(&config.installation, &run)?;
        containers.insert(name.clone(), plan);
        specs.insert(name, ContainerSpec { run, secret_hashes });
    }
    let listeners = config
        .listeners
        .iter()
        .map(|(name, l)| (name.clone(), Upstream { container: l.container.clone(), port: l.port }))
        .collect();
    let spec = serde_json::to_value(RunSpec { containers: specs, listeners })
        .map_err(|error| Fault::permanent("the run spec cannot be written as JSON").because(error))?;
    Ok(Plan { containers, spec, data: data::plan(config, &fetched.manifest, images)? })
}

/// Hashes of the secrets as they are now.
pub(super) fn secret_hashes(
    installation: &InstallationId,
    run: &ContainerConfig,
) -> Result<BTreeMap<String, Digest>, Fault> {
    let hashed =
        |(key, source): (&String, &SecretSource)| Ok((key.clone(), hash(installation, key, &resolve(key, source)?)));
    run.secrets.iter().map(hashed).collect()
}

fn wishes(manifest: &serde_json::Value) -> Result<BTreeMap<String, ProbeWish>, Fault> {
    match manifest.get("probes") {
        None | Some(serde_json::Value::Null) => Ok(BTreeMap::new()),
        Some(probes) => BTreeMap::deserialize(probes).map_err(|error| {
            Fault::permanent("the release's manifest asks something of its probes that it may not")
                .advice("a release may set path, expect_status, version and timeout_ms of a probe")
                .because(error)
        }),
    }
}

fn bend(probe: &mut ProbeConfig, wish: ProbeWish) -> Result<(), (String, String)> {
    if probe.tcp {
        return Err(("bends a probe that is a plain connection".to_owned(), "take it out of the manifest".to_owned()));
    }
    if let Some(path) = wish.path {
        probe.path = path;
    }
    if let Some(expect) = wish.expect_status {
        probe.expect_status = expect;
    }
    if let Some(timeout) = wish.timeout_ms {
        probe.timeout_ms = timeout;
    }
    if let Some(version) = wish.version {
        // A release may prove its version in another way; it may not stop proving it.
        if version == VersionProof::None && probe.version != VersionProof::None {
            return Err((
                "takes the operator's proof of the version away".to_owned(),
                "give another proof, or leave `version` out".to_owned(),
            ));
        }
        probe.version = version;
    }
    config::check_probe(probe)
}

/// Reads a secret from the operator's side. Faults name the secret and its source, never what was read.
pub fn resolve(name: &str, source: &SecretSource) -> Result<String, Fault> {
    let fault = |why: String| {
        Fault::permanent(format!("secret {name} cannot be read: {why}"))
            .advice("make it available to the process that creates containers, or correct its source")
    };
    let value = match source {
        SecretSource::Env(variable) => {
            std::env::var(variable).map_err(|_| fault(format!("the environment has no usable {variable}")))?
        }
        SecretSource::File(path) => {
            let size =
                std::fs::metadata(path).map_err(|error| fault(format!("{}: {}", path.display(), error.kind())))?.len();
            if size > SECRET_MAX {
                return Err(fault(format!("{} is larger than {SECRET_MAX} bytes", path.display())));
            }
            let mut text = std::fs::read_to_string(path)
                .map_err(|error| fault(format!("{}: {}", path.display(), error.kind())))?;
            if text.ends_with('\n') {
                text.pop();
            }
            text
        }
    };
    if value.contains('\0') || value.len() as u64 > SECRET_MAX {
        return Err(fault("it has a zero byte or is too long".to_owned()));
    }
    Ok(value)
}

/// Salted with the installation's id, so that equal secrets of two installations have nothing in common.
pub fn hash(installation: &InstallationId, name: &str, value: &str) -> Digest {
    let mut hash = Sha256::new();
    for part in [installation.as_str(), name, value] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    Digest::new(format!("sha256:{}", hex::encode(hash.finalize())))
        .unwrap_or_else(|_| unreachable!("a SHA-256 in hex is a digest"))
}
