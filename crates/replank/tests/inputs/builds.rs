//! Releases that cannot be built.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use replank_testbed::repo::Entry;

use crate::rig::{DOCKERFILE, JOB_LIMIT, Options, Rig, get, release};

fn dockerfile(lines: &str) -> Vec<Entry> {
    vec![Entry::file("app/Dockerfile", format!("FROM testbed/busybox\n{lines}\n"))]
}

#[test]
fn a_release_that_cannot_be_built_fails_before_anything_is_touched() {
    let mut rig = Rig::start(Options::default());

    rig.repo.remove(&["app/Dockerfile"], "no Dockerfile").unwrap();
    rig.publish("0.1.1", &[]);
    rig.fails("0.1.1", &["app", "app/Dockerfile"]);

    rig.publish("0.1.2", &dockerfile("RUN echo the reason is here && exit 3"));
    let row = rig.fails("0.1.2", &["the build of app failed", "the reason is here", "build log"]);
    let (code, log) = rig.log(&row);
    assert!(code == 200 && log.contains("the reason is here"), "{code}: {log}");
    let shown = rig.cli(&["logs", "app"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("the reason is here"));

    rig.publish("0.1.3", &[Entry::file("app/Dockerfile", "FROM testbed/busybox\nNONSENSE\n")]);
    rig.fails("0.1.3", &["app", "NONSENSE"]);

    rig.publish("0.1.4", &dockerfile("COPY ../../etc/passwd /stolen"));
    rig.fails("0.1.4", &["the build of app failed"]);

    rig.publish("0.1.5", &[Entry::file("app/Dockerfile", "FROM no.such.registry.invalid/nothing:1\n")]);
    rig.fails("0.1.5", &["app", "no.such.registry.invalid"]);

    // Bytes that are no text, both in what the build prints and in the Dockerfile.
    let odd = "RUN printf 'before \\377\\376 \\033[2J\\r\\n after\\n' && exit 4";
    rig.publish("0.1.6", &dockerfile(odd));
    let row = rig.fails("0.1.6", &["the build of app failed"]);
    let (_, log) = rig.log(&row);
    assert!(log.contains("before") && log.contains("after"), "{log}");
    assert!(!log.contains("\u{1b}[2J"), "a control sequence came through: {log:?}");
    let told = row["phase_detail"].as_str().unwrap();
    let told = format!("{told}{}", row["failure"]);
    assert!(!told.chars().any(char::is_control), "{told:?}");

    let mut bytes = b"FROM testbed/busybox\nRUN echo '".to_vec();
    bytes.extend_from_slice(&[0xff, 0xfe, 0x80]);
    bytes.extend_from_slice(b"' && exit 5\n");
    rig.publish("0.1.7", &[Entry::file("app/Dockerfile", bytes)]);
    rig.fails("0.1.7", &["app"]);

    // The context's place is taken by a link that leads out of the tree.
    let tree = rig.repo.tree().to_owned();
    std::fs::rename(tree.join("app"), tree.join("kept")).unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("app")).unwrap();
    rig.publish("0.1.8", &[]);
    rig.fails("0.1.8", &["app"]);
    std::fs::remove_file(tree.join("app")).unwrap();
    std::fs::rename(tree.join("kept"), tree.join("app")).unwrap();

    // A link inside of the context leads out of it: it is never followed on this side.
    std::os::unix::fs::symlink("/etc", tree.join("app/out")).unwrap();
    rig.publish("0.1.9", &dockerfile("COPY out/hostname /stolen"));
    rig.fails("0.1.9", &["the build of app failed"]);
    std::fs::remove_file(tree.join("app/out")).unwrap();

    rig.goes_on("0.2.0");
}

#[test]
fn a_build_cannot_write_into_the_clone_nor_leave_its_sandbox() {
    let mut rig = Rig::start(Options::default());
    // The attempt at the context comes first, and a step that lasts gives the time to look; its zeros make it easy to find.
    let sleep = "sleep 000000006";
    let attack = "RUN --mount=type=bind,target=/c,rw touch /c/x && echo spoiled > /c/www/version && rm /c/www/index.html && \
                  test -e /c/x && test ! -e /c/www/index.html";
    let mut files = release("0.1.1");
    files[0] = Entry::file("app/Dockerfile", DOCKERFILE.replacen('\n', &format!("\n{attack}\nRUN {sleep}\n"), 1));
    rig.publish("0.1.1", &files);
    if let Some(watch) = rig.watch.take() {
        drop(watch);
    }
    let row = rig.begin("0.1.1");
    until("the step after the attack runs", || running(sleep));
    let clone = rig.home.join("work").join(row["job_id"].as_str().unwrap()).join("src");
    let in_clone = tree(&clone);
    assert_eq!(in_clone, tree(rig.repo.tree()), "the clone is not the commit any more");
    assert!(in_clone.contains_key("app/www/index.html") && !in_clone.contains_key("app/x"));
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    let (code, body) = get(rig.web, "/version", "").unwrap();
    assert_eq!((code, body.trim()), (200, "version=0.1.1;"), "later steps see the commit's files");

    // What a build may not have at all, it is refused by the engine, since nobody asks for it on the build's behalf: an old
    // one does not know the words, a newer one misses the entitlement.
    for (version, flag, name) in [("0.1.2", "--network=host", "network"), ("0.1.3", "--security=insecure", "security")]
    {
        rig.publish(version, &dockerfile(&format!("RUN {flag} id")));
        let row = rig.run(version);
        let told = format!("{}; {}", row["failure"], row["advice"]);
        eprintln!("{flag}: {told}");
        assert_eq!(row["state"], "failed_pre", "{row}");
        assert_eq!(row["running_version"], "0.1.1", "{row}");
        assert!(told.contains("app") && told.contains(name), "{name:?} is not in {told}");
        assert!(told.contains("correct the Dockerfile"), "nothing says what to do: {told}");
    }
    rig.goes_on("0.2.0");
}

/// Every file below a directory by its path, but for git's own.
fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with(".git") {
                continue;
            }
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

#[test]
fn a_build_that_hangs_ends_with_its_budget_and_in_the_engine() {
    let mut rig = Rig::start(Options { budgets: "building_seconds = 8", ..Options::default() });
    // A number that no other sleep on this machine has.
    let sleep = format!("sleep 3{}", std::process::id());
    rig.publish("0.1.1", &dockerfile(&format!("RUN {sleep}")));
    rig.begin("0.1.1");
    until("the step runs", || running(&sleep));
    let row = rig.end(Duration::from_secs(60));
    rig.failed(&row, "0.1.1", &["'building' took longer than its budget of 8 s", "app"]);
    until("the step is gone from the engine", || !running(&sleep));
    rig.goes_on("0.2.0");
}

/// The engine clips what a step prints, in size and in speed, so most of the flood ends there; what is beyond it, without any
/// clipping, is the build log's own limits, which have tests of their own.
#[test]
fn a_build_that_prints_a_gigabyte_costs_bounded_memory_and_is_told_as_any_other() {
    let mut rig = Rig::start(Options::default());
    let line = "x".repeat(1023);
    // Lines of a kibibyte, so that the number of lines is what it says; twice, in lines and in one that does not end.
    let print = format!(
        "RUN yes {line} | head -n 1048576\nRUN tr '\\0' y < /dev/zero | head -c 1073741824\nRUN echo the last words && exit 6"
    );
    rig.publish("0.1.1", &dockerfile(&print));
    let before = peak(rig.pid());
    let begun = Instant::now();
    let row = rig.fails("0.1.1", &["the build of app failed", "the last words"]);
    let took = begun.elapsed();
    let after = peak(rig.pid());
    let (code, log) = rig.log(&row);
    let stored = log.len() / 1024;
    eprintln!("2 GiB in {took:?}: memory {before} -> {after} MiB, {stored} KiB of log");
    assert_eq!(code, 200);
    assert!(log.matches("output clipped").count() >= 2, "the log does not say that something is missing");
    assert!(log.contains("the last words"), "the tail of the log is lost");
    assert!(stored > 100, "only {stored} KiB of log are kept");
    assert!(after < before + 100, "the controller grew from {before} to {after} MiB");
    rig.goes_on("0.2.0");
}

/// Highest memory of a process so far, in MiB.
fn peak(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024
}

/// Whether a process with this command line runs on the machine, containers included.
fn running(command: &str) -> bool {
    let wanted: Vec<u8> = command.split(' ').flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
    let lines = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
    lines.into_iter().any(|path| std::fs::read(path).is_ok_and(|line| line == wanted))
}

fn until(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
