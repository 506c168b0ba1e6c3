//! What the engine needs from the world. Every implementation passes the conformance suite of its port.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::data::DataStep;
use crate::fault::{Fault, Told};
use crate::history::Line;
use crate::image::{ImageId, Images};
use crate::phase::{Built, Fetched, Recipe};
use crate::record::{ControllerId, Deployment, Plan, Record, Target};
use crate::words::{
    AppName, CommitSha, ComponentName, ContainerName, Digest, InstallationId, JobId, Millis, OpKey, RevisionId, Version,
};

// --- Time and chance -------------------------------------------------------------------------------------------

/// The only clock. Wall time, since records outlive processes.
pub trait Clock: Send + Sync + fmt::Debug {
    fn now(&self) -> Millis;
}

/// The only source of randomness.
pub trait Ids: Send + Sync + fmt::Debug {
    /// `n` random bytes from the operating system.
    fn random(&self, n: usize) -> Vec<u8>;
}

// --- Ledger ----------------------------------------------------------------------------------------------------

/// The store's own version of a record: opaque, compared for equality only. It never leaves the server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Etag(pub String);

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Somebody committed in between: load again.
    #[error("the record was changed by somebody else")]
    Conflict,
    /// Nothing was written.
    #[error("the ledger cannot be used")]
    Unavailable(#[source] Fault),
    /// It may or may not have been written: load and compare.
    #[error("it is not known whether the ledger took the change")]
    Indeterminate(#[source] Fault),
    /// What is stored cannot be used by this build; nothing is written over it.
    #[error("the ledger cannot be read")]
    Unreadable(#[source] Fault),
}

/// Everything that a controller says about itself every five seconds. The driver's is the lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Presence {
    pub controller: ControllerId,
    /// Random per process, so that a restarted controller is told from its predecessor.
    pub instance: String,
    /// Highest record format that this controller reads.
    pub reads_format: u32,
    /// The Replank version, for people.
    pub version: String,
    pub at: Millis,
}

/// Record and history of one application. A commit is atomic: the record and its lines, or neither.
#[async_trait]
pub trait Ledger: Send + Sync + fmt::Debug {
    /// `None` where nothing was ever committed. Shared, as most who load only read it.
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError>;

    /// The version alone: whether a load would give something new. Every controller asks each second.
    async fn version(&self) -> Result<Option<Etag>, LedgerError>;

    /// Replaces the version `expected` (`None`: there is no record yet) and appends `lines`.
    /// The lines' sequence numbers continue the stored history without a gap, else `Conflict`.
    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError>;

    /// Up to `limit` lines from `from` upwards, in order.
    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError>;

    /// Writes the caller's heartbeat, in a row of its own that never conflicts with a commit.
    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError>;

    /// Every controller that ever beat and was not forgotten.
    async fn presences(&self) -> Result<Vec<Presence>, LedgerError>;

    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError>;

    /// For each tag the commit that was seen first, for ever; a tag that is new here is pinned to what is given.
    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        now: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError>;
}

/// How far one reader of the history has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// Lines that it has done with: the sequence number of the next one.
    pub seq: u64,
    /// The job whose closing confirm window it was told of; empty where it was not.
    #[serde(default)]
    pub closing: String,
}

/// Readers of the history that must not miss a line, by name.
#[async_trait]
pub trait Cursors: Send + Sync + fmt::Debug {
    /// `None` where no reader of that name was ever kept.
    async fn cursor(&self, reader: &str) -> Result<Option<Cursor>, LedgerError>;
    /// A cursor never goes back: one that is behind the stored one changes nothing.
    async fn keep_cursor(&self, reader: &str, cursor: &Cursor) -> Result<(), LedgerError>;
}

/// A named bearer token; only its hash is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Stable id, shown as the actor's `oid`.
    pub id: String,
    pub name: String,
    pub role: Role,
    /// SHA-256 of the secret. The secret has 256 random bits, so that a slow hash would protect nothing.
    pub hash: Digest,
    pub created_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Millis>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Reader,
    Admin,
}

/// A request that a guard turned away: kept apart from the history, bounded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub at: Millis,
    pub actor: String,
    pub from: String,
    pub action: String,
    pub why: String,
}

#[async_trait]
pub trait Tokens: Send + Sync + fmt::Debug {
    /// Fails with `Conflict` where an unrevoked token of that name exists.
    async fn add(&self, token: &Token) -> Result<(), LedgerError>;
    async fn by_hash(&self, hash: &Digest) -> Result<Option<Token>, LedgerError>;
    async fn list(&self) -> Result<Vec<Token>, LedgerError>;
    /// True where an unrevoked token of that name was there.
    async fn revoke(&self, name: &str, at: Millis) -> Result<bool, LedgerError>;
    /// Best effort and coarse: implementations may drop updates closer together than a minute.
    async fn used(&self, id: &str, at: Millis) -> Result<(), LedgerError>;
    /// Keeps the newest [`REFUSALS_KEPT`] only.
    async fn refused(&self, refusal: &Refusal) -> Result<(), LedgerError>;
    async fn refusals(&self, limit: usize) -> Result<Vec<Refusal>, LedgerError>;
}

/// A flood of refusals must not fill the disk nor push the last honest ones out within seconds.
pub const REFUSALS_KEPT: usize = 10_000;

// --- Build logs ------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogId {
    pub job: JobId,
    pub component: ComponentName,
}

/// The right to append to one log: lost as soon as another attempt begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogWriter {
    pub id: LogId,
    /// Grows with each `begin`; the store refuses an append with a lower one.
    pub fence: u64,
    /// Where the next append goes.
    pub offset: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("another attempt writes this log now")]
    Fenced,
    /// The log ends elsewhere than the writer thought: re-read and compare.
    #[error("the log ends at {actual}, not where the append was to go")]
    Offset { actual: u64 },
    #[error("the log store cannot be used")]
    Unavailable(#[source] Fault),
    #[error("it is not known whether the log store took the lines")]
    Indeterminate(#[source] Fault),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    pub bytes: Vec<u8>,
    /// Offset after the last byte given.
    pub next: u64,
    /// The log is at its end and its last writer has closed it.
    pub closed: bool,
}

/// Build logs: bytes that never change once stored. Masked before they get here.
#[async_trait]
pub trait LogStore: Send + Sync + fmt::Debug {
    /// Takes the log over from any earlier writer and appends `marker` (a whole line).
    async fn begin(&self, id: &LogId, marker: &[u8]) -> Result<LogWriter, LogError>;
    /// Appends at the writer's offset and moves it.
    async fn append(&self, writer: &mut LogWriter, bytes: &[u8]) -> Result<(), LogError>;
    /// Says that no more will come from this writer.
    async fn close(&self, writer: &LogWriter) -> Result<(), LogError>;
    /// At most `max` bytes from `from`; `None` where the log was never begun.
    async fn read(&self, id: &LogId, from: u64, max: usize) -> Result<Option<LogChunk>, LogError>;
    /// Removes all logs but those of the `keep_jobs` jobs that began last, and says of how many jobs.
    async fn prune(&self, keep_jobs: usize) -> Result<usize, LogError>;
    /// Returns when the log may have grown beyond `from`, was closed, or the store's own patience (at most 1 s) is over.
    async fn changed(&self, id: &LogId, from: u64) -> Result<(), LogError>;
}

// --- Source ----------------------------------------------------------------------------------------------------

/// A tag as the remote names it, peeled to its commit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TagRef {
    pub version: Version,
    /// `refs/tags/v1.2.3`.
    pub raw_ref: String,
    pub commit: CommitSha,
    /// An annotated tag's own object; absent for a lightweight tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag_object: Option<CommitSha>,
    /// Why it cannot be offered; absent where it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub struct Refs {
    /// Release tags, newest first by version.
    pub tags: Vec<TagRef>,
    /// Head of the tracking branch, and its ref.
    pub branch: Option<(String, CommitSha)>,
}

/// A clean tree of one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// On the disk of whoever builds, which need not be this machine's: only the source that made it and the builder that goes
    /// with it may look there.
    pub path: PathBuf,
    pub commit: CommitSha,
    /// Who signed the tag, where signatures are asked for: name and key, as the operator's keys have them.
    pub signed_by: Option<String>,
}

/// A file of a commit, as far as a look without a job can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileSeen {
    Absent,
    Holds(Vec<u8>),
    /// Whoever looks, now or after the fetch, will find it unfit: why.
    Unfit(Told),
    /// It cannot be said before the release is fetched: why.
    Unknown(String),
}

/// A commit as its author wrote it: hostile text, cut to a bounded length and neither masked nor made visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitSeen {
    pub id: CommitSha,
    pub author: String,
    /// When it was committed, by its own word.
    pub at: Millis,
    pub subject: String,
}

/// The commits between two, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommitsSeen {
    /// At most [`COMMITS_MAX`].
    pub commits: Vec<CommitSeen>,
    /// There are more, or the older commit was not met among the newest ones, so that some of these may not be between.
    pub more: bool,
}

/// Most commits of one look: a person reads no more, and a history without end costs no more.
pub const COMMITS_MAX: usize = 200;

/// What a commit holds, looked at before there is a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peeked {
    pub file: FileSeen,
    /// Where they cannot be had: why.
    pub commits: Result<CommitsSeen, String>,
}

#[async_trait]
pub trait Source: Send + Sync + fmt::Debug {
    /// The remote as it may be shown: without userinfo.
    fn remote(&self) -> String;
    /// Why commits of the branch cannot be targets here, whatever the record says; `None` where they can.
    fn refuses_commits(&self) -> Option<String> {
        None
    }
    /// Looks at the remote; nothing is written.
    async fn refs(&self) -> Result<Refs, Fault>;
    /// Looks into the pinned commit without a job: one file by its path from the root, of at most `max` bytes, and the commits
    /// since `since`, which are none where that is absent. Leaves nothing behind. Signatures are not looked at: what is seen may
    /// inform and refuse, and never stands for what a fetch finds. A fault where nothing could be had.
    async fn peek(&self, target: &Target, since: Option<&CommitSha>, path: &str, max: usize) -> Result<Peeked, Fault>;
    /// Clones the pinned commit for a job, or finds the tree that is already there. Never returns another commit: where the
    /// remote gives one, the fault is permanent and names both. Where signatures are asked for, one is checked each time.
    async fn fetch(&self, job: &JobId, target: &Target, log: &dyn Log) -> Result<Tree, Fault>;
    /// A file of a fetched tree, by its path from the tree's root; `None` where there is none. Faults (permanent): it lies outside
    /// the tree, is no regular file, or has more than `max` bytes.
    async fn read(&self, tree: &Tree, path: &str, max: usize) -> Result<Option<Vec<u8>>, Fault>;
    /// Checks that a component's Dockerfile and context are in the commit and on disk, inside the tree (lesson 7). `Ok` means
    /// that a builder may open both. Faults are permanent and name the component and the path.
    async fn check_paths(&self, tree: &Tree, component: &str, dockerfile: &str, context: &str) -> Result<(), Fault>;
    /// Removes every job's tree but this one's.
    async fn discard_all_but(&self, job: Option<&JobId>) -> Result<(), Fault>;
}

// --- Builder and registry --------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// How far a build is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub done: u32,
    pub total: u32,
    /// The step that runs, as the builder names it.
    pub step: String,
}

/// Where a source or a builder says what it does. Never blocks; the other side masks, cuts and stores.
pub trait Log: Send + Sync {
    /// Bytes as they came, in any chunks and any encoding.
    fn write(&self, stream: Stream, bytes: &[u8]);
    fn progress(&self, progress: Progress);
}

/// A log that forgets.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLog;

impl Log for NoLog {
    fn write(&self, _: Stream, _: &[u8]) {}
    fn progress(&self, _: Progress) {}
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildSpec {
    pub installation: InstallationId,
    pub application: AppName,
    pub job: JobId,
    pub key: OpKey,
    pub attempt: u32,
    /// An earlier process may have given the same key to a builder: what that one began may still go on.
    pub resumed: bool,
    pub component: ComponentName,
    pub recipe: Recipe,
    pub tree: Tree,
    pub version: Version,
    /// The remote without userinfo, for the image's source label.
    pub remote: String,
}

#[async_trait]
pub trait Builder: Send + Sync + fmt::Debug {
    /// Builds one image, and pushes it where a registry is configured. Called again with the same key it adopts what is
    /// there (installation, key and commit must match) or converges. Dropping the future ends the build.
    async fn build(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Built, Fault>;
}

/// What a registry knows of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub image: ImageId,
    pub created_at: Option<Millis>,
    pub labels: BTreeMap<String, String>,
}

/// What became of the tags that a failed job may have left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Discarded {
    Removed,
    /// There was nothing.
    Absent,
}

#[async_trait]
pub trait Registry: Send + Sync + fmt::Debug {
    /// Looks an image up; `None` where it is gone.
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault>;
    /// Puts a `replank-keep-…` tag on an image; done twice it is done.
    async fn protect(&self, image: &ImageId, installation: &InstallationId, name: &str) -> Result<(), Fault>;
    /// Takes every such tag of this installation away; an image without one is no error.
    async fn release(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault>;
    /// Images of one repository that carry this installation's label, with every tag on them.
    async fn list(&self, repository: &str, installation: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault>;
    /// Deletes an image with all its tags. Refuses (permanent) an image that lacks the installation's label or carries a keep tag.
    async fn delete(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault>;
    /// Takes away what one attempt pushed: its tag, which nobody else can have made, `also` where that tag leads to the same
    /// image, and the image itself where no other tag leads to it and it is not among `needed`.
    async fn discard(
        &self,
        repository: &str,
        attempt_tag: &str,
        also: &str,
        needed: &BTreeSet<Digest>,
    ) -> Result<Discarded, Fault>;
}

// --- Platform --------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Running {
    /// Exists and was never started.
    Created,
    Running,
    /// Ended, or was stopped.
    Stopped,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerSeen {
    pub image: ImageId,
    pub running: Running,
    /// Exit code of a stopped container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What is wrong with it as the platform says it ("crash loop", "unhealthy"); absent when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// Answers of a revision's probes in one observation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Probed {
    /// Not asked for in this observation.
    NotAsked,
    /// Every probe answered, with the intended version where a probe proves it.
    Passed,
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RevisionSeen {
    /// Key and commit as the containers' labels carry them. A revision whose containers disagree is reported with `None`.
    pub key: Option<OpKey>,
    pub commit: Option<CommitSha>,
    pub containers: BTreeMap<ContainerName, ContainerSeen>,
    /// Probes straight at the revision.
    pub probed: Probed,
    /// Every container of it returns by itself after a reboot of the machine.
    pub returns_alone: bool,
    /// When its last container stopped; absent while one runs, and where none ever ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<Millis>,
}

impl RevisionSeen {
    /// Whether any container of it runs.
    pub fn runs(&self) -> bool {
        self.containers.values().any(|c| c.running == Running::Running)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TrafficSeen {
    /// Where requests go now; `None` where nothing is routed.
    pub revision: Option<RevisionId>,
    pub generation: u64,
    /// The platform would fall back to another revision after a restart of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<RevisionId>,
    /// Probes through the public way in.
    pub probed: Probed,
}

/// One look at the platform: only what carries this installation's id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Observation {
    pub at: Millis,
    pub revisions: BTreeMap<RevisionId, RevisionSeen>,
    pub traffic: TrafficSeen,
}

/// What an observation is to find out beyond what runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ask {
    /// Probe these deployments directly.
    pub direct: Vec<Deployment>,
    /// Probe the public way in, expecting this deployment's version.
    pub through: Option<Deployment>,
}

/// One change of the platform. Every one is idempotent, checks first whether it is already done, and is the same change
/// whoever carries it out.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Create and start these containers of a deployment; those that exist and are ours are started. Nothing is ever replaced:
    /// a look-alike under the same name is a conflict.
    Start { deployment: Deployment, containers: BTreeSet<ContainerName> },
    /// Stop containers and keep them. Containers that are gone are stopped. A stop that reaches beyond those that may not
    /// overlap retires the revision, and is refused (conflict) while traffic goes there: it is a dead driver's, and late.
    Stop { deployment: Deployment, containers: BTreeSet<ContainerName> },
    /// Send all traffic to a deployment, if `generation` is above the platform's. While `fallback` is set, a restart of
    /// the traffic's own machinery serves that one until it is told again; so what runs of it returns after a reboot too.
    Shift { to: Deployment, generation: u64, fallback: Option<Deployment> },
    /// Make this the deployment that returns alone after a reboot; `not` no longer does. Ends the fallback. Refused (conflict)
    /// where `generation` is below the platform's, and unless every container of the deployment runs: a late settle would
    /// otherwise hide a late stop, or leave nothing that returns.
    Settle { deployment: Deployment, not: Vec<RevisionId>, generation: u64 },
    /// Stop everything of a revision of this installation and keep it, so that what it left behind can be read; none of it
    /// returns after a reboot. For what no deployment is known of any more. Refused (conflict) while traffic goes there.
    Halt { revision: RevisionId },
    /// Remove everything of a revision of this installation. Refused (conflict) while traffic goes there.
    Remove { revision: RevisionId },
}

/// How to put the old version back by hand, with Replank gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct EscapeHatch {
    pub commands: Vec<String>,
    /// Extra fields of contract §2 that are known on this platform.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
}

#[async_trait]
pub trait Platform: Send + Sync + fmt::Debug {
    /// How a release would run: operator's configuration, and what the release may say about it.
    /// Changes nothing. A permanent fault names what is missing.
    async fn plan(&self, fetched: &Fetched, images: &Images, version: &Version) -> Result<Plan, Fault>;
    async fn observe(&self, ask: &Ask) -> Result<Observation, Fault>;
    async fn change(&self, change: &Change) -> Result<(), Fault>;
    /// Runs a data step of `deployment` in a container of its own and waits for its end, at most until `until`: it is ended then,
    /// and the fault is permanent. Called again with the same key it waits for the same container, or reads how that has
    /// ended; nothing is run a second time. Answers the exit code.
    async fn run_step(
        &self,
        deployment: &Deployment,
        step: &DataStep,
        key: &OpKey,
        until: Millis,
        log: &dyn Log,
    ) -> Result<i64, Fault>;
    /// Commands that restore `to` while `from` runs; no secret in them.
    fn escape_hatch(&self, to: &Deployment, from: Option<&Deployment>, generation: u64) -> EscapeHatch;
}
