//! Numbers and spans as those who take them see them: a scraper, and a collector that reads OTLP.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use replank::http::Options;
use replank::telemetry::{Telemetry, Watched};
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::Store;
use replank_core::decide::{Outcome, TaskId};
use replank_core::event::Event;
use replank_core::fault::{Fault, Told};
use replank_core::ports::{Etag, Ledger, LedgerError};
use replank_core::record::Record;
use replank_core::transition::apply;
use replank_core::words::*;
use support::*;

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).rsplit(' ').next().unwrap().parse().unwrap()
}

async fn get(url: &str, token: Option<&str>) -> reqwest::Response {
    drop(rustls::crypto::ring::default_provider().install_default());
    let client = reqwest::Client::builder().tls_certs_only([]).no_proxy().build().unwrap();
    let request = client.get(url);
    token.map_or(request.try_clone().unwrap(), |token| request.bearer_auth(token)).send().await.unwrap()
}

#[tokio::test]
async fn numbers_are_for_those_who_may_look_and_their_series_are_few() {
    let server = Server::start(Options::default()).await;
    let url = |path: &str| format!("{}{path}", server.url());
    assert_eq!(get(&url("/metrics"), None).await.status(), 401);
    assert_eq!(get(&url("/metrics"), Some("rpk_wrong")).await.status(), 401);
    for path in
        ["/api/upgrade/status", "/api/upgrade/jobs/job-1/build-log/api", "/api/upgrade/jobs/job-2/build-log/api"]
    {
        get(&url(path), Some(ADMIN)).await;
    }
    for made_up in 0..50 {
        get(&url(&format!("/made/up/{made_up}")), None).await;
        get(&url(&format!("/api/upgrade/jobs/job-{made_up}/build-log/api")), None).await;
    }
    server.engine.set(|record| record.latest.checked_at = Some(Millis(1_700_000_040_000)));
    let answer = get(&url("/metrics"), Some(READER)).await;
    assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = answer.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"));
    for (series, expect) in [
        ("replank_http_requests_total{method=\"GET\",route=\"/api/upgrade/status\",status=\"200\"}", 1.0),
        (
            "replank_http_requests_total{method=\"GET\",route=\"/api/upgrade/jobs/{job_id}/build-log/{component}\",status=\"200\"}",
            1.0,
        ),
        ("replank_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"}", 50.0),
        ("replank_http_requests_total{method=\"GET\",route=\"/metrics\",status=\"401\"}", 2.0),
        ("replank_state{state=\"idle\"}", 1.0),
        ("replank_state{state=\"building\"}", 0.0),
        ("replank_jobs_total{state=\"succeeded\"}", 0.0),
        ("replank_builds_total{result=\"failed\"}", 0.0),
        ("replank_ledger_up", 1.0),
        ("replank_last_check_age_seconds", 60.0),
    ] {
        assert_eq!(value(&text, series), expect, "{series}");
    }
    assert!(text.lines().count() < 100, "{text}");
    assert!(!text.contains("made") && !text.contains("job-1"), "a client's words made a series");

    let open = Server::start(Options { metrics_are_public: true, ..Options::default() }).await;
    assert_eq!(get(&format!("{}/metrics", open.url()), None).await.status(), 200);
    assert_eq!(get(&format!("{}/api/upgrade/status", open.url()), None).await.status(), 401, "nothing else is open");
}

/// A collector that keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collector {
    async fn start(&self) -> String {
        let take = |State(Self(all)): State<Self>, uri: Uri, headers: HeaderMap, body: Bytes| async move {
            assert_eq!(
                (uri.path(), &headers["content-type"]),
                ("/v1/traces", &"application/x-protobuf".parse().unwrap())
            );
            all.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
            StatusCode::OK
        };
        let router = axum::Router::new().fallback(take).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}/v1/traces")
    }

    fn spans(&self) -> Vec<Span> {
        let all = self.0.lock().unwrap();
        let scopes = all.iter().flat_map(|request| &request.resource_spans).flat_map(|r| &r.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }
}

async fn step(ledger: &dyn Ledger, event: Event, at: i64) -> (Record, Etag) {
    let (record, etag) = ledger.load().await.unwrap().unwrap();
    let commit = apply(&record, &event, Millis(at)).unwrap();
    let etag = ledger.commit(Some(&etag), &commit.record, &commit.lines).await.unwrap();
    (commit.record, etag)
}

fn failed(what: &str) -> Event {
    Event::Failed { fault: Told::permanent(what, "mend it") }
}

#[tokio::test]
async fn a_job_is_counted_once_and_becomes_one_trace() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let telemetry = Arc::new(Telemetry::new(Some(&endpoint)).unwrap());
    let store = Store::open(directory.path()).await.unwrap();
    let real = Arc::new(SqliteLedger::new(store, AppName::new("shop").unwrap()));
    // Two controllers on one ledger; only the first makes the commits.
    let (acts, other) = (Watched::new(real.clone(), telemetry.clone()), Arc::new(Telemetry::default()));
    let watches = Watched::new(real, other.clone());

    let t = 1_700_000_000_000;
    acts.commit(None, &record(), &[]).await.unwrap();
    let start = Event::Start { job: Box::new(job("0.2.0")), override_quarantine: false };
    step(&acts, start, t + 1_000).await;
    let (fetching, stale) = step(&acts, Event::Claimed, t + 3_000).await;
    watches.load().await.unwrap();
    let task = TaskId { job: "job-1".to_owned(), step: "fetch".to_owned(), attempt: 1 };
    let fault: Result<Outcome, Fault> = Err(Fault::transient("the remote is away"));
    telemetry.step(&fetching, &task, Millis(t + 3_500), Millis(t + 4_000), &fault);
    let task = TaskId { step: "build-api".to_owned(), ..task };
    telemetry.step(&fetching, &task, Millis(t + 4_000), Millis(t + 5_000), &fault);
    let (ended, _) = step(&acts, failed("the remote is away"), t + 10_000).await;
    let lost = acts.commit(Some(&stale), &ended, &[]).await;
    assert!(matches!(lost, Err(LedgerError::Conflict)));
    watches.load().await.unwrap();

    let text = telemetry.scrape(Some(&ended), Millis(t));
    for (series, expect) in [
        ("replank_jobs_total{state=\"failed_pre\"}", 1.0),
        ("replank_phase_duration_seconds_sum{phase=\"queued\"}", 2.0),
        ("replank_phase_duration_seconds_sum{phase=\"fetching\"}", 7.0),
        ("replank_ledger_commit_seconds_count{result=\"committed\"}", 4.0),
        ("replank_ledger_commit_seconds_count{result=\"conflict\"}", 1.0),
        ("replank_builds_total{result=\"failed\"}", 1.0),
        ("replank_state{state=\"failed_pre\"}", 1.0),
    ] {
        assert_eq!(value(&text, series), expect, "{series}");
    }
    assert_eq!(value(&other.scrape(None, Millis(t)), "replank_jobs_total{state=\"failed_pre\"}"), 0.0, "counted twice");

    telemetry.close().await;
    let spans = collector.spans();
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["queued", "fetch", "build-api", "fetching", "upgrade"]);
    let [queued, fetch, _, fetching, root] = spans.as_slice() else { panic!("{names:?}") };
    assert!(spans.iter().all(|span| span.trace_id == root.trace_id && span.trace_id != vec![0; 16]));
    assert_eq!((&queued.parent_span_id, &fetching.parent_span_id), (&root.span_id, &root.span_id));
    assert_eq!(fetch.parent_span_id, fetching.span_id, "a step belongs to its phase, which ends after it");
    assert!(root.parent_span_id.is_empty() || root.parent_span_id == vec![0; 8]);
    let nanos = |at: i64| u64::try_from(at).unwrap() * 1_000_000;
    assert_eq!((root.start_time_unix_nano, root.end_time_unix_nano), (nanos(t + 1_000), nanos(t + 10_000)));
    let code = |span: &Span| span.status.as_ref().map(|status| status.code);
    assert_eq!((code(queued), code(fetch), code(root)), (Some(1), Some(2), Some(2)));
    let whole = format!("{spans:?}");
    assert!(whole.contains("job-1") && !whole.contains(&"b".repeat(32)), "the job's nonce is a secret");
}

#[tokio::test]
async fn a_collector_that_is_away_costs_nothing() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let telemetry = Telemetry::new(Some("http://127.0.0.1:9/v1/traces")).unwrap();
    let mut record = record();
    record.job = Some(job("0.2.0"));
    record.phase = replank_core::phase::Phase::Fetching;
    let task = TaskId { job: "job-1".to_owned(), step: "fetch".to_owned(), attempt: 1 };
    let fault: Result<Outcome, Fault> = Err(Fault::transient("x"));
    let begun = std::time::Instant::now();
    for at in 0..10_000 {
        telemetry.step(&record, &task, Millis(at), Millis(at + 1), &fault);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    tokio::time::timeout(Duration::from_secs(10), telemetry.close()).await.unwrap();
}
