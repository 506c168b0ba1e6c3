//! Disks that are full, and disks that are no place for a ledger.

use std::time::{Duration, Instant};

use replank_testbed::EngineOptions;
use replank_testbed::remains::Scratch;
use replank_testbed::repo::Entry;

use crate::rig::{JOB_LIMIT, Mounted, Options, Rig, refused, release, said};

#[test]
fn a_full_home_is_told_and_the_job_can_be_started_again() {
    let place = Scratch::create().unwrap();
    let small = Mounted::in_memory(&place.path().join("small"), 64);
    let mut rig = Rig::start(Options { home: Some(small.0.join("home")), ..Options::default() });
    rig.publish("0.1.1", &release("0.1.1"));
    let ballast = small.fill();

    let out = rig.cli(&["start", "0.1.1", "--yes", "--no-wait"]);
    eprintln!("{}", said(&out).trim());
    refused(&out, 4, &["full", "free space"]);
    // Reading goes on.
    assert_eq!(rig.status()["state"], "succeeded");

    std::fs::remove_file(&ballast).unwrap();
    let row = rig.run("0.1.1");
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    if let Some(watch) = rig.watch.take() {
        drop(watch);
    }

    // Full in the middle of a build: it stands still, says why, and goes on by itself when there is space.
    let slow = "FROM testbed/busybox\nRUN sleep 4\nCOPY www /www\nCMD [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n";
    let mut files = release("0.1.2");
    files[0] = Entry::file("app/Dockerfile", slow);
    rig.publish("0.1.2", &files);
    rig.begin("0.1.2");
    while rig.status()["state"] != "building" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let ballast = small.fill();
    let end = Instant::now() + Duration::from_secs(60);
    let mut row = rig.status();
    // The build itself ends well; its log waits for the disk for a while before the outcome is recorded.
    while !row["next_action"].as_str().unwrap_or_default().contains("full") {
        assert!(Instant::now() < end, "the full disk is not told: {row}");
        std::thread::sleep(Duration::from_millis(100));
        row = rig.status();
    }
    assert_eq!(row["state"], "building", "{row}");
    assert!(rig.told().contains("the disk that holds the ledger is full"), "{}", rig.told());
    std::fs::remove_file(&ballast).unwrap();
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    rig.goes_on("0.2.0");
    drop(rig);
}

#[test]
fn a_disk_that_is_too_small_for_the_clone_is_told_with_advice() {
    let mut rig = Rig::prepare(Options { budgets: "fetching_seconds = 6", ..Options::default() });
    // Of the clones alone: the ledger has its own disk, and goes on.
    let work = rig.home.join("work");
    let small = Mounted::in_memory(&work, 40);
    let deployed = rig.cli(&["deploy", "0.1.0"]);
    assert!(deployed.status.success(), "{}", said(&deployed));
    rig.serve();

    // Does not get smaller by compression; lies outside of the context, so that nothing but the clone has to take it.
    let mut noise = vec![0u8; 24 << 20];
    getrandom(&mut noise);
    let mut files = release("0.1.1");
    files.push(Entry::file("big", noise));
    rig.publish("0.1.1", &files);
    rig.fails("0.1.1", &["git clone failed", "free some space on the disk of", work.to_str().unwrap()]);
    rig.repo.remove(&["big"], "smaller").unwrap();
    rig.goes_on("0.2.0");
    drop(rig);
    drop(small);
}

fn getrandom(bytes: &mut [u8]) {
    use std::io::Read as _;
    std::fs::File::open("/dev/urandom").unwrap().read_exact(bytes).unwrap();
}

#[test]
fn a_full_engine_fails_the_build_with_advice() {
    let place = Scratch::create().unwrap();
    let small = Mounted::in_memory(&place.path().join("data"), 600);
    let engine = EngineOptions { arguments: vec!["--storage-driver=vfs".to_owned()], data_root: Some(small.0.clone()) };
    let mut rig = Rig::start(Options { engine, ..Options::default() });
    let big = "FROM testbed/busybox\nRUN dd if=/dev/zero of=/big bs=1M count=700\n";
    rig.publish("0.1.1", &[Entry::file("app/Dockerfile", big)]);
    rig.fails("0.1.1", &["the build of app failed", "space"]);
    rig.goes_on("0.2.0");
    drop(rig);
}

/// The home lies on a file system in user space, as sshfs and mounted buckets are.
#[test]
fn a_ledger_on_a_network_file_system_is_refused() {
    let place = Scratch::create().unwrap();
    let shared = Mounted::through_fuse(&place.path().join("real"), &place.path().join("seen"));
    let rig = Rig::prepare(Options { home: Some(place.path().join("home")), ..Options::default() });
    let config = std::fs::read_to_string(rig.home.join("replank.toml")).unwrap();
    std::fs::write(shared.0.join("replank.toml"), config).unwrap();
    let file = shared.0.join("replank.toml");
    for command in [&["serve"][..], &["deploy"], &["token", "create", "someone", "--role", "reader"]] {
        let config = ["--config", file.to_str().unwrap()];
        let out = rig.cli(&[&config, command].concat());
        let line = refused(&out, 1, &["lies on FUSE", "a directory on a local disk"]);
        assert!(line.contains(shared.0.join("ledger").to_str().unwrap()), "{line}");
    }
    let left: Vec<_> = std::fs::read_dir(shared.0.join("ledger")).unwrap().collect();
    assert!(left.is_empty(), "something was made: {left:?}");
}
