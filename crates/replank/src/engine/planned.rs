//! The plan of an upgrade, as every face shows it: what would be done, with what, and what stands against it. Absent texts are
//! empty; what nobody knows is `null`, or is told in a field of its own.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// What is asked about, as a start would ask for it. Without a target it is the newest release.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PlanRequest {
    /// `A.B.C`, with or without `v`.
    #[param(pattern = r"^v?(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18})){2}$")]
    pub target_version: Option<String>,
    /// A commit of the tracking branch, or the commit that the release has to be at.
    #[param(pattern = "^[0-9a-f]{40}$")]
    pub target_sha: Option<String>,
    /// Build and push, and touch nothing that runs.
    #[serde(default)]
    pub build_only: bool,
    /// A commit that failed before would be started knowingly.
    #[serde(default)]
    pub override_quarantine: bool,
    /// A release after which the version before it cannot use the data would be started knowingly.
    #[serde(default)]
    pub accept_one_way: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpgradePlan {
    /// Empty where nothing runs.
    pub from_version: String,
    pub from_sha: String,
    pub to_version: String,
    pub to_sha: String,
    pub build_only: bool,
    /// `single` or `blue_green`.
    pub mode: String,
    /// Seconds; 0 where there is no confirm window.
    pub confirm_window_seconds: u64,
    /// What happens when it fails, as sentences.
    pub on_failure: Vec<String>,
    /// Why a start would be refused now; empty where it would not.
    pub refused: Vec<String>,
    /// Why images, steps, changes and data are not known; empty where they are.
    pub unknown: String,
    pub images: Vec<PlannedImage>,
    /// In the order of time.
    pub steps: Vec<PlannedStep>,
    pub containers: Vec<PlannedContainer>,
    pub downtime: Downtime,
    pub commits: Commits,
    /// The release's own words: masked, with control characters made visible.
    pub notes: String,
    /// What of how things are built and run would be other than it is.
    pub changes: Vec<Change>,
    /// Changes that are not listed.
    pub more_changes: usize,
    pub data: Data,
    pub checks: Vec<Check>,
    pub prediction: Prediction,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedImage {
    pub component: String,
    pub dockerfile: String,
    pub context: String,
    /// A build-only job made it of the same commit by the same recipe.
    pub reused: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedStep {
    /// `data`, `stop`, `start`, `prove`, `cut_over`, `hand_over`, `confirm` or `retire`.
    pub kind: String,
    pub containers: Vec<String>,
    pub what: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedContainer {
    pub name: String,
    /// `allowed`, `stop_old_first` or `start_after_cutover`.
    pub overlap: String,
    /// `kept`, `new` or `removed`.
    pub change: String,
    /// When neither the old nor the new one runs: `none`, `before_cutover`, `after_cutover` or `across_cutover`.
    pub gap: String,
}

/// How long something of the application does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Downtime {
    /// Containers with a gap; empty where every one overlaps with its successor.
    pub containers: Vec<String>,
    /// Milliseconds: half of the past jobs' gaps were at most this. 0 where there is no gap.
    pub p50_ms: Option<u64>,
    pub p90_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Commits {
    /// Newest first, at most 200; masked, with control characters made visible.
    #[schema(max_items = 200)]
    pub list: Vec<Commit>,
    /// There are more, or what runs was not met among the newest, so that some may not be between.
    pub more: bool,
    /// Why they are not known; empty where they are.
    pub unknown: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Commit {
    pub sha: String,
    pub author: String,
    /// RFC 3339, UTC, by the commit's own word.
    pub at: String,
    pub subject: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// A path, such as `containers.api.run.probe.path`.
    pub what: String,
    /// Empty where there was nothing. Values of variables are never shown.
    pub from: String,
    pub to: String,
    /// `release`, or `operator`, whose configuration differs from what was deployed.
    pub by: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Data {
    /// Names of the data steps, in their order.
    pub steps: Vec<String>,
    /// `compatible`, `one-way` or `unknown`, as the release says.
    pub schema: String,
    /// Why the way back closes; empty where it stays open, as far as is known.
    pub closes: String,
    /// What a rollback would need.
    pub rollback: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    pub name: String,
    /// `ok`, `warning`, or `refused`: a start would be.
    pub verdict: String,
    pub what: String,
    /// What to do; empty where all is well.
    pub advice: String,
}

/// How long it would take, by jobs of the same mode and kind that succeeded. `null` below three of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prediction {
    /// Jobs that it rests on, at most 20.
    pub jobs: usize,
    pub phases: Vec<PhaseTime>,
    pub total_p50_ms: Option<u64>,
    pub total_p90_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTime {
    pub phase: String,
    pub p50_ms: Option<u64>,
    pub p90_ms: Option<u64>,
}
