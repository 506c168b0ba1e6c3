//! Asks a remote for refs over git's smart HTTP, protocol version 2, without the git binary.
//!
//! Proxies from the environment are not used: a proxy would resolve the remote's name itself, and what was judged here would
//! not be what is connected to.

use std::error::Error as StdError;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use replank_core::fault::Fault;
use replank_core::words::Millis;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, redirect};

use super::Limits;
use super::capabilities::{self, Unfit};
use super::pkt;
use super::refs::{BadRefs, RefLine, parse, tame};
use super::remote::{Host, Remote};

/// A server that does not answer a connection attempt by then is down.
const CONNECT_TIME: Duration = Duration::from_secs(10);
const AGENT: &str = concat!("replank/", env!("CARGO_PKG_VERSION"));

/// One conversation with a remote, at addresses that were judged.
#[derive(Debug)]
pub(super) struct Asker<'a> {
    remote: &'a Remote,
    client: Client,
    limits: &'a Limits,
}

impl<'a> Asker<'a> {
    pub(super) fn new(
        remote: &'a Remote,
        addresses: &[SocketAddr],
        ca_file: Option<&Path>,
        limits: &'a Limits,
    ) -> Result<Self, Fault> {
        // reqwest comes without a provider here. An error says that the process has one already.
        if rustls::crypto::ring::default_provider().install_default().is_err() {
            tracing::trace!("a TLS provider is already installed");
        }
        let mut builder = Client::builder()
            .user_agent(AGENT)
            .no_proxy()
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIME)
            .timeout(limits.refs_time)
            .https_only(!remote.is_plain());
        if let Host::Name(name) = remote.host() {
            builder = builder.resolve_to_addrs(name, addresses);
        }
        if let Some(path) = ca_file {
            builder = builder.tls_certs_only(certificates(path)?);
        } else if remote.is_plain() {
            // No certificate will be looked at; a machine without any must not fail here.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|e| {
            Fault::permanent("the HTTPS client cannot be set up")
                .advice("install CA certificates (ca-certificates), or name a CA file for the git remote")
                .because(e)
        })?;
        Ok(Self { remote, client, limits })
    }

    /// All refs under the prefixes, and perhaps others: a server may ignore prefixes.
    pub(super) async fn ls_refs(&self, prefixes: &[String]) -> Result<Vec<RefLine>, Fault> {
        let asked = tokio::time::timeout(self.limits.refs_time, self.converse(prefixes));
        asked.await.unwrap_or_else(|_| Err(slow()))
    }

    /// What time the remote says that it is. An answer of any kind carries it, a refusal too.
    pub(super) async fn time(&self) -> Result<Option<Millis>, Fault> {
        let url = format!("{}/info/refs?service=git-upload-pack", self.remote.shown());
        let asked = tokio::time::timeout(self.limits.refs_time, self.client.head(url).send()).await;
        let answer = asked.map_err(|_| slow())?.map_err(sort)?;
        Ok(crate::http_date::of(answer.headers()))
    }

    async fn converse(&self, prefixes: &[String]) -> Result<Vec<RefLine>, Fault> {
        let url = format!("{}/info/refs?service=git-upload-pack", self.remote.shown());
        let body = self.send(self.client.get(url), "application/x-git-upload-pack-advertisement").await?;
        capabilities::check(&body).map_err(unfit)?;
        let mut ask = Vec::new();
        pkt::write(&mut ask, "command=ls-refs\n");
        pkt::write(&mut ask, &format!("agent={AGENT}\n"));
        pkt::write(&mut ask, "object-format=sha1\n");
        ask.extend_from_slice(pkt::DELIM);
        pkt::write(&mut ask, "peel\n");
        pkt::write(&mut ask, "symrefs\n");
        for prefix in prefixes {
            pkt::write(&mut ask, &format!("ref-prefix {prefix}\n"));
        }
        ask.extend_from_slice(pkt::FLUSH);
        let url = format!("{}/git-upload-pack", self.remote.shown());
        let request = self.client.post(url).header(CONTENT_TYPE, "application/x-git-upload-pack-request").body(ask);
        let body = self.send(request, "application/x-git-upload-pack-result").await?;
        parse(&body).map_err(|why| match why {
            BadRefs::Said(_) => Fault::permanent("the git remote refuses to list its refs").advice(CHECK).because(why),
            BadRefs::Pkt(_) | BadRefs::Line | BadRefs::Unended => not_git(why.to_string()),
        })
    }

    async fn send(&self, request: RequestBuilder, expect: &str) -> Result<Vec<u8>, Fault> {
        let mut request = request.header("Git-Protocol", "version=2");
        if let Some(credential) = self.remote.credential() {
            request = request.basic_auth(&credential.username, Some(&credential.password));
        }
        let mut response = request.send().await.map_err(sort)?;
        status(&response, self.remote)?;
        let kind = response.headers().get(CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
        let kind = kind.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
        if kind != expect.as_bytes() {
            return Err(not_git(format!("the answer's type is {:?}", tame(kind))));
        }
        let limit = self.limits.advert_bytes;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(sort)? {
            if body.len() + chunk.len() > limit {
                return Err(Fault::permanent(format!("the git remote's answer is larger than {limit} bytes"))
                    .advice("remove old tags from the remote, and branches whose names begin with 'v'"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

const CHECK: &str = "check the remote's address and, for a private repository, its credential";

/// The `Authorization` header's value for a credential, for children that speak HTTP themselves.
pub(super) fn authorization(username: &str, password: &str) -> Result<String, Fault> {
    // The client's own encoder, so that there is one.
    let request = Client::builder().no_proxy().tls_certs_only([]).build();
    let request = request.and_then(|c| c.get("http://localhost/").basic_auth(username, Some(password)).build());
    let bad = || Fault::permanent("the credential of the git remote cannot be put into a header").advice(CHECK);
    let request = request.map_err(|e| bad().because(e))?;
    let value = request.headers().get(AUTHORIZATION).ok_or_else(bad)?;
    value.to_str().map(str::to_owned).map_err(|e| bad().because(e))
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, Fault> {
    let bad = || {
        Fault::permanent(format!("the CA file {} of the git remote cannot be used", path.display()))
            .advice("name a readable file of PEM certificates")
    };
    let pem = std::fs::read(path).map_err(|e| bad().because(e))?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(bad()),
        Err(e) => Err(bad().because(e)),
    }
}

fn slow() -> Fault {
    Fault::transient("the git remote did not answer in time")
        .advice("check that the git server is up and reachable from here")
}

fn not_git(why: String) -> Fault {
    Fault::permanent("the git remote does not answer as a git server does")
        .advice("check that the remote's address is the one that 'git clone' takes")
        .because(why)
}

fn unfit(why: Unfit) -> Fault {
    match why {
        Unfit::Pkt(_) | Unfit::NoList => not_git(why.to_string()),
        Unfit::Said(said) => {
            Fault::permanent("the git remote refuses to list its refs").advice(CHECK).because(BadRefs::Said(said))
        }
        Unfit::Old => Fault::permanent("the git remote speaks only an old version of git's protocol")
            .advice("let the git server speak protocol version 2 (git 2.18 or later; pass on the Git-Protocol header)"),
        Unfit::Format => Fault::permanent("the git remote's repository is not a SHA-1 one")
            .advice("use a repository with the object format sha1"),
    }
}

/// Sorts a failed exchange by its type: a certificate does not get better by waiting, the rest may.
fn sort(error: reqwest::Error) -> Fault {
    if error.is_timeout() {
        return slow().because(error.without_url());
    }
    if is_tls(&error) {
        return Fault::permanent("the git remote's TLS certificate or handshake is refused")
            .advice("check the remote's host name, or name the CA file of your own certificate authority")
            .because(error.without_url());
    }
    Fault::transient("the git remote cannot be reached")
        .advice("check the network between here and the git server")
        .because(error.without_url())
}

fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    let mut layer = Some(error);
    while let Some(error) = layer {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
            return true;
        }
        layer = error.source();
    }
    false
}

fn status(response: &Response, remote: &Remote) -> Result<(), Fault> {
    let code = response.status();
    let has_credential = remote.credential().is_some();
    let fault = match code {
        StatusCode::OK => return Ok(()),
        StatusCode::UNAUTHORIZED if has_credential => Fault::permanent("the git remote does not accept the credential")
            .advice("renew the credential of the git remote; it needs read access to the repository"),
        StatusCode::UNAUTHORIZED => Fault::permanent("the git remote wants a credential")
            .advice("configure a credential with read access to the repository"),
        StatusCode::FORBIDDEN => Fault::permanent("the git remote forbids access")
            .advice("give the credential read access to the repository"),
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Fault::permanent("the git remote has no such repository").advice(CHECK)
        }
        _ if code.is_redirection() => {
            let to = response.headers().get(LOCATION).map_or(&[][..], HeaderValue::as_bytes);
            let to = shown_target(to);
            Fault::permanent("the git remote redirects elsewhere, and redirects are not followed")
                .advice(format!("if the repository has moved, configure its new address{to}"))
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Fault::transient("the git remote asks for patience").advice("wait; Replank tries again")
        }
        _ if code.is_server_error() => {
            Fault::transient("the git remote has an internal problem").advice("look at the git server if this lasts")
        }
        _ => Fault::permanent("the git remote refuses the request").advice(CHECK),
    };
    Err(fault.because(format!("HTTP status {}", code.as_u16())))
}

/// A redirect's target as it may be shown: host and path, no userinfo, no query.
fn shown_target(location: &[u8]) -> String {
    let url = std::str::from_utf8(location).ok().and_then(|text| reqwest::Url::parse(text).ok());
    url.and_then(|url| Some(format!(" ({}://{}{})", url.scheme(), url.host_str()?, tame(url.path().as_bytes()))))
        .unwrap_or_default()
}
