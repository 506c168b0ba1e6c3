//! The data part of a plan: the operator's steps, and what the release asks for.

use std::collections::BTreeMap;

use replank_core::data::{DataPlan, DataStep, Schema, StepKind};
use replank_core::fault::Fault;
use replank_core::image::Images;
use replank_core::words::{ComponentName, ContainerName};

use super::config::{ContainerConfig, DockerConfig};
use super::spec::{self, ContainerSpec};

/// # Errors
/// Permanent: a step that no container of the operator's can be the pattern of.
pub(super) fn plan(config: &DockerConfig, manifest: &serde_json::Value, images: &Images) -> Result<DataPlan, Fault> {
    // The manifest was checked when it was read: what it does not say has its default.
    let part = |name: &str| manifest.get(name).cloned().filter(|value| !value.is_null());
    let odd = |error: serde_json::Error| {
        Fault::permanent("the release's manifest says something of its data that is not understood").because(error)
    };
    let asked: BTreeMap<ComponentName, Vec<String>> =
        part("migrate").map(serde_json::from_value).transpose().map_err(odd)?.unwrap_or_default();
    let schema: Schema = part("schema").map(serde_json::from_value).transpose().map_err(odd)?.unwrap_or_default();
    let back_to = part("back_to").map(serde_json::from_value).transpose().map_err(odd)?;
    let mut steps = Vec::new();
    for component in images.keys() {
        let own = config.data.migrate.get(component);
        let Some(command) = asked.get(component).or_else(|| own.map(|own| &own.command).filter(|own| !own.is_empty()))
        else {
            continue;
        };
        let pattern = own.and_then(|own| own.container.as_ref());
        let run = pattern_of(config, component, pattern, command)?;
        steps.push(step(config, StepKind::Migrate, &format!("migrate-{component}"), run)?);
    }
    if let Some(backup) = &config.data.backup
        && !(steps.is_empty() && schema == Schema::Compatible)
    {
        let pattern = config.containers.get(&backup.container).ok_or_else(|| {
            Fault::permanent(format!("the backup is to run as container {}, which is not configured", backup.container))
                .advice("name a container in [backup]")
        })?;
        let run = pattern_of(config, &pattern.component, Some(&backup.container), &backup.command)?;
        steps.insert(0, step(config, StepKind::Backup, "backup", run)?);
    }
    Ok(DataPlan { steps, schema, back_to })
}

/// The run settings of a container of the component: its variables, secrets, mounts and networks are what a data step needs.
fn pattern_of(
    config: &DockerConfig,
    component: &ComponentName,
    named: Option<&ContainerName>,
    command: &[String],
) -> Result<ContainerConfig, Fault> {
    let of_component = |run: &&ContainerConfig| run.component == *component && !run.controller;
    let pattern = match named {
        Some(name) => config.containers.get(name),
        None => config.containers.values().find(of_component),
    };
    let pattern = pattern.filter(of_component).ok_or_else(|| {
        Fault::permanent(format!("no container runs {component}, so that a data step of it has no pattern"))
            .advice("configure a container of that component, which is not the controller")
    })?;
    Ok(ContainerConfig {
        // Its words are all that runs: behind an entry point that takes no commands they would start the application once more.
        entrypoint: Some(command.to_vec()),
        command: None,
        probe: None,
        overlap: None,
        depends_on: Default::default(),
        ..pattern.clone()
    })
}

fn step(config: &DockerConfig, kind: StepKind, name: &str, run: ContainerConfig) -> Result<DataStep, Fault> {
    let name = ContainerName::new(name).map_err(|bad| {
        Fault::permanent("a data step cannot be named").because(bad).advice("give the component a shorter name")
    })?;
    let component = run.component.clone();
    let secret_hashes = spec::secret_hashes(&config.installation, &run)?;
    let spec = serde_json::to_value(ContainerSpec { run, secret_hashes })
        .map_err(|error| Fault::permanent("the data step cannot be written as JSON").because(error))?;
    Ok(DataStep { name, kind, component, budget: config.data.budget_ms, spec })
}
