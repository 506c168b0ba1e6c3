//! From `replank.toml` and the environment to [`Settings`]: raw, merged, validated. Only the validated type travels.

mod check;
mod data;
pub mod env;
pub mod manifest;
mod outward;
mod places;
mod raw;
pub mod reader;
mod reference;
mod signed;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use replank_adapters::platform::docker::config::{
    ContainerConfig, DataConfig, DockerConfig, ListenerConfig, ProxyConfig, SecretSource,
};
use replank_adapters::source::git::Verify;
use replank_core::phase::Mode;
use replank_core::policy::Policy;
use replank_core::record::OnRolloutFailure;
use replank_core::words::{AppName, ComponentName, ContainerName, InstallationId};
use replank_exec::outbound::Reach;
use url::Url;

use env::Environment;
pub use outward::WebhookEvent;
pub use raw::Builder;
use reader::{Document, Problem, TEXT_MAX};

/// The file's usual name.
pub const FILE: &str = "replank.toml";
/// Where the service listens unless told otherwise: loopback, so that nothing is public by accident.
pub const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8086);

/// Everything an operator decides, checked. Made by [`Settings::load`] only.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The configuration file, absolute.
    pub file: PathBuf,
    /// The directory of the file: `ledger/`, `proxy/`, `work/` and `tokens/` live in it.
    pub home: PathBuf,
    pub application: AppName,
    /// `None`: nothing is ever discovered, and status says so.
    pub source: Option<SourceSettings>,
    pub server: ServerSettings,
    pub build: BuildSettings,
    pub registry: Option<RegistrySettings>,
    /// Where git and az run; present where the builder drives them through the exec channel.
    pub exec: Option<ExecSettings>,
    pub components: BTreeMap<ComponentName, ComponentSettings>,
    pub platform: PlatformSettings,
    pub policy: Policy,
    pub mode: Mode,
    pub on_rollout_failure: OnRolloutFailure,
    pub telemetry: TelemetrySettings,
    pub webhooks: Vec<WebhookSettings>,
    /// `UPGRADE_ADMIN_OIDS`: counts for verified identities only, never for tokens.
    pub admin_oids: BTreeSet<String>,
    /// `APP_VERSION`: the version that this controller's own image was built as.
    pub app_version: Option<String>,
    /// `CONTAINER_APP_NAME`: set where this runs on Azure Container Apps.
    pub container_app: Option<String>,
    /// `REPLANK_REVISION`: set by the platform inside a deployed revision.
    pub revision: Option<String>,
    /// `AUTH_DEV_BYPASS`; by itself it does nothing here (security rules, Sign-in): see the http module.
    pub auth_dev_bypass: bool,
}

#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// As configured; the source adapter judges the URL itself. Shown only through [`shown`].
    pub remote: String,
    pub branch: String,
    pub credential: Option<CredentialSettings>,
    pub allow_loopback: bool,
    pub allow_private: bool,
    pub ca_file: Option<PathBuf>,
    /// Whether only signed tags are releases, and where the keys are that may have signed them.
    pub verify: Verify,
}

#[derive(Debug, Clone)]
pub struct CredentialSettings {
    pub username: String,
    pub password: SecretSource,
}

#[derive(Debug, Clone)]
pub struct ServerSettings {
    pub listen: SocketAddr,
    /// Lower case, each `host` or `host:port`.
    pub public_hosts: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct BuildSettings {
    pub builder: Builder,
    pub parallel: usize,
    pub memory_bytes: Option<u64>,
    pub cpu_millis: Option<u32>,
    pub secrets: BTreeMap<String, SecretSource>,
}

#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// `host` or `host:port`.
    pub host: String,
    /// The name of the Azure registry that the host is.
    pub acr: Option<String>,
    pub push: bool,
    pub insecure: bool,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
}

/// How a component's image is built when the release says nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComponentSettings {
    pub dockerfile: String,
    pub context: String,
    pub target: Option<String>,
    pub args: BTreeMap<String, String>,
    pub platform: Option<String>,
    pub secrets: Vec<String>,
    /// The build argument that a commit target's abbreviated commit goes into.
    pub commit_arg: Option<String>,
    /// Without a tag; begins with the registry's host where one is configured.
    pub repository: String,
}

/// The other end of the exec channel, and what goes through it.
#[derive(Debug, Clone)]
pub struct ExecSettings {
    /// `http://HOST:PORT` or `HOST:PORT`.
    pub url: String,
    pub token: SecretSource,
    /// Where clones go on the exec server's disk.
    pub clone_root: PathBuf,
    /// A server that cannot be given the remote's credential apart gets it in the address.
    pub credential_in_url: bool,
    pub wait_out: Duration,
    /// The managed identity that `az` and the registry's client sign in as.
    pub client_id: Option<String>,
}

#[derive(Debug, Clone)]
pub struct TelemetrySettings {
    /// `/metrics` needs no token.
    pub metrics_are_public: bool,
    /// Where spans go: the whole URL, `/v1/traces` included.
    pub otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone)]
pub struct WebhookSettings {
    pub url: Url,
    pub secret: SecretSource,
    /// Never empty.
    pub events: BTreeSet<WebhookEvent>,
    pub reach: Reach,
}

#[derive(Debug, Clone)]
pub struct PlatformSettings {
    /// False: images are built, and nothing is ever run.
    pub runs: bool,
    pub socket: PathBuf,
    pub containers: BTreeMap<ContainerName, ContainerConfig>,
    pub listeners: BTreeMap<String, ListenerConfig>,
    pub networks: BTreeSet<String>,
    pub proxy: ProxyConfig,
    pub data: DataConfig,
}

/// Every problem of a configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// For a job's failure, which is told in one line.
    pub fn in_one_line(&self) -> String {
        self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; and ")
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

impl Settings {
    /// Reads and checks a configuration file.
    pub fn load(file: &Path, env: &Environment) -> Result<Self, Problems> {
        let shown = file.display().to_string();
        let problem = |what: String, advice: &str| {
            Problems(vec![Problem {
                file: shown.clone(),
                line: 0,
                column: 0,
                key: String::new(),
                what,
                advice: advice.to_owned(),
            }])
        };
        let absolute = std::path::absolute(file)
            .map_err(|e| problem(format!("the path cannot be used: {e}"), "give the path of replank.toml"))?;
        let text = read_bounded(&absolute).map_err(|e| {
            problem(
                format!("the configuration cannot be read: {e}"),
                "give its path with --config, or run in its directory",
            )
        })?;
        Self::parse(&shown, &absolute, &text, env)
    }

    /// True where the environment configures the reference application by itself.
    pub fn is_in_environment(env: &Environment) -> bool {
        reference::is_meant(env)
    }

    /// The reference application of the wire contract, from the environment alone. `home` is where the state is kept.
    pub fn of_environment(home: &Path, env: &Environment) -> Result<Self, Problems> {
        let file = std::path::absolute(home).unwrap_or_else(|_| home.to_path_buf()).join(FILE);
        Self::parse("environment", &file, &reference::text(env), env)
    }

    /// As [`Settings::load`], from a text. `file` must be absolute: its directory is the home.
    pub fn parse(shown: &str, file: &Path, text: &str, env: &Environment) -> Result<Self, Problems> {
        let doc = Document::parse(shown, text, "").map_err(Problems)?;
        check::settings(&doc, file, env)
    }

    /// Where this machine reaches the service: at the listener that publishes the controller, from outside of it; else where it
    /// listens itself. A listener with TLS has a name that only its certificate knows.
    pub fn reached_at(&self) -> SocketAddr {
        let published = |listener: &&ListenerConfig| {
            let is_controller = self.platform.containers.get(&listener.container).is_some_and(|c| c.controller);
            is_controller && listener.port == self.server.listen.port() && listener.tls.is_none()
        };
        match self.platform.listeners.values().find(published) {
            Some(listener) if self.revision.is_none() => SocketAddr::new(listener.bind, listener.publish),
            Some(_) | None => self.server.listen,
        }
    }

    pub fn ledger_dir(&self) -> PathBuf {
        self.home.join("ledger")
    }

    pub fn work_dir(&self) -> PathBuf {
        self.home.join("work")
    }

    pub fn tokens_dir(&self) -> PathBuf {
        self.home.join("tokens")
    }

    pub fn proxy_dir(&self) -> PathBuf {
        self.home.join("proxy")
    }

    /// The platform's own configuration, for the installation that the ledger knows.
    pub fn docker(&self, installation: InstallationId) -> DockerConfig {
        DockerConfig {
            socket: self.platform.socket.clone(),
            home: self.home.clone(),
            application: self.application.clone(),
            installation,
            containers: self.platform.containers.clone(),
            listeners: self.platform.listeners.clone(),
            networks: self.platform.networks.clone(),
            proxy: self.platform.proxy.clone(),
            data: self.platform.data.clone(),
        }
    }

    /// Names that a Host header may carry beside loopback: public ones, and those by which the application's own containers
    /// know the controllers.
    pub fn hosts(&self) -> BTreeSet<String> {
        let controllers =
            self.platform.containers.iter().filter(|(_, c)| c.controller).map(|(name, _)| name.to_string());
        self.server.public_hosts.iter().cloned().chain(controllers).collect()
    }

    /// The remote as status shows it.
    pub fn shown_remote(&self) -> Option<String> {
        self.source.as_ref().map(|source| shown(&source.remote))
    }
}

/// A URL without userinfo.
pub fn shown(remote: &str) -> String {
    match remote.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => String::new(),
    }
}

fn read_bounded(file: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(file)?.take(TEXT_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}
