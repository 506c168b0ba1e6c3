//! What decisions protect, each test named after the lesson or promise behind it.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use replank_core::decide::*;
use replank_core::fault::{Fault, Told};
use replank_core::phase::*;
use replank_core::policy::Policy;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::{Event, apply};
use replank_core::words::*;
use support::*;

/// A long time after everything: the controller was down for days.
const DAYS: i64 = 300_000_000;

fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

fn old() -> Deployment {
    deployment("job-0", 1)
}

fn new() -> Deployment {
    deployment("job-1", 2)
}

/// A platform that does what it is told, and everything that a decision may see.
struct Scene {
    record: Record,
    me: ControllerId,
    now: Millis,
    policy: Policy,
    seen: Observation,
    presences: Vec<Presence>,
    tasks: Tasks,
    /// Looks that were taken before the decision.
    looks: u32,
    healthy: bool,
}

fn scene(record: Record) -> Scene {
    Scene {
        me: record.driver.controller.clone(),
        record,
        now: Millis(0),
        policy: Policy::default(),
        seen: Observation {
            at: Millis(0),
            revisions: BTreeMap::new(),
            traffic: TrafficSeen { revision: None, generation: 1, fallback: None, probed: Probed::NotAsked },
        },
        presences: vec![],
        tasks: Tasks::default(),
        looks: 3,
        healthy: true,
    }
}

impl Scene {
    fn at(mut self, now: i64) -> Self {
        self.now = Millis(now);
        self
    }

    fn sick(mut self) -> Self {
        self.healthy = false;
        self
    }

    fn looks(mut self, looks: u32) -> Self {
        self.looks = looks;
        self
    }

    fn traffic(mut self, to: &Deployment, generation: u64) -> Self {
        self.seen.traffic.revision = Some(to.revision.clone());
        self.seen.traffic.generation = generation;
        self
    }

    /// Containers of a deployment: `true` runs, `false` stopped.
    fn with(mut self, d: &Deployment, containers: &[(&str, bool)], alone: bool) -> Self {
        for (container, runs) in containers {
            self.put(d, &name(container), *runs);
        }
        self.seen.revisions.get_mut(&d.revision).unwrap().returns_alone = alone;
        self
    }

    fn put(&mut self, d: &Deployment, container: &ContainerName, runs: bool) {
        let revision = self.seen.revisions.entry(d.revision.clone()).or_insert_with(|| RevisionSeen {
            key: Some(d.key.clone()),
            commit: Some(d.commit.clone()),
            containers: BTreeMap::new(),
            probed: Probed::NotAsked,
            returns_alone: false,
            stopped_at: None,
        });
        let container_seen = ContainerSeen {
            image: d.images[&app()].clone(),
            running: if runs { Running::Running } else { Running::Stopped },
            exit_code: None,
            trouble: None,
        };
        revision.containers.insert(container.clone(), container_seen);
        let any = revision.containers.values().any(|c| c.running == Running::Running);
        revision.stopped_at = (!any).then_some(Millis(0));
    }

    fn heard(mut self, who: &Deployment, at: i64, reads_format: u32) -> Self {
        self.presences.push(Presence {
            controller: ControllerId::Revision(who.revision.clone()),
            instance: String::new(),
            reads_format,
            version: String::new(),
            at: Millis(at),
        });
        self
    }

    fn ended(mut self, step: &str, ended: Ended) -> Self {
        self.tasks.ended.insert(task(step), ended);
        self
    }

    fn decide(&self) -> Decision {
        let mut streaks = Streaks::default();
        let asked = ask(&self.record);
        let observation = asked.map(|ask| {
            let mut seen = self.seen.clone();
            let probed = if self.healthy { Probed::Passed } else { Probed::Failed("no answer".to_owned()) };
            for direct in &ask.direct {
                if let Some(revision) = seen.revisions.get_mut(&direct.revision) {
                    revision.probed = probed.clone();
                }
            }
            if ask.through.is_some() {
                seen.traffic.probed = probed;
            }
            for look in 0..self.looks {
                seen.at = self.now.plus(u64::from(look) * self.policy.observe_every);
                streaks.see(&ask, &seen, &self.policy);
            }
            seen
        });
        decide(&View {
            record: &self.record,
            me: &self.me,
            now: self.now,
            policy: &self.policy,
            observation: observation.as_ref(),
            streaks: &streaks,
            presences: &self.presences,
            tasks: &self.tasks,
        })
    }

    fn carry_out(&mut self, change: &Change) -> String {
        let list = |names: &BTreeSet<ContainerName>| {
            let names: Vec<&str> = names.iter().map(ContainerName::as_str).collect();
            names.join("+")
        };
        let side = |d: &Deployment| {
            if *d.revision.as_str() == *old().revision.as_str() { "old" } else { "new" }
        };
        match change {
            Change::Start { deployment, containers } => {
                for container in containers {
                    self.put(deployment, container, true);
                }
                format!("start {} {}", side(deployment), list(containers))
            }
            Change::Stop { deployment, containers } => {
                for container in containers {
                    self.put(deployment, container, false);
                }
                format!("stop {} {}", side(deployment), list(containers))
            }
            Change::Shift { to, generation, .. } => {
                self.seen.traffic.revision = Some(to.revision.clone());
                self.seen.traffic.generation = *generation;
                format!("shift {}", side(to))
            }
            Change::Settle { deployment, generation, .. } => {
                self.seen.traffic.generation = *generation;
                for (id, revision) in &mut self.seen.revisions {
                    revision.returns_alone = *id == deployment.revision;
                }
                format!("settle {}", side(deployment))
            }
            Change::Halt { revision } => {
                let now = self.now;
                if let Some(there) = self.seen.revisions.get_mut(revision) {
                    there.containers.values_mut().for_each(|c| c.running = Running::Stopped);
                    (there.returns_alone, there.stopped_at) = (false, Some(now));
                }
                format!("halt {revision}")
            }
            Change::Remove { revision } => {
                self.seen.revisions.remove(revision);
                format!("remove {revision}")
            }
        }
    }

    /// Goes on until the job is over; every change is once seen to be under way. Says what was changed, in order.
    fn ends_as(mut self) -> (State, Vec<String>) {
        let mut changes = vec![];
        for _ in 0..100 {
            if !self.record.phase.state().in_flight() {
                return (self.record.phase.state(), changes);
            }
            self.me = self.record.driver.controller.clone();
            match self.decide() {
                Decision::Record(event) => {
                    self.record = apply(&self.record, &event, self.now).unwrap().record;
                }
                Decision::Act(Action::Change { task, change }) => {
                    self.tasks.running.insert(task);
                    let under_way = self.decide();
                    assert!(matches!(under_way, Decision::Wait { .. }), "{under_way:?}");
                    self.tasks.running.clear();
                    changes.push(self.carry_out(&change));
                }
                Decision::Act(other) => panic!("{other:?}"),
                Decision::Wait { until, .. } => {
                    // Only the confirm window is waited for.
                    let state = self.record.phase.state();
                    assert_eq!(state, State::Confirming);
                    self.now = until.unwrap().max(self.now.plus(1_000));
                    for presence in &mut self.presences {
                        presence.at = self.now;
                    }
                    if let Phase::Confirming(Confirming { deadline: Some(at), .. }) = &self.record.phase {
                        self.now = self.now.max(*at);
                    }
                }
            }
        }
        panic!("no end: {:?}", self.record.phase);
    }
}

fn task(step: &str) -> TaskId {
    TaskId { job: "job-1".to_owned(), step: step.to_owned(), attempt: 1 }
}

fn badly(fault: Fault, tries: u32, at: i64) -> Ended {
    Ended::Badly { told: fault.told(), tries, at: Millis(at) }
}

fn failed(decision: &Decision) -> Option<&Told> {
    match decision {
        Decision::Record(Event::Failed { fault }) => Some(fault),
        _ => None,
    }
}

fn swap_of(record: &mut Record) -> &mut Swap {
    match &mut record.phase {
        Phase::RollingOut(swap) | Phase::Validating(swap) => swap,
        Phase::Confirming(c) => &mut c.swap,
        Phase::RollingBack(back) => &mut back.swap,
        other => panic!("{other:?}"),
    }
}

/// A record whose swap has done exactly `ops`.
fn swapping(state: State, mode: Mode, ops: &[Op]) -> Record {
    let mut record = record_in(state, mode);
    if let Phase::Confirming(c) = &mut record.phase {
        c.flip = None;
    }
    swap_of(&mut record).ops.retain(|op, _| ops.contains(op));
    record.generation = 1;
    record
}

const FULL: &[(&str, bool)] = &[("app", true), ("worker", true)];
const NO_WORKER: &[(&str, bool)] = &[("app", true), ("worker", false)];

#[test]
fn lesson_2_the_budget_counts_from_the_moment_the_phase_was_entered() {
    let budgets = Policy::default().budgets;
    let entered = 5_000_000;
    for (state, mode, ops, budget) in [
        (State::Queued, Mode::Single, &[][..], budgets.queued),
        (State::Fetching, Mode::Single, &[], budgets.fetching),
        (State::Patching, Mode::Single, &[], budgets.patching),
        (State::RollingOut, Mode::Single, &[Op::StopOld, Op::StartNew][..], budgets.rolling_out),
        (State::Validating, Mode::BlueGreen, &[Op::StopOld, Op::StartNew], budgets.validating),
        (State::RollingBack, Mode::Single, &[Op::StopOld, Op::StartNew], budgets.rolling_back),
    ] {
        let check = |after: u64, fails: bool| {
            let record = if state.before_swap() { record_in(state, mode) } else { swapping(state, mode, ops) };
            let mut scene =
                scene(record).with(&old(), FULL, true).with(&new(), FULL, false).traffic(&old(), 1).sick().at(entered);
            scene.record.entered_at = Millis(entered);
            scene.now = scene.now.plus(after);
            let decision = scene.decide();
            assert_eq!(failed(&decision).is_some(), fails, "{} after {after}: {decision:?}", state.name());
        };
        check(0, false);
        check(budget - 1, false);
        check(budget, true);
    }
}

#[test]
fn lesson_2_a_build_has_its_own_budget_from_its_own_intent() {
    let budget = Policy::default().budgets.building;
    for (after, fails) in [(budget - 1, false), (budget, true)] {
        let mut record = record_in(State::Building, Mode::Single);
        let Phase::Building(building) = &mut record.phase else { unreachable!() };
        let build = building.builds.get_mut(&app()).unwrap();
        (build.built, build.intended_at) = (None, Millis(7_000_000));
        let mut scene = scene(record).at(7_000_000);
        scene.now = scene.now.plus(after);
        assert_eq!(failed(&scene.decide()).is_some(), fails, "after {after}");
    }
}

#[test]
fn lesson_3_success_comes_before_the_budget_however_late() {
    for (state, mode, ops, ends) in [
        (State::RollingOut, Mode::Single, &[Op::StopOld, Op::StartNew][..], State::Succeeded),
        (State::RollingOut, Mode::BlueGreen, &[Op::StopOld, Op::StartNew], State::Succeeded),
        (State::Validating, Mode::BlueGreen, &[Op::StopOld, Op::StartNew], State::Succeeded),
        (State::Confirming, Mode::BlueGreen, &[Op::StopOld, Op::StartNew], State::Succeeded),
    ] {
        let scene = scene(swapping(state, mode, ops))
            .with(&old(), NO_WORKER, false)
            .with(&new(), FULL, false)
            .traffic(&old(), 1)
            .heard(&old(), DAYS, 1)
            .heard(&new(), DAYS, 1)
            .at(DAYS);
        assert_eq!(scene.ends_as().0, ends, "{} {mode:?}", state.name());
    }
    let scene = scene(swapping(State::RollingBack, Mode::Single, &[Op::StopOld, Op::StartNew]))
        .with(&old(), FULL, false)
        .with(&new(), NO_WORKER, true)
        .traffic(&new(), 1)
        .heard(&old(), DAYS, 1)
        .heard(&new(), DAYS, 1)
        .at(DAYS);
    assert_eq!(scene.ends_as().0, State::RolledBack);
}

#[test]
fn a_change_that_never_lands_fails_after_its_own_120_seconds() {
    let check = |now, seen: bool, fails: bool| {
        let mut record = swapping(State::RollingOut, Mode::Single, &[Op::StopOld, Op::StartNew]);
        swap_of(&mut record).ops.get_mut(&Op::StartNew).unwrap().observed_at = None;
        let mut scene = scene(record).with(&old(), NO_WORKER, true).traffic(&old(), 1).at(now);
        if seen {
            scene = scene.with(&new(), &[("app", false)], false);
        }
        let decision = scene.decide();
        assert_eq!(failed(&decision).is_some(), fails, "at {now}, seen {seen}: {decision:?}");
    };
    check(119_999, false, false);
    check(120_000, false, true);
    check(120_000, true, false);
}

#[test]
fn a_failed_rollout_is_held_or_rolled_back_as_the_policy_says() {
    let decide = |policy, way_back: bool| {
        let mut record = swapping(State::Validating, Mode::BlueGreen, &[Op::StopOld, Op::StartNew]);
        record.job.as_mut().unwrap().on_rollout_failure = policy;
        if !way_back {
            swap_of(&mut record).way_back = WayBack::FirstDeployment;
        }
        scene(record)
            .with(&old(), NO_WORKER, true)
            .with(&new(), FULL, false)
            .traffic(&old(), 1)
            .sick()
            .at(DAYS)
            .decide()
    };
    assert!(failed(&decide(OnRolloutFailure::Hold, true)).is_some());
    assert!(failed(&decide(OnRolloutFailure::Rollback, false)).is_some());
    match decide(OnRolloutFailure::Rollback, true) {
        Decision::Record(Event::RollbackStarted { actor, .. }) => {
            assert_eq!(actor, Actor::system())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_confirm_window_flips_back_after_three_bad_looks_and_only_with_a_way_back() {
    for (looks, way_back, flips) in [(2, true, false), (3, true, true), (3, false, false)] {
        let ops = [Op::StopOld, Op::StartNew, Op::CutOver];
        let mut record = swapping(State::Confirming, Mode::BlueGreen, &ops);
        record.driver.controller = ControllerId::Revision(new().revision);
        let Phase::Confirming(c) = &mut record.phase else { unreachable!() };
        c.deadline = Some(Millis(300_000));
        if !way_back {
            c.swap.way_back = WayBack::FirstDeployment;
        }
        let scene = scene(record)
            .with(&old(), NO_WORKER, true)
            .with(&new(), FULL, false)
            .traffic(&new(), 1)
            .sick()
            .looks(looks);
        let decision = scene.decide();
        let flipped = matches!(decision, Decision::Record(Event::FlipIntended { .. }));
        assert_eq!(flipped, flips, "{looks} looks, way back {way_back}: {decision:?}");
    }
}

#[test]
fn traffic_that_a_late_effect_moved_is_put_right_at_rest() {
    let decide = |generation| {
        let mut record = record_in(State::Succeeded, Mode::Single);
        record.generation = generation;
        scene(record).with(&old(), FULL, true).with(&new(), FULL, false).traffic(&new(), 5).decide()
    };
    // First a generation above what is there, recorded; then the change under it.
    assert!(matches!(decide(5), Decision::Record(Event::RepairIntended { .. })));
    match decide(6) {
        Decision::Act(Action::Change { change: Change::Shift { to, generation: 6, .. }, .. }) => {
            assert_eq!(to.revision, old().revision);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_held_failure_is_left_as_it_stands() {
    let stray = deployment("job-8", 7);
    let decision = scene(record_in(State::FailedRollout, Mode::BlueGreen))
        .with(&old(), NO_WORKER, false)
        .with(&new(), FULL, false)
        .with(&stray, FULL, false)
        .traffic(&old(), 1)
        .decide();
    assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
}

#[test]
fn what_failed_is_stopped_at_once_and_kept_for_its_logs() {
    let keep = i64::try_from(scene(record_in(State::Succeeded, Mode::BlueGreen)).policy.keep_containers).unwrap();
    let check = |containers: &[(&str, bool)], now: i64, expect: Option<Change>| {
        let stray = deployment("job-8", 7);
        let decision = scene(record_in(State::Succeeded, Mode::BlueGreen))
            .at(now)
            .heard(&old(), now, 2)
            .with(&old(), FULL, true)
            .with(&stray, containers, false)
            .traffic(&old(), 1)
            .decide();
        match (decision, expect) {
            (Decision::Act(Action::Change { change, .. }), Some(expect)) => assert_eq!(change, expect, "at {now}"),
            (Decision::Wait { .. }, None) => {}
            other => panic!("{containers:?} at {now}: {other:?}"),
        }
    };
    let revision = || deployment("job-8", 7).revision;
    let stopped: Vec<(&str, bool)> = FULL.iter().map(|(name, _)| (*name, false)).collect();
    check(FULL, 0, Some(Change::Halt { revision: revision() }));
    check(FULL, keep, Some(Change::Halt { revision: revision() }));
    // A late start of one container is halted again.
    check(NO_WORKER, 0, Some(Change::Halt { revision: revision() }));
    check(&stopped, 0, None);
    check(&stopped, keep - 1, None);
    check(&stopped, keep, Some(Change::Remove { revision: revision() }));
}

#[test]
fn what_is_kept_does_not_hide_what_still_runs() {
    let (kept, runs) = (deployment("job-8", 7), deployment("job-9", 8));
    let stopped: Vec<(&str, bool)> = FULL.iter().map(|(name, _)| (*name, false)).collect();
    for (first, second) in [(&kept, &runs), (&runs, &kept)] {
        let decision = scene(record_in(State::Succeeded, Mode::BlueGreen))
            .heard(&old(), 0, 2)
            .with(&old(), FULL, true)
            .with(first, &stopped, false)
            .with(second, FULL, false)
            .traffic(&old(), 1)
            .decide();
        match decision {
            Decision::Act(Action::Change { change: Change::Halt { revision }, .. }) => {
                assert_eq!(revision, second.revision);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_never_ran_is_removed_at_once() {
    let stray = deployment("job-8", 7);
    let mut scene = scene(record_in(State::Succeeded, Mode::BlueGreen))
        .heard(&old(), 0, 2)
        .with(&old(), FULL, true)
        .with(&stray, FULL, false)
        .traffic(&old(), 1);
    let there = scene.seen.revisions.get_mut(&stray.revision).unwrap();
    there.containers.values_mut().for_each(|c| c.running = Running::Created);
    there.stopped_at = None;
    match scene.decide() {
        Decision::Act(Action::Change { change: Change::Remove { revision }, .. }) => {
            assert_eq!(revision, stray.revision);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn lesson_35_a_late_start_leaves_no_two_workers_even_while_a_failure_is_held() {
    let decision = scene(record_in(State::FailedRollout, Mode::BlueGreen))
        .with(&old(), FULL, true)
        .with(&new(), FULL, false)
        .traffic(&old(), 1)
        .decide();
    match decision {
        Decision::Act(Action::Change { change: Change::Stop { deployment, containers }, .. }) => {
            assert_eq!(deployment.revision, new().revision);
            assert_eq!(containers, BTreeSet::from([name("worker")]));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_silent_driver_keeps_the_wheel_for_15_seconds() {
    for (heard, since, now, takes) in [
        (Some(1_000), 0, 15_999, false),
        (Some(1_000), 0, 16_000, true),
        // Named and not heard yet: the same patience, counted from the naming.
        (None, 2_000, 16_999, false),
        (None, 2_000, 17_000, true),
        (Some(1_000), 9_000, 23_999, false),
    ] {
        let mut scene = scene(record_in(State::Fetching, Mode::Single)).at(now);
        scene.record.driver.since = Millis(since);
        scene.me = ControllerId::Revision(new().revision);
        if let Some(at) = heard {
            scene = scene.heard(&old(), at, 1);
        }
        let took = matches!(&scene.decide(), Decision::Record(Event::TookOver { by }) if *by == scene.me);
        assert_eq!(took, takes, "heard {heard:?}, since {since}, now {now}");
    }
}

fn building(components: &[&str], begun: usize) -> Record {
    let mut record = record_in(State::Building, Mode::Single);
    let recipe = fetched().recipes[&app()].clone();
    let component = |c: &&str| ComponentName::new(*c).unwrap();
    let build = Build { attempt: 1, intended_at: Millis(0), built: None };
    record.phase = Phase::Building(Building {
        fetched: Fetched {
            recipes: components.iter().map(|c| (component(c), recipe.clone())).collect(),
            manifest: serde_json::Value::Null,
        },
        builds: components[..begun].iter().map(|c| (component(c), build.clone())).collect(),
    });
    record
}

#[test]
fn no_more_builds_run_at_once_than_allowed() {
    for (begun, limit, begins) in [(0, 2, true), (1, 2, true), (2, 2, false), (2, 3, true), (0, 0, true)] {
        let mut scene = scene(building(&["a", "b", "c"], begun));
        scene.policy.parallel_builds = limit;
        for component in &["a", "b", "c"][..begun] {
            scene.tasks.running.insert(task(&format!("build-{component}")));
        }
        let decision = scene.decide();
        let began = matches!(decision, Decision::Record(Event::BuildIntended { .. }));
        assert_eq!(began, begins, "{begun} of {limit}: {decision:?}");
    }
}

#[test]
fn a_transient_build_failure_is_tried_again_under_the_same_key() {
    let key = record_in(State::Building, Mode::Single).job.unwrap().key("build-a", 1);
    // Waits 1 s after the first try, doubled after each, and 30 s at most.
    for (tries, wait) in [(1, 1_000), (2, 2_000), (4, 8_000), (9, 30_000)] {
        let decide = |now| {
            scene(building(&["a"], 1)).ended("build-a", badly(Fault::transient("busy"), tries, 0)).at(now).decide()
        };
        match decide(wait - 1) {
            Decision::Wait { until, .. } => assert_eq!(until, Some(Millis(wait))),
            other => panic!("{other:?}"),
        }
        match decide(wait) {
            Decision::Act(Action::Build { attempt: 1, key: again, .. }) => assert_eq!(again, key),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_permanent_failure_fails_the_phase_now() {
    for (state, step) in [
        (State::Fetching, "fetch".to_owned()),
        (State::Building, "build-a".to_owned()),
        (State::Patching, "prepare".to_owned()),
        (State::RollingOut, format!("start-new:{}", new().revision)),
    ] {
        let record = match state {
            State::Building => building(&["a"], 1),
            State::RollingOut => {
                let mut record = swapping(state, Mode::Single, &[Op::StopOld, Op::StartNew]);
                swap_of(&mut record).ops.get_mut(&Op::StartNew).unwrap().observed_at = None;
                record
            }
            other => record_in(other, Mode::Single),
        };
        let scene =
            scene(record).with(&old(), NO_WORKER, true).ended(&step, badly(Fault::permanent("no such image"), 1, 0));
        let decision = scene.decide();
        assert_eq!(failed(&decision).map(|f| f.what.as_str()), Some("no such image"), "{}", state.name());
    }
}

#[test]
fn the_wheel_is_handed_to_a_controller_that_reports_in_and_can_read_the_record() {
    #[derive(Debug, PartialEq)]
    enum Then {
        Waits,
        HandsOver,
        FlipsBack,
    }
    for (heard, reads, then) in [
        (None, 1, Then::Waits),
        (Some(0), 1, Then::Waits),
        (Some(20_000), 1, Then::HandsOver),
        (Some(20_000), 2, Then::HandsOver),
        (Some(20_000), 0, Then::FlipsBack),
    ] {
        let ops = [Op::StopOld, Op::StartNew, Op::CutOver];
        let mut scene = scene(swapping(State::Confirming, Mode::BlueGreen, &ops))
            .with(&old(), NO_WORKER, true)
            .with(&new(), FULL, false)
            .traffic(&new(), 1)
            .at(20_000);
        if let Some(at) = heard {
            scene = scene.heard(&new(), at, reads);
        }
        let got = match scene.decide() {
            Decision::Wait { .. } => Then::Waits,
            Decision::Record(Event::HandedOver { .. }) => Then::HandsOver,
            Decision::Record(Event::FlipIntended { .. }) => Then::FlipsBack,
            other => panic!("{other:?}"),
        };
        assert_eq!(got, then, "heard {heard:?}, reads {reads}");
    }
}

/// The order of changes in a whole swap, with `overlap` for the worker on both sides.
fn order(state: State, mode: Mode, overlap: Overlap, from: &[(&str, bool)], to: &[(&str, bool)]) -> Vec<String> {
    let mut record = swapping(state, mode, &[]);
    let plan = |d: &mut Deployment| d.plan.containers.get_mut(&name("worker")).unwrap().overlap = overlap;
    let swap = swap_of(&mut record);
    plan(&mut swap.to);
    plan(swap.from.as_mut().unwrap());
    let (left, entered) = if state == State::RollingBack { (new(), old()) } else { (old(), new()) };
    record.driver.controller = ControllerId::Revision(left.revision.clone());
    let mut scene = scene(record).with(&left, from, true).traffic(&left, 1).heard(&old(), 0, 1).heard(&new(), 0, 1);
    if !to.is_empty() {
        scene = scene.with(&entered, to, false);
    }
    scene.ends_as().1
}

#[test]
fn lesson_35_containers_that_may_not_overlap_change_places_in_order() {
    use Overlap::{StartAfterCutover, StopOldFirst};
    for mode in [Mode::Single, Mode::BlueGreen] {
        assert_eq!(
            order(State::RollingOut, mode, StopOldFirst, FULL, &[]),
            ["stop old worker", "start new app+worker", "shift new", "settle new"]
        );
        assert_eq!(
            order(State::RollingOut, mode, StartAfterCutover, FULL, &[]),
            ["start new app", "shift new", "stop old worker", "start new worker", "settle new"]
        );
    }
    let cold = &[("app", false), ("worker", false)][..];
    assert_eq!(
        order(State::RollingBack, Mode::Single, StopOldFirst, FULL, cold),
        ["stop new worker", "start old app+worker", "shift old", "settle old"]
    );
    assert_eq!(
        order(State::RollingBack, Mode::Single, StartAfterCutover, FULL, cold),
        ["start old app", "shift old", "stop new worker", "start old worker", "settle old"]
    );
}

#[test]
fn a_warm_old_side_takes_the_traffic_before_anything_else_on_the_way_back() {
    use Overlap::{StartAfterCutover, StopOldFirst};
    assert_eq!(
        order(State::RollingBack, Mode::BlueGreen, StopOldFirst, FULL, NO_WORKER),
        ["shift old", "stop new worker", "start old app+worker", "settle old"]
    );
    // Before the late containers changed places, the old side has its own still.
    assert_eq!(
        order(State::RollingBack, Mode::BlueGreen, StartAfterCutover, &[("app", true)], FULL),
        ["shift old", "settle old"]
    );
}

#[test]
fn traffic_that_a_reboot_moved_in_the_middle_of_a_swap_is_moved_again() {
    for ops in [&[Op::StopOld, Op::StartNew, Op::CutOver][..], &[Op::StopOld, Op::StartNew, Op::CutOver, Op::Settle]] {
        // The new side runs again, and the proxy serves what was proved last.
        let forward = scene(swapping(State::RollingOut, Mode::Single, ops))
            .with(&old(), NO_WORKER, true)
            .with(&new(), FULL, false)
            .traffic(&old(), 1);
        let back = scene(swapping(State::RollingBack, Mode::BlueGreen, ops))
            .with(&new(), NO_WORKER, true)
            .with(&old(), FULL, false)
            .traffic(&new(), 1);
        for (scene, ends, wanted) in [
            (forward, State::Succeeded, ["shift new", "settle new"]),
            (back, State::RolledBack, ["shift old", "settle old"]),
        ] {
            let (state, done) = scene.heard(&old(), 0, 1).heard(&new(), 0, 1).ends_as();
            assert_eq!(state, ends, "{done:?}");
            assert_eq!(done, wanted);
        }
    }
}

#[test]
fn who_is_no_longer_needed_gives_the_wheel_to_who_serves() {
    // Only another controller can remove its revision, and stop its worker.
    let mut record = record_in(State::FailedRollout, Mode::BlueGreen);
    record.driver.controller = ControllerId::Revision(new().revision);
    let decide = |heard: Option<i64>| {
        let mut scene =
            scene(record.clone()).with(&old(), NO_WORKER, true).with(&new(), FULL, false).traffic(&old(), 1).at(20_000);
        if let Some(at) = heard {
            scene = scene.heard(&old(), at, 1);
        }
        scene.decide()
    };
    let serves = ControllerId::Revision(old().revision);
    assert_eq!(decide(Some(19_000)), Decision::Record(Event::HandedOver { to: serves }));
    assert!(matches!(decide(Some(0)), Decision::Wait { .. }));
    assert!(matches!(decide(None), Decision::Wait { .. }));
}

#[test]
fn what_was_proved_last_is_not_retired_while_something_unproved_serves() {
    let mut record = record_in(State::FailedPre, Mode::Single);
    record.snapshot = Some(snapshot_of(old()));
    record.serving = Some(new());
    record.driver.controller = ControllerId::Revision(new().revision);
    let decision = scene(record).with(&old(), NO_WORKER, true).with(&new(), FULL, false).traffic(&new(), 1).decide();
    assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
}

#[test]
fn looks_closer_together_than_the_spacing_count_once() {
    use replank_core::ports::{Observation, RevisionSeen, TrafficSeen};
    let new = deployment("job-1", 2);
    let policy = Policy::default();
    let seen = |at: i64, probed: Probed| {
        let containers = new.plan.containers.iter().map(|(name, plan)| {
            let image = new.images[&plan.component].clone();
            (name.clone(), ContainerSeen { image, running: Running::Running, exit_code: None, trouble: None })
        });
        let revision = RevisionSeen {
            key: Some(new.key.clone()),
            commit: Some(new.commit.clone()),
            containers: containers.collect(),
            probed,
            returns_alone: false,
            stopped_at: None,
        };
        Observation {
            at: Millis(at),
            revisions: BTreeMap::from([(new.revision.clone(), revision)]),
            traffic: TrafficSeen { revision: None, generation: 0, fallback: None, probed: Probed::NotAsked },
        }
    };
    let look = Ask { direct: vec![new.clone()], through: None };
    let mut streaks = Streaks::default();
    for at in 0..3 {
        streaks.see(&look, &seen(at, Probed::Passed), &policy);
    }
    assert!(!streaks.proved(&new, 2), "three looks within 3 ms are one proof");
    streaks.see(&look, &seen(policy.prove_every as i64, Probed::Passed), &policy);
    assert!(streaks.proved(&new, 2));
    for at in 0..3 {
        let at = policy.prove_every as i64 + at;
        streaks.see(&look, &seen(at, Probed::Failed("refused".to_owned())), &policy);
    }
    assert!(streaks.degraded(&new, 1).is_some(), "one failure ends the streak at once");
    assert!(streaks.degraded(&new, 2).is_none(), "and three within 3 ms are one failure");
}
