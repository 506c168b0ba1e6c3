//! What the platform and the proxy say to each other over the proxy's Unix socket.
//!
//! HTTP/1.1 with JSON bodies:
//! - `GET /state` answers [`State`].
//! - `PUT /routes` with [`Routes`] answers 200 [`State`]; 409 [`State`] where `generation` is below the one in force, or equal
//!   with other content; 400 `{"detail"}` where the routes make no sense (unknown listener, no container).
//! - `CONNECT <container id>:<port>` opens a tunnel to a container on one of the proxy's networks, for probes that take the
//!   same road as the traffic.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a listener speaks with its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1 and h2 (prior knowledge, or ALPN over TLS), WebSocket and other upgrades included.
    Http,
    /// Bytes.
    Tcp,
}

/// A port that the proxy owns. Fixed when the proxy starts; an application's upgrade never changes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Listener {
    /// Port inside the proxy's container, on all its addresses.
    pub port: u16,
    pub protocol: Protocol,
    /// Certificate chain and key, PEM, paths inside the proxy's container; re-read when they change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TlsFiles {
    pub certificate: String,
    pub key: String,
}

/// The file that the proxy starts from: `proxy.json` in its directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// By listener name, such as `web`.
    pub listeners: BTreeMap<String, Listener>,
}

/// A port of one container, by the container's identity: the engine's full id, of which the first 12 digits resolve on the
/// proxy's networks. Never an address: those are given to the next container (lesson 36).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Backend {
    pub container: String,
    pub port: u16,
}

/// One revision's way in: a backend for each listener that it serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Side {
    pub revision: String,
    pub backends: BTreeMap<String, Backend>,
}

/// Where traffic goes. Kept on disk before it is answered for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Routes {
    pub generation: u64,
    pub primary: Side,
    /// While set, a proxy that has just started serves this side until it is told the routes again (with the same
    /// generation or a higher one): after a reboot an unconfirmed revision serves nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Side>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Replank version of the proxy's binary.
    pub version: String,
    /// `None` before the first routes.
    pub routes: Option<Routes>,
    /// The revision that new requests go to now: the primary's, or the fallback's after a start.
    pub serving: Option<String>,
    /// Requests, tunnels and upgraded connections that are open now, by container id.
    pub open: BTreeMap<String, u64>,
}

/// Name of the control socket in the proxy's directory.
pub const SOCKET: &str = "control.sock";
/// Name of [`Config`]'s file in the proxy's directory.
pub const CONFIG: &str = "proxy.json";
/// Name of the file in which the proxy keeps [`Routes`].
pub const ROUTES: &str = "routes.json";
