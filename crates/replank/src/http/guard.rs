//! What a request must look like before anybody asks who sent it: host, origin, content type; and the headers of every answer.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use replank_core::record::Actor;

use super::errors::ApiError;
use super::serve::Peer;
use super::{App, Http};
use crate::refusals::{self, Asked};

/// Answered under any host name, since a platform probes by address, and nothing in them is worth rebinding for.
pub const OPEN: [&str; 3] = ["/api/health", "/livez", "/readyz"];

const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

impl Http {
    /// Writes down that somebody was not let in, as far as the bound allows. Never fails the answer that it belongs to.
    pub(super) async fn refused(&self, actor: &str, from: IpAddr, parts: &Parts, why: &str) {
        if self.strikes.may_write() {
            self.write_down(actor, &from.to_string(), &format!("{} {}", parts.method, parts.uri.path()), why).await;
        }
    }

    /// The same of a command that was turned down although its caller may give it. Counted apart, so that a flood from
    /// outside cannot hide what administrators tried.
    pub(super) async fn turned_down(&self, actor: &Actor, action: &str, why: &str) {
        if self.strikes.may_write_of_admins() {
            self.write_down(&actor.oid, &actor.from, action, why).await;
        }
    }

    async fn write_down(&self, actor: &str, from: &str, action: &str, why: &str) {
        let asked = Asked { at: self.clock.now(), actor, from, action };
        refusals::write_down(self.tokens.as_ref(), asked, why).await;
    }
}

/// The outermost layer of every route.
pub async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let mut response = match check(&app, &parts) {
        Err(error) => {
            let from = parts.extensions.get::<Peer>().map_or(IpAddr::from([0, 0, 0, 0]), |p| p.0.ip());
            app.refused("", from, &parts, &error.detail).await;
            error.into_response()
        }
        Ok(()) => {
            let run = next.run(Request::from_parts(parts, body));
            match tokio::time::timeout(app.options.limits.request, run).await {
                Ok(response) => response,
                Err(_) => {
                    let detail = "no answer in time; look at the status before you try again";
                    ApiError::new(StatusCode::GATEWAY_TIMEOUT, detail).into_response()
                }
            }
        }
    };
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

fn check(app: &Http, parts: &Parts) -> Result<(), ApiError> {
    if OPEN.contains(&parts.uri.path()) {
        return Ok(());
    }
    let host = one(&parts.headers, &header::HOST)?.and_then(split_host);
    let Some((name, port)) = host.filter(|(name, port)| allowed(app, name, *port)) else {
        let detail = "this host name is not served here; add it to server.public_hosts in replank.toml";
        return Err(ApiError::new(StatusCode::MISDIRECTED_REQUEST, detail));
    };
    if matches!(parts.method.as_str(), "GET" | "HEAD" | "OPTIONS") {
        return Ok(());
    }
    let foreign = || ApiError::new(StatusCode::FORBIDDEN, "the request comes from another site");
    if let Some(origin) = one(&parts.headers, &header::ORIGIN)? {
        // TLS may end before this service, so the scheme says nothing; host and port do.
        let authority = origin.split_once("://").map(|(_, rest)| rest);
        if authority.and_then(split_host) != Some((name, port)) {
            return Err(foreign());
        }
    }
    if let Some(site) = one(&parts.headers, &HeaderName::from_static("sec-fetch-site"))?
        && !matches!(site, "same-origin" | "none")
    {
        return Err(foreign());
    }
    content_type(parts)
}

/// JSON, or no body at all where a route can do without: a form cannot be made to look like either.
fn content_type(parts: &Parts) -> Result<(), ApiError> {
    let wrong =
        || ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "send the body as `Content-Type: application/json`");
    let has_body = parts.headers.contains_key(header::TRANSFER_ENCODING)
        || parts.headers.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0");
    match one(&parts.headers, &header::CONTENT_TYPE)? {
        None if has_body => Err(wrong()),
        None => Ok(()),
        Some(value) => {
            let essence = value.split(';').next().unwrap_or("").trim();
            if essence.eq_ignore_ascii_case("application/json") { Ok(()) } else { Err(wrong()) }
        }
    }
}

/// A header that may stand once. Two of one kind are read differently by different readers, which is how guards are passed.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(ApiError::bad_request(format!("the header {name} stands twice")));
    }
    first
        .map(|value| value.to_str().map_err(|_| ApiError::bad_request(format!("the header {name} is not readable"))))
        .transpose()
}

fn allowed(app: &Http, name: &str, port: Option<u16>) -> bool {
    is_loopback_name(name)
        || app.options.hosts.contains(name)
        || port.is_some_and(|port| app.options.hosts.contains(&format!("{name}:{port}")))
}

/// Host and port of an authority, lower case; an IPv6 address without its brackets.
pub fn split_host(text: &str) -> Option<(String, Option<u16>)> {
    let authority: http::uri::Authority = text.parse().ok()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    // "host:" and "host:99999" parse as an authority without a port.
    let rest = authority.as_str().rsplit_once(']').map_or(authority.as_str(), |(_, rest)| rest);
    if rest.contains(':') && authority.port_u16().is_none() {
        return None;
    }
    (!host.is_empty()).then(|| (host, authority.port_u16()))
}

/// Names that mean this machine. Other names that resolve to it do not count: that is what rebinding does.
pub fn is_loopback_name(name: &str) -> bool {
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What is said where no route is.
pub async fn nothing_here(method: Method) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing to {method} here"))
}

pub async fn wrong_method(method: Method) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not possible here"))
}
