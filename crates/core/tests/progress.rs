//! How far a job is: phases weighed, parts inside them counted, and never less than was said before.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use proptest::prelude::*;
use replank_core::check::{Misfit, between};
use replank_core::event::Event;
use replank_core::fault::Told;
use replank_core::format;
use replank_core::history::{Audit, Line, seal};
use replank_core::phase::*;
use replank_core::ports::Progress;
use replank_core::predict::Kind;
use replank_core::progress::{due, place, shown, weights};
use replank_core::record::*;
use replank_core::transition::apply;
use replank_core::words::*;
use support::*;

const SINGLE: Kind = Kind { mode: Mode::Single, build_only: false };
const BLUE_GREEN: Kind = Kind { mode: Mode::BlueGreen, build_only: false };

/// In single mode phases begin at 0, 1, 10, 70 and 80 percent.
const MEASURED: [(State, u64); 5] = [
    (State::Queued, 1_000),
    (State::Fetching, 9_000),
    (State::Building, 60_000),
    (State::Patching, 10_000),
    (State::RollingOut, 20_000),
];

fn measured(mut record: Record) -> Record {
    record.job.as_mut().unwrap().reached.weights = BTreeMap::from(MEASURED);
    record
}

fn steps(done: u32, total: u32) -> BTreeMap<ComponentName, Progress> {
    BTreeMap::from([(app(), Progress { done, total, step: String::new() })])
}

fn actor() -> Actor {
    Actor { oid: "op".to_owned(), name: String::new(), from: String::new() }
}

/// A record in this state of which nothing was said yet, `seconds` after the phase was entered.
fn after(record: Record, seen: &BTreeMap<ComponentName, Progress>, seconds: i64) -> u32 {
    due(&measured(record), seen, Millis(seconds * 1_000)).unwrap_or(0)
}

fn building(of: usize, done: usize) -> Record {
    let mut record = record_in(State::Building, Mode::Single);
    let Phase::Building(building) = &mut record.phase else { unreachable!() };
    let (recipe, build) = (building.fetched.recipes[&app()].clone(), building.builds[&app()].clone());
    building.builds.clear();
    building.fetched.recipes.clear();
    for number in 0..of {
        // The last one is the one that the tests' steps are of.
        let name = if number + 1 == of { app() } else { ComponentName::new(format!("a{number}")).unwrap() };
        building.fetched.recipes.insert(name.clone(), recipe.clone());
        let built = build.built.clone().filter(|_| number < done);
        if number <= done {
            building.builds.insert(name, Build { built, ..build.clone() });
        }
    }
    record
}

#[test]
fn a_phase_weighs_as_much_as_it_takes() {
    let none = BTreeMap::new();
    let single = |state| record_in(state, Mode::Single);
    for (record, seconds, expect) in [
        (single(State::Queued), 0, 0),
        (single(State::Fetching), 0, 1),
        // Nine of ten parts of a phase belong to its usual time: 1 + 9 * 0.9.
        (single(State::Fetching), 9, 9),
        (single(State::Fetching), 3_600, 9),
        (building(2, 0), 0, 10),
        (single(State::Patching), 0, 70),
        (single(State::Patching), 5, 74),
        (single(State::Patching), 10, 79),
        (single(State::Patching), 100_000_000, 79),
    ] {
        assert_eq!(after(record.clone(), &none, seconds), expect, "{} after {seconds} s", record.phase.state().name());
    }
}

#[test]
fn a_build_is_as_far_as_its_components_and_their_steps() {
    let none = BTreeMap::new();
    for (of, done, seen, seconds, expect) in [
        // Half of the components, half of the way from 10 to 70.
        (2, 1, steps(0, 4), 0, 40),
        (2, 1, steps(2, 4), 0, 54),
        // All steps are done and nothing is pushed yet.
        (2, 1, steps(4, 4), 0, 68),
        (1, 0, steps(7, 4), 3_600, 67),
        // Steps count, whatever the time says.
        (1, 0, steps(1, 4), 3_600, 24),
        // Who says nothing of steps is believed to go on.
        (1, 0, none.clone(), 0, 10),
        (1, 0, steps(0, 0), 30, 37),
        (1, 0, none.clone(), 3_600, 69),
        (4, 3, none.clone(), 0, 55),
        (3, 3, none, 0, 70),
    ] {
        assert_eq!(after(building(of, done), &seen, seconds), expect, "{done} of {of}, {seen:?}, {seconds} s");
    }
}

#[test]
fn a_swap_is_as_far_as_its_operations() {
    let with = |ops: &[Op]| {
        let mut record = record_in(State::RollingOut, Mode::Single);
        let Phase::RollingOut(swap) = &mut record.phase else { unreachable!() };
        swap.ops.retain(|op, _| ops.contains(op));
        after(record, &BTreeMap::new(), 0)
    };
    // Four of them, since the plan has a container that stops first: 80 and a quarter of 95 percent of 20 for each.
    assert_eq!(with(&[]), 80);
    assert_eq!(with(&[Op::StopOld]), 84);
    assert_eq!(with(&[Op::StopOld, Op::StartNew]), 89);
    assert_eq!(with(&[Op::StopOld, Op::StartNew, Op::CutOver]), 94);
    assert_eq!(with(&[Op::StopOld, Op::StartNew, Op::CutOver, Op::Settle]), 99);
}

#[test]
fn a_confirm_window_ends_at_its_deadline() {
    let mut record = record_in(State::Confirming, Mode::BlueGreen);
    let Phase::Confirming(confirming) = &mut record.phase else { unreachable!() };
    (confirming.flip, confirming.deadline) = (None, Some(Millis(100_000)));
    let weights = [(State::Validating, 50_000), (State::Confirming, 100_000)];
    record.job.as_mut().unwrap().reached.weights = MEASURED.into_iter().chain(weights).collect();
    let at = |record: &Record, seconds: i64| due(record, &BTreeMap::new(), Millis(seconds * 1_000));
    // 150 of 250 seconds are behind it.
    assert_eq!(at(&record, 0), Some(60));
    assert_eq!(at(&record, 50), Some(78));
    assert_eq!(at(&record, 100), Some(96));
    assert_eq!(at(&record, 100_000), Some(99));
}

#[test]
fn by_time_alone_a_phase_never_comes_to_its_end() {
    let ends = [("queued", 10_000), ("fetching", 100_000), ("building", 700_000), ("patching", 800_000)];
    for state in [State::Queued, State::Fetching, State::Building, State::Patching] {
        let record =
            if state == State::Building { measured(building(1, 0)) } else { measured(record_in(state, Mode::Single)) };
        let (_, end) = ends.into_iter().find(|(name, _)| *name == state.name()).unwrap();
        let mut last = 0;
        for passed in (0..62).map(|power| 1_i64 << power) {
            let now = place(&record, Some((&BTreeMap::new(), Millis(passed)))).unwrap();
            assert!(last <= now && now < end, "{} after {passed} ms: {last}, {now}, {end}", state.name());
            last = now;
        }
        assert!(end - last < 1_000, "{} comes near its end: {last} of {end}", state.name());
    }
}

/// Jobs of this kind that took so long, in seconds, phase by phase.
fn history(kind: Kind, jobs: &[[u64; 7]]) -> Vec<Line> {
    let (mut events, mut now) = (Vec::new(), 0);
    for (number, durations) in jobs.iter().enumerate() {
        let id = JobId::new(format!("job-{number}")).unwrap();
        let said = |now, event: &str, state: State| Audit::new(now, Some(&id), event).with("state", state.name());
        events.push(said(Millis(now), "start", State::Queued).with("mode", kind.mode.name()));
        let ends = kind.phases().iter().skip(1).copied().chain([State::Succeeded]);
        for (seconds, next) in durations.iter().zip(ends) {
            now += i64::try_from(*seconds).unwrap() * 1_000;
            events.push(said(Millis(now), "moved", next));
        }
    }
    seal(&Head::default(), &events).0
}

#[test]
fn weights_are_medians_of_three_jobs_of_the_kind_and_usual_times_below() {
    let three = [[1, 2, 30, 4, 5, 6, 70], [3, 2, 10, 4, 5, 6, 70], [2, 9, 20, 4, 50, 6, 70]];
    let told = weights(&history(BLUE_GREEN, &three), BLUE_GREEN, 1);
    let medians = [2_000, 2_000, 20_000, 4_000, 5_000, 6_000, 70_000];
    assert_eq!(told, BLUE_GREEN.phases().iter().copied().zip(medians).collect());

    // Two are anecdotes, and another kind's say nothing: then the configured window counts, which is known.
    for lines in [history(BLUE_GREEN, &three[..2]), history(SINGLE, &three)] {
        let usual = weights(&lines, BLUE_GREEN, 42_000);
        assert_eq!(usual.keys().copied().collect::<Vec<_>>(), BLUE_GREEN.phases());
        assert_eq!(usual[&State::Confirming], 42_000);
        let most = usual.iter().filter(|(state, _)| **state != State::Building).map(|(_, weight)| *weight).sum::<u64>();
        assert!(usual[&State::Building] > most, "building is most of an upgrade: {usual:?}");
    }
}

#[test]
fn what_is_recorded_is_shown_and_nothing_is_taken_back() {
    let started = |record: &Record, id, minor| {
        let job = Job { reached: record.job.as_ref().unwrap().reached.clone(), ..job(id, minor, Mode::Single) };
        apply(record, &Event::Start { job: Box::new(job), override_quarantine: false }, Millis(0)).unwrap().record
    };
    let told = |record: &Record, event: Event| apply(record, &event, Millis(0)).unwrap().record;

    let record = told(&measured(building(1, 0)), Event::Progressed { percent: 55 });
    assert_eq!(shown(&record), 55);
    let lines = apply(&record, &Event::Progressed { percent: 56 }, Millis(0)).unwrap().lines;
    assert!(lines.is_empty(), "no line for each percent");
    // More steps than were known, a build that is begun again, another controller, an estimate that is smaller.
    assert_eq!(due(&record, &steps(1, 40), Millis(0)), None);
    let record = told(&record, Event::BuildIntended { component: app() });
    let record = told(&record, Event::TookOver { by: ControllerId::Host });
    let record = told(&record, Event::Progressed { percent: 3 });
    let record = told(&record, Event::Progressed { percent: 700 });
    assert_eq!(shown(&record), 99, "in flight nothing is done");

    // It failed where it was; what is started then begins anew, and so does a way back.
    let failed = told(&record, Event::Failed { fault: Told::permanent("no", "") });
    assert_eq!((failed.phase.state(), shown(&failed)), (State::FailedPre, 99));
    assert_eq!(shown(&started(&failed, "job-2", 3)), 0);
    let mut done = record_in(State::Succeeded, Mode::Single);
    assert_eq!(shown(&done), 100);
    done.job.as_mut().unwrap().reached.percent = 100;
    let back = told(&done, Event::RollbackStarted { actor: actor(), reason: String::new(), data_restored: false });
    assert_eq!((back.phase.state(), shown(&back)), (State::RollingBack, 0));
    assert_eq!(shown(&told(&back, Event::Progressed { percent: 7 })), 7);
    assert_eq!(shown(&record_in(State::RolledBack, Mode::Single)), 100);
    // One that an older Replank began knows nothing of what it means.
    let mut older = record_in(State::RollingBack, Mode::Single);
    older.job.as_mut().unwrap().reached.percent = 80;
    assert_eq!(shown(&older), 0);
}

#[test]
fn a_fall_is_a_misfit() {
    let mut before = record_in(State::Building, Mode::Single);
    before.job.as_mut().unwrap().reached.percent = 60;
    let mut after = before.clone();
    assert_eq!(between(&before, &after), None);
    after.job.as_mut().unwrap().reached.percent = 59;
    assert_eq!(between(&before, &after), Some(Misfit::Progress { from: 60, to: 59 }));
    after.job.as_mut().unwrap().id = JobId::new("job-2").unwrap();
    assert_eq!(between(&before, &after), None, "another job");
}

/// What a driver, an operator or the platform may bring about; most of it is refused in most states.
fn events() -> Vec<Event> {
    let new = deployment("job-1", 2);
    let built =
        Built { image: images('2')[&app()].clone(), bases: BTreeMap::new(), queued_ms: 0, built_ms: 0, adopted: false };
    let way_back = WayBack::Snapshot(Box::new(snapshot_of(deployment("job-0", 1))));
    let op = |op| [Event::OpIntended { op }, Event::OpObserved { op }];
    let mut all = vec![
        Event::Claimed,
        Event::Fetched(fetched()),
        Event::BuildIntended { component: app() },
        Event::BuildDone { component: app(), built },
        Event::BuildsComplete,
        Event::Prepared { to: Box::new(new), way_back, escape_hatch: vec![] },
        Event::Landed,
        Event::CutOverIntended,
        Event::Converged { deadline: Millis(300_000) },
        Event::Kept { actor: actor(), reason: String::new() },
        Event::FlipIntended { why: "bad".to_owned() },
        Event::Completed,
        Event::FlippedBack,
        Event::RolledBack,
        Event::RollbackStarted { actor: actor(), reason: String::new(), data_restored: true },
        Event::Failed { fault: Told::permanent("no", "") },
        Event::Reset { actor: actor(), reason: String::new() },
        Event::HandedOver { to: ControllerId::Host },
        Event::TrackCommits { actor: actor(), on: true },
    ];
    all.extend([Op::StopOld, Op::StartNew, Op::CutOver, Op::Settle].into_iter().flat_map(op));
    all
}

#[derive(Debug, Clone)]
enum Move {
    Happens(usize),
    /// A controller estimates: the builders' steps as it knows them, and the time by its own clock.
    Estimates {
        steps: Option<(u32, u32)>,
        at: i64,
    },
    /// The record is written and read by another process.
    IsReadAgain,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let count = events().len();
    // What leads on is tried most often, so that jobs get somewhere.
    let happens = prop_oneof![3 => 0..9_usize, 1 => 0..count, 3 => 19..count].prop_map(Move::Happens);
    let steps = prop::option::of((0_u32..50, 0_u32..50));
    let estimates = (steps, -10_000_i64..3_000_000).prop_map(|(steps, at)| Move::Estimates { steps, at });
    prop::collection::vec(prop_oneof![6 => happens, 3 => estimates, 1 => Just(Move::IsReadAgain)], 1..150)
}

proptest! {
    #[test]
    fn one_jobs_progress_never_falls(
        moves in moves(),
        mode in prop_oneof![Just(Mode::Single), Just(Mode::BlueGreen)],
        weights in prop::collection::vec(0_u64..1_000_000, 0..7),
    ) {
        let mut record = running_record();
        let kind = Kind { mode, build_only: false };
        let reached = kind.phases().iter().copied().zip(weights).collect();
        let mut job = job("job-1", 2, mode);
        job.reached.weights = reached;
        let start = Event::Start { job: Box::new(job), override_quarantine: true };
        record = apply(&record, &start, Millis(0)).unwrap().record;
        let (events, mut now) = (events(), 0);
        for step in moves {
            let before = record.clone();
            match step {
                Move::Happens(which) => {
                    now += 1_000;
                    if let Ok(commit) = apply(&record, &events[which], Millis(now)) {
                        record = commit.record;
                    }
                }
                Move::Estimates { steps: known, at } => {
                    let seen = known.map(|(done, total)| steps(done, total)).unwrap_or_default();
                    if let Some(percent) = due(&record, &seen, Millis(now + at)) {
                        prop_assert!(percent > shown(&record) && percent < 100);
                        record = apply(&record, &Event::Progressed { percent }, Millis(now)).unwrap().record;
                        prop_assert_eq!(shown(&record), percent);
                        prop_assert_eq!(due(&record, &seen, Millis(now + at)), None, "the same is not told twice");
                    }
                }
                Move::IsReadAgain => record = format::read(&format::write(&record).unwrap()).unwrap(),
            }
            prop_assert_eq!(between(&before, &record), None);
            let ended = matches!(record.phase, Phase::Succeeded { .. } | Phase::RolledBack { .. });
            prop_assert_eq!(shown(&record) == 100, ended, "100 percent is the end, and nothing else: {:?}", record.phase.state());
        }
    }
}
