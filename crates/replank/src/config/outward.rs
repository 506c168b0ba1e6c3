//! What is told to others: numbers, spans and webhooks.

use std::net::IpAddr;
use std::path::PathBuf;

use replank_adapters::platform::docker::config::SecretSource;
use replank_exec::outbound::{Reach, admit, admit_name};
use serde::Deserialize;
use url::Url;

use super::reader::Document;
use super::{TelemetrySettings, WebhookSettings, raw};

/// Each has a task and a connection of its own.
const WEBHOOKS_MAX: usize = 16;

/// Where a collector takes traces, below the address that people know it by.
const TRACES_PATH: &str = "/v1/traces";

/// What a hook can be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WebhookEvent {
    Succeeded,
    FailedPre,
    FailedRollout,
    RolledBack,
    RollbackFailed,
    /// A rollout failed and stays as it stands: a person decides.
    Held,
    /// The confirm window ends soon, and then the new version stays.
    ConfirmWindowClosing,
    /// The snapshot's time is over, or it can no longer be restored.
    WayBackLost,
    /// What runs is not what was recorded.
    Drift,
}

impl WebhookEvent {
    pub const ALL: [WebhookEvent; 9] = [
        Self::Succeeded,
        Self::FailedPre,
        Self::FailedRollout,
        Self::RolledBack,
        Self::RollbackFailed,
        Self::Held,
        Self::ConfirmWindowClosing,
        Self::WayBackLost,
        Self::Drift,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::FailedPre => "failed_pre",
            Self::FailedRollout => "failed_rollout",
            Self::RolledBack => "rolled_back",
            Self::RollbackFailed => "rollback_failed",
            Self::Held => "held",
            Self::ConfirmWindowClosing => "confirm_window_closing",
            Self::WayBackLost => "way_back_lost",
            Self::Drift => "drift",
        }
    }
}

pub(super) fn telemetry(doc: &Document, raw: raw::Telemetry) -> TelemetrySettings {
    let endpoint = raw.otlp_endpoint.map(|endpoint| {
        let url = Url::parse(&endpoint).ok();
        let is_plain = url.is_some_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if !is_plain {
            let advice = "write it as \"http://127.0.0.1:4318\"; headers go into OTEL_EXPORTER_OTLP_HEADERS";
            doc.problem(&["telemetry", "otlp_endpoint"], format!("{endpoint:?} is not a collector's URL"), advice);
        }
        let base = endpoint.trim_end_matches('/');
        if base.ends_with(TRACES_PATH) { base.to_owned() } else { format!("{base}{TRACES_PATH}") }
    });
    TelemetrySettings { metrics_are_public: raw.metrics == raw::Metrics::Public, otlp_endpoint: endpoint }
}

pub(super) fn webhooks(
    doc: &Document,
    raw: Vec<raw::Webhook>,
    at: &impl Fn(PathBuf) -> PathBuf,
) -> Vec<WebhookSettings> {
    if raw.len() > WEBHOOKS_MAX {
        doc.problem(
            &["webhooks"],
            format!("{} are too many", raw.len()),
            format!("at most {WEBHOOKS_MAX} can be told"),
        );
        return Vec::new();
    }
    let mut hooks: Vec<WebhookSettings> = Vec::new();
    for (number, hook) in raw.into_iter().enumerate() {
        // The URL may hold a token, so it is named by its place.
        let wrong = |what: &str, advice: &str| {
            doc.problem(&["webhooks"], format!("number {}: {what}", number + 1), advice);
        };
        let reach = Reach { loopback: hook.allow_loopback, private: hook.allow_private };
        let url = match url(&hook.url, reach) {
            Ok(url) => Some(url),
            Err(what) => {
                wrong(&what, "write it as \"https://HOST/PATH\"");
                None
            }
        };
        let secret = match (hook.secret_file, hook.secret_env) {
            (Some(file), None) => Some(SecretSource::File(at(file))),
            (None, Some(name)) => Some(SecretSource::Env(name)),
            (None, None) | (Some(_), Some(_)) => {
                wrong("its secret has to come from one place", "give one of secret_file and secret_env");
                None
            }
        };
        let events = hook.events.unwrap_or_else(|| WebhookEvent::ALL.to_vec());
        if events.is_empty() {
            wrong("it is told nothing", "name some events, or leave `events` out");
        }
        if let Some((url, secret)) = url.zip(secret) {
            if hooks.iter().any(|known| known.url == url) {
                wrong("another one has the same URL", "put their events into one");
            }
            hooks.push(WebhookSettings { url, secret, events: events.into_iter().collect(), reach });
        }
    }
    hooks
}

/// By its spelling; where it leads is judged anew before each request.
fn url(text: &str, reach: Reach) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("its URL cannot be read: {error}"))?;
    if url.scheme() != "https" && !(url.scheme() == "http" && reach.loopback) {
        return Err("its URL is not https (http is for this machine, with allow_loopback)".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("its URL has a user, a password or a fragment".to_owned());
    }
    let host = url.host_str().unwrap_or_default();
    let judged = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(ip) => admit(ip, reach).map(drop),
        Err(_) => admit_name(host, reach),
    };
    judged.map_err(|refused| refused.to_string())?;
    Ok(url)
}
