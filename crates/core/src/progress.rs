//! How far a job is, in percent: phases weighed by how long they take, and never backwards (lesson 32).
//!
//! What is shown is what is recorded. The driver alone estimates, and records what it finds where that is more than before; so
//! two controllers never tell different things, and a successor that knows less than its predecessor takes nothing back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::history::Line;
use crate::phase::{Building, Confirming, Op, Phase, State, Swap};
use crate::ports::Progress;
use crate::predict::{Kind, Spread, predict};
use crate::record::{Deployment, Overlap, Record};
use crate::words::{ComponentName, Millis};

/// The whole way of a job, and of a phase, in the parts that are counted in here.
const WHOLE: u64 = 1_000_000;
/// Where a phase of exactly its usual length stands at its end by time alone. One that takes longer comes nearer to the end from
/// there on and never there.
const ON_TIME: u64 = 900_000;
/// Where a build stands after its last step: the image still has to be exported, and pushed.
const STEPS_DONE: u64 = 950_000;
/// In flight nothing is ever done.
const PERCENT_MAX: u32 = 99;

/// How far a job got, as it was recorded last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Reached {
    /// How long each phase of a job like this takes, in milliseconds, as it was known when the job began. Kept for the whole
    /// job, so that everybody who drives it counts alike. What is absent takes its usual time.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<State, u64>,
    #[serde(default)]
    pub percent: u32,
    /// The percent are those of the way back: a rollback starts its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub back: bool,
}

impl Reached {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a phase takes where too few jobs have told, in milliseconds: a small application on one machine. Of how a job is spread over
/// its phases only proportions matter.
fn usual(state: State) -> u64 {
    const SECOND: u64 = 1_000;
    match state {
        // It is claimed by the next turn of the loop.
        State::Queued => SECOND,
        // One shallow clone.
        State::Fetching => 5 * SECOND,
        // By far the most, unless a cache has all of it.
        State::Building => 120 * SECOND,
        // A few questions to the registry.
        State::Patching => 2 * SECOND,
        // Containers start, answer, and change places.
        State::RollingOut | State::RollingBack => 20 * SECOND,
        State::Validating => 10 * SECOND,
        // Contract §1: the confirm window.
        State::Confirming => 300 * SECOND,
        State::Idle
        | State::Succeeded
        | State::FailedPre
        | State::FailedRollout
        | State::RolledBack
        | State::RollbackFailed => 0,
    }
}

/// The weights of a job that begins now: medians of its kind where the history has at least three, what is usual otherwise.
pub fn weights(lines: &[Line], kind: Kind, confirm_window: u64) -> BTreeMap<State, u64> {
    let told = predict(lines, kind);
    let one = |(state, spread): (State, Option<Spread>)| {
        let usual = if state == State::Confirming { confirm_window } else { usual(state) };
        (state, spread.map_or(usual, |spread| spread.p50))
    };
    told.phases.into_iter().map(one).collect()
}

/// What clients see.
pub fn shown(record: &Record) -> u32 {
    let recorded = record.job.as_ref().map(|job| &job.reached);
    match &record.phase {
        Phase::Idle => 0,
        Phase::Succeeded { .. } | Phase::RolledBack { .. } => 100,
        // A rollback that an older Replank began has not said that it starts anew.
        Phase::RollingBack(_) => recorded.filter(|reached| reached.back).map_or(0, |reached| reached.percent),
        Phase::Queued
        | Phase::Fetching
        | Phase::Building(_)
        | Phase::Patching(_)
        | Phase::RollingOut(_)
        | Phase::Validating(_)
        | Phase::Confirming(_)
        // Nobody has taken back how far it came before it failed.
        | Phase::FailedPre { .. }
        | Phase::FailedRollout { .. }
        | Phase::RollbackFailed { .. } => recorded.map_or(0, |reached| reached.percent),
    }
}

/// What the driver has to record: its estimate, where that is more than what is recorded.
pub fn due(record: &Record, steps: &BTreeMap<ComponentName, Progress>, now: Millis) -> Option<u32> {
    let percent = percent(place(record, Some((steps, now)))?);
    (percent > shown(record)).then_some(percent)
}

/// Takes an event into what is recorded. `new` is the record with its new phase. What moves no job moves no progress.
pub(crate) fn note(new: &mut Record, old: &Phase, event: &Event) {
    if new.phase == *old && !matches!(event, Event::Start { .. } | Event::Progressed { .. }) {
        return;
    }
    let ended = matches!(new.phase, Phase::Succeeded { .. } | Phase::RolledBack { .. });
    let at_least = place(new, None).map_or(0, percent);
    let Some(job) = &mut new.job else { return };
    let reached = &mut job.reached;
    if matches!(event, Event::Start { .. } | Event::RollbackStarted { .. }) {
        (reached.percent, reached.back) = (0, matches!(event, Event::RollbackStarted { .. }));
    } else if let Event::Progressed { percent } = event {
        reached.percent = reached.percent.max((*percent).min(PERCENT_MAX));
    }
    reached.percent = if ended { 100 } else { reached.percent.max(at_least) };
}

fn percent(place: u64) -> u32 {
    let percent = place.saturating_mul(100) / WHOLE;
    u32::try_from(percent).unwrap_or(PERCENT_MAX).min(PERCENT_MAX)
}

/// How far the job is, in parts of [`WHOLE`]: by what is recorded alone, or also by the builders' steps and the time. `None` at rest.
pub fn place(record: &Record, seen: Option<(&BTreeMap<ComponentName, Progress>, Millis)>) -> Option<u64> {
    let job = record.job.as_ref()?;
    let state = record.phase.state();
    let by_time = |since: Millis, takes: u64| seen.map_or(0, |(_, now)| paced(now.since(since), takes));
    let weight = |state: State| job.reached.weights.get(&state).copied().unwrap_or_else(|| usual(state)).max(1);
    let by_clock = || by_time(record.entered_at, weight(state));
    let inside = match &record.phase {
        Phase::Queued | Phase::Fetching | Phase::Patching(_) | Phase::Validating(_) => by_clock(),
        Phase::Building(building) => {
            let unknown = |since| by_time(since, weight(state));
            built(building, seen.map(|(steps, _)| steps), unknown)
        }
        Phase::RollingOut(swap) => by_clock().max(moved(swap)),
        // Its end is known as soon as the cut-over was seen.
        Phase::Confirming(Confirming { deadline: Some(deadline), flip: None, .. }) => {
            by_time(record.entered_at, deadline.since(record.entered_at))
        }
        Phase::Confirming(Confirming { deadline: None, flip: None, .. }) => by_clock(),
        // It goes back by itself: forward it comes no further.
        Phase::Confirming(Confirming { flip: Some(_), .. }) => 0,
        // A way of its own, from its beginning.
        Phase::RollingBack(back) => {
            return Some(by_time(record.entered_at, weight(State::RollingOut)).max(moved(&back.swap)));
        }
        Phase::Idle
        | Phase::Succeeded { .. }
        | Phase::FailedPre { .. }
        | Phase::FailedRollout { .. }
        | Phase::RolledBack { .. }
        | Phase::RollbackFailed { .. } => return None,
    };
    let phases = Kind::of(job).phases();
    let until = |end: usize| phases[..end].iter().map(|state| weight(*state)).fold(0, u64::saturating_add);
    // Each kind of job goes through no other phases than its own.
    let at = phases.iter().position(|phase| *phase == state)?;
    let all = until(phases.len());
    let share = |weight: u64| part(weight, all, WHOLE);
    let (begin, end) = (share(until(at)), share(until(at + 1)));
    Some(begin + part(inside, WHOLE, end - begin))
}

/// `of / all` of `whole`. Nothing of nothing is nothing.
fn part(of: u64, all: u64, whole: u64) -> u64 {
    let part = (u128::from(of) * u128::from(whole)).checked_div(u128::from(all)).unwrap_or(0);
    u64::try_from(part).unwrap_or(whole).min(whole)
}

/// How far something is that has gone on for `passed` and usually takes `takes`: at its end never, however long it goes on.
fn paced(passed: u64, takes: u64) -> u64 {
    if passed <= takes { part(passed, takes, ON_TIME) } else { WHOLE - part(takes, passed, WHOLE - ON_TIME).max(1) }
}

/// Components that are built, and of the others as much as their builders say, or as the time says where those say nothing.
fn built(
    building: &Building,
    steps: Option<&BTreeMap<ComponentName, Progress>>,
    by_time: impl Fn(Millis) -> u64,
) -> u64 {
    let one = |name: &ComponentName| match building.builds.get(name) {
        None => 0,
        Some(build) if build.built.is_some() => WHOLE,
        Some(build) => match steps.and_then(|steps| steps.get(name)).filter(|steps| steps.total > 0) {
            Some(steps) => part(steps.done.into(), steps.total.into(), STEPS_DONE),
            None => by_time(build.intended_at),
        },
    };
    let components = &building.fetched.recipes;
    part(components.keys().map(one).sum(), components.len() as u64 * WHOLE, WHOLE)
}

/// How much of a swap was observed, by the operations that it has in this phase. The last one ends the phase, and so it is never
/// at the end.
fn moved(swap: &Swap) -> u64 {
    let has =
        |side: Option<&Deployment>, overlap| side.is_some_and(|side| side.plan.with_overlap(overlap).next().is_some());
    let is_planned = |op: &Op| match op {
        Op::StartNew | Op::CutOver | Op::Settle => true,
        // Only where an earlier job's change came late.
        Op::PinTraffic => false,
        Op::StopOld => has(swap.from.as_ref(), Overlap::StopOldFirst),
        Op::StopOldLate => has(swap.from.as_ref(), Overlap::StartAfterCutover),
        Op::StartNewLate => has(Some(&swap.to), Overlap::StartAfterCutover),
    };
    const OPS: [Op; 6] = [Op::StopOld, Op::StartNew, Op::CutOver, Op::StopOldLate, Op::StartNewLate, Op::Settle];
    let planned = OPS.iter().filter(|op| is_planned(op));
    let (all, done) = planned.fold((0, 0), |(all, done), op| (all + 1, done + u64::from(swap.is_observed(*op))));
    part(done, all, STEPS_DONE)
}
