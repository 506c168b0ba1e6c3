//! What one controller is made of: its ports, who it is, and what its loop and its commands share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use async_trait::async_trait;
use replank_core::fault::{Fault, Told};
use replank_core::mask::Masker;
use replank_core::phase::{Fetched, Mode};
use replank_core::policy::Policy;
use replank_core::ports::{Builder, Clock, Ids, Ledger, LogStore, Platform, Registry, Source, Tree};
use replank_core::record::{ControllerId, Deployment, OnRolloutFailure};
use replank_core::words::{AppName, ComponentName, InstallationId, Millis, Version};
use tokio::sync::{Notify, watch};

use super::api::Live;
use crate::doctor::Checked;
use crate::telemetry::Telemetry;

/// The world, as the engine sees it.
#[derive(Debug, Clone)]
pub struct Ports {
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub ledger: Arc<dyn Ledger>,
    pub logs: Arc<dyn LogStore>,
    /// Absent where no remote is configured.
    pub source: Option<Arc<dyn Source>>,
    pub builder: Arc<dyn Builder>,
    pub registry: Arc<dyn Registry>,
    /// The copies that builds and pulls leave on this machine, where the registry is another place.
    pub local_images: Option<Arc<dyn Registry>>,
    /// Absent for build-only services.
    pub platform: Option<Arc<dyn Platform>>,
}

/// A release's manifest, judged by the operator's configuration.
#[derive(Debug, Clone)]
pub struct Reading {
    pub fetched: Fetched,
    /// What the operator lacks for it, each with what to do.
    pub missing: Vec<String>,
    /// For the person who chooses, as the release has them.
    pub notes: String,
}

impl Reading {
    /// Why it cannot be built here; `None` where nothing is missing.
    pub fn refused(&self, version: &Version) -> Option<Told> {
        let what = || format!("release {version} cannot be built: {}", self.missing.join("; "));
        (!self.missing.is_empty()).then(|| Told::permanent(what(), "mend the release, or replank.toml"))
    }
}

/// Turns a release into what is to be built: operator's configuration, release's manifest, trust boundary.
#[async_trait]
pub trait Recipes: Send + Sync + std::fmt::Debug {
    /// By the content of the manifest alone; `None`: the release has none. Faults are permanent: it is not what it may be.
    fn judge(&self, manifest: Option<&[u8]>, version: &Version, running: Option<&Deployment>)
    -> Result<Reading, Fault>;
    /// The same of a fetched tree, which has to hold all that is named. Permanent faults name what the release lacks or may not
    /// set.
    async fn recipes(&self, tree: &Tree, version: &Version, running: Option<&Deployment>) -> Result<Fetched, Fault>;
}

/// What this machine has left for an upgrade.
#[async_trait]
pub trait Room: Send + Sync + std::fmt::Debug {
    /// Disk and memory, each by name. Bounded in time; changes nothing. `both`: what runs now will run beside what is started.
    async fn look(&self, both: bool) -> Vec<Checked>;
}

/// Who this controller is and how it was configured.
#[derive(Debug, Clone)]
pub struct Setup {
    pub application: AppName,
    /// Used when there is no record yet; afterwards the record's own counts.
    pub installation: InstallationId,
    pub me: ControllerId,
    /// Random per process.
    pub instance: String,
    pub policy: Policy,
    pub mode: Mode,
    pub on_rollout_failure: OnRolloutFailure,
    pub components: Vec<ComponentName>,
    /// What this service's own image was built as, where nothing is run from here: what runs is then somebody else's affair,
    /// and this is the best that is known of it.
    pub own_version: Option<Version>,
    /// Values that must never show, for the masks of logs and errors.
    pub secrets: Vec<String>,
    pub recipes: Arc<dyn Recipes>,
    pub room: Arc<dyn Room>,
    /// The highest record format that this build reads and writes: always the same, but in the simulation of two builds.
    pub reads_format: u32,
}

impl Setup {
    /// Hides what must never show.
    pub fn masker(&self) -> Masker {
        Masker::new(&self.secrets)
    }

    /// A failure as it may be told: an adapter hands on what a remote, a registry or a build said, and one of those may repeat a
    /// credential that it was given.
    pub fn told(&self, fault: &Fault) -> Told {
        fault.told_with(&self.masker())
    }
}

/// What commands and loop of one process share. Signals only wake; everything is read again from the ledger.
#[derive(Debug)]
pub struct Shared {
    pub wake: Notify,
    pub live: watch::Sender<Live>,
    /// What happened is told there too; nothing is read from it.
    pub telemetry: Arc<Telemetry>,
    last_turn: AtomicI64,
    /// The record was written by a newer Replank while this one ran: who cannot read it drives nothing.
    shut_out: AtomicBool,
}

impl Default for Shared {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl Shared {
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        let live = watch::Sender::new(Live::default());
        Self { wake: Notify::new(), live, telemetry, last_turn: AtomicI64::new(0), shut_out: AtomicBool::new(false) }
    }

    pub fn woken(&self) {
        self.wake.notify_one();
    }

    /// Publishes a change of the live view; followers see it at once.
    pub fn publish(&self, change: impl FnOnce(&mut Live)) {
        self.live.send_if_modified(|live| {
            let before = live.clone();
            change(live);
            let changed = *live != before;
            if changed {
                live.seq += 1;
            }
            changed
        });
    }

    /// What was said of the last phase does not hold for the one that begins.
    pub fn entered(&self) {
        self.publish(|live| {
            live.next_action.clear();
            live.next_deadline = None;
        });
    }

    /// Tells followers that the record itself has changed.
    pub fn record_changed(&self) {
        self.live.send_modify(|live| live.seq += 1);
    }

    pub fn turned(&self, now: Millis) {
        self.last_turn.store(now.0, Ordering::Relaxed);
        self.telemetry.loop_lives(now);
    }

    pub fn set_shut_out(&self, is_shut_out: bool) {
        self.shut_out.store(is_shut_out, Ordering::Relaxed);
    }

    pub fn is_shut_out(&self) -> bool {
        self.shut_out.load(Ordering::Relaxed)
    }

    /// When the loop last began a turn.
    pub fn last_turn(&self) -> Millis {
        Millis(self.last_turn.load(Ordering::Relaxed))
    }
}
