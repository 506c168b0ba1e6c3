//! A controller that dies while it builds leaves what is built to its successor.

use std::time::Duration;

use crate::world::{Moment, Options, RESUME_LIMIT_SECONDS, World, kill_9, now, text, time_of};

/// So many that the api still builds when the others are done.
const UNITS: u32 = 6;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_killed_build_is_taken_up_without_building_anything_twice() {
    let world = World::start(&Options { units: UNITS, ..Options::default() });
    let controller = World::controller_of(text(&world.row().await, "running_revision"));
    let pid = world.pid(&controller);
    let job = world.start_job("v0.2.0").await;
    world.until_event(&job, Moment("build_intended", None)).await;
    let built = |events: &[serde_json::Value], component: &str| {
        events.iter().any(|event| event["event"] == "built" && event["component"] == component)
    };
    loop {
        let events = world.events_of(&job).await.unwrap_or_default();
        assert!(!built(&events, "api"), "the api was built before the others: {events:#?}");
        if built(&events, "frontend") && built(&events, "worker") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    kill_9(&pid);
    let killed = now();

    let row = world.rest(&mut vec![]).await;
    assert_eq!((text(&row, "state"), text(&row, "running_version")), ("succeeded", "0.2.0"), "{row:#}");
    let events = world.events_of(&job).await.unwrap();
    let resumed = events.iter().map(time_of).find(|at| *at > killed).unwrap().duration_since(killed).as_secs_f64();
    assert!(resumed <= RESUME_LIMIT_SECONDS, "went on after {resumed} s");
    for component in ["api", "controller", "frontend", "worker"] {
        let of = |name: &str| {
            events.iter().filter(|event| event["event"] == name && event["component"] == component).count()
        };
        assert_eq!((of("build_intended"), of("built")), (1, 1), "{component}: {events:#?}");
        if ["frontend", "worker"].contains(&component) {
            let log = world.log(&job, component);
            let attempts = log.lines().filter(|line| line.starts_with("--- attempt ")).count();
            assert_eq!(attempts, 1, "{component} was built once: {log}");
        }
    }
    world.verify_history();
}
