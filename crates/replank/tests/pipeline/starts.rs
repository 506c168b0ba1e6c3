//! Who may start, when many want to at once; and who may serve.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use replank_testbed::process;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::world::{Options, World, text};

const CALLERS: usize = 200;
const REFUSAL_LIMIT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_one_of_many_starts_wins_and_a_repeated_one_is_the_same_job() {
    let world = World::start(&Options { more: &["0.4.0", "0.4.1"], ..Options::default() });

    let distinct = |i: usize| {
        let version = if i.is_multiple_of(2) { "v0.2.0" } else { "v0.4.0" };
        json!({"target_version": version, "confirm_downtime": true, "reason": format!("caller {i}")})
    };
    let answers = at_once(&world, distinct).await;
    assert_eq!(count(&answers), BTreeMap::from([(202, 1), (409, CALLERS - 1)]), "{answers:?}");
    let won = answers.iter().find(|(status, _)| *status == 202).unwrap();
    finish(&world, text(&won.1, "job_id")).await;

    // A later job, whatever came of the first: it may have been too fast to be cancelled, and this target is newer in any case.
    let same = |_| json!({"target_version": "v0.4.1", "confirm_downtime": true, "idempotency_key": "one-click"});
    let answers = at_once(&world, same).await;
    assert_eq!(count(&answers), BTreeMap::from([(202, CALLERS)]), "{answers:?}");
    let job = text(&answers[0].1, "job_id");
    assert!(!job.is_empty() && answers.iter().all(|(_, row)| text(row, "job_id") == job), "{answers:?}");
    let events = world.installed.history().await.unwrap();
    let started = events.iter().filter(|e| e["event"] == "start" && e["job_id"] == job).count();
    assert_eq!(started, 1, "{events:#?}");
    finish(&world, job).await;
    world.verify_history();
}

async fn at_once(world: &World, body: impl Fn(usize) -> Value) -> Vec<(u16, Value)> {
    let mut calls = JoinSet::new();
    for i in 0..CALLERS {
        let (installed, body) = (world.installed.clone(), body(i));
        calls.spawn(async move { installed.call(Method::POST, "/api/upgrade/start", Some(body)).await.unwrap() });
    }
    calls.join_all().await
}

fn count(answers: &[(u16, Value)]) -> BTreeMap<u16, usize> {
    let mut counted = BTreeMap::new();
    for (status, _) in answers {
        *counted.entry(*status).or_default() += 1;
    }
    counted
}

/// Cancels while that is possible; otherwise the job runs to its end.
async fn finish(world: &World, job: &str) {
    let body = json!({"reason": "seen enough"});
    let (status, answer) = world.installed.call(Method::POST, "/api/upgrade/cancel", Some(body)).await.unwrap();
    assert!((200..300).contains(&status) || status == 409, "{status} {answer}");
    let row = world.rest(&mut vec![]).await;
    assert_eq!(text(&row, "job_id"), job);
    let wanted = if status == 409 { "succeeded" } else { "failed_pre" };
    assert_eq!(text(&row, "state"), wanted, "{row:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_second_controller_of_one_revision_is_refused() {
    let world = World::start(&Options::default());
    let revision = text(&world.row().await, "running_revision").to_owned();
    let controller = World::controller_of(&revision);

    let mut inside = world.engine.docker_command();
    inside.args(["exec", &controller, "/usr/local/bin/replank", "serve", "--listen", "127.0.0.1:9099"]);
    refused(inside);

    let mut outside = world.installed.command(&["serve", "--listen", "127.0.0.1:0"]);
    outside.env("REPLANK_REVISION", &revision);
    refused(outside);

    // The first one did not notice.
    assert_eq!(text(&world.row().await, "running_revision"), revision);
}

fn refused(mut command: Command) {
    let out = process::output(&mut command, REFUSAL_LIMIT).unwrap();
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{told}");
    let lines: Vec<&str> = told.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "{told}");
    assert!(lines[0].contains("another replank process serves"), "{told}");
}
