//! `replank token`: named tokens, straight in the ledger. A secret only ever goes into a new file that its owner alone can read.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use replank_core::ports::{LedgerError, Role, Token, Tokens};
use replank_core::words::Millis;

use super::failure::{Code, Failure};
use crate::http::{SECRET_PREFIX, hash_secret};

/// 256 bits: a guess is hopeless, so that a fast hash is enough.
const SECRET_BYTES: usize = 32;
const ID_BYTES: usize = 8;
const NAME_MAX: usize = 64;
/// Ten years; tokens that outlive that outlive everybody who knows of them.
const DAYS_MAX: u64 = 3_650;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn random(n: usize) -> Result<String, Failure> {
    let mut bytes = vec![0; n];
    getrandom::fill(&mut bytes)
        .map_err(|e| Failure::new(Code::Failed, format!("no random bytes could be had: {e}")))?;
    Ok(hex(&bytes))
}

/// `90d`, `12h`, `30m` in milliseconds; `None` for `never`.
pub fn lifetime(text: &str) -> Result<Option<u64>, String> {
    if text == "never" {
        return Ok(None);
    }
    let unit = match text.chars().last() {
        Some('d') => 24 * 3_600_000,
        Some('h') => 3_600_000,
        Some('m') => 60_000,
        _ => 0,
    };
    let number = text.get(..text.len().saturating_sub(1)).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    match number.checked_mul(unit) {
        Some(millis) if millis > 0 && millis <= DAYS_MAX * 24 * 3_600_000 => Ok(Some(millis)),
        _ => Err("write it as 90d, 12h, 30m or never; at most 3650d".to_owned()),
    }
}

fn ledger(error: LedgerError) -> Failure {
    Failure::from(anyhow::Error::new(error))
}

/// Makes a token and its file. The file comes first: a token whose secret nobody has must not stay behind.
pub async fn create(
    tokens: &dyn Tokens,
    name: &str,
    role: Role,
    lives: Option<u64>,
    out: &Path,
    now: Millis,
) -> Result<Token, Failure> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fine) {
        return Err(Failure::usage(format!(
            "{name:?} is no token's name: use at most {NAME_MAX} of A-Z, a-z, 0-9, '.', '_', '-' and '@'"
        )));
    }
    let secret = format!("{SECRET_PREFIX}{}", random(SECRET_BYTES)?);
    let token = Token {
        id: format!("token:{}", random(ID_BYTES)?),
        name: name.to_owned(),
        role,
        hash: hash_secret(&secret),
        created_at: now,
        expires_at: lives.map(|millis| now.plus(millis)),
        revoked_at: None,
        last_used_at: None,
    };
    if let Some(directory) = out.parent().filter(|d| !d.as_os_str().is_empty()) {
        make_directory(directory)?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(out).map_err(|e| {
        let next = if e.kind() == std::io::ErrorKind::AlreadyExists {
            "it exists; give another file with --out"
        } else {
            "choose a writable directory with --out"
        };
        Failure::new(Code::Failed, format!("the token's file {} cannot be made: {e}; {next}", out.display()))
    })?;
    let written = file.write_all(format!("{secret}\n").as_bytes()).and_then(|()| file.sync_all());
    let added = match written {
        Ok(()) => tokens.add(&token).await.map_err(|error| match error {
            LedgerError::Conflict => {
                let message = format!("there is a token named {name} already; revoke it with `replank token revoke {name}`, or choose another name");
                Failure::new(Code::Refused, message)
            }
            other => ledger(other),
        }),
        Err(error) => Err(Failure::new(Code::Failed, format!("the token's file {} cannot be written: {error}", out.display()))),
    };
    if let Err(failure) = added {
        // Best effort: what is left holds a secret that opens nothing.
        if let Err(error) = std::fs::remove_file(out) {
            tracing::warn!(%error, file = %out.display(), "an unused token file stayed behind");
        }
        return Err(failure);
    }
    Ok(token)
}

pub async fn list(tokens: &dyn Tokens) -> Result<Vec<Token>, Failure> {
    tokens.list().await.map_err(ledger)
}

pub async fn revoke(tokens: &dyn Tokens, name: &str, now: Millis) -> Result<(), Failure> {
    if tokens.revoke(name, now).await.map_err(ledger)? {
        return Ok(());
    }
    Err(Failure::new(Code::Refused, format!("there is no token named {name}; see `replank token list`")))
}

/// The file that holds a new token when none is named.
pub fn default_out(dir: &Path, name: &str) -> Result<PathBuf, Failure> {
    make_directory(dir)?;
    Ok(dir.join(name))
}

fn make_directory(dir: &Path) -> Result<(), Failure> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
        Failure::new(
            Code::Failed,
            format!("the directory {} cannot be made: {e}; name a file with --out", dir.display()),
        )
    })
}
