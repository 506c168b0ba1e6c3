//! A job that only builds: nothing that runs is touched, and the next job of its commit takes its images.

use serde_json::Value;

use crate::rig::{JOB_LIMIT, Options, Rig, get, release, said};

fn start(rig: &Rig, arguments: &[&str]) -> Value {
    let mut all = vec!["start", "--yes", "--no-wait", "--json"];
    all.extend(arguments);
    let out = rig.cli(&all);
    assert!(out.status.success(), "{}", said(&out));
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    row
}

#[test]
fn what_was_only_built_goes_straight_to_the_swap() {
    let mut rig = Rig::start(Options::default());
    rig.publish("0.2.0", &release("0.2.0"));
    let before = rig.status();
    rig.until_offered("0.2.0");
    let row = start(&rig, &["0.2.0", "--build-only"]);
    for untouched in ["running_version", "running_sha", "running_revision", "current_images", "rollback_target"] {
        assert_eq!(row[untouched], before[untouched], "{untouched}");
    }
    assert_eq!((row["build_only"].as_bool(), row["target_version"].as_str()), (Some(true), Some("0.2.0")), "{row}");
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.1.0;\n".to_owned()));
    let built = |job: &Value| -> Vec<Value> {
        rig.history().into_iter().filter(|e| e["event"] == "built" && e["job_id"] == *job).collect()
    };
    let first = built(&row["job_id"]);
    assert_eq!((first.len(), first[0]["adopted"].as_bool()), (1, Some(false)), "{first:?}");

    let row = start(&rig, &["0.2.0"]);
    assert_eq!((row["running_version"].as_str(), row["build_only"].as_bool()), (Some("0.2.0"), Some(false)), "{row}");
    let second = built(&row["job_id"]);
    assert_eq!((&second[0]["image"], second[0]["adopted"].as_bool()), (&first[0]["image"], Some(true)), "{second:?}");
    assert!(rig.log(&row).1.contains("made of the same commit by an earlier job"), "{}", rig.log(&row).1);
    assert_eq!(get(rig.web, "/version", "").map(|(_, body)| body), Some("version=0.2.0;\n".to_owned()));
    rig.watch.take();
    rig.goes_on("0.3.0");
}
