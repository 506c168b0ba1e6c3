//! From settings to ports: the one place where implementations are chosen.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use replank_adapters::builder::docker::{DockerBuilder, DockerBuilderConfig, SecretSource as BuildSecret};
use replank_adapters::engine::Engine;
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::logs::sqlite::SqliteLogs;
use replank_adapters::oci::{Credentials as RegistryCredentials, OciConfig};
use replank_adapters::platform::docker::config::SecretSource;
use replank_adapters::platform::docker::{DockerPlatform, Vantage};
use replank_adapters::registry::engine::EngineRegistry;
use replank_adapters::registry::oci::OciRegistry;
use replank_adapters::source::git::{Credential, GitConfig, GitSource, tree};
use replank_adapters::sqlite::Store;
use replank_core::fault::Fault;
use replank_core::phase::Fetched;
use replank_core::ports::{Clock as _, Ids as _, Ledger, LedgerError, Registry, Tokens, Tree};
use replank_core::record::{ControllerId, Deployment, Record};
use replank_core::words::{InstallationId, RevisionId, Version};

use crate::config::env::Environment;
use crate::config::{RegistrySettings, Settings, manifest};
use crate::engine::{LocalEngine, Ports, Recipes, Setup, Shared};
use crate::lock::ControllerLock;
use crate::system::{SystemClock, SystemIds};

/// Largest release manifest: it is text written by people.
const MANIFEST_MAX: usize = 256 * 1024;

/// One controller, ready to run.
#[derive(Debug)]
pub struct Controller {
    pub ports: Ports,
    pub setup: Arc<Setup>,
    pub shared: Arc<Shared>,
    pub engine: Arc<LocalEngine>,
    pub tokens: Arc<dyn Tokens>,
    pub docker: Arc<DockerPlatform>,
    /// Kept for as long as the controller: one process for each revision.
    pub lock: ControllerLock,
}

/// The ledger alone, for commands that work without a server.
pub async fn open_ledger(settings: &Settings) -> Result<(Store, Arc<SqliteLedger>), LedgerError> {
    let store = Store::open(settings.ledger_dir()).await?;
    let ledger = Arc::new(SqliteLedger::new(store.clone(), settings.application.clone()));
    Ok((store, ledger))
}

/// Builds everything. The ledger is opened and, where it is new, gets its first record.
pub async fn controller(settings: &Settings, env: &Environment) -> anyhow::Result<Controller> {
    let clock = Arc::new(SystemClock);
    let ids = Arc::new(SystemIds);
    let me = me(settings)?;
    let (store, ledger) = open_ledger(settings).await?;
    let lock = ControllerLock::take(&settings.ledger_dir(), &me)?;
    let installation = installation(ledger.as_ref(), settings, &me).await?;

    let mut secrets = Vec::new();
    let source = source(settings, env, &mut secrets)?.map(Arc::new);
    let socket = &settings.platform.socket;
    let registries = registries(settings.registry.as_ref(), &mut secrets)?;
    let builder = DockerBuilder::new(
        Engine::connect(socket)?,
        DockerBuilderConfig {
            secrets: build_secrets(settings, env, &mut secrets)?,
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
    let vantage = match &me {
        ControllerId::Host => Vantage::Host,
        ControllerId::Revision(revision) => Vantage::Inside(revision.clone()),
    };
    let docker = DockerPlatform::new(settings.docker(installation.clone()), vantage, clock.clone())?;
    let docker = Arc::new(docker.with_registries(registries));

    let ports = Ports {
        clock,
        ids: ids.clone(),
        ledger: ledger.clone(),
        logs: Arc::new(SqliteLogs::new(store)),
        source: source.clone().map(|s| s as Arc<dyn replank_core::ports::Source>),
        builder: Arc::new(builder),
        registry,
        local_images,
        platform: Some(docker.clone()),
    };
    let setup = Arc::new(Setup {
        application: settings.application.clone(),
        installation,
        me,
        instance: ids.random(8).iter().map(|b| format!("{b:02x}")).collect(),
        policy: settings.policy.clone(),
        mode: settings.mode,
        on_rollout_failure: settings.on_rollout_failure,
        components: settings.components.keys().cloned().collect(),
        secrets,
        recipes: Arc::new(ReleaseRecipes { settings: settings.clone(), source }),
    });
    let shared = Arc::new(Shared::default());
    let engine = Arc::new(LocalEngine::new(ports.clone(), setup.clone(), shared.clone()));
    Ok(Controller { ports, setup, shared, engine, tokens: ledger, docker, lock })
}

fn me(settings: &Settings) -> anyhow::Result<ControllerId> {
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
            return Ok(record.installation);
        }
        let id: String = SystemIds.random(10).iter().map(|b| format!("{b:02x}")).collect();
        let mut record = Record::new(InstallationId::new(id)?, settings.application.clone(), SystemClock.now());
        record.driver.controller = me.clone();
        match ledger.commit(None, &record, &[]).await {
            // Whoever was first gave the id.
            Ok(_) | Err(LedgerError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn source(settings: &Settings, env: &Environment, secrets: &mut Vec<String>) -> Result<Option<GitSource>, Fault> {
    let Some(source) = &settings.source else { return Ok(None) };
    let credential = match &source.credential {
        None => None,
        Some(c) => {
            let password = secret(&c.password, env, "the remote's password")?;
            secrets.push(password.clone());
            Some(Credential { username: c.username.clone(), password })
        }
    };
    let mut config = GitConfig::new(source.remote.clone(), settings.work_dir());
    config.credential = credential;
    config.tracking_branch.clone_from(&source.branch);
    config.allow_loopback = source.allow_loopback;
    config.allow_private = source.allow_private;
    config.ca_file.clone_from(&source.ca_file);
    GitSource::new(config).map(Some)
}

fn registries(registry: Option<&RegistrySettings>, secrets: &mut Vec<String>) -> Result<OciConfig, Fault> {
    let mut config = OciConfig::default();
    let Some(registry) = registry else { return Ok(config) };
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

fn secret(from: &SecretSource, env: &Environment, what: &str) -> Result<String, Fault> {
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
    source: Option<Arc<GitSource>>,
}

#[async_trait]
impl Recipes for ReleaseRecipes {
    async fn recipes(&self, tree: &Tree, version: &Version, running: Option<&Deployment>) -> Result<Fetched, Fault> {
        let refused = |what: String| {
            Fault::permanent(format!("release {version} cannot be built: {what}"))
                .advice("mend the release, or replank.toml")
        };
        let path = tree.path.clone();
        let bytes = tokio::task::spawn_blocking(move || tree::read_file(&path, manifest::FILE, MANIFEST_MAX))
            .await
            .map_err(|e| Fault::permanent("the release's manifest could not be read").because(e))??;
        let manifest = match bytes {
            Some(bytes) => {
                manifest::Manifest::parse_bytes(&bytes).map_err(|problems| refused(problems.in_one_line()))?
            }
            None => manifest::Manifest::default(),
        };
        let missing = manifest.missing(&self.settings, running.map(|r| &r.version));
        if !missing.is_empty() {
            return Err(refused(missing.join("; ")));
        }
        let recipes =
            manifest::recipes(&self.settings, &manifest, version).map_err(|error| refused(error.to_string()))?;
        if let Some(source) = &self.source {
            for (component, recipe) in &recipes {
                source.check_paths(tree, component.as_str(), &recipe.dockerfile, &recipe.context).await?;
            }
        }
        Ok(Fetched { recipes, manifest: manifest.to_json() })
    }
}
