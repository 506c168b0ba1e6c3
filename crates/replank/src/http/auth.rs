//! Who calls: named bearer tokens, and the development identity. Everything else is nobody.

use std::net::{IpAddr, SocketAddr};

use axum::extract::FromRequestParts;
use http::request::Parts;
use http::{StatusCode, header};
use replank_core::ports::Role;
use replank_core::record::Actor;
use replank_core::words::Digest;

use super::App;
use super::errors::ApiError;
use super::glance::Glance;
use super::guard::{is_loopback_name, split_host};
use super::serve::Peer;

/// How every token begins, so that secret scanners and people know one.
pub const SECRET_PREFIX: &str = "rpk_";
/// Longest token that is looked at: ours have 68 characters.
const SECRET_MAX: usize = 512;
/// The development identity (contract §2).
const DEV_OID: &str = "00000000-0000-0000-0000-000000000000";

/// A signed-in caller.
#[derive(Debug, Clone)]
pub struct Caller {
    pub actor: Actor,
    pub role: Role,
    /// To ask again later whether a long stream may go on.
    hash: Option<Digest>,
}

/// A signed-in caller who may change what runs.
#[derive(Debug, Clone)]
pub struct Admin(pub Caller);

/// The hash under which a token is kept.
pub fn hash_secret(secret: &str) -> Digest {
    Digest::of(secret.as_bytes())
}

/// Whether requests without a token count as the development identity. The error says what is in the way.
///
/// The identity is an administrator, so it needs the flag, and a place that only this machine's people can reach.
pub fn dev_bypass(
    flag: bool,
    listen: SocketAddr,
    revision: Option<&str>,
    container_app: Option<&str>,
) -> Result<bool, String> {
    if !flag {
        return Ok(false);
    }
    if container_app.is_some() {
        return Err("--dev is refused where CONTAINER_APP_NAME is set: sign in with a token".to_owned());
    }
    if revision.is_some() {
        return Err(
            "--dev is refused inside a deployed revision (REPLANK_REVISION is set): sign in with a token".to_owned()
        );
    }
    if !listen.ip().is_loopback() {
        return Err(format!(
            "--dev needs a loopback address and this would listen on {listen}: use --listen 127.0.0.1:8086"
        ));
    }
    Ok(true)
}

impl Caller {
    /// With `glance`, a token that was found a moment ago is taken from there: only where nothing but looking is allowed.
    pub(super) async fn of(parts: &Parts, app: &App, glance: Option<&Glance>) -> Result<Self, ApiError> {
        let Some(Peer(peer)) = parts.extensions.get::<Peer>().copied() else {
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, "the caller's address is not known"));
        };
        let Some(value) = parts.headers.get(header::AUTHORIZATION) else {
            let host = parts.headers.get(header::HOST).and_then(|h| h.to_str().ok()).and_then(split_host);
            let local = peer.ip().is_loopback() && host.is_some_and(|(name, _)| is_loopback_name(&name));
            return if app.options.dev_bypass && local {
                Ok(Self::developer(peer.ip()))
            } else {
                Err(ApiError::new(StatusCode::UNAUTHORIZED, "sign in: send `Authorization: Bearer TOKEN`"))
            };
        };
        let secret = value.to_str().ok().and_then(|v| {
            let (scheme, secret) = v.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
        });
        let now = app.clock.now();
        let hash = secret.filter(|s| !s.is_empty() && s.len() <= SECRET_MAX).map(hash_secret);
        let known = hash.as_ref().and_then(|hash| glance?.token(hash));
        let is_known = known.is_some();
        let found = match (known, &hash) {
            (Some(token), _) => Some(token),
            (None, Some(hash)) => app.tokens.by_hash(hash).await.map_err(|e| ApiError::internal(&e))?,
            (None, None) => None,
        };
        let usable = found.filter(|t| t.revoked_at.is_none() && t.expires_at.is_none_or(|until| now < until));
        let Some(token) = usable else {
            if let Some(wait) = app.strikes.strike(peer.ip()) {
                return Err(ApiError::too_many("too many failed sign-ins from this address", wait));
            }
            app.refused("", peer.ip(), parts, "the token is unknown, revoked or expired").await;
            let detail = "the token is unknown, revoked or expired; make another with `replank token create`";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, detail));
        };
        // Best effort by contract of the port: a sign-in must not fail because of it.
        if !is_known && let Err(error) = app.tokens.used(&token.id, now).await {
            tracing::debug!(%error, "a token's last use was not written");
        }
        if !is_known && let Some(glance) = glance {
            glance.found(&token);
        }
        let actor = Actor { oid: token.id, name: token.name, from: peer.ip().to_string() };
        Ok(Self { actor, role: token.role, hash: Some(token.hash) })
    }

    fn developer(from: IpAddr) -> Self {
        let actor = Actor { oid: DEV_OID.to_owned(), name: "developer".to_owned(), from: from.to_string() };
        Self { actor, role: Role::Admin, hash: None }
    }

    /// Whether the token still stands: a stream must not outlive a revocation. An answer that cannot be had counts as yes
    /// until the next time, since the store being busy is no reason to cut everybody off.
    pub async fn still_stands(&self, app: &App) -> bool {
        let Some(hash) = &self.hash else { return true };
        let now = app.clock.now();
        match app.tokens.by_hash(hash).await {
            Ok(Some(token)) => token.revoked_at.is_none() && token.expires_at.is_none_or(|until| now < until),
            Ok(None) => false,
            Err(_) => true,
        }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        Self::of(parts, app, None).await
    }
}

impl FromRequestParts<App> for Admin {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let caller = Caller::of(parts, app, None).await?;
        match caller.role {
            Role::Admin => Ok(Self(caller)),
            Role::Reader => {
                let from = parts.extensions.get::<Peer>().map_or(IpAddr::from([0, 0, 0, 0]), |p| p.0.ip());
                app.refused(&caller.actor.oid, from, parts, "the token's role is reader").await;
                let detail =
                    "this needs a token with the role admin; make one with `replank token create NAME --role admin`";
                Err(ApiError::new(StatusCode::FORBIDDEN, detail))
            }
        }
    }
}
