//! One installation of the sample application on an engine, and what the cases ask of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use replank_testbed::installed::{InstallOptions, Installed, home_in};
use replank_testbed::load::Load;
use replank_testbed::remains::Scratch;
use replank_testbed::repo::Entry;
use replank_testbed::{
    Engine, EngineOptions, GitServer, GitServerOptions, Sample, SampleOptions, cleanup, images, process, sample,
};
use serde_json::Value;

/// A whole upgrade with a kill in it, on a busy machine.
pub const JOB_LIMIT: Duration = Duration::from_secs(180);
/// Promise 1.
pub const RESUME_LIMIT_SECONDS: f64 = 30.0;
/// Long enough to be killed in, short enough to wait for.
const CONFIRM_WINDOW_SECONDS: u64 = 4;
/// Only who has the traffic gives out pages, and a load takes some seconds for so many.
pub const PAGES_GOOD: u32 = 400;
/// Between two looks at the history when a certain moment is waited for: shorter than an engine's answer.
const LOOK_EVERY: Duration = Duration::from_millis(3);
/// Looks at what is still there, while an installation is removed.
const REMOVALS_MAX: u32 = 25;
/// The highest record format that the program reads.
const READS_FORMAT: u32 = 1;

pub const RESTING: [&str; 6] = ["idle", "succeeded", "failed_pre", "failed_rollout", "rolled_back", "rollback_failed"];

#[derive(Debug, Clone)]
pub struct Options {
    pub mode: &'static str,
    /// An engine that may be killed, instead of the one that all tests share. It is not tidied up: it goes as a whole.
    pub own_engine: bool,
    pub units: u32,
    /// Good releases that follow v0.3.0, which is the bad one.
    pub more: &'static [&'static str],
    /// A release after those whose api answers its probes well until it has given out [`PAGES_GOOD`] pages.
    pub degrades: Option<&'static str>,
    pub confirm_window_seconds: u64,
    pub policy: &'static [&'static str],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: "blue-green",
            own_engine: false,
            units: SampleOptions::small().units,
            more: &[],
            degrades: None,
            confirm_window_seconds: CONFIRM_WINDOW_SECONDS,
            policy: &[],
        }
    }
}

/// Fields are dropped in this order: the engine after everything that runs in it.
pub struct World {
    events: Option<Child>,
    pub installed: Installed,
    pub engine: Engine,
    pub git: GitServer,
    _scratch: Scratch,
    own_engine: bool,
}

impl World {
    /// Installs v0.1.0.
    pub fn start(options: &Options) -> Self {
        cleanup::on_signals().unwrap();
        let engine = if options.own_engine {
            let engine = Engine::start(&EngineOptions::default()).unwrap();
            base_images(&engine);
            engine
        } else {
            Engine::from_env().unwrap()
        };
        Self::install(engine, Scratch::create().unwrap(), options)
    }

    /// The same on an engine that has the base images.
    pub fn install(engine: Engine, scratch: Scratch, options: &Options) -> Self {
        let gateway = engine.gateway().expect("an engine on this machine");
        let mut sample = Sample::create(scratch.path(), SampleOptions { units: options.units }).unwrap();
        let health = |text: &str| Entry::file("api/health.h", text);
        for version in options.more {
            let notes = Entry::file("NOTES", format!("{version}\n"));
            let files = [health(include_str!("../../../testbed/sample/api/health.h")), notes];
            sample.release(version, &files, "A release that works").unwrap();
        }
        if let Some(version) = options.degrades {
            let degrades = format!("#define HEALTH_STATUS (pages > {PAGES_GOOD} ? 503 : 200)\n");
            sample.release(version, &[health(&degrades)], "A release that works for a while").unwrap();
        }
        let git =
            GitServer::start(scratch.path(), &GitServerOptions { bind: IpAddr::V4(gateway), sign_in: None }).unwrap();
        let installed = Installed::prepare(InstallOptions {
            socket: engine.socket().to_owned(),
            remote: git.url(sample::NAME),
            replank: binary(),
            home: home_in(scratch.path()),
            mode: options.mode,
            confirm_window_seconds: options.confirm_window_seconds,
            registry: None,
            policy: options.policy.iter().map(|line| (*line).to_owned()).collect(),
        })
        .unwrap();
        let own_engine = options.own_engine;
        let world = Self { events: None, installed, engine, git, _scratch: scratch, own_engine };
        world.installed.deploy("v0.1.0").unwrap();
        world
    }

    pub fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments).unwrap()
    }

    pub fn load(&self) -> Load {
        let ports = self.installed.ports;
        // The api first: its answers are the ones whose versions are followed.
        let targets = [format!("http://127.0.0.1:{}/", ports.api), format!("http://127.0.0.1:{}/", ports.frontend)];
        Load::start(&targets, 2).unwrap()
    }

    /// Names of this application's containers that run.
    pub fn running(&self) -> BTreeSet<String> {
        self.docker(&["ps", "--filter", "label=io.replank.application=sample", "--format", "{{.Names}}"])
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// The host's process of a container. Panics when it does not run.
    pub fn pid(&self, container: &str) -> String {
        let pid = self.docker(&["inspect", "-f", "{{.State.Pid}}", container]);
        assert_ne!(pid, "0", "{container} does not run");
        pid
    }

    pub async fn row(&self) -> Value {
        self.installed.until(Duration::from_secs(60), &mut vec![], |_| true).await.unwrap()
    }

    /// Starts a release and gives the job.
    pub async fn start_job(&self, version: &str) -> String {
        let row = self.installed.start(version, false).await.unwrap();
        text(&row, "job_id").to_owned()
    }

    /// This job's events so far; `None` while no controller answers.
    pub async fn events_of(&self, job: &str) -> Option<Vec<Value>> {
        let events = self.installed.history().await.ok()?;
        Some(events.into_iter().filter(|event| event["job_id"] == job).collect())
    }

    /// Waits for a recorded event of the job, looking as often as it can.
    pub async fn until_event(&self, job: &str, moment: Moment) -> Value {
        self.until_event_after(job, Moment("start", None), moment).await
    }

    /// The same, of the last `first` or of what came after it.
    pub async fn until_event_after(&self, job: &str, first: Moment, moment: Moment) -> Value {
        let end = Instant::now() + JOB_LIMIT;
        let mut last = Vec::new();
        while Instant::now() < end {
            if let Some(events) = self.events_of(job).await {
                let from = events.iter().rposition(|event| first.is(event)).unwrap_or(events.len());
                if let Some(found) = events[from..].iter().find(|event| moment.is(event)) {
                    return found.clone();
                }
                last = events;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        panic!("{moment:?} was not recorded within {JOB_LIMIT:?}: {last:#?}");
    }

    /// The controller that drives, by the last event that names one.
    pub async fn driver(&self) -> String {
        let events = self.installed.history().await.unwrap();
        let named = events.iter().rev().find(|e| e["event"] == "handed_over" || e["event"] == "took_over");
        named.map(|event| text(event, "to").to_owned()).expect("somebody drives")
    }

    pub fn controller_of(revision: &str) -> String {
        format!("replank-sample-{revision}-controller")
    }

    /// Follows the job to a resting state.
    pub async fn rest(&self, states: &mut Vec<String>) -> Value {
        let rested = self.installed.until_state(JOB_LIMIT, states, &RESTING).await;
        match rested {
            Ok(row) => row,
            Err(error) => panic!("{error:#}\n{}", self.report().await),
        }
    }

    /// `replank history --verify`, as an auditor would.
    pub fn verify_history(&self) {
        process::text(&mut self.installed.command(&["history", "--verify"])).unwrap();
    }

    /// A build log's text.
    pub fn log(&self, job: &str, component: &str) -> String {
        process::text(&mut self.installed.command(&["logs", "--job", job, component])).unwrap()
    }

    /// Keeps every container that the engine makes from now on.
    pub fn watch_creations(&mut self) {
        let child = self
            .engine
            .docker_command()
            .args(["events", "--filter", "type=container", "--filter", "event=create"])
            .args(["--filter", "label=io.replank.application=sample", "--format", "{{.Actor.Attributes.name}}"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        self.events = Some(child);
    }

    /// How often each container was made since [`Self::watch_creations`].
    pub fn creations(&mut self) -> BTreeMap<String, u32> {
        let mut child = self.events.take().expect("creations are watched");
        child.kill().unwrap();
        let mut told = String::new();
        child.stdout.take().unwrap().read_to_string(&mut told).unwrap();
        child.wait().unwrap();
        let mut made = BTreeMap::new();
        for name in told.lines() {
            *made.entry(name.to_owned()).or_default() += 1;
        }
        made
    }

    /// What a person would look at when a case fails.
    pub async fn report(&self) -> String {
        let shown = |arguments: &[&str]| self.engine.docker(arguments).unwrap_or_else(|e| format!("{e:#}"));
        let status = self.installed.status().await.map_or_else(|e| format!("{e:#}"), |row| row.to_string());
        let events = self.installed.history().await.unwrap_or_default();
        let mut report = format!("status: {status}\n{}", shown(&["ps", "-a", "--format", "{{.Names}} {{.Status}}"]));
        for event in events.iter().rev().take(60).rev() {
            let mut event = event.clone();
            event["prev_hash"].take();
            event["commands"].take();
            report.push_str(&format!("\n{event}"));
        }
        for name in shown(&["ps", "-a", "--format", "{{.Names}}"]).lines() {
            if name.contains("controller") || name.ends_with("proxy") {
                let out = self.engine.docker_command().args(["logs", "--tail", "60", name]).output();
                let (out, err) = out.map_or((vec![], vec![]), |out| (out.stdout, out.stderr));
                let both = [String::from_utf8_lossy(&out), String::from_utf8_lossy(&err)].concat();
                report.push_str(&format!("\n--- {name}\n{both}"));
            }
        }
        report
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut child) = self.events.take() {
            child.kill().ok();
            child.wait().ok();
        }
        if self.own_engine {
            return;
        }
        // The proxy is made first, so whatever is there carries the same installation as it does.
        let label = "{{index .Config.Labels \"io.replank.installation\"}}";
        let Ok(installation) = self.engine.docker(&["inspect", "-f", label, "replank-sample-proxy"]) else { return };
        let filter = format!("label=io.replank.installation={installation}");
        for (list, remove) in [(&["ps", "-aq"][..], &["rm", "-fv"][..]), (&["network", "ls", "-q"], &["network", "rm"])]
        {
            // The controllers go on while they are removed, and remove things too.
            for _ in 0..REMOVALS_MAX {
                let listed = self.engine.docker(&[list, &["--filter", &filter]].concat()).unwrap_or_default();
                let ids: Vec<&str> = listed.split_whitespace().collect();
                if ids.is_empty() || self.engine.docker(&[remove, &ids].concat()).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

/// What the sample's components are built on.
pub fn base_images(engine: &Engine) {
    images::busybox(engine).unwrap();
    images::cc(engine).unwrap();
    images::runtime(engine, &binary(), READS_FORMAT).unwrap();
}

/// A recorded event: its name and, for operations, which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(pub &'static str, pub Option<&'static str>);

impl Moment {
    pub fn is(self, event: &Value) -> bool {
        event["event"] == self.0 && self.1.is_none_or(|op| event["op"] == op)
    }
}

pub fn text<'a>(row: &'a Value, field: &str) -> &'a str {
    row[field].as_str().unwrap_or_default()
}

pub fn time_of(event: &Value) -> Timestamp {
    text(event, "ts").parse().expect("events carry a time")
}

/// Beside the times of events, which the controller's clock gave.
#[expect(clippy::disallowed_methods, reason = "a test has no clock port, and compares with the system's time")]
pub fn now() -> Timestamp {
    Timestamp::now()
}

/// The static program under test.
pub fn binary() -> PathBuf {
    std::env::var_os("REPLANK_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_replank")), PathBuf::from)
}

/// Whether the long form of a case was asked for.
pub fn is_full() -> bool {
    ["REPLANK_FULL", "REPLANK_TEST_FULL"].iter().any(|name| std::env::var_os(name).is_some_and(|value| value == "1"))
}

/// SIGKILL of a process of the host.
pub fn kill_9(pid: &str) {
    process::run(Command::new("kill").args(["-9", pid])).unwrap();
}

/// SIGSTOP: it does nothing more from here on, whatever else is still to be killed.
pub fn freeze(pid: &str) {
    process::run(Command::new("kill").args(["-STOP", pid])).unwrap();
}
