//! The decision: given the record, one look at the platform, and the time, what to do next.
//!
//! It is called again after every change of anything. It keeps nothing between calls, so that the first call of a successor
//! is as good as the hundredth of its predecessor.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fault::{Class, Told};
use crate::phase::{Building, Built, Confirming, Fetched, Mode, Op, Phase, Swap, WayBack};
use crate::policy::Policy;
use crate::ports::{Ask, Change, Observation, Presence, Probed, RevisionSeen, Running};
use crate::record::{ControllerId, Deployment, Job, OnRolloutFailure, Overlap, Plan, Record, Snapshot};
use crate::swap::{Fit, Stage, Step, advance, fit, hand_over};
use crate::transition::Event;
use crate::words::{ComponentName, Millis, OpKey, RevisionId};

/// One thing to carry out in the world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    Fetch,
    Build {
        component: ComponentName,
        attempt: u32,
        key: OpKey,
    },
    /// Plan the new revision, and resolve, prove and protect the images of the way back.
    Prepare,
    Change {
        task: TaskId,
        change: Change,
    },
}

impl Action {
    /// The name of this action for the record that it was decided on.
    pub fn task(&self, record: &Record) -> TaskId {
        let named = |step: String, attempt| TaskId { job: job_of(record), step, attempt };
        match self {
            Self::Fetch => named(FETCH.to_owned(), 1),
            Self::Build { component, attempt, .. } => named(build_step(component), *attempt),
            Self::Prepare => named(PREPARE.to_owned(), 1),
            Self::Change { task, .. } => task.clone(),
        }
    }
}

const FETCH: &str = "fetch";
const PREPARE: &str = "prepare";

fn build_step(component: &ComponentName) -> String {
    format!("build-{component}")
}

fn job_of(record: &Record) -> String {
    record.job.as_ref().map(|j| j.id.to_string()).unwrap_or_default()
}

/// What an action is called while it runs: one job's step, and its attempt. Two actions with one name are one action.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId {
    pub job: String,
    pub step: String,
    pub attempt: u32,
}

/// What came of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Fetched(Fetched),
    Built(Built),
    Prepared(Box<Prepared>),
    Changed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    pub plan: Plan,
    /// Commands that put the old version back by hand.
    pub escape_hatch: Vec<String>,
    /// Format that the new controller's image reads, where it says so; `None` without a controller.
    pub reads_format: Option<u32>,
}

/// A task that ended. Failures carry how often it was tried, for the backoff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    Well { outcome: Outcome, at: Millis },
    Badly { told: Told, tries: u32, at: Millis },
}

/// The tasks of this process: what runs, and what ended since. A restarted process has none, and that is enough.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tasks {
    pub running: std::collections::BTreeSet<TaskId>,
    pub ended: BTreeMap<TaskId, Ended>,
}

/// Observations in a row, kept by the loop between turns.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Streaks {
    direct: BTreeMap<RevisionId, Streak>,
    /// The same, by those containers alone that may overlap: what a side that made room for another still has.
    warm: BTreeMap<RevisionId, Streak>,
    through: BTreeMap<RevisionId, Streak>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Streak {
    pub passed: u32,
    pub failed: u32,
    pub last: String,
    /// When the last counted look was.
    at: Option<Millis>,
}

impl Streak {
    /// Counting stops where it no longer matters.
    const ENOUGH: u32 = 1_000;

    /// Looks that come closer together than the policy's spacing count as one: three within a millisecond prove no more
    /// than one does, and condemn no more.
    fn see(&mut self, probed: &Probed, at: Millis, policy: &Policy) {
        let since = self.at.map(|last| at.since(last));
        match probed {
            Probed::NotAsked => {}
            Probed::Passed => {
                if self.passed == 0 || since.is_none_or(|gap| gap >= policy.prove_every) {
                    self.passed = (self.passed + 1).min(Self::ENOUGH);
                    self.at = Some(at);
                }
                self.failed = 0;
                self.last.clear();
            }
            Probed::Failed(why) => {
                if self.failed == 0 || since.is_none_or(|gap| gap >= policy.observe_every) {
                    self.failed = (self.failed + 1).min(Self::ENOUGH);
                    self.at = Some(at);
                }
                self.passed = 0;
                self.last.clone_from(why);
            }
        }
    }
}

impl Streaks {
    /// Counts one observation that was made for `ask`.
    pub fn see(&mut self, ask: &Ask, seen: &Observation, policy: &Policy) {
        let asked = |id: &RevisionId| ask.direct.iter().any(|d| d.revision == *id);
        // A streak means consecutive looks: what was not looked at starts over.
        self.direct.retain(|id, _| asked(id));
        self.warm.retain(|id, _| asked(id));
        for deployment in &ask.direct {
            let id = &deployment.revision;
            let probed = |fit| match (fit, seen.revisions.get(id)) {
                (Fit::Up, Some(revision)) => revision.probed.clone(),
                (Fit::Up, None) => Probed::NotAsked,
                (Fit::NotYet(why) | Fit::Crashed(why) | Fit::Foreign(why), _) => Probed::Failed(why),
            };
            let early = probed(fit(seen, deployment, deployment.plan.early()));
            self.direct.entry(id.clone()).or_default().see(&early, seen.at, policy);
            let allowed = deployment.plan.with_overlap(Overlap::Allowed);
            let warm = probed(fit(seen, deployment, allowed));
            self.warm.entry(id.clone()).or_default().see(&warm, seen.at, policy);
        }
        let through = ask.through.as_ref().map(|d| &d.revision);
        self.through.retain(|id, _| Some(id) == through);
        if let Some(id) = through {
            let probed = match &seen.traffic.revision {
                Some(serving) if serving == id => seen.traffic.probed.clone(),
                Some(other) => Probed::Failed(format!("traffic still goes to revision {other}")),
                None => Probed::Failed("traffic goes nowhere".to_owned()),
            };
            self.through.entry(id.clone()).or_default().see(&probed, seen.at, policy);
        }
    }

    pub fn proved(&self, d: &Deployment, proofs: u32) -> bool {
        self.direct.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    /// Answers well enough to take the traffic back, whatever else of it had to make room.
    pub fn warm(&self, d: &Deployment, proofs: u32) -> bool {
        self.warm.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    pub fn through_proved(&self, d: &Deployment, proofs: u32) -> bool {
        self.through.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    pub fn why(&self, d: &Deployment) -> String {
        why(self.direct.get(&d.revision), "the new revision's probes")
    }

    pub fn why_through(&self, d: &Deployment) -> String {
        why(self.through.get(&d.revision), "probes through the public way in")
    }

    /// The reason, when a revision was bad often enough in a row.
    pub fn degraded(&self, d: &Deployment, after: u32) -> Option<String> {
        [self.direct.get(&d.revision), self.through.get(&d.revision)]
            .into_iter()
            .flatten()
            .find(|s| s.failed >= after)
            .map(|s| s.last.clone())
    }
}

fn why(streak: Option<&Streak>, what: &str) -> String {
    match streak {
        Some(s) if s.failed > 0 => format!("{what} fail: {}", s.last),
        Some(s) => format!("{what} answered {} in a row", s.passed),
        None => format!("{what} were not asked yet"),
    }
}

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
                Outcome::Built(_) | Outcome::Prepared(_) | Outcome::Changed => None,
            };
            run(view, FETCH, Action::Fetch, view.policy.budgets.fetching, view.record.entered_at, done)
        }
        (Phase::Building(building), Some(job)) => decide_building(view, building, job),
        (Phase::Patching(patching), Some(job)) => {
            let done = |outcome: &Outcome| match outcome {
                Outcome::Prepared(prepared) => Some(prepared_event(view, job, &patching.images, prepared)),
                Outcome::Fetched(_) | Outcome::Built(_) | Outcome::Changed => None,
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
        ) => decide_resting(view),
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
    let state = view.record.phase.state().name();
    let why = if why.is_empty() { String::new() } else { format!("; last seen: {why}") };
    Decision::Record(Event::Failed {
        fault: Told::permanent(
            format!("'{state}' took longer than its budget of {} s{why}", budget / 1_000),
            "look at the log, mend the cause or raise the budget, and start again",
        ),
    })
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
        Pause::Until(_, told) if view.now >= deadline => failed_budget(view, budget, &told.what),
        _ if view.now >= deadline => failed_budget(view, budget, ""),
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
                // What the last try died of is the cause; the time that passed is not.
                let seen = match view.tasks.ended.get(&task) {
                    Some(Ended::Badly { told, .. }) => format!("the build of {component}: {}", told.what),
                    Some(Ended::Well { .. }) | None => format!("the build of {component} was not done"),
                };
                return failed_budget(view, budget, &seen);
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
    let to = Deployment {
        revision,
        key,
        version: job.target.version.clone(),
        commit: job.target.commit.clone(),
        images: images.clone(),
        plan: prepared.plan.clone(),
    };
    let way_back = match &record.running {
        None => WayBack::FirstDeployment,
        Some(running) => WayBack::Snapshot(Box::new(Snapshot {
            deployment: running.clone(),
            taken_at: view.now,
            keep_until: view.now.plus(view.policy.keep_images),
            proved_at: view.now,
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
            if crate::transition::reverse_of(view.record).is_some() =>
        {
            let actor = crate::record::Actor::system();
            Decision::Record(Event::RollbackStarted { actor, reason: fault.what.clone() })
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
    let spent = view.spent_of(view.record.entered_at, view.policy.budgets.rolling_out);
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
    let has_way_back = matches!(swap.way_back, WayBack::Snapshot(_));
    let degraded = view.streaks.degraded(&swap.to, view.policy.degraded_after);
    if let Some(why) = degraded.filter(|_| has_way_back) {
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

/// Between jobs: put right what a late effect changed, and retire what nobody needs any more.
fn decide_resting(view: &View<'_>) -> Decision {
    let record = view.record;
    let rest =
        |why: &str| Decision::Wait { until: Some(view.now.plus(view.policy.observe_at_rest)), why: why.to_owned() };
    let (Some(serving), Some(seen)) = (&record.serving, view.observation) else {
        return rest("at rest");
    };
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
        if record.generation <= traffic.generation {
            let why = "traffic was seen elsewhere than recorded".to_owned();
            return Decision::Record(Event::RepairIntended { why });
        }
        let change = Change::Shift { to: serving.clone(), generation: record.generation, fallback: None };
        let attempt = u32::try_from(record.generation).unwrap_or(u32::MAX);
        return as_decision(view.act("repair-traffic", attempt, change));
    }
    let is_proved = record.running.as_ref().is_some_and(|r| r.revision == serving.revision);
    // What serves without proof stays beside what was proved last, also where a later job failed before it touched anything:
    // the proved one is all that returns after a reboot.
    let held = !is_proved || matches!(record.phase, Phase::FailedRollout { .. } | Phase::RollbackFailed { .. });
    if held {
        if let Some(step) = one_of_each(view, serving, seen) {
            return as_decision(step);
        }
        return rest("held as it stands until an operator decides");
    }
    // A late stop takes the reboot policy away; an operator's own stop does not, and is left alone.
    let settled = seen.revisions.get(&serving.revision).is_some_and(|r| r.returns_alone);
    if !settled {
        if fit(seen, serving, serving.plan.containers.keys()) != Fit::Up {
            let containers = serving.plan.containers.keys().cloned().collect();
            return as_decision(view.act("repair-start", 1, Change::Start { deployment: serving.clone(), containers }));
        }
        if record.generation <= traffic.generation {
            let why = "the serving revision would not return after a reboot".to_owned();
            return Decision::Record(Event::RepairIntended { why });
        }
        let change = Change::Settle { deployment: serving.clone(), not: vec![], generation: record.generation };
        let attempt = u32::try_from(record.generation).unwrap_or(u32::MAX);
        return as_decision(view.act("repair-settle", attempt, change));
    }
    if let Some(step) = hand_over(view, serving) {
        return as_decision(step);
    }
    if let Some(step) = tidy_strays(view, seen) {
        return as_decision(step);
    }
    retire_snapshot(view, serving, seen).map_or_else(|| rest("at rest"), as_decision)
}

/// While a failure is held nothing is tidied, but a late start may not leave two of what may not overlap (lesson 35): the
/// one beside what serves stops.
fn one_of_each(view: &View<'_>, serving: &Deployment, seen: &Observation) -> Option<Step> {
    let record = view.record;
    let swap = record.phase.swap();
    let snapshot = record.snapshot.as_ref().map(|s| &s.deployment);
    let known = [swap.and_then(|s| s.from.as_ref()), swap.map(|s| &s.to), record.running.as_ref(), snapshot];
    let runs = |d: &Deployment, name: &crate::words::ContainerName| {
        let revision = seen.revisions.get(&d.revision);
        let container = revision.and_then(|r| r.containers.get(name));
        container.is_some_and(|c| c.running == Running::Running)
    };
    for beside in known.into_iter().flatten() {
        if beside.revision == serving.revision {
            continue;
        }
        let doubled: std::collections::BTreeSet<_> = beside
            .plan
            .containers
            .iter()
            .filter(|(name, c)| {
                let single = c.overlap != Overlap::Allowed && !c.controller;
                single && runs(beside, name) && runs(serving, name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        if !doubled.is_empty() {
            let change = Change::Stop { deployment: beside.clone(), containers: doubled };
            return Some(view.act("stop-doubled", 1, change));
        }
    }
    None
}

/// What nobody needs any more, most often a release that failed: stopped at once, and removed after a day, so that its
/// containers' logs are there for whoever asks why.
fn tidy_strays(view: &View<'_>, seen: &Observation) -> Option<Step> {
    view.strays_beside(&[], seen).find_map(|(id, there)| {
        let runs = there.containers.values().any(|c| c.running == Running::Running);
        let revision = id.clone();
        match there.stopped_at {
            _ if runs => Some(view.act("halt-stray", 1, Change::Halt { revision })),
            Some(at) if view.now.since(at) < view.policy.keep_containers => None,
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

impl Serialize for TaskId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}/{}", self.job, self.step, self.attempt))
    }
}

impl<'de> Deserialize<'de> for TaskId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut parts = text.rsplitn(3, '/');
        let attempt = parts.next().and_then(|a| a.parse().ok());
        match (attempt, parts.next(), parts.next()) {
            (Some(attempt), Some(step), Some(job)) => Ok(Self { job: job.to_owned(), step: step.to_owned(), attempt }),
            _ => Err(serde::de::Error::custom("a task is job/step/attempt")),
        }
    }
}
