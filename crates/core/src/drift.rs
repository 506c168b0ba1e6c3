//! Drift: what runs is not what was recorded, as sentences for people. Somebody's own hand, a container that keeps failing, or a
//! change that Replank cannot put right by itself.

use serde::{Deserialize, Serialize};

use crate::mask::mask_sentence;
use crate::ports::{Observation, Running};
use crate::record::Deployment;
use crate::words::Millis;

/// More than this many differences say no more than that all is different.
pub const DRIFT_MAX: usize = 10;

/// A sentence holds what the platform says of a container, and stands in the record: no longer than this, in characters.
const SENTENCE_MAX: usize = 200;

/// What was seen often enough to be told, as it stands in the record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Drift {
    /// One sentence for each difference, at most [`DRIFT_MAX`].
    pub what: Vec<String>,
    pub since: Millis,
    /// An administrator has seen exactly this, and lets upgrades start all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepted: bool,
}

impl Drift {
    /// The first difference, and how many more there are.
    #[must_use]
    pub fn brief(&self) -> String {
        let first = self.what.first().map(String::as_str).unwrap_or_default();
        match self.what.len() {
            0 | 1 => first.to_owned(),
            more => format!("{first}, and {} more", more - 1),
        }
    }
}

/// How what is seen differs from a deployment that is recorded as proved and serving; empty where it does not.
#[must_use]
pub fn of(recorded: &Deployment, seen: &Observation) -> Vec<String> {
    let mut what = Vec::new();
    let revision = &recorded.revision;
    match seen.revisions.get(revision) {
        None => what.push(format!("nothing of revision {revision} is there")),
        Some(there) if there.key.as_ref() != Some(&recorded.key) || there.commit.as_ref() != Some(&recorded.commit) => {
            what.push(format!("what runs as revision {revision} was not made by the job that is recorded"));
        }
        Some(there) => {
            for (name, plan) in &recorded.plan.containers {
                let Some(container) = there.containers.get(name) else {
                    what.push(format!("container {name} is gone"));
                    continue;
                };
                if let Some(image) = recorded.images.get(&plan.component).filter(|image| **image != container.image) {
                    what.push(format!("container {name} runs {} instead of {image}", container.image));
                }
                match (container.running, &container.trouble) {
                    (Running::Created, _) => what.push(format!("container {name} is not started")),
                    (Running::Stopped, _) => {
                        let code = container.exit_code.map_or(String::new(), |code| format!(", exit code {code}"));
                        what.push(format!("container {name} is stopped{code}"));
                    }
                    (Running::Running, Some(trouble)) => what.push(format!("container {name}: {trouble}")),
                    (Running::Running, None) => {}
                }
            }
            let others = there.containers.keys().filter(|name| !recorded.plan.containers.contains_key(*name));
            what.extend(others.map(|name| format!("container {name} runs beside them and is not recorded")));
        }
    }
    if seen.traffic.revision.is_none() && !recorded.plan.containers.is_empty() {
        what.push("no traffic goes anywhere".to_owned());
    }
    what.truncate(DRIFT_MAX);
    what.into_iter().map(|sentence| on_a_line(&sentence)).collect()
}

fn on_a_line(text: &str) -> String {
    mask_sentence(text, SENTENCE_MAX)
}

/// One difference for as long as it is seen, look after look: what passes by itself is none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Lasting {
    what: Vec<String>,
    since: Option<Millis>,
}

impl Lasting {
    /// Counts a look at `at`.
    pub fn see(&mut self, what: Vec<String>, at: Millis) {
        if self.since.is_none() || what != self.what {
            *self = Self { what, since: Some(at) };
        }
    }

    /// Something differs that is not told yet: it is looked at again soon, and not at the pace of a rest.
    #[must_use]
    pub fn is_pending(&self, recorded: Option<&Drift>) -> bool {
        !self.what.is_empty() && recorded.is_none_or(|drift| drift.what != self.what)
    }

    /// What is to be recorded in place of `recorded`: differences that were there for `after` milliseconds at least, or at once
    /// that there are none any more.
    #[must_use]
    pub fn news(&self, recorded: Option<&Drift>, now: Millis, after: u64) -> Option<&[String]> {
        let since = self.since?;
        let known = recorded.map_or(&[][..], |drift| &drift.what);
        let is_sure = self.what.is_empty() || now.since(since) >= after;
        (is_sure && self.what != known).then_some(&self.what)
    }
}
