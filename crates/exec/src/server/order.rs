//! From a request that may run to a program that runs: its directory, its input, its environment, and what is left of it all.

use std::ffi::{OsStr, OsString};
use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;

use super::audit::{self, Started};
use super::child::{self, Ended, Order, Sink};
use super::connection::Running;
use super::environment::{self, Surroundings};
use super::http::{Judged, Server};
use super::place::Fresh;
use crate::protocol::{Credential, EXIT_NOT_STARTED, Request};
use crate::signers::{self, Signers};

/// The one subcommand of git that asks whose signatures count.
const VERIFY: &str = "verify-tag";

/// Why there is no program that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRun {
    pub exit_code: i32,
    pub why: String,
}

/// What is left to do for a request that may run.
pub(super) struct Ready {
    pub(super) order: Result<Order, NotRun>,
    pub(super) started: Started,
    pub(super) fresh: Fresh,
    pub(super) slot: OwnedSemaphorePermit,
    pub(super) running: Running,
}

impl Ready {
    /// Runs the program to its end. Its slot and its directory go before anybody is answered, so that a client that takes its
    /// time with the answer holds neither.
    pub(super) async fn run(self, sink: &mut (impl Sink + Send)) -> Result<Ended, NotRun> {
        let Self { order, started, fresh, slot, running } = self;
        let ended = match order {
            Ok(order) => child::run(order, sink).await.map_err(|error| NotRun {
                exit_code: EXIT_NOT_STARTED,
                why: format!(
                    "{} cannot be started: {error}; see that it is installed, and that cwd is there",
                    started.program()
                ),
            }),
            Err(not_run) => Err(not_run),
        };
        match &ended {
            Ok(ended) => started.done(ended),
            Err(not_run) => started.failed(not_run.exit_code),
        }
        if let Err(error) = fresh.close() {
            let what = format!("a request's directory could not be removed: {}", error.kind());
            audit::event("exec_error", json!({"error": what}));
        }
        drop((slot, running));
        ended
    }
}

impl Server {
    /// What to run, and how.
    pub(super) fn order(&self, request: Request, fresh: &Fresh, judged: &Judged) -> io::Result<Result<Order, NotRun>> {
        let signers = match self.signers(&request, fresh) {
            Some(Ok(ready)) => Some(ready),
            Some(Err(not_run)) => return Ok(Err(not_run)),
            None => None,
        };
        let timeout = Duration::from_secs(request.timeout());
        let mut input = request.stdin.map(String::into_bytes);
        if let (Some(file), Some(bytes)) = (&request.stdin_file, &input) {
            let path = fresh.work.join(file);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            private(&path, bytes, 0o600)?;
            input = None;
        }
        let askpass = request.git_credential.as_ref().map(|credential| askpass(&fresh.own, credential)).transpose()?;
        let config = self.config();
        let around = Surroundings {
            own: self.own(),
            home: &fresh.own,
            work: &fresh.work,
            clone_root: &config.rules.clone_root,
            remote_is_plain: config.remote.as_ref().is_some_and(super::remote::Remote::is_plain),
            pin: judged.pin.as_deref(),
            signers: signers.as_ref(),
            askpass: askpass.as_deref(),
        };
        let program = request.argv.first().map(String::as_str).unwrap_or_default();
        let environment = environment::of(program, &around);
        let directory = request.cwd.map_or_else(|| fresh.work.clone(), PathBuf::from);
        let room = judged.fills.clone().map(|path| (path, config.max_clone));
        Ok(Ok(Order { argv: request.argv, directory, environment, input, timeout, room }))
    }

    /// The keys, where signatures are to be checked and any is configured. Read anew each time.
    fn signers(&self, request: &Request, fresh: &Fresh) -> Option<Result<signers::Ready, NotRun>> {
        let signers = &self.config().signers;
        let checks = request.argv.first().is_some_and(|name| name == "git") && request.argv.iter().any(|w| w == VERIFY);
        if !checks || *signers == Signers::default() {
            return None;
        }
        let search = self.own().get(OsStr::new("PATH")).map(OsString::as_os_str).unwrap_or_default();
        let Some(clock) = self.clock() else {
            let why = "the server was given no clock, so nobody can say which keys have ended".to_owned();
            return Some(Err(NotRun { exit_code: EXIT_NOT_STARTED, why }));
        };
        let ready = signers.prepare(&fresh.own, search, clock());
        Some(ready.map_err(|why| {
            let cause = std::error::Error::source(&why).map(|cause| format!(": {cause}")).unwrap_or_default();
            NotRun { exit_code: EXIT_NOT_STARTED, why: format!("{why}{cause}; {}", why.advice()) }
        }))
    }

    /// The directory that the Azure CLI keeps its settings in, where the operator has chosen one.
    pub(super) fn azure_config(&self) -> Option<&Path> {
        self.own().get(OsStr::new("AZURE_CONFIG_DIR")).map(Path::new)
    }
}

/// Files that git asks for user and password, in the request's own directory: nothing of them in an argument or a variable.
fn askpass(own: &Path, credential: &Credential) -> io::Result<PathBuf> {
    let (username, password) = (own.join("username"), own.join("password"));
    private(&username, credential.username.as_bytes(), 0o600)?;
    private(&password, credential.password.as_bytes(), 0o600)?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
    let script = format!(
        "#!/bin/sh\ncase \"$1\" in Username*) exec cat {} ;; *) exec cat {} ;; esac\n",
        quoted(&username),
        quoted(&password)
    );
    let path = own.join("askpass");
    private(&path, script.as_bytes(), 0o700)?;
    Ok(path)
}

fn private(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)
}
