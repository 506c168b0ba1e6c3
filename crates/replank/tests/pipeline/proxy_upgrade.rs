//! The proxy's own upgrade: under load, with images that are none, killed at any moment, and with the machine.

use std::collections::BTreeSet;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use replank_testbed::images;
use replank_testbed::load::Load;
use serde_json::Value;

use crate::world::{Options, World, text};

const PROXY: &str = "replank-sample-proxy";
const OLD: &str = "replank-sample-proxy-old";
/// From the death of the command, or of the machine, to a proxy that is whole again.
const MEND_LIMIT: Duration = Duration::from_secs(40);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// New connections are refused for this long at most, on a busy machine whose requests are short.
const GAP_MAX_MS: u64 = 8_000;

/// The proxy's image under another id, as another version would have one.
fn another(world: &World, tag: &str) -> String {
    let image = world.docker(&["inspect", "-f", "{{.Image}}", PROXY]);
    built(world, tag, &format!("FROM {image}\nLABEL test={tag}\n"), &[])
}

fn built(world: &World, tag: &str, recipe: &str, files: &[(&str, &str)]) -> String {
    let context = tempfile::tempdir().unwrap();
    for (name, content) in files.iter().chain([("Dockerfile", recipe)].iter()) {
        std::fs::write(context.path().join(name), content).unwrap();
    }
    let name = format!("proxy-test:{tag}");
    let mut build = world.engine.docker_command();
    build.env("DOCKER_BUILDKIT", "0").args(["build", "-q", "-t", &name]).arg(context.path());
    let out = build.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    name
}

fn upgrade(world: &World, image: &str) -> (Option<i32>, Value, String) {
    let out = world.installed.command(&["proxy", "upgrade", "--json", "--image", image]).output().unwrap();
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    (out.status.code(), serde_json::from_slice(&out.stdout).unwrap_or_default(), told)
}

fn upgraded(world: &World, image: &str) -> Value {
    let (code, told, error) = upgrade(world, image);
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(runs(world), id_of(world, image));
    assert_whole(world);
    told
}

fn runs(world: &World) -> String {
    world.docker(&["inspect", "-f", "{{.Image}}", PROXY])
}

fn id_of(world: &World, image: &str) -> String {
    world.docker(&["image", "inspect", "-f", "{{.Id}}", image])
}

/// Name, state, restart policy and whether it was ever started, of everything that is the proxy's.
fn proxies(world: &World) -> Vec<(String, bool, String, bool)> {
    let filter = ["--filter", "label=io.replank.application=sample", "--filter", "label=io.replank.role=proxy"];
    let ids = world.docker(&[&["ps", "-aq"], &filter[..]].concat());
    let format = "{{.Name}} {{.State.Running}} {{.HostConfig.RestartPolicy.Name}} {{.State.StartedAt}}";
    let mut arguments = vec!["inspect", "-f", format];
    arguments.extend(ids.split_whitespace());
    let told = world.engine.docker_command().args(&arguments).output().unwrap().stdout;
    let lines = String::from_utf8_lossy(&told).into_owned();
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let name = words[0].trim_start_matches('/').to_owned();
        (name, words[1] == "true", words[2].to_owned(), !words[3].starts_with("0001"))
    };
    lines.lines().map(line).collect()
}

/// One proxy, which runs, and nothing of an upgrade beside it.
fn is_whole(world: &World) -> bool {
    let directory = world.installed.options.home.join("proxy");
    proxies(world) == [(PROXY.to_owned(), true, "always".to_owned(), true)]
        && !directory.join("upgrade").exists()
        && !directory.join("t").exists()
}

fn assert_whole(world: &World) {
    assert!(is_whole(world), "{:?}", proxies(world));
}

/// What a starting engine starts: restarts `always`, and was started before.
fn assert_returns(world: &World, when: &str) {
    let found = proxies(world);
    assert!(found.iter().any(|(_, _, policy, started)| policy == "always" && *started), "{when}: {found:?}");
}

/// The longest time in which no request that was answered was sent: what somebody outside sees of the gap.
fn longest_pause(load: &Load) -> Duration {
    let mut sent: Vec<Instant> = load.answers_since(Instant::now() - MEND_LIMIT).iter().map(|a| a.sent).collect();
    sent.sort();
    sent.windows(2).map(|two| two[1].duration_since(two[0])).max().unwrap_or_default()
}

async fn until(what: &str, world: &World, done: impl AsyncFn() -> bool) {
    let end = Instant::now() + MEND_LIMIT;
    while !done().await {
        assert!(Instant::now() < end, "{what}: not in time; {:?}\n{}", proxies(world), world.report().await);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn networks(world: &World) -> BTreeSet<String> {
    let format = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}";
    world.docker(&["inspect", "-f", format, PROXY]).split_whitespace().map(str::to_owned).collect()
}

async fn steps(world: &World) -> Vec<String> {
    let events = world.installed.history().await.unwrap();
    events.iter().filter(|e| e["event"] == "proxy_upgraded").map(|e| text(e, "step").to_owned()).collect()
}

fn begin(world: &World, image: &str) -> Child {
    let mut command = world.installed.command(&["proxy", "upgrade", "--image", image]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_the_proxy_is_upgraded_under_load_and_a_bad_image_is_not_taken() {
    let world = World::start(&Options { own_engine: true, ..Options::default() });
    let (first, on) = (runs(&world), networks(&world));
    let two = another(&world, "two");

    let load = world.load();
    until("requests are answered", &world, async || load.totals().requests > 50).await;
    let told = upgraded(&world, &two);
    let gap = told["gap_ms"].as_u64().unwrap();
    let since = Instant::now();
    until("it serves", &world, async || load.answers_since(since).len() > 20).await;
    let longest = longest_pause(&load);
    let totals = load.stop().await;
    eprintln!(
        "without an answer for {longest:?}; gap {gap} ms: {} of {} requests failed: {:?}",
        totals.failed, totals.requests, totals.failures
    );
    assert!(gap > 0 && gap < GAP_MAX_MS, "{told}");
    // Nobody was cut off in the middle of an answer: new connections alone were refused.
    let cut: Vec<_> = totals.failures.iter().filter(|f| f.contains("answered 5")).collect();
    assert!(cut.is_empty(), "{cut:?}");
    assert_eq!(networks(&world), on);
    assert_eq!(steps(&world).await, ["begun", "done"]);

    // The same once more changes nothing and interrupts nobody.
    let id = world.docker(&["inspect", "-f", "{{.Id}}", PROXY]);
    assert_eq!(upgraded(&world, &two)["changed"], false);
    assert_eq!(world.docker(&["inspect", "-f", "{{.Id}}", PROXY]), id);

    // Images that are found out before anything is touched.
    let load = world.load();
    for image in [images::BUSYBOX, "replank-there-is-none:1"] {
        let (code, _, error) = upgrade(&world, image);
        assert_eq!(code, Some(1), "{error}");
        assert_eq!(world.docker(&["inspect", "-f", "{{.Id}}", PROXY]), id, "{error}");
        assert_whole(&world);
    }
    let totals = load.stop().await;
    assert_eq!(totals.failed, 0, "{:?}", totals.failures);

    // One that only fails where it has to serve.
    let recipe = format!(
        "FROM {first} AS proxy\nFROM {}\nCOPY --from=proxy /replank /replank\nCOPY entry /entry\nENTRYPOINT [\"/bin/busybox\",\"sh\",\"/entry\"]\n",
        images::BUSYBOX
    );
    let entry = "case \"$*\" in */t) exec /replank \"$@\";; esac\necho no proxy today\nexit 3\n";
    let bad = built(&world, "bad", &recipe, &[("entry", entry)]);
    let (code, _, error) = upgrade(&world, &bad);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("the old one serves again"), "{error}");
    assert_eq!(world.docker(&["inspect", "-f", "{{.Id}}", PROXY]), id);
    assert_whole(&world);
    let load = world.load();
    let since = Instant::now();
    until("the old one serves", &world, async || load.answers_since(since).len() > 20).await;
    drop(load);
    assert_eq!(steps(&world).await.last().unwrap(), "failed");

    // Not while the application is upgraded; and afterwards its upgrades find the proxy as they need it.
    let job = world.start_job("v0.2.0").await;
    let (code, _, error) = upgrade(&world, &two);
    assert_eq!(code, Some(3), "{error}");
    assert!(error.contains("in flight"), "{error}");
    let row = world.rest(&mut vec![]).await;
    assert_eq!((text(&row, "job_id"), text(&row, "state")), (job.as_str(), "succeeded"), "{row:#}");
    world.verify_history();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_an_upgrade_of_the_proxy_killed_at_any_moment_is_mended() {
    const ROUNDS: u32 = 12;
    let world = World::start(&Options { own_engine: true, ..Options::default() });
    let images = [another(&world, "one"), another(&world, "two")];
    let begun = Instant::now();
    upgraded(&world, &images[1]);
    let whole = begun.elapsed();
    let load = world.load();
    for round in 0..ROUNDS {
        let image = &images[usize::try_from(round % 2).unwrap()];
        let child = begin(&world, image);
        tokio::time::sleep(whole * (round + 1) / (ROUNDS + 1)).await;
        kill(child);
        let when = format!("round {round}: {:?}", proxies(&world));
        assert_returns(&world, &when);
        eprintln!("{when}");
        if round % 3 == 2 {
            // By whoever comes first: the command, or a controller.
            upgraded(&world, image);
        } else {
            until("a controller mends it", &world, async || is_whole(&world)).await;
        }
        let since = Instant::now();
        until("it serves", &world, async || load.answers_since(since).len() > 5).await;
    }
    let steps = steps(&world).await;
    assert!(steps.iter().any(|step| step == "restored"), "no kill was in time: {steps:?}");

    // With the machine: one of the two returns, and the other is gone soon after.
    for (round, moment) in ["-trial", "-next", "-old", "-old"].into_iter().enumerate() {
        let image = if runs(&world) == id_of(&world, &images[0]) { &images[1] } else { &images[0] };
        let child = begin(&world, image);
        let seen = || {
            let found = proxies(&world);
            let there = found.iter().any(|(name, ..)| name.ends_with(moment));
            // The second time: both are there, and the new one runs.
            there && (round < 3 || found.iter().any(|(name, running, ..)| name == PROXY && *running))
        };
        let end = Instant::now() + MEND_LIMIT;
        while !seen() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        kill(child);
        eprintln!("{moment}, killed at: {:?}", proxies(&world));
        world.engine.kill_everything().unwrap();
        world.engine.start_again().unwrap();
        let since = Instant::now();
        until("it serves", &world, async || load.answers_since(since).len() > 5).await;
        eprintln!("{moment}: serves {:?} after the engine's return: {:?}", since.elapsed(), proxies(&world));
        until("it is mended", &world, async || is_whole(&world)).await;
        assert!(!world.running().contains(OLD));
    }
    world.verify_history();
}
