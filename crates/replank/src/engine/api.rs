//! The commands and views that every face of Replank (HTTP, command line) is made of. Faces call these and nothing else.

use std::collections::BTreeMap;

use async_trait::async_trait;
use replank_core::history::Line;
use replank_core::ports::{EscapeHatch, LogChunk, Progress, TagRef};
use replank_core::record::{Actor, Record, TargetKind};
use replank_core::words::{CommitSha, ComponentName, JobId, Millis, Version};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

use super::planned::{PlanRequest, UpgradePlan};

/// A start as a client asks for it (contract §2), before anything is checked.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(description = "What to start. Without a target it is the newest release.")]
pub struct StartRequest {
    /// `A.B.C`, with or without `v`.
    #[serde(default)]
    #[schema(pattern = r"^v?(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18})){2}(-commit\.[0-9a-f]{7,40})?$")]
    pub target_version: Option<String>,
    #[serde(default)]
    #[schema(pattern = "^[0-9a-f]{40}$")]
    pub target_sha: Option<String>,
    #[serde(default)]
    #[schema(schema_with = kinds)]
    pub target_kind: Option<TargetKind>,
    /// Users may notice, and whoever starts knows it.
    #[serde(default)]
    #[schema(schema_with = yes, required = true)]
    pub confirm_downtime: bool,
    /// For the history.
    #[serde(default)]
    #[schema(max_length = 280)]
    pub reason: Option<String>,
    /// Makes a repeated start harmless.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$")]
    pub idempotency_key: Option<String>,
    /// Build and push, and touch nothing that runs.
    #[serde(default)]
    pub build_only: bool,
    /// Start a commit that failed before, knowingly: with a reason.
    #[serde(default)]
    pub override_quarantine: bool,
    /// Start a release after which the version before it cannot use the data, knowingly.
    #[serde(default)]
    pub accept_one_way: bool,
}

/// A downgrade as a client asks for it, before anything is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DowngradeRequest {
    /// `A.B.C`, with or without `v`.
    pub target_version: String,
    pub confirm_downtime: bool,
    pub reason: String,
    pub idempotency_key: Option<String>,
    pub override_quarantine: bool,
    /// The data are those of that version.
    pub data_restored: bool,
}

fn kinds() -> Object {
    let null = serde_json::Value::Null;
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::String, Type::Null]))
        .enum_values(Some(["release".into(), "commit".into(), null]))
        .build()
}

/// A tag that was moved, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedTag {
    pub version: Version,
    pub commit: CommitSha,
}

pub(crate) fn yes() -> Object {
    ObjectBuilder::new().schema_type(Type::Boolean).enum_values(Some([true])).build()
}

/// Why a command was not carried out. Each text is one sentence with what to do next, free of secrets.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request itself is wrong: 422 (400 where the contract says so).
    #[error("{0}")]
    Invalid(String),
    /// It is right and cannot happen now: 409.
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    NotFound(String),
    /// 429 with `Retry-After`.
    #[error("asked too soon after the last time: wait {retry_after_s} s")]
    TooSoon { retry_after_s: u64 },
    /// Something Replank depends on does not answer: 503. The text may be shown.
    #[error("{0}")]
    Unavailable(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Candidates {
    pub configured: bool,
    pub remote: Option<String>,
    pub running_version: String,
    /// Newer than running and not refused, newest first, at most 20.
    pub candidates: Vec<TagRef>,
    /// Newer than running and refused, with the reason in `refused`.
    pub refused: Vec<TagRef>,
    /// Why no commit of the tracking branch can be started here, whatever the record says; `None` where they can.
    pub commits_refused: Option<String>,
    pub error: Option<String>,
}

/// One image of the snapshot, looked up now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PreflightImage {
    pub image_ref: String,
    /// It was seen. An image that was not is gone where there is no `error`, and may be there where there is one.
    pub exists: bool,
    pub created_on: Option<Millis>,
    /// Why nobody could say.
    pub error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preflight {
    /// No image is known to be gone.
    pub available: bool,
    pub reason: String,
    pub images: Vec<PreflightImage>,
    /// Why the data stand in the way; a rollback goes ahead all the same for whoever says that they are restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
}

/// What the record does not hold: how far this process's builds are, and what the driver waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct Live {
    /// What runs, where nothing is run from here and only this service's own version is known.
    pub own_version: Option<Version>,
    /// Grows with every change of the record or of the fields below.
    pub seq: u64,
    pub progress: BTreeMap<ComponentName, Progress>,
    /// What happens next or is waited for, in words.
    pub next_action: String,
    pub next_deadline: Option<Millis>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogRead {
    Chunk(LogChunk),
    /// The current job's, and not begun: an empty 200 (lesson 13).
    NotBegun,
    /// No such job, or it has no such log.
    Unknown,
}

/// Everything a face may do.
#[async_trait]
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// The record as it is stored now.
    async fn record(&self) -> Result<Record, Refusal>;
    /// The live part; `changed()` fires on every change of the record too.
    fn live(&self) -> watch::Receiver<Live>;
    /// Cached for 15 s.
    async fn candidates(&self) -> Result<Candidates, Refusal>;
    /// Looks at the remote now, and records what is new.
    async fn check(&self, actor: &Actor) -> Result<Record, Refusal>;
    async fn track_commits(&self, actor: &Actor, on: bool) -> Result<Record, Refusal>;
    async fn start(&self, actor: &Actor, request: StartRequest) -> Result<Record, Refusal>;
    /// Builds and swaps to a release that is older than what runs.
    async fn downgrade(&self, actor: &Actor, request: DowngradeRequest) -> Result<Record, Refusal>;
    /// What such a start would do, and what stands against it. Changes nothing. Fails where there is no target to plan for.
    async fn plan(&self, request: PlanRequest) -> Result<UpgradePlan, Refusal>;
    /// `data_restored`: the data are those of the version that is restored, where a data step had closed the way back.
    async fn rollback(&self, actor: &Actor, reason: &str, data_restored: bool) -> Result<Record, Refusal>;
    async fn cancel(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal>;
    /// Ends the confirm window early: keep.
    async fn keep(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal>;
    async fn reset(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal>;
    /// Takes a commit out of quarantine, by its version or by its id.
    async fn lift_quarantine(&self, actor: &Actor, which: &str, reason: &str) -> Result<Record, Refusal>;
    /// Lets a release be started at the commit that its tag was moved to: `commit`, and no other.
    async fn accept_moved_tag(&self, actor: &Actor, tag: MovedTag, reason: &str) -> Result<Record, Refusal>;
    /// Lets upgrades start although what runs differs from what was recorded in exactly this way.
    async fn accept_drift(&self, actor: &Actor, what: &[String], reason: &str) -> Result<Record, Refusal>;
    async fn preflight(&self) -> Result<Preflight, Refusal>;
    async fn escape_hatch(&self) -> Result<EscapeHatch, Refusal>;
    /// Names of the configured components: what the build-log route knows.
    fn components(&self) -> Vec<ComponentName>;
    async fn read_log(&self, job: &JobId, component: &ComponentName, from: u64, max: usize)
    -> Result<LogRead, Refusal>;
    /// Returns when the log may have grown beyond `from`, or after at most 1 s.
    async fn log_changed(&self, job: &JobId, component: &ComponentName, from: u64);
    /// The newest `limit` lines, oldest of them first.
    async fn history(&self, limit: usize) -> Result<Vec<Line>, Refusal>;
    /// The ledger answers and this controller's loop turns.
    async fn ready(&self) -> Result<(), Refusal>;
}
