//! The numbers for Prometheus, and the count of answered requests among them.

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header;
use http::request::Parts;

use super::App;
use super::auth::Caller;
use super::errors::ApiError;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Anybody signed in, or anybody where the operator says so.
pub struct Scraper;

impl FromRequestParts<App> for Scraper {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if !app.options.metrics_are_public {
            Caller::from_request_parts(parts, app).await?;
        }
        Ok(Self)
    }
}

/// Numbers for Prometheus, in the OpenMetrics format. A service may be configured to show them without a token.
#[utoipa::path(get, path = "/metrics", tag = "service", security(("token" = [])), responses(
    (status = 200, description = "The numbers", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
))]
pub async fn metrics(State(app): State<App>, _: Scraper) -> impl IntoResponse {
    // A ledger that is away is among what is told here.
    let record = app.engine.record().await.ok();
    let text = app.options.telemetry.scrape(record.as_ref(), app.clock.now());
    ([(header::CONTENT_TYPE, OPEN_METRICS)], text)
}

/// The outermost layer: every answer counts, also those of the guard.
pub async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    app.options.telemetry.request(&method, route.as_ref().map(MatchedPath::as_str), response.status().as_u16());
    response
}
