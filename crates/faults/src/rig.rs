//! One installation of the sample application whose controllers have fault points, on a real engine.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use replank_testbed::installed::{InstallOptions, Installed, home_in};
use replank_testbed::load::Load;
use replank_testbed::remains::Scratch;
use replank_testbed::repo::Entry;
use replank_testbed::{Engine, GitServer, GitServerOptions, Sample, SampleOptions, cleanup, images, process, sample};
use serde_json::{Value, json};

use crate::gate;

/// The base image of the controllers: the usual one with another program.
pub const RUNTIME: &str = "replank-runtime-with-faults";
/// Short, as every upgrade waits for it; longer than a degrading release takes to be noticed.
const CONFIRM_WINDOW_SECONDS: u64 = 6;
/// Pages that a degrading release gives out before its probe fails; only who has the traffic gives out any.
const PAGES_GOOD: u32 = 60;
/// One line for each that was made; below the directory of the data.
const BACKUPS: &str = "backups";
/// The version of each release whose data step ran.
const MIGRATIONS: &str = "migrations";
/// A whole upgrade with a fault in it, on a busy machine.
pub const JOB_LIMIT: Duration = Duration::from_secs(180);
/// The first releases of the sample are the testbed's own; these follow.
const FIRST_MINOR: u32 = 10;
/// Looks at what is still there, while an installation is removed.
const REMOVALS_MAX: u32 = 25;
const RETRY_EVERY: Duration = Duration::from_millis(200);

pub const RESTING: [&str; 6] = ["idle", "succeeded", "failed_pre", "failed_rollout", "rolled_back", "rollback_failed"];

/// The status of an answer to what was recorded.
const ACCEPTED: u16 = 202;

/// Fields are dropped in this order: what runs on the engine goes first.
#[derive(Debug)]
pub struct Rig {
    pub installed: Installed,
    pub engine: Engine,
    sample: Sample,
    minor: u32,
    /// What the controllers of the next releases are made from, and the record format that it reads.
    controllers: Controllers,
    /// Where data steps write; none where no release has any.
    data: Option<PathBuf>,
    _git: GitServer,
    _scratch: Scratch,
}

/// What a release is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Good,
    /// It degrades while it is used.
    Degrading,
    /// It has a data step, and so a backup is made before it.
    Migrating,
}

/// A base image for controllers.
#[derive(Debug, Clone)]
pub struct Controllers {
    /// The image's name.
    pub runtime: &'static str,
    /// The static program in it.
    pub program: PathBuf,
    /// The highest record format that the program reads.
    pub reads: u32,
}

impl Controllers {
    /// Those with fault points.
    #[must_use]
    pub fn with_faults(program: PathBuf) -> Self {
        Self { runtime: RUNTIME, program, reads: replank_core::format::FORMAT }
    }
}

impl Rig {
    /// Installs a first release, with these controllers and by their program, and a backup for releases that change the data.
    ///
    /// # Errors
    /// When a part does not start, or the deployment fails.
    pub fn with_data(engine: Engine, controllers: Controllers, mode: &'static str) -> Result<Self> {
        let mut rig = Self::prepare(engine, controllers, mode)?;
        let home = &rig.installed.options.home;
        let data = home.join("data");
        std::fs::create_dir_all(&data)?;
        let more = format!(
            "[backup]\ncontainer = \"worker\"\ncommand = [\"sh\", \"-c\", \"echo copied >> /data/{BACKUPS}\"]\n\n\
             [[containers.worker.mounts]]\nsource = \"{}\"\ntarget = \"/data\"\n",
            data.display()
        );
        let file = home.join("replank.toml");
        let configuration = std::fs::read_to_string(&file)? + &more;
        std::fs::write(file, configuration)?;
        rig.data = Some(data);
        rig.installing()
    }

    /// Installs a first release, with these controllers and by their program.
    ///
    /// # Errors
    /// When a part does not start, or the deployment fails.
    pub fn start(engine: Engine, controllers: Controllers, mode: &'static str) -> Result<Self> {
        Self::prepare(engine, controllers, mode)?.installing()
    }

    fn installing(mut self) -> Result<Self> {
        let first = self.release(Kind::Good)?;
        self.installed.deploy(&first)?;
        Ok(self)
    }

    fn prepare(engine: Engine, controllers: Controllers, mode: &'static str) -> Result<Self> {
        cleanup::on_signals()?;
        let gateway = engine.gateway().context("the engine is not on this machine")?;
        let program = controllers.program.clone();
        images::runtime_as(&engine, controllers.runtime, &program, controllers.reads)?;
        let scratch = Scratch::create()?;
        let sample = Sample::create(scratch.path(), SampleOptions::small())?;
        let git = GitServer::start(scratch.path(), &GitServerOptions { bind: IpAddr::V4(gateway), sign_in: None })?;
        let installed = Installed::prepare(InstallOptions {
            socket: engine.socket().to_owned(),
            remote: git.url(sample::NAME),
            replank: program,
            home: home_in(scratch.path()),
            mode,
            confirm_window_seconds: CONFIRM_WINDOW_SECONDS,
            registry: None,
            policy: vec![],
        })?;
        std::fs::create_dir_all(installed.options.home.join(gate::DIRECTORY))?;
        Ok(Self {
            installed,
            engine,
            sample,
            minor: FIRST_MINOR,
            controllers,
            data: None,
            _git: git,
            _scratch: scratch,
        })
    }

    /// Releases from now on have these controllers.
    ///
    /// # Errors
    /// When the engine refuses the image.
    pub fn turn_to(&mut self, controllers: Controllers) -> Result<()> {
        images::runtime_as(&self.engine, controllers.runtime, &controllers.program, controllers.reads)?;
        self.controllers = controllers;
        Ok(())
    }

    /// Publishes the next release, and answers its tag.
    ///
    /// # Errors
    /// When git fails.
    pub fn release(&mut self, kind: Kind) -> Result<String> {
        let version = format!("0.{}.0", self.minor);
        self.minor += 1;
        let health = match kind {
            Kind::Good | Kind::Migrating => "#define HEALTH_STATUS 200\n".to_owned(),
            Kind::Degrading => format!("#define HEALTH_STATUS (pages > {PAGES_GOOD} ? 503 : 200)\n"),
        };
        // Without a word about its data, a release gets a backup for safety's sake.
        let migrate = match kind {
            Kind::Good | Kind::Degrading => String::new(),
            Kind::Migrating => {
                format!("\n[migrate]\nworker = [\"sh\", \"-c\", \"echo {version} >> /data/{MIGRATIONS}\"]\n")
            }
        };
        let manifest = format!("schema = \"compatible\"\n{migrate}");
        let controller = format!(
            "FROM {}\nARG APP_VERSION\nENV APP_VERSION=$APP_VERSION\nLABEL io.replank.reads-format={}\n",
            self.controllers.runtime, self.controllers.reads
        );
        let mut files = vec![
            Entry::file("api/health.h", health),
            Entry::file("controller/Dockerfile", controller),
            Entry::file("NOTES", format!("{version}\n")),
        ];
        // The first builds knew no such manifest.
        if self.data.is_some() {
            files.push(Entry::file(".replank.toml", manifest));
        }
        Ok(self.sample.release(&version, &files, "Another release")?.tag.clone())
    }

    /// A file of the gate's.
    #[must_use]
    pub fn gate(&self, file: &str) -> PathBuf {
        self.installed.options.home.join(gate::DIRECTORY).join(file)
    }

    /// How often the data step of a release ran, and how many backups were made in all.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn data_steps(&self, tag: &str) -> Result<(usize, usize)> {
        let Some(data) = &self.data else { return Ok((0, 0)) };
        let text = |file: &str| {
            let path = data.join(file);
            if path.exists() { std::fs::read_to_string(path) } else { Ok(String::new()) }
        };
        let migrated = text(MIGRATIONS)?.lines().filter(|line| tag.strip_prefix('v') == Some(*line)).count();
        Ok((migrated, text(BACKUPS)?.lines().count()))
    }

    pub fn load(&self) -> Result<Load> {
        let ports = self.installed.ports;
        let targets = [format!("http://127.0.0.1:{}/", ports.api), format!("http://127.0.0.1:{}/", ports.frontend)];
        Load::start(&targets, 2)
    }

    /// Sends a signal to a controller's process, as the host sees it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, revision: &str, signal: &str) -> Result<()> {
        let container = format!("replank-sample-{revision}-controller");
        let pid = self.engine.docker(&["inspect", "-f", "{{.State.Pid}}", &container])?;
        if pid == "0" {
            bail!("{container} does not run");
        }
        process::run(Command::new("kill").args([&format!("-{signal}"), &pid])).map(drop)
    }

    /// Starts an upgrade, again and again until it is recorded, as a client with an idempotency key does; the job's id.
    ///
    /// # Errors
    /// When it is refused for good, or the patience is over.
    pub async fn upgrade(&self, tag: &str) -> Result<String> {
        let body = json!({ "target_version": tag, "confirm_downtime": true, "idempotency_key": tag });
        let row = self.asked("/api/upgrade/start", &body, |_| false).await?;
        Ok(row["job_id"].as_str().unwrap_or_default().to_owned())
    }

    /// Starts the way back, until it is recorded.
    ///
    /// # Errors
    /// As [`Self::upgrade`].
    pub async fn roll_back(&self) -> Result<()> {
        let began = |row: &Value| row["state"] == "rolling_back" || row["state"] == "rolled_back";
        self.asked("/api/upgrade/rollback", &json!({ "reason": "a test" }), began).await.map(drop)
    }

    async fn asked(&self, path: &str, body: &Value, done: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + JOB_LIMIT;
        let mut last = String::new();
        while Instant::now() < end {
            match self.installed.call(reqwest::Method::POST, path, Some(body.clone())).await {
                Ok((ACCEPTED, row)) => return Ok(row),
                Ok((status, answer)) => last = format!("{status} {answer}"),
                Err(error) => last = format!("{error:#}"),
            }
            if let Ok(row) = self.installed.status().await
                && done(&row)
            {
                return Ok(row);
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
        bail!("{path} was not taken within {} s: {last}", JOB_LIMIT.as_secs())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // An engine of our own goes as a whole, and what does not run is in nobody's way.
        let filter = "label=io.replank.application=sample";
        for (list, remove) in [(&["ps", "-aq"][..], &["rm", "-fv"][..]), (&["network", "ls", "-q"], &["network", "rm"])]
        {
            // The controllers go on while they are removed, and remove things too.
            for _ in 0..REMOVALS_MAX {
                let listed = self.engine.docker(&[list, &["--filter", filter]].concat()).unwrap_or_default();
                let ids: Vec<&str> = listed.split_whitespace().collect();
                if ids.is_empty() || self.engine.docker(&[remove, &ids].concat()).is_ok() {
                    break;
                }
                std::thread::sleep(RETRY_EVERY);
            }
        }
    }
}
