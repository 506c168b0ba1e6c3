//! What one universe holds: everything outside of the controllers, and the processes that the controllers are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replank::engine::LocalEngine;
use replank_core::data::{DataPlan, DataStep, Schema, StepKind};
use replank_core::image::ImageId;
use replank_core::phase::Mode;
use replank_core::policy::{Budgets, Policy};
use replank_core::ports::{Clock, Ids, LogId, TagRef};
use replank_core::record::{OnRolloutFailure, Overlap};
use replank_core::words::{
    CommitSha, ComponentName, ContainerName, Digest, InstallationId, Millis, OpKey, RevisionId, Version,
};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::chance::{Health, Rates};
use crate::ledger::LedgerState;
use crate::platform::PlatformState;

/// The beginning of every universe.
const EPOCH: i64 = 1_700_000_000_000;

/// A release of the made-up application.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub tag: TagRef,
    pub health: Health,
    /// Highest record format that its Replank reads.
    pub reads: u32,
    pub data: DataPlan,
}

/// One controller's process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Tells a process from its predecessor in the same container.
    pub number: u64,
    /// None where it was never paused: nobody has to ask for the time then.
    pub paused_until: Option<Millis>,
    pub loop_: AbortHandle,
    pub engine: Arc<LocalEngine>,
}

#[derive(Debug, Default)]
pub(crate) struct LogState {
    pub bytes: Vec<u8>,
    pub fence: u64,
    pub closed: bool,
}

/// A data step's container.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub ends_at: Millis,
    pub exit_code: i64,
}

/// An image as the registry has it.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub id: ImageId,
    pub reads: u32,
    pub at: Millis,
    pub kept: bool,
}

#[derive(Debug)]
pub(crate) struct State {
    pub rng: fastrand::Rng,
    pub rates: Rates,
    pub ledger: LedgerState,
    pub platform: PlatformState,
    pub images: BTreeMap<Digest, Stored>,
    /// Newest last.
    pub releases: Vec<Release>,
    /// Data steps by key: how each ended, or will.
    pub steps: BTreeMap<OpKey, Step>,
    pub logs: BTreeMap<LogId, LogState>,
    pub processes: BTreeMap<RevisionId, Process>,
    pub next_process: u64,
    /// Effects on their way.
    pub under_way: u32,
    /// Answers through the public way in, in a row, since the traffic last moved.
    pub through: u32,
    pub faults: u64,
    pub violations: Vec<String>,
    /// What happened, where somebody wants to read it.
    pub trace: Option<Vec<String>>,
}

/// A seeded mistake of the universe's parts, which a verdict must notice: production counts on each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The ledger takes every commit.
    NoCompareAndSwap,
    /// The proxy does whatever it was told last.
    ProxyIgnoresGenerations,
    /// An image that was to be protected is not.
    ProtectsNothing,
    /// Whatever runs answers.
    ProbesLie,
}

/// One universe.
#[derive(Debug)]
pub(crate) struct World {
    pub mutant: Option<Mutant>,
    state: Mutex<State>,
    begun: Instant,
    is_traced: bool,
    pub policy: Policy,
    pub mode: Mode,
    pub on_rollout_failure: OnRolloutFailure,
    /// How the third container lives beside its successor.
    pub overlap: Overlap,
    /// Some releases come with a Replank of the next record format.
    pub two_formats: bool,
}

pub(crate) fn component(name: &str) -> ComponentName {
    ComponentName::new(name).unwrap_or_else(|bad| unreachable!("{bad}"))
}

pub(crate) fn container(name: &str) -> ContainerName {
    ContainerName::new(name).unwrap_or_else(|bad| unreachable!("{bad}"))
}

pub(crate) fn installation() -> InstallationId {
    InstallationId::new("simulated0000000").unwrap_or_else(|bad| unreachable!("{bad}"))
}

impl World {
    pub(crate) fn new(seed: u64, trace: bool, mutant: Option<Mutant>) -> Arc<Self> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mode = if rng.bool() { Mode::Single } else { Mode::BlueGreen };
        let on_rollout_failure = if rng.bool() { OnRolloutFailure::Hold } else { OnRolloutFailure::Rollback };
        let overlap = [Overlap::Allowed, Overlap::StopOldFirst, Overlap::StartAfterCutover][rng.usize(0..3)];
        let two_formats = rng.u32(0..3) == 0;
        let state = State {
            rates: Rates::CALM,
            ledger: LedgerState::default(),
            platform: PlatformState::default(),
            images: BTreeMap::new(),
            releases: Vec::new(),
            steps: BTreeMap::new(),
            logs: BTreeMap::new(),
            processes: BTreeMap::new(),
            next_process: 0,
            under_way: 0,
            through: 0,
            faults: 0,
            violations: Vec::new(),
            trace: trace.then(Vec::new),
            rng,
        };
        Arc::new(Self {
            mutant,
            state: Mutex::new(state),
            begun: Instant::now(),
            is_traced: trace,
            policy: policy(),
            mode,
            on_rollout_failure,
            overlap,
            two_formats,
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere fails the universe by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now(&self) -> Millis {
        Millis(EPOCH).plus(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn instant(&self, at: Millis) -> Instant {
        self.begun + std::time::Duration::from_millis(at.since(Millis(EPOCH)))
    }

    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        if !self.is_traced {
            return;
        }
        let now = self.now();
        let mut state = self.state();
        if let Some(trace) = &mut state.trace {
            let second = now.since(Millis(EPOCH)) as f64 / 1_000.0;
            trace.push(format!("{second:>9.3} {}", what()));
        }
    }

    pub(crate) fn is_traced(&self) -> bool {
        self.is_traced
    }

    pub(crate) fn violated(&self, what: String) {
        self.tell(|| format!("VIOLATION {what}"));
        self.state().violations.push(what);
    }
}

/// Production's numbers but for the long ones, which would only be waited through.
fn policy() -> Policy {
    const SECOND: u64 = 1_000;
    Policy {
        budgets: Budgets {
            queued: 60 * SECOND,
            fetching: 60 * SECOND,
            building: 120 * SECOND,
            patching: 60 * SECOND,
            rolling_out: 120 * SECOND,
            landing: 40 * SECOND,
            validating: 60 * SECOND,
            confirm_window: 15 * SECOND,
            convergence: 60 * SECOND,
            rolling_back: 120 * SECOND,
        },
        change: 60 * SECOND,
        keep_containers: 120 * SECOND,
        keep_images: 1_800 * SECOND,
        clean_up_every: 300 * SECOND,
        // Seldom, as it is what happens least in these: a job takes a minute here.
        progress_every: 60 * SECOND,
        ..Policy::default()
    }
}

/// Virtual wall time.
#[derive(Debug)]
pub(crate) struct SimClock(pub Arc<World>);

impl Clock for SimClock {
    fn now(&self) -> Millis {
        self.0.now()
    }
}

/// Ids from the universe's seed.
#[derive(Debug)]
pub(crate) struct SimIds(pub Arc<World>);

impl Ids for SimIds {
    fn random(&self, n: usize) -> Vec<u8> {
        let mut state = self.0.state();
        (0..n).map(|_| state.rng.u8(..)).collect()
    }
}

impl State {
    /// A new release of the application on its remote.
    pub(crate) fn publish(&mut self, two_formats: bool, health: Health) -> Version {
        let minor = self.releases.len() as u64 + 1;
        let version = Version::release(0, minor, 0);
        let hex: String = (0..40).map(|_| char::from(b"0123456789abcdef"[self.rng.usize(0..16)])).collect();
        let commit = CommitSha::new(hex).unwrap_or_else(|bad| unreachable!("{bad}"));
        let first = replank_core::format::FIRST;
        let reads = if two_formats && self.rng.bool() { first + 1 } else { first };
        let tag = TagRef {
            raw_ref: format!("refs/tags/{}", version.tag()),
            version: version.clone(),
            commit,
            tag_object: None,
            refused: None,
        };
        let data = self.data_of_release(&version);
        self.releases.push(Release { tag, health, reads, data });
        version
    }

    /// Most releases leave the data alone.
    fn data_of_release(&mut self, version: &Version) -> DataPlan {
        let step = |kind, name: &str| DataStep {
            name: container(name),
            kind,
            component: component("app"),
            budget: 30_000,
            spec: serde_json::Value::Null,
        };
        let mut data = DataPlan::default();
        if version.minor == 1 || self.rng.u32(0..4) != 0 {
            return data;
        }
        if self.rng.bool() {
            data.steps.push(step(StepKind::Backup, "backup"));
        }
        if self.rng.u32(0..4) != 0 {
            data.steps.push(step(StepKind::Migrate, "migrate-app"));
        }
        data.schema = [Schema::Compatible, Schema::OneWay, Schema::Unknown][self.rng.usize(0..3)];
        data.back_to = (self.rng.u32(0..4) == 0).then(|| version.clone());
        data
    }

    pub(crate) fn release(&self, commit: &CommitSha) -> Option<&Release> {
        self.releases.iter().rev().find(|release| release.tag.commit == *commit)
    }

    /// What the record speaks of, by digest.
    pub(crate) fn needed(&self) -> BTreeSet<Digest> {
        let record = self.ledger.record.as_ref();
        record.iter().flat_map(|record| record.images()).map(|image| image.digest().clone()).collect()
    }
}
