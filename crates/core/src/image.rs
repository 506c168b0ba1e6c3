//! What an image is to Replank: an identity that cannot change under it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::words::{ComponentName, Digest, OpKey, Version};

/// An image by content, never by tag.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageId {
    /// In a registry: `repository@digest`. The repository includes the registry's host.
    Manifest { repository: String, digest: Digest },
    /// Only in one engine, which gives it no manifest digest: the engine's own image id, and the tag that it was built as.
    Engine { id: Digest, name: String },
}

impl ImageId {
    /// What is given to an engine to run exactly this image.
    pub fn reference(&self) -> String {
        match self {
            Self::Manifest { repository, digest } => format!("{repository}@{digest}"),
            Self::Engine { id, .. } => id.to_string(),
        }
    }

    /// Where its versions are kept beside one another: the name without tag or digest.
    pub fn repository(&self) -> &str {
        match self {
            Self::Manifest { repository, .. } => repository,
            // A colon before a slash belongs to a port.
            Self::Engine { name, .. } => match name.rsplit_once(':') {
                Some((repository, tag)) if !tag.contains('/') => repository,
                Some(_) | None => name,
            },
        }
    }

    /// What makes it this image: the same bytes have the same digest under every name.
    pub fn digest(&self) -> &Digest {
        match self {
            Self::Manifest { digest, .. } => digest,
            Self::Engine { id, .. } => id,
        }
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest { repository, digest } => write!(f, "{repository}@{digest}"),
            Self::Engine { id, name } => write!(f, "{name}@{id}"),
        }
    }
}

/// One image of each component: what moves as a set (never one component alone).
pub type Images = std::collections::BTreeMap<ComponentName, ImageId>;

/// The tag that one attempt's image is pushed under. Nobody outside the installation can guess the key, so what is found under
/// this tag is what the attempt made.
pub fn attempt_tag(version: &Version, key: &OpKey) -> String {
    format!("{}-{key}", version_tag(version))
}

/// The tag for people: it moves when the version is built again.
pub fn version_tag(version: &Version) -> String {
    format!("v{version}")
}
