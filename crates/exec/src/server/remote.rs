//! The one remote: whether it may be one at all, and its addresses, judged and pinned anew for each request that talks to it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, SocketAddr};

use crate::outbound::{self, Kind, RESOLVE_TIME, Reach, Refused, Resolver};
use crate::policy::url;

/// Longest name that the name service knows.
const HOST_MAX: usize = 253;

/// A remote that obeys the URL rule. Nothing of a user or a password is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    host: Host,
    port: u16,
    is_plain: bool,
    reach: Reach,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Name(String),
    Literal(IpAddr),
}

/// Why git is not sent to the remote now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreached {
    #[error("the remote's host is refused: {0}{advice}", advice = advice(.0))]
    Refused(Refused),
    #[error("the remote's host is refused: {0} is a public address, and http shows everything on the way there")]
    Shown(IpAddr),
    /// As far as a client is concerned, git itself could not reach it.
    #[error("the remote's host {0} cannot be resolved: {1}; check its name and this machine's name service")]
    Unresolved(String, String),
}

fn advice(refused: &Refused) -> &'static str {
    match refused {
        Refused::Loopback(_) => "; EXEC_ALLOW_LOOPBACK_REMOTE=true allows it for development",
        Refused::Private(_) => "; EXEC_ALLOW_PRIVATE_REMOTE=true allows a git server on your own network",
        Refused::Never(..) | Refused::Nowhere(_) => "",
    }
}

impl Remote {
    /// Reads the configured URL and judges what can be judged without asking anybody.
    ///
    /// # Errors
    /// With what is wrong, as the end of a sentence that begins with the variable's name. Nothing of the URL is in it, as it may
    /// hold a password.
    pub fn read(text: &str, reach: Reach) -> Result<Self, String> {
        let shape = || "must be https://HOST/PATH.git".to_owned();
        let (scheme, authority) = url::authority(text).ok_or_else(shape)?;
        let is_plain = scheme == "http";
        if is_plain && !reach.loopback {
            return Err(
                "must begin with https://: http is for development, with EXEC_ALLOW_LOOPBACK_REMOTE=true".into()
            );
        }
        if !text.ends_with(".git") || text.ends_with("/.git") || text.contains(['?', '#']) {
            return Err("must end in .git after a name, without a query".into());
        }
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| shape())?),
            _ => (authority.as_str(), if is_plain { 80 } else { 443 }),
        };
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let host = match bare.parse::<IpAddr>() {
            Ok(ip) if ip.is_ipv6() == (bare != host) => Host::Literal(ip),
            _ => Host::Name(name(host).ok_or("must name its host by a name, or by an address in the usual form")?),
        };
        let remote = Self { host, port, is_plain, reach };
        let judged = match &remote.host {
            Host::Literal(ip) => remote.admit(*ip),
            Host::Name(name) => outbound::admit_name(name, reach).map_err(Unreached::Refused),
        };
        match judged {
            Ok(()) => Ok(remote),
            Err(why) => Err(format!("cannot be used: {why}")),
        }
    }

    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.is_plain
    }

    fn admit(&self, ip: IpAddr) -> Result<(), Unreached> {
        match outbound::admit(ip, self.reach).map_err(Unreached::Refused)? {
            Kind::Public if self.is_plain => Err(Unreached::Shown(ip)),
            _ => Ok(()),
        }
    }

    /// Resolves the host once, judges every answer, and answers what git is told so that it asks nobody again: a value of
    /// `http.curloptResolve`, or nothing where the URL has an address.
    ///
    /// `own` is the environment that git gets its proxy from. Behind a proxy it is the proxy that resolves, so a pin has no
    /// effect, and a name that only the proxy can resolve is no reason to refuse; what can be resolved here is judged all the
    /// same.
    ///
    /// # Errors
    /// When there is no address, or one that may not be connected to.
    pub async fn pin(
        &self,
        resolver: &dyn Resolver,
        own: &BTreeMap<OsString, OsString>,
    ) -> Result<Option<String>, Unreached> {
        let Host::Name(name) = &self.host else { return Ok(None) };
        let answers = match tokio::time::timeout(RESOLVE_TIME, resolver.resolve(name, self.port)).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(_)) | Err(_) if self.is_behind_proxy(name, own) => return Ok(None),
            Ok(Err(error)) => return Err(Unreached::Unresolved(name.clone(), error.to_string())),
            Err(_) => {
                let why = format!("no answer within {} s", RESOLVE_TIME.as_secs());
                return Err(Unreached::Unresolved(name.clone(), why));
            }
        };
        let answers: Vec<SocketAddr> =
            outbound::admit_all(name, answers, self.reach).map_err(|refused| match refused {
                Refused::Nowhere(name) => Unreached::Unresolved(name, "it has no address".into()),
                refused => Unreached::Refused(refused),
            })?;
        answers.iter().try_for_each(|answer| self.admit(answer.ip()))?;
        Ok(Some(outbound::pin(name, self.port, &answers)))
    }

    /// Read as git's HTTP library does, except that what is unclear counts as "no proxy": then the name must resolve here.
    fn is_behind_proxy(&self, host: &str, own: &BTreeMap<OsString, OsString>) -> bool {
        let get = |name: &str| own.get(OsStr::new(name)).and_then(|value| value.to_str()).filter(|v| !v.is_empty());
        let proxy = if self.is_plain { get("http_proxy") } else { get("https_proxy").or_else(|| get("HTTPS_PROXY")) };
        let excepted = get("no_proxy").or_else(|| get("NO_PROXY")).unwrap_or_default();
        let is_excepted = excepted.split([',', ' ']).map(|entry| entry.trim_start_matches(['*', '.'])).any(|entry| {
            let entry = entry.split(':').next().unwrap_or_default().to_ascii_lowercase();
            host.strip_suffix(entry.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.') && !entry.is_empty())
        });
        proxy.is_some() && !is_excepted && !excepted.contains('*')
    }
}

/// A host's name in lower case. One that ends in a number is an address in a spelling that few expect, such as `127.1`.
fn name(text: &str) -> Option<String> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|b| b.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    let fine = text.len() <= HOST_MAX && text.split('.').all(label) && !is_number;
    fine.then(|| text.to_ascii_lowercase())
}
