//! What is done to the data before a new revision starts: the operator's part.

use std::collections::BTreeMap;

use replank_adapters::platform::docker::config::{BackupConfig, ContainerConfig, DataConfig, MigrateConfig};
use replank_core::words::{ComponentName, ContainerName};

use super::check::seconds;
use super::raw;
use super::reader::Document;

pub(super) fn data(
    doc: &Document,
    components: &BTreeMap<ComponentName, raw::Component>,
    containers: &BTreeMap<ContainerName, ContainerConfig>,
    backup: Option<BackupConfig>,
    budget_seconds: Option<u64>,
) -> DataConfig {
    let mut data = DataConfig::default();
    seconds(doc, &["policy", "budgets", "data_seconds"], budget_seconds, &mut data.budget_ms, 1);
    for (name, component) in components {
        let at = |key| ["components", name.as_str(), key];
        if component.migrate.as_ref().is_some_and(Vec::is_empty) {
            doc.problem(
                &at("migrate"),
                "an empty command runs nothing",
                "give the words of a command, or leave it out",
            );
        }
        if let Some(pattern) = &component.migrate_as
            && !containers.get(pattern).is_some_and(|run| run.component == *name && !run.controller)
        {
            let what = format!("{pattern} is no container of {name}");
            doc.problem(
                &at("migrate_as"),
                what,
                "name a container that runs this component, and is not the controller",
            );
        }
        if component.migrate.is_some() || component.migrate_as.is_some() {
            let command = component.migrate.clone().unwrap_or_default();
            data.migrate.insert(name.clone(), MigrateConfig { command, container: component.migrate_as.clone() });
        }
        // The step's container and its log have this name.
        let step = format!("migrate-{name}");
        is_free(doc, &step, components, containers);
    }
    if let Some(backup) = &backup {
        let pattern = containers.get(&backup.container);
        if pattern.is_none_or(|run| run.controller) {
            let what = format!("{} is no container that could make a backup", backup.container);
            doc.problem(&["backup", "container"], what, "name a configured container which is not the controller");
        }
        if backup.command.is_empty() {
            doc.problem(&["backup", "command"], "an empty command saves nothing", "give the words of a command");
        }
        is_free(doc, "backup", components, containers);
    }
    DataConfig { backup, ..data }
}

fn is_free(
    doc: &Document,
    step: &str,
    components: &BTreeMap<ComponentName, raw::Component>,
    containers: &BTreeMap<ContainerName, ContainerConfig>,
) {
    let what = || format!("{step} is the name of a data step");
    if components.keys().any(|name| name.as_str() == step) {
        doc.problem(&["components", step], what(), "give the component another name");
    }
    if containers.keys().any(|name| name.as_str() == step) {
        doc.problem(&["containers", step], what(), "give the container another name");
    }
}
