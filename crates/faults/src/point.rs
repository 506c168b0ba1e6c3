//! Where a fault can strike: every event that is recorded and every effect that is made, before it and after it.

use std::fmt;

use replank_core::event::Event;
use replank_core::ports::Change;
use serde::{Deserialize, Serialize};

/// On which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Nothing of it was done.
    Before,
    /// It was done, and nobody knows yet.
    After,
}

/// What goes wrong there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// `kill -9`.
    Kill,
    /// SIGSTOP until another controller has taken over, or could have.
    Stop,
    Transient,
    Permanent,
    Conflict,
    /// After the step: it was done, and the answer was lost.
    Indeterminate,
}

/// A step, as the trace of an undisturbed job names it: `record intended start-new`, `change start`, `build api`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Step(pub String);

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Point {
    pub step: Step,
    pub side: Side,
    /// At the Nth time that the job comes there, from 1.
    pub nth: usize,
    pub effect: Effect,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", word(&self.effect), word(&self.side), self.step.0)?;
        if self.nth == 1 { Ok(()) } else { write!(f, " #{}", self.nth) }
    }
}

fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// What a change is called. Without a wildcard: a new one has to be named here before anything compiles.
pub fn change(change: &Change) -> &'static str {
    match change {
        Change::Start { .. } => "start",
        Change::Stop { .. } => "stop",
        Change::Shift { .. } => "shift",
        Change::Settle { .. } => "settle",
        Change::Halt { .. } => "halt",
        Change::Remove { .. } => "remove",
    }
}

/// Which of the jobs that are played records an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Played {
    /// Every upgrade that goes well.
    Upgrade,
    /// A way back that an operator asks for, and what only that records.
    Rollback,
    /// A release that degrades inside its confirm window.
    Degrading,
    /// A release with a data step.
    Data,
    /// An upgrade in which something else goes wrong: part of what is seen after a fault, not of what one strikes.
    Fault,
    /// An operator's word or the remote's state: one commit on its own, nothing of a job.
    Alone,
}

macro_rules! events {
    ($($event:pat => $name:literal $played:ident,)*) => {
        /// Without a wildcard: whoever adds an event says here which job records it, and the matrix demands to see it there.
        pub fn played(event: &Event) -> Played {
            match event {
                $($event => Played::$played,)*
            }
        }

        /// Every event's recorded name.
        pub const EVENTS: &[(&str, Played)] = &[$(($name, Played::$played)),*];
    };
}

events! {
    Event::Start { .. } => "start" Upgrade,
    Event::HandedOver { .. } => "handed_over" Upgrade,
    Event::Claimed => "claimed" Upgrade,
    Event::Fetched(_) => "fetched" Upgrade,
    Event::BuildIntended { .. } => "build_intended" Upgrade,
    Event::BuildDone { .. } => "built" Upgrade,
    Event::BuildsComplete => "builds_complete" Upgrade,
    Event::Prepared { .. } => "escape_hatch" Upgrade,
    Event::OpIntended { .. } => "intended" Upgrade,
    Event::OpObserved { .. } => "observed" Upgrade,
    Event::Landed => "landed" Upgrade,
    Event::CutOverIntended => "cut_over_intended" Upgrade,
    Event::Converged { .. } => "converged" Upgrade,
    Event::Completed => "succeeded" Upgrade,
    Event::RollbackStarted { .. } => "rollback_start" Rollback,
    Event::RolledBack => "rollback_done" Rollback,
    Event::FlipIntended { .. } => "flip_intended" Degrading,
    Event::FlippedBack => "flipped_back" Degrading,
    Event::StepIntended { .. } => "data_step_intended" Data,
    Event::StepDone { .. } => "data_step_done" Data,
    Event::TookOver { .. } => "took_over" Fault,
    Event::Failed { .. } => "failed" Fault,
    Event::RepairIntended { .. } => "repair_intended" Fault,
    Event::ProvedServes { .. } => "proved_serves" Fault,
    Event::Cancelled { .. } => "cancelled" Alone,
    Event::Reset { .. } => "reset" Alone,
    Event::QuarantineLifted { .. } => "quarantine_lifted" Alone,
    Event::DriftAccepted { .. } => "drift_accepted" Alone,
    Event::DriftSeen { .. } => "drift_seen" Alone,
    Event::MovedTagAccepted { .. } => "moved_tag_accepted" Alone,
    Event::Kept { .. } => "kept" Alone,
    Event::TrackCommits { .. } => "track_commits" Alone,
    Event::TokenChanged { .. } => "token_changed" Alone,
    Event::LedgerRestored { .. } => "ledger_restored" Alone,
    Event::ProxyUpgraded { .. } => "proxy_upgraded" Alone,
    Event::RefsSeen { .. } => "candidate_detected" Alone,
    // Has no line, so that no trace shows it: whoever is struck there loses an estimate.
    Event::Progressed { .. } => "progressed" Alone,
    Event::WayBackProved { .. } => "way_back_proved" Alone,
    Event::SnapshotDropped { .. } => "snapshot_dropped" Alone,
    Event::PurgeTried { .. } => "orphan_purge_attempt" Alone,
}

impl Step {
    /// The recorded event's name, where the step is one.
    pub fn event(&self) -> Option<&str> {
        self.0.strip_prefix("record ")?.split(' ').next()
    }

    /// What can go wrong on one side of it. What was done has not failed: its answer is lost at worst. A ledger that cannot be used
    /// is the same thing whatever the reason.
    #[must_use]
    pub fn effects(&self, side: Side) -> Vec<Effect> {
        match (side, self.event()) {
            (Side::Before, Some(_)) => vec![Effect::Kill, Effect::Stop, Effect::Transient],
            (Side::Before, None) => vec![Effect::Kill, Effect::Stop, Effect::Transient, Effect::Permanent],
            (Side::After, _) => vec![Effect::Kill, Effect::Stop, Effect::Indeterminate],
        }
    }

    /// The step without the component that it is about: all components are built the same way, at the same time.
    #[must_use]
    pub fn kind(&self) -> &str {
        let one_of_many = ["record build_intended", "record built", "build"];
        let (kind, _) = self.0.rsplit_once(' ').unwrap_or((&self.0, ""));
        if one_of_many.contains(&kind) { kind } else { &self.0 }
    }

    /// Whether a job that is played has this step of its own: what only an operator, the remote or another fault brings about
    /// may stand in a trace by chance.
    pub fn is_of_a_job(&self) -> bool {
        let Some(event) = self.event() else { return true };
        EVENTS.iter().any(|(name, played)| *name == event && !matches!(played, Played::Alone | Played::Fault))
    }
}
