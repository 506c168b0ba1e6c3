//! Build logs: the stored bytes passed through, from an offset, and followed while they grow.

use std::io;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use replank_core::words::{ComponentName, JobId};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::IntoParams;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};

use super::App;
use super::auth::{Admin, Caller};
use super::errors::ApiError;
use super::events::open;
use super::extract::{Asked, Named, number};
use super::limits::StreamPermit;
use crate::engine::api::LogRead;

/// One read of the store: large enough to be cheap, small enough to hold for every stream at once.
const CHUNK: usize = 64 * 1024;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Ask {
    /// Go on until the build ends.
    #[param(schema_with = switch)]
    follow: Option<String>,
    /// How many bytes to leave out.
    #[param(schema_with = offset)]
    from: Option<String>,
}

/// Without a format, which would bound it: an offset beyond the end is an empty answer.
fn offset() -> Object {
    ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0)).default(Some(0.into())).build()
}

fn switch() -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["0", "1", "false", "true"])).build()
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct Which {
    #[param(pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{3,63}$")]
    job_id: String,
    /// One of the configured components.
    component: String,
}

struct Reader {
    app: App,
    caller: Caller,
    job: JobId,
    component: ComponentName,
    at: u64,
    follow: bool,
    /// Read before the answer began, to know its status.
    ready: Option<Bytes>,
    closed: bool,
    checked: Instant,
    _permit: StreamPermit,
}

/// A component's build log: the stored bytes, from an offset, followed where that is asked for.
#[utoipa::path(get, path = "/jobs/{job_id}/build-log/{component}", tag = "upgrade", security(("token" = ["admin"])),
    params(Which, Ask), responses(
        (status = 200, description = "The log; empty where the current job's has not begun",
            body = String, content_type = "text/plain; charset=utf-8"),
        (status = 400, description = "A bad job id, an unknown component or a bad parameter"),
        (status = 404, description = "There is no such log"),
    ))]
pub async fn build_log(
    State(app): State<App>,
    Admin(caller): Admin,
    Named(which): Named<Which>,
    Asked(ask): Asked<Ask>,
) -> Result<Response, ApiError> {
    let component = which.component;
    let job = JobId::new(which.job_id).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let known = app.engine.components();
    // A data step has a log too, under its own name.
    let is_step = component == "backup"
        || component.strip_prefix("migrate-").is_some_and(|of| known.iter().any(|known| known.as_str() == of));
    let step = ComponentName::new(component.as_str()).ok().filter(|_| is_step);
    let component = known.iter().find(|c| c.as_str() == component).cloned().or(step).ok_or_else(|| {
        let known: Vec<&str> = known.iter().map(ComponentName::as_str).collect();
        ApiError::bad_request(format!("there is no such component; the components are {}", known.join(", ")))
    })?;
    let from = match ask.from.as_deref() {
        None => 0,
        Some(text) => number("from", text)?,
    };
    let follow = match ask.follow.as_deref() {
        None | Some("0" | "false") => false,
        Some("1" | "true") => true,
        Some(_) => return Err(ApiError::bad_request("`follow` is 1 or 0")),
    };
    let permit = open(&app, &caller)?;
    let (ready, at, closed) = match app.engine.read_log(&job, &component, from, CHUNK).await? {
        LogRead::Unknown => {
            return Err(ApiError::new(StatusCode::NOT_FOUND, format!("job {job} has no log of {component}")));
        }
        LogRead::NotBegun => (Bytes::new(), from, false),
        LogRead::Chunk(chunk) => (Bytes::from(chunk.bytes), chunk.next, chunk.closed),
    };
    let ready = Some(ready).filter(|bytes| !bytes.is_empty());
    let checked = Instant::now();
    let reader = Reader { app, caller, job, component, at, follow, ready, closed, checked, _permit: permit };
    let body = Body::from_stream(stream::try_unfold(reader, |mut reader| async move {
        let bytes = reader.next().await?;
        Ok::<_, io::Error>(bytes.map(|bytes| (bytes, reader)))
    }));
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

impl Reader {
    /// The next bytes; `None` at the end of the log. An error cuts the connection, so that a reader can tell a log that
    /// ended from a service that went away.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(bytes) = self.ready.take() {
            return Ok(Some(bytes));
        }
        loop {
            if self.closed {
                return Ok(None);
            }
            // Asked before the read: whatever is written before a job rests is then still read.
            let resting = self.follow && self.resting().await?;
            let read = self.app.engine.read_log(&self.job, &self.component, self.at, CHUNK).await;
            if let LogRead::Chunk(chunk) = read.map_err(io::Error::other)? {
                self.at = chunk.next;
                self.closed = chunk.closed;
                if !chunk.bytes.is_empty() {
                    return Ok(Some(Bytes::from(chunk.bytes)));
                }
            }
            if self.closed || !self.follow || resting {
                return Ok(None);
            }
            if self.checked.elapsed() > self.app.options.limits.heartbeat {
                self.checked = Instant::now();
                if !self.caller.still_stands(&self.app).await {
                    return Err(io::Error::other("the token no longer stands"));
                }
            }
            tokio::select! {
                () = self.app.stopping.cancelled() => return Err(io::Error::other("the service stops")),
                () = self.app.engine.log_changed(&self.job, &self.component, self.at) => {}
            }
        }
    }

    /// Nothing will come any more: the log's job is not the one in flight. A killed writer leaves a log open.
    async fn resting(&self) -> io::Result<bool> {
        let record = self.app.engine.record().await.map_err(io::Error::other)?;
        let current = record.job.as_ref().is_some_and(|job| job.id == self.job);
        Ok(!current || !record.phase.state().in_flight())
    }
}
