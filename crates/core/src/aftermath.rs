//! What a commit changes beside the phase: commits that are not started again, what a failed job left, what is news.

use crate::decide::build_step;
use crate::phase::{BuiltOnly, Phase};
use crate::record::{Latest, Orphan, Quarantined, Record};
use crate::words::{CommitSha, ComponentName, Millis, Version};

/// The release of a look at the remote, where it is newer than what runs and than every one that was recorded before.
pub(crate) fn new_release<'a>(record: &Record, latest: &'a Latest) -> Option<&'a (Version, CommitSha)> {
    let found = latest.release.as_ref().filter(|(version, _)| record.is_behind(version, latest.own.as_ref()))?;
    let known = record.latest.release.as_ref().is_some_and(|(known, _)| known.base() >= found.0.base());
    (!known).then_some(found)
}

/// The head of the tracking branch, where it can be started and was not recorded before (contract §1, commit channel).
pub(crate) fn new_head<'a>(record: &Record, latest: &'a Latest) -> Option<&'a CommitSha> {
    let head = latest.branch_head.as_ref().filter(|head| record.latest.branch_head.as_ref() != Some(head))?;
    let is_other = match &record.running {
        Some(running) => running.commit != *head,
        None => latest.own.is_some(),
    };
    let startable = record.track_commits && is_other;
    startable.then_some(head)
}

/// Marks the commit that was left, or that failed, so that the next click does not install it again.
pub(crate) fn quarantine(new: &mut Record, record: &Record, reason: &str, now: Millis) {
    let left = match &record.phase {
        // Leaving a revision: what it ran is what is bad.
        Phase::RollingBack(back) => back.swap.from.as_ref(),
        other => other.swap().map(|swap| &swap.to),
    };
    let Some(bad) = left else { return };
    // What runs now is never quarantined, so that a failed rollback does not condemn the version it returns to.
    if new.running.as_ref().is_some_and(|running| running.commit == bad.commit) {
        return;
    }
    let entry =
        Quarantined { version: bad.version.clone(), reason: reason.to_owned(), at: now, images: bad.images.clone() };
    new.quarantine.insert(bad.commit.clone(), entry);
}

/// What the next job of the same commit need not build again: a build-only job's images, which a job that failed in between
/// does not use up.
pub(crate) fn reusable(record: &Record) -> Option<&BuiltOnly> {
    match &record.phase {
        Phase::Succeeded { built_only: Some(made) } => Some(made),
        Phase::FailedPre { .. } => record.job.as_ref()?.reuse.as_ref(),
        Phase::Idle
        | Phase::Queued
        | Phase::Fetching
        | Phase::Building(_)
        | Phase::Patching(_)
        | Phase::RollingOut(_)
        | Phase::Validating(_)
        | Phase::Confirming(_)
        | Phase::Succeeded { built_only: None }
        | Phase::FailedRollout { .. }
        | Phase::RollingBack(_)
        | Phase::RolledBack { .. }
        | Phase::RollbackFailed { .. } => None,
    }
}

/// What a job that fails now has pushed, or may still push, and nobody will find by its label.
pub(crate) fn orphans_of(record: &Record, now: Millis) -> Vec<Orphan> {
    let Some(job) = &record.job else { return Vec::new() };
    let (fetched, attempts): (_, Vec<(&ComponentName, u32, bool)>) = match &record.phase {
        Phase::Building(b) => {
            let begun = b.builds.iter().map(|(name, build)| (name, build.attempt, build.built.is_some()));
            (&b.fetched, begun.collect())
        }
        Phase::Patching(p) => (&p.fetched, p.attempts.iter().map(|(name, attempt)| (name, *attempt, true)).collect()),
        Phase::Idle
        | Phase::Queued
        | Phase::Fetching
        | Phase::RollingOut(_)
        | Phase::Validating(_)
        | Phase::Confirming(_)
        | Phase::Succeeded { .. }
        | Phase::FailedPre { .. }
        | Phase::FailedRollout { .. }
        | Phase::RollingBack(_)
        | Phase::RolledBack { .. }
        | Phase::RollbackFailed { .. } => return Vec::new(),
    };
    let one = |(name, attempt, seen): (&ComponentName, u32, bool)| {
        let recipe = fetched.recipes.get(name).filter(|recipe| recipe.unlabelled)?;
        Some(Orphan {
            repository: recipe.repository.clone(),
            version: job.target.version.clone(),
            key: job.key(&build_step(name), attempt),
            since: now,
            seen,
            tried_at: None,
        })
    };
    attempts.into_iter().filter_map(one).collect()
}
