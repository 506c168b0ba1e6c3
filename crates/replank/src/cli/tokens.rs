//! `replank token`: named tokens, straight in the ledger. A secret only ever goes into a new file that its owner alone can read.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replank_core::event::{Event, TokenChange};
use replank_core::ports::{Clock, Ledger, LedgerError, Role, Token, Tokens};
use replank_core::record::Actor;
use replank_core::transition::apply;

use super::failure::{Code, Failure};
use crate::config::env::Environment;
use crate::http::{SECRET_PREFIX, hash_secret};

/// 256 bits: a guess is hopeless, so that a fast hash is enough.
const SECRET_BYTES: usize = 32;
const ID_BYTES: usize = 8;
const NAME_MAX: usize = 64;
/// Contract §2, in characters.
const REASON_MAX: usize = 280;
/// A commit that loses this many races in a row meets more than a busy engine.
const RACES_MAX: u32 = 50;
/// Ten years; tokens that outlive that outlive everybody who knows of them.
const DAYS_MAX: u64 = 3_650;

fn random(n: usize) -> Result<String, Failure> {
    let mut bytes = vec![0; n];
    getrandom::fill(&mut bytes)
        .map_err(|e| Failure::new(Code::Failed, format!("no random bytes could be had: {e}")))?;
    Ok(hex::encode(bytes))
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

/// Changes of tokens, with who makes them and why. Each is a line of the history, written before the change is made: one
/// that was cut short shows there, and none can be made in silence.
#[derive(Debug)]
pub struct Changes {
    pub tokens: Arc<dyn Tokens>,
    pub ledger: Arc<dyn Ledger>,
    pub clock: Arc<dyn Clock>,
    pub actor: Actor,
    pub reason: String,
}

impl Changes {
    /// Makes a token and its file. The file comes first: a token whose secret nobody has must not stay behind.
    pub async fn create(&self, name: &str, role: Role, lives: Option<u64>, out: &Path) -> Result<Token, Failure> {
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fine) {
            return Err(Failure::usage(format!(
                "{name:?} is no token's name: use at most {NAME_MAX} of A-Z, a-z, 0-9, '.', '_', '-' and '@'"
            )));
        }
        self.check_reason()?;
        let (secret, now) = (format!("{SECRET_PREFIX}{}", random(SECRET_BYTES)?), self.clock.now());
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
            Ok(()) => self.add(&token).await,
            Err(error) => {
                let message = format!("the token's file {} cannot be written: {error}", out.display());
                Err(Failure::new(Code::Failed, message))
            }
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

    async fn add(&self, token: &Token) -> Result<(), Failure> {
        let name = &token.name;
        let taken = || {
            let message = format!(
                "there is a token named {name} already; revoke it with `replank token revoke {name}`, or choose another name"
            );
            Failure::new(Code::Refused, message)
        };
        // Looked at first, so that the history does not tell of a token that never was.
        if self.standing(name).await?.is_some() {
            return Err(taken());
        }
        self.record(token, TokenChange::Created, &self.reason).await?;
        let failure = match self.tokens.add(token).await {
            Ok(()) => return Ok(()),
            Err(LedgerError::Conflict) => taken(),
            Err(other) => ledger(other),
        };
        if let Err(error) = self.record(token, TokenChange::Revoked, "it could not be stored").await {
            tracing::warn!(%error, token = %token.id, "the history speaks of a token that was not made");
        }
        Err(failure)
    }

    /// Makes the token of this name useless. That comes before everything: it is done even where the history cannot tell of
    /// it, which is then an error.
    pub async fn revoke(&self, name: &str) -> Result<(), Failure> {
        self.check_reason()?;
        let none = || Failure::new(Code::Refused, format!("there is no token named {name}; see `replank token list`"));
        let token = self.standing(name).await?.ok_or_else(none)?;
        let told = self.record(&token, TokenChange::Revoked, &self.reason).await;
        if !self.tokens.revoke(name, self.clock.now()).await.map_err(ledger)? {
            return Err(none());
        }
        told.map_err(|failure| {
            let message =
                format!("the token {name} opens nothing any more, but the history does not say so: {failure}");
            Failure::new(failure.code, message)
        })
    }

    /// The token of this name that was not revoked.
    async fn standing(&self, name: &str) -> Result<Option<Token>, Failure> {
        let all = list(self.tokens.as_ref()).await?;
        Ok(all.into_iter().find(|token| token.name == name && token.revoked_at.is_none()))
    }

    async fn record(&self, token: &Token, change: TokenChange, reason: &str) -> Result<(), Failure> {
        let event = Event::TokenChanged {
            actor: self.actor.clone(),
            id: token.id.clone(),
            name: token.name.clone(),
            role: token.role,
            change,
            reason: reason.to_owned(),
        };
        for _ in 0..RACES_MAX {
            let (record, etag) = self.ledger.load().await.map_err(ledger)?.ok_or_else(|| {
                Failure::new(
                    Code::Failed,
                    "the application has no record yet; try again when its controller has started",
                )
            })?;
            let commit = apply(&record, &event, self.clock.now())
                .map_err(|refused| Failure::new(Code::Failed, refused.to_string()))?;
            match self.ledger.commit(Some(&etag), &commit.record, &commit.lines).await {
                Ok(_) => return Ok(()),
                // Said twice is better than not at all: an unknown outcome is tried again.
                Err(LedgerError::Conflict | LedgerError::Indeterminate(_)) => {}
                Err(error) => return Err(ledger(error)),
            }
        }
        Err(Failure::new(Code::Unreachable, "the record changes faster than this command can follow; try again"))
    }

    fn check_reason(&self) -> Result<(), Failure> {
        check_reason(&self.reason)
    }
}

pub fn check_reason(reason: &str) -> Result<(), Failure> {
    if reason.chars().count() > REASON_MAX {
        return Err(Failure::usage(format!("the reason is longer than {REASON_MAX} characters; shorten it")));
    }
    Ok(())
}

/// The user who types, as an actor: the number is the system's word, the name only what the environment says.
pub fn local_actor(env: &Environment) -> Actor {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| env.get(name)).unwrap_or_default();
    let oid = format!("uid:{}", rustix::process::getuid().as_raw());
    Actor { oid, name: name.chars().take(NAME_MAX).collect(), from: "host".to_owned() }
}

pub async fn list(tokens: &dyn Tokens) -> Result<Vec<Token>, Failure> {
    tokens.list().await.map_err(ledger)
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
