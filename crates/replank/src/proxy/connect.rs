//! From a container's identity to an open TCP connection, or to the reason why there is none.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::limits::{CONNECT_BACKOFF, KEEPALIVE, Limits, UNACKED_MILLIS};
use super::proxy_api::Backend;
use super::routes::{SHORT_ID, is_container_id};

/// Finds where a container is now. Asked for every new connection; nothing is remembered, because an address that was a
/// container's a moment ago may be a stranger's (lesson 36).
#[async_trait]
pub trait Resolver: Send + Sync + fmt::Debug {
    /// Addresses of the container, none or an error where it cannot be found.
    async fn resolve(&self, container: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

/// The engine's embedded DNS, which names each running container by the first 12 digits of its id on user-defined networks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dns;

#[async_trait]
impl Resolver for Dns {
    async fn resolve(&self, container: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if !is_container_id(container) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a container id"));
        }
        // The dot at the end keeps search domains out: `<id>.corp.example` may well resolve to something else.
        let name = format!("{}.", &container[..SHORT_ID]);
        let found = tokio::net::lookup_host((name.as_str(), port)).await?;
        // The engine asks the outer DNS for names that it does not know, and some outer DNS servers have an answer for
        // everything. A container is always on a network that the proxy is on too.
        let networks = Networks::read();
        Ok(found.filter(|address| networks.contain(address.ip())).collect())
    }
}

/// The networks that this process is directly on, as the kernel's routing tables list them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Networks {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl Networks {
    fn read() -> Self {
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self::parse(&text("/proc/net/route"), &text("/proc/net/ipv6_route"))
    }

    /// `/proc/net/route` has a header and hexadecimal columns in the machine's byte order (interface, destination, gateway,
    /// flags, four more, mask); `/proc/net/ipv6_route` has network order (destination, prefix length, source, its length, next hop).
    fn parse(v4: &str, v6: &str) -> Self {
        let mut networks = Self::default();
        for line in v4.lines().skip(1) {
            let column: Vec<&str> = line.split_ascii_whitespace().collect();
            let hex =
                |index: usize| column.get(index).and_then(|text| u32::from_str_radix(text, 16).ok()).map(u32::from_be);
            if let (Some(destination), Some(0), Some(mask)) = (hex(1), hex(2), hex(7))
                && mask != 0
            {
                networks.v4.push((destination, mask));
            }
        }
        for line in v6.lines() {
            let column: Vec<&str> = line.split_ascii_whitespace().collect();
            let hex = |index: usize| column.get(index).and_then(|text| u128::from_str_radix(text, 16).ok());
            if let (Some(destination), Some(length @ 1..=128), Some(0)) = (hex(0), hex(1), hex(4)) {
                networks.v6.push((destination, u128::MAX << (128 - length)));
            }
        }
        networks
    }

    fn contain(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.iter().any(|(network, mask)| Ipv4Addr::to_bits(address) & mask == *network),
            IpAddr::V6(address) => self.v6.iter().any(|(network, mask)| Ipv6Addr::to_bits(address) & mask == *network),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the container does not resolve")]
    Gone(#[source] Option<io::Error>),
    #[error("the container does not accept connections")]
    Refused(#[source] io::Error),
    #[error("the container did not answer in time")]
    TimedOut,
}

/// Opens connections to backends.
#[derive(Debug)]
pub(crate) struct Connector {
    resolver: Arc<dyn Resolver>,
    limits: Limits,
}

impl Connector {
    pub(crate) fn new(resolver: Arc<dyn Resolver>, limits: Limits) -> Self {
        Self { resolver, limits }
    }

    /// One lookup and one attempt at each address.
    pub(crate) async fn once(&self, backend: &Backend) -> Result<TcpStream, ConnectError> {
        let attempt = async {
            // The engine answers for its own containers within milliseconds. For a name that it does not know it asks the
            // machine's name servers, which may be out of reach: that wait says no more than its beginning.
            let lookup = self.resolver.resolve(&backend.container, backend.port);
            let addresses = match timeout(self.limits.resolve_attempt, lookup).await {
                Ok(Ok(addresses)) => addresses,
                Ok(Err(error)) => return Err(ConnectError::Gone(Some(error))),
                Err(late) => return Err(ConnectError::Gone(Some(late.into()))),
            };
            let mut refused = None;
            for address in addresses {
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        tune(&stream);
                        return Ok(stream);
                    }
                    Err(error) => refused = Some(error),
                }
            }
            Err(refused.map_or(ConnectError::Gone(None), ConnectError::Refused))
        };
        timeout(self.limits.connect_attempt, attempt).await.unwrap_or(Err(ConnectError::TimedOut))
    }

    /// Tries anew while the backend may be restarting. Nothing of a request has been sent yet, so this is safe for any.
    pub(crate) async fn patiently(&self, backend: &Backend) -> Result<TcpStream, ConnectError> {
        let start = Instant::now();
        let (mut pause, longest) = CONNECT_BACKOFF;
        loop {
            let error = match self.once(backend).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let patience = match error {
                ConnectError::Gone(_) => self.limits.resolve_patience,
                ConnectError::Refused(_) | ConnectError::TimedOut => self.limits.connect_patience,
            };
            if start.elapsed() + pause >= patience {
                return Err(error);
            }
            sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }
}

/// Small writes go out at once, and a peer that vanished is found. Best effort: a socket that refuses an option works.
pub(crate) fn tune(stream: &TcpStream) {
    use rustix::net::sockopt;
    let (idle, interval, count) = KEEPALIVE;
    let set = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(stream, idle)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepintvl(stream, interval)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepcnt(stream, count)?))
        .and_then(|()| Ok(sockopt::set_tcp_user_timeout(stream, UNACKED_MILLIS)?));
    if let Err(error) = set {
        tracing::debug!(%error, "a socket option was refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_on_own_networks_are_containers() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t010012AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth0\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let v6 = "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
                  00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n";
        let networks = Networks::parse(v4, v6);
        for (address, expect) in [
            ("172.18.3.4", true),
            ("172.19.0.1", false),
            ("93.184.216.34", false),
            ("fd00::2", true),
            ("fd01::2", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(networks.contain(address.parse().expect("address")), expect, "{address}");
        }
        assert!(!Networks::parse("", "").contain(IpAddr::from([127, 0, 0, 1])));
    }
}
