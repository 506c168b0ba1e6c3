//! `cargo xtask demo`: the sample application upgrades itself, with a person at the wheel or by itself.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replank_testbed::cleanup::{is_stopping, leave_it_to_the_signal};
use replank_testbed::installed::{InstallOptions, Installed, home_in};
use replank_testbed::load::Load;
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
/// The successor must report within 30 s; waiting longer tells how late it was.
const RESUME_LIMIT: Duration = Duration::from_secs(90);

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

/// What the run measured.
#[derive(Debug, Default)]
struct Measured {
    states: Vec<String>,
    upgrade_seconds: f64,
    resume_seconds: f64,
    rollback_flip_ms: f64,
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
    let ok = played.is_ok() && totals.failed == 0;
    let result = json!({
        "ok": ok,
        "states": measured.states,
        "upgrade_seconds": round(measured.upgrade_seconds),
        "resume_seconds": round(measured.resume_seconds),
        "rollback_flip_ms": measured.rollback_flip_ms.round(),
        "requests": totals.requests,
        "failed_requests": totals.failed,
    });
    if options.json {
        println!("{result}");
    } else {
        println!(
            "upgrade {:.1} s, resumed after {:.1} s, rollback flipped after {:.0} ms, {} of {} requests failed: {}",
            measured.upgrade_seconds,
            measured.resume_seconds,
            measured.rollback_flip_ms,
            totals.failed,
            totals.requests,
            if ok { "ok" } else { "not ok" }
        );
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn round(seconds: f64) -> f64 {
    (seconds * 100.0).round() / 100.0
}

async fn play(world: &World, installed: &Installed, load: &Load, measured: &mut Measured) -> Result<()> {
    let states = &mut measured.states;

    say("0.1.0 -> 0.2.0, and kill -9 of the controller in the middle of the build");
    let begun = Instant::now();
    installed.start("v0.2.0", false).await?;
    let row = installed.until_state(UPGRADE_LIMIT, states, &["building"]).await?;
    // The build of the api takes seconds: give it time to be in the middle of them.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = installed.history().await?.len();
    let container = format!("replank-sample-{}-controller", text(&row, "running_revision"));
    let pid = world.engine.docker(&["inspect", "-f", "{{.State.Pid}}", &container])?;
    let killed = Instant::now();
    kill(&world.engine, pid.trim())?;
    measured.resume_seconds = resumed(installed, before, killed).await?;
    say(&format!("the successor went on after {:.1} s", measured.resume_seconds));
    installed.until_state(UPGRADE_LIMIT, states, &["confirming"]).await?;
    installed.until(ROLLBACK_LIMIT, states, |row| !text(row, "confirm_deadline").is_empty()).await?;
    measured.upgrade_seconds = begun.elapsed().as_secs_f64();
    expect_serving(load, "0.2.0").await?;

    say("roll back to 0.1.0 while it is warm");
    let asked = Instant::now();
    installed.rollback("the demo goes back").await?;
    let row = installed.until_state(ROLLBACK_LIMIT, states, &["rolled_back", "rollback_failed"]).await?;
    ensure!(row["state"] == "rolled_back", "the rollback ended as {}", row["state"]);
    ensure!(row["running_version"] == "0.1.0", "after the rollback {} runs", row["running_version"]);
    let flip = load.flip_to("0.1.0", asked).context("no answer of 0.1.0 after the rollback")?;
    measured.rollback_flip_ms = flip.as_secs_f64() * 1_000.0;
    say(&format!("the old version answered after {:.0} ms", measured.rollback_flip_ms));

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

/// Seconds from the kill to the first event that was recorded after it.
async fn resumed(installed: &Installed, before: usize, killed: Instant) -> Result<f64> {
    while killed.elapsed() < RESUME_LIMIT {
        if let Ok(events) = installed.history().await
            && events.len() > before
        {
            return Ok(killed.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("no event within {} s of the kill", RESUME_LIMIT.as_secs())
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
