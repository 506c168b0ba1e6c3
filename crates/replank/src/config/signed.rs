//! Whether only signed tags are releases, and which keys may have signed them.

use std::path::PathBuf;

use replank_adapters::source::git::{Signers, Verify};

use super::check::variable;
use super::env::Environment;
use super::raw;
use super::raw::Builder;
use super::reader::{Document, Problem};

/// The same as `source.verify`, for a service without a configuration file.
const VARIABLE: &str = "UPGRADE_GIT_VERIFY";

pub(super) fn verify(
    doc: &Document,
    raw: &raw::Source,
    builder: Builder,
    env: &Environment,
    outside: &mut Vec<Problem>,
    at: &impl Fn(PathBuf) -> PathBuf,
) -> Verify {
    let wanted = match env.get(VARIABLE) {
        Some("none") => Some(raw::Verify::None),
        Some("signed-tags") => Some(raw::Verify::SignedTags),
        Some(text) => {
            let advice = "set it to none or signed-tags";
            outside.push(variable(VARIABLE, format!("{text:?} is not usable"), advice.to_owned()));
            None
        }
        None => raw.verify,
    };
    let files = [
        ("allowed_signers_file", &raw.allowed_signers_file),
        ("revoked_signers_file", &raw.revoked_signers_file),
        ("openpgp_keyring_file", &raw.openpgp_keyring_file),
    ];
    let given = files.iter().filter(|(_, file)| file.is_some());
    match (wanted.unwrap_or(raw::Verify::None), builder) {
        (raw::Verify::None, _) => {
            // Somebody who names keys believes that they are asked for.
            for (key, _) in given {
                let advice = "set `verify = \"signed-tags\"`, or take it out";
                doc.problem(&["source", key], "no signature is asked for", advice);
            }
            Verify::Nothing
        }
        (raw::Verify::SignedTags, Builder::AzExec) => {
            for (key, _) in given {
                let advice = "give the keys to the exec server (EXEC_ALLOWED_SIGNERS_FILE, EXEC_OPENPGP_KEYRING_FILE)";
                doc.problem(
                    &["source", key],
                    "with builder \"az-exec\" the exec server's git checks signatures",
                    advice,
                );
            }
            Verify::SignedElsewhere
        }
        (raw::Verify::SignedTags, Builder::Docker) => {
            let place = |file: &Option<PathBuf>| file.clone().map(at);
            let signers = Signers {
                allowed: place(&raw.allowed_signers_file),
                revoked: place(&raw.revoked_signers_file),
                openpgp: place(&raw.openpgp_keyring_file),
            };
            if signers.allowed.is_none() && signers.openpgp.is_none() {
                let advice = "add `allowed_signers_file = \"PATH\"`, or `openpgp_keyring_file`";
                doc.problem(&["source", "verify"], "there is no key that a tag could be signed with", advice);
            } else if signers.allowed.is_none() && signers.revoked.is_some() {
                let advice = "it goes with `allowed_signers_file`: OpenPGP keys carry their revocation in the keyring";
                doc.problem(&["source", "revoked_signers_file"], "there are no SSH keys that it could revoke", advice);
            }
            Verify::SignedTags(signers)
        }
    }
}
