//! Builder `docker`: BuildKit through a Docker engine's API.
//!
//! An engine that goes away makes a fault transient, never indeterminate: a build is called again with the same key, finds
//! what there is by its attempt tag, and makes only what is missing.

mod context;
mod filesync;
mod hide;
mod ignore;
mod progress;
mod push;
mod run;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use async_trait::async_trait;
use replank_core::fault::Fault;
use replank_core::image::{ImageId, attempt_tag, version_tag};
use replank_core::phase::Built;
use replank_core::ports::{BuildSpec, Builder, Log, Stream};
use replank_core::words::Digest;

pub use context::ContextLimits;

use crate::engine::{Engine, classify, is_missing};
use crate::labels;
use crate::oci::{OciClient, OciConfig, registry_host};

/// Where a build secret's value is found on this machine, when a build begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    Env(String),
    File(PathBuf),
}

/// The operator's side of a build. Nothing of it comes from a release.
#[derive(Debug, Clone, Default)]
pub struct DockerBuilderConfig {
    /// By the name that a Dockerfile uses. A build gets only those that its recipe names.
    pub secrets: BTreeMap<String, SecretSource>,
    pub context: ContextLimits,
    /// Bytes. BuildKit inside an engine before 23 ignores it: there the engine's own `--cgroup-parent` limits builds.
    pub memory: Option<u64>,
    /// Thousandths of a processor. The same restriction.
    pub milli_cpus: Option<u64>,
    /// Look for newer base images even where the engine has some under the same name.
    pub pull: bool,
    /// Push images whose repository names a registry.
    pub push: bool,
    /// Credentials also serve base images that the engine pulls.
    pub registries: OciConfig,
}

pub struct DockerBuilder {
    engine: Engine,
    config: DockerBuilderConfig,
    registry: OciClient,
}

impl fmt::Debug for DockerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerBuilder").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// What one build is called.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Names {
    /// Unique for the attempt: what is adopted, pushed and asked for.
    attempt: String,
    attempt_tag: String,
    /// For people.
    version_tag: String,
    version: String,
}

impl Names {
    fn of(spec: &BuildSpec) -> Self {
        let (version_tag, attempt_tag) = (version_tag(&spec.version), attempt_tag(&spec.version, &spec.key));
        let repository = &spec.recipe.repository;
        Self {
            attempt: format!("{repository}:{attempt_tag}"),
            version: format!("{repository}:{version_tag}"),
            attempt_tag,
            version_tag,
        }
    }
}

fn labels_of(spec: &BuildSpec) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        (labels::SOURCE, spec.remote.clone()),
        (labels::REVISION, spec.tree.commit.to_string()),
        (labels::VERSION, spec.version.to_string()),
        (labels::INSTALLATION, spec.installation.to_string()),
        (labels::APPLICATION, spec.application.to_string()),
        (labels::COMPONENT, spec.component.to_string()),
        (labels::JOB, spec.job.to_string()),
        (labels::KEY, spec.key.to_string()),
        (labels::COMMIT, spec.tree.commit.to_string()),
    ])
}

/// Adopts only what this installation made for this very key and commit.
fn check_labels<'a>(spec: &BuildSpec, where_: &str, found: impl Fn(&str) -> Option<&'a str>) -> Result<(), Fault> {
    let expected = labels_of(spec);
    for name in [labels::INSTALLATION, labels::KEY, labels::COMMIT] {
        let (want, have) = (expected.get(name).map(String::as_str), found(name));
        if want != have {
            return Err(Fault::conflict(format!(
                "{where_} has an image under the name of this build whose label {name} is {have:?}, not {want:?}"
            ))
            .advice("somebody else made it; remove that image, or start a new attempt"));
        }
    }
    Ok(())
}

/// An image that the engine has under the attempt's name.
struct Local {
    id: Digest,
    labels: BTreeMap<String, String>,
    digests: Vec<String>,
}

impl DockerBuilder {
    pub fn new(engine: Engine, config: DockerBuilderConfig) -> Result<Self, Fault> {
        let registry = OciClient::new(config.registries.clone())?;
        Ok(Self { engine, config, registry })
    }

    async fn inspect(&self, name: &str) -> Result<Option<Local>, Fault> {
        match self.engine.docker().inspect_image(name).await {
            Ok(image) => {
                let id = Digest::new(image.id.unwrap_or_default()).map_err(|e| {
                    Fault::permanent(format!("the engine's id of the image {name} is not a digest")).because(e)
                })?;
                let labels = image.config.and_then(|c| c.labels).unwrap_or_default().into_iter().collect();
                Ok(Some(Local { id, labels, digests: image.repo_digests.unwrap_or_default() }))
            }
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(classify(error, &format!("the image {name} cannot be inspected"))),
        }
    }

    /// The values of the recipe's secrets, by name.
    async fn secrets(&self, spec: &BuildSpec) -> Result<BTreeMap<String, Vec<u8>>, Fault> {
        let mut values = BTreeMap::new();
        for name in &spec.recipe.secrets {
            let missing = |why: &str| {
                Fault::permanent(format!("the build secret {name} of {} cannot be given: {why}", spec.component))
                    .advice("set the secret's source in the operator's configuration")
            };
            let source = self.config.secrets.get(name).ok_or_else(|| missing("it is not configured"))?;
            let value = match source {
                SecretSource::Env(variable) => std::env::var_os(variable)
                    .map(|v| v.as_encoded_bytes().to_vec())
                    .ok_or_else(|| missing(&format!("the environment has no {variable}")))?,
                SecretSource::File(path) => read_secret(path)
                    .await
                    .map_err(|e| missing(&format!("{} cannot be read", path.display())).because(e))?,
            };
            if value.len() > SECRET_MAX {
                return Err(missing("it is larger than BuildKit takes"));
            }
            values.insert(name.clone(), value);
        }
        Ok(values)
    }
}

/// BuildKit's own limit of a secret.
const SECRET_MAX: usize = 500 << 10;

async fn read_secret(path: &std::path::Path) -> std::io::Result<Vec<u8>> {
    use tokio::io::AsyncReadExt as _;
    let mut value = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(SECRET_MAX as u64 + 1).read_to_end(&mut value).await?;
    Ok(value)
}

#[async_trait]
impl Builder for DockerBuilder {
    async fn build(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Built, Fault> {
        let begun = Instant::now();
        let names = Names::of(spec);
        let repository = &spec.recipe.repository;
        let pushes = self.config.push && registry_host(repository).is_some();
        let say = |text: String| log.write(Stream::Stdout, format!("{text}\n").as_bytes());
        let built_ms = |begun: Instant| u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);

        if pushes && let Some(manifest) = self.registry.manifest(repository, &names.attempt_tag).await? {
            let facts = self.registry.facts(repository, &manifest).await?;
            check_labels(spec, "the registry", |name| facts.labels.get(name).map(String::as_str))?;
            say(format!("adopted {} from the registry: {}", names.attempt, manifest.digest));
            let image = ImageId::Manifest { repository: repository.clone(), digest: manifest.digest };
            return Ok(Built { image, bases: BTreeMap::new(), queued_ms: 0, built_ms: 0, adopted: true });
        }
        let (local, bases, adopted) = match self.inspect(&names.attempt).await? {
            Some(local) => {
                check_labels(spec, "the engine", |name| local.labels.get(name).map(String::as_str))?;
                say(format!("adopted {} from the engine: {}", names.attempt, local.id));
                (local, BTreeMap::new(), true)
            }
            None => {
                let (id, bases) = self.run(spec, &names, log).await?;
                let Some(local) = self.inspect(&names.attempt).await? else {
                    return Err(Fault::transient(format!(
                        "the engine lost the image {} after its build",
                        names.attempt
                    )));
                };
                if local.id != id {
                    return Err(Fault::conflict(format!(
                        "the name {} leads to the image {}, but {id} was built",
                        names.attempt, local.id
                    )));
                }
                check_labels(spec, "the engine", |name| local.labels.get(name).map(String::as_str))?;
                (local, bases, false)
            }
        };
        let image = if pushes {
            let digest = self.push(spec, &names, log).await?;
            ImageId::Manifest { repository: repository.clone(), digest }
        } else {
            ImageId::Engine { id: local.id, name: names.attempt }
        };
        say(format!("image {image}"));
        // An image that was only pushed again was not built again.
        let adopted = adopted && !pushes;
        Ok(Built { image, bases, queued_ms: 0, built_ms: built_ms(begun), adopted })
    }
}
