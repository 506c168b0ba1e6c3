//! Which headers end at the proxy, and which it adds (RFC 9110 §7.6, RFC 9112, RFC 9113 §8).

use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Uri, Version};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// Says who the client is and would be believed by applications.
const CLAIMS: [HeaderName; 4] = [
    header::FORWARDED,
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-forwarded-server"),
];
/// `Proxy` becomes `HTTP_PROXY` in CGI-like applications (CVE-2016-5385); nothing honest sends it.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Whether a comma-separated header lists a token.
fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}

/// The protocol that an HTTP/1.1 message wants to switch to, or has switched to. `h2c` is left out: the backend would then
/// speak a protocol that nobody checks (a known way past a proxy's rules).
pub(crate) fn upgrade(version: Version, headers: &HeaderMap) -> Option<HeaderValue> {
    if version != Version::HTTP_11 || !lists(headers, &header::CONNECTION, "upgrade") {
        return None;
    }
    let wanted = headers.get(header::UPGRADE)?;
    if lists(headers, &header::UPGRADE, "h2c") { None } else { Some(wanted.clone()) }
}

/// Takes away what is meant for the next hop only: what `Connection` names, and what always is.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // These two frame the message; naming them would be an attack on whoever reads it next.
        .filter(|name| name != header::HOST && name != header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The host that the client asks for: the request line's where it has one, else the only `Host`. `Err` says what is wrong.
pub(crate) fn host(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<Option<HeaderValue>, &'static str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err("more than one Host header");
    }
    if let Some(authority) = uri.authority() {
        if authority.as_str().contains('@') {
            return Err("user information in the address");
        }
        return HeaderValue::from_str(authority.as_str()).map(Some).map_err(|_| "the address is not valid");
    }
    match first {
        Some(host) => Ok(Some(host.clone())),
        None if version == Version::HTTP_11 => Err("the Host header is missing"),
        None => Ok(None),
    }
}

/// Who talked to the proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Client {
    pub(crate) address: IpAddr,
    pub(crate) tls: bool,
    /// Its own forwarding headers are believed: a known ingress.
    pub(crate) trusted: bool,
}

impl Client {
    pub(crate) fn new(address: IpAddr, tls: bool, trusted: &[IpNet]) -> Self {
        let address = address.to_canonical();
        Self { address, tls, trusted: trusted.iter().any(|net| net.contains(&address)) }
    }
}

/// Turns a client's request headers into those for the backend.
pub(crate) fn prepare(headers: &mut HeaderMap, client: Client, host: Option<HeaderValue>) {
    strip(headers);
    // The proxy answered `100 Continue` itself when it began to read the body.
    headers.remove(header::EXPECT);
    join_cookies(headers);
    let told = |name: &HeaderName, headers: &HeaderMap| if client.trusted { headers.get(name).cloned() } else { None };
    let chain = match told(&FORWARDED_FOR, headers).as_ref().and_then(|value| value.to_str().ok()) {
        Some(before) => format!("{before}, {}", client.address),
        None => client.address.to_string(),
    };
    let proto = told(&FORWARDED_PROTO, headers)
        .unwrap_or_else(|| HeaderValue::from_static(if client.tls { "https" } else { "http" }));
    let outer = told(&FORWARDED_HOST, headers).or_else(|| host.clone());
    if !client.trusted {
        CLAIMS.iter().for_each(|name| {
            headers.remove(name);
        });
    }
    for (name, value) in [
        (FORWARDED_FOR, HeaderValue::from_str(&chain).ok()),
        (FORWARDED_PROTO, Some(proto)),
        (FORWARDED_HOST, outer),
        (header::HOST, Some(host.unwrap_or_else(|| HeaderValue::from_static("")))),
    ] {
        match value {
            Some(value) => drop(headers.insert(name, value)),
            None => drop(headers.remove(name)),
        }
    }
}

/// h2 clients split cookies for compression; HTTP/1.1 servers expect one header (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, cookie);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.parse::<HeaderName>().expect("name"), value.parse().expect("value"));
        }
        headers
    }

    fn text(headers: &HeaderMap) -> Vec<String> {
        let mut lines: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
        lines.sort();
        lines
    }

    #[test]
    fn hop_by_hop_headers_end_here() {
        for (before, after) in [
            (vec![("connection", "close, x-mine"), ("x-mine", "1"), ("x-other", "2")], vec!["x-other: 2"]),
            (
                vec![("connection", "Host, Content-Length"), ("host", "a"), ("content-length", "3")],
                vec!["content-length: 3", "host: a"],
            ),
            (vec![("te", "trailers"), ("keep-alive", "timeout=5"), ("upgrade", "h2c"), ("proxy", "evil")], vec![]),
            (
                vec![("transfer-encoding", "chunked"), ("proxy-connection", "keep-alive"), ("trailer", "x")],
                vec!["trailer: x"],
            ),
        ] {
            let mut headers = map(&before);
            strip(&mut headers);
            assert_eq!(text(&headers), after, "{before:?}");
        }
    }

    #[test]
    fn forwarding_claims_are_believed_from_trusted_clients_only() {
        let claims = [
            ("x-forwarded-for", "6.6.6.6"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "evil"),
            ("x-real-ip", "6.6.6.6"),
        ];
        for (trusted, expect) in [
            (false, vec!["host: a", "x-forwarded-for: 10.0.0.9", "x-forwarded-host: a", "x-forwarded-proto: http"]),
            (
                true,
                vec![
                    "host: a",
                    "x-forwarded-for: 6.6.6.6, 10.0.0.9",
                    "x-forwarded-host: evil",
                    "x-forwarded-proto: https",
                    "x-real-ip: 6.6.6.6",
                ],
            ),
        ] {
            let nets: Vec<IpNet> = if trusted { vec!["10.0.0.0/8".parse().expect("net")] } else { vec![] };
            let client = Client::new("::ffff:10.0.0.9".parse().expect("address"), false, &nets);
            let mut headers = map(&claims);
            prepare(&mut headers, client, Some(HeaderValue::from_static("a")));
            assert_eq!(text(&headers), expect);
        }
    }

    #[test]
    fn upgrades_are_named_and_h2c_is_none() {
        for (version, pairs, expect) in [
            (
                Version::HTTP_11,
                vec![("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")],
                Some("websocket"),
            ),
            (Version::HTTP_11, vec![("upgrade", "websocket")], None),
            (Version::HTTP_10, vec![("connection", "upgrade"), ("upgrade", "websocket")], None),
            (Version::HTTP_11, vec![("connection", "upgrade"), ("upgrade", "websocket, H2C")], None),
        ] {
            let got = upgrade(version, &map(&pairs));
            assert_eq!(got.as_ref().map(|v| v.to_str().expect("text")), expect, "{pairs:?}");
        }
    }

    #[test]
    fn one_host_only() {
        for (uri, pairs, expect) in [
            ("/", vec![("host", "a")], Ok(Some("a"))),
            ("/", vec![("host", "a"), ("host", "a")], Err(())),
            ("/", vec![], Err(())),
            ("http://b:8/x", vec![("host", "a")], Ok(Some("b:8"))),
            ("http://u@b/x", vec![("host", "a")], Err(())),
        ] {
            let got = host(Version::HTTP_11, &uri.parse().expect("uri"), &map(&pairs));
            let got = got.map(|host| host.map(|h| h.to_str().expect("text").to_owned())).map_err(|_| ());
            assert_eq!(got, expect.map(|host: Option<&str>| host.map(str::to_owned)), "{uri} {pairs:?}");
        }
    }

    #[test]
    fn cookie_crumbs_become_one() {
        let mut headers = map(&[("cookie", "a=1"), ("cookie", "b=2")]);
        join_cookies(&mut headers);
        assert_eq!(text(&headers), ["cookie: a=1; b=2"]);
    }
}
