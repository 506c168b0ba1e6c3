//! The outbound rule: which hosts and addresses this installation may connect to on somebody else's word.
//!
//! A name is judged by its spelling, resolved once, every answer is judged, and what was judged is what is connected to:
//! callers pin the addresses, so that a second answer of the name server (DNS rebinding) reaches nobody. It stands in this crate
//! because both of its users, the exec channel's server and the git source, can see this crate and not each other.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;

/// How long a name may take to resolve; the system's own patience is longer than a person's.
pub const RESOLVE_TIME: Duration = Duration::from_secs(10);

/// More answers than any real name has; the rest would only make the pin longer.
const MAX_ADDRESSES: usize = 16;

/// What the operator's configuration opens beyond public addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// 127.0.0.0/8 and ::1: for development only.
    pub loopback: bool,
    /// RFC 1918, unique local and carrier-grade NAT addresses: a git server inside the company.
    pub private: bool,
}

/// What an address is, as far as the rule needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Public,
    Private,
    Loopback,
    /// Never reached, whatever is configured; says why.
    Never(&'static str),
}

/// Why a host is not connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0} is this machine itself, and loopback remotes are not allowed")]
    Loopback(String),
    #[error("{0} is a private address, and private remotes are not allowed")]
    Private(String),
    #[error("{0} is {1}")]
    Never(String, &'static str),
    #[error("{0} has no address")]
    Nowhere(String),
}

const METADATA: &str = "a cloud metadata service, which hands out credentials";
const LINK_LOCAL: &str = "a link-local address";

/// Names of metadata services; their addresses are refused as well, but a name may be answered by a search domain.
const METADATA_NAMES: &[&str] = &[
    "metadata",
    "metadata.google.internal",
    "metadata.goog",
    "metadata.azure.internal",
    "metadata.azure.com",
    "metadata.packet.net",
    "metadata.platformequinix.com",
    "metadata.tencentyun.com",
    "instance-data",
    "instance-data.ec2.internal",
];

const LOOPBACK_NAMES: &[&str] =
    &["localhost", "localhost.localdomain", "localhost6", "localhost6.localdomain6", "ip6-localhost", "ip6-loopback"];

/// Sorts an address into its kind. IPv4 inside IPv6 (mapped, compatible, NAT64, 6to4) is judged as what it leads to.
#[must_use]
pub fn kind(ip: IpAddr) -> Kind {
    match ip {
        IpAddr::V4(ip) => kind4(ip),
        IpAddr::V6(ip) => kind6(ip),
    }
}

fn kind4(ip: Ipv4Addr) -> Kind {
    match ip.octets() {
        // Connecting to 0.0.0.0 reaches this machine on Linux.
        [0, ..] => Kind::Never("an unspecified address"),
        [127, ..] => Kind::Loopback,
        // Alibaba Cloud, Azure's wire server, Oracle Cloud: outside the link-local range where the others are.
        [100, 100, 100, 200] | [168, 63, 129, 16] | [192, 0, 0, 192] | [169, 254, 169 | 170, _] => {
            Kind::Never(METADATA)
        }
        [169, 254, ..] => Kind::Never(LINK_LOCAL),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18 | 19, ..] => Kind::Private,
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => Kind::Never("a reserved address"),
        [224..=239, ..] => Kind::Never("a multicast address"),
        [240..=255, ..] => Kind::Never("a reserved address"),
        _ => Kind::Public,
    }
}

fn kind6(ip: Ipv6Addr) -> Kind {
    let s = ip.segments();
    let inner = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        kind4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => Kind::Never("an unspecified address"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Kind::Loopback,
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] => inner(high, low),
        [0, 0, 0, 0, 0xffff, 0, high, low] => inner(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => inner(high, low),
        [0x2002, high, low, ..] => inner(high, low),
        // AWS and Google Cloud keep their IPv6 metadata services inside the unique local range.
        [0xfd00, 0xec2, ..] | [0xfd20, 0xce, ..] => Kind::Never(METADATA),
        [0x2001, 0, ..] => Kind::Never("a Teredo address, which leads to an unknown one"),
        [0x2001, 0xdb8, ..] => Kind::Never("a reserved address"),
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => Kind::Private,
        [0xfe80..=0xfebf, ..] => Kind::Never(LINK_LOCAL),
        [0xff00..=0xffff, ..] => Kind::Never("a multicast address"),
        [0x2000..=0x3fff, ..] => Kind::Public,
        // Everything outside 2000::/3 that is not named above is unassigned.
        _ => Kind::Never("a reserved address"),
    }
}

/// Judges one address.
///
/// # Errors
/// When it may not be connected to.
pub fn admit(ip: IpAddr, reach: Reach) -> Result<Kind, Refused> {
    let kind = kind(ip);
    match kind {
        Kind::Public => Ok(kind),
        Kind::Private if reach.private => Ok(kind),
        Kind::Loopback if reach.loopback => Ok(kind),
        Kind::Private => Err(Refused::Private(ip.to_string())),
        Kind::Loopback => Err(Refused::Loopback(ip.to_string())),
        Kind::Never(why) => Err(Refused::Never(ip.to_string(), why)),
    }
}

/// Judges a name by its spelling, before anybody is asked about it. Case and one trailing dot make no difference.
///
/// # Errors
/// When nobody may be asked about it.
pub fn admit_name(name: &str, reach: Reach) -> Result<(), Refused> {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    if METADATA_NAMES.contains(&name.as_str()) {
        return Err(Refused::Never(name, METADATA));
    }
    let local = LOOPBACK_NAMES.contains(&name.as_str()) || name.ends_with(".localhost");
    if local && !reach.loopback {
        return Err(Refused::Loopback(name));
    }
    Ok(())
}

/// Asks the name service. A trait, so that a test can answer differently the second time.
#[async_trait]
pub trait Resolver: Send + Sync + fmt::Debug {
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

/// The operating system's resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

#[async_trait]
impl Resolver for SystemResolver {
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }
}

/// Judges every answer for a name: one bad address refuses them all, since nobody honest mixes them.
///
/// # Errors
/// When there is none, or one that may not be connected to.
pub fn admit_all(host: &str, answers: Vec<SocketAddr>, reach: Reach) -> Result<Vec<SocketAddr>, Refused> {
    if answers.is_empty() {
        return Err(Refused::Nowhere(host.to_owned()));
    }
    for answer in &answers {
        admit(answer.ip(), reach)?;
    }
    Ok(answers.into_iter().take(MAX_ADDRESSES).collect())
}

/// Judged addresses in the notation of git's `http.curloptResolve`, which is curl's own: git resolves no more.
#[must_use]
pub fn pin(name: &str, port: u16, addresses: &[SocketAddr]) -> String {
    let list: Vec<String> = addresses
        .iter()
        .map(|address| match address {
            SocketAddr::V4(address) => address.ip().to_string(),
            SocketAddr::V6(address) => format!("[{}]", address.ip()),
        })
        .collect();
    format!("{name}:{port}:{}", list.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sorted() {
        let never = |text: &str| matches!(kind(text.parse().expect("address")), Kind::Never(_));
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.1.1",
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "192.0.2.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "2001::1",
            "2001:db8::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fe80::1",
            "ff02::1",
            "100::1",
            "4000::1",
            "::ffff:0:169.254.169.254",
        ] {
            assert!(never(text), "{text}");
        }
        for (text, expect) in [
            ("127.0.0.1", Kind::Loopback),
            ("127.255.255.254", Kind::Loopback),
            ("::1", Kind::Loopback),
            ("::ffff:127.0.0.1", Kind::Loopback),
            ("64:ff9b::7f00:1", Kind::Loopback),
            ("2002:7f00:1::", Kind::Loopback),
            ("10.0.0.1", Kind::Private),
            ("172.16.0.1", Kind::Private),
            ("172.31.255.255", Kind::Private),
            ("172.32.0.1", Kind::Public),
            ("192.168.1.1", Kind::Private),
            ("100.64.0.1", Kind::Private),
            ("100.128.0.1", Kind::Public),
            ("::ffff:10.1.1.1", Kind::Private),
            ("fd12:3456::1", Kind::Private),
            ("140.82.121.4", Kind::Public),
            ("2606:50c0:8000::154", Kind::Public),
            ("64:ff9b::8c52:7904", Kind::Public),
        ] {
            assert_eq!(kind(text.parse().expect("address")), expect, "{text}");
        }
    }

    #[test]
    fn reach_opens_only_what_it_names() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("address");
        let (none, both) = (Reach::default(), Reach { loopback: true, private: true });
        let (loopback, private) = (Reach { loopback: true, private: false }, Reach { loopback: false, private: true });
        for (text, in_none, in_loopback, in_private, in_both) in [
            ("140.82.121.4", true, true, true, true),
            ("127.0.0.1", false, true, false, true),
            ("10.0.0.1", false, false, true, true),
            ("169.254.169.254", false, false, false, false),
        ] {
            for (reach, expect) in [(none, in_none), (loopback, in_loopback), (private, in_private), (both, in_both)] {
                assert_eq!(admit(ip(text), reach).is_ok(), expect, "{text} {reach:?}");
            }
        }
    }

    #[test]
    fn names_are_judged_by_spelling() {
        for (name, closed, open) in [
            ("localhost", false, true),
            ("LOCALHOST.", false, true),
            ("evil.localhost", false, true),
            ("ip6-localhost", false, true),
            ("metadata.google.internal", false, false),
            ("Metadata.Google.Internal.", false, false),
            ("metadata", false, false),
            ("github.com", true, true),
            ("localhost.example.com", true, true),
        ] {
            assert_eq!(admit_name(name, Reach::default()).is_ok(), closed, "{name}");
            assert_eq!(admit_name(name, Reach { loopback: true, private: true }).is_ok(), open, "{name}");
        }
    }

    #[test]
    fn pins_are_written_as_curl_reads_them() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("address");
        let both = [at("140.82.121.4:443"), at("[2606:50c0:8000::154]:443")];
        assert_eq!(pin("git.example.com", 443, &both), "git.example.com:443:140.82.121.4,[2606:50c0:8000::154]");
    }

    #[test]
    fn one_bad_answer_refuses_all() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("address");
        let good = vec![at("140.82.121.4:443")];
        assert!(admit_all("x", good.clone(), Reach::default()).is_ok());
        assert!(admit_all("x", vec![good[0], at("127.0.0.1:443")], Reach::default()).is_err());
        assert_eq!(admit_all("x", vec![], Reach::default()), Err(Refused::Nowhere("x".to_owned())));
    }
}
