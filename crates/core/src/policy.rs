//! The numbers that decisions depend on. Defaults come from contract §1 unless a line says otherwise.

use serde::{Deserialize, Serialize};

/// How long a phase may last, in milliseconds from the moment it was entered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Budgets {
    pub queued: u64,
    pub fetching: u64,
    /// For each component's build, from its own intent.
    pub building: u64,
    pub patching: u64,
    pub rolling_out: u64,
    /// From the recorded intent to the first sight of the new revision: "the change never landed".
    pub landing: u64,
    pub validating: u64,
    pub confirm_window: u64,
    /// How long a cut-over or a flip back may take to be observed.
    pub convergence: u64,
    pub rolling_back: u64,
}

impl Default for Budgets {
    fn default() -> Self {
        const SECOND: u64 = 1_000;
        Self {
            queued: 300 * SECOND,
            fetching: 600 * SECOND,
            building: 1_800 * SECOND,
            patching: 300 * SECOND,
            rolling_out: 900 * SECOND,
            landing: 120 * SECOND,
            validating: 900 * SECOND,
            confirm_window: 300 * SECOND,
            convergence: 300 * SECOND,
            // Not in the contract: a rollback does what a rollout does, without a build.
            rolling_back: 900 * SECOND,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Policy {
    pub budgets: Budgets,
    /// Builds at the same time.
    pub parallel_builds: usize,
    /// Healthy observations in a row that count as proof.
    pub proofs: u32,
    /// Unhealthy observations in a row, inside the confirm window, that flip traffic back.
    pub degraded_after: u32,
    /// Starts of a crashed container of a new revision before the rollout is given up.
    pub start_attempts: u32,
    /// Age of the driver's heartbeat at which another controller takes over (architecture: 15 s).
    pub stale_driver: u64,
    /// First wait after a transient failure; doubled up to `backoff_max`.
    pub backoff_min: u64,
    pub backoff_max: u64,
    /// How long a retired revision's containers stay, stopped.
    pub keep_containers: u64,
    /// How many revisions that nobody needs keep their stopped containers for that time, the newest. Each holds a network, and an
    /// engine has addresses for some thirty.
    pub keep_failed: usize,
    /// How long a snapshot's images stay protected.
    pub keep_images: u64,
    /// The newest images of each component that stay although nothing needs them, so that a version can come back without a
    /// build. What runs and what a rollback needs stays in any case.
    pub keep_builds: usize,
    /// The newest jobs whose build logs stay.
    pub keep_logs: usize,
    /// Time between clean-ups at rest.
    pub clean_up_every: u64,
    /// Time between observations while a phase waits for the platform.
    pub observe_every: u64,
    /// Longest that one change of the platform, or one clean-up, may take before it is given up as lost and looked for.
    pub change: u64,
    /// Time between observations that count as proofs: long enough to be separate answers, short enough not to be waited for.
    pub prove_every: u64,
    /// Time between observations at rest.
    pub observe_at_rest: u64,
    /// How long what runs has to differ from what was recorded before it is told: longer than a container takes to restart.
    pub drift_after: u64,
    /// How often the driver records how far a job is at most: often enough for a bar, and a hundred small commits for a long job.
    pub progress_every: u64,
}

impl Default for Policy {
    fn default() -> Self {
        const SECOND: u64 = 1_000;
        const DAY: u64 = 24 * 3_600 * SECOND;
        Self {
            budgets: Budgets::default(),
            parallel_builds: 4,
            proofs: 3,
            degraded_after: 3,
            start_attempts: 3,
            stale_driver: 15 * SECOND,
            backoff_min: SECOND,
            backoff_max: 30 * SECOND,
            keep_containers: DAY,
            keep_failed: 3,
            keep_images: 90 * DAY,
            // Contract §6, UPGRADE_ACR_KEEP_IMAGES.
            keep_builds: 3,
            keep_logs: 50,
            clean_up_every: DAY,
            observe_every: SECOND,
            // Twice the longest grace of a stop (it waits for open requests, then for the process), and half of that again.
            change: 1_500 * SECOND,
            prove_every: 100,
            observe_at_rest: 15 * SECOND,
            drift_after: 30 * SECOND,
            progress_every: 2 * SECOND,
        }
    }
}
