//! The answer to `GET /status`, made once for everybody who asks at nearly the same time: pages, scripts and probes ask for
//! it far more often than anything changes.
//!
//! Two things are remembered for a moment, and no decision is ever taken on them: who a token is, for this one route, and the
//! row as bytes. Everything that changes something asks the ledger itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, header};
use replank_core::ports::Token;
use replank_core::words::Digest;
use tokio::sync::Mutex as Turn;

use super::App;
use super::auth::Caller;
use super::errors::ApiError;
use super::row::Row;

/// A token that was revoked still reads the status for this long, and does nothing else. Its end counts at once.
pub const TRUSTED_FOR: Duration = Duration::from_millis(250);
/// What another controller has written shows after this long at the latest; what this one has, at once.
const ROW_FOR: Duration = Duration::from_millis(20);
/// Remembered tokens; nobody has more that are in use at once. When it is full, all are asked for again.
const TOKENS_MAX: usize = 256;

/// What is remembered.
#[derive(Debug, Default)]
pub struct Glance {
    tokens: Mutex<HashMap<Digest, (Instant, Token)>>,
    row: Mutex<Option<Known>>,
    /// One makes the row anew, and the others wait for it.
    making: Turn<()>,
}

#[derive(Debug, Clone)]
struct Known {
    at: Instant,
    seq: u64,
    bytes: Bytes,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each entry is whole, whatever a panicking holder did.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Glance {
    /// A token that was found a moment ago.
    pub(super) fn token(&self, hash: &Digest) -> Option<Token> {
        lock(&self.tokens).get(hash).filter(|(at, _)| at.elapsed() < TRUSTED_FOR).map(|(_, token)| token.clone())
    }

    pub(super) fn found(&self, token: &Token) {
        let mut tokens = lock(&self.tokens);
        if tokens.len() >= TOKENS_MAX {
            tokens.clear();
        }
        tokens.insert(token.hash.clone(), (Instant::now(), token.clone()));
    }

    fn row(&self, seq: u64) -> Option<Bytes> {
        let row = lock(&self.row);
        row.as_ref().filter(|known| known.seq == seq && known.at.elapsed() < ROW_FOR).map(|known| known.bytes.clone())
    }
}

/// The status as it is now, as JSON.
pub(super) async fn status(app: &App) -> Result<Response, ApiError> {
    let seq = || app.engine.live().borrow().seq;
    let bytes = match app.glance.row(seq()) {
        Some(bytes) => bytes,
        None => {
            let _turn = app.glance.making.lock().await;
            match app.glance.row(seq()) {
                Some(bytes) => bytes,
                None => make(app).await?,
            }
        }
    };
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], bytes).into_response())
}

async fn make(app: &App) -> Result<Bytes, ApiError> {
    // Before the record is read: what changes while it is read makes the row old at once.
    let (at, live) = (Instant::now(), app.engine.live().borrow().clone());
    let record = app.engine.record().await?;
    let row = Row::of(&record, &live, &app.options.remote);
    let bytes = Bytes::from(serde_json::to_vec(&row).map_err(|error| ApiError::internal(&error))?);
    *lock(&app.glance.row) = Some(Known { at, seq: live.seq, bytes: bytes.clone() });
    Ok(bytes)
}

/// A signed-in caller who only wants to look: a token that was found a moment ago is not asked for again.
#[derive(Debug)]
pub struct Looker;

impl FromRequestParts<Arc<super::Http>> for Looker {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        Caller::of(parts, app, Some(&app.glance)).await.map(|_| Self)
    }
}
