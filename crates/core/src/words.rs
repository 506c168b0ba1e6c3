//! The names of the domain as types: each can only hold what its rule allows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A text that does not obey the rule of the word it was meant for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct BadWord {
    pub what: &'static str,
    pub value: String,
    pub rule: &'static str,
}

/// Declares a validated string type: its name, what it is called in errors, its rule in words and as a predicate.
macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn new(value: impl Into<String>) -> Result<Self, BadWord> {
                let value = value.into();
                let ok: fn(&str) -> bool = $ok;
                if ok(&value) {
                    Ok(Self(value))
                } else {
                    let value = value.chars().take(80).collect();
                    Err(BadWord { what: $what, value, rule: $rule })
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadWord;
            fn try_from(value: String) -> Result<Self, BadWord> {
                Self::new(value)
            }
        }

        impl FromStr for $name {
            type Err = BadWord;
            fn from_str(value: &str) -> Result<Self, BadWord> {
                Self::new(value)
            }
        }

        impl From<$name> for String {
            fn from(word: $name) -> String {
                word.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

fn is_label(text: &str, longest: usize) -> bool {
    let bytes = text.as_bytes();
    (1..=longest).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes[bytes.len() - 1] != b'-'
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

word!(
    /// The application that is upgraded. Part of container names, so it is short.
    AppName, "application name", "1 to 32 of a-z, 0-9 and '-', beginning with a letter", |s| is_label(s, 32)
);
word!(
    /// One image to build.
    ComponentName, "component name", "1 to 32 of a-z, 0-9 and '-', beginning with a letter", |s| is_label(s, 32)
);
word!(
    /// One container of a revision; several may use the same component's image.
    ContainerName, "container name", "1 to 32 of a-z, 0-9 and '-', beginning with a letter", |s| is_label(s, 32)
);
word!(
    /// Random, made once per installation; everything that Replank creates carries it.
    InstallationId, "installation id", "16 to 64 of a-z and 0-9",
    |s| (16..=64).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
);
word!(
    /// One upgrade (contract §2: the id that build-log routes take).
    JobId, "job id", "4 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', not beginning with '.'",
    |s| (4..=64).contains(&s.len())
        && !s.starts_with('.')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
);
word!(
    /// What a client sends to make a repeated start harmless (contract §2).
    IdempotencyKey, "idempotency key", "1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'",
    |s| (1..=64).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
);
word!(
    /// A full git commit id.
    CommitSha, "commit", "exactly 40 of 0-9 and a-f", |s| s.len() == 40 && is_lower_hex(s)
);
word!(
    /// One deployed set of containers. Valid inside a container name and as a revision suffix.
    RevisionId, "revision", "1 to 40 of a-z, 0-9 and '-', beginning with a letter", |s| is_label(s, 40)
);
word!(
    /// The secret of one job that goes into its operation keys; only this installation can derive them.
    Nonce, "nonce", "exactly 32 of 0-9 and a-f", |s| s.len() == 32 && is_lower_hex(s)
);
word!(
    /// A content digest.
    Digest, "digest", "'sha256:' and 64 of 0-9 and a-f",
    |s| s.strip_prefix("sha256:").is_some_and(|h| h.len() == 64 && is_lower_hex(h))
);

impl Digest {
    /// The SHA-256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(Sha256::digest(bytes))))
    }
}

impl CommitSha {
    /// The first 12 digits: short enough to read, long enough to be unique in a repository.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

/// Milliseconds since the Unix epoch, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Millis(pub i64);

impl Millis {
    /// Time passed since `earlier`; zero where a clock went backwards.
    pub fn since(self, earlier: Millis) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }

    pub fn plus(self, millis: u64) -> Millis {
        Millis(self.0.saturating_add(i64::try_from(millis).unwrap_or(i64::MAX)))
    }

    /// RFC 3339, UTC, whole milliseconds: the form of every time on the wire.
    pub fn rfc3339(self) -> String {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => format!("{at:.3}"),
            Err(_) => String::new(),
        }
    }

    /// The time that a text of [`Millis::rfc3339`]'s form names.
    pub fn parse(text: &str) -> Option<Millis> {
        text.parse::<jiff::Timestamp>().ok().map(|at| Millis(at.as_millisecond()))
    }
}

/// A release version `A.B.C`, or a commit on top of one, `A.B.C-commit.<7..40 hex>` (contract §1).
///
/// Order is by the base release: a commit counts as its base when it is compared with candidates.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    pub major: u64,
    pub minor: u64,
    pub patch: u64,
    pub commit: Option<String>,
}

impl Version {
    pub const RULE: &'static str =
        "a version is A.B.C or A.B.C-commit.<7 to 40 hex digits>, with an optional leading 'v'";

    pub fn release(major: u64, minor: u64, patch: u64) -> Self {
        Self { major, minor, patch, commit: None }
    }

    /// The commit target on top of this version's base release.
    pub fn at_commit(&self, sha: &CommitSha) -> Self {
        Self { commit: Some(sha.short().to_owned()), ..self.clone() }
    }

    pub fn base(&self) -> (u64, u64, u64) {
        (self.major, self.minor, self.patch)
    }

    /// `vA.B.C`, the tag that names this release.
    pub fn tag(&self) -> String {
        format!("v{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = BadWord;

    fn from_str(text: &str) -> Result<Self, BadWord> {
        let bad = || BadWord { what: "version", value: text.chars().take(80).collect(), rule: Version::RULE };
        let rest = text.strip_prefix('v').unwrap_or(text);
        let (base, commit) = match rest.split_once("-commit.") {
            None => (rest, None),
            Some((base, hex)) if (7..=40).contains(&hex.len()) && is_lower_hex(hex) => (base, Some(hex.to_owned())),
            Some(_) => return Err(bad()),
        };
        let mut numbers = base.split('.').map(|part| {
            // Semantic versioning forbids leading zeros; 'v01.2.3' would otherwise be a second name of a release.
            let canonical = part == "0" || (!part.starts_with('0') && !part.is_empty());
            let digits = part.bytes().all(|b| b.is_ascii_digit());
            if canonical && digits { part.parse::<u64>().ok() } else { None }
        });
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Some(major)), Some(Some(minor)), Some(Some(patch)), None) => Ok(Self { major, minor, patch, commit }),
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Version {
    type Error = BadWord;
    fn try_from(text: String) -> Result<Self, BadWord> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)?;
        match &self.commit {
            Some(hex) => write!(f, "-commit.{hex}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The name of one platform effect or build: what makes doing it twice harmless.
///
/// It depends on nothing but the job, the step, the attempt and the job's secret nonce, so that a successor derives the
/// same key, and nobody outside the installation can.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpKey(String);

impl OpKey {
    /// 20 of 32 characters: 100 bits, and short enough for a tag, a label and a revision suffix.
    const LENGTH: usize = 20;
    const ALPHABET: &'static [u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

    pub fn derive(job: &JobId, step: &str, attempt: u32, nonce: &Nonce) -> Self {
        let mut hash = Sha256::new();
        for part in [job.as_str(), step, &attempt.to_string(), nonce.as_str()] {
            // A length before each part keeps ("ab", "c") and ("a", "bc") apart.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        let bytes = hash.finalize();
        let text = bytes.iter().take(Self::LENGTH).map(|b| char::from(Self::ALPHABET[usize::from(b & 31)])).collect();
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OpKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_and_write() {
        for (text, expect) in [
            ("v1.2.3", Some("1.2.3")),
            ("1.2.3", Some("1.2.3")),
            ("0.0.0", Some("0.0.0")),
            ("1.2.3-commit.0123456", Some("1.2.3-commit.0123456")),
            ("1.2.3-commit.012345", None),
            ("1.2.3-commit.012345G", None),
            ("1.2", None),
            ("1.2.3.4", None),
            ("01.2.3", None),
            ("1.2.3-rc.1", None),
            ("1.2.+3", None),
            ("", None),
            ("99999999999999999999.0.0", None),
        ] {
            let got = text.parse::<Version>().ok().map(|v| v.to_string());
            assert_eq!(got.as_deref(), expect, "{text:?}");
        }
    }

    #[test]
    fn words_refuse_what_their_rule_forbids() {
        assert!(JobId::new("../x").is_err());
        assert!(JobId::new("..aaaa").is_err());
        assert!(JobId::new("abc").is_err());
        assert!(JobId::new("a".repeat(64)).is_ok());
        assert!(JobId::new("a".repeat(65)).is_err());
        assert!(ComponentName::new("Api").is_err());
        assert!(ComponentName::new("api-").is_err());
        assert!(CommitSha::new("A".repeat(40)).is_err());
        assert!(Digest::new(format!("sha256:{}", "0".repeat(63))).is_err());
    }

    #[test]
    fn operation_keys_depend_on_each_part() {
        let nonce = |c: &str| Nonce::new(c.repeat(32)).expect("nonce");
        let job = |s: &str| JobId::new(s).expect("job");
        let base = OpKey::derive(&job("job1"), "build-api", 1, &nonce("a"));
        assert_eq!(base, OpKey::derive(&job("job1"), "build-api", 1, &nonce("a")));
        for other in [
            OpKey::derive(&job("job2"), "build-api", 1, &nonce("a")),
            OpKey::derive(&job("job1"), "build-apj", 1, &nonce("a")),
            OpKey::derive(&job("job1"), "build-api", 2, &nonce("a")),
            OpKey::derive(&job("job1"), "build-api", 1, &nonce("b")),
        ] {
            assert_ne!(base, other);
        }
        assert_eq!(base.as_str().len(), OpKey::LENGTH);
    }

    #[test]
    fn times_are_rfc3339_utc() {
        assert_eq!(Millis(0).rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(Millis(1_700_000_000_123).rfc3339(), "2023-11-14T22:13:20.123Z");
    }
}
