//! Changes of the platform: each one looks first whether it is done, touches only what carries this installation's id,
//! and replaces nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bollard::models::{ContainerInspectResponse, ContainerUpdateBody, NetworkDisconnectRequest, RestartPolicyNameEnum};
use bollard::query_parameters::{
    CreateContainerOptions, InspectContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptions,
    StartContainerOptions, StopContainerOptions,
};
use replank_core::fault::Fault;
use replank_core::ports::Change;
use replank_core::record::{Deployment, Overlap};
use replank_core::words::{ContainerName, RevisionId};
use tokio::time::Instant;

use super::config::STOP_GRACE_MAX_SECONDS;
use super::labels::{self, Carried, Owner};
use super::proxy_api::{Backend, Routes, Side};
use super::spec::RunSpec;
use super::traffic::Sent;
use super::{DockerPlatform, Vantage, create, names, pull, renewal};
use crate::engine::{ANSWER_TIMEOUT, Engine, classify, is_missing};

/// Between two looks at a container's open requests: short beside any grace, long beside the proxy's answer.
const DRAIN_POLL: Duration = Duration::from_millis(200);

pub(super) async fn change(platform: &DockerPlatform, change: &Change) -> Result<(), Fault> {
    let _undisturbed = renewal::undisturbed(platform).await?;
    let engine = platform.engine()?;
    let work = Work { platform, engine: &engine };
    match change {
        Change::Start { deployment, containers } => work.start(deployment, containers).await,
        Change::Stop { deployment, containers } => work.stop(deployment, containers).await,
        Change::Shift { to, generation, fallback } => work.shift(to, *generation, fallback.as_ref()).await,
        Change::Settle { deployment, not, generation } => work.settle(deployment, not, *generation).await,
        Change::Halt { revision } => work.halt(revision).await,
        Change::Remove { revision } => work.remove(revision).await,
    }
}

/// Side by side, and each to its end: one that fails must not leave the others half done. The first fault is the answer.
async fn all(work: impl Iterator<Item = impl Future<Output = Result<(), Fault>>>) -> Result<(), Fault> {
    futures_util::future::join_all(work).await.into_iter().collect()
}

pub(super) struct Work<'a> {
    pub(super) platform: &'a DockerPlatform,
    pub(super) engine: &'a Engine,
}

/// A container of ours as the engine has it.
struct Ours {
    id: String,
    running: bool,
    /// Waits for the engine's next try after a crash, which the engine counts as running.
    restarting: bool,
    networks: BTreeSet<String>,
    restart: Option<RestartPolicyNameEnum>,
}

impl Ours {
    fn of(found: ContainerInspectResponse) -> Self {
        let state = found.state.as_ref();
        Self {
            running: state.and_then(|s| s.running).unwrap_or(false),
            restarting: state.and_then(|s| s.restarting).unwrap_or(false),
            id: found.id.unwrap_or_default(),
            networks: found
                .network_settings
                .and_then(|n| n.networks)
                .into_iter()
                .flatten()
                .map(|(name, _)| name)
                .collect(),
            restart: found.host_config.and_then(|h| h.restart_policy).and_then(|r| r.name),
        }
    }

    /// An empty policy is the engine's other way to write `no`.
    fn policy(&self) -> RestartPolicyNameEnum {
        self.restart.filter(|policy| *policy != RestartPolicyNameEnum::EMPTY).unwrap_or(RestartPolicyNameEnum::NO)
    }

    fn returns(&self) -> bool {
        self.policy() != RestartPolicyNameEnum::NO
    }
}

impl Work<'_> {
    // --- Start ---------------------------------------------------------------------------------------------------

    async fn start(&self, deployment: &Deployment, containers: &BTreeSet<ContainerName>) -> Result<(), Fault> {
        let spec = RunSpec::of(&deployment.plan)?;
        if let Some(name) = containers.iter().find(|name| !spec.containers.contains_key(*name)) {
            return Err(Fault::permanent(format!("revision {} has no container {name}", deployment.revision)));
        }
        let waves = spec.waves(|name| containers.contains(name))?;
        self.private_network(&deployment.revision).await?;
        self.join_proxy(&names::network(&self.platform.config.application, &deployment.revision), &[]).await?;
        // All are created before any is started: what cannot be created costs nothing yet.
        let mut made = BTreeMap::new();
        for name in waves.iter().flatten() {
            let container = &spec.containers[name];
            let ours = match self.find(deployment, name).await? {
                Some(ours) => ours,
                None => self.create(deployment, name, &spec).await?,
            };
            for network in &container.run.networks {
                if !ours.networks.contains(network) {
                    // No alias: on a shared network the component's name belongs to what serves.
                    self.join(network, &ours.id, &[]).await?;
                }
                let aliases = self.aliases(network);
                self.join_proxy(network, &aliases).await?;
            }
            made.insert(name, ours);
        }
        for wave in &waves {
            let mine = wave.iter().filter_map(|name| Some((name, made.get(name)?)));
            all(mine.map(|(name, ours)| self.start_one(&deployment.revision, name, ours))).await?;
        }
        Ok(())
    }

    async fn start_one(&self, revision: &RevisionId, name: &ContainerName, ours: &Ours) -> Result<(), Fault> {
        if ours.running {
            return Ok(());
        }
        let started = self.engine.docker().start_container(&ours.id, None::<StartContainerOptions>).await;
        started.map_err(|error| classify(error, &format!("container {name} of {revision} cannot be started")))
    }

    /// Names by which the proxy is known on a shared network: those of what it serves that stands on that network.
    pub(super) fn aliases(&self, network: &str) -> Vec<String> {
        let config = &self.platform.config;
        let mut aliases = BTreeSet::new();
        for listener in config.listeners.values() {
            if let Some(run) = config.containers.get(&listener.container).filter(|run| run.networks.contains(network)) {
                aliases.insert(listener.container.to_string());
                aliases.insert(run.component.to_string());
            }
        }
        aliases.into_iter().collect()
    }

    async fn create(&self, deployment: &Deployment, name: &ContainerName, spec: &RunSpec) -> Result<Ours, Fault> {
        let container = &spec.containers[name];
        let image = create::image(deployment, &container.run.component)?;
        let image_id = pull::image_id(self.platform, self.engine, image).await?;
        let body = create::body(self.platform, deployment, name, container, &image_id)?;
        let full = names::container(&self.platform.config.application, &deployment.revision, name);
        let options = CreateContainerOptions { name: Some(full.clone()), ..Default::default() };
        if let Err(error) = self.engine.docker().create_container(Some(options), body).await {
            // Somebody was faster under this name: it is adopted if it is ours, and a conflict if not.
            if let Some(ours) = self.find(deployment, name).await? {
                return Ok(ours);
            }
            return Err(classify(error, &format!("container {full} cannot be created")));
        }
        self.find(deployment, name)
            .await?
            .ok_or_else(|| Fault::conflict(format!("container {full} was removed as soon as it was created")))
    }

    /// Looks up a container of a deployment. A conflict where something else stands under its name.
    async fn find(&self, deployment: &Deployment, name: &ContainerName) -> Result<Option<Ours>, Fault> {
        let full = names::container(&self.platform.config.application, &deployment.revision, name);
        let Some(found) = self.inspect(&full).await? else { return Ok(None) };
        let labels = labels_of(&found);
        let carried =
            Carried::read(&labels).filter(|c| self.platform.owner.owns(&labels) && c.belongs(deployment, name));
        let Some(carried) = carried else {
            return Err(look_alike(&self.platform.owner, &full, &labels));
        };
        let image = found.image.clone().unwrap_or_default();
        let intended = deployment.plan.containers.get(name).and_then(|plan| deployment.images.get(&plan.component));
        if carried.image.as_ref() != intended || carried.image_id.as_ref().is_some_and(|id| *id != image) {
            return Err(Fault::conflict(format!(
                "container {full} runs another image than revision {} is to",
                deployment.revision
            ))
            .advice(format!("look at it with `docker inspect {full}`; remove it by hand if nothing needs it")));
        }
        Ok(Some(Ours::of(found)))
    }

    pub(super) async fn inspect(&self, name: &str) -> Result<Option<ContainerInspectResponse>, Fault> {
        match self.engine.docker().inspect_container(name, None::<InspectContainerOptions>).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(classify(error, &format!("container {name} cannot be inspected"))),
        }
    }

    // --- Stop ----------------------------------------------------------------------------------------------------

    async fn stop(&self, deployment: &Deployment, containers: &BTreeSet<ContainerName>) -> Result<(), Fault> {
        let plans = || containers.iter().filter_map(|name| deployment.plan.containers.get(name));
        if plans().any(|plan| plan.controller) {
            self.not_myself(&deployment.revision)?;
        }
        // A stop that reaches beyond those that make room for others retires the revision.
        let retires = plans().any(|plan| plan.overlap == Overlap::Allowed);
        let spec = RunSpec::of(&deployment.plan)?;
        let waves = spec.waves(|name| containers.contains(name))?;
        // All are looked at before any is touched: a look-alike costs nothing yet.
        let mut mine = BTreeMap::new();
        for name in waves.iter().flatten() {
            if let Some(ours) = self.find(deployment, name).await? {
                mine.insert(name, ours);
            }
        }
        if retires && mine.values().any(|ours| ours.running || ours.returns()) {
            self.not_routed(&deployment.revision, "stopped").await?;
        }
        for wave in waves.iter().rev() {
            let there = wave.iter().filter_map(|name| Some((name, mine.get(name)?)));
            all(there.map(|(name, ours)| {
                let grace = Duration::from_secs(u64::from(spec.containers[name].run.stop_grace_seconds));
                self.stop_one(&deployment.revision, name, ours, grace, retires)
            }))
            .await?;
        }
        Ok(())
    }

    /// Stops a revision of which nothing more is known than what its containers carry.
    async fn halt(&self, revision: &RevisionId) -> Result<(), Fault> {
        self.not_myself(revision)?;
        let mut mine = Vec::new();
        for (id, _) in self.of_revision(revision).await? {
            let Some(found) = self.inspect(&id).await? else { continue };
            let Some(carried) = Carried::read(&labels_of(&found)) else { continue };
            // Noted by the engine when the container was made.
            let grace = found.config.as_ref().and_then(|c| c.stop_timeout).and_then(|t| u64::try_from(t).ok());
            let grace = grace.unwrap_or_default().min(u64::from(STOP_GRACE_MAX_SECONDS));
            mine.push((carried.container, Duration::from_secs(grace), Ours::of(found)));
        }
        if mine.iter().any(|(_, _, ours)| ours.running || ours.returns()) {
            self.not_routed(revision, "stopped").await?;
        }
        all(mine.iter().map(|(name, grace, ours)| self.stop_one(revision, name, ours, *grace, true))).await
    }

    /// `retires`: refused where traffic goes to the revision.
    async fn stop_one(
        &self,
        revision: &RevisionId,
        name: &ContainerName,
        ours: &Ours,
        grace: Duration,
        retires: bool,
    ) -> Result<(), Fault> {
        if ours.running {
            self.drain(revision, &ours.id, grace).await;
            if retires {
                // Draining takes its time, and traffic may have come back meanwhile.
                self.not_routed(revision, "stopped").await?;
            }
        }
        // Before the stop, so that neither a crash in between nor the engine's restart brings it back.
        self.set_restart(ours, name, RestartPolicyNameEnum::NO).await?;
        if !ours.running {
            return Ok(());
        }
        let options = StopContainerOptions { signal: None, t: i32::try_from(grace.as_secs()).ok() };
        // The engine answers when the container has stopped, so its grace comes on top.
        let docker = self.engine.docker().clone().with_timeout(ANSWER_TIMEOUT + grace);
        match docker.stop_container(&ours.id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(classify(error, &format!("container {name} of {revision} cannot be stopped"))),
        }
    }

    /// A conflict where traffic goes to a revision, or would go there after a restart of the proxy.
    async fn not_routed(&self, revision: &RevisionId, what: &str) -> Result<(), Fault> {
        let state = self.platform.proxy.state().await?;
        let named = |side: &Side| side.revision == revision.as_str();
        let routed = state.routes.as_ref().is_some_and(|r| named(&r.primary) || r.fallback.as_ref().is_some_and(named));
        if routed || state.serving.as_deref() == Some(revision.as_str()) {
            return Err(Fault::conflict(format!("revision {revision} still takes traffic, so it is not {what}"))
                .advice("this was decided before traffic went there; what is decided next goes by what is seen now"));
        }
        Ok(())
    }

    /// Waits until a container that no longer serves has no open request, at most for `grace`. A proxy that does not answer
    /// has no requests to lose.
    async fn drain(&self, revision: &RevisionId, id: &str, grace: Duration) {
        let until = Instant::now() + grace;
        while Instant::now() < until {
            let Ok(state) = self.platform.proxy.state().await else { return };
            let serves = state.serving.as_deref() == Some(revision.as_str());
            if serves || state.open.get(id).is_none_or(|open| *open == 0) {
                return;
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    async fn set_restart(&self, ours: &Ours, name: &ContainerName, policy: RestartPolicyNameEnum) -> Result<(), Fault> {
        if ours.policy() == policy {
            return Ok(());
        }
        let update = ContainerUpdateBody { restart_policy: Some(create::restart(policy)), ..Default::default() };
        match self.engine.docker().update_container(&ours.id, update).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) && policy == RestartPolicyNameEnum::NO => Ok(()),
            Err(error) => Err(classify(error, &format!("the restart policy of container {name} cannot be changed"))),
        }
    }

    // --- Traffic -------------------------------------------------------------------------------------------------

    async fn shift(&self, to: &Deployment, generation: u64, fallback: Option<&Deployment>) -> Result<(), Fault> {
        let primary = self.side(to, true).await?;
        let fallback = match fallback {
            Some(deployment) => {
                let side = self.side(deployment, false).await?;
                self.keep_returning(deployment).await?;
                Some(side)
            }
            None => None,
        };
        self.route(&Routes { generation, primary, fallback }).await
    }

    /// What a restart of the proxy would serve has to be there after a reboot; what of it made room stays down.
    async fn keep_returning(&self, deployment: &Deployment) -> Result<(), Fault> {
        for name in deployment.plan.containers.keys() {
            if let Some(ours) = self.find(deployment, name).await?.filter(|ours| ours.running) {
                self.set_restart(&ours, name, RestartPolicyNameEnum::ALWAYS).await?;
            }
        }
        Ok(())
    }

    /// The way into a deployment, by the identities that its containers have now.
    async fn side(&self, deployment: &Deployment, must_run: bool) -> Result<Side, Fault> {
        let spec = RunSpec::of(&deployment.plan)?;
        let mut backends = BTreeMap::new();
        for (listener, upstream) in &spec.listeners {
            let at = format!("container {} of {}", upstream.container, deployment.revision);
            let ours = self.find(deployment, &upstream.container).await?;
            let ours = ours.ok_or_else(|| Fault::conflict(format!("{at} is gone, so that traffic cannot go to it")))?;
            if must_run && !ours.running {
                return Err(Fault::conflict(format!("{at} does not run, so that traffic cannot go to it")));
            }
            backends.insert(listener.clone(), Backend { container: ours.id, port: upstream.port });
        }
        Ok(Side { revision: deployment.revision.to_string(), backends })
    }

    async fn route(&self, routes: &Routes) -> Result<(), Fault> {
        let state = self.platform.proxy.state().await?;
        self.not_stale(state.routes.as_ref(), routes.generation)?;
        // After a start of its own the proxy may still serve the fallback: it is told again then.
        if state.routes.as_ref() == Some(routes) && state.serving.as_ref() == Some(&routes.primary.revision) {
            return Ok(());
        }
        match self.platform.proxy.put(routes).await? {
            Sent::Taken => Ok(()),
            Sent::Refused(state) => {
                self.not_stale(state.routes.as_ref(), routes.generation)?;
                Err(Fault::conflict(format!("the proxy has other routes of generation {}", routes.generation)))
            }
        }
    }

    fn not_stale(&self, held: Option<&Routes>, generation: u64) -> Result<(), Fault> {
        match held {
            Some(held) if held.generation > generation => Err(Fault::conflict(format!(
                "traffic was moved by a later decision: the proxy is at generation {}, this one is {generation}",
                held.generation
            ))),
            _ => Ok(()),
        }
    }

    async fn settle(&self, deployment: &Deployment, not: &[RevisionId], generation: u64) -> Result<(), Fault> {
        // Everything is looked at before anything is touched: a late settle of an earlier decision must not undo a later
        // one, and what does not run must not be what returns.
        self.not_stale(self.platform.proxy.state().await?.routes.as_ref(), generation)?;
        let mut mine = Vec::with_capacity(deployment.plan.containers.len());
        for name in deployment.plan.containers.keys() {
            match self.find(deployment, name).await? {
                Some(ours) if ours.running && !ours.restarting => mine.push((name, ours)),
                found => {
                    let what = if found.is_some() { "does not run" } else { "is gone" };
                    return Err(Fault::conflict(format!(
                        "container {name} of {} {what}, so that the revision is not the one that returns after a reboot",
                        deployment.revision
                    )));
                }
            }
        }
        let routes = Routes { generation, primary: self.side(deployment, true).await?, fallback: None };
        // This order, since at each point in between a reboot finds at least one whole revision that returns.
        for (name, ours) in mine {
            // Not `unless-stopped`: an engine that was killed stops what it finds running when it comes back, counts that
            // as stopped on purpose (seen on 20.10) and leaves it down. Whoever stops a container sets `no` first.
            self.set_restart(&ours, name, RestartPolicyNameEnum::ALWAYS).await?;
        }
        self.route(&routes).await?;
        for revision in not.iter().filter(|revision| **revision != deployment.revision) {
            for (id, _) in self.of_revision(revision).await? {
                let Some(found) = self.inspect(&id).await? else { continue };
                let Some(carried) = Carried::read(&labels_of(&found)) else { continue };
                let ours = Ours::of(found);
                self.set_restart(&ours, &carried.container, RestartPolicyNameEnum::NO).await?;
            }
        }
        Ok(())
    }

    // --- Remove --------------------------------------------------------------------------------------------------

    async fn remove(&self, revision: &RevisionId) -> Result<(), Fault> {
        self.not_myself(revision)?;
        // What was started meanwhile, by a rollback, is not taken away under it; a step that nobody waits for any more is.
        let mut mine: Vec<_> = self.of_revision(revision).await?.into_iter().map(|found| (found, false)).collect();
        mine.extend(self.in_role(revision, labels::ROLE_STEP).await?.into_iter().map(|found| (found, true)));
        let name = names::network(&self.platform.config.application, revision);
        if mine.is_empty() && !self.network_to_remove(&name).await? {
            return Ok(());
        }
        self.not_routed(revision, "removed").await?;
        for ((id, full), force) in mine {
            // `v`: anonymous volumes of the image go with their container; named ones stay.
            let options = RemoveContainerOptions { force, v: true, link: false };
            match self.engine.docker().remove_container(&id, Some(options)).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(classify(error, &format!("container {full} cannot be removed"))),
            }
        }
        if !self.network_to_remove(&name).await? {
            return Ok(());
        }
        let proxy = names::proxy(&self.platform.config.application);
        let request = NetworkDisconnectRequest { container: proxy, force: Some(true) };
        if let Err(error) = self.engine.docker().disconnect_network(&name, request).await {
            // Whether it was connected shows in the next step: the engine keeps a network that somebody is on.
            tracing::debug!(%error, name, "the proxy was not on the network");
        }
        match self.engine.docker().remove_network(&name).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 403, .. }) => {
                Err(Fault::conflict(format!("network {name} is still used by a container that is not Replank's"))
                    .advice(format!("see who is on it with `docker network inspect {name}`")))
            }
            Err(error) => Err(classify(error, &format!("network {name} cannot be removed"))),
        }
    }

    /// A network under our name that is not ours is nobody's business here.
    async fn network_to_remove(&self, name: &str) -> Result<bool, Fault> {
        match self.engine.docker().inspect_network(name, None).await {
            Ok(found) => Ok(self.platform.owner.owns(&found.labels.unwrap_or_default())),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(classify(error, &format!("network {name} cannot be inspected"))),
        }
    }

    /// Ids and names of this installation's containers of a revision. Never the proxy: it carries no revision.
    async fn of_revision(&self, revision: &RevisionId) -> Result<Vec<(String, String)>, Fault> {
        self.in_role(revision, labels::ROLE_APP).await
    }

    async fn in_role(&self, revision: &RevisionId, role: &str) -> Result<Vec<(String, String)>, Fault> {
        let filter = self.platform.owner.filter(&[(labels::REVISION, revision.as_str()), (labels::ROLE, role)]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filter).build();
        let found = self
            .engine
            .docker()
            .list_containers(Some(options))
            .await
            .map_err(|error| classify(error, "the engine's containers cannot be listed"))?;
        let named = |c: bollard::models::ContainerSummary| {
            let id = c.id?;
            let name = c.names.and_then(|names| names.into_iter().next()).unwrap_or_else(|| id.clone());
            Some((id, name.trim_start_matches('/').to_owned()))
        };
        Ok(found.into_iter().filter_map(named).collect())
    }

    /// A controller never retires the revision that it runs in.
    fn not_myself(&self, revision: &RevisionId) -> Result<(), Fault> {
        match &self.platform.vantage {
            Vantage::Inside(mine) if mine == revision => {
                Err(Fault::conflict(format!("revision {revision} is the one that this controller runs in"))
                    .advice("the other revision's controller takes this step after the hand-over"))
            }
            Vantage::Inside(_) | Vantage::Host => Ok(()),
        }
    }
}

pub(super) fn labels_of(found: &ContainerInspectResponse) -> HashMap<String, String> {
    found.config.as_ref().and_then(|c| c.labels.clone()).unwrap_or_default()
}

pub(super) fn look_alike(owner: &Owner, name: &str, labels: &HashMap<String, String>) -> Fault {
    let whose = if owner.owns(labels) {
        "belongs to another operation of this installation"
    } else {
        "is not of this installation"
    };
    Fault::conflict(format!("container {name} exists and {whose}"))
        .advice(format!("look at it with `docker inspect {name}`; remove or rename it by hand if nothing needs it"))
}
