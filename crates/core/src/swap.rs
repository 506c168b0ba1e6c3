//! What a swap has to do next, by comparing what was recorded with what was observed.
//!
//! The same code moves an upgrade forward, a rollback back and a flip back, and finishes what a dead driver began: it reads
//! the whole situation each time and names the first thing that is missing.

use std::collections::BTreeSet;

use crate::decide::{Action, View};
use crate::event::Event;
use crate::fault::Told;
use crate::phase::{Confirming, Op, Phase, Swap, WayBack};
use crate::ports::{Change, Observation, Running};
use crate::record::{ContainerPlan, ControllerId, Deployment, Overlap};
use crate::words::{ContainerName, RevisionId};

/// How far a swap is to be taken now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The new side's containers run.
    Landed,
    /// ... and its probes answered often enough.
    Proved,
    /// Traffic was observed on the new side, its controller drives, late containers have changed places.
    Serving,
    /// The new side is the one that returns alone.
    Settled,
}

/// The first missing thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Record(Event),
    Act(Action),
    Wait(String),
    /// A change is under way, or was done a moment ago.
    Doing(String),
    /// Nothing is missing but more good answers.
    Proving(String),
    Reached,
    /// It cannot get there.
    Failed(Told),
}

/// Whether a deployment's containers are as they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    Up,
    NotYet(String),
    /// Started and ended by itself.
    Crashed(String),
    /// Something else runs under its name.
    Foreign(String),
}

/// Compares a deployment's containers, or some of them, with what was seen.
pub fn fit<'a>(seen: &Observation, want: &Deployment, names: impl Iterator<Item = &'a ContainerName>) -> Fit {
    compare(seen, want, names, |_| true)
}

/// The same, of those containers alone that a side keeps while another one stands beside it. That a controller was restarted a
/// moment ago says nothing about traffic: it runs, and its probe is asked as the others' are.
pub fn fit_to_serve(seen: &Observation, want: &Deployment) -> Fit {
    compare(seen, want, want.plan.with_overlap(Overlap::Allowed), |plan| !plan.controller)
}

/// Whether what takes requests runs: a side whose controller is gone serves all the same, unless there is nothing else in it.
pub fn takes_requests(seen: &Observation, want: &Deployment) -> bool {
    let controls = |name: &&ContainerName| want.plan.containers.get(*name).is_some_and(|plan| plan.controller);
    let names: Vec<_> = want.plan.with_overlap(Overlap::Allowed).filter(|name| !controls(name)).collect();
    match names.is_empty() {
        true => fit_to_serve(seen, want) == Fit::Up,
        false => compare(seen, want, names.into_iter(), |_| true) == Fit::Up,
    }
}

fn compare<'a>(
    seen: &Observation,
    want: &Deployment,
    names: impl Iterator<Item = &'a ContainerName>,
    heeds_trouble: impl Fn(&ContainerPlan) -> bool,
) -> Fit {
    let Some(revision) = seen.revisions.get(&want.revision) else {
        return if names.count() == 0 { Fit::Up } else { Fit::NotYet("nothing of it exists yet".to_owned()) };
    };
    if revision.key.as_ref() != Some(&want.key) || revision.commit.as_ref() != Some(&want.commit) {
        return Fit::Foreign(format!("what runs as revision {} was not made by this job", want.revision));
    }
    for name in names {
        let plan = want.plan.containers.get(name);
        let Some((plan, container)) = plan.zip(revision.containers.get(name)) else {
            return Fit::NotYet(format!("container {name} does not exist yet"));
        };
        if want.images.get(&plan.component) != Some(&container.image) {
            return Fit::Foreign(format!("container {name} runs {} instead of the built image", container.image));
        }
        match container.running {
            Running::Running => {}
            Running::Created => return Fit::NotYet(format!("container {name} is not started yet")),
            Running::Stopped => {
                let code = container.exit_code.map_or(String::new(), |code| format!(" with exit code {code}"));
                return Fit::Crashed(format!("container {name} ended{code}"));
            }
        }
        if let Some(trouble) = container.trouble.as_ref().filter(|_| heeds_trouble(plan)) {
            return Fit::NotYet(format!("container {name}: {trouble}"));
        }
    }
    Fit::Up
}

fn none_runs<'a>(seen: &Observation, d: &Deployment, mut names: impl Iterator<Item = &'a ContainerName>) -> bool {
    let Some(revision) = seen.revisions.get(&d.revision) else {
        return true;
    };
    names.all(|name| revision.containers.get(name).is_none_or(|c| c.running != Running::Running))
}

/// Containers of the old side with this overlap: those that make room first, or those that stop late.
fn old_with(swap: &Swap, overlap: Overlap) -> BTreeSet<ContainerName> {
    swap.from.iter().flat_map(|from| from.plan.with_overlap(overlap)).cloned().collect()
}

/// The two directions of one job are different steps.
fn step_name(op: Op, swap: &Swap) -> String {
    format!("{}:{}", op.name(), swap.to.revision)
}

/// Takes one operation through intent, effect and observation. `None` once it is observed.
fn operate(view: &View<'_>, swap: &Swap, op: Op, satisfied: bool, change: impl FnOnce(u64) -> Change) -> Option<Step> {
    match swap.intended(op) {
        Some(state) if state.observed_at.is_some() => None,
        Some(_) if satisfied => Some(Step::Record(Event::OpObserved { op })),
        Some(state) => Some(view.act(&step_name(op, swap), state.attempt, change(state.generation))),
        None => Some(Step::Record(Event::OpIntended { op })),
    }
}

/// What `swap` needs next to reach `stage`. `reverse`: on the way back a warm side takes the traffic first and the rest follows.
pub fn advance(view: &View<'_>, swap: &Swap, stage: Stage, reverse: bool) -> Step {
    let Some(seen) = view.observation else {
        return Step::Wait("looking at the platform".to_owned());
    };
    let to = &swap.to;

    let warm = reverse && fit_to_serve(seen, to) == Fit::Up && view.streaks.warm(to, view.policy.proofs);
    if warm && let Some(step) = cut_over(view, swap, seen) {
        return step;
    }

    if let Some(step) = pin_traffic(view, swap, seen) {
        return step;
    }
    // Containers that may not overlap make room first: the old side's, and whatever an earlier, failed swap left running.
    let has_traffic = |id: &RevisionId| seen.traffic.revision.as_ref() == Some(id);
    let known = [swap.from.as_ref(), Some(to)];
    let mut strays = view.strays_beside(&known, seen).filter(|(id, there)| there.runs() && !has_traffic(id));
    if let Some((stray, _)) = strays.next() {
        return view.act("halt-stray", 1, Change::Halt { revision: stray.clone() });
    }
    let first = old_with(swap, Overlap::StopOldFirst);
    if let Some(from) = swap.from.as_ref().filter(|_| !first.is_empty()) {
        let done = none_runs(seen, from, first.iter());
        let change = |_| Change::Stop { deployment: from.clone(), containers: first.clone() };
        if let Some(step) = operate(view, swap, Op::StopOld, done, change) {
            return step;
        }
    }

    let start = |names: BTreeSet<ContainerName>| move |_| Change::Start { deployment: to.clone(), containers: names };
    let up = fit(seen, to, to.plan.early());
    match &up {
        Fit::Foreign(what) => {
            return Step::Failed(Told::permanent(
                what.clone(),
                "remove the foreign container by hand if it is not yours, then start again",
            ));
        }
        Fit::Up | Fit::NotYet(_) | Fit::Crashed(_) => {}
    }
    if let Some(step) = operate(view, swap, Op::StartNew, up == Fit::Up, start(to.plan.early().cloned().collect())) {
        return match (step, &up) {
            // It was started and ended: starting the same again is a new attempt, and there are few of them.
            (Step::Act(_), Fit::Crashed(why))
                if view.tried(&step_name(Op::StartNew, swap), attempt_of(swap, Op::StartNew)) =>
            {
                crashed(view, swap, Op::StartNew, why)
            }
            (step, _) => step,
        };
    }
    if let Fit::Crashed(why) = &up {
        return crashed(view, swap, Op::StartNew, why);
    }
    if stage == Stage::Landed {
        return Step::Reached;
    }

    if !swap.is_observed(Op::CutOver) {
        if up != Fit::Up {
            return Step::Wait(reason(&up));
        }
        if !view.streaks.proved(to, view.policy.proofs) {
            return Step::Proving(view.streaks.why(to));
        }
    }
    if stage == Stage::Proved {
        return Step::Reached;
    }

    if let Some(step) = cut_over(view, swap, seen) {
        return step;
    }
    if !view.streaks.through_proved(to, view.policy.proofs) {
        return Step::Proving(view.streaks.why_through(to));
    }
    if let Some(step) = hand_over(view, to) {
        return step;
    }
    let late = old_with(swap, Overlap::StartAfterCutover);
    if let Some(from) = swap.from.as_ref().filter(|_| !late.is_empty()) {
        let done = none_runs(seen, from, late.iter());
        let change = |_| Change::Stop { deployment: from.clone(), containers: late.clone() };
        if let Some(step) = operate(view, swap, Op::StopOldLate, done, change) {
            return step;
        }
    }
    let starts_late: BTreeSet<ContainerName> = to.plan.with_overlap(Overlap::StartAfterCutover).cloned().collect();
    if !starts_late.is_empty() {
        let up = fit(seen, to, starts_late.iter());
        let done = up == Fit::Up;
        if let Some(step) = operate(view, swap, Op::StartNewLate, done, start(starts_late)) {
            return step;
        }
        // A dead driver's stop that arrives after the start was observed would otherwise be settled as it is.
        if let Fit::Crashed(why) = &up {
            return crashed(view, swap, Op::StartNewLate, why);
        }
    }
    if stage == Stage::Serving {
        return Step::Reached;
    }

    let settled = seen.revisions.get(&to.revision).is_some_and(|r| r.returns_alone)
        && seen.traffic.fallback.is_none()
        && swap.intended(Op::Settle).is_some_and(|s| seen.traffic.generation >= s.generation);
    let others = seen.revisions.keys().filter(|id| **id != to.revision).cloned().collect();
    let change = |generation| Change::Settle { deployment: to.clone(), not: others, generation };
    operate(view, swap, Op::Settle, settled, change).unwrap_or(Step::Reached)
}

fn attempt_of(swap: &Swap, op: Op) -> u32 {
    swap.intended(op).map_or(0, |state| state.attempt)
}

fn crashed(view: &View<'_>, swap: &Swap, op: Op, why: &str) -> Step {
    if attempt_of(swap, op) < view.policy.start_attempts {
        Step::Record(Event::OpIntended { op })
    } else {
        Step::Failed(Told::permanent(
            format!("{why}, {} times in a row", view.policy.start_attempts),
            "read the container's log, mend the release, and start again",
        ))
    }
}

fn reason(fit: &Fit) -> String {
    match fit {
        Fit::Up => String::new(),
        Fit::NotYet(why) | Fit::Crashed(why) | Fit::Foreign(why) => why.clone(),
    }
}

/// Traffic is where it should be when the platform says so under the generation that was recorded, or a later one: an
/// earlier one could be a dead driver's.
fn cut_over(view: &View<'_>, swap: &Swap, seen: &Observation) -> Option<Step> {
    let there = seen.traffic.revision.as_ref() == Some(&swap.to.revision)
        && swap.intended(Op::CutOver).is_some_and(|s| seen.traffic.generation >= s.generation);
    // It was there and is no longer: after a reboot the proxy serves what was proved last. Inside the confirm window that is
    // a reason to flip back; elsewhere it is moved again, under a generation of its own.
    let flips = matches!(view.record.phase, Phase::Confirming(Confirming { flip: None, .. }))
        && matches!(swap.way_back, WayBack::Snapshot(_))
        && crate::data::closed(swap, view.record.job.as_ref()).is_none();
    if !there && !flips && swap.is_observed(Op::CutOver) {
        return Some(Step::Record(Event::OpIntended { op: Op::CutOver }));
    }
    // What returns alone after a reboot is the deployment that was proved last; that is what a restarted proxy must serve.
    // On the way back that is where the traffic goes: it returns from then on, before all of it is there to be settled.
    let fallback = view.record.running.clone();
    operate(view, swap, Op::CutOver, there, |generation| Change::Shift { to: swap.to.clone(), generation, fallback })
}

/// An earlier job's change of traffic may arrive as late as in this one. What has the traffic cannot be stopped to make room, so
/// that goes back first to the side that serves by the record, under a generation that refuses the like from then on. Once the
/// cut-over is intended its own generation does that.
fn pin_traffic(view: &View<'_>, swap: &Swap, seen: &Observation) -> Option<Step> {
    let (serving, at) = view.record.serving.as_ref().zip(seen.traffic.revision.as_ref())?;
    let known = [Some(serving), Some(&swap.to), swap.from.as_ref()];
    let strayed = known.into_iter().flatten().all(|d| d.revision != *at) && swap.intended(Op::CutOver).is_none();
    let pinned = swap.intended(Op::PinTraffic);
    if strayed && pinned.is_none_or(|pinned| pinned.observed_at.is_some()) {
        return Some(Step::Record(Event::OpIntended { op: Op::PinTraffic }));
    }
    pinned?;
    let fallback = view.record.running.clone();
    let change = |generation| Change::Shift { to: serving.clone(), generation, fallback };
    operate(view, swap, Op::PinTraffic, !strayed, change)
}

/// Gives the wheel to the controller of the side that serves, once that controller reports in.
pub fn hand_over(view: &View<'_>, to: &Deployment) -> Option<Step> {
    let successor = ControllerId::Revision(to.revision.clone());
    if !to.plan.has_controller() || view.record.driver.controller == successor {
        return None;
    }
    match view.presence(&successor) {
        Some(p) if p.reads_format < view.record.min_reader => Some(Step::Failed(Told::permanent(
            format!(
                "the controller of revision {} cannot read the record (it reads format {})",
                to.revision, p.reads_format
            ),
            "roll back, and upgrade to a release whose Replank reads it",
        ))),
        Some(p) if view.now.since(p.at) < view.policy.stale_driver => {
            Some(Step::Record(Event::HandedOver { to: successor }))
        }
        Some(_) | None => {
            Some(Step::Wait(format!("waiting for the controller of revision {} to report in", to.revision)))
        }
    }
}
