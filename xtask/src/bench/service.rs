//! A running `replank serve` of an application that is only built, for the benchmarks of the service itself.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use replank_testbed::installed::free_port;
use replank_testbed::process;

use crate::tied::tied;

const START_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks whether it is ready: well below what is measured.
const ASK_EVERY: Duration = Duration::from_micros(500);

#[derive(Debug)]
pub(super) struct Service {
    child: Child,
    pub(super) address: SocketAddr,
    pub(super) token: String,
    /// From the start of the process to its first word that it is ready.
    pub(super) ready: Duration,
    /// Stands where an engine would: a service that builds nothing says nothing to it.
    _engine: Option<UnixListener>,
}

impl Service {
    /// In a home of its own, which is made. With an engine's socket and a remote it can build; else it has nothing to do.
    pub(super) fn start(replank: &Path, home: &Path, builds: Option<(&Path, &str)>) -> Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(home)?;
        let config = home.join("replank.toml");
        let own = home.join("engine.sock");
        let (engine, socket, source) = match builds {
            Some((socket, remote)) => {
                let source = format!("[source]\nremote = {remote:?}\nallow_loopback = true\nallow_private = true\n");
                (None, socket, source)
            }
            None => (Some(UnixListener::bind(&own)?), own.as_path(), String::new()),
        };
        let base = "application = \"bench\"\nplatform = \"none\"\n[components.lines]\n";
        fs::write(&config, format!("{base}{source}[docker]\nsocket = {socket:?}\n"))?;
        let file = home.join("token");
        let replank = |words: &[&str]| {
            let mut command = Command::new(replank);
            command.args(words).arg("--config").arg(&config).env_remove("CI");
            command
        };
        let out = file.display().to_string();
        process::run(&mut replank(&["token", "create", "bench", "--role", "admin", "--out", &out]))?;
        let token = fs::read_to_string(&file)?.trim().to_owned();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let log = home.join("serve.log");
        let mut command = tied(&replank(&["serve", "--listen", &address.to_string()]));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let begun = Instant::now();
        let child = command.spawn().context("cannot start the service")?;
        let mut service = Self { child, address, token, ready: Duration::ZERO, _engine: engine };
        while !service.is_ready() {
            if service.child.try_wait()?.is_some() || begun.elapsed() > START_LIMIT {
                bail!("the service does not start: {}", fs::read_to_string(&log)?.trim());
            }
            std::thread::sleep(ASK_EVERY);
        }
        service.ready = begun.elapsed();
        Ok(service)
    }

    /// Its ledger answers and its loop turns.
    fn is_ready(&self) -> bool {
        let asked = TcpStream::connect(self.address).and_then(|mut stream| {
            stream.set_read_timeout(Some(START_LIMIT))?;
            stream.write_all(b"GET /readyz HTTP/1.0\r\nhost: localhost\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        asked.is_ok_and(|answer| answer.split(' ').nth(1) == Some("200"))
    }

    /// What it has in memory now, in MiB.
    pub(super) fn memory(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes: f64 =
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok()).context("no such field")?;
        Ok(kibibytes / 1024.0)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped next.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
