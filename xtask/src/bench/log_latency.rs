//! `log-latency`: from the moment that a step of a real build prints a line to the moment that a client which follows the
//! build's log over HTTP has it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use replank_testbed::installed::client;
use replank_testbed::repo::Entry;
use replank_testbed::{Repo, images, sample};
use serde_json::{Value, json};

use super::service::Service;
use super::{Options, percentile, round};
use crate::world::World;

/// Lines that the build prints.
const LINES: usize = 120;
/// Stands before each time in the log.
const MARK: &str = "printed at ";
/// What prints them, 137 ms apart, which is no multiple of anybody's timer. The images' own clock counts whole seconds.
const PRINTER: &str = r#"
#include <stdio.h>
#include <time.h>
int main(void) {
    for (int line = 0; line < LINES; line++) {
        struct timespec now, pause = {0, 137 * 1000 * 1000};
        clock_gettime(CLOCK_REALTIME, &now);
        printf("printed at %lld%09ld\n", (long long)now.tv_sec, now.tv_nsec);
        fflush(stdout);
        nanosleep(&pause, NULL);
    }
    return 0;
}
"#;
/// Fewer would be no 95th percentile: the first lines may come before the client does.
const LEAST: usize = 100;
const LIMIT: Duration = Duration::from_secs(180);

pub(super) fn run(options: &Options, replank: PathBuf) -> Result<ExitCode> {
    let world = World::start(replank, sample::FULL_UNITS)?;
    let mut repo = Repo::create(world.scratch.path(), "lines")?;
    let dockerfile =
        format!("FROM {}\nCOPY print.c /\nRUN gcc -static -std=gnu11 -o /print /print.c\nRUN /print\n", images::CC);
    let printer = format!("#define LINES {LINES}\n{PRINTER}");
    let files = [Entry::file("Dockerfile", dockerfile), Entry::file("print.c", printer)];
    let commit = repo.commit(&files, "lines")?;
    repo.tag("v1.0.0", &commit, "lines")?;
    let remote = world.git.url("lines");
    let builds = Some((world.engine.socket(), remote.as_str()));
    let service = Service::start(&world.replank, &world.scratch.path().join("service"), builds)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut late = runtime.block_on(measure(&service))?;
    ensure!(late.len() >= LEAST, "only {} of {LINES} lines came as they were printed", late.len());
    let (p50_ms, p95_ms) = (round(percentile(&mut late, 0.5)), round(percentile(&mut late, 0.95)));
    if options.json {
        println!("{}", json!({"p50_ms": p50_ms, "p95_ms": p95_ms}));
    } else {
        println!("median {p50_ms} ms, 95th percentile {p95_ms} ms ({} lines)", late.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds from print to sight, of each line that was printed while the client listened.
async fn measure(service: &Service) -> Result<Vec<f64>> {
    let http = client(LIMIT)?;
    let url = |path: &str| format!("http://{}/api/upgrade/{path}", service.address);
    let start = http.post(url("start")).bearer_auth(&service.token).json(&json!({"confirm_downtime": true}));
    let answer = start.send().await?;
    let status = answer.status();
    let row: Value = answer.json().await?;
    ensure!(status.as_u16() == 202, "the start was answered with {status}: {row}");
    let job = row["job_id"].as_str().context("a row without a job")?;
    let follow = url(&format!("jobs/{job}/build-log/lines?follow=1"));
    let mut stream = http.get(follow).bearer_auth(&service.token).send().await?.error_for_status()?;
    let (mut late, mut text, mut listens_since) = (Vec::new(), String::new(), None);
    while let Some(chunk) = stream.chunk().await? {
        let now = since_epoch()?;
        text.push_str(&String::from_utf8_lossy(&chunk));
        // What is in the first piece was printed at some time before it was asked for.
        let from = *listens_since.get_or_insert(now);
        while let Some(end) = text.find('\n') {
            if let Some(printed) = printed(&text[..end]).filter(|printed| *printed > from) {
                late.push((now.saturating_sub(printed)).as_secs_f64() * 1_000.0);
            }
            text.drain(..=end);
        }
    }
    let row: Value = http.get(url("status")).bearer_auth(&service.token).send().await?.json().await?;
    let state = row["state"].as_str().unwrap_or_default();
    ensure!(!state.starts_with("failed"), "the build failed: {}; {}", row["failure"], row["advice"]);
    Ok(late)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the benchmark has no clock port, and compares with what the build printed"
)]
fn since_epoch() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?)
}

/// The time in a line, where it is one of the step's; the step's own command has the words too, and no number behind them.
fn printed(line: &str) -> Option<Duration> {
    let (_, rest) = line.split_once(MARK)?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok().map(Duration::from_nanos)
}
