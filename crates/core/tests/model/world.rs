//! The modelled world: one ledger, controllers, operators, and a platform that carries out whatever arrives.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use replank_core::decide::{Decision, Ended, TaskId};
use replank_core::event::Event;
use replank_core::phase::Mode;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::words::*;

use crate::support;

/// What was broken, as bits, so that one state can tell everything.
pub mod broken {
    pub const JOB_REPLACED: u16 = 1;
    pub const SECOND_REVISION: u16 = 2;
    pub const SECOND_COPY: u16 = 4;
    pub const UNPROVED: u16 = 8;
    pub const AUDIT_LOST: u16 = 16;
    pub const NO_WAY_BACK: u16 = 32;
    pub const GENERATION_DOWN: u16 = 64;
    pub const OWN_GOAL: u16 = 128;
    pub const NEEDED_REMOVED: u16 = 256;
    pub const TOUCHED_EARLY: u16 = 512;
    pub const BLIND: u16 = 1_024;
    pub const SHUT_OUT: u16 = 2_048;
    pub const TWICE: u16 = 4_096;
}

/// How the new revisions behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    Good,
    /// Starts, and its probes never answer.
    Never,
    /// Answers, and stops to answer at some moment after it took the traffic.
    Degrades,
    /// Its first container may end by itself, once.
    Exits,
}

/// Which record formats the releases' Replanks read. The first release's is this very build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Formats {
    /// All the same.
    One,
    /// The second and third release's are newer. They write what this build cannot read as soon as nobody who is needed
    /// would be shut out by it.
    Newer,
    /// The third release's is this build again.
    NewerAndBack,
}

/// A seeded mistake, each of which some invariant must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The ledger takes a commit whatever happened since the record was loaded.
    NoCompareAndSwap,
    /// A start does not look whether a job is in flight.
    StartInFlight,
    /// Probes count as passed although nobody asked.
    ProbesUnasked,
    /// A take-over leaves no line in the history.
    AuditDropped,
    /// The swap begins with nothing to go back to.
    NoSnapshot,
    /// The new revision's key depends on the process that makes it.
    KeyPerProcess,
    /// The platform gives every request a container of its own.
    NamesDoNotCollide,
    /// The proxy does whatever it was told last.
    ProxyIgnoresGenerations,
    /// Who does not drive tidies up all the same.
    ActsForTheDriver,
    /// Success is declared when the new side is healthy, traffic or not.
    SuccessWithoutTraffic,
    /// Strays are looked for without looking at what the record needs.
    RemovesWhatIsNeeded,
    /// A controller acts on the platform before everything is built.
    StartsBeforeBuilt,
    /// Nothing is put right at rest.
    NoRepair,
    /// Nobody takes over from a silent driver.
    NoTakeOver,
    /// A record is used whatever reader it asks for.
    ReadsBlindly,
    /// A newer Replank writes its own format at once.
    RaisesAtOnce,
    /// Every new release's Replank is taken to read everything.
    TakesAnyReader,
    /// A commit whose answer was lost is made again without loading the record.
    CommitsAgain,
    /// A start whose answer was lost is made again without a look for its job.
    StartsAgain,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub mode: Mode,
    pub health: Health,
    pub policy: OnRolloutFailure,
    /// Crashes, pauses, time-outs, half-done effects and refusals in one history of the world.
    pub faults: u8,
    /// Jobs that operators may start one after the other.
    pub jobs: u8,
    /// The second operator may also roll back, once.
    pub rollback: bool,
    /// How the second container lives beside its successor.
    pub overlap: Overlap,
    pub formats: Formats,
    pub mutant: Option<Mutant>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Container {
    pub running: bool,
    pub alone: bool,
    pub copies: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Revision {
    pub deployment: Arc<Deployment>,
    pub containers: BTreeMap<ContainerName, Container>,
}

impl Revision {
    pub fn serves(&self) -> bool {
        self.containers.get(&app()).is_some_and(|c| c.running)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Platform {
    pub revisions: BTreeMap<RevisionId, Revision>,
    pub traffic: Option<RevisionId>,
    pub generation: u64,
    pub fallback: Option<RevisionId>,
    pub sick: BTreeSet<RevisionId>,
}

/// A controller process. It dies with its container; a crash leaves a new one with nothing in its head.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Controller {
    pub pending: Option<Pending>,
    pub running: BTreeSet<TaskId>,
    /// Only what a later decision can tell from "never tried".
    pub ended: BTreeMap<TaskId, Badly>,
    /// The others see its heartbeat as stale, until it goes on.
    pub silent: bool,
}

/// How a task ended, where it matters. The back-off is always over in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Badly {
    Perhaps,
    ForGood,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pending {
    pub decision: Arc<Thought>,
    /// What it was decided on, once the ledger has moved on. Only the mutant without compare-and-swap keeps such a commit.
    pub base: Option<Arc<Record>>,
    /// It was committed, and its answer was lost. Only the mutant that does not load again keeps such a commit.
    pub again: bool,
}

impl Pending {
    pub fn new(thought: Thought) -> Self {
        Self { decision: Arc::new(thought), base: None, again: false }
    }
}

/// The part of a decision that is carried out later.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(clippy::large_enum_variant)]
pub enum Thought {
    Record(Event),
    Change(TaskId, Change),
}

impl Thought {
    pub fn of(decision: Decision) -> Option<Self> {
        match decision {
            Decision::Record(event) => Some(Self::Record(event)),
            Decision::Act(replank_core::decide::Action::Change { task, change }) => Some(Self::Change(task, change)),
            Decision::Act(_) | Decision::Wait { .. } => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    Start(u8),
    Rollback,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Operator {
    pub script: Vec<Verb>,
    pub pending: Option<Pending>,
}

/// An effect that was asked for and has not arrived.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Flight {
    pub change: Arc<Change>,
    pub task: TaskId,
    /// Who waits for the answer; nobody after a crash or a time-out.
    pub waiting: Option<RevisionId>,
}

impl Flight {
    pub fn order(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub record: Arc<Record>,
    pub controllers: BTreeMap<RevisionId, Controller>,
    pub operators: Vec<Operator>,
    pub platform: Arc<Platform>,
    pub flights: Vec<Flight>,
    /// Every budget of the phase is over.
    pub late: bool,
    /// At rest, the time of the snapshot is over.
    pub expired: bool,
    pub faults: u8,
    pub jobs: u8,
    // Ghosts: what the properties need to know and nobody in the model can read.
    pub ran_before: Option<RevisionId>,
    pub protected: bool,
    /// The revision that has the traffic answered through it since it got it.
    pub proved: bool,
    pub broken: u16,
}

pub fn app() -> ContainerName {
    ContainerName::new("app").unwrap()
}

pub fn worker() -> ContainerName {
    ContainerName::new("worker").unwrap()
}

pub fn plan(config: &Config) -> Plan {
    let mut plan = support::plan();
    plan.containers.get_mut(&worker()).unwrap().overlap = config.overlap;
    plan
}

/// The highest record format that a revision's Replank reads.
pub fn reads(config: &Config, id: &RevisionId) -> u32 {
    match config.formats {
        // In a world of one format it does not matter.
        Formats::One => 2,
        _ if id.as_str().starts_with("v0-1-") => replank_core::format::FORMAT,
        Formats::NewerAndBack if id.as_str().starts_with("v0-3-") => replank_core::format::FORMAT,
        Formats::Newer | Formats::NewerAndBack => replank_core::format::FORMAT + 1,
    }
}

/// Everybody who may have to drive from this record on: both sides of a swap that is held as well.
pub fn needed(record: &Record) -> impl Iterator<Item = &RevisionId> {
    let swap = record.phase.swap();
    [
        record.running.as_ref(),
        record.serving.as_ref(),
        record.snapshot.as_ref().map(|s| &s.deployment),
        swap.and_then(|s| s.from.as_ref()),
        swap.map(|s| &s.to),
    ]
    .into_iter()
    .flatten()
    .map(|d| &d.revision)
}

pub fn first_world(config: &Config) -> World {
    let mut record = support::running_record();
    let mut old = record.running.clone().unwrap();
    old.plan = plan(config);
    record.running = Some(old.clone());
    record.serving = Some(old.clone());
    record.generation = 1;
    let container = Container { running: true, alone: true, copies: 1 };
    let revision = Revision {
        deployment: Arc::new(old.clone()),
        containers: BTreeMap::from([(app(), container.clone()), (worker(), container)]),
    };
    let platform = Platform {
        revisions: BTreeMap::from([(old.revision.clone(), revision)]),
        traffic: Some(old.revision.clone()),
        generation: 1,
        ..Platform::default()
    };
    let operator = |script: Vec<Verb>| Operator { script, pending: None };
    let mut second = vec![Verb::Start(3)];
    if config.rollback {
        second.push(Verb::Rollback);
    }
    World {
        record: Arc::new(record),
        controllers: BTreeMap::from([(old.revision, Controller::default())]),
        operators: vec![operator(vec![Verb::Start(2)]), operator(second)],
        platform: Arc::new(platform),
        flights: vec![],
        late: false,
        expired: false,
        faults: config.faults,
        jobs: 0,
        ran_before: None,
        protected: false,
        proved: true,
        broken: 0,
    }
}

impl World {
    pub fn platform_mut(&mut self) -> &mut Platform {
        Arc::make_mut(&mut self.platform)
    }

    /// A process ends: what it had in its head is gone, what it had asked for is not.
    pub fn dies(&mut self, who: &RevisionId) {
        self.controllers.remove(who);
        for flight in &mut self.flights {
            if flight.waiting.as_ref() == Some(who) {
                flight.waiting = None;
            }
        }
        self.flights.sort_by_cached_key(Flight::order);
    }

    fn refused_generation(&self, config: &Config, generation: u64, equal: bool) -> bool {
        let at = self.platform.generation;
        config.mutant != Some(Mutant::ProxyIgnoresGenerations) && (generation < at || (generation == at && !equal))
    }

    /// A request arrives. The platform remembers no request; it looks at what is there, and does it. `partly`: the machinery
    /// dies after the first container.
    pub fn carry_out(&mut self, config: &Config, change: &Change, partly: bool) {
        match change {
            Change::Start { deployment, containers } => self.start(config, deployment, containers, partly),
            Change::Stop { deployment, containers } => {
                let retires = deployment.plan.with_overlap(Overlap::Allowed).any(|name| containers.contains(name));
                if retires && self.platform.traffic.as_ref() == Some(&deployment.revision) {
                    return;
                }
                let take = if partly { 1 } else { usize::MAX };
                for name in containers.iter().take(take) {
                    let revisions = &mut self.platform_mut().revisions;
                    if let Some(revision) = revisions.get_mut(&deployment.revision)
                        && let Some(container) = revision.containers.get_mut(name)
                    {
                        (container.running, container.alone) = (false, false);
                        if *name == app() {
                            self.dies(&deployment.revision);
                        }
                    }
                }
            }
            Change::Shift { to, generation, fallback } => {
                if !self.platform.revisions.contains_key(&to.revision)
                    || self.refused_generation(config, *generation, false)
                {
                    return;
                }
                if self.platform.traffic.as_ref() != Some(&to.revision) {
                    self.proved = false;
                }
                let platform = self.platform_mut();
                platform.traffic = Some(to.revision.clone());
                platform.fallback = fallback.as_ref().map(|d| d.revision.clone());
                if let Some(kept) = fallback.as_ref().and_then(|d| platform.revisions.get_mut(&d.revision)) {
                    kept.containers.values_mut().filter(|c| c.running).for_each(|c| c.alone = true);
                }
                self.generation_is(*generation);
            }
            Change::Settle { deployment, not, generation } => {
                let there = self.platform.revisions.get(&deployment.revision);
                let complete = deployment
                    .plan
                    .containers
                    .keys()
                    .all(|name| there.and_then(|r| r.containers.get(name)).is_some_and(|c| c.running));
                if !complete || self.refused_generation(config, *generation, true) {
                    return;
                }
                let platform = self.platform_mut();
                for (id, revision) in &mut platform.revisions {
                    for container in revision.containers.values_mut() {
                        if *id == deployment.revision {
                            container.alone = true;
                        } else if not.contains(id) {
                            container.alone = false;
                        }
                    }
                }
                if !partly {
                    platform.fallback = None;
                    self.generation_is(*generation);
                }
            }
            Change::Halt { revision } => {
                if self.platform.traffic.as_ref() == Some(revision) {
                    return;
                }
                self.is_not_needed(revision);
                let take = if partly { 1 } else { usize::MAX };
                let mut controller = false;
                if let Some(there) = self.platform_mut().revisions.get_mut(revision) {
                    for (name, container) in there.containers.iter_mut().take(take) {
                        (container.running, container.alone) = (false, false);
                        controller |= *name == app();
                    }
                }
                if controller {
                    self.dies(revision);
                }
            }
            Change::Remove { revision } => {
                if self.platform.traffic.as_ref() == Some(revision) {
                    return;
                }
                self.is_not_needed(revision);
                if self.platform_mut().revisions.remove(revision).is_some() {
                    self.dies(revision);
                }
            }
        }
    }

    fn is_not_needed(&mut self, revision: &RevisionId) {
        let r = &self.record;
        let needed = [
            r.running.as_ref(),
            r.serving.as_ref(),
            r.snapshot.as_ref().map(|s| &s.deployment),
            r.phase.swap().filter(|_| r.phase.state().in_flight()).map(|s| &s.to),
        ];
        if needed.into_iter().flatten().any(|d| d.revision == *revision) {
            self.broken |= broken::NEEDED_REMOVED;
        }
    }

    fn generation_is(&mut self, generation: u64) {
        if generation < self.platform.generation {
            self.broken |= broken::GENERATION_DOWN;
        }
        self.platform_mut().generation = generation;
    }

    fn start(&mut self, config: &Config, deployment: &Deployment, containers: &BTreeSet<ContainerName>, partly: bool) {
        let copies = config.mutant == Some(Mutant::NamesDoNotCollide);
        let platform = self.platform_mut();
        let created = !platform.revisions.contains_key(&deployment.revision);
        let revision = platform
            .revisions
            .entry(deployment.revision.clone())
            .or_insert_with(|| Revision { deployment: Arc::new(deployment.clone()), containers: BTreeMap::new() });
        let take = if partly { 1 } else { usize::MAX };
        let mut doubled = false;
        let mut controller = false;
        for name in containers.iter().take(take) {
            match revision.containers.get_mut(name) {
                Some(container) => {
                    controller |= !container.running && *name == app();
                    container.running = true;
                    if copies {
                        container.copies += 1;
                        doubled = true;
                    }
                }
                None => {
                    controller |= *name == app();
                    let container = Container { running: true, alone: false, copies: 1 };
                    revision.containers.insert(name.clone(), container);
                }
            }
        }
        let made_by = |r: &Revision| r.deployment.commit == deployment.commit;
        let of_job = platform.revisions.values().filter(|r| made_by(r)).count();
        if created && config.health == Health::Never {
            platform.sick.insert(deployment.revision.clone());
        }
        if created && of_job > 1 {
            self.broken |= broken::SECOND_REVISION;
        }
        if doubled {
            self.broken |= broken::SECOND_COPY;
        }
        if controller {
            self.controllers.insert(deployment.revision.clone(), Controller::default());
        }
    }

    /// A true look.
    pub fn observe(&self, ask: &Ask, now: Millis) -> Observation {
        let platform = &self.platform;
        let answers = |id: &RevisionId| {
            let there = platform.revisions.get(id).is_some_and(Revision::serves);
            if there && !platform.sick.contains(id) { Probed::Passed } else { Probed::Failed("no answer".to_owned()) }
        };
        let revisions = platform.revisions.iter().map(|(id, revision)| {
            let asked = ask.direct.iter().any(|d| d.revision == *id);
            let any = revision.containers.values().any(|c| c.running);
            let containers = revision.containers.iter().map(|(name, container)| {
                let seen = ContainerSeen {
                    image: revision.deployment.images[&support::app()].clone(),
                    running: if container.running { Running::Running } else { Running::Stopped },
                    exit_code: None,
                    trouble: None,
                };
                (name.clone(), seen)
            });
            let seen = RevisionSeen {
                key: Some(revision.deployment.key.clone()),
                commit: Some(revision.deployment.commit.clone()),
                containers: containers.collect(),
                probed: if asked { answers(id) } else { Probed::NotAsked },
                returns_alone: revision.containers.values().all(|c| c.alone),
                stopped_at: (!any).then_some(Millis(0)),
            };
            (id.clone(), seen)
        });
        Observation {
            at: now,
            revisions: revisions.collect(),
            traffic: TrafficSeen {
                revision: platform.traffic.clone(),
                generation: platform.generation,
                fallback: platform.fallback.clone(),
                probed: match (&ask.through, &platform.traffic) {
                    (Some(_), Some(id)) => answers(id),
                    (Some(_), None) => Probed::Failed("nothing is routed".to_owned()),
                    (None, _) => Probed::NotAsked,
                },
            },
        }
    }
}

impl Badly {
    pub fn ended(self) -> Ended {
        let told = match self {
            Self::Perhaps => replank_core::fault::Fault::indeterminate("no answer").told(),
            Self::ForGood => replank_core::fault::Fault::permanent("refused").told(),
        };
        Ended::Badly { told, tries: 1, at: Millis(-1_000_000) }
    }
}
