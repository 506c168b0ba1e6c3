//! Basic and bearer authorization of registries; credentials go to the registry itself or to a realm that is safe to name.

use std::fmt;

use replank_core::fault::{Class, Fault};
use reqwest::{Client, Url};
use serde::Deserialize;

use super::{OciConfig, Place, is_loopback, read};

/// A token answer holds one or two tokens of a few KiB.
const TOKEN_MAX: usize = 256 << 10;

/// A user and password, or a user and an access token, of one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Credentials {
    /// The value of an `Authorization` header.
    pub(super) fn basic(&self) -> String {
        format!("Basic {}", base64(format!("{}:{}", self.username, self.password).as_bytes()))
    }
}

/// Standard base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, b| (word << 8) | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let sextet = (word >> (18 - 6 * i)) & 63;
            text.push(if i <= chunk.len() { char::from(ALPHABET[sextet as usize]) } else { '=' });
        }
    }
    text
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

/// Reads a `WWW-Authenticate` header as registries write it: one scheme, quoted parameters.
pub(super) fn challenge(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let parameter = |name: &str| {
        let start = rest.find(&format!("{name}=\""))? + name.len() + 2;
        let value = &rest[start..];
        Some(value[..value.find('"')?].to_owned())
    };
    Some(Challenge::Bearer { realm: parameter("realm")?, service: parameter("service") })
}

/// Where a token may be asked for: over TLS, or without it on the registry's own host or loopback where the registry
/// itself is spoken to without TLS. A hostile registry could else send credentials in the clear, or to a neighbour.
pub(super) fn realm(text: &str, place: &Place, config: &OciConfig) -> Result<Url, Fault> {
    let refused = || {
        Fault::permanent(format!("the registry {} names a place for tokens that is not trusted", place.host))
            .advice("check the registry's token realm; it must be an https address")
    };
    let url = Url::parse(text).map_err(|_| refused())?;
    let host = match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => return Err(refused()),
    };
    let registry_is_plain = place.base.scheme() == "http";
    let good = match url.scheme() {
        // The registry is loopback's: its realm may be, too. A public registry's may not point inside.
        "https" => is_loopback(&place.host) || !is_loopback(&host),
        "http" => {
            registry_is_plain
                && (host == place.host || config.insecure.contains(&host) || is_both_loopback(&host, place))
        }
        _ => false,
    };
    if good && url.username().is_empty() && url.password().is_none() { Ok(url) } else { Err(refused()) }
}

fn is_both_loopback(host: &str, place: &Place) -> bool {
    is_loopback(host) && is_loopback(&place.host)
}

/// Fetches a bearer token: the value of an `Authorization` header.
pub(super) async fn token(
    client: &Client,
    mut realm: Url,
    service: Option<&str>,
    scope: &str,
    credentials: Option<&Credentials>,
    place: &Place,
) -> Result<String, Fault> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    if let Some(service) = service {
        realm.query_pairs_mut().append_pair("service", service);
    }
    realm.query_pairs_mut().append_pair("scope", scope);
    let mut request = client.get(realm);
    if let Some(credentials) = credentials {
        request = request.header("authorization", credentials.basic());
    }
    let what = |why: &str| format!("no token for the registry {}: {why}", place.host);
    let response = request
        .send()
        .await
        .map_err(|e| Fault::transient(what("its token service cannot be reached")).because(e.without_url()))?;
    let status = response.status();
    if !status.is_success() {
        let class =
            if status.is_server_error() || status.as_u16() == 429 { Class::Transient } else { Class::Permanent };
        return Err(Fault::new(class, what(&format!("its token service answers {}", status.as_u16())))
            .advice("give valid credentials for this registry in the configuration"));
    }
    let answer: Answer = serde_json::from_slice(&read(response, TOKEN_MAX).await?)
        .map_err(|e| Fault::permanent(what("its token service's answer cannot be read")).because(e))?;
    match answer.token.or(answer.access_token) {
        Some(token) if !token.is_empty() => Ok(format!("Bearer {token}")),
        _ => Err(Fault::permanent(what("its token service gave none"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded() {
        for (text, expect) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("user:pass", "dXNlcjpwYXNz")]
        {
            assert_eq!(base64(text.as_bytes()), expect);
        }
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) })
        };
        for (header, expect) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("Bearer realm=\"https://a/t\",service=\"s\",scope=\"x\"", bearer("https://a/t", Some("s"))),
            ("bearer realm=\"https://a/t\"", bearer("https://a/t", None)),
            ("Bearer service=\"s\"", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(challenge(header), expect, "{header}");
        }
    }

    #[test]
    fn realms_that_could_leak_credentials_are_refused() {
        let client = super::super::OciClient::new(OciConfig::default()).expect("client");
        for (repository, text, good) in [
            ("registry.example/a", "https://auth.example/token", true),
            ("registry.example/a", "http://auth.example/token", false),
            ("registry.example/a", "http://registry.example/token", false),
            ("registry.example/a", "https://127.0.0.1/token", false),
            ("registry.example/a", "ftp://registry.example/token", false),
            ("registry.example/a", "https://user@auth.example/token", false),
            ("registry.example/a", "nonsense", false),
            ("127.0.0.1:5000/a", "http://127.0.0.1:5000/token", true),
            ("127.0.0.1:5000/a", "http://127.0.0.1:5001/token", true),
            ("127.0.0.1:5000/a", "http://10.0.0.1/token", false),
        ] {
            let place = client.place(repository).expect("place");
            assert_eq!(realm(text, &place, &OciConfig::default()).is_ok(), good, "{repository} {text}");
        }
    }
}
