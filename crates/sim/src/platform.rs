//! The made-up engine and proxy: revisions of containers, traffic with generations, reboots. It remembers no request: it looks at
//! what is there, and does what it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use replank_core::fault::Fault;
use replank_core::image::ImageId;
use replank_core::ports::{Ask, Change, ContainerSeen, Observation, Probed, RevisionSeen, Running, TrafficSeen};
use replank_core::record::{Deployment, Overlap};
use replank_core::words::{CommitSha, ContainerName, Millis, OpKey, RevisionId};

use crate::chance::Health;
use crate::process;
use crate::world::{Mutant, State, World, container};

#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub image: ImageId,
    pub running: bool,
    pub exit_code: Option<i64>,
    /// Returns by itself after a crash and after a reboot.
    pub alone: bool,
    pub started: u32,
    pub started_at: Millis,
    pub controller: bool,
    /// May run beside its successor.
    pub overlaps: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Revision {
    pub key: OpKey,
    pub commit: CommitSha,
    pub containers: BTreeMap<ContainerName, Container>,
    pub stopped_at: Option<Millis>,
    /// When it first got traffic.
    pub served_at: Option<Millis>,
}

impl Revision {
    fn runs(&self) -> bool {
        self.containers.values().any(|c| c.running)
    }
}

#[derive(Debug, Default)]
pub(crate) struct PlatformState {
    pub revisions: BTreeMap<RevisionId, Revision>,
    pub traffic: Option<RevisionId>,
    pub generation: u64,
    pub fallback: Option<RevisionId>,
    /// The machine is down until then.
    pub down_until: Option<Millis>,
}

fn conflict(what: &str) -> Fault {
    Fault::conflict(what)
}

/// Carries a change out. `partly`: the machinery dies after the first container.
pub(crate) fn carry_out(world: &Arc<World>, change: &Change, partly: bool) -> Result<(), Fault> {
    let now = world.now();
    let mut state = world.state();
    if state.platform.down_until.is_some_and(|until| now < until) {
        return Err(Fault::transient("the engine is down"));
    }
    let heeds_generations = world.mutant != Some(Mutant::ProxyIgnoresGenerations);
    match change {
        Change::Start { deployment, containers } => start(world, &mut state, deployment, containers, partly),
        Change::Stop { deployment, containers } => {
            let beyond = deployment.plan.with_overlap(Overlap::Allowed).any(|name| containers.contains(name));
            if beyond && state.platform.traffic.as_ref() == Some(&deployment.revision) {
                return Err(conflict("traffic goes there"));
            }
            stop(&mut state, &deployment.revision, containers.iter().take(if partly { 1 } else { usize::MAX }), now);
            Ok(())
        }
        Change::Shift { to, generation, fallback } => {
            let platform = &mut state.platform;
            if platform.generation == *generation && platform.traffic.as_ref() == Some(&to.revision) {
                return Ok(());
            }
            if *generation <= platform.generation && heeds_generations {
                return Err(conflict("the proxy knows a newer generation"));
            }
            if !platform.revisions.get(&to.revision).is_some_and(Revision::runs) {
                return Err(conflict("nothing of it runs"));
            }
            move_traffic(&mut state, &to.revision, now);
            state.platform.generation = *generation;
            state.platform.fallback = fallback.as_ref().map(|d| d.revision.clone());
            if let Some(kept) = fallback.as_ref().and_then(|d| state.platform.revisions.get_mut(&d.revision)) {
                kept.containers.values_mut().filter(|c| c.running).for_each(|c| c.alone = true);
            }
            Ok(())
        }
        Change::Settle { deployment, not, generation } => {
            if *generation < state.platform.generation && heeds_generations {
                return Err(conflict("the proxy knows a newer generation"));
            }
            let there = state.platform.revisions.get(&deployment.revision);
            let up = |name| there.and_then(|r| r.containers.get(name)).is_some_and(|c| c.running);
            if !deployment.plan.containers.keys().all(up) {
                return Err(conflict("not every container of it runs"));
            }
            for (id, revision) in &mut state.platform.revisions {
                for container in revision.containers.values_mut() {
                    if *id == deployment.revision {
                        container.alone = true;
                    } else if not.contains(id) {
                        container.alone = false;
                    }
                }
            }
            if !partly {
                move_traffic(&mut state, &deployment.revision, now);
                state.platform.fallback = None;
                state.platform.generation = *generation;
            }
            Ok(())
        }
        Change::Halt { revision } => {
            if state.platform.traffic.as_ref() == Some(revision) {
                return Err(conflict("traffic goes there"));
            }
            is_not_needed(&mut state, revision, true, "halted");
            let names: Vec<ContainerName> =
                state.platform.revisions.get(revision).iter().flat_map(|r| r.containers.keys().cloned()).collect();
            stop(&mut state, revision, names.iter().take(if partly { 1 } else { usize::MAX }), now);
            Ok(())
        }
        Change::Remove { revision } => {
            if state.platform.traffic.as_ref() == Some(revision) {
                return Err(conflict("traffic goes there"));
            }
            if state.platform.revisions.get(revision).is_some_and(Revision::runs) {
                return Err(conflict("it runs"));
            }
            // Nothing of it runs: what a job is going to start, and this took away first, it makes anew.
            is_not_needed(&mut state, revision, false, "removed");
            process::end(&mut state, revision);
            state.platform.revisions.remove(revision);
            Ok(())
        }
    }
}

/// `starts`: what the job in flight starts is needed too.
fn is_not_needed(state: &mut State, revision: &RevisionId, starts: bool, what: &str) {
    let Some(r) = state.ledger.record.clone() else { return };
    let in_flight = r.phase.swap().filter(|_| starts && r.phase.state().in_flight()).map(|s| &s.to);
    // The snapshot's containers go after their time; its images are what stays.
    let needed = [r.running.as_ref(), r.serving.as_ref(), in_flight];
    if needed.into_iter().flatten().any(|d| d.revision == *revision) {
        state.violations.push(format!("revision {revision} is needed and was {what}"));
    }
}

fn move_traffic(state: &mut State, to: &RevisionId, now: Millis) {
    if state.platform.traffic.as_ref() != Some(to) {
        state.through = 0;
    }
    state.platform.traffic = Some(to.clone());
    if let Some(revision) = state.platform.revisions.get_mut(to) {
        revision.served_at.get_or_insert(now);
    }
}

fn start(
    world: &Arc<World>,
    state: &mut State,
    deployment: &Deployment,
    containers: &BTreeSet<ContainerName>,
    partly: bool,
) -> Result<(), Fault> {
    let now = world.now();
    let record = state.ledger.record.clone();
    let early = record.as_ref().is_some_and(|r| {
        r.phase.state().before_swap() && r.job.as_ref().is_some_and(|job| job.key("revision", 1) == deployment.key)
    });
    if early {
        state.violations.push(format!("{} was touched before everything was built", deployment.revision));
    }
    for name in containers.iter().take(if partly { 1 } else { usize::MAX }) {
        let Some(plan) = deployment.plan.containers.get(name) else { continue };
        let Some(image) = deployment.images.get(&plan.component) else { continue };
        let exists =
            state.platform.revisions.get(&deployment.revision).is_some_and(|r| r.containers.contains_key(name));
        if !exists && !state.images.contains_key(image.digest()) {
            return Err(Fault::permanent(format!("image {image} is gone")));
        }
        let revision = state.platform.revisions.entry(deployment.revision.clone()).or_insert_with(|| Revision {
            key: deployment.key.clone(),
            commit: deployment.commit.clone(),
            containers: BTreeMap::new(),
            stopped_at: None,
            served_at: None,
        });
        if revision.key != deployment.key {
            return Err(conflict("a look-alike stands there"));
        }
        let container = revision.containers.entry(name.clone()).or_insert_with(|| Container {
            image: image.clone(),
            running: false,
            exit_code: None,
            alone: false,
            started: 0,
            started_at: now,
            controller: plan.controller,
            overlaps: plan.overlap == Overlap::Allowed,
        });
        if !container.running {
            run(world, state, &deployment.revision, name);
        }
    }
    Ok(())
}

/// A container begins to run: by a start, or by itself after a reboot or a crash.
pub(crate) fn run(world: &Arc<World>, state: &mut State, id: &RevisionId, name: &ContainerName) {
    let now = world.now();
    let Some(revision) = state.platform.revisions.get_mut(id) else { return };
    revision.stopped_at = None;
    let commit = revision.commit.clone();
    let Some(there) = revision.containers.get_mut(name) else { return };
    (there.running, there.exit_code, there.started_at) = (true, None, now);
    there.started += 1;
    let (controller, started) = (there.controller, there.started);
    if controller {
        process::begin(world, state, id);
    }
    let crashes = match state.release(&commit).map(|release| release.health) {
        Some(Health::Crashes(times)) => *name == container("web") && started <= times,
        _ => false,
    };
    if crashes {
        let (world, id, name) = (world.clone(), id.clone(), name.clone());
        let after = state.rng.u64(50..3_000);
        tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(after)).await;
            exits(&world, &id, &name, started);
        });
    }
}

/// A container's program ends by itself, if it is still the same one.
pub(crate) fn exits(world: &Arc<World>, id: &RevisionId, name: &ContainerName, started: u32) {
    let now = world.now();
    let mut state = world.state();
    let after = state.rng.u64(100..20_000);
    let Some(revision) = state.platform.revisions.get_mut(id) else { return };
    let Some(there) = revision.containers.get_mut(name).filter(|c| c.running && c.started == started) else { return };
    (there.running, there.exit_code) = (false, Some(1));
    let (alone, controller) = (there.alone, there.controller);
    if !revision.runs() {
        revision.stopped_at = Some(now);
    }
    if controller {
        process::end(&mut state, id);
    }
    if alone {
        let (world, id, name) = (world.clone(), id.clone(), name.clone());
        tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(after)).await;
            let mut state = world.state();
            let there = state.platform.revisions.get(&id).and_then(|r| r.containers.get(&name));
            if there.is_some_and(|c| !c.running && c.alone && c.started == started) {
                run(&world, &mut state, &id, &name);
            }
        });
    }
}

fn stop<'a>(state: &mut State, id: &RevisionId, names: impl Iterator<Item = &'a ContainerName>, now: Millis) {
    let mut controller = false;
    let Some(revision) = state.platform.revisions.get_mut(id) else { return };
    for name in names {
        if let Some(there) = revision.containers.get_mut(name) {
            controller |= there.controller && there.running;
            if there.running {
                there.exit_code = Some(0);
            }
            (there.running, there.alone) = (false, false);
        }
    }
    if !revision.runs() {
        revision.stopped_at.get_or_insert(now);
    }
    if controller {
        process::end(state, id);
    }
}

/// Somebody stops a container of what serves, by hand. As an engine has it: it returns with the machine, and not by itself.
pub(crate) fn stop_by_hand(state: &mut State) -> Option<(RevisionId, ContainerName)> {
    let id = state.platform.traffic.clone()?;
    let revision = state.platform.revisions.get_mut(&id)?;
    let (name, there) = revision.containers.iter_mut().find(|(_, c)| c.running && !c.controller)?;
    (there.running, there.exit_code) = (false, Some(0));
    // Whatever it was to do by itself is of no interest any more.
    there.started += 1;
    Some((id, name.clone()))
}

/// ... and starts it again, unless it runs already, or nobody needs its revision any more. Traffic may still be on its way to it.
pub(crate) fn start_by_hand(world: &Arc<World>, (id, name): &(RevisionId, ContainerName)) {
    let mut state = world.state();
    let there = state.platform.revisions.get(id).and_then(|revision| revision.containers.get(name));
    let record = state.ledger.record.as_ref();
    let needed = record.into_iter().flat_map(|r| [&r.serving, &r.running]).flatten().any(|d| d.revision == *id);
    if needed && there.is_some_and(|c| !c.running) {
        run(world, &mut state, id, name);
    }
}

/// Somebody starts the controller of what serves, which nothing else would start again.
pub(crate) fn start_controller_by_hand(world: &Arc<World>) {
    let state = world.state();
    let Some(id) = state.platform.traffic.clone() else { return };
    let containers = state.platform.revisions.get(&id).map(|revision| &revision.containers);
    let controller = containers.and_then(|all| all.iter().find(|(_, c)| c.controller)).map(|(name, _)| name.clone());
    drop(state);
    if let Some(name) = controller {
        world.tell(|| format!("carol starts {name} of {id}"));
        start_by_hand(world, &(id, name));
    }
}

/// Power goes and comes back: what returns alone runs again, and the proxy serves its fallback.
pub(crate) fn reboot(world: &Arc<World>) {
    let now = world.now();
    let mut state = world.state();
    let down = state.rng.u64(2_000..25_000);
    state.platform.down_until = Some(now.plus(down));
    let ids: Vec<RevisionId> = state.platform.revisions.keys().cloned().collect();
    for id in &ids {
        process::end(&mut state, id);
        if let Some(revision) = state.platform.revisions.get_mut(id) {
            for there in revision.containers.values_mut().filter(|c| c.running) {
                (there.running, there.exit_code) = (false, Some(137));
                // A restart that a crash had scheduled is not one any more.
                there.started += 1;
            }
            revision.stopped_at.get_or_insert(now);
        }
    }
    let world = world.clone();
    tokio::spawn(async move {
        tokio::time::sleep(std::time::Duration::from_millis(down)).await;
        let now = world.now();
        let mut state = world.state();
        if let Some(fallback) = state.platform.fallback.clone() {
            move_traffic(&mut state, &fallback, now);
        }
        let mut alone = Vec::new();
        for (id, revision) in &state.platform.revisions {
            let names = revision.containers.iter().filter(|(_, c)| c.alone && !c.running);
            alone.extend(names.map(|(name, _)| (id.clone(), name.clone())));
        }
        for (id, name) in alone {
            run(&world, &mut state, &id, &name);
        }
    });
}

/// Whether a revision answers its probes now.
fn answers(state: &mut State, id: &RevisionId, now: Millis) -> Probed {
    let failed = |why: &str| Probed::Failed(why.to_owned());
    let Some(revision) = state.platform.revisions.get(id) else { return failed("nothing is there") };
    let probed = |c: &&Container| c.overlaps;
    if !revision.containers.values().filter(probed).all(|c| c.running) {
        return failed("connection refused");
    }
    let up_since = revision.containers.values().filter(probed).map(|c| c.started_at).max().unwrap_or(now);
    let served = revision.served_at;
    let commit = revision.commit.clone();
    match state.release(&commit).map(|release| release.health) {
        Some(Health::Never) => failed("503"),
        Some(Health::Slow(after)) if now.since(up_since) < after => failed("starting"),
        Some(Health::Degrades(after)) if served.is_some_and(|at| now.since(at) >= after) => failed("500"),
        Some(Health::Flickers) if state.rng.u32(0..4) == 0 => failed("502"),
        Some(Health::Good | Health::Slow(_) | Health::Degrades(_) | Health::Crashes(_) | Health::Flickers) | None => {
            Probed::Passed
        }
    }
}

/// A true look.
pub(crate) fn observe(world: &World, ask: &Ask) -> Result<Observation, Fault> {
    let now = world.now();
    let mut state = world.state();
    let state = &mut *state;
    if state.platform.down_until.is_some_and(|until| now < until) {
        return Err(Fault::transient("the engine is down"));
    }
    let told = |truth: Probed| if world.mutant == Some(Mutant::ProbesLie) { Probed::Passed } else { truth };
    let ids: Vec<RevisionId> = state.platform.revisions.keys().cloned().collect();
    let mut revisions = BTreeMap::new();
    for id in ids {
        let asked = ask.direct.iter().any(|d| d.revision == id);
        let probed = if asked { told(answers(state, &id, now)) } else { Probed::NotAsked };
        let Some(revision) = state.platform.revisions.get(&id) else { continue };
        let containers = revision.containers.iter().map(|(name, there)| {
            let fresh = there.running && there.started > 1 && now.since(there.started_at) < 10_000;
            let seen = ContainerSeen {
                image: there.image.clone(),
                running: if there.running { Running::Running } else { Running::Stopped },
                exit_code: there.exit_code.filter(|_| !there.running),
                trouble: fresh.then(|| "restarted a moment ago".to_owned()),
            };
            (name.clone(), seen)
        });
        let seen = RevisionSeen {
            key: Some(revision.key.clone()),
            commit: Some(revision.commit.clone()),
            containers: containers.collect(),
            probed,
            returns_alone: !revision.containers.is_empty() && revision.containers.values().all(|c| c.alone),
            stopped_at: revision.stopped_at,
        };
        revisions.insert(id, seen);
    }
    let probed = match (&ask.through, state.platform.traffic.clone()) {
        (Some(want), Some(id)) => {
            let answer = answers(state, &id, now);
            state.through = if answer == Probed::Passed { state.through + 1 } else { 0 };
            // The version that answers is not the one that was asked for.
            if id == want.revision { told(answer) } else { Probed::Failed("another version answered".to_owned()) }
        }
        (Some(_), None) => Probed::Failed("nothing is routed".to_owned()),
        (None, _) => Probed::NotAsked,
    };
    let platform = &state.platform;
    let (revision, generation, fallback) = (platform.traffic.clone(), platform.generation, platform.fallback.clone());
    Ok(Observation { at: now, revisions, traffic: TrafficSeen { revision, generation, fallback, probed } })
}
