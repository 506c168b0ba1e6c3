//! One Docker engine: revisions are labelled containers, traffic is moved by the proxy.

mod bootstrap;
mod change;
pub mod config;
mod create;
mod data;
mod hatch;
pub mod labels;
pub mod names;
mod networks;
mod observe;
mod probe;
pub mod proxy_api;
mod pull;
mod renewal;
pub mod spec;
mod step;
pub mod traffic;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use replank_core::data::DataStep;
use replank_core::fault::Fault;
use replank_core::image::Images;
use replank_core::phase::Fetched;
use replank_core::ports::{Ask, Change, Clock, EscapeHatch, Log, Observation, Platform};
use replank_core::record::{Deployment, Plan};
use replank_core::words::{Millis, OpKey, RevisionId, Version};

use crate::engine::Engine;
use crate::oci::OciConfig;
pub use bootstrap::proxy_image_from_binary;
use config::DockerConfig;
use labels::Owner;
pub use renewal::{DRAIN_MAX, Mended, Renewal, Renewed};
use traffic::Proxy;

/// Where this process stands: what it can reach the proxy's ports by, and what it must never remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vantage {
    /// On the host: published ports.
    Host,
    /// In a container of this revision: the proxy by its name on the revision's network.
    Inside(RevisionId),
}

/// The platform. Cheap to make: it holds addresses and no connections.
#[derive(Debug)]
pub struct DockerPlatform {
    config: DockerConfig,
    owner: Owner,
    vantage: Vantage,
    proxy: Proxy,
    clock: Arc<dyn Clock>,
    /// Who the engine is to be when it pulls an image that it lost.
    registries: OciConfig,
}

impl DockerPlatform {
    /// Permanent where the configuration breaks a rule. The engine and the proxy need not be there yet.
    pub fn new(config: DockerConfig, vantage: Vantage, clock: Arc<dyn Clock>) -> Result<Self, Fault> {
        config.validate()?;
        let owner = Owner { installation: config.installation.clone(), application: config.application.clone() };
        let proxy = Proxy::new(config.control_socket());
        Ok(Self { config, owner, vantage, proxy, clock, registries: OciConfig::default() })
    }

    /// With credentials for the registries that images are pulled from. They are not part of [`DockerConfig`], which is
    /// stored with every plan.
    #[must_use]
    pub fn with_registries(mut self, registries: OciConfig) -> Self {
        self.registries = registries;
        self
    }

    pub fn config(&self) -> &DockerConfig {
        &self.config
    }

    /// Made anew for each piece of work: an engine that was down at the start, and its socket with it, may be up now.
    fn engine(&self) -> Result<Engine, Fault> {
        Engine::connect(&self.config.socket)
    }

    /// Makes the proxy's directory, network and container, or finds them as they should be. Permanent where they are there
    /// but made from something else.
    pub async fn ensure_proxy(&self, image: &str) -> Result<(), Fault> {
        bootstrap::ensure_proxy(self, image).await
    }

    /// Takes the right to replace the proxy's container: nothing else changes the platform while it is held. Also tells what
    /// became of an upgrade that was cut short. Transient while somebody else is at it.
    pub async fn proxy_upgrade(&self) -> Result<(Renewal<'_>, Option<Mended>), Fault> {
        Renewal::begin(self).await
    }

    /// Brings an upgrade of the proxy that was cut short to its end; `None` where there is none, or where somebody is at it.
    pub async fn mend_proxy(&self) -> Result<Option<Mended>, Fault> {
        renewal::mend(self).await
    }

    /// See [`proxy_image_from_binary`].
    pub async fn proxy_image(&self, binary: &Path) -> Result<String, Fault> {
        proxy_image_from_binary(&self.engine()?, &self.config.installation, binary).await
    }
}

#[async_trait]
impl Platform for DockerPlatform {
    async fn plan(&self, fetched: &Fetched, images: &Images, _version: &Version) -> Result<Plan, Fault> {
        spec::plan(&self.config, fetched, images)
    }

    async fn observe(&self, ask: &Ask) -> Result<Observation, Fault> {
        observe::observe(self, ask).await
    }

    async fn change(&self, change: &Change) -> Result<(), Fault> {
        change::change(self, change).await
    }

    async fn run_step(
        &self,
        deployment: &Deployment,
        step: &DataStep,
        key: &OpKey,
        until: Millis,
        log: &dyn Log,
    ) -> Result<i64, Fault> {
        step::run(self, deployment, step, key, until, log).await
    }

    fn escape_hatch(&self, to: &Deployment, from: Option<&Deployment>, generation: u64) -> EscapeHatch {
        hatch::escape_hatch(self, to, from, generation)
    }
}
