//! What can happen to an upgrade, each with its data: an operator's word, what the driver did and saw, what the remote shows.

use serde::{Deserialize, Serialize};

use crate::fault::Told;
use crate::phase::{Built, Fetched, Op, WayBack};
use crate::ports::Role;
use crate::record::{Actor, ControllerId, Deployment, Head, Job, Latest};
use crate::words::{CommitSha, ComponentName, ContainerName, Millis, OpKey};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenChange {
    Created,
    Revoked,
}

/// How far an upgrade of the proxy came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyStep {
    /// About to be done.
    Begun,
    /// The new proxy serves.
    Done,
    /// The old one does.
    Failed,
    /// It was cut short, and the new one was found to serve.
    Finished,
    /// It was cut short, and the old one was brought back.
    Restored,
}

/// Something that happened, or that is about to be done and is recorded first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    // An operator's.
    Start {
        job: Box<Job>,
        override_quarantine: bool,
    },
    RollbackStarted {
        actor: Actor,
        reason: String,
        /// The data are those of the version that is restored, by the operator's word.
        #[serde(default)]
        data_restored: bool,
    },
    Cancelled {
        actor: Actor,
        reason: String,
    },
    Reset {
        actor: Actor,
        reason: String,
    },
    /// A commit may be started again without an override.
    QuarantineLifted {
        actor: Actor,
        commit: CommitSha,
        reason: String,
    },
    /// An upgrade may start although what runs is not what was recorded: exactly these differences, and no others.
    DriftAccepted {
        actor: Actor,
        reason: String,
        what: Vec<String>,
    },
    /// A tag may be started at another commit than it was seen first at: this one, and no other.
    MovedTagAccepted {
        actor: Actor,
        reason: String,
        /// Such as `refs/tags/v1.4.0`.
        raw_ref: String,
        /// What counted until now.
        from: CommitSha,
        to: CommitSha,
    },
    Kept {
        actor: Actor,
        #[serde(default)]
        reason: String,
    },
    TrackCommits {
        actor: Actor,
        on: bool,
    },
    /// Who may do what is about to change. The state does not; the history must tell.
    TokenChanged {
        actor: Actor,
        /// The token's id: what its holder's own acts carry as their actor. Never the secret, nor its hash.
        id: String,
        name: String,
        role: Role,
        change: TokenChange,
        reason: String,
    },
    /// The ledger's file was replaced by a backup of it: what happened in between is in the file that was replaced.
    LedgerRestored {
        actor: Actor,
        reason: String,
        /// Name of the backup, without its directory.
        file: String,
        /// The history that was replaced, as far as it could be read.
        replaced: Option<Head>,
    },
    /// The process that owns the public ports is replaced by one of another image, or was. The state does not change.
    ProxyUpgraded {
        actor: Actor,
        reason: String,
        step: ProxyStep,
        /// The image, as it was named; empty where who brings it to an end does not know.
        image: String,
        /// What came of it in words: the gap, or the fault.
        outcome: String,
    },
    // The remote's.
    RefsSeen {
        latest: Latest,
    },
    // The driver's.
    HandedOver {
        to: ControllerId,
    },
    TookOver {
        by: ControllerId,
    },
    Claimed,
    Fetched(Fetched),
    BuildIntended {
        component: ComponentName,
    },
    BuildDone {
        component: ComponentName,
        built: Built,
    },
    BuildsComplete,
    /// The job is so many percent on its way: no line of the history, which would drown in them.
    Progressed {
        percent: u32,
    },
    Prepared {
        to: Box<Deployment>,
        way_back: WayBack,
        escape_hatch: Vec<String>,
    },
    /// A data step is about to be run, for the only time.
    StepIntended {
        step: ContainerName,
    },
    StepDone {
        step: ContainerName,
    },
    /// An operation is about to be done; again, when its attempt is above one.
    OpIntended {
        op: Op,
    },
    OpObserved {
        op: Op,
    },
    Landed,
    CutOverIntended,
    Converged {
        deadline: Millis,
    },
    FlipIntended {
        why: String,
    },
    Completed,
    Failed {
        fault: Told,
    },
    FlippedBack,
    RolledBack,
    /// At rest: traffic or the reboot policy is not what the record says and is about to be put right.
    RepairIntended {
        why: String,
    },
    /// At rest: a restart of the machine took what served without proof away, and what was proved last serves again.
    ProvedServes {
        why: String,
    },
    /// At rest: the images of the way back were looked for, daily.
    WayBackProved {
        /// Which of them are gone; empty where all are there and protected.
        lost: String,
    },
    /// At rest: what runs differs from what was recorded, and has for a while; or no longer does, where nothing is named.
    DriftSeen {
        what: Vec<String>,
    },
    /// At rest: the snapshot's time is over, or it can no longer be restored.
    SnapshotDropped {
        why: String,
    },
    /// At rest: what failed jobs left in the registry was to be removed.
    PurgeTried {
        removed: Vec<OpKey>,
        /// Why the others stay; empty where none does.
        why: String,
    },
}

impl Event {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::RollbackStarted { .. } => "rollback_start",
            Self::Cancelled { .. } => "cancelled",
            Self::Reset { .. } => "reset",
            Self::QuarantineLifted { .. } => "quarantine_lifted",
            Self::DriftAccepted { .. } => "drift_accepted",
            Self::MovedTagAccepted { .. } => "moved_tag_accepted",
            Self::Kept { .. } => "kept",
            Self::TrackCommits { .. } => "track_commits",
            Self::TokenChanged { .. } => "token_changed",
            Self::LedgerRestored { .. } => "ledger_restored",
            Self::ProxyUpgraded { .. } => "proxy_upgraded",
            Self::RefsSeen { .. } => "candidate_detected",
            Self::HandedOver { .. } => "handed_over",
            Self::TookOver { .. } => "took_over",
            Self::Claimed => "claimed",
            Self::Fetched(_) => "fetched",
            Self::BuildIntended { .. } => "build_intended",
            Self::BuildDone { .. } => "built",
            Self::BuildsComplete => "builds_complete",
            Self::Progressed { .. } => "progressed",
            Self::Prepared { .. } => "escape_hatch",
            Self::StepIntended { .. } => "data_step_intended",
            Self::StepDone { .. } => "data_step_done",
            Self::OpIntended { .. } => "intended",
            Self::OpObserved { .. } => "observed",
            Self::Landed => "landed",
            Self::CutOverIntended => "cut_over_intended",
            Self::Converged { .. } => "converged",
            Self::FlipIntended { .. } => "flip_intended",
            Self::Completed => "succeeded",
            Self::Failed { .. } => "failed",
            Self::FlippedBack => "flipped_back",
            Self::RolledBack => "rollback_done",
            Self::RepairIntended { .. } => "repair_intended",
            Self::ProvedServes { .. } => "proved_serves",
            Self::WayBackProved { lost } if lost.is_empty() => "way_back_proved",
            Self::WayBackProved { .. } => "way_back_lost",
            Self::DriftSeen { what } if what.is_empty() => "drift_gone",
            Self::DriftSeen { .. } => "drift_seen",
            Self::SnapshotDropped { .. } => "snapshot_dropped",
            Self::PurgeTried { .. } => "orphan_purge_attempt",
        }
    }
}
