//! Registries: where images are kept and protected.

pub mod engine;
pub mod oci;
#[cfg(test)]
mod tests;

pub use engine::EngineRegistry;
pub use oci::OciRegistry;

use replank_core::fault::Fault;
use replank_core::words::{Digest, InstallationId};
use sha2::{Digest as _, Sha256};

use crate::labels::KEEP_TAG;

/// How every keep tag of one installation begins.
fn keep_prefix(installation: &InstallationId) -> String {
    format!("{KEEP_TAG}{}-", short(&[installation.as_str()], 4))
}

/// The tag that protects one image under one name. The image's own digest is part of it, so that no two images ever
/// contend for a tag; the parts are hashed, since names may hold what tags may not.
pub(crate) fn keep_tag(installation: &InstallationId, name: &str, image: &Digest) -> String {
    let unique = short(&[name, image.as_str()], 8);
    // For people: as much of the name as is good in a tag.
    let readable: String =
        name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')).take(40).collect();
    format!("{}{readable}-{unique}", keep_prefix(installation))
}

/// The first `bytes` bytes of the hash over all parts, in hex.
fn short(parts: &[&str], bytes: usize) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hex::encode(&hash.finalize()[..bytes])
}

fn foreign(image: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(format!("{image} is not an image of this installation and is not deleted"))
        .advice("remove it by hand if it is not needed")
}

fn protected(image: &dyn std::fmt::Display, tag: &str) -> Fault {
    Fault::permanent(format!("{image} is protected by the tag {tag} and is not deleted"))
        .advice("it is released when no rollback needs it any more")
}
