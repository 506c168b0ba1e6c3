//! A controller inside a container of the application: it probes through the proxy by name, and never retires itself.
//!
//! The test's own program, which is static, is run in a container as the controller would be.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use replank_adapters::platform::docker::config::DockerConfig;
use replank_adapters::platform::docker::{DockerPlatform, Vantage, names};
use replank_core::fault::Class;
use replank_core::ports::{Ask, Change, Platform as _, Probed};
use replank_core::record::Deployment;
use serde::{Deserialize, Serialize};

use crate::fixture::{App, WallClock};
use crate::{name, shift, start, stop};

const INPUT: &str = "REPLANK_TEST_INSIDE";

#[derive(Debug, Serialize, Deserialize)]
struct Input {
    config: DockerConfig,
    mine: Deployment,
    serving: Deployment,
    /// Both its own revision's, which has to make room, and to be retired.
    tries: Vec<Change>,
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of a_controller_inside_proves_through_the_proxy_and_never_retires_itself, which runs it in a container"]
async fn as_a_controller() {
    let file = std::env::var_os(INPUT).expect("the other test runs this one");
    let input: Input = serde_json::from_slice(&std::fs::read(file).expect("input")).expect("input");
    let vantage = Vantage::Inside(input.mine.revision.clone());
    let platform = DockerPlatform::new(input.config, vantage, Arc::new(WallClock)).expect("platform");
    let ask = Ask { direct: vec![input.mine.clone(), input.serving.clone()], through: Some(input.serving.clone()) };
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let seen = platform.observe(&ask).await.expect("observe");
        let direct = [&input.mine, &input.serving].map(|d| &seen.revisions[&d.revision].probed);
        if seen.traffic.probed == Probed::Passed && direct == [&Probed::Passed; 2] {
            break;
        }
        assert!(Instant::now() < end, "{seen:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The road is the real one: what it expects is not what it gets.
    let wrong = Deployment { version: "0.9.0".parse().expect("version"), ..input.serving.clone() };
    let seen = platform.observe(&Ask { direct: vec![], through: Some(wrong) }).await.expect("observe");
    assert!(matches!(&seen.traffic.probed, Probed::Failed(why) if why.contains("expected 0.9.0")), "{seen:?}");
    for change in &input.tries {
        match platform.change(change).await {
            Err(fault) => {
                assert_eq!(fault.class, Class::Conflict, "{}", fault.chain());
                println!("refused: {}", fault.what);
            }
            Ok(()) => println!("done"),
        }
    }
}

/// Runs the part above in a container on a revision's network; answers what it said of each change.
fn inside(app: &App, mine: &Deployment, serving: &Deployment, tries: &[Change]) -> Vec<String> {
    let input =
        Input { config: app.config.clone(), mine: mine.clone(), serving: serving.clone(), tries: tries.to_vec() };
    let file = app.config.home.join("inside.json");
    std::fs::write(&file, serde_json::to_vec(&input).expect("input")).expect("write");
    let (home, socket) = (app.config.home.display(), app.config.socket.display());
    let program = std::env::current_exe().expect("this program");
    let said = app.docker(&[
        "run",
        "--rm",
        "--network",
        &names::network(&app.config.application, &mine.revision),
        "--env",
        &format!("{INPUT}={}", file.display()),
        "--volume",
        &format!("{home}:{home}"),
        "--volume",
        &format!("{socket}:{socket}"),
        "--volume",
        &format!("{}:/controller:ro", program.display()),
        &app.image("0.1.0"),
        "/controller",
        "--exact",
        "inside::as_a_controller",
        "--ignored",
        "--nocapture",
    ]);
    assert!(said.contains("1 passed"), "{said}");
    said.lines().filter(|line| *line == "done" || line.starts_with("refused")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_inside_proves_through_the_proxy_and_never_retires_itself() {
    let app = App::with("inside", |config| {
        config.containers.get_mut(&name("web")).expect("web").controller = true;
        // The published port is the host's; inside, the proxy listens elsewhere.
        config.listeners.get_mut("web").expect("web").listen = Some(8099);
    })
    .await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    assert!(inside(&app, &blue, &blue, &[]).is_empty());

    app.does(&start(&green)).await;
    app.does(&shift(&green, 2, None)).await;
    let remove = Change::Remove { revision: blue.revision.clone() };
    let worker = Change::Stop { deployment: blue.clone(), containers: BTreeSet::from([name("worker")]) };
    // Nothing but its own revision keeps it from these: traffic goes elsewhere.
    let said = inside(&app, &blue, &green, &[remove.clone(), stop(&blue), worker]);
    assert_eq!(said.len(), 3, "{said:?}");
    for refused in &said[..2] {
        assert!(refused.contains("revision r1 is the one that this controller runs in"), "{said:?}");
    }
    assert_eq!(said[2], "done", "what makes room for its successor is its own to stop");
    assert_eq!(app.state("{{.State.Running}}", &blue), ["true", "false"]);
    // The other one's controller may.
    let said = inside(&app, &green, &green, &[]);
    assert!(said.is_empty());
    let successor = app.platform_at(Vantage::Inside(green.revision.clone()));
    for change in [stop(&blue), remove] {
        successor.change(&change).await.expect("the successor retires it");
    }
}
