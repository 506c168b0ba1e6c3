//! Builder `az-exec`: `az acr build` through the exec channel, in the clone that the source of the same name made there.
//!
//! Neither what `az` prints nor how it ends decides anything: it ends well on some failed builds, and a killed one leaves its
//! build running in the registry's service. The image is what the registry has under the attempt's tag.

mod output;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use replank_core::fault::Fault;
use replank_core::image::{ImageId, attempt_tag, version_tag};
use replank_core::phase::Built;
use replank_core::ports::{BuildSpec, Builder, Log, Stream};
use replank_core::words::{Digest, JobId, OpKey};
use replank_exec::protocol::{EXIT_NOT_STARTED, Request, Summary};

use crate::exec_channel::{Channel, Streamed};
use crate::oci::{OciClient, OciConfig, registry_host};
use output::Watch;

/// The channel's longest time-out, and the building budget's default.
const BUILD_SECONDS: u64 = 1_800;
const LOGIN_SECONDS: u64 = 120;
/// Between two looks for what an earlier attempt's build pushes: a build takes minutes.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A shell's way to say that a signal ended a program.
const KILLED: i32 = 128;

/// The operator's side of a build.
#[derive(Debug, Clone)]
pub struct AzExecConfig {
    /// The container registry's name, as `az acr build --registry` takes it.
    pub registry: String,
    /// The managed identity that `az` signs in as; the machine's own where absent.
    pub client_id: Option<String>,
    /// How long a build that an earlier attempt may have begun is waited for, before another one is begun.
    pub wait_out: Duration,
    /// How the registry is asked.
    pub registries: OciConfig,
}

pub struct AzExecBuilder {
    channel: Channel,
    config: AzExecConfig,
    registry: OciClient,
    /// The job for which `az` has signed in last. Held while it does, so that builds side by side wait for it.
    signed_in: tokio::sync::Mutex<Option<JobId>>,
    /// Attempts whose `az` was begun by this process and lost: their builds may go on.
    lost: Mutex<BTreeSet<OpKey>>,
}

impl fmt::Debug for AzExecBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzExecBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl AzExecBuilder {
    pub fn new(channel: Channel, config: AzExecConfig) -> Result<Self, Fault> {
        let registry = OciClient::new(config.registries.clone())?;
        Ok(Self { channel, config, registry, signed_in: tokio::sync::Mutex::default(), lost: Mutex::default() })
    }

    /// What the registry has under the attempt's tag.
    async fn pushed(&self, spec: &BuildSpec) -> Result<Option<Digest>, Fault> {
        self.registry.head(&spec.recipe.repository, &attempt_tag(&spec.version, &spec.key)).await
    }

    fn lost(&self) -> std::sync::MutexGuard<'_, BTreeSet<OpKey>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what an earlier attempt's build may still push: two builds at once would fight over the tag.
    async fn wait_out(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Option<Digest>, Fault> {
        let limit = self.config.wait_out;
        let seconds = limit.as_secs();
        say(log, &format!("an earlier az may have left its build running: waiting up to {seconds} s for its image"));
        let begun = Instant::now();
        while begun.elapsed() < limit {
            tokio::time::sleep(LOOK_EVERY.min(limit)).await;
            if let Some(digest) = self.pushed(spec).await? {
                return Ok(Some(digest));
            }
        }
        say(log, "no image came; building again");
        Ok(None)
    }

    /// Best effort (contract §5): where it fails, `az acr build` says what is missing.
    async fn sign_in(&self, spec: &BuildSpec, log: &dyn Log) {
        let mut signed_in = self.signed_in.lock().await;
        if signed_in.as_ref() == Some(&spec.job) {
            return;
        }
        let mut argv: Vec<String> =
            ["az", "login", "--identity", "--allow-no-subscriptions"].map(str::to_owned).to_vec();
        if let Some(id) = &self.config.client_id {
            argv.extend(["--client-id".to_owned(), id.clone()]);
        }
        let request = Request { argv, timeout_seconds: Some(LOGIN_SECONDS), ..Request::default() };
        match self.channel.run(&request, "az was to sign in").await {
            Ok(outcome) if outcome.exit_code == 0 => *signed_in = Some(spec.job.clone()),
            Ok(outcome) => {
                say(log, &format!("az login ended with exit code {}: {}", outcome.exit_code, outcome.stderr.trim()));
            }
            Err(fault) => say(log, &format!("az login failed: {}", fault.told().sentence())),
        }
    }

    /// `az acr build` as contract §5 has it, and one tag more that is this attempt's alone.
    fn words(&self, spec: &BuildSpec) -> Result<Vec<String>, Fault> {
        let recipe = &spec.recipe;
        let host = registry_host(&recipe.repository).ok_or_else(|| {
            Fault::permanent(format!("the repository {} names no registry", recipe.repository))
                .advice("set PLATFORM_ACR_NAME, or registry.host")
        })?;
        if !recipe.secrets.is_empty() {
            return Err(Fault::permanent(format!(
                "{} needs build secrets, which az acr build is not given",
                spec.component
            ))
            .advice("take `secrets` out of the component, or build with another builder"));
        }
        let name = &recipe.repository[host.len() + 1..];
        let mut words: Vec<String> =
            ["az", "acr", "build", "--registry", &self.config.registry].map(str::to_owned).to_vec();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        add("--image", format!("{name}:{}", version_tag(&spec.version)));
        add("--image", format!("{name}:{}", attempt_tag(&spec.version, &spec.key)));
        add("--file", recipe.dockerfile.clone());
        for (arg, value) in &recipe.args {
            add("--build-arg", format!("{arg}={value}"));
        }
        if let Some(target) = &recipe.target {
            add("--target", target.clone());
        }
        if let Some(platform) = &recipe.platform {
            add("--platform", platform.clone());
        }
        words.push(recipe.context.clone());
        Ok(words)
    }

    /// Why no image is there, told by how `az` ended.
    fn why(&self, spec: &BuildSpec, summary: &Summary, last: &str) -> Fault {
        let what = &spec.component;
        let code = summary.exit_code;
        if summary.timed_out {
            return Fault::permanent(format!("az acr build of {what} took longer than {BUILD_SECONDS} s"))
                .advice("its build may go on in the registry's service; make the build faster, and start again");
        }
        if code == EXIT_NOT_STARTED {
            return Fault::permanent("the exec server cannot run az")
                .advice("install the Azure CLI in the container that runs the exec server");
        }
        if !(0..KILLED).contains(&code) {
            self.lost().insert(spec.key.clone());
            return Fault::indeterminate(format!("az acr build of {what} was killed (exit code {code})"))
                .advice("its build may go on in the registry's service; it is looked for before another one is begun");
        }
        let fault = if code == 0 {
            Fault::permanent(format!(
                "az acr build of {what} ended without an error, but the registry has no image of it"
            ))
        } else {
            Fault::permanent(format!("az acr build of {what} failed with exit code {code}"))
        };
        let fault = fault.advice("look at its build log, mend the cause, and start again");
        if last.is_empty() { fault } else { fault.because(format!("its last words: {last}")) }
    }
}

fn say(log: &dyn Log, text: &str) {
    log.write(Stream::Stdout, format!("{text}\n").as_bytes());
}

#[async_trait]
impl Builder for AzExecBuilder {
    async fn build(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Built, Fault> {
        let begun = Instant::now();
        let words = self.words(spec)?;
        say(log, &shown(&words));
        let repository = spec.recipe.repository.clone();
        let made = |digest: Digest, queued: Duration, adopted: bool| {
            let image = ImageId::Manifest { repository: repository.clone(), digest };
            say(log, &format!("image {image}"));
            let built = begun.elapsed().saturating_sub(queued);
            let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
            Built { image, bases: BTreeMap::new(), queued_ms: millis(queued), built_ms: millis(built), adopted }
        };
        let is_lost = self.lost().contains(&spec.key);
        let mut found = self.pushed(spec).await?;
        if found.is_none() && (spec.resumed || is_lost) && !self.config.wait_out.is_zero() {
            found = self.wait_out(spec, log).await?;
        }
        if let Some(digest) = found {
            say(log, "found in the registry: an earlier attempt's build pushed it");
            return Ok(made(digest, Duration::ZERO, true));
        }
        self.sign_in(spec, log).await;
        let request = Request {
            argv: words,
            cwd: Some(spec.tree.path.display().to_string()),
            timeout_seconds: Some(BUILD_SECONDS),
            ..Request::default()
        };
        let watch = Watch::new(log);
        let doing = format!("az acr build of {} was to run on the exec server", spec.component);
        let streamed = self.channel.stream(&request, &doing, &watch).await?;
        let pushed = self.pushed(spec).await;
        match (streamed, pushed) {
            // However az ended: what was wanted is there.
            (_, Ok(Some(digest))) => {
                self.lost().remove(&spec.key);
                Ok(made(digest, watch.queued(), false))
            }
            (Streamed::Ended(summary), Ok(None)) => Err(self.why(spec, &summary, &watch.last_words())),
            (Streamed::Lost(fault), _) => {
                self.lost().insert(spec.key.clone());
                Err(fault)
            }
            // Asked again with the same key, it is found.
            (Streamed::Ended(_), Err(fault)) => {
                self.lost().insert(spec.key.clone());
                Err(fault)
            }
        }
    }
}

/// The command as a person would type it.
fn shown(words: &[String]) -> String {
    let plain =
        |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:=@,+".contains(&b));
    let quoted = |word: &String| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', "'\\''")) };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
