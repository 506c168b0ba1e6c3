//! Control groups: an engine needs them mounted, and a bare machine without an init system has none.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

const ROOT: &str = "/sys/fs/cgroup";

/// Mounts the control groups where nothing has mounted them yet. They stay: they belong to the machine, not to us.
pub(crate) fn ensure() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|line| matches!(line.split_whitespace().nth(2), Some("cgroup" | "cgroup2"))) {
        return Ok(());
    }
    let offered = fs::read_to_string("/proc/cgroups").context("this kernel has no control groups")?;
    let controllers = enabled(&offered);
    let mount = |kind: &str, options: &str, at: &str| {
        process::run(Command::new("mount").args(["-t", kind, "-o", options, "cgroup", at]))
            .context("cannot mount control groups")
    };
    // The old layout only where the kernel offers the controller that the new one does without.
    if !controllers.contains(&"devices") {
        mount("cgroup2", "rw", ROOT)?;
        return Ok(());
    }
    mount("tmpfs", "mode=755", ROOT)?;
    for controller in controllers {
        let at = Path::new(ROOT).join(controller);
        fs::create_dir_all(&at)?;
        mount("cgroup", controller, &at.to_string_lossy())?;
    }
    Ok(())
}

/// Removes the groups that the engine made under `name`, in every hierarchy; only empty groups can be removed at all.
pub(crate) fn remove(name: &str) {
    let hierarchies = fs::read_dir(ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([Path::new(ROOT).to_owned()]) {
        let ours = hierarchy.join(name);
        if ours.is_dir() {
            remove_below(&ours);
        }
    }
}

fn remove_below(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
        }
    }
    // What is still in use stays; the machine's next start takes it.
    fs::remove_dir(group).ok();
}

/// The controllers that `/proc/cgroups` shows as switched on.
fn enabled(offered: &str) -> Vec<&str> {
    offered
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            (words.nth(2) == Some("1")).then_some(name)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn controllers_that_are_off_are_left_out() {
        let table = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t1\t1\nmemory\t0\t1\t0\ndevices\t3\t1\t1\n";
        assert_eq!(super::enabled(table), ["cpu", "devices"]);
    }
}
