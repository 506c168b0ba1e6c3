//! The made-up ledger: one record, its history, heartbeats; and what must be true of every commit.

use std::collections::BTreeMap;
use std::sync::Arc;

use replank_core::check;
use replank_core::format;
use replank_core::history::Line;
use replank_core::phase::Phase;
use replank_core::ports::Presence;
use replank_core::record::{ControllerId, Deployment, Record};
use replank_core::words::CommitSha;

use crate::world::{Mutant, State};

#[derive(Debug, Default)]
pub(crate) struct LedgerState {
    pub record: Option<Arc<Record>>,
    pub version: u64,
    pub lines: Vec<Line>,
    pub presences: BTreeMap<ControllerId, Presence>,
    pub first_seen: BTreeMap<String, CommitSha>,
}

/// Why a commit was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotTaken {
    Conflict,
    /// The writer's build cannot read what it would write over.
    Unreadable,
}

impl LedgerState {
    /// The record that a universe begins with.
    pub(crate) fn begin(&mut self, record: Record) {
        self.record = Some(Arc::new(record));
        self.version = 1;
    }
}

impl State {
    /// Takes a commit, as the real one does: all or nothing.
    pub(crate) fn commit(
        &mut self,
        mutant: Option<Mutant>,
        expected: Option<u64>,
        record: Record,
        lines: Vec<Line>,
        reads: u32,
        proofs: u32,
    ) -> Result<u64, NotTaken> {
        let stored = self.ledger.record.as_ref().map(|_| self.ledger.version);
        let continues = lines.iter().zip(self.ledger.lines.len() as u64..).all(|(line, seq)| line.seq == seq);
        if (stored != expected || !continues) && mutant != Some(Mutant::NoCompareAndSwap) {
            return Err(NotTaken::Conflict);
        }
        if self.ledger.record.as_ref().is_some_and(|r| format::is_readable(r.min_reader, reads).is_err()) {
            return Err(NotTaken::Unreadable);
        }
        let before = self.ledger.record.clone();
        if lines.len() > 1 {
            self.violations.push("a commit with more than one line".to_owned());
        }
        self.ledger.lines.extend(lines);
        let record = Arc::new(record);
        self.ledger.record = Some(record.clone());
        self.ledger.version += 1;
        self.judge(before.as_deref(), &record, proofs);
        Ok(self.ledger.version)
    }

    fn judge(&mut self, before: Option<&Record>, record: &Record, proofs: u32) {
        let Some(before) = before else { return };
        if before.phase.state().in_flight()
            && record.job.as_ref().map(|job| &job.id) != before.job.as_ref().map(|job| &job.id)
        {
            self.violations.push("a job in flight was replaced by another one".to_owned());
        }
        self.violations.extend(check::between(before, record).map(|misfit| misfit.to_string()));
        if record.generation < before.generation {
            self.violations.push("the generation went down".to_owned());
        }
        let was = before.phase.state();
        let ended_well = was.in_flight() && !was.before_swap() && is_success(&record.phase);
        if ended_well {
            let running = record.running.as_ref();
            let there = running.zip(self.platform.traffic.as_ref()).is_some_and(|(d, at)| d.revision == *at);
            // A late effect of an earlier driver may take the traffic away between the look and the commit; what was never
            // seen through the way in is something else.
            if self.through < proofs && there {
                self.violations.push(format!(
                    "{} without proof: {} answers",
                    record.phase.state().name(),
                    self.through
                ));
            }
        }
        if let Phase::RollingOut(swap) = &record.phase
            && before.running.is_some()
        {
            for (component, image) in record.snapshot.iter().flat_map(|s| &s.deployment.images) {
                let kept = self.images.get(image.digest()).is_some_and(|stored| stored.kept);
                if was.before_swap() && !kept {
                    self.violations.push(format!("{component} has no protected way back for {}", swap.to.version));
                }
            }
        }
        let goes_back = |phase: &Phase| match phase {
            Phase::RollingBack(back) => Some(back.reason.clone()),
            Phase::Confirming(confirming) => confirming.flip.as_ref().map(|flip| flip.why.clone()),
            _ => None,
        };
        let begins = goes_back(&before.phase).is_none() && goes_back(&record.phase).is_some();
        let last = self.ledger.lines.last().map(|line| String::from_utf8_lossy(&line.bytes).into_owned());
        let by_a_person = last.is_some_and(|line| line.contains("\"data_restored\":true"));
        if let Some(why) = replank_core::data::closed_for(before).filter(|_| begins && !by_a_person) {
            self.violations.push(format!("the system went back although {why}"));
        }
        for deployment in needed(record).filter(|d| d.reads_format() < record.min_reader) {
            self.violations.push(format!("{} can no longer read the record", deployment.version));
        }
    }
}

fn is_success(phase: &Phase) -> bool {
    matches!(phase, Phase::Succeeded { built_only: None } | Phase::RolledBack { .. })
}

/// Everybody who may have to drive from this record on.
fn needed(record: &Record) -> impl Iterator<Item = &Deployment> {
    let swap = record.phase.swap();
    let all = [
        record.running.as_ref(),
        record.serving.as_ref(),
        record.snapshot.as_ref().map(|s| &s.deployment),
        swap.and_then(|s| s.from.as_ref()),
        swap.map(|s| &s.to),
    ];
    all.into_iter().flatten()
}
