//! The engine's commands over a real ledger, where the remote and the registries are doubles: for answers that no real one
//! can be made to give at the moment that matters.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use replank::doctor::{Checked, Finding, Verdict};
use replank::engine::api::{Engine as _, Refusal, StartRequest};
use replank::engine::{LocalEngine, Ports, Reading, Recipes, Reconciler, Room, Setup, Shared};
use replank::system::SystemIds;
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::logs::sqlite::SqliteLogs;
use replank_adapters::sqlite::Store;
use replank_core::event::Event;
use replank_core::fault::{Fault, Told};
use replank_core::history::Line;
use replank_core::image::ImageId;
use replank_core::phase::*;
use replank_core::policy::Policy;
use replank_core::ports::*;
use replank_core::record::*;
use replank_core::transition::apply;
use replank_core::words::*;
use serde_json::Value;
use support::{Hand, SHA, deployment, name, record};
use tokio_util::task::AbortOnDropHandle;

/// What the remote's credential is, which nothing may show.
const SECRET: &str = "hunter2-of-the-remote";
const NEVER: &str = "no case comes here";

/// A remote that says what a case wants, and counts how often it was asked.
#[derive(Debug)]
struct Remote {
    /// Newest first; a failure where there is none.
    tags: Mutex<Option<Vec<TagRef>>>,
    asked: AtomicU32,
    /// How long each look takes by the case's clock.
    takes: AtomicI64,
    clock: Arc<Hand>,
    /// Only signed tags are accepted.
    signed: AtomicBool,
    /// What a look into a commit finds; it never comes back where there is nothing.
    peeked: Mutex<Option<Result<FileSeen, Told>>>,
    looked_into: AtomicU32,
    /// What it says when it fails.
    says: Mutex<String>,
}

impl Remote {
    fn fails(&self, fault: Fault) -> Fault {
        let says = self.says.lock().unwrap();
        if says.is_empty() { fault } else { fault.because(says.clone()) }
    }

    fn is_away(&self) {
        *self.tags.lock().unwrap() = None;
    }

    fn offers(&self, versions: &[&str]) {
        let tag = |version: &&str| TagRef {
            version: version.parse().unwrap(),
            raw_ref: format!("refs/tags/v{version}"),
            commit: CommitSha::new(SHA).unwrap(),
            tag_object: None,
            refused: None,
        };
        *self.tags.lock().unwrap() = Some(versions.iter().map(tag).collect());
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Source for Remote {
    fn remote(&self) -> String {
        "https://git.test/shop.git".to_owned()
    }
    fn refuses_commits(&self) -> Option<String> {
        self.signed.load(Ordering::SeqCst).then(|| "only signed tags are accepted".to_owned())
    }
    async fn refs(&self) -> Result<Refs, Fault> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        // Others get their turn while this look is under way.
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.clock.0.fetch_add(self.takes.load(Ordering::SeqCst), Ordering::SeqCst);
        let away = || self.fails(Fault::transient("the git remote cannot be reached").advice("look at its machine"));
        Ok(Refs { tags: self.tags.lock().unwrap().clone().ok_or_else(away)?, branch: None })
    }
    async fn peek(&self, _: &Target, _: Option<&CommitSha>, path: &str, _: usize) -> Result<Peeked, Fault> {
        self.looked_into.fetch_add(1, Ordering::SeqCst);
        assert_eq!(path, ".replank.toml");
        let answer = self.peeked.lock().unwrap().clone();
        match answer {
            Some(Ok(file)) => Ok(Peeked { file, commits: Ok(CommitsSeen::default()) }),
            Some(Err(told)) => Err(Fault::new(told.class, told.what).advice(told.advice)),
            None => std::future::pending().await,
        }
    }
    async fn fetch(&self, _: &JobId, _: &Target, log: &dyn Log) -> Result<Tree, Fault> {
        log.write(Stream::Stdout, b"$ git clone --depth 1 https://git.test/shop.git\n");
        log.write(Stream::Stderr, format!("remote: hello {SECRET}\nfatal: the pack is damaged").as_bytes());
        Err(self.fails(Fault::permanent("git clone failed").advice("have it mended").because("exit code 128")))
    }
    async fn read(&self, _: &Tree, _: &str, _: usize) -> Result<Option<Vec<u8>>, Fault> {
        panic!("{NEVER}")
    }
    async fn check_paths(&self, _: &Tree, _: &str, _: &str, _: &str) -> Result<(), Fault> {
        panic!("{NEVER}")
    }
    async fn discard_all_but(&self, _: Option<&JobId>) -> Result<(), Fault> {
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    Has,
    Lacks,
    IsAway,
    Hangs,
}
use Answer::*;

#[derive(Debug)]
struct Shelf(Answer);

#[async_trait]
impl Registry for Shelf {
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault> {
        match self.0 {
            Has => Ok(Some(Stored { image: image.clone(), created_at: Some(Millis(7)), labels: BTreeMap::new() })),
            Lacks => Ok(None),
            IsAway => Err(Fault::transient("the registry cannot be reached").advice("look at its machine")),
            Hangs => std::future::pending().await,
        }
    }
    async fn protect(&self, _: &ImageId, _: &InstallationId, _: &str) -> Result<(), Fault> {
        panic!("{NEVER}")
    }
    async fn release(&self, _: &ImageId, _: &InstallationId) -> Result<(), Fault> {
        panic!("{NEVER}")
    }
    async fn list(&self, _: &str, _: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault> {
        Ok(vec![])
    }
    async fn delete(&self, _: &ImageId, _: &InstallationId) -> Result<(), Fault> {
        panic!("{NEVER}")
    }
    async fn discard(&self, _: &str, _: &str, _: &str, _: &BTreeSet<Digest>) -> Result<Discarded, Fault> {
        panic!("{NEVER}")
    }
}

#[derive(Debug)]
struct Nothing;

#[async_trait]
impl Builder for Nothing {
    async fn build(&self, _: &BuildSpec, _: &dyn Log) -> Result<Built, Fault> {
        panic!("{NEVER}")
    }
}

#[async_trait]
impl Recipes for Nothing {
    /// As the words of the manifest say: what is missing, and whether it is one-way.
    fn judge(&self, manifest: Option<&[u8]>, _: &Version, _: Option<&Deployment>) -> Result<Reading, Fault> {
        let text = String::from_utf8_lossy(manifest.unwrap_or_default()).into_owned();
        if text == "nonsense" {
            return Err(Fault::permanent("the manifest is no manifest").advice("mend the release"));
        }
        let missing = text.strip_prefix("needs ").map(|what| format!("the release needs {what}: set it"));
        let one_way = serde_json::json!({ "schema": "one-way" });
        let manifest = if text == "one-way" { one_way } else { Value::Null };
        let fetched = Fetched { manifest, ..Fetched::default() };
        Ok(Reading { fetched, missing: missing.into_iter().collect(), notes: String::new() })
    }
    async fn recipes(&self, _: &Tree, _: &Version, _: Option<&Deployment>) -> Result<Fetched, Fault> {
        panic!("{NEVER}")
    }
}

/// The ledger, whose next answer to a commit is lost, before or after it was carried out.
#[derive(Debug)]
struct LosesAnAnswer {
    ledger: Arc<dyn Ledger>,
    lost: Mutex<Option<Lost>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    Before,
    After,
    /// And somebody else's commit is there too by the time that anybody looks.
    Overtaken,
}

#[async_trait]
impl Ledger for LosesAnAnswer {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        self.ledger.load().await
    }
    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        self.ledger.version().await
    }
    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError> {
        let lost = self.lost.lock().unwrap().take();
        let Some(lost) = lost else { return self.ledger.commit(expected, record, lines).await };
        if lost != Lost::Before {
            let etag = self.ledger.commit(expected, record, lines).await?;
            if lost == Lost::Overtaken {
                let event = Event::TrackCommits { actor: alice(), on: !record.track_commits };
                let commit = apply(record, &event, Millis(1_700_000_100_001)).unwrap();
                self.ledger.commit(Some(&etag), &commit.record, &commit.lines).await?;
            }
        }
        Err(LedgerError::Indeterminate(Fault::indeterminate("the answer was lost")))
    }
    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError> {
        self.ledger.history(from, limit).await
    }
    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError> {
        self.ledger.beat(presence).await
    }
    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        self.ledger.presences().await
    }
    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError> {
        self.ledger.forget(controller).await
    }
    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        now: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        self.ledger.first_seen(tags, now).await
    }
}

#[async_trait]
impl Room for Nothing {
    async fn look(&self, _: bool) -> Vec<Checked> {
        vec![]
    }
}

struct World {
    engine: LocalEngine,
    remote: Arc<Remote>,
    clock: Arc<Hand>,
    ports: Ports,
    setup: Arc<Setup>,
    shared: Arc<Shared>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(record: Record, registry: Answer, local: Option<Answer>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let ledger = Arc::new(SqliteLedger::new(store.clone(), record.application.clone()));
        ledger.commit(None, &record, &[]).await.unwrap();
        let clock = Arc::new(Hand(AtomicI64::new(1_700_000_100_000)));
        let remote = Remote {
            tags: Mutex::default(),
            asked: AtomicU32::new(0),
            takes: AtomicI64::new(0),
            clock: clock.clone(),
            signed: AtomicBool::new(false),
            peeked: Mutex::new(Some(Ok(FileSeen::Absent))),
            looked_into: AtomicU32::new(0),
            says: Mutex::default(),
        };
        let remote = Arc::new(remote);
        let ports = Ports {
            clock: clock.clone(),
            ids: Arc::new(SystemIds),
            ledger,
            logs: Arc::new(SqliteLogs::new(store)),
            source: Some(remote.clone()),
            builder: Arc::new(Nothing),
            registry: Arc::new(Shelf(registry)),
            local_images: local.map(|answer| Arc::new(Shelf(answer)) as Arc<dyn Registry>),
            platform: None,
        };
        let setup = Arc::new(Setup {
            application: record.application.clone(),
            installation: record.installation.clone(),
            me: ControllerId::Host,
            instance: "one".to_owned(),
            policy: Policy::default(),
            mode: Mode::BlueGreen,
            on_rollout_failure: OnRolloutFailure::Hold,
            own_version: None,
            components: vec![name("api")],
            secrets: vec![SECRET.to_owned()],
            recipes: Arc::new(Nothing),
            room: Arc::new(Nothing),
            reads_format: replank_core::format::FORMAT,
        });
        let shared = Arc::new(Shared::default());
        let engine = LocalEngine::new(ports.clone(), setup.clone(), shared.clone());
        Self { engine, remote, clock, ports, setup, shared, _dir: dir }
    }

    /// With a remote, and images that nobody asks for.
    async fn of_remote() -> Self {
        Self::new(record(), Lacks, None).await
    }

    fn later(&self, millis: i64) {
        self.clock.0.fetch_add(millis, Ordering::SeqCst);
    }

    async fn error_of_candidates(&self) -> Option<String> {
        self.engine.candidates().await.unwrap().error
    }

    /// Lets the loop take the job to its end, which is before anything was touched; answers why.
    async fn failed_pre(&self) -> Told {
        let reconciler = Reconciler::new(self.ports.clone(), self.setup.clone(), self.shared.clone());
        let run = reconciler.run(|record| !record.phase.state().in_flight());
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("the job ends");
        let record = self.engine.record().await.unwrap();
        let Phase::FailedPre { fault } = record.phase else { panic!("{:?}", record.phase) };
        fault
    }

    async fn events(&self) -> Vec<Value> {
        let lines = self.engine.history(100).await.unwrap();
        lines.iter().map(|line| serde_json::from_slice(&line.bytes).unwrap()).collect()
    }
}

fn alice() -> Actor {
    Actor { oid: "token:1".to_owned(), name: "alice".to_owned(), from: "127.0.0.1".to_owned() }
}

fn start() -> StartRequest {
    StartRequest { confirm_downtime: true, ..StartRequest::default() }
}

/// Inside the confirm window: 0.2.0 serves, and 0.1.0 is warm.
fn confirming() -> Record {
    let mut record = record();
    let (old, new) = (deployment("0.1.0", '1'), deployment("0.2.0", '2'));
    let snapshot = Snapshot {
        deployment: old.clone(),
        taken_at: Millis(0),
        keep_until: Millis(i64::MAX),
        proved_at: Millis(0),
        lost: None,
        closed: None,
        extra: BTreeMap::new(),
    };
    let way_back = WayBack::Snapshot(Box::new(snapshot.clone()));
    let swap = Swap::new(Some(old), new.clone(), Mode::BlueGreen, way_back);
    (record.snapshot, record.serving, record.job) = (Some(snapshot), Some(new), Some(support::job("0.2.0")));
    record.phase = Phase::Confirming(Confirming { swap, deadline: Some(Millis(i64::MAX)), flip: None });
    record
}

/// Below the first format there is none: it stands for a controller that is behind the record.
const BEHIND: u32 = 0;

#[tokio::test]
async fn a_rollback_to_a_controller_that_could_not_read_the_record_is_refused_in_preflight() {
    for has_controller in [true, false] {
        let mut record = confirming();
        record.phase = Phase::Succeeded { built_only: None };
        let back = &mut record.snapshot.as_mut().unwrap().deployment;
        back.reads_format = Some(BEHIND);
        let container =
            ContainerPlan { component: support::name("api"), overlap: Overlap::Allowed, controller: has_controller };
        back.plan.containers.insert(replank_core::words::ContainerName::new("upgrade").unwrap(), container);
        let world = World::new(record, Has, None).await;
        let preflight = world.engine.preflight().await.unwrap();
        assert_eq!(preflight.available, !has_controller, "only a controller reads records: {}", preflight.reason);
        let events = world.events().await.len();
        let answer = world.engine.rollback(&alice(), "it is slow", false).await;
        if has_controller {
            assert!(preflight.reason.contains("0.1.0 reads record format 0"), "{}", preflight.reason);
            assert!(matches!(&answer, Err(Refusal::Conflict(why)) if *why == preflight.reason), "{answer:?}");
            assert_eq!(world.events().await.len(), events, "nothing was begun");
        } else {
            assert_eq!(answer.unwrap().phase.state(), State::RollingBack);
        }
    }
}

/// A record that a newer Replank may write at any moment; its heartbeats are counted.
#[derive(Debug)]
struct Raised {
    record: Record,
    is_raised: AtomicBool,
    beats: AtomicU32,
}

#[async_trait]
impl Ledger for Raised {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        match self.is_raised.load(Ordering::SeqCst) {
            true => Err(LedgerError::Unreadable(Fault::permanent("a newer Replank wrote it"))),
            false => Ok(Some((Arc::new(self.record.clone()), Etag("1".to_owned())))),
        }
    }
    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        let raised = self.is_raised.load(Ordering::SeqCst);
        Ok(Some(Etag(if raised { "2" } else { "1" }.to_owned())))
    }
    async fn commit(&self, _: Option<&Etag>, _: &Record, _: &[Line]) -> Result<Etag, LedgerError> {
        Err(LedgerError::Conflict)
    }
    async fn history(&self, _: u64, _: usize) -> Result<Vec<Line>, LedgerError> {
        Ok(vec![])
    }
    async fn beat(&self, _: &Presence) -> Result<(), LedgerError> {
        self.beats.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        Ok(vec![])
    }
    async fn forget(&self, _: &ControllerId) -> Result<(), LedgerError> {
        Ok(())
    }
    async fn first_seen(
        &self,
        _: &[(String, CommitSha)],
        _: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        Ok(BTreeMap::new())
    }
}

/// Found by the simulation: a failed release whose controller is older drove on, unable to read what its sibling had written, and
/// nobody took over from one whose heart beat.
#[tokio::test(start_paused = true)]
async fn who_cannot_read_the_record_no_longer_says_that_it_is_there() {
    let world = World::of_remote().await;
    let ledger = Arc::new(Raised { record: record(), is_raised: AtomicBool::new(false), beats: AtomicU32::new(0) });
    let ports = Ports { ledger: ledger.clone(), ..world.ports.clone() };
    let reconciler = Reconciler::new(ports, world.setup.clone(), world.shared.clone());
    let _run = AbortOnDropHandle::new(tokio::spawn(reconciler.run(|_| false)));
    let a_while = Duration::from_secs(60);
    let beats = async || {
        let before = ledger.beats.load(Ordering::SeqCst);
        tokio::time::sleep(a_while).await;
        ledger.beats.load(Ordering::SeqCst) - before
    };
    assert!(beats().await > 10);
    ledger.is_raised.store(true, Ordering::SeqCst);
    // It comes to see that first.
    tokio::time::sleep(a_while).await;
    assert_eq!(beats().await, 0, "whoever can read the record has to see that nobody drives");
    ledger.is_raised.store(false, Ordering::SeqCst);
    tokio::time::sleep(a_while).await;
    assert!(beats().await > 10, "a ledger that was restored");
}

#[tokio::test]
async fn a_commit_is_refused_with_the_reason_where_tags_must_be_signed() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.2.0"]);
    let commit = || StartRequest { target_sha: Some(SHA.to_owned()), ..start() };
    let why = |refused: Refusal| refused.to_string();
    let before = world.engine.start(&alice(), commit()).await.map_err(why).unwrap_err();
    assert!(!before.contains("signed"), "{before}");
    assert_eq!(world.engine.candidates().await.unwrap().commits_refused, None);
    world.remote.signed.store(true, Ordering::SeqCst);
    let asked = world.remote.asked();
    let refused = world.engine.start(&alice(), commit()).await.map_err(why).unwrap_err();
    assert!(refused.contains("cannot be started: only signed tags are accepted"), "{refused}");
    // It needs no look at the remote, and no job was begun.
    assert_eq!(world.remote.asked(), asked);
    let told = world.engine.candidates().await.unwrap().commits_refused;
    assert_eq!(told.as_deref(), Some("only signed tags are accepted"), "known before anybody tries");
    assert!(world.events().await.iter().all(|event| event["event"] != "start"));
}

#[tokio::test]
async fn a_command_whose_answer_was_lost_is_not_refused_for_having_been_done() {
    for lost in [Lost::Before, Lost::After, Lost::Overtaken] {
        let world = World::new(confirming(), Has, None).await;
        let ledger = Arc::new(LosesAnAnswer { ledger: world.ports.ledger.clone(), lost: Mutex::new(Some(lost)) });
        let ports = Ports { ledger: ledger.clone(), ..world.ports.clone() };
        let engine = LocalEngine::new(ports, world.setup.clone(), world.shared.clone());
        let record =
            engine.rollback(&alice(), "it is slow", false).await.map_err(|e| format!("{lost:?}: {e}")).unwrap();
        assert_eq!(record.phase.state(), State::RollingBack, "{lost:?}");
        assert_eq!(*ledger.lost.lock().unwrap(), None, "{lost:?}: nothing was lost");
        let events = world.events().await;
        let begun = events.iter().filter(|event| event["event"] == "rollback_start").count();
        assert_eq!(begun, 1, "{lost:?}: {events:?}");
        // A second click is one, and refused.
        let again = engine.rollback(&alice(), "it is slow", false).await.unwrap_err();
        assert!(matches!(again, Refusal::Conflict(_)), "{lost:?}: {again}");
    }
}

#[tokio::test]
async fn a_rollback_is_refused_only_where_an_image_is_known_to_be_gone() {
    let succeeded = || {
        let mut record = confirming();
        record.phase = Phase::Succeeded { built_only: None };
        record
    };
    for (registry, local, seen, known, goes) in [
        (Has, None, true, true, true),
        (Lacks, None, false, true, false),
        // Nobody knows: no reason to stand in the way (lesson 24 holds for registries too).
        (IsAway, None, false, false, true),
        (Hangs, None, false, false, true),
        // What this machine holds is enough, whatever the registry says.
        (Lacks, Some(Has), true, true, true),
        (IsAway, Some(Has), true, true, true),
        (Hangs, Some(Has), true, true, true),
        (Lacks, Some(Lacks), false, true, false),
        (IsAway, Some(Lacks), false, false, true),
        (Lacks, Some(IsAway), false, false, true),
        (Has, Some(IsAway), true, true, true),
    ] {
        for record in [confirming(), succeeded()] {
            let case = format!("registry {registry:?}, this machine {local:?}, {}", record.phase.state().name());
            let world = World::new(record, registry, local).await;
            let begun = Instant::now();
            let preflight = world.engine.preflight().await.unwrap();
            assert!(begun.elapsed() < Duration::from_secs(20), "{case}: a hurry is no time to wait for a registry");
            assert_eq!((preflight.available, preflight.images.len()), (goes, 1), "{case}");
            let image = &preflight.images[0];
            assert_eq!((image.exists, image.error.is_none()), (seen, known), "{case}: {image:?}");
            let expect = match (seen, known) {
                (true, _) => "0.1.0 can be restored",
                (false, true) => "an image of 0.1.0 is gone",
                (false, false) => "is not known now",
            };
            assert!(preflight.reason.contains(expect), "{case}: {}", preflight.reason);
            assert!(seen || preflight.reason.contains(&image.image_ref), "{case}: {}", preflight.reason);
            match (goes, world.engine.rollback(&alice(), "", false).await) {
                (true, Ok(record)) => assert_eq!(record.phase.state(), State::RollingBack, "{case}"),
                (false, Err(Refusal::Conflict(why))) => assert_eq!(why, preflight.reason, "{case}"),
                (_, other) => panic!("{case}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_remote_that_fails_is_not_asked_again_for_15_seconds() {
    let world = World::of_remote().await;
    let error = world.error_of_candidates().await.unwrap();
    assert!(error.contains("cannot be reached") && error.contains("its machine"), "{error}");
    world.remote.offers(&["0.2.0"]);
    world.later(14_999);
    assert_eq!(world.error_of_candidates().await, Some(error));
    assert_eq!(world.remote.asked(), 1, "the same error, without a new look");
    world.later(1);
    assert_eq!(world.error_of_candidates().await, None);
    assert_eq!(world.remote.asked(), 2);
    assert_eq!(world.error_of_candidates().await, None);
    assert_eq!(world.remote.asked(), 2);
}

#[tokio::test]
async fn who_waits_for_a_look_that_fails_shares_its_failure() {
    let world = World::of_remote().await;
    // Longer than any failure is kept for.
    world.remote.takes.store(30_000, Ordering::SeqCst);
    let looks = (0..8).map(|_| world.engine.candidates());
    for found in futures_util::future::join_all(looks).await {
        assert!(found.unwrap().error.is_some());
    }
    assert_eq!(world.remote.asked(), 1);
    world.later(60_000);
    let alice = alice();
    let checks = (0..8).map(|_| world.engine.check(&alice));
    for checked in futures_util::future::join_all(checks).await {
        assert!(matches!(checked, Err(Refusal::Unavailable(_))), "{checked:?}");
    }
    assert_eq!(world.remote.asked(), 2);
}

#[tokio::test]
async fn a_check_that_failed_counts_as_the_last_one() {
    let world = World::of_remote().await;
    assert!(matches!(world.engine.check(&alice()).await, Err(Refusal::Unavailable(why)) if why.contains("reached")));
    world.remote.offers(&["0.1.0"]);
    world.later(4_000);
    let again = world.engine.check(&alice()).await;
    assert!(matches!(again, Err(Refusal::TooSoon { retry_after_s: 11 })), "{again:?}");
    assert_eq!(world.remote.asked(), 1);
    world.later(11_000);
    world.engine.check(&alice()).await.unwrap();
    world.later(14_000);
    // One that went well still counts, as before.
    let again = world.engine.check(&alice()).await;
    assert!(matches!(again, Err(Refusal::TooSoon { retry_after_s: 1 })), "{again:?}");
    assert_eq!(world.remote.asked(), 2);
}

#[tokio::test]
async fn a_start_needs_no_new_look_and_does_not_wait_for_an_old_failure() {
    let world = World::of_remote().await;
    let away =
        |started: Result<Record, Refusal>| assert!(matches!(started, Err(Refusal::Unavailable(_))), "{started:?}");
    away(world.engine.start(&alice(), start()).await);
    away(world.engine.start(&alice(), start()).await);
    assert_eq!(world.remote.asked(), 1);
    // Back, and somebody who was waiting for it gets on.
    world.remote.offers(&["0.2.0"]);
    world.later(2_000);
    let refused = StartRequest { target_version: Some("0.1.0".to_owned()), ..start() };
    assert!(matches!(world.engine.start(&alice(), refused).await, Err(Refusal::Conflict(_))));
    // Away again: the targets of the last good look can be started, since their commits are pinned.
    world.remote.is_away();
    world.later(5 * 60_000);
    assert!(world.error_of_candidates().await.is_some());
    let started = world.engine.start(&alice(), start()).await.unwrap();
    assert_eq!(started.job.unwrap().target.version.to_string(), "0.2.0");
}

#[tokio::test]
async fn who_is_up_to_date_sees_the_newest_release_and_the_history_no_news() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.1.0", "0.0.9"]);
    let latest = world.engine.check(&alice()).await.unwrap().latest;
    assert_eq!(latest.release.unwrap().0.to_string(), "0.1.0", "what runs is the newest, and that is worth showing");
    world.later(15_000);
    world.remote.offers(&["0.2.0", "0.1.0"]);
    world.engine.check(&alice()).await.unwrap();
    world.later(15_000);
    world.engine.check(&alice()).await.unwrap();
    let events = world.events().await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!((&events[0]["event"], &events[0]["version"]), (&"candidate_detected".into(), &"0.2.0".into()));
    // A release that is refused is not the newest one, whatever its number.
    world.later(15_000);
    world.remote.tags.lock().unwrap().as_mut().unwrap()[0].refused = Some("a branch has its name".to_owned());
    let latest = world.engine.check(&alice()).await.unwrap().latest;
    assert_eq!(latest.release.unwrap().0.to_string(), "0.1.0");
    assert_eq!(world.events().await.len(), 1);
}

#[tokio::test]
async fn a_failed_fetch_says_what_git_said_and_no_secret() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.2.0"]);
    world.engine.start(&alice(), start()).await.unwrap();
    let fault = world.failed_pre().await;
    let expect = "git clone failed: exit code 128: the fetch said last: $ git clone --depth 1 https://git.test/shop.git | \
                  remote: hello *** | fatal: the pack is damaged";
    assert_eq!((fault.what.as_str(), fault.advice.as_str()), (expect, "have it mended"));
    assert!(!serde_json::to_string(&world.events().await).unwrap().contains(SECRET));
}

/// A machine on which each check comes to the same.
#[derive(Debug)]
struct Machine(Verdict);

#[async_trait]
impl Room for Machine {
    async fn look(&self, both: bool) -> Vec<Checked> {
        assert!(!both, "a job that only builds starts nothing beside what runs");
        let one = |name: &'static str| {
            let (what, advice) = (format!("too little {name}"), format!("add {name}"));
            Checked { name, finding: Finding { verdict: self.0, what, advice }, ms: 0 }
        };
        ["home", "memory", "disk"].map(one).to_vec()
    }
}

#[tokio::test]
async fn a_job_without_room_fails_before_anything_is_fetched() {
    const NO_ROOM: &str = "this machine has no room for the upgrade: too little memory; too little disk";
    for (verdict, expect) in
        [(Verdict::Failed, NO_ROOM), (Verdict::Warning, "git clone failed"), (Verdict::Ok, "git clone failed")]
    {
        let world = World::of_remote().await;
        world.remote.offers(&["0.2.0"]);
        world.engine.start(&alice(), start()).await.unwrap();
        let setup = Setup { room: Arc::new(Machine(verdict)), ..(*world.setup).clone() };
        let reconciler = Reconciler::new(world.ports.clone(), Arc::new(setup), world.shared.clone());
        let run = reconciler.run(|record| !record.phase.state().in_flight());
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("the job ends");
        let record = world.engine.record().await.unwrap();
        let Phase::FailedPre { fault } = &record.phase else { panic!("{:?}", record.phase) };
        assert!(fault.what.starts_with(expect), "{verdict:?}: {}", fault.what);
        if verdict == Verdict::Failed {
            assert_eq!(
                (fault.what.as_str(), fault.advice.as_str()),
                (NO_ROOM, "add memory; add disk; then start again")
            );
        }
    }
}

#[tokio::test]
async fn a_confirmation_keeps_its_reason() {
    let world = World::new(confirming(), Has, None).await;
    let long = "x".repeat(281);
    assert!(matches!(world.engine.keep(&alice(), &long).await, Err(Refusal::Invalid(_))));
    world.engine.keep(&alice(), "the numbers are fine").await.unwrap();
    let events = world.events().await;
    let kept = &events[events.len() - 1];
    assert_eq!((&kept["event"], &kept["reason"]), (&"kept".into(), &"the numbers are fine".into()), "{events:?}");
    assert_eq!(kept["actor"]["name"], "alice");
}

#[tokio::test]
async fn what_a_release_says_of_itself_refuses_a_start_before_there_is_a_job() {
    let seen = |text: &str| Some(Ok(FileSeen::Holds(text.as_bytes().to_vec())));
    let too_large = Told::permanent("\".replank.toml\" is larger than 9 bytes", "make the file smaller");
    for (peeked, accept_one_way, expect) in [
        (seen("nonsense"), true, Some("is no manifest; mend the release")),
        (seen("needs TOKEN"), true, Some("the release needs TOKEN: set it; mend")),
        (Some(Ok(FileSeen::Unfit(too_large))), false, Some("larger than 9 bytes; make the file smaller")),
        (seen("one-way"), false, Some("one-way; make sure of a backup")),
        (seen("one-way"), true, None),
        (seen("fine"), false, None),
        (Some(Ok(FileSeen::Absent)), false, None),
        // What is not known refuses nothing: the fetch sees it.
        (Some(Ok(FileSeen::Unknown("it is a link".to_owned()))), false, None),
        (Some(Err(Told::permanent("git cannot be run", ""))), false, None),
        (None, false, None),
    ] {
        let world = World::of_remote().await;
        world.remote.offers(&["0.2.0"]);
        let case = format!("{peeked:?} {accept_one_way}");
        *world.remote.peeked.lock().unwrap() = peeked;
        let request = StartRequest { accept_one_way, ..start() };
        let begun = Instant::now();
        let started = world.engine.start(&alice(), request).await;
        assert!(begun.elapsed() < Duration::from_secs(20), "{case}: a click waits for no remote");
        match (started, expect) {
            (Ok(record), None) => assert_eq!(record.phase.state(), State::Queued, "{case}"),
            (Err(Refusal::Conflict(why)), Some(part)) => {
                assert!(why.contains(part), "{case}: {why}");
                assert!(world.events().await.is_empty(), "{case}: no job was begun");
            }
            (other, _) => panic!("{case}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_commit_is_looked_into_once_and_a_failure_is_kept_for_15_seconds() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.2.0"]);
    let looks = || world.remote.looked_into.load(Ordering::SeqCst);
    *world.remote.peeked.lock().unwrap() = Some(Err(Told::permanent("away", "")));
    // The look at the remote begins it, and waits for nothing.
    world.engine.check(&alice()).await.unwrap();
    world.engine.start(&alice(), start()).await.unwrap();
    assert_eq!(looks(), 1);
    world.engine.cancel(&alice(), "").await.unwrap();
    let nonsense = Some(Ok(FileSeen::Holds(b"nonsense".to_vec())));
    *world.remote.peeked.lock().unwrap() = nonsense;
    world.engine.start(&alice(), start()).await.unwrap();
    world.engine.cancel(&alice(), "").await.unwrap();
    assert_eq!(looks(), 1, "a failure is not asked for again at once");
    world.later(15_000);
    let request = || async { world.engine.start(&alice(), start()).await };
    let refused = futures_util::future::join_all((0..8).map(|_| request())).await;
    assert!(refused.iter().all(|r| matches!(r, Err(Refusal::Conflict(_)))), "{refused:?}");
    assert_eq!(looks(), 2, "all who ask share one look");
    world.later(9 * 60_000);
    assert!(request().await.is_err());
    assert_eq!(looks(), 2, "a commit never changes");
}

/// The credential that it was sent, another secret, and what a terminal or a page would obey: nothing of it is told to anybody.
#[tokio::test]
async fn what_a_remote_says_is_told_without_its_tricks_and_without_secrets() {
    let world = World::of_remote().await;
    *world.remote.says.lock().unwrap() =
        format!("bad credential {SECRET}, password=hunter3 \u{1b}]0;owned\u{7}\r\u{202e}v9\u{200b}.0");
    #[track_caller]
    fn clean(text: &str) {
        assert!(text.contains("bad credential ***, password=***") && text.contains("owned"), "{text:?}");
        assert!(!text.contains("hunter"), "{text:?}");
        let obeyed = |c: char| c.is_control() || replank_core::mask::is_obeyed(c);
        assert!(!text.contains(obeyed) && !text.contains("\\u001b") && !text.contains("\\r"), "{text:?}");
    }
    clean(&world.error_of_candidates().await.unwrap());
    world.later(15_000);
    let Err(Refusal::Unavailable(why)) = world.engine.check(&alice()).await else { panic!("it is away") };
    clean(&why);
    world.later(15_000);
    let Err(Refusal::Unavailable(why)) = world.engine.start(&alice(), start()).await else { panic!("it is away") };
    clean(&why);
    world.remote.offers(&["0.2.0"]);
    world.later(15_000);
    world.engine.start(&alice(), start()).await.unwrap();
    let fault = world.failed_pre().await;
    clean(&fault.what);
    let lines = world.engine.history(100).await.unwrap();
    let mut failed = lines.iter().map(|line| String::from_utf8(line.bytes.clone()).unwrap());
    clean(&failed.find(|line| line.contains("\"failed\"")).expect("a line that tells of it"));
}

/// Elsewhere "Check" showed nothing where nothing had changed. The history has no news then, and whoever clicked has an answer.
#[tokio::test]
async fn lesson_14_a_check_that_finds_nothing_new_answers_visibly() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.1.0"]);
    let mut last = None;
    for _ in 0..2 {
        let checked = world.engine.check(&alice()).await.unwrap().latest.checked_at;
        assert_eq!(checked, Some(world.clock.now()));
        assert!(checked > last, "the same answer as before");
        last = checked;
        world.later(15_000);
    }
    assert!(world.events().await.is_empty());
}

#[tokio::test]
async fn candidates_are_kept_for_15_seconds() {
    let world = World::of_remote().await;
    world.remote.offers(&["0.2.0"]);
    let looks = (0..8).map(|_| world.engine.candidates());
    for found in futures_util::future::join_all(looks).await {
        assert_eq!(found.unwrap().candidates.len(), 1);
    }
    world.later(14_999);
    world.engine.candidates().await.unwrap();
    assert_eq!(world.remote.asked(), 1, "a page that is reloaded asks nobody");
    world.later(1);
    world.engine.candidates().await.unwrap();
    assert_eq!(world.remote.asked(), 2);
}

#[tokio::test]
async fn an_override_of_the_quarantine_needs_a_reason() {
    let mut quarantined = record();
    let entry = Quarantined {
        version: "0.2.0".parse().unwrap(),
        reason: "probes fail".to_owned(),
        at: Millis(0),
        images: BTreeMap::new(),
    };
    quarantined.quarantine.insert(CommitSha::new(SHA).unwrap(), entry);
    let world = World::new(quarantined, Lacks, None).await;
    world.remote.offers(&["0.3.0", "0.2.0"]);
    // Under another tag it is the same commit.
    for version in ["0.2.0", "0.3.0"] {
        for (override_quarantine, reason, part) in [
            (false, Some("I know better"), "is quarantined since it failed: probes fail"),
            (true, None, "needs a reason"),
            (true, Some(" \n"), "needs a reason"),
        ] {
            let (target_version, reason) = (Some(version.to_owned()), reason.map(str::to_owned));
            let request = StartRequest { target_version, override_quarantine, reason, ..start() };
            let refused = world.engine.start(&alice(), request).await;
            assert!(matches!(&refused, Err(Refusal::Conflict(why)) if why.contains(part)), "{version}: {refused:?}");
        }
    }
    assert!(world.events().await.is_empty());
    let reason = Some("the disk was full".to_owned());
    world.engine.start(&alice(), StartRequest { override_quarantine: true, reason, ..start() }).await.unwrap();
    let events = world.events().await;
    let told = (&events[0]["event"], &events[0]["override"], &events[0]["reason"], &events[0]["actor"]["from"]);
    assert_eq!(told, (&"start".into(), &"quarantine".into(), &"the disk was full".into(), &"127.0.0.1".into()));
}
