//! `replank doctor`: what the process that does the work would meet, looked at before the work needs it (lesson 10).
//!
//! Nothing is changed: no lock is taken, no record is made, and an upload that is begun is given up. All checks run at once,
//! each with a time limit of its own, so that one server that hangs hides nothing.

mod host;
mod outside;
mod state;

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use replank_core::fault::Fault;
use serde::Serialize;

use crate::config::Settings;
use crate::config::env::Environment;

/// What a check comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// Works now, and may not for long, or could not be looked at from here.
    Warning,
    /// An upgrade would fail on it.
    Failed,
}

/// One check's answer, in words without secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub verdict: Verdict,
    pub what: String,
    /// What to do; empty where all is well.
    pub advice: String,
}

impl Finding {
    pub fn ok(what: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, what: what.into(), advice: String::new() }
    }

    pub fn warning(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, what: what.into(), advice: advice.into() }
    }

    pub fn failed(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failed, what: what.into(), advice: advice.into() }
    }
}

impl From<Fault> for Finding {
    fn from(fault: Fault) -> Self {
        let told = fault.told();
        let advice = if told.advice.is_empty() { "look again in a moment".to_owned() } else { told.advice };
        Self::failed(told.what, advice)
    }
}

/// A check by its name, with its answer and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    pub name: &'static str,
    #[serde(flatten)]
    pub finding: Finding,
    pub ms: u64,
}

/// What all checks look at.
#[derive(Debug, Clone, Copy)]
pub struct Patient<'a> {
    pub settings: &'a Settings,
    pub env: &'a Environment,
}

type Check<'a> = Pin<Box<dyn Future<Output = Finding> + Send + 'a>>;

/// Runs every check, each for at most `limit`.
pub async fn examine(patient: Patient<'_>, limit: Duration) -> Vec<Checked> {
    let all: Vec<(&'static str, Check<'_>)> = vec![
        ("home", Box::pin(host::home(patient))),
        ("memory", Box::pin(host::memory(patient, true))),
        ("engine", Box::pin(host::engine(patient))),
        ("disk", Box::pin(host::disk(patient))),
        ("git", Box::pin(outside::git(patient))),
        ("remote", Box::pin(outside::remote(patient))),
        ("exec", Box::pin(outside::exec(patient))),
        ("registry", Box::pin(outside::registry(patient))),
        ("clock", Box::pin(outside::clock(patient))),
        ("secrets", Box::pin(state::secrets(patient))),
        ("ledger", Box::pin(state::ledger(patient))),
        ("running", Box::pin(state::running(patient))),
    ];
    join_all(all.into_iter().map(|(name, check)| timed(name, check, limit, Verdict::Failed))).await
}

/// Longest that a plan or a job waits for a look at this machine.
const ROOM_MAX: Duration = Duration::from_secs(5);

/// Disk and memory alone, for an upgrade's plan and for its job. `both`: what runs now will run beside what is started.
pub async fn room(patient: Patient<'_>, both: bool) -> Vec<Checked> {
    let all: Vec<(&'static str, Check<'_>)> = vec![
        ("home", Box::pin(host::home(patient))),
        ("memory", Box::pin(host::memory(patient, both))),
        ("disk", Box::pin(host::disk(patient))),
    ];
    join_all(all.into_iter().map(|(name, check)| timed(name, check, ROOM_MAX, Verdict::Warning))).await
}

/// `late` is what a check comes to that does not end in time.
async fn timed(name: &'static str, check: Check<'_>, limit: Duration, late: Verdict) -> Checked {
    let begun = Instant::now();
    let finding = tokio::time::timeout(limit, check).await.unwrap_or_else(|_| {
        let what = format!("this check did not end within {} s", limit.as_secs());
        let advice = "see whether what it asks hangs; --timeout gives it longer".to_owned();
        Finding { verdict: late, what, advice }
    });
    Checked { name, finding, ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX) }
}

/// `1.5 GiB`.
fn size(bytes: u64) -> String {
    let mib = bytes / (1024 * 1024);
    if mib < 1024 { format!("{mib} MiB") } else { format!("{}.{} GiB", mib / 1024, mib % 1024 * 10 / 1024) }
}
