//! What is served now: the routes in force, who may replace them, and how much is open towards each container.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::persist;
use super::proxy_api::{Backend, Routes, Side, State};

/// Why routes were not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("{0}")]
    Senseless(String),
    #[error("other routes with the same or a higher generation are in force")]
    Stale,
    #[error("the routes could not be kept on disk, so they were not taken")]
    NotKept(#[source] std::io::Error),
}

#[derive(Debug)]
struct Inner {
    routes: Option<Routes>,
    /// The fallback serves since the start: nobody has confirmed the routes yet.
    fallen_back: bool,
    open: BTreeMap<String, u64>,
}

impl Inner {
    fn serving(&self) -> Option<&Side> {
        let routes = self.routes.as_ref()?;
        match &routes.fallback {
            Some(fallback) if self.fallen_back => Some(fallback),
            Some(_) | None => Some(&routes.primary),
        }
    }
}

/// The table that every request looks at.
#[derive(Debug)]
pub(crate) struct Table {
    dir: PathBuf,
    listeners: BTreeSet<String>,
    /// Held for a few map operations only. Choosing a backend and counting the request are one step under it: otherwise a
    /// container could be seen with nothing open while a request is on its way to it.
    inner: Mutex<Inner>,
    /// One `PUT` at a time: generation check, disk and switch belong together.
    writing: tokio::sync::Mutex<()>,
    /// Grows with each change of the serving side.
    epoch: watch::Sender<u64>,
}

impl Table {
    /// Starts from what is kept in `dir`. Kept routes that cannot be read are reported and count as none: a controller can
    /// then put them right, which it could not with a proxy that does not start.
    pub(crate) fn load(dir: &Path, listeners: BTreeSet<String>) -> Arc<Self> {
        let routes = persist::load(dir).unwrap_or_else(|error| {
            tracing::error!(%error, file = %dir.join(super::proxy_api::ROUTES).display(), "the kept routes cannot be read; serving nothing until routes are put");
            None
        });
        let fallen_back = routes.as_ref().is_some_and(|routes| routes.fallback.is_some());
        let inner = Inner { routes, fallen_back, open: BTreeMap::new() };
        let table = Self {
            dir: dir.to_owned(),
            listeners,
            inner: Mutex::new(inner),
            writing: tokio::sync::Mutex::default(),
            epoch: watch::Sender::new(0),
        };
        Arc::new(table)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing under this lock panics half-way through a change, so a poisoned one is still whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        let inner = self.inner();
        State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            routes: inner.routes.clone(),
            serving: inner.serving().map(|side| side.revision.clone()),
            open: inner.open.clone(),
        }
    }

    pub(crate) fn epoch(&self) -> watch::Receiver<u64> {
        self.epoch.subscribe()
    }

    /// The serving side's backend for a listener, counted as open until the guard is dropped.
    pub(crate) fn choose(self: &Arc<Self>, listener: &str) -> Option<(Backend, Open)> {
        let mut inner = self.inner();
        let backend = inner.serving()?.backends.get(listener)?.clone();
        let open = self.count(&mut inner, &backend.container);
        Some((backend, open))
    }

    /// Counts something towards a container that was not chosen by the routes: a control tunnel.
    pub(crate) fn open(self: &Arc<Self>, container: &str) -> Open {
        let mut inner = self.inner();
        self.count(&mut inner, container)
    }

    fn count(self: &Arc<Self>, inner: &mut Inner, container: &str) -> Open {
        *inner.open.entry(container.to_owned()).or_default() += 1;
        Open { table: Arc::clone(self), container: container.to_owned() }
    }

    /// Takes new routes: checked, kept on disk, then in force for every request that begins after this returns.
    pub(crate) async fn put(&self, routes: Routes) -> Result<State, Refused> {
        check(&routes, &self.listeners).map_err(Refused::Senseless)?;
        let _one_at_a_time = self.writing.lock().await;
        let current = self.inner().routes.clone();
        match &current {
            Some(current) if routes.generation < current.generation => return Err(Refused::Stale),
            Some(current) if routes.generation == current.generation && routes != *current => {
                return Err(Refused::Stale);
            }
            Some(current) if routes == *current => {}
            Some(_) | None => {
                let (dir, kept) = (self.dir.clone(), routes.clone());
                tokio::task::spawn_blocking(move || persist::store(&dir, &kept))
                    .await
                    .map_err(|error| Refused::NotKept(std::io::Error::other(error)))?
                    .map_err(Refused::NotKept)?;
            }
        }
        let moved = {
            let mut inner = self.inner();
            let before = inner.serving().cloned();
            inner.routes = Some(routes);
            inner.fallen_back = false;
            before.as_ref() != inner.serving()
        };
        if moved {
            self.epoch.send_modify(|epoch| *epoch += 1);
        }
        Ok(self.state())
    }
}

/// One request, tunnel or upgraded connection towards a container, counted for as long as it lives.
#[derive(Debug)]
pub(crate) struct Open {
    table: Arc<Table>,
    container: String,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut inner = self.table.inner();
        if let Some(count) = inner.open.get_mut(&self.container) {
            *count -= 1;
            if *count == 0 {
                inner.open.remove(&self.container);
            }
        }
    }
}

/// Digits of a container's id that resolve as a name.
pub(crate) const SHORT_ID: usize = 12;

/// A container id in whole or from its first 12 digits on. Anything else could be somebody's name or an address.
pub(crate) fn is_container_id(text: &str) -> bool {
    (SHORT_ID..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn check(routes: &Routes, listeners: &BTreeSet<String>) -> Result<(), String> {
    for side in std::iter::once(&routes.primary).chain(&routes.fallback) {
        if side.revision.is_empty() {
            return Err("a side has no revision".to_owned());
        }
        if side.backends.is_empty() {
            return Err(format!("revision {:?} has no backend", side.revision));
        }
        for (listener, backend) in &side.backends {
            if !listeners.contains(listener) {
                return Err(format!("there is no listener {listener:?} in proxy.json"));
            }
            if !is_container_id(&backend.container) {
                return Err(format!("{:?} is not a container id: 12 to 64 of 0-9 and a-f", backend.container));
            }
            if backend.port == 0 {
                return Err(format!("the backend of listener {listener:?} has port 0"));
            }
        }
    }
    Ok(())
}
