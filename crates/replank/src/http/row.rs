//! The row as clients see it (contract §1): flat, absent texts empty, times RFC 3339, no secret, no ETag.

use std::collections::BTreeMap;

use replank_core::fault::Told;
use replank_core::image::Images;
use replank_core::phase::{Phase, State, Swap, WayBack};
use replank_core::progress;
use replank_core::record::{Record, TargetKind};
use replank_core::words::{ComponentName, Millis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};

use crate::engine::api::Live;

/// Contract §1.
const DETAIL_MAX: usize = 240;

/// One application: what runs, what is newest, what is going on. Absent texts are empty; times are RFC 3339, UTC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Row {
    pub running_version: String,
    pub running_sha: String,
    pub running_revision: String,
    pub latest_version: String,
    pub latest_sha: String,
    pub latest_checked_at: String,
    pub latest_commit_sha: String,
    pub git_remote: String,
    pub track_commits: bool,
    #[schema(schema_with = states)]
    pub state: String,
    pub target_version: String,
    pub target_sha: String,
    #[schema(schema_with = target_kinds)]
    pub target_kind: String,
    pub job_id: String,
    pub started_by_oid: String,
    pub started_at: String,
    #[schema(max_length = 240)]
    pub phase_detail: String,
    /// How far the job is, in percent. Grows within one job; a rollback begins at 0.
    #[schema(maximum = 100)]
    pub phase_progress: u32,
    pub build_log_blob: String,
    pub rollback_available_until: String,
    pub green_revision: String,
    pub blue_revision: String,
    pub confirm_deadline: String,
    pub traffic_serving: String,
    pub validating_started_at: String,
    pub rolling_out_started_at: String,
    pub idempotency_key: String,
    pub updated_at: String,
    pub current_images: BTreeMap<String, String>,
    pub rollback_target: BTreeMap<String, String>,
    // Ours, beside the contract.
    #[serde(default)]
    pub seq: u64,
    #[serde(default)]
    pub application: String,
    #[serde(default)]
    pub started_by: String,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub entered_at: String,
    /// `single` or `blue_green`, of the current job.
    #[serde(default)]
    #[schema(schema_with = modes)]
    pub mode: String,
    #[serde(default)]
    pub build_only: bool,
    /// The current job leads to an older release.
    #[serde(default)]
    pub downgrade: bool,
    /// The revision that traffic goes to.
    #[serde(default)]
    pub serving: String,
    #[serde(default)]
    pub next_action: String,
    #[serde(default)]
    pub next_deadline: String,
    /// After a failure, whole: what failed and why. `phase_detail` has room for its beginning only.
    #[serde(default)]
    pub failure: String,
    /// What to do about it.
    #[serde(default)]
    pub advice: String,
    /// Why a rollback is refused until the data are restored; empty while it is open.
    #[serde(default)]
    pub rollback_closed: String,
    /// How what runs differs from what was recorded, one sentence each. An upgrade starts once this is empty or accepted.
    #[serde(default)]
    pub drift: Vec<String>,
    #[serde(default)]
    pub drift_since: String,
    #[serde(default)]
    pub drift_accepted: bool,
    /// While building: each component.
    #[serde(default)]
    pub components: BTreeMap<String, Component>,
}

fn one_of(names: impl IntoIterator<Item = &'static str>) -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).build()
}

fn states() -> Object {
    one_of(State::ALL.map(State::name))
}

fn target_kinds() -> Object {
    one_of(["", "release", "commit"])
}

fn modes() -> Object {
    one_of(["", "single", "blue_green"])
}

fn component_states() -> Object {
    one_of(["waiting", "building", "built"])
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Component {
    #[schema(schema_with = component_states)]
    pub state: String,
    pub done: u32,
    pub total: u32,
    pub step: String,
    pub attempt: u32,
}

pub fn references(images: &Images) -> BTreeMap<String, String> {
    images.iter().map(|(name, image)| (name.to_string(), image.reference())).collect()
}

fn text(value: Option<impl ToString>) -> String {
    value.map(|v| v.to_string()).unwrap_or_default()
}

fn time(at: Option<Millis>) -> String {
    at.map(Millis::rfc3339).unwrap_or_default()
}

/// At most `max` characters, on one line, cut with an ellipsis.
fn cut(text: &str, max: usize) -> String {
    let flat: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if flat.chars().count() <= max { flat } else { flat.chars().take(max - 1).chain(['…']).collect() }
}

impl Row {
    pub fn of(record: &Record, live: &Live, remote: &str) -> Self {
        let job = record.job.as_ref();
        let target = job.map(|job| &job.target);
        let colours = Colours::of(record);
        let components = components(record, live);
        let swap = record.phase.swap();
        let rolling_out_since = match &record.phase {
            Phase::RollingOut(_) => Some(record.entered_at),
            // Later phases know it from the first change that was intended.
            Phase::Validating(s) | Phase::Confirming(replank_core::phase::Confirming { swap: s, .. }) => {
                first_change(s)
            }
            Phase::FailedRollout { swap, .. } => first_change(swap),
            _ => None,
        };
        Self {
            running_version: text(record.running.as_ref().map(|d| &d.version).or(live.own_version.as_ref())),
            running_sha: text(record.running.as_ref().map(|d| &d.commit)),
            running_revision: text(record.running.as_ref().map(|d| &d.revision)),
            latest_version: text(record.latest.release.as_ref().map(|(version, _)| version)),
            latest_sha: text(record.latest.release.as_ref().map(|(_, sha)| sha)),
            latest_checked_at: time(record.latest.checked_at),
            latest_commit_sha: text(record.latest.branch_head.as_ref()),
            git_remote: crate::config::shown(remote),
            track_commits: record.track_commits,
            state: record.phase.state().name().to_owned(),
            target_version: text(target.map(|t| &t.version)),
            target_sha: text(target.map(|t| &t.commit)),
            target_kind: text(target.map(|t| match t.kind {
                TargetKind::Release => "release",
                TargetKind::Commit => "commit",
            })),
            job_id: text(job.map(|j| &j.id)),
            started_by_oid: text(job.map(|j| &j.actor.oid)),
            started_at: time(job.map(|j| j.started_at)),
            phase_detail: cut(&detail(record, live, &components), DETAIL_MAX),
            phase_progress: progress::shown(record),
            build_log_blob: text(job.map(|j| format!("upgrade-logs/{}", j.id))),
            rollback_available_until: time(record.snapshot.as_ref().map(|s| s.keep_until)),
            green_revision: colours.green,
            blue_revision: colours.blue,
            confirm_deadline: time(match &record.phase {
                Phase::Confirming(confirming) => confirming.deadline,
                _ => None,
            }),
            traffic_serving: colours.serving,
            validating_started_at: time(match &record.phase {
                Phase::Validating(_) => Some(record.entered_at),
                _ => None,
            }),
            rolling_out_started_at: time(rolling_out_since),
            idempotency_key: text(job.and_then(|j| j.idempotency_key.as_ref())),
            updated_at: record.updated_at.rfc3339(),
            current_images: record.running.as_ref().map(|d| references(&d.images)).unwrap_or_default(),
            rollback_target: rollback_target(record, swap),
            seq: live.seq,
            application: record.application.to_string(),
            started_by: text(job.map(|j| &j.actor.name)),
            reason: text(job.map(|j| &j.reason)),
            entered_at: record.entered_at.rfc3339(),
            mode: text(job.map(|j| j.mode.name())),
            build_only: job.is_some_and(|j| j.build_only),
            downgrade: job.is_some_and(|j| j.downgrade.is_some()),
            serving: text(record.serving.as_ref().map(|d| &d.revision)),
            next_action: cut(&live.next_action, DETAIL_MAX),
            next_deadline: time(live.next_deadline),
            failure: text(fault_of(&record.phase).map(|fault| &fault.what)),
            advice: text(fault_of(&record.phase).map(|fault| &fault.advice)),
            rollback_closed: replank_core::data::closed_for(record).unwrap_or_default(),
            drift: record.drift.as_ref().map(|drift| drift.what.clone()).unwrap_or_default(),
            drift_since: time(record.drift.as_ref().map(|drift| drift.since)),
            drift_accepted: record.drift.as_ref().is_some_and(|drift| drift.accepted),
            components,
        }
    }
}

fn rollback_target(record: &Record, swap: Option<&Swap>) -> BTreeMap<String, String> {
    let of_swap = swap.and_then(|swap| match &swap.way_back {
        WayBack::Snapshot(snapshot) => Some(snapshot.as_ref()),
        WayBack::FirstDeployment => None,
    });
    record.snapshot.as_ref().or(of_swap).map(|s| references(&s.deployment.images)).unwrap_or_default()
}

fn first_change(swap: &Swap) -> Option<Millis> {
    swap.ops.values().map(|op| op.intended_at).min()
}

#[derive(Default)]
struct Colours {
    blue: String,
    green: String,
    serving: String,
}

impl Colours {
    /// Blue is what served before the job, green what the job brought; a rollback keeps the names, though it runs from green to blue.
    fn of(record: &Record) -> Self {
        let Some(swap) = record.phase.swap() else {
            return Self::default();
        };
        let (from, to) = (swap.from.as_ref(), Some(&swap.to));
        let (blue, green) = match &record.phase {
            Phase::RollingBack(_) | Phase::RollbackFailed { .. } => (to, from),
            _ => (from, to),
        };
        let blue = text(blue.map(|d| &d.revision));
        let green = text(green.map(|d| &d.revision));
        let serving = match record.serving.as_ref().map(|d| d.revision.as_str()) {
            Some(revision) if revision == green => "green",
            Some(revision) if revision == blue => "blue",
            _ => "",
        };
        Self { serving: serving.to_owned(), blue, green }
    }
}

fn components(record: &Record, live: &Live) -> BTreeMap<String, Component> {
    let Phase::Building(building) = &record.phase else {
        return BTreeMap::new();
    };
    let one = |name: &ComponentName| {
        let build = building.builds.get(name);
        let step = live.progress.get(name);
        let built = build.is_some_and(|b| b.built.is_some());
        let state = if built {
            "built"
        } else if build.is_some() {
            "building"
        } else {
            "waiting"
        };
        let component = Component {
            state: state.to_owned(),
            done: step.map_or(0, |s| s.done),
            total: step.map_or(0, |s| s.total),
            step: step.map(|s| cut(&s.step, DETAIL_MAX)).unwrap_or_default(),
            attempt: build.map_or(0, |b| b.attempt),
        };
        (name.to_string(), component)
    };
    building.fetched.recipes.keys().map(one).collect()
}

fn detail(record: &Record, live: &Live, components: &BTreeMap<String, Component>) -> String {
    let target = text(record.job.as_ref().map(|job| &job.target.version));
    let or = |otherwise: String| {
        if live.next_action.is_empty() { otherwise } else { live.next_action.clone() }
    };
    match &record.phase {
        Phase::Idle => String::new(),
        Phase::Queued => or("waiting for the controller to begin".to_owned()),
        Phase::Fetching => or(format!("fetching {target} at its pinned commit")),
        Phase::Building(_) => {
            let built = components.values().filter(|c| c.state == "built").count();
            let mut told = format!("{built} of {} built", images(components.len()));
            for (name, c) in components.iter().filter(|(_, c)| c.state == "building") {
                told.push_str(&if c.total > 0 {
                    format!("; {name}: step {} of {}", c.done, c.total)
                } else {
                    format!("; {name}: building")
                });
            }
            told
        }
        Phase::Patching(_) => or("preparing the way back".to_owned()),
        Phase::RollingOut(_) => or(format!("starting {target}")),
        Phase::Validating(_) => or(format!("proving {target} before it gets traffic")),
        Phase::Confirming(c) => match &c.flip {
            Some(flip) => format!("going back by itself: {}", flip.why),
            None => or(format!("{target} serves; the old revision stays ready")),
        },
        Phase::Succeeded { built_only: Some(built) } => {
            format!("{} of {target} built; nothing that runs was touched", images(built.images.len()))
        }
        Phase::Succeeded { built_only: None } => String::new(),
        Phase::FailedPre { fault } | Phase::FailedRollout { fault, .. } | Phase::RollbackFailed { fault, .. } => {
            short_of(fault)
        }
        Phase::RollingBack(back) => or(format!("going back to {}", back.swap.to.version)),
        Phase::RolledBack { reason } => reason.clone(),
    }
}

fn fault_of(phase: &Phase) -> Option<&Told> {
    match phase {
        Phase::FailedPre { fault } | Phase::FailedRollout { fault, .. } | Phase::RollbackFailed { fault, .. } => {
            Some(fault)
        }
        Phase::Idle
        | Phase::Queued
        | Phase::Fetching
        | Phase::Building(_)
        | Phase::Patching(_)
        | Phase::RollingOut(_)
        | Phase::Validating(_)
        | Phase::Confirming(_)
        | Phase::Succeeded { .. }
        | Phase::RollingBack(_)
        | Phase::RolledBack { .. } => None,
    }
}

/// A failure in the room of `phase_detail`: where not all of it fits, the cause is cut and the advice stays.
fn short_of(fault: &Told) -> String {
    let whole = fault.sentence();
    if whole.chars().count() <= DETAIL_MAX || fault.advice.is_empty() {
        return whole;
    }
    let advice = cut(&fault.advice, DETAIL_MAX / 2);
    format!("{}; {advice}", cut(&fault.what, DETAIL_MAX - 2 - advice.chars().count()))
}

fn images(count: usize) -> String {
    if count == 1 { "1 image".to_owned() } else { format!("{count} images") }
}
