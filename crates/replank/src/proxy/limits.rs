//! Every bound of the proxy, with its reason.

use std::time::Duration;

/// Bounds that tests shorten; everyone else takes the default.
#[derive(Debug, Clone)]
pub struct Limits {
    /// From a connection's (or a kept-alive connection's last answer's) end to the end of the next request's headers. Ends
    /// slow-header attacks and idle connections; longer than the keep-alive of common clients' pools matters less than that.
    pub header_read: Duration,
    /// TLS handshake, several round trips on a bad line.
    pub handshake: Duration,
    /// How long connecting is tried anew when a backend refuses: a container that restarts is back within this.
    pub connect_patience: Duration,
    /// One lookup of a container's name.
    pub resolve_attempt: Duration,
    /// How long a name that does not resolve is asked for: a container that is gone should be reported at once.
    pub resolve_patience: Duration,
    /// One lookup plus one TCP connect.
    pub connect_attempt: Duration,
    /// From the request's end to the response's headers. Long polls are usually a minute.
    pub response_headers: Duration,
    /// A request body that stands still this long is given up.
    pub body_stall: Duration,
    /// An h2 connection without requests.
    pub h2_idle: Duration,
    /// Connections per listener; more wait in the kernel's queue. At about 30 KiB each this bounds memory.
    pub connections: usize,
    /// Certificates are looked at this often.
    pub tls_reload: Duration,
    /// What a stop waits for open requests; the engine's own default before it kills is 10 s.
    pub drain: Duration,
    /// An idle connection to a backend is used again up to this age; common servers close theirs after 5 s.
    pub pool_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_read: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            connect_patience: Duration::from_secs(3),
            resolve_attempt: Duration::from_secs(1),
            resolve_patience: Duration::from_millis(500),
            connect_attempt: Duration::from_secs(3),
            response_headers: Duration::from_secs(300),
            body_stall: Duration::from_secs(300),
            h2_idle: Duration::from_secs(120),
            connections: 8192,
            tls_reload: Duration::from_secs(2),
            drain: Duration::from_secs(9),
            pool_idle: Duration::from_secs(4),
        }
    }
}

/// Request line and headers together; what common servers take behind us is 8 to 64 KiB.
pub(crate) const HEADER_BYTES: usize = 64 * 1024;
/// Common servers allow about 100.
pub(crate) const HEADERS: usize = 128;
/// Read and write buffer of one HTTP/1.1 connection; must hold the headers.
pub(crate) const BUFFER_BYTES: usize = 128 * 1024;
/// Concurrent requests of one h2 connection; what RFC 9113 recommends as the least.
pub(crate) const H2_STREAMS: u32 = 128;
/// Streams that an h2 client may open and reset at once (rapid reset, CVE-2023-44487).
pub(crate) const H2_RESETS: usize = 32;
/// h2 pings find dead clients.
pub(crate) const H2_PING: Duration = Duration::from_secs(30);
/// Idle connections kept for each backend.
pub(crate) const POOL_IDLE_PER_BACKEND: usize = 64;
/// After a response's end a backend's connection has this long to become idle, or it is not kept.
pub(crate) const POOL_RETURN: Duration = Duration::from_secs(1);
/// First pause between two attempts to connect; doubles up to the second.
pub(crate) const CONNECT_BACKOFF: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(400));
/// TCP keep-alive: a peer that vanished is found within about two minutes, also on a silent WebSocket.
pub(crate) const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);
/// Data that nobody acknowledges (a client that stopped reading, a dead line) ends the connection.
pub(crate) const UNACKED_MILLIS: u32 = 120_000;
/// Kernel queue of connections not yet accepted.
pub(crate) const BACKLOG: u32 = 1024;
/// Pause after the system refused a new connection (no descriptors): others must end first.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Routes are a few hundred bytes per listener.
pub(crate) const CONTROL_BODY_BYTES: usize = 256 * 1024;
/// Connections on the control socket: the controllers, their probes and an operator.
pub(crate) const CONTROL_CONNECTIONS: usize = 256;
/// `--check` is a health check and must answer before the engine gives up on it.
pub(crate) const CHECK: Duration = Duration::from_secs(2);
/// proxy.json and certificates; more is a mistake.
pub(crate) const FILE_BYTES: u64 = 1024 * 1024;
