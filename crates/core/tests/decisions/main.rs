//! What decisions protect, each test named after the lesson or promise behind it: jobs in flight.
#![allow(clippy::unwrap_used)]

mod data;
mod drift;
mod resting;
mod scene;
#[path = "../support/mod.rs"]
mod support;

use scene::*;
use std::collections::BTreeMap;

use replank_core::decide::*;
use replank_core::event::Event;
use replank_core::fault::Fault;
use replank_core::phase::*;
use replank_core::policy::Policy;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::words::*;
use support::*;

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

/// What is retried until the time is over was not too slow: what it died of is told, with what to do about that.
#[test]
fn a_budget_that_runs_out_tells_what_the_last_try_died_of() {
    let budget = i64::try_from(Policy::default().budgets.fetching).unwrap();
    let died = |advice: &str| {
        let told = Fault::transient("git clone failed").advice(advice).told();
        Ended::Badly { told, tries: 3, at: Millis(budget - 1_000) }
    };
    let told = |advice: &str, again: bool| {
        let mut scene = scene(record_in(State::Fetching, Mode::Single)).ended("fetch", died(advice)).at(budget);
        if again {
            scene.tasks.running.insert(task("fetch"));
        }
        failed(&scene.decide()).unwrap().clone()
    };
    // Also while the next try is under way.
    for again in [false, true] {
        let fault = told("free some space", again);
        assert!(fault.what.ends_with("its budget of 600 s; last seen: git clone failed"), "{fault:?}");
        assert_eq!(fault.advice, "free some space; then start again");
        assert!(told("", again).advice.contains("raise the budget"));
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

/// Found by the model: an earlier job's cut-over arrives in a later job, and what has the traffic cannot be stopped.
#[test]
fn traffic_that_an_earlier_job_moved_late_goes_back_before_room_is_made() {
    let stray = deployment("job-8", 7);
    let of = |record: Record, traffic: &Deployment, generation| {
        let scene = scene(record).with(&old(), FULL, true).with(&stray, FULL, false);
        scene.traffic(traffic, generation).decide()
    };
    let mut record = swapping(State::RollingOut, Mode::Single, &[]);
    record.generation = 2;
    let Decision::Record(event) = of(record.clone(), &stray, 2) else { panic!("nothing was intended") };
    assert_eq!(event, Event::OpIntended { op: Op::PinTraffic });
    let record = replank_core::transition::apply(&record, &event, Millis(0)).unwrap().record;
    match of(record.clone(), &stray, 2) {
        Decision::Act(Action::Change { change: Change::Shift { to, generation: 3, .. }, .. }) => {
            assert_eq!(to.revision, old().revision);
        }
        other => panic!("{other:?}"),
    }
    let Decision::Record(event) = of(record.clone(), &old(), 3) else { panic!("nothing was observed") };
    assert_eq!(event, Event::OpObserved { op: Op::PinTraffic });
    let record = replank_core::transition::apply(&record, &event, Millis(0)).unwrap().record;
    match of(record, &old(), 3) {
        Decision::Act(Action::Change { change: Change::Halt { revision }, .. }) => assert_eq!(revision, stray.revision),
        other => panic!("{other:?}"),
    }
    // Where the cut-over is on its way already, its own generation settles that, and what has the traffic waits for it.
    let mut record = swapping(State::RollingOut, Mode::Single, &[Op::StopOld, Op::StartNew, Op::CutOver]);
    swap_of(&mut record).ops.get_mut(&Op::CutOver).unwrap().observed_at = None;
    record.generation = 3;
    swap_of(&mut record).ops.get_mut(&Op::CutOver).unwrap().generation = 3;
    let scene = scene(record).with(&old(), NO_WORKER, true).with(&new(), FULL, false).with(&stray, FULL, false);
    match scene.traffic(&stray, 2).decide() {
        Decision::Act(Action::Change { change: Change::Shift { to, generation: 3, .. }, .. }) => {
            assert_eq!(to.revision, new().revision);
        }
        other => panic!("{other:?}"),
    }
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
            signed_by: None,
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
fn an_earlier_failures_containers_make_room_and_keep_their_logs() {
    let stray = deployment("job-8", 7);
    let begin = |containers: &[(&str, bool)]| {
        scene(swapping(State::RollingOut, Mode::BlueGreen, &[]))
            .with(&old(), FULL, true)
            .with(&stray, containers, false)
            .traffic(&old(), 1)
            .decide()
    };
    match begin(NO_WORKER) {
        Decision::Act(Action::Change { change: Change::Halt { revision }, .. }) => {
            assert_eq!(revision, stray.revision);
        }
        other => panic!("{other:?}"),
    }
    let stopped: Vec<(&str, bool)> = FULL.iter().map(|(name, _)| (*name, false)).collect();
    assert!(matches!(begin(&stopped), Decision::Record(Event::OpIntended { op: Op::StopOld })));
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

/// Found by a demo whose build was short: ten seconds after a kill the old controller still counted as freshly restarted, and
/// the way back waited for that.
#[test]
fn a_controller_that_was_restarted_a_moment_ago_does_not_keep_its_side_from_taking_the_traffic_back() {
    let decide = |trouble: &str, healthy: bool| {
        let mut record = swapping(State::RollingBack, Mode::BlueGreen, &[]);
        let mut back = old();
        let web = ContainerPlan { component: app(), overlap: Overlap::Allowed, controller: false };
        back.plan.containers.insert(name("web"), web);
        swap_of(&mut record).to = back.clone();
        let mut scene = scene(record).with(&back, &[("app", true), ("web", true)], true).with(&new(), FULL, false);
        scene.healthy = healthy;
        let there = scene.seen.revisions.get_mut(&back.revision).unwrap();
        there.containers.get_mut(&name(trouble)).unwrap().trouble = Some("was restarted 3 s ago".to_owned());
        scene.traffic(&new(), 1).decide()
    };
    let first = |decision: Decision| match decision {
        Decision::Record(Event::OpIntended { op }) => op,
        other => panic!("{other:?}"),
    };
    assert_eq!(first(decide("app", true)), Op::CutOver, "the controller");
    assert_eq!(first(decide("web", true)), Op::StopOld, "what serves may be in a crash loop");
    assert_eq!(first(decide("app", false)), Op::StopOld, "its probe counts all the same");
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
