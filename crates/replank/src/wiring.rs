//! The two commands that run a controller: `serve`, for as long as the process lives, and `deploy`, until the application
//! has a controller of its own.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use replank_adapters::platform::docker::{DockerPlatform, Vantage};
use replank_core::phase::Phase;
use replank_core::ports::{EscapeHatch, Ledger, Platform as _, Tokens};
use replank_core::record::{Actor, ControllerId, Record};
use replank_core::transition::reverse_of;
use replank_core::words::Version;
use replank_exec::outbound::SystemResolver;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use crate::assemble::{self, Between, Controller};
use crate::config::Settings;
use crate::config::env::Environment;
use crate::engine::api::{Engine as _, Refusal, StartRequest};
use crate::engine::{Reconciler, Shared};
use crate::http::row::Row;
use crate::http::{Http, Options};
use crate::proxy_upgrade;
use crate::refusals::{self, Asked};
use crate::system::SystemClock;
use crate::webhooks::{Courier, Pace};

/// How often the remote is looked at without being asked.
const CHECK_EVERY: Duration = Duration::from_secs(15 * 60);

/// `replank serve`, parsed and checked.
#[derive(Debug, Clone)]
pub struct ServeArgs {
    pub settings: Settings,
    /// The command line's word over the file's.
    pub listen: SocketAddr,
    /// The answer of [`crate::http::dev_bypass`]: requests without a token count as the development identity.
    pub dev_bypass: bool,
    pub between: Between,
}

/// `replank deploy`, parsed and checked.
#[derive(Debug, Clone)]
pub struct DeployArgs {
    pub settings: Settings,
    /// A release; the newest where absent.
    pub version: Option<Version>,
    pub json: bool,
    /// Who types.
    pub actor: Actor,
}

/// The token store, for `replank token list` and `replank history --refusals`.
pub async fn tokens(settings: &Settings) -> anyhow::Result<Arc<dyn Tokens>> {
    Ok(assemble::open_ledger(settings).await?.1)
}

/// The token store, and the history that its changes go into.
pub async fn token_changes(settings: &Settings) -> anyhow::Result<(Arc<dyn Tokens>, Arc<dyn Ledger>)> {
    let (_, ledger) = assemble::open_ledger(settings).await?;
    if let Err(error) = assemble::first_record(ledger.as_ref(), settings).await {
        // Whoever needs the record is told by what it cannot do without one; a token can be revoked all the same.
        tracing::warn!(error = %format!("{error:#}"), "the record cannot be read");
    }
    Ok((ledger.clone(), ledger))
}

/// The ledger, for `replank history --verify`.
pub async fn ledger(settings: &Settings) -> anyhow::Result<Arc<dyn Ledger>> {
    Ok(assemble::open_ledger(settings).await?.1)
}

/// The way back as the ledger's record gives it, for `replank escape-hatch` without a service. `None` without a snapshot.
pub async fn escape_hatch(settings: &Settings) -> anyhow::Result<Option<EscapeHatch>> {
    let (_, ledger) = assemble::open_ledger(settings).await?;
    let Some((record, _)) = ledger.load().await? else { return Ok(None) };
    let Some(swap) = reverse_of(&record).filter(|_| settings.platform.runs) else { return Ok(None) };
    let config = settings.docker(record.installation.clone());
    let platform = DockerPlatform::new(config, Vantage::Host, Arc::new(SystemClock))?;
    Ok(Some(platform.escape_hatch(&swap.to, swap.from.as_ref(), record.generation)))
}

/// Runs a controller until it is told to stop.
pub async fn serve(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let ServeArgs { settings, listen, dev_bypass, between } = args;
    let env = Environment::of_process();
    let controller = assemble::controller(&settings, &env, between).await?;
    let listener = tokio::net::TcpListener::bind(listen).await.with_context(|| {
        format!("the address {listen} cannot be listened on; choose another one in [server] listen")
    })?;
    tracing::info!(%listen, controller = %controller.setup.me, version = env!("CARGO_PKG_VERSION"), "replank serves");

    let engine = controller.engine.clone();
    let tokens = controller.tokens.clone();
    let telemetry = controller.shared.telemetry.clone();
    let options = Options { telemetry: telemetry.clone(), ..Options::of(&settings, dev_bypass) };
    let http = Http::new(engine.clone(), tokens, controller.ports.clock.clone(), options);
    let reconciler = Reconciler::new(controller.ports.clone(), controller.setup.clone(), controller.shared.clone());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop; what is under way goes on when a controller is back");
    };
    let courier = Courier {
        ledger: controller.ports.ledger.clone(),
        cursors: controller.cursors.clone(),
        clock: controller.ports.clock.clone(),
        resolver: Arc::new(SystemResolver),
        me: controller.setup.me.clone(),
        live: engine.live(),
        pace: Pace::default(),
    };
    let docker = controller.docker.clone();
    let after = docker.map(|docker| tokio::spawn(proxy_upgrade::look_after(docker, controller.ports.ledger.clone())));
    let _after = after.map(AbortOnDropHandle::new);
    let _telling = AbortOnDropHandle::new(tokio::spawn(courier.run(controller.hooks.clone())));
    let mut looking = tokio::spawn(look_regularly(engine));
    tokio::select! {
        () = crate::http::serve(listener, http, stop) => {}
        () = reconciler.run(|_| false) => {}
        ended = &mut looking => ended.context("the regular look at the remote ended")?,
    }
    looking.abort();
    telemetry.close().await;
    Ok(ExitCode::SUCCESS)
}

/// Looks at the remote now and then. Failures are shown by the next look of a person, who also gets the reason.
async fn look_regularly(engine: Arc<crate::engine::LocalEngine>) {
    loop {
        match engine.check(&Actor::system()).await {
            Ok(_) | Err(Refusal::TooSoon { .. }) => {}
            Err(refusal) => tracing::warn!(why = %refusal, "the remote could not be looked at"),
        }
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

/// The first deployment: this process drives until the new revision's controller has taken over.
pub async fn deploy(args: DeployArgs) -> anyhow::Result<ExitCode> {
    let env = Environment::of_process();
    let settings = &args.settings;
    let controller = assemble::controller(settings, &env, assemble::as_they_are).await?;
    let Some(docker) = &controller.docker else {
        let why = "this configuration runs nothing, so there is nothing to deploy; run `replank serve`, and `replank start` \
                   builds a release";
        return Err(refused(&controller, &args, Refusal::Conflict(why.to_owned())).await);
    };
    let record = controller.engine.record().await?;
    if let Some(running) = &record.running {
        let why = format!(
            "{} is deployed already: version {} runs as revision {}; use `replank start` for the next version",
            settings.application, running.version, running.revision
        );
        return Err(refused(&controller, &args, Refusal::Conflict(why)).await);
    }
    let image = match &settings.platform.proxy.image {
        Some(image) => image.clone(),
        None => {
            let binary = std::env::current_exe().context("the path of this program is not known")?;
            docker.proxy_image(&binary).await?
        }
    };
    docker.ensure_proxy(&image).await?;

    let mut teller = Teller::new(&args, &controller);
    if record.phase.state().in_flight() {
        teller.say("going on with the deployment that was begun");
    } else if let Err(refusal) = start(&controller, &args).await {
        return Err(refused(&controller, &args, refusal).await);
    }
    let last = drive(&controller, &mut teller).await?;
    controller.shared.telemetry.close().await;
    match (&last.phase, &last.running) {
        (Phase::Succeeded { .. }, Some(running)) => {
            let runs = format!("{} {} runs as revision {}", settings.application, running.version, running.revision);
            teller.say(&runs);
            Ok(ExitCode::SUCCESS)
        }
        (Phase::FailedPre { fault } | Phase::FailedRollout { fault, .. } | Phase::RollbackFailed { fault, .. }, _) => {
            anyhow::bail!("the deployment ended as '{}': {}", last.phase.state().name(), fault.sentence())
        }
        _ => anyhow::bail!("the deployment ended as '{}'", last.phase.state().name()),
    }
}

/// Writes a refusal down as the service does with a request's: who tried what, and why not. What cannot be had now is a failure
/// and no refusal.
async fn refused(controller: &Controller, args: &DeployArgs, refusal: Refusal) -> anyhow::Error {
    match &refusal {
        Refusal::Invalid(why) | Refusal::Conflict(why) | Refusal::NotFound(why) => {
            let action = args.version.as_ref().map_or("deploy".to_owned(), |version| format!("deploy {version}"));
            let at = controller.ports.clock.now();
            let asked = Asked { at, actor: &args.actor.oid, from: &args.actor.from, action: &action };
            refusals::write_down(controller.tokens.as_ref(), asked, why).await;
        }
        Refusal::TooSoon { .. } | Refusal::Unavailable(_) => {}
    }
    refusal.into()
}

async fn start(controller: &Controller, args: &DeployArgs) -> Result<(), Refusal> {
    let actor = Actor { oid: "host".to_owned(), name: "replank deploy".to_owned(), from: "host".to_owned() };
    match controller.engine.check(&actor).await {
        Ok(_) | Err(Refusal::TooSoon { .. }) => {}
        Err(refusal) => return Err(refusal),
    }
    let request = StartRequest {
        target_version: args.version.as_ref().map(ToString::to_string),
        confirm_downtime: true,
        // A first deployment that failed may be tried again without ceremony: nothing runs that it could harm.
        override_quarantine: true,
        reason: Some("deployed by hand, as nothing runs yet".to_owned()),
        accept_one_way: true,
        ..StartRequest::default()
    };
    controller.engine.start(&actor, request).await?;
    Ok(())
}

/// Drives to a resting state, telling each step.
async fn drive(controller: &Controller, teller: &mut Teller) -> anyhow::Result<Record> {
    let reconciler = Reconciler::new(controller.ports.clone(), controller.setup.clone(), controller.shared.clone());
    reconciler
        .run(|record| {
            teller.tell(record);
            !record.phase.state().in_flight()
        })
        .await;
    teller.last.take().context("the ledger has no record")
}

/// What a deployment says while it goes on: each new state on standard error for people, or each new row as one JSON
/// object a line on standard output, as `start --json` does.
struct Teller {
    json: bool,
    remote: String,
    shared: Arc<Shared>,
    begun: Instant,
    last: Option<Record>,
}

impl Teller {
    fn new(args: &DeployArgs, controller: &Controller) -> Self {
        let remote = args.settings.shown_remote().unwrap_or_default();
        Self { json: args.json, remote, shared: controller.shared.clone(), begun: Instant::now(), last: None }
    }

    fn say(&self, text: &str) {
        if !self.json {
            eprintln!("{text}");
        }
    }

    fn tell(&mut self, record: &Record) {
        if self.last.as_ref() == Some(record) {
            return;
        }
        if self.json {
            let row = Row::of(record, &self.shared.live.borrow(), &self.remote);
            let line = serde_json::to_string(&row).unwrap_or_default();
            // A reader that went away must not end the deployment; whether it went well, the exit code tells.
            if let Err(error) = writeln!(std::io::stdout(), "{line}") {
                tracing::debug!(%error, "nobody reads the rows");
            }
        }
        let told = self.last.as_ref().map(|last| (last.phase.state(), &last.driver.controller));
        let now = (record.phase.state(), &record.driver.controller);
        if told != Some(now) {
            let by = match now.1 {
                ControllerId::Host => String::new(),
                ControllerId::Revision(id) => format!(" (driven by revision {id})"),
            };
            self.say(&format!("{:7.1} s  {}{by}", self.begun.elapsed().as_secs_f64(), now.0.name()));
        }
        self.last = Some(record.clone());
    }
}
