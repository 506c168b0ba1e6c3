//! Takes requests apart: body, query and path. What cannot be taken apart is answered as every other problem is.

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use bytes::Bytes;
use http::StatusCode;
use http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, IgnoredAny};

use super::App;
use super::errors::ApiError;
use super::limits::BODY_MAX;

/// A request's body, bounded, to be read as JSON. Fields that are not known are refused.
pub struct Body(Bytes);

impl FromRequest<App> for Body {
    type Rejection = ApiError;
    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
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
    pub fn required<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let is_object = self.0.trim_ascii_start().first() == Some(&b'{');
        // Types of ours would also be read from a list of their fields' values, which nobody means.
        if !is_object && serde_json::from_slice::<IgnoredAny>(&self.0).is_ok() {
            return Err(ApiError::invalid("the body is not a JSON object"));
        }
        serde_json::from_slice(&self.0).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                ApiError::invalid(format!("the body is not what it should be: {error}"))
            }
            serde_json::error::Category::Io
            | serde_json::error::Category::Syntax
            | serde_json::error::Category::Eof => ApiError::bad_request("the body is not JSON"),
        })
    }

    /// No body at all, or `null`, is the default.
    pub fn optional<T: DeserializeOwned + Default>(&self) -> Result<T, ApiError> {
        if self.0.is_empty() || self.0.trim_ascii() == b"null" { Ok(T::default()) } else { self.required() }
    }
}

/// The query's parameters.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<App> for Asked<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, app).await {
            Ok(Query(asked)) => Ok(Self(asked)),
            Err(rejection) => Err(ApiError::bad_request(format!("the query cannot be read: {rejection}"))),
        }
    }
}

/// The parts of the path that are names.
pub struct Named<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Named<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        match Path::<T>::from_request_parts(parts, app).await {
            Ok(Path(named)) => Ok(Self(named)),
            Err(rejection) => Err(ApiError::bad_request(format!("the path cannot be read: {rejection}"))),
        }
    }
}

/// A number of a query, written in digits only. One that is larger than any of ours counts as the largest.
pub fn number(name: &str, text: &str) -> Result<u64, ApiError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ApiError::bad_request(format!("`{name}` is a whole number, written in digits")));
    }
    Ok(text.parse().unwrap_or(u64::MAX))
}
