//! Between jobs: what a late effect changed is put right, and what nobody needs any more goes.

use std::collections::BTreeSet;

use super::task::{CLEAN_UP, PROVE, PURGE};
use super::{Action, Decision, Ended, Outcome, View, look_again};
use crate::event::Event;
use crate::phase::Phase;
use crate::ports::{Change, Observation, RevisionSeen, Running};
use crate::record::{ControllerId, Deployment, Overlap};
use crate::swap::{Fit, Step, fit, fit_to_serve, hand_over, takes_requests};
use crate::words::{ContainerName, Millis};

/// Between jobs: put right what a late effect changed, and retire what nobody needs any more.
pub(super) fn decide(view: &View<'_>) -> Decision {
    let record = view.record;
    let rest =
        |why: &str| Decision::Wait { until: Some(view.now.plus(view.policy.observe_at_rest)), why: why.to_owned() };
    let Some(serving) = &record.serving else {
        // Nothing runs, or nothing that is ours to run: a service that only builds leaves trees, logs and images all the same.
        return housekeeping(view).unwrap_or_else(|| rest("at rest"));
    };
    let Some(seen) = view.observation else { return rest("at rest") };
    let as_decision = |step: Step| match step {
        Step::Record(event) => Decision::Record(event),
        Step::Act(action) => Decision::Act(action),
        Step::Wait(why) | Step::Proving(why) | Step::Doing(why) => look_again(view, why),
        Step::Failed(told) => rest(&told.what),
        Step::Reached => rest("at rest"),
    };

    // A dead driver's change of traffic that arrived late is undone, under a generation that refuses it from then on.
    let traffic = &seen.traffic;
    if traffic.revision.is_some() && traffic.revision.as_ref() != Some(&serving.revision) {
        if let Some(event) = proved_serves(view, serving, seen) {
            return Decision::Record(event);
        }
        if !takes_requests(seen, serving) {
            return as_decision(bring_back(view, serving, seen));
        }
        if record.generation <= traffic.generation {
            let why = "traffic was seen elsewhere than recorded".to_owned();
            return Decision::Record(Event::RepairIntended { why });
        }
        let fallback = record.running.clone();
        let change = Change::Shift { to: serving.clone(), generation: record.generation, fallback };
        let attempt = u32::try_from(record.generation).unwrap_or(u32::MAX);
        return as_decision(view.act("repair-traffic", attempt, change));
    }
    let settled = seen.revisions.get(&serving.revision).is_some_and(|r| r.returns_alone);
    let is_proved = record.running.as_ref().is_some_and(|r| r.revision == serving.revision);
    // What serves without proof stays beside what was proved last, also where a later job failed before it touched anything:
    // the proved one is all that returns after a reboot.
    let held = !is_proved || matches!(record.phase, Phase::FailedRollout { .. } | Phase::RollbackFailed { .. });
    if held {
        let has = |name: &ContainerName| is_running(seen.revisions.get(&serving.revision), name);
        if let Some(step) = stop_doubles(view, serving, seen, has) {
            return as_decision(step);
        }
        // What was proved and serves has to return, also where going back to it was given up before it was settled.
        if is_proved && !settled && fit(seen, serving, serving.plan.containers.keys()) == Fit::Up {
            return settle_serving(view, serving, traffic.generation, as_decision);
        }
        return prove(view).unwrap_or_else(|| rest("held as it stands until an operator decides"));
    }
    // Told before it is mended, as what is mended may be a hand that has its reasons.
    if let Some(what) = view.streaks.drift.news(record.drift.as_ref(), view.now, view.policy.drift_after) {
        return Decision::Record(Event::DriftSeen { what: what.to_vec() });
    }
    // A late stop takes the reboot policy away; an operator's own stop does not, and is left alone.
    if !settled {
        if fit(seen, serving, serving.plan.containers.keys()) != Fit::Up {
            return as_decision(start_serving(view, serving));
        }
        return settle_serving(view, serving, traffic.generation, as_decision);
    }
    if let Some(step) = hand_over(view, serving) {
        return as_decision(step);
    }
    if let Some(step) = tidy_strays(view, seen) {
        return as_decision(step);
    }
    if let Some(step) = retire_snapshot(view, serving, seen) {
        return as_decision(step);
    }
    if let Some(event) = forget_snapshot(view) {
        return Decision::Record(event);
    }
    housekeeping(view).unwrap_or_else(|| match view.streaks.drift.is_pending(record.drift.as_ref()) {
        true => look_again(view, "what runs is not what was recorded, and may be again in a moment".to_owned()),
        false => rest("at rest"),
    })
}

/// Promise 4: what a rollback needs is proved to be there daily, before somebody needs it at night.
fn prove(view: &View<'_>) -> Option<Decision> {
    let snapshot = view.record.snapshot.as_ref()?;
    let task = view.task(PROVE, 1);
    let is_due = view.now.since(snapshot.proved_at) >= view.policy.clean_up_every;
    if !is_due || view.tasks.running.contains(&task) {
        return None;
    }
    match view.tasks.ended.get(&task) {
        // A look that ended before the newest commit may be of another snapshot.
        Some(Ended::Well { outcome: Outcome::Proved { lost }, at }) if view.record.updated_at <= *at => {
            Some(Decision::Record(Event::WayBackProved { lost: lost.clone() }))
        }
        Some(Ended::Badly { at, .. }) if view.now.since(*at) < view.policy.backoff_max => None,
        Some(_) | None => Some(Decision::Act(Action::Prove)),
    }
}

fn housekeeping(view: &View<'_>) -> Option<Decision> {
    prove(view).or_else(|| purge(view)).or_else(|| is_clean_up_due(view).then_some(Decision::Act(Action::CleanUp)))
}

/// What serves becomes what returns after a reboot, under a generation that is recorded first.
fn settle_serving(
    view: &View<'_>,
    serving: &Deployment,
    seen: u64,
    as_decision: impl FnOnce(Step) -> Decision,
) -> Decision {
    let generation = view.record.generation;
    if generation <= seen {
        let why = "the serving revision would not return after a reboot".to_owned();
        return Decision::Record(Event::RepairIntended { why });
    }
    let change = Change::Settle { deployment: serving.clone(), not: vec![], generation };
    as_decision(view.act("repair-settle", u32::try_from(generation).unwrap_or(u32::MAX), change))
}

/// Traffic is elsewhere than recorded, and what served without proof is not there to take it back: after a reboot the way in leads
/// to what was proved last, and after a late effect it may lead anywhere. What was proved and runs is what is left to serve.
fn proved_serves(view: &View<'_>, serving: &Deployment, seen: &Observation) -> Option<Event> {
    let running = view.record.running.as_ref().filter(|running| running.revision != serving.revision)?;
    let runs = |d: &Deployment| seen.revisions.get(&d.revision).is_some_and(RevisionSeen::runs);
    // A controller that was killed for good takes nothing from who answers; the one that drives goes on.
    let is_left = runs(running) && takes_requests(seen, running);
    let serves = runs(serving) && fit_to_serve(seen, serving) == Fit::Up;
    (is_left && !serves).then(|| Event::ProvedServes {
        why: format!("{} no longer runs, and {} is what was proved last", serving.version, running.version),
    })
}

/// A reboot can leave nothing to serve: what was proved last had been told not to return, as its successor was proved, and that one
/// fell before this was recorded. Then what serves by the record comes back, as it stood.
fn bring_back(view: &View<'_>, serving: &Deployment, seen: &Observation) -> Step {
    let will_have = |name: &ContainerName| serving.plan.containers.contains_key(name);
    stop_doubles(view, serving, seen, will_have).unwrap_or_else(|| start_serving(view, serving))
}

fn start_serving(view: &View<'_>, serving: &Deployment) -> Step {
    let containers = serving.plan.containers.keys().cloned().collect();
    view.act("repair-start", 1, Change::Start { deployment: serving.clone(), containers })
}

fn is_running(there: Option<&RevisionSeen>, name: &ContainerName) -> bool {
    let container = there.and_then(|there| there.containers.get(name));
    container.is_some_and(|c| c.running == Running::Running)
}

/// What a failed job left in the registry is removed at once; what could not be is tried again daily, and after each failure.
fn purge(view: &View<'_>) -> Option<Decision> {
    let task = view.task(PURGE, 1);
    if view.tasks.running.contains(&task) {
        return None;
    }
    let is_due = |tried_at: Option<Millis>| tried_at.is_none_or(|at| view.now.since(at) >= view.policy.clean_up_every);
    if !view.record.orphans.iter().any(|orphan| is_due(orphan.tried_at)) {
        return None;
    }
    match view.tasks.ended.get(&task) {
        // A purge that ended before the newest try that is recorded speaks of that one.
        Some(Ended::Well { outcome: Outcome::Purged(purged), at }) if view.record.updated_at <= *at => {
            Some(Decision::Record(Event::PurgeTried { removed: purged.removed.clone(), why: purged.why.clone() }))
        }
        Some(Ended::Badly { at, .. }) if view.now.since(*at) < view.policy.backoff_max => None,
        Some(_) | None => Some(Decision::Act(Action::Purge)),
    }
}

/// The way back closes when its images' time is over: what may be gone is not offered.
fn forget_snapshot(view: &View<'_>) -> Option<Event> {
    let snapshot = view.record.snapshot.as_ref().filter(|s| view.now >= s.keep_until)?;
    let version = &snapshot.deployment.version;
    Some(Event::SnapshotDropped {
        why: format!("the images of {version} were kept until {}", snapshot.keep_until.rfc3339()),
    })
}

/// Once after each job, and then daily: what could not be removed today may be free tomorrow.
fn is_clean_up_due(view: &View<'_>) -> bool {
    let task = view.task(CLEAN_UP, 1);
    if view.tasks.running.contains(&task) {
        return false;
    }
    match view.tasks.ended.get(&task) {
        None => true,
        Some(Ended::Well { at, .. } | Ended::Badly { at, .. }) => view.now.since(*at) >= view.policy.clean_up_every,
    }
}

/// While a failure is held nothing is tidied, but a late start may not leave two of what may not overlap (lesson 35). `has` says
/// which containers what serves has.
fn stop_doubles(
    view: &View<'_>,
    serving: &Deployment,
    seen: &Observation,
    has: impl Fn(&ContainerName) -> bool,
) -> Option<Step> {
    one_of_each(view, serving, seen, &has).or_else(|| halt_doubles(view, serving, seen, &has))
}

/// The one in what serves stays, or else the one in what was proved last; the others stop.
fn one_of_each(
    view: &View<'_>,
    serving: &Deployment,
    seen: &Observation,
    has: &dyn Fn(&ContainerName) -> bool,
) -> Option<Step> {
    let record = view.record;
    let swap = record.phase.swap();
    let snapshot = record.snapshot.as_ref().map(|s| &s.deployment);
    let (from, to) = (swap.and_then(|s| s.from.as_ref()), swap.map(|s| &s.to));
    let known: Vec<_> = [Some(serving), record.running.as_ref(), from, to, snapshot].into_iter().flatten().collect();
    let runs = |d: &Deployment, name: &ContainerName| match d.revision == serving.revision {
        true => has(name),
        false => is_running(seen.revisions.get(&d.revision), name),
    };
    for (at, beside) in known.iter().enumerate() {
        let before = &known[..at];
        if before.iter().any(|d| d.revision == beside.revision) {
            continue;
        }
        let doubled: BTreeSet<_> = beside
            .plan
            .containers
            .iter()
            .filter(|(name, c)| {
                let single = c.overlap != Overlap::Allowed && !c.controller;
                single && runs(beside, name) && before.iter().any(|d| runs(d, name))
            })
            .map(|(name, _)| name.clone())
            .collect();
        if !doubled.is_empty() {
            let change = Change::Stop { deployment: (*beside).clone(), containers: doubled };
            return Some(view.act("stop-doubled", 1, change));
        }
    }
    None
}

/// The same for what no part of the record knows: a start of an earlier job that arrives late. What is held is this job's, so
/// that one stops as a whole, as the next swap would stop it.
fn halt_doubles(
    view: &View<'_>,
    serving: &Deployment,
    seen: &Observation,
    has: &dyn Fn(&ContainerName) -> bool,
) -> Option<Step> {
    let single = |name: &&ContainerName| {
        let plan = serving.plan.containers.get(*name);
        plan.is_some_and(|c| c.overlap != Overlap::Allowed && !c.controller)
    };
    let held = [view.record.phase.swap().and_then(|swap| swap.from.as_ref())];
    let (stray, _) = view.strays_beside(&held, seen).find(|(id, there)| {
        let others = || seen.revisions.iter().filter(|(other, _)| other != id);
        let mut names = there.containers.keys().filter(single).filter(|name| is_running(Some(there), name));
        names.any(|name| has(name) || others().any(|(_, other)| is_running(Some(other), name)))
    })?;
    Some(view.act("halt-stray", 1, Change::Halt { revision: stray.clone() }))
}

/// What nobody needs any more, most often a release that failed: stopped at once, and removed after a day, so that its
/// containers' logs are there for whoever asks why. The newest few of them only.
fn tidy_strays(view: &View<'_>, seen: &Observation) -> Option<Step> {
    let stopped = view.strays_beside(&[], seen).filter(|(_, there)| !there.runs());
    let mut newest: Vec<_> = stopped.filter_map(|(id, there)| Some((there.stopped_at?, id))).collect();
    newest.sort_unstable_by(|one, other| other.cmp(one));
    newest.truncate(view.policy.keep_failed);
    view.strays_beside(&[], seen).find_map(|(id, there)| {
        let revision = id.clone();
        match there.stopped_at {
            _ if there.runs() => Some(view.act("halt-stray", 1, Change::Halt { revision })),
            Some(at) if newest.contains(&(at, id)) && view.now.since(at) < view.policy.keep_containers => None,
            // Also what never ran: it has nothing to tell.
            Some(_) | None => Some(view.act("remove-stray", 1, Change::Remove { revision })),
        }
    })
}

/// The revision that a rollback would restore: stopped at once, its containers removed after a day.
fn retire_snapshot(view: &View<'_>, serving: &Deployment, seen: &Observation) -> Option<Step> {
    let old = &view.record.snapshot.as_ref()?.deployment;
    let there = seen.revisions.get(&old.revision)?;
    if old.revision == serving.revision || *view.me == ControllerId::Revision(old.revision.clone()) {
        return None;
    }
    match there.stopped_at {
        None if there.containers.is_empty() => None,
        None => {
            let containers = old.plan.containers.keys().cloned().collect();
            Some(view.act("retire", 1, Change::Stop { deployment: old.clone(), containers }))
        }
        Some(at) if view.now.since(at) >= view.policy.keep_containers => {
            Some(view.act("remove-old", 1, Change::Remove { revision: old.revision.clone() }))
        }
        Some(_) => None,
    }
}
