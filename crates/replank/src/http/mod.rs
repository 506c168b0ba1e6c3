//! The HTTP face (contract §2): routes, sign-in, guards and views. Handlers only call engine commands.

mod auth;
pub mod bodies;
mod document;
mod errors;
mod events;
mod extract;
mod glance;
mod guard;
mod limits;
mod logs;
mod metrics;
mod patience;
mod routes;
pub mod row;
mod serve;
mod views;

use std::collections::BTreeSet;
use std::sync::Arc;

use replank_core::ports::{Clock, Tokens};
use tokio_util::sync::CancellationToken;

use crate::config::Settings;
use crate::engine::api::Engine;
use crate::telemetry::Telemetry;

pub use auth::{SECRET_PREFIX, dev_bypass, hash_secret};
pub use document::{document, text as document_text};
pub use limits::Limits;
pub use serve::serve;

/// What the face needs to know beside the engine.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `host` or `host:port`, beside the loopback names that are always allowed.
    pub hosts: BTreeSet<String>,
    /// The answer of [`dev_bypass`].
    pub dev_bypass: bool,
    /// The remote without userinfo; empty where there is none.
    pub remote: String,
    /// The application's own version, for `/api/health`.
    pub version: String,
    pub limits: Limits,
    /// `/metrics` needs no token.
    pub metrics_are_public: bool,
    pub telemetry: Arc<Telemetry>,
}

impl Options {
    pub fn of(settings: &Settings, dev_bypass: bool) -> Self {
        Self {
            hosts: settings.hosts(),
            dev_bypass,
            remote: settings.shown_remote().unwrap_or_default(),
            version: settings.app_version.clone().unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned()),
            limits: Limits::default(),
            metrics_are_public: settings.telemetry.metrics_are_public,
            telemetry: Arc::default(),
        }
    }
}

/// Everything a request can reach.
#[derive(Debug)]
pub struct Http {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) tokens: Arc<dyn Tokens>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) options: Options,
    pub(crate) streams: limits::Streams,
    pub(crate) strikes: limits::Strikes,
    pub(crate) glance: glance::Glance,
    /// Ends streams when the service is to stop: they would hold a graceful shutdown for ever.
    pub(crate) stopping: CancellationToken,
}

pub(crate) type App = Arc<Http>;

impl Http {
    pub fn new(engine: Arc<dyn Engine>, tokens: Arc<dyn Tokens>, clock: Arc<dyn Clock>, options: Options) -> Arc<Self> {
        Arc::new(Self {
            engine,
            tokens,
            clock,
            streams: limits::Streams::default(),
            strikes: limits::Strikes::default(),
            glance: glance::Glance::default(),
            options,
            stopping: CancellationToken::new(),
        })
    }
}
