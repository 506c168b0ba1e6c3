//! This machine: the home, the engine, disk space and memory.

use std::collections::BTreeMap;
use std::path::Path;

use replank_adapters::engine::{self, Engine};
use replank_adapters::platform::docker::config::ContainerConfig;
use replank_core::record::Overlap;
use replank_core::words::ContainerName;
use rustix::fs::{Access, access, statvfs};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{Finding, Patient, size};
use crate::config::Builder;

/// Oldest engine that builds through BuildKit as Replank asks for it.
const ENGINE_OLDEST: (u32, u32) = (20, 10);
/// The home holds clones and the ledger with its logs: below this a clone of a usual repository fails, or soon will.
const HOME_LEAST: u64 = 256 * 1024 * 1024;
const HOME_ENOUGH: u64 = 2 * 1024 * 1024 * 1024;
/// The engine's disk holds the images of both sides and what a build leaves: a usual image has hundreds of MiB. A job is refused
/// below the least, so that a small image on a small disk must still pass.
const ENGINE_LEAST: u64 = 256 * 1024 * 1024;
const ENGINE_ENOUGH: u64 = 5 * 1024 * 1024 * 1024;
/// Both sides of an upgrade run at the same time, beside a build.
const MEMORY_LEAST: u64 = 64 * 1024 * 1024;
const MEMORY_ENOUGH: u64 = 512 * 1024 * 1024;
/// A file system out of inodes is as full as one out of bytes.
const INODES_LEAST: u64 = 10_000;
/// More of an engine's answer than its first line is not looked at.
const HEAD_MAX: usize = 1024;

pub async fn home(patient: Patient<'_>) -> Finding {
    let home = &patient.settings.home;
    let shown = home.display();
    if !home.is_dir() {
        return Finding::failed(format!("the home {shown} does not exist"), "make it, for the user that runs replank");
    }
    // What exists is what is written to; the rest is made below the home.
    for part in
        [home.clone(), patient.settings.ledger_dir(), patient.settings.work_dir(), patient.settings.tokens_dir()]
    {
        if part.exists() && access(&part, Access::WRITE_OK | Access::EXEC_OK).is_err() {
            let what = format!("{} cannot be written by this user", part.display());
            return Finding::failed(
                what,
                "give it to the user that runs replank, and see that it is not mounted read-only",
            );
        }
    }
    space(home, "the home", HOME_LEAST, HOME_ENOUGH)
}

fn space(path: &Path, what: &str, least: u64, enough: u64) -> Finding {
    let shown = path.display();
    let stat = match statvfs(path) {
        Ok(stat) => stat,
        Err(error) => {
            let what = format!("the disk of {shown} cannot be looked at: {error}");
            return Finding::warning(what, "look at its free space with `df`");
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let told = format!("{what} {shown} has {} free", size(free));
    if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Finding::failed(format!("{what} {shown} is mounted read-only"), "mount it for writing");
    }
    if free < least {
        Finding::failed(told, format!("free some: below {} an upgrade fails", size(least)))
    } else if stat.f_files > 0 && stat.f_favail < INODES_LEAST {
        Finding::warning(
            format!("{what} {shown} has room for {} more files", stat.f_favail),
            "remove what is not needed",
        )
    } else if free < enough {
        Finding::warning(told, format!("free some: {} is comfortable", size(enough)))
    } else {
        Finding::ok(told)
    }
}

/// `both`: two revisions run at the same time during an upgrade.
pub async fn memory(patient: Patient<'_>, both: bool) -> Finding {
    let text = match std::fs::read_to_string("/proc/meminfo") {
        Ok(text) => text,
        Err(error) => return Finding::warning(format!("/proc/meminfo cannot be read: {error}"), "look with `free`"),
    };
    memory_of(&text, limits(&patient.settings.platform.containers, both))
}

/// What containers may take by their own limits, at the moment when most of them run; those without one count nothing.
fn limits(containers: &BTreeMap<ContainerName, ContainerConfig>, both: bool) -> u64 {
    let of = |run: &ContainerConfig| {
        let sides = match run.overlap_rule() {
            Overlap::Allowed if both => 2,
            Overlap::Allowed | Overlap::StopOldFirst | Overlap::StartAfterCutover => 1,
        };
        run.memory_bytes.unwrap_or(0).saturating_mul(sides)
    };
    containers.values().map(of).fold(0, u64::saturating_add)
}

/// By the kernel's word, and what containers may take of it.
fn memory_of(meminfo: &str, limits: u64) -> Finding {
    let bytes = |name: &str| {
        let kib = |line: &str| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok();
        meminfo.lines().find_map(kib).map(|kib| kib.saturating_mul(1024))
    };
    let (Some(available), Some(total)) = (bytes("MemAvailable:"), bytes("MemTotal:")) else {
        return Finding::warning("the kernel does not say how much memory is available", "look with `free`");
    };
    let whole = total.saturating_add(bytes("SwapTotal:").unwrap_or(0));
    let told = format!("{} of memory are available", size(available));
    let advice = "free some: old and new run side by side during an upgrade, and beside a build";
    if limits > whole {
        let what = format!(
            "containers may take {} of memory while old and new run, and there are {}",
            size(limits),
            size(whole)
        );
        Finding::failed(
            what,
            "lower memory_bytes in [containers], let some of them stop first (overlap), or add memory",
        )
    } else if available < MEMORY_LEAST {
        Finding::failed(told, advice)
    } else if available < MEMORY_ENOUGH {
        Finding::warning(told, advice)
    } else {
        Finding::ok(told)
    }
}

/// Nothing is run and nothing is built here: then no engine is needed.
fn needs_no_engine(patient: Patient<'_>) -> bool {
    !patient.settings.platform.runs && patient.settings.build.builder == Builder::AzExec
}

pub async fn engine(patient: Patient<'_>) -> Finding {
    if needs_no_engine(patient) {
        return Finding::ok("no engine is needed: images are built elsewhere, and nothing is run");
    }
    let socket = &patient.settings.platform.socket;
    let found = match Engine::connect(socket) {
        Ok(engine) => {
            engine.docker().version().await.map_err(|e| engine::classify(e, "the engine's version cannot be asked"))
        }
        Err(fault) => Err(fault),
    };
    let version = match found {
        Ok(found) => found.version.unwrap_or_default(),
        Err(fault) => return fault.into(),
    };
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    let pair = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if pair < ENGINE_OLDEST {
        let (major, minor) = ENGINE_OLDEST;
        return Finding::failed(
            format!("the engine has version {version:?}"),
            format!("install {major}.{minor} or later"),
        );
    }
    match has_buildkit(socket).await {
        Ok(true) => Finding::ok(format!("version {version} with BuildKit, at {}", socket.display())),
        Ok(false) => Finding::failed(
            format!("the engine {version} offers no BuildKit"),
            "use Docker Engine itself, and take \"features\": {\"buildkit\": false} out of its daemon.json",
        ),
        Err(error) => {
            Finding::failed(format!("the engine does not answer a question about BuildKit: {error}"), "look at its log")
        }
    }
}

/// Whether the engine would speak with a BuildKit client. The connection is closed before anything is said on it.
async fn has_buildkit(socket: &Path) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(
            b"POST /grpc HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
        )
        .await?;
    let mut head = Vec::new();
    while head.len() < HEAD_MAX && !head.contains(&b'\n') {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    Ok(head.starts_with(b"HTTP/1.1 101"))
}

pub async fn disk(patient: Patient<'_>) -> Finding {
    if needs_no_engine(patient) {
        return Finding::ok("no engine is needed");
    }
    let root = match Engine::connect(&patient.settings.platform.socket) {
        Ok(engine) => engine.docker().info().await.ok().and_then(|info| info.docker_root_dir),
        Err(_) => None,
    };
    let Some(root) = root else {
        return Finding::warning("the engine does not say where its images are", "see the check of the engine");
    };
    let root = Path::new(&root);
    if !root.exists() {
        // Inside a container the engine's directory is not in sight.
        let what = format!("the engine's directory {} cannot be seen from here", root.display());
        return Finding::warning(what, "look at the host's free space with `df`, or run doctor on the host");
    }
    space(root, "the engine's directory", ENGINE_LEAST, ENGINE_ENOUGH)
}

#[cfg(test)]
mod tests {
    use replank_core::words::ComponentName;

    use super::super::Verdict;
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn container(name: &str, overlap: Overlap, mebibytes: Option<u64>) -> (ContainerName, ContainerConfig) {
        let component = ComponentName::new("app").expect("a name");
        let memory_bytes = mebibytes.map(|mebibytes| mebibytes * MIB);
        let run = ContainerConfig { overlap: Some(overlap), memory_bytes, ..ContainerConfig::of(component) };
        (ContainerName::new(name).expect("a name"), run)
    }

    #[test]
    fn limits_count_for_both_sides_where_both_run() {
        let containers = BTreeMap::from([
            container("api", Overlap::Allowed, Some(100)),
            container("worker", Overlap::StopOldFirst, Some(10)),
            container("beat", Overlap::StartAfterCutover, Some(1)),
            container("web", Overlap::Allowed, None),
        ]);
        assert_eq!(limits(&containers, true), 211 * MIB);
        assert_eq!(limits(&containers, false), 111 * MIB, "a first deployment has one side");
        let absurd = BTreeMap::from([
            container("one", Overlap::Allowed, Some(u64::MAX / MIB)),
            container("two", Overlap::Allowed, Some(u64::MAX / MIB)),
        ]);
        assert_eq!(limits(&absurd, true), u64::MAX);
    }

    #[test]
    fn memory_is_what_the_kernel_has_against_what_containers_may_take() {
        let machine = |total: u64, available: u64, swap: u64| {
            let line = |name: &str, mebibytes: u64| format!("{name}:   {} kB\n", mebibytes * 1024);
            line("MemTotal", total) + "MemFree: 1 kB\n" + &line("MemAvailable", available) + &line("SwapTotal", swap)
        };
        for (meminfo, limits, verdict, part) in [
            (machine(4096, 2048, 0), 0, Verdict::Ok, "2.0 GiB of memory are available"),
            (machine(4096, 2048, 0), 4096, Verdict::Ok, "2.0 GiB"),
            (machine(4096, 2048, 0), 4097, Verdict::Failed, "may take 4.0 GiB of memory while old and new run"),
            (machine(4096, 2048, 1024), 5120, Verdict::Ok, "2.0 GiB"),
            (machine(4096, 2048, 1024), u64::MAX / MIB, Verdict::Failed, "there are 5.0 GiB"),
            (machine(4096, 63, 0), 0, Verdict::Failed, "63 MiB"),
            (machine(4096, 64, 0), 0, Verdict::Warning, "64 MiB"),
            (String::new(), 1, Verdict::Warning, "does not say"),
            ("MemTotal: much\nMemAvailable: -1 kB\n".to_owned(), 1, Verdict::Warning, "does not say"),
        ] {
            let found = memory_of(&meminfo, limits * MIB);
            assert_eq!(found.verdict, verdict, "{meminfo}, {limits} MiB: {found:?}");
            assert!(found.what.contains(part), "{meminfo}, {limits} MiB: {found:?}");
            assert_eq!(found.advice.is_empty(), verdict == Verdict::Ok, "what to do: {found:?}");
        }
    }
}
