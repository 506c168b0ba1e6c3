//! The whole machine dies in each phase. What returns alone is the proxy and what was confirmed; the job ends right.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use replank_testbed::git::Fault;
use replank_testbed::load::Load;
use serde_json::Value;

use crate::world::{JOB_LIMIT, Moment, Options, World, freeze, is_full, now, text, time_of};

const LOOK_EVERY: Duration = Duration::from_millis(3);
/// From the engine's first answer to the application's.
const RETURN_LIMIT: Duration = Duration::from_secs(30);
/// More than the refs take, less than the objects of a clone.
const REFS_MAX: u64 = 3_000;
/// Those that never make room for another revision, so that they run at every moment.
const ALWAYS_UP: [&str; 3] = ["api", "controller", "frontend"];

const PROXY: &str = "replank-sample-proxy";

struct Case {
    version: &'static str,
    at: At,
    /// Where the job may end: the contract leaves the controller a choice only inside the confirm window.
    ends: &'static [&'static str],
    /// What the job must have recorded last when everything died, where the phase is too short to take that on trust.
    last: Option<&'static str>,
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
    /// When some of the release's objects have come, and not all.
    Clone,
    /// The same, of the rollback that follows a success.
    Back(Moment),
}

const DONE: &[&str] = &["succeeded"];
const CHOICE: &[&str] = &["succeeded", "rolled_back"];
const BACK: &[&str] = &["rolled_back"];

const fn case(version: &'static str, at: At, ends: &'static [&'static str], short: bool) -> Case {
    Case { version, at, ends, last: None, short }
}

const BLUE_GREEN: [Case; 11] = [
    case("0.2.0", At::State("building"), DONE, true),
    case("0.4.0", At::State("rolling_out"), DONE, true),
    case("0.5.0", At::State("validating"), DONE, true),
    case("0.6.0", At::State("confirming"), CHOICE, false),
    // The new controller drives by then, and does not return alone.
    case("0.7.0", At::Event(Moment("converged", None)), CHOICE, true),
    case("0.8.0", At::State("succeeded"), DONE, true),
    case("0.9.0", At::Back(Moment("rollback_start", None)), BACK, false),
    case("0.10.0", At::Back(Moment("observed", Some("cut-over"))), BACK, true),
    // Queued is over within milliseconds: most often the kill comes a little later.
    case("0.11.0", At::Event(Moment("start", None)), DONE, false),
    Case { last: Some("claimed"), ..case("0.12.0", At::Clone, DONE, true) },
    Case { last: Some("builds_complete"), ..case("0.13.0", At::Event(Moment("builds_complete", None)), DONE, true) },
];

const SINGLE: [Case; 4] = [
    case("0.2.0", At::Event(Moment("intended", Some("start-new"))), DONE, false),
    case("0.4.0", At::Event(Moment("intended", Some("cut-over"))), DONE, false),
    case("0.5.0", At::Event(Moment("observed", Some("cut-over"))), DONE, true),
    case("0.6.0", At::Event(Moment("handed_over", None)), DONE, false),
];

const RELEASES: [&str; 10] =
    ["0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "0.9.0", "0.10.0", "0.11.0", "0.12.0", "0.13.0"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_an_engine_killed_in_any_phase_brings_back_what_was_confirmed_and_the_job_ends() {
    check("blue-green", &BLUE_GREEN).await;
    check("single", &SINGLE).await;
}

async fn check(mode: &'static str, cases: &[Case]) {
    let world = World::start(&Options { mode, own_engine: true, more: &RELEASES, ..Options::default() });
    for case in cases.iter().filter(|case| case.short || is_full()) {
        eprintln!("{mode}: {}, killed at {:?}", case.version, case.at);
        let begun = Instant::now();
        killed_in(&world, case).await;
        eprintln!("{mode}: {} took {:.1} s", case.version, begun.elapsed().as_secs_f64());
    }
}

async fn killed_in(world: &World, case: &Case) {
    let before = world.row().await;
    let driver = world.pid(&World::controller_of(text(&before, "running_revision")));
    if matches!(case.at, At::Clone) {
        world.git.set_fault(Fault::StallAfter(REFS_MAX));
    }
    let stalled = world.git.stalled();
    let job = world.start_job(&format!("v{}", case.version)).await;
    let row = match case.at {
        At::State(state) => until_state(world, &job, state).await,
        At::Event(moment) => {
            world.until_event(&job, moment).await;
            freeze(&driver);
            before.clone()
        }
        At::Clone => {
            let end = Instant::now() + JOB_LIMIT;
            while world.git.stalled() == stalled {
                assert!(Instant::now() < end, "nothing was cloned: {}", world.report().await);
                tokio::time::sleep(LOOK_EVERY).await;
            }
            before.clone()
        }
        At::Back(moment) => {
            let row = world.rest(&mut vec![]).await;
            assert_eq!(text(&row, "state"), "succeeded", "{row:#}");
            let driver = world.pid(&World::controller_of(text(&row, "running_revision")));
            world.installed.rollback("to be interrupted").await.unwrap();
            // Since the rollback began: the upgrade that it undoes recorded the same.
            let begun = Moment("rollback_start", None);
            world.until_event_after(&job, begun, moment).await;
            freeze(&driver);
            row
        }
    };
    world.engine.kill_everything().unwrap();
    let dead = now();
    world.git.set_fault(Fault::None);

    // What the dead engine holds decides what the next one starts, before any controller acts.
    let returning = returning(world);
    let load = world.load();
    let killed = Instant::now();
    world.engine.start_again().unwrap();
    let up = world.running();
    eprintln!("up at once: {up:?}");
    let answers = first_answers(&load, killed).await;

    let mut states = vec![];
    let ended = world.rest(&mut states).await;
    if !case.ends.contains(&text(&ended, "state")) {
        panic!("{:?}: {states:?} {ended:#}\n{}", case.at, world.report().await);
    }
    let events = world.events_of(&job).await.unwrap();
    let until = || events.iter().rev().filter(|event| time_of(event) <= dead);
    let last = until().next().map(|event| text(event, "event"));
    eprintln!("the last event before the end was {last:?}");
    assert!(case.last.is_none() || last == case.last, "{:?} was not hit: {last:?}\n{events:#?}", case.at);
    // What is proved is settled within milliseconds, one container after the other: a kill that came during that, and not
    // before it as was wanted, leaves some of both sides, and the record says so.
    let settling = until().map(|event| text(event, "op")).find(|op| !op.is_empty()) == Some("settle");
    let confirmed = [&row].into_iter().chain(settling.then_some(&ended));
    what_returns(case, &returning, &confirmed.clone().map(|row| text(row, "running_revision")).collect::<Vec<_>>());
    let mut versions = confirmed.map(|row| text(row, "running_version"));
    assert!(
        versions.any(|version| version == answers),
        "{:?}: the confirmed version answers first: {answers}",
        case.at
    );
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
        let stays = name == PROXY || name.starts_with(&ended_as);
        assert_eq!(policy == "always", stays, "{:?}: {name} has restart policy {policy}: {policies:?}", case.at);
    }
    world.verify_history();
    eprintln!("ended as {} after {states:?}", text(&ended, "state"));
}

/// Containers of these revisions return and of no other, and of one of them all that serve.
fn what_returns(case: &Case, returning: &BTreeSet<String>, revisions: &[&str]) {
    let prefixes: Vec<_> = revisions.iter().map(|revision| format!("replank-sample-{revision}-")).collect();
    let is_of_one = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let strange: Vec<_> = returning.iter().filter(|name| *name != PROXY && !is_of_one(name)).collect();
    assert!(strange.is_empty(), "{:?}: only {revisions:?} may return, and so would {strange:?}", case.at);
    let serves = |prefix: &String| ALWAYS_UP.iter().all(|name| returning.contains(&format!("{prefix}{name}")));
    let whole = returning.contains(PROXY) && prefixes.iter().any(serves);
    assert!(whole, "{:?}: the proxy and one of {revisions:?} should return; {returning:?} would", case.at);
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
