//! Webhooks against real receivers on loopback: ones that verify signatures, fail, redirect, hang, and are not to be reached.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use replank::engine::api::Live;
use replank::webhooks::{Courier, Event, Hook, Pace, Secret};
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::Store;
use replank_core::event::Event as Happened;
use replank_core::fault::Told;
use replank_core::history::{Audit, seal};
use replank_core::phase::*;
use replank_core::ports::Ledger as _;
use replank_core::record::{ControllerId, Record, Snapshot};
use replank_core::transition::apply;
use replank_core::words::*;
use replank_exec::outbound::{Reach, Resolver, SystemResolver};
use serde_json::Value;
use support::{Hand, deployment, job, record};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const KEY: [u8; 32] = [7; 32];
const T: i64 = 1_700_000_000_000;
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
enum Answer {
    Say(u16),
    Redirect,
    Hang,
}

#[derive(Debug, Clone)]
struct Got {
    path: String,
    id: String,
    body: Value,
}

/// Answers as a case says, then 200. Every request's signature is verified, by the specification's words and not by ours.
#[derive(Debug, Clone, Default)]
struct Receiver {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    got: Arc<Mutex<Vec<Got>>>,
}

impl Receiver {
    async fn start(answers: &[Answer]) -> (Self, SocketAddr) {
        let receiver = Self { answers: Arc::new(Mutex::new(answers.iter().copied().collect())), got: Arc::default() };
        let take = |State(this): State<Self>, uri: Uri, headers: HeaderMap, body: Bytes| async move {
            let header = |name: &str| headers[name].to_str().unwrap().to_owned();
            let (id, time) = (header("webhook-id"), header("webhook-timestamp"));
            let signed = [id.as_bytes(), b".", time.as_bytes(), b".", &body].concat();
            let (version, signature) =
                header("webhook-signature").split_once(',').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
            assert_eq!(version, "v1");
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &KEY);
            ring::hmac::verify(&key, &signed, &STANDARD.decode(signature).unwrap()).unwrap();
            assert_eq!(header("content-type"), "application/json");
            let body = serde_json::from_slice(&body).unwrap();
            this.got.lock().unwrap().push(Got { path: uri.path().to_owned(), id, body });
            let answer = this.answers.lock().unwrap().pop_front();
            match answer {
                None => StatusCode::OK.into_response(),
                Some(Answer::Say(status)) => StatusCode::from_u16(status).unwrap().into_response(),
                Some(Answer::Redirect) => (StatusCode::FOUND, [(header::LOCATION, "/elsewhere")]).into_response(),
                Some(Answer::Hang) => std::future::pending::<Response>().await,
            }
        };
        let router = axum::Router::new().fallback(take).with_state(receiver.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (receiver, address)
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }

    async fn wait_for(&self, count: usize) -> Vec<Got> {
        let begun = Instant::now();
        while self.got().len() < count {
            assert!(begun.elapsed() < PATIENCE, "only {:?}", self.got());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // What should not come gets its chance.
        tokio::time::sleep(Duration::from_millis(400)).await;
        self.got()
    }
}

fn hook(url: &str, events: &[Event]) -> Hook {
    Hook {
        url: url.parse().unwrap(),
        secret: Secret::parse(&format!("whsec_{}", STANDARD.encode(KEY))).unwrap(),
        events: events.iter().copied().collect(),
        reach: Reach { loopback: true, private: false },
    }
}

fn all(address: SocketAddr) -> Hook {
    hook(&format!("http://{address}/hook?token=x"), &Event::ALL)
}

struct World {
    ledger: Arc<SqliteLedger>,
    clock: Arc<Hand>,
    live: watch::Sender<Live>,
    resolver: Arc<dyn Resolver>,
}

impl World {
    async fn open(directory: &Path) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let store = Store::open(directory).await.unwrap();
        let ledger = Arc::new(SqliteLedger::new(store, AppName::new("shop").unwrap()));
        if ledger.load().await.unwrap().is_none() {
            ledger.commit(None, &record(), &[]).await.unwrap();
        }
        let clock = Arc::new(Hand(AtomicI64::new(T)));
        Self { ledger, clock, live: watch::Sender::new(Live::default()), resolver: Arc::new(SystemResolver) }
    }

    /// Begins to deliver, and waits until each hook has its cursor.
    async fn deliver(&self, hooks: Vec<Hook>, me: ControllerId) -> JoinHandle<()> {
        let courier = Courier {
            ledger: self.ledger.clone(),
            cursors: self.ledger.clone(),
            clock: self.clock.clone(),
            resolver: self.resolver.clone(),
            me,
            live: self.live.subscribe(),
            pace: Pace {
                attempt: Duration::from_millis(300),
                first: Duration::from_millis(20),
                longest: Duration::from_millis(50),
                poll: Duration::from_millis(30),
                ..Pace::default()
            },
        };
        let running = tokio::spawn(courier.run(hooks));
        tokio::time::sleep(Duration::from_millis(300)).await;
        running
    }

    async fn happens(&self, event: Happened) -> Record {
        let (record, etag) = self.ledger.load().await.unwrap().unwrap();
        let commit = apply(&record, &event, Millis(T + 1_000)).unwrap();
        self.ledger.commit(Some(&etag), &commit.record, &commit.lines).await.unwrap();
        self.live.send_modify(|live| live.seq += 1);
        commit.record
    }

    /// A line as a transition writes it, on a record that a case changes by hand.
    async fn written(&self, line: Audit, change: impl FnOnce(&mut Record)) {
        let (record, etag) = self.ledger.load().await.unwrap().unwrap();
        let mut record = Record::clone(&record);
        change(&mut record);
        let (lines, head) = seal(&record.history, &[line]);
        record.history = head;
        self.ledger.commit(Some(&etag), &record, &lines).await.unwrap();
        self.live.send_modify(|live| live.seq += 1);
    }

    async fn fails(&self, version: &str) -> Record {
        self.happens(Happened::Start { job: Box::new(job(version)), override_quarantine: true }).await;
        self.happens(Happened::Claimed).await;
        self.happens(Happened::Failed { fault: Told::permanent("the clone failed", "mend the remote") }).await
    }
}

fn names(got: &[Got]) -> Vec<&str> {
    got.iter().map(|got| got.body["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn what_happened_is_told_signed_until_it_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    let (receiver, address) =
        Receiver::start(&[Answer::Say(500), Answer::Redirect, Answer::Hang, Answer::Say(429)]).await;
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    let record = world.fails("0.2.0").await;
    let got = receiver.wait_for(5).await;
    assert_eq!(names(&got), ["failed_pre"; 5], "five attempts at one message, and then no more");
    assert!(got.iter().all(|got| got.path == "/hook"), "a redirect was followed");
    assert_eq!(got.iter().map(|got| &got.id).collect::<BTreeSet<_>>().len(), 1, "a repetition is known by its id");
    let data = &got[4].body["data"];
    assert_eq!(data["history"], serde_json::to_value(&record.history).unwrap(), "an anchor of the history");
    assert_eq!(data["versions"], serde_json::json!({ "from": "0.1.0", "target": "0.2.0" }));
    assert_eq!(data["job"], serde_json::json!({ "id": "job-1", "started_by": "alice" }));
    assert_eq!(
        (&data["why"], &data["state"], &data["application"]),
        (&"the clone failed".into(), &"failed_pre".into(), &"shop".into())
    );
    assert_eq!(data["cause"], "failed");
    assert_eq!(got[4].body["timestamp"], Millis(T + 1_000).rfc3339());
    running.abort();
}

#[tokio::test]
async fn a_restart_loses_nothing_and_repeats_nothing_that_was_taken() {
    let directory = tempfile::tempdir().unwrap();
    let (receiver, address) = Receiver::start(&[]).await;
    {
        let world = World::open(directory.path()).await;
        let running = world.deliver(vec![all(address)], ControllerId::Host).await;
        world.fails("0.2.0").await;
        assert_eq!(names(&receiver.wait_for(1).await), ["failed_pre"]);
        running.abort();
        // Nobody is there to tell these.
        world.fails("0.3.0").await;
        world.written(Audit::new(Millis(T), None, "snapshot_dropped").with("why", "its time is over"), |_| {}).await;
    }
    // The receiver is away when the successor begins.
    receiver.answers.lock().unwrap().extend([Answer::Say(503); 2]);
    let world = World::open(directory.path()).await;
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    let got = receiver.wait_for(5).await;
    assert_eq!(names(&got), ["failed_pre", "failed_pre", "failed_pre", "failed_pre", "way_back_lost"]);
    assert_eq!(got[3].body["data"]["versions"]["target"], "0.3.0");
    assert_ne!(got[0].id, got[3].id);
    assert_eq!(got[4].body["data"]["why"], "its time is over");
    running.abort();
}

#[tokio::test]
async fn one_that_hangs_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    let (slow, slow_at) = Receiver::start(&[Answer::Hang; 1_000]).await;
    let (quick, quick_at) = Receiver::start(&[]).await;
    let running = world.deliver(vec![all(slow_at), all(quick_at)], ControllerId::Host).await;
    let begun = Instant::now();
    world.fails("0.2.0").await;
    assert!(begun.elapsed() < Duration::from_secs(2), "who records waits for nobody");
    quick.wait_for(1).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(!slow.got().is_empty());
    running.abort();
}

#[tokio::test]
async fn only_the_driver_tells_and_only_what_is_wanted_from_now_on() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    world.fails("0.2.0").await;
    let (receiver, address) = Receiver::start(&[]).await;
    let other = ControllerId::Revision(RevisionId::new("r-9").unwrap());
    let watching = world.deliver(vec![all(address)], other).await;
    let wanted = hook(&format!("http://{address}/some"), &[Event::Held, Event::RolledBack]);
    let driving = world.deliver(vec![all(address), wanted], ControllerId::Host).await;
    let line = |event: &str, state: &str| Audit::new(Millis(T), None, event).with("state", state);
    world.written(line("failed", "failed_rollout").with("held", true), |_| {}).await;
    world.written(line("token_changed", "idle"), |_| {}).await;
    world.written(line("rollback_done", "rolled_back"), |_| {}).await;
    let got = receiver.wait_for(5).await;
    let of = |path: &str| got.iter().filter(|g| g.path == path).cloned().collect::<Vec<_>>();
    assert_eq!(names(&of("/hook")), ["failed_rollout", "held", "rolled_back"], "nothing of the time before");
    assert_eq!(names(&of("/some")), ["held", "rolled_back"]);
    watching.abort();
    driving.abort();
}

#[tokio::test]
async fn a_confirm_window_s_end_is_told_once_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let (receiver, address) = Receiver::start(&[]).await;
    let world = World::open(directory.path()).await;
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    let snapshot = Snapshot {
        deployment: deployment("0.1.0", '1'),
        taken_at: Millis(0),
        keep_until: Millis(T + 1_000_000),
        proved_at: Millis(0),
        lost: None,
        closed: None,
        extra: BTreeMap::new(),
    };
    let way_back = WayBack::Snapshot(Box::new(snapshot));
    let swap = Swap::new(Some(deployment("0.1.0", '1')), deployment("0.2.0", '2'), Mode::BlueGreen, way_back);
    let deadline = Some(Millis(T + 300_000));
    world
        .written(Audit::new(Millis(T), None, "converged"), |record| {
            record.job = Some(job("0.2.0"));
            record.entered_at = Millis(T);
            record.phase = Phase::Confirming(Confirming { swap, deadline, flip: None });
        })
        .await;
    world.clock.0.store(T + 239_000, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(receiver.got().is_empty(), "too early");
    world.clock.0.store(T + 241_000, Ordering::SeqCst);
    let got = receiver.wait_for(1).await;
    assert_eq!(names(&got), ["confirm_window_closing"]);
    let data = &got[0].body["data"];
    assert_eq!(data["confirm_deadline"], Millis(T + 300_000).rfc3339());
    assert_eq!((&data["versions"]["target"], &data["job"]["id"]), (&"0.2.0".into(), &"job-1".into()));
    assert!(data["history"]["hash"].is_string());
    running.abort();
    drop(world);
    let world = World::open(directory.path()).await;
    world.clock.0.store(T + 250_000, Ordering::SeqCst);
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    assert_eq!(receiver.wait_for(1).await.len(), 1, "once, also after a restart");
    running.abort();
}

/// A name service that an attacker runs.
#[derive(Debug)]
struct Lying {
    answers: Vec<SocketAddr>,
    asked: AtomicU32,
}

#[async_trait]
impl Resolver for Lying {
    async fn resolve(&self, _: &str, _: u16) -> std::io::Result<Vec<SocketAddr>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Ok(self.answers.clone())
    }
}

#[tokio::test]
async fn a_name_that_leads_inside_is_never_connected_to() {
    let directory = tempfile::tempdir().unwrap();
    let mut world = World::open(directory.path()).await;
    let (receiver, address) = Receiver::start(&[]).await;
    let public: SocketAddr = "140.82.121.4:443".parse().unwrap();
    for (answers, reach, url, expect) in [
        (vec![address], Reach::default(), format!("https://hooks.test:{}/a", address.port()), 0),
        (vec![public, address], Reach::default(), format!("https://hooks.test:{}/b", address.port()), 0),
        (
            vec!["169.254.169.254:80".parse().unwrap()],
            Reach { loopback: true, private: true },
            "http://hooks.test/c".to_owned(),
            0,
        ),
        (vec![public], Reach { loopback: true, private: false }, "http://hooks.test/d".to_owned(), 0),
        (vec![], Reach::default(), "https://metadata.google.internal/e".to_owned(), 0),
        // What was judged is what is connected to: the name exists nowhere else.
        (vec![address], Reach { loopback: true, private: false }, format!("http://hooks.test:{}/f", address.port()), 1),
    ] {
        receiver.got.lock().unwrap().clear();
        let lying = Arc::new(Lying { answers, asked: AtomicU32::new(0) });
        world.resolver = lying.clone();
        let hook = Hook { reach, ..hook(&url, &Event::ALL) };
        let running = world.deliver(vec![hook], ControllerId::Host).await;
        world.fails("0.2.0").await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(receiver.got().len(), expect, "{url}");
        let asked = lying.asked.load(Ordering::SeqCst);
        assert!(
            if expect == 1 { asked == 1 } else { url.contains("metadata") == (asked == 0) },
            "{url}: asked {asked} times"
        );
        running.abort();
    }
}

#[tokio::test]
async fn one_that_is_gone_and_what_is_too_old_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    let (receiver, address) = Receiver::start(&[Answer::Say(410)]).await;
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    world.fails("0.2.0").await;
    assert_eq!(receiver.wait_for(1).await.len(), 1, "410 is taken at its word");
    receiver.answers.lock().unwrap().extend([Answer::Say(500); 1_000]);
    world.fails("0.3.0").await;
    receiver.wait_for(4).await;
    // A day later.
    world.clock.0.fetch_add(25 * 3_600 * 1_000, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let tries = receiver.wait_for(4).await.len();
    assert_eq!(receiver.wait_for(4).await.len(), tries, "it is still tried");
    running.abort();
}

#[tokio::test]
async fn an_answer_without_end_is_not_read() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, sent) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (count, mebibytes) = (asked.clone(), sent.clone());
    let (ended, end) = tokio::sync::oneshot::channel();
    let receiver = tokio::spawn(async move {
        let mut ended = Some(ended);
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            let mut request = [0; 16 * 1024];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
            let chunk = [b"100000\r\n".as_slice(), &vec![b'x'; 1 << 20], b"\r\n"].concat();
            // As long as somebody takes it.
            while stream.write_all(&chunk).await.is_ok() {
                mebibytes.fetch_add(1, Ordering::SeqCst);
            }
            if let Some(ended) = ended.take() {
                ended.send(()).ok();
            }
        }
    });
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    world.fails("0.2.0").await;
    tokio::time::timeout(PATIENCE, end).await.expect("the connection is closed").unwrap();
    // A second message: the first one counts as told, and is not repeated.
    world.fails("0.3.0").await;
    let begun = Instant::now();
    while asked.load(Ordering::SeqCst) < 2 {
        assert!(begun.elapsed() < PATIENCE, "the second one was not told");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(asked.load(Ordering::SeqCst), 2, "one that was taken was told again");
    // What the sockets' buffers hold, and no more.
    assert!(sent.load(Ordering::SeqCst) <= 32, "{} MiB were read", sent.load(Ordering::SeqCst));
    running.abort();
    receiver.abort();
}

/// Receivers show it in chats and on boards: nothing of a reason or of a failure steers those.
#[tokio::test]
async fn what_is_told_steers_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::open(directory.path()).await;
    let (receiver, address) = Receiver::start(&[]).await;
    let running = world.deliver(vec![all(address)], ControllerId::Host).await;
    let tricks = "see \u{1b}]8;;http://evil.test\u{7}this\r\nall is well \u{202e}\u{2066}v1\u{200b}.0 token=abcdef";
    let line = Audit::new(Millis(T), None, "failed")
        .with("state", "failed_pre")
        .with("why", tricks)
        .with("reason", tricks)
        .with("actor", serde_json::json!({ "name": tricks }));
    world.written(line, |_| {}).await;
    let got = receiver.wait_for(1).await;
    let data = &got[0].body["data"];
    let expect = "see ␛]8;;http://evil.test␇this all is well \\u{202e}\\u{2066}v1\\u{200b}.0 token=***";
    assert_eq!((&data["why"], &data["reason"], &data["by"]), (&expect.into(), &expect.into(), &expect.into()));
    running.abort();
}
