//! The routes of contract §2: each takes the request apart, calls one engine command and shapes the answer.

use axum::extract::{Query, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use replank_core::ports::TagRef;
use replank_core::record::Record;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::auth::{Admin, Caller};
use super::bodies::{self, Nothing, Reason, Wanted};
use super::errors::ApiError;
use super::events::{events, time};
use super::glance::{self, Looker};
use super::guard::{guard, nothing_here, wrong_method};
use super::limits::BODY_MAX;
use super::logs::build_log;
use super::row::Row;
use super::{App, row};

const HISTORY_DEFAULT: usize = 50;
/// Most history lines of one answer; a line has a few hundred bytes.
const HISTORY_MAX: usize = 1_000;

type Answer = Result<Json<Value>, ApiError>;
type Accepted = Result<(StatusCode, Json<Row>), ApiError>;
type Tried = Result<Record, ApiError>;

pub fn router(app: App) -> Router {
    let upgrade = Router::new()
        .route("/status", get(status))
        .route("/candidates", get(candidates))
        .route("/check", post(check))
        .route("/settings", post(settings))
        .route("/start", post(start))
        .route("/jobs/{job_id}/build-log/{component}", get(build_log))
        .route("/rollback-preflight", get(preflight))
        .route("/rollback", post(rollback))
        .route("/cancel", post(cancel))
        .route("/confirm", post(confirm))
        .route("/reset", post(reset))
        .route("/escape-hatch", get(escape_hatch))
        .route("/history", get(history))
        .route("/events", get(events));
    Router::new()
        .nest("/api/upgrade", upgrade)
        .route("/api/health", get(health))
        .route("/livez", get(|| async { Json(json!({ "status": "ok" })) }))
        .route("/readyz", get(ready))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// A request's body, bounded, as JSON. Fields that are not known are refused.
struct Body(Bytes);

impl axum::extract::FromRequest<App> for Body {
    type Rejection = ApiError;
    async fn from_request(request: axum::extract::Request, _: &App) -> Result<Self, ApiError> {
        match Limited::new(request.into_body(), BODY_MAX).collect().await {
            Ok(body) => Ok(Self(body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                let detail = format!("the body is longer than {BODY_MAX} bytes");
                Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, detail))
            }
            Err(_) => Err(ApiError::bad_request("the body did not come in whole")),
        }
    }
}

impl Body {
    fn required<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        Ok(bodies::required(&self.0)?)
    }

    fn optional<T: DeserializeOwned + Default>(&self) -> Result<T, ApiError> {
        Ok(bodies::optional(&self.0)?)
    }
}

fn view(app: &App, record: &Record) -> Row {
    Row::of(record, &app.engine.live().borrow(), &app.options.remote)
}

fn accepted(app: &App, record: &Record) -> Accepted {
    Ok((StatusCode::ACCEPTED, Json(view(app, record))))
}

async fn health(State(app): State<App>) -> Json<Value> {
    Json(json!({ "status": "ok", "version": app.options.version, "replank": env!("CARGO_PKG_VERSION") }))
}

async fn ready(State(app): State<App>) -> Answer {
    match app.engine.ready().await {
        Ok(()) => Ok(Json(json!({ "status": "ready" }))),
        Err(refusal) => {
            tracing::warn!(why = %refusal, "not ready");
            // Nobody is signed in here, so the reason stays in the log.
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not ready; the service's log says why"))
        }
    }
}

async fn status(State(app): State<App>, _: Looker) -> Result<Response, ApiError> {
    glance::status(&app).await
}

fn candidate(tag: &TagRef) -> Value {
    let mut shown = json!({ "name": tag.version.tag(), "raw_ref": tag.raw_ref, "commit_sha": tag.commit });
    if let Some(refused) = &tag.refused {
        shown["refused"] = refused.as_str().into();
    }
    shown
}

async fn candidates(State(app): State<App>, _: Caller) -> Answer {
    let found = app.engine.candidates().await?;
    let mut answer = json!({
        "configured": found.configured,
        "remote": found.remote.as_deref().map(crate::config::shown),
        "running_version": found.running_version,
        "candidates": found.candidates.iter().map(candidate).collect::<Vec<_>>(),
        "refused": found.refused.iter().map(candidate).collect::<Vec<_>>(),
    });
    if let Some(error) = found.error {
        answer["error"] = error.into();
    }
    Ok(Json(answer))
}

async fn check(State(app): State<App>, caller: Caller, body: Body) -> Result<Json<Row>, ApiError> {
    body.optional::<Nothing>()?;
    let record = app.engine.check(&caller.actor).await?;
    Ok(Json(view(&app, &record)))
}

async fn settings(State(app): State<App>, caller: Caller, body: Body) -> Result<Json<Row>, ApiError> {
    let wanted: Wanted = body.required()?;
    let record = app.engine.track_commits(&caller.actor, wanted.track_commits).await?;
    Ok(Json(view(&app, &record)))
}

/// Answers a command that an administrator gave. One that was turned down, by a check of the request or by the engine, is
/// written down: who tried what, and why not, is an auditor's question too.
async fn command(app: &App, caller: &Caller, name: &str, tried: impl Future<Output = Tried>) -> Accepted {
    let tried = tried.await;
    if let Err(error) = &tried
        && error.status.is_client_error()
    {
        app.turned_down(&caller.actor, &format!("POST /api/upgrade/{name}"), &error.detail).await;
    }
    accepted(app, &tried?)
}

async fn start(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let request = bodies::start(&body.0)?;
        Ok(app.engine.start(&caller.actor, request).await?)
    };
    command(&app, &caller, "start", tried).await
}

async fn rollback(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.optional::<Reason>()?.text()?;
        Ok(app.engine.rollback(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "rollback", tried).await
}

async fn cancel(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.optional::<Reason>()?.text()?;
        Ok(app.engine.cancel(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "cancel", tried).await
}

async fn confirm(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.optional::<Reason>()?.text()?;
        Ok(app.engine.keep(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "confirm", tried).await
}

async fn reset(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.required::<Reason>()?.text()?;
        if reason.trim().is_empty() {
            return Err(ApiError::invalid("say why: a reset needs a `reason`"));
        }
        Ok(app.engine.reset(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "reset", tried).await
}

async fn preflight(State(app): State<App>, _: Admin) -> Answer {
    let found = app.engine.preflight().await?;
    let images: Vec<Value> = found
        .images
        .iter()
        .map(|image| {
            json!({
                "image_ref": image.image_ref,
                "exists": image.exists,
                "created_on": image.created_on.map(|at| time(Some(at))),
                "error": image.error.as_deref().unwrap_or_default(),
            })
        })
        .collect();
    Ok(Json(json!({ "available": found.available, "reason": found.reason, "images": images })))
}

async fn escape_hatch(State(app): State<App>, _: Admin) -> Answer {
    let record = app.engine.record().await?;
    let hatch = app.engine.escape_hatch().await?;
    let mut answer = Map::new();
    // Empty on platforms that have no such thing; the platform's facts fill them where it has.
    for name in ["container_app", "subscription_id", "resource_group"] {
        answer.insert(name.to_owned(), "".into());
    }
    answer.extend(hatch.facts.into_iter().map(|(name, value)| (name, value.into())));
    let images = record.snapshot.as_ref().map(|s| row::references(&s.deployment.images)).unwrap_or_default();
    answer.insert("target_images".to_owned(), json!(images));
    answer.insert("commands".to_owned(), hatch.commands.into());
    Ok(Json(Value::Object(answer)))
}

#[derive(Debug, Deserialize)]
struct Tail {
    limit: Option<String>,
}

async fn history(State(app): State<App>, _: Caller, Query(tail): Query<Tail>) -> Answer {
    let limit = match tail.limit.as_deref() {
        None | Some("") => HISTORY_DEFAULT,
        Some(text) => match text.parse::<usize>() {
            Ok(limit) if limit >= 1 => limit.min(HISTORY_MAX),
            _ => {
                return Err(ApiError::bad_request(format!("`limit` is a number from 1 to {HISTORY_MAX}")));
            }
        },
    };
    let lines = app.engine.history(limit).await?;
    let events: Vec<Value> = lines
        .iter()
        .map(|line| match serde_json::from_slice::<Map<String, Value>>(&line.bytes) {
            Ok(event) => Value::Object(event),
            // Shown rather than left out: a line that cannot be read is something to look into.
            Err(_) => json!({ "ts": "", "job_id": "", "event": "unreadable", "seq": line.seq }),
        })
        .collect();
    Ok(Json(json!({ "events": events })))
}
