//! What can be started: the remote's releases, compared with what runs and with the commits seen first.

use std::collections::BTreeMap;
use std::sync::Arc;

use replank_core::fault::{Fault, Told};
use replank_core::mask::Masker;
use replank_core::ports::{Clock, Ledger, LedgerError, Refs, Source, TagRef};
use replank_core::record::{Record, Target, TargetKind};
use replank_core::words::{CommitSha, Millis, Version};
use tokio::sync::Mutex;

use super::api::{Refusal, StartRequest};
use super::reconcile::describe;

/// Contract §2: candidates are cached for 15 s, and a check may follow another after 15 s.
pub(super) const FRESH_MS: u64 = 15_000;
/// Contract §2: at most 20 tags are offered.
pub(super) const OFFERED_MAX: usize = 20;

/// How old an answer about the remote may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    /// The remote is asked now.
    Now,
    /// The last look, well or not, where it is younger than [`FRESH_MS`]: what is shown is how it stands.
    Fresh,
    /// The last good look, where it is younger than so many milliseconds; a failure only while it is younger than both
    /// this and [`RETRY_MS`], since somebody waits for the remote to be back.
    Good(u64),
}

/// A start may ask a remote that failed again after this long.
const RETRY_MS: u64 = 2_000;

#[derive(Debug, Default)]
struct Looks {
    /// When the last good look began.
    good: Option<(Millis, Refs)>,
    /// When the last look ended, where it failed.
    failed: Option<(Millis, Told)>,
}

impl Looks {
    /// What is known already, where that is enough for somebody who asked at `asked`.
    fn known(&self, age: Age, asked: Millis, now: Millis) -> Option<Result<Refs, Told>> {
        let good =
            |max: u64| self.good.as_ref().filter(|(at, _)| now.since(*at) < max).map(|(_, refs)| Ok(refs.clone()));
        let failed =
            |max: u64| self.failed.as_ref().filter(|(at, _)| now.since(*at) < max).map(|(_, told)| Err(told.clone()));
        match age {
            // It failed while this caller waited for its turn: asking again would only make a queue of failures.
            Age::Now => self.failed.as_ref().filter(|(at, _)| *at > asked).map(|(_, told)| Err(told.clone())),
            // A failure is always the newer of the two, since a good look ends it.
            Age::Fresh => failed(FRESH_MS).or_else(|| good(FRESH_MS)),
            Age::Good(max) => good(max).or_else(|| failed(max.min(RETRY_MS))),
        }
    }
}

/// The last look at the remote. One look at a time: callers that come while it is under way share its result.
#[derive(Debug)]
pub(super) struct Remote {
    source: Arc<dyn Source>,
    ledger: Arc<dyn Ledger>,
    clock: Arc<dyn Clock>,
    /// What a remote says of a failure may repeat the credential that it was sent.
    masker: Masker,
    looks: Mutex<Looks>,
}

impl Remote {
    pub(super) fn new(source: Arc<dyn Source>, ledger: Arc<dyn Ledger>, clock: Arc<dyn Clock>, masker: Masker) -> Self {
        Self { source, ledger, clock, masker, looks: Mutex::default() }
    }

    pub(super) fn shown(&self) -> String {
        self.source.remote()
    }

    pub(super) fn refuses_commits(&self) -> Option<String> {
        self.source.refuses_commits()
    }

    /// What was last seen counts no more: something else is made of it from now on.
    pub(super) async fn look_anew(&self) {
        *self.looks.lock().await = Looks::default();
    }

    /// The commit that counts for a tag: the one that was accepted, or else the one that was seen first. A tag that is new
    /// here is pinned to where it is.
    pub(super) async fn pinned(&self, record: &Record, tag: &TagRef) -> Result<CommitSha, LedgerError> {
        let first = self.ledger.first_seen(&[(tag.raw_ref.clone(), tag.commit.clone())], self.clock.now()).await?;
        Ok(counts(&record.moved_tags, &first, tag).0.clone())
    }

    /// The remote's refs with moved tags refused, or why they cannot be had.
    pub(super) async fn refs(&self, age: Age) -> Result<Refs, Told> {
        let asked = self.clock.now();
        let mut looks = self.looks.lock().await;
        let now = self.clock.now();
        if let Some(known) = looks.known(age, asked, now) {
            return known;
        }
        let mut refs = match self.source.refs().await {
            Ok(refs) => refs,
            Err(fault) => {
                let told = fault.told_with(&self.masker);
                // From its end: a remote that hangs would otherwise be asked again by everybody who waited.
                looks.failed = Some((self.clock.now(), told.clone()));
                return Err(told);
            }
        };
        let seen: Vec<(String, CommitSha)> = refs.tags.iter().map(|t| (t.raw_ref.clone(), t.commit.clone())).collect();
        let first = self.ledger.first_seen(&seen, now).await.map_err(|e| {
            let why = describe(&e);
            Fault::transient(format!("the commits that were seen first could not be read: {why}")).told()
        })?;
        let accepted = match self.ledger.load().await {
            Ok(found) => found.map(|(record, _)| record.moved_tags.clone()).unwrap_or_default(),
            Err(error) => {
                let why = describe(&error);
                return Err(
                    Fault::transient(format!("the moved tags that were accepted could not be read: {why}")).told()
                );
            }
        };
        for tag in &mut refs.tags {
            let (pinned, how) = counts(&accepted, &first, tag);
            if *pinned != tag.commit {
                tag.refused = Some(format!(
                    "the tag was moved: it was {how} at {pinned} and is now at {}; publish a new version instead, or accept \
                     exactly that commit (`replank accept-moved-tag`)",
                    tag.commit
                ));
            }
        }
        *looks = Looks { good: Some((now, refs.clone())), failed: None };
        Ok(refs)
    }
}

/// Which commit counts for a tag, and why: the one that was accepted, or else the one that was seen first.
fn counts<'a>(
    accepted: &'a BTreeMap<String, CommitSha>,
    first: &'a BTreeMap<String, CommitSha>,
    tag: &'a TagRef,
) -> (&'a CommitSha, &'static str) {
    match accepted.get(&tag.raw_ref) {
        Some(pinned) => (pinned, "accepted"),
        None => (first.get(&tag.raw_ref).unwrap_or(&tag.commit), "seen first"),
    }
}

/// What runs and is compared with: what was deployed here, or, where nothing is run from here, what this service's own image was
/// built as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running<'a> {
    version: &'a Version,
    commit: Option<&'a CommitSha>,
}

impl<'a> Running<'a> {
    pub(super) fn version(self) -> String {
        self.version.to_string()
    }

    pub(super) fn of(record: &'a Record, own: Option<&'a Version>) -> Option<Self> {
        match &record.running {
            Some(running) => Some(Self { version: &running.version, commit: Some(&running.commit) }),
            None => own.map(|version| Self { version, commit: None }),
        }
    }
}

/// Newer than what runs, by base release (contract §1). Everything is newer than nothing.
pub(super) fn is_newer(version: &Version, running: Option<Running<'_>>) -> bool {
    running.is_none_or(|running| version.base() > running.version.base())
}

/// The newest release that is not refused, whether it is newer than what runs or not.
pub(super) fn newest(refs: &Refs) -> Option<(Version, CommitSha)> {
    let newest = refs.tags.iter().find(|tag| tag.refused.is_none())?;
    Some((newest.version.clone(), newest.commit.clone()))
}

/// Release tags newer than what runs, newest first, as offered and as refused.
pub(super) fn offer(refs: &Refs, running: Option<Running<'_>>) -> (Vec<TagRef>, Vec<TagRef>) {
    let newer = refs.tags.iter().filter(|tag| is_newer(&tag.version, running)).cloned();
    let (offered, refused): (Vec<_>, Vec<_>) = newer.partition(|tag| tag.refused.is_none());
    (offered.into_iter().take(OFFERED_MAX).collect(), refused.into_iter().take(OFFERED_MAX).collect())
}

/// What a request means, by its own words alone: nothing is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    Newest,
    Release { version: Version, sha: Option<CommitSha> },
    Commit { sha: CommitSha },
}

pub(super) fn wanted(request: &StartRequest) -> Result<Wanted, Refusal> {
    let invalid = |e: replank_core::words::BadWord| Refusal::Invalid(e.to_string());
    let sha = request.target_sha.as_deref().map(CommitSha::new).transpose().map_err(invalid)?;
    let version = request.target_version.as_deref().map(str::parse::<Version>).transpose().map_err(invalid)?;
    match (request.target_kind, version, sha) {
        (Some(TargetKind::Commit), Some(v), Some(_)) if v.commit.is_none() => {
            Err(Refusal::Invalid(format!("{v} names a release and target_kind says commit: send only target_sha")))
        }
        // The version of a commit target is the server's to derive; one that speaks of another commit is a mistake.
        (_, Some(v), Some(sha)) if v.commit.as_deref().is_some_and(|hex| !sha.as_str().starts_with(hex)) => {
            Err(Refusal::Invalid(format!("{v} and target_sha {sha} name two commits: send only target_sha")))
        }
        (Some(TargetKind::Commit), _, Some(sha)) => Ok(Wanted::Commit { sha }),
        (Some(TargetKind::Commit), _, None) => {
            Err(Refusal::Invalid("a commit target needs target_sha, all 40 hex digits of it".to_owned()))
        }
        (kind, Some(version), sha) if version.commit.is_some() => match (kind, sha) {
            (None, Some(sha)) => Ok(Wanted::Commit { sha }),
            _ => Err(Refusal::Invalid(format!(
                "{version} is a commit target: send target_sha and target_kind \"commit\""
            ))),
        },
        (_, Some(version), sha) => Ok(Wanted::Release { version, sha }),
        (None, None, Some(sha)) => Ok(Wanted::Commit { sha }),
        (Some(TargetKind::Release), None, Some(_)) => {
            Err(Refusal::Invalid("a release target needs target_version".to_owned()))
        }
        (_, None, None) => Ok(Wanted::Newest),
    }
}

impl Wanted {
    /// Whether a job that exists already is for this very target.
    pub(super) fn is(&self, target: &Target) -> bool {
        match self {
            Self::Newest => true,
            Self::Release { version, sha } => {
                target.kind == TargetKind::Release
                    && target.version == *version
                    && sha.as_ref().is_none_or(|sha| *sha == target.commit)
            }
            Self::Commit { sha } => target.kind == TargetKind::Commit && target.commit == *sha,
        }
    }
}

/// Which side of what runs a target lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
}

/// A downgrade leads to what is older, and nowhere else.
fn older(version: &Version, commit: &CommitSha, running: Option<Running<'_>>) -> Result<(), Refusal> {
    let Some(runs) = running else {
        return Err(Refusal::Conflict("nothing runs yet that could be downgraded; start a release".to_owned()));
    };
    if runs.commit == Some(commit) {
        return Err(Refusal::Conflict(format!("{version} is what runs already")));
    }
    if is_newer(version, running) {
        let runs = runs.version();
        return Err(Refusal::Conflict(format!("{version} is newer than what runs ({runs}); start it as an upgrade")));
    }
    Ok(())
}

/// The pinned target of a start: only what was offered, and newer (contract §1 for commits).
pub(super) fn choose(
    wanted: &Wanted,
    way: Way,
    refs: &Refs,
    record: &Record,
    own: Option<&Version>,
) -> Result<Target, Refusal> {
    let running = Running::of(record, own);
    match wanted {
        Wanted::Newest => {
            let (offered, _) = offer(refs, running);
            let tag =
                offered.first().ok_or_else(|| Refusal::Conflict("there is no newer release to start".to_owned()))?;
            Ok(release(tag))
        }
        Wanted::Release { version, sha } => {
            let tag = refs.tags.iter().find(|tag| tag.version == *version).ok_or_else(|| {
                let newest = refs.tags.first().map(|tag| format!(" (its newest is {})", tag.version.tag()));
                Refusal::Conflict(format!(
                    "the remote offers no release {}{}; publish the tag, or choose one of the candidates",
                    version.tag(),
                    newest.unwrap_or_default()
                ))
            })?;
            if let Some(why) = &tag.refused {
                return Err(Refusal::Conflict(format!("release {} cannot be started: {why}", version.tag())));
            }
            if let Some(sha) = sha.as_ref().filter(|sha| **sha != tag.commit) {
                return Err(Refusal::Conflict(format!(
                    "release {} is at {} and not at {sha}; look at the candidates again",
                    version.tag(),
                    tag.commit
                )));
            }
            if way == Way::Down {
                return older(version, &tag.commit, running).map(|()| release(tag));
            }
            if !is_newer(version, running) {
                let running = running.map(|running| running.version.to_string()).unwrap_or_default();
                return Err(Refusal::Conflict(format!(
                    "{version} is not newer than what runs ({running}); to go back to what ran before, use rollback, and to any \
                     other older release, downgrade"
                )));
            }
            let (offered, _) = offer(refs, running);
            if !offered.iter().any(|offered| offered.version == *version) {
                return Err(Refusal::Conflict(format!(
                    "release {} is not among the {OFFERED_MAX} newest, which are what is offered; choose one of the candidates",
                    version.tag()
                )));
            }
            Ok(release(tag))
        }
        Wanted::Commit { sha } => {
            if !record.track_commits {
                return Err(Refusal::Conflict("commits are not followed: switch track_commits on first".to_owned()));
            }
            let running = running.ok_or_else(|| {
                Refusal::Conflict(
                    "a commit target needs a running release to count from; start a release first".to_owned(),
                )
            })?;
            if running.commit == Some(sha) {
                return Err(Refusal::Conflict(format!("commit {} is what runs already", sha.short())));
            }
            let known = record.latest.branch_head.as_ref() == Some(sha);
            let head = refs.branch.as_ref().filter(|(_, head)| head == sha);
            match (head, known) {
                (Some((raw_ref, _)), true) => Ok(Target {
                    kind: TargetKind::Commit,
                    version: running.version.at_commit(sha),
                    commit: sha.clone(),
                    raw_ref: raw_ref.clone(),
                }),
                _ => Err(Refusal::Conflict(format!(
                    "commit {} is not the recorded head of the tracking branch; run a check and choose again",
                    sha.short()
                ))),
            }
        }
    }
}

pub(super) fn release(tag: &TagRef) -> Target {
    Target {
        kind: TargetKind::Release,
        version: tag.version.clone(),
        commit: tag.commit.clone(),
        raw_ref: tag.raw_ref.clone(),
    }
}

#[cfg(test)]
#[path = "candidates_tests.rs"]
mod tests;
