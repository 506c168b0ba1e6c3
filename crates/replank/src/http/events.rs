//! The stream of states: the whole row and the live part at once, then on every change, with heartbeats in between.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header};
use replank_core::words::Millis;
use tokio::sync::watch;
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};

use super::App;
use super::auth::Caller;
use super::errors::ApiError;
use super::limits::StreamPermit;
use super::row::Row;
use crate::engine::api::Live;

/// What clients are told to wait before they come back, in milliseconds.
const RETRY_MS: u64 = 1_000;

/// One event of the stream, its fields by name.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the stream is written as text; this is its shape for the document")]
struct StateEvent {
    #[schema(schema_with = names)]
    event: String,
    /// Grows with every change, within one process.
    #[schema(pattern = "^[0-9]+$")]
    id: String,
    /// Of `status`, the row; of `trouble`, an object with `detail`.
    #[schema(content_media_type = "application/json")]
    data: String,
    /// Milliseconds to wait before coming back; in the first event.
    retry: Option<u64>,
}

fn names() -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["status", "trouble"])).build()
}

struct Events {
    app: App,
    caller: Caller,
    live: watch::Receiver<Live>,
    /// When the last state went out; `None` before the first.
    sent: Option<Instant>,
    _permit: StreamPermit,
}

/// The row at once and on every change, as server-sent events: `status` with a row, or `trouble` with `detail`.
#[utoipa::path(get, path = "/events", tag = "upgrade", security(("token" = [])),
    responses((status = 200, description = "A stream without an end; the schema is one event's",
        body = StateEvent, content_type = "text/event-stream; charset=utf-8")))]
pub async fn events(State(app): State<App>, caller: Caller) -> Result<Response, ApiError> {
    let permit = open(&app, &caller)?;
    let mut live = app.engine.live();
    live.mark_unchanged();
    let events = Events { app, caller, live, sent: None, _permit: permit };
    let body = Body::from_stream(stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, Infallible>(bytes), events))
    }));
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    // Proxies that buffer answers would hold the events back; this is how nginx and its like are told.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A place for one more stream of this caller.
pub fn open(app: &App, caller: &Caller) -> Result<StreamPermit, ApiError> {
    app.streams
        .open(&caller.actor.oid, &app.options.limits)
        .ok_or_else(|| ApiError::too_many("too many streams are open; close one", 5))
}

impl Events {
    async fn next(&mut self) -> Option<Bytes> {
        let limits = self.app.options.limits.clone();
        if let Some(sent) = self.sent {
            let stopping = self.app.stopping.clone();
            tokio::select! {
                () = stopping.cancelled() => return None,
                changed = self.live.changed() => changed.ok()?,
                () = tokio::time::sleep(limits.heartbeat) => {
                    return self.caller.still_stands(&self.app).await.then(|| Bytes::from_static(b": still here\n\n"));
                }
            }
            // What changes meanwhile is in the state that goes out then: the latest is all that matters.
            let pause: Duration = limits.coalesce.saturating_sub(sent.elapsed());
            tokio::select! {
                () = stopping.cancelled() => return None,
                () = tokio::time::sleep(pause) => {}
            }
        }
        let first = self.sent.replace(Instant::now()).is_none();
        let live = self.live.borrow_and_update().clone();
        let retry = if first { format!("retry: {RETRY_MS}\n") } else { String::new() };
        let (event, data) = match self.app.engine.record().await {
            Ok(record) => {
                let row = Row::of(&record, &live, &self.app.options.remote);
                ("status", serde_json::to_string(&row))
            }
            Err(refusal) => ("trouble", serde_json::to_string(&serde_json::json!({ "detail": refusal.to_string() }))),
        };
        let data = data.unwrap_or_default();
        Some(Bytes::from(format!("{retry}event: {event}\nid: {}\ndata: {data}\n\n", live.seq)))
    }
}

/// RFC 3339, or an empty text.
pub(super) fn time(at: Option<Millis>) -> String {
    at.map(Millis::rfc3339).unwrap_or_default()
}
