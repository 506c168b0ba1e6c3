//! The whole proxy: what it is started from, what its tasks share, and how it stops.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use ipnet::IpNet;
use rustix::fs::FlockOperation;
use serde::Deserialize;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connect::{Connector, Dns, Resolver};
use super::control;
use super::limits::Limits;
use super::listen::{self, Door};
use super::persist::read_small;
use super::pool::Pool;
use super::proxy_api::{CONFIG, Config};
use super::routes::Table;

/// Held for as long as a proxy runs on a directory.
const LOCK: &str = "proxy.lock";

/// `proxy.json`: what the platform writes, and what an operator may add.
#[derive(Debug, Deserialize)]
struct Settings {
    #[serde(flatten)]
    config: Config,
    /// Ingresses in front of the proxy, whose `X-Forwarded-…` headers are believed.
    #[serde(default)]
    trusted_proxies: Vec<IpNet>,
}

/// What a proxy is started with.
#[derive(Debug)]
pub struct Start {
    pub dir: PathBuf,
    pub resolver: Arc<dyn Resolver>,
    pub limits: Limits,
}

impl Start {
    /// A proxy as it runs in production: names by the engine's DNS, default limits.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, resolver: Arc::new(Dns), limits: Limits::default() }
    }
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) table: Arc<Table>,
    pub(crate) connector: Connector,
    pub(crate) pool: Arc<Pool>,
    pub(crate) limits: Limits,
    pub(crate) trusted: Vec<IpNet>,
    pub(crate) stopping: CancellationToken,
    /// Client connections and tunnels: what a stop waits for.
    pub(crate) tasks: TaskTracker,
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    addresses: BTreeMap<String, SocketAddr>,
    control: PathBuf,
    _lock: File,
}

impl Proxy {
    /// Reads the directory, binds every port and the control socket, and serves. Any error leaves nothing behind.
    pub async fn start(start: Start) -> anyhow::Result<Self> {
        let Start { dir, resolver, limits } = start;
        let lock = lock(&dir)?;
        let path = dir.join(CONFIG);
        let text = read_small(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        let settings: Settings = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a proxy's configuration", path.display()))?;

        let mut doors = Vec::new();
        let mut addresses = BTreeMap::new();
        for (name, listener) in &settings.config.listeners {
            let door = Door::new(name, listener).with_context(|| format!("listener {name:?} cannot start"))?;
            let socket = listen::bind(listener.port)
                .with_context(|| format!("port {} of listener {name:?} cannot be opened", listener.port))?;
            addresses.insert(name.clone(), socket.local_addr()?);
            doors.push((Arc::new(door), socket));
        }

        let table = Table::load(&dir, settings.config.listeners.into_keys().collect());
        let shared = Arc::new(Shared {
            table,
            connector: Connector::new(resolver, limits.clone()),
            pool: Pool::new(limits.pool_idle),
            limits,
            trusted: settings.trusted_proxies,
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let control = control::bind(&dir)?;
        tokio::spawn(control::accept(Arc::clone(&shared), control));
        tokio::spawn(housekeeping(Arc::clone(&shared), doors.iter().map(|(door, _)| Arc::clone(door)).collect()));
        for (door, socket) in doors {
            let port = addresses.get(&*door.name).map(SocketAddr::port);
            tracing::info!(listener = &*door.name, port, protocol = ?door.protocol, tls = door.certificate.is_some(), "listening");
            tokio::spawn(listen::accept(Arc::clone(&shared), door, socket));
        }
        let serving = shared.table.state().serving;
        tracing::info!(serving = serving.as_deref().unwrap_or("nothing"), "the proxy serves");
        Ok(Self { shared, addresses, control: dir.join(super::proxy_api::SOCKET), _lock: lock })
    }

    /// The address of each listener.
    pub fn addresses(&self) -> &BTreeMap<String, SocketAddr> {
        &self.addresses
    }

    /// Takes no more connections, lets open requests end within the drain limit, and removes the control socket.
    pub async fn stop(self) {
        self.shared.stopping.cancel();
        self.shared.tasks.close();
        if timeout(self.shared.limits.drain, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!(open = ?self.shared.table.state().open, "the time to drain is over; what is open is cut off");
        }
        if let Err(error) = fs::remove_file(&self.control) {
            tracing::debug!(%error, "the control socket was gone already");
        }
    }
}

/// One proxy per directory: two would each answer for routes that the other does not serve.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join(LOCK);
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).with_context(|| {
            format!("{} cannot be opened; the directory must exist and be writable", path.display())
        })?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("another proxy runs on {}, stop it first", dir.display()))?;
    Ok(file)
}

/// Looks at certificates and closes idle backend connections.
async fn housekeeping(shared: Arc<Shared>, doors: Vec<Arc<Door>>) {
    let mut certificates = interval(shared.limits.tls_reload);
    let mut idle = interval(shared.limits.pool_idle);
    certificates.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let encrypted = doors.iter().any(|door| door.certificate.is_some());
    loop {
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            _ = certificates.tick(), if encrypted => {
                let found = doors.iter().filter_map(|door| door.certificate.clone()).collect::<Vec<_>>();
                let refreshed = tokio::task::spawn_blocking(move || found.iter().for_each(|certificate| certificate.refresh()));
                if let Err(error) = refreshed.await {
                    tracing::error!(%error, "looking at the certificates failed");
                }
            }
            _ = idle.tick() => shared.pool.sweep(),
        }
    }
}
