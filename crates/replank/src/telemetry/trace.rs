//! Spans over OTLP: each job is a trace of phases and steps. Ids are derived from the job, so that the controllers of one upgrade,
//! and a successor after a crash, add to the same trace without having spoken to each other.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use replank_core::decide::TaskId;
use replank_core::fault::Fault;
use replank_core::phase::State;
use replank_core::record::{Job, Record};
use replank_core::words::{Digest, Millis};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Left;

/// Spans that wait while the collector is away; a whole job has some dozens. What comes beyond is dropped.
const QUEUE: usize = 1_024;
const BATCH: usize = 256;
/// How long a span waits for others to be sent with.
const GATHER: Duration = Duration::from_secs(2);
const SEND_MAX: Duration = Duration::from_secs(10);
/// At the end of the process.
const CLOSE_MAX: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub struct Traces {
    queue: mpsc::Sender<SpanData>,
    stop: CancellationToken,
    sending: Mutex<Option<JoinHandle<()>>>,
}

struct Shape {
    id: SpanId,
    parent: Option<SpanId>,
    name: String,
    from: Millis,
    to: Millis,
    status: Status,
    attributes: Vec<KeyValue>,
}

impl Traces {
    /// Begins to send; needs a runtime.
    pub fn start(endpoint: &str) -> anyhow::Result<Self> {
        let mut client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(SEND_MAX)
            .user_agent(concat!("replank/", env!("CARGO_PKG_VERSION")));
        if endpoint.starts_with("http://") {
            // No certificates are needed, and a small image has none to load.
            client = client.tls_certs_only([]);
        }
        let client = client.build().context("no HTTP client could be made for telemetry.otlp_endpoint")?;
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(SEND_MAX)
            .with_endpoint(endpoint)
            .build()
            .context("telemetry.otlp_endpoint cannot be used")?;
        let resource = Resource::builder()
            .with_service_name("replank")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        exporter.set_resource(&resource);
        let (queue, waiting) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let sending = tokio::spawn(send(exporter, waiting, stop.clone()));
        Ok(Self { queue, stop, sending: Mutex::new(Some(sending)) })
    }

    pub async fn close(&self) {
        self.stop.cancel();
        if let Some(sending) = self.sending.lock().await.take()
            && tokio::time::timeout(CLOSE_MAX, sending).await.is_err()
        {
            tracing::warn!("the last spans were not sent in time");
        }
    }

    /// A phase that was left.
    pub fn phase(&self, left: Left, record: &Record) {
        let Some(job) = &record.job else { return };
        let id = phase_id(job, left.state, left.entered_at);
        let is_rollback = left.state == State::RollingBack;
        let shape = Shape {
            id,
            parent: (!is_rollback).then(|| root_id(job)),
            name: left.state.name().to_owned(),
            from: left.entered_at,
            to: record.updated_at,
            status: status_of(record.phase.state()),
            attributes: vec![KeyValue::new("replank.next_state", record.phase.state().name())],
        };
        self.put(job, shape, record);
    }

    /// A job that has ended, or that is being rolled back.
    pub fn job(&self, record: &Record) {
        let Some(job) = &record.job else { return };
        let shape = Shape {
            id: root_id(job),
            parent: None,
            name: "upgrade".to_owned(),
            from: job.started_at,
            to: record.updated_at,
            status: status_of(record.phase.state()),
            attributes: vec![
                KeyValue::new("replank.state", record.phase.state().name()),
                KeyValue::new("replank.build_only", job.build_only),
            ],
        };
        self.put(job, shape, record);
    }

    pub fn step(&self, record: &Record, task: &TaskId, from: Millis, to: Millis, fault: Option<&Fault>) {
        // What is done at rest belongs to no job's story.
        let Some(job) = record.job.as_ref().filter(|_| record.phase.state().in_flight()) else { return };
        let status = match fault {
            None => Status::Ok,
            Some(fault) => Status::error(fault.told().sentence()),
        };
        let shape = Shape {
            id: span_id(job, &["step", &task.step, &from.0.to_string()]),
            parent: Some(phase_id(job, record.phase.state(), record.entered_at)),
            name: task.step.clone(),
            from,
            to,
            status,
            attributes: Vec::new(),
        };
        self.put(job, shape, record);
    }

    fn put(&self, job: &Job, shape: Shape, record: &Record) {
        let trace = TraceId::from_bytes(first(&derived(job, &["trace"])));
        let mut attributes = shape.attributes;
        attributes.extend([
            KeyValue::new("replank.application", record.application.to_string()),
            KeyValue::new("replank.job", job.id.to_string()),
            KeyValue::new("replank.version", job.target.version.to_string()),
            KeyValue::new("replank.controller", record.driver.controller.to_string()),
        ]);
        let span = SpanData {
            span_context: SpanContext::new(trace, shape.id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: shape.parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: shape.name.into(),
            start_time: at(shape.from),
            end_time: at(shape.to),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: shape.status,
            instrumentation_scope: InstrumentationScope::builder("replank").build(),
        };
        if self.queue.try_send(span).is_err() {
            tracing::debug!("a span was dropped: the collector does not take them fast enough");
        }
    }
}

async fn send(exporter: SpanExporter, mut waiting: mpsc::Receiver<SpanData>, stop: CancellationToken) {
    let mut is_well = true;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            () = stop.cancelled() => waiting.close(),
            first = waiting.recv() => match first {
                Some(first) => batch.push(first),
                None => return,
            },
        }
        if !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(GATHER) => {}
            }
        }
        while let Some(span) = (batch.len() < BATCH).then(|| waiting.try_recv().ok()).flatten() {
            batch.push(span);
        }
        if batch.is_empty() {
            return;
        }
        match exporter.export(batch).await {
            Ok(()) => is_well = true,
            // Said once for each time that it is away: a collector in trouble must not fill the log.
            Err(error) if std::mem::replace(&mut is_well, false) => {
                tracing::warn!(%error, "spans could not be sent to telemetry.otlp_endpoint; they are lost");
            }
            Err(error) => tracing::debug!(%error, "spans could not be sent"),
        }
    }
}

fn status_of(state: State) -> Status {
    match state {
        State::FailedPre | State::FailedRollout | State::RollbackFailed => Status::error(state.name()),
        State::Idle
        | State::Queued
        | State::Fetching
        | State::Building
        | State::Patching
        | State::RollingOut
        | State::Validating
        | State::Confirming
        | State::Succeeded
        | State::RollingBack
        | State::RolledBack => Status::Ok,
    }
}

fn at(time: Millis) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(time.0).unwrap_or(0))
}

/// 32 bytes that depend on the job and the words, and on nothing else. The job's nonce is a secret and is not among them.
fn derived(job: &Job, words: &[&str]) -> [u8; 32] {
    let text = format!("replank\0{}\0{}\0{}", job.id, job.started_at.0, words.join("\0"));
    let hex = Digest::of(text.as_bytes());
    let digits = hex.as_str().trim_start_matches("sha256:");
    std::array::from_fn(|i| digits.get(2 * i..2 * i + 2).and_then(|two| u8::from_str_radix(two, 16).ok()).unwrap_or(0))
}

fn first<const N: usize>(bytes: &[u8; 32]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i])
}

fn span_id(job: &Job, words: &[&str]) -> SpanId {
    SpanId::from_bytes(first(&derived(job, words)))
}

fn root_id(job: &Job) -> SpanId {
    span_id(job, &["root"])
}

fn phase_id(job: &Job, state: State, entered_at: Millis) -> SpanId {
    span_id(job, &["phase", state.name(), &entered_at.0.to_string()])
}
