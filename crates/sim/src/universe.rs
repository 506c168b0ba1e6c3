//! One universe from its beginning to its end: jobs one after another, trouble while they run, and a verdict after each.

use std::sync::Arc;
use std::time::Duration;

use replank_core::check::{Evidence, LogSeen, at_rest};
use replank_core::phase::Phase;
use replank_core::ports::Ask;
use replank_core::record::{ControllerId, Deployment, Record};
use replank_core::words::{AppName, Nonce, OpKey, RevisionId};
use tokio::time::sleep;

use crate::chance::{Health, Rates};
use crate::operators::{drifts, start, trouble};
use crate::platform::{Container, Revision};
use crate::ports::{Door, push};
use crate::world::{Mutant, World, component, container, installation};
use crate::{platform, process};

/// What came of a universe.
#[derive(Debug, Default)]
pub struct Outcome {
    pub seed: u64,
    /// Jobs that were begun and ended.
    pub jobs: u64,
    pub faults: u64,
    pub violations: Vec<String>,
    /// How often a job ended in which state.
    pub ends: std::collections::BTreeMap<&'static str, u64>,
    /// What happened, where a trace was asked for.
    pub trace: Vec<String>,
}

/// Trouble lasts this long at most for one job; then everything has to come to its end by itself.
const TROUBLE: u64 = 240_000;
/// A job that has not ended so long after the last trouble never will: all budgets of a job and a rollback, twice.
const STUCK: u64 = 2_400_000;
/// Longest that the platform may take to be in order after a job, with nobody to disturb it: what was refused for good is forgotten
/// after a minute, and then found, undone and observed.
const ORDER: u64 = 300_000;

/// Plays the universe of `seed` until `jobs` jobs have ended.
pub fn play(seed: u64, jobs: u64, trace: bool, mutant: Option<Mutant>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let Ok(runtime) = runtime else { unreachable!("a runtime without I/O needs nothing from the system") };
    runtime.block_on(async {
        let world = World::new(seed, trace, mutant);
        begin(&world);
        let mut outcome = Outcome { seed, ..Outcome::default() };
        for _ in 0..jobs {
            if let Some(end) = job(&world).await {
                outcome.jobs += 1;
                *outcome.ends.entry(end).or_default() += 1;
            }
            if !world.state().violations.is_empty() {
                break;
            }
        }
        let mut state = world.state();
        outcome.faults = state.faults;
        outcome.violations = std::mem::take(&mut state.violations);
        outcome.trace = state.trace.take().unwrap_or_default();
        outcome
    })
}

/// The first release runs, and its controller drives.
fn begin(world: &Arc<World>) {
    let now = world.now();
    let mut state = world.state();
    let version = state.publish(false, Health::Good);
    let commit = state.releases[0].tag.commit.clone();
    let images = ["app", "web"].map(|name| (component(name), push(&mut state, &commit, &component(name), now)));
    let containers = ["controller", "web", "worker"].map(|name| {
        let there = Container {
            image: images[usize::from(name == "web")].1.clone(),
            running: true,
            exit_code: None,
            alone: true,
            started: 1,
            started_at: now,
            controller: name == "controller",
            overlaps: name != "worker" || world.overlap == replank_core::record::Overlap::Allowed,
        };
        (container(name), there)
    });
    let revision = RevisionId::new("v0-1-0-first").unwrap_or_else(|bad| unreachable!("{bad}"));
    let nonce = Nonce::new("0".repeat(32)).unwrap_or_else(|bad| unreachable!("{bad}"));
    let job = replank_core::words::JobId::new("first").unwrap_or_else(|bad| unreachable!("{bad}"));
    let key = OpKey::derive(&job, "revision", 1, &nonce);
    let deployment = Deployment {
        revision: revision.clone(),
        key: key.clone(),
        version,
        commit: commit.clone(),
        images: images.into(),
        plan: Door::plan_of(world),
        reads_format: None,
    };
    let app = AppName::new("shop").unwrap_or_else(|bad| unreachable!("{bad}"));
    let mut record = Record::new(installation(), app, now);
    record.driver.controller = ControllerId::Revision(revision.clone());
    record.running = Some(deployment.clone());
    record.serving = Some(deployment);
    record.generation = 1;
    let there = Revision { key, commit, containers: containers.into(), stopped_at: None, served_at: Some(now) };
    state.platform.revisions.insert(revision.clone(), there);
    state.platform.traffic = Some(revision.clone());
    state.platform.generation = 1;
    state.ledger.begin(record);
    process::begin(world, &mut state, &revision);
}

/// One job under trouble, and what it left. The name of the state it ended in; none where it could not be begun.
async fn job(world: &Arc<World>) -> Option<&'static str> {
    let stopped = if world.state().rng.u32(0..8) == 0 { drifts(world).await } else { None };
    let (version, rates, second, meddling) = {
        let mut state = world.state();
        let health = Health::draw(&mut state.rng);
        let version = state.publish(world.two_formats, health);
        world_note(&mut state, &format!("{version} is {health:?}"));
        let rates = Rates::draw(&mut state.rng);
        (version, rates, state.rng.u32(0..4) == 0, state.rng.bool())
    };
    world.state().rates = rates;
    let disturbance = tokio::spawn(trouble(world.clone(), meddling));
    let rival = second.then(|| {
        let (world, version) = (world.clone(), version.clone());
        tokio::spawn(async move { start(&world, "bob", &version).await })
    });
    let mut begun = start(world, "alice", &version).await;
    let troubled_until = world.now().plus(TROUBLE);
    loop {
        let rests = world.state().ledger.record.as_ref().is_none_or(|record| !record.phase.state().in_flight());
        if rests || world.now() >= troubled_until {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    disturbance.abort();
    calm(world);
    if let Some(stopped) = stopped {
        platform::start_by_hand(world, &stopped);
    }
    if let Some(rival) = rival {
        begun |= rival.await.unwrap_or(false);
    }
    let stuck_at = world.now().plus(STUCK);
    let mut alone_since = None;
    loop {
        // What was never proved does not return by itself, so bad luck can take the last controller that there is. Somebody
        // who looks at the machine starts what serves again; nothing else is asked of him.
        if !world.state().processes.is_empty() {
            alone_since = None;
        } else if world.now().since(*alone_since.get_or_insert_with(|| world.now())) >= NOBODY {
            platform::start_controller_by_hand(world);
        }
        let record = world.state().ledger.record.clone();
        if record.is_none_or(|record| !record.phase.state().in_flight()) {
            break;
        }
        if world.now() >= stuck_at {
            world.violated("the job does not end although nothing disturbs it".to_owned());
            return None;
        }
        sleep(Duration::from_secs(1)).await;
    }
    comes_to_order(world).await;
    let name = world.state().ledger.record.as_ref().map(|record| record.phase.state().name());
    name.filter(|_| begun)
}

fn world_note(state: &mut crate::world::State, what: &str) {
    if let Some(trace) = &mut state.trace {
        trace.push(format!("---------- {what}"));
    }
}

/// Nothing more goes wrong, and whoever stood still goes on.
fn calm(world: &World) {
    let mut state = world.state();
    state.rates = Rates::CALM;
    state.processes.values_mut().for_each(|process| process.paused_until = None);
    world_note(&mut state, "calm");
}

/// So long without any controller is not a restart that is on its way, in milliseconds.
const NOBODY: u64 = 60_000;

/// Looks until everything fits. What still does not in the end is a violation.
async fn comes_to_order(world: &World) {
    let until = world.now().plus(ORDER);
    loop {
        // Whatever is still on its way arrives first: it is what has to be put right.
        let quiet = world.state().under_way == 0;
        sleep(Duration::from_secs(17)).await;
        if !quiet {
            continue;
        }
        let misfits = misfits(world);
        if misfits.is_empty() {
            return;
        }
        if world.now() >= until {
            for misfit in misfits {
                world.violated(misfit);
            }
            return;
        }
    }
}

fn misfits(world: &World) -> Vec<String> {
    let Ok(seen) = platform::observe(world, &Ask::default()) else {
        return vec!["the platform is down".to_owned()];
    };
    let state = world.state();
    let Some(record) = state.ledger.record.clone() else { return vec!["there is no record".to_owned()] };
    let job = record.job.as_ref().map(|job| &job.id);
    let logs: Vec<LogSeen> = state
        .logs
        .iter()
        .filter(|(id, _)| Some(&id.job) == job)
        // Who was killed while it built never closed its log; whoever goes on does, unless the job ended before that.
        .map(|(id, log)| LogSeen { id: id.clone(), bytes: log.bytes.clone(), closed: true })
        .collect();
    let evidence = Evidence { record: &record, history: &state.ledger.lines, seen: Some(&seen), logs: &logs };
    let mut misfits: Vec<String> = at_rest(&evidence).iter().map(ToString::to_string).collect();
    // Promise 4: what a rollback would restore is there and protected.
    if let Some(snapshot) = &record.snapshot {
        for image in snapshot.deployment.images.values() {
            if !state.images.get(image.digest()).is_some_and(|stored| stored.kept) {
                misfits.push(format!("the way back to {} has lost {image}", snapshot.deployment.version));
            }
        }
    }
    if matches!(record.phase, Phase::Idle) {
        misfits.push("a job was begun and the record says idle".to_owned());
    }
    misfits
}
