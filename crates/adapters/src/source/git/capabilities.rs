//! Whether a server can be asked for its refs, by what it advertises: pure, bounded by its input.

use super::pkt::{self, Pkt, PktError};
use super::refs::tame;

/// Why it cannot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    #[error(transparent)]
    Pkt(#[from] PktError),
    /// The server's own words, without control characters.
    #[error("the server says: {0}")]
    Said(String),
    #[error("it does not speak version 2 of the protocol")]
    Old,
    #[error("its objects are not named by SHA-1")]
    Format,
    #[error("it does not offer ls-refs")]
    NoList,
}

/// Checks that a server speaks version 2 and SHA-1, and can list refs.
pub(super) fn check(body: &[u8]) -> Result<(), Unfit> {
    let mut version = false;
    let mut can_list = false;
    for (at, packet) in pkt::read(body).enumerate() {
        let line = match packet? {
            Pkt::Data(line) => line.strip_suffix(b"\n").unwrap_or(line),
            // The flush after the service line, which some servers leave out, and the one at the end.
            Pkt::Flush | Pkt::Delim | Pkt::ResponseEnd => continue,
        };
        if at == 0 && line.starts_with(b"# service=") {
            continue;
        }
        if let Some(said) = line.strip_prefix(b"ERR ") {
            return Err(Unfit::Said(tame(said)));
        }
        if !version {
            if line != b"version 2" {
                return Err(Unfit::Old);
            }
            version = true;
        } else if let Some(format) = line.strip_prefix(b"object-format=") {
            if format != b"sha1" {
                return Err(Unfit::Format);
            }
        } else if line == b"ls-refs" || line.starts_with(b"ls-refs=") {
            can_list = true;
        }
    }
    if version && can_list { Ok(()) } else { Err(Unfit::NoList) }
}
