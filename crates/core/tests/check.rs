//! The checker is shown sound worlds, which it must find nothing in, and broken ones, each of which it must call by its name.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use replank_core::check::{Evidence, LogSeen, Misfit, always, at_rest};
use replank_core::event::Event;
use replank_core::fault::Told;
use replank_core::history::{Audit, Line, seal};
use replank_core::phase::*;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::apply;
use replank_core::words::*;
use support::*;

/// Everything that there is after a job, to be broken.
#[derive(Clone)]
struct World {
    record: Record,
    lines: Vec<Line>,
    seen: Observation,
    logs: Vec<LogSeen>,
}

impl World {
    /// 0.1.0 runs and serves, and nothing ever happened.
    fn new() -> Self {
        let record = running_record();
        let old = record.running.clone().unwrap();
        let traffic = TrafficSeen {
            revision: Some(old.revision.clone()),
            generation: 0,
            fallback: None,
            probed: Probed::NotAsked,
        };
        let seen = Observation { at: Millis(0), revisions: BTreeMap::new(), traffic };
        let mut world = Self { record, lines: vec![], seen, logs: vec![] };
        world.runs(&old, true);
        world
    }

    fn after(mut self, events: Vec<Event>) -> Self {
        for event in events {
            let commit = apply(&self.record, &event, Millis(5)).unwrap_or_else(|e| panic!("{}: {e}", event.name()));
            self.record = commit.record;
            self.lines.extend(commit.lines);
        }
        self
    }

    /// One more line in the history, as a chain that nobody broke.
    fn told(mut self, event: &str, details: &[(&str, &str)]) -> Self {
        let job = self.record.job.as_ref().map(|job| job.id.clone());
        let audit = Audit::new(Millis(6), job.as_ref(), event);
        let audit = details.iter().fold(audit, |audit, (name, value)| audit.with(name, *value));
        let (lines, head) = seal(&self.record.history, &[audit]);
        self.lines.extend(lines);
        self.record.history = head;
        self
    }

    /// Every container of a deployment runs.
    fn runs(&mut self, d: &Deployment, alone: bool) {
        let containers = d.plan.containers.iter().map(|(name, plan)| {
            let image = d.images[&plan.component].clone();
            let seen = ContainerSeen { image, running: Running::Running, exit_code: None, trouble: None };
            (name.clone(), seen)
        });
        let revision = RevisionSeen {
            key: Some(d.key.clone()),
            commit: Some(d.commit.clone()),
            containers: containers.collect(),
            probed: Probed::NotAsked,
            returns_alone: alone,
            stopped_at: None,
        };
        self.seen.revisions.insert(d.revision.clone(), revision);
    }

    fn stops(&mut self, d: &Deployment) {
        let revision = self.seen.revisions.get_mut(&d.revision).unwrap();
        revision.returns_alone = false;
        revision.containers.values_mut().for_each(|c| c.running = Running::Stopped);
    }

    fn evidence(&self) -> Evidence<'_> {
        Evidence { record: &self.record, history: &self.lines, seen: Some(&self.seen), logs: &self.logs }
    }

    fn misfits(&self) -> Vec<Misfit> {
        at_rest(&self.evidence())
    }
}

fn built() -> Built {
    Built { image: images('2')[&app()].clone(), bases: BTreeMap::new(), queued_ms: 0, built_ms: 0, adopted: false }
}

fn actor() -> Actor {
    Actor { oid: "op".to_owned(), name: String::new(), from: String::new() }
}

/// The events of a job up to its swap.
fn until_swap(mode: Mode) -> Vec<Event> {
    let old = deployment("job-0", 1);
    vec![
        Event::Start { job: Box::new(job("job-1", 2, mode)), override_quarantine: false },
        Event::Claimed,
        Event::Fetched(fetched()),
        Event::BuildIntended { component: app() },
        Event::BuildDone { component: app(), built: built() },
        Event::BuildsComplete,
        Event::Prepared {
            to: Box::new(deployment("job-1", 2)),
            way_back: WayBack::Snapshot(Box::new(snapshot_of(old))),
            escape_hatch: vec!["docker start it".to_owned()],
        },
    ]
}

fn operated(ops: &[Op]) -> Vec<Event> {
    ops.iter().flat_map(|op| [Event::OpIntended { op: *op }, Event::OpObserved { op: *op }]).collect()
}

/// A whole upgrade to 0.2.0 in single mode, and what it leaves.
fn upgraded() -> World {
    let mut events = until_swap(Mode::Single);
    events.extend(operated(&[Op::StopOld, Op::StartNew, Op::CutOver]));
    let new = deployment("job-1", 2);
    events.push(Event::HandedOver { to: ControllerId::Revision(new.revision.clone()) });
    events.extend(operated(&[Op::Settle]));
    events.push(Event::Completed);
    let mut world = World::new().after(events);
    world.stops(&deployment("job-0", 1));
    world.runs(&new, true);
    world.seen.traffic.revision = Some(new.revision.clone());
    world.seen.traffic.generation = world.record.generation;
    let key = job("job-1", 2, Mode::Single).key("build-app", 1);
    let bytes = format!("--- attempt 1, key {key}, 2026-01-01T00:00:00.000Z\n#1 done\n").into_bytes();
    let id = LogId { job: JobId::new("job-1").unwrap(), component: app() };
    world.logs = vec![LogSeen { id, bytes, closed: true }];
    world
}

#[test]
fn sound_worlds_fit() {
    assert_eq!(World::new().misfits(), []);
    assert_eq!(upgraded().misfits(), []);
    let cancelled = Event::Cancelled { actor: actor(), reason: "no".to_owned() };
    let start = Event::Start { job: Box::new(job("job-1", 2, Mode::Single)), override_quarantine: false };
    assert_eq!(World::new().after(vec![start, cancelled]).misfits(), []);
}

#[test]
fn a_rollback_and_a_flip_back_are_stories_too() {
    let old = deployment("job-0", 1);
    let back = |world: World| {
        let mut events =
            vec![Event::RollbackStarted { actor: actor(), reason: "no good".to_owned(), data_restored: false }];
        events.extend(operated(&[Op::CutOver, Op::StopOld, Op::StartNew, Op::Settle]));
        events.push(Event::HandedOver { to: ControllerId::Revision(old.revision.clone()) });
        events.push(Event::RolledBack);
        let mut world = world.after(events);
        world.runs(&old, true);
        world.seen.traffic.revision = Some(old.revision.clone());
        world.logs.clear();
        world
    };
    let mut rolled_back = upgraded();
    rolled_back.stops(&deployment("job-1", 2));
    assert_eq!(back(rolled_back).misfits(), []);

    let mut events = until_swap(Mode::BlueGreen);
    events.extend(operated(&[Op::StopOld, Op::StartNew]));
    events.extend([Event::Landed, Event::CutOverIntended, Event::OpObserved { op: Op::CutOver }]);
    events.extend([Event::Converged { deadline: Millis(9) }, Event::FlipIntended { why: "500".to_owned() }]);
    events.extend(operated(&[Op::CutOver, Op::StartNew, Op::Settle]));
    events.push(Event::FlippedBack);
    let flipped = World::new().after(events);
    assert_eq!(flipped.record.phase.state(), State::RolledBack);
    assert_eq!(flipped.misfits(), []);
}

#[test]
fn a_job_in_flight_is_sound_but_not_at_rest() {
    let world = World::new().after(until_swap(Mode::Single));
    assert_eq!(always(&world.evidence()), []);
    assert!(matches!(world.misfits()[..], [Misfit::Told { recorded: State::RollingOut, .. }]));
}

/// Breaks a world, and says whether the one misfit that is wanted was found.
fn finds(what: &str, breaks: impl FnOnce(&mut World), wanted: impl Fn(&Misfit) -> bool) {
    let mut world = upgraded();
    breaks(&mut world);
    let misfits = world.misfits();
    assert!(misfits.iter().any(wanted), "{what}: {misfits:?}");
}

#[test]
fn each_broken_world_is_called_by_its_name() {
    let (old, new) = (deployment("job-0", 1), deployment("job-1", 2));
    let to_old = old.revision.clone();
    finds(
        "a line was edited",
        |w| w.lines[2].bytes = String::from_utf8_lossy(&w.lines[2].bytes).replace("fetched", "fetchee").into_bytes(),
        |m| matches!(m, Misfit::History(_)),
    );
    finds("the end was cut", |w| drop(w.lines.pop()), |m| matches!(m, Misfit::History(_)));
    finds(
        "the record went back",
        |w| {
            let head = w.record.history.clone();
            w.record = World::new().after(until_swap(Mode::Single)).record;
            w.record.history = head;
        },
        |m| matches!(m, Misfit::Told { recorded: State::RollingOut, .. }),
    );
    finds(
        "traffic is elsewhere",
        |w| w.seen.traffic.revision = Some(to_old.clone()),
        |m| matches!(m, Misfit::Traffic { .. }),
    );
    finds("traffic is nowhere", |w| w.seen.traffic.revision = None, |m| matches!(m, Misfit::Traffic { .. }));
    finds(
        "a fallback stayed",
        |w| w.seen.traffic.fallback = Some(to_old.clone()),
        |m| matches!(m, Misfit::Fallback(_)),
    );
    finds(
        "a worker runs twice",
        |w| {
            let worker = ContainerName::new("worker").unwrap();
            let there = w.seen.revisions.get_mut(&old.revision).unwrap();
            there.containers.get_mut(&worker).unwrap().running = Running::Running;
        },
        |m| matches!(m, Misfit::Doubled { container, .. } if container.as_str() == "worker"),
    );
    finds("what serves was stopped", |w| w.stops(&new), |m| matches!(m, Misfit::Serving(_)));
    finds(
        "what serves runs something else",
        |w| {
            let there = w.seen.revisions.get_mut(&new.revision).unwrap();
            there.containers.values_mut().for_each(|c| c.image = images('7')[&app()].clone());
        },
        |m| matches!(m, Misfit::Serving(_)),
    );
    let returns =
        |w: &mut World, d: &Deployment, alone| w.seen.revisions.get_mut(&d.revision).unwrap().returns_alone = alone;
    finds(
        "nothing returns",
        |w| returns(w, &new, false),
        |m| matches!(m, Misfit::Reboot { would, .. } if would.is_empty()),
    );
    finds("two return", |w| returns(w, &old, true), |m| matches!(m, Misfit::Reboot { would, .. } if would.len() == 2));
    finds("the old side runs on", |w| w.runs(&old, false), |m| matches!(m, Misfit::Beside(id) if *id == old.revision));
    finds(
        "the old side drives",
        |w| w.record.driver.controller = ControllerId::Revision(old.revision.clone()),
        |m| matches!(m, Misfit::Driver { .. }),
    );
    finds(
        "one key has two revisions",
        |w| {
            let twin = RevisionId::new("v0-2-0-twin").unwrap();
            w.seen.revisions.insert(twin, w.seen.revisions[&new.revision].clone());
        },
        |m| matches!(m, Misfit::Twice { .. }),
    );
}

#[test]
fn each_story_that_cannot_be_is_told_from_those_that_can() {
    let odd = |what: &str, world: World| {
        let misfits = world.misfits();
        assert!(misfits.iter().any(|m| matches!(m, Misfit::Story { .. })), "{what}: {misfits:?}");
    };
    odd("a success that nobody saw", World::new().after(until_swap(Mode::Single)).told("succeeded", &[]));
    odd("a job twice", upgraded().told("start", &[]));
    odd("a second job beside the first", World::new().after(until_swap(Mode::Single)).told("start", &[]));
    odd(
        "an effect without its intent",
        World::new().after(until_swap(Mode::Single)).told("observed", &[("op", "settle")]),
    );
    odd("a rollback that nobody began", upgraded().told("rollback_done", &[]));
    odd("a swap before everything was built", World::new().told("intended", &[("op", "start-new")]));
    odd(
        "a failure of the wrong stage",
        World::new().after(until_swap(Mode::Single)).told("failed", &[("stage", "pre")]),
    );
    odd("a repair in the middle of a job", World::new().after(until_swap(Mode::Single)).told("repair_intended", &[]));
    odd("a cancel of what had changed already", World::new().after(until_swap(Mode::Single)).told("cancelled", &[]));
}

#[test]
fn a_swap_without_a_way_back_shows() {
    let mut world = World::new().after(until_swap(Mode::Single));
    world.record.snapshot = None;
    assert!(always(&world.evidence()).iter().any(|m| matches!(m, Misfit::WayBack(_))));
}

#[test]
fn logs_that_are_not_whole_show() {
    let broken = |change: fn(&mut LogSeen)| {
        let mut world = upgraded();
        change(&mut world.logs[0]);
        let misfits = world.misfits();
        assert!(matches!(misfits[..], [Misfit::Log { .. }]), "{misfits:?}");
    };
    broken(|log| log.closed = false);
    broken(|log| log.bytes.truncate(log.bytes.len() - 1));
    broken(|log| drop(log.bytes.drain(..10)));
    broken(|log| log.bytes.clear());
    broken(|log| log.bytes.extend_from_slice(b"--- attempt 2, key of-somebody-else, 2026-01-01T00:00:00.000Z\n"));
}

/// A failure that is held is left as it stands: only what may never be is a misfit there.
#[test]
fn a_held_failure_may_stand_as_it_is() {
    let mut events = until_swap(Mode::Single);
    events.extend(operated(&[Op::StopOld, Op::StartNew]));
    events.push(Event::Failed { fault: Told::permanent("it does not answer", "") });
    let mut world = World::new().after(events);
    let (old, new) = (deployment("job-0", 1), deployment("job-1", 2));
    world.stops(&old);
    world.runs(&old, true);
    let worker = ContainerName::new("worker").unwrap();
    world.seen.revisions.get_mut(&old.revision).unwrap().containers.get_mut(&worker).unwrap().running =
        Running::Stopped;
    world.runs(&new, false);
    assert_eq!(world.misfits(), []);
    world.runs(&old, true);
    assert!(matches!(world.misfits()[..], [Misfit::Doubled { .. }]));
}
