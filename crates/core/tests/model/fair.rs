//! From any state, once faults and operators are quiet, the world must come to rest, and at rest everything must fit.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use replank_core::phase::State;
use replank_core::record::ControllerId;
use replank_core::words::RevisionId;

use crate::turn::{Local, act, heard, think};
use crate::world::*;

/// A whole upgrade with a rollback takes about a hundred steps.
const STEPS: usize = 400;

fn print_of(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// Runs the world without further faults. `known` says which worlds are known to rest; the way there is returned.
pub fn comes_to_rest(config: &Config, start: &World, known: impl Fn(u64) -> bool) -> Result<Vec<u64>, String> {
    let mut world = start.clone();
    world.operators.clear();
    for controller in world.controllers.values_mut() {
        controller.silent = false;
    }
    // Mutants tell processes apart by it; nothing else looks at it any more.
    if config.mutant.is_none() {
        world.faults = 0;
    }
    let mut path = vec![];
    for _ in 0..STEPS {
        let print = print_of(&world);
        if known(print) {
            return Ok(path);
        }
        path.push(print);
        if !step(config, &mut world) {
            return match misfit(&world) {
                None => Ok(path),
                Some(why) => Err(format!("{why}: {}", tell(&world))),
            };
        }
    }
    Err(format!("no rest after {STEPS} steps: {}", tell(&world)))
}

fn step(config: &Config, world: &mut World) -> bool {
    if !world.flights.is_empty() {
        let flight = world.flights.remove(0);
        world.carry_out(config, &flight.change, false);
        heard(world, &flight, None);
        return true;
    }
    let ids: Vec<RevisionId> = world.controllers.keys().cloned().collect();
    for id in &ids {
        if world.controllers[id].pending.is_some() {
            act(config, world, id);
            return true;
        }
    }
    for id in &ids {
        if think(config, world, id, Local::Well) {
            return true;
        }
    }
    !std::mem::replace(&mut world.late, true)
}

/// What does not fit, at rest.
fn misfit(world: &World) -> Option<&'static str> {
    let record = &world.record;
    let state = record.phase.state();
    if state.in_flight() {
        return Some("stuck in flight");
    }
    let serving = record.serving.as_ref()?;
    if world.platform.traffic.as_ref() != Some(&serving.revision) {
        return Some("traffic is not where the record says");
    }
    let revisions = &world.platform.revisions;
    let workers = revisions.values().filter(|r| r.containers.get(&worker()).is_some_and(|c| c.running));
    if workers.count() > 1 {
        return Some("two workers run");
    }
    // What serves was never proved, and stays so: something must return after a reboot.
    let running = record.running.as_ref()?;
    if running.revision != serving.revision {
        let returns = |r: &Revision| r.containers.get(&app()).is_some_and(|c| c.alone);
        return (!revisions.values().any(returns)).then_some("nothing would return after a reboot");
    }
    if matches!(state, State::FailedRollout | State::RollbackFailed) {
        return None;
    }
    let Some(there) = revisions.get(&serving.revision) else {
        return Some("what serves does not exist");
    };
    if !there.containers.values().all(|c| c.running && c.alone)
        || there.containers.len() != serving.plan.containers.len()
    {
        return Some("what serves does not run in full, or would not return after a reboot");
    }
    if record.driver.controller != ControllerId::Revision(serving.revision.clone()) {
        return Some("what serves does not drive");
    }
    let beside = revisions.iter().any(|(id, r)| *id != serving.revision && r.containers.values().any(|c| c.running));
    if beside && record.phase.state() != State::FailedPre {
        return Some("something runs beside what serves");
    }
    None
}

pub fn tell(world: &World) -> String {
    let revisions: Vec<String> = world
        .platform
        .revisions
        .iter()
        .map(|(id, r)| {
            let containers: Vec<String> = r
                .containers
                .iter()
                .map(|(n, c)| {
                    format!("{}{}{}", n.as_str(), if c.running { "+" } else { "-" }, if c.alone { "!" } else { "" })
                })
                .collect();
            format!("{id}[{}]", containers.join(" "))
        })
        .collect();
    let ops: Vec<String> = world.record.phase.swap().map_or(vec![], |s| {
        s.ops
            .iter()
            .map(|(op, s)| format!("{}#{}{}", op.name(), s.attempt, if s.observed_at.is_some() { "ok" } else { "" }))
            .collect()
    });
    let text = format!(
        "{} {:?} fault={:?} late={} driver={} serving={:?} running={:?} gen={} | {} traffic={:?}@{} controllers={:?} flights={:?}",
        world.record.phase.state().name(),
        ops,
        match &world.record.phase {
            replank_core::phase::Phase::FailedRollout { fault, .. }
            | replank_core::phase::Phase::RollbackFailed { fault, .. }
            | replank_core::phase::Phase::FailedPre { fault } => fault.what.as_str(),
            _ => "",
        },
        world.late,
        world.record.driver.controller,
        world.record.serving.as_ref().map(|d| d.revision.as_str()),
        world.record.running.as_ref().map(|d| d.revision.as_str()),
        world.record.generation,
        revisions.join(" "),
        world.platform.traffic.as_ref().map(|r| r.as_str()),
        world.platform.generation,
        world
            .controllers
            .iter()
            .map(|(id, c)| format!("{id}{}", if c.pending.is_some() { "*" } else { "" }))
            .collect::<Vec<_>>(),
        world.flights.iter().map(|f| f.task.step.as_str()).collect::<Vec<_>>(),
    );
    text.replace("v0-1-0-zganrqb3", "V1").replace("v0-2-0-iib7ipeh", "V2").replace('"', "")
}
