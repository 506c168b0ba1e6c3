//! A registry that speaks the OCI distribution protocol: images are known by repository and digest.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _};
use replank_core::fault::Fault;
use replank_core::image::ImageId;
use replank_core::ports::{Discarded, Registry, Stored};
use replank_core::words::{Digest, InstallationId};

use super::{foreign, keep_prefix, keep_tag, protected};
use crate::labels::{INSTALLATION, KEEP_TAG};
use crate::oci::{DOCKER_MANIFEST, OciClient, OciConfig};

/// Requests at once while tags are looked at: quick, and no burden for a small registry.
const AT_ONCE: usize = 8;

#[derive(Debug)]
pub struct OciRegistry {
    client: OciClient,
}

fn place(image: &ImageId) -> Result<(&str, &Digest), Fault> {
    match image {
        ImageId::Manifest { repository, digest } => Ok((repository, digest)),
        ImageId::Engine { .. } => Err(Fault::permanent(format!("{image} is only in an engine, not in a registry"))
            .advice("build it again with the registry configured")),
    }
}

impl OciRegistry {
    pub fn new(config: OciConfig) -> Result<Self, Fault> {
        Ok(Self { client: OciClient::new(config)? })
    }

    async fn stored(&self, repository: &str, digest: &Digest) -> Result<Option<Stored>, Fault> {
        let Some(manifest) = self.client.manifest(repository, digest.as_str()).await? else { return Ok(None) };
        let facts = self.client.facts(repository, &manifest).await?;
        let image = ImageId::Manifest { repository: repository.to_owned(), digest: digest.clone() };
        Ok(Some(Stored { image, created_at: facts.created_at, labels: facts.labels }))
    }

    /// Every tag of a repository by the digest under it: all of them, or a fault.
    async fn by_digest(&self, repository: &str) -> Result<BTreeMap<Digest, Vec<String>>, Fault> {
        let tags = self.client.tags(repository).await?;
        let found: Vec<(Option<Digest>, String)> = futures_util::stream::iter(tags)
            .map(|tag| async move { Ok::<_, Fault>((self.client.head(repository, &tag).await?, tag)) })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let mut map: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (digest, tag) in found {
            // A tag can go between listing and looking.
            if let Some(digest) = digest {
                map.entry(digest).or_default().push(tag);
            }
        }
        Ok(map)
    }
}

impl OciRegistry {
    /// Takes one tag away and leaves its manifest.
    async fn untag(&self, repository: &str, tag: &str) -> Result<(), Fault> {
        if self.client.delete_tag(repository, tag).await?.is_some() {
            return Ok(());
        }
        // This registry deletes manifests only, and with one every tag on it. So the tag is moved to a manifest of its own
        // first, which is deleted then. Where even that is forbidden, the image is released all the same.
        let config = format!("{{\"architecture\":\"none\",\"os\":\"none\",\"replank\":\"{tag}\"}}");
        let blob = self.client.put_blob(repository, config.as_bytes()).await?;
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "size": config.len(),
                "digest": blob,
            },
            "layers": [],
        })
        .to_string();
        self.client.put_manifest(repository, tag, DOCKER_MANIFEST, manifest.as_bytes()).await?;
        self.client.delete_manifest(repository, &Digest::of(manifest.as_bytes())).await.map(drop)
    }
}

#[async_trait]
impl Registry for OciRegistry {
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault> {
        let (repository, digest) = place(image)?;
        self.stored(repository, digest).await
    }

    async fn protect(&self, image: &ImageId, installation: &InstallationId, name: &str) -> Result<(), Fault> {
        let (repository, digest) = place(image)?;
        let tag = keep_tag(installation, name, digest);
        if self.client.head(repository, &tag).await?.as_ref() == Some(digest) {
            return Ok(());
        }
        let Some(manifest) = self.client.manifest(repository, digest.as_str()).await? else {
            return Err(Fault::permanent(format!(
                "{image} cannot be protected: the registry does not have it any more"
            ))
            .advice("build the release again"));
        };
        self.client.put_manifest(repository, &tag, &manifest.media_type, &manifest.bytes).await
    }

    async fn release(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        let (repository, digest) = place(image)?;
        let ours = keep_prefix(installation);
        for tag in self.by_digest(repository).await?.remove(digest).unwrap_or_default() {
            if tag.starts_with(&ours) {
                self.untag(repository, &tag).await?;
            }
        }
        Ok(())
    }

    async fn list(&self, repository: &str, installation: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault> {
        let mut list = Vec::new();
        for (digest, tags) in self.by_digest(repository).await? {
            let Some(stored) = self.stored(repository, &digest).await? else { continue };
            if stored.labels.get(INSTALLATION).map(String::as_str) == Some(installation.as_str()) {
                list.push((stored, tags));
            }
        }
        Ok(list)
    }

    async fn delete(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        let (repository, digest) = place(image)?;
        let Some(stored) = self.stored(repository, digest).await? else { return Ok(()) };
        if stored.labels.get(INSTALLATION).map(String::as_str) != Some(installation.as_str()) {
            return Err(foreign(image));
        }
        // Deleting a manifest drops every tag on it, so all are looked at first.
        let tags = self.by_digest(repository).await?.remove(digest).unwrap_or_default();
        if let Some(tag) = tags.iter().find(|tag| tag.starts_with(KEEP_TAG)) {
            return Err(protected(image, tag));
        }
        self.client.delete_manifest(repository, digest).await.map(drop)
    }

    async fn discard(
        &self,
        repository: &str,
        attempt_tag: &str,
        also: &str,
        needed: &BTreeSet<Digest>,
    ) -> Result<Discarded, Fault> {
        let Some(digest) = self.client.head(repository, attempt_tag).await? else { return Ok(Discarded::Absent) };
        // Deleting a manifest drops every tag on it, so all are looked at first.
        let tags = self.by_digest(repository).await?.remove(&digest).unwrap_or_default();
        let (ours, others): (Vec<_>, Vec<_>) = tags.iter().partition(|tag| *tag == attempt_tag || *tag == also);
        if others.is_empty() && !needed.contains(&digest) {
            self.client.delete_manifest(repository, &digest).await?;
        } else {
            for tag in ours {
                self.untag(repository, tag).await?;
            }
        }
        Ok(Discarded::Removed)
    }
}
