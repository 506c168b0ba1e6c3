//! The people of a universe, and its bad luck: who starts, rolls back, cancels and resets, and who kills, stops and reboots.

use std::sync::Arc;
use std::time::Duration;

use replank::engine::LocalEngine;
use replank::engine::api::{Engine as _, Refusal, StartRequest};
use replank_core::record::{Actor, Record};
use replank_core::words::{ContainerName, RevisionId, Version};
use tokio::time::{sleep, timeout};

use crate::world::World;
use crate::{platform, process};

/// A request to a process that dies meanwhile is never answered.
const PATIENCE: Duration = Duration::from_secs(20);

fn actor(name: &str) -> Actor {
    Actor { oid: name.to_owned(), name: name.to_owned(), from: "127.0.0.1".to_owned() }
}

/// Some controller that can be asked: any, as the way in may lead to either side of a swap.
fn anybody(world: &World) -> Option<Arc<LocalEngine>> {
    let mut state = world.state();
    let alive = state.processes.len();
    if alive == 0 {
        return None;
    }
    let chosen = state.rng.usize(0..alive);
    state.processes.values().nth(chosen).map(|process| process.engine.clone())
}

async fn ask<T>(
    world: &World,
    request: impl AsyncFnOnce(Arc<LocalEngine>) -> Result<T, Refusal>,
) -> Option<Result<T, Refusal>> {
    let engine = anybody(world)?;
    timeout(PATIENCE, request(engine)).await.ok()
}

/// Starts a release, again and again until it is taken or can not be. True where a job of that version was begun.
pub(crate) async fn start(world: &Arc<World>, who: &str, version: &Version) -> bool {
    let key = format!("{who}-{version}");
    for _ in 0..60 {
        let request = StartRequest {
            target_version: Some(version.to_string()),
            confirm_downtime: true,
            idempotency_key: Some(key.clone()),
            override_quarantine: true,
            reason: Some("it may work now".to_owned()),
            accept_one_way: true,
            ..StartRequest::default()
        };
        let answer = ask(world, async |engine| engine.start(&actor(who), request).await).await;
        world.tell(|| format!("{who} starts {version}: {:?}", answer.as_ref().map(told)));
        match answer {
            Some(Ok(_)) => return true,
            Some(Err(Refusal::Conflict(_))) => return false,
            Some(Err(Refusal::Invalid(why))) => {
                world.violated(format!("a right request was refused as wrong: {why}"));
                return false;
            }
            Some(Err(Refusal::NotFound(_) | Refusal::TooSoon { .. } | Refusal::Unavailable(_))) | None => {
                sleep(Duration::from_secs(2)).await;
            }
        }
    }
    false
}

fn told(answer: &Result<Record, Refusal>) -> String {
    match answer {
        Ok(record) => record.phase.state().name().to_owned(),
        Err(refusal) => refusal.to_string(),
    }
}

/// At rest, a container is stopped by hand. That has to be told, and to keep upgrades from starting; then it is put right, or
/// accepted as it is. What is still stopped then is answered.
pub(crate) async fn drifts(world: &Arc<World>) -> Option<(RevisionId, ContainerName)> {
    let record = || world.state().ledger.record.clone();
    // What was accepted may have been put right a moment ago, and then nothing new is told of the same.
    record().filter(|record| record.drift.is_none())?.proved_and_serving()?;
    let stopped = platform::stop_by_hand(&mut world.state())?;
    world.tell(|| format!("carol stops {} of {}", stopped.1, stopped.0));
    let until = async |wanted: bool, what: &str| {
        for _ in 0..120 {
            if record().is_some_and(|record| record.drift.is_some() == wanted) {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
        world.violated(what.to_owned());
    };
    until(true, "a container that was stopped by hand is never told").await;
    let request = StartRequest { confirm_downtime: true, override_quarantine: true, ..StartRequest::default() };
    if let Some(Ok(_)) = ask(world, async |engine| engine.start(&actor("alice"), request).await).await {
        world.violated("an upgrade starts from what was never recorded".to_owned());
    }
    if world.state().rng.bool() {
        platform::start_by_hand(world, &stopped);
        until(false, "a container that was started again is told as stopped").await;
        return None;
    }
    let what = record()?.drift.clone().map(|drift| drift.what).unwrap_or_default();
    let accepted = ask(world, async |engine| engine.accept_drift(&actor("carol"), &what, "on purpose").await).await;
    world.tell(|| format!("carol accepts {what:?}: {:?}", accepted.as_ref().map(told)));
    Some(stopped)
}

/// What an operator may do while a job runs.
async fn meddles(world: &Arc<World>) {
    let verb = world.state().rng.u32(0..10);
    let answer = match verb {
        0..4 => ask(world, async |engine| engine.rollback(&actor("carol"), "not good", true).await).await,
        4..6 => ask(world, async |engine| engine.cancel(&actor("carol"), "not now").await).await,
        6..8 => ask(world, async |engine| engine.keep(&actor("carol"), "good enough").await).await,
        8 => ask(world, async |engine| engine.reset(&actor("carol"), "stuck").await).await,
        _ => ask(world, async |engine| engine.check(&actor("carol")).await).await,
    };
    world.tell(|| format!("carol does {verb}: {:?}", answer.as_ref().map(told)));
}

/// Goes on until it is dropped.
pub(crate) async fn trouble(world: Arc<World>, meddling: bool) {
    loop {
        let (wait, what) = {
            let mut state = world.state();
            (state.rng.u64(1_000..60_000), state.rng.u32(0..10))
        };
        sleep(Duration::from_millis(wait)).await;
        let somebody: Option<RevisionId> = {
            let mut state = world.state();
            let alive = state.processes.len();
            let chosen = if alive == 0 { 0 } else { state.rng.usize(0..alive) };
            state.processes.keys().nth(chosen).cloned()
        };
        match (what, somebody) {
            (0..3, Some(id)) => {
                world.state().faults += 1;
                process::kill(&world, &id);
            }
            (3..5, Some(id)) => {
                let now = world.now();
                let mut state = world.state();
                state.faults += 1;
                let pause = state.rng.u64(5_000..60_000);
                if let Some(process) = state.processes.get_mut(&id) {
                    process.paused_until = Some(now.plus(pause));
                }
                drop(state);
                world.tell(|| format!("PAUSE {id} for {pause} ms"));
            }
            (5, _) => {
                world.state().faults += 1;
                world.tell(|| "REBOOT".to_owned());
                platform::reboot(&world);
            }
            _ if meddling => meddles(&world).await,
            _ => {}
        }
    }
}
