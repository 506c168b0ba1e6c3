//! The proxy's own upgrade: another image for its container, on the same ports, with the same routes.
//!
//! Two containers cannot hold one host port, so there is a gap: from the moment at which the old proxy takes no more
//! connections until the new one does. Everything that can fail beforehand is done before it: the image is tried on a copy
//! of configuration and routes, and the new container stands created and on all networks.
//!
//! At every moment something returns after a reboot. The engine starts a container again that restarts `always`, unless it
//! was never started: so it is the old one until the new one starts, then whichever of the two is faster to the ports, as
//! both ask for the same ones in the same order, and the new one once the old one is gone. The names say how far it came:
//! while there is an old one under [`names::proxy_old`], the one under the proxy's name is new.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::models::{ContainerCreateBody, ContainerInspectResponse, RestartPolicyNameEnum};
use bollard::query_parameters::{
    CreateContainerOptions, RemoveContainerOptions, RenameContainerOptions, StartContainerOptions, StopContainerOptions,
};
use replank_core::fault::Fault;
use replank_core::ports::{Ask, Platform as _, Probed};
use replank_core::record::Deployment;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::change::{Work, labels_of, look_alike};
use super::observe::way_in;
use super::proxy_api::{self, Routes, State};
use super::traffic::{Proxy, Sent};
use super::{DockerPlatform, bootstrap, create, labels, names};
use crate::engine::{Engine, classify, is_missing};

/// Intent: in the proxy's directory from before the first change until all is done or undone.
const MARK: &str = "upgrade";
/// What the mark says while nothing that serves was touched.
const FORWARD: &str = "forward";
/// Once the old proxy is about to be stopped: an engine goes on with a stop when whoever asked for it is dead.
const STOP: &str = "stop";
/// Once the new proxy was found not to serve.
const BACK: &str = "back";
/// And once the new one serves: the old one may go.
const DONE: &str = "done";
/// Where an image is tried, in the proxy's directory. Short, as the path of the socket in it is bounded.
const TRIAL: &str = "t";
/// Changes of the platform that are under way are waited for this long: a container's stop may take its grace.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_EVERY: Duration = Duration::from_millis(50);
/// A proxy answers within milliseconds; a busy engine may take seconds to start its container.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_EVERY: Duration = Duration::from_millis(20);
/// The kernel answers a connection at once where somebody listens.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest time for requests that are open when the old proxy stops; it gives them no more itself.
pub const DRAIN_MAX: Duration = Duration::from_secs(9);

/// What an upgrade of the proxy came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// The engine's id of the image that the proxy ran.
    pub from: String,
    /// And of the one that it runs now.
    pub to: String,
    /// How long no connection was taken, at most; `None` where the proxy ran this image already.
    pub gap: Option<Duration>,
}

/// What became of an upgrade that was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mended {
    /// The new proxy serves.
    Finished,
    /// The old one does.
    Restored,
}

/// Shared by those that change the platform, exclusive while the proxy is upgraded. Ends with its holder, however it ends.
#[derive(Debug)]
pub(super) struct Held {
    _directory: File,
}

/// The directory itself is locked: every process that may use the proxy's socket can open it, whoever it runs as. `None`
/// where somebody else holds it.
fn try_hold(directory: &Path, operation: FlockOperation) -> Result<Option<Held>, Fault> {
    let failed = |error: std::io::Error| {
        Fault::permanent(format!("the proxy's directory {} cannot be locked", directory.display()))
            .advice("run this as the user that owns the directory, or as root")
            .because(error)
    };
    let file = File::open(directory).map_err(failed)?;
    match flock(&file, operation) {
        Ok(()) => Ok(Some(Held { _directory: file })),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed(error.into())),
    }
}

/// Held by a change of the platform: while the proxy is upgraded, nothing else moves. An upgrade that was cut short is brought
/// to its end first. `None` where there is no proxy yet. Transient while an upgrade is under way.
pub(super) async fn undisturbed(platform: &DockerPlatform) -> Result<Option<Held>, Fault> {
    let directory = platform.config.proxy_dir();
    if !directory.exists() {
        return Ok(None);
    }
    let busy = || Fault::transient("the proxy is being upgraded").advice("this goes on by itself when that is done");
    if directory.join(MARK).exists() {
        // Whatever it meets may be over soon: who changes the platform has a budget of its own.
        let mended = mend(platform).await.map_err(|fault| {
            Fault::transient("an upgrade of the proxy was cut short and cannot be brought to its end")
                .advice("run `replank proxy upgrade` and do what it says")
                .because(fault.chain())
        })?;
        tracing::info!(?mended, "an upgrade of the proxy was cut short");
    }
    let held = try_hold(&directory, FlockOperation::NonBlockingLockShared)?.ok_or_else(busy)?;
    // Between the two looks somebody may have begun and died.
    if directory.join(MARK).exists() { Err(busy()) } else { Ok(Some(held)) }
}

/// Brings an upgrade that was cut short to its end; `None` where there is none, or where somebody is at it.
pub(super) async fn mend(platform: &DockerPlatform) -> Result<Option<Mended>, Fault> {
    let directory = platform.config.proxy_dir();
    if !directory.join(MARK).exists() {
        return Ok(None);
    }
    let Some(held) = try_hold(&directory, FlockOperation::NonBlockingLockExclusive)? else { return Ok(None) };
    if !directory.join(MARK).exists() {
        return Ok(None);
    }
    let engine = platform.engine()?;
    let renewal = Renewal { platform, engine, _held: held, settled: false };
    renewal.mended().await.map(Some)
}

/// The right to replace the proxy's container, and to be the only one that changes anything meanwhile.
#[derive(Debug)]
pub struct Renewal<'a> {
    platform: &'a DockerPlatform,
    engine: Engine,
    _held: Held,
    /// One proxy is there and serves, so that the mark may go.
    settled: bool,
}

/// The proxy's container under its three names.
struct Found {
    current: Option<ContainerInspectResponse>,
    next: Option<ContainerInspectResponse>,
    old: Option<ContainerInspectResponse>,
}

impl<'a> Renewal<'a> {
    /// Waits for changes that are under way, and brings an upgrade that was cut short to its end. Transient where somebody
    /// else upgrades the proxy.
    pub(super) async fn begin(platform: &'a DockerPlatform) -> Result<(Self, Option<Mended>), Fault> {
        let directory = platform.config.proxy_dir();
        if !directory.exists() {
            return Err(Fault::permanent(format!("there is no proxy in {}", directory.display()))
                .advice("run `replank deploy` first, or name the application's configuration with --config"));
        }
        let end = Instant::now() + LOCK_PATIENCE;
        let held = loop {
            if let Some(held) = try_hold(&directory, FlockOperation::NonBlockingLockExclusive)? {
                break held;
            }
            if Instant::now() >= end {
                return Err(Fault::transient("the platform is being changed, or the proxy is being upgraded already")
                    .advice("try again when that is done; see `replank status`"));
            }
            sleep(LOCK_EVERY).await;
        };
        let this = Self { platform, engine: platform.engine()?, _held: held, settled: false };
        let mended = if this.mark_path().exists() { Some(this.mended().await?) } else { None };
        Ok((this, mended))
    }

    /// Replaces the proxy's container by one of `image`, which the engine must have. `running` is what serves: where it
    /// answered through the old proxy it has to answer through the new one. `drain` is what open requests get, at most
    /// [`DRAIN_MAX`]. After an error the old proxy serves, unless the error says otherwise. Whichever it is, [`Self::finish`] is
    /// to follow, once the history knows.
    pub async fn run(&mut self, image: &str, running: Option<&Deployment>, drain: Duration) -> Result<Renewed, Fault> {
        let found = self.found().await?;
        let old = found.current.ok_or_else(|| self.none_there())?;
        let fingerprint = bootstrap::fingerprint(&self.platform.config)?;
        if labels_of(&old).get(labels::CONFIG) != Some(&fingerprint) {
            return Err(Fault::permanent("the proxy was made from other listeners or another home").advice(
                "this command changes its image alone: leave [listeners], [proxy] memory_bytes and home as they were",
            ));
        }
        let to = bootstrap::image_id(&self.engine, image).await?;
        let from = old.image.clone().unwrap_or_default();
        if from == to && is_running(&old) {
            return Ok(Renewed { from, to, gap: None });
        }
        self.mark(FORWARD)?;
        let made = match self.tried(image, &to).await {
            Ok(()) => self.created(&old, &to, &fingerprint).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = made {
            // Nothing that serves was touched.
            self.remove(&names::proxy_next(&self.platform.config.application)).await?;
            self.settled = true;
            return Err(fault);
        }
        let before = self.platform.proxy.state().await.ok();
        let passed = self.passes(running).await;

        self.mark(STOP)?;
        let begun = Instant::now();
        let swapped = match self.swapped(drain).await {
            Ok(()) => self.serves(before.as_ref(), running.filter(|_| passed)).await,
            Err(fault) => Err(fault),
        };
        let gap = match swapped {
            Ok(at) => at.duration_since(begun),
            Err(fault) => {
                self.mark(BACK)?;
                self.back(true).await.map_err(|undo| {
                    undo.because(format!("the new proxy was given up: {}", fault.chain())).advice(
                        "no proxy may serve now: mend what it says and run `replank proxy upgrade` again, or let a running \
                         controller bring the old one back",
                    )
                })?;
                self.settled = true;
                let gap = begun.elapsed().as_millis();
                return Err(Fault::permanent(format!(
                    "the proxy of {image} did not serve; the old one serves again, after {gap} ms without"
                ))
                .because(fault.chain()));
            }
        };
        // Whoever joined a network meanwhile met the old one.
        self.alike(&names::proxy_old(&self.platform.config.application)).await?;
        self.mark(DONE)?;
        self.remove(&names::proxy_old(&self.platform.config.application)).await?;
        self.settled = true;
        Ok(Renewed { from, to, gap: Some(gap) })
    }

    /// Ends it. What is not settled stays marked, for the next one who comes.
    pub fn finish(self) -> Result<(), Fault> {
        if self.settled && self.mark_path().exists() { self.unmark() } else { Ok(()) }
    }

    // --- Before the gap --------------------------------------------------------------------------------------------

    /// Runs the image on a copy of configuration and routes, with no network: it has to read them, and answer.
    async fn tried(&self, image: &str, id: &str) -> Result<(), Fault> {
        let directory = self.platform.config.proxy_dir();
        let trial = directory.join(TRIAL);
        self.copied(&trial)?;
        let name = names::proxy_trial(&self.platform.config.application);
        let mut body = self.body(id, "")?;
        body.cmd = Some(vec!["proxy".to_owned(), "--dir".to_owned(), trial.display().to_string()]);
        body.exposed_ports = None;
        body.networking_config = None;
        if let Some(host) = &mut body.host_config {
            host.port_bindings = None;
            host.network_mode = Some("none".to_owned());
            host.restart_policy = Some(create::restart(RestartPolicyNameEnum::NO));
        }
        self.create(&name, body).await?;
        let outcome = match self.start(&name).await {
            Ok(()) => {
                let wanted = self.platform.proxy.state().await.ok().and_then(|state| state.routes);
                self.answers(&Proxy::new(trial.join(proxy_api::SOCKET)), &name, wanted.as_ref()).await
            }
            Err(fault) => Err(fault),
        };
        let said = if outcome.is_err() { bootstrap::last_words(&self.engine, &name).await } else { String::new() };
        self.remove(&name).await?;
        forget(&trial)?;
        outcome.map_err(|fault| {
            Fault::permanent(format!("the image {image} was tried and is no proxy that works here; it said: {said}"))
                .advice("nothing was changed; give an image whose entry point is a newer `replank`")
                .because(fault.chain())
        })
    }

    fn copied(&self, trial: &Path) -> Result<(), Fault> {
        let directory = self.platform.config.proxy_dir();
        let failed = |error: std::io::Error| {
            Fault::permanent(format!("the proxy's files cannot be copied to {}", trial.display()))
                .advice("run this as the user that owns the directory, or as root; see whether the disk has room")
                .because(error)
        };
        forget(trial)?;
        let copy = || -> std::io::Result<()> {
            let owner = fs::metadata(&directory)?;
            let own = |path: &Path| std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid()));
            fs::create_dir(trial)?;
            for file in [proxy_api::CONFIG, proxy_api::ROUTES] {
                match fs::copy(directory.join(file), trial.join(file)) {
                    Ok(_) => own(&trial.join(file))?,
                    // No routes were ever kept.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound && file == proxy_api::ROUTES => {}
                    Err(error) => return Err(error),
                }
            }
            fs::set_permissions(trial, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            own(trial)
        };
        copy().map_err(failed)
    }

    /// The new container, on every network that the old one stands on, never started: no reboot starts it.
    async fn created(&self, old: &ContainerInspectResponse, id: &str, fingerprint: &str) -> Result<(), Fault> {
        let next = names::proxy_next(&self.platform.config.application);
        self.create(&next, self.body(id, fingerprint)?).await?;
        self.joined(old, &next).await
    }

    // --- The gap ---------------------------------------------------------------------------------------------------

    async fn swapped(&self, drain: Duration) -> Result<(), Fault> {
        let application = &self.platform.config.application;
        let (current, old) = (names::proxy(application), names::proxy_old(application));
        self.stop(&current, drain).await?;
        self.rename(&current, &old).await?;
        self.rename(&names::proxy_next(application), &current).await?;
        self.alike(&old).await?;
        self.start(&current).await
    }

    /// Waits until the new proxy serves as the old one did. Gives the moment at which it took connections again.
    async fn serves(&self, before: Option<&State>, running: Option<&Deployment>) -> Result<Instant, Fault> {
        let name = names::proxy(&self.platform.config.application);
        let routes = before.and_then(|state| state.routes.as_ref());
        self.answers(&self.platform.proxy, &name, routes).await?;
        // A proxy that has just started serves the fallback until it is told again; that it was told before still holds.
        let primary =
            before.zip(routes).filter(|(state, routes)| state.serving.as_ref() == Some(&routes.primary.revision));
        if let Some((_, routes)) = primary.filter(|(_, routes)| routes.fallback.is_some())
            && let Sent::Refused(_) = self.platform.proxy.put(routes).await?
        {
            tracing::warn!("traffic was moved by somebody else while the proxy was upgraded");
        }
        let end = Instant::now() + ANSWER_LIMIT;
        let at = loop {
            match self.reachable().await {
                Ok(()) => break Instant::now(),
                Err(why) if Instant::now() >= end => return Err(Fault::permanent(why)),
                Err(_) => sleep(ANSWER_EVERY).await,
            }
        };
        let Some(running) = running else { return Ok(at) };
        while !self.passes(Some(running)).await {
            if Instant::now() >= end {
                return Err(Fault::permanent(format!(
                    "{} answered its probes through the old proxy, and does not through the new one",
                    running.revision
                )));
            }
            sleep(ANSWER_EVERY).await;
        }
        Ok(at)
    }

    /// Whether each listener takes connections where users come in.
    async fn reachable(&self) -> Result<(), String> {
        for (name, listener) in &self.platform.config.listeners {
            let (host, port) = way_in(self.platform, listener);
            match timeout(CONNECT_LIMIT, TcpStream::connect((host.as_str(), port))).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(format!("listener {name} takes no connection: {error}")),
                Err(_) => return Err(format!("listener {name} takes no connection")),
            }
        }
        Ok(())
    }

    async fn passes(&self, running: Option<&Deployment>) -> bool {
        let Some(running) = running else { return false };
        let ask = Ask { direct: Vec::new(), through: Some(running.clone()) };
        self.platform.observe(&ask).await.is_ok_and(|seen| seen.traffic.probed == Probed::Passed)
    }

    /// Waits until this container's proxy answers, with these routes at least.
    async fn answers(&self, proxy: &Proxy, name: &str, routes: Option<&Routes>) -> Result<(), Fault> {
        let work = Work { platform: self.platform, engine: &self.engine };
        let end = Instant::now() + ANSWER_LIMIT;
        let generation = |routes: Option<&Routes>| routes.map(|routes| routes.generation);
        loop {
            let why = match proxy.state().await {
                Ok(state) if generation(state.routes.as_ref()) >= generation(routes) => {
                    if work.inspect(name).await?.as_ref().is_some_and(is_running) {
                        return Ok(());
                    }
                    Fault::permanent(format!("container {name} does not run"))
                }
                Ok(_) => Fault::permanent("it does not have the routes that are kept"),
                Err(fault) => fault,
            };
            // A container that ended, and that nothing starts again, says no more.
            let over = work.inspect(name).await?.as_ref().is_none_or(has_ended);
            if over || Instant::now() >= end {
                return Err(why);
            }
            sleep(ANSWER_EVERY).await;
        }
    }

    // --- After a failure, or after somebody died -------------------------------------------------------------------

    /// The old proxy under its own name, running, from wherever the swap stands. `stopping`: the engine may be about to stop it,
    /// so that it is stopped in full before it is started; one that drains would answer, and then be gone.
    async fn back(&self, stopping: bool) -> Result<(), Fault> {
        let application = &self.platform.config.application;
        let (current, old) = (names::proxy(application), names::proxy_old(application));
        let found = self.found().await?;
        if found.old.is_some() {
            if found.current.is_some() {
                self.remove(&current).await?;
            }
            self.rename(&old, &current).await?;
        } else if found.current.is_none() {
            // Only the new one is left: somebody removed the old one by hand.
            found.next.ok_or_else(|| self.none_there())?;
            self.rename(&names::proxy_next(application), &current).await?;
        } else if stopping {
            self.stop(&current, DRAIN_MAX).await?;
        }
        self.start(&current).await?;
        self.remove(&names::proxy_next(application)).await?;
        self.answers(&self.platform.proxy, &current, None).await
    }

    async fn mended(&self) -> Result<Mended, Fault> {
        let application = &self.platform.config.application;
        self.remove(&names::proxy_trial(application)).await?;
        forget(&self.platform.config.proxy_dir().join(TRIAL))?;
        let mark = fs::read_to_string(self.mark_path()).unwrap_or_default();
        let found = self.found().await?;
        let new = found.old.is_some() && found.current.as_ref().is_some_and(is_running);
        let served = mark == DONE || (new && mark != BACK && self.serves(None, None).await.is_ok());
        if served && found.current.is_some() {
            let old = names::proxy_old(application);
            self.alike(&old).await?;
            self.remove(&old).await?;
            self.start(&names::proxy(application)).await?;
        } else {
            self.back(mark != FORWARD).await?;
        }
        self.unmark()?;
        Ok(if served { Mended::Finished } else { Mended::Restored })
    }

    // --- Parts -----------------------------------------------------------------------------------------------------

    fn mark_path(&self) -> PathBuf {
        self.platform.config.proxy_dir().join(MARK)
    }

    fn mark(&self, text: &str) -> Result<(), Fault> {
        let (path, directory) = (self.mark_path(), self.platform.config.proxy_dir());
        let draft = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            File::open(&directory)?.sync_all()
        };
        write().map_err(|error| unwritable(&directory, error))
    }

    fn unmark(&self) -> Result<(), Fault> {
        let directory = self.platform.config.proxy_dir();
        fs::remove_file(self.mark_path())
            .and_then(|()| File::open(&directory)?.sync_all())
            .map_err(|error| unwritable(&directory, error))
    }

    fn body(&self, id: &str, fingerprint: &str) -> Result<ContainerCreateBody, Fault> {
        let config = &self.platform.config;
        let user = bootstrap::user_of(&config.proxy_dir())?;
        Ok(bootstrap::body(self.platform, id, &names::proxy_network(&config.application), fingerprint, user))
    }

    fn none_there(&self) -> Fault {
        let name = names::proxy(&self.platform.config.application);
        Fault::permanent(format!("the proxy's container {name} is not there")).advice("run `replank deploy` to make it")
    }

    async fn found(&self) -> Result<Found, Fault> {
        let application = &self.platform.config.application;
        Ok(Found {
            current: self.ours(&names::proxy(application)).await?,
            next: self.ours(&names::proxy_next(application)).await?,
            old: self.ours(&names::proxy_old(application)).await?,
        })
    }

    /// A conflict where it is there and is no proxy of ours.
    async fn ours(&self, name: &str) -> Result<Option<ContainerInspectResponse>, Fault> {
        let work = Work { platform: self.platform, engine: &self.engine };
        let Some(found) = work.inspect(name).await? else { return Ok(None) };
        let labels = labels_of(&found);
        if self.platform.owner.owns(&labels) && labels.get(labels::ROLE).is_some_and(|role| role == labels::ROLE_PROXY)
        {
            Ok(Some(found))
        } else {
            Err(look_alike(&self.platform.owner, name, &labels))
        }
    }

    /// The proxy's container joins what the old one stands on.
    async fn alike(&self, old: &str) -> Result<(), Fault> {
        let Some(old) = self.ours(old).await? else { return Ok(()) };
        self.joined(&old, &names::proxy(&self.platform.config.application)).await
    }

    async fn joined(&self, like: &ContainerInspectResponse, name: &str) -> Result<(), Fault> {
        let work = Work { platform: self.platform, engine: &self.engine };
        let mine = self.ours(name).await?;
        let there = mine.as_ref().map(networks_of).unwrap_or_default();
        for network in networks_of(like).iter().filter(|network| !there.contains(network)) {
            work.join(network, name, &work.aliases(network)).await?;
        }
        Ok(())
    }

    /// Nothing is in the way: the lock is held, so that what stands under this name was left by somebody who died.
    async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<(), Fault> {
        self.remove(name).await?;
        let options = CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        let made = self.engine.docker().create_container(Some(options), body).await;
        made.map(drop).map_err(|error| classify(error, &format!("the proxy {name} cannot be created")))
    }

    async fn start(&self, name: &str) -> Result<(), Fault> {
        let started = self.engine.docker().start_container(name, None::<StartContainerOptions>).await;
        started.map_err(|error| {
            classify(error, &format!("the proxy {name} cannot be started"))
                .advice("check that nothing else uses the published ports")
        })
    }

    async fn stop(&self, name: &str, drain: Duration) -> Result<(), Fault> {
        let seconds = i32::try_from(drain.min(DRAIN_MAX).as_secs()).unwrap_or(0);
        let options = StopContainerOptions { t: Some(seconds), ..Default::default() };
        let stopped = self.engine.docker().stop_container(name, Some(options)).await;
        stopped.map_err(|error| classify(error, &format!("the proxy {name} cannot be stopped")))
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), Fault> {
        let renamed = self.engine.docker().rename_container(from, RenameContainerOptions { name: to.to_owned() }).await;
        renamed.map_err(|error| classify(error, &format!("the proxy {from} cannot be renamed to {to}")))
    }

    async fn remove(&self, name: &str) -> Result<(), Fault> {
        if self.ours(name).await?.is_none() {
            return Ok(());
        }
        let options = RemoveContainerOptions { force: true, ..Default::default() };
        match self.engine.docker().remove_container(name, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(classify(error, &format!("the proxy {name} cannot be removed"))),
        }
    }
}

fn is_running(found: &ContainerInspectResponse) -> bool {
    found.state.as_ref().is_some_and(|state| state.running == Some(true) && state.restarting != Some(true))
}

fn has_ended(found: &ContainerInspectResponse) -> bool {
    found.state.as_ref().is_none_or(|state| state.running != Some(true) && state.restarting != Some(true))
}

fn networks_of(found: &ContainerInspectResponse) -> Vec<String> {
    found.network_settings.iter().filter_map(|n| n.networks.as_ref()).flat_map(|n| n.keys().cloned()).collect()
}

fn unwritable(directory: &Path, error: std::io::Error) -> Fault {
    Fault::permanent(format!("the proxy's directory {} cannot be written", directory.display()))
        .advice("run this as the user that owns the directory, or as root; see whether the disk has room")
        .because(error)
}

fn forget(trial: &Path) -> Result<(), Fault> {
    match fs::remove_dir_all(trial) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(unwritable(trial, error)),
    }
}
