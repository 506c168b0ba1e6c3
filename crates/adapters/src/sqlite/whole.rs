//! The whole file looked at, page by page: more than opening it does, and too slow for every start.

use replank_core::ports::LedgerError;

use super::{Failed, Stage, Store, classify, damaged};

impl Store {
    /// Every page, index and reference. `Unreadable` where one is not as it should be. Takes seconds for a file of gigabytes,
    /// and holds nobody up: it is a read.
    pub async fn check_whole(&self) -> Result<(), LedgerError> {
        self.call(|connection| {
            let failed = |e| LedgerError::from(classify(e, Stage::Work));
            let verdict: String =
                connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(failed)?;
            if verdict != "ok" {
                return Err(LedgerError::from(Failed::Unreadable(damaged().because(verdict))));
            }
            Ok(())
        })
        .await
    }
}
