//! What is asked of a deployed controller from inside of its container, where the work is done (lesson 10).

use serde_json::Value;

use crate::world::{Options, World};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_doctor_and_backup_work_inside_a_deployed_controller() {
    let world = World::start(&Options::default());
    let controller = world.running().into_iter().find(|name| name.ends_with("-controller")).expect("a controller");
    let inside = |arguments: &[&str]| {
        let all = [&["exec", controller.as_str(), "replank"], arguments].concat();
        world.engine.docker_command().args(all).output().unwrap()
    };
    let out = inside(&["doctor", "--json"]);
    let found: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{out:?}"));
    for check in found["checks"].as_array().unwrap() {
        match check["name"].as_str().unwrap() {
            // The test machine's affair; and the engine's directory is not in sight from here.
            "home" | "memory" | "disk" => assert!(check["what"].is_string(), "{check}"),
            _ => assert_eq!(check["verdict"], "ok", "{check}"),
        }
    }
    let running = found["checks"].as_array().unwrap().iter().find(|check| check["name"] == "running").unwrap();
    assert!(running["what"].as_str().unwrap().contains("0.1.0"), "{running}");

    // Beside the running controller: a copy can be made, and none can be put back.
    let copy = "/tmp/copy.db";
    let made = inside(&["ledger", "backup", copy, "--json"]);
    assert!(made.status.success(), "{made:?}");
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert!(made["history"]["count"].as_u64().unwrap() > 5, "{made}");
    let refused = inside(&["ledger", "restore", copy]);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(3) && told.contains("the ledger is in use"), "{told}");
    world.verify_history();
}
