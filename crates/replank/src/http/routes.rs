//! The routes of contract §2: each takes the request apart, calls one engine command and shapes the answer. What stands above
//! a handler is its part of the API's document; `document.rs` adds what all routes have in common.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, middleware};
use http::{StatusCode, header};
use replank_core::record::Record;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::IntoParams;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Admin, Caller};
use super::bodies::{
    self, AcceptDrift, AcceptMovedTag, Downgrade, Lift, Nothing, Reason, ResetReason, Rollback, Wanted,
};
use super::errors::ApiError;
use super::extract::{Asked, Body, number};
use super::glance::{self, Looker};
use super::guard::{guard, nothing_here, wrong_method};
use super::row::Row;
use super::{App, document, events, logs, metrics, row, views};
use crate::engine::api::StartRequest;
use crate::engine::planned::{PlanRequest, UpgradePlan};

const HISTORY_DEFAULT: usize = 50;
/// Most history lines of one answer; a line has a few hundred bytes.
const HISTORY_MAX: usize = 1_000;

type Answer<T> = Result<Json<T>, ApiError>;
type Accepted = Result<(StatusCode, Json<Row>), ApiError>;
type Tried = Result<Record, ApiError>;

/// Every route, with its part of the document. A route belongs here and nowhere else.
pub fn routes() -> OpenApiRouter<App> {
    let upgrade = OpenApiRouter::new()
        .routes(routes!(status))
        .routes(routes!(candidates))
        .routes(routes!(check))
        .routes(routes!(settings))
        .routes(routes!(plan))
        .routes(routes!(start))
        .routes(routes!(logs::build_log))
        .routes(routes!(preflight))
        .routes(routes!(downgrade))
        .routes(routes!(rollback))
        .routes(routes!(cancel))
        .routes(routes!(confirm))
        .routes(routes!(reset))
        .routes(routes!(quarantine, lift_quarantine))
        .routes(routes!(accept_drift))
        .routes(routes!(accept_moved_tag))
        .routes(routes!(escape_hatch))
        .routes(routes!(history))
        .routes(routes!(events::events));
    OpenApiRouter::with_openapi(document::empty())
        .nest("/api/upgrade", upgrade)
        .routes(routes!(health))
        .routes(routes!(live))
        .routes(routes!(ready))
        .routes(routes!(openapi))
        .routes(routes!(metrics::metrics))
}

pub fn router(app: App) -> Router {
    Router::from(routes())
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .layer(middleware::from_fn_with_state(app.clone(), metrics::count))
        .with_state(app)
}

fn view(app: &App, record: &Record) -> Row {
    Row::of(record, &app.engine.live().borrow(), &app.options.remote)
}

fn accepted(app: &App, record: &Record) -> Accepted {
    Ok((StatusCode::ACCEPTED, Json(view(app, record))))
}

/// Who answers here, in which version.
#[utoipa::path(get, path = "/api/health", tag = "service",
    responses((status = 200, description = "It answers", body = views::Health)))]
async fn health(State(app): State<App>) -> Json<views::Health> {
    Json(views::Health { status: "ok", version: app.options.version.clone(), replank: env!("CARGO_PKG_VERSION") })
}

/// Whether the process answers.
#[utoipa::path(get, path = "/livez", tag = "service",
    responses((status = 200, description = "It answers", body = views::Sign)))]
async fn live() -> Json<views::Sign> {
    Json(views::Sign { status: "ok" })
}

/// Whether the ledger answers and the loop turns.
#[utoipa::path(get, path = "/readyz", tag = "service", responses(
    (status = 200, description = "Ready", body = views::Sign),
    (status = 503, description = "Not ready; the service's log says why"),
))]
async fn ready(State(app): State<App>) -> Answer<views::Sign> {
    match app.engine.ready().await {
        Ok(()) => Ok(Json(views::Sign { status: "ready" })),
        Err(refusal) => {
            tracing::warn!(why = %refusal, "not ready");
            // Nobody is signed in here, so the reason stays in the log.
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not ready; the service's log says why"))
        }
    }
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "service",
    responses((status = 200, description = "OpenAPI 3.1", body = Object, content_type = "application/json")))]
async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], document::text())
}

/// What runs, what is newest and what is going on.
#[utoipa::path(get, path = "/status", tag = "upgrade", security(("token" = [])),
    responses((status = 200, description = "The row", body = Row)))]
async fn status(State(app): State<App>, _: Looker) -> Result<Response, ApiError> {
    glance::status(&app).await
}

/// Releases that can be started, and those that are refused. A remote that fails is told in the answer.
#[utoipa::path(get, path = "/candidates", tag = "upgrade", security(("token" = [])),
    responses((status = 200, description = "The candidates", body = views::Candidates)))]
async fn candidates(State(app): State<App>, _: Caller) -> Answer<views::Candidates> {
    Ok(Json(app.engine.candidates().await?.into()))
}

/// Look at the remote now.
#[utoipa::path(post, path = "/check", tag = "upgrade", security(("token" = [])), request_body = Option<Nothing>, responses(
    (status = 200, description = "The row, refreshed", body = Row),
    (status = 409, description = "No remote is configured"),
    (status = 429, description = "Asked within 15 s of the last time, or too many failed sign-ins"),
))]
async fn check(State(app): State<App>, caller: Caller, body: Body) -> Answer<Row> {
    body.optional::<Nothing>()?;
    let record = app.engine.check(&caller.actor).await?;
    Ok(Json(view(&app, &record)))
}

/// Change what anybody signed in may change.
#[utoipa::path(post, path = "/settings", tag = "upgrade", security(("token" = [])), request_body = Wanted,
    responses((status = 200, description = "The row", body = Row)))]
async fn settings(State(app): State<App>, caller: Caller, body: Body) -> Answer<Row> {
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

/// What a start would do, and whether it would be refused. Nothing is changed.
#[utoipa::path(get, path = "/plan", tag = "upgrade", security(("token" = [])), params(PlanRequest), responses(
    (status = 200, description = "The plan", body = UpgradePlan),
    (status = 409, description = "No remote is configured, or there is no such target: not offered, or not newer"),
    (status = 422, description = "The version or the commit is malformed, or the two do not go together"),
))]
async fn plan(State(app): State<App>, _: Caller, Asked(asked): Asked<PlanRequest>) -> Answer<UpgradePlan> {
    Ok(Json(app.engine.plan(asked).await?))
}

/// Upgrade: build a release from its pinned commit, swap to it, prove it.
///
/// The same `idempotency_key` with the same target answers the job that exists.
#[utoipa::path(post, path = "/start", tag = "upgrade", security(("token" = ["admin"])), request_body = StartRequest, responses(
    (status = 202, description = "Queued", body = Row),
    (status = 409, description = "One is in flight, what runs is not what was recorded, or the target is not offered, not newer or quarantined"),
))]
async fn start(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let request = bodies::start(body.bytes())?;
        Ok(app.engine.start(&caller.actor, request).await?)
    };
    command(&app, &caller, "start", tried).await
}

/// Build and swap to a release that is older than what runs. What ran before comes back faster by a rollback.
#[utoipa::path(post, path = "/downgrade", tag = "upgrade", security(("token" = ["admin"])), request_body = Downgrade, responses(
    (status = 202, description = "Queued", body = Row),
    (status = 409, description = "One is in flight, what runs is not what was recorded, the release is not offered, not older or quarantined, or it cannot use the data"),
))]
async fn downgrade(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let request = body.required::<Downgrade>()?.checked()?;
        Ok(app.engine.downgrade(&caller.actor, request).await?)
    };
    command(&app, &caller, "downgrade", tried).await
}

/// Go back to what ran before; needs neither git nor a build.
#[utoipa::path(post, path = "/rollback", tag = "upgrade", security(("token" = ["admin"])), request_body = Option<Rollback>, responses(
    (status = 202, description = "Rolling back", body = Row),
    (status = 409, description = "Not in this state, no snapshot, an image of it is gone, or a data step closed the way"),
))]
async fn rollback(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let asked = body.optional::<Rollback>()?;
        let data_restored = asked.data_restored;
        Ok(app.engine.rollback(&caller.actor, &asked.text()?, data_restored).await?)
    };
    command(&app, &caller, "rollback", tried).await
}

/// End a job that has not touched anything yet.
#[utoipa::path(post, path = "/cancel", tag = "upgrade", security(("token" = ["admin"])), request_body = Option<Reason>, responses(
    (status = 202, description = "Cancelled", body = Row),
    (status = 409, description = "There is no such job"),
))]
async fn cancel(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.optional::<Reason>()?.text()?;
        Ok(app.engine.cancel(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "cancel", tried).await
}

/// End the confirm window early: keep the new version.
#[utoipa::path(post, path = "/confirm", tag = "upgrade", security(("token" = ["admin"])), request_body = Option<Reason>, responses(
    (status = 202, description = "Kept", body = Row),
    (status = 409, description = "No confirm window is open"),
))]
async fn confirm(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.optional::<Reason>()?.text()?;
        Ok(app.engine.keep(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "confirm", tried).await
}

/// Give up a stuck job.
#[utoipa::path(post, path = "/reset", tag = "upgrade", security(("token" = ["admin"])), request_body = ResetReason, responses(
    (status = 202, description = "Given up", body = Row),
    (status = 409, description = "No job is in flight"),
))]
async fn reset(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let reason = body.required::<ResetReason>()?.text()?;
        if reason.trim().is_empty() {
            return Err(ApiError::invalid("say why: a reset needs a `reason`"));
        }
        Ok(app.engine.reset(&caller.actor, &reason).await?)
    };
    command(&app, &caller, "reset", tried).await
}

/// Commits that are not started again without an override, newest first.
#[utoipa::path(get, path = "/quarantine", tag = "upgrade", security(("token" = [])),
    responses((status = 200, description = "The commits", body = views::Quarantine)))]
async fn quarantine(State(app): State<App>, _: Caller) -> Answer<views::Quarantine> {
    Ok(Json(views::Quarantine::of(&app.engine.record().await?)))
}

/// Let a commit be started again without an override.
#[utoipa::path(post, path = "/quarantine", tag = "upgrade", security(("token" = ["admin"])), request_body = Lift, responses(
    (status = 202, description = "Lifted", body = Row),
    (status = 409, description = "It is not quarantined, or the version has more than one commit that is"),
))]
async fn lift_quarantine(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let (which, reason) = body.required::<Lift>()?.checked()?;
        Ok(app.engine.lift_quarantine(&caller.actor, &which, &reason).await?)
    };
    command(&app, &caller, "quarantine", tried).await
}

/// Let a release be started at the commit that its tag was moved to.
#[utoipa::path(post, path = "/moved-tag", tag = "upgrade", security(("token" = ["admin"])), request_body = AcceptMovedTag, responses(
    (status = 202, description = "Accepted", body = Row),
    (status = 409, description = "The tag is at another commit, or where it always was, or it is not there"),
))]
async fn accept_moved_tag(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let (tag, reason) = body.required::<AcceptMovedTag>()?.checked()?;
        Ok(app.engine.accept_moved_tag(&caller.actor, tag, &reason).await?)
    };
    command(&app, &caller, "moved-tag", tried).await
}

/// Let upgrades start although what runs is not what was recorded: the row's `drift`, and no other.
#[utoipa::path(post, path = "/drift", tag = "upgrade", security(("token" = ["admin"])), request_body = AcceptDrift, responses(
    (status = 202, description = "Accepted", body = Row),
    (status = 409, description = "What runs differs in another way, or not at all, or a job is in flight"),
))]
async fn accept_drift(State(app): State<App>, Admin(caller): Admin, body: Body) -> Accepted {
    let tried = async {
        let (what, reason) = body.required::<AcceptDrift>()?.checked()?;
        Ok(app.engine.accept_drift(&caller.actor, &what, &reason).await?)
    };
    command(&app, &caller, "drift", tried).await
}

/// Whether a rollback would find what it needs.
#[utoipa::path(get, path = "/rollback-preflight", tag = "upgrade", security(("token" = ["admin"])),
    responses((status = 200, description = "What was found", body = views::Preflight)))]
async fn preflight(State(app): State<App>, _: Admin) -> Answer<views::Preflight> {
    Ok(Json(app.engine.preflight().await?.into()))
}

/// The commands that restore the old version with Replank gone.
#[utoipa::path(get, path = "/escape-hatch", tag = "upgrade", security(("token" = ["admin"])), responses(
    (status = 200, description = "The commands", body = views::EscapeHatch),
    (status = 404, description = "There is no snapshot, or nothing is run from here"),
))]
async fn escape_hatch(State(app): State<App>, _: Admin) -> Answer<views::EscapeHatch> {
    let record = app.engine.record().await?;
    let mut hatch = app.engine.escape_hatch().await?;
    // Empty on platforms that have no such thing; the platform's facts fill them where it has.
    let mut fact = |name: &str| hatch.facts.remove(name).unwrap_or_default();
    Ok(Json(views::EscapeHatch {
        container_app: fact("container_app"),
        subscription_id: fact("subscription_id"),
        resource_group: fact("resource_group"),
        target_images: record.snapshot.as_ref().map(|s| row::references(&s.deployment.images)).unwrap_or_default(),
        commands: hatch.commands,
        facts: hatch.facts,
    }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Tail {
    /// How many of the newest; more than 1000 count as 1000.
    #[param(schema_with = tail)]
    limit: Option<String>,
}

/// Without a format, which would bound it: too many are as many as there may be.
fn tail() -> Object {
    ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).default(Some(HISTORY_DEFAULT.into())).build()
}

/// What happened: the newest lines of the audited history.
#[utoipa::path(get, path = "/history", tag = "upgrade", security(("token" = [])), params(Tail),
    responses((status = 200, description = "The newest last", body = views::History)))]
async fn history(State(app): State<App>, _: Caller, Asked(tail): Asked<Tail>) -> Answer<views::History> {
    let limit = match tail.limit.as_deref() {
        None => HISTORY_DEFAULT,
        Some(text) => match usize::try_from(number("limit", text)?).unwrap_or(usize::MAX) {
            0 => return Err(ApiError::bad_request(format!("`limit` is a number from 1 to {HISTORY_MAX}"))),
            limit => limit.min(HISTORY_MAX),
        },
    };
    let lines = app.engine.history(limit).await?;
    let events = lines.iter().map(|line| match serde_json::from_slice::<Map<String, Value>>(&line.bytes) {
        Ok(event) => Value::Object(event),
        Err(_) => views::HistoryEvent::unreadable(line.seq),
    });
    Ok(Json(views::History { events: events.collect() }))
}
