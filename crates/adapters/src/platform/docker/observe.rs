//! What runs, where traffic goes and what answers: one look, of this installation's things only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bollard::models::{
    ContainerInspectResponse, ContainerState, ContainerStateStatusEnum, HealthStatusEnum, RestartPolicyNameEnum,
};
use bollard::query_parameters::{InspectContainerOptions, ListContainersOptionsBuilder};
use futures_util::future::join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use replank_core::fault::Fault;
use replank_core::image::ImageId;
use replank_core::mask::mask_sentence;
use replank_core::ports::{Ask, ContainerSeen, Observation, Probed, RevisionSeen, Running, TrafficSeen};
use replank_core::record::{Deployment, Overlap};
use replank_core::words::{ContainerName, Digest, Millis, RevisionId};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::change::labels_of;
use super::config::ProbeConfig;
use super::labels::{self, Carried};
use super::proxy_api::{Protocol, State};
use super::spec::RunSpec;
use super::{DockerPlatform, Vantage, names, probe};
use crate::engine::{Engine, classify, is_missing};

/// Containers inspected at the same time: each is a connection to the engine.
const INSPECTIONS: usize = 8;
/// A container that was restarted by the engine less than this ago is in trouble even while it runs.
const FRESH: u64 = 10_000;
/// A controller may die at any moment and goes on where it was: that it was brought back once says nothing about its release. One
/// that cannot run does not come to stand still here: it does not answer its probe, and another controller takes over.
const CONTROLLER_RESTARTS: i64 = 1;
/// Longest text of trouble that is passed on from the engine.
const TROUBLE_MAX: usize = 200;

/// One container of ours, with what probes and routes need beside what is reported.
struct Seen {
    carried: Carried,
    id: String,
    running: bool,
    returns: bool,
    stopped_at: Option<Millis>,
    report: ContainerSeen,
}

/// An error only where the engine cannot be asked: a proxy that does not answer is something observed.
pub(super) async fn observe(platform: &DockerPlatform, ask: &Ask) -> Result<Observation, Fault> {
    let engine = platform.engine()?;
    let at = platform.clock.now();
    let seen = containers(platform, &engine, at).await?;
    let state = platform.proxy.state().await;
    let serving = state.as_ref().ok().and_then(|s| s.serving.clone());

    let probes = join_all(ask.direct.iter().map(|deployment| async {
        (deployment.revision.clone(), direct(platform, deployment, &seen, serving.as_deref()).await)
    }));
    let (probed, traffic) = tokio::join!(probes, traffic(platform, ask, state));
    let mut probed: BTreeMap<RevisionId, Probed> = probed.into_iter().collect();

    let mut grouped: BTreeMap<RevisionId, Vec<Seen>> = BTreeMap::new();
    for one in seen {
        grouped.entry(one.carried.revision.clone()).or_default().push(one);
    }
    let revisions = grouped.into_iter().map(|(revision, containers)| {
        let probed = probed.remove(&revision).unwrap_or(Probed::NotAsked);
        let seen = group(containers, probed);
        (revision, seen)
    });
    Ok(Observation { at, revisions: revisions.collect(), traffic })
}

fn group(containers: Vec<Seen>, probed: Probed) -> RevisionSeen {
    let agree = |a: &Seen, b: &Seen| a.carried.key == b.carried.key && a.carried.commit == b.carried.commit;
    let first = containers.first().filter(|first| containers.iter().all(|other| agree(first, other)));
    let (key, commit) = first.map_or((None, None), |f| (f.carried.key.clone(), f.carried.commit.clone()));
    // Half of a revision does not return as one: whoever settles it again gets it finished.
    let returns_alone = containers.iter().all(|c| c.returns);
    let stopped = |c: &Seen| c.stopped_at.filter(|_| c.report.running == Running::Stopped);
    let stopped_at = if containers.iter().any(|c| c.report.running == Running::Running) {
        None
    } else {
        containers.iter().filter_map(stopped).max()
    };
    let containers = containers.into_iter().map(|c| (c.carried.container, c.report)).collect();
    RevisionSeen { key, commit, containers, probed, returns_alone, stopped_at }
}

async fn containers(platform: &DockerPlatform, engine: &Engine, at: Millis) -> Result<Vec<Seen>, Fault> {
    let filter = platform.owner.filter(&[(labels::ROLE, labels::ROLE_APP)]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filter).build();
    let listed = engine
        .docker()
        .list_containers(Some(options))
        .await
        .map_err(|error| classify(error, "the engine's containers cannot be listed"))?;
    let ids: Vec<String> = listed.into_iter().filter_map(|c| c.id).collect();
    let inspected: Vec<Option<Seen>> = stream::iter(ids)
        .map(|id| async move {
            let found = match engine.docker().inspect_container(&id, None::<InspectContainerOptions>).await {
                Ok(found) => found,
                // Gone since it was listed.
                Err(error) if is_missing(&error) => return Ok(None),
                Err(error) => return Err(classify(error, &format!("container {id} cannot be inspected"))),
            };
            let Some(carried) = Carried::read(&labels_of(&found)) else {
                tracing::warn!(container = %id, "a container of this installation has labels that are not understood");
                return Ok(None);
            };
            let is_controller = platform.config.containers.get(&carried.container).is_some_and(|run| run.controller);
            seen(engine, carried, id, &found, at, is_controller).await.map(Some)
        })
        .buffered(INSPECTIONS)
        .try_collect()
        .await?;
    Ok(inspected.into_iter().flatten().collect())
}

async fn seen(
    engine: &Engine,
    carried: Carried,
    id: String,
    found: &ContainerInspectResponse,
    at: Millis,
    is_controller: bool,
) -> Result<Seen, Fault> {
    let state = found.state.clone().unwrap_or_default();
    let running = match state.status.unwrap_or(ContainerStateStatusEnum::EMPTY) {
        ContainerStateStatusEnum::CREATED => Running::Created,
        ContainerStateStatusEnum::RUNNING
        | ContainerStateStatusEnum::PAUSED
        | ContainerStateStatusEnum::RESTARTING
        | ContainerStateStatusEnum::STOPPING => Running::Running,
        ContainerStateStatusEnum::EXITED
        | ContainerStateStatusEnum::DEAD
        | ContainerStateStatusEnum::REMOVING
        | ContainerStateStatusEnum::EMPTY => Running::Stopped,
    };
    let report = ContainerSeen {
        image: image(engine, &carried, found).await?,
        running,
        exit_code: if running == Running::Stopped { state.exit_code } else { None },
        trouble: trouble(&state, found.restart_count.unwrap_or(0), at, is_controller),
    };
    let policy = found.host_config.as_ref().and_then(|h| h.restart_policy.as_ref()).and_then(|r| r.name);
    let returns = match policy.unwrap_or(RestartPolicyNameEnum::EMPTY) {
        RestartPolicyNameEnum::ALWAYS | RestartPolicyNameEnum::UNLESS_STOPPED => true,
        RestartPolicyNameEnum::EMPTY | RestartPolicyNameEnum::NO | RestartPolicyNameEnum::ON_FAILURE => false,
    };
    let really = state.running.unwrap_or(false) && !state.restarting.unwrap_or(false);
    Ok(Seen { carried, id, running: really, returns, stopped_at: time(state.finished_at.as_deref()), report })
}

/// The image that really runs: the intended one where it is, in the words in which it was intended, else the engine's id.
async fn image(engine: &Engine, carried: &Carried, found: &ContainerInspectResponse) -> Result<ImageId, Fault> {
    let real = found.image.clone().unwrap_or_default();
    let name = found.config.as_ref().and_then(|c| c.image.clone()).unwrap_or_default();
    let other = |name: String| match Digest::new(real.clone()) {
        Ok(id) => Ok(ImageId::Engine { id, name }),
        Err(error) => {
            Err(Fault::permanent("the engine names an image in a form that is not understood").because(error))
        }
    };
    match &carried.image {
        None => other(name),
        Some(ImageId::Engine { id, .. }) if id.as_str() != real => other(name),
        Some(intended @ ImageId::Engine { .. }) => Ok(intended.clone()),
        // What the digest was resolved to when the container was made cannot change: labels are fixed, digests are content.
        Some(intended @ ImageId::Manifest { .. }) if carried.image_id.as_deref() == Some(real.as_str()) => {
            Ok(intended.clone())
        }
        // Made by hand from the escape hatch's commands: ask the engine which digests it knows the image by.
        Some(intended @ ImageId::Manifest { .. }) => {
            let digests = match engine.docker().inspect_image(&real).await {
                Ok(image) => image.repo_digests.unwrap_or_default(),
                Err(error) if is_missing(&error) => Vec::new(),
                Err(error) => return Err(classify(error, "an image cannot be inspected")),
            };
            if digests.contains(&intended.reference()) { Ok(intended.clone()) } else { other(name) }
        }
    }
}

/// What the engine says is wrong. A container that ended by a signal was most likely stopped, which is no trouble.
fn trouble(state: &ContainerState, restarts: i64, at: Millis, is_controller: bool) -> Option<String> {
    /// Exit codes of SIGKILL and SIGTERM: how a stop ends.
    const STOPPED: [i64; 2] = [137, 143];
    let code = state.exit_code.unwrap_or(0);
    let said = state.error.as_deref().unwrap_or("").trim();
    let with = |text: String| if said.is_empty() { text } else { format!("{text}: {said}") };
    let allowed = if is_controller { CONTROLLER_RESTARTS } else { 0 };
    let fresh = time(state.started_at.as_deref()).is_some_and(|started| at.since(started) < FRESH);
    let text = match state.status.unwrap_or(ContainerStateStatusEnum::EMPTY) {
        ContainerStateStatusEnum::RESTARTING => with(format!("crash loop: ended with code {code} and is restarted")),
        ContainerStateStatusEnum::DEAD => with("the engine could not remove it".to_owned()),
        ContainerStateStatusEnum::PAUSED => "paused".to_owned(),
        _ if state.oom_killed.unwrap_or(false) => "killed: out of memory".to_owned(),
        ContainerStateStatusEnum::EXITED if code != 0 && !STOPPED.contains(&code) => {
            with(format!("crashed: ended with code {code}"))
        }
        ContainerStateStatusEnum::CREATED if !said.is_empty() => with("could not be started".to_owned()),
        ContainerStateStatusEnum::RUNNING
            if state.health.as_ref().and_then(|h| h.status) == Some(HealthStatusEnum::UNHEALTHY) =>
        {
            "unhealthy: its image's own check fails".to_owned()
        }
        ContainerStateStatusEnum::RUNNING if restarts > allowed && fresh => {
            format!("crash loop: restarted {restarts} times, the last time just now")
        }
        _ => return None,
    };
    Some(mask_sentence(&text, TROUBLE_MAX))
}

/// The engine writes year 1 for "never".
fn time(text: Option<&str>) -> Option<Millis> {
    let at: jiff::Timestamp = text?.parse().ok()?;
    Some(Millis(at.as_millisecond())).filter(|at| at.0 > 0)
}

// --- Probes ------------------------------------------------------------------------------------------------------

/// Every probe of a deployment, each by a tunnel to its container.
async fn direct(platform: &DockerPlatform, deployment: &Deployment, seen: &[Seen], serving: Option<&str>) -> Probed {
    let spec = match RunSpec::of(&deployment.plan) {
        Ok(spec) => spec,
        Err(fault) => return Probed::Failed(fault.chain()),
    };
    let serves = serving == Some(deployment.revision.as_str());
    let one = |name: ContainerName| {
        let found = seen.iter().find(|c| c.carried.belongs(deployment, &name));
        let probe = spec.containers.get(&name).and_then(|c| c.run.probe.clone());
        let overlap = deployment.plan.containers.get(&name).map_or(Overlap::Allowed, |plan| plan.overlap);
        async move {
            match (found.filter(|c| c.running), probe) {
                (Some(found), Some(probe)) => {
                    let asked = by_tunnel(platform, &found.id, &probe, deployment, &name).await;
                    asked.map_err(|why| format!("{name} {why}"))
                }
                (Some(_), None) => Ok(()),
                // Its turn has not come: it starts when traffic has moved.
                (None, _) if overlap == Overlap::StartAfterCutover && !serves => Ok(()),
                (None, Some(_)) => Err(format!("{name} does not run")),
                // Without a probe only what may always run is expected to; the rest shows in its own state.
                (None, None) if overlap == Overlap::Allowed => Err(format!("{name} does not run")),
                (None, None) => Ok(()),
            }
        }
    };
    verdict(join_all(deployment.plan.containers.keys().cloned().map(one)).await)
}

async fn by_tunnel(
    platform: &DockerPlatform,
    id: &str,
    probe: &ProbeConfig,
    deployment: &Deployment,
    name: &ContainerName,
) -> Result<(), String> {
    let tunnel = platform.proxy.tunnel(id, probe.port).await.map_err(|why| format!("cannot be asked: {why}"))?;
    if probe.tcp {
        return Ok(());
    }
    probe::ask(tunnel, probe, name.as_str(), &deployment.version).await
}

fn verdict(results: Vec<Result<(), String>>) -> Probed {
    let failures: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() { Probed::Passed } else { Probed::Failed(failures.join("; ")) }
}

async fn traffic(platform: &DockerPlatform, ask: &Ask, state: Result<State, Fault>) -> TrafficSeen {
    let state = match state {
        Ok(state) => state,
        Err(fault) => {
            tracing::debug!(error = %fault.chain(), "the proxy does not answer");
            let probed = Probed::Failed(fault.told().sentence());
            return TrafficSeen { revision: None, generation: 0, fallback: None, probed };
        }
    };
    let word = |text: &str| RevisionId::new(text).ok();
    let probed = match &ask.through {
        None => Probed::NotAsked,
        Some(deployment) => through(platform, deployment, &state).await,
    };
    TrafficSeen {
        revision: state.serving.as_deref().and_then(word),
        generation: state.routes.as_ref().map_or(0, |r| r.generation),
        fallback: state.routes.as_ref().and_then(|r| r.fallback.as_ref()).and_then(|side| word(&side.revision)),
        probed,
    }
}

/// The public way in: each listener whose container proves itself on that same port, as a client would ask.
async fn through(platform: &DockerPlatform, deployment: &Deployment, state: &State) -> Probed {
    if state.serving.as_deref() != Some(deployment.revision.as_str()) {
        return Probed::Failed(format!(
            "traffic goes to {}, not to {}",
            state.serving.as_deref().unwrap_or("nobody"),
            deployment.revision
        ));
    }
    let spec = match RunSpec::of(&deployment.plan) {
        Ok(spec) => spec,
        Err(fault) => return Probed::Failed(fault.chain()),
    };
    let mut asked = BTreeSet::new();
    let mut work = Vec::new();
    for (name, listener) in &platform.config.listeners {
        let Some(upstream) = spec.listeners.get(name) else { continue };
        let probe = spec.containers.get(&upstream.container).and_then(|c| c.run.probe.as_ref());
        let Some(probe) = probe.filter(|probe| probe.port == upstream.port) else { continue };
        if asked.insert(listener.inside()) {
            let plain = probe.tcp || listener.protocol == Protocol::Tcp || listener.tls.is_some();
            let (host, port) = way_in(platform, listener);
            work.push(async move {
                let asked = by_listener(&host, port, plain, probe, deployment).await;
                asked.map_err(|why| format!("listener {name} {why}"))
            });
        }
    }
    verdict(join_all(work).await)
}

/// Where this process reaches a listener: the published port from the host, the proxy by name from a revision's network.
pub(super) fn way_in(platform: &DockerPlatform, listener: &super::config::ListenerConfig) -> (String, u16) {
    match &platform.vantage {
        Vantage::Inside(_) => (names::proxy(&platform.config.application), listener.inside()),
        Vantage::Host => {
            let address = match listener.bind {
                IpAddr::V4(any) if any.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(any) if any.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
                other => other,
            };
            (SocketAddr::new(address, 0).ip().to_string(), listener.publish)
        }
    }
}

/// `plain`: only a connection. A TLS listener's certificate is for its public name, which only a client knows; what stands
/// behind it is proved by the direct probes and by the route.
async fn by_listener(
    host: &str,
    port: u16,
    plain: bool,
    probe: &ProbeConfig,
    deployment: &Deployment,
) -> Result<(), String> {
    let patience = Duration::from_millis(probe.timeout_ms);
    let stream = timeout(patience, TcpStream::connect((host, port)))
        .await
        .map_err(|_| format!("took no connection within {} ms", probe.timeout_ms))?
        .map_err(|error| format!("takes no connection: {error}"))?;
    if plain {
        return Ok(());
    }
    probe::ask(stream, probe, host, &deployment.version).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_restart_is_trouble_for_everything_but_a_controller() {
        let running = |seconds_ago: i64| ContainerState {
            status: Some(ContainerStateStatusEnum::RUNNING),
            started_at: Some(jiff::Timestamp::from_second(1_000 - seconds_ago).unwrap().to_string()),
            ..ContainerState::default()
        };
        let at = Millis(1_000_000);
        for (restarts, seconds_ago, is_controller, in_trouble) in [
            (0, 1, false, false),
            (1, 1, false, true),
            (1, 60, false, false),
            // It may be killed at any moment, and goes on.
            (1, 1, true, false),
            (2, 1, true, true),
            (2, 60, true, false),
        ] {
            let found = trouble(&running(seconds_ago), restarts, at, is_controller);
            assert_eq!(found.is_some(), in_trouble, "{restarts} {seconds_ago} {is_controller}: {found:?}");
        }
    }
}
