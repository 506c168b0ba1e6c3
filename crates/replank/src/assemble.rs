//! From settings to ports: the one place where implementations are chosen.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use replank_adapters::builder::az_exec::{AzExecBuilder, AzExecConfig};
use replank_adapters::builder::docker::{DockerBuilder, DockerBuilderConfig, SecretSource as BuildSecret};
use replank_adapters::engine::Engine;
use replank_adapters::exec_channel::Channel;
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::logs::sqlite::SqliteLogs;
use replank_adapters::oci::{Credentials as RegistryCredentials, MachineIdentity, OciConfig};
use replank_adapters::platform::docker::config::SecretSource;
use replank_adapters::platform::docker::{DockerPlatform, Vantage};
use replank_adapters::registry::engine::EngineRegistry;
use replank_adapters::registry::oci::OciRegistry;
use replank_adapters::source::az_exec::AzExecSource;
use replank_adapters::source::git::{Credential, GitConfig, GitSource};
use replank_adapters::sqlite::Store;
use replank_core::fault::Fault;
use replank_core::phase::Fetched;
use replank_core::ports::{
    Builder, Clock as _, Cursors, Ids as _, Ledger, LedgerError, Platform, Registry, Source, Tokens, Tree,
};
use replank_core::record::{ControllerId, Deployment, Record};
use replank_core::words::{InstallationId, RevisionId, Version};

use crate::config::env::Environment;
use crate::config::{ExecSettings, RegistrySettings, Settings, manifest};
use crate::doctor::{self, Checked};
use crate::engine::{LocalEngine, Ports, Reading, Recipes, Room, Setup, Shared};
use crate::lock::ControllerLock;
use crate::system::{SystemClock, SystemIds};
use crate::telemetry::{Telemetry, Watched};
use crate::webhooks::{Hook, Secret};

/// One controller, ready to run.
#[derive(Debug)]
pub struct Controller {
    pub ports: Ports,
    pub setup: Arc<Setup>,
    pub shared: Arc<Shared>,
    pub engine: Arc<LocalEngine>,
    pub tokens: Arc<dyn Tokens>,
    pub cursors: Arc<dyn Cursors>,
    pub hooks: Vec<Hook>,
    /// Absent where nothing is run.
    pub docker: Option<Arc<DockerPlatform>>,
    /// Kept for as long as the controller: one process for each revision.
    pub lock: ControllerLock,
}

/// The ledger alone, for commands that work without a server.
pub async fn open_ledger(settings: &Settings) -> Result<(Store, Arc<SqliteLedger>), LedgerError> {
    let store = Store::open(settings.ledger_dir()).await?;
    let ledger = Arc::new(SqliteLedger::new(store.clone(), settings.application.clone()));
    Ok((store, ledger))
}

/// What stands between a service and its ports. It is given by who calls, never by settings or the environment.
pub type Between = fn(Ports, &Settings) -> Ports;

/// Nothing stands between.
pub fn as_they_are(ports: Ports, _: &Settings) -> Ports {
    ports
}

/// Builds everything. The ledger is opened and, where it is new, gets its first record.
pub async fn controller(settings: &Settings, env: &Environment, between: Between) -> anyhow::Result<Controller> {
    let clock = Arc::new(SystemClock);
    let ids = Arc::new(SystemIds);
    let me = me(settings)?;
    let (store, ledger) = open_ledger(settings).await?;
    let lock = ControllerLock::take(&settings.ledger_dir(), &me)?;
    let installation = installation(ledger.as_ref(), settings, &me).await?;

    let mut secrets = Vec::new();
    let parts = match &settings.exec {
        Some(exec) => through_exec(settings, exec, env, &mut secrets)?,
        None => on_the_engine(settings, env, &mut secrets)?,
    };
    let hooks = hooks(settings, env, &mut secrets)?;
    let telemetry = Arc::new(Telemetry::new(settings.telemetry.otlp_endpoint.as_deref())?);
    let docker = if settings.platform.runs {
        let vantage = match &me {
            ControllerId::Host => Vantage::Host,
            ControllerId::Revision(revision) => Vantage::Inside(revision.clone()),
        };
        let docker = DockerPlatform::new(settings.docker(installation.clone()), vantage, clock.clone())?;
        Some(Arc::new(docker.with_registries(parts.registries)))
    } else {
        None
    };

    let ports = Ports {
        clock,
        ids: ids.clone(),
        ledger: Arc::new(Watched::new(ledger.clone(), telemetry.clone())),
        logs: Arc::new(SqliteLogs::new(store)),
        source: parts.source.clone(),
        builder: parts.builder,
        registry: parts.registry,
        local_images: parts.local_images,
        platform: docker.clone().map(|docker| docker as Arc<dyn Platform>),
    };
    let ports = between(ports, settings);
    let setup = Arc::new(Setup {
        application: settings.application.clone(),
        installation,
        me,
        instance: hex::encode(ids.random(8)),
        policy: settings.policy.clone(),
        mode: settings.mode,
        on_rollout_failure: settings.on_rollout_failure,
        components: settings.components.keys().cloned().collect(),
        own_version: own_version(settings),
        secrets,
        reads_format: replank_core::format::FORMAT,
        recipes: Arc::new(ReleaseRecipes { settings: settings.clone(), source: parts.source }),
        room: Arc::new(HostRoom(settings.clone())),
    });
    let shared = Arc::new(Shared::new(telemetry));
    let engine = Arc::new(LocalEngine::new(ports.clone(), setup.clone(), shared.clone()));
    Ok(Controller { ports, setup, shared, engine, tokens: ledger.clone(), cursors: ledger, hooks, docker, lock })
}

fn own_version(settings: &Settings) -> Option<Version> {
    let version = settings.app_version.as_ref().filter(|_| !settings.platform.runs)?;
    // Images of development carry other words here, and nothing is compared with them.
    version.parse().ok()
}

/// Where releases come from, how they are built, and where images go.
struct Parts {
    source: Option<Arc<dyn Source>>,
    builder: Arc<dyn Builder>,
    registry: Arc<dyn Registry>,
    local_images: Option<Arc<dyn Registry>>,
    registries: OciConfig,
}

/// Everything on one Docker engine.
fn on_the_engine(settings: &Settings, env: &Environment, secrets: &mut Vec<String>) -> Result<Parts, Fault> {
    let source = source(settings, env, secrets)?;
    let socket = &settings.platform.socket;
    let registries = registries(settings, secrets)?;
    let builder = DockerBuilder::new(
        Engine::connect(socket)?,
        DockerBuilderConfig {
            secrets: build_secrets(settings, env, secrets)?,
            memory: settings.build.memory_bytes,
            milli_cpus: settings.build.cpu_millis.map(u64::from),
            push: settings.registry.as_ref().is_some_and(|r| r.push),
            registries: registries.clone(),
            ..DockerBuilderConfig::default()
        },
    )?;
    let engine: Arc<dyn Registry> = Arc::new(EngineRegistry::new(Engine::connect(socket)?));
    let (registry, local_images): (Arc<dyn Registry>, _) = match &settings.registry {
        Some(r) if r.push => (Arc::new(OciRegistry::new(registries.clone())?), Some(engine)),
        Some(_) | None => (engine, None),
    };
    let source = source.map(|source| Arc::new(source) as Arc<dyn Source>);
    Ok(Parts { source, builder: Arc::new(builder), registry, local_images, registries })
}

/// git and az in another container, images in an Azure registry: no engine is needed here.
fn through_exec(
    settings: &Settings,
    exec: &ExecSettings,
    env: &Environment,
    secrets: &mut Vec<String>,
) -> Result<Parts, Fault> {
    let token = secret(&exec.token, env, "the exec server's token")?;
    secrets.push(token.clone());
    let channel = Channel::new(&exec.url, &token)?;
    let git = source(settings, env, secrets)?;
    let source = git.map(|git| {
        let root = exec.clone_root.clone();
        Arc::new(AzExecSource::new(git, channel.clone(), root, exec.credential_in_url)) as Arc<dyn Source>
    });
    let registries = registries(settings, secrets)?;
    let config = AzExecConfig {
        registry: settings.registry.as_ref().and_then(|r| r.acr.clone()).unwrap_or_default(),
        client_id: exec.client_id.clone(),
        wait_out: exec.wait_out,
        registries: registries.clone(),
    };
    let builder = Arc::new(AzExecBuilder::new(channel, config)?);
    let registry = Arc::new(OciRegistry::new(registries.clone())?);
    Ok(Parts { source, builder, registry, local_images: None, registries })
}

pub(crate) fn me(settings: &Settings) -> anyhow::Result<ControllerId> {
    Ok(match &settings.revision {
        Some(revision) => ControllerId::Revision(RevisionId::new(revision.clone())?),
        None => ControllerId::Host,
    })
}

/// Gives a new ledger its first record, so that what is done before the first deployment has a history to stand in.
pub async fn first_record(ledger: &dyn Ledger, settings: &Settings) -> anyhow::Result<()> {
    installation(ledger, settings, &me(settings)?).await?;
    Ok(())
}

/// The installation's id: the record's, or a new one that becomes the record's.
async fn installation(ledger: &dyn Ledger, settings: &Settings, me: &ControllerId) -> anyhow::Result<InstallationId> {
    loop {
        if let Some((record, _)) = ledger.load().await? {
            return Ok(record.installation.clone());
        }
        let id = hex::encode(SystemIds.random(10));
        let mut record = Record::new(InstallationId::new(id)?, settings.application.clone(), SystemClock.now());
        record.driver.controller = me.clone();
        match ledger.commit(None, &record, &[]).await {
            // Whoever was first gave the id.
            Ok(_) | Err(LedgerError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

pub(crate) fn source(
    settings: &Settings,
    env: &Environment,
    secrets: &mut Vec<String>,
) -> Result<Option<GitSource>, Fault> {
    let Some(source) = &settings.source else { return Ok(None) };
    let credential = match &source.credential {
        None => None,
        Some(c) => {
            let password = secret(&c.password, env, "the remote's password")?;
            secrets.push(password.clone());
            Some(Credential { username: c.username.clone(), password })
        }
    };
    secrets.extend(password_in(&source.remote));
    let mut config = GitConfig::new(source.remote.clone(), settings.work_dir());
    config.credential = credential;
    config.tracking_branch.clone_from(&source.branch);
    config.allow_loopback = source.allow_loopback;
    config.allow_private = source.allow_private;
    config.ca_file.clone_from(&source.ca_file);
    config.verify.clone_from(&source.verify);
    config.clock = Some(Arc::new(SystemClock));
    GitSource::new(config).map(Some)
}

/// The password that a remote's URL carries, as it stands there and as it is meant.
fn password_in(remote: &str) -> Vec<String> {
    let authority = remote.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or_default());
    let Some((user, _)) = authority.rsplit_once('@') else { return Vec::new() };
    // A token alone stands where the user would.
    let written = user.split_once(':').map_or(user, |(_, password)| password);
    let meant = percent_decoded(written);
    [Some(written.to_owned()), meant.filter(|meant| meant != written)].into_iter().flatten().collect()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

pub(crate) fn registries(settings: &Settings, secrets: &mut Vec<String>) -> Result<OciConfig, Fault> {
    let mut config = OciConfig::default();
    let Some(registry): Option<&RegistrySettings> = settings.registry.as_ref() else { return Ok(config) };
    if registry.acr.is_some() {
        let client_id = settings.exec.as_ref().and_then(|exec| exec.client_id.clone());
        config.machine.insert(registry.host.clone(), MachineIdentity { client_id, endpoint: None });
    }
    if registry.insecure {
        config.insecure.insert(registry.host.clone());
    }
    if let (Some(username), Some(file)) = (&registry.username, &registry.password_file) {
        let password = read_secret(file, "the registry's password")?;
        secrets.push(password.clone());
        config.credentials.insert(registry.host.clone(), RegistryCredentials { username: username.clone(), password });
    }
    Ok(config)
}

fn build_secrets(
    settings: &Settings,
    env: &Environment,
    secrets: &mut Vec<String>,
) -> Result<std::collections::BTreeMap<String, BuildSecret>, Fault> {
    let mut sources = std::collections::BTreeMap::new();
    for (name, from) in &settings.build.secrets {
        // Read now only so that the masks know it; the builder reads it again for each build.
        secrets.push(secret(from, env, &format!("build secret {name}"))?);
        let from = match from {
            SecretSource::File(path) => BuildSecret::File(path.clone()),
            SecretSource::Env(variable) => BuildSecret::Env(variable.clone()),
        };
        sources.insert(name.clone(), from);
    }
    Ok(sources)
}

fn hooks(settings: &Settings, env: &Environment, secrets: &mut Vec<String>) -> Result<Vec<Hook>, Fault> {
    let mut hooks = Vec::new();
    for hook in &settings.webhooks {
        let written = secret(&hook.secret, env, "a webhook's secret")?;
        let secret = Secret::parse(&written).map_err(|rule| {
            Fault::permanent(rule).advice("make one with: echo whsec_$(head -c 32 /dev/urandom | base64)")
        })?;
        secrets.push(written);
        hooks.push(Hook { url: hook.url.clone(), secret, events: hook.events.clone(), reach: hook.reach });
    }
    Ok(hooks)
}

pub(crate) fn secret(from: &SecretSource, env: &Environment, what: &str) -> Result<String, Fault> {
    match from {
        SecretSource::File(path) => read_secret(path, what),
        SecretSource::Env(name) => env.get(name).map(str::to_owned).ok_or_else(|| {
            Fault::permanent(format!("{what} is to come from the variable {name}, which is not set"))
                .advice("set it for the process that runs replank")
        }),
    }
}

fn read_secret(path: &Path, what: &str) -> Result<String, Fault> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Fault::permanent(format!("{what} cannot be read from {}", path.display()))
            .advice("make the file readable for this user, and only for this user")
            .because(e)
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// Recipes of a fetched release: operator's settings, bent by the release's manifest where it may.
#[derive(Debug)]
struct ReleaseRecipes {
    settings: Settings,
    source: Option<Arc<dyn Source>>,
}

fn unfit(version: &Version, what: &str) -> Fault {
    Fault::permanent(format!("release {version} cannot be built: {what}")).advice("mend the release, or replank.toml")
}

#[async_trait]
impl Recipes for ReleaseRecipes {
    fn judge(
        &self,
        manifest: Option<&[u8]>,
        version: &Version,
        running: Option<&Deployment>,
    ) -> Result<Reading, Fault> {
        let manifest = match manifest {
            Some(bytes) => {
                manifest::Manifest::parse_bytes(bytes).map_err(|problems| unfit(version, &problems.in_one_line()))?
            }
            None => manifest::Manifest::default(),
        };
        let recipes = manifest::recipes(&self.settings, &manifest, version)
            .map_err(|error| unfit(version, &error.to_string()))?;
        let fetched = Fetched { recipes, manifest: manifest.to_json(), signed_by: None };
        let missing = manifest.missing(&self.settings, running.map(|running| &running.version));
        Ok(Reading { fetched, missing, notes: manifest.notes })
    }

    async fn recipes(&self, tree: &Tree, version: &Version, running: Option<&Deployment>) -> Result<Fetched, Fault> {
        let bytes = match &self.source {
            Some(source) => source.read(tree, manifest::FILE, manifest::SIZE_MAX).await?,
            None => None,
        };
        let reading = self.judge(bytes.as_deref(), version, running)?;
        if let Some(told) = reading.refused(version) {
            return Err(Fault::new(told.class, told.what).advice(told.advice));
        }
        let fetched = Fetched { signed_by: tree.signed_by.clone(), ..reading.fetched };
        if let Some(source) = &self.source {
            for (component, recipe) in &fetched.recipes {
                source.check_paths(tree, component.as_str(), &recipe.dockerfile, &recipe.context).await?;
            }
        }
        Ok(fetched)
    }
}

/// Looks at disk and memory as `replank doctor` does.
#[derive(Debug)]
struct HostRoom(Settings);

#[async_trait]
impl Room for HostRoom {
    async fn look(&self, both: bool) -> Vec<Checked> {
        // What is looked at here reads nothing of the environment.
        doctor::room(doctor::Patient { settings: &self.0, env: &Environment::default() }, both).await
    }
}
