//! What happened, as numbers to scrape and, where that is configured, as spans to send. Whoever does something tells it here;
//! nothing of it decides anything, and none of it can fail or block who tells.

mod ledger;
mod metrics;
mod trace;

use std::time::Duration;

use replank_core::decide::{Outcome, TaskId};
use replank_core::fault::Fault;
use replank_core::phase::State;
use replank_core::record::Record;
use replank_core::words::Millis;

pub use ledger::Watched;
use metrics::Metrics;
pub use trace::Traces;

#[derive(Debug, Default)]
pub struct Telemetry {
    metrics: Metrics,
    traces: Option<Traces>,
}

/// The phase that a commit left, as the record before it had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    pub state: State,
    pub entered_at: Millis,
}

impl Telemetry {
    /// # Errors
    /// When the endpoint's client cannot be made.
    pub fn new(otlp_endpoint: Option<&str>) -> anyhow::Result<Self> {
        let traces = otlp_endpoint.map(Traces::start).transpose()?;
        Ok(Self { metrics: Metrics::default(), traces })
    }

    /// The loop begins a turn.
    pub fn turn(&self) {
        self.metrics.turn();
    }

    /// The loop turns, or waits for something to do.
    pub fn loop_lives(&self, now: Millis) {
        self.metrics.loop_lives(now);
    }

    /// A commit took this long and was taken, or not.
    fn committed(&self, took: Duration, result: &'static str) {
        self.metrics.commit(took, result);
    }

    /// A commit of this process led from one state to another.
    fn moved(&self, left: Left, record: &Record) {
        let (to, now) = (record.phase.state(), record.updated_at);
        if !left.state.in_flight() {
            return;
        }
        self.metrics.phase(left.state, seconds(now.since(left.entered_at)));
        if !to.in_flight() {
            self.metrics.job(to);
        }
        if let Some(traces) = &self.traces {
            traces.phase(left, record);
            // A rollback is an operation of its own in the same trace.
            if (!to.in_flight() || to == State::RollingBack) && left.state != State::RollingBack {
                traces.job(record);
            }
        }
    }

    /// A step of a job has ended.
    pub fn step(&self, record: &Record, task: &TaskId, from: Millis, to: Millis, result: &Result<Outcome, Fault>) {
        if task.step.starts_with("build-") {
            let result = match result {
                Ok(Outcome::Built(built)) if built.adopted => "adopted",
                Ok(_) => "built",
                Err(_) => "failed",
            };
            self.metrics.build(result);
        }
        if let Some(traces) = &self.traces {
            traces.step(record, task, from, to, result.as_ref().err());
        }
    }

    /// A request was answered. `route` is a template of ours, never what a client wrote.
    pub fn request(&self, method: &http::Method, route: Option<&str>, status: u16) {
        self.metrics.request(method, route, status);
    }

    /// The numbers in the OpenMetrics text format. `record` is what the ledger has now, where it answers.
    pub fn scrape(&self, record: Option<&Record>, now: Millis) -> String {
        self.metrics.text(record, now)
    }

    /// Sends what still waits to be sent, for a few seconds at most.
    pub async fn close(&self) {
        if let Some(traces) = &self.traces {
            traces.close().await;
        }
    }
}

fn seconds(millis: u64) -> f64 {
    Duration::from_millis(millis).as_secs_f64()
}
