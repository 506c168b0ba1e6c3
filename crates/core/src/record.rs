//! The record: everything Replank knows about one application, loaded and written as one versioned value.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::{DataPlan, StepState};
use crate::drift::Drift;
use crate::image::{ImageId, Images};
use crate::phase::{BuiltOnly, Mode, Phase};
use crate::progress::Reached;
use crate::words::{
    AppName, CommitSha, ComponentName, ContainerName, Digest, IdempotencyKey, InstallationId, JobId, Millis, Nonce,
    OpKey, RevisionId, Version,
};

/// Whose turn it can be: a controller inside a revision, or one that runs on the host (first deployment, development).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ControllerId {
    Host,
    Revision(RevisionId),
}

impl fmt::Display for ControllerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host:"),
            Self::Revision(id) => write!(f, "{id}"),
        }
    }
}

impl From<ControllerId> for String {
    fn from(id: ControllerId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for ControllerId {
    type Error = crate::words::BadWord;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        // A colon cannot stand in a revision's name, so the two never collide.
        if text == "host:" { Ok(Self::Host) } else { RevisionId::new(text).map(Self::Revision) }
    }
}

/// How a container lives beside its successor (architecture, Data and workers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    Allowed,
    StopOldFirst,
    StartAfterCutover,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerPlan {
    pub component: ComponentName,
    pub overlap: Overlap,
    /// This container is a Replank controller.
    #[serde(default)]
    pub controller: bool,
}

/// How a revision runs: what decisions need, and the platform's own run spec, which only the platform reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Plan {
    pub containers: BTreeMap<ContainerName, ContainerPlan>,
    #[serde(default)]
    pub spec: serde_json::Value,
    /// What happens to the data.
    #[serde(default, skip_serializing_if = "DataPlan::is_default")]
    pub data: DataPlan,
}

impl Plan {
    pub fn has_controller(&self) -> bool {
        self.containers.values().any(|c| c.controller)
    }

    /// Containers that may start before the cut-over.
    pub fn early(&self) -> impl Iterator<Item = &ContainerName> {
        self.containers.iter().filter(|(_, c)| c.overlap != Overlap::StartAfterCutover).map(|(name, _)| name)
    }

    pub fn with_overlap(&self, overlap: Overlap) -> impl Iterator<Item = &ContainerName> {
        self.containers.iter().filter(move |(_, c)| c.overlap == overlap).map(|(name, _)| name)
    }
}

/// A set of images, running or runnable, under one revision.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Deployment {
    pub revision: RevisionId,
    /// The operation key that its containers carry: what tells ours from a look-alike.
    pub key: OpKey,
    pub version: Version,
    pub commit: CommitSha,
    pub images: Images,
    pub plan: Plan,
    /// The highest record format that its controller reads, as its image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads_format: Option<u32>,
}

impl Deployment {
    /// A controller that was deployed before images said so reads the first format.
    pub fn reads_format(&self) -> u32 {
        self.reads_format.unwrap_or(crate::format::FIRST)
    }
}

/// What a rollback restores.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Snapshot {
    pub deployment: Deployment,
    pub taken_at: Millis,
    /// `rollback_available_until`: images are protected until then.
    pub keep_until: Millis,
    /// When the images were last seen present.
    pub proved_at: Millis,
    /// Which images were gone when they were last looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
    /// Why the data keep it from being restored by anybody but a person who has restored them first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    Release,
    Commit,
}

/// What was chosen: the commit is pinned here before anything is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Target {
    pub kind: TargetKind,
    pub version: Version,
    pub commit: CommitSha,
    /// `refs/tags/v1.2.3` for a release; the tracking branch's ref for a commit.
    pub raw_ref: String,
}

/// Who asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Actor {
    /// The identity's stable id: an Entra object id, a token's id, `uid:N` for a user of the machine, or `system`.
    pub oid: String,
    /// A name for people; may be empty.
    #[serde(default)]
    pub name: String,
    /// Where the request came from; empty for the system.
    #[serde(default)]
    pub from: String,
}

impl Actor {
    pub fn system() -> Self {
        Self { oid: "system".to_owned(), name: "Replank".to_owned(), from: String::new() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnRolloutFailure {
    Hold,
    Rollback,
}

/// What is particular about a job that leads to an older release.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Downgrade {
    /// The data are those of the older release, by the operator's word.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub data_restored: bool,
}

/// One upgrade, from the click to its final state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub target: Target,
    pub nonce: Nonce,
    pub actor: Actor,
    #[serde(default)]
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<IdempotencyKey>,
    pub started_at: Millis,
    pub mode: Mode,
    pub on_rollout_failure: OnRolloutFailure,
    #[serde(default)]
    pub build_only: bool,
    /// What an earlier build-only job made of the same commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reuse: Option<BuiltOnly>,
    /// Whoever started it knows that the way back may close.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_one_way: bool,
    /// It leads to an older release, on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downgrade: Option<Downgrade>,
    /// Data steps that were begun.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<ContainerName, StepState>,
    /// How far it got.
    #[serde(default, skip_serializing_if = "Reached::is_default")]
    pub reached: Reached,
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl Job {
    /// What a release says of its data is about upgrades to it, so that a downgrade has nothing to accept.
    pub fn accepts_one_way(&self) -> bool {
        self.accept_one_way || self.downgrade.is_some()
    }

    pub fn key(&self, step: &str, attempt: u32) -> OpKey {
        OpKey::derive(&self.id, step, attempt, &self.nonce)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Driver {
    pub controller: ControllerId,
    pub since: Millis,
}

/// What the last look at the remote showed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Latest {
    /// The newest release that may be started or runs already; older than what runs where its tag has gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<(Version, CommitSha)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_head: Option<CommitSha>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<Millis>,
    /// What the service's own image was built as, where nothing is run from here: the best that is known of what runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<Version>,
}

/// A commit that must not be started again without an override (lesson 25).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Quarantined {
    pub version: Version,
    pub reason: String,
    pub at: Millis,
    /// Further facts, not the key: a rebuild has other digests.
    #[serde(default)]
    pub images: Images,
}

/// What a failed job pushed, or may have pushed, into a registry: tags that nobody needs. Only of builders that cannot label
/// what they push.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Orphan {
    pub repository: String,
    pub version: Version,
    /// Of the attempt that pushed it.
    pub key: OpKey,
    /// When its job failed.
    pub since: Millis,
    /// The image was seen in the registry. Otherwise its build may go on without anybody who waits for it.
    pub seen: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tried_at: Option<Millis>,
}

/// More orphans than a year of failed jobs makes: the oldest go, so that the record stays small.
pub const ORPHANS_MAX: usize = 100;

/// More moved tags than anybody accepts one by one; the record stays small.
pub const MOVED_TAGS_MAX: usize = 100;

/// The end of the history as the record anchors it: how many lines, and the hash of the last one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Head {
    pub count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The format this value was written in, and the lowest format whose readers may use it.
    pub format: u32,
    pub min_reader: u32,
    pub installation: InstallationId,
    pub application: AppName,
    /// The last deployment that was proved: what `running_*` shows and a swap starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<Deployment>,
    /// The deployment that traffic was last observed, or ordered, to reach; enforced at rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<Deployment>,
    #[serde(default)]
    pub latest: Latest,
    pub track_commits: bool,
    pub driver: Driver,
    /// Counts intended changes of traffic; the proxy refuses a lower one.
    pub generation: u64,
    pub phase: Phase,
    /// When the phase was entered: every budget counts from here (lesson 2).
    pub entered_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Job>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// Commits that are not started again without an override.
    #[serde(default)]
    pub quarantine: BTreeMap<CommitSha, Quarantined>,
    /// What is still to be removed from the registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<Orphan>,
    /// Tags that were moved, by their ref, with the commit at which an administrator accepted each: it counts instead of the one
    /// that was seen first.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub moved_tags: BTreeMap<String, CommitSha>,
    /// The oldest version that can use the data as they are now; absent where no release has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_from: Option<Version>,
    /// At rest: how what runs differs from `running`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<Drift>,
    pub history: Head,
    pub updated_at: Millis,
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl Record {
    /// Whether a release is newer than what runs, by base release (contract §1). Everything is newer than nothing.
    pub fn is_behind(&self, version: &Version, own: Option<&Version>) -> bool {
        let running = self.running.as_ref().map(|running| &running.version).or(own);
        running.is_none_or(|running| version.base() > running.base())
    }

    /// What serves at rest, where it was proved and no failure is held: what has to run, and nothing else.
    pub fn proved_and_serving(&self) -> Option<&Deployment> {
        match self.phase {
            Phase::Succeeded { .. } | Phase::FailedPre { .. } | Phase::RolledBack { .. } => {
                let is_proved = |serving: &&Deployment| {
                    self.running.as_ref().is_some_and(|running| running.revision == serving.revision)
                };
                self.serving.as_ref().filter(is_proved)
            }
            Phase::Idle
            | Phase::Queued
            | Phase::Fetching
            | Phase::Building(_)
            | Phase::Patching(_)
            | Phase::RollingOut(_)
            | Phase::Validating(_)
            | Phase::Confirming(_)
            | Phase::FailedRollout { .. }
            | Phase::RollingBack(_)
            | Phase::RollbackFailed { .. } => None,
        }
    }

    /// The record of an application of which nothing is known yet.
    pub fn new(installation: InstallationId, application: AppName, now: Millis) -> Self {
        Self {
            format: crate::format::FIRST,
            min_reader: crate::format::FIRST,
            installation,
            application,
            running: None,
            serving: None,
            latest: Latest::default(),
            // Contract §1: the default is true.
            track_commits: true,
            driver: Driver { controller: ControllerId::Host, since: now },
            generation: 0,
            phase: Phase::Idle,
            entered_at: now,
            job: None,
            snapshot: None,
            quarantine: BTreeMap::new(),
            orphans: Vec::new(),
            moved_tags: BTreeMap::new(),
            data_from: None,
            drift: None,
            history: Head::default(),
            updated_at: now,
            extra: BTreeMap::new(),
        }
    }

    /// Every image that something runs on or would return to, many of them more than once: what must not be deleted.
    pub fn images(&self) -> impl Iterator<Item = &ImageId> {
        let snapshot = self.snapshot.as_ref().map(|s| &s.deployment);
        let deployments = [self.running.as_ref(), self.serving.as_ref(), snapshot];
        let reused = self.job.iter().filter_map(|job| job.reuse.as_ref()).flat_map(|reuse| reuse.images.values());
        deployments.into_iter().flatten().flat_map(|d| d.images.values()).chain(self.phase.images()).chain(reused)
    }
}
