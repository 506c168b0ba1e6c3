//! `cargo xtask demo`: the sample application upgrades itself, with a person at the wheel or by itself.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use replank_testbed::cleanup::{is_stopping, leave_it_to_the_signal};
use replank_testbed::installed::{InstallOptions, Installed, home_in};
use replank_testbed::load::{Load, Totals};
use replank_testbed::{Engine, images, process, sample};
use serde_json::{Value, json};

use crate::build::{Build, Profile};
use crate::world::World;

/// Long enough to see a confirm window, short enough to wait for it.
const CONFIRM_WINDOW_SECONDS: u64 = 8;
/// Clients of the load for each target.
const CLIENTS: usize = 4;
/// A whole upgrade on a slow machine, cold build cache included.
const UPGRADE_LIMIT: Duration = Duration::from_secs(900);
const ROLLBACK_LIMIT: Duration = Duration::from_secs(120);
/// The successor must report within [`RESUME_SECONDS_MAX`]; waiting longer tells how late it was.
const RESUME_LIMIT: Duration = Duration::from_secs(90);

// What the run must keep to, besides that no request fails.
const REQUESTS_MIN: u64 = 2_000;
const RESUME_SECONDS_MAX: f64 = 30.0;
const FLIP_MS_MAX: f64 = 1_000.0;
/// How the four upgrades and the rollback end, in this order; the states between them depend on when one looks.
const ENDS: [&str; 4] = ["confirming", "rolled_back", "succeeded", "failed_rollout"];

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Do it all without a person, under load, and end with one line of figures.
    #[arg(long)]
    auto: bool,
    /// Print the last line as JSON.
    #[arg(long)]
    json: bool,
    /// Generated units of the sample's api: fewer build faster.
    #[arg(long, default_value_t = sample::FULL_UNITS)]
    units: u32,
    /// The static replank binary to use instead of building one.
    #[arg(long)]
    replank: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let shown = show(options);
    if shown.is_err() && options.auto && options.json {
        leave_it_to_the_signal();
        // Whoever reads the last line gets his answer, however early the run ended.
        println!("{}", result(false, &Measured::default(), &Totals::default()));
    }
    shown
}

fn show(options: &Options) -> Result<ExitCode> {
    if options.replank.is_none() {
        say("building replank (static, optimised)");
    }
    let replank = Build::replank_or(options.replank.as_deref(), Profile::Release)?;
    let world = World::start(replank, options.units)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let installed = Installed::prepare(options_of(&world))?;
        deploy(&installed)?;
        if options.auto { auto(options, &world, &installed).await } else { by_hand(&world, &installed).await }
    })
}

/// Progress goes to stderr, so that the last line of stdout is the result alone.
fn say(text: &str) {
    if !is_stopping() {
        eprintln!("demo: {text}");
    }
}

fn options_of(world: &World) -> InstallOptions {
    InstallOptions {
        socket: world.engine.socket().to_owned(),
        remote: world.git.url(sample::NAME),
        replank: world.replank.clone(),
        home: home_in(world.scratch.path()),
        mode: "blue-green",
        confirm_window_seconds: CONFIRM_WINDOW_SECONDS,
        registry: None,
        // The least that is allowed: the demo waits out the whole of it for the version that fails its probes.
        policy: vec!["budgets.validating_seconds = 60".to_owned()],
    }
}

fn deploy(installed: &Installed) -> Result<()> {
    say("deploying v0.1.0 (the first build has a cold cache)");
    let begun = Instant::now();
    installed.deploy("v0.1.0").context("the first deployment failed")?;
    say(&format!("v0.1.0 runs after {:.1} s", begun.elapsed().as_secs_f64()));
    Ok(())
}

async fn by_hand(world: &World, installed: &Installed) -> Result<ExitCode> {
    let ports = installed.ports;
    println!("The sample application runs version 0.1.0, with Replank inside it.\n");
    println!("  page         http://127.0.0.1:{}/", ports.frontend);
    println!("  api          http://127.0.0.1:{}/", ports.api);
    println!("  upgrade API  http://127.0.0.1:{}/api/upgrade/status", ports.upgrade);
    println!("  admin token  {}", installed.token_file.display());
    println!("  remote       {}", world.git.url(sample::NAME));
    println!("  docker       docker --host {} ps\n", world.engine.host());
    println!("Try, in another terminal:\n");
    println!("  export REPLANK_URL={} REPLANK_TOKEN_FILE={}", installed.url(""), installed.token_file.display());
    let replank = world.replank.display();
    for line in ["candidates", "start v0.2.0", "status", "rollback", "start v0.3.0   # fails its probes", "history"] {
        println!("  {replank} {line}");
    }
    println!("\nCtrl-C ends the demo and takes everything away.");
    std::io::stdout().flush()?;
    // The signal handler of the testbed cleans up and ends the process.
    std::future::pending::<()>().await;
    Ok(ExitCode::SUCCESS)
}

/// What the run measured; `None` where it did not get that far.
#[derive(Debug, Default)]
struct Measured {
    states: Vec<String>,
    upgrade_seconds: Option<f64>,
    resume_seconds: Option<f64>,
    rollback_flip_ms: Option<f64>,
}

async fn auto(options: &Options, world: &World, installed: &Installed) -> Result<ExitCode> {
    let ports = installed.ports;
    // The api first: its answers are the ones whose versions are followed.
    let targets = [format!("http://127.0.0.1:{}/", ports.api), format!("http://127.0.0.1:{}/", ports.frontend)];
    let load = Load::start(&targets, CLIENTS)?;
    let mut measured = Measured::default();
    let played = play(world, installed, &load, &mut measured).await;
    let totals = load.stop().await;
    leave_it_to_the_signal();
    for failure in &totals.failures {
        say(&format!("failed request: {failure}"));
    }
    if let Err(error) = &played {
        say(&format!("{error:#}"));
        say(&report(world, installed).await);
    }
    let missed = missed(&measured, &totals);
    for what in &missed {
        say(&format!("not ok: {what}"));
    }
    let ok = played.is_ok() && missed.is_empty();
    if options.json {
        println!("{}", result(ok, &measured, &totals));
    } else {
        let shown =
            |value: Option<f64>, unit: &str| value.map_or("never".to_owned(), |v| format!("after {v:.1} {unit}"));
        println!(
            "upgraded {}, resumed {}, rollback flipped {}, {} of {} requests failed: {}",
            shown(measured.upgrade_seconds, "s"),
            shown(measured.resume_seconds, "s"),
            shown(measured.rollback_flip_ms, "ms"),
            totals.failed,
            totals.requests,
            if ok { "ok" } else { "not ok" }
        );
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The last line of `--json`.
fn result(ok: bool, measured: &Measured, totals: &Totals) -> Value {
    json!({
        "ok": ok,
        "states": measured.states,
        "upgrade_seconds": measured.upgrade_seconds.map(round),
        "resume_seconds": measured.resume_seconds.map(round),
        "rollback_flip_ms": measured.rollback_flip_ms.map(f64::round),
        "requests": totals.requests,
        "failed_requests": totals.failed,
    })
}

/// What the run did not keep to; nothing that was not measured is kept to.
fn missed(measured: &Measured, totals: &Totals) -> Vec<String> {
    let within = |value: Option<f64>, most: f64| value.is_some_and(|value| value <= most);
    let mut states = measured.states.iter();
    let in_order = ENDS.iter().all(|end| states.any(|state| state == end));
    let is_last = measured.states.last().is_some_and(|state| state == ENDS[ENDS.len() - 1]);
    [
        (
            totals.requests >= REQUESTS_MIN,
            format!("{} requests were made, at least {REQUESTS_MIN} must be", totals.requests),
        ),
        (totals.failed == 0, format!("{} requests failed, none may", totals.failed)),
        (
            within(measured.resume_seconds, RESUME_SECONDS_MAX),
            format!("resume_seconds is {:?}, at most {RESUME_SECONDS_MAX} may pass", measured.resume_seconds),
        ),
        (
            within(measured.rollback_flip_ms, FLIP_MS_MAX),
            format!("rollback_flip_ms is {:?}, at most {FLIP_MS_MAX} may pass", measured.rollback_flip_ms),
        ),
        (
            in_order && is_last,
            format!("the states {} do not lead through {}", measured.states.join(" "), ENDS.join(", ")),
        ),
    ]
    .into_iter()
    .filter_map(|(kept, what)| (!kept).then_some(what))
    .collect()
}

fn round(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

async fn play(world: &World, installed: &Installed, load: &Load, measured: &mut Measured) -> Result<()> {
    let states = &mut measured.states;

    say("0.1.0 -> 0.2.0, and kill -9 of the controller in the middle of the build");
    // Found out beforehand, so that nothing stands between a look at the state and the kill.
    let container = format!("replank-sample-{}-controller", text(&installed.status().await?, "running_revision"));
    let pid = world.engine.docker(&["inspect", "-f", "{{.State.Pid}}", &container])?;
    let begun = Instant::now();
    let row = installed.start("v0.2.0", false).await?;
    let job = text(&row, "job_id");
    let over = ["patching", "rolling_out", "validating", "confirming", "succeeded", "failed_pre", "failed_rollout"];
    let row = installed
        .until(UPGRADE_LIMIT, states, |row| is_amid_the_build(row) || over.iter().any(|state| row["state"] == *state))
        .await?;
    ensure!(is_amid_the_build(&row), "the state was '{}' before the kill could hit the build", text(&row, "state"));
    let killed = now();
    kill(&world.engine, pid.trim())?;
    let resume_seconds = resumed(installed, job, killed).await?;
    measured.resume_seconds = Some(resume_seconds);
    say(&format!("the successor went on after {resume_seconds:.1} s"));
    installed.until_state(UPGRADE_LIMIT, states, &["confirming"]).await?;
    installed.until(ROLLBACK_LIMIT, states, |row| !text(row, "confirm_deadline").is_empty()).await?;
    measured.upgrade_seconds = Some(begun.elapsed().as_secs_f64());
    let built = first(&installed.history().await?, job, "builds_complete", Timestamp::MIN);
    ensure!(built.is_some_and(|at| at > killed), "the build was over at {built:?}, before the kill at {killed}");
    expect_serving(load, "0.2.0").await?;

    say("roll back to 0.1.0 while it is warm");
    let asked = Instant::now();
    installed.rollback("the demo goes back").await?;
    let row = installed.until_state(ROLLBACK_LIMIT, states, &["rolled_back", "rollback_failed"]).await?;
    ensure!(row["state"] == "rolled_back", "the rollback ended as {}", row["state"]);
    ensure!(row["running_version"] == "0.1.0", "after the rollback {} runs", row["running_version"]);
    let flip = load.flip_to("0.1.0", asked).context("no answer of 0.1.0 after the rollback")?;
    let flip_ms = flip.as_secs_f64() * 1_000.0;
    measured.rollback_flip_ms = Some(flip_ms);
    say(&format!("the old version answered after {flip_ms:.0} ms"));

    say("0.2.0 again, with the quarantine overridden");
    let refused = installed
        .call(
            reqwest::Method::POST,
            "/api/upgrade/start",
            Some(json!({"target_version": "v0.2.0", "confirm_downtime": true})),
        )
        .await?;
    ensure!(refused.0 == 409, "a quarantined commit started without the override: {refused:?}");
    installed.start("v0.2.0", true).await?;
    let row = installed
        .until_state(UPGRADE_LIMIT, states, &["succeeded", "failed_pre", "failed_rollout", "rolled_back"])
        .await?;
    ensure!(row["state"] == "succeeded", "the second upgrade ended as {}: {}", row["state"], row["phase_detail"]);
    expect_serving(load, "0.2.0").await?;

    say("0.3.0, which starts and fails its probes");
    let begun = Instant::now();
    installed.start("v0.3.0", false).await?;
    let row = installed
        .until_state(UPGRADE_LIMIT, states, &["succeeded", "failed_pre", "failed_rollout", "rolled_back"])
        .await?;
    ensure!(row["state"] == "failed_rollout", "0.3.0 ended as {}: {}", row["state"], row["phase_detail"]);
    let strange: Vec<String> =
        load.answers_since(begun).iter().filter(|a| a.version != "0.2.0").map(|a| a.version.clone()).collect();
    ensure!(strange.is_empty(), "while 0.3.0 failed, {} answers were not 0.2.0's", strange.len());
    Ok(())
}

fn text<'a>(row: &'a Value, field: &str) -> &'a str {
    row[field].as_str().unwrap_or_default()
}

/// `docker kill` would also keep the engine from starting it again, so the kill comes from beside: from this process, or from a
/// container where the engine belongs to somebody else and its processes are not ours to kill.
fn kill(engine: &Engine, pid: &str) -> Result<()> {
    if engine.pid().is_some() {
        return process::run(std::process::Command::new("kill").args(["-9", pid])).map(drop);
    }
    engine.docker(&["run", "--rm", "--pid", "host", "--network", "none", images::BUSYBOX, "kill", "-9", pid]).map(drop)
}

/// The api, whose build takes the longest, has begun and is not done.
fn is_amid_the_build(row: &Value) -> bool {
    let api = &row["components"]["api"];
    row["state"] == "building" && api["state"] == "building" && api["done"].as_u64().is_some_and(|steps| steps > 0)
}

/// Seconds from the kill to the successor's first event. A controller that goes on with a job says first that it took over;
/// what its predecessor recorded in its last moments is another event, and older than the kill.
async fn resumed(installed: &Installed, job: &str, killed: Timestamp) -> Result<f64> {
    let end = Instant::now() + RESUME_LIMIT;
    while Instant::now() < end {
        if let Ok(events) = installed.history().await
            && let Some(at) = first(&events, job, "took_over", killed)
        {
            return Ok(at.duration_since(killed).as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("nobody took the job over within {} s of the kill", RESUME_LIMIT.as_secs())
}

/// When `event` of this job was first recorded after `since`.
fn first(events: &[Value], job: &str, event: &str, since: Timestamp) -> Option<Timestamp> {
    let of_job = events.iter().filter(|e| e["job_id"] == job && e["event"] == event);
    of_job.filter_map(|e| text(e, "ts").parse().ok()).find(|at| *at > since)
}

#[expect(clippy::disallowed_methods, reason = "the demo has no clock port, and compares with the times of events")]
fn now() -> Timestamp {
    Timestamp::now()
}

/// The load's latest answers come from `version`.
async fn expect_serving(load: &Load, version: &str) -> Result<()> {
    let since = Instant::now();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let answers = load.answers_since(since);
    ensure!(!answers.is_empty(), "nothing answers");
    let other = answers.iter().filter(|a| a.version != version).count();
    ensure!(other == 0, "{other} of {} answers are not {version}'s", answers.len());
    Ok(())
}

/// What a person would look at when the demo fails.
async fn report(world: &World, installed: &Installed) -> String {
    let status = installed.status().await.map_or_else(|e| format!("{e:#}"), |row| row.to_string());
    let containers = shown(&world.engine, &["ps", "-a", "--format", "{{.Names}} {{.Status}}"]);
    let names = shown(&world.engine, &["ps", "-a", "--format", "{{.Names}}"]);
    let mut text = format!("status: {status}\ncontainers:\n{containers}");
    for name in names.lines().filter(|name| name.contains("controller") || name.ends_with("proxy")) {
        let out = world.engine.docker_command().args(["logs", "--tail", "40", name]).output();
        if let Ok(out) = out {
            text.push_str(&format!(
                "\n--- {name}\n{}{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            ));
        }
    }
    text
}

fn shown(engine: &Engine, arguments: &[&str]) -> String {
    engine.docker(arguments).unwrap_or_else(|e| format!("{e:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> (Measured, Totals) {
        let states = ["building", "confirming", "rolled_back", "queued", "confirming", "succeeded", "failed_rollout"];
        let measured = Measured {
            states: states.map(str::to_owned).into(),
            upgrade_seconds: Some(40.0),
            resume_seconds: Some(30.0),
            rollback_flip_ms: Some(1_000.0),
        };
        (measured, Totals { requests: 2_000, failed: 0, failures: vec![] })
    }

    #[test]
    fn each_bound_of_the_run_is_held() {
        let (measured, totals) = good();
        assert_eq!(missed(&measured, &totals), Vec::<String>::new());
        type Spoil = fn(&mut Measured, &mut Totals);
        let cases: [(&str, Spoil); 9] = [
            ("1999 requests were made", |_, totals| totals.requests = 1_999),
            ("1 requests failed", |_, totals| totals.failed = 1),
            ("resume_seconds is Some(30.01)", |measured, _| measured.resume_seconds = Some(30.01)),
            ("resume_seconds is None", |measured, _| measured.resume_seconds = None),
            ("rollback_flip_ms is Some(1000.5)", |measured, _| measured.rollback_flip_ms = Some(1_000.5)),
            ("rollback_flip_ms is None", |measured, _| measured.rollback_flip_ms = None),
            ("do not lead through", |measured, _| drop(measured.states.pop())),
            ("do not lead through", |measured, _| drop(measured.states.remove(2))),
            ("do not lead through", |measured, _| measured.states.push("rolled_back".to_owned())),
        ];
        for (expect, spoil) in cases {
            let (mut measured, mut totals) = good();
            spoil(&mut measured, &mut totals);
            let told = missed(&measured, &totals);
            assert!(told.len() == 1 && told[0].contains(expect), "{expect:?}: {told:?}");
        }
    }

    #[test]
    fn a_predecessor_s_last_words_are_no_successor() {
        let event = |ts: &str, job: &str, event: &str| json!({"ts": ts, "job_id": job, "event": event});
        let killed: Timestamp = "2026-01-01T00:00:10Z".parse().expect("a time");
        let mut events = vec![
            event("2026-01-01T00:00:01.000Z", "this", "took_over"),
            event("2026-01-01T00:00:10.001Z", "this", "built"),
            event("2026-01-01T00:00:10.002Z", "other", "took_over"),
        ];
        assert_eq!(first(&events, "this", "took_over", killed), None);
        events.push(event("2026-01-01T00:00:12.500Z", "this", "took_over"));
        let at = first(&events, "this", "took_over", killed).expect("a successor");
        assert_eq!(at.duration_since(killed).as_secs_f64(), 2.5);
    }
}
