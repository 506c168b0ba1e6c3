//! The stored form: which formats this build writes and reads, and how bytes become a record and back.

use serde::Deserialize;

use crate::record::{Deployment, Record};

/// The highest format that this build reads and, when every reader understands it, writes.
///
/// The feature exists to prove that builds of two formats can live beside one another; no release is built with it.
pub const FORMAT: u32 = if cfg!(feature = "raised-format") { FIRST + 1 } else { FIRST };
/// The format of the first releases: what a Replank reads that says nothing.
pub const FIRST: u32 = 1;

/// Image label that tells which formats a controller image reads, so that any platform can ask before a swap.
pub const FORMATS_LABEL: &str = "io.replank.reads-format";

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error(
        "the record needs a reader of format {min_reader}, and this build reads up to {reads}; start a newer Replank"
    )]
    TooNew { min_reader: u32, reads: u32 },
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
    is_readable(envelope.min_reader, FORMAT)?;
    Ok(serde_json::from_slice(bytes)?)
}

/// Whether a build that reads up to `reads` may use a record at all.
pub fn is_readable(min_reader: u32, reads: u32) -> Result<(), FormatError> {
    if min_reader > reads { Err(FormatError::TooNew { min_reader, reads }) } else { Ok(()) }
}

/// The format to write: the lowest that any controller reads which may have to drive from this record on. That is not the
/// snapshot's alone: both sides of a swap may, and of one that is held as well.
pub fn level(record: &Record, reads: u32) -> u32 {
    let swap = record.phase.swap();
    let needed = [
        record.running.as_ref(),
        record.serving.as_ref(),
        record.snapshot.as_ref().map(|s| &s.deployment),
        swap.and_then(|s| s.from.as_ref()),
        swap.map(|s| &s.to),
    ];
    let of_others = needed.into_iter().flatten().filter(|d| d.plan.has_controller()).map(Deployment::reads_format);
    // Who was shut out before this commit stays so: there is no way to write a record down.
    of_others.fold(reads, u32::min).max(record.min_reader)
}

/// The bytes to store.
pub fn write(record: &Record) -> Result<Vec<u8>, FormatError> {
    Ok(serde_json::to_vec(record)?)
}
