//! The numbers: what there is to scrape. Every label's values are ours and few, so that nobody outside can make series.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use http::Method;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use replank_core::phase::State;
use replank_core::record::Record;
use replank_core::words::Millis;

use super::seconds;

/// Seconds. Phases take from a blink (patching) to half an hour (a large build).
const PHASES: [f64; 13] = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0];
/// Seconds. A commit waits for the disk: a millisecond on a good one, seconds on one in trouble.
const COMMITS: [f64; 10] = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        self.0.encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPhase {
    phase: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfResult {
    result: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    method: Word,
    route: String,
    status: u16,
}

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    jobs: Family<OfState, Counter>,
    phases: Family<OfPhase, Histogram, fn() -> Histogram>,
    commits: Family<OfResult, Histogram, fn() -> Histogram>,
    builds: Family<OfResult, Counter>,
    requests: Family<OfRequest, Counter>,
    turns: Counter,
    last_seen: AtomicI64,
    // Set when they are scraped.
    state: Family<OfState, Gauge>,
    ledger_up: Gauge,
    check_age: Gauge<f64, AtomicU64>,
    loop_lag: Gauge<f64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("replank");
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The version of Replank", Info::new(version));
        let metrics = Self {
            jobs: Family::default(),
            phases: Family::new_with_constructor(|| Histogram::new(PHASES)),
            commits: Family::new_with_constructor(|| Histogram::new(COMMITS)),
            builds: Family::default(),
            requests: Family::default(),
            turns: Counter::default(),
            last_seen: AtomicI64::new(0),
            state: Family::default(),
            ledger_up: Gauge::default(),
            check_age: Gauge::default(),
            loop_lag: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("jobs", "Jobs that this process saw to their end, by final state", metrics.jobs.clone());
        registry.register_with_unit("phase_duration", "Time in each phase", Unit::Seconds, metrics.phases.clone());
        registry.register_with_unit(
            "ledger_commit",
            "Time of commits, by result",
            Unit::Seconds,
            metrics.commits.clone(),
        );
        registry.register("builds", "Builds of images, by result", metrics.builds.clone());
        registry.register("http_requests", "Answered requests", metrics.requests.clone());
        registry.register("loop_turns", "Turns of the loop", metrics.turns.clone());
        registry.register_with_unit(
            "loop_lag",
            "Time since the loop last turned or looked whether it has to; above a minute it is stuck",
            Unit::Seconds,
            metrics.loop_lag.clone(),
        );
        registry.register(
            "state",
            "1 for the state of the application's record, 0 for the others",
            metrics.state.clone(),
        );
        registry.register("ledger_up", "Whether the ledger answered this scrape", metrics.ledger_up.clone());
        registry.register_with_unit(
            "last_check_age",
            "Time since the remote was last looked at successfully; NaN before the first time",
            Unit::Seconds,
            metrics.check_age.clone(),
        );
        // Series that begin at 0 show their first increase.
        for state in State::ALL.into_iter().filter(|state| !state.in_flight() && *state != State::Idle) {
            drop(metrics.jobs.get_or_create(&OfState { state: Word(state.name()) }));
        }
        for result in ["built", "adopted", "failed"] {
            drop(metrics.builds.get_or_create(&OfResult { result: Word(result) }));
        }
        Self { registry, ..metrics }
    }
}

impl Metrics {
    pub fn turn(&self) {
        self.turns.inc();
    }

    pub fn loop_lives(&self, now: Millis) {
        self.last_seen.store(now.0, Ordering::Relaxed);
    }

    pub fn commit(&self, took: Duration, result: &'static str) {
        self.commits.get_or_create(&OfResult { result: Word(result) }).observe(took.as_secs_f64());
    }

    pub fn phase(&self, phase: State, seconds: f64) {
        self.phases.get_or_create(&OfPhase { phase: Word(phase.name()) }).observe(seconds);
    }

    pub fn job(&self, state: State) {
        self.jobs.get_or_create(&OfState { state: Word(state.name()) }).inc();
    }

    pub fn build(&self, result: &'static str) {
        self.builds.get_or_create(&OfResult { result: Word(result) }).inc();
    }

    pub fn request(&self, method: &Method, route: Option<&str>, status: u16) {
        let method = match method.as_str() {
            "GET" => "GET",
            "HEAD" => "HEAD",
            "POST" => "POST",
            "PUT" => "PUT",
            "PATCH" => "PATCH",
            "DELETE" => "DELETE",
            "OPTIONS" => "OPTIONS",
            // Whatever a client makes up is one series.
            _ => "other",
        };
        let route = route.unwrap_or("none").to_owned();
        self.requests.get_or_create(&OfRequest { method: Word(method), route, status }).inc();
    }

    pub fn text(&self, record: Option<&Record>, now: Millis) -> String {
        self.ledger_up.set(i64::from(record.is_some()));
        let last_seen = Millis(self.last_seen.load(Ordering::Relaxed));
        self.loop_lag.set(seconds(now.since(last_seen)));
        match record {
            Some(record) => {
                for state in State::ALL {
                    let is = i64::from(record.phase.state() == state);
                    self.state.get_or_create(&OfState { state: Word(state.name()) }).set(is);
                }
                let checked = record.latest.checked_at;
                self.check_age.set(checked.map_or(f64::NAN, |at| seconds(now.since(at))));
            }
            // Nobody knows: better no value than the last one.
            None => {
                self.state.clear();
                self.check_age.set(f64::NAN);
            }
        }
        let mut text = String::new();
        // A text takes whatever is written.
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "the metrics could not be written");
        }
        text
    }
}
