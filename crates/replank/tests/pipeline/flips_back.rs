//! A release that works until it has the traffic, and then degrades: traffic flips back by itself.

use std::time::Instant;

use reqwest::Method;
use serde_json::json;

use crate::world::{Moment, Options, World, text};

const VERSION: &str = "0.4.0";
/// Far longer than the release stays well, so that only its degrading can end it.
const WINDOW_SECONDS: u64 = 120;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_release_that_degrades_inside_its_confirm_window_flips_back() {
    let options = Options { degrades: Some(VERSION), confirm_window_seconds: WINDOW_SECONDS, ..Options::default() };
    let world = World::start(&options);
    let load = world.load();
    let begun = Instant::now();
    let job = world.start_job(&format!("v{VERSION}")).await;
    let row = world.rest(&mut vec![]).await;
    let events = world.events_of(&job).await.unwrap();
    if text(&row, "state") != "rolled_back" {
        panic!("{row:#}\n{}", world.report().await);
    }
    assert_eq!(text(&row, "running_version"), "0.1.0", "{row:#}");

    // It was proved, had the traffic, and was left for its health: in this order, each once.
    let order = ["converged", "flip_intended", "flipped_back"].map(|name| {
        let found: Vec<usize> =
            events.iter().enumerate().filter(|(_, e)| Moment(name, None).is(e)).map(|(at, _)| at).collect();
        assert_eq!(found.len(), 1, "{name}: {events:#?}");
        found[0]
    });
    assert!(order.is_sorted(), "{events:#?}");
    let why = text(&events[order[1]], "why");
    assert!(why.contains("api") && why.contains("503"), "{why:?} does not say what degraded");
    assert!(!events.iter().any(|event| event["event"] == "succeeded"), "{events:#?}");

    // Users saw the new version, then the old one, and never an error.
    let answers = load.answers_since(begun);
    assert!(answers.iter().any(|answer| answer.version == VERSION), "{VERSION} never had the traffic");
    assert!(load.flip_to("0.1.0", begun).is_some(), "0.1.0 does not serve: {:?}", answers.last());
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{} requests: {:?}", totals.requests, totals.failures);

    let body = json!({"target_version": format!("v{VERSION}"), "confirm_downtime": true});
    let (status, answer) = world.installed.call(Method::POST, "/api/upgrade/start", Some(body)).await.unwrap();
    assert_eq!(status, 409, "{answer}");
    assert!(text(&answer, "detail").contains("quarantined"), "{answer}");
    world.verify_history();
}
