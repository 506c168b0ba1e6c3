//! From a line of the history to what a receiver is told.

use replank_core::history::{Entry, Line};
use replank_core::mask::mask_sentence;
use replank_core::phase::State;
use replank_core::ports::{Ledger, LedgerError};
use replank_core::record::{Head, Record};
use replank_core::words::{Digest, Millis};
use serde_json::{Map, Value, json};

use super::{Event, Hook};

/// Longest text of a message; a failure's cause is told whole by the status.
const TEXT_MAX: usize = 500;
/// How far back the beginning of a job is looked for: a job with every retry has some hundred lines.
const START_MAX: u64 = 2_000;
const PAGE: usize = 500;

#[derive(Debug, Clone)]
pub struct Message {
    pub event: Event,
    /// The same for every attempt, and for every controller that tells it: a receiver knows a repetition by it.
    pub id: String,
    /// When it happened.
    pub at: Millis,
    data: Map<String, Value>,
}

fn id(hook: &Hook, words: &[&str]) -> String {
    let text = format!("{}\0{}", hook.reader(), words.join("\0"));
    let hex = Digest::of(text.as_bytes());
    format!("msg_{}", &hex.as_str().trim_start_matches("sha256:")[..32])
}

/// Fit for whatever a receiver shows it in: what people wrote as a reason is in no record's own words.
fn cut(text: &str) -> String {
    mask_sentence(text, TEXT_MAX)
}

/// What a line tells: the final state that it led to, and more.
fn events(line: &Entry) -> Vec<Event> {
    let mut events = Vec::new();
    events.extend(line.state().and_then(|state| match state {
        State::Succeeded => Some(Event::Succeeded),
        State::FailedPre => Some(Event::FailedPre),
        State::FailedRollout => Some(Event::FailedRollout),
        State::RolledBack => Some(Event::RolledBack),
        State::RollbackFailed => Some(Event::RollbackFailed),
        State::Idle
        | State::Queued
        | State::Fetching
        | State::Building
        | State::Patching
        | State::RollingOut
        | State::Validating
        | State::Confirming
        | State::RollingBack => None,
    }));
    if line.is("held") {
        events.push(Event::Held);
    }
    if ["snapshot_dropped", "way_back_lost"].contains(&line.event()) {
        events.push(Event::WayBackLost);
    }
    if line.event() == "drift_seen" {
        events.push(Event::Drift);
    }
    events
}

impl Message {
    /// What `hook` wants to know of a line.
    pub fn of_line(record: &Record, line: &Line, hook: &Hook) -> Vec<Self> {
        let Some(parsed) = Entry::read(line) else { return Vec::new() };
        // The head as of this line: whoever keeps it can tell later whether the history was cut or edited.
        let head = Head { count: line.seq + 1, hash: Some(Digest::of(&line.bytes)) };
        let wanted = events(&parsed).into_iter().filter(|event| hook.events.contains(event));
        let at = parsed.at().unwrap_or(record.updated_at);
        wanted
            .map(|event| {
                let mut data = Map::new();
                data.insert("application".to_owned(), record.application.to_string().into());
                data.insert("job".to_owned(), json!({ "id": parsed.job() }));
                for name in ["state", "why", "advice", "reason"] {
                    if !parsed.text(name).is_empty() {
                        data.insert(name.to_owned(), cut(parsed.text(name)).into());
                    }
                }
                if let Some(what) = parsed.get("what").filter(|_| event == Event::Drift) {
                    data.insert("what".to_owned(), what.clone());
                }
                // What led there: a cancelled job and one that failed both end as failed_pre.
                data.insert("cause".to_owned(), parsed.event().into());
                if let Some(by) = parsed.get("actor").and_then(|actor| actor.get("name")).and_then(Value::as_str) {
                    data.insert("by".to_owned(), cut(by).into());
                }
                data.insert("history".to_owned(), json!(head));
                Self { event, id: id(hook, &[event.name(), head.hash.as_ref().map_or("", |h| h.as_str())]), at, data }
            })
            .collect()
    }

    pub fn closing(record: &Record, deadline: Millis, hook: &Hook) -> Self {
        let event = Event::ConfirmWindowClosing;
        let mut data = Map::new();
        data.insert("application".to_owned(), record.application.to_string().into());
        data.insert("state".to_owned(), record.phase.state().name().into());
        data.insert("confirm_deadline".to_owned(), deadline.rfc3339().into());
        data.insert("history".to_owned(), json!(record.history));
        let job = record.job.as_ref();
        let job_id = job.map(|job| job.id.to_string()).unwrap_or_default();
        let from = record.running.as_ref().map(|running| running.version.to_string()).unwrap_or_default();
        let target = job.map(|job| job.target.version.to_string()).unwrap_or_default();
        let started_by = job.map(|job| job.actor.name.clone()).unwrap_or_default();
        data.insert("job".to_owned(), json!({ "id": job_id, "started_by": cut(&started_by) }));
        data.insert("versions".to_owned(), json!({ "from": from, "target": target }));
        Self { event, id: id(hook, &[event.name(), &job_id, &deadline.0.to_string()]), at: record.updated_at, data }
    }

    /// Adds what the job began with. Its record may be another job's by now, so this too comes from the history.
    pub async fn with_start(mut self, ledger: &dyn Ledger, seq: u64) -> Result<Self, LedgerError> {
        let job = self.data["job"]["id"].as_str().unwrap_or_default().to_owned();
        if job.is_empty() {
            return Ok(self);
        }
        let is_start = |line: &Entry| line.event() == "start" && line.job() == job;
        let mut end = seq;
        while end > seq.saturating_sub(START_MAX) {
            let from = end.saturating_sub(PAGE as u64);
            let page = ledger.history(from, usize::try_from(end - from).unwrap_or(PAGE)).await?;
            if let Some(start) = page.iter().rev().filter_map(Entry::read).find(is_start) {
                let by = start.get("actor").and_then(|actor| actor.get("name")).and_then(Value::as_str);
                self.data.insert("job".to_owned(), json!({ "id": job, "started_by": cut(by.unwrap_or_default()) }));
                let versions = json!({ "from": start.text("from_version"), "target": start.text("target_version") });
                self.data.insert("versions".to_owned(), versions);
                break;
            }
            end = from;
        }
        Ok(self)
    }

    pub fn body(&self) -> Vec<u8> {
        let body = json!({ "type": self.event.name(), "timestamp": self.at.rfc3339(), "data": self.data });
        body.to_string().into_bytes()
    }
}
