//! Whether this machine has room for a job: one look and one judgement, for the plan and for the job itself.

use replank_core::fault::{Fault, Told};
use replank_core::record::{Job, Record};

use super::setup::Room;
use crate::doctor::{Checked, Verdict};

/// Looks, for a job that begins from what the record says.
pub(super) async fn look(room: &dyn Room, record: &Record, job: &Job) -> Vec<Checked> {
    // What runs stays beside what the job starts; one that only builds starts nothing.
    room.look(record.running.is_some() && !job.build_only).await
}

/// What would keep a job from going well. A look that could not be made stands in nobody's way.
pub(super) fn lacks(found: &Checked) -> Option<Told> {
    // Who writes to the home says so himself: clone, ledger and logs wait there for room, and go on.
    let counts = matches!(found.name, "memory" | "disk");
    let fails = match found.finding.verdict {
        Verdict::Failed => counts,
        Verdict::Ok | Verdict::Warning => false,
    };
    fails.then(|| Told::permanent(found.finding.what.clone(), found.finding.advice.clone()))
}

/// Fails where there is no room, with all that is missing.
pub(super) async fn check(room: &dyn Room, record: &Record, job: &Job) -> Result<(), Fault> {
    let lacking: Vec<Told> = look(room, record, job).await.iter().filter_map(lacks).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let all = |of: fn(&Told) -> &str| lacking.iter().map(of).collect::<Vec<_>>().join("; ");
    let what = format!("this machine has no room for the upgrade: {}", all(|told| &told.what));
    Err(Fault::permanent(what).advice(format!("{}; then start again", all(|told| &told.advice))))
}
