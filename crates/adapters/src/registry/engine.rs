//! The engine itself as the registry, where none is configured: images are known by the engine's own ids.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use async_trait::async_trait;
use bollard::models::ImageInspect;
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder, TagImageOptionsBuilder,
};
use replank_core::fault::Fault;
use replank_core::image::ImageId;
use replank_core::ports::{Discarded, Registry, Stored};
use replank_core::words::{Digest, InstallationId, Millis};

use super::{foreign, keep_prefix, keep_tag, protected};
use crate::engine::{Engine, classify, is_missing};
use crate::labels::{INSTALLATION, KEEP_TAG, KEY};

#[derive(Debug, Clone)]
pub struct EngineRegistry {
    engine: Engine,
}

/// Splits `repository:tag`; a colon before a slash belongs to a port.
fn split(reference: &str) -> Option<(&str, &str)> {
    reference.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))
}

fn is_keep(reference: &str) -> bool {
    split(reference).is_some_and(|(_, tag)| tag.starts_with(KEEP_TAG))
}

impl EngineRegistry {
    pub fn new(engine: Engine) -> Self {
        Self { engine }
    }

    async fn inspect(&self, reference: &str) -> Result<Option<ImageInspect>, Fault> {
        match self.engine.docker().inspect_image(reference).await {
            Ok(image) => Ok(Some(image)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(classify(error, &format!("the image {reference} cannot be inspected"))),
        }
    }

    async fn tag(&self, id: &str, repository: &str, tag: &str) -> Result<(), Fault> {
        let options = TagImageOptionsBuilder::default().repo(repository).tag(tag).build();
        let tagged = self.engine.docker().tag_image(id, Some(options)).await;
        tagged.map_err(|error| classify(error, &format!("the image {id} cannot be tagged {repository}:{tag}")))
    }

    /// Removes a tag, and with the last one the image. Never forced: what a container uses stays.
    async fn untag(&self, reference: &str) -> Result<(), Fault> {
        let options = RemoveImageOptionsBuilder::default().force(false).noprune(false).build();
        match self.engine.docker().remove_image(reference, Some(options), None).await {
            Ok(_) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(classify(error, &format!("the image {reference} cannot be removed"))),
        }
    }
}

/// The repository that an image's keep tag goes to, and the identity that it is derived from.
fn home(image: &ImageId) -> Result<(&str, &Digest), Fault> {
    match image {
        ImageId::Engine { id, name } => split(name)
            .map(|(repository, _)| (repository, id))
            .ok_or_else(|| Fault::permanent(format!("the image {image} has no name with a tag"))),
        ImageId::Manifest { repository, digest } => Ok((repository, digest)),
    }
}

fn labels(image: &ImageInspect) -> BTreeMap<String, String> {
    let labels = image.config.as_ref().and_then(|c| c.labels.clone());
    labels.unwrap_or_default().into_iter().collect()
}

#[async_trait]
impl Registry for EngineRegistry {
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault> {
        let found = self.inspect(&image.reference()).await?;
        Ok(found.map(|found| Stored {
            image: image.clone(),
            created_at: found.created.map(|at| Millis((at.unix_timestamp_nanos() / 1_000_000) as i64)),
            labels: labels(&found),
        }))
    }

    async fn protect(&self, image: &ImageId, installation: &InstallationId, name: &str) -> Result<(), Fault> {
        let (repository, id) = home(image)?;
        self.tag(&image.reference(), repository, &keep_tag(installation, name, id)).await
    }

    async fn release(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        let Some(found) = self.inspect(&image.reference()).await? else { return Ok(()) };
        let ours = keep_prefix(installation);
        let is_ours = |reference: &String| split(reference).is_some_and(|(_, tag)| tag.starts_with(&ours));
        let (kept, others): (Vec<_>, Vec<_>) = found.repo_tags.unwrap_or_default().into_iter().partition(is_ours);
        // The engine deletes an image with its last tag; releasing is not deleting.
        if !kept.is_empty()
            && others.is_empty()
            && let ImageId::Engine { name, .. } = image
            && let Some((repository, tag)) = split(name)
        {
            self.tag(&image.reference(), repository, tag).await?;
        }
        for reference in &kept {
            self.untag(reference).await?;
        }
        Ok(())
    }

    async fn list(&self, repository: &str, installation: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault> {
        let filters = HashMap::from([
            ("label", vec![format!("{INSTALLATION}={installation}")]),
            ("reference", vec![repository.to_owned()]),
        ]);
        let options = ListImagesOptionsBuilder::default().filters(&filters).build();
        let images = self.engine.docker().list_images(Some(options)).await;
        let images =
            images.map_err(|error| classify(error, &format!("the images of {repository} cannot be listed")))?;
        let mut list = Vec::new();
        for image in images {
            // The filter shows only tags of this repository, but the others count, too: deleting takes them all.
            let Some(full) = self.inspect(&image.id).await? else { continue };
            let id = Digest::new(image.id).map_err(|e| Fault::permanent("an image's id is not a digest").because(e))?;
            let labels: BTreeMap<String, String> = labels(&full);
            let references = full.repo_tags.unwrap_or_default();
            let built_as = labels.get(KEY).map(|key| format!("-{key}"));
            let name = references
                .iter()
                .find(|r| built_as.as_ref().is_some_and(|end| r.ends_with(end.as_str())))
                .or(references.first());
            // What was pulled by its digest has no tag.
            let name = name.map_or(repository, String::as_str).to_owned();
            let tags = references.iter().filter_map(|r| split(r)).map(|(_, tag)| tag.to_owned()).collect();
            let created_at = Some(Millis(image.created.saturating_mul(1_000)));
            list.push((Stored { image: ImageId::Engine { id, name }, created_at, labels }, tags));
        }
        Ok(list)
    }

    async fn delete(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        let Some(found) = self.inspect(&image.reference()).await? else { return Ok(()) };
        if labels(&found).get(INSTALLATION).map(String::as_str) != Some(installation.as_str()) {
            return Err(foreign(image));
        }
        let tags = found.repo_tags.unwrap_or_default();
        if let Some(tag) = tags.iter().find(|tag| is_keep(tag)) {
            return Err(protected(image, tag));
        }
        let id = found.id.unwrap_or_default();
        let filters = HashMap::from([("ancestor", vec![id.clone()])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let users = self.engine.docker().list_containers(Some(options)).await;
        let users = users.map_err(|error| classify(error, "the containers that use an image cannot be listed"))?;
        // Children of an image are listed as well; only its own containers hold it.
        if users.iter().any(|c| c.image_id.as_deref() == Some(id.as_str())) {
            return Err(Fault::permanent(format!("{image} is used by a container and is not deleted"))
                .advice("it can be deleted once the revision that uses it is removed"));
        }
        for tag in &tags {
            self.untag(tag).await?;
        }
        // An image without any tag is still there.
        if tags.is_empty() { self.untag(&id).await } else { Ok(()) }
    }

    async fn discard(
        &self,
        repository: &str,
        attempt_tag: &str,
        also: &str,
        needed: &BTreeSet<Digest>,
    ) -> Result<Discarded, Fault> {
        let name = |tag: &str| format!("{repository}:{tag}");
        let (attempt, also) = (name(attempt_tag), name(also));
        let Some(found) = self.inspect(&attempt).await? else { return Ok(Discarded::Absent) };
        let tags = found.repo_tags.unwrap_or_default();
        let (ours, others): (Vec<_>, Vec<_>) = tags.into_iter().partition(|tag| *tag == attempt || *tag == also);
        // With its last tag an image goes, and what is needed stays.
        let is_needed = found.id.is_some_and(|id| needed.iter().any(|digest| digest.as_str() == id));
        if !(is_needed && others.is_empty()) {
            for tag in &ours {
                self.untag(tag).await?;
            }
        }
        Ok(Discarded::Removed)
    }
}
