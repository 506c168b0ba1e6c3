//! The service's ports with a gate before and behind whatever records something or has an effect. Looks pass freely, but for
//! those whose failure ends a step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use replank::config::Settings;
use replank::engine::Ports;
use replank_core::data::DataStep;
use replank_core::fault::{Class, Fault};
use replank_core::history::{Entry, Line};
use replank_core::image::{ImageId, Images};
use replank_core::phase::{Built, Fetched};
use replank_core::ports::*;
use replank_core::record::{ControllerId, Deployment, Plan, Record, Target};
use replank_core::words::{CommitSha, Digest, InstallationId, JobId, Millis, OpKey, Version};

use crate::gate::Gate;
use crate::point::{self, Side};

/// Puts a gate before every port.
pub fn with_faults(ports: Ports, settings: &Settings) -> Ports {
    let home = settings.ledger_dir();
    let home = home.parent().unwrap_or(&home);
    let gate = Gate::new(home, settings.revision.as_deref().unwrap_or("host"));
    Ports {
        ledger: Arc::new(Door { inner: ports.ledger, gate: gate.clone() }),
        source: ports.source.map(|inner| Arc::new(Door { inner, gate: gate.clone() }) as Arc<dyn Source>),
        builder: Arc::new(Door { inner: ports.builder, gate: gate.clone() }),
        registry: Arc::new(Door { inner: ports.registry, gate: gate.clone() }),
        platform: ports.platform.map(|inner| Arc::new(Door { inner, gate: gate.clone() }) as Arc<dyn Platform>),
        clock: ports.clock,
        ids: ports.ids,
        // Fenced and compared by offset: a build's own faults try it.
        logs: ports.logs,
        local_images: ports.local_images,
    }
}

/// One port behind its gate.
#[derive(Debug)]
struct Door<P: ?Sized> {
    inner: Arc<P>,
    gate: Gate,
}

impl<P: ?Sized> Door<P> {
    async fn effect<T>(&self, step: &str, effect: impl Future<Output = Result<T, Fault>> + Send) -> Result<T, Fault> {
        self.gate.pass(step, Side::Before).await.map_err(injected)?;
        let value = effect.await?;
        self.gate.pass(step, Side::After).await.map_err(injected)?;
        Ok(value)
    }
}

fn injected(class: Class) -> Fault {
    Fault::new(class, "a failure that a test made").advice("nothing: it was meant")
}

fn of_ledger(class: Class) -> LedgerError {
    match class {
        Class::Transient | Class::Permanent => LedgerError::Unavailable(injected(class)),
        Class::Conflict => LedgerError::Conflict,
        Class::Indeterminate => LedgerError::Indeterminate(injected(class)),
    }
}

/// A recorded step's name: the event, and what it is about.
fn recorded(line: &Line) -> Option<String> {
    let entry = Entry::read(line)?;
    let event = Some(entry.event()).filter(|event| !event.is_empty())?;
    let about = ["op", "component", "step"].into_iter().map(|name| entry.text(name)).find(|about| !about.is_empty());
    Some(about.map_or_else(|| format!("record {event}"), |about| format!("record {event} {about}")))
}

#[async_trait]
impl Ledger for Door<dyn Ledger> {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        let loaded = self.inner.load().await?;
        if let Some((record, _)) = &loaded {
            self.gate.saw(record);
        }
        Ok(loaded)
    }

    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        self.inner.version().await
    }

    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError> {
        let Some(step) = lines.first().and_then(recorded) else {
            return self.inner.commit(expected, record, lines).await;
        };
        self.gate.pass(&step, Side::Before).await.map_err(of_ledger)?;
        let etag = self.inner.commit(expected, record, lines).await?;
        self.gate.saw(record);
        self.gate.pass(&step, Side::After).await.map_err(of_ledger)?;
        Ok(etag)
    }

    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError> {
        self.inner.history(from, limit).await
    }

    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError> {
        self.inner.beat(presence).await
    }

    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        self.inner.presences().await
    }

    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError> {
        self.inner.forget(controller).await
    }

    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        now: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        self.inner.first_seen(tags, now).await
    }
}

#[async_trait]
impl Source for Door<dyn Source> {
    fn remote(&self) -> String {
        self.inner.remote()
    }

    fn refuses_commits(&self) -> Option<String> {
        self.inner.refuses_commits()
    }

    async fn refs(&self) -> Result<Refs, Fault> {
        self.inner.refs().await
    }

    async fn peek(&self, target: &Target, since: Option<&CommitSha>, path: &str, max: usize) -> Result<Peeked, Fault> {
        self.inner.peek(target, since, path, max).await
    }

    async fn fetch(&self, job: &JobId, target: &Target, log: &dyn Log) -> Result<Tree, Fault> {
        self.effect("fetch", self.inner.fetch(job, target, log)).await
    }

    async fn read(&self, tree: &Tree, path: &str, max: usize) -> Result<Option<Vec<u8>>, Fault> {
        self.inner.read(tree, path, max).await
    }

    async fn check_paths(&self, tree: &Tree, component: &str, dockerfile: &str, context: &str) -> Result<(), Fault> {
        self.inner.check_paths(tree, component, dockerfile, context).await
    }

    async fn discard_all_but(&self, job: Option<&JobId>) -> Result<(), Fault> {
        self.inner.discard_all_but(job).await
    }
}

#[async_trait]
impl Builder for Door<dyn Builder> {
    async fn build(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Built, Fault> {
        self.effect(&format!("build {}", spec.component), self.inner.build(spec, log)).await
    }
}

#[async_trait]
impl Registry for Door<dyn Registry> {
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault> {
        self.inner.resolve(image).await
    }

    async fn protect(&self, image: &ImageId, installation: &InstallationId, name: &str) -> Result<(), Fault> {
        self.effect("protect", self.inner.protect(image, installation, name)).await
    }

    async fn release(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        self.inner.release(image, installation).await
    }

    async fn list(&self, repository: &str, installation: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault> {
        self.inner.list(repository, installation).await
    }

    async fn delete(&self, image: &ImageId, installation: &InstallationId) -> Result<(), Fault> {
        self.inner.delete(image, installation).await
    }

    async fn discard(
        &self,
        repository: &str,
        attempt_tag: &str,
        also: &str,
        needed: &BTreeSet<Digest>,
    ) -> Result<Discarded, Fault> {
        self.inner.discard(repository, attempt_tag, also, needed).await
    }
}

#[async_trait]
impl Platform for Door<dyn Platform> {
    async fn plan(&self, fetched: &Fetched, images: &Images, version: &Version) -> Result<Plan, Fault> {
        self.effect("plan", self.inner.plan(fetched, images, version)).await
    }

    async fn observe(&self, ask: &Ask) -> Result<Observation, Fault> {
        self.inner.observe(ask).await
    }

    async fn change(&self, change: &Change) -> Result<(), Fault> {
        let step = format!("change {}", point::change(change));
        if !self.gate.waits_behind(&step) {
            return self.effect(&step, self.inner.change(change)).await;
        }
        // A controller that sees the change before this call comes back gives the call up; the fault is to strike all the same.
        let (door, change) = (Self { inner: self.inner.clone(), gate: self.gate.clone() }, change.clone());
        let made = tokio::spawn(async move { door.effect(&step, door.inner.change(&change)).await });
        made.await.map_err(|gone| Fault::indeterminate("the change was not waited for").because(gone))?
    }

    async fn run_step(
        &self,
        deployment: &Deployment,
        step: &DataStep,
        key: &OpKey,
        until: Millis,
        log: &dyn Log,
    ) -> Result<i64, Fault> {
        let inner = self.inner.run_step(deployment, step, key, until, log);
        self.effect(&format!("data step {}", step.name), inner).await
    }

    fn escape_hatch(&self, to: &Deployment, from: Option<&Deployment>, generation: u64) -> EscapeHatch {
        self.inner.escape_hatch(to, from, generation)
    }
}
