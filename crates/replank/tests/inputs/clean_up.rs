//! What job after job leaves behind goes; what runs, what a rollback needs and what is not ours stays.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::rig::{JOB_LIMIT, Options, Rig, release, said};

/// The ids of all images under one repository.
fn images(rig: &Rig, repository: &str) -> BTreeSet<String> {
    let told = rig.engine.docker(&["images", "--no-trunc", "--quiet", repository]).unwrap();
    told.lines().map(str::to_owned).collect()
}

/// The image that each container of the application was made from, running or stopped.
fn used(rig: &Rig) -> BTreeSet<String> {
    let ids = rig.engine.docker(&["ps", "--all", "--quiet", "--no-trunc"]).unwrap();
    ids.lines().map(|id| rig.engine.docker(&["inspect", "--format", "{{.Image}}", id]).unwrap()).collect()
}

#[test]
fn what_jobs_leave_behind_goes_and_what_is_needed_stays() {
    let policy = "keep_builds = 1\nkeep_logs = 2\nkeep_containers_hours = 0";
    let mut rig = Rig::prepare(Options { policy, ..Options::default() });
    let deployed = rig.cli(&["deploy", "0.1.0"]);
    assert!(deployed.status.success(), "{}", said(&deployed));
    rig.serve();
    let first = rig.status();
    // Somebody else's image under the same name lacks the installation's label.
    rig.engine.docker(&["tag", "testbed/busybox", "inputs-app:mine"]).unwrap();
    let foreign = rig.engine.docker(&["inspect", "--format", "{{.Id}}", "inputs-app:mine"]).unwrap();

    let mut built = BTreeSet::new();
    for version in ["0.2.0", "0.3.0", "0.4.0"] {
        rig.publish(version, &release(version));
        let before = images(&rig, "inputs-app");
        let row = rig.run(version);
        assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
        built = images(&rig, "inputs-app").difference(&before).cloned().collect();
    }
    assert_eq!(built.len(), 1, "the last job's image: {built:?}");

    // The running image, the one that a rollback restores, and the foreign one.
    let end = Instant::now() + Duration::from_secs(60);
    while images(&rig, "inputs-app").len() > 3 {
        assert!(Instant::now() < end, "{:?}\n{}", images(&rig, "inputs-app"), rig.told());
        std::thread::sleep(Duration::from_millis(100));
    }
    let left = images(&rig, "inputs-app");
    assert!(left.contains(&foreign), "{foreign} is not in {left:?}");
    assert!(left.is_superset(&built), "{built:?} is not in {left:?}");
    assert!(used(&rig).intersection(&left).eq(built.iter()), "only the running version has containers");
    let names = |place: &str| -> Vec<String> {
        let found = std::fs::read_dir(rig.home.join(place)).into_iter().flatten();
        found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    // Looks at releases have a place of their own there, in which nothing stays.
    let trees: Vec<String> = names("work").into_iter().filter(|name| name != "@look").collect();
    assert!(trees.is_empty(), "trees of ended jobs: {trees:?}");
    let end = Instant::now() + Duration::from_secs(30);
    while !names("work/@look").is_empty() {
        assert!(Instant::now() < end, "what looks have left: {:?}", names("work/@look"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(rig.log(&first).0, 404, "the oldest log");
    assert_eq!(rig.log(&rig.status()).0, 200, "the newest log");

    // The way back was left alone.
    let back = rig.cli(&["rollback", "--reason", "as it was"]);
    assert!(back.status.success(), "{}", said(&back));
    assert_eq!(rig.end(JOB_LIMIT)["running_version"], "0.3.0");
}
