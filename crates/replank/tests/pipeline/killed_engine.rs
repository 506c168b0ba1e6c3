//! The whole machine dies in each phase. What returns alone is the proxy and what was confirmed; the job ends right.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use replank_testbed::load::Load;
use serde_json::Value;

use crate::world::{JOB_LIMIT, Moment, Options, World, is_full, text};

const LOOK_EVERY: Duration = Duration::from_millis(3);
/// From the engine's first answer to the application's.
const RETURN_LIMIT: Duration = Duration::from_secs(30);
/// Those that never make room for another revision, so that they run at every moment.
const ALWAYS_UP: [&str; 3] = ["api", "controller", "frontend"];

struct Case {
    version: &'static str,
    at: At,
    /// Where the job may end: the contract leaves the controller a choice only inside the confirm window.
    ends: &'static [&'static str],
    /// Not only in the long run.
    short: bool,
}

/// The moment of the kill.
#[derive(Debug, Clone, Copy)]
enum At {
    /// As soon as the row shows this state.
    State(&'static str),
    /// As soon as this is recorded.
    Event(Moment),
    /// The same, of the rollback that follows a success.
    Back(Moment),
}

const BLUE_GREEN: [Case; 8] = [
    Case { version: "0.2.0", at: At::State("building"), ends: &["succeeded"], short: true },
    Case { version: "0.4.0", at: At::State("rolling_out"), ends: &["succeeded"], short: true },
    Case { version: "0.5.0", at: At::State("validating"), ends: &["succeeded"], short: true },
    Case { version: "0.6.0", at: At::State("confirming"), ends: &["succeeded", "rolled_back"], short: false },
    // The new controller drives by then, and does not return alone.
    Case {
        version: "0.7.0",
        at: At::Event(Moment("converged", None)),
        ends: &["succeeded", "rolled_back"],
        short: true,
    },
    Case { version: "0.8.0", at: At::State("succeeded"), ends: &["succeeded"], short: true },
    Case { version: "0.9.0", at: At::Back(Moment("rollback_start", None)), ends: &["rolled_back"], short: false },
    Case { version: "0.10.0", at: At::Back(Moment("observed", Some("cut-over"))), ends: &["rolled_back"], short: true },
];

const SINGLE: [Case; 4] = [
    Case { version: "0.2.0", at: At::Event(Moment("intended", Some("start-new"))), ends: &["succeeded"], short: false },
    Case { version: "0.4.0", at: At::Event(Moment("intended", Some("cut-over"))), ends: &["succeeded"], short: false },
    Case { version: "0.5.0", at: At::Event(Moment("observed", Some("cut-over"))), ends: &["succeeded"], short: false },
    Case { version: "0.6.0", at: At::Event(Moment("handed_over", None)), ends: &["succeeded"], short: false },
];

const RELEASES: [&str; 7] = ["0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "0.9.0", "0.10.0"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_an_engine_killed_in_any_phase_brings_back_what_was_confirmed_and_the_job_ends() {
    check("blue-green", &BLUE_GREEN).await;
    if is_full() {
        check("single", &SINGLE).await;
    }
}

async fn check(mode: &'static str, cases: &[Case]) {
    let world = World::start(&Options { mode, own_engine: true, more: &RELEASES, ..Options::default() });
    for case in cases.iter().filter(|case| case.short || is_full()) {
        eprintln!("{mode}: {}, killed at {:?}", case.version, case.at);
        killed_in(&world, case).await;
    }
}

async fn killed_in(world: &World, case: &Case) {
    let before = world.row().await;
    let job = world.start_job(&format!("v{}", case.version)).await;
    let row = match case.at {
        At::State(state) => until_state(world, &job, state).await,
        At::Event(moment) => {
            world.until_event(&job, moment).await;
            before.clone()
        }
        At::Back(moment) => {
            let row = world.rest(&mut vec![]).await;
            assert_eq!(text(&row, "state"), "succeeded", "{row:#}");
            world.installed.rollback("to be interrupted").await.unwrap();
            // Since the rollback began: the upgrade that it undoes recorded the same.
            let begun = Moment("rollback_start", None);
            world.until_event_after(&job, begun, moment).await;
            row
        }
    };
    let confirmed = text(&row, "running_revision").to_owned();
    world.engine.kill_everything().unwrap();

    // What the dead engine holds decides what the next one starts, before any controller acts.
    let returning = returning(world);
    let proxy = "replank-sample-proxy".to_owned();
    let of_confirmed = format!("replank-sample-{confirmed}-");
    let strange: Vec<_> = returning.iter().filter(|n| **n != proxy && !n.starts_with(&of_confirmed)).collect();
    assert!(strange.is_empty(), "{:?}: only {confirmed} may return, and so would {strange:?}", case.at);
    let missing: Vec<_> = ALWAYS_UP
        .iter()
        .map(|name| format!("{of_confirmed}{name}"))
        .chain([proxy.clone()])
        .filter(|name| !returning.contains(name))
        .collect();
    assert!(missing.is_empty(), "{:?}: {missing:?} would not return; {returning:?} would", case.at);

    let load = world.load();
    let killed = Instant::now();
    world.engine.start_again().unwrap();
    let up = world.running();
    eprintln!("up at once: {up:?}");
    let answers = first_answers(&load, killed).await;
    assert_eq!(answers, text(&row, "running_version"), "{:?}: the confirmed version answers first", case.at);

    let mut states = vec![];
    let ended = world.rest(&mut states).await;
    if !case.ends.contains(&text(&ended, "state")) {
        panic!("{:?}: {states:?} {ended:#}\n{}", case.at, world.report().await);
    }
    let wanted = match text(&ended, "state") {
        "succeeded" => case.version,
        _ => text(&before, "running_version"),
    };
    assert_eq!(text(&ended, "running_version"), wanted, "{:?}: {ended:#}", case.at);
    drop(load);
    let load = world.load();
    let since = Instant::now();
    assert_eq!(first_answers(&load, since).await, wanted, "{:?}", case.at);
    let policies = policies(world);
    let ended_as = format!("replank-sample-{}-", text(&ended, "running_revision"));
    for (name, policy) in &policies {
        let stays = *name == proxy || name.starts_with(&ended_as);
        assert_eq!(policy == "always", stays, "{:?}: {name} has restart policy {policy}: {policies:?}", case.at);
    }
    world.verify_history();
    eprintln!("ended as {} after {states:?}", text(&ended, "state"));
}

async fn until_state(world: &World, job: &str, state: &str) -> Value {
    let end = Instant::now() + JOB_LIMIT;
    let mut last = Value::Null;
    while Instant::now() < end {
        if let Ok(row) = world.installed.status().await {
            if text(&row, "state") == state && text(&row, "job_id") == job {
                return row;
            }
            last = row;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    panic!("{state} was not seen: {last:#}\n{}", world.report().await);
}

/// The version of the first answer of the api that was asked for since then.
async fn first_answers(load: &Load, since: Instant) -> String {
    let end = Instant::now() + RETURN_LIMIT;
    while Instant::now() < end {
        if let Some(answer) = load.answers_since(since).first() {
            return answer.version.clone();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    panic!("nothing answers: {:?}", load.totals());
}

/// Names of the containers that a starting engine will start, read from its files while it is dead.
fn returning(world: &World) -> BTreeSet<String> {
    let containers = world.engine.directory().unwrap().join("data").join("containers");
    let read = |path: std::path::PathBuf| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(containers).unwrap() {
        let dir = entry.unwrap().path();
        let policy = read(dir.join("hostconfig.json"));
        if policy["RestartPolicy"]["Name"] == "always" || policy["RestartPolicy"]["Name"] == "unless-stopped" {
            let name = read(dir.join("config.v2.json"));
            names.insert(text(&name, "Name").trim_start_matches('/').to_owned());
        }
    }
    names
}

/// The restart policy of every container of the application.
fn policies(world: &World) -> BTreeMap<String, String> {
    let ids = world.docker(&["ps", "-aq", "--filter", "label=io.replank.application=sample"]);
    let mut arguments = vec!["inspect", "-f", "{{.Name}} {{.HostConfig.RestartPolicy.Name}}"];
    arguments.extend(ids.split_whitespace());
    // What is retired may be removed between the two questions: the client then still tells about the others.
    let told = world.engine.docker_command().args(&arguments).output().unwrap().stdout;
    let told = String::from_utf8_lossy(&told);
    let pairs = told.lines().filter_map(|line| line.trim_start_matches('/').split_once(' '));
    pairs.map(|(name, policy)| (name.to_owned(), policy.to_owned())).collect()
}
