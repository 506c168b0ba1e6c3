//! The only place where transitions live: `next` says which phase follows, `apply` what else changes with it.
//!
//! Every (state, event) pair that is not written here is refused with a typed error; nothing is accepted by default.

use serde_json::json;

use crate::aftermath::{new_head, new_release, orphans_of, quarantine, reusable};
use crate::data::{StepKind, StepState, closed, closed_for, oldest, too_new_for};
use crate::drift::Drift;
use crate::event::{Event, ProxyStep};
use crate::fault::Told;
use crate::history::{Audit, Line, seal};
use crate::image::attempt_tag;
use crate::phase::{
    Build, Building, BuiltOnly, Confirming, Flip, Mode, Op, OpState, Patching, Phase, RollingBack, State, Swap, WayBack,
};
use crate::progress;
use crate::record::{Deployment, Driver, Job, MOVED_TAGS_MAX, ORPHANS_MAX, OnRolloutFailure, Orphan, Record};
use crate::words::{CommitSha, Millis, Version};

/// Why an event cannot happen now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("'{event}' cannot happen while the state is '{}'", from.name())]
    WrongState { from: State, event: &'static str },
    #[error("an upgrade is in flight (state '{}'): wait for it or roll it back", from.name())]
    InFlight { from: State },
    #[error("there is no snapshot to roll back to")]
    NoSnapshot,
    #[error(
        "{why}: restore the data first, then roll back and say that they are restored (replank rollback --data-restored)"
    )]
    Closed { why: String },
    #[error(
        "the controller of {version} reads record format {reads}, and this record needs {needs}: it could not take the wheel; \
         start a newer release, or restore that version by hand (escape hatch)"
    )]
    Unreadable { version: Version, reads: u32, needs: u32 },
    #[error("commit {} ({version}) is quarantined since it failed: {reason}; start it with the override if you mean it", commit.short())]
    Quarantined { commit: CommitSha, version: String, reason: String },
    #[error(
        "what runs is not what was recorded ({what}): put it right, or accept it as it is (`replank drift --accept`), and start again"
    )]
    Drifted { what: String },
    #[error("{version} cannot use the data: {why}: restore the data of {version} first, and say so (data_restored)")]
    DataTooNew { version: Version, why: String },
    #[error("{MOVED_TAGS_MAX} moved tags were accepted already: publish a new version instead")]
    TooManyMovedTags,
    #[error("what runs differs in another way by now, or no longer does: look at it again, and accept that")]
    OtherDrift,
    #[error("'{event}' does not fit the job: {why}")]
    Inconsistent { event: &'static str, why: &'static str },
}

/// The phase that follows `record.phase` when `event` happens at `now`.
pub fn next(record: &Record, event: &Event, now: Millis) -> Result<Phase, Refused> {
    let from = record.phase.state();
    let wrong = || Refused::WrongState { from, event: event.name() };
    let odd = |why| Refused::Inconsistent { event: event.name(), why };
    let phase = record.phase.clone();
    match event {
        Event::Start { job, override_quarantine } => {
            if from.in_flight() {
                return Err(Refused::InFlight { from });
            }
            undrifted(record, job.build_only)?;
            if job.downgrade.is_some_and(|down| !down.data_restored)
                && let Some(why) = too_new_for(record, &job.target.version)
            {
                return Err(Refused::DataTooNew { version: job.target.version.clone(), why });
            }
            match record.quarantine.get(&job.target.commit) {
                Some(q) if !override_quarantine => Err(Refused::Quarantined {
                    commit: job.target.commit.clone(),
                    version: q.version.to_string(),
                    reason: q.reason.clone(),
                }),
                Some(_) | None => Ok(Phase::Queued),
            }
        }
        Event::Progressed { .. } if !from.in_flight() || record.job.is_none() => Err(wrong()),
        Event::ProxyUpgraded { step: ProxyStep::Begun, .. } if from.in_flight() => Err(Refused::InFlight { from }),
        Event::TrackCommits { .. }
        | Event::Progressed { .. }
        | Event::ProxyUpgraded { .. }
        | Event::TokenChanged { .. }
        | Event::LedgerRestored { .. }
        | Event::RefsSeen { .. }
        | Event::TookOver { .. }
        | Event::HandedOver { .. } => Ok(phase),
        Event::RollbackStarted { reason, data_restored, .. } => {
            let swap = reverse_of(record).ok_or(match from {
                State::RollingOut
                | State::Validating
                | State::Confirming
                | State::Succeeded
                | State::FailedRollout
                | State::RollbackFailed
                | State::FailedPre => Refused::NoSnapshot,
                State::Idle
                | State::Queued
                | State::Fetching
                | State::Building
                | State::Patching
                | State::RollingBack
                | State::RolledBack => wrong(),
            })?;
            readable_to(record, &swap.to)?;
            if let Some(why) = closed_for(record).filter(|_| !data_restored) {
                return Err(Refused::Closed { why });
            }
            Ok(Phase::RollingBack(RollingBack { swap, reason: reason.clone() }))
        }
        Event::Cancelled { reason, .. } if from.before_swap() => Ok(Phase::FailedPre {
            fault: Told::permanent(format!("cancelled: {reason}"), "start it again when you want it"),
        }),
        Event::Cancelled { .. } => Err(wrong()),
        Event::Reset { reason, .. } => {
            let fault = Told::permanent(format!("reset by an administrator: {reason}"), "");
            match phase {
                Phase::Queued | Phase::Fetching | Phase::Building(_) | Phase::Patching(_) => {
                    Ok(Phase::FailedPre { fault })
                }
                Phase::RollingOut(swap) | Phase::Validating(swap) => Ok(Phase::FailedRollout { fault, swap }),
                Phase::Confirming(c) => Ok(Phase::FailedRollout { fault, swap: c.swap }),
                Phase::RollingBack(back) => Ok(Phase::FailedRollout { fault, swap: back.swap }),
                Phase::Idle
                | Phase::Succeeded { .. }
                | Phase::FailedPre { .. }
                | Phase::FailedRollout { .. }
                | Phase::RolledBack { .. }
                | Phase::RollbackFailed { .. } => Err(wrong()),
            }
        }
        Event::QuarantineLifted { commit, .. } if record.quarantine.contains_key(commit) => Ok(phase),
        Event::QuarantineLifted { .. } => Err(odd("that commit is not quarantined")),
        Event::MovedTagAccepted { raw_ref, .. } => {
            let is_new = !record.moved_tags.contains_key(raw_ref);
            match is_new && record.moved_tags.len() >= MOVED_TAGS_MAX {
                true => Err(Refused::TooManyMovedTags),
                false => Ok(phase),
            }
        }
        Event::DriftAccepted { .. } if from.in_flight() => Err(Refused::InFlight { from }),
        Event::DriftAccepted { what, .. } => match &record.drift {
            Some(drift) if drift.what == *what => Ok(phase),
            Some(_) | None => Err(Refused::OtherDrift),
        },
        Event::Kept { .. } => match phase {
            Phase::Confirming(Confirming { swap, deadline: Some(_), flip: None }) => {
                Ok(Phase::Confirming(Confirming { swap, deadline: Some(now), flip: None }))
            }
            _ => Err(wrong()),
        },
        Event::Claimed => match phase {
            Phase::Queued => Ok(Phase::Fetching),
            _ => Err(wrong()),
        },
        Event::Fetched(fetched) => match phase {
            Phase::Fetching if fetched.recipes.is_empty() => Err(odd("the release has no component to build")),
            Phase::Fetching => Ok(Phase::Building(Building { fetched: fetched.clone(), builds: Default::default() })),
            _ => Err(wrong()),
        },
        Event::BuildIntended { component } => match phase {
            Phase::Building(mut building) => {
                if !building.fetched.recipes.contains_key(component) {
                    return Err(odd("the release has no such component"));
                }
                let attempt = building.builds.get(component).map_or(1, |b| b.attempt + 1);
                building.builds.insert(component.clone(), Build { attempt, intended_at: now, built: None });
                Ok(Phase::Building(building))
            }
            _ => Err(wrong()),
        },
        Event::BuildDone { component, built } => match phase {
            Phase::Building(mut building) => match building.builds.get_mut(component) {
                Some(build) if build.built.is_none() => {
                    build.built = Some(built.clone());
                    Ok(Phase::Building(building))
                }
                Some(_) => Err(odd("the component is built already")),
                None => Err(odd("the build was never intended")),
            },
            _ => Err(wrong()),
        },
        Event::BuildsComplete => match phase {
            Phase::Building(building) => {
                let images = building.images().ok_or(odd("a component is not built"))?;
                let job = record.job.as_ref().ok_or(odd("there is no job"))?;
                if job.build_only {
                    let recipes = building.fetched.recipes;
                    let built_only = Some(BuiltOnly { commit: job.target.commit.clone(), images, recipes });
                    Ok(Phase::Succeeded { built_only })
                } else {
                    let attempts = building.builds.into_iter().map(|(name, build)| (name, build.attempt)).collect();
                    Ok(Phase::Patching(Patching { fetched: building.fetched, images, attempts }))
                }
            }
            _ => Err(wrong()),
        },
        Event::Prepared { to, way_back, .. } => match phase {
            Phase::Patching(patching) => {
                let job = record.job.as_ref().ok_or(odd("there is no job"))?;
                if to.images != patching.images || to.commit != job.target.commit {
                    return Err(odd("the deployment is not what was built"));
                }
                // Promise 4: where something runs, the way back is a snapshot of it, or there is no swap.
                match (way_back, &record.running) {
                    (WayBack::FirstDeployment, None) => {}
                    (WayBack::Snapshot(s), Some(running)) if s.deployment == *running => {}
                    _ => return Err(odd("the way back is not a snapshot of what runs")),
                }
                let swap = Swap::new(record.serving.clone(), (**to).clone(), job.mode, way_back.clone());
                Ok(Phase::RollingOut(swap))
            }
            _ => Err(wrong()),
        },
        Event::StepIntended { step } => match phase {
            Phase::RollingOut(swap) => {
                let planned = swap.to.plan.data.steps.iter().any(|planned| planned.name == *step);
                let begun = record.job.as_ref().is_none_or(|job| job.data.contains_key(step));
                match (planned, begun, swap.ops.is_empty()) {
                    (true, false, true) => Ok(Phase::RollingOut(swap)),
                    (true, false, false) => Err(odd("the platform was changed before the data step")),
                    (true, true, _) => Err(odd("the data step was begun already, and is run once")),
                    (false, ..) => Err(odd("the release has no such data step")),
                }
            }
            _ => Err(wrong()),
        },
        Event::StepDone { step } => match (&phase, record.job.as_ref().and_then(|job| job.data.get(step))) {
            (Phase::RollingOut(_), Some(state)) if state.ended_at.is_none() => Ok(phase),
            (Phase::RollingOut(_), _) => Err(odd("the data step was never begun, or has ended already")),
            _ => Err(wrong()),
        },
        Event::OpIntended { op } => {
            let mut phase = phase;
            let generation = if moves_traffic(*op) { record.generation + 1 } else { 0 };
            let swap = active_swap(&mut phase).ok_or_else(wrong)?;
            let attempt = swap.ops.get(op).map_or(1, |state| state.attempt + 1);
            swap.ops.insert(*op, OpState { attempt, generation, intended_at: now, observed_at: None });
            // A cut-over names a side to fall back to, which only a settling that follows takes away.
            if *op == Op::CutOver {
                swap.ops.remove(&Op::Settle);
            }
            Ok(phase)
        }
        Event::OpObserved { op } => {
            let mut phase = phase;
            let swap = active_swap(&mut phase).ok_or_else(wrong)?;
            let state = swap.ops.get_mut(op).ok_or(odd("the operation was never intended"))?;
            state.observed_at = Some(now);
            Ok(phase)
        }
        Event::Landed => match phase {
            Phase::RollingOut(swap) if swap.mode == Mode::BlueGreen && swap.is_observed(Op::StartNew) => {
                Ok(Phase::Validating(swap))
            }
            Phase::RollingOut(_) => Err(odd("the new revision was not observed, or the mode is not blue/green")),
            _ => Err(wrong()),
        },
        Event::CutOverIntended => match phase {
            Phase::Validating(mut swap) => {
                let generation = record.generation + 1;
                swap.ops.insert(Op::CutOver, OpState { attempt: 1, generation, intended_at: now, observed_at: None });
                Ok(Phase::Confirming(Confirming { swap, deadline: None, flip: None }))
            }
            _ => Err(wrong()),
        },
        Event::Converged { deadline } => match phase {
            Phase::Confirming(Confirming { swap, deadline: None, flip: None }) if swap.is_observed(Op::CutOver) => {
                Ok(Phase::Confirming(Confirming { swap, deadline: Some(*deadline), flip: None }))
            }
            Phase::Confirming(_) => Err(odd("the cut-over was not observed, or is counted already")),
            _ => Err(wrong()),
        },
        Event::FlipIntended { why } => match phase {
            Phase::Confirming(Confirming { swap, deadline, flip: None }) => {
                let to = match &swap.way_back {
                    WayBack::Snapshot(s) => s.deployment.clone(),
                    WayBack::FirstDeployment => return Err(Refused::NoSnapshot),
                };
                if let Some(why) = closed(&swap, record.job.as_ref()) {
                    return Err(Refused::Closed { why });
                }
                let back = Swap::new(Some(swap.to.clone()), to, swap.mode, swap.way_back.clone());
                let flip = Some(Flip { swap: back, why: why.clone(), since: now });
                Ok(Phase::Confirming(Confirming { swap, deadline, flip }))
            }
            Phase::Confirming(_) => Err(odd("a flip back is under way already")),
            _ => Err(wrong()),
        },
        Event::Completed => match phase {
            Phase::RollingOut(swap) if swap.mode == Mode::Single && is_proved(&swap) => {
                Ok(Phase::Succeeded { built_only: None })
            }
            Phase::Confirming(Confirming { swap, deadline: Some(_), flip: None }) if is_proved(&swap) => {
                Ok(Phase::Succeeded { built_only: None })
            }
            Phase::RollingOut(_) | Phase::Confirming(_) => {
                Err(odd("the new revision was not observed to serve and settle"))
            }
            _ => Err(wrong()),
        },
        Event::Failed { fault } => {
            let fault = fault.clone();
            match phase {
                Phase::Queued | Phase::Fetching | Phase::Building(_) | Phase::Patching(_) => {
                    Ok(Phase::FailedPre { fault })
                }
                Phase::RollingOut(swap) | Phase::Validating(swap) => Ok(Phase::FailedRollout { fault, swap }),
                Phase::Confirming(c) => {
                    Ok(Phase::RollbackFailed { fault, swap: c.flip.map_or(c.swap, |flip| flip.swap) })
                }
                Phase::RollingBack(back) => Ok(Phase::RollbackFailed { fault, swap: back.swap }),
                Phase::Idle
                | Phase::Succeeded { .. }
                | Phase::FailedPre { .. }
                | Phase::FailedRollout { .. }
                | Phase::RolledBack { .. }
                | Phase::RollbackFailed { .. } => Err(wrong()),
            }
        }
        Event::FlippedBack => match phase {
            Phase::Confirming(Confirming { flip: Some(flip), .. }) if is_proved(&flip.swap) => {
                Ok(Phase::RolledBack { reason: flip.why })
            }
            Phase::Confirming(_) => Err(odd("the flip back was not observed to serve and settle")),
            _ => Err(wrong()),
        },
        Event::RolledBack => match phase {
            Phase::RollingBack(back) if is_proved(&back.swap) => Ok(Phase::RolledBack { reason: back.reason }),
            Phase::RollingBack(_) => Err(odd("the restored revision was not observed to serve and settle")),
            _ => Err(wrong()),
        },
        Event::RepairIntended { .. }
        | Event::ProvedServes { .. }
        | Event::WayBackProved { .. }
        | Event::DriftSeen { .. }
        | Event::SnapshotDropped { .. }
        | Event::PurgeTried { .. } => {
            if from.in_flight() {
                Err(wrong())
            } else {
                Ok(phase)
            }
        }
    }
}

/// Success is observed, never assumed: the traffic was seen to move and the revision was seen to be settled.
fn is_proved(swap: &Swap) -> bool {
    swap.is_observed(Op::StartNew) && swap.is_observed(Op::CutOver) && swap.is_observed(Op::Settle)
}

/// Operations that the proxy tells apart by generation.
pub fn moves_traffic(op: Op) -> bool {
    match op {
        Op::PinTraffic | Op::CutOver | Op::Settle => true,
        Op::StopOld | Op::StartNew | Op::StopOldLate | Op::StartNewLate => false,
    }
}

fn active_swap(phase: &mut Phase) -> Option<&mut Swap> {
    match phase {
        Phase::RollingOut(swap) | Phase::Validating(swap) => Some(swap),
        Phase::Confirming(Confirming { flip: Some(flip), .. }) => Some(&mut flip.swap),
        Phase::Confirming(Confirming { swap, flip: None, .. }) => Some(swap),
        Phase::RollingBack(back) => Some(&mut back.swap),
        Phase::Idle
        | Phase::Queued
        | Phase::Fetching
        | Phase::Building(_)
        | Phase::Patching(_)
        | Phase::Succeeded { .. }
        | Phase::FailedPre { .. }
        | Phase::FailedRollout { .. }
        | Phase::RolledBack { .. }
        | Phase::RollbackFailed { .. } => None,
    }
}

/// The data are those of `version` again, by an operator's word.
fn lower(from: &mut Option<Version>, version: &Version) {
    if from.as_ref().is_some_and(|from| version.base() < from.base()) {
        *from = Some(version.clone());
    }
}

/// Whether a job may start from what runs; one that only builds touches none of it.
pub fn undrifted(record: &Record, build_only: bool) -> Result<(), Refused> {
    match record.drift.as_ref().filter(|drift| !drift.accepted && !build_only) {
        Some(drift) => Err(Refused::Drifted { what: drift.brief() }),
        None => Ok(()),
    }
}

/// Whether the controller of a deployment could go on from this record.
pub fn readable_to(record: &Record, to: &Deployment) -> Result<(), Refused> {
    let reads = to.reads_format();
    if to.plan.has_controller() && reads < record.min_reader {
        return Err(Refused::Unreadable { version: to.version.clone(), reads, needs: record.min_reader });
    }
    Ok(())
}

/// The swap that undoes what the record's phase did, where there is one.
pub fn reverse_of(record: &Record) -> Option<Swap> {
    // A swap that already leads to the way back is tried again from the side that it was to leave.
    let undo = |swap: &Swap| match &swap.way_back {
        WayBack::Snapshot(s) => {
            let again = swap.to.revision == s.deployment.revision;
            let from = if again { swap.from.clone() } else { Some(swap.to.clone()) };
            Some(Swap::new(from, s.deployment.clone(), swap.mode, swap.way_back.clone()))
        }
        WayBack::FirstDeployment => None,
    };
    match &record.phase {
        Phase::RollingOut(swap)
        | Phase::Validating(swap)
        | Phase::FailedRollout { swap, .. }
        | Phase::RollbackFailed { swap, .. } => undo(swap),
        Phase::Confirming(c) => undo(&c.swap),
        Phase::Succeeded { .. } | Phase::FailedPre { .. } => {
            let snapshot = record.snapshot.as_ref()?;
            let mode = record.job.as_ref().map_or(Mode::Single, |job| job.mode);
            let way_back = WayBack::Snapshot(Box::new(snapshot.clone()));
            Some(Swap::new(record.serving.clone(), snapshot.deployment.clone(), mode, way_back))
        }
        Phase::Idle
        | Phase::Queued
        | Phase::Fetching
        | Phase::Building(_)
        | Phase::Patching(_)
        | Phase::RollingBack(_)
        | Phase::RolledBack { .. } => None,
    }
}

/// What a commit writes: the new record with the head of its history, and the lines that lead to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub record: Record,
    pub lines: Vec<Line>,
}

/// Carries an event out on the record. Nothing is written; the result goes to the ledger as one commit.
pub fn apply(record: &Record, event: &Event, now: Millis) -> Result<Commit, Refused> {
    apply_as(record, event, now, crate::format::FORMAT)
}

/// The same for a build that reads records up to the format `reads`.
pub fn apply_as(record: &Record, event: &Event, now: Millis, reads: u32) -> Result<Commit, Refused> {
    let phase = next(record, event, now)?;
    let mut new = record.clone();
    if phase.state() != record.phase.state() {
        new.entered_at = now;
    }
    new.phase = phase;
    new.updated_at = now;

    let mut audit = Audit::new(now, record.job.as_ref().map(|j| &j.id), event.name());
    match event {
        Event::Start { job, override_quarantine } => {
            audit = Audit::new(now, Some(&job.id), event.name())
                .with("actor", json!(job.actor))
                .with("target_version", job.target.version.to_string())
                .with("target_sha", job.target.commit.as_str())
                .with("from_version", record.running.as_ref().map_or(String::new(), |r| r.version.to_string()))
                .with("reason", job.reason.clone())
                .with("mode", job.mode.name())
                .with("build_only", job.build_only);
            if *override_quarantine && new.quarantine.remove(&job.target.commit).is_some() {
                audit = audit.with("override", "quarantine");
            }
            if let Some(downgrade) = job.downgrade {
                audit = audit.with("downgrade", true);
                if downgrade.data_restored {
                    audit = audit.with("data_restored", true);
                    lower(&mut new.data_from, &job.target.version);
                }
            }
            let reuse = reusable(record).filter(|made| made.commit == job.target.commit);
            new.job = Some(Job { reuse: reuse.cloned(), ..(**job).clone() });
        }
        Event::RollbackStarted { actor, reason, data_restored } => {
            audit = audit.with("actor", json!(actor)).with("reason", reason.clone());
            if *data_restored {
                audit = audit.with("data_restored", true);
                if let Some(swap) = new.phase.swap() {
                    lower(&mut new.data_from, &swap.to.version);
                }
            }
            if let Some(swap) = new.phase.swap() {
                audit = audit.with("to_version", swap.to.version.to_string());
            }
        }
        Event::Cancelled { actor, reason } | Event::Reset { actor, reason } | Event::Kept { actor, reason } => {
            audit = audit.with("actor", json!(actor)).with("reason", reason.clone());
        }
        Event::QuarantineLifted { actor, commit, reason } => {
            let lifted = new.quarantine.remove(commit);
            let version = lifted.map(|q| q.version.to_string()).unwrap_or_default();
            // No job's doing, whichever one happens to be there.
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("reason", reason.clone())
                .with("version", version)
                .with("sha", commit.as_str());
        }
        Event::MovedTagAccepted { actor, reason, raw_ref, from, to } => {
            new.moved_tags.insert(raw_ref.clone(), to.clone());
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("reason", reason.clone())
                .with("ref", raw_ref.clone())
                .with("from_sha", from.as_str())
                .with("sha", to.as_str());
        }
        Event::DriftAccepted { actor, reason, what } => {
            if let Some(drift) = &mut new.drift {
                drift.accepted = true;
            }
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("reason", reason.clone())
                .with("what", json!(what));
        }
        Event::TrackCommits { actor, on } => {
            new.track_commits = *on;
            audit = audit.with("actor", json!(actor)).with("on", *on);
        }
        Event::TokenChanged { actor, id, name, role, change, reason } => {
            // No job's doing, whichever one happens to be there.
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("token_id", id.clone())
                .with("token", name.clone())
                .with("role", json!(role))
                .with("change", json!(change))
                .with("reason", reason.clone());
        }
        Event::ProxyUpgraded { actor, reason, step, image, outcome } => {
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("step", json!(step))
                .with("image", image.clone())
                .with("reason", reason.clone())
                .with("outcome", outcome.clone());
        }
        Event::LedgerRestored { actor, reason, file, replaced } => {
            audit = Audit::new(now, None, event.name())
                .with("actor", json!(actor))
                .with("reason", reason.clone())
                .with("file", file.clone())
                .with("lines", record.history.count);
            if let Some(head) = replaced {
                audit = audit.with("replaced_lines", head.count).with("replaced_head", json!(head.hash));
            }
        }
        Event::RefsSeen { latest } => {
            new.latest = latest.clone();
            if let Some((version, commit)) = new_release(record, latest) {
                audit = audit.with("version", version.to_string()).with("sha", commit.as_str());
            }
            if let Some(head) = new_head(record, latest) {
                audit = audit.with("branch_head", head.as_str());
            }
        }
        Event::HandedOver { to } | Event::TookOver { by: to } => {
            audit = audit.with("from", record.driver.controller.to_string()).with("to", to.to_string());
            new.driver = Driver { controller: to.clone(), since: now };
        }
        // A build-only job ends here, and the history calls every such end by one name.
        Event::BuildsComplete if new.phase.state() == State::Succeeded => {
            audit = Audit::new(now, record.job.as_ref().map(|j| &j.id), "succeeded").with("build_only", true);
        }
        Event::Claimed | Event::BuildsComplete | Event::Landed | Event::Progressed { .. } => {}
        Event::Fetched(fetched) => {
            audit = audit.with("components", fetched.recipes.len());
            if let Some(signer) = &fetched.signed_by {
                audit = audit.with("signed_by", signer.as_str());
            }
        }
        Event::BuildIntended { component } => audit = audit.with("component", component.as_str()),
        Event::BuildDone { component, built } => {
            audit = audit
                .with("component", component.as_str())
                .with("image", built.image.to_string())
                .with("adopted", built.adopted)
                .with("queued_ms", built.queued_ms)
                .with("built_ms", built.built_ms);
            if !built.bases.is_empty() {
                audit = audit.with("bases", json!(built.bases));
            }
        }
        Event::Prepared { to, way_back, escape_hatch } => {
            new.snapshot = match way_back {
                WayBack::Snapshot(s) => Some((**s).clone()),
                WayBack::FirstDeployment => None,
            };
            // From here on what runs is this job's business; what is left of it afterwards is seen anew.
            new.drift = None;
            audit = audit.with("revision", to.revision.as_str()).with("commands", json!(escape_hatch));
        }
        Event::StepIntended { step } | Event::StepDone { step } => {
            audit = audit.with("step", step.as_str());
            if let (Event::StepIntended { .. }, Phase::RollingOut(swap)) = (event, &new.phase)
                && swap
                    .to
                    .plan
                    .data
                    .steps
                    .iter()
                    .any(|planned| planned.name == *step && planned.kind == StepKind::Migrate)
            {
                new.data_from = oldest(record.data_from.as_ref(), &swap.to);
            }
            if let Some(job) = &mut new.job {
                let state = job.data.entry(step.clone()).or_insert(StepState { intended_at: now, ended_at: None });
                state.ended_at = matches!(event, Event::StepDone { .. }).then_some(now);
            }
        }
        Event::OpIntended { op } | Event::OpObserved { op } => {
            audit = audit.with("op", op.name());
            // From here on the new release has the data, whatever becomes of it.
            if let (Event::OpIntended { op: Op::StartNew }, Phase::RollingOut(swap)) = (event, &new.phase) {
                new.data_from = oldest(record.data_from.as_ref(), &swap.to);
            }
            if let (Event::OpIntended { .. }, true) = (event, moves_traffic(*op)) {
                new.generation += 1;
                audit = audit.with("generation", new.generation);
            }
            if let (Event::OpObserved { .. }, Op::CutOver) = (event, op) {
                new.serving = new.phase.active_swap().map(|swap| swap.to.clone());
            }
        }
        Event::CutOverIntended => {
            new.generation += 1;
            audit = audit.with("generation", new.generation);
        }
        Event::Converged { deadline } => audit = audit.with("confirm_deadline", deadline.rfc3339()),
        Event::FlipIntended { why } => audit = audit.with("why", why.clone()),
        Event::RepairIntended { why } => {
            new.generation += 1;
            audit = audit.with("why", why.clone()).with("generation", new.generation);
        }
        Event::ProvedServes { why } => {
            new.serving.clone_from(&record.running);
            audit = audit.with("why", why.clone());
            if let Some(running) = &record.running {
                audit = audit.with("revision", running.revision.as_str());
            }
        }
        Event::WayBackProved { lost } => {
            if let Some(snapshot) = &mut new.snapshot {
                snapshot.proved_at = now;
                snapshot.lost = (!lost.is_empty()).then(|| lost.clone());
                audit = audit.with("version", snapshot.deployment.version.to_string());
            }
            if !lost.is_empty() {
                audit = audit.with("why", lost.clone());
            }
        }
        Event::DriftSeen { what } => {
            new.drift = (!what.is_empty()).then(|| Drift { what: what.clone(), since: now, accepted: false });
            audit = Audit::new(now, None, event.name()).with("what", json!(what));
        }
        Event::SnapshotDropped { why } => {
            new.snapshot = None;
            audit = audit.with("why", why.clone());
        }
        Event::PurgeTried { removed, why } => {
            let tags = |orphans: &[&Orphan]| -> Vec<String> {
                orphans.iter().map(|o| format!("{}:{}", o.repository, attempt_tag(&o.version, &o.key))).collect()
            };
            let (gone, left): (Vec<_>, Vec<_>) = record.orphans.iter().partition(|o| removed.contains(&o.key));
            // Contract §3 has a name of its own for the first time that something stays.
            if left.iter().any(|orphan| orphan.tried_at.is_none()) {
                audit = Audit::new(now, record.job.as_ref().map(|j| &j.id), "orphan_acr_tags");
            }
            audit = audit.with("removed", json!(tags(&gone))).with("left", json!(tags(&left))).with("why", why.clone());
            new.orphans.retain(|orphan| !removed.contains(&orphan.key));
            new.orphans.iter_mut().for_each(|orphan| orphan.tried_at = Some(now));
        }
        Event::Completed => {
            let swap = record.phase.swap().ok_or(Refused::NoSnapshot)?;
            new.running = Some(swap.to.clone());
            new.serving = Some(swap.to.clone());
            audit = audit.with("version", swap.to.version.to_string()).with("revision", swap.to.revision.as_str());
        }
        Event::Failed { fault } => {
            let stage = if record.phase.state().before_swap() { "pre" } else { "rollout" };
            audit = audit.with("stage", stage).with("why", fault.what.clone());
            if !fault.advice.is_empty() {
                audit = audit.with("advice", fault.advice.clone());
            }
            if stage == "rollout" {
                quarantine(&mut new, record, &fault.what, now);
            }
        }
        Event::FlippedBack | Event::RolledBack => {
            let (swap, why) = match &record.phase {
                Phase::RollingBack(back) => (&back.swap, back.reason.clone()),
                Phase::Confirming(Confirming { flip: Some(flip), .. }) => (&flip.swap, flip.why.clone()),
                _ => {
                    return Err(Refused::WrongState { from: record.phase.state(), event: event.name() });
                }
            };
            new.running = Some(swap.to.clone());
            new.serving = Some(swap.to.clone());
            new.snapshot = None;
            audit = audit.with("version", swap.to.version.to_string()).with("revision", swap.to.revision.as_str());
            let why =
                if why.is_empty() { "rolled back by an operator".to_owned() } else { format!("rolled back: {why}") };
            quarantine(&mut new, record, &why, now);
        }
    }
    if new.phase.state() != record.phase.state() {
        audit = audit.with("state", new.phase.state().name());
        let holds = record.job.as_ref().is_some_and(|job| job.on_rollout_failure == OnRolloutFailure::Hold);
        if new.phase.state() == State::FailedRollout && holds {
            audit = audit.with("held", true);
        }
    }
    if new.phase.state() == State::FailedPre && record.phase.state() != State::FailedPre {
        new.orphans.extend(orphans_of(record, now));
        let most = new.orphans.len().saturating_sub(ORPHANS_MAX);
        new.orphans.drain(..most);
    }
    // From the moment on that the data may have changed: whoever asks later has no swap to ask.
    let in_swap = matches!(record.phase, Phase::RollingOut(_) | Phase::Validating(_) | Phase::Confirming(_));
    if let Some(why) = record.phase.swap().filter(|_| in_swap).and_then(|swap| closed(swap, record.job.as_ref()))
        && let Some(snapshot) = &mut new.snapshot
    {
        snapshot.closed = Some(why);
    }
    progress::note(&mut new, &record.phase, event);
    let level = crate::format::level(&new, reads);
    (new.format, new.min_reader) = (new.format.max(level), level);
    // A look at the remote that found nothing new to start is no event, nor is that a job goes on: the history would drown in them.
    let silent = match event {
        Event::RefsSeen { latest } => new_release(record, latest).is_none() && new_head(record, latest).is_none(),
        other => matches!(other, Event::Progressed { .. }),
    };
    let events = if silent { &[][..] } else { std::slice::from_ref(&audit) };
    let (lines, head) = seal(&record.history, events);
    new.history = head;
    Ok(Commit { record: new, lines })
}
