//! What the operator says about how the application runs on one Docker engine.
//!
//! Only the operator's file holds these; a release may bend its probes within bounds (see [`super::spec`]) and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use replank_core::fault::Fault;
use replank_core::record::Overlap;
use replank_core::words::{AppName, ComponentName, ContainerName, InstallationId};
use serde::{Deserialize, Serialize};

use super::names;
use super::proxy_api::Protocol;

/// Longest grace for a stop: an upgrade must not hang for longer on one container that ignores its signal.
pub const STOP_GRACE_MAX_SECONDS: u32 = 600;
/// Shortest and longest patience of one probe, in milliseconds: below it a busy machine fails, above it a hang goes unseen.
pub const PROBE_TIMEOUT_MS: std::ops::RangeInclusive<u64> = 100..=30_000;
/// Longest probe path, header name, pointer or pattern: they travel in one request and in every record.
pub const PROBE_TEXT_MAX: usize = 256;
/// Most containers of one revision, and most listeners: bounds the work of one observation.
pub const CONTAINERS_MAX: usize = 64;
/// Longest path of a Unix socket that Linux takes, less the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// One application on one engine. Checked by [`DockerConfig::validate`] before anything uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerConfig {
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The application's state directory on the host, and the same path inside a controller: it holds `proxy/` and `ledger/`.
    pub home: PathBuf,
    pub application: AppName,
    pub installation: InstallationId,
    pub containers: BTreeMap<ContainerName, ContainerConfig>,
    /// By name, such as `web`: the ports that the proxy owns.
    #[serde(default)]
    pub listeners: BTreeMap<String, ListenerConfig>,
    /// Existing networks that containers may join. Replank makes and removes none of them.
    #[serde(default)]
    pub networks: BTreeSet<String>,
    #[serde(default)]
    pub proxy: ProxyConfig,
    #[serde(default)]
    pub data: DataConfig,
}

/// What is done to the data before a new revision starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// By component; what a release asks for comes before it.
    #[serde(default)]
    pub migrate: BTreeMap<ComponentName, MigrateConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupConfig>,
    /// Milliseconds for each step.
    pub budget_ms: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { migrate: BTreeMap::new(), backup: None, budget_ms: 30 * 60 * 1_000 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateConfig {
    pub command: Vec<String>,
    /// Whose variables, secrets, mounts and networks it gets; the first container of the component where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerName>,
}

/// A copy of the data, made by the image that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// Whose image, variables, secrets, mounts and networks it gets.
    pub container: ContainerName,
    pub command: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct ProxyConfig {
    /// The image whose entry point is `replank`; made from the running binary where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerConfig {
    /// Port on the host.
    pub publish: u16,
    /// Host address that the port is published on: loopback unless the operator says otherwise.
    #[serde(default = "loopback")]
    pub bind: IpAddr,
    /// Port inside the proxy's container, and so on shared networks; `publish` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<u16>,
    pub container: ContainerName,
    /// Port of the container.
    pub port: u16,
    #[serde(default = "http")]
    pub protocol: Protocol,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

impl ListenerConfig {
    pub fn inside(&self) -> u16 {
        self.listen.unwrap_or(self.publish)
    }
}

/// Certificate chain and key, PEM, as paths on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerConfig {
    pub component: ComponentName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Values that may be shown; secrets have their own table.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Environment variables whose values are read from the operator's side each time a container is created.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, SecretSource>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The rule of [`ContainerConfig::overlap_rule`] where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<Overlap>,
    /// Gets the engine's socket and `home`, and is told who it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub controller: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<ProbeConfig>,
    /// Seconds between the stop signal and the kill, and the longest wait for open requests before it.
    #[serde(default = "default_grace")]
    pub stop_grace_seconds: u32,
    /// Thousandths of a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_millis: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub cap_add: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only_root: bool,
    /// Directories in memory.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tmpfs: BTreeSet<String>,
    /// Shared networks, each one named in [`DockerConfig::networks`].
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub networks: BTreeSet<String>,
    /// Containers that are started before this one and stopped after it. Order only; readiness is the application's affair.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub depends_on: BTreeSet<ContainerName>,
}

impl ContainerConfig {
    /// A container of this component with every default, for configurations made in code.
    pub fn of(component: ComponentName) -> Self {
        Self {
            component,
            entrypoint: None,
            command: None,
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            mounts: Vec::new(),
            user: None,
            overlap: None,
            controller: false,
            probe: None,
            stop_grace_seconds: default_grace(),
            cpu_millis: None,
            memory_bytes: None,
            cap_add: BTreeSet::new(),
            read_only_root: false,
            tmpfs: BTreeSet::new(),
            networks: BTreeSet::new(),
            depends_on: BTreeSet::new(),
        }
    }

    /// Two of a kind may run side by side where nothing but requests reaches them: an HTTP probe and no writable volume. The
    /// controller's ledger is made for two. Everything else might do its work twice (lesson 35).
    pub fn overlap_rule(&self) -> Overlap {
        if let Some(chosen) = self.overlap {
            return chosen;
        }
        let by_http = self.probe.as_ref().is_some_and(|probe| !probe.tcp);
        let writes = self.mounts.iter().any(|mount| !mount.read_only);
        if self.controller || (by_http && !writes) { Overlap::Allowed } else { Overlap::StopOldFirst }
    }
}

/// Where a secret's value comes from. Never the value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretSource {
    /// A file as the process that creates containers sees it; one line end at its end is not part of the value.
    File(PathBuf),
    /// A variable of the environment of the process that creates containers.
    Env(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    /// An absolute path on the host, or the name of a volume.
    pub source: String,
    pub target: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// How a container proves that it works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeConfig {
    pub port: u16,
    /// Only a connection, no request.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tcp: bool,
    #[serde(default = "default_path")]
    pub path: String,
    #[serde(default)]
    pub expect_status: StatusRange,
    #[serde(default)]
    pub version: VersionProof,
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
}

impl ProbeConfig {
    pub fn http(port: u16, path: &str) -> Self {
        Self {
            port,
            tcp: false,
            path: path.to_owned(),
            expect_status: StatusRange::default(),
            version: VersionProof::None,
            timeout_ms: default_timeout(),
        }
    }
}

/// How the answer tells which version it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum VersionProof {
    #[default]
    None,
    /// A response header that equals the version.
    Header(String),
    /// A pointer (RFC 6901) to a string in a JSON body that equals the version.
    JsonPointer(String),
    /// Literal text with `{version}` in it that stands in the body.
    Pattern(String),
}

/// Statuses that count as an answer: one, or a range with both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StatusForm", into = "StatusForm")]
pub struct StatusRange {
    pub from: u16,
    pub to: u16,
}

impl Default for StatusRange {
    fn default() -> Self {
        Self { from: 200, to: 299 }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StatusForm {
    One(u16),
    Range([u16; 2]),
}

impl TryFrom<StatusForm> for StatusRange {
    type Error = String;
    fn try_from(form: StatusForm) -> Result<Self, String> {
        let (from, to) = match form {
            StatusForm::One(code) => (code, code),
            StatusForm::Range([from, to]) => (from, to),
        };
        // A redirect can be a healthy answer; an error can not.
        if 200 <= from && from <= to && to <= 399 {
            Ok(Self { from, to })
        } else {
            Err("expect_status is a status from 200 to 399, or [from, to] within that".to_owned())
        }
    }
}

impl From<StatusRange> for StatusForm {
    fn from(range: StatusRange) -> Self {
        if range.from == range.to { Self::One(range.from) } else { Self::Range([range.from, range.to]) }
    }
}

fn default_socket() -> PathBuf {
    PathBuf::from("/var/run/docker.sock")
}
fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}
fn http() -> Protocol {
    Protocol::Http
}
fn default_grace() -> u32 {
    10
}
fn default_path() -> String {
    "/".to_owned()
}
fn default_timeout() -> u64 {
    2_000
}

impl DockerConfig {
    /// The proxy's directory: its configuration, its kept routes and its control socket.
    pub fn proxy_dir(&self) -> PathBuf {
        self.home.join("proxy")
    }

    pub fn control_socket(&self) -> PathBuf {
        self.proxy_dir().join(super::proxy_api::SOCKET)
    }

    /// Every rule that a type cannot hold. The fault is permanent and names the first place that breaks one.
    pub fn validate(&self) -> Result<(), Fault> {
        check_path("socket", &self.socket)?;
        check_path("home", &self.home)?;
        if self.control_socket().as_os_str().len() > SOCKET_PATH_MAX {
            return Err(wrong(
                "home is too long for the proxy's Unix socket below it",
                "choose a path below 80 characters",
            ));
        }
        if self.containers.is_empty() || self.containers.len() > CONTAINERS_MAX {
            return Err(wrong(
                format!("{} containers are configured", self.containers.len()),
                format!("configure 1 to {CONTAINERS_MAX} containers"),
            ));
        }
        for network in &self.networks {
            names::check_shared_network(network)?;
        }
        for (name, container) in &self.containers {
            self.check_container(name, container)?;
        }
        waves(&self.containers, |_| true)?;
        self.check_listeners()
    }

    fn check_container(&self, name: &ContainerName, container: &ContainerConfig) -> Result<(), Fault> {
        let at = |what: &str| format!("container {name}: {what}");
        for key in container.env.keys().chain(container.secrets.keys()) {
            let mut bytes = key.bytes();
            let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
            if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return Err(wrong(at(&format!("{key:?} is no environment name")), "use letters, digits and '_'"));
            }
            if key.starts_with("REPLANK_") && container.controller {
                return Err(wrong(at(&format!("{key} is set by Replank itself")), "give it another name"));
            }
            if container.env.contains_key(key) && container.secrets.contains_key(key) {
                return Err(wrong(at(&format!("{key} is both in env and in secrets")), "keep one of the two"));
            }
        }
        if let Some((key, _)) = container.env.iter().find(|(_, value)| value.contains('\0')) {
            return Err(wrong(at(&format!("the value of {key} has a zero byte")), "remove it"));
        }
        for mount in &container.mounts {
            let volume = mount.source.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
            let source = if mount.source.starts_with('/') { !mount.source.contains(',') } else { volume };
            if mount.source.is_empty() || !source || !mount.target.starts_with('/') || mount.target.contains(',') {
                return Err(wrong(
                    at(&format!("the mount of {:?} to {:?} is not usable", mount.source, mount.target)),
                    "give an absolute host path or a volume's name, and an absolute target, without commas",
                ));
            }
            if Path::new(&mount.source) == self.socket {
                return Err(wrong(
                    at("the engine's socket is mounted by hand"),
                    "only a container with controller = true gets it, and it gets it by itself",
                ));
            }
        }
        if let Some(path) = container.tmpfs.iter().find(|path| !path.starts_with('/') || path.contains([',', ':'])) {
            return Err(wrong(at(&format!("tmpfs {path:?} is no absolute path")), "begin it with '/'"));
        }
        if container.stop_grace_seconds > STOP_GRACE_MAX_SECONDS {
            return Err(wrong(at("stop_grace_seconds is too long"), format!("at most {STOP_GRACE_MAX_SECONDS}")));
        }
        for network in &container.networks {
            if !self.networks.contains(network) {
                return Err(wrong(at(&format!("network {network:?} is not declared")), "add it to networks"));
            }
        }
        match &container.probe {
            Some(probe) => check_probe(probe).map_err(|(what, advice)| wrong(at(&format!("its probe {what}")), advice)),
            None => Ok(()),
        }
    }

    fn check_listeners(&self) -> Result<(), Fault> {
        if self.listeners.len() > CONTAINERS_MAX {
            return Err(wrong("too many listeners are configured", format!("at most {CONTAINERS_MAX}")));
        }
        let mut inside = BTreeMap::new();
        let mut published = BTreeMap::new();
        for (name, listener) in &self.listeners {
            // The same rule as a container's name: listener names go into shell commands and labels.
            if ContainerName::new(name.as_str()).is_err() {
                return Err(wrong(format!("listener name {name:?} is not valid"), "use a to z, 0 to 9 and '-'"));
            }
            if !self.containers.contains_key(&listener.container) {
                return Err(wrong(
                    format!("listener {name}: there is no container {}", listener.container),
                    "name one of the configured containers",
                ));
            }
            if listener.publish == 0 || listener.port == 0 || listener.inside() == 0 {
                return Err(wrong(format!("listener {name} has port 0"), "give a port from 1 to 65535"));
            }
            if let Some(other) = inside.insert(listener.inside(), name) {
                return Err(wrong(
                    format!("listeners {other} and {name} both listen on {} in the proxy", listener.inside()),
                    "give one of them another `listen` port",
                ));
            }
            if let Some(other) = published.insert((listener.bind, listener.publish), name) {
                return Err(wrong(
                    format!("listeners {other} and {name} publish the same port {}", listener.publish),
                    "give one of them another port or address",
                ));
            }
            if let Some(tls) = &listener.tls {
                check_path("certificate", &tls.certificate)?;
                check_path("key", &tls.key)?;
            }
        }
        Ok(())
    }
}

/// A probe's own rules, for the operator's file and for what a release asks. The error is what is wrong, and advice.
pub(super) fn check_probe(probe: &ProbeConfig) -> Result<(), (String, String)> {
    let visible =
        |text: &str| !text.is_empty() && text.len() <= PROBE_TEXT_MAX && text.bytes().all(|b| b.is_ascii_graphic());
    if probe.port == 0 {
        return Err(("has port 0".to_owned(), "give a port from 1 to 65535".to_owned()));
    }
    if !PROBE_TIMEOUT_MS.contains(&probe.timeout_ms) {
        return Err((
            format!("has a timeout of {} ms", probe.timeout_ms),
            format!("choose {} to {} ms", PROBE_TIMEOUT_MS.start(), PROBE_TIMEOUT_MS.end()),
        ));
    }
    if !probe.path.starts_with('/') || !visible(&probe.path) || probe.path.contains('#') {
        return Err((
            "has no usable path".to_owned(),
            format!("begin it with '/', at most {PROBE_TEXT_MAX} visible ASCII characters, no '#'"),
        ));
    }
    let (fine, advice) = match &probe.version {
        VersionProof::None => (true, ""),
        VersionProof::Header(name) => (http::HeaderName::try_from(name.as_str()).is_ok(), "give a header's name"),
        VersionProof::JsonPointer(pointer) => {
            (pointer.starts_with('/') && pointer.len() <= PROBE_TEXT_MAX, "give a JSON pointer such as \"/version\"")
        }
        VersionProof::Pattern(text) => {
            (text.matches("{version}").count() == 1 && text.len() <= PROBE_TEXT_MAX, "put {version} into the text once")
        }
    };
    if !fine {
        return Err(("has no usable version proof".to_owned(), advice.to_owned()));
    }
    if probe.tcp && probe.version != VersionProof::None {
        return Err(("proves a version over plain TCP".to_owned(), "leave out either tcp or version".to_owned()));
    }
    Ok(())
}

/// Those containers that `wanted` picks, in waves: each container stands in a wave after those that it depends on.
pub(super) fn waves(
    containers: &BTreeMap<ContainerName, ContainerConfig>,
    wanted: impl Fn(&ContainerName) -> bool,
) -> Result<Vec<Vec<ContainerName>>, Fault> {
    let mut left: BTreeSet<&ContainerName> = containers.keys().collect();
    let mut waves = Vec::new();
    for (name, container) in containers {
        if let Some(other) = container.depends_on.iter().find(|other| !containers.contains_key(*other)) {
            return Err(wrong(
                format!("container {name} depends on {other}, which is not configured"),
                "correct depends_on",
            ));
        }
    }
    while !left.is_empty() {
        let is_free = |name: &ContainerName| containers[name].depends_on.iter().all(|other| !left.contains(other));
        let wave: Vec<&ContainerName> = left.iter().copied().filter(|name| is_free(name)).collect();
        if wave.is_empty() {
            let circle: Vec<&str> = left.iter().map(|name| name.as_str()).collect();
            return Err(wrong(format!("{} depend on each other in a circle", circle.join(", ")), "correct depends_on"));
        }
        left.retain(|name| !wave.contains(name));
        waves.push(wave.into_iter().filter(|name| wanted(name)).cloned().collect());
    }
    Ok(waves)
}

fn check_path(what: &str, path: &Path) -> Result<(), Fault> {
    let clean = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    let text = path.to_str().is_some_and(|text| !text.contains([',', ':', '\n', '\0']));
    if path.is_absolute() && clean && text {
        Ok(())
    } else {
        Err(wrong(
            format!("{what} is not a usable path: {}", path.display()),
            "give an absolute path without '..', ',' and ':'",
        ))
    }
}

fn wrong(what: impl Into<String>, advice: impl Into<String>) -> Fault {
    Fault::permanent(what).advice(advice)
}
