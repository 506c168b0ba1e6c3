//! Decisions between jobs.

use std::collections::BTreeSet;

use crate::scene::*;
use crate::support::*;
use replank_core::decide::*;
use replank_core::event::Event;
use replank_core::phase::*;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::apply;
use replank_core::words::*;

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

/// Found by the simulation: a controller that was killed for good before a reboot brought the rest of its side back.
#[test]
fn what_was_proved_serves_again_although_its_controller_is_gone() {
    let mut proved = old();
    // Beside the controller, which is all that the others have.
    let web = ContainerPlan { component: app(), overlap: Overlap::Allowed, controller: false };
    proved.plan.containers.insert(name("web"), web);
    let mut record = record_in(State::FailedRollout, Mode::Single);
    (record.running, record.serving, record.generation) = (Some(proved.clone()), Some(new()), 6);
    let decide = |web_runs: bool| {
        let mut scene = scene(record.clone()).with(&new(), &[("app", false), ("worker", false)], false);
        scene = scene.with(&proved, &[("app", !web_runs), ("worker", false), ("web", web_runs)], false);
        scene.traffic(&proved, 5).decide()
    };
    assert!(matches!(decide(true), Decision::Record(Event::ProvedServes { .. })), "{:?}", decide(true));
    // Who answers nobody is no better than what is gone.
    assert!(!matches!(decide(false), Decision::Record(Event::ProvedServes { .. })), "{:?}", decide(false));
}

/// Found by the simulation: a reboot inside a confirm window, and a flip back that was given up.
#[test]
fn what_was_proved_keeps_the_traffic_that_a_reboot_gave_it() {
    let mut record = record_in(State::RollbackFailed, Mode::BlueGreen);
    (record.serving, record.generation) = (Some(new()), 6);
    let rebooted = |serving: &[(&str, bool)], proved: &[(&str, bool)]| {
        let scene = scene(record.clone()).with(&old(), proved, true).with(&new(), serving, false);
        scene.traffic(&old(), 5).decide()
    };
    const DOWN: &[(&str, bool)] = &[("app", false), ("worker", false)];
    let Decision::Record(event @ Event::ProvedServes { .. }) = rebooted(DOWN, NO_WORKER) else {
        panic!("{:?}", rebooted(DOWN, NO_WORKER))
    };
    let after = apply(&record, &event, Millis(0)).unwrap();
    assert_eq!(after.record.serving, record.running);
    assert_eq!(after.record.phase, record.phase, "an operator still decides");
    // While what serves is there, traffic that went elsewhere goes back to it; a restart of the way in then finds what was proved.
    match rebooted(NO_WORKER, NO_WORKER) {
        Decision::Act(Action::Change { change: Change::Shift { to, fallback, .. }, .. }) => {
            assert_eq!((to.revision, fallback.map(|d| d.revision)), (new().revision, Some(old().revision)));
        }
        other => panic!("{other:?}"),
    }
    // A late effect took it elsewhere, and what serves is gone.
    let stray = deployment("job-8", 7);
    let mut astray =
        scene(record.clone()).with(&old(), NO_WORKER, true).with(&new(), DOWN, false).with(&stray, FULL, false);
    astray = astray.traffic(&stray, 5);
    assert!(matches!(astray.decide(), Decision::Record(Event::ProvedServes { .. })), "{:?}", astray.decide());
    // Nothing is there to serve: nothing is declared, and what serves by the record is brought back, which the way in follows then.
    // Found by the simulation: what was proved was told not to return by a settling that was never recorded.
    let change = |decision| match decision {
        Decision::Act(Action::Change { change, .. }) => change,
        other => panic!("{other:?}"),
    };
    let Change::Start { deployment, containers } = change(rebooted(DOWN, DOWN)) else {
        panic!("{:?}", rebooted(DOWN, DOWN))
    };
    assert_eq!((deployment.revision, containers), (new().revision, BTreeSet::from([name("app"), name("worker")])));
    // What may run once stops first where it runs already.
    const WORKER: &[(&str, bool)] = &[("app", false), ("worker", true)];
    let Change::Stop { deployment, containers } = change(rebooted(DOWN, WORKER)) else {
        panic!("{:?}", rebooted(DOWN, WORKER))
    };
    assert_eq!((deployment.revision, containers), (old().revision, BTreeSet::from([name("worker")])));
}

#[test]
fn a_held_failure_is_left_as_it_stands() {
    let stray = deployment("job-8", 7);
    let decision = scene(record_in(State::FailedRollout, Mode::BlueGreen))
        .with(&old(), NO_WORKER, false)
        .with(&new(), FULL, false)
        .with(&stray, NO_WORKER, false)
        .traffic(&old(), 1)
        .decide();
    assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
}

/// Found by the model: an earlier job's start arrives when a later one's failure is held.
#[test]
fn lesson_35_a_late_start_of_an_earlier_job_leaves_no_two_workers_beside_a_held_failure() {
    let stray = deployment("job-8", 7);
    let held = || scene(record_in(State::FailedRollout, Mode::BlueGreen)).traffic(&old(), 1);
    let doubled = held().with(&old(), NO_WORKER, false).with(&new(), FULL, false).with(&stray, FULL, false);
    match doubled.decide() {
        Decision::Act(Action::Change { change: Change::Halt { revision }, .. }) => assert_eq!(revision, stray.revision),
        other => panic!("{other:?}"),
    }
    // Of two that the record knows, what was proved last keeps its own, whatever serves.
    let mut scene = held().with(&new(), FULL, false).with(&stray, FULL, false).with(&old(), NO_WORKER, false);
    scene.record.running = Some(stray.clone());
    match scene.decide() {
        Decision::Act(Action::Change { change: Change::Stop { deployment, containers }, .. }) => {
            assert_eq!((deployment.revision, containers), (new().revision, BTreeSet::from([name("worker")])));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_failed_is_stopped_at_once_and_kept_for_its_logs() {
    let keep = i64::try_from(scene(record_in(State::Succeeded, Mode::BlueGreen)).policy.keep_containers).unwrap();
    let check = |containers: &[(&str, bool)], now: i64, expect: Option<Change>| {
        let stray = deployment("job-8", 7);
        let decision = scene(record_in(State::Succeeded, Mode::BlueGreen))
            .at(now)
            .ended("clean-up", Ended::Well { outcome: Outcome::CleanedUp, at: Millis(now) })
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

/// Each of them holds a network of the engine, and thirty failed releases of a day would leave no address for the next one.
#[test]
fn of_what_failed_the_newest_few_are_kept() {
    let stopped: Vec<(&str, bool)> = FULL.iter().map(|(name, _)| (*name, false)).collect();
    let strays: Vec<_> = (4..=8).map(|n| deployment(&format!("job-{n}"), n)).collect();
    let removed = |stopped_at: &[i64]| {
        let mut scene = scene(record_in(State::Succeeded, Mode::BlueGreen))
            .at(1_000)
            .ended("clean-up", Ended::Well { outcome: Outcome::CleanedUp, at: Millis(1_000) })
            .heard(&old(), 1_000, 2)
            .with(&old(), FULL, true)
            .traffic(&old(), 1);
        for (stray, at) in strays.iter().zip(stopped_at) {
            scene = scene.with(stray, &stopped, false);
            scene.seen.revisions.get_mut(&stray.revision).unwrap().stopped_at = Some(Millis(*at));
        }
        match scene.decide() {
            Decision::Act(Action::Change { change: Change::Remove { revision }, .. }) => {
                strays.iter().position(|stray| stray.revision == revision)
            }
            Decision::Wait { .. } => None,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(removed(&[300, 100, 200]), None, "three are kept");
    assert_eq!(removed(&[300, 100, 200, 400]), Some(1), "the one that stopped first goes");
    assert!([Some(1), Some(2)].contains(&removed(&[300, 100, 200, 400, 500])), "one after the other");
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
fn what_was_proved_last_is_not_retired_while_something_unproved_serves() {
    let mut record = record_in(State::FailedPre, Mode::Single);
    record.snapshot = Some(snapshot_of(old()));
    record.serving = Some(new());
    record.driver.controller = ControllerId::Revision(new().revision);
    let decision = scene(record).with(&old(), NO_WORKER, true).with(&new(), FULL, false).traffic(&new(), 1).decide();
    assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
}

/// At rest with nothing left to put right, `ended` ago.
fn rested(now: i64, ended: Option<i64>) -> Scene {
    let mut record = record_in(State::Succeeded, Mode::BlueGreen);
    record.snapshot = None;
    let scene = scene(record).at(now).heard(&old(), now, 2).with(&old(), FULL, true).traffic(&old(), 1);
    match ended {
        Some(at) => scene.ended("clean-up", Ended::Well { outcome: Outcome::CleanedUp, at: Millis(at) }),
        None => scene,
    }
}

#[test]
fn what_jobs_left_is_cleaned_up_after_each_and_then_daily() {
    let day = 24 * 3_600 * 1_000;
    for (now, ended, due) in [(0, None, true), (5, Some(5), false), (day - 1, Some(0), false), (day, Some(0), true)] {
        let decision = rested(now, ended).decide();
        assert_eq!(matches!(decision, Decision::Act(Action::CleanUp)), due, "{now} {ended:?}: {decision:?}");
    }
    let mut running = rested(0, None);
    running.tasks.running.insert(task("clean-up"));
    assert!(matches!(running.decide(), Decision::Wait { .. }), "one at a time");
    let mut held = rested(0, None);
    held.record.phase = record_in(State::FailedRollout, Mode::BlueGreen).phase;
    let decision = held.decide();
    assert!(!matches!(decision, Decision::Act(Action::CleanUp)), "a held failure is left as it stands: {decision:?}");
}

/// Promise 4: proved daily that the way back is still there.
#[test]
fn the_way_back_is_looked_for_daily_and_its_loss_is_told() {
    let day = 24 * 3_600 * 1_000;
    let look = |now, ended: Option<Ended>| {
        let mut scene = rested(now, Some(now));
        scene.record.snapshot = Some(snapshot_of(new()));
        match ended {
            Some(ended) => scene.ended("prove", ended),
            None => scene,
        }
    };
    assert!(!matches!(look(day - 1, None).decide(), Decision::Act(Action::Prove)), "proved when it was taken");
    assert_eq!(look(day, None).decide(), Decision::Act(Action::Prove));
    let well = |lost: &str| Ended::Well { outcome: Outcome::Proved { lost: lost.to_owned() }, at: Millis(day) };
    for (lost, line) in [("", "way_back_proved"), ("app is gone", "way_back_lost")] {
        let scene = look(day, Some(well(lost)));
        let Decision::Record(event) = scene.decide() else { panic!("{:?}", scene.decide()) };
        let after = apply(&scene.record, &event, Millis(day)).unwrap();
        let told = String::from_utf8(after.lines[0].bytes.clone()).unwrap();
        assert!(told.contains(&format!("\"event\":\"{line}\"")) && told.contains(lost), "{told}");
        let snapshot = after.record.snapshot.as_ref().unwrap();
        assert_eq!(snapshot.proved_at, Millis(day));
        assert_eq!(snapshot.lost.as_deref().unwrap_or_default(), lost);
        // Not again before the next day.
        let mut again = look(day + 1, Some(well(lost)));
        again.record = after.record;
        assert!(!matches!(again.decide(), Decision::Record(_) | Decision::Act(Action::Prove)), "{:?}", again.decide());
    }
    let away = Ended::Badly { told: replank_core::fault::Told::permanent("no answer", ""), tries: 1, at: Millis(day) };
    assert!(!matches!(look(day + 1, Some(away.clone())).decide(), Decision::Act(Action::Prove)), "not at once again");
    assert_eq!(look(day + 60_000, Some(away)).decide(), Decision::Act(Action::Prove));
    // While a failure is held the way back matters most.
    let mut held = look(day, None);
    held.record.phase = record_in(State::FailedRollout, Mode::BlueGreen).phase;
    assert_eq!(held.decide(), Decision::Act(Action::Prove));
}

#[test]
fn the_way_back_closes_when_its_images_time_is_over() {
    let decide = |now| {
        let mut scene = rested(now, Some(now));
        let mut snapshot = snapshot_of(new());
        snapshot.keep_until = Millis(1_000);
        scene.record.snapshot = Some(snapshot);
        scene.decide()
    };
    assert!(matches!(decide(999), Decision::Wait { .. }));
    let Decision::Record(event @ Event::SnapshotDropped { .. }) = decide(1_000) else { panic!("{:?}", decide(1_000)) };
    let mut before = rested(1_000, None).record;
    before.snapshot = Some(snapshot_of(new()));
    let after = apply(&before, &event, Millis(1_000)).unwrap().record;
    assert_eq!(
        after,
        Record { history: after.history.clone(), updated_at: after.updated_at, snapshot: None, ..before }
    );
}

/// Every image's digest that stands anywhere in a value.
fn digests(value: &serde_json::Value, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value.as_str()) {
                    ("digest" | "id", Some(text)) if text.starts_with("sha256:") => drop(found.insert(text.to_owned())),
                    _ => digests(value, found),
                }
            }
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| digests(value, found)),
        _ => {}
    }
}

#[test]
fn no_image_that_a_record_speaks_of_is_left_out() {
    let mut most = 0;
    for state in State::ALL {
        for mode in [Mode::Single, Mode::BlueGreen] {
            let record = record_in(state, mode);
            let mut stored = BTreeSet::new();
            digests(&serde_json::to_value(&record).unwrap(), &mut stored);
            let told: BTreeSet<String> = record.images().map(|image| image.digest().to_string()).collect();
            assert_eq!(told, stored, "{state:?} {mode:?}");
            most = most.max(told.len());
        }
    }
    assert!(most > 1, "there is something to leave out");
}

/// A service that only builds, at rest, with what `orphans` tried when.
fn build_only(now: i64, orphans: &[Option<i64>]) -> Scene {
    let mut record = record_in(State::FailedPre, Mode::Single);
    (record.running, record.serving, record.snapshot) = (None, None, None);
    let orphan = |(n, tried_at): (usize, &Option<i64>)| Orphan {
        repository: "acr.example/app".to_owned(),
        version: Version::release(0, 2, 0),
        key: job(&format!("job-{n}"), 2, Mode::Single).key("build-app", 1),
        since: Millis(0),
        seen: true,
        tried_at: tried_at.map(Millis),
    };
    record.orphans = orphans.iter().enumerate().map(orphan).collect();
    scene(record).at(now)
}

#[test]
fn what_failed_jobs_pushed_is_removed_at_once_and_then_daily() {
    let day = 24 * 3_600 * 1_000;
    for (now, orphans, due) in [
        (5, &[][..], false),
        (5, &[None], true),
        (5, &[Some(0)], false),
        (5, &[Some(0), None], true),
        (day - 1, &[Some(0)], false),
        (day, &[Some(0)], true),
    ] {
        let decision = build_only(now, orphans).decide();
        assert_eq!(matches!(decision, Decision::Act(Action::Purge)), due, "{now} {orphans:?}: {decision:?}");
        // Nothing to purge is no reason not to clean up, also where no platform is.
        assert_eq!(matches!(decision, Decision::Act(Action::CleanUp)), !due, "{now} {orphans:?}: {decision:?}");
    }
    let mut running = build_only(5, &[None]);
    running.tasks.running.insert(task("purge"));
    assert!(!matches!(running.decide(), Decision::Act(Action::Purge)), "one at a time");
    let failed = Ended::Badly { told: replank_core::fault::Told::permanent("no", ""), tries: 1, at: Millis(5) };
    assert!(!matches!(build_only(6, &[None]).ended("purge", failed).decide(), Decision::Act(Action::Purge)));
}

#[test]
fn what_a_purge_came_to_is_recorded_under_the_contract_s_names() {
    let scene = build_only(5, &[None, None]);
    let keys: Vec<_> = scene.record.orphans.iter().map(|orphan| orphan.key.clone()).collect();
    let ended = |removed: &[OpKey], why: &str, at| Ended::Well {
        outcome: Outcome::Purged(Purged { removed: removed.to_vec(), why: why.to_owned() }),
        at: Millis(at),
    };
    let decision = scene.ended("purge", ended(&keys[..1], "not permitted", 5)).decide();
    let Decision::Record(event) = decision else { panic!("{decision:?}") };
    let mut record = build_only(5, &[None, None]).record;
    let told = |record: &mut Record, event: &Event, now| {
        let commit = apply(record, event, Millis(now)).unwrap();
        *record = commit.record;
        let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
        line
    };
    let line = told(&mut record, &event, 6);
    assert_eq!((line["event"].as_str(), line["why"].as_str()), (Some("orphan_acr_tags"), Some("not permitted")));
    assert_eq!(line["left"], serde_json::json!([format!("acr.example/app:v0.2.0-{}", keys[1])]));
    assert_eq!(line["removed"], serde_json::json!([format!("acr.example/app:v0.2.0-{}", keys[0])]));
    assert_eq!(record.orphans.iter().map(|o| (&o.key, o.tried_at)).collect::<Vec<_>>(), [(&keys[1], Some(Millis(6)))]);
    // The next tries have the other name, whatever they come to; what has been told is not told twice.
    let again = Event::PurgeTried { removed: vec![], why: "not permitted".to_owned() };
    assert_eq!(told(&mut record, &again, 7)["event"], "orphan_purge_attempt");
    let gone = Event::PurgeTried { removed: vec![keys[1].clone()], why: String::new() };
    assert_eq!(told(&mut record, &gone, 8)["event"], "orphan_purge_attempt");
    assert!(record.orphans.is_empty());
    // A purge of before the last change of the record says nothing about what is there now.
    let mut stale = build_only(90_000_000, &[Some(10)]);
    stale.record.updated_at = Millis(10);
    let decision = stale.ended("purge", ended(&[], "old", 9)).decide();
    assert!(matches!(decision, Decision::Act(Action::Purge)), "{decision:?}");
}
