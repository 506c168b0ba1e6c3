//! How often in a row a deployment was seen well or ill: what turns single looks into proof.

use std::collections::BTreeMap;

use crate::drift::{self, Lasting};
use crate::policy::Policy;
use crate::ports::{Ask, Observation, Probed};
use crate::record::{Deployment, Record};
use crate::swap::{Fit, fit, fit_to_serve};
use crate::words::{Millis, RevisionId};

/// Observations in a row, kept by the loop between turns.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Streaks {
    direct: BTreeMap<RevisionId, Streak>,
    /// The same, by those containers alone that may overlap: what a side that made room for another still has.
    warm: BTreeMap<RevisionId, Streak>,
    through: BTreeMap<RevisionId, Streak>,
    /// At rest: how what serves differs from what was recorded.
    pub(super) drift: Lasting,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Streak {
    pub passed: u32,
    pub failed: u32,
    pub last: String,
    /// When the last counted look was.
    at: Option<Millis>,
}

impl Streak {
    /// Counting stops where it no longer matters.
    const ENOUGH: u32 = 1_000;

    /// Looks that come closer together than the policy's spacing count as one: three within a millisecond prove no more
    /// than one does, and condemn no more.
    fn see(&mut self, probed: &Probed, at: Millis, policy: &Policy) {
        let since = self.at.map(|last| at.since(last));
        match probed {
            Probed::NotAsked => {}
            Probed::Passed => {
                if self.passed == 0 || since.is_none_or(|gap| gap >= policy.prove_every) {
                    self.passed = (self.passed + 1).min(Self::ENOUGH);
                    self.at = Some(at);
                }
                self.failed = 0;
                self.last.clear();
            }
            Probed::Failed(why) => {
                if self.failed == 0 || since.is_none_or(|gap| gap >= policy.observe_every) {
                    self.failed = (self.failed + 1).min(Self::ENOUGH);
                    self.at = Some(at);
                }
                self.passed = 0;
                self.last.clone_from(why);
            }
        }
    }
}

impl Streaks {
    /// Counts one observation that was made for `ask`.
    pub fn see(&mut self, ask: &Ask, seen: &Observation, policy: &Policy) {
        let asked = |id: &RevisionId| ask.direct.iter().any(|d| d.revision == *id);
        // A streak means consecutive looks: what was not looked at starts over.
        self.direct.retain(|id, _| asked(id));
        self.warm.retain(|id, _| asked(id));
        for deployment in &ask.direct {
            let id = &deployment.revision;
            let probed = |fit| match (fit, seen.revisions.get(id)) {
                (Fit::Up, Some(revision)) => revision.probed.clone(),
                (Fit::Up, None) => Probed::NotAsked,
                (Fit::NotYet(why) | Fit::Crashed(why) | Fit::Foreign(why), _) => Probed::Failed(why),
            };
            let early = probed(fit(seen, deployment, deployment.plan.early()));
            self.direct.entry(id.clone()).or_default().see(&early, seen.at, policy);
            let warm = probed(fit_to_serve(seen, deployment));
            self.warm.entry(id.clone()).or_default().see(&warm, seen.at, policy);
        }
        let through = ask.through.as_ref().map(|d| &d.revision);
        self.through.retain(|id, _| Some(id) == through);
        if let Some(id) = through {
            let probed = match &seen.traffic.revision {
                Some(serving) if serving == id => seen.traffic.probed.clone(),
                Some(other) => Probed::Failed(format!("traffic still goes to revision {other}")),
                None => Probed::Failed("traffic goes nowhere".to_owned()),
            };
            self.through.entry(id.clone()).or_default().see(&probed, seen.at, policy);
        }
    }

    /// Counts one observation at rest.
    pub fn see_at_rest(&mut self, record: &Record, seen: &Observation) {
        match record.proved_and_serving() {
            Some(serving) => self.drift.see(drift::of(serving, seen), seen.at),
            None => self.drift = Lasting::default(),
        }
    }

    pub fn proved(&self, d: &Deployment, proofs: u32) -> bool {
        self.direct.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    /// Answers well enough to take the traffic back, whatever else of it had to make room.
    pub fn warm(&self, d: &Deployment, proofs: u32) -> bool {
        self.warm.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    pub fn through_proved(&self, d: &Deployment, proofs: u32) -> bool {
        self.through.get(&d.revision).is_some_and(|s| s.passed >= proofs)
    }

    pub fn why(&self, d: &Deployment) -> String {
        why(self.direct.get(&d.revision), "the new revision's probes")
    }

    pub fn why_through(&self, d: &Deployment) -> String {
        why(self.through.get(&d.revision), "probes through the public way in")
    }

    /// The reason, when a revision was bad often enough in a row.
    pub fn degraded(&self, d: &Deployment, after: u32) -> Option<String> {
        [self.direct.get(&d.revision), self.through.get(&d.revision)]
            .into_iter()
            .flatten()
            .find(|s| s.failed >= after)
            .map(|s| s.last.clone())
    }
}

fn why(streak: Option<&Streak>, what: &str) -> String {
    match streak {
        Some(s) if s.failed > 0 => format!("{what} fail: {}", s.last),
        Some(s) => format!("{what} answered {} in a row", s.passed),
        None => format!("{what} were not asked yet"),
    }
}
