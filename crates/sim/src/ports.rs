//! What a controller's process sees of its universe: every port, and every way in which a call can go wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use replank::doctor::Checked;
use replank::engine::{Reading, Recipes, Room};
use replank_core::data::DataStep;
use replank_core::fault::{Class, Fault};
use replank_core::format::{self, FORMATS_LABEL};
use replank_core::history::Line;
use replank_core::image::{ImageId, Images};
use replank_core::phase::{Built, Fetched, Recipe};
use replank_core::ports::*;
use replank_core::record::{ContainerPlan, ControllerId, Deployment, Overlap, Plan, Record, Target};
use replank_core::words::{
    CommitSha, ComponentName, Digest, InstallationId, JobId, Millis, OpKey, RevisionId, Version,
};
use tokio::sync::oneshot;
use tokio::time::{sleep, sleep_until};

use crate::chance::{Fate, Kind, fate};
use crate::ledger::NotTaken;
use crate::world::{LogState, Mutant, State, Step, Stored as InRegistry, World, component, container};
use crate::{platform, process};

/// One process's way to everything.
#[derive(Debug)]
pub(crate) struct Door {
    pub world: Arc<World>,
    pub me: RevisionId,
    pub number: u64,
    pub reads: u32,
}

impl Door {
    /// A process that was killed never comes back from a call, and one that stands still comes back late.
    async fn is_there(&self) {
        loop {
            let until = {
                let state = self.world.state();
                match state.processes.get(&self.me) {
                    Some(process) if process.number == self.number => process.paused_until,
                    Some(_) | None => break,
                }
            };
            let Some(until) = until.filter(|until| self.world.now() < *until) else { return };
            sleep_until(self.world.instant(until)).await;
        }
        pending().await
    }

    /// The beginning of every call.
    async fn enter(&self, kind: Kind, what: &str) -> Fate {
        self.is_there().await;
        let (fate, latency) = {
            let mut state = self.world.state();
            let state = &mut *state;
            let fate = fate(&mut state.rng, &state.rates, kind);
            if state.rates.paused > 0 && state.rng.u32(0..200_000) < state.rates.paused {
                let pause = state.rng.u64(1_000..45_000);
                if let Some(process) = state.processes.get_mut(&self.me) {
                    process.paused_until = Some(self.world.now().plus(pause));
                }
                state.faults += 1;
            }
            if fate != Fate::Well {
                state.faults += 1;
            }
            (fate, if kind == Kind::Effect { state.rng.u64(1..800) } else { 0 })
        };
        if fate != Fate::Well {
            self.world.tell(|| format!("{}#{} {what}: {fate:?}", self.me, self.number));
        }
        if latency > 0 {
            sleep(Duration::from_millis(latency)).await;
        }
        match fate {
            Fate::Killed { done: false } => self.dies().await,
            Fate::Hangs => pending().await,
            Fate::Well | Fate::Refused(_) | Fate::Lost | Fate::Late(_) | Fate::Killed { done: true } => {}
        }
        self.is_there().await;
        fate
    }

    async fn dies(&self) {
        process::kill(&self.world, &self.me);
        pending().await
    }

    /// The end of a call whose effect was made at once.
    async fn leave<T>(&self, fate: Fate, value: T) -> Result<T, Class> {
        match fate {
            Fate::Killed { .. } => self.dies().await,
            Fate::Lost => return Err(Class::Indeterminate),
            Fate::Well | Fate::Refused(_) | Fate::Late(_) | Fate::Hangs => {}
        }
        self.is_there().await;
        Ok(value)
    }

    /// A call whose effect is made by `effect`, or not, or late.
    async fn call<T: Send + 'static>(
        &self,
        kind: Kind,
        what: &str,
        effect: impl FnOnce(&Arc<World>) -> T + Send + 'static,
    ) -> Result<T, Class> {
        match self.enter(kind, what).await {
            Fate::Refused(class) => Err(class),
            Fate::Late(after) => {
                self.later(after, effect);
                Err(Class::Indeterminate)
            }
            fate @ (Fate::Well | Fate::Lost | Fate::Killed { .. } | Fate::Hangs) => {
                let value = effect(&self.world);
                self.leave(fate, value).await
            }
        }
    }

    fn later<T: Send + 'static>(&self, after: Duration, effect: impl FnOnce(&Arc<World>) -> T + Send + 'static) {
        let world = self.world.clone();
        world.state().under_way += 1;
        tokio::spawn(async move {
            sleep(after).await;
            effect(&world);
            world.state().under_way -= 1;
        });
    }

    /// The same, where a call that is no longer waited for is carried out all the same.
    async fn asked<T: Send + 'static>(
        &self,
        what: &str,
        effect: impl FnOnce(&Arc<World>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let fate = self.enter(Kind::Effect, what).await;
        let after = match fate {
            Fate::Refused(class) => return Err(injected(class)),
            Fate::Late(after) => {
                self.later(after, effect);
                return Err(injected(Class::Indeterminate));
            }
            Fate::Well | Fate::Lost | Fate::Killed { .. } | Fate::Hangs => {
                Duration::from_millis(self.world.state().rng.u64(1..1_500))
            }
        };
        let (sender, answer) = oneshot::channel();
        self.later(after, move |world| {
            // Nobody waits any more where the caller is gone.
            let _: Result<(), _> = sender.send(effect(world));
        });
        let value = answer.await.unwrap_or_else(|_| Err(injected(Class::Indeterminate)))?;
        self.leave(fate, value).await.map_err(injected)
    }

    /// A look.
    async fn look<T>(&self, what: &str, look: impl FnOnce(&World) -> T + Send) -> Result<T, Fault>
    where
        T: Send,
    {
        match self.enter(Kind::Look, what).await {
            Fate::Refused(class) => Err(injected(class)),
            fate @ (Fate::Well | Fate::Lost | Fate::Late(_) | Fate::Killed { .. } | Fate::Hangs) => {
                let value = look(&self.world);
                self.leave(fate, value).await.map_err(injected)
            }
        }
    }

    /// How every release of the application runs.
    pub(crate) fn plan_of(world: &World) -> Plan {
        let one = |component_name: &str, overlap, controller| ContainerPlan {
            component: component(component_name),
            overlap,
            controller,
        };
        let containers = BTreeMap::from([
            (container("controller"), one("app", Overlap::Allowed, true)),
            (container("web"), one("web", Overlap::Allowed, false)),
            (container("worker"), one("app", world.overlap, false)),
        ]);
        Plan { containers, ..Plan::default() }
    }

    fn label(&self, stored: &InRegistry) -> Stored {
        let labels = BTreeMap::from([(FORMATS_LABEL.to_owned(), stored.reads.to_string())]);
        Stored { image: stored.id.clone(), created_at: Some(stored.at), labels }
    }
}

fn injected(class: Class) -> Fault {
    Fault::new(class, "a made-up failure")
}

fn of_ledger(class: Class) -> LedgerError {
    match class {
        Class::Transient | Class::Permanent => LedgerError::Unavailable(injected(class)),
        Class::Conflict => LedgerError::Conflict,
        Class::Indeterminate => LedgerError::Indeterminate(injected(class)),
    }
}

fn of_log(class: Class) -> LogError {
    match class {
        Class::Transient | Class::Permanent | Class::Conflict => LogError::Unavailable(injected(class)),
        Class::Indeterminate => LogError::Indeterminate(injected(class)),
    }
}

#[async_trait]
impl Ledger for Door {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        let reads = self.reads;
        let stored = self.call(Kind::Frequent, "load", |world| {
            let state = world.state();
            state.ledger.record.clone().map(|record| (record, state.ledger.version))
        });
        let Some((record, version)) = stored.await.map_err(of_ledger)? else { return Ok(None) };
        if let Err(error) = format::is_readable(record.min_reader, reads) {
            return Err(LedgerError::Unreadable(Fault::permanent("a newer Replank wrote it").because(error)));
        }
        Ok(Some((record, Etag(version.to_string()))))
    }

    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        let version = self.call(Kind::Frequent, "version", |world| {
            let state = world.state();
            state.ledger.record.is_some().then_some(state.ledger.version)
        });
        Ok(version.await.map_err(of_ledger)?.map(|version| Etag(version.to_string())))
    }

    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError> {
        let expected = expected.map(|etag| etag.0.parse::<u64>().unwrap_or(u64::MAX));
        let (record, lines, reads, proofs) = (record.clone(), lines.to_vec(), self.reads, self.world.policy.proofs);
        let (me, number) = (self.me.clone(), self.number);
        let taken = self.call(Kind::Frequent, "commit", move |world| {
            let line = lines.first().filter(|_| world.is_traced()).map(|line| line.bytes.clone());
            let taken = world.state().commit(world.mutant, expected, record, lines, reads, proofs);
            world.tell(|| {
                let line = String::from_utf8_lossy(&line.unwrap_or_default()).into_owned();
                format!("{me}#{number} commit {taken:?} {line}")
            });
            taken
        });
        match taken.await.map_err(of_ledger)? {
            Ok(version) => Ok(Etag(version.to_string())),
            Err(NotTaken::Conflict) => Err(LedgerError::Conflict),
            Err(NotTaken::Unreadable) => Err(LedgerError::Unreadable(Fault::permanent("a newer Replank wrote it"))),
        }
    }

    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError> {
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let lines = self.call(Kind::Frequent, "history", move |world| {
            world.state().ledger.lines.iter().skip(from).take(limit).cloned().collect()
        });
        lines.await.map_err(of_ledger)
    }

    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError> {
        let presence = presence.clone();
        let beat = self.call(Kind::Frequent, "beat", move |world| {
            world.state().ledger.presences.insert(presence.controller.clone(), presence);
        });
        beat.await.map_err(of_ledger)
    }

    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        let all =
            self.call(Kind::Frequent, "presences", |world| world.state().ledger.presences.values().cloned().collect());
        all.await.map_err(of_ledger)
    }

    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError> {
        let controller = controller.clone();
        let gone = self.call(Kind::Frequent, "forget", move |world| {
            world.state().ledger.presences.remove(&controller);
        });
        gone.await.map_err(of_ledger)
    }

    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        _: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        let tags = tags.to_vec();
        let first = self.call(Kind::Frequent, "first_seen", move |world| {
            let seen = &mut world.state().ledger.first_seen;
            tags.into_iter().map(|(tag, commit)| (tag.clone(), seen.entry(tag).or_insert(commit).clone())).collect()
        });
        first.await.map_err(of_ledger)
    }
}

#[async_trait]
impl LogStore for Door {
    async fn begin(&self, id: &LogId, marker: &[u8]) -> Result<LogWriter, LogError> {
        let (id, marker) = (id.clone(), marker.to_vec());
        let begun = self.call(Kind::Frequent, "log begin", move |world| {
            let mut state = world.state();
            let log: &mut LogState = state.logs.entry(id.clone()).or_default();
            // An earlier attempt may have been cut off in the middle of a line.
            if log.bytes.last().is_some_and(|last| *last != b'\n') {
                log.bytes.push(b'\n');
            }
            log.bytes.extend_from_slice(&marker);
            (log.fence, log.closed) = (log.fence + 1, false);
            LogWriter { id, fence: log.fence, offset: log.bytes.len() as u64 }
        });
        begun.await.map_err(of_log)
    }

    async fn append(&self, writer: &mut LogWriter, bytes: &[u8]) -> Result<(), LogError> {
        let (w, bytes) = (writer.clone(), bytes.to_vec());
        let length = bytes.len() as u64;
        let appended = self.call(Kind::Frequent, "log append", move |world| {
            let mut state = world.state();
            let log = state.logs.entry(w.id.clone()).or_default();
            if log.fence != w.fence {
                return Err(LogError::Fenced);
            }
            if log.bytes.len() as u64 != w.offset {
                return Err(LogError::Offset { actual: log.bytes.len() as u64 });
            }
            log.bytes.extend_from_slice(&bytes);
            Ok(())
        });
        appended.await.map_err(of_log)??;
        writer.offset += length;
        Ok(())
    }

    async fn close(&self, writer: &LogWriter) -> Result<(), LogError> {
        let w = writer.clone();
        let closed = self.call(Kind::Frequent, "log close", move |world| {
            let mut state = world.state();
            let log = state.logs.entry(w.id.clone()).or_default();
            if log.fence != w.fence {
                return Err(LogError::Fenced);
            }
            log.closed = true;
            Ok(())
        });
        closed.await.map_err(of_log)?
    }

    async fn read(&self, id: &LogId, from: u64, max: usize) -> Result<Option<LogChunk>, LogError> {
        let id = id.clone();
        let chunk = self.call(Kind::Frequent, "log read", move |world| {
            let state = world.state();
            let log = state.logs.get(&id)?;
            let from = usize::try_from(from).unwrap_or(usize::MAX).min(log.bytes.len());
            let until = (from + max).min(log.bytes.len());
            let closed = log.closed && until == log.bytes.len();
            Some(LogChunk { bytes: log.bytes[from..until].to_vec(), next: until as u64, closed })
        });
        chunk.await.map_err(of_log)
    }

    async fn prune(&self, _: usize) -> Result<usize, LogError> {
        Ok(0)
    }

    async fn changed(&self, _: &LogId, _: u64) -> Result<(), LogError> {
        sleep(Duration::from_secs(1)).await;
        Ok(())
    }
}

#[async_trait]
impl Source for Door {
    fn remote(&self) -> String {
        "https://git.test/shop.git".to_owned()
    }

    async fn refs(&self) -> Result<Refs, Fault> {
        let tags = |world: &World| world.state().releases.iter().rev().map(|release| release.tag.clone()).collect();
        Ok(Refs { tags: self.look("refs", tags).await?, branch: None })
    }

    async fn peek(&self, _: &Target, _: Option<&CommitSha>, _: &str, _: usize) -> Result<Peeked, Fault> {
        // No release here says anything of itself; what can go wrong is the look.
        let nothing = |_: &Arc<World>| Ok(Peeked { file: FileSeen::Absent, commits: Ok(CommitsSeen::default()) });
        self.asked("peek", nothing).await
    }

    async fn fetch(&self, _: &JobId, target: &Target, log: &dyn Log) -> Result<Tree, Fault> {
        let commit = target.commit.clone();
        log.write(Stream::Stdout, b"$ git clone\n");
        let tree = Tree { path: "/trees/job".into(), commit, signed_by: None };
        self.asked("fetch", move |_| Ok(tree)).await
    }

    async fn read(&self, _: &Tree, _: &str, _: usize) -> Result<Option<Vec<u8>>, Fault> {
        Ok(None)
    }

    async fn check_paths(&self, _: &Tree, _: &str, _: &str, _: &str) -> Result<(), Fault> {
        Ok(())
    }

    async fn discard_all_but(&self, _: Option<&JobId>) -> Result<(), Fault> {
        self.asked("discard", |_| Ok(())).await
    }
}

#[async_trait]
impl Recipes for Door {
    fn judge(&self, _: Option<&[u8]>, _: &Version, _: Option<&Deployment>) -> Result<Reading, Fault> {
        let recipe = |name: &str| Recipe {
            dockerfile: "Dockerfile".to_owned(),
            context: ".".to_owned(),
            target: None,
            args: BTreeMap::new(),
            platform: None,
            secrets: Vec::new(),
            repository: format!("shop-{name}"),
            unlabelled: false,
        };
        let recipes = ["app", "web"].map(|name| (component(name), recipe(name)));
        let fetched = Fetched { recipes: recipes.into(), ..Fetched::default() };
        Ok(Reading { fetched, missing: Vec::new(), notes: String::new() })
    }

    async fn recipes(&self, _: &Tree, version: &Version, running: Option<&Deployment>) -> Result<Fetched, Fault> {
        Ok(self.judge(None, version, running)?.fetched)
    }
}

#[async_trait]
impl Room for Door {
    async fn look(&self, _: bool) -> Vec<Checked> {
        Vec::new()
    }
}

/// The image that a component of a commit is built as, whoever builds it.
pub(crate) fn image(commit: &CommitSha, component: &ComponentName) -> ImageId {
    ImageId::Engine {
        id: Digest::of(format!("{commit}/{component}").as_bytes()),
        name: format!("shop-{component}:{}", commit.short()),
    }
}

/// An image gets into the registry.
pub(crate) fn push(state: &mut State, commit: &CommitSha, component: &ComponentName, at: Millis) -> ImageId {
    let id = image(commit, component);
    let reads = state.release(commit).map_or(format::FIRST, |release| release.reads);
    let stored = InRegistry { id: id.clone(), reads, at, kept: false };
    state.images.entry(id.digest().clone()).or_insert(stored);
    id
}

#[async_trait]
impl Builder for Door {
    async fn build(&self, spec: &BuildSpec, log: &dyn Log) -> Result<Built, Fault> {
        log.write(Stream::Stdout, b"#1 building\n");
        let takes = self.world.state().rng.u64(100..20_000);
        sleep(Duration::from_millis(takes)).await;
        log.write(Stream::Stdout, b"#2 pushing\n");
        let (commit, name) = (spec.tree.commit.clone(), spec.component.clone());
        let image = self.asked("build", move |world| {
            let now = world.now();
            Ok(push(&mut world.state(), &commit, &name, now))
        });
        let image = image.await?;
        Ok(Built { image, bases: BTreeMap::new(), queued_ms: 0, built_ms: takes, adopted: false })
    }
}

#[async_trait]
impl Registry for Door {
    async fn resolve(&self, image: &ImageId) -> Result<Option<Stored>, Fault> {
        let digest = image.digest();
        let stored = self.look("resolve", |world| world.state().images.get(digest).cloned()).await?;
        Ok(stored.map(|stored| self.label(&stored)))
    }

    async fn protect(&self, image: &ImageId, _: &InstallationId, _: &str) -> Result<(), Fault> {
        let digest = image.digest().clone();
        let is_mutant = self.world.mutant == Some(Mutant::ProtectsNothing);
        let kept = self.asked("protect", move |world| match world.state().images.get_mut(&digest) {
            Some(stored) => {
                stored.kept = !is_mutant;
                Ok(())
            }
            None => Err(Fault::permanent("there is no such image")),
        });
        kept.await
    }

    async fn release(&self, image: &ImageId, _: &InstallationId) -> Result<(), Fault> {
        let digest = image.digest().clone();
        let released = self.asked("release", move |world| {
            if let Some(stored) = world.state().images.get_mut(&digest) {
                stored.kept = false;
            }
            Ok(())
        });
        released.await
    }

    async fn list(&self, repository: &str, _: &InstallationId) -> Result<Vec<(Stored, Vec<String>)>, Fault> {
        let listed = self.look("list", |world| -> Vec<InRegistry> {
            let state = world.state();
            state.images.values().filter(|stored| stored.id.repository() == repository).cloned().collect()
        });
        Ok(listed.await?.iter().map(|stored| (self.label(stored), Vec::new())).collect())
    }

    async fn delete(&self, image: &ImageId, _: &InstallationId) -> Result<(), Fault> {
        let digest = image.digest().clone();
        let deleted = self.asked("delete", move |world| {
            let mut state = world.state();
            match state.images.get(&digest) {
                Some(stored) if stored.kept => return Err(Fault::permanent("it is protected")),
                Some(_) => {}
                None => return Ok(()),
            }
            if state.needed().contains(&digest) {
                state.violations.push(format!("image {digest} is needed and was deleted"));
            }
            state.images.remove(&digest);
            Ok(())
        });
        deleted.await
    }

    async fn discard(&self, _: &str, _: &str, _: &str, _: &BTreeSet<Digest>) -> Result<Discarded, Fault> {
        Ok(Discarded::Absent)
    }
}

#[async_trait]
impl Platform for Door {
    async fn plan(&self, _: &Fetched, _: &Images, version: &Version) -> Result<Plan, Fault> {
        let of_release = |world: &World| {
            let state = world.state();
            let release = state.releases.iter().find(|release| release.tag.version == *version);
            Plan { data: release.map(|release| release.data.clone()).unwrap_or_default(), ..Door::plan_of(world) }
        };
        self.look("plan", of_release).await
    }

    async fn observe(&self, ask: &Ask) -> Result<Observation, Fault> {
        self.look("observe", |world| platform::observe(world, ask)).await?
    }

    async fn change(&self, change: &Change) -> Result<(), Fault> {
        let change = change.clone();
        let what = format!("{:?}", ShortChange(&change));
        let partly = {
            let mut state = self.world.state();
            state.rates.lost > 0 && state.rng.u32(0..200) == 0
        };
        let who = format!("{}#{}", self.me, self.number);
        let name = what.clone();
        let done = self.asked(&name, move |world| {
            let result = platform::carry_out(world, &change, partly);
            world.tell(|| {
                let told = result.as_ref().map_err(|fault| fault.what.clone());
                format!("{who} {what}{} -> {told:?}", if partly { " (in part)" } else { "" })
            });
            result
        });
        let done = done.await;
        if partly && done.is_ok() { Err(injected(Class::Indeterminate)) } else { done }
    }

    async fn run_step(
        &self,
        deployment: &Deployment,
        step: &DataStep,
        key: &OpKey,
        until: Millis,
        log: &dyn Log,
    ) -> Result<i64, Fault> {
        log.write(Stream::Stdout, b"step by step\n");
        let (key, name, version) = (key.clone(), step.name.clone(), deployment.version.clone());
        let begun = self.asked("data step", move |world| {
            let now = world.now();
            let mut state = world.state();
            // A container of that name is there: nothing runs a second time.
            if let Some(step) = state.steps.get(&key) {
                return Ok(step.clone());
            }
            let takes = state.rng.u64(10..35_000);
            let exit_code = i64::from(state.rng.u32(0..8) == 0);
            let step = Step { ends_at: now.plus(takes), exit_code };
            state.steps.insert(key, step.clone());
            drop(state);
            world.tell(|| format!("data step {name} on {version} runs: {step:?}"));
            Ok(step)
        });
        let step = begun.await?;
        sleep_until(self.world.instant(step.ends_at.min(until))).await;
        self.is_there().await;
        if step.ends_at > until { Err(Fault::permanent("it did not end in time")) } else { Ok(step.exit_code) }
    }

    fn escape_hatch(&self, to: &Deployment, _: Option<&Deployment>, _: u64) -> EscapeHatch {
        EscapeHatch { commands: vec![format!("docker start {}", to.revision)], facts: BTreeMap::new() }
    }
}

/// A change as a line of a trace.
struct ShortChange<'a>(&'a Change);

impl std::fmt::Debug for ShortChange<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Change::Start { deployment, containers } => write!(f, "start {} {containers:?}", deployment.revision),
            Change::Stop { deployment, containers } => write!(f, "stop {} {containers:?}", deployment.revision),
            Change::Shift { to, generation, fallback } => {
                let back = fallback.as_ref().map(|d| &d.revision);
                write!(f, "shift to {} at {generation}, else {back:?}", to.revision)
            }
            Change::Settle { deployment, not, generation } => {
                write!(f, "settle {} at {generation}, not {not:?}", deployment.revision)
            }
            Change::Halt { revision } => write!(f, "halt {revision}"),
            Change::Remove { revision } => write!(f, "remove {revision}"),
        }
    }
}
