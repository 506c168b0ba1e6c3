//! What runs is not what was recorded: seen for long enough, told once, and in the way of upgrades alone.

use crate::scene::*;
use crate::support::*;
use replank_core::decide::*;
use replank_core::drift::{self, DRIFT_MAX, Drift};
use replank_core::event::Event;
use replank_core::phase::*;
use replank_core::record::*;
use replank_core::transition::{Refused, apply, next};
use replank_core::words::*;

const UP: &[(&str, bool)] = FULL;
const WORKER_DOWN: &[(&str, bool)] = &[("app", true), ("worker", false)];
const NO_SUCH_WORKER: &[(&str, bool)] = &[("app", true)];

/// At rest on the old deployment, which returns alone: nobody but a person stopped anything.
fn resting(containers: &[(&str, bool)]) -> Scene {
    let mut record = record_in(State::Succeeded, Mode::BlueGreen);
    record.snapshot = None;
    let scene = scene(record).at(0).heard(&old(), 0, 2).with(&old(), containers, true).traffic(&old(), 1);
    scene.ended("clean-up", Ended::Well { outcome: Outcome::CleanedUp, at: Millis(0) })
}

/// What is decided after looks at these times, the last of which is now.
fn after(scene: &Scene, looks: &[(i64, &[(&str, bool)])]) -> Decision {
    let mut streaks = Streaks::default();
    let mut last = scene.seen.clone();
    for (at, containers) in looks {
        last = resting(containers).seen;
        last.at = Millis(*at);
        streaks.see_at_rest(&scene.record, &last);
    }
    decide(&View {
        record: &scene.record,
        me: &scene.me,
        now: last.at,
        policy: &scene.policy,
        observation: Some(&last),
        streaks: &streaks,
        presences: &scene.presences,
        tasks: &scene.tasks,
    })
}

fn seen(decision: &Decision) -> Option<Vec<String>> {
    match decision {
        Decision::Record(Event::DriftSeen { what }) => Some(what.clone()),
        Decision::Record(_) | Decision::Act(_) | Decision::Wait { .. } => None,
    }
}

#[test]
fn a_difference_is_told_once_it_has_lasted_and_its_end_at_once() {
    let scene = resting(WORKER_DOWN);
    let stopped = vec!["container worker is stopped".to_owned()];
    assert_eq!(seen(&after(&scene, &[(0, WORKER_DOWN), (29_999, WORKER_DOWN)])), None, "a restart is no drift");
    assert_eq!(seen(&after(&scene, &[(0, WORKER_DOWN), (30_000, WORKER_DOWN)])), Some(stopped.clone()));
    assert_eq!(
        seen(&after(&scene, &[(0, WORKER_DOWN), (15_000, UP), (30_000, WORKER_DOWN)])),
        None,
        "it was well in between"
    );
    assert_eq!(seen(&after(&scene, &[(0, UP), (60_000, UP)])), None);
    // Another difference is another one, from its own first sight on.
    let changed = &[(0, WORKER_DOWN), (20_000, NO_SUCH_WORKER), (49_999, NO_SUCH_WORKER)];
    assert_eq!(seen(&after(&scene, changed)), None);

    let event = Event::DriftSeen { what: stopped.clone() };
    let told = apply(&scene.record, &event, Millis(30_000)).unwrap();
    assert!(String::from_utf8_lossy(&told.lines[0].bytes).contains("\"event\":\"drift_seen\""));
    let mut known = resting(WORKER_DOWN);
    known.record = told.record;
    assert_eq!(seen(&after(&known, &[(0, WORKER_DOWN), (90_000, WORKER_DOWN)])), None, "told once");
    let gone = after(&known, &[(0, WORKER_DOWN), (15_000, UP)]);
    assert_eq!(seen(&gone), Some(vec![]), "what is put right needs no second look");
    let Decision::Record(event) = gone else { unreachable!() };
    let after = apply(&known.record, &event, Millis(15_000)).unwrap();
    assert_eq!(after.record.drift, None);
    assert!(String::from_utf8_lossy(&after.lines[0].bytes).contains("\"event\":\"drift_gone\""));
}

#[test]
fn each_difference_has_its_sentence() {
    let mut images = resting(UP);
    let other = deployment("job-7", 5);
    images.seen.revisions.get_mut(&old().revision).unwrap().containers.get_mut(&name("app")).unwrap().image =
        other.images[&app()].clone();
    let mut unknown = resting(UP);
    unknown.put(&old(), &name("debug"), true);
    let mut ill = resting(UP);
    let revision = ill.seen.revisions.get_mut(&old().revision).unwrap();
    revision.containers.get_mut(&name("worker")).unwrap().trouble = Some("crash\nloop".to_owned());
    let mut stranger = resting(UP);
    stranger.seen.revisions.get_mut(&old().revision).unwrap().commit = Some(sha('9'));
    let mut nothing = resting(UP);
    nothing.seen.revisions.clear();
    let mut cut_off = resting(UP);
    cut_off.seen.traffic.revision = None;
    for (scene, expect) in [
        (resting(UP), ""),
        (resting(WORKER_DOWN), "container worker is stopped"),
        (resting(NO_SUCH_WORKER), "container worker is gone"),
        (images, "container app runs "),
        (unknown, "container debug runs beside them and is not recorded"),
        (ill, "container worker: crash loop"),
        (stranger, "was not made by the job that is recorded"),
        (nothing, "nothing of revision "),
        (cut_off, "no traffic goes anywhere"),
    ] {
        let what = drift::of(&old(), &scene.seen);
        match expect {
            "" => assert!(what.is_empty(), "{what:?}"),
            _ => assert!(what.iter().any(|sentence| sentence.contains(expect)), "{expect}: {what:?}"),
        }
    }
    let mut many = resting(UP);
    for other in 0..2 * DRIFT_MAX {
        many.put(&old(), &name(&format!("other{other}")), true);
    }
    assert_eq!(drift::of(&old(), &many.seen).len(), DRIFT_MAX);
}

/// What a job left, held or under way, is the job's, and is told by its state.
#[test]
fn only_what_was_proved_and_serves_can_drift() {
    for state in State::ALL {
        let mut scene = resting(WORKER_DOWN);
        scene.record = Record { snapshot: None, ..record_in(state, Mode::BlueGreen) };
        let expect = matches!(state, State::Succeeded | State::FailedPre | State::RolledBack);
        assert_eq!(scene.record.proved_and_serving().is_some(), expect, "{}", state.name());
        let told = seen(&after(&scene, &[(0, WORKER_DOWN), (90_000, WORKER_DOWN)]));
        assert_eq!(told.is_some(), expect, "{}", state.name());
    }
    let mut unproved = record_in(State::Succeeded, Mode::BlueGreen);
    unproved.serving = Some(new());
    assert_eq!(unproved.proved_and_serving(), None);
}

fn drifted(what: &[&str]) -> Record {
    let what = what.iter().map(|sentence| (*sentence).to_owned()).collect();
    let mut record = record_in(State::Succeeded, Mode::BlueGreen);
    record.drift = Some(Drift { what, since: Millis(1), accepted: false });
    record
}

fn start(build_only: bool) -> Event {
    let job = Job { build_only, ..job("job-9", 3, Mode::BlueGreen) };
    Event::Start { job: Box::new(job), override_quarantine: false }
}

fn accept(what: &[&str]) -> Event {
    let what = what.iter().map(|sentence| (*sentence).to_owned()).collect();
    Event::DriftAccepted { actor: Actor::system(), reason: "the queue is mended first".to_owned(), what }
}

#[test]
fn an_upgrade_waits_for_the_drift_to_be_accepted_and_a_way_back_never_does() {
    let record = drifted(&["container worker is stopped", "container app is gone"]);
    let Err(Refused::Drifted { what }) = next(&record, &start(false), Millis(2)) else { panic!("it starts") };
    assert_eq!(what, "container worker is stopped, and 1 more");
    assert!(next(&record, &start(true), Millis(2)).is_ok(), "what only builds touches nothing that runs");
    let back = Event::RollbackStarted { actor: Actor::system(), reason: String::new(), data_restored: false };
    assert!(next(&record, &back, Millis(2)).is_ok(), "who goes back is in a hurry");
    // Exactly what is there: neither less nor something that was.
    for other in [&["container worker is stopped"][..], &[], &["container app is gone", "container worker is stopped"]]
    {
        assert_eq!(next(&record, &accept(other), Millis(2)), Err(Refused::OtherDrift), "{other:?}");
    }
    let accepted =
        apply(&record, &accept(&["container worker is stopped", "container app is gone"]), Millis(2)).unwrap();
    let line = String::from_utf8_lossy(&accepted.lines[0].bytes).into_owned();
    assert!(
        line.contains("drift_accepted")
            && line.contains("the queue is mended first")
            && line.contains("container app is gone"),
        "{line}"
    );
    assert!(next(&accepted.record, &start(false), Millis(3)).is_ok());
    // What differs later was not accepted.
    let later = Event::DriftSeen { what: vec!["nothing of revision x is there".to_owned()] };
    let later = apply(&accepted.record, &later, Millis(4)).unwrap().record;
    assert!(matches!(next(&later, &start(false), Millis(5)), Err(Refused::Drifted { .. })));
    assert_eq!(next(&drifted(&[]), &accept(&["x"]), Millis(2)), Err(Refused::OtherDrift));
}

#[test]
fn from_the_swap_on_a_drift_is_history() {
    let mut record = record_in(State::Patching, Mode::BlueGreen);
    record.drift = Some(Drift { what: vec!["container app is gone".to_owned()], since: Millis(1), accepted: true });
    let way_back = WayBack::Snapshot(Box::new(snapshot_of(record.running.clone().unwrap())));
    let prepared = Event::Prepared { to: Box::new(deployment("job-1", 2)), way_back, escape_hatch: vec![] };
    assert_eq!(apply(&record, &prepared, Millis(9)).unwrap().record.drift, None);
    // A job that touched nothing leaves what runs as it was.
    let failed = Event::Failed { fault: replank_core::fault::Told::permanent("no room", "") };
    assert!(apply(&record, &failed, Millis(9)).unwrap().record.drift.is_some());
}
