//! Ctrl-C in the middle of the demo: nothing of it stays on the machine.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The demo says so when its controller was killed and the successor builds: there is the most to take away.
const MIDDLE: &str = "the successor went on";
/// From the signal to the end of the process, and from there to the end of what it killed.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Something that the demo has on this machine, by what it is and which.
type Thing = (&'static str, String);

/// Everything on this machine that carries the demo's mark: its own process id is part of the name of each directory.
fn things(mark: &str, ranges: &BTreeSet<String>, sockets: &BTreeSet<PathBuf>) -> BTreeSet<Thing> {
    let mut all = BTreeSet::new();
    let names = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let is_ours = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(mark));
    for dir in names(&std::env::temp_dir()).into_iter().chain(names(Path::new("/tmp"))).filter(|path| is_ours(path)) {
        all.insert(("directory", dir.display().to_string()));
    }
    let groups = Path::new("/sys/fs/cgroup");
    for group in
        names(groups).into_iter().flat_map(|dir| [names(&dir), vec![dir]].concat()).filter(|path| is_ours(path))
    {
        all.insert(("control group", group.display().to_string()));
    }
    for proc in names(Path::new("/proc")) {
        let Some(pid) = proc.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else { continue };
        let holds = |file: &str| fs::read(proc.join(file)).is_ok_and(|text| contains(&text, mark));
        // Its mounts may have spread into the name space of some service of this machine, so that they alone tell nothing.
        if pid != std::process::id() && (holds("cmdline") || holds("cgroup")) {
            let line = fs::read(proc.join("cmdline")).unwrap_or_default();
            all.insert(("process", format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " "))));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    all.extend(mounts.lines().filter(|line| line.contains(mark)).map(|line| ("mount", line.to_owned())));
    let links = Command::new("ip").args(["-o", "-4", "addr"]).output().unwrap().stdout;
    for line in String::from_utf8_lossy(&links).lines() {
        if ranges.iter().any(|range| line.contains(&format!(" {range}"))) {
            all.insert(("link", line.to_owned()));
        }
    }
    let rules = Command::new("iptables").args(["-w", "-S"]).output().map(|out| out.stdout).unwrap_or_default();
    for line in String::from_utf8_lossy(&rules).lines() {
        if ranges.iter().any(|range| line.contains(range.as_str())) {
            all.insert(("rule", line.to_owned()));
        }
    }
    all.extend(sockets.iter().filter(|path| path.exists()).map(|path| ("socket", path.display().to_string())));
    all
}

fn contains(text: &[u8], mark: &str) -> bool {
    text.windows(mark.len()).any(|window| window == mark.as_bytes())
}

/// Address ranges and containers' sockets of the demo's engine: where they are is only known while it stands.
fn of_engine(mark: &str) -> (BTreeSet<String>, BTreeSet<PathBuf>) {
    let (mut ranges, mut sockets) = (BTreeSet::new(), BTreeSet::new());
    for entry in fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(mark) {
            continue;
        }
        let note = fs::read_to_string(entry.path().join("note.json")).unwrap_or_default();
        let octet = note.split_once("\"octet\":").and_then(|(_, rest)| rest.split([',', '}']).next());
        if let Some(octet) = octet.and_then(|octet| octet.trim().parse::<u8>().ok()) {
            ranges.insert(format!("10.{octet}."));
        }
        let tasks = entry.path().join("exec/containerd/daemon/io.containerd.runtime.v2.task/moby");
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            let address = fs::read_to_string(task.path().join("address")).unwrap_or_default();
            sockets.extend(address.trim().strip_prefix("unix://").map(PathBuf::from));
        }
    }
    (ranges, sockets)
}

/// In the full run alone: it takes a minute and shows what no change of the product can break.
#[test]
fn an_interrupted_demo_leaves_nothing() {
    if std::env::var_os("REPLANK_FULL").is_none_or(|value| value != "1") {
        return;
    }
    let replank =
        std::env::var_os("REPLANK_BIN").expect("REPLANK_BIN names the static program: run `cargo xtask test`");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["demo", "--auto", "--json", "--replank"])
        .arg(replank)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mark = format!("replank-testbed-{}-", demo.id());
    let mut told = BufReader::new(demo.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains(MIDDLE) {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "the demo ended before it was interrupted");
        eprint!("{line}");
    }
    let (ranges, sockets) = of_engine(&mark);
    let before = things(&mark, &ranges, &sockets);
    // What is not there cannot be left: the rules are only made where the machine drops what it forwards.
    for kind in ["directory", "process", "mount", "link", "control group", "socket"] {
        assert!(before.iter().any(|(of, _)| *of == kind), "no {kind} in the middle of the demo: {before:#?}");
    }

    let begun = Instant::now();
    assert!(Command::new("kill").args(["-INT", &demo.id().to_string()]).status().unwrap().success());
    let mut rest = String::new();
    told.read_to_string(&mut rest).unwrap();
    let status = loop {
        if let Some(status) = demo.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < END_LIMIT, "it does not end: {rest}");
        std::thread::sleep(Duration::from_millis(20));
    };
    eprintln!("ended with {status} after {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(status.code(), Some(130), "{rest}");
    let mut result = String::new();
    demo.stdout.take().unwrap().read_to_string(&mut result).unwrap();
    assert_eq!(result, "", "an interrupted run has no result");
    // Of its end it tells that it cleans up, and of no failure that the clean-up itself brings about.
    assert_eq!(rest.trim(), "stopping: cleaning up");
    let left = things(&mark, &ranges, &sockets);
    assert!(left.is_empty(), "left on the machine: {left:#?}");
}
