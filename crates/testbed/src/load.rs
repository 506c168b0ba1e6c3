//! A steady HTTP load from outside: every answer counts, and every failure is kept.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::task::JoinSet;

use crate::installed::client;

/// Requests of one client at a time; the pause keeps the load steady instead of as high as it can be.
const PAUSE: Duration = Duration::from_millis(20);
/// An answer that takes longer has failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Descriptions of failures that are kept.
const FAILURES_KEPT: usize = 20;

/// One answer: when its request was sent, when it was complete, and the version that gave it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub sent: Instant,
    pub done: Instant,
    pub version: String,
}

#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    failed: u64,
    failures: Vec<String>,
    /// Answers of the first target only.
    answers: Vec<Answer>,
}

#[derive(Debug)]
pub struct Load {
    seen: Arc<Mutex<Seen>>,
    clients: JoinSet<()>,
}

/// What a load came to.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    pub requests: u64,
    pub failed: u64,
    pub failures: Vec<String>,
}

impl Load {
    /// `clients` clients for each target, each with connections of its own that it keeps.
    pub fn start(targets: &[String], clients: usize) -> Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut set = JoinSet::new();
        for (index, target) in targets.iter().enumerate() {
            for _ in 0..clients {
                let (http, target, seen) = (client(ANSWER_LIMIT)?, target.clone(), seen.clone());
                set.spawn(async move {
                    loop {
                        let sent = Instant::now();
                        let answer = ask(&http, &target).await;
                        let done = Instant::now();
                        if let Ok(mut seen) = seen.lock() {
                            seen.requests += 1;
                            match answer {
                                Ok(version) if index == 0 => seen.answers.push(Answer { sent, done, version }),
                                Ok(_) => {}
                                Err(error) => {
                                    seen.failed += 1;
                                    if seen.failures.len() < FAILURES_KEPT {
                                        seen.failures.push(format!("{target}: {error:#}"));
                                    }
                                }
                            }
                        }
                        tokio::time::sleep(PAUSE).await;
                    }
                });
            }
        }
        Ok(Self { seen, clients: set })
    }

    pub fn totals(&self) -> Totals {
        let seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Totals { requests: seen.requests, failed: seen.failed, failures: seen.failures.clone() }
    }

    /// Answers of the first target whose request was sent at or after `since`, in the order in which they were complete.
    pub fn answers_since(&self, since: Instant) -> Vec<Answer> {
        let seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut answers: Vec<Answer> = seen.answers.iter().filter(|a| a.sent >= since).cloned().collect();
        answers.sort_by_key(|a| a.done);
        answers
    }

    /// From `since` to the first answer of `version` after which no other version answered. `None` where that was not seen.
    pub fn flip_to(&self, version: &str, since: Instant) -> Option<Duration> {
        let answers = self.answers_since(since);
        let after_other = answers.iter().rposition(|a| a.version != version).map_or(0, |i| i + 1);
        answers.get(after_other).map(|a| a.done.duration_since(since))
    }

    pub async fn stop(mut self) -> Totals {
        self.clients.shutdown().await;
        self.totals()
    }
}

async fn ask(http: &reqwest::Client, target: &str) -> Result<String> {
    let answer = http.get(target).send().await?;
    let status = answer.status();
    let version = answer.headers().get("x-app-version").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let body = answer.bytes().await?;
    anyhow::ensure!(
        status.is_success(),
        "answered {status}: {}",
        String::from_utf8_lossy(&body[..body.len().min(200)])
    );
    Ok(version)
}
