//! Reads everything that is left, each thing where it is: the SQLite file, the engine through `docker`, the proxy's file. The
//! core's checker decides.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::logs::sqlite::SqliteLogs;
use replank_adapters::sqlite::Store;
use replank_core::check::{self, Evidence, LogSeen};
use replank_core::history::Line;
use replank_core::image::ImageId;
use replank_core::ports::{
    ContainerSeen, Ledger, LogId, LogStore, Observation, Probed, RevisionSeen, Running, TrafficSeen,
};
use replank_core::record::Record;
use replank_core::words::{AppName, ComponentName, Digest, Millis, RevisionId};
use replank_testbed::Engine;
use replank_testbed::installed::APPLICATION;
use serde_json::Value;

use crate::rig::Rig;

/// What follows a job at rest (the old side stops, its controller hands over) is over by then, also where one of these was refused
/// for good: that is tried again after a minute.
const AFTERMATH_LIMIT: Duration = Duration::from_secs(100);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Lines of a history; a matrix's installation records some ten thousand.
const HISTORY_MAX: usize = 1_000_000;
/// A build log of the sample.
const LOG_MAX: usize = 4 << 20;
const COMPONENTS: [&str; 4] = replank_testbed::sample::COMPONENTS;

/// Record, history and logs of the last job, from the file.
#[derive(Debug)]
pub struct Kept {
    pub record: Record,
    pub history: Vec<Line>,
    pub logs: Vec<LogSeen>,
}

/// # Errors
/// When the file cannot be read.
pub async fn kept(home: &Path) -> Result<Kept> {
    let store = Store::open(home.join("ledger")).await?;
    let ledger = SqliteLedger::new(store.clone(), AppName::new(APPLICATION)?);
    // Both from one moment: what is recorded in between is read anew.
    let (record, history) = loop {
        let (record, etag) = ledger.load().await?.context("the ledger has no record")?;
        let history = ledger.history(0, HISTORY_MAX).await?;
        if ledger.version().await? == Some(etag) {
            break (record, history);
        }
    };
    let logs = SqliteLogs::new(store);
    let mut found = Vec::new();
    if let Some(job) = &record.job {
        for name in COMPONENTS {
            let id = LogId { job: job.id.clone(), component: ComponentName::new(name)? };
            let (mut bytes, mut closed) = (Vec::new(), false);
            let mut exists = false;
            while let Some(chunk) = logs.read(&id, bytes.len() as u64, LOG_MAX).await? {
                exists = true;
                closed = chunk.closed;
                if chunk.bytes.is_empty() {
                    break;
                }
                bytes.extend(chunk.bytes);
            }
            if exists {
                found.push(LogSeen { id, bytes, closed });
            }
        }
    }
    Ok(Kept { record: Arc::unwrap_or_clone(record), history, logs: found })
}

/// What `docker` says, and where the proxy's file sends traffic.
///
/// # Errors
/// When either cannot be read.
pub fn seen(engine: &Engine, home: &Path) -> Result<Observation> {
    let listed = engine.docker(&[
        "ps",
        "-aq",
        "--filter",
        "label=io.replank.application=sample",
        "--filter",
        "label=io.replank.role=app",
    ])?;
    let mut arguments = vec!["inspect"];
    arguments.extend(listed.split_whitespace());
    let told: Vec<Value> = if listed.is_empty() { vec![] } else { serde_json::from_str(&engine.docker(&arguments)?)? };
    let mut revisions: BTreeMap<RevisionId, RevisionSeen> = BTreeMap::new();
    for container in &told {
        let label = |name: &str| container["Config"]["Labels"][name].as_str().unwrap_or_default().to_owned();
        let returns =
            matches!(container["HostConfig"]["RestartPolicy"]["Name"].as_str(), Some("always" | "unless-stopped"));
        let revision = RevisionId::new(label("io.replank.revision"))?;
        let one = revisions.entry(revision).or_insert_with(|| RevisionSeen {
            key: serde_json::from_value(Value::String(label("io.replank.key"))).ok(),
            commit: label("io.replank.commit").parse().ok(),
            containers: BTreeMap::new(),
            probed: Probed::NotAsked,
            returns_alone: true,
            stopped_at: None,
        });
        one.returns_alone &= returns;
        one.containers.insert(label("io.replank.container").parse()?, container_seen(container)?);
    }
    let routes: Value = serde_json::from_slice(&std::fs::read(home.join("proxy").join("routes.json"))?)?;
    let side = |side: &Value| side["revision"].as_str().and_then(|revision| RevisionId::new(revision).ok());
    let traffic = TrafficSeen {
        revision: side(&routes["primary"]),
        generation: routes["generation"].as_u64().unwrap_or_default(),
        fallback: side(&routes["fallback"]),
        probed: Probed::NotAsked,
    };
    Ok(Observation { at: now(), revisions, traffic })
}

fn container_seen(container: &Value) -> Result<ContainerSeen> {
    let state = &container["State"];
    let running = match state["Status"].as_str().unwrap_or_default() {
        "created" => Running::Created,
        "running" | "restarting" | "paused" => Running::Running,
        // Ended, dead, or being removed.
        _ => Running::Stopped,
    };
    let status = state["Status"].as_str().unwrap_or_default();
    let trouble = ["restarting", "paused", "dead"].contains(&status).then(|| status.to_owned());
    let real = container["Image"].as_str().unwrap_or_default();
    let name = container["Config"]["Image"].as_str().unwrap_or_default().to_owned();
    let intended = container["Config"]["Labels"]["io.replank.image"].as_str().unwrap_or_default();
    let intended: Option<ImageId> = serde_json::from_str(intended).ok();
    let image = match intended {
        Some(ImageId::Engine { id, name }) if id.as_str() == real => ImageId::Engine { id, name },
        // Whatever was meant, this is what runs.
        Some(_) | None => ImageId::Engine { id: Digest::new(real)?, name },
    };
    Ok(ContainerSeen { image, running, exit_code: state["ExitCode"].as_i64(), trouble })
}

#[expect(clippy::disallowed_methods, reason = "a judge of what really happened has no clock port")]
#[must_use]
pub fn now() -> Millis {
    Millis(jiff::Timestamp::now().as_millisecond())
}

/// Everything that does not fit, once what follows a job has had its time; and what the file holds.
///
/// # Errors
/// When something cannot be read.
pub async fn judged(rig: &Rig) -> Result<(Vec<String>, Kept)> {
    let end = Instant::now() + AFTERMATH_LIMIT;
    let home = &rig.installed.options.home;
    loop {
        let kept = kept(home).await?;
        let seen = seen(&rig.engine, home);
        let misfits: Vec<String> = match &seen {
            Ok(seen) => {
                let Kept { record, history, logs } = &kept;
                let evidence = Evidence { record, history, seen: Some(seen), logs };
                check::at_rest(&evidence).iter().map(ToString::to_string).collect()
            }
            // A container that went between two questions.
            Err(error) => vec![format!("{error:#}")],
        };
        if misfits.is_empty() || Instant::now() >= end {
            return Ok((misfits, kept));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
