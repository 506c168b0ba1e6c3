//! The command line's HTTP: one place that signs in, and that turns answers into exit codes.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, StatusCode};
use reqwest::Response;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::failure::{Code, Failure};

/// A look at a remote takes up to a minute on the service's side.
const ANSWER_MAX: Duration = Duration::from_secs(75);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// No answer of a command is larger: a thousand history lines.
const BODY_MAX: usize = 8 * 1024 * 1024;
/// Streams are heard from every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(45);

#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
}

impl Client {
    /// `base` is `http://HOST:PORT`, with or without a path.
    pub fn new(base: &str, token: Option<String>) -> Result<Self, Failure> {
        let base = base.trim_end_matches('/').to_owned();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("replank/", env!("CARGO_PKG_VERSION")))
            // The static C library cannot look names up everywhere, and this one never changes.
            .resolve("localhost", ([127, 0, 0, 1], 0).into());
        if base.starts_with("http://") {
            // No certificates are needed, and a small image has none to load. A token in the clear never goes through a proxy.
            builder = builder.tls_certs_only([]).no_proxy();
        }
        let http = builder
            .build()
            .map_err(|e| Failure::from(anyhow::Error::new(e).context("no HTTP client could be made")))?;
        Ok(Self { http, base, token })
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let response = self.send(Method::GET, path, None, Some(ANSWER_MAX)).await?;
        self.json(response).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, Failure> {
        let response = self.send(Method::POST, path, Some(body), Some(ANSWER_MAX)).await?;
        self.json(response).await
    }

    /// A body that comes for as long as it comes. An error where it breaks off, or falls silent, is [`Code::Unreachable`].
    pub async fn stream(&self, path: &str) -> Result<Chunks, Failure> {
        let response = self.send(Method::GET, path, None, None).await?;
        Ok(Chunks { inner: Box::pin(response.bytes_stream()), base: self.base.clone() })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Option<Duration>,
    ) -> Result<Response, Failure> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let detail = self.body(response).await.ok().and_then(|body| {
            let value: Value = serde_json::from_slice(&body).ok()?;
            Some(crate::plain::line(value.get("detail")?.as_str()?, false))
        });
        Err(self.refusal(status, detail))
    }

    fn refusal(&self, status: StatusCode, detail: Option<String>) -> Failure {
        // With a reason the service itself is well: what it speaks of is the remote, the ledger or the registry.
        let is_told = detail.is_some();
        let said = detail.unwrap_or_else(|| format!("the service answered {status}"));
        match status {
            StatusCode::UNAUTHORIZED if self.token.is_none() => Failure::new(
                Code::Forbidden,
                "not signed in: give a token with --token-file FILE, or make one with `replank token create`",
            ),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::new(Code::Forbidden, said),
            status if status.is_client_error() => Failure::new(Code::Refused, said),
            _ if is_told => Failure::new(Code::Unreachable, said),
            _ => Failure::new(Code::Unreachable, format!("{} cannot answer: {said}; look at its log", self.base)),
        }
    }

    fn unreachable(&self, error: reqwest::Error) -> Failure {
        // The library's own text begins with the URL, which stands in ours.
        let error = anyhow::Error::new(error.without_url());
        let cause = error.root_cause();
        let message = format!(
            "{} cannot be reached: {cause}; is `replank serve` running there? give its address with --url",
            self.base
        );
        Failure::new(Code::Unreachable, message)
    }

    async fn body(&self, response: Response) -> Result<Vec<u8>, Failure> {
        let mut stream = response.bytes_stream();
        let mut body = Vec::new();
        while let Some(chunk) = stream.next().await {
            body.extend_from_slice(&chunk.map_err(|error| self.unreachable(error))?);
            if body.len() > BODY_MAX {
                return Err(Failure::new(Code::Failed, format!("{} answered more than {BODY_MAX} bytes", self.base)));
            }
        }
        Ok(body)
    }

    async fn json<T: DeserializeOwned>(&self, response: Response) -> Result<T, Failure> {
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|error| {
            let message = format!("{} gave an answer that is not Replank's: {error}; check --url", self.base);
            Failure::new(Code::Failed, message)
        })
    }
}

/// A body in pieces.
pub struct Chunks {
    inner: futures_util::stream::BoxStream<'static, reqwest::Result<Bytes>>,
    base: String,
}

impl std::fmt::Debug for Chunks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunks").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Chunks {
    /// `None` at its end. Waits as long as it takes: a quiet build log is no fault.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        let next = self.inner.next().await.transpose();
        next.map_err(|_| Failure::new(Code::Unreachable, format!("the connection to {} broke", self.base)))
    }

    /// As [`Chunks::next`], for a stream with heartbeats.
    pub async fn next_beat(&mut self) -> Result<Option<Bytes>, Failure> {
        match tokio::time::timeout(SILENCE_MAX, self.next()).await {
            Ok(next) => next,
            Err(_) => Err(Failure::new(Code::Unreachable, format!("{} fell silent", self.base))),
        }
    }
}
