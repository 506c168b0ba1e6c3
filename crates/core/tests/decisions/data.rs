//! Data steps: each once, before anything else of a rollout; and what they do to the way back.

use std::collections::BTreeMap;

use super::scene::*;
use crate::support::*;
use replank_core::data::*;
use replank_core::decide::*;
use replank_core::event::Event;
use replank_core::fault::{Fault, Told};
use replank_core::phase::*;
use replank_core::record::*;
use replank_core::transition::{Refused, apply};
use replank_core::words::*;

const BUDGET: u64 = 60_000;

fn planned(name: &str, kind: StepKind) -> DataStep {
    DataStep { name: self::name(name), kind, component: app(), budget: BUDGET, spec: serde_json::Value::Null }
}

/// At the beginning of a rollout to a release that backs up and migrates.
fn rolling_out(schema: Schema) -> Record {
    let mut record = record_in(State::RollingOut, Mode::Single);
    let Phase::RollingOut(swap) = &mut record.phase else { unreachable!() };
    swap.ops.clear();
    let steps = vec![planned("backup", StepKind::Backup), planned("migrate-app", StepKind::Migrate)];
    swap.to.plan.data = DataPlan { steps, schema, back_to: None };
    record.job.as_mut().unwrap().on_rollout_failure = OnRolloutFailure::Rollback;
    record
}

fn after(record: &Record, events: &[Event]) -> Record {
    events.iter().fold(record.clone(), |record, event| {
        apply(&record, event, Millis(1_000)).unwrap_or_else(|refused| panic!("{}: {refused}", event.name())).record
    })
}

fn intended(step: &str) -> Event {
    Event::StepIntended { step: name(step) }
}

fn done(step: &str) -> Event {
    Event::StepDone { step: name(step) }
}

fn ended(code: i64) -> Ended {
    Ended::Well { outcome: Outcome::Stepped { exit_code: code }, at: Millis(1_000) }
}

fn at_work(record: &Record) -> Scene {
    scene(record.clone()).with(&old(), FULL, true).traffic(&old(), 1).at(1_000)
}

#[test]
fn the_backup_comes_first_then_the_migration_then_the_rollout() {
    let record = rolling_out(Schema::Unknown);
    assert_eq!(at_work(&record).decide(), Decision::Record(intended("backup")));
    let record = after(&record, &[intended("backup")]);
    let Decision::Act(Action::Step { step, until, key }) = at_work(&record).decide() else { panic!() };
    assert_eq!((step, until), (name("backup"), Millis(1_000).plus(BUDGET)));
    assert_eq!(key, record.job.as_ref().unwrap().key("data-backup", 1), "the same key, whoever asks");
    assert_eq!(at_work(&record).ended("data-backup", ended(0)).decide(), Decision::Record(done("backup")));
    let record = after(&record, &[done("backup")]);
    assert_eq!(at_work(&record).decide(), Decision::Record(intended("migrate-app")));
    let record = after(&record, &[intended("migrate-app"), done("migrate-app")]);
    assert_eq!(at_work(&record).decide(), Decision::Record(Event::OpIntended { op: Op::StopOld }));
}

#[test]
fn a_step_that_fails_ends_the_job_and_is_not_run_again() {
    let record = after(&rolling_out(Schema::Unknown), &[intended("backup")]);
    let decision = at_work(&record).ended("data-backup", ended(3)).decide();
    let Decision::Record(Event::RollbackStarted { reason, .. }) = &decision else { panic!("{decision:?}") };
    assert!(reason.contains("exit code 3; nothing was changed, and 0.1.0 serves"), "{reason}");
    // A migration that fails may have changed anything.
    let migrating = after(&record, &[done("backup"), intended("migrate-app")]);
    let Decision::Record(Event::RollbackStarted { reason, .. }) =
        at_work(&migrating).ended("data-migrate-app", ended(3)).decide()
    else {
        panic!()
    };
    assert!(reason.contains("exit code 3") && !reason.contains("nothing was changed"), "{reason}");
    let again = apply(&record, &intended("backup"), Millis(0));
    assert!(matches!(again, Err(Refused::Inconsistent { .. })), "{again:?}");
    let twice = apply(&after(&record, &[done("backup")]), &done("backup"), Millis(0));
    assert!(matches!(twice, Err(Refused::Inconsistent { .. })), "{twice:?}");
    let unknown = apply(&record, &intended("migrate-web"), Millis(0));
    assert!(matches!(unknown, Err(Refused::Inconsistent { .. })), "{unknown:?}");
}

#[test]
fn a_successor_waits_for_the_same_step() {
    let record = after(&rolling_out(Schema::Unknown), &[intended("backup")]);
    let fresh = at_work(&record);
    assert!(matches!(fresh.decide(), Decision::Act(Action::Step { .. })), "a process that knows of no task asks again");
    let lost = Ended::Badly { told: Fault::indeterminate("the engine went away").told(), tries: 1, at: Millis(1_000) };
    assert!(matches!(at_work(&record).ended("data-backup", lost).decide(), Decision::Wait { .. }));
    // The platform ends it at its budget; who hears nothing of it for a minute more gives up.
    let late = i64::try_from(1_000 + BUDGET).unwrap();
    assert!(matches!(at_work(&record).at(late).decide(), Decision::Act(Action::Step { .. })));
    let Decision::Record(Event::RollbackStarted { reason, .. }) = at_work(&record).at(late + 60_000).decide() else {
        panic!()
    };
    assert!(reason.contains("backup did not end"), "{reason}");
}

#[test]
fn the_other_clocks_of_the_rollout_start_after_the_last_step() {
    let mut record = after(&rolling_out(Schema::Unknown), &[intended("backup"), done("backup")]);
    let (intended_at, ended_at) = (Millis(1_000), Some(Millis(5_000_000)));
    record.job.as_mut().unwrap().data.insert(name("migrate-app"), StepState { intended_at, ended_at });
    let scene = |now| scene(record.clone()).with(&old(), FULL, true).traffic(&old(), 1).at(now);
    assert!(matches!(scene(5_000_001).decide(), Decision::Record(Event::OpIntended { .. })));
    let budget = i64::try_from(replank_core::policy::Policy::default().budgets.rolling_out).unwrap();
    assert!(matches!(scene(5_000_000 + budget).decide(), Decision::Record(Event::RollbackStarted { .. })));
}

/// Promise 4: where the data close the way back, nothing pretends otherwise.
#[test]
fn a_one_way_step_closes_the_automatic_way_back_from_its_intent_on() {
    let open = after(&rolling_out(Schema::OneWay), &[intended("backup")]);
    assert_eq!(closed_for(&open), None, "a backup changes nothing");
    assert!(matches!(
        at_work(&open).ended("data-backup", ended(1)).decide(),
        Decision::Record(Event::RollbackStarted { .. })
    ));
    let shut = after(&open, &[done("backup"), intended("migrate-app")]);
    assert!(closed_for(&shut).is_some());
    let decision = at_work(&shut).ended("data-migrate-app", ended(1)).decide();
    let Decision::Record(Event::Failed { fault }) = &decision else { panic!("{decision:?}") };
    assert!(fault.advice.contains("not undone"), "{fault:?}");

    let held = after(&shut, &[Event::Failed { fault: fault.clone() }]);
    assert!(held.snapshot.as_ref().unwrap().closed.is_some(), "the outcome says so");
    let back = |data_restored| Event::RollbackStarted { actor: Actor::system(), reason: String::new(), data_restored };
    for record in [&shut, &held] {
        assert!(matches!(apply(record, &back(false), Millis(0)), Err(Refused::Closed { .. })));
        assert!(apply(record, &back(true), Millis(0)).is_ok(), "a person who has restored the data may go back");
    }
    // The next job's snapshot is of the same version, whose data are gone as before.
    let next = Event::Start { job: Box::new(job("job-2", 3, Mode::Single)), override_quarantine: false };
    let next = after(&held, &[next, Event::Failed { fault: Told::permanent("no", "") }]);
    assert!(matches!(apply(&next, &back(false), Millis(0)), Err(Refused::Closed { .. })));
    assert_eq!(still_closed(next.snapshot.as_ref(), &old().revision), held.snapshot.as_ref().unwrap().closed);
    assert_eq!(still_closed(next.snapshot.as_ref(), &new().revision), None);
}

#[test]
fn what_a_release_says_of_its_data_closes_the_way_back_to_what_came_before() {
    let plan = |schema, back_to: Option<&str>| DataPlan {
        steps: vec![],
        schema,
        back_to: back_to.map(|version| version.parse().unwrap()),
    };
    let closes = |plan: DataPlan| plan.closes(&Version::release(0, 1, 0)).is_some();
    assert!(!closes(plan(Schema::Compatible, None)));
    assert!(!closes(plan(Schema::Unknown, None)));
    assert!(closes(plan(Schema::OneWay, None)));
    assert!(closes(plan(Schema::Compatible, Some("0.1.1"))), "too old for the data");
    assert!(!closes(plan(Schema::Compatible, Some("0.1.0"))));
    // Data that change when the new containers start close it there.
    let mut record = rolling_out(Schema::OneWay);
    let Phase::RollingOut(swap) = &mut record.phase else { unreachable!() };
    swap.to.plan.data.steps.clear();
    assert_eq!(closed_for(&record), None);
    let started = after(&record, &[Event::OpIntended { op: Op::StartNew }]);
    assert!(closed_for(&started).is_some());
}

#[test]
fn inside_a_confirm_window_nothing_flips_back_to_data_that_are_gone() {
    let mut record = record_in(State::Confirming, Mode::BlueGreen);
    let Phase::Confirming(c) = &mut record.phase else { unreachable!() };
    (c.flip, c.deadline) = (None, Some(Millis(10_000_000)));
    c.swap.to.plan.data = DataPlan { schema: Schema::OneWay, ..DataPlan::default() };
    let flip = Event::FlipIntended { why: "500".to_owned() };
    assert!(matches!(apply(&record, &flip, Millis(0)), Err(Refused::Closed { .. })));
    let ill =
        scene(record.clone()).with(&old(), FULL, true).with(&new(), FULL, false).traffic(&new(), 9).sick().looks(30);
    assert!(!matches!(ill.decide(), Decision::Record(Event::FlipIntended { .. })), "{:?}", ill.decide());
    // Found by the simulation: a window that could neither end well nor flip back never ended.
    let over = |now| {
        scene(record.clone())
            .with(&old(), FULL, true)
            .with(&new(), FULL, false)
            .traffic(&new(), 9)
            .sick()
            .looks(30)
            .at(now)
    };
    assert!(!matches!(over(9_000_000).decide(), Decision::Record(Event::Failed { .. })), "it may recover until then");
    let Decision::Record(Event::Failed { fault }) = over(10_000_000).decide() else {
        panic!("{:?}", over(10_000_000).decide())
    };
    assert!(fault.what.contains("stopped answering") && fault.advice.contains("restore the data"), "{fault:?}");
    // Found by the simulation: a reboot brings the old side back to the way in, and nobody waits for a flip that never comes.
    let rebooted = scene(record.clone()).with(&old(), FULL, true).with(&new(), FULL, false).traffic(&old(), 9);
    assert_eq!(rebooted.decide(), Decision::Record(Event::OpIntended { op: Op::CutOver }));
    let Phase::Confirming(c) = &mut record.phase else { unreachable!() };
    c.swap.to.plan.data = DataPlan::default();
    assert!(apply(&record, &flip, Millis(0)).is_ok());
}

#[test]
fn records_without_data_steps_are_written_as_before() {
    let value = serde_json::to_value(record_in(State::RollingOut, Mode::Single)).unwrap();
    let job = value["job"].as_object().unwrap();
    assert!(!job.contains_key("data") && !job.contains_key("accept_one_way"), "{job:?}");
    assert!(!value["running"]["plan"].as_object().unwrap().contains_key("data"));
    let _: BTreeMap<String, serde_json::Value> = serde_json::from_value(value).unwrap();
}

/// A downgrade must not lead to a release that cannot use the data, however long ago they were changed.
#[test]
fn the_oldest_version_that_can_use_the_data_is_remembered() {
    let with = |version: &str, schema, back_to: Option<&str>| {
        let mut to = new();
        to.version = version.parse().unwrap();
        to.plan.data = DataPlan { steps: vec![], schema, back_to: back_to.map(|v| v.parse().unwrap()) };
        to
    };
    let version = |text: &str| text.parse::<Version>().unwrap();
    for (before, to, expect) in [
        (None, with("2.0.0", Schema::Compatible, None), None),
        (None, with("2.0.0", Schema::Unknown, None), None),
        (None, with("2.0.0", Schema::OneWay, None), Some("2.0.0")),
        (None, with("2.0.0", Schema::OneWay, Some("1.5.0")), Some("1.5.0")),
        (None, with("2.0.0", Schema::Compatible, Some("1.5.0")), Some("1.5.0")),
        // It only rises by upgrades.
        (Some("1.8.0"), with("2.0.0", Schema::Compatible, Some("1.5.0")), Some("1.8.0")),
        (Some("1.8.0"), with("2.0.0", Schema::Compatible, None), Some("1.8.0")),
        (Some("1.8.0"), with("2.0.0", Schema::OneWay, None), Some("2.0.0")),
    ] {
        let before = before.map(version);
        assert_eq!(oldest(before.as_ref(), &to), expect.map(version), "{before:?} and {:?}", to.plan.data);
    }

    // From the intent on, since what was intended may have happened.
    let mut record = record_in(State::RollingOut, Mode::Single);
    let Phase::RollingOut(swap) = &mut record.phase else { unreachable!() };
    swap.to.plan.data.back_to = Some(swap.to.version.clone());
    let (to, from) = (swap.to.version.clone(), record.running.as_ref().unwrap().version.clone());
    assert!(from.base() < to.base());
    swap.ops.clear();
    let intended = apply(&record, &Event::OpIntended { op: Op::StartNew }, Millis(3)).unwrap().record;
    assert_eq!(intended.data_from.as_ref(), Some(&to));
    let failed = Event::Failed { fault: replank_core::fault::Told::permanent("it does not answer", "") };
    let failed = apply(&intended, &failed, Millis(4)).unwrap().record;

    let down = |data_restored| {
        let mut job = job("job-9", 3, Mode::Single);
        job.target.version = from.clone();
        job.downgrade = Some(Downgrade { data_restored });
        Event::Start { job: Box::new(job), override_quarantine: true }
    };
    let refused = apply(&failed, &down(false), Millis(5)).unwrap_err();
    assert!(matches!(&refused, Refused::DataTooNew { version, .. } if *version == from), "{refused}");
    let started = apply(&failed, &down(true), Millis(5)).unwrap();
    assert_eq!(started.record.data_from.as_ref(), Some(&from), "by the operator's word");
    let line = String::from_utf8_lossy(&started.lines[0].bytes).into_owned();
    assert!(line.contains("\"downgrade\":true") && line.contains("\"data_restored\":true"), "{line}");
    let back = Event::RollbackStarted { actor: Actor::system(), reason: String::new(), data_restored: true };
    assert_eq!(apply(&failed, &back, Millis(5)).unwrap().record.data_from.as_ref(), Some(&from));

    // Where no release in flight said so, what runs may.
    let mut rested = record_in(State::Succeeded, Mode::Single);
    rested.running.as_mut().unwrap().plan.data.schema = Schema::OneWay;
    assert!(matches!(apply(&rested, &down(false), Millis(5)), Err(Refused::DataTooNew { .. })));
    rested.running.as_mut().unwrap().plan.data.schema = Schema::Compatible;
    assert!(apply(&rested, &down(false), Millis(5)).is_ok());
}

/// What an older release says of its data is about upgrades to it.
#[test]
fn a_downgrade_runs_no_migration_and_leaves_the_way_back_open() {
    let mut plan = DataPlan { steps: vec![], schema: Schema::OneWay, back_to: Some("1.0.0".parse().unwrap()) };
    for (name, kind) in [("backup", StepKind::Backup), ("migrate-app", StepKind::Migrate)] {
        let name = ContainerName::new(name).unwrap();
        plan.steps.push(DataStep { name, kind, component: app(), budget: 1, spec: serde_json::Value::Null });
    }
    without_changes(&mut plan);
    let steps: Vec<&str> = plan.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!((steps, plan.closes(&"9.0.0".parse().unwrap())), (vec!["backup"], None));
}
