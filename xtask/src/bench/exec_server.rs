//! The server that `exec-stream` measures, and what the kernel says of its processor time and memory.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use replank_testbed::installed::free_port;

use super::exec_client::Channel;
use crate::tied::tied;

const START_LIMIT: Duration = Duration::from_secs(10);
/// The kernel counts processor time for programs in hundredths of a second, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    pub(super) channel: Channel,
}

impl Server {
    /// With its files below `scratch`, and `programs` before everything else on its path.
    pub(super) fn start(replank: &Path, scratch: &Path, programs: &Path) -> Result<Self> {
        let channel =
            Channel { address: ([127, 0, 0, 1], free_port()?).into(), token: "a token for one run".to_owned() };
        let requests = scratch.join("requests");
        fs::create_dir(&requests)?;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(replank);
        command
            .arg("exec-server")
            .env("EXEC_TOKEN", &channel.token)
            .env("EXEC_PORT", channel.address.port().to_string())
            .env("EXEC_CLONE_ROOT", scratch.join("clones"))
            .env("TMPDIR", &requests)
            .env("PATH", format!("{}:{path}", programs.display()));
        let log = scratch.join("server.log");
        let mut command = tied(&command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut server = Self { child: command.spawn().context("cannot start the server")?, channel };
        let begun = Instant::now();
        while TcpStream::connect(server.channel.address).is_err() {
            if server.child.try_wait()?.is_some() || begun.elapsed() > START_LIMIT {
                bail!("the server does not start: {}", fs::read_to_string(&log)?.trim());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// `VmRSS`, what it has now, or `VmHWM`, the most it had: in MiB.
    pub(super) fn memory(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kibibytes: f64 =
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok()).context("no such field")?;
        Ok(kibibytes / 1024.0)
    }

    /// From here on `VmHWM` is the most that it has had since.
    pub(super) fn forget_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }

    /// Its own, without what its programs used.
    pub(super) fn processor_seconds(&self) -> Result<f64> {
        processor_seconds(&self.child.id().to_string(), 14)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped next.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Of all programs that this process has waited for.
pub(super) fn processor_seconds_of_children() -> Result<f64> {
    processor_seconds("self", 16)
}

/// Two fields of `/proc/PID/stat`, counted from 1 as in proc(5): time in user mode, and after it in the kernel.
fn processor_seconds(process: &str, field: usize) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name, in parentheses, is field 2 and may hold anything.
    let rest = stat.rsplit_once(')').context("/proc has no stat like that")?.1;
    let ticks = rest.split_whitespace().skip(field - 3).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / TICKS_PER_SECOND)
}
