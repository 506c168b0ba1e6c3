//! What a release does to the application's data, and what that does to the way back.

use serde::{Deserialize, Serialize};

use crate::phase::{Op, Swap, WayBack};
use crate::record::{Deployment, Job, Record, Snapshot};
use crate::words::{ComponentName, ContainerName, Millis, Version};

/// What a release says of its data: whether the version before it can still use them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schema {
    Compatible,
    OneWay,
    #[default]
    Unknown,
}

impl Schema {
    // The signature is serde's.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn is_default(&self) -> bool {
        *self == Self::Unknown
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// Runs on the images that run now, before anything is changed.
    Backup,
    /// Runs on the new images.
    Migrate,
}

/// One container that runs once and has to end well.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DataStep {
    /// `backup`, or `migrate-COMPONENT`: the name of its container and of its log.
    pub name: ContainerName,
    pub kind: StepKind,
    /// Whose image it runs.
    pub component: ComponentName,
    /// Milliseconds.
    pub budget: u64,
    /// How it runs, which only the platform reads.
    #[serde(default)]
    pub spec: serde_json::Value,
}

/// The data part of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DataPlan {
    /// In their order: the backup is the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<DataStep>,
    #[serde(default, skip_serializing_if = "Schema::is_default")]
    pub schema: Schema,
    /// The oldest version that can use the data once this one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to: Option<Version>,
}

impl DataPlan {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Why `before` cannot use the data any more once this release has had them; `None` where it can, or where nobody knows.
    pub fn closes(&self, before: &Version) -> Option<String> {
        match &self.back_to {
            Some(oldest) if before.base() < oldest.base() => Some(format!("its data can be used from {oldest} on")),
            _ if self.schema == Schema::OneWay => Some("it changes data in a way that is one-way".to_owned()),
            Some(_) | None => None,
        }
    }
}

/// The oldest version that can use the data once `to` may have had them, where `before` was it until then.
#[must_use]
pub fn oldest(before: Option<&Version>, to: &Deployment) -> Option<Version> {
    let data = &to.plan.data;
    let said = match (&data.back_to, data.schema) {
        (Some(oldest), _) => Some(oldest),
        (None, Schema::OneWay) => Some(&to.version),
        (None, Schema::Compatible | Schema::Unknown) => None,
    };
    said.into_iter().chain(before).max_by_key(|version| version.base()).cloned()
}

/// Why an older release cannot use the data as they are; `None` where it can, or where nobody knows.
#[must_use]
pub fn too_new_for(record: &Record, older: &Version) -> Option<String> {
    let known = record.data_from.as_ref().filter(|from| older.base() < from.base());
    let of_running = || record.running.as_ref().and_then(|running| running.plan.data.closes(older));
    known.map(|from| format!("the data can be used from {from} on")).or_else(of_running)
}

/// What a release says of its data is about upgrades to it. On the way down from a newer one nothing of it holds: the older
/// release does not change them, and what ran before can use them again.
pub fn without_changes(data: &mut DataPlan) {
    data.steps.retain(|step| step.kind != StepKind::Migrate);
    (data.schema, data.back_to) = (Schema::Compatible, None);
}

/// How far a data step is. It began when `intended_at` was recorded, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StepState {
    pub intended_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Millis>,
}

/// When the last data step ended: the other clocks of the rollout start there.
pub fn ended_at(job: &Job) -> Option<Millis> {
    job.data.values().filter_map(|state| state.ended_at).max()
}

/// Why the way back of a swap is closed to everything but a person who has restored the data; `None` while it is open.
///
/// It closes before the data can change, not after: what was intended may have happened.
pub fn closed(swap: &Swap, job: Option<&Job>) -> Option<String> {
    let WayBack::Snapshot(snapshot) = &swap.way_back else { return None };
    if let Some(why) = &snapshot.closed {
        return Some(why.clone());
    }
    // On the way back itself nothing of the old version touches the data anew.
    if swap.to.revision == snapshot.deployment.revision {
        return None;
    }
    let data = &swap.to.plan.data;
    let why = data.closes(&snapshot.deployment.version)?;
    let migrates = data.steps.iter().filter(|step| step.kind == StepKind::Migrate);
    let begun = job.is_some_and(|job| migrates.into_iter().any(|step| job.data.contains_key(&step.name)));
    (begun || swap.intended(Op::StartNew).is_some()).then(|| format!("{} has had the data, and {why}", swap.to.version))
}

/// The same for whatever a rollback would restore now.
pub fn closed_for(record: &Record) -> Option<String> {
    let of_snapshot = || record.snapshot.as_ref().and_then(|snapshot| snapshot.closed.clone());
    match record.phase.swap() {
        Some(swap) => closed(swap, record.job.as_ref()).or_else(of_snapshot),
        None => of_snapshot(),
    }
}

/// A snapshot that is taken again keeps what the data of a failed job have closed.
pub fn still_closed(before: Option<&Snapshot>, revision: &crate::words::RevisionId) -> Option<String> {
    before.filter(|snapshot| snapshot.deployment.revision == *revision).and_then(|snapshot| snapshot.closed.clone())
}
