//! Down to an older release, on purpose: an action of its own, which no start does by mistake.

use crate::rig::{JOB_LIMIT, Options, Rig, get, release, said};

#[test]
fn a_downgrade_is_an_action_of_its_own_and_can_be_rolled_back() {
    let mut rig = Rig::start(Options::default());
    rig.publish("0.2.0", &release("0.2.0"));
    rig.until_offered("0.2.0");
    rig.watch.take().expect("a watch").flawless();
    rig.publish("0.3.0", &release("0.3.0"));
    rig.until_offered("0.3.0");
    assert_eq!(rig.run("0.3.0")["state"], "succeeded", "{}", rig.told());

    let refused = |arguments: &[&str], parts: &[&str]| {
        let before = rig.status()["job_id"].clone();
        let out = rig.cli(arguments);
        let told = said(&out);
        assert!(out.status.code() == Some(3) && parts.iter().all(|part| told.contains(part)), "{arguments:?}: {told}");
        assert_eq!(rig.status()["job_id"], before, "{arguments:?} began a job");
    };
    refused(&["start", "0.2.0", "--yes"], &["0.2.0 is not newer than what runs (0.3.0)", "downgrade"]);
    refused(&["downgrade", "0.3.0", "--yes", "--reason", "x"], &["0.3.0 is what runs already"]);
    refused(&["downgrade", "0.9.0", "--yes", "--reason", "x"], &["the remote offers no release v0.9.0"]);
    let silent = rig.cli(&["downgrade", "0.2.0", "--yes"]);
    assert!(silent.status.code() == Some(2) && said(&silent).contains("--reason"), "{}", said(&silent));

    let down = rig.cli(&["downgrade", "0.2.0", "--yes", "--no-wait", "--json", "--reason", "0.3 forgets orders"]);
    assert!(down.status.success(), "{}", said(&down));
    let row = rig.end(JOB_LIMIT);
    assert_eq!((row["state"].as_str(), row["running_version"].as_str()), (Some("succeeded"), Some("0.2.0")), "{row}");
    assert_eq!((row["downgrade"].as_bool(), row["reason"].as_str()), (Some(true), Some("0.3 forgets orders")));
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.2.0;\n".to_owned()));
    let history = rig.history();
    let starts: Vec<_> = history.iter().filter(|event| event["event"] == "start").collect();
    assert_eq!(starts.last().map(|event| &event["downgrade"]), Some(&true.into()), "{starts:?}");

    let back = rig.cli(&["rollback", "--reason", "0.2 is worse"]);
    assert!(back.status.success(), "{}", said(&back));
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.3.0;\n".to_owned()));
}
