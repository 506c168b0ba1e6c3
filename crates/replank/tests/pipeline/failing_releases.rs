//! A release that starts and fails its probes: held by default, rolled back by the system where the policy says so.

use std::time::Instant;

use crate::world::{Options, World, is_full, text};

/// As short as the configuration allows: a release that never answers is given up when the time is over.
const BLUE_GREEN: &str = "budgets = { validating_seconds = 60 }";
/// Without a validation of its own the rollout as a whole is given up; enough for the good releases.
const SINGLE: &str = "budgets = { rolling_out_seconds = 20 }";
const ROLLBACK: &str = "on_rollout_failure = \"rollback\"";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_bad_release_is_held_and_the_next_start_works() {
    let world = World::start(&Options { policy: &[BLUE_GREEN], ..Options::default() });
    let load = world.load();
    let begun = Instant::now();
    let job = world.start_job("v0.3.0").await;
    let row = world.rest(&mut vec![]).await;
    assert_eq!((text(&row, "state"), text(&row, "job_id")), ("failed_rollout", job.as_str()), "{row:#}");
    assert_eq!(text(&row, "running_version"), "0.1.0");
    let strange: Vec<_> = load.answers_since(begun).into_iter().filter(|answer| answer.version != "0.1.0").collect();
    assert!(strange.is_empty(), "0.1.0 serves throughout: {strange:?}");

    world.start_job("v0.2.0").await;
    let row = world.rest(&mut vec![]).await;
    assert_eq!((text(&row, "state"), text(&row, "running_version")), ("succeeded", "0.2.0"), "{row:#}");
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{:?}", totals.failures);
    world.verify_history();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_bad_release_is_rolled_back_by_the_system() {
    rolled_back("single", &[SINGLE, ROLLBACK]).await;
    if is_full() {
        rolled_back("blue-green", &[BLUE_GREEN, ROLLBACK]).await;
    }
}

async fn rolled_back(mode: &'static str, policy: &'static [&'static str]) {
    let world = World::start(&Options { mode, policy, ..Options::default() });
    let load = world.load();
    let job = world.start_job("v0.3.0").await;
    let row = world.rest(&mut vec![]).await;
    if text(&row, "state") != "rolled_back" {
        panic!("{row:#}\n{}", world.report().await);
    }
    assert_eq!(text(&row, "running_version"), "0.1.0", "{row:#}");
    let events = world.events_of(&job).await.unwrap();
    let begun: Vec<_> = events.iter().filter(|event| event["event"] == "rollback_start").collect();
    assert_eq!(begun.len(), 1, "{events:#?}");
    assert_eq!(begun[0]["actor"]["oid"], "system", "{begun:?}");
    assert!(events.iter().any(|event| event["event"] == "rollback_done"), "{events:#?}");
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{:?}", totals.failures);
    world.verify_history();
}
