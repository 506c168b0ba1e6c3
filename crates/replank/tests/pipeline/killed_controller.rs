//! The controller that drives is killed in the middle of replacing its own container, and a successor finishes.

use crate::world::{JOB_LIMIT, Moment, Options, RESUME_LIMIT_SECONDS, World, is_full, kill_9, now, text, time_of};

/// Each with a release to upgrade to.
const SINGLE: [(Moment, &str); 6] = [
    (Moment("intended", Some("start-new")), "0.2.0"),
    (Moment("intended", Some("cut-over")), "0.4.0"),
    (Moment("handed_over", None), "0.5.0"),
    (Moment("escape_hatch", None), "0.6.0"),
    (Moment("observed", Some("start-new")), "0.7.0"),
    (Moment("observed", Some("settle")), "0.8.0"),
];
const BLUE_GREEN: [(Moment, &str); 6] = [
    (Moment("escape_hatch", None), "0.2.0"),
    (Moment("cut_over_intended", None), "0.4.0"),
    (Moment("handed_over", None), "0.5.0"),
    (Moment("intended", Some("start-new")), "0.6.0"),
    (Moment("observed", Some("start-new")), "0.7.0"),
    (Moment("observed", Some("settle")), "0.8.0"),
];
const RELEASES: [&str; 5] = ["0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_killed_controller_s_swap_is_finished_in_single_mode() {
    check("single", &SINGLE, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_killed_controller_s_swap_is_finished_in_blue_green_mode() {
    check("blue-green", &BLUE_GREEN, 3).await;
}

/// The first `short` cases, or all of them.
async fn check(mode: &'static str, cases: &[(Moment, &str)], short: usize) {
    let mut world = World::start(&Options { mode, more: &RELEASES, ..Options::default() });
    let cases = if is_full() { cases } else { &cases[..short] };
    for (moment, version) in cases {
        eprintln!("{mode}: {version}, killed at {moment:?}");
        killed_at(&mut world, *moment, version).await;
    }
}

async fn killed_at(world: &mut World, moment: Moment, version: &str) {
    let load = world.load();
    world.watch_creations();
    // Known beforehand, so that the kill follows the event at once.
    let mut victim = World::controller_of(text(&world.row().await, "running_revision"));
    let mut pid = world.pid(&victim);
    let job = world.start_job(&format!("v{version}")).await;
    let event = world.until_event(&job, moment).await;
    let driver = world.driver().await;
    if World::controller_of(&driver) != victim {
        victim = World::controller_of(&driver);
        pid = world.pid(&victim);
    }
    kill_9(&pid);
    let killed = now();
    eprintln!("killed {victim} {} after {moment:?}", killed.duration_since(time_of(&event)).as_millis());

    let mut states = vec![];
    let row = world.rest(&mut states).await;
    let events = world.events_of(&job).await.unwrap();
    let report = || format!("{moment:?} {states:?} {row:#}\n{events:#?}");
    if text(&row, "state") != "succeeded" {
        panic!("{}\n{}", report(), world.report().await);
    }
    assert_eq!(text(&row, "running_version"), version, "{}", report());
    // The kill may have come when everything was recorded already; otherwise somebody went on.
    let went_on = events.iter().map(time_of).find(|at| *at > killed);
    let resumed = went_on.map_or(0.0, |at| at.duration_since(killed).as_secs_f64());
    eprintln!("went on after {resumed:.1} s");
    assert!(resumed <= RESUME_LIMIT_SECONDS, "went on after {resumed} s: {}", report());

    let revision = text(&row, "running_revision");
    let made = world.creations();
    let wanted: Vec<String> =
        ["api", "controller", "frontend", "worker"].map(|name| format!("replank-sample-{revision}-{name}")).into();
    assert_eq!(made.keys().cloned().collect::<Vec<_>>(), wanted, "{}", report());
    assert!(made.values().all(|times| *times == 1), "{made:?}: {}", report());

    world.verify_history();
    // What serves in the end is asked for, not taken from the record.
    let since = std::time::Instant::now();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let answers = load.answers_since(since);
    assert!(!answers.is_empty() && answers.iter().all(|answer| answer.version == version), "{answers:?}");
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{} requests: {:?}\n{}", totals.requests, totals.failures, report());
    // The new revision's controller takes over for good before the next upgrade begins.
    let end = std::time::Instant::now() + JOB_LIMIT;
    while world.driver().await != revision {
        assert!(std::time::Instant::now() < end, "the new controller never drove: {}", world.report().await);
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}
