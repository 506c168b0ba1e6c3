//! What a private server leaves on the machine, and taking it away: by the owner at its end, or by the next start when the
//! owner was killed.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::cleanup::{self, CleanUp, lock};
use crate::net::Range;
use crate::{cgroup, net, process};

/// Directories of ours in the system's directory for temporary files.
const PREFIX: &str = "replank-testbed-";
const NOTE: &str = "note.json";

/// Processes in the middle of a fork show up only on a second look; killed ones are gone well within this time.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Longer paths do not fit a Unix socket's address (108 bytes) once the engine has added its own part.
const DIRECTORY_LIMIT: usize = 48;

/// The programs that may be killed for having our directory in their arguments. Clients that talk to the engine are spared.
const SERVERS: [&str; 8] = [
    "dockerd",
    "containerd",
    "containerd-shim",
    "containerd-shim-runc-v1",
    "containerd-shim-runc-v2",
    "runc",
    "docker-proxy",
    "docker-registry",
];

/// Written into the directory before anything else is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    boot: String,
    owner: u32,
    owner_start: u64,
    /// Second octet of the engine's 10.x.0.0/16.
    octet: Option<u8>,
    forward_rules: bool,
    /// Where the engine keeps its data, if not in the directory.
    data_root: Option<PathBuf>,
}

/// A directory that holds all the files of one server, with the note of what else there is outside of it.
#[derive(Debug)]
pub(crate) struct Remains {
    dir: PathBuf,
    note: Note,
}

impl Remains {
    /// Makes the directory, after a look for what dead owners left.
    pub(crate) fn create() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let note = Note {
            boot: boot()?,
            owner: std::process::id(),
            owner_start: process::start_ticks(std::process::id()).context("cannot read our own /proc entry")?,
            octet: None,
            forward_rules: false,
            data_root: None,
        };
        let name = format!("{PREFIX}{}-{}", note.owner, NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = base().join(name);
        // Of the same process id, but before a restart of the machine: the sweep takes it only with its note.
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::DirBuilder::new().mode(0o711).create(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let remains = Self { dir, note };
        remains.write()?;
        Ok(remains)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory's own name: unique on the machine as long as it stands.
    pub(crate) fn name(&self) -> String {
        self.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub(crate) fn set_network(&mut self, range: Range, forward_rules: bool) -> Result<()> {
        self.note.octet = Some(range.octet);
        self.note.forward_rules = forward_rules;
        self.write()
    }

    pub(crate) fn set_data_root(&mut self, data_root: Option<&Path>) -> Result<()> {
        self.note.data_root = data_root.map(Path::to_owned);
        self.write()
    }

    /// SIGKILL to every server and container that belongs to the directory, until none is left.
    pub(crate) fn kill(&self) {
        self.kill_until_gone(|_| true);
    }

    /// SIGKILL to the containerd of the directory. It dies with its engine by itself, but not at once, and an engine that
    /// starts meanwhile takes the dying one for a healthy one and gives up.
    pub(crate) fn kill_containerd(&self) {
        self.kill_until_gone(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "containerd")
        });
        // The number in it may belong to anybody by now.
        fs::remove_file(self.dir.join("exec/containerd/containerd.pid")).ok();
    }

    fn kill_until_gone(&self, is_meant: impl Fn(u32) -> bool) {
        let deadline = Instant::now() + KILL_LIMIT;
        loop {
            let found: Vec<u32> = self.processes().into_iter().filter(|pid| is_meant(*pid)).collect();
            for pid in &found {
                process::signal(*pid, Signal::KILL);
            }
            if found.is_empty() || Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Unmounts everything below the directory and the engine's data.
    pub(crate) fn unmount(&self) {
        let below = |point: &Path| {
            let is_in = |dir: &Path| point != dir && point.starts_with(dir);
            is_in(&self.dir) || self.note.data_root.as_deref().is_some_and(is_in)
        };
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<&str> =
            table.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| below(Path::new(point))).collect();
        // What was mounted last lies on top.
        points.reverse();
        for point in points {
            // Lazily, as a dying process may still hold it; whatever fails shows when the directory is removed.
            process::run(Command::new("umount").args(["--lazy", point])).ok();
        }
    }

    /// Kills, unmounts and removes everything. Safe to call again, and after half a start.
    pub(crate) fn clear(&self) {
        self.kill();
        self.unmount();
        if let Some(octet) = self.note.octet {
            net::release(Range { octet }, self.note.forward_rules);
        }
        cgroup::remove(&self.name());
        self.remove_shim_sockets();
        // Last, as the note in it is what a later sweep would need.
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && self.dir.exists()
        {
            eprintln!("testbed: cannot remove {}: {error}", self.dir.display());
        }
    }

    fn write(&self) -> Result<()> {
        let path = self.dir.join(NOTE);
        let fresh = self.dir.join("note.new");
        fs::write(&fresh, serde_json::to_vec(&self.note)?)?;
        fs::rename(&fresh, &path).with_context(|| path.display().to_string())
    }

    fn processes(&self) -> Vec<u32> {
        let own_mounts = fs::read_link("/proc/self/ns/mnt").ok();
        let here = format!("{}/", self.dir.display());
        let group = format!("/{}/", self.name());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if pid == std::process::id() {
                continue;
            }
            let proc = entry.path();
            let is_server = || {
                let arguments = fs::read(proc.join("cmdline")).unwrap_or_default();
                let arguments = String::from_utf8_lossy(&arguments);
                let program = arguments.split('\0').next().unwrap_or_default();
                let program = program.rsplit('/').next().unwrap_or_default();
                let in_range = |octet: u8| arguments.contains(&format!("-container-ip\u{0}10.{octet}."));
                SERVERS.contains(&program) && (arguments.contains(&here) || self.note.octet.is_some_and(in_range))
            };
            let is_grouped = || fs::read_to_string(proc.join("cgroup")).is_ok_and(|groups| groups.contains(&group));
            // A container whose group tells nothing: its root file system lies in our directory. Only the root counts, as
            // other mounts of ours may have spread into the name space of some service of this machine.
            let is_rooted = || {
                fs::read_link(proc.join("ns/mnt")).ok() != own_mounts
                    && fs::read_to_string(proc.join("mountinfo")).is_ok_and(|table| {
                        table.lines().any(|line| line.split(' ').nth(4) == Some("/") && line.contains(&here))
                    })
            };
            let is_dead = || {
                fs::read_to_string(proc.join("stat"))
                    .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
            };
            if (is_server() || is_grouped() || is_rooted()) && !is_dead() {
                found.push(pid);
            }
        }
        found
    }

    /// Shims keep their sockets outside of the engine's directories and leave them when they are killed.
    fn remove_shim_sockets(&self) {
        let tasks = self.dir.join("exec/containerd/daemon/io.containerd.runtime.v2.task/moby");
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            let address = fs::read_to_string(task.path().join("address")).unwrap_or_default();
            if let Some(socket) =
                address.trim().strip_prefix("unix://").filter(|path| path.starts_with("/run/containerd/s/"))
            {
                fs::remove_file(socket).ok();
            }
        }
    }
}

/// A directory for the files of one run, which also goes when the process ends by a signal or is killed.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    remains: Arc<Kept>,
}

#[derive(Debug)]
struct Kept(Mutex<Option<Remains>>);

impl Scratch {
    /// # Errors
    /// When it cannot be made.
    pub fn create() -> Result<Self> {
        let remains = Remains::create()?;
        let dir = remains.dir().to_owned();
        let remains = Arc::new(Kept(Mutex::new(Some(remains))));
        let weak: Weak<Kept> = Arc::downgrade(&remains);
        cleanup::register(weak);
        Ok(Self { dir, remains })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remains.clean_up();
    }
}

impl CleanUp for Kept {
    fn clean_up(&self) {
        if let Some(remains) = lock(&self.0).take() {
            remains.clear();
        }
    }
}

/// Cleans up after owners that are gone.
pub fn sweep() {
    for entry in fs::read_dir(base()).into_iter().flatten().flatten() {
        let dir = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Anyone can make such a name in a shared directory; only our own user's notes are believed.
        let ours = fs::symlink_metadata(&dir)
            .is_ok_and(|meta| meta.is_dir() && meta.uid() == rustix::process::getuid().as_raw());
        let Some(note) = fs::read(dir.join(NOTE)).ok().and_then(|bytes| serde_json::from_slice::<Note>(&bytes).ok())
        else {
            continue;
        };
        let alive =
            boot().is_ok_and(|boot| boot == note.boot) && process::start_ticks(note.owner) == Some(note.owner_start);
        if ours && !alive {
            Remains { dir, note }.clear();
        }
    }
}

fn base() -> PathBuf {
    let base = std::env::temp_dir();
    if base.as_os_str().len() > DIRECTORY_LIMIT - PREFIX.len() { PathBuf::from("/tmp") } else { base }
}

fn boot() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
