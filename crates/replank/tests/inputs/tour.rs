//! Every command as a new user types it, against a running installation.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::{Options, Rig, refused, release, said};

fn show(rig: &Rig, arguments: &[&str]) -> Output {
    let out = rig.cli(arguments);
    eprintln!("$ replank {}\n{}", arguments.join(" "), said(&out));
    out
}

/// It went well, and what it says holds all of `parts`.
#[track_caller]
fn well(rig: &Rig, arguments: &[&str], parts: &[&str]) -> String {
    let out = show(rig, arguments);
    let text = said(&out);
    assert!(out.status.success(), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    // A command is no log.
    assert!(!text.contains(" INFO ") && !text.contains('\u{1b}'), "{text}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[track_caller]
fn json(rig: &Rig, arguments: &[&str]) -> Value {
    let out = show(rig, &[arguments, &["--json"]].concat());
    assert!(out.status.success(), "{}", said(&out));
    // One object, or one a line where something is followed: the last one counts.
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    serde_json::from_str(text.trim().lines().last().unwrap_or_default()).expect("JSON")
}

/// Contract §3: the commands of the escape hatch stand in the history before the platform is touched.
fn the_way_back_was_told_first(rig: &Rig) {
    let job = rig.status()["job_id"].clone();
    let events: Vec<Value> = rig.history().into_iter().filter(|e| e["job_id"] == job).collect();
    let first =
        |name: &str| events.iter().position(|e| e["event"] == name).unwrap_or_else(|| panic!("no {name}: {events:?}"));
    assert!(first("escape_hatch") < first("intended"), "{events:?}");
    let commands = events[first("escape_hatch")]["commands"].as_array().cloned().unwrap_or_default();
    assert!(commands.iter().any(|c| c.as_str().is_some_and(|c| c.contains("docker"))), "{commands:?}");
}

/// On a real engine, remote and, where one is configured, registry. Disk and memory are the test machine's affair.
fn all_that_an_upgrade_needs_is_there(rig: &Rig) {
    let out = show(rig, &["doctor", "--json"]);
    let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let checks = found["checks"].as_array().cloned().unwrap_or_default();
    assert!(checks.len() >= 12, "{found}");
    for check in checks.iter().filter(|c| c["name"] != "disk" && c["name"] != "memory" && c["name"] != "home") {
        assert_eq!(check["verdict"], "ok", "{check}");
    }
}

#[test]
fn every_command_answers_a_new_user() {
    let mut rig = Rig::prepare(Options::default());
    // Before anything is there.
    refused(&show(&rig, &["status"]), 4, &["cannot be reached", "replank serve"]);
    refused(&show(&rig, &["deploy", "9.9.9"]), 1, &["9.9.9", "v0.1.0", "publish"]);
    refused(&show(&rig, &["deploy", "nonsense"]), 2, &["nonsense"]);
    well(&rig, &["deploy"], &["building", "0.1.0 runs as revision"]);
    refused(&show(&rig, &["deploy"]), 1, &["deployed already", "replank start"]);
    // Before there was a service, and kept for whoever asks later.
    let refusals = show(&rig, &["history", "--refusals"]);
    assert!(
        said(&refusals).contains("deploy 9.9.9") && said(&refusals).contains("deployed already"),
        "{}",
        said(&refusals)
    );
    rig.serve();
    all_that_an_upgrade_needs_is_there(&rig);

    well(&rig, &["status"], &["inputs", "0.1.0", "succeeded", "what runs is the newest"]);
    well(&rig, &["candidates"], &["nothing newer than 0.1.0"]);
    refused(&show(&rig, &["start", "--yes"]), 3, &["nothing newer"]);
    refused(&show(&rig, &["rollback"]), 3, &["snapshot"]);
    refused(&show(&rig, &["escape-hatch"]), 3, &["snapshot"]);
    refused(&show(&rig, &["cancel"]), 3, &[]);
    refused(&show(&rig, &["confirm"]), 3, &[]);
    rig.publish("0.2.0", &release("0.2.0"));
    std::thread::sleep(std::time::Duration::from_secs(16));
    well(&rig, &["check"], &["0.2.0"]);
    refused(&show(&rig, &["check"]), 3, &["wait"]);
    well(&rig, &["candidates"], &["1 release newer than 0.1.0", "v0.2.0"]);
    assert_eq!(json(&rig, &["candidates"])["candidates"][0]["name"], "v0.2.0");
    refused(&show(&rig, &["start"]), 2, &["--yes"]);
    refused(&show(&rig, &["start", "0.0.9", "--yes"]), 3, &["0.0.9"]);
    refused(&show(&rig, &["start", "v1", "--yes"]), 2, &["v1"]);
    well(&rig, &["start", "--yes", "--reason", "because"], &["building", "succeeded", "0.2.0 runs"]);
    assert_eq!(json(&rig, &["status"])["running_version"], "0.2.0");
    well(&rig, &["status"], &["because", "rollback", "what runs is the newest"]);
    the_way_back_was_told_first(&rig);
    well(&rig, &["logs", "app"], &["COPY www /www"]);
    well(&rig, &["logs", "-f", "app"], &["COPY www /www"]);
    let line: Value = json(&rig, &["logs", "app"]);
    assert_eq!(line["component"], "app");
    refused(&show(&rig, &["logs", "nothing"]), 3, &["no such component", "app"]);
    refused(&show(&rig, &["logs", "app", "--job", "v9.9.9-abcdef"]), 3, &["job"]);
    let commands = well(&rig, &["escape-hatch"], &["docker"]);
    assert!(commands.lines().count() >= 1);
    well(&rig, &["history"], &["start", "succeeded", "because"]);
    // Up to date is no news.
    let found = rig.history().into_iter().filter(|e| e["event"] == "candidate_detected").collect::<Vec<_>>();
    assert!(found.iter().all(|e| e["version"].as_str().is_some_and(|v| !v.is_empty())), "{found:?}");
    assert_eq!(found.iter().filter(|e| e["version"] == "0.2.0").count(), 1, "{found:?}");
    well(&rig, &["history", "--refusals"], &["admin", "POST /api/upgrade/rollback", "no snapshot"]);
    assert_eq!(json(&rig, &["history", "--refusals", "--limit", "1"])["refusals"].as_array().map(Vec::len), Some(1));
    well(&rig, &["history", "--verify"], &["consistent with anchor"]);
    assert_eq!(json(&rig, &["history", "--verify"])["consistent"], true);
    assert!(json(&rig, &["history", "--limit", "3"])["events"].as_array().is_some_and(|e| e.len() == 3));
    well(&rig, &["rollback", "--reason", "not nice"], &["rolled_back", "0.1.0 runs"]);
    refused(&show(&rig, &["start", "0.2.0", "--yes"]), 3, &["quarantine"]);
    let again = ["start", "0.2.0", "--yes", "--override-quarantine"];
    refused(&show(&rig, &again), 3, &["quarantined", "needs a reason"]);
    let again = [&again[..], &["--reason", "the port is free now"]].concat();
    assert_eq!(json(&rig, &again)["state"], "succeeded");

    // Tokens.
    well(&rig, &["token", "list"], &["NAME", "admin"]);
    refused(&show(&rig, &["token", "create", "admin"]), 1, &["exists", "--out"]);
    well(&rig, &["token", "create", "eve", "--out", &rig.home.join("eve").display().to_string()], &["eve"]);
    let eve = rig.home.join("eve").display().to_string();
    well(&rig, &["status", "--token-file", &eve], &["0.2.0"]);
    refused(&show(&rig, &["rollback", "--token-file", &eve]), 5, &["admin"]);
    well(&rig, &["token", "revoke", "eve"], &["eve"]);
    refused(&show(&rig, &["token", "revoke", "eve"]), 3, &["eve"]);
    well(&rig, &["history"], &["token_changed", "change=created", "change=revoked", "token=eve"]);
    well(&rig, &["history", "--refusals"], &["eve", "the token's role is reader", "quarantine"]);
    well(&rig, &["history", "--verify"], &["consistent with anchor"]);
    // The status alone may be read on for 250 ms (SECURITY.md); everything else is refused at once.
    refused(&show(&rig, &["history", "--token-file", &eve]), 5, &["token"]);
    let revoked = Instant::now();
    while show(&rig, &["status", "--token-file", &eve]).status.success() {
        assert!(revoked.elapsed() < Duration::from_secs(2), "a revoked token still reads the status");
    }
    refused(&show(&rig, &["status", "--token-file", &eve]), 5, &["token"]);
    assert!(json(&rig, &["token", "list"])["tokens"].as_array().is_some_and(|all| all.len() == 2));
    std::fs::write(&eve, "").unwrap();
    refused(&show(&rig, &["status", "--token-file", &eve]), 2, &["holds no token"]);
    refused(&show(&rig, &["status", "--token-file", "/no/such"]), 2, &["/no/such"]);
    refused(&show(&rig, &["status", "--url", "ftp://x"]), 2, &["http://"]);

    // A wrong directory, and a service that is gone: the way back is still told.
    let mut elsewhere = rig.command(&["status"]);
    elsewhere.env_remove("REPLANK_HOME").env_remove("REPLANK_URL");
    elsewhere.env("REPLANK_URL", rig.url(""));
    refused(&elsewhere.output().unwrap(), 5, &["not signed in", "--token-file"]);
    drop(rig.serving.take());
    refused(&show(&rig, &["status"]), 4, &["cannot be reached"]);
    let offline = well(&rig, &["escape-hatch"], &["docker"]);
    assert!(offline.lines().all(|line| !line.contains("service")), "{offline}");
    let shell = show(&rig, &["completions", "bash"]);
    assert!(shell.status.success());
    let out = show(&rig, &["status", "--json"]);
    let told: Value = serde_json::from_slice(&out.stderr).expect("an error in JSON");
    assert_eq!(told["code"], 4);
}
