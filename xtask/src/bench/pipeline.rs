//! `pipeline`: a whole upgrade of the sample application, against the same done with the plain tools.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replank_testbed::installed::{InstallOptions, Installed, client, free_port, home_in};
use replank_testbed::{process, sample};
use serde_json::json;

use super::{Options, median, round};
use crate::world::World;

/// Interleaved pairs of one run; odd, so that a median is one of them.
const PAIRS: usize = 5;
/// Between two looks for the new version: more of them would take the processors from the build.
const ASK_EVERY: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(600);

/// Single mode, from the start request to the first answer of the new version, against a script that does the same git
/// clone, parallel docker build, push and start with the plain tools. The build cache is cold for both.
pub(super) fn run(options: &Options, replank: PathBuf) -> Result<ExitCode> {
    let world = World::start(replank, sample::FULL_UNITS)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        let installed = Installed::prepare(InstallOptions {
            socket: world.engine.socket().to_owned(),
            remote: world.git.url(sample::NAME),
            replank: world.replank.clone(),
            home: home_in(world.scratch.path()),
            mode: "single",
            confirm_window_seconds: 5,
            registry: Some(world.registry.name()),
            policy: vec![],
        })?;
        installed.deploy("v0.1.0")?;
        for pair in 1..=PAIRS {
            cold(&world)?;
            let (us, api_port) = (upgrade(&installed).await?, free_port()?);
            if options.profile {
                profile(&installed).await?;
            }
            let mut states = vec![];
            installed.rollback("the next pair starts from 0.1.0").await?;
            installed.until_state(LIMIT, &mut states, &["rolled_back"]).await?;
            cold(&world)?;
            let them = script(&world, api_port).await?;
            eprintln!("bench: pair {pair} of {PAIRS}: ours {us:.2} s, baseline {them:.2} s");
            ours.push(us);
            theirs.push(them);
        }
        Ok::<(), anyhow::Error>(())
    })?;
    let (ours_s, baseline_s) = (median(&mut ours), median(&mut theirs));
    let ratio = ours_s / baseline_s;
    if options.json {
        println!("{}", json!({"ours_s": round(ours_s), "baseline_s": round(baseline_s), "ratio": round(ratio)}));
    } else {
        println!("ours {ours_s:.2} s, baseline {baseline_s:.2} s, ratio {ratio:.3} (medians of {PAIRS} pairs)");
    }
    Ok(ExitCode::SUCCESS)
}

/// Forgets every build step. Images stay: a running version is no build cache.
fn cold(world: &World) -> Result<()> {
    world.engine.docker(&["builder", "prune", "--all", "--force"])?;
    Ok(())
}

async fn upgrade(installed: &Installed) -> Result<f64> {
    let api = format!("http://127.0.0.1:{}/", installed.ports.api);
    let begun = Instant::now();
    installed.start("v0.2.0", true).await?;
    first_answer(&api, "0.2.0", begun).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let mut states = vec![];
    let row = installed.until_state(LIMIT, &mut states, &["succeeded", "failed_pre", "failed_rollout"]).await?;
    ensure!(row["state"] == "succeeded", "the upgrade ended as {}: {}", row["state"], row["phase_detail"]);
    Ok(seconds)
}

/// The last job's events, in seconds from its start.
async fn profile(installed: &Installed) -> Result<()> {
    let job = installed.status().await?["job_id"].clone();
    let at = |event: &serde_json::Value| -> Option<jiff::Timestamp> { event["ts"].as_str()?.parse().ok() };
    let events = installed.history().await?;
    let mut events: Vec<_> = events.iter().filter(|e| e["job_id"] == job).filter_map(|e| Some((at(e)?, e))).collect();
    events.sort_by_key(|(at, event)| (*at, event["seq"].as_u64()));
    let Some(begun) = events.first().map(|(at, _)| *at) else { return Ok(()) };
    for (at, event) in events {
        let what = ["component", "op"].iter().find_map(|field| event[field].as_str()).unwrap_or_default();
        eprintln!(
            "  {:8.3} s  {} {what}",
            at.duration_since(begun).as_secs_f64(),
            event["event"].as_str().unwrap_or("?")
        );
    }
    Ok(())
}

async fn first_answer(url: &str, version: &str, begun: Instant) -> Result<()> {
    let http = client(Duration::from_secs(5))?;
    while begun.elapsed() < LIMIT {
        if let Ok(answer) = http.get(url).send().await
            && answer.headers().get("x-app-version").is_some_and(|v| v == version)
        {
            return Ok(());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    bail!("{url} never answered with version {version}")
}

/// What an operator would write: fails at the first failing step, builds and pushes side by side.
const SCRIPT: &str = r#"set -eu
git clone --quiet --depth 1 --branch v0.2.0 "$REMOTE" "$WORK/src"
cd "$WORK/src"
each() { pids=""; for c in api controller frontend worker; do "$@" "$c" & pids="$pids $!"; done; for p in $pids; do wait "$p"; done; }
build() { docker build --quiet --tag "$REGISTRY/baseline/$1:v0.2.0" --file "$1/Dockerfile" --build-arg APP_VERSION=0.2.0 . >/dev/null; }
push() { docker push --quiet "$REGISTRY/baseline/$1:v0.2.0" >/dev/null; }
each build
each push
docker run --detach --name baseline-worker "$REGISTRY/baseline/worker:v0.2.0" >/dev/null
docker run --detach --name baseline-frontend "$REGISTRY/baseline/frontend:v0.2.0" >/dev/null
docker run --detach --name baseline-api --publish "127.0.0.1:$PORT:8080" "$REGISTRY/baseline/api:v0.2.0" >/dev/null
"#;

async fn script(world: &World, port: u16) -> Result<f64> {
    let work = world.scratch.path().join("baseline");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir(&work)?;
    let begun = Instant::now();
    let docker = world.engine.docker_command();
    let directory = Path::new(docker.get_program()).parent().context("the docker client has no directory")?;
    let path = format!("{}:{}", directory.display(), "/usr/local/bin:/usr/bin:/bin");
    process::run(
        Command::new("sh")
            .args(["-c", SCRIPT])
            .env("PATH", path)
            .env("DOCKER_HOST", world.engine.host())
            .env("DOCKER_BUILDKIT", "1")
            .env("REMOTE", world.git.url(sample::NAME))
            .env("REGISTRY", world.registry.name())
            .env("WORK", &work)
            .env("PORT", port.to_string()),
    )?;
    first_answer(&format!("http://127.0.0.1:{port}/"), "0.2.0", begun).await?;
    let seconds = begun.elapsed().as_secs_f64();
    for name in ["baseline-api", "baseline-frontend", "baseline-worker"] {
        world.engine.docker(&["rm", "--force", name])?;
    }
    Ok(seconds)
}
