//! A platform that does what it is told, and everything that a decision may see.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::*;
use replank_core::decide::*;
use replank_core::event::Event;
use replank_core::fault::{Fault, Told};
use replank_core::phase::*;
use replank_core::policy::Policy;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::apply;
use replank_core::words::*;

/// A long time after everything: the controller was down for days.
pub const DAYS: i64 = 300_000_000;

pub fn name(text: &str) -> ContainerName {
    ContainerName::new(text).unwrap()
}

pub fn old() -> Deployment {
    deployment("job-0", 1)
}

pub fn new() -> Deployment {
    deployment("job-1", 2)
}

/// A platform that does what it is told, and everything that a decision may see.
pub struct Scene {
    pub record: Record,
    pub me: ControllerId,
    pub now: Millis,
    pub policy: Policy,
    pub seen: Observation,
    pub presences: Vec<Presence>,
    pub tasks: Tasks,
    /// Looks that were taken before the decision.
    pub looks: u32,
    pub healthy: bool,
}

pub fn scene(record: Record) -> Scene {
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
    pub fn at(mut self, now: i64) -> Self {
        self.now = Millis(now);
        self
    }

    pub fn sick(mut self) -> Self {
        self.healthy = false;
        self
    }

    pub fn looks(mut self, looks: u32) -> Self {
        self.looks = looks;
        self
    }

    pub fn traffic(mut self, to: &Deployment, generation: u64) -> Self {
        self.seen.traffic.revision = Some(to.revision.clone());
        self.seen.traffic.generation = generation;
        self
    }

    /// Containers of a deployment: `true` runs, `false` stopped.
    pub fn with(mut self, d: &Deployment, containers: &[(&str, bool)], alone: bool) -> Self {
        for (container, runs) in containers {
            self.put(d, &name(container), *runs);
        }
        self.seen.revisions.get_mut(&d.revision).unwrap().returns_alone = alone;
        self
    }

    pub fn put(&mut self, d: &Deployment, container: &ContainerName, runs: bool) {
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

    pub fn heard(mut self, who: &Deployment, at: i64, reads_format: u32) -> Self {
        self.presences.push(Presence {
            controller: ControllerId::Revision(who.revision.clone()),
            instance: String::new(),
            reads_format,
            version: String::new(),
            at: Millis(at),
        });
        self
    }

    pub fn ended(mut self, step: &str, ended: Ended) -> Self {
        self.tasks.ended.insert(task(step), ended);
        self
    }

    pub fn decide(&self) -> Decision {
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

    pub fn carry_out(&mut self, change: &Change) -> String {
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
    pub fn ends_as(mut self) -> (State, Vec<String>) {
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

pub fn task(step: &str) -> TaskId {
    TaskId { job: "job-1".to_owned(), step: step.to_owned(), attempt: 1 }
}

pub fn badly(fault: Fault, tries: u32, at: i64) -> Ended {
    Ended::Badly { told: fault.told(), tries, at: Millis(at) }
}

pub fn failed(decision: &Decision) -> Option<&Told> {
    match decision {
        Decision::Record(Event::Failed { fault }) => Some(fault),
        _ => None,
    }
}

pub fn swap_of(record: &mut Record) -> &mut Swap {
    match &mut record.phase {
        Phase::RollingOut(swap) | Phase::Validating(swap) => swap,
        Phase::Confirming(c) => &mut c.swap,
        Phase::RollingBack(back) => &mut back.swap,
        other => panic!("{other:?}"),
    }
}

/// A record whose swap has done exactly `ops`.
pub fn swapping(state: State, mode: Mode, ops: &[Op]) -> Record {
    let mut record = record_in(state, mode);
    if let Phase::Confirming(c) = &mut record.phase {
        c.flip = None;
    }
    swap_of(&mut record).ops.retain(|op, _| ops.contains(op));
    record.generation = 1;
    record
}

pub const FULL: &[(&str, bool)] = &[("app", true), ("worker", true)];
pub const NO_WORKER: &[(&str, bool)] = &[("app", true), ("worker", false)];
