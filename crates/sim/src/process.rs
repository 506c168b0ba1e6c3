//! Controllers as processes: they begin with their container, die with it, stand still, and come back with nothing in their heads.

use std::sync::Arc;
use std::time::Duration;

use replank::engine::{LocalEngine, Ports, Reconciler, Setup, Shared};
use replank_core::record::ControllerId;
use replank_core::words::{AppName, RevisionId};

use crate::platform;
use crate::ports::Door;
use crate::world::{Process, SimClock, SimIds, State, World, component, container, installation};

/// A controller's container starts to run.
pub(crate) fn begin(world: &Arc<World>, state: &mut State, id: &RevisionId) {
    end(state, id);
    let commit = state.platform.revisions.get(id).map(|r| r.commit.clone());
    let release = commit.and_then(|commit| state.release(&commit));
    let reads = release.map_or(replank_core::format::FIRST, |release| release.reads);
    state.next_process += 1;
    let number = state.next_process;
    let door = Arc::new(Door { world: world.clone(), me: id.clone(), number, reads });
    let ports = Ports {
        clock: Arc::new(SimClock(world.clone())),
        ids: Arc::new(SimIds(world.clone())),
        ledger: door.clone(),
        logs: door.clone(),
        source: Some(door.clone()),
        builder: door.clone(),
        registry: door.clone(),
        local_images: None,
        platform: Some(door.clone()),
    };
    let setup = Arc::new(Setup {
        application: AppName::new("shop").unwrap_or_else(|bad| unreachable!("{bad}")),
        installation: installation(),
        me: ControllerId::Revision(id.clone()),
        instance: format!("process-{number}"),
        policy: world.policy.clone(),
        mode: world.mode,
        on_rollout_failure: world.on_rollout_failure,
        components: vec![component("app"), component("web")],
        own_version: None,
        secrets: Vec::new(),
        recipes: door.clone(),
        room: door,
        reads_format: reads,
    });
    let shared = Arc::new(Shared::default());
    let engine = Arc::new(LocalEngine::new(ports.clone(), setup.clone(), shared.clone()));
    let delay = Duration::from_millis(state.rng.u64(10..3_000));
    let loop_ = tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        Reconciler::new(ports, setup, shared).run(|_| false).await;
    })
    .abort_handle();
    let process = Process { number, paused_until: None, loop_, engine };
    state.processes.insert(id.clone(), process);
}

/// It is gone, with all that it had in its head. What it had asked for is not.
pub(crate) fn end(state: &mut State, id: &RevisionId) {
    if let Some(process) = state.processes.remove(id) {
        process.loop_.abort();
    }
}

/// It is killed, and its container with it.
pub(crate) fn kill(world: &Arc<World>, id: &RevisionId) {
    let name = container("controller");
    let started = {
        let mut state = world.state();
        end(&mut state, id);
        state.platform.revisions.get(id).and_then(|r| r.containers.get(&name)).map(|c| c.started)
    };
    world.tell(|| format!("KILL {id}"));
    if let Some(started) = started {
        platform::exits(world, id, &name, started);
    }
}
