//! A controller's turn and an operator's request, around the real `ask`, `see`, `decide` and `apply`.

use std::collections::BTreeMap;
use std::sync::Arc;

use replank_core::decide::{self, *};
use replank_core::event::Event;
use replank_core::format::{self, FORMAT};
use replank_core::phase::*;
use replank_core::policy::Policy;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::{apply, apply_as};
use replank_core::words::*;

use crate::support;
use crate::world::*;

/// Past every budget and window, and short of the day after which old containers are removed.
const LATE: Millis = Millis(7_200_000);
/// Past the time of a snapshot that was taken at the beginning.
const EXPIRED: Millis = Millis(KEEP_UNTIL.0 + 1);
const KEEP_UNTIL: Millis = Millis(90 * 24 * 3_600_000);
/// Past the patience with a silent driver, and short of every budget.
const IMPATIENT: Millis = Millis(20_000);
const LONG_AGO: Millis = Millis(-1_000_000);

pub fn policy() -> Policy {
    // Retired containers stay: what goes after a day is nobody's way back any more, and would only add states.
    Policy { proofs: 1, degraded_after: 1, start_attempts: 2, keep_containers: u64::MAX, ..Policy::default() }
}

/// What a local step of a turn may do instead of going well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    Well,
    Fails,
}

fn job(config: &Config, minor: u8) -> Job {
    let mut job = support::job(&format!("job-{minor}"), u64::from(minor), config.mode);
    job.on_rollout_failure = config.policy;
    job
}

/// Fetch, build and prepare touch nothing that others can see, so a turn carries them out on the spot.
fn local(config: &Config, world: &mut World, record: &Record, action: &Action) -> Outcome {
    let minor = record.job.as_ref().map_or(0, |j| j.target.version.minor);
    let digit = char::from_digit(u32::try_from(minor).unwrap(), 10).unwrap();
    match action {
        Action::Fetch => Outcome::Fetched(support::fetched()),
        Action::Build { .. } => Outcome::Built(Built {
            image: support::images(digit)[&support::app()].clone(),
            bases: BTreeMap::new(),
            queued_ms: 0,
            built_ms: 0,
            adopted: false,
        }),
        Action::Prepare => {
            world.protected = true;
            // What a new release's Replank reads is asked before it has a revision's name.
            let as_named = RevisionId::new(format!("v0-{minor}-0-new")).unwrap();
            let any = config.mutant == Some(Mutant::TakesAnyReader);
            let told = Some(if any { FORMAT + 1 } else { reads(config, &as_named) });
            Outcome::Prepared(Box::new(Prepared { plan: plan(config), escape_hatch: vec![], reads_format: told }))
        }
        Action::CleanUp => Outcome::CleanedUp,
        Action::Prove => Outcome::Proved { lost: String::new() },
        Action::Purge => Outcome::Purged(Purged::default()),
        Action::Step { .. } => unreachable!("no release of the model has data steps: the simulation's have"),
        Action::Change { .. } => unreachable!("a change is no local step"),
    }
}

fn local_task(record: &Record, action: &Action) -> TaskId {
    let (step, attempt) = match action {
        Action::Fetch => ("fetch".to_owned(), 1),
        Action::Build { component, attempt, .. } => (format!("build-{component}"), *attempt),
        Action::Prepare => ("prepare".to_owned(), 1),
        Action::CleanUp => ("clean-up".to_owned(), 1),
        Action::Prove => ("prove".to_owned(), 1),
        Action::Purge => ("purge".to_owned(), 1),
        Action::Step { step, .. } => (data_step(step), 1),
        Action::Change { task, .. } => return task.clone(),
    };
    TaskId { job: record.job.as_ref().unwrap().id.to_string(), step, attempt }
}

fn presences(config: &Config, world: &World, me: &RevisionId, now: Millis) -> Vec<Presence> {
    let presence = |(id, controller): (&RevisionId, &Controller)| Presence {
        controller: ControllerId::Revision(id.clone()),
        instance: String::new(),
        reads_format: reads(config, id),
        version: String::new(),
        at: if controller.silent && id != me { LONG_AGO } else { now },
    };
    world.controllers.iter().map(presence).collect()
}

/// The times that decisions put into events are made few, so that the world stays finite.
fn few_times(config: &Config, event: &mut Event) {
    match event {
        Event::Converged { deadline } => *deadline = Millis(300_000),
        Event::Prepared { way_back: WayBack::Snapshot(s), .. } => {
            let until = if config.formats == Formats::One { Millis(i64::MAX) } else { KEEP_UNTIL };
            (s.taken_at, s.keep_until, s.proved_at) = (Millis(0), until, Millis(0))
        }
        _ => {}
    }
}

/// Whether a revision's Replank can use the record. This build is asked itself, with the record as it would be stored.
fn is_readable(config: &Config, record: &Record, id: &RevisionId) -> bool {
    let reads = reads(config, id);
    if record.min_reader > FORMAT && reads == FORMAT {
        return format::read(&format::write(record).unwrap()).is_ok();
    }
    record.min_reader <= reads
}

/// Loads, looks, and decides; what was decided is carried out later. False where nothing came of it.
pub fn think(config: &Config, world: &mut World, id: &RevisionId, how: Local) -> bool {
    let record = Arc::clone(&world.record);
    let mut controller = world.controllers[id].clone();
    let woke = std::mem::take(&mut controller.silent);
    if !is_readable(config, &record, id) && config.mutant != Some(Mutant::ReadsBlindly) {
        // It beats on, so that people see it, and leaves everything alone until it is retired.
        world.controllers.insert(id.clone(), controller);
        return woke;
    }
    let mut me = ControllerId::Revision(id.clone());
    if config.mutant == Some(Mutant::ActsForTheDriver) {
        me = record.driver.controller.clone();
    }
    let drives = record.driver.controller == me;
    let driver_heard = world
        .controllers
        .iter()
        .any(|(id, c)| record.driver.controller == ControllerId::Revision(id.clone()) && !c.silent);
    let now = match (drives, world.late, driver_heard) {
        (true, true, _) => LATE,
        (true, false, _) | (false, _, true) => Millis(0),
        (false, _, false) => IMPATIENT,
    };
    let now = if drives && world.expired && !record.phase.state().in_flight() { EXPIRED } else { now };

    let asked = decide::ask(&record);
    let mut streaks = Streaks::default();
    let observation = asked.as_ref().map(|ask| {
        let mut seen = world.observe(ask, now);
        if let (Some(through), Some(traffic)) = (&ask.through, &seen.traffic.revision)
            && through.revision == *traffic
            && seen.traffic.probed == Probed::Passed
        {
            world.proved = true;
        }
        if config.mutant == Some(Mutant::ProbesUnasked) {
            seen.traffic.probed = Probed::Passed;
            for revision in seen.revisions.values_mut() {
                revision.probed = Probed::Passed;
            }
        }
        // One proof is enough in the model, so the streak of one look is all that any streak can say.
        streaks.see(ask, &seen, &policy());
        seen
    });
    let mut tasks = Tasks { running: controller.running.clone(), ended: BTreeMap::new() };
    for (task, badly) in &controller.ended {
        tasks.ended.insert(task.clone(), badly.ended());
    }
    let presences = presences(config, world, id, now);
    let policy = policy();
    let mut failed = false;
    // A phase before the swap needs one local step at most before it records something.
    let decision = loop {
        let view = View {
            record: &record,
            me: &me,
            now,
            policy: &policy,
            observation: observation.as_ref(),
            streaks: &streaks,
            presences: &presences,
            tasks: &tasks,
        };
        match decide::decide(&view) {
            Decision::Act(action @ (Action::Fetch | Action::Build { .. } | Action::Prepare)) => {
                let task = local_task(&record, &action);
                let ended = if how == Local::Fails {
                    failed = true;
                    Badly::ForGood.ended()
                } else {
                    let outcome = local(config, world, &record, &action);
                    Ended::Well { outcome, at: now }
                };
                tasks.ended.insert(task, ended);
            }
            // It touches nothing that a record speaks of, so that only the decision after it matters here.
            Decision::Act(action @ (Action::CleanUp | Action::Prove | Action::Purge)) => {
                let outcome = local(config, world, &record, &action);
                tasks.ended.insert(local_task(&record, &action), Ended::Well { outcome, at: now });
            }
            other => break other,
        }
    };
    if how == Local::Fails && !failed {
        return false;
    }
    let decision = mutated(config, world, &record, decision);
    if let Decision::Act(Action::Change { change, .. }) = &decision {
        world.broken |= judged(world, &record, id, change);
        if !is_readable(config, &record, id) {
            world.broken |= broken::BLIND;
        }
    }
    controller.pending = Thought::of(decision).map(|mut thought| {
        if let Thought::Record(event) = &mut thought {
            few_times(config, event);
        }
        Pending::new(thought)
    });
    let something = woke || controller.pending.is_some();
    world.controllers.insert(id.clone(), controller);
    something
}

/// What a decision to change the platform may never be.
fn judged(world: &World, record: &Record, me: &RevisionId, change: &Change) -> u16 {
    let mut bad = 0;
    let state = record.phase.state();
    if state.before_swap() {
        bad |= broken::TOUCHED_EARLY;
    }
    if let (State::RollingOut | State::Validating | State::Confirming, Some(before)) = (state, &world.ran_before) {
        let way_back = record.phase.swap().is_some_and(|swap| match &swap.way_back {
            WayBack::Snapshot(s) => s.deployment.revision == *before,
            WayBack::FirstDeployment => false,
        });
        if !way_back || !world.protected {
            bad |= broken::NO_WAY_BACK;
        }
    }
    let own = match change {
        Change::Halt { revision } | Change::Remove { revision } => revision == me,
        Change::Stop { deployment, containers } => deployment.revision == *me && containers.contains(&app()),
        Change::Start { .. } | Change::Shift { .. } | Change::Settle { .. } => false,
    };
    if own {
        bad |= broken::OWN_GOAL;
    }
    bad
}

fn mutated(config: &Config, world: &World, record: &Record, decision: Decision) -> Decision {
    let Some(mutant) = config.mutant else {
        return decision;
    };
    let nothing = || Decision::Wait { until: None, why: String::new() };
    let change = |change| {
        Decision::Act(Action::Change {
            task: TaskId { job: String::new(), step: "mutant".to_owned(), attempt: 1 },
            change,
        })
    };
    match (mutant, decision) {
        (Mutant::SuccessWithoutTraffic, Decision::Record(Event::OpIntended { op: Op::CutOver })) => {
            Decision::Record(Event::Completed)
        }
        (Mutant::RemovesWhatIsNeeded, Decision::Wait { .. })
            if record.phase.state() == State::Succeeded && record.snapshot.is_some() =>
        {
            let revision = record.snapshot.as_ref().unwrap().deployment.revision.clone();
            change(Change::Remove { revision })
        }
        (Mutant::StartsBeforeBuilt, Decision::Record(Event::BuildsComplete)) => {
            change(Change::Start { deployment: record.running.clone().unwrap(), containers: [app()].into() })
        }
        (Mutant::NoRepair, Decision::Act(_) | Decision::Record(Event::RepairIntended { .. }))
            if !record.phase.state().in_flight() =>
        {
            nothing()
        }
        (Mutant::NoTakeOver, Decision::Record(Event::TookOver { .. })) => nothing(),
        (Mutant::KeyPerProcess, Decision::Act(Action::Change { task, change })) => {
            let change = match change {
                Change::Start { mut deployment, containers } if deployment.version.minor > 1 => {
                    // The faults left tell one process from its predecessor.
                    let name = format!("{}-p{}", deployment.revision, world.faults);
                    deployment.revision = RevisionId::new(name).unwrap();
                    Change::Start { deployment, containers }
                }
                other => other,
            };
            Decision::Act(Action::Change { task, change })
        }
        (_, decision) => decision,
    }
}

/// Carries out what was decided: commits it, or sends the request on its way.
pub fn act(config: &Config, world: &mut World, id: &RevisionId) {
    let Some(pending) = world.controllers.get_mut(id).and_then(|c| {
        c.silent = false;
        c.pending.take()
    }) else {
        return;
    };
    match &*pending.decision {
        Thought::Record(event) => commit(config, world, Some(id), event, &pending),
        Thought::Change(task, change) => {
            let controller = world.controllers.get_mut(id).unwrap();
            controller.running.insert(task.clone());
            world.flights.push(Flight {
                change: Arc::new(change.clone()),
                task: task.clone(),
                waiting: Some(id.clone()),
            });
            world.flights.sort_by_cached_key(Flight::order);
        }
    }
}

/// What the event is applied to, with the forgery of the mutants that need one.
fn forged(config: &Config, base: &Record, event: &Event) -> Record {
    let mut base = base.clone();
    match (config.mutant, event) {
        (Some(Mutant::StartInFlight), Event::Start { .. }) => base.phase = Phase::Idle,
        (Some(Mutant::NoSnapshot), Event::Prepared { .. }) => base.running = None,
        (Some(Mutant::SuccessWithoutTraffic), Event::Completed) => {
            if let Phase::RollingOut(swap) = &mut base.phase {
                let state = swap.ops[&Op::StartNew].clone();
                swap.ops.insert(Op::CutOver, state.clone());
                swap.ops.insert(Op::Settle, state);
            }
        }
        _ => {}
    }
    base
}

/// A commit whose answer does not come: it was `taken`, or it was not. Whoever waited loads again, as if it had been refused.
pub fn loses_answer(config: &Config, world: &mut World, id: &RevisionId, taken: bool) {
    let controller = world.controllers.get_mut(id).unwrap();
    controller.silent = false;
    let Some(pending) = controller.pending.take() else { return };
    if let (Thought::Record(event), true) = (&*pending.decision, taken) {
        commit(config, world, Some(id), event, &pending);
    }
    if config.mutant == Some(Mutant::CommitsAgain)
        && let Some(controller) = world.controllers.get_mut(id)
    {
        controller.pending = Some(Pending { again: taken, ..pending });
    }
}

/// The format that a writer's build reads; in a world of one format there is no other.
fn reads_of(config: &Config, writer: Option<&RevisionId>) -> u32 {
    writer.filter(|_| config.formats != Formats::One).map_or(FORMAT, |id| reads(config, id))
}

/// `writer`: none for an operator's request, which whichever controller answers records.
fn commit(config: &Config, world: &mut World, writer: Option<&RevisionId>, event: &Event, pending: &Pending) {
    let stale = pending.base.as_ref();
    let current = Arc::clone(&world.record);
    let base = stale.unwrap_or(&current);
    if writer.is_some_and(|id| !is_readable(config, &current, id)) {
        world.broken |= broken::BLIND;
    }
    let mut event = event.clone();
    if let (Some(Mutant::NoSnapshot), Event::Prepared { way_back, .. }) = (config.mutant, &mut event) {
        *way_back = WayBack::FirstDeployment;
    }
    let forged = forged(config, base, &event);
    let writer_reads = reads_of(config, writer);
    let Ok(commit) = apply_as(&forged, &event, Millis(0), writer_reads) else {
        return;
    };
    let (mut record, mut lines) = (commit.record, commit.lines);
    if matches!((config.mutant, &event), (Some(Mutant::AuditDropped), Event::TookOver { .. })) {
        lines.clear();
    }
    // The record anchors what was written, and writing over a record that moved on loses the lines in between.
    let anchored = record.history.count - base.history.count;
    if lines.len() as u64 != anchored || lines.len() != 1 || stale.is_some() {
        world.broken |= broken::AUDIT_LOST;
    }
    record.history = Head::default();
    if config.mutant == Some(Mutant::RaisesAtOnce) {
        (record.format, record.min_reader) = (writer_reads.max(record.format), writer_reads.max(record.min_reader));
    }
    if needed(&record).any(|id| !is_readable(config, &record, id)) {
        world.broken |= broken::SHUT_OUT;
    }
    let repeats = |job: &Job| current.job.as_ref().is_some_and(|known| known.id == job.id);
    if pending.again || matches!(&event, Event::Start { job, .. } if repeats(job)) {
        world.broken |= broken::TWICE;
    }
    match &event {
        Event::Start { .. } => {
            world.expired = false;
            if current.phase.state().in_flight() {
                world.broken |= broken::JOB_REPLACED;
            }
            world.jobs += 1;
            world.ran_before = current.running.as_ref().map(|d| d.revision.clone());
            world.protected = false;
        }
        Event::Prepared { .. } => record.running.clone_from(&current.running),
        Event::SnapshotDropped { .. } => world.expired = false,
        // Commits have no time here, and the next day's look is as far as tomorrow.
        Event::WayBackProved { .. } => {
            if let Some(snapshot) = &mut record.snapshot {
                snapshot.proved_at = EXPIRED;
            }
        }
        Event::Completed | Event::FlippedBack | Event::RolledBack => {
            let running = record.running.as_ref().map(|d| &d.revision);
            let serves = running.and_then(|id| world.platform.revisions.get(id)).is_some_and(Revision::serves);
            if !world.proved || world.platform.traffic.as_ref() != running || !serves {
                world.broken |= broken::UNPROVED;
            }
        }
        _ => {}
    }
    if record.phase.state() != current.phase.state()
        || matches!(event, Event::FlipIntended { .. } | Event::Converged { .. })
    {
        world.late = false;
    }
    world.record = Arc::new(record);
    outdate(config, world, &current);
}

/// Everybody else's commit would now be refused, and a refused commit is as good as none: the turn begins again.
fn outdate(config: &Config, world: &mut World, base: &Arc<Record>) {
    let pendings = world
        .controllers
        .values_mut()
        .map(|c| &mut c.pending)
        .chain(world.operators.iter_mut().map(|o| &mut o.pending));
    for pending in pendings {
        let Some(waits) = pending else { continue };
        if !matches!(*waits.decision, Thought::Record(_)) {
            continue;
        }
        if config.mutant == Some(Mutant::NoCompareAndSwap) {
            waits.base.get_or_insert_with(|| Arc::clone(base));
        } else {
            *pending = None;
        }
    }
}

/// An operator's request is received: the record is loaded and the request is checked against it.
pub fn receive(config: &Config, world: &mut World, operator: usize) {
    let verb = world.operators[operator].script.remove(0);
    let event = match verb {
        Verb::Start(minor) => {
            let job = job(config, minor);
            // Asked again after a lost answer: the job that is there is the one that was asked for.
            let is_there = world.record.job.as_ref().is_some_and(|known| known.id == job.id);
            if is_there && config.mutant != Some(Mutant::StartsAgain) {
                return;
            }
            Event::Start { job: Box::new(job), override_quarantine: true }
        }
        Verb::Rollback => {
            Event::RollbackStarted { actor: Actor::system(), reason: String::new(), data_restored: false }
        }
    };
    if apply(&forged(config, &world.record, &event), &event, Millis(0)).is_ok() {
        world.operators[operator].pending = Some(Pending::new(Thought::Record(event)));
    }
}

/// ... and committed.
pub fn answer(config: &Config, world: &mut World, operator: usize) {
    if let Some(pending) = world.operators[operator].pending.take()
        && let Thought::Record(event) = &*pending.decision
    {
        commit(config, world, None, event, &pending);
    }
}

/// ... and committed or not, and the answer is lost: the request is looked at again.
pub fn answer_is_lost(config: &Config, world: &mut World, operator: usize, taken: bool) {
    let Some(pending) = world.operators[operator].pending.clone() else { return };
    let Thought::Record(event) = &*pending.decision else { return };
    let verb = match event {
        Event::Start { job, .. } => Verb::Start(u8::try_from(job.target.version.minor).unwrap()),
        _ => Verb::Rollback,
    };
    if taken {
        answer(config, world, operator);
    }
    let operator = &mut world.operators[operator];
    operator.pending = None;
    operator.script.insert(0, verb);
}

/// A task is over for who waited for it.
pub fn heard(world: &mut World, flight: &Flight, badly: Option<Badly>) {
    let Some(id) = &flight.waiting else { return };
    let Some(controller) = world.controllers.get_mut(id) else {
        return;
    };
    controller.running.remove(&flight.task);
    // Only the start of a new revision is ever asked about after its back-off is over.
    let kept = match badly {
        Some(Badly::ForGood) => Some(Badly::ForGood),
        Some(Badly::Perhaps) | None => flight.task.step.starts_with("start-new:").then_some(Badly::Perhaps),
    };
    if let Some(kept) = kept {
        controller.ended.insert(flight.task.clone(), kept);
    }
}
