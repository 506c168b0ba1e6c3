//! `replank exec-server`: the exec channel's server, set up from the environment alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use replank_core::ports::Clock as _;
use replank_exec::server::audit;
use replank_exec::server::config::Config;
use replank_exec::server::http::Server;
use replank_exec::server::place::{Places, make_private, sweep_clones};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::failure::Failure;
use crate::config::env::Environment;
use crate::system::SystemClock;

/// Below the directory for temporary files: one for each request, gone with it.
const REQUESTS: &str = "replank-exec";

/// Clones are swept after a day; an hour more or less is no matter.
const SWEEP_EVERY: Duration = Duration::from_secs(3_600);

/// What `--help` says of the environment, which is all there is to set.
pub const ENVIRONMENT: &str = "\
Environment:
  EXEC_TOKEN                  the token, 16 to 1024 characters (needed)
  EXEC_HOST EXEC_PORT         where it listens [127.0.0.1:7682]
  EXEC_ALLOWED_BINARIES       fewer programs
                              [az azcopy elastic-blast elb git kubectl]
  EXEC_POLICY                 enforce, or audit: only report [enforce]
  EXEC_CLONE_ROOT             where clones go [/tmp/elb-upgrade]
  EXEC_CLONE_MAX_BYTES        of the disk, for each clone [4 GiB]
  EXEC_ALLOWED_SIGNERS_FILE   SSH keys that git verify-tag trusts
  EXEC_REVOKED_SIGNERS_FILE   SSH keys that it no longer trusts
  EXEC_OPENPGP_KEYRING_FILE   OpenPGP keys that it trusts
  UPGRADE_GIT_REMOTE          the one remote that git may reach
  EXEC_ALLOW_PRIVATE_REMOTE   true: it may have a private address
  EXEC_ALLOW_LOOPBACK_REMOTE  true, for development: it may be this machine
                              or a private address, and speak plain http
  PLATFORM_ACR_NAME           the one registry that az may build in
  CONTAINER_APP_NAME          the one app that az may show and update;
                              with it, EXEC_HOST must be loopback
  AZURE_RESOURCE_GROUP        that app's resource group
  EXEC_MAX_CONCURRENCY        programs at the same time [4]
  EXEC_MAX_BODY_BYTES         of a request [8 MiB]
  EXEC_RUN_MAX_OUTPUT_BYTES   of each output that /exec answers [8 MiB]
  EXEC_STREAM_LINE_MAX_BYTES  of a line of /exec/stream [64 KiB]
  STRICT_EXEC_RATE_LIMIT      true: limit the starts of each program to
                              EXEC_RATE_LIMIT_PER_WINDOW [120] in
                              EXEC_RATE_LIMIT_WINDOW_SECONDS [60]

What is not set cannot be reached: the policy refuses what would need it.
All programs but az and git are arbitrary execution for whoever holds the
token. Each event is one JSON line on standard error.";

/// Serves until it is told to stop; what runs then is killed.
pub fn run(env: &Environment) -> Result<ExitCode, Failure> {
    let config = Config::read(|name| env.get(name).map(str::to_owned)).map_err(|e| Failure::usage(e.to_string()))?;
    Ok(serve(config, env)?)
}

/// A clone's directory may be packed and sent to the registry, and what is old in the requests' directory is removed: neither may
/// hold the other. Both are there.
fn apart(clones: &Path, requests: &Path) -> anyhow::Result<()> {
    let (clones, requests) = (clones.canonicalize()?, requests.canonicalize()?);
    anyhow::ensure!(
        !clones.starts_with(&requests) && !requests.starts_with(&clones),
        "clones go to {} and requests to {}, one of which is in the other; set EXEC_CLONE_ROOT to a directory of its own",
        clones.display(),
        requests.display()
    );
    Ok(())
}

fn serve(config: Config, env: &Environment) -> anyhow::Result<ExitCode> {
    let root = config.rules.clone_root.clone();
    make_private(&root).with_context(|| {
        format!("the clone root {} cannot be made; set EXEC_CLONE_ROOT to a directory of its own", root.display())
    })?;
    let parent = env.get("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from).join(REQUESTS);
    let unusable = || format!("{} cannot be used for requests; set TMPDIR to another place", parent.display());
    make_private(&parent).with_context(unusable)?;
    apart(&root, &parent)?;
    let places = Places::open(parent.clone(), now()).with_context(unusable)?;
    let own = env.all().map(|(name, value)| (name.into(), value.into())).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listen = config.listen;
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("the address {listen} cannot be listened on; set EXEC_PORT to a free port"))?;
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let server = Arc::new(Server::new(config, places, own).timed(now));
        tokio::select! {
            () = server.serve(listener, stop) => {}
            () = sweep(root) => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(SystemClock.now().0).unwrap_or_default())
}

/// Never ends.
async fn sweep(root: PathBuf) {
    loop {
        let place = root.clone();
        let swept = tokio::task::spawn_blocking(move || sweep_clones(&place, now())).await;
        if let Ok(Err(error)) = swept {
            audit::event("exec_error", json!({"error": format!("old clones could not be looked for: {error}")}));
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}
