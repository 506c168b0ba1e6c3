//! Carries out what was decided: fetch, build, prepare, change. One task each; the result goes back to the loop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use replank_core::data::StepKind;
use replank_core::decide::{Action, Ended, Outcome, Prepared, TaskId};
use replank_core::fault::Fault;
use replank_core::format::FORMATS_LABEL;
use replank_core::image::{ImageId, Images};
use replank_core::phase::{Built, Phase, Recipe};
use replank_core::ports::{BuildSpec, Log as _, LogId, Platform, Source, Stream, Tree};
use replank_core::record::{Job, Record};
use replank_core::words::{ComponentName, ContainerName, JobId, Millis, OpKey};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use super::fetch_log::FetchLog;
use super::release::one_way;
use super::room;
use super::setup::{Ports, Setup, Shared};
use crate::build_log::{Begin, BuildLog};

#[derive(Debug)]
pub(super) struct Executor {
    pub(super) ports: Ports,
    pub(super) setup: Arc<Setup>,
    shared: Arc<Shared>,
    results: mpsc::Sender<(TaskId, Ended)>,
    /// The tree of the job that is being built; builds of several components fetch it once.
    pub(super) tree: Mutex<Option<(JobId, Tree)>>,
    /// When this process began: a build that was intended before may have been begun by an earlier one.
    begun: Millis,
}

impl Executor {
    pub(super) fn new(
        ports: Ports,
        setup: Arc<Setup>,
        shared: Arc<Shared>,
        results: mpsc::Sender<(TaskId, Ended)>,
    ) -> Self {
        let begun = ports.clock.now();
        Self { ports, setup, shared, results, tree: Mutex::new(None), begun }
    }

    /// Runs an action beside the loop. Aborting the handle drops the work.
    pub(super) fn spawn(
        self: Arc<Self>,
        record: Arc<Record>,
        task: TaskId,
        action: Action,
        tries: u32,
    ) -> JoinHandle<()> {
        tokio::spawn(async move {
            let from = self.ports.clock.now();
            let inner = {
                let (this, record) = (self.clone(), record.clone());
                tokio::spawn(async move { this.carry_out_in_time(&record, action).await })
            };
            let result = match AbortOnDropHandle::new(inner).await {
                Ok(result) => result,
                Err(error) => Err(Fault::permanent(format!("{} ended in a defect of Replank", task.step))
                    .advice("report this with the log of the controller")
                    .because(error)),
            };
            // From here on it goes into spans, the log, the record, the history and to receivers.
            let result = result.map_err(|fault| {
                let told = self.setup.told(&fault);
                Fault::new(told.class, told.what).advice(told.advice)
            });
            let at = self.ports.clock.now();
            self.shared.telemetry.step(&record, &task, from, at, &result);
            let ended = match result {
                Ok(outcome) => Ended::Well { outcome, at },
                Err(fault) => {
                    tracing::warn!(task = %task.step, class = ?fault.class, error = %fault.chain(), "a step failed");
                    Ended::Badly { told: fault.told(), tries: tries + 1, at }
                }
            };
            // The loop is gone when this fails, and so is everybody who wants the result.
            if self.results.send((task, ended)).await.is_err() {
                tracing::debug!("a result came after the loop had ended");
            }
        })
    }

    /// An engine that never answers must not keep everything else from being done. What the phases' budgets end needs no limit
    /// of its own.
    async fn carry_out_in_time(&self, record: &Record, action: Action) -> Result<Outcome, Fault> {
        let is_limited = match &action {
            Action::Change { .. } | Action::CleanUp | Action::Prove | Action::Purge => true,
            Action::Fetch | Action::Build { .. } | Action::Prepare | Action::Step { .. } => false,
        };
        let work = self.carry_out(record, action);
        if !is_limited {
            return work.await;
        }
        let limit = Duration::from_millis(self.setup.policy.change);
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let what = format!("there was no answer within {} s", limit.as_secs());
            Err(Fault::indeterminate(what).advice("look at the engine and at its log"))
        })
    }

    async fn carry_out(&self, record: &Record, action: Action) -> Result<Outcome, Fault> {
        match action {
            Action::Fetch => {
                let (job, source) = (self.job(record)?, self.source()?);
                // Before anything is taken from anywhere: what does not fit costs nobody a build.
                room::check(self.setup.room.as_ref(), record, job).await?;
                let tree = self.tree(job, source.as_ref()).await?;
                let fetched = self.setup.recipes.recipes(&tree, &job.target.version, record.running.as_ref()).await?;
                // Looked at before the job where that could be had; what counts is what was fetched.
                let closes = one_way(&fetched, record.running.as_ref(), &job.target.version);
                if let Some(told) = closes.filter(|_| !job.accepts_one_way()) {
                    return Err(Fault::new(told.class, told.what).advice(told.advice));
                }
                Ok(Outcome::Fetched(fetched))
            }
            Action::Build { component, attempt, key } => self.build(record, component, attempt, key).await,
            Action::Step { step, key, until } => self.data_step(record, &step, &key, until).await,
            Action::Prepare => self.prepare(record).await,
            Action::Change { change, .. } => {
                self.still_mine(record).await?;
                self.platform()?.change(&change).await?;
                Ok(Outcome::Changed)
            }
            Action::CleanUp => {
                self.clean_up(record).await;
                Ok(Outcome::CleanedUp)
            }
            Action::Prove => Ok(Outcome::Proved { lost: self.prove(record).await? }),
            Action::Purge => Ok(Outcome::Purged(self.purge(record).await?)),
        }
    }

    /// A process that was paused between deciding and acting must not act on what it knew then: the shorter that gap, the
    /// less a successor has to undo.
    pub(super) async fn still_mine(&self, decided_on: &Record) -> Result<(), Fault> {
        let now = self.ports.ledger.load().await;
        let now = now.map_err(|e| Fault::transient("the ledger could not be asked before a change").because(e))?;
        let same = now.is_some_and(|(now, _)| {
            now.driver == decided_on.driver
                && now.phase.state() == decided_on.phase.state()
                && now.generation == decided_on.generation
                && now.job.as_ref().map(|j| &j.id) == decided_on.job.as_ref().map(|j| &j.id)
        });
        if same { Ok(()) } else { Err(Fault::conflict("the record moved on before the change was made")) }
    }

    async fn tree(&self, job: &Job, source: &dyn Source) -> Result<Tree, Fault> {
        let mut held = self.tree.lock().await;
        if let Some((id, tree)) = held.as_ref()
            && *id == job.id
        {
            return Ok(tree.clone());
        }
        *held = None;
        source.discard_all_but(Some(&job.id)).await?;
        let log = FetchLog::new(&job.id, &self.setup.secrets);
        let tree = source.fetch(&job.id, &job.target, &log).await.map_err(|fault| log.explain(fault))?;
        log.finish();
        *held = Some((job.id.clone(), tree.clone()));
        Ok(tree)
    }

    async fn build(
        &self,
        record: &Record,
        component: ComponentName,
        attempt: u32,
        key: OpKey,
    ) -> Result<Outcome, Fault> {
        let (job, source) = (self.job(record)?, self.source()?);
        let Phase::Building(building) = &record.phase else {
            return Err(Fault::conflict("the job is no longer building"));
        };
        let recipe = building.fetched.recipes.get(&component).cloned().ok_or_else(|| {
            Fault::permanent(format!("the release has no recipe for {component}")).advice("report this")
        })?;
        let resumed = building.builds.get(&component).is_some_and(|b| b.intended_at < self.begun);
        let reused = self.reused(job, &component, &recipe).await?;
        let id = LogId { job: job.id.clone(), component: component.clone() };
        // The builder writes the exact request as the first line after the marker.
        let begin = Begin { id, attempt, key: key.to_string(), request: String::new() };
        let log = BuildLog::begin(self.ports.logs.clone(), self.ports.clock.as_ref(), &begin, &self.setup.secrets);
        if let Some(image) = reused {
            log.write(Stream::Stdout, format!("image {image}, made of the same commit by an earlier job\n").as_bytes());
            log.finish().await;
            return Ok(Outcome::Built(Built {
                image,
                bases: BTreeMap::new(),
                queued_ms: 0,
                built_ms: 0,
                adopted: true,
            }));
        }
        let tree = self.tree(job, source.as_ref()).await?;
        let spec = BuildSpec {
            installation: record.installation.clone(),
            application: record.application.clone(),
            job: job.id.clone(),
            key,
            attempt,
            resumed,
            component: component.clone(),
            recipe,
            tree,
            version: job.target.version.clone(),
            remote: source.remote(),
        };
        let follow = self.follow_progress(&component, &log);
        let result = self.ports.builder.build(&spec, &log).await;
        drop(follow);
        if let Err(fault) = &result {
            log.write(Stream::Stderr, format!("{}\n", fault.told().sentence()).as_bytes());
        }
        let stored = log.finish().await;
        if !stored.complete {
            tracing::warn!(component = %component, dropped_lines = stored.dropped_lines, "the build log is not whole");
        }
        result.map(Outcome::Built)
    }

    /// A build-only job's image of the same commit and recipe, if it is still there.
    async fn reused(&self, job: &Job, component: &ComponentName, recipe: &Recipe) -> Result<Option<ImageId>, Fault> {
        let Some(image) = job.reuse.as_ref().and_then(|made| made.image(component, recipe)) else { return Ok(None) };
        Ok(self.ports.registry.resolve(image).await?.map(|_| image.clone()))
    }

    /// Copies a build's progress into the live view until it is dropped.
    fn follow_progress(&self, component: &ComponentName, log: &BuildLog) -> AbortOnDropHandle<()> {
        let (shared, component, mut progress) = (self.shared.clone(), component.clone(), log.progress_of());
        AbortOnDropHandle::new(tokio::spawn(async move {
            while progress.changed().await.is_ok() {
                let Some(now) = progress.borrow_and_update().clone() else { continue };
                shared.publish(|live| {
                    live.progress.insert(component.clone(), now);
                });
            }
        }))
    }

    /// A data step is like a build: it has a log of its own, and a key under which it is found again.
    async fn data_step(
        &self,
        record: &Record,
        name: &ContainerName,
        key: &OpKey,
        until: Millis,
    ) -> Result<Outcome, Fault> {
        self.still_mine(record).await?;
        let Phase::RollingOut(swap) = &record.phase else {
            return Err(Fault::conflict("the job is no longer rolling out"));
        };
        let step = swap.to.plan.data.steps.iter().find(|step| step.name == *name);
        let step = step.ok_or_else(|| Fault::permanent(format!("the release has no data step {name}")))?;
        // A backup is made by what runs, which knows its data; there is nothing to back up where nothing ran.
        let on = match (step.kind, &swap.from) {
            (StepKind::Migrate, _) => &swap.to,
            (StepKind::Backup, Some(from)) => from,
            (StepKind::Backup, None) => return Ok(Outcome::Stepped { exit_code: 0 }),
        };
        let component = ComponentName::new(name.as_str())
            .map_err(|bad| Fault::permanent("the data step cannot be named").because(bad))?;
        let id = LogId { job: self.job(record)?.id.clone(), component };
        let begin = Begin { id, attempt: 1, key: key.to_string(), request: format!("data step {name}") };
        let log = BuildLog::begin(self.ports.logs.clone(), self.ports.clock.as_ref(), &begin, &self.setup.secrets);
        let result = self.platform()?.run_step(on, step, key, until, &log).await;
        let last = match &result {
            Ok(code) => format!("{name} ended with exit code {code}\n"),
            Err(fault) => format!("{}\n", fault.told().sentence()),
        };
        log.write(Stream::Stderr, last.as_bytes());
        log.finish().await;
        Ok(Outcome::Stepped { exit_code: result? })
    }

    /// Before the platform is touched: how the new revision would run, and the way back resolved, present and protected.
    async fn prepare(&self, record: &Record) -> Result<Outcome, Fault> {
        let platform = self.platform()?;
        let job = self.job(record)?;
        let Phase::Patching(patching) = &record.phase else {
            return Err(Fault::conflict("the job is no longer at this step"));
        };
        // Once more, as builds take time and room: from here on both sides run.
        room::check(self.setup.room.as_ref(), record, job).await?;
        let plan = platform.plan(&patching.fetched, &patching.images, &job.target.version).await?;
        self.protect(record, &patching.images, job.target.version.to_string()).await?;
        let mut escape_hatch = Vec::new();
        if let Some(running) = &record.running {
            self.protect(record, &running.images, running.version.to_string()).await?;
            escape_hatch = platform.escape_hatch(running, None, record.generation).commands;
        }
        let controller = plan.containers.values().find(|c| c.controller).map(|c| c.component.clone());
        let mut reads_format = None;
        if let Some(image) = controller.and_then(|component| patching.images.get(&component)) {
            let stored = self.ports.registry.resolve(image).await?;
            let label = stored.and_then(|s| s.labels.get(FORMATS_LABEL).cloned());
            // An image that does not say so may be no Replank at all: it could never take the wheel.
            let told = label.as_deref().and_then(|text| text.parse::<u32>().ok()).ok_or_else(|| {
                Fault::permanent(format!(
                    "the controller's image does not say which record formats it reads (label {FORMATS_LABEL})"
                ))
                .advice("build the controller's image from a Replank image, or set the label")
            })?;
            reads_format = Some(told);
        }
        Ok(Outcome::Prepared(Box::new(Prepared { plan, escape_hatch, reads_format })))
    }

    async fn protect(&self, record: &Record, images: &Images, name: String) -> Result<(), Fault> {
        for (component, image) in images {
            if self.ports.registry.resolve(image).await?.is_none() {
                return Err(Fault::permanent(format!("the image of {component} for {name} is gone: {image}"))
                    .advice("restore it in the registry; nothing was touched"));
            }
            self.ports.registry.protect(image, &record.installation, &format!("{name}-{component}")).await?;
        }
        Ok(())
    }

    fn job<'a>(&self, record: &'a Record) -> Result<&'a Job, Fault> {
        record.job.as_ref().ok_or_else(|| Fault::permanent("the record has no job").advice("start the upgrade again"))
    }

    fn source(&self) -> Result<Arc<dyn Source>, Fault> {
        self.ports
            .source
            .clone()
            .ok_or_else(|| Fault::permanent("no remote is configured").advice("set source.remote in replank.toml"))
    }

    fn platform(&self) -> Result<Arc<dyn Platform>, Fault> {
        self.ports.platform.clone().ok_or_else(|| {
            Fault::permanent("no platform is configured").advice("start a build-only job, or configure one")
        })
    }
}
