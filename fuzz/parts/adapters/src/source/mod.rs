//! What a git remote says.

pub mod git;
#[path = "../../../../../crates/adapters/src/source/signed.rs"]
mod signed;

use replank_core::fault::Fault;
use replank_core::record::Target;

/// A signer's name, of a tag object that is to be the target's.
pub fn judge(target: &Target, object: &[u8], is_good: bool, words: &str) -> Result<String, Fault> {
    signed::judge(target, &signed::Said { object, is_good, words }, &[])
}
