//! The only place where transitions live: `next` says which phase follows, `apply` what else changes with it.
//!
//! Every (state, event) pair that is not written here is refused with a typed error; nothing is accepted by default.

mod apply;

pub use apply::{Commit, apply, apply_as};

use crate::data::{closed, closed_for, too_new_for};
use crate::event::{Event, ProxyStep};
use crate::fault::Told;
use crate::phase::{
    Build, Building, BuiltOnly, Confirming, Flip, Mode, Op, OpState, Patching, Phase, RollingBack, State, Swap, WayBack,
};
use crate::record::{Deployment, MOVED_TAGS_MAX, Record};
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
