//! Answers that are no row: their shapes, for the handlers and for the document.

use std::collections::BTreeMap;

use replank_core::ports::TagRef;
use replank_core::record::Record;
use replank_core::words::CommitSha;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::events::time;
use crate::engine::api;

#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: &'static str,
    /// The application's own version.
    pub version: String,
    /// The version of Replank.
    pub replank: &'static str,
}

/// The process answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sign {
    pub status: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Candidates {
    /// A git remote is configured.
    pub configured: bool,
    /// Its URL, without userinfo.
    pub remote: Option<String>,
    pub running_version: String,
    /// Newer than what runs, newest first, at most 20.
    #[schema(max_items = 20)]
    pub candidates: Vec<Candidate>,
    /// Newer than what runs, and not offered.
    pub refused: Vec<Candidate>,
    /// Why no commit of the tracking branch can be started, whatever `track_commits` says; absent where they can.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false)]
    pub commits_refused: Option<String>,
    /// Why the remote could not be read; the lists are empty then.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false)]
    pub error: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Candidate {
    /// `vA.B.C`.
    pub name: String,
    pub raw_ref: String,
    pub commit_sha: String,
    /// Why it is not offered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false)]
    pub refused: Option<String>,
}

impl From<&TagRef> for Candidate {
    fn from(tag: &TagRef) -> Self {
        Self {
            name: tag.version.tag(),
            raw_ref: tag.raw_ref.clone(),
            commit_sha: tag.commit.to_string(),
            refused: tag.refused.clone(),
        }
    }
}

/// Commits that failed, or that somebody left.
#[derive(Debug, Serialize, ToSchema)]
pub struct Quarantine {
    pub quarantine: Vec<Quarantined>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Quarantined {
    pub version: String,
    pub commit_sha: String,
    pub reason: String,
    /// RFC 3339, UTC.
    pub at: String,
    /// Images that it was built as, by component.
    pub images: BTreeMap<String, String>,
}

impl Quarantine {
    pub fn of(record: &Record) -> Self {
        let mut entries: Vec<_> = record.quarantine.iter().collect();
        entries.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.at));
        let one = |(commit, entry): (&CommitSha, &replank_core::record::Quarantined)| Quarantined {
            version: entry.version.to_string(),
            commit_sha: commit.to_string(),
            reason: entry.reason.clone(),
            at: entry.at.rfc3339(),
            images: super::row::references(&entry.images),
        };
        Self { quarantine: entries.into_iter().map(one).collect() }
    }
}

impl From<api::Candidates> for Candidates {
    fn from(found: api::Candidates) -> Self {
        Self {
            configured: found.configured,
            remote: found.remote.as_deref().map(crate::config::shown),
            running_version: found.running_version,
            candidates: found.candidates.iter().map(Candidate::from).collect(),
            refused: found.refused.iter().map(Candidate::from).collect(),
            commits_refused: found.commits_refused,
            error: found.error,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Preflight {
    /// No image of the way back is known to be gone.
    pub available: bool,
    pub reason: String,
    pub images: Vec<PreflightImage>,
    /// Why the data stand in the way; a rollback goes ahead all the same for whoever says that they are restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, required = false)]
    pub closed: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct PreflightImage {
    pub image_ref: String,
    pub exists: bool,
    /// RFC 3339, UTC.
    pub created_on: Option<String>,
    /// Why nobody could say whether it exists; empty where somebody could.
    pub error: String,
}

impl From<api::Preflight> for Preflight {
    fn from(found: api::Preflight) -> Self {
        let images = found.images.into_iter().map(|image| PreflightImage {
            image_ref: image.image_ref,
            exists: image.exists,
            created_on: image.created_on.map(|at| time(Some(at))),
            error: image.error.unwrap_or_default(),
        });
        Self { available: found.available, reason: found.reason, images: images.collect(), closed: found.closed }
    }
}

/// How to go back with Replank gone. Beside these, facts that only some platforms have.
#[derive(Debug, Serialize, ToSchema)]
pub struct EscapeHatch {
    /// Empty on platforms that have no such thing, as the next two.
    pub container_app: String,
    pub subscription_id: String,
    pub resource_group: String,
    /// Image references by component.
    pub target_images: BTreeMap<String, String>,
    pub commands: Vec<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub facts: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct History {
    /// The newest last.
    #[schema(value_type = Vec<HistoryEvent>)]
    pub events: Vec<Value>,
}

/// A stored line, with the fields of its own kind beside these.
#[derive(Debug, Serialize, ToSchema)]
pub struct HistoryEvent {
    /// RFC 3339, UTC.
    pub ts: String,
    /// Empty for what belongs to no job.
    pub job_id: String,
    pub event: String,
}

impl HistoryEvent {
    /// Shown rather than left out: a line that cannot be read is something to look into.
    pub fn unreadable(seq: u64) -> Value {
        serde_json::json!({ "ts": "", "job_id": "", "event": "unreadable", "seq": seq })
    }
}
