//! The answers of git's smart HTTP.

#[path = "../../../../../../crates/adapters/src/source/git/capabilities.rs"]
mod capabilities;
#[path = "../../../../../../crates/adapters/src/source/git/pkt.rs"]
mod pkt;
#[path = "../../../../../../crates/adapters/src/source/git/refs.rs"]
mod refs;
#[path = "../../../../../../crates/adapters/src/source/git/verify.rs"]
mod verify;

pub(super) use refs::tame;
pub use replank_exec::signers::Signers;
pub use verify::Verify;

use replank_core::ports::Refs;

/// The releases, and the head of `main`, in an answer to `ls-refs`.
pub fn listed(answer: &[u8], signed: bool) -> Result<Refs, String> {
    let lines = refs::parse(answer).map_err(|why| why.to_string())?;
    Ok(refs::choose(&lines, "main", signed))
}

/// Whether the server can be asked at all.
pub fn capable(body: &[u8]) -> Result<(), String> {
    capabilities::check(body).map_err(|why| why.to_string())
}
