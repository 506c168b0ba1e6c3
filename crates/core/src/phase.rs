//! Where an upgrade stands. Each phase holds what it needs and nothing else, so that a rollout without a way back,
//! or a success without an observed revision, cannot be written down.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fault::Told;
use crate::image::{ImageId, Images};
use crate::record::{Deployment, Snapshot};
use crate::words::{CommitSha, ComponentName, Millis};

/// How one component's image is built. Paths are relative to the release's tree and never leave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Recipe {
    pub dockerfile: String,
    pub context: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
    /// `linux/amd64` and the like; the engine's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Build secrets by the names that the operator's configuration gives them; never values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Where the image goes: the repository without a tag.
    pub repository: String,
    /// The builder cannot label what it pushes: the image is known by its tag alone, so that clean-up by label never finds it
    /// and what a failed job leaves must be remembered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlabelled: bool,
}

/// What a fetched release asks for, after the trust boundary has been applied to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Fetched {
    pub recipes: BTreeMap<ComponentName, Recipe>,
    /// What the release's own manifest says about how it runs, for the platform's plan.
    #[serde(default)]
    pub manifest: serde_json::Value,
    /// Who signed the tag; absent where nobody asks for signatures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
}

/// An image that a builder answers for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Built {
    pub image: ImageId,
    /// `FROM` images by reference and digest, as far as the builder knows them.
    #[serde(default)]
    pub bases: BTreeMap<String, String>,
    /// Time spent waiting for a builder, and time spent building: told apart (lesson 29).
    #[serde(default)]
    pub queued_ms: u64,
    #[serde(default)]
    pub built_ms: u64,
    /// True where an earlier attempt's image was found and taken over.
    #[serde(default)]
    pub adopted: bool,
}

/// One component's build inside the building phase.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Build {
    /// Counts from 1; a new attempt has a new operation key.
    pub attempt: u32,
    pub intended_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built: Option<Built>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Building {
    pub fetched: Fetched,
    /// Only components whose build was intended; what is absent has not begun.
    pub builds: BTreeMap<ComponentName, Build>,
}

impl Building {
    /// The images, once every component has one.
    pub fn images(&self) -> Option<Images> {
        self.fetched
            .recipes
            .keys()
            .map(|c| Some((c.clone(), self.builds.get(c)?.built.as_ref()?.image.clone())))
            .collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Patching {
    pub fetched: Fetched,
    pub images: Images,
    /// The attempts that made the images: what is under their tags goes when the job fails here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attempts: BTreeMap<ComponentName, u32>,
}

/// What protects the application once its platform is touched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WayBack {
    /// Nothing ran before, so there is nothing to go back to.
    FirstDeployment,
    /// The images are resolved, were seen present, and are protected.
    Snapshot(Box<Snapshot>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The new revision takes the traffic as soon as it is proved, and the job ends there.
    Single,
    /// The old revision stays warm for a confirm window in which traffic flips back by itself.
    BlueGreen,
}

/// One change of the platform inside a swap. The order is the order in which a swap makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Traffic stays where it is by name, so that a new revision gets none by default.
    PinTraffic,
    /// Containers that may not overlap: the old ones stop before the new ones start.
    StopOld,
    StartNew,
    CutOver,
    /// Containers that run on the old side until the cut-over is observed.
    StopOldLate,
    StartNewLate,
    /// From here on the new revision is the one that returns alone after a reboot.
    Settle,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::PinTraffic => "pin-traffic",
            Self::StopOld => "stop-old",
            Self::StartNew => "start-new",
            Self::CutOver => "cut-over",
            Self::StopOldLate => "stop-old-late",
            Self::StartNewLate => "start-new-late",
            Self::Settle => "settle",
        }
    }
}

/// An intent that was recorded before its effect.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpState {
    pub attempt: u32,
    /// The proxy generation for changes of traffic; 0 for the others.
    pub generation: u64,
    pub intended_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<Millis>,
}

/// A move from one deployment to another: an upgrade, a rollback or a flip back.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Swap {
    /// What served before; none at a first deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Deployment>,
    pub to: Deployment,
    pub mode: Mode,
    pub way_back: WayBack,
    #[serde(default)]
    pub ops: BTreeMap<Op, OpState>,
}

impl Swap {
    pub fn new(from: Option<Deployment>, to: Deployment, mode: Mode, way_back: WayBack) -> Self {
        Self { from, to, mode, way_back, ops: BTreeMap::new() }
    }

    pub fn is_observed(&self, op: Op) -> bool {
        self.ops.get(&op).is_some_and(|state| state.observed_at.is_some())
    }

    pub fn intended(&self, op: Op) -> Option<&OpState> {
        self.ops.get(&op)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Confirming {
    pub swap: Swap,
    /// Set when the cut-over was observed; the confirm window counts from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Millis>,
    /// The way back to blue, once it is intended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flip: Option<Flip>,
}

/// An automatic flip back inside the confirm window.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flip {
    pub swap: Swap,
    pub why: String,
    pub since: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RollingBack {
    pub swap: Swap,
    pub reason: String,
}

/// The states of contract §1, each with its data. `state` on the wire is [`Phase::name`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Phase {
    Idle,
    Queued,
    Fetching,
    Building(Building),
    Patching(Patching),
    RollingOut(Swap),
    Validating(Swap),
    Confirming(Confirming),
    Succeeded {
        /// Images built by a build-only job, for a later start of the same target.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        built_only: Option<BuiltOnly>,
    },
    FailedPre {
        fault: Told,
    },
    FailedRollout {
        fault: Told,
        swap: Swap,
    },
    RollingBack(RollingBack),
    RolledBack {
        reason: String,
    },
    RollbackFailed {
        fault: Told,
        swap: Swap,
    },
}

/// What a build-only job made: a later job of the same commit takes each image whose recipe is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BuiltOnly {
    pub commit: CommitSha,
    pub images: Images,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub recipes: BTreeMap<ComponentName, Recipe>,
}

impl BuiltOnly {
    /// The image of a component, where it was made as it would be made now.
    pub fn image(&self, component: &ComponentName, recipe: &Recipe) -> Option<&ImageId> {
        self.images.get(component).filter(|_| self.recipes.get(component) == Some(recipe))
    }
}

/// The name of a phase without its data: what clients see and what the contract's table is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Idle,
    Queued,
    Fetching,
    Building,
    Patching,
    RollingOut,
    Validating,
    Confirming,
    Succeeded,
    FailedPre,
    FailedRollout,
    RollingBack,
    RolledBack,
    RollbackFailed,
}

impl Mode {
    /// As rows and lines write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::BlueGreen => "blue_green",
        }
    }
}

impl State {
    /// The state of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    pub const ALL: [State; 14] = [
        Self::Idle,
        Self::Queued,
        Self::Fetching,
        Self::Building,
        Self::Patching,
        Self::RollingOut,
        Self::Validating,
        Self::Confirming,
        Self::Succeeded,
        Self::FailedPre,
        Self::FailedRollout,
        Self::RollingBack,
        Self::RolledBack,
        Self::RollbackFailed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Queued => "queued",
            Self::Fetching => "fetching",
            Self::Building => "building",
            Self::Patching => "patching",
            Self::RollingOut => "rolling_out",
            Self::Validating => "validating",
            Self::Confirming => "confirming",
            Self::Succeeded => "succeeded",
            Self::FailedPre => "failed_pre",
            Self::FailedRollout => "failed_rollout",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::RollbackFailed => "rollback_failed",
        }
    }

    /// A job is being worked on.
    pub fn in_flight(self) -> bool {
        match self {
            Self::Queued
            | Self::Fetching
            | Self::Building
            | Self::Patching
            | Self::RollingOut
            | Self::Validating
            | Self::Confirming
            | Self::RollingBack => true,
            Self::Idle
            | Self::Succeeded
            | Self::FailedPre
            | Self::FailedRollout
            | Self::RolledBack
            | Self::RollbackFailed => false,
        }
    }

    /// In flight, and the platform has not been touched yet.
    pub fn before_swap(self) -> bool {
        matches!(self, Self::Queued | Self::Fetching | Self::Building | Self::Patching)
    }
}

impl Phase {
    pub fn state(&self) -> State {
        match self {
            Self::Idle => State::Idle,
            Self::Queued => State::Queued,
            Self::Fetching => State::Fetching,
            Self::Building(_) => State::Building,
            Self::Patching(_) => State::Patching,
            Self::RollingOut(_) => State::RollingOut,
            Self::Validating(_) => State::Validating,
            Self::Confirming(_) => State::Confirming,
            Self::Succeeded { .. } => State::Succeeded,
            Self::FailedPre { .. } => State::FailedPre,
            Self::FailedRollout { .. } => State::FailedRollout,
            Self::RollingBack(_) => State::RollingBack,
            Self::RolledBack { .. } => State::RolledBack,
            Self::RollbackFailed { .. } => State::RollbackFailed,
        }
    }

    /// The swap that operations belong to now: inside the confirm window the flip back, once there is one.
    pub fn active_swap(&self) -> Option<&Swap> {
        match self {
            Self::Confirming(Confirming { flip: Some(flip), .. }) => Some(&flip.swap),
            other => other.swap(),
        }
    }

    /// Every image that the phase speaks of.
    pub fn images(&self) -> Vec<&ImageId> {
        fn of_swap(swap: &Swap) -> Vec<&ImageId> {
            let snapshot = match &swap.way_back {
                WayBack::Snapshot(snapshot) => Some(&snapshot.deployment),
                WayBack::FirstDeployment => None,
            };
            let deployments = [Some(&swap.to), swap.from.as_ref(), snapshot];
            deployments.into_iter().flatten().flat_map(|d| d.images.values()).collect()
        }
        match self {
            Self::Idle | Self::Queued | Self::Fetching | Self::FailedPre { .. } | Self::RolledBack { .. } => Vec::new(),
            Self::Building(building) => {
                building.builds.values().filter_map(|b| b.built.as_ref()).map(|b| &b.image).collect()
            }
            Self::Patching(patching) => patching.images.values().collect(),
            Self::RollingOut(swap)
            | Self::Validating(swap)
            | Self::FailedRollout { swap, .. }
            | Self::RollbackFailed { swap, .. } => of_swap(swap),
            Self::Confirming(Confirming { swap, flip, .. }) => {
                let back = flip.as_ref().map(|f| of_swap(&f.swap)).unwrap_or_default();
                of_swap(swap).into_iter().chain(back).collect()
            }
            Self::RollingBack(back) => of_swap(&back.swap),
            Self::Succeeded { built_only } => built_only.iter().flat_map(|b| b.images.values()).collect(),
        }
    }

    /// The swap that a phase is about, in flight or held.
    pub fn swap(&self) -> Option<&Swap> {
        match self {
            Self::RollingOut(swap) | Self::Validating(swap) => Some(swap),
            Self::Confirming(confirming) => Some(&confirming.swap),
            Self::FailedRollout { swap, .. } | Self::RollbackFailed { swap, .. } => Some(swap),
            Self::RollingBack(back) => Some(&back.swap),
            Self::Idle
            | Self::Queued
            | Self::Fetching
            | Self::Building(_)
            | Self::Patching(_)
            | Self::Succeeded { .. }
            | Self::FailedPre { .. }
            | Self::RolledBack { .. } => None,
        }
    }
}
