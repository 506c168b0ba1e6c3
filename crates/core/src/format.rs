//! The stored form: which formats this build writes and reads, and how bytes become a record and back.

use serde::Deserialize;

use crate::record::Record;

/// The format that this build writes when every reader understands it.
pub const FORMAT: u32 = 1;
/// The lowest format whose readers can use what this build writes.
pub const MIN_READER: u32 = 1;

/// Image label that tells which formats a controller image reads, so that any platform can ask before a swap.
pub const FORMATS_LABEL: &str = "io.replank.reads-format";

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error(
        "the record needs a reader of format {min_reader}, and this build reads up to {FORMAT}; start a newer Replank"
    )]
    TooNew { min_reader: u32 },
    #[error("the stored record is not readable")]
    Corrupt(#[from] serde_json::Error),
}

#[derive(Deserialize)]
struct Envelope {
    min_reader: u32,
}

/// Reads a stored record. Only `min_reader` above our own is an error; unknown fields are kept.
pub fn read(bytes: &[u8]) -> Result<Record, FormatError> {
    let envelope: Envelope = serde_json::from_slice(bytes)?;
    if envelope.min_reader > FORMAT {
        return Err(FormatError::TooNew { min_reader: envelope.min_reader });
    }
    Ok(serde_json::from_slice(bytes)?)
}

/// The bytes to store.
pub fn write(record: &Record) -> Result<Vec<u8>, FormatError> {
    Ok(serde_json::to_vec(record)?)
}
