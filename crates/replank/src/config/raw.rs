//! `replank.toml` as it is written: shapes and defaults only. Nothing outside `config` sees these types.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use replank_adapters::platform::docker::config::{
    BackupConfig, ContainerConfig, ListenerConfig, ProxyConfig, SecretSource,
};
use replank_core::phase::Mode;
use replank_core::record::OnRolloutFailure;
use replank_core::words::{AppName, ComponentName, ContainerName};
use serde::Deserialize;

use super::outward::WebhookEvent;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    pub application: Option<AppName>,
    pub platform: Option<Platform>,
    pub source: Option<Source>,
    #[serde(default)]
    pub server: Server,
    #[serde(default)]
    pub build: Build,
    pub registry: Option<Registry>,
    pub exec: Option<Exec>,
    #[serde(default)]
    pub components: BTreeMap<ComponentName, Component>,
    #[serde(default)]
    pub docker: Docker,
    #[serde(default)]
    pub containers: BTreeMap<ContainerName, ContainerConfig>,
    #[serde(default)]
    pub listeners: BTreeMap<String, ListenerConfig>,
    #[serde(default)]
    pub networks: BTreeSet<String>,
    #[serde(default)]
    pub proxy: ProxyConfig,
    pub backup: Option<BackupConfig>,
    #[serde(default)]
    pub policy: Policy,
    #[serde(default)]
    pub telemetry: Telemetry,
    #[serde(default)]
    pub webhooks: Vec<Webhook>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    Docker,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Builder {
    #[default]
    Docker,
    AzExec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    pub url: Option<String>,
    pub token_file: Option<PathBuf>,
    pub token_env: Option<String>,
    pub clone_root: Option<PathBuf>,
    #[serde(default)]
    pub credential_in_url: bool,
    pub wait_out_seconds: Option<u64>,
    pub client_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub remote: Option<String>,
    #[serde(default = "main_branch")]
    pub branch: String,
    pub credential: Option<Credential>,
    #[serde(default)]
    pub allow_loopback: bool,
    #[serde(default)]
    pub allow_private: bool,
    pub ca_file: Option<PathBuf>,
    pub verify: Option<Verify>,
    pub allowed_signers_file: Option<PathBuf>,
    pub revoked_signers_file: Option<PathBuf>,
    pub openpgp_keyring_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    None,
    SignedTags,
}

fn main_branch() -> String {
    "main".to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    pub username: String,
    pub password_file: Option<PathBuf>,
    pub password_env: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Server {
    pub listen: Option<String>,
    #[serde(default)]
    pub public_hosts: Vec<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Build {
    #[serde(default)]
    pub builder: Builder,
    pub parallel: Option<u32>,
    pub memory: Option<Size>,
    pub cpus: Option<f64>,
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretSource>,
}

/// Bytes, as a number or as a text such as "2GiB".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SizeForm")]
pub struct Size(pub u64);

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a size such as \"512MiB\" or \"2GiB\", or a number of bytes")]
enum SizeForm {
    Bytes(u64),
    Text(String),
}

impl TryFrom<SizeForm> for Size {
    type Error = String;
    fn try_from(form: SizeForm) -> Result<Self, String> {
        let text = match form {
            SizeForm::Bytes(bytes) => return Ok(Self(bytes)),
            SizeForm::Text(text) => text,
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim() {
            "" | "B" => Some(1),
            "KiB" | "K" => Some(1024),
            "MiB" | "M" => Some(1024 * 1024),
            "GiB" | "G" => Some(1024 * 1024 * 1024),
            _ => None,
        };
        factor
            .and_then(|factor: u64| number.parse::<u64>().ok()?.checked_mul(factor))
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a size such as \"512MiB\" or \"2GiB\""))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    pub host: Option<String>,
    pub acr: Option<String>,
    pub push: Option<bool>,
    #[serde(default)]
    pub insecure: bool,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Component {
    pub dockerfile: Option<String>,
    pub context: Option<String>,
    pub target: Option<String>,
    #[serde(default)]
    pub args: BTreeMap<String, String>,
    pub platform: Option<String>,
    #[serde(default)]
    pub secrets: Vec<String>,
    pub commit_arg: Option<String>,
    pub repository: Option<String>,
    pub migrate: Option<Vec<String>>,
    pub migrate_as: Option<ContainerName>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Docker {
    pub socket: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    pub url: String,
    pub secret_file: Option<PathBuf>,
    pub secret_env: Option<String>,
    pub events: Option<Vec<WebhookEvent>>,
    #[serde(default)]
    pub allow_loopback: bool,
    #[serde(default)]
    pub allow_private: bool,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    #[serde(default)]
    pub metrics: Metrics,
    pub otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metrics {
    #[default]
    Token,
    Public,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default, deserialize_with = "mode")]
    pub mode: Option<Mode>,
    pub confirm_window_seconds: Option<u64>,
    pub on_rollout_failure: Option<OnRolloutFailure>,
    pub proofs: Option<u32>,
    pub drift_after_seconds: Option<u64>,
    pub keep_containers_hours: Option<u64>,
    pub keep_images_days: Option<u64>,
    pub keep_builds: Option<usize>,
    pub keep_failed: Option<usize>,
    pub keep_logs: Option<usize>,
    #[serde(default)]
    pub budgets: Budgets,
}

/// The file writes `blue-green`, as people do; stored records write `blue_green`.
fn mode<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Mode>, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Written {
        Single,
        BlueGreen,
    }
    Ok(Option::<Written>::deserialize(from)?.map(|written| match written {
        Written::Single => Mode::Single,
        Written::BlueGreen => Mode::BlueGreen,
    }))
}

/// Seconds; contract §1 has the defaults.
#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Budgets {
    pub queued_seconds: Option<u64>,
    pub fetching_seconds: Option<u64>,
    pub building_seconds: Option<u64>,
    pub patching_seconds: Option<u64>,
    pub rolling_out_seconds: Option<u64>,
    pub landing_seconds: Option<u64>,
    pub validating_seconds: Option<u64>,
    pub convergence_seconds: Option<u64>,
    pub rolling_back_seconds: Option<u64>,
    pub data_seconds: Option<u64>,
}
