//! A real image registry (Debian's docker-registry) on an ephemeral port, that can be stopped and started again.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::cleanup::{self, CleanUp, lock};
use crate::process;
use crate::remains::Remains;

/// It only opens a directory; longer means that it does not start.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// From SIGTERM to SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Between choosing a free port and the registry taking it, another process may take it.
const PORT_ATTEMPTS: u32 = 5;

/// Who may use a registry that asks for a sign-in.
pub const USER: &str = "tester";
pub const PASSWORD: &str = "a-password-of-the-tests";
/// The same as the registry wants it; the cost is the lowest, as it is checked with every request.
const HTPASSWD: &str = "tester:$2b$04$KPmm7X9V88xxYuyEHhsvf./e4I3mkST.Ltuu/cHOG1ULAcV4P2vYm\n";

/// Dropping it removes it with everything that was pushed.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    own: Arc<Own>,
}

#[derive(Debug)]
struct Own {
    program: PathBuf,
    rules: Rules,
    read_only: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
struct Rules {
    sign_in: bool,
    deletes: bool,
}

#[derive(Debug)]
struct State {
    child: Option<Child>,
    remains: Option<Remains>,
}

impl Registry {
    /// Starts one on loopback, or on an engine's gateway where containers are to reach it too. Plain HTTP, no sign-in,
    /// deletion enabled.
    ///
    /// # Errors
    /// When the program is missing or does not come up; the error holds the end of its log.
    pub fn start(on: IpAddr) -> Result<Self> {
        Self::launch(on, Rules { sign_in: false, deletes: true })
    }

    /// The same, for [`USER`] with [`PASSWORD`] alone.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_sign_in(on: IpAddr) -> Result<Self> {
        Self::launch(on, Rules { sign_in: true, deletes: true })
    }

    /// As [`Self::start`], but nothing can be deleted.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_without_deletion(on: IpAddr) -> Result<Self> {
        Self::launch(on, Rules { sign_in: false, deletes: false })
    }

    fn launch(on: IpAddr, rules: Rules) -> Result<Self> {
        let program = process::find("docker-registry", &["/usr/bin/docker-registry"])
            .context("there is no docker-registry; install the package of that name")?;
        let remains = Remains::create()?;
        let state = Mutex::new(State { child: None, remains: Some(remains) });
        let own = Arc::new(Own { program, rules, read_only: AtomicBool::new(false), state });
        let weak: Weak<Own> = Arc::downgrade(&own);
        cleanup::register(weak);
        let mut failure = None;
        for _ in 0..PORT_ATTEMPTS {
            let address = TcpListener::bind((on, 0)).and_then(|free| free.local_addr());
            let address = address.with_context(|| format!("cannot listen on {on}"))?;
            match own.start(address) {
                Ok(()) => return Ok(Self { address, own }),
                Err(error) => failure = Some(error),
            }
            own.stop()?;
        }
        own.clean_up();
        Err(failure.context("no attempt was made to start the registry")?)
    }

    /// `127.0.0.1:41234`: what stands before the `/` in an image's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:41234`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where the registry keeps blobs and manifests; `None` once removed.
    #[must_use]
    pub fn storage(&self) -> Option<PathBuf> {
        lock(&self.own.state).remains.as_ref().map(|remains| remains.dir().join("storage"))
    }

    /// Stops it: connections are refused until [`Self::start_again`]; what was pushed stays.
    ///
    /// # Errors
    /// When its end cannot be waited for.
    pub fn stop(&self) -> Result<()> {
        self.own.stop()
    }

    /// Restarts it such that it refuses uploads, as in maintenance, or takes them again.
    ///
    /// # Errors
    /// As [`Self::start_again`].
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.own.stop()?;
        self.own.read_only.store(read_only, Ordering::SeqCst);
        self.start_again()
    }

    /// Starts it on the same port with the same content.
    ///
    /// # Errors
    /// When it runs already or does not come up.
    pub fn start_again(&self) -> Result<()> {
        self.own.start(self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.own.clean_up();
    }
}

impl Own {
    fn stop(&self) -> Result<()> {
        if let Some(mut child) = lock(&self.state).child.take() {
            process::signal(child.id(), Signal::TERM);
            if process::wait(&mut child, STOP_LIMIT)?.is_none() {
                child.kill().ok();
                child.wait()?;
            }
        }
        Ok(())
    }

    fn start(&self, address: SocketAddr) -> Result<()> {
        let log = self.spawn(address)?;
        let deadline = Instant::now() + READY_LIMIT;
        while !answers(address) {
            let log = || process::tail(&std::fs::read(&log).unwrap_or_default());
            let ended =
                lock(&self.state).child.as_mut().context("the registry was stopped while it started")?.try_wait()?;
            if let Some(status) = ended {
                bail!("docker-registry ended with {status}: {}", log());
            }
            if Instant::now() >= deadline {
                bail!("docker-registry did not answer within {} s: {}", READY_LIMIT.as_secs(), log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn spawn(&self, address: SocketAddr) -> Result<PathBuf> {
        let mut state = lock(&self.state);
        ensure!(state.child.is_none(), "the registry runs already");
        let dir = state.remains.as_ref().context("the registry was removed")?.dir().to_owned();
        let config = dir.join("config.json");
        // JSON is YAML.
        let mut content = serde_json::json!({
            "version": "0.1",
            "log": { "level": "warn", "accesslog": { "disabled": true } },
            "storage": {
                "filesystem": { "rootdirectory": dir.join("storage") },
                "delete": { "enabled": self.rules.deletes },
                "maintenance": {
                    "uploadpurging": { "enabled": false },
                    "readonly": { "enabled": self.read_only.load(Ordering::SeqCst) },
                },
            },
            "http": { "addr": address.to_string(), "secret": "only for uploads that span processes" },
        });
        if self.rules.sign_in {
            let users = dir.join("htpasswd");
            std::fs::write(&users, HTPASSWD)?;
            content["auth"] = serde_json::json!({ "htpasswd": { "realm": "tests", "path": users } });
        }
        std::fs::write(&config, serde_json::to_vec_pretty(&content)?)?;
        let log = dir.join("registry.log");
        let arguments = ["serve".to_owned(), config.display().to_string()];
        state.child = Some(process::spawn_tied(&self.program, &arguments, &log)?);
        Ok(log)
    }
}

impl CleanUp for Own {
    fn clean_up(&self) {
        let mut state = lock(&self.state);
        if let Some(mut child) = state.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        if let Some(remains) = state.remains.take() {
            remains.clear();
        }
    }
}

fn answers(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(4096).read_to_end(&mut answer)?;
        // The header tells it from a stranger who got the port.
        let answer = String::from_utf8_lossy(&answer);
        let head = answer.lines().next().unwrap_or_default();
        Ok([" 200 ", " 401 "].iter().any(|status| head.contains(status))
            && answer.to_ascii_lowercase().contains("docker-distribution-api-version"))
    };
    ask().unwrap_or(false)
}
