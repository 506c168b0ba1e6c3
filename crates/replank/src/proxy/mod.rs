//! The proxy: owns the application's public ports and moves their traffic between revisions.
//!
//! It knows nothing of upgrades. It keeps [`proxy_api::Routes`] on its volume, starts without a controller, and obeys only
//! whoever can open its Unix socket.

mod connect;
mod control;
mod forward;
mod headers;
mod http;
mod limits;
mod listen;
mod persist;
mod pool;
mod routes;
mod server;
mod tcp;
mod tls;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use replank_adapters::platform::docker::proxy_api;

pub use connect::{Dns, Resolver};
pub use limits::Limits;
pub use server::{Proxy, Start};

#[derive(Debug, Clone, clap::Args)]
pub struct ProxyArgs {
    /// The directory with proxy.json, the kept routes and the control socket.
    #[arg(long)]
    pub dir: PathBuf,
    /// Ask the proxy that runs on this directory whether it answers, and exit.
    #[arg(long)]
    pub check: bool,
}

/// One per core and no more than this: a proxy that copies bytes gains nothing from more, and each costs memory.
const WORKERS_MAX: usize = 4;
/// Name lookups and disk writes only; a burst of new connections waits here rather than starting hundreds of threads.
const BLOCKING_THREADS: usize = 16;
/// A blocking thread without work ends after this, so that an idle proxy is small.
const BLOCKING_KEPT: Duration = Duration::from_secs(5);

/// Runs the proxy until SIGTERM or SIGINT, or with `check` asks a running one.
pub fn run(args: ProxyArgs) -> anyhow::Result<()> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEPT)
        .enable_all()
        .build()
        .context("the proxy's threads could not be started")?;
    if args.check {
        return runtime.block_on(control::check(&args.dir));
    }
    let outcome = runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let proxy = Proxy::start(Start::new(args.dir)).await?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop: no new connections, open requests may end");
        proxy.stop().await;
        Ok(())
    });
    // A name lookup that hangs must not hold the exit up.
    runtime.shutdown_background();
    outcome
}
