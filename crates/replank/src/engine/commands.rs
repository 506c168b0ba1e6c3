//! Commands: each loads the record, records one event by compare-and-swap, and wakes the loop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use replank_core::data::closed_for;
use replank_core::event::Event;
use replank_core::history::Line;
use replank_core::image::ImageId;
use replank_core::phase::State;
use replank_core::ports::{EscapeHatch, LedgerError, LogId};
use replank_core::predict::Kind;
use replank_core::progress::{self, Reached};
use replank_core::record::{Actor, Downgrade, Head, Job, Latest, Quarantined, Record, TargetKind};
use replank_core::transition::{Refused, apply_as, readable_to, undrifted};
use replank_core::words::{CommitSha, ComponentName, IdempotencyKey, JobId, Millis, Nonce, Version};
use tokio::sync::watch;

use super::api::{
    Candidates, DowngradeRequest, Engine, Live, LogRead, MovedTag, Preflight, PreflightImage, Refusal, StartRequest,
};
use super::candidates::{
    Age, FRESH_MS, Remote, Running, Wanted, Way, choose, newest, offer, release as target_of, wanted,
};
use super::planned::{PlanRequest, UpgradePlan};
use super::reconcile::describe;
use super::release::{self, Looks, START_WAITS};
use super::setup::{Ports, Setup, Shared};

/// A commit that loses this many races in a row meets more than operators.
const RACES_MAX: u32 = 50;
/// Contract §2.
const REASON_MAX: usize = 280;
/// Refs as old as this may name a target: its commit is pinned and checked after the clone, so age cannot mislead.
pub(super) const START_REFS_MS: u64 = 10 * 60_000;
/// Somebody who starts what was published a moment ago gets it, and a script that asks for what is not there does not
/// hammer the remote.
pub(super) const MISSED_REFS_MS: u64 = 2_000;
/// Longest wait for a word about one image of the way back: who rolls back is in a hurry, and no word is no refusal.
const IMAGE_LOOK_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the history of earlier jobs: a start is acknowledged at once, and only the bar's proportions depend on it.
const HISTORY_LOOK_MAX: Duration = Duration::from_millis(200);
/// A loop that has not turned for this long is stuck; its longest regular step is an observation of at most a minute.
const LOOP_STUCK_MS: u64 = 120_000;

/// The engine of this process.
#[derive(Debug)]
pub struct LocalEngine {
    pub(super) ports: Ports,
    pub(super) setup: Arc<Setup>,
    shared: Arc<Shared>,
    pub(super) remote: Option<Remote>,
    pub(super) looks: Option<Looks>,
    /// When a check failed last, in milliseconds; one that went well stands in the record.
    failed_check: AtomicI64,
}

impl LocalEngine {
    pub fn new(ports: Ports, setup: Arc<Setup>, shared: Arc<Shared>) -> Self {
        shared.publish(|live| live.own_version.clone_from(&setup.own_version));
        let masker = || setup.masker();
        let remote =
            ports.source.clone().map(|source| Remote::new(source, ports.ledger.clone(), ports.clock.clone(), masker()));
        let looks = ports.source.clone().map(|source| Looks::new(source, ports.clock.clone(), masker()));
        Self { ports, setup, shared, remote, looks, failed_check: AtomicI64::new(0) }
    }

    /// Records what `event` makes of the record as it is; `Ok(Err(record))` ends early with nothing to record.
    async fn commit(
        &self,
        event: impl Fn(&Arc<Record>) -> Result<Result<Event, Arc<Record>>, Refusal>,
    ) -> Result<Record, Refusal> {
        for _ in 0..RACES_MAX {
            let (record, etag) = self.load().await?;
            let event = match event(&record)? {
                Ok(event) => event,
                Err(record) => return Ok(Arc::unwrap_or_clone(record)),
            };
            let commit = apply_as(&record, &event, self.ports.clock.now(), self.setup.reads_format).map_err(refusal)?;
            let landed = match self.ports.ledger.commit(Some(&etag), &commit.record, &commit.lines).await {
                Ok(_) => true,
                Err(LedgerError::Conflict) => false,
                // Nobody is told that his own click, which counted, is refused since it was made already.
                Err(LedgerError::Indeterminate(_)) => self.holds(&commit.record.history, &commit.lines).await?,
                Err(error) => return Err(unavailable(&error)),
            };
            if landed {
                if commit.record.phase.state() != record.phase.state() {
                    self.shared.entered();
                }
                self.shared.record_changed();
                self.shared.woken();
                return Ok(commit.record);
            }
        }
        Err(Refusal::Unavailable("the record changes faster than this request can follow; try again".to_owned()))
    }

    /// Whether the history holds these lines, which end at `head`. Each is chained to all before it, so that nobody else's can
    /// be taken for them.
    async fn holds(&self, head: &Head, lines: &[Line]) -> Result<bool, Refusal> {
        let Some(last) = lines.last().filter(|last| last.seq + 1 == head.count) else { return Ok(false) };
        let found = self.ports.ledger.history(last.seq, 1).await.map_err(|e| unavailable(&e))?;
        Ok(found.first().is_some_and(|line| line == last))
    }

    pub(super) async fn load(&self) -> Result<(Arc<Record>, replank_core::ports::Etag), Refusal> {
        match self.ports.ledger.load().await {
            Ok(Some(found)) => Ok(found),
            Ok(None) => {
                Err(Refusal::Unavailable("the application has no record yet; its controller is starting".to_owned()))
            }
            Err(error) => Err(unavailable(&error)),
        }
    }

    pub(super) fn new_job(
        &self,
        actor: &Actor,
        request: &StartRequest,
        target: replank_core::record::Target,
    ) -> Result<Job, Refusal> {
        let hex = |n: usize| hex::encode(self.ports.ids.random(n));
        let internal = |e: replank_core::words::BadWord| Refusal::Unavailable(e.to_string());
        let idempotency_key = request.idempotency_key.as_deref().map(IdempotencyKey::new).transpose();
        Ok(Job {
            // Contract §2 gives the alphabet; the version in front is for people.
            id: JobId::new(format!("{}-{}", target.version.tag(), hex(5))).map_err(internal)?,
            target,
            nonce: Nonce::new(hex(16)).map_err(internal)?,
            actor: actor.clone(),
            reason: request.reason.clone().unwrap_or_default(),
            idempotency_key: idempotency_key.map_err(|e| Refusal::Invalid(e.to_string()))?,
            started_at: self.ports.clock.now(),
            mode: self.setup.mode,
            on_rollout_failure: self.setup.on_rollout_failure,
            build_only: request.build_only || self.ports.platform.is_none(),
            reuse: None,
            accept_one_way: request.accept_one_way,
            downgrade: None,
            data: Default::default(),
            reached: Default::default(),
            extra: Default::default(),
        })
    }

    /// Records a job, up or down.
    async fn begin(
        &self,
        actor: &Actor,
        request: StartRequest,
        downgrade: Option<Downgrade>,
    ) -> Result<Record, Refusal> {
        // Everything that the request alone decides comes first: bad input changes nothing and costs no look-up.
        if !request.confirm_downtime {
            return Err(Refusal::Invalid("confirm_downtime must be true: an upgrade replaces what runs".to_owned()));
        }
        checked_reason(request.reason.as_deref().unwrap_or_default())?;
        if let Some(key) = &request.idempotency_key {
            IdempotencyKey::new(key.as_str()).map_err(|e| Refusal::Invalid(e.to_string()))?;
        }
        let wanted = wanted(&request)?;
        let key = request.idempotency_key.as_deref();
        let record = self.record().await?;
        if repeated(&record, key, &wanted)? {
            return Ok(record);
        }
        if record.phase.state().in_flight() {
            return Err(refusal(Refused::InFlight { from: record.phase.state() }));
        }
        // Before the remote is asked, as it may be away; the transition refuses it in any case.
        undrifted(&record, request.build_only).map_err(refusal)?;
        let remote = self.remote()?;
        if let (Wanted::Commit { sha }, Some(why)) = (&wanted, remote.refuses_commits()) {
            return Err(Refusal::Conflict(format!("commit {} cannot be started: {why}", sha.short())));
        }
        let own = self.setup.own_version.as_ref();
        let refs = |age| async move { remote.refs(age).await.map_err(|told| Refusal::Unavailable(told.sentence())) };
        let way = downgrade.map_or(Way::Up, |_| Way::Down);
        let target = match choose(&wanted, way, &refs(Age::Good(START_REFS_MS)).await?, &record, own) {
            Ok(target) => target,
            // What was just published may not be in the last look yet.
            Err(_) => choose(&wanted, way, &refs(Age::Good(MISSED_REFS_MS)).await?, &record, own)?,
        };
        let job = Job { downgrade, ..self.new_job(actor, &request, target)? };
        let override_quarantine = request.override_quarantine;
        overrides_with_reason(&record, &job, override_quarantine)?;
        // Refused by the state before the release is looked at, so that the reason given is the first one.
        let event = Event::Start { job: Box::new(job.clone()), override_quarantine };
        apply_as(&record, &event, self.ports.clock.now(), self.setup.reads_format).map_err(refusal)?;
        let (fits, weights) = tokio::join!(self.fits(&record, &job), self.weights(&record, &job));
        fits?;
        let job = Job { reached: Reached { weights, ..Reached::default() }, ..job };
        self.commit(|record| {
            if repeated(record, key, &wanted)? || record.job.as_ref().is_some_and(|known| known.id == job.id) {
                return Ok(Err(record.clone()));
            }
            overrides_with_reason(record, &job, override_quarantine)?;
            Ok(Ok(Event::Start { job: Box::new(job.clone()), override_quarantine }))
        })
        .await
    }

    /// What the phases of such a job weigh.
    async fn weights(&self, record: &Record, job: &Job) -> BTreeMap<State, u64> {
        let lines = tokio::time::timeout(HISTORY_LOOK_MAX, self.tail(record)).await.unwrap_or_default();
        progress::weights(&lines, Kind::of(job), self.setup.policy.budgets.confirm_window)
    }

    /// Refuses what the release's own word stands against, as far as that can be had in time: the fetch reads it again, and a
    /// remote that is slow or away now may be there then.
    async fn fits(&self, record: &Record, job: &Job) -> Result<(), Refusal> {
        let Some(looks) = &self.looks else { return Ok(()) };
        let (running, to) = (record.running.as_ref(), &job.target.version);
        let release = release::read(looks, self.setup.recipes.as_ref(), &job.target, running, START_WAITS).await;
        match release::refused(&release.manifest, running, job.accepts_one_way(), to) {
            Some(told) => Err(Refusal::Conflict(told.sentence())),
            None => Ok(()),
        }
    }

    /// Looks for an image of the way back: on this machine first, which is nearest and enough to run it, then in the
    /// registry. Gone is only what both say is not there: a registry that is away must never stand in a rollback's way.
    pub(super) async fn find(&self, image: &ImageId) -> PreflightImage {
        let image_ref = image.to_string();
        let mut error = None;
        let places = [self.ports.local_images.as_deref(), Some(self.ports.registry.as_ref())];
        for place in places.into_iter().flatten() {
            match tokio::time::timeout(IMAGE_LOOK_MAX, place.resolve(image)).await {
                Ok(Ok(Some(stored))) => {
                    return PreflightImage { image_ref, exists: true, created_on: stored.created_at, error: None };
                }
                Ok(Ok(None)) => {}
                Ok(Err(fault)) => error = Some(self.setup.told(&fault).sentence()),
                Err(_) => error = Some(format!("there was no answer within {IMAGE_LOOK_MAX:?}")),
            }
        }
        PreflightImage { image_ref, exists: false, created_on: None, error }
    }

    pub(super) fn remote(&self) -> Result<&Remote, Refusal> {
        self.remote
            .as_ref()
            .ok_or_else(|| Refusal::Conflict("no remote is configured; set source.remote in replank.toml".to_owned()))
    }
}

/// A job that exists already under the same idempotency key.
fn repeated(record: &Record, key: Option<&str>, wanted: &Wanted) -> Result<bool, Refusal> {
    let Some((job, key)) = record.job.as_ref().zip(key) else { return Ok(false) };
    if job.idempotency_key.as_ref().is_none_or(|known| known.as_str() != key) {
        return Ok(false);
    }
    if wanted.is(&job.target) {
        return Ok(true);
    }
    Err(Refusal::Conflict(format!("idempotency key {key} was used for {} already; use a new key", job.target.version)))
}

fn refusal(refused: Refused) -> Refusal {
    Refusal::Conflict(refused.to_string())
}

fn unavailable(error: &LedgerError) -> Refusal {
    let text = describe(error);
    tracing::error!(error = %text, "the ledger refused a command");
    Refusal::Unavailable(text)
}

fn checked_reason(reason: &str) -> Result<(), Refusal> {
    if reason.chars().count() > REASON_MAX {
        return Err(Refusal::Invalid(format!("the reason is longer than {REASON_MAX} characters; shorten it")));
    }
    Ok(())
}

/// For what nobody should be able to do without a word: `what` is that.
fn needed_reason(reason: &str, what: &str) -> Result<(), Refusal> {
    checked_reason(reason)?;
    if reason.trim().is_empty() {
        return Err(Refusal::Invalid(format!("{what} needs a reason")));
    }
    Ok(())
}

/// A commit that failed is started again by somebody who says why. Where nothing is overridden, nothing has to be said.
fn overrides_with_reason(record: &Record, job: &Job, override_quarantine: bool) -> Result<(), Refusal> {
    let Some(quarantined) = record.quarantine.get(&job.target.commit).filter(|_| override_quarantine) else {
        return Ok(());
    };
    if job.reason.trim().is_empty() {
        let (commit, version) = (job.target.commit.short(), &quarantined.version);
        return Err(Refusal::Conflict(format!(
            "commit {commit} ({version}) is quarantined, and to override that needs a reason: say why it will work now"
        )));
    }
    Ok(())
}

#[async_trait]
impl Engine for LocalEngine {
    async fn record(&self) -> Result<Record, Refusal> {
        Ok(Arc::unwrap_or_clone(self.load().await?.0))
    }

    fn live(&self) -> watch::Receiver<Live> {
        self.shared.live.subscribe()
    }

    async fn candidates(&self) -> Result<Candidates, Refusal> {
        let record = self.record().await?;
        let own = self.setup.own_version.as_ref();
        let running = Running::of(&record, own);
        let running_version = running.map(Running::version).unwrap_or_default();
        let Some(remote) = &self.remote else {
            return Ok(Candidates {
                configured: false,
                remote: None,
                running_version,
                candidates: vec![],
                refused: vec![],
                commits_refused: None,
                error: None,
            });
        };
        let (candidates, refused, error) = match remote.refs(Age::Fresh).await {
            Ok(refs) => {
                let (offered, refused) = offer(&refs, running);
                (offered, refused, None)
            }
            Err(told) => (vec![], vec![], Some(told.sentence())),
        };
        Ok(Candidates {
            configured: true,
            remote: Some(remote.shown()),
            running_version,
            candidates,
            refused,
            commits_refused: remote.refuses_commits(),
            error,
        })
    }

    async fn check(&self, _actor: &Actor) -> Result<Record, Refusal> {
        let remote = self.remote()?;
        let record = self.record().await?;
        let now = self.ports.clock.now();
        // One that failed counts too: a remote in trouble is not helped by being asked more often.
        let failed = Millis(self.failed_check.load(Ordering::Relaxed));
        let last = record.latest.checked_at.map_or(failed, |well| well.max(failed));
        if now.since(last) < FRESH_MS {
            let left = FRESH_MS - now.since(last);
            return Err(Refusal::TooSoon { retry_after_s: left.div_ceil(1_000).max(1) });
        }
        let refs = remote.refs(Age::Now).await.map_err(|told| {
            self.failed_check.store(self.ports.clock.now().0, Ordering::Relaxed);
            Refusal::Unavailable(told.sentence())
        })?;
        // Whoever starts the newest release, or asks what that would do, finds it looked at.
        let (offered, _) = offer(&refs, Running::of(&record, self.setup.own_version.as_ref()));
        if let (Some(looks), Some(tag)) = (&self.looks, offered.first()) {
            looks.begin(&target_of(tag), record.running.as_ref().map(|running| &running.commit));
        }
        self.commit(|_| {
            let branch_head = refs.branch.as_ref().map(|(_, head)| head.clone());
            let latest = Latest {
                release: newest(&refs),
                branch_head,
                checked_at: Some(self.ports.clock.now()),
                own: self.setup.own_version.clone(),
            };
            Ok(Ok(Event::RefsSeen { latest }))
        })
        .await
    }

    async fn track_commits(&self, actor: &Actor, on: bool) -> Result<Record, Refusal> {
        self.commit(|record| {
            if record.track_commits == on {
                return Ok(Err(record.clone()));
            }
            Ok(Ok(Event::TrackCommits { actor: actor.clone(), on }))
        })
        .await
    }

    async fn start(&self, actor: &Actor, request: StartRequest) -> Result<Record, Refusal> {
        self.begin(actor, request, None).await
    }

    async fn downgrade(&self, actor: &Actor, request: DowngradeRequest) -> Result<Record, Refusal> {
        needed_reason(&request.reason, "a downgrade")?;
        let downgrade = Downgrade { data_restored: request.data_restored };
        let request = StartRequest {
            target_version: Some(request.target_version),
            target_kind: Some(TargetKind::Release),
            confirm_downtime: request.confirm_downtime,
            reason: Some(request.reason),
            idempotency_key: request.idempotency_key,
            override_quarantine: request.override_quarantine,
            ..StartRequest::default()
        };
        self.begin(actor, request, Some(downgrade)).await
    }

    async fn plan(&self, request: PlanRequest) -> Result<UpgradePlan, Refusal> {
        self.make_plan(request).await
    }

    async fn rollback(&self, actor: &Actor, reason: &str, data_restored: bool) -> Result<Record, Refusal> {
        checked_reason(reason)?;
        let record = self.record().await?;
        let event = Event::RollbackStarted { actor: actor.clone(), reason: reason.to_owned(), data_restored };
        // Refused by the state before the images are looked at, so that the reason given is the first one.
        apply_as(&record, &event, self.ports.clock.now(), self.setup.reads_format).map_err(refusal)?;
        let preflight = self.preflight().await?;
        // A way back that the data closed is open again by the operator's word, which the line above has asked for.
        if !preflight.available && preflight.closed.is_none() {
            return Err(Refusal::Conflict(preflight.reason));
        }
        self.commit(|_| Ok(Ok(event.clone()))).await
    }

    async fn cancel(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal> {
        checked_reason(reason)?;
        self.commit(|_| Ok(Ok(Event::Cancelled { actor: actor.clone(), reason: reason.to_owned() }))).await
    }

    async fn keep(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal> {
        checked_reason(reason)?;
        self.commit(|_| Ok(Ok(Event::Kept { actor: actor.clone(), reason: reason.to_owned() }))).await
    }

    async fn reset(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal> {
        needed_reason(reason, "a reset")?;
        self.commit(|_| Ok(Ok(Event::Reset { actor: actor.clone(), reason: reason.to_owned() }))).await
    }

    async fn lift_quarantine(&self, actor: &Actor, which: &str, reason: &str) -> Result<Record, Refusal> {
        needed_reason(reason, "lifting a quarantine")?;
        let bad = |_| Refusal::Invalid(format!("{which:.80} is neither a version nor a commit of 40 hex digits"));
        let version = which.parse::<Version>().ok();
        let commit = match version {
            Some(_) => None,
            None => Some(CommitSha::new(which).map_err(bad)?),
        };
        self.commit(|record| {
            let is_meant = |(sha, entry): &(&CommitSha, &Quarantined)| {
                commit.as_ref().is_some_and(|commit| commit == *sha) || version.as_ref() == Some(&entry.version)
            };
            // Two commits of one version are two tags of that name: whoever means one of them says which.
            let mut meant = record.quarantine.iter().filter(is_meant);
            let (Some((sha, _)), None) = (meant.next(), meant.next()) else {
                let what = if record.quarantine.iter().any(|entry| is_meant(&entry)) {
                    format!("more than one commit of {which} is quarantined: name the commit")
                } else {
                    format!("{which} is not quarantined; see the list of what is")
                };
                return Err(Refusal::Conflict(what));
            };
            let reason = reason.to_owned();
            Ok(Ok(Event::QuarantineLifted { actor: actor.clone(), commit: sha.clone(), reason }))
        })
        .await
    }

    async fn accept_moved_tag(&self, actor: &Actor, tag: MovedTag, reason: &str) -> Result<Record, Refusal> {
        needed_reason(reason, "accepting a moved tag")?;
        let MovedTag { version, commit } = tag;
        let remote = self.remote()?;
        let refs = remote.refs(Age::Now).await.map_err(|told| Refusal::Unavailable(told.sentence()))?;
        let found = refs.tags.iter().find(|found| found.version == version);
        let Some(found) = found else {
            return Err(Refusal::Conflict(format!(
                "the remote has no release {}; look at the candidates",
                version.tag()
            )));
        };
        if found.commit != commit {
            return Err(Refusal::Conflict(format!(
                "{} is at {} now and not at {commit}: look at what that is before you accept it",
                version.tag(),
                found.commit
            )));
        }
        let record = self.record().await?;
        let from = remote.pinned(&record, found).await.map_err(|e| unavailable(&e))?;
        if from == commit {
            return Err(Refusal::Conflict(format!(
                "{} is where it always was: there is nothing to accept",
                version.tag()
            )));
        }
        let event = Event::MovedTagAccepted {
            actor: actor.clone(),
            reason: reason.to_owned(),
            raw_ref: found.raw_ref.clone(),
            from,
            to: commit,
        };
        let record = self.commit(|_| Ok(Ok(event.clone()))).await?;
        remote.look_anew().await;
        Ok(record)
    }

    async fn accept_drift(&self, actor: &Actor, what: &[String], reason: &str) -> Result<Record, Refusal> {
        needed_reason(reason, "accepting a drift")?;
        self.commit(|_| {
            let (actor, reason) = (actor.clone(), reason.to_owned());
            Ok(Ok(Event::DriftAccepted { actor, reason, what: what.to_vec() }))
        })
        .await
    }

    async fn preflight(&self) -> Result<Preflight, Refusal> {
        let record = self.record().await?;
        let none =
            |reason: &str| Preflight { available: false, reason: reason.to_owned(), images: vec![], closed: None };
        let Some(swap) = replank_core::transition::reverse_of(&record) else {
            return Ok(none("there is no snapshot to roll back to"));
        };
        if let Err(refused) = readable_to(&record, &swap.to) {
            return Ok(none(&refused.to_string()));
        }
        let images = futures_util::future::join_all(swap.to.images.values().map(|image| self.find(image))).await;
        let those = |which: fn(&PreflightImage) -> bool| -> Vec<&str> {
            images.iter().filter(|image| which(image)).map(|image| image.image_ref.as_str()).collect()
        };
        let gone = those(|image| !image.exists && image.error.is_none());
        let unknown = those(|image| image.error.is_some());
        let version = &swap.to.version;
        let reason = if !gone.is_empty() {
            format!(
                "an image of {version} is gone: {}; bring it back under this digest, or start a newer release",
                gone.join(", ")
            )
        } else if !unknown.is_empty() {
            format!("{version} may be restored; whether its images are there is not known now: {}", unknown.join(", "))
        } else {
            format!("{version} can be restored")
        };
        let closed = closed_for(&record).filter(|_| gone.is_empty());
        match closed {
            Some(why) => Ok(Preflight {
                available: false,
                reason: format!("{why}: restore the data first, then roll back with data_restored"),
                images,
                closed: Some(why),
            }),
            None => Ok(Preflight { available: gone.is_empty(), reason, images, closed: None }),
        }
    }

    async fn escape_hatch(&self) -> Result<EscapeHatch, Refusal> {
        let record = self.record().await?;
        let swap = replank_core::transition::reverse_of(&record)
            .ok_or_else(|| Refusal::NotFound("there is no snapshot, so there is nothing to go back to".to_owned()))?;
        let platform = self
            .ports
            .platform
            .as_ref()
            .ok_or_else(|| Refusal::NotFound("without a platform there is nothing to restore".to_owned()))?;
        Ok(platform.escape_hatch(&swap.to, swap.from.as_ref(), record.generation))
    }

    fn components(&self) -> Vec<ComponentName> {
        self.setup.components.clone()
    }

    async fn read_log(
        &self,
        job: &JobId,
        component: &ComponentName,
        from: u64,
        max: usize,
    ) -> Result<LogRead, Refusal> {
        let id = LogId { job: job.clone(), component: component.clone() };
        match self.ports.logs.read(&id, from, max).await {
            Ok(Some(chunk)) => Ok(LogRead::Chunk(chunk)),
            Ok(None) => {
                let record = self.record().await?;
                let current = record.job.as_ref().is_some_and(|j| j.id == *job);
                Ok(if current { LogRead::NotBegun } else { LogRead::Unknown })
            }
            Err(error) => {
                tracing::error!(error = %error, "a build log could not be read");
                Err(Refusal::Unavailable("the build log cannot be read now; try again".to_owned()))
            }
        }
    }

    async fn log_changed(&self, job: &JobId, component: &ComponentName, from: u64) {
        let id = LogId { job: job.clone(), component: component.clone() };
        if let Err(error) = self.ports.logs.changed(&id, from).await {
            tracing::warn!(error = %error, "a build log cannot be followed");
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }

    async fn history(&self, limit: usize) -> Result<Vec<Line>, Refusal> {
        let record = self.record().await?;
        let from = record.history.count.saturating_sub(limit as u64);
        self.ports.ledger.history(from, limit).await.map_err(|e| unavailable(&e))
    }

    async fn ready(&self) -> Result<(), Refusal> {
        self.load().await?;
        let quiet = self.ports.clock.now().since(self.shared.last_turn());
        if quiet > LOOP_STUCK_MS {
            return Err(Refusal::Unavailable(format!("the loop has not turned for {} s", quiet / 1_000)));
        }
        Ok(())
    }
}
