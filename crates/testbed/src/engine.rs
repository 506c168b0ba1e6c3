//! A Docker engine: a private one that can be killed and restarted at will, or one that was found.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::cleanup::{self, CleanUp, lock};
use crate::net::Range;
use crate::remains::Remains;
use crate::{cgroup, net, process};

/// Names the engine's socket for tests; `cargo xtask test` sets it.
pub const ENGINE_ENV: &str = "REPLANK_TEST_DOCKER";

/// An engine on a slow, shared disk answers within a few seconds; with many containers to restart it takes longer.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// After SIGTERM the engine gives its containers [`SHUTDOWN_SECONDS`]; what is left of that time is its own.
const STOP_LIMIT: Duration = Duration::from_secs(25);
const SHUTDOWN_SECONDS: u32 = 10;

/// One question to the engine's socket while waiting for it.
const PING_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// More arguments for dockerd, as they are.
    pub arguments: Vec<String>,
    /// Where the engine keeps images and containers instead of its temporary directory, such as a small mount that can be
    /// filled up. Not removed at the end.
    pub data_root: Option<PathBuf>,
}

/// Dropping a private engine removes it with all its containers, images, networks and mounts.
#[derive(Debug)]
pub struct Engine {
    socket: PathBuf,
    client: PathBuf,
    own: Option<Arc<Own>>,
}

/// What only a private engine has.
#[derive(Debug)]
struct Own {
    dockerd: PathBuf,
    data_root: PathBuf,
    range: Range,
    arguments: Vec<String>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    child: Option<Child>,
    /// `None` once it was removed for good.
    remains: Option<Remains>,
}

impl Engine {
    /// Starts a private engine and waits until it answers. Needs root and the packages of [`crate::setup`].
    ///
    /// # Errors
    /// When a program is missing or the engine does not come up; the error holds the end of its log.
    pub fn start(options: &EngineOptions) -> Result<Self> {
        let dockerd =
            process::find("dockerd", &["/usr/sbin/dockerd"]).context("there is no dockerd; install docker.io")?;
        let client = client()?;
        cgroup::ensure()?;
        let mut remains = Remains::create()?;
        let prepared = net::claim().and_then(|range| {
            // Noted at once, so that a kill in the next instant leaves no unknown bridge.
            remains.set_network(range, false)?;
            remains.set_data_root(options.data_root.as_deref())?;
            if net::allow_forwarding(range)? {
                remains.set_network(range, true)?;
            }
            // Not the machine's: its settings are for its own engine. Not the caller's: his credentials are not for this one.
            fs::write(remains.dir().join("daemon.json"), "{}")?;
            fs::create_dir_all(remains.dir().join("client"))?;
            Ok(range)
        });
        let range = prepared.inspect_err(|_| remains.clear())?;
        let socket = remains.dir().join("docker.sock");
        let own = Arc::new(Own {
            dockerd,
            data_root: options.data_root.clone().unwrap_or_else(|| remains.dir().join("data")),
            range,
            arguments: options.arguments.clone(),
            state: Mutex::new(State { child: None, remains: Some(remains) }),
        });
        let weak: Weak<Own> = Arc::downgrade(&own);
        cleanup::register(weak);
        let engine = Self { socket, client, own: Some(own) };
        engine.start_again()?;
        Ok(engine)
    }

    /// An engine that is there already, which is only used: it is neither stopped nor removed.
    ///
    /// # Errors
    /// When there is no client program, or nothing answers on the socket.
    pub fn attach(socket: &Path) -> Result<Self> {
        let engine = Self { socket: socket.to_owned(), client: client()?, own: None };
        ensure!(engine.answers(), "no Docker engine answers on {}", socket.display());
        Ok(engine)
    }

    /// The engine that `REPLANK_TEST_DOCKER` names.
    ///
    /// # Errors
    /// When it is not set or does not answer: such tests fail, as a silent skip would pass for a success.
    pub fn from_env() -> Result<Self> {
        let socket = std::env::var_os(ENGINE_ENV).with_context(|| {
            format!("{ENGINE_ENV} is not set: run `cargo xtask test`, or `cargo xtask engine` beside")
        })?;
        Self::attach(Path::new(&socket))
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `unix://…`, as in `DOCKER_HOST`.
    #[must_use]
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Where containers on the default bridge reach this machine; `None` where a found engine does not tell, or is not on
    /// this machine.
    #[must_use]
    pub fn gateway(&self) -> Option<Ipv4Addr> {
        if let Some(own) = &self.own {
            return Some(own.range.gateway());
        }
        let told =
            self.docker(&["network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", "bridge"]).ok()?;
        let address: Ipv4Addr = told.parse().ok()?;
        std::net::UdpSocket::bind((address, 0)).is_ok().then_some(address)
    }

    /// The process id of a private engine that runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.own.as_ref().and_then(|own| lock(&own.state).child.as_ref().map(Child::id))
    }

    /// The directory of a private engine; its log is `engine.log` in it.
    #[must_use]
    pub fn directory(&self) -> Option<PathBuf> {
        self.own.as_ref().and_then(|own| lock(&own.state).remains.as_ref().map(|remains| remains.dir().to_owned()))
    }

    /// Runs the Docker client and answers its trimmed standard output.
    ///
    /// # Errors
    /// With the end of the client's error output.
    pub fn docker<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        process::text(self.docker_command().args(arguments))
    }

    /// The Docker client, pointed at this engine, for callers that need its streams.
    #[must_use]
    pub fn docker_command(&self) -> Command {
        let mut command = Command::new(&self.client);
        command.env("DOCKER_HOST", self.host()).env("DOCKER_BUILDKIT", "1");
        for foreign in ["DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_API_VERSION"] {
            command.env_remove(foreign);
        }
        if let Some(directory) = self.directory() {
            command.env("DOCKER_CONFIG", directory.join("client"));
        }
        command
    }

    /// Starts a stopped or killed engine on the same data and waits until it answers.
    ///
    /// # Errors
    /// When it runs already, is not ours, or does not come up.
    pub fn start_again(&self) -> Result<()> {
        self.own()?.start(&self.socket)?;
        let deadline = Instant::now() + READY_LIMIT;
        while !self.answers() {
            let ended = {
                let mut state = lock(&self.own()?.state);
                state.child.as_mut().context("the engine was stopped while it started")?.try_wait()?
            };
            if let Some(status) = ended {
                bail!("dockerd ended with {status}: {}", self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!("dockerd did not answer within {} s: {}", READY_LIMIT.as_secs(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// SIGTERM, as an orderly stop of the machine sends it: containers are stopped too. SIGKILL when it takes too long.
    ///
    /// # Errors
    /// When the engine is not ours.
    pub fn stop(&self) -> Result<()> {
        let own = self.own()?;
        let mut state = lock(&own.state);
        if let Some(mut child) = state.child.take() {
            process::signal(child.id(), Signal::TERM);
            if process::wait(&mut child, STOP_LIMIT)?.is_none() {
                child.kill().ok();
                child.wait()?;
            }
        }
        // Its containerd goes with it; containers that did not stop in time would otherwise live on.
        state.remains.iter().for_each(Remains::kill);
        Ok(())
    }

    /// SIGKILL of the engine and its containerd: the containers run on.
    ///
    /// # Errors
    /// When the engine is not ours.
    pub fn kill(&self) -> Result<()> {
        let mut state = lock(&self.own()?.state);
        if let Some(mut child) = state.child.take() {
            child.kill().ok();
            child.wait()?;
        }
        state.remains.iter().for_each(Remains::kill_containerd);
        Ok(())
    }

    /// As if the machine lost its power: SIGKILL of the engine, containerd, the shims and every container at once, and what
    /// lives in memory only is gone. Nothing gets to write its last words.
    ///
    /// # Errors
    /// When the engine is not ours.
    pub fn kill_everything(&self) -> Result<()> {
        let mut state = lock(&self.own()?.state);
        state.remains.iter().for_each(Remains::kill);
        if let Some(mut child) = state.child.take() {
            child.kill().ok();
            child.wait()?;
        }
        if let Some(remains) = &state.remains {
            remains.unmount();
            let exec = remains.dir().join("exec");
            if exec.exists() {
                fs::remove_dir_all(&exec).with_context(|| format!("cannot remove {}", exec.display()))?;
            }
        }
        Ok(())
    }

    /// [`Self::stop`] and [`Self::start_again`].
    ///
    /// # Errors
    /// As those.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    /// The end of the engine's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let path = self.directory().map(|dir| dir.join("engine.log"));
        process::tail(&path.and_then(|path| fs::read(path).ok()).unwrap_or_default())
    }

    fn own(&self) -> Result<&Own> {
        self.own.as_deref().context("this engine was found, not started here: it is not ours to stop or start")
    }

    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(PING_LIMIT))?;
            stream.set_write_timeout(Some(PING_LIMIT))?;
            stream.write_all(b"GET /_ping HTTP/1.0\r\n\r\n")?;
            let mut start = [0; 12];
            stream.read_exact(&mut start)?;
            Ok(start.ends_with(b" 200"))
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(own) = &self.own {
            own.clean_up();
        }
    }
}

impl Own {
    fn start(&self, socket: &Path) -> Result<()> {
        let mut state = lock(&self.state);
        ensure!(state.child.is_none(), "the engine runs already");
        let dir = state.remains.as_ref().context("the engine was removed")?.dir().to_owned();
        let name = state.remains.as_ref().map(Remains::name).unwrap_or_default();
        let pidfile = dir.join("docker.pid");
        // Left by a kill; the number in it may belong to anybody by now.
        if pidfile.exists() {
            fs::remove_file(&pidfile)?;
        }
        let at = |name: &str| dir.join(name).display().to_string();
        let mut arguments = vec![
            format!("--host=unix://{}", socket.display()),
            format!("--data-root={}", self.data_root.display()),
            format!("--exec-root={}", at("exec")),
            format!("--pidfile={}", pidfile.display()),
            format!("--config-file={}", at("daemon.json")),
            format!("--bridge={}", self.range.bridge()),
            format!("--default-address-pool=base={},size=24", self.range.networks()),
            format!("--cgroup-parent=/{name}"),
            format!("--shutdown-timeout={SHUTDOWN_SECONDS}"),
            // The rules' chains have fixed names, and a starting engine empties them: that would cut the published ports of
            // an engine that is not ours. Ports are published by the engine's own forwarder instead.
            "--iptables=false".to_owned(),
            "--ip6tables=false".to_owned(),
            // A registry on the bridge speaks plain HTTP; nobody but this machine and its containers can reach it.
            format!("--insecure-registry={}", self.range.all()),
        ];
        arguments.extend(self.arguments.iter().cloned());
        let log = at("engine.log");
        state.child = Some(process::spawn_tied(&self.dockerd, &arguments, Path::new(&log))?);
        Ok(())
    }
}

impl CleanUp for Own {
    fn clean_up(&self) {
        let mut state = lock(&self.state);
        if let Some(remains) = state.remains.take() {
            if let Some(child) = &mut state.child {
                // First the one that would start others again.
                child.kill().ok();
                child.wait().ok();
            }
            state.child = None;
            remains.clear();
        }
    }
}

/// Debian's client, also where another one stands before it on PATH: client and engine of one package understand each other.
fn client() -> Result<PathBuf> {
    process::find("docker", &["/usr/bin/docker"]).context("there is no Docker client; install docker.io")
}
