//! What callers may take: times, sizes, streams, failed sign-ins. Everything is bounded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bounds of the service. The defaults are for production; tests make them small.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Until the head of an answer: a look at the remote is the longest thing that a request waits for.
    pub request: Duration,
    /// Until a request's head has come in: what is slower is an attack or a dead peer.
    pub head: Duration,
    /// A reader that takes no byte for this long is dropped, so that it holds no connection and no memory.
    pub write: Duration,
    /// Open requests may end for this long at a shutdown; engines kill after ten seconds by default.
    pub drain: Duration,
    /// Comment lines keep idle streams open through proxies that cut at 30 s or 60 s.
    pub heartbeat: Duration,
    /// Least time between two states on one stream: ten a second are as many as a person can see.
    pub coalesce: Duration,
    pub connections: usize,
    pub streams: usize,
    pub streams_per_caller: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(60),
            head: Duration::from_secs(10),
            write: Duration::from_secs(30),
            drain: Duration::from_secs(5),
            heartbeat: Duration::from_secs(15),
            coalesce: Duration::from_millis(100),
            connections: 512,
            streams: 128,
            streams_per_caller: 8,
        }
    }
}

/// Longest request body: a start with every field at its longest has less than 1 KiB.
pub const BODY_MAX: usize = 16 * 1024;
/// Most headers, and most bytes of a request's head: browsers send about 20, and cookies of neighbours on one host.
pub const HEADERS_MAX: usize = 64;
pub const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Wrong tokens per address and minute; a person with a stale token in a script stays below it.
const STRIKES_MAX: u32 = 10;
/// Written refusals per minute of those who were not let in, and as many of those who were: the store keeps a bounded
/// number, and a flood must not push honest ones out.
const WRITTEN_MAX: u32 = 60;
const WINDOW: Duration = Duration::from_secs(60);
/// Remembered addresses; when it is full, the old windows go.
const ADDRESSES_MAX: usize = 4_096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain counters: they are right whatever a panicking holder did.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Window {
    since: Instant,
    count: u32,
}

impl Window {
    fn hit(&mut self) -> u32 {
        if self.since.elapsed() > WINDOW {
            *self = Self { since: Instant::now(), count: 0 };
        }
        self.count = self.count.saturating_add(1);
        self.count
    }
}

impl Default for Window {
    fn default() -> Self {
        Self { since: Instant::now(), count: 0 }
    }
}

/// Failed sign-ins by address, and how many refusals were written.
#[derive(Debug, Default)]
pub struct Strikes {
    by_address: Mutex<HashMap<IpAddr, Window>>,
    written: Mutex<Window>,
    written_of_admins: Mutex<Window>,
}

impl Strikes {
    /// Counts a wrong token. `Some(seconds)` where the address has used up its share.
    pub fn strike(&self, from: IpAddr) -> Option<u64> {
        let mut all = lock(&self.by_address);
        if all.len() >= ADDRESSES_MAX {
            all.retain(|_, window| window.since.elapsed() <= WINDOW);
            if all.len() >= ADDRESSES_MAX {
                all.clear();
            }
        }
        let window = all.entry(from).or_default();
        let over = window.hit() > STRIKES_MAX;
        over.then(|| WINDOW.saturating_sub(window.since.elapsed()).as_secs().max(1))
    }

    pub fn may_write(&self) -> bool {
        lock(&self.written).hit() <= WRITTEN_MAX
    }

    pub fn may_write_of_admins(&self) -> bool {
        lock(&self.written_of_admins).hit() <= WRITTEN_MAX
    }
}

/// Open streams by caller.
#[derive(Debug, Default, Clone)]
pub struct Streams(Arc<Mutex<HashMap<String, usize>>>);

/// One open stream; dropping it gives the place back.
#[derive(Debug)]
pub struct StreamPermit {
    streams: Streams,
    caller: String,
}

impl Streams {
    pub fn open(&self, caller: &str, limits: &Limits) -> Option<StreamPermit> {
        let mut open = lock(&self.0);
        let total: usize = open.values().sum();
        let own = open.get(caller).copied().unwrap_or(0);
        if total >= limits.streams || own >= limits.streams_per_caller {
            return None;
        }
        open.insert(caller.to_owned(), own + 1);
        Some(StreamPermit { streams: self.clone(), caller: caller.to_owned() })
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut open = lock(&self.streams.0);
        if let Some(own) = open.get_mut(&self.caller) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                open.remove(&self.caller);
            }
        }
    }
}
