//! Somebody's hand on what runs: it is told, keeps upgrades from starting until it is accepted, and is never in a rollback's way.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::{Options, Rig, get, release, said};

/// The row, once it tells of this much drift.
fn until(rig: &Rig, wanted: impl Fn(&[Value]) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let row = rig.status();
        if wanted(row["drift"].as_array().expect("a list")) {
            return row;
        }
        assert!(Instant::now() < end, "{row}\n{}", rig.told());
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn container(rig: &Rig) -> String {
    let filter = "label=io.replank.container=app";
    let all = rig.engine.docker(&["ps", "--all", "--quiet", "--filter", filter]).expect("containers");
    all.lines().next().unwrap_or_else(|| panic!("no container carries {filter}")).to_owned()
}

#[test]
fn what_was_stopped_by_hand_is_told_and_keeps_an_upgrade_from_starting_until_it_is_accepted() {
    let mut rig = Rig::start(Options { policy: "drift_after_seconds = 2", ..Options::default() });
    rig.watch.take().expect("a watch").flawless();
    assert_eq!(rig.status()["drift"], serde_json::json!([]));
    let shown = rig.cli(&["drift"]);
    assert!(shown.status.success() && said(&shown).contains("what runs is what was recorded"), "{}", said(&shown));
    let nothing = rig.cli(&["drift", "--accept", "--reason", "x"]);
    assert_eq!(nothing.status.code(), Some(3), "{}", said(&nothing));

    let id = container(&rig);
    rig.engine.docker(&["stop", "--time", "1", &id]).expect("it stops");
    let row = until(&rig, |drift| !drift.is_empty());
    let sentence = row["drift"][0].as_str().expect("a sentence");
    assert!(sentence.starts_with("container app is stopped"), "{sentence}");
    rig.publish("0.2.0", &release("0.2.0"));
    rig.until_offered("0.2.0");
    let refused = rig.cli(&["start", "0.2.0", "--yes", "--no-wait"]);
    let told = said(&refused);
    assert!(
        refused.status.code() == Some(3) && told.contains(sentence) && told.contains("replank drift --accept"),
        "{told}"
    );
    assert_eq!(rig.status()["job_id"], row["job_id"], "no job was begun");

    // Put right, it is gone by itself.
    rig.engine.docker(&["start", &id]).expect("it starts");
    until(&rig, <[Value]>::is_empty);
    rig.engine.docker(&["stop", "--time", "1", &id]).expect("it stops");
    until(&rig, |drift| !drift.is_empty());
    let shown = rig.cli(&["drift"]);
    assert!(shown.status.success() && said(&shown).contains("no upgrade starts until"), "{}", said(&shown));
    let unsaid = rig.cli(&["drift", "--accept"]);
    assert_eq!(unsaid.status.code(), Some(2), "{}", said(&unsaid));
    let accepted = rig.cli(&["drift", "--accept", "--reason", "it eats the disk"]);
    assert!(
        accepted.status.success() && said(&accepted).contains("accepted: an upgrade may start"),
        "{}",
        said(&accepted)
    );

    let row = rig.run("0.2.0");
    assert_eq!((row["state"].as_str(), row["running_version"].as_str()), (Some("succeeded"), Some("0.2.0")), "{row}");
    assert_eq!(row["drift"], serde_json::json!([]), "it went with what was replaced");
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.2.0;\n".to_owned()));
    let told: Vec<Value> = rig.history();
    let names: Vec<&str> = told.iter().filter_map(|event| event["event"].as_str()).collect();
    let of_drift: Vec<&str> = names.into_iter().filter(|name| name.starts_with("drift")).collect();
    assert_eq!(of_drift, ["drift_seen", "drift_gone", "drift_seen", "drift_accepted"]);
    let accepted = told.iter().find(|event| event["event"] == "drift_accepted").expect("a line");
    assert_eq!((&accepted["reason"], &accepted["actor"]["name"]), (&"it eats the disk".into(), &"admin".into()));

    // By hand again, and the way back is open all the same.
    rig.engine.docker(&["stop", "--time", "1", &container(&rig)]).expect("it stops");
    let back = rig.cli(&["rollback", "--reason", "it was better"]);
    assert!(back.status.success(), "{}", said(&back));
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.1.0;\n".to_owned()));
}
