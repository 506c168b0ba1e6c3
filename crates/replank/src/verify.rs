//! The history held against the record's anchor, from its first line to its last.

use replank_core::history::{Broken, Verifier};
use replank_core::ports::{Ledger, LedgerError};

/// Lines that are read at a time: a history of years must not be in memory as a whole.
const STEP: usize = 1_000;

/// Why a history is not known to be consistent.
#[derive(Debug, thiserror::Error)]
pub enum NotVerified {
    #[error("the ledger cannot be read")]
    Ledger(#[from] LedgerError),
    #[error("the history is NOT consistent with its anchor: {0}; keep a copy of the ledger directory and look into it")]
    Broken(Broken),
}

/// How many lines were found consistent with the anchor; `None` where there is no record yet.
pub async fn history(ledger: &dyn Ledger) -> Result<Option<u64>, NotVerified> {
    let Some((record, _)) = ledger.load().await? else { return Ok(None) };
    let (mut verifier, mut next) = (Verifier::default(), 0_u64);
    // The anchor's count bounds the walk: lines that were added since belong to a later anchor.
    while next < record.history.count {
        let step = usize::try_from(record.history.count - next).unwrap_or(STEP).min(STEP);
        let lines = ledger.history(next, step).await?;
        if lines.is_empty() {
            break;
        }
        for line in &lines {
            verifier.line(line).map_err(NotVerified::Broken)?;
            next += 1;
        }
    }
    verifier.finish(&record.history).map(Some).map_err(NotVerified::Broken)
}
