//! A ledger that tells how long commits took, and which phases they ended. It stands between the engine and the real one, so
//! that every commit of this process is seen, whoever made it, and none of another process is counted twice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use replank_core::history::Line;
use replank_core::ports::{Etag, Ledger, LedgerError, Presence};
use replank_core::record::{ControllerId, Record};
use replank_core::words::{CommitSha, Millis};

use super::{Left, Telemetry};

/// Versions of the record that are remembered: a commit expects one that was loaded a moment ago.
const SEEN_MAX: usize = 16;

#[derive(Debug)]
pub struct Watched {
    inner: Arc<dyn Ledger>,
    telemetry: Arc<Telemetry>,
    seen: Mutex<VecDeque<(Etag, Left)>>,
}

impl Watched {
    pub fn new(inner: Arc<dyn Ledger>, telemetry: Arc<Telemetry>) -> Self {
        Self { inner, telemetry, seen: Mutex::default() }
    }

    fn see(&self, etag: &Etag, record: &Record) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.iter().any(|(known, _)| known == etag) {
            return;
        }
        if seen.len() >= SEEN_MAX {
            seen.pop_front();
        }
        seen.push_back((etag.clone(), Left { state: record.phase.state(), entered_at: record.entered_at }));
    }

    fn before(&self, etag: &Etag) -> Option<Left> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().find(|(known, _)| known == etag).map(|(_, left)| *left)
    }
}

#[async_trait]
impl Ledger for Watched {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        let found = self.inner.load().await?;
        if let Some((record, etag)) = &found {
            self.see(etag, record);
        }
        Ok(found)
    }

    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        self.inner.version().await
    }

    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError> {
        let begun = Instant::now();
        let result = self.inner.commit(expected, record, lines).await;
        let name = match &result {
            Ok(_) => "committed",
            Err(LedgerError::Conflict) => "conflict",
            Err(LedgerError::Indeterminate(_)) => "indeterminate",
            Err(LedgerError::Unavailable(_) | LedgerError::Unreadable(_)) => "failed",
        };
        self.telemetry.committed(begun.elapsed(), name);
        if let Ok(etag) = &result {
            let left = expected.and_then(|etag| self.before(etag));
            if let Some(left) = left.filter(|left| left.state != record.phase.state()) {
                self.telemetry.moved(left, record);
            }
            self.see(etag, record);
        }
        result
    }

    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError> {
        self.inner.history(from, limit).await
    }

    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError> {
        self.inner.beat(presence).await
    }

    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        self.inner.presences().await
    }

    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError> {
        self.inner.forget(controller).await
    }

    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        now: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        self.inner.first_seen(tags, now).await
    }
}
