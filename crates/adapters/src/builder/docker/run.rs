//! One run of BuildKit: session, request, messages, result.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::models::{BuildInfoAux, ErrorDetail};
use replank_core::fault::{Class, Fault};
use replank_core::ports::{BuildSpec, Log, Stream};
use replank_core::words::Digest;
use sha2::{Digest as _, Sha256};

use super::filesync::Files;
use super::hide::Hide;
use super::progress::{Failed, Tracker};
use super::session::{Served, open};
use super::wire::{Messages, Wire};
use super::{DockerBuilder, Names, context, labels_of};

/// Less than this is a full disk: BuildKit cannot even write its own records.
const DISK_FULL: u64 = 64 << 20;
/// A build fails at once where its session is gone, and both are told on connections of their own.
const SESSION_END_SEEN: Duration = Duration::from_millis(500);
/// Base images whose digests are looked up.
const BASES_MAX: usize = 32;
/// A period of the CPU quota, microseconds; the kernel's default.
const CPU_PERIOD: u64 = 100_000;

/// Ends the build in the engine unless it is known to be over.
struct Running<'a> {
    wire: &'a Wire,
    build: &'a str,
    over: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.wire.cancel_soon(self.build);
        }
    }
}

impl DockerBuilder {
    /// Builds and tags; gives the image's id and its base images.
    pub(super) async fn run(
        &self,
        spec: &BuildSpec,
        names: &Names,
        log: &dyn Log,
    ) -> Result<(Digest, BTreeMap<String, String>), Fault> {
        let (tree, recipe, limits) = (spec.tree.path.clone(), spec.recipe.clone(), self.config.context);
        let gathered =
            tokio::task::spawn_blocking(move || context::gather(&tree, &recipe.context, &recipe.dockerfile, limits));
        let context =
            gathered.await.map_err(|e| Fault::transient("the build context could not be read").because(e))??;
        let secrets = self.secrets(spec).await?;
        let hide = Hide::new(secrets.values().map(Vec::as_slice));

        let query = self.query(spec, names, &context.dockerfile_name);
        let shown: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let first = format!("POST /build {}\n", shown.join(" "));
        log.write(Stream::Stdout, hide.text(&first).as_bytes());
        let size = format!(
            "context {} of {}: {} entries, {} bytes\n",
            spec.recipe.context,
            spec.tree.commit.short(),
            context.context.entries.len(),
            context.bytes
        );
        log.write(Stream::Stdout, size.as_bytes());

        let id = random_id()?;
        let wire = Wire::new(&self.engine);
        let refused = Arc::new(Mutex::new(Vec::new()));
        let served = Served {
            files: Files(Arc::new(context)),
            secrets,
            credentials: self.registry.credentials().clone(),
            refused: refused.clone(),
        };
        let mut session = open(&wire, &id, &shared_key(spec), served).await?;
        let mut query = query;
        query.push(("session", id.clone()));
        query.push(("buildid", id.clone()));
        let mut running = Running { wire: &wire, build: &id, over: false };
        let answer = wire.post("/build", &query, &[("content-type", "application/x-tar")]).await;
        let answer = answer.map_err(|fault| not_accepted(spec, fault))?;
        let mut messages = Messages::new(answer);
        let mut tracker = Tracker::new(log, &hide);
        let mut image = None;
        let mut error = None;
        while let Some(message) = messages.next().await? {
            match message.aux {
                Some(BuildInfoAux::BuildKit(status)) => tracker.take(status),
                Some(BuildInfoAux::Default(found)) => image = found.id.or(image),
                None => {}
            }
            if let Some(ErrorDetail { message: Some(text), .. }) = message.error_detail {
                error = Some(text);
            }
        }
        running.over = true;
        tracker.finish();
        // The engine keeps it while it builds, unless this process stood still for long.
        let is_lost = error.is_some() && session.is_lost(SESSION_END_SEEN).await;
        drop(session);
        if let Some(error) = error {
            if is_lost {
                let what = format!("the Docker engine dropped the session of the build of {}", spec.component);
                return Err(Fault::transient(what).because(hide.text(&error)));
            }
            let refused = refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
            return Err(self.failure(spec, tracker.failed(), &hide.text(&error), &refused).await);
        }
        // A stream that ends without a result: the engine was ended in the middle.
        let image = image.ok_or_else(|| Fault::transient("the Docker engine ended the build without a result"))?;
        let image = Digest::new(image)
            .map_err(|e| Fault::permanent("the engine's id of the built image is not a digest").because(e))?;
        let bases = self.bases(tracker.bases()).await;
        Ok((image, bases))
    }

    pub(super) fn query(&self, spec: &BuildSpec, names: &Names, dockerfile: &str) -> Vec<(&'static str, String)> {
        let json = |map: BTreeMap<&str, &str>| serde_json::to_string(&map).unwrap_or_default();
        let labels = labels_of(spec);
        let mut query = vec![
            ("version", "2".to_owned()),
            ("remote", "client-session".to_owned()),
            ("dockerfile", dockerfile.to_owned()),
            ("t", names.attempt.clone()),
            ("t", names.version.clone()),
            ("rm", "1".to_owned()),
            // Never anything else: neither the host's network nor one that a release chooses.
            ("networkmode", "default".to_owned()),
            ("labels", json(labels.iter().map(|(k, v)| (*k, v.as_str())).collect())),
            ("buildargs", json(spec.recipe.args.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect())),
        ];
        if let Some(target) = &spec.recipe.target {
            query.push(("target", target.clone()));
        }
        if let Some(platform) = &spec.recipe.platform {
            query.push(("platform", platform.clone()));
        }
        if self.config.pull {
            query.push(("pull", "1".to_owned()));
        }
        if let Some(memory) = self.config.memory {
            query.push(("memory", memory.to_string()));
            // Without this a build would use as much swap again.
            query.push(("memswap", memory.to_string()));
        }
        if let Some(milli) = self.config.milli_cpus {
            query.push(("cpuperiod", CPU_PERIOD.to_string()));
            query.push(("cpuquota", (CPU_PERIOD.saturating_mul(milli) / 1_000).to_string()));
        }
        query
    }

    /// What a failed build means. BuildKit says why as text only, so the class comes from what can be observed: which
    /// step ended, whether the engine still answers, and whether its disk is full.
    async fn failure(&self, spec: &BuildSpec, failed: Option<Failed>, error: &str, refused: &[String]) -> Fault {
        let component = &spec.component;
        if !refused.is_empty() {
            return Fault::permanent(format!(
                "the build of {component} wants secrets that it is not given: {}",
                refused.join(", ")
            ))
            .advice("name them for this component in the operator's configuration, or correct the Dockerfile")
            .because(error.to_owned());
        }
        let Ok(info) = self.engine.docker().info().await else {
            return Fault::transient(format!("the Docker engine went away during the build of {component}"))
                .because(error.to_owned());
        };
        let free = info.docker_root_dir.and_then(|dir| rustix::fs::statvfs(dir.as_str()).ok());
        if free.is_some_and(|s| s.f_bavail.saturating_mul(s.f_frsize) < DISK_FULL) {
            return Fault::permanent(format!("the build of {component} failed, and the engine's disk is full"))
                .advice("free space where the engine keeps its data, then start again")
                .because(error.to_owned());
        }
        match failed {
            Some(Failed { step, error, tail }) => {
                let mut cause = both_ends(&error);
                if !tail.is_empty() {
                    cause = format!("{cause}; last lines: {}", tail.join(" | "));
                }
                Fault::permanent(format!("the build of {component} failed at step {}", shortened(&step)))
                    .advice("the build log has the whole output; correct the release, or start again if the cause lay outside of it")
                    .because(cause)
            }
            None => Fault::permanent(format!("BuildKit refused the build of {component}"))
                .advice("correct the Dockerfile or the component's configuration")
                .because(error.to_owned()),
        }
    }

    /// Digests of base images as the engine knows them: from the reference itself, from the registry that it was pulled
    /// from, or, for an image made on this machine, its id. What cannot be found out is left out.
    async fn bases(&self, references: Vec<String>) -> BTreeMap<String, String> {
        let mut bases = BTreeMap::new();
        for reference in references.into_iter().take(BASES_MAX) {
            if let Some((name, digest)) = reference.split_once('@') {
                bases.insert(name.to_owned(), digest.to_owned());
                continue;
            }
            if let Ok(Some(local)) = self.inspect(&reference).await {
                let digest = local.digests.first().and_then(|d| d.split_once('@')).map(|(_, digest)| digest.to_owned());
                bases.insert(reference, digest.unwrap_or_else(|| local.id.to_string()));
            }
        }
        bases
    }
}

/// What the engine refuses before it begins is in the request, and that comes from the component's configuration.
fn not_accepted(spec: &BuildSpec, fault: Fault) -> Fault {
    if fault.class != Class::Permanent || !fault.advice.is_empty() {
        return fault;
    }
    Fault::permanent(format!("the build of {} was not accepted", spec.component))
        .advice("correct the component's configuration: its platform, target or arguments")
        .because(fault)
}

/// The engine's error repeats the instruction and has the exit code at its end: both ends count.
fn both_ends(error: &str) -> String {
    const END: usize = 100;
    let count = error.chars().count();
    if count <= 2 * END {
        return error.to_owned();
    }
    error.chars().take(END).chain(['…']).chain(error.chars().skip(count - END)).collect()
}

/// A step is named by its whole instruction, which can be pages of shell: what it died of must still fit behind it.
fn shortened(step: &str) -> String {
    const STEP_MAX: usize = 120;
    if step.chars().count() <= STEP_MAX {
        return step.to_owned();
    }
    step.chars().take(STEP_MAX).chain(['…']).collect()
}

/// What the engine may reuse of files that an earlier build sent: only this component's own.
fn shared_key(spec: &BuildSpec) -> String {
    let mut hash = Sha256::new();
    for part in [spec.installation.as_str(), spec.application.as_str(), spec.component.as_str(), &spec.recipe.context] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hex::encode(hash.finalize())
}

/// Names session and build; unguessable, since whoever knows it could cancel the build.
fn random_id() -> Result<String, Fault> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Fault::transient("the operating system gives no randomness").because(e.to_string()))?;
    Ok(hex::encode(bytes))
}
