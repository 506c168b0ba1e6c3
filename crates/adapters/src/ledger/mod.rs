//! Where record, history and tokens are kept.

pub mod sqlite;

#[cfg(test)]
pub(crate) mod conformance;

pub use sqlite::SqliteLedger;
