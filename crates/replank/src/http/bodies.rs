//! The bodies that clients send, taken apart: shapes of contract §2, and what of them is wrong before anything is looked up.
//! Pure: bytes in, a request or a reason out.

use replank_core::drift::DRIFT_MAX;
use replank_core::record::TargetKind;
use replank_core::words::{CommitSha, IdempotencyKey, Version};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use utoipa::ToSchema;

use crate::engine::api::{DowngradeRequest, MovedTag, StartRequest};

/// Contract §2, in characters.
pub const REASON_MAX: usize = 280;

/// What is wrong with a body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadBody {
    /// 400.
    #[error("the body is not JSON")]
    NotJson,
    /// 422.
    #[error("{0}")]
    Invalid(String),
}

fn invalid<T>(why: impl Into<String>) -> Result<T, BadBody> {
    Err(BadBody::Invalid(why.into()))
}

/// A body that must be there. Fields that are not known are refused by the types themselves.
pub fn required<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadBody> {
    // The types would take an array for their fields in order, which is nobody's contract.
    let is_object = bytes.trim_ascii_start().first() == Some(&b'{');
    let read = if is_object { serde_json::from_slice(bytes).map_err(Some) } else { Err(None) };
    read.map_err(|error: Option<serde_json::Error>| {
        // By the bytes and not by the error's kind: what the types do not expect ends some of them as bad syntax.
        if serde_json::from_slice::<IgnoredAny>(bytes).is_err() {
            return BadBody::NotJson;
        }
        let why = error.map_or_else(|| "it is no object".to_owned(), |error| error.to_string());
        BadBody::Invalid(format!("the body is not what it should be: {why}"))
    })
}

/// A body that may be left out: `null` says as much.
pub fn optional<T: DeserializeOwned + Default>(bytes: &[u8]) -> Result<T, BadBody> {
    // Read and not compared: what is blank to us need not be to JSON, such as a form feed.
    let is_null = || serde_json::from_slice::<()>(bytes).is_ok();
    if bytes.is_empty() || is_null() { Ok(T::default()) } else { required(bytes) }
}

/// `{}`, for commands that take nothing.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// `POST /settings`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Whether commits of the tracking branch may be started.
    pub track_commits: bool,
}

/// Commands that take nothing but a reason.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// For the history.
    #[schema(max_length = 280)]
    reason: Option<String>,
}

impl Reason {
    pub fn text(self) -> Result<String, BadBody> {
        let reason = self.reason.unwrap_or_default();
        check_reason(&reason)?;
        Ok(reason)
    }
}

/// `POST /rollback`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// For the history.
    #[schema(max_length = 280)]
    reason: Option<String>,
    /// The data are those of the version that is restored, where a data step had closed the way back.
    #[serde(default)]
    pub data_restored: bool,
}

impl Rollback {
    pub fn text(self) -> Result<String, BadBody> {
        Reason { reason: self.reason }.text()
    }
}

/// `POST /downgrade`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Downgrade {
    /// `A.B.C`, with or without `v`: a release that is older than what runs.
    #[schema(pattern = r"^v?(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18})){2}$")]
    target_version: String,
    /// Users may notice, and whoever starts knows it.
    #[serde(default)]
    #[schema(schema_with = crate::engine::api::yes, required = true)]
    confirm_downtime: bool,
    /// For the history; not only blanks.
    #[schema(min_length = 1, max_length = 280, pattern = r"\S")]
    reason: String,
    /// Makes a repeated request harmless.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$")]
    idempotency_key: Option<String>,
    /// Start a commit that failed before, knowingly.
    #[serde(default)]
    override_quarantine: bool,
    /// The data are those of that version, where what ran since has changed them for good.
    #[serde(default)]
    data_restored: bool,
}

impl Downgrade {
    pub fn checked(self) -> Result<DowngradeRequest, BadBody> {
        needed_reason(&self.reason, "a downgrade")?;
        match self.target_version.parse::<Version>() {
            Ok(version) if version.commit.is_none() => {}
            Ok(_) => return invalid("`target_version` names a commit, and a downgrade leads to a release: A.B.C"),
            Err(error) => return invalid(error.to_string()),
        }
        if let Some(key) = &self.idempotency_key {
            IdempotencyKey::new(key.as_str()).or_else(|error| invalid(error.to_string()))?;
        }
        if !self.confirm_downtime {
            return invalid("confirm_downtime must be true: a downgrade replaces what runs");
        }
        Ok(DowngradeRequest {
            target_version: self.target_version,
            confirm_downtime: self.confirm_downtime,
            reason: self.reason,
            idempotency_key: self.idempotency_key,
            override_quarantine: self.override_quarantine,
            data_restored: self.data_restored,
        })
    }
}

/// `POST /quarantine`: what may be started again.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Lift {
    /// A version, or a commit's 40 hex digits.
    #[schema(
        pattern = r"^(v?(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18})){2}(-commit\.[0-9a-f]{7,40})?|[0-9a-f]{40})$"
    )]
    pub lift: String,
    /// For the history; not only blanks.
    #[schema(min_length = 1, max_length = 280, pattern = r"\S")]
    reason: String,
}

impl Lift {
    pub fn checked(self) -> Result<(String, String), BadBody> {
        needed_reason(&self.reason, "lifting a quarantine")?;
        if self.lift.parse::<Version>().is_err() && CommitSha::new(self.lift.as_str()).is_err() {
            return invalid("`lift` is a version, or a commit's 40 hex digits");
        }
        Ok((self.lift, self.reason))
    }
}

/// `POST /moved-tag`: at which commit a release may be started although its tag was at another one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AcceptMovedTag {
    /// `A.B.C`, with or without `v`.
    #[schema(pattern = r"^v?(0|[1-9][0-9]{0,18})(\.(0|[1-9][0-9]{0,18})){2}$")]
    version: String,
    /// Where the tag is now: who accepts it has looked at exactly this.
    #[schema(pattern = "^[0-9a-f]{40}$")]
    commit_sha: String,
    /// For the history; not only blanks.
    #[schema(min_length = 1, max_length = 280, pattern = r"\S")]
    reason: String,
}

impl AcceptMovedTag {
    pub fn checked(self) -> Result<(MovedTag, String), BadBody> {
        needed_reason(&self.reason, "accepting a moved tag")?;
        let version = self.version.parse::<Version>().or_else(|error| invalid(error.to_string()))?;
        if version.commit.is_some() {
            return invalid("`version` names a commit, and a tag names a release: A.B.C");
        }
        let commit = CommitSha::new(self.commit_sha.as_str()).or_else(|error| invalid(error.to_string()))?;
        Ok((MovedTag { version, commit }, self.reason))
    }
}

/// `POST /drift`: what may stay different from what was recorded.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AcceptDrift {
    /// The row's `drift`, word for word: nobody accepts what he has not seen.
    #[schema(min_items = 1, max_items = 10)]
    pub accept: Vec<String>,
    /// For the history; not only blanks.
    #[schema(min_length = 1, max_length = 280, pattern = r"\S")]
    reason: String,
}

impl AcceptDrift {
    pub fn checked(self) -> Result<(Vec<String>, String), BadBody> {
        needed_reason(&self.reason, "accepting a drift")?;
        if self.accept.is_empty() || self.accept.len() > DRIFT_MAX {
            return invalid("`accept` is the row's `drift`, word for word: 1 to 10 sentences");
        }
        Ok((self.accept, self.reason))
    }
}

/// Why a job is given up, for the history.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResetReason {
    /// Not only blanks.
    #[schema(min_length = 1, max_length = 280, pattern = r"\S")]
    reason: String,
}

impl ResetReason {
    pub fn text(self) -> Result<String, BadBody> {
        check_reason(&self.reason)?;
        Ok(self.reason)
    }
}

fn check_reason(reason: &str) -> Result<(), BadBody> {
    let length = reason.chars().count();
    if length > REASON_MAX {
        return invalid(format!("the reason has {length} characters and {REASON_MAX} are the most"));
    }
    Ok(())
}

/// For commands that nobody should be able to give without a word: `what` is that.
fn needed_reason(reason: &str, what: &str) -> Result<(), BadBody> {
    check_reason(reason)?;
    if reason.trim().is_empty() {
        return invalid(format!("say why: {what} needs a `reason`"));
    }
    Ok(())
}

/// `POST /start`, in the shapes of contract §2; whether the target was offered is the engine's to judge.
pub fn start(bytes: &[u8]) -> Result<StartRequest, BadBody> {
    let request: StartRequest = required(bytes)?;
    if !request.confirm_downtime {
        return invalid("confirm that users may notice: send `confirm_downtime: true`");
    }
    if let Some(version) = &request.target_version
        && let Err(error) = version.parse::<Version>()
    {
        return invalid(format!("target_version: {error}"));
    }
    if let Some(sha) = &request.target_sha
        && let Err(error) = CommitSha::new(sha.as_str())
    {
        return invalid(format!("target_sha: {error}"));
    }
    if request.target_kind == Some(TargetKind::Commit) && request.target_sha.is_none() {
        return invalid("a commit target needs `target_sha`");
    }
    if let Some(key) = &request.idempotency_key
        && let Err(error) = IdempotencyKey::new(key.as_str())
    {
        return invalid(format!("idempotency_key: {error}"));
    }
    check_reason(request.reason.as_deref().unwrap_or_default())?;
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_nothing_are_left_out_and_a_form_feed_is_no_blank() {
        let check = |body: &[u8], expect: Result<(), BadBody>| {
            assert_eq!(optional::<Nothing>(body).map(|Nothing {}| ()), expect, "{:?}", String::from_utf8_lossy(body));
        };
        for body in [&b""[..], b"null", b" null\r\n\t", b"{}", b" {} "] {
            check(body, Ok(()));
        }
        for body in [&b" "[..], b"null \x0c", b"\x0c{}", b"nul"] {
            check(body, Err(BadBody::NotJson));
        }
    }
}
