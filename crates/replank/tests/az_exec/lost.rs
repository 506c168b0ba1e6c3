//! An `az` that dies leaves its build running in the registry's service: its image is taken, and nothing is built twice.

use std::time::Duration;

use crate::rig::{Options, Rig};

const WAITS: &str = "an earlier az may have left its build running";
const BEGUN: Duration = Duration::from_secs(60);

/// The exec server is killed in the middle of a build, and comes back.
#[test]
fn a_killed_exec_server_s_build_is_adopted() {
    let mut rig = Rig::start(Options::default());
    rig.az.set_mode("elb-api", "detach").unwrap();
    rig.begin(&["1.0.0"]);
    rig.az.until_detached(BEGUN).unwrap();
    rig.exec.as_mut().unwrap().kill();
    rig.start_exec();
    rig.until("it is waited for", |rig| rig.log(&rig.status(), "api").contains(WAITS));
    rig.az.go().unwrap();
    let row = rig.end();
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    let builds = rig.az.builds().unwrap();
    let of_api = builds.iter().filter(|call| call.arguments.iter().any(|word| word == "elb-api:v1.0.0")).count();
    assert_eq!((of_api, builds.len()), (1, 3), "{builds:?}");
    let log = rig.log(&row, "api");
    assert!(log.contains("an earlier attempt's build pushed it"), "{log}");
}

/// The same for the controller: its successor knows nothing but the record.
#[test]
fn a_killed_controller_s_build_is_adopted() {
    let mut rig = Rig::start(Options::default());
    rig.az.set_mode("elb-api", "detach").unwrap();
    rig.begin(&["1.0.0"]);
    rig.az.until_detached(BEGUN).unwrap();
    rig.serving.as_mut().unwrap().kill();
    // The channel's client is gone, so its az is killed; the registry's service does not care.
    rig.until("the server has seen it go", |rig| rig.exec.as_ref().unwrap().told().contains("\"client_aborted\":true"));
    rig.serve();
    rig.until("it is waited for", |rig| rig.log(&rig.status(), "api").contains(WAITS));
    rig.az.go().unwrap();
    let row = rig.end();
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    assert_eq!(rig.az.builds().unwrap().len(), 3, "{:?}", rig.az.builds());
}

/// Where nothing comes, another build is begun after the wait.
#[test]
fn a_build_that_never_comes_is_begun_again() {
    let home = tempfile::tempdir().unwrap();
    let mut rig = Rig::prepare(Options::default());
    // The wait is for people who know their builds; here it is a file's.
    let config = format!(
        "application = \"control-plane\"\nplatform = \"none\"\n[build]\nbuilder = \"az-exec\"\n[exec]\nwait_out_seconds = 1\n\
         [components.api]\nrepository = \"elb-api\"\ndockerfile = \"api/Dockerfile\"\n[server]\nlisten = \"127.0.0.1:1\"\n# {}\n",
        home.path().display()
    );
    std::fs::write(rig.home.join("replank.toml"), config).unwrap();
    rig.start_exec();
    rig.serve();
    rig.az.set_mode("elb-api", "detach").unwrap();
    rig.begin(&["1.0.0"]);
    rig.az.until_detached(BEGUN).unwrap();
    rig.az.set_mode("elb-api", "build").unwrap();
    rig.exec.as_mut().unwrap().kill();
    rig.start_exec();
    let row = rig.end();
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    assert_eq!(rig.az.builds().unwrap().len(), 2);
    assert!(rig.log(&row, "api").contains("no image came; building again"));
    // The first one's build is let go, so that it does not outlive the test.
    rig.az.go().unwrap();
}
