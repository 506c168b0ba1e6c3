//! What earlier jobs left and nobody needs: their trees, the oldest build logs, and images beyond the newest few.

use std::collections::BTreeSet;

use replank_core::decide::Purged;
use replank_core::fault::Fault;
use replank_core::image::{attempt_tag, version_tag};
use replank_core::ports::{Discarded, Registry, Stored};
use replank_core::record::Record;
use replank_core::words::Digest;

use super::execute::Executor;

/// The longest time-out of a build in a registry's own service (eight hours), with room.
const BUILD_OUTLIVES_MS: u64 = 12 * 3_600_000;

impl Executor {
    /// At rest only. What cannot be removed now is told and left for the next time: clutter is no reason to fail.
    pub(super) async fn clean_up(&self, record: &Record) {
        *self.tree.lock().await = None;
        if let Some(source) = &self.ports.source
            && let Err(fault) = source.discard_all_but(None).await
        {
            tracing::warn!(error = %fault.chain(), "old trees were not removed");
        }
        match self.ports.logs.prune(self.setup.policy.keep_logs).await {
            Ok(0) => {}
            Ok(jobs) => tracing::info!(jobs, "removed the oldest build logs"),
            Err(error) => tracing::warn!(%error, "old build logs were not removed"),
        }
        let repositories: BTreeSet<&str> = record.images().map(|image| image.repository()).collect();
        for registry in [Some(&self.ports.registry), self.ports.local_images.as_ref()].into_iter().flatten() {
            for repository in &repositories {
                if let Err(fault) = self.remove_images(record, registry.as_ref(), repository).await {
                    tracing::warn!(repository, error = %fault.chain(), "old images were not removed");
                }
            }
        }
    }

    /// What the record speaks of always stays: it runs, or a rollback needs it.
    async fn remove_images(&self, record: &Record, registry: &dyn Registry, repository: &str) -> Result<(), Fault> {
        let needed: BTreeSet<&Digest> = record.images().map(|image| image.digest()).collect();
        let listed = registry.list(repository, &record.installation).await?;
        let mut stored: Vec<Stored> = listed.into_iter().map(|(stored, _)| stored).collect();
        stored.sort_by_key(|stored| std::cmp::Reverse(stored.created_at));
        for old in stored.iter().skip(self.setup.policy.keep_builds) {
            if needed.contains(old.image.digest()) {
                continue;
            }
            // A job that has begun meanwhile may have found this image and counts on it.
            self.still_mine(record).await?;
            registry.release(&old.image, &record.installation).await?;
            match registry.delete(&old.image, &record.installation).await {
                Ok(()) => tracing::info!(image = %old.image, "removed an old image"),
                Err(fault) => tracing::info!(error = %fault.chain(), "an old image stays for now"),
            }
        }
        Ok(())
    }

    /// The images of the way back: which of them are gone, in words. Those that are there are protected again, as somebody may have
    /// taken a tag away.
    pub(super) async fn prove(&self, record: &Record) -> Result<String, Fault> {
        let Some(snapshot) = &record.snapshot else { return Ok(String::new()) };
        let deployment = &snapshot.deployment;
        let mut lost = Vec::new();
        for (component, image) in &deployment.images {
            let places = [Some(&self.ports.registry), self.ports.local_images.as_ref()];
            let mut is_there = false;
            for registry in places.into_iter().flatten() {
                if registry.resolve(image).await?.is_some() {
                    is_there = true;
                    let name = format!("{}-{component}", deployment.version);
                    self.still_mine(record).await?;
                    registry.protect(image, &record.installation, &name).await?;
                    break;
                }
            }
            if !is_there {
                lost.push(format!("{component} ({image})"));
            }
        }
        if lost.is_empty() {
            return Ok(String::new());
        }
        let why = format!("images of {} are gone: {}", deployment.version, lost.join(", "));
        tracing::warn!(%why, "the way back is lost");
        Ok(why)
    }

    /// What failed jobs pushed without a label, by the tags of their attempts. What cannot be removed stays in the record.
    pub(super) async fn purge(&self, record: &Record) -> Result<Purged, Fault> {
        self.still_mine(record).await?;
        let needed: BTreeSet<Digest> = record.images().map(|image| image.digest().clone()).collect();
        let now = self.ports.clock.now();
        let mut purged = Purged::default();
        for orphan in &record.orphans {
            let (attempt, version) = (attempt_tag(&orphan.version, &orphan.key), version_tag(&orphan.version));
            match self.ports.registry.discard(&orphan.repository, &attempt, &version, &needed).await {
                Ok(Discarded::Removed) => purged.removed.push(orphan.key.clone()),
                // A build that nobody waited for may push long after its job has failed.
                Ok(Discarded::Absent) if orphan.seen || now.since(orphan.since) >= BUILD_OUTLIVES_MS => {
                    purged.removed.push(orphan.key.clone());
                }
                Ok(Discarded::Absent) => "its build may still be going on".clone_into(&mut purged.why),
                Err(fault) => {
                    tracing::warn!(error = %fault.chain(), "what a failed job pushed was not removed");
                    purged.why = self.setup.told(&fault).sentence();
                }
            }
        }
        Ok(purged)
    }
}
