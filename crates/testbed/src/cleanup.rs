//! What must be cleaned up when the process ends by a signal, when no destructor runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Something that leaves nothing behind when asked; asked twice, it does nothing the second time.
pub trait CleanUp: Send + Sync {
    fn clean_up(&self);
}

static ALIVE: Mutex<Vec<Weak<dyn CleanUp>>> = Mutex::new(Vec::new());

static STOPPING: AtomicBool = AtomicBool::new(false);

/// A signal came: what fails from now on fails because everything is being taken away, and is not worth telling.
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::SeqCst)
}

/// Where a signal came, waits for the clean-up to end the process: a `main` that returned first would cut it short.
pub fn leave_it_to_the_signal() {
    while is_stopping() {
        thread::park();
    }
}

/// Remembers `it` for [`all`]; forgotten when it is dropped.
pub(crate) fn register(it: Weak<dyn CleanUp>) {
    let mut alive = lock(&ALIVE);
    alive.retain(|other| other.strong_count() > 0);
    alive.push(it);
}

/// Cleans up everything that still stands, newest first.
pub fn all() {
    let alive = std::mem::take(&mut *lock(&ALIVE));
    for it in alive.iter().rev().filter_map(Weak::upgrade) {
        it.clean_up();
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP clean everything up and end the process with 128 + the signal's number.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals() -> Result<()> {
    // A second thread would find nothing to do, and end the process before the first one is done.
    static LISTENING: AtomicBool = AtomicBool::new(false);
    if LISTENING.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut int, mut term, mut hup) = {
        let _inside = runtime.enter();
        let on = |kind| signal(kind).context("cannot listen for signals");
        (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?)
    };
    thread::spawn(move || {
        let number = runtime.block_on(async {
            tokio::select! {
                _ = int.recv() => 2,
                _ = term.recv() => 15,
                _ = hup.recv() => 1,
            }
        });
        STOPPING.store(true, Ordering::SeqCst);
        eprintln!("\nstopping: cleaning up");
        all();
        #[expect(clippy::disallowed_methods, reason = "the one clean-up there is has just run")]
        std::process::exit(128 + number);
    });
    Ok(())
}

/// A panic while a lock was held must not keep the clean-up from happening.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
