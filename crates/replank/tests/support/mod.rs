//! A double of the engine and of the token store, and a real server on a loopback socket around them.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use replank::engine::api::*;
use replank::engine::planned::*;
use replank::http::{Http, Options, hash_secret};
use replank_core::history::{Audit, Line, seal};
use replank_core::image::{ImageId, Images};
use replank_core::phase::*;
use replank_core::ports::{Clock, EscapeHatch, LedgerError, LogChunk, Role, TagRef, Token, Tokens};
use replank_core::record::*;
use replank_core::words::*;
use tokio::sync::{Notify, watch};

pub const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
pub const ADMIN: &str = "rpk_admin";
pub const READER: &str = "rpk_reader";

pub fn name(text: &str) -> ComponentName {
    ComponentName::new(text).unwrap()
}

pub fn image(component: &str, digit: char) -> ImageId {
    let digest = Digest::new(format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
    ImageId::Manifest { repository: format!("registry.test/{component}"), digest }
}

pub fn deployment(version: &str, digit: char) -> Deployment {
    let job = JobId::new("job-0").unwrap();
    let nonce = Nonce::new("a".repeat(32)).unwrap();
    Deployment {
        revision: RevisionId::new(format!("r-{digit}")).unwrap(),
        key: OpKey::derive(&job, "deploy", 1, &nonce),
        version: version.parse().unwrap(),
        commit: CommitSha::new(SHA).unwrap(),
        images: Images::from([(name("api"), image("api", digit))]),
        plan: Plan::default(),
        reads_format: None,
    }
}

pub fn record() -> Record {
    let id = InstallationId::new("i".repeat(16)).unwrap();
    let mut record = Record::new(id, AppName::new("shop").unwrap(), Millis(1_700_000_000_000));
    record.running = Some(deployment("0.1.0", '1'));
    record.serving = record.running.clone();
    record
}

pub fn job(version: &str) -> Job {
    Job {
        id: JobId::new("job-1").unwrap(),
        target: Target {
            kind: TargetKind::Release,
            version: version.parse().unwrap(),
            commit: CommitSha::new(SHA).unwrap(),
            raw_ref: format!("refs/tags/v{version}"),
        },
        nonce: Nonce::new("b".repeat(32)).unwrap(),
        actor: Actor { oid: "token:1".into(), name: "alice".into(), from: "127.0.0.1".into() },
        reason: String::new(),
        idempotency_key: None,
        started_at: Millis(1_700_000_001_000),
        mode: Mode::BlueGreen,
        on_rollout_failure: OnRolloutFailure::Hold,
        build_only: false,
        reuse: None,
        accept_one_way: false,
        downgrade: None,
        data: Default::default(),
        reached: Default::default(),
        extra: BTreeMap::new(),
    }
}

/// An engine whose record is what a test puts there, and whose log grows when a test says so.
#[derive(Debug)]
pub struct Double {
    pub record: Mutex<Record>,
    pub live: watch::Sender<Live>,
    /// Given once to the next command instead of success.
    pub refuse: Mutex<Option<Refusal>>,
    /// No remote is configured.
    pub is_alone: AtomicBool,
    pub log: Mutex<(Option<Vec<u8>>, bool)>,
    pub grown: Notify,
    pub calls: Mutex<Vec<(String, Actor)>>,
}

impl Double {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            record: Mutex::new(record()),
            live: watch::Sender::new(Live::default()),
            refuse: Mutex::default(),
            is_alone: AtomicBool::new(false),
            log: Mutex::default(),
            grown: Notify::new(),
            calls: Mutex::default(),
        })
    }

    pub fn set(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record.lock().unwrap());
        self.live.send_modify(|live| live.seq += 1);
    }

    pub fn grow(&self, bytes: &[u8], closed: bool) {
        let mut log = self.log.lock().unwrap();
        log.0.get_or_insert_default().extend_from_slice(bytes);
        log.1 = closed;
        drop(log);
        self.grown.notify_waiters();
    }

    fn command(&self, what: &str, actor: &Actor) -> Result<Record, Refusal> {
        self.calls.lock().unwrap().push((what.to_owned(), actor.clone()));
        match self.refuse.lock().unwrap().take() {
            Some(refusal) => Err(refusal),
            None => Ok(self.record.lock().unwrap().clone()),
        }
    }

    fn look<T>(&self, value: T) -> Result<T, Refusal> {
        self.refuse.lock().unwrap().take().map_or(Ok(value), Err)
    }
}

#[async_trait]
impl Engine for Double {
    async fn record(&self) -> Result<Record, Refusal> {
        Ok(self.record.lock().unwrap().clone())
    }
    fn live(&self) -> watch::Receiver<Live> {
        self.live.subscribe()
    }
    async fn candidates(&self) -> Result<Candidates, Refusal> {
        let tag = |version: &str, refused: Option<&str>| TagRef {
            version: version.parse().unwrap(),
            raw_ref: format!("refs/tags/v{version}"),
            commit: CommitSha::new(SHA).unwrap(),
            tag_object: None,
            refused: refused.map(str::to_owned),
        };
        if self.is_alone.load(Ordering::SeqCst) {
            return self.look(Candidates {
                configured: false,
                remote: None,
                running_version: "0.1.0".into(),
                candidates: vec![],
                refused: vec![],
                commits_refused: None,
                error: None,
            });
        }
        self.look(Candidates {
            configured: true,
            remote: Some("https://user:pw@git.test/shop.git".into()),
            running_version: "0.1.0".into(),
            candidates: vec![tag("0.2.0", None)],
            refused: vec![tag("0.3.0", Some("the tag was moved"))],
            commits_refused: Some("only signed tags are accepted\u{1b}[2J".into()),
            error: None,
        })
    }
    async fn check(&self, actor: &Actor) -> Result<Record, Refusal> {
        self.command("check", actor)
    }
    async fn track_commits(&self, actor: &Actor, on: bool) -> Result<Record, Refusal> {
        self.record.lock().unwrap().track_commits = on;
        self.command("track_commits", actor)
    }
    async fn start(&self, actor: &Actor, request: StartRequest) -> Result<Record, Refusal> {
        let version = request.target_version.unwrap_or_else(|| "0.2.0".into());
        let started = self.command("start", actor)?;
        drop(started);
        self.set(|record| {
            record.job = Some(job(&version));
            record.phase = Phase::Queued;
        });
        self.record().await
    }
    async fn downgrade(&self, actor: &Actor, request: DowngradeRequest) -> Result<Record, Refusal> {
        self.command(&format!("downgrade {request:?}"), actor)
    }
    async fn plan(&self, request: PlanRequest) -> Result<UpgradePlan, Refusal> {
        let unknown = |_| None::<u64>;
        let refused = if request.accept_one_way { vec![] } else { vec!["it is one-way; accept it".to_owned()] };
        self.look(UpgradePlan {
            from_version: "0.1.0".into(),
            from_sha: SHA.into(),
            to_version: request.target_version.unwrap_or_else(|| "0.2.0".into()),
            to_sha: SHA.into(),
            build_only: request.build_only,
            mode: "blue_green".into(),
            confirm_window_seconds: 300,
            on_failure: vec!["before the swap nothing that runs is touched".into()],
            refused,
            unknown: String::new(),
            images: vec![],
            steps: vec![],
            containers: vec![],
            downtime: Downtime { containers: vec!["worker".into()], p50_ms: unknown(()), p90_ms: None },
            commits: Commits { list: vec![], more: false, unknown: "the remote is away".into() },
            notes: "new\u{202e}\nlook".into(),
            changes: vec![],
            more_changes: 0,
            data: Data {
                steps: vec![],
                schema: "one-way".into(),
                closes: "it is one-way".into(),
                rollback: "a backup".into(),
            },
            checks: vec![],
            prediction: Prediction { jobs: 0, phases: vec![], total_p50_ms: None, total_p90_ms: None },
        })
    }
    async fn rollback(&self, actor: &Actor, reason: &str, data_restored: bool) -> Result<Record, Refusal> {
        let restored = if data_restored { " of restored data" } else { "" };
        self.command(&format!("rollback{restored} {reason}"), actor)
    }
    async fn cancel(&self, actor: &Actor, _: &str) -> Result<Record, Refusal> {
        self.command("cancel", actor)
    }
    async fn keep(&self, actor: &Actor, reason: &str) -> Result<Record, Refusal> {
        self.command(&format!("keep {reason}"), actor)
    }
    async fn reset(&self, actor: &Actor, _: &str) -> Result<Record, Refusal> {
        self.command("reset", actor)
    }
    async fn lift_quarantine(&self, actor: &Actor, which: &str, reason: &str) -> Result<Record, Refusal> {
        self.command(&format!("lift {which} {reason}"), actor)
    }
    async fn accept_moved_tag(&self, actor: &Actor, tag: MovedTag, reason: &str) -> Result<Record, Refusal> {
        self.command(&format!("accept {} at {} {reason}", tag.version, tag.commit), actor)
    }
    async fn accept_drift(&self, actor: &Actor, what: &[String], reason: &str) -> Result<Record, Refusal> {
        self.command(&format!("accept {} {reason}", what.join("; ")), actor)
    }
    async fn preflight(&self) -> Result<Preflight, Refusal> {
        let images = vec![PreflightImage { image_ref: "a@b".into(), exists: true, created_on: None, error: None }];
        self.look(Preflight { available: true, reason: String::new(), images, closed: None })
    }
    async fn escape_hatch(&self) -> Result<EscapeHatch, Refusal> {
        self.look(EscapeHatch { commands: vec!["docker start x".into()], facts: BTreeMap::new() })
    }
    fn components(&self) -> Vec<ComponentName> {
        vec![name("api"), name("web")]
    }
    async fn read_log(&self, job: &JobId, _: &ComponentName, from: u64, max: usize) -> Result<LogRead, Refusal> {
        if job.as_str() != "job-1" {
            return Ok(LogRead::Unknown);
        }
        let log = self.log.lock().unwrap();
        let Some(bytes) = &log.0 else {
            return Ok(LogRead::NotBegun);
        };
        let from = (from as usize).min(bytes.len());
        let end = (from + max).min(bytes.len());
        let closed = log.1 && end == bytes.len();
        Ok(LogRead::Chunk(LogChunk { bytes: bytes[from..end].to_vec(), next: end as u64, closed }))
    }
    async fn log_changed(&self, _: &JobId, _: &ComponentName, _: u64) {
        // The port's own patience; shorter, since a wake-up may be missed between a read and this.
        let patience = std::time::Duration::from_millis(50);
        drop(tokio::time::timeout(patience, self.grown.notified()).await);
    }
    async fn history(&self, limit: usize) -> Result<Vec<Line>, Refusal> {
        let events: Vec<Audit> = (0..3).map(|i| Audit::new(Millis(i), None, "start").with("n", i)).collect();
        let (lines, _) = seal(&Head::default(), &events);
        self.look(lines[lines.len().saturating_sub(limit)..].to_vec())
    }
    async fn ready(&self) -> Result<(), Refusal> {
        self.look(())
    }
}

#[derive(Debug, Default)]
pub struct MemoryTokens {
    pub all: Mutex<Vec<Token>>,
    pub refused: Mutex<Vec<replank_core::ports::Refusal>>,
}

#[async_trait]
impl Tokens for MemoryTokens {
    async fn add(&self, token: &Token) -> Result<(), LedgerError> {
        let mut all = self.all.lock().unwrap();
        if all.iter().any(|t| t.name == token.name && t.revoked_at.is_none()) {
            return Err(LedgerError::Conflict);
        }
        all.push(token.clone());
        Ok(())
    }
    async fn by_hash(&self, hash: &Digest) -> Result<Option<Token>, LedgerError> {
        Ok(self.all.lock().unwrap().iter().find(|t| t.hash == *hash).cloned())
    }
    async fn list(&self) -> Result<Vec<Token>, LedgerError> {
        Ok(self.all.lock().unwrap().clone())
    }
    async fn revoke(&self, name: &str, at: Millis) -> Result<bool, LedgerError> {
        let mut all = self.all.lock().unwrap();
        let found = all.iter_mut().find(|t| t.name == name && t.revoked_at.is_none());
        Ok(found.map(|t| t.revoked_at = Some(at)).is_some())
    }
    async fn used(&self, id: &str, at: Millis) -> Result<(), LedgerError> {
        let mut all = self.all.lock().unwrap();
        all.iter_mut().filter(|t| t.id == id).for_each(|t| t.last_used_at = Some(at));
        Ok(())
    }
    async fn refused(&self, refusal: &replank_core::ports::Refusal) -> Result<(), LedgerError> {
        self.refused.lock().unwrap().push(refusal.clone());
        Ok(())
    }
    async fn refusals(&self, _: usize) -> Result<Vec<replank_core::ports::Refusal>, LedgerError> {
        Ok(self.refused.lock().unwrap().clone())
    }
}

#[derive(Debug)]
pub struct Hand(pub AtomicI64);

impl Clock for Hand {
    fn now(&self) -> Millis {
        Millis(self.0.load(Ordering::SeqCst))
    }
}

pub struct Server {
    pub address: SocketAddr,
    pub engine: Arc<Double>,
    pub tokens: Arc<MemoryTokens>,
    pub clock: Arc<Hand>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    pub task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub async fn start(options: Options) -> Self {
        let (engine, tokens) = (Double::new(), Arc::new(MemoryTokens::default()));
        let clock = Arc::new(Hand(AtomicI64::new(1_700_000_100_000)));
        for (secret, role) in [(ADMIN, Role::Admin), (READER, Role::Reader)] {
            let token = Token {
                id: format!("token:{secret}"),
                name: secret.to_owned(),
                role,
                hash: hash_secret(secret),
                created_at: Millis(0),
                expires_at: None,
                revoked_at: None,
                last_used_at: None,
            };
            tokens.add(&token).await.unwrap();
        }
        let app = Http::new(engine.clone(), tokens.clone(), clock.clone(), options);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(replank::http::serve(listener, app, async {
            drop(stopped.await);
        }));
        Self { address, engine, tokens, clock, stop: Some(stop), task }
    }

    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}
