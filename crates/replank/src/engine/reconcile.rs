//! The loop: load, observe, decide, then record, act or wait. It takes no input; signals only wake it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use replank_core::decide::{Action, Decision, Ended, Streaks, TaskId, Tasks, View, ask, decide};
use replank_core::event::Event;
use replank_core::fault::Class;
use replank_core::phase::{Confirming, OpState, Phase, State};
use replank_core::ports::{Etag, LedgerError, Observation, Presence};
use replank_core::progress;
use replank_core::record::Record;
use replank_core::transition::apply_as;
use replank_core::words::Millis;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;

use super::execute::Executor;
use super::setup::{Ports, Setup, Shared};

/// Architecture, "Who drives": the heartbeat is written every five seconds.
const BEAT_EVERY: Duration = Duration::from_secs(5);
/// How soon a change that another process made is noticed.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// Longest wait after the ledger could not be used.
const LEDGER_BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A look at the platform that takes longer than this has failed; probes have their own, shorter limits.
const OBSERVE_LIMIT: Duration = Duration::from_secs(60);

/// One controller's loop.
#[derive(Debug)]
pub struct Reconciler {
    ports: Ports,
    setup: Arc<Setup>,
    shared: Arc<Shared>,
    executor: Arc<Executor>,
    tasks: Tasks,
    handles: BTreeMap<TaskId, JoinHandle<()>>,
    results: mpsc::Receiver<(TaskId, Ended)>,
    streaks: Streaks,
    seen_etag: Option<Etag>,
    /// When this process recorded last how far a job is.
    told_progress: Millis,
    /// No turn has driven a job yet in this process.
    fresh: bool,
}

/// A repair at rest that was refused for good may be possible after an operator has acted.
const FORGET_REFUSALS_MS: u64 = 60_000;

/// What a turn came to.
enum Turn {
    Again,
    Until(Option<Millis>),
}

impl Reconciler {
    pub fn new(ports: Ports, setup: Arc<Setup>, shared: Arc<Shared>) -> Self {
        // More results than tasks can run at once never wait here.
        let (sender, results) = mpsc::channel(64);
        let executor = Arc::new(Executor::new(ports.clone(), setup.clone(), shared.clone(), sender));
        Self {
            ports,
            setup,
            shared,
            executor,
            tasks: Tasks::default(),
            handles: BTreeMap::new(),
            results,
            streaks: Streaks::default(),
            seen_etag: None,
            told_progress: Millis(0),
            fresh: true,
        }
    }

    /// Runs until `done` says so after a turn. Dropping the future stops the loop; its tasks stop with it.
    pub async fn run(mut self, mut done: impl FnMut(&Record) -> bool) {
        let _beating =
            AbortOnDropHandle::new(tokio::spawn(beat(self.ports.clone(), self.setup.clone(), self.shared.clone())));
        let mut trouble = Duration::ZERO;
        loop {
            self.shared.turned(self.ports.clock.now());
            self.shared.telemetry.turn();
            let turn = self.turn(&mut done).await;
            self.shared.set_shut_out(matches!(turn, Err(LedgerError::Unreadable(_))));
            match turn {
                Ok(None) => return,
                Ok(Some(Turn::Again)) => trouble = Duration::ZERO,
                Ok(Some(Turn::Until(until))) => {
                    trouble = Duration::ZERO;
                    self.sleep(until).await;
                }
                Err(error) => {
                    trouble = (trouble * 2).clamp(Duration::from_millis(200), LEDGER_BACKOFF_MAX);
                    let fault = describe(&error);
                    tracing::error!(error = %fault, "the ledger cannot be used; trying again in {trouble:?}");
                    self.shared.publish(|live| live.next_action.clone_from(&fault));
                    tokio::time::sleep(trouble).await;
                }
            }
        }
    }

    /// Waits for a wake-up, a result, the time, or somebody else's commit.
    async fn sleep(&mut self, until: Option<Millis>) {
        loop {
            let now = self.ports.clock.now();
            let left = until.map_or(POLL_EVERY, |until| Duration::from_millis(until.since(now)));
            if left.is_zero() {
                return;
            }
            let shared = self.shared.clone();
            tokio::select! {
                // In this order, so that a run under virtual time can be played again.
                biased;
                () = shared.wake.notified() => return,
                Some((task, ended)) = self.results.recv() => {
                    self.took(task, ended);
                    return;
                }
                () = tokio::time::sleep(left.min(POLL_EVERY)) => {}
            }
            self.shared.turned(self.ports.clock.now());
            match self.ports.ledger.version().await {
                Ok(Some(etag)) if Some(&etag) == self.seen_etag.as_ref() => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn took(&mut self, task: TaskId, ended: Ended) {
        self.handles.remove(&task);
        if self.tasks.running.remove(&task) {
            self.tasks.ended.insert(task, ended);
        }
    }

    async fn turn(&mut self, done: &mut impl FnMut(&Record) -> bool) -> Result<Option<Turn>, LedgerError> {
        while let Ok((task, ended)) = self.results.try_recv() {
            self.took(task, ended);
        }
        let Some((record, etag)) = self.ports.ledger.load().await? else {
            self.found().await?;
            return Ok(Some(Turn::Again));
        };
        if self.seen_etag.as_ref() != Some(&etag) {
            self.seen_etag = Some(etag.clone());
            self.shared.record_changed();
        }
        if done(&record) {
            return Ok(None);
        }
        self.drop_obsolete(&record).await;
        let driving = record.driver.controller == self.setup.me;
        if !driving {
            // What was seen before somebody else drove proves nothing: a successor proves again.
            self.streaks = Streaks::default();
        }
        let observation = if driving { self.observe(&record).await } else { None };
        let presences = self.ports.ledger.presences().await?;
        let now = self.ports.clock.now();
        let view = View {
            record: &record,
            me: &self.setup.me,
            now,
            policy: &self.setup.policy,
            observation: observation.as_ref(),
            streaks: &self.streaks,
            presences: &presences,
            tasks: &self.tasks,
        };
        // A restarted driver says so in the history before it goes on: who worked on a job when is the auditor's question.
        let resumed = std::mem::take(&mut self.fresh) && driving && record.phase.state().in_flight();
        let decision =
            if resumed { Decision::Record(Event::TookOver { by: self.setup.me.clone() }) } else { decide(&view) };
        match decision {
            Decision::Record(event) => self.record(&record, &etag, &event, now).await.map(Some),
            // One change of the platform at a time: two of them in different directions would only undo each other.
            Decision::Act(Action::Change { .. }) if self.tasks.running.iter().any(is_change) => {
                Ok(Some(Turn::Until(None)))
            }
            Decision::Act(action) => {
                self.start(&record, action);
                Ok(Some(Turn::Again))
            }
            Decision::Wait { until, why } => {
                // How far the job is, is recorded where there is nothing better to do, and by nobody but its driver.
                let in_flight = driving && record.phase.state().in_flight();
                let due = in_flight.then(|| progress::due(&record, &self.shared.live.borrow().progress, now)).flatten();
                if let Some(percent) = due.filter(|_| now.since(self.told_progress) >= self.setup.policy.progress_every)
                {
                    self.told_progress = now;
                    return self.record(&record, &etag, &Event::Progressed { percent }, now).await.map(Some);
                }
                let told_again = in_flight.then(|| now.plus(self.setup.policy.progress_every));
                let until = [until, told_again].into_iter().flatten().min();
                self.shared.publish(|live| {
                    live.next_action = why;
                    live.next_deadline = match &record.phase {
                        Phase::Confirming(Confirming { deadline, flip: None, .. }) => *deadline,
                        _ => None,
                    };
                });
                Ok(Some(Turn::Until(until)))
            }
        }
    }

    /// Writes down what was decided.
    async fn record(&mut self, record: &Record, etag: &Etag, event: &Event, now: Millis) -> Result<Turn, LedgerError> {
        let commit = match apply_as(record, event, now, self.setup.reads_format) {
            Ok(commit) => commit,
            Err(refused) => {
                // A decision that the transitions refuse is a defect; it must not spin.
                tracing::error!(event = event.name(), error = %refused, "a decision was refused");
                return Ok(Turn::Until(Some(now.plus(5_000))));
            }
        };
        match self.ports.ledger.commit(Some(etag), &commit.record, &commit.lines).await {
            Ok(etag) => {
                let (from, to) = (record.phase.state().name(), commit.record.phase.state().name());
                if !commit.lines.is_empty() {
                    tracing::info!(event = event.name(), from, to, "recorded");
                }
                self.seen_etag = Some(etag);
                if from != to {
                    self.shared.entered();
                }
                self.shared.record_changed();
            }
            // Loading again tells what came of it, in both cases.
            Err(LedgerError::Conflict | LedgerError::Indeterminate(_)) => {}
            Err(error @ (LedgerError::Unavailable(_) | LedgerError::Unreadable(_))) => return Err(error),
        }
        Ok(Turn::Again)
    }

    /// The first record of an application.
    async fn found(&self) -> Result<(), LedgerError> {
        let now = self.ports.clock.now();
        let mut record = Record::new(self.setup.installation.clone(), self.setup.application.clone(), now);
        record.driver.controller = self.setup.me.clone();
        match self.ports.ledger.commit(None, &record, &[]).await {
            Ok(_) | Err(LedgerError::Conflict | LedgerError::Indeterminate(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn observe(&mut self, record: &Record) -> Option<Observation> {
        let (platform, ask) = self.ports.platform.as_ref().zip(ask(record))?;
        let seen = match tokio::time::timeout(OBSERVE_LIMIT, platform.observe(&ask)).await {
            Ok(Ok(seen)) => seen,
            Ok(Err(fault)) => {
                tracing::warn!(error = %fault.chain(), "the platform could not be observed");
                self.shared.publish(|live| live.next_action = self.setup.told(&fault).sentence());
                return None;
            }
            Err(_) => {
                tracing::warn!("the platform did not answer within {OBSERVE_LIMIT:?}");
                return None;
            }
        };
        self.streaks.see(&ask, &seen, &self.setup.policy);
        self.streaks.see_at_rest(record, &seen);
        Some(seen)
    }

    fn start(&mut self, record: &Arc<Record>, action: Action) {
        let task = action.task(record);
        // How the last try ended stays known until this one has: it is what a budget that runs out meanwhile tells.
        let tries = match self.tasks.ended.get(&task) {
            Some(Ended::Badly { tries, .. }) => *tries,
            Some(Ended::Well { .. }) | None => 0,
        };
        self.tasks.running.insert(task.clone());
        let handle = self.executor.clone().spawn(record.clone(), task.clone(), action, tries);
        self.handles.insert(task, handle);
    }

    /// Ends tasks that the record no longer wants, and waits until they are gone, so that they cannot act late.
    async fn drop_obsolete(&mut self, record: &Record) {
        let wanted = |task: &TaskId| is_wanted(task, record);
        let obsolete: Vec<TaskId> = self.handles.keys().filter(|task| !wanted(task)).cloned().collect();
        for task in obsolete {
            if let Some(handle) = self.handles.remove(&task) {
                tracing::info!(task = %task.step, "stopping what is no longer wanted");
                handle.abort();
                // The only error here is the cancellation that was asked for, or a panic that is logged where it happened.
                if let Err(error) = handle.await
                    && error.is_panic()
                {
                    tracing::error!(task = %task.step, "a task panicked");
                }
            }
            self.tasks.running.remove(&task);
        }
        // What was refused for good is tried again at rest after a while: nobody else would ever repair it.
        let (now, resting) = (self.ports.clock.now(), !record.phase.state().in_flight());
        self.tasks.ended.retain(|task, ended| {
            let old = matches!(ended, Ended::Badly { told, at, .. }
                if told.class == Class::Permanent && now.since(*at) >= FORGET_REFUSALS_MS);
            wanted(task) && !(resting && old)
        });
        if record.phase.state() != State::Building {
            self.shared.publish(|live| live.progress.clear());
        }
    }
}

/// Tasks that change the platform; the others build or look.
fn is_change(task: &TaskId) -> bool {
    !(matches!(task.step.as_str(), "fetch" | "prepare" | "clean-up" | "purge" | "prove")
        || task.step.starts_with("build-")
        || task.step.starts_with("data-"))
}

/// Whether a task still belongs to what the record says.
fn is_wanted(task: &TaskId, record: &Record) -> bool {
    if task.job != record.job.as_ref().map(|j| j.id.to_string()).unwrap_or_default() {
        return false;
    }
    let state = record.phase.state();
    let step = task.step.as_str();
    if step == "fetch" {
        state == State::Fetching
    } else if step.starts_with("build-") {
        state == State::Building
    } else if let Some(name) = step.strip_prefix("data-") {
        let job = record.job.as_ref();
        state == State::RollingOut
            && job.is_some_and(|job| job.data.iter().any(|(n, s)| n.as_str() == name && s.ended_at.is_none()))
    } else if step == "prepare" {
        state == State::Patching
    } else if step == "halt-stray" {
        true
    } else if let Some((op, revision)) = step.split_once(':') {
        // An operation that was observed is over, whether its call has come back or not: one that never does would keep
        // everything after it from being done.
        state.in_flight()
            && record.phase.active_swap().is_some_and(|swap| {
                let is_over = |state: &OpState| state.observed_at.is_some();
                swap.to.revision.as_str() == revision
                    && !swap.ops.iter().any(|(known, state)| known.name() == op && is_over(state))
            })
    } else {
        !state.in_flight()
    }
}

/// Says that this controller is there, unless it could only stand in the way of one that can read the record.
async fn beat(ports: Ports, setup: Arc<Setup>, shared: Arc<Shared>) {
    loop {
        let presence = Presence {
            controller: setup.me.clone(),
            instance: setup.instance.clone(),
            reads_format: setup.reads_format,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            at: ports.clock.now(),
        };
        if !shared.is_shut_out()
            && let Err(error) = ports.ledger.beat(&presence).await
        {
            tracing::warn!(error = %describe(&error), "the heartbeat was not written");
        }
        tokio::time::sleep(BEAT_EVERY).await;
    }
}

/// The cause chain of a ledger's error on one line.
pub(crate) fn describe(error: &LedgerError) -> String {
    match error {
        LedgerError::Conflict => error.to_string(),
        LedgerError::Unavailable(fault) | LedgerError::Indeterminate(fault) | LedgerError::Unreadable(fault) => {
            let told = fault.told();
            format!("{error}: {}", told.sentence())
        }
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        for handle in self.handles.values() {
            handle.abort();
        }
    }
}
