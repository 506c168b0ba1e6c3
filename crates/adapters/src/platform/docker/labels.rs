//! The labels that everything Replank makes carries: how it is found again, and how it is told from a look-alike.
//!
//! No label of another tool is ever set: a tool that removes its own orphans must not find ours (lesson 37).

use std::collections::{BTreeMap, HashMap};

use replank_core::image::ImageId;
use replank_core::record::Deployment;
use replank_core::words::{AppName, CommitSha, ComponentName, ContainerName, InstallationId, OpKey, RevisionId};

pub use crate::labels::{APPLICATION, COMMIT, COMPONENT, INSTALLATION, KEY};
pub const REVISION: &str = "io.replank.revision";
pub const CONTAINER: &str = "io.replank.container";
pub const ROLE: &str = "io.replank.role";
/// The intended image, as JSON.
pub const IMAGE: &str = "io.replank.image";
/// The engine's id that the intended image had when the container was made.
pub const IMAGE_ID: &str = "io.replank.image-id";
/// Hash of what the proxy was made from.
pub const CONFIG: &str = "io.replank.config";

pub const ROLE_APP: &str = "app";
/// A data step: no part of what a revision runs.
pub const ROLE_STEP: &str = "step";
pub const ROLE_PROXY: &str = "proxy";
pub const ROLE_NETWORK: &str = "network";

/// Whose things these are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub installation: InstallationId,
    pub application: AppName,
}

impl Owner {
    pub fn labels(&self, role: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            (INSTALLATION.to_owned(), self.installation.to_string()),
            (APPLICATION.to_owned(), self.application.to_string()),
            (ROLE.to_owned(), role.to_owned()),
        ])
    }

    /// A filter that only things of this owner pass, for the engine's list calls.
    pub fn filter(&self, more: &[(&str, &str)]) -> HashMap<String, Vec<String>> {
        let mut labels =
            vec![format!("{INSTALLATION}={}", self.installation), format!("{APPLICATION}={}", self.application)];
        labels.extend(more.iter().map(|(name, value)| format!("{name}={value}")));
        HashMap::from([("label".to_owned(), labels)])
    }

    pub fn owns(&self, labels: &HashMap<String, String>) -> bool {
        let is = |name: &str, value: &str| labels.get(name).is_some_and(|found| found == value);
        is(INSTALLATION, self.installation.as_str()) && is(APPLICATION, self.application.as_str())
    }

    /// Labels of one container of a deployment, without the engine's id of its image.
    pub fn container(
        &self,
        deployment: &Deployment,
        container: &ContainerName,
        component: &ComponentName,
        image: &ImageId,
    ) -> BTreeMap<String, String> {
        let mut labels = self.labels(ROLE_APP);
        labels.extend([
            (REVISION.to_owned(), deployment.revision.to_string()),
            (CONTAINER.to_owned(), container.to_string()),
            (COMPONENT.to_owned(), component.to_string()),
            (KEY.to_owned(), deployment.key.to_string()),
            (COMMIT.to_owned(), deployment.commit.to_string()),
            (IMAGE.to_owned(), serde_json::to_string(image).unwrap_or_default()),
        ]);
        labels
    }

    pub fn network(&self, revision: &RevisionId) -> BTreeMap<String, String> {
        let mut labels = self.labels(ROLE_NETWORK);
        labels.insert(REVISION.to_owned(), revision.to_string());
        labels
    }
}

/// What a container of ours says about itself; `None` where a label is missing or malformed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    pub revision: RevisionId,
    pub container: ContainerName,
    pub key: Option<OpKey>,
    pub commit: Option<CommitSha>,
    pub image: Option<ImageId>,
    pub image_id: Option<String>,
}

impl Carried {
    pub fn read(labels: &HashMap<String, String>) -> Option<Self> {
        let key = |text: &String| serde_json::from_value(serde_json::Value::String(text.clone())).ok();
        Some(Self {
            revision: labels.get(REVISION)?.parse().ok()?,
            container: labels.get(CONTAINER)?.parse().ok()?,
            key: labels.get(KEY).and_then(key),
            commit: labels.get(COMMIT).and_then(|text| text.parse().ok()),
            image: labels.get(IMAGE).and_then(|text| serde_json::from_str(text).ok()),
            image_id: labels.get(IMAGE_ID).cloned(),
        })
    }

    /// Made for this deployment, by this operation, from this commit.
    pub fn belongs(&self, deployment: &Deployment, container: &ContainerName) -> bool {
        self.revision == deployment.revision
            && self.container == *container
            && self.key.as_ref() == Some(&deployment.key)
            && self.commit.as_ref() == Some(&deployment.commit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elsewhere `up -d --remove-orphans` of another tool removed what carried that tool's project label.
    #[test]
    fn lesson_37_no_label_of_another_tool_is_carried() {
        let owner = Owner {
            installation: InstallationId::new("abcdefghij0123456789").expect("id"),
            application: AppName::new("shop").expect("name"),
        };
        let revision = RevisionId::new("v1-0-0-abcdef").expect("revision");
        let all = [ROLE_APP, ROLE_STEP, ROLE_PROXY, ROLE_NETWORK].map(|role| owner.labels(role));
        let names = all.iter().flat_map(BTreeMap::keys).cloned().chain(owner.network(&revision).into_keys());
        let own = [REVISION, CONTAINER, ROLE, IMAGE, IMAGE_ID, CONFIG, COMMIT, COMPONENT, KEY].map(str::to_owned);
        for name in names.chain(own) {
            assert!(name.starts_with("io.replank."), "{name} may be another tool's");
        }
        // And who lists by these labels never sees what lacks this installation's id.
        let filter = owner.filter(&[(ROLE, ROLE_APP)]);
        assert!(filter["label"].contains(&"io.replank.installation=abcdefghij0123456789".to_owned()), "{filter:?}");
        let other = HashMap::from([(INSTALLATION.to_owned(), "someoneelse00000".to_owned())]);
        assert!(!owner.owns(&other) && !owner.owns(&HashMap::new()));
    }
}
