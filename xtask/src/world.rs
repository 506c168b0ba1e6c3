//! The real parts around Replank, started together: engine, registry, git server, base images, sample application.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use replank_testbed::leftovers::Leftovers;
use replank_testbed::remains::Scratch;
use replank_testbed::{
    Engine, EngineOptions, GitServer, GitServerOptions, Registry, Sample, SampleOptions, cleanup, engine, images,
    sample, setup,
};

use crate::build::{Build, Profile};

/// The highest record format that the built program reads; the image's label says so.
const READS_FORMAT: u32 = 1;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Generated units of the sample's api: fewer build faster.
    #[arg(long, default_value_t = sample::FULL_UNITS)]
    units: u32,
    /// Put this program into the controller's base image instead of building replank.
    #[arg(long)]
    replank: Option<PathBuf>,
}

/// Fields are dropped in this order: the engine last, as the others may be in use by its containers.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) git: GitServer,
    pub(crate) sample: Sample,
    pub(crate) registry: Registry,
    _leftovers: Option<Arc<Leftovers>>,
    pub(crate) engine: Engine,
    /// Holds the repositories that the git server serves.
    pub(crate) scratch: Scratch,
    pub(crate) replank: PathBuf,
}

impl World {
    /// Sets up what is missing and starts everything. From here on signals clean up.
    ///
    /// # Errors
    /// When a part is missing and cannot be installed, or does not start.
    pub(crate) fn start(replank: PathBuf, units: u32) -> Result<Self> {
        cleanup::on_signals()?;
        let machine = setup::ensure()?;
        let scratch = Scratch::create()?;
        let engine = timed("engine", || machine.engine(&EngineOptions::default()))?;
        // An engine of our own goes as a whole; somebody else's keeps everything but what this run makes.
        let leftovers = engine.pid().is_none().then(|| Leftovers::watch(&engine, scratch.path())).transpose()?;
        // Containers reach the gateway's address as well as this machine does, so one name is right for both. The machine's
        // own engine trusts a registry without TLS on loopback only.
        let gateway = engine.gateway().map(IpAddr::V4);
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let registry_on = if engine.pid().is_some() { gateway.unwrap_or(loopback) } else { loopback };
        let registry = timed("registry", || Registry::start(registry_on))?;
        timed("busybox image", || images::busybox(&engine))?;
        timed("compiler image", || images::cc(&engine))?;
        timed("runtime image", || images::runtime(&engine, &replank, READS_FORMAT))?;
        let (git, sample) = timed("sample repository and git server", || {
            let sample = Sample::create(scratch.path(), SampleOptions { units })?;
            let options = GitServerOptions { bind: gateway.unwrap_or(loopback), sign_in: None };
            Ok((GitServer::start(scratch.path(), &options)?, sample))
        })?;
        Ok(Self { git, sample, registry, _leftovers: leftovers, engine, scratch, replank })
    }

    /// Names and values of what leads tests here.
    #[must_use]
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            (engine::ENGINE_ENV, self.engine.socket().display().to_string()),
            ("REPLANK_TEST_REGISTRY", self.registry.name()),
            ("REPLANK_TEST_GIT", self.git.url(sample::NAME)),
            ("REPLANK_TEST_RUNTIME_IMAGES", [images::BUSYBOX, images::CC, images::RUNTIME].join(" ")),
            ("REPLANK_BIN", self.replank.display().to_string()),
        ]
    }
}

/// `cargo xtask engine`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let replank = Build::replank_or(options.replank.as_deref(), Profile::Dev)?;
    let begin = Instant::now();
    let world = World::start(replank, options.units)?;
    eprintln!("everything stands after {:.1} s\n", begin.elapsed().as_secs_f64());
    for (name, value) in world.environment() {
        println!("export {name}={value:?}");
    }
    println!("export DOCKER_HOST={:?}", world.engine.host());
    for release in &world.sample.releases {
        println!("# {} is {}", release.tag, release.commit);
    }
    println!("# the engine's files and log: {}", world.engine.directory().unwrap_or_default().display());
    eprintln!("\nCtrl-C ends and removes everything.");
    // The signal's thread ends the process.
    loop {
        std::thread::park();
    }
}

fn timed<T>(what: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let made = make()?;
    eprintln!("{what}: {:.1} s", begin.elapsed().as_secs_f64());
    Ok(made)
}
