//! Ways back, on the sample application: the printed commands are run by a plain shell with Replank gone, and what was
//! rolled back is left to be read.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use replank_testbed::installed::{InstallOptions, Installed, client, home_in};
use replank_testbed::remains::Scratch;
use replank_testbed::{Engine, EngineOptions, GitServer, GitServerOptions, Sample, SampleOptions, images, process};
use replank_testbed::{sample, setup};
use serde_json::Value;

/// A whole upgrade of the small sample on a busy machine.
const UPGRADE: Duration = Duration::from_secs(240);
/// What the machine does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// The sample application after its upgrade to v0.2.0, on an engine of its own: its names are fixed. Dropped in this order.
struct World {
    installed: Installed,
    _git: GitServer,
    _sample: Sample,
    engine: Engine,
    _scratch: Scratch,
}

impl World {
    /// v0.2.0 begun, v0.1.0 running.
    async fn started(confirm_window_seconds: u64) -> Self {
        let scratch = Scratch::create().expect("scratch");
        let engine = setup::ensure().and_then(|machine| machine.engine(&EngineOptions::default())).expect("engine");
        let replank = Path::new(env!("CARGO_BIN_EXE_replank"));
        images::busybox(&engine).expect("busybox image");
        images::cc(&engine).expect("compiler image");
        images::runtime(&engine, replank, 1).expect("runtime image");
        let sample = Sample::create(scratch.path(), SampleOptions::small()).expect("sample");
        let bind = engine.gateway().expect("a gateway").into();
        let git = GitServer::start(scratch.path(), &GitServerOptions { bind, sign_in: None }).expect("git server");
        let installed = Installed::prepare(InstallOptions {
            socket: engine.socket().to_owned(),
            remote: git.url(sample::NAME),
            replank: replank.to_owned(),
            home: home_in(scratch.path()),
            mode: "blue-green",
            confirm_window_seconds,
            registry: None,
            policy: vec![],
        })
        .expect("configuration");
        installed.deploy("v0.1.0").expect("the first deployment");
        installed.start("v0.2.0", false).await.expect("start");
        Self { installed, _git: git, _sample: sample, engine, _scratch: scratch }
    }

    async fn upgraded() -> Self {
        let world = Self::started(2).await;
        let mut states = vec![];
        let ends = ["succeeded", "failed_pre", "failed_rollout", "rolled_back", "rollback_failed"];
        let row = world.installed.until_state(UPGRADE, &mut states, &ends).await.expect("an end");
        assert_eq!(row["state"], "succeeded", "{states:?}: {row}");
        world
    }

    fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments).unwrap_or_else(|error| panic!("docker {arguments:?}: {error:#}"))
    }

    /// Names of a release's containers, controllers aside: all, or those that run.
    fn containers(&self, release: &str, running: bool) -> Vec<String> {
        let status = if running { "status=running" } else { "label=io.replank.role=app" };
        let name = format!("name=-v{}-", release.replace('.', "-"));
        let listed = self.docker(&["ps", "-a", "--filter", &name, "--filter", status, "--format", "{{.Names}}"]);
        listed.lines().filter(|name| !name.ends_with("-controller")).map(str::to_owned).collect()
    }

    /// What an operator notes down before anything is wrong.
    fn commands(&self) -> Vec<String> {
        let told = process::text(&mut self.installed.command(&["escape-hatch", "--json"])).expect("escape-hatch");
        let told: Value = serde_json::from_str(&told).expect("JSON");
        let commands: Vec<String> = serde_json::from_value(told["commands"].clone()).expect("commands");
        assert!(commands.len() > 5, "{told}");
        commands
    }

    /// Every controller, for good.
    fn replank_is_gone(&self) {
        let filter = "label=io.replank.container=controller";
        let ids = self.docker(&["ps", "-aq", "--filter", filter]);
        let ids: Vec<&str> = ids.split_whitespace().collect();
        assert_eq!(ids.len(), 2, "a controller of each revision");
        self.docker(&[&["rm", "-f"], &ids[..]].concat());
    }

    /// With nothing in the environment but the way to the plain tools.
    fn by_hand(&self, commands: &[String]) {
        for command in commands {
            let output = Command::new("/bin/sh")
                .args(["-euc", command])
                .env_clear()
                .env("PATH", "/usr/bin:/bin")
                .output()
                .expect("a shell");
            assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// The version that both public ports answer with, within `patience`.
    async fn serves(&self, version: &str, patience: Duration) {
        let http = client(Duration::from_secs(5)).expect("client");
        let end = Instant::now() + patience;
        for port in [self.installed.ports.api, self.installed.ports.frontend] {
            loop {
                let answer = http.get(format!("http://127.0.0.1:{port}/")).send().await;
                let found = answer.as_ref().ok().filter(|a| a.status().is_success());
                let found = found.and_then(|a| a.headers().get("x-app-version")).map(|v| v.as_bytes().to_owned());
                if found.as_deref() == Some(version.as_bytes()) {
                    break;
                }
                assert!(Instant::now() < end, "port {port} is not {version}: {found:?} {answer:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    async fn until_retired(&self, release: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.containers(release, true).is_empty() {
            assert!(Instant::now() < end, "{release} still runs: {}", self.docker(&["ps"]));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The old version alone, also after the machine lost its power.
    async fn is_back(&self) {
        self.serves("0.1.0", Duration::ZERO).await;
        assert_eq!(self.containers("0.1.0", true).len(), 3);
        assert_eq!(self.containers("0.2.0", true), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn printed_commands_bring_the_old_version_back_with_replank_gone() {
    let world = World::upgraded().await;
    world.until_retired("0.1.0").await;
    let commands = world.commands();
    world.replank_is_gone();
    // Nobody misses it: the proxy goes on by itself.
    world.serves("0.2.0", Duration::ZERO).await;
    // Again, as a person would who is not sure.
    for _ in 0..2 {
        world.by_hand(&commands);
        world.is_back().await;
    }
    world.engine.kill_everything().expect("kill");
    world.engine.start_again().expect("start");
    world.serves("0.1.0", PATIENCE).await;
    world.is_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn printed_commands_make_the_old_version_again_where_it_was_removed() {
    let world = World::upgraded().await;
    world.until_retired("0.1.0").await;
    let commands = world.commands();
    world.replank_is_gone();
    let old = world.containers("0.1.0", false);
    assert_eq!(old.len(), 3, "{old:?}");
    let format = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}";
    let network = world.docker(&["inspect", "-f", format, &old[0]]);
    for container in &old {
        world.docker(&["rm", "-f", container]);
    }
    world.docker(&["network", "disconnect", "-f", &network, "replank-sample-proxy"]);
    world.docker(&["network", "rm", &network]);
    world.serves("0.2.0", Duration::ZERO).await;
    world.by_hand(&commands);
    world.serves("0.1.0", PATIENCE).await;
    world.is_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rolled_back_stays_stopped_with_its_logs() {
    // Long enough for an operator who is quick; the first deployment waits for it too.
    let world = World::started(20).await;
    let open = |row: &Value| row["confirm_deadline"].as_str().is_some_and(|at| !at.is_empty());
    world.installed.until(UPGRADE, &mut vec![], open).await.expect("the confirm window");
    world.installed.rollback("not as it should be").await.expect("rollback");
    let ends = ["rolled_back", "rollback_failed"];
    let row = world.installed.until_state(UPGRADE, &mut vec![], &ends).await.expect("an end");
    assert_eq!(row["state"], "rolled_back", "{row}");
    world.until_retired("0.2.0").await;
    world.is_back().await;
    let kept = world.containers("0.2.0", false);
    assert_eq!(kept.len(), 3, "{kept:?}");
    for container in &kept {
        assert_eq!(world.docker(&["inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", container]), "no");
    }
    let worker = kept.iter().find(|name| name.ends_with("-worker")).expect("a worker");
    assert!(!world.docker(&["logs", worker]).is_empty(), "its log can still be read");
    // Its controller too, which no revision can stop for itself.
    let controller = worker.replace("-worker", "-controller");
    let end = Instant::now() + PATIENCE;
    while world.docker(&["inspect", "-f", "{{.State.Running}}", &controller]) != "false" {
        assert!(Instant::now() < end, "{controller} still runs");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
