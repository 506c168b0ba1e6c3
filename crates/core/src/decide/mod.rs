//! The decision: given the record, one look at the platform, and the time, what to do next.
//!
//! It is called again after every change of anything. It keeps nothing between calls, so that the first call of a successor
//! is as good as the hundredth of its predecessor.

mod data;
mod resting;
mod streaks;
mod task;

use std::collections::BTreeMap;

pub(crate) use task::build_step;
use task::{FETCH, PREPARE, job_of};

pub use streaks::{Streak, Streaks};
pub use task::{Action, Ended, Outcome, Prepared, Purged, TaskId, Tasks, data_step};

use crate::event::Event;
use crate::fault::{Class, Told};
use crate::phase::{Building, Confirming, Mode, Op, Phase, Swap, WayBack};
use crate::policy::Policy;
use crate::ports::{Ask, Change, Observation, Presence, RevisionSeen};
use crate::record::{ControllerId, Deployment, Job, OnRolloutFailure, Record, Snapshot};
use crate::swap::{Fit, Stage, Step, advance, fit, hand_over};
use crate::words::{Millis, OpKey, RevisionId};

/// Everything a decision may depend on.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub record: &'a Record,
    pub me: &'a ControllerId,
    pub now: Millis,
    pub policy: &'a Policy,
    /// Absent where [`ask`] asked for none, or where the last look failed.
    pub observation: Option<&'a Observation>,
    pub streaks: &'a Streaks,
    pub presences: &'a [Presence],
    pub tasks: &'a Tasks,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Record(Event),
    Act(Action),
    /// Nothing to do before `until`, or before something changes.
    Wait {
        until: Option<Millis>,
        why: String,
    },
}

impl<'a> View<'a> {
    pub fn presence(&self, of: &ControllerId) -> Option<&'a Presence> {
        self.presences.iter().filter(|p| p.controller == *of).max_by_key(|p| p.at)
    }

    pub fn job_id(&self) -> String {
        job_of(self.record)
    }

    pub fn task(&self, step: &str, attempt: u32) -> TaskId {
        TaskId { job: self.job_id(), step: step.to_owned(), attempt }
    }

    pub fn tried(&self, step: &str, attempt: u32) -> bool {
        self.tasks.ended.contains_key(&self.task(step, attempt))
    }

    /// Carries a change out, unless it runs already or its last try says to wait or give up.
    pub fn act(&self, step: &str, attempt: u32, change: Change) -> Step {
        let task = self.task(step, attempt);
        match self.pause(&task) {
            Pause::None => Step::Act(Action::Change { task, change }),
            Pause::Running => Step::Doing(format!("{step} is under way")),
            Pause::Until(_, told) if self.done(&task) => Step::Doing(told.what),
            Pause::Until(_, told) => Step::Wait(told.what),
            Pause::GaveUp(told) => Step::Failed(told),
        }
    }

    fn done(&self, task: &TaskId) -> bool {
        matches!(self.tasks.ended.get(task), Some(Ended::Well { .. }))
    }

    fn pause(&self, task: &TaskId) -> Pause {
        if self.tasks.running.contains(task) {
            return Pause::Running;
        }
        match self.tasks.ended.get(task) {
            None => Pause::None,
            Some(Ended::Well { at, .. }) => {
                // Done, and still not observed: let the platform settle before the same is asked again.
                let until = at.plus(self.policy.observe_every);
                let told = Told {
                    class: Class::Transient,
                    what: format!("{} was done and is not observed yet", task.step),
                    advice: String::new(),
                };
                if self.now < until { Pause::Until(until, told) } else { Pause::None }
            }
            Some(Ended::Badly { told, tries, at }) => match told.class {
                Class::Permanent => Pause::GaveUp(told.clone()),
                Class::Transient | Class::Conflict | Class::Indeterminate => {
                    let doubled = self.policy.backoff_min.saturating_mul(1 << tries.saturating_sub(1).min(16));
                    let until = at.plus(doubled.min(self.policy.backoff_max));
                    if self.now < until { Pause::Until(until, told.clone()) } else { Pause::None }
                }
            },
        }
    }

    /// Revisions that no part of the record needs, other than the controller's own.
    pub fn strays_beside<'s>(
        &self,
        needed: &[Option<&Deployment>],
        seen: &'s Observation,
    ) -> impl Iterator<Item = (&'s RevisionId, &'s RevisionSeen)> {
        let r = self.record;
        let snapshot = r.snapshot.as_ref().map(|s| &s.deployment);
        let mine = match self.me {
            ControllerId::Revision(me) => Some(me.clone()),
            ControllerId::Host => None,
        };
        let needed: Vec<RevisionId> = needed
            .iter()
            .copied()
            .chain([r.serving.as_ref(), r.running.as_ref(), snapshot, r.phase.swap().map(|s| &s.to)])
            .flatten()
            .map(|d| d.revision.clone())
            .chain(mine)
            .collect();
        seen.revisions.iter().filter(move |(id, _)| !needed.contains(id))
    }

    /// The budget, once it is over.
    fn spent_of(&self, since: Millis, budget: u64) -> Option<u64> {
        (self.now.since(since) >= budget).then_some(budget)
    }
}

enum Pause {
    None,
    Running,
    Until(Millis, Told),
    GaveUp(Told),
}

/// What a look at the platform must find out for the next decision; `None` where none is needed.
pub fn ask(record: &Record) -> Option<Ask> {
    match &record.phase {
        Phase::Idle | Phase::Queued | Phase::Fetching | Phase::Building(_) | Phase::Patching(_) => None,
        Phase::RollingOut(swap) | Phase::Validating(swap) => Some(ask_swap(swap)),
        Phase::RollingBack(back) => Some(ask_swap(&back.swap)),
        Phase::Confirming(Confirming { swap, flip: None, .. }) => {
            // Blue is watched too, so that the way back is known to be warm when it is needed.
            let mut ask = ask_swap(swap);
            ask.direct.extend(swap.from.clone());
            Some(ask)
        }
        Phase::Confirming(Confirming { flip: Some(flip), .. }) => Some(ask_swap(&flip.swap)),
        Phase::Succeeded { .. }
        | Phase::FailedPre { .. }
        | Phase::FailedRollout { .. }
        | Phase::RolledBack { .. }
        | Phase::RollbackFailed { .. } => record.serving.is_some().then(Ask::default),
    }
}

fn ask_swap(swap: &Swap) -> Ask {
    let cut = swap.is_observed(Op::CutOver);
    Ask { direct: vec![swap.to.clone()], through: cut.then(|| swap.to.clone()) }
}

/// What to do next.
pub fn decide(view: &View<'_>) -> Decision {
    let record = view.record;
    if record.driver.controller != *view.me {
        return stand_by(view);
    }
    if let Some(decision) = make_way(view) {
        return decision;
    }
    match (&record.phase, &record.job) {
        (Phase::Queued, Some(_)) => over_budget(view, view.policy.budgets.queued, Decision::Record(Event::Claimed)),
        (Phase::Fetching, Some(_)) => {
            let done = |outcome: &Outcome| match outcome {
                Outcome::Fetched(fetched) => Some(Event::Fetched(fetched.clone())),
                Outcome::Built(_)
                | Outcome::Prepared(_)
                | Outcome::Stepped { .. }
                | Outcome::Changed
                | Outcome::CleanedUp
                | Outcome::Proved { .. }
                | Outcome::Purged(_) => None,
            };
            run(view, FETCH, Action::Fetch, view.policy.budgets.fetching, view.record.entered_at, done)
        }
        (Phase::Building(building), Some(job)) => decide_building(view, building, job),
        (Phase::Patching(patching), Some(job)) => {
            let done = |outcome: &Outcome| match outcome {
                Outcome::Prepared(prepared) => Some(prepared_event(view, job, &patching.images, prepared)),
                Outcome::Fetched(_)
                | Outcome::Built(_)
                | Outcome::Stepped { .. }
                | Outcome::Changed
                | Outcome::CleanedUp
                | Outcome::Proved { .. }
                | Outcome::Purged(_) => None,
            };
            run(view, PREPARE, Action::Prepare, view.policy.budgets.patching, view.record.entered_at, done)
        }
        (Phase::RollingOut(swap), Some(job)) => decide_rolling_out(view, swap, job),
        (Phase::Validating(swap), Some(job)) => decide_validating(view, swap, job),
        (Phase::Confirming(confirming), Some(_)) => decide_confirming(view, confirming),
        (Phase::RollingBack(back), _) => {
            let step = advance(view, &back.swap, Stage::Settled, true);
            let spent = view.spent_of(view.record.entered_at, view.policy.budgets.rolling_back);
            finish(view, &back.swap, step, Event::RolledBack, spent, "the rollback")
        }
        (
            Phase::Queued
            | Phase::Fetching
            | Phase::Building(_)
            | Phase::Patching(_)
            | Phase::RollingOut(_)
            | Phase::Validating(_)
            | Phase::Confirming(_),
            None,
        ) => Decision::Record(Event::Failed {
            fault: Told::permanent("the record has a phase without a job", "start the upgrade again"),
        }),
        (
            Phase::Idle
            | Phase::Succeeded { .. }
            | Phase::FailedPre { .. }
            | Phase::FailedRollout { .. }
            | Phase::RolledBack { .. }
            | Phase::RollbackFailed { .. },
            _,
        ) => resting::decide(view),
    }
}

/// A controller of a revision that nobody needs could never remove that revision, so it gives the wheel to the one that
/// serves, if that one is there.
fn make_way(view: &View<'_>) -> Option<Decision> {
    let record = view.record;
    let ControllerId::Revision(me) = view.me else {
        return None;
    };
    let swap = record.phase.swap().filter(|_| record.phase.state().in_flight());
    let needed = [
        record.serving.as_ref(),
        record.running.as_ref(),
        record.snapshot.as_ref().map(|s| &s.deployment),
        swap.map(|s| &s.to),
        swap.and_then(|s| s.from.as_ref()),
    ];
    if needed.into_iter().flatten().any(|d| d.revision == *me) {
        return None;
    }
    match hand_over(view, record.serving.as_ref()?)? {
        Step::Record(event) => Some(Decision::Record(event)),
        Step::Act(_) | Step::Wait(_) | Step::Doing(_) | Step::Proving(_) | Step::Reached | Step::Failed(_) => None,
    }
}

/// Who does not drive only observes, and takes over when the driver has gone quiet.
fn stand_by(view: &View<'_>) -> Decision {
    let driver = &view.record.driver;
    // A driver that was named but has not beaten yet gets the same patience, counted from its naming.
    let heard = view.presence(&driver.controller).map_or(driver.since, |p| p.at.max(driver.since));
    let until = heard.plus(view.policy.stale_driver);
    if view.now >= until {
        Decision::Record(Event::TookOver { by: view.me.clone() })
    } else {
        Decision::Wait { until: Some(until), why: format!("{} drives", driver.controller) }
    }
}

fn over_budget(view: &View<'_>, budget: u64, otherwise: Decision) -> Decision {
    match view.spent_of(view.record.entered_at, budget) {
        Some(budget) => failed_budget(view, budget, ""),
        None => otherwise,
    }
}

fn failed_budget(view: &View<'_>, budget: u64, why: &str) -> Decision {
    over(view, budget, why, "look at the log, mend the cause or raise the budget, and start again")
}

fn over(view: &View<'_>, budget: u64, why: &str, advice: &str) -> Decision {
    let state = view.record.phase.state().name();
    let why = if why.is_empty() { String::new() } else { format!("; last seen: {why}") };
    let what = format!("'{state}' took longer than its budget of {} s{why}", budget / 1_000);
    Decision::Record(Event::Failed { fault: Told::permanent(what, advice) })
}

/// What the last try of a task died of is the cause, and what to do about that is the advice; the time that passed is neither.
fn out_of_time(view: &View<'_>, budget: u64, task: &TaskId, doing: &str) -> Decision {
    let colon = if doing.is_empty() { "" } else { ": " };
    match view.tasks.ended.get(task) {
        Some(Ended::Badly { told, .. }) if told.advice.is_empty() => {
            failed_budget(view, budget, &format!("{doing}{colon}{}", told.what))
        }
        Some(Ended::Badly { told, .. }) => {
            let advice = format!("{}; then start again", told.advice);
            over(view, budget, &format!("{doing}{colon}{}", told.what), &advice)
        }
        Some(Ended::Well { .. }) | None if doing.is_empty() => failed_budget(view, budget, ""),
        Some(Ended::Well { .. }) | None => failed_budget(view, budget, &format!("{doing} was not done")),
    }
}

/// A task that turns into an event when it ends well, inside a budget. Its result counts before the budget does.
fn run(
    view: &View<'_>,
    step: &str,
    action: Action,
    budget: u64,
    since: Millis,
    done: impl FnOnce(&Outcome) -> Option<Event>,
) -> Decision {
    let task = view.task(step, 1);
    if let Some(Ended::Well { outcome, .. }) = view.tasks.ended.get(&task)
        && let Some(event) = done(outcome)
    {
        return Decision::Record(event);
    }
    let deadline = since.plus(budget);
    match view.pause(&task) {
        Pause::GaveUp(fault) => Decision::Record(Event::Failed { fault }),
        _ if view.now >= deadline => out_of_time(view, budget, &task, ""),
        Pause::None => Decision::Act(action),
        Pause::Running => Decision::Wait { until: Some(deadline), why: format!("{step} is under way") },
        Pause::Until(until, told) => Decision::Wait { until: Some(until.min(deadline)), why: told.what },
    }
}

fn decide_building(view: &View<'_>, building: &Building, job: &Job) -> Decision {
    let budget = view.policy.budgets.building;
    let mut wait: Option<(Millis, String)> = None;
    let mut busy = 0;
    let mut next = None;
    for component in building.fetched.recipes.keys() {
        let Some(build) = building.builds.get(component) else {
            next = next.or_else(|| Some(Event::BuildIntended { component: component.clone() }));
            continue;
        };
        if build.built.is_some() {
            continue;
        }
        busy += 1;
        let step = build_step(component);
        let task = view.task(&step, build.attempt);
        if let Some(Ended::Well { outcome: Outcome::Built(built), .. }) = view.tasks.ended.get(&task) {
            return Decision::Record(Event::BuildDone { component: component.clone(), built: built.clone() });
        }
        let deadline = build.intended_at.plus(budget);
        match view.pause(&task) {
            Pause::GaveUp(fault) => return Decision::Record(Event::Failed { fault }),
            _ if view.now >= deadline => {
                return out_of_time(view, budget, &task, &format!("the build of {component}"));
            }
            Pause::None => {
                let key = job.key(&step, build.attempt);
                return Decision::Act(Action::Build { component: component.clone(), attempt: build.attempt, key });
            }
            Pause::Running => sooner(&mut wait, deadline, format!("building {component}")),
            Pause::Until(until, told) => sooner(&mut wait, until.min(deadline), told.what),
        }
    }
    if building.images().is_some() {
        return Decision::Record(Event::BuildsComplete);
    }
    if let Some(event) = next.filter(|_| busy < view.policy.parallel_builds.max(1)) {
        return Decision::Record(event);
    }
    let (until, why) = wait.map_or((None, String::new()), |(until, why)| (Some(until), why));
    Decision::Wait { until, why }
}

fn sooner(wait: &mut Option<(Millis, String)>, until: Millis, why: String) {
    if wait.as_ref().is_none_or(|(at, _)| until < *at) {
        *wait = Some((until, why));
    }
}

fn prepared_event(view: &View<'_>, job: &Job, images: &crate::image::Images, prepared: &Prepared) -> Event {
    let record = view.record;
    if let (true, Some(reads)) = (prepared.plan.has_controller(), prepared.reads_format)
        && reads < record.min_reader
    {
        return Event::Failed {
            fault: Told::permanent(
                format!(
                    "the new release's Replank reads record format {reads}, and this record needs {}",
                    record.min_reader
                ),
                "choose a release with a newer Replank",
            ),
        };
    }
    let key = job.key("revision", 1);
    let Ok(revision) = revision_name(job, &key) else {
        return Event::Failed { fault: Told::permanent("the revision cannot be named", "report this") };
    };
    let mut plan = prepared.plan.clone();
    if job.downgrade.is_some() {
        crate::data::without_changes(&mut plan.data);
    }
    let to = Deployment {
        revision,
        key,
        version: job.target.version.clone(),
        commit: job.target.commit.clone(),
        images: images.clone(),
        plan,
        reads_format: prepared.reads_format,
    };
    let way_back = match &record.running {
        None => WayBack::FirstDeployment,
        Some(running) => WayBack::Snapshot(Box::new(Snapshot {
            deployment: running.clone(),
            taken_at: view.now,
            keep_until: view.now.plus(view.policy.keep_images),
            proved_at: view.now,
            lost: None,
            closed: crate::data::still_closed(record.snapshot.as_ref(), &running.revision),
            extra: BTreeMap::new(),
        })),
    };
    Event::Prepared { to: Box::new(to), way_back, escape_hatch: prepared.escape_hatch.clone() }
}

/// `v0-2-0-k3f9az2c`: readable in `docker ps` at night, and unique per job.
fn revision_name(job: &Job, key: &OpKey) -> Result<RevisionId, crate::words::BadWord> {
    let (major, minor, patch) = job.target.version.base();
    let key: String = key.as_str().chars().take(8).collect();
    RevisionId::new(format!("v{major}-{minor}-{patch}-{key}"))
}

/// When the driver next wants to look although nothing woke it.
fn look_again(view: &View<'_>, why: String) -> Decision {
    Decision::Wait { until: Some(view.now.plus(view.policy.observe_every)), why }
}

fn prove_again(view: &View<'_>, why: String) -> Decision {
    Decision::Wait { until: Some(view.now.plus(view.policy.prove_every)), why }
}

/// Success first, then the budget (lesson 3): what is up and answering well is late, not failed, and is carried to its end.
fn finish(view: &View<'_>, swap: &Swap, step: Step, reached: Event, spent: Option<u64>, what: &str) -> Decision {
    let well = || {
        let up = view.observation.is_some_and(|seen| fit(seen, &swap.to, swap.to.plan.early()) == Fit::Up);
        up && view.streaks.degraded(&swap.to, 1).is_none()
    };
    match (step, spent) {
        (Step::Reached, _) => Decision::Record(reached),
        (Step::Failed(fault), _) => Decision::Record(Event::Failed { fault }),
        (Step::Wait(why), Some(budget)) => failed_budget(view, budget, &why),
        (Step::Proving(why) | Step::Doing(why), Some(budget)) if !well() => failed_budget(view, budget, &why),
        (Step::Act(_), Some(budget)) if !well() => failed_budget(view, budget, &format!("{what} was still under way")),
        (Step::Record(Event::OpIntended { .. }), Some(budget)) if !well() => {
            failed_budget(view, budget, &format!("{what} was still under way"))
        }
        (Step::Record(event), _) => Decision::Record(event),
        (Step::Act(action), _) => Decision::Act(action),
        (Step::Wait(why) | Step::Doing(why), _) => look_again(view, why),
        (Step::Proving(why), _) => prove_again(view, why),
    }
}

/// A failed rollout is held, or rolled back by the system where the policy says so and there is a way.
fn rollout_failed(view: &View<'_>, job: &Job, decision: Decision) -> Decision {
    match (&decision, job.on_rollout_failure) {
        (Decision::Record(Event::Failed { fault }), OnRolloutFailure::Rollback)
            if crate::transition::reverse_of(view.record).is_some()
                && crate::data::closed_for(view.record).is_none() =>
        {
            let actor = crate::record::Actor::system();
            Decision::Record(Event::RollbackStarted { actor, reason: fault.what.clone(), data_restored: false })
        }
        _ => decision,
    }
}

fn landed_in_time(view: &View<'_>, swap: &Swap) -> Option<Decision> {
    let intent = swap.intended(Op::StartNew)?;
    let seen = view.observation?;
    let nothing = !seen.revisions.contains_key(&swap.to.revision);
    let late = view.now.since(intent.intended_at) >= view.policy.budgets.landing;
    (intent.observed_at.is_none() && nothing && late).then(|| {
        Decision::Record(Event::Failed {
            fault: Told::permanent(
                format!("the change never landed: nothing of revision {} was seen", swap.to.revision),
                "look at the engine's log, then start again",
            ),
        })
    })
}

fn decide_rolling_out(view: &View<'_>, swap: &Swap, job: &Job) -> Decision {
    if let Some(decision) = data::decide(view, swap, job) {
        return rollout_failed(view, job, decision);
    }
    let spent = view.spent_of(data::since(view, job), view.policy.budgets.rolling_out);
    let decision = match swap.mode {
        Mode::Single => {
            let step = advance(view, swap, Stage::Settled, false);
            finish(view, swap, step, Event::Completed, spent, "the rollout")
        }
        Mode::BlueGreen => {
            let step = advance(view, swap, Stage::Landed, false);
            finish(view, swap, step, Event::Landed, spent, "the rollout")
        }
    };
    let decision = match decision {
        Decision::Wait { .. } | Decision::Act(_) => landed_in_time(view, swap).unwrap_or(decision),
        Decision::Record(_) => decision,
    };
    rollout_failed(view, job, decision)
}

fn decide_validating(view: &View<'_>, swap: &Swap, job: &Job) -> Decision {
    let step = advance(view, swap, Stage::Proved, false);
    let spent = view.spent_of(view.record.entered_at, view.policy.budgets.validating);
    let decision = finish(view, swap, step, Event::CutOverIntended, spent, "the validation");
    rollout_failed(view, job, decision)
}

fn decide_confirming(view: &View<'_>, confirming: &Confirming) -> Decision {
    let budgets = &view.policy.budgets;
    if let Some(flip) = &confirming.flip {
        let step = advance(view, &flip.swap, Stage::Settled, true);
        let spent = view.spent_of(flip.since, budgets.convergence);
        return finish(view, &flip.swap, step, Event::FlippedBack, spent, "the flip back");
    }
    let swap = &confirming.swap;
    // A way back that the data have closed is not taken by the system: the old version would only fail on them too.
    let closed = crate::data::closed(swap, view.record.job.as_ref());
    let has_way_back = matches!(swap.way_back, WayBack::Snapshot(_)) && closed.is_none();
    let degraded = view.streaks.degraded(&swap.to, view.policy.degraded_after);
    if has_way_back && let Some(why) = degraded {
        return Decision::Record(Event::FlipIntended { why });
    }
    let Some(deadline) = confirming.deadline else {
        // Until the new side is observed to serve, everything counts against the cut-over's own grace.
        // A window without a way back would only be a wait.
        let window = if has_way_back { budgets.confirm_window } else { 0 };
        let reached = Event::Converged { deadline: view.now.plus(window) };
        let spent = view.spent_of(view.record.entered_at, budgets.convergence);
        let decision = finish(view, swap, advance(view, swap, Stage::Serving, false), reached, spent, "the cut-over");
        return match decision {
            // Traffic did move: the way back is to move it again, not to leave it on a revision that is not complete.
            Decision::Record(Event::Failed { fault }) if has_way_back && swap.is_observed(Op::CutOver) => {
                Decision::Record(Event::FlipIntended { why: fault.what })
            }
            other => other,
        };
    };
    let over = view.now >= deadline;
    // There is nothing to flip back to, and a window that never ends would tell nobody.
    if let Some(why) = degraded.filter(|_| over) {
        let what = format!("the new revision stopped answering inside its confirm window: {why}");
        let advice = match closed {
            Some(closed) => format!("{closed}: mend it with a newer release, or restore the data and roll back"),
            None => "mend it with a newer release".to_owned(),
        };
        return Decision::Record(Event::Failed { fault: Told::permanent(what, advice) });
    }
    let stage = if over && still_well(view, swap) { Stage::Settled } else { Stage::Serving };
    match advance(view, swap, stage, false) {
        Step::Reached if over && swap.is_observed(Op::Settle) => Decision::Record(Event::Completed),
        Step::Failed(why) if has_way_back => Decision::Record(Event::FlipIntended { why: why.what }),
        Step::Failed(fault) => Decision::Record(Event::Failed { fault }),
        Step::Record(event) => Decision::Record(event),
        Step::Act(action) => Decision::Act(action),
        Step::Wait(why) | Step::Doing(why) => look_again(view, why),
        Step::Proving(why) => prove_again(view, why),
        Step::Reached => look_again(view, "the confirm window is open".to_owned()),
    }
}

/// The last look of the confirm window must be a good one.
fn still_well(view: &View<'_>, swap: &Swap) -> bool {
    view.streaks.proved(&swap.to, view.policy.proofs) && view.streaks.through_proved(&swap.to, view.policy.proofs)
}
