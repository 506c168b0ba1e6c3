//! The command line as people and scripts use it: the real binary against a real server.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use replank::engine::api::Refusal;
use replank::http::Options;
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::Store;
use replank_core::fault::Told;
use replank_core::phase::*;
use replank_core::ports::{Ledger as _, Role};
use replank_core::record::Actor;
use replank_core::words::*;
use rustix::process::{Pid, Signal, kill_process};
use support::*;
use tokio::io::{AsyncBufReadExt as _, BufReader};

async fn replank(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_replank"));
    // A directory without a configuration, and nothing of the caller's environment.
    command.args(args).env_clear().current_dir(std::env::temp_dir()).kill_on_drop(true);
    command.envs(env.iter().copied());
    tokio::time::timeout(Duration::from_secs(60), command.output()).await.expect("in time").unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct World {
    server: Server,
    url: String,
    token: tempfile::NamedTempFile,
}

impl World {
    async fn new() -> Self {
        let server = Server::start(Options::default()).await;
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), format!("{ADMIN}\n")).unwrap();
        Self { url: server.url(), server, token }
    }

    async fn run(&self, args: &[&str]) -> Output {
        let file = self.token.path().to_str().unwrap();
        replank(args, &[("REPLANK_URL", &self.url), ("REPLANK_TOKEN_FILE", file), ("TZ", "UTC")]).await
    }
}

#[tokio::test]
async fn help_teaches_every_command() {
    let all = text(&replank(&["--help"], &[]).await.stdout);
    for part in ["Exit codes:", "replank start", "REPLANK_URL", "NO_COLOR"] {
        assert!(all.contains(part), "{part}");
    }
    for command in [
        "init",
        "serve",
        "deploy",
        "status",
        "candidates",
        "check",
        "plan",
        "start",
        "rollback",
        "cancel",
        "confirm",
        "reset",
        "logs",
        "history",
        "escape-hatch",
        "doctor",
        "token",
        "ledger",
        "proxy",
        "completions",
    ] {
        assert!(all.contains(&format!("\n  {command} ")), "{command} is not listed");
        let help = replank(&[command, "--help"], &[]).await;
        assert!(help.status.success(), "{command}");
    }
    assert!(text(&replank(&["--version"], &[]).await.stdout).starts_with("replank "));
    assert!(text(&replank(&["completions", "bash"], &[]).await.stdout).contains("_replank"));
}

#[tokio::test]
async fn the_proxy_and_its_upgrade_are_told_apart() {
    for wrong in [&["proxy"][..], &["proxy", "--dir", "/x", "upgrade"], &["proxy", "upgrade", "--drain", "10"]] {
        let out = replank(wrong, &[]).await;
        assert_eq!(out.status.code(), Some(2), "{wrong:?}: {}", text(&out.stderr));
    }
    let help = text(&replank(&["proxy", "upgrade", "--help"], &[]).await.stdout);
    assert!(help.contains("--drain <SECONDS>") && help.contains("docker exec CONTROLLER"), "{help}");
}

#[tokio::test]
async fn status_is_for_people_and_for_scripts() {
    let world = World::new().await;
    let out = world.run(&["status"]).await;
    assert!(out.status.success(), "{}", text(&out.stderr));
    let shown = text(&out.stdout);
    assert!(shown.contains("running      0.1.0 (0123456789ab, revision r-1)"), "{shown}");
    assert!(!shown.contains('\u{1b}'), "no colours where there is no terminal");
    let row: serde_json::Value = serde_json::from_slice(&world.run(&["status", "--json"]).await.stdout).unwrap();
    assert_eq!((row["state"].as_str(), row["running_version"].as_str()), (Some("idle"), Some("0.1.0")));
    let shown = text(&world.run(&["candidates"]).await.stdout);
    assert!(shown.contains("1 release newer than 0.1.0:\n  v0.2.0  0123456789ab"), "{shown}");
    assert!(shown.contains("the tag was moved"));
    assert!(shown.ends_with("commits cannot be started: only signed tags are accepted␛[2J\n"), "{shown}");
    let shown = text(&world.run(&["history", "--limit", "1"]).await.stdout);
    assert!(shown.starts_with("1970-01-01 00:00:00 +00:00") && shown.contains("n=2"), "{shown}");
    assert_eq!(text(&world.run(&["escape-hatch"]).await.stdout), "docker start x\n");
}

#[tokio::test]
async fn exit_codes_are_those_of_the_help() {
    let world = World::new().await;
    let refuse = |refusal| *world.server.engine.refuse.lock().unwrap() = Some(refusal);
    assert_eq!(world.run(&["frobnicate"]).await.status.code(), Some(2));
    assert_eq!(world.run(&["start", "1.2"]).await.status.code(), Some(2));
    let out = world.run(&["start"]).await;
    assert_eq!(out.status.code(), Some(2), "no terminal to ask on");
    assert!(text(&out.stderr).contains("--yes"));
    refuse(Refusal::Conflict("job x is in flight; wait for it".into()));
    let out = world.run(&["start", "0.2.0", "--yes"]).await;
    assert_eq!(
        (out.status.code(), text(&out.stderr).as_str()),
        (Some(3), "replank: job x is in flight; wait for it\n")
    );
    refuse(Refusal::TooSoon { retry_after_s: 3 });
    assert_eq!(world.run(&["check"]).await.status.code(), Some(3));
    refuse(Refusal::Unavailable("the ledger is away".into()));
    assert_eq!(world.run(&["check"]).await.status.code(), Some(4));
    let out = replank(&["status", "--url", "http://127.0.0.1:1"], &[]).await;
    assert_eq!(out.status.code(), Some(4));
    assert!(text(&out.stderr).contains("http://127.0.0.1:1 cannot be reached"), "{}", text(&out.stderr));
    assert_eq!(replank(&["status", "--url", &world.url], &[]).await.status.code(), Some(5));
    std::fs::write(world.token.path(), READER).unwrap();
    let out = world.run(&["rollback", "--json"]).await;
    assert_eq!(out.status.code(), Some(5));
    let error: serde_json::Value = serde_json::from_slice(&out.stderr).unwrap();
    assert_eq!(error["code"], 5);
    let out = replank(&["serve", "--config", "/nonexistent/replank.toml"], &[]).await;
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("/nonexistent/replank.toml: the configuration cannot be read"));
}

#[tokio::test]
async fn a_start_is_watched_to_its_end() {
    let world = World::new().await;
    let engine = world.server.engine.clone();
    let driver = tokio::spawn(async move {
        let state = || engine.record.lock().unwrap().phase.state().name();
        for (from, phase) in [("queued", Phase::Fetching), ("fetching", Phase::Succeeded { built_only: None })] {
            while state() != from {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            // Long enough that the watcher's stream has it: states between two events are skipped on purpose.
            tokio::time::sleep(Duration::from_millis(600)).await;
            engine.set(|record| record.phase = phase);
        }
    });
    let out = world.run(&["start", "--yes", "--json"]).await;
    assert!(out.status.success(), "{}", text(&out.stderr));
    driver.await.unwrap();
    let rows = text(&out.stdout);
    let rows: Vec<serde_json::Value> = rows.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.last().unwrap()["state"], "succeeded");
    assert!(rows.iter().any(|r| r["target_version"] == "0.2.0"), "the newest candidate");

    let out = world.run(&["start", "0.2.0", "--yes", "--no-wait"]).await;
    assert!(text(&out.stdout).contains("queued"), "{}", text(&out.stdout));
    let out = world.run(&["status", "--watch", "--timeout", "1"]).await;
    assert_eq!(out.status.code(), Some(6));
    assert!(text(&out.stderr).contains("the job goes on") || text(&out.stderr).contains("goes on"));
}

#[tokio::test]
async fn logs_reach_the_terminal_without_their_tricks() {
    let world = World::new().await;
    world.server.engine.set(|record| record.job = Some(job("0.2.0")));
    world.server.engine.grow(b"ok\n\x1b[2Jgone \x1b]0;title\x07\xff\n", true);
    let out = world.run(&["logs", "api"]).await;
    assert_eq!(text(&out.stdout), "ok\n␛[2Jgone ␛]0;title␇\u{fffd}\n");
    let out = world.run(&["logs", "api", "-f", "--json"]).await;
    assert!(text(&out.stdout).starts_with("{\"component\":\"api\",\"line\":\"ok\"}\n"));
    assert_eq!(world.run(&["logs", "nothing"]).await.status.code(), Some(3));
}

/// Puts the job into each phase in turn, long enough for the watcher's stream to have it: states between two events are
/// skipped on purpose.
async fn drive(engine: Arc<Double>, phases: Vec<Phase>) {
    let state = || engine.record.lock().unwrap().phase.state();
    while !state().in_flight() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for phase in phases {
        tokio::time::sleep(Duration::from_millis(600)).await;
        engine.set(|record| record.phase = phase);
    }
}

fn building() -> Phase {
    let recipe = Recipe {
        dockerfile: "Dockerfile".into(),
        context: ".".into(),
        target: None,
        args: Default::default(),
        platform: None,
        secrets: vec![],
        repository: "shop-api".into(),
        unlabelled: false,
    };
    let fetched =
        Fetched { recipes: [(name("api"), recipe)].into(), manifest: serde_json::Value::Null, signed_by: None };
    let build = Build { attempt: 1, intended_at: Millis(0), built: None };
    Phase::Building(Building { fetched, builds: [(name("api"), build)].into() })
}

#[tokio::test]
async fn a_job_that_fails_ends_with_1_and_the_end_of_what_failed() {
    let world = World::new().await;
    let lines: String = (0..100).map(|n| format!("step {n}\n")).collect();
    world.server.engine.grow(format!("{lines}\x1b[2Jcc: no such file\n").as_bytes(), true);
    let fault = Told::permanent("the build of api failed with exit code 1", "mend the Dockerfile");
    let failed = || Phase::FailedPre { fault: fault.clone() };

    let driver = tokio::spawn(drive(world.server.engine.clone(), vec![building(), failed()]));
    let out = world.run(&["start", "0.2.0", "--yes"]).await;
    driver.await.unwrap();
    let (told, last) = (text(&out.stderr), text(&out.stdout));
    assert_eq!(out.status.code(), Some(1), "{told}{last}");
    assert!(last.contains("failed_pre") && last.contains("0.1.0 runs"), "{last}");
    assert!(last.contains("the build of api failed with exit code 1; mend the Dockerfile"), "{last}");
    assert!(told.contains("end of the log of api (all of it: replank logs api --job job-1)"), "{told}");
    assert!(told.contains("\n  step 99\n  ␛[2Jcc: no such file\n"), "{told}");
    assert!(told.contains("  step 81\n") && !told.contains("  step 80\n"), "the end alone: {told}");

    // For scripts: the last row says it, and nothing else is mixed in.
    let driver = tokio::spawn(drive(world.server.engine.clone(), vec![building(), failed()]));
    let out = world.run(&["start", "0.2.0", "--yes", "--json"]).await;
    driver.await.unwrap();
    assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(1), ""));
    let row: serde_json::Value = serde_json::from_str(text(&out.stdout).lines().last().unwrap()).unwrap();
    assert_eq!((&row["state"], &row["failure"]), (&"failed_pre".into(), &fault.what.as_str().into()));
}

#[tokio::test]
async fn ctrl_c_ends_the_watching_with_130_and_not_the_job() {
    let world = World::new().await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_replank"));
    command.args(["start", "0.2.0", "--yes"]).env_clear().current_dir(std::env::temp_dir()).kill_on_drop(true);
    command.env("REPLANK_URL", &world.url).env("REPLANK_TOKEN_FILE", world.token.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut next =
        async || tokio::time::timeout(Duration::from_secs(60), told.next_line()).await.expect("in time").unwrap();
    // It watches once it has said so, and from then on the signal is caught.
    let first = next().await.unwrap();
    assert!(first.contains("queued"), "{first}");
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(130), "{ended}");
    let last = next().await.unwrap();
    assert!(last.contains("job job-1 goes on") && last.contains("replank cancel"), "{last}");
    let engine = &world.server.engine;
    assert_eq!(engine.record.lock().unwrap().phase, Phase::Queued);
    assert!(!engine.calls.lock().unwrap().iter().any(|(what, _)| what == "cancel"));
}

#[tokio::test]
async fn status_says_whether_what_runs_is_the_newest() {
    let world = World::new().await;
    let sha = || CommitSha::new(SHA).unwrap();
    for (running, latest, expect) in [
        ("0.1.0", None, "latest       no release found, looked at 2023-11-14 22:13:20 +00:00"),
        ("0.1.0", Some("0.1.0"), "latest       0.1.0 (0123456789ab), what runs is the newest, looked at 2023-"),
        ("0.1.0", Some("0.2.0"), "latest       0.2.0 (0123456789ab), looked at 2023-"),
        // Made of 0.1.0; and newer than what is left at the remote.
        ("0.1.0-commit.0123456", Some("0.1.0"), "what runs is the newest"),
        ("0.2.0", Some("0.1.0"), "what runs is the newest"),
    ] {
        world.server.engine.set(|record| {
            record.running.as_mut().unwrap().version = running.parse().unwrap();
            record.latest.release = latest.map(|version| (version.parse().unwrap(), sha()));
            record.latest.checked_at = Some(Millis(1_700_000_000_000));
        });
        let shown = text(&world.run(&["status"]).await.stdout);
        assert!(shown.contains(expect), "{running} and {latest:?}: {shown}");
    }
}

#[tokio::test]
async fn tokens_go_into_new_private_files_only() {
    use replank::cli::tokens;
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("t");
    let ledger = Store::open(dir.path().join("ledger")).await.unwrap();
    let ledger = Arc::new(SqliteLedger::new(ledger, AppName::new("shop").unwrap()));
    ledger.commit(None, &record(), &[]).await.unwrap();
    let store = tokens::Changes {
        tokens: ledger.clone(),
        ledger: ledger.clone(),
        clock: Arc::new(Hand(1_000.into())),
        actor: Actor { oid: "uid:7".into(), name: "root".into(), from: "host".into() },
        reason: "a new colleague".into(),
    };
    let token = store.create("alice", Role::Admin, Some(60_000), &file).await.unwrap();
    assert_eq!(token.expires_at, Some(Millis(61_000)));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let secret = std::fs::read_to_string(&file).unwrap();
    assert_eq!(replank::http::hash_secret(secret.trim()), token.hash);
    assert!(secret.starts_with("rpk_") && secret.trim().len() == 68);
    // An existing file, a link and a taken name: nothing is overwritten and nothing stays behind.
    assert!(store.create("bob", Role::Reader, None, &file).await.is_err());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
    assert!(store.create("bob", Role::Reader, None, &link).await.is_err());
    let second = dir.path().join("second");
    assert!(store.create("alice", Role::Reader, None, &second).await.is_err());
    assert!(!second.exists());
    assert!(store.create("a b", Role::Reader, None, &second).await.is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), secret);
    store.revoke("alice").await.unwrap();
    assert!(store.revoke("alice").await.is_err());
    let long = tokens::Changes { reason: "x".repeat(281), ..store };
    assert!(long.create("carol", Role::Reader, None, &second).await.is_err() && !second.exists());
    // What was done is in the history, and only that; of the secret, nothing.
    let lines = ledger.history(0, 100).await.unwrap();
    let events: Vec<serde_json::Value> = lines.iter().map(|l| serde_json::from_slice(&l.bytes).unwrap()).collect();
    let told: Vec<_> = events.iter().map(|e| (&e["event"], &e["change"], &e["token"], &e["token_id"])).collect();
    let (event, id, alice) = ("token_changed".into(), token.id.as_str().into(), "alice".into());
    assert_eq!(told, [(&event, &"created".into(), &alice, &id), (&event, &"revoked".into(), &alice, &id)]);
    for event in &events {
        assert_eq!((&event["role"], &event["reason"]), (&"admin".into(), &"a new colleague".into()));
        assert_eq!(event["actor"], serde_json::json!({ "oid": "uid:7", "name": "root", "from": "host" }));
        let text = event.to_string();
        assert!(!text.contains(secret.trim()) && !text.contains(token.hash.as_str()), "{text}");
    }
    for (text, expect) in [
        ("90d", Some(Some(7_776_000_000))),
        ("12h", Some(Some(43_200_000))),
        ("never", Some(None)),
        ("0d", None),
        ("x", None),
        ("", None),
        ("99999d", None),
        ("5é", None),
    ] {
        assert_eq!(tokens::lifetime(text).ok(), expect, "{text:?}");
    }
}

#[tokio::test]
async fn a_plan_that_would_be_refused_has_an_exit_code_of_its_own() {
    let world = World::new().await;
    let out = world.run(&["plan", "0.2.0"]).await;
    let shown = text(&out.stdout);
    assert_eq!(out.status.code(), Some(3), "{shown}{}", text(&out.stderr));
    for part in ["0.1.0 → 0.2.0", "would be refused: it is one-way", "takes", "unknown", "remote is away", "<U+202E>"]
    {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{shown:?}");
    let out = world.run(&["plan", "--accept-one-way", "--json"]).await;
    assert!(out.status.success(), "{}", text(&out.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&plan["to_version"], &plan["prediction"]["total_p50_ms"]), (&"0.2.0".into(), &serde_json::Value::Null));
    assert_eq!(world.run(&["plan", "a b&c"]).await.status.code(), Some(2));
}
