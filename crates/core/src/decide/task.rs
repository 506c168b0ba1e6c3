//! Steps that are carried out in the world: what one is called, and what came of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::fault::Told;
use crate::phase::{Built, Fetched};
use crate::ports::Change;
use crate::record::{Plan, Record};
use crate::words::{ComponentName, ContainerName, Millis, OpKey};

/// One thing to carry out in the world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    Fetch,
    Build {
        component: ComponentName,
        attempt: u32,
        key: OpKey,
    },
    /// Run a data step, once and until `until` at the longest.
    Step {
        step: ContainerName,
        key: OpKey,
        until: Millis,
    },
    /// Plan the new revision, and resolve, prove and protect the images of the way back.
    Prepare,
    Change {
        task: TaskId,
        change: Change,
    },
    /// Remove what earlier jobs left and nobody needs: trees, logs, images.
    CleanUp,
    /// Look for the images of the way back, and protect them again.
    Prove,
    /// Remove from the registry what failed jobs left there without a label.
    Purge,
}

impl Action {
    /// The name of this action for the record that it was decided on.
    pub fn task(&self, record: &Record) -> TaskId {
        let named = |step: String, attempt| TaskId { job: job_of(record), step, attempt };
        match self {
            Self::Fetch => named(FETCH.to_owned(), 1),
            Self::Build { component, attempt, .. } => named(build_step(component), *attempt),
            Self::Step { step, .. } => named(data_step(step), 1),
            Self::Prepare => named(PREPARE.to_owned(), 1),
            Self::Change { task, .. } => task.clone(),
            Self::CleanUp => named(CLEAN_UP.to_owned(), 1),
            Self::Prove => named(PROVE.to_owned(), 1),
            Self::Purge => named(PURGE.to_owned(), 1),
        }
    }
}

pub(super) const FETCH: &str = "fetch";
pub(super) const PREPARE: &str = "prepare";
pub(super) const CLEAN_UP: &str = "clean-up";
pub(super) const PURGE: &str = "purge";
pub(super) const PROVE: &str = "prove";

pub(crate) fn build_step(component: &ComponentName) -> String {
    format!("build-{component}")
}

pub fn data_step(step: &ContainerName) -> String {
    format!("data-{step}")
}

pub(super) fn job_of(record: &Record) -> String {
    record.job.as_ref().map(|j| j.id.to_string()).unwrap_or_default()
}

/// What an action is called while it runs: one job's step, and its attempt. Two actions with one name are one action.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId {
    pub job: String,
    pub step: String,
    pub attempt: u32,
}

/// What came of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Fetched(Fetched),
    Built(Built),
    Prepared(Box<Prepared>),
    /// A data step has ended.
    Stepped {
        exit_code: i64,
    },
    Changed,
    CleanedUp,
    /// Which images of the way back are gone; empty where none is.
    Proved {
        lost: String,
    },
    Purged(Purged),
}

/// What is no longer in the registry, and why the rest still is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Purged {
    pub removed: Vec<OpKey>,
    pub why: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    pub plan: Plan,
    /// Commands that put the old version back by hand.
    pub escape_hatch: Vec<String>,
    /// Format that the new controller's image reads, where it says so; `None` without a controller.
    pub reads_format: Option<u32>,
}

/// A task that ended. Failures carry how often it was tried, for the backoff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    Well { outcome: Outcome, at: Millis },
    Badly { told: Told, tries: u32, at: Millis },
}

/// The tasks of this process: what runs, and what ended since. A restarted process has none, and that is enough.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tasks {
    pub running: BTreeSet<TaskId>,
    pub ended: BTreeMap<TaskId, Ended>,
}

impl Serialize for TaskId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}/{}", self.job, self.step, self.attempt))
    }
}

impl<'de> Deserialize<'de> for TaskId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut parts = text.rsplitn(3, '/');
        let attempt = parts.next().and_then(|a| a.parse().ok());
        match (attempt, parts.next(), parts.next()) {
            (Some(attempt), Some(step), Some(job)) => Ok(Self { job: job.to_owned(), step: step.to_owned(), attempt }),
            _ => Err(serde::de::Error::custom("a task is job/step/attempt")),
        }
    }
}
