//! Idle connections to backends, kept for requests that may be sent twice.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::http1::SendRequest;
use tokio::time::{Instant, timeout};

use super::forward::Upload;
use super::limits::{POOL_IDLE_PER_BACKEND, POOL_RETURN};
use super::proxy_api::Backend;

pub(crate) type Sender = SendRequest<Upload>;

#[derive(Debug)]
pub(crate) struct Pool {
    idle: Mutex<HashMap<Backend, Vec<(Sender, Instant)>>>,
    keep: Duration,
}

impl Pool {
    pub(crate) fn new(keep: Duration) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), keep })
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<Backend, Vec<(Sender, Instant)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that was used last, if one is still open as far as can be known.
    pub(crate) fn take(&self, backend: &Backend) -> Option<Sender> {
        let mut idle = self.idle();
        let kept = idle.get_mut(backend)?;
        while let Some((sender, since)) = kept.pop() {
            if since.elapsed() < self.keep && sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    /// Keeps a connection once its exchange is over; one that the backend closes is dropped.
    pub(crate) fn give_back(self: Arc<Self>, backend: Backend, mut sender: Sender) {
        if sender.is_ready() {
            self.keep(backend, sender);
            return;
        }
        tokio::spawn(async move {
            if let Ok(Ok(())) = timeout(POOL_RETURN, sender.ready()).await {
                self.keep(backend, sender);
            }
        });
    }

    fn keep(&self, backend: Backend, sender: Sender) {
        let mut idle = self.idle();
        let kept = idle.entry(backend).or_default();
        if kept.len() < POOL_IDLE_PER_BACKEND {
            kept.push((sender, Instant::now()));
        }
    }

    /// Closes what is too old.
    pub(crate) fn sweep(&self) {
        self.idle().retain(|_, kept| {
            kept.retain(|(sender, since)| since.elapsed() < self.keep && sender.is_ready());
            !kept.is_empty()
        });
    }
}
