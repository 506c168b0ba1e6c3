//! What else changes with a phase: the rest of the record, and the line that tells of it. Which phase follows is not said here.

use serde_json::json;

use super::{Refused, moves_traffic, next};
use crate::aftermath::{new_head, new_release, orphans_of, quarantine, reusable};
use crate::data::{StepKind, StepState, closed, oldest};
use crate::drift::Drift;
use crate::event::Event;
use crate::history::{Audit, Line, seal};
use crate::image::attempt_tag;
use crate::phase::{Confirming, Op, Phase, State, WayBack};
use crate::progress;
use crate::record::{Driver, Job, ORPHANS_MAX, OnRolloutFailure, Orphan, Record};
use crate::words::{Millis, Version};

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

/// The data are those of `version` again, by an operator's word.
fn lower(from: &mut Option<Version>, version: &Version) {
    if from.as_ref().is_some_and(|from| version.base() < from.base()) {
        *from = Some(version.clone());
    }
}
