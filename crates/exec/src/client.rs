//! The channel's other end: one connection for each request, so that letting go of a request ends its program.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::protocol::{
    CREDENTIAL_FEATURE, Event, FEATURES_HEADER, Health, Outcome, Request, Stream, Summary, TOKEN_HEADER,
};

/// The server is on this machine: one that does not take a connection at once is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A refusal, and the beginning of a stream, come at once; a server under load is given some time.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// Beyond the program's own time: what the server needs to end it and to say so, with room.
const BEYOND: Duration = Duration::from_secs(30);
/// A whole outcome: two outputs of 8 MiB, each byte of them escaped to six at worst.
const OUTCOME_MAX: usize = 128 * 1024 * 1024;
/// One line of a stream: 64 KiB by the contract, escaped as above; a server may have been given a larger limit.
const EVENT_MAX: usize = 8 * 1024 * 1024;
/// A refusal's body.
const REFUSAL_MAX: usize = 64 * 1024;
/// Longest part of a refusal that is repeated.
const DETAIL_MAX: usize = 300;

/// Why a request came to nothing. Nothing of the request is in it.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// No connection: nothing was run.
    #[error("the exec server at {at} cannot be reached")]
    Unreachable {
        at: String,
        #[source]
        why: std::io::Error,
    },
    #[error("the exec server refuses the token")]
    Token,
    #[error("the exec server calls the request malformed: {0}")]
    Malformed(String),
    /// The program or its arguments are not allowed.
    #[error("the exec server does not allow this: {0}")]
    Denied(String),
    #[error("the exec server calls the request too large")]
    TooLarge,
    /// As many programs run already as may.
    #[error("the exec server is busy")]
    Busy,
    #[error("the exec server limits how often a program may be started")]
    Limited {
        /// Seconds until the next start is free, where the server says so.
        retry_after: Option<u64>,
    },
    #[error("the exec server answers with status {0}: {1}")]
    Unexpected(u16, String),
    /// The answer broke off or makes no sense: what the program did is not known.
    #[error("the exec server's answer cannot be used: {0}")]
    Broken(String),
}

/// An upstream that is not `http://HOST:PORT` or `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the exec server's address is not http://HOST:PORT")]
pub struct BadUpstream;

/// Where a server is, and the token that it asks for.
#[derive(Clone)]
pub struct Client {
    /// `host:port`.
    authority: String,
    token: String,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("authority", &self.authority).finish_non_exhaustive()
    }
}

/// What a server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub max_concurrency: usize,
    /// It gives `git_credential` to git. Servers from before that field ignore it.
    pub takes_credentials: bool,
}

/// A connection whose task ends with it.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// # Errors
    /// When `upstream` is neither `http://HOST:PORT` nor `HOST:PORT`. The channel is for loopback, so there is no TLS.
    pub fn new(upstream: &str, token: impl Into<String>) -> Result<Self, BadUpstream> {
        let rest = upstream.trim().strip_prefix("http://").unwrap_or(upstream.trim());
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let parsed: http::uri::Authority = authority.parse().map_err(|_| BadUpstream)?;
        if parsed.port_u16().is_none() || parsed.host().is_empty() || authority.contains('@') {
            return Err(BadUpstream);
        }
        Ok(Self { authority: authority.to_owned(), token: token.into() })
    }

    /// Where the server is: `host:port`.
    #[must_use]
    pub fn at(&self) -> &str {
        &self.authority
    }

    /// Asks what the server is.
    ///
    /// # Errors
    /// As [`Failed`] says.
    pub async fn about(&self) -> Result<About, Failed> {
        let (answer, _connection) = self.send(Method::GET, "/healthz", Bytes::new(), HEAD_LIMIT).await?;
        let features = answer.headers().get(FEATURES_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let takes_credentials = features.split(',').any(|feature| feature.trim() == CREDENTIAL_FEATURE);
        let health: Health = whole(answer, REFUSAL_MAX, HEAD_LIMIT).await?;
        Ok(About { max_concurrency: health.max_concurrency, takes_credentials })
    }

    /// Runs a program to its end and answers all that it printed, up to the server's limits. Dropping the future ends it.
    ///
    /// # Errors
    /// As [`Failed`] says.
    pub async fn run(&self, request: &Request) -> Result<Outcome, Failed> {
        let patience = Duration::from_secs(request.timeout()) + BEYOND;
        let (answer, _connection) = self.send(Method::POST, "/exec", body(request)?, patience).await?;
        whole(answer, OUTCOME_MAX, patience).await
    }

    /// Runs a program and hands its lines on as they come. Dropping the future ends it, and being slow holds it back.
    ///
    /// # Errors
    /// As [`Failed`] says. Lines may have come before.
    pub async fn stream(&self, request: &Request, mut each: impl FnMut(Stream, &str)) -> Result<Summary, Failed> {
        let (mut answer, _connection) = self.send(Method::POST, "/exec/stream", body(request)?, HEAD_LIMIT).await?;
        let mut events = Events::default();
        let follow = async {
            while let Some(frame) = answer.frame().await {
                let frame = frame.map_err(|e| Failed::Broken(e.to_string()))?;
                let Ok(data) = frame.into_data() else { continue };
                events.push(&data, &mut each)?;
            }
            events.end()
        };
        within(Duration::from_secs(request.timeout()) + BEYOND, follow).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<(http::Response<Incoming>, Connection), Failed> {
        let unreachable = |why| Failed::Unreachable { at: self.authority.clone(), why };
        let connecting = timeout(CONNECT_LIMIT, TcpStream::connect(&self.authority)).await;
        let stream = connecting.map_err(|_| unreachable(std::io::ErrorKind::TimedOut.into()))?.map_err(unreachable)?;
        // A request is one small write; waiting for more of it would only cost time.
        stream.set_nodelay(true).map_err(unreachable)?;
        let broken = |e: hyper::Error| Failed::Broken(e.to_string());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = Connection(tokio::spawn(async move {
            // What goes wrong here shows in the answer, or in its absence.
            let _shown = connection.await;
        }));
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::CONNECTION, "close");
        if path != "/healthz" {
            request = request.header(TOKEN_HEADER, &self.token).header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|_| Failed::Token)?;
        let answer = within(patience, async { sender.send_request(request).await.map_err(broken) }).await?;
        if answer.status() == StatusCode::OK { Ok((answer, connection)) } else { Err(refusal(answer).await) }
    }
}

fn body(request: &Request) -> Result<Bytes, Failed> {
    serde_json::to_vec(request).map(Bytes::from).map_err(|e| Failed::Malformed(e.to_string()))
}

async fn within<T>(patience: Duration, work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
    let silent = || Failed::Broken(format!("it did not come within {} s", patience.as_secs()));
    timeout(patience, work).await.unwrap_or_else(|_| Err(silent()))
}

async fn whole<T: DeserializeOwned>(
    answer: http::Response<Incoming>,
    most: usize,
    patience: Duration,
) -> Result<T, Failed> {
    let body = async {
        let body = Limited::new(answer.into_body(), most).collect().await;
        body.map(|body| body.to_bytes()).map_err(|e| Failed::Broken(e.to_string()))
    };
    let body = within(patience, body).await?;
    serde_json::from_slice(&body).map_err(|e| Failed::Broken(format!("not what was asked for: {e}")))
}

/// Told by its status: what an older or newer server says beside it is for people.
async fn refusal(answer: http::Response<Incoming>) -> Failed {
    let (status, retry_after) = (answer.status(), answer.headers().get(header::RETRY_AFTER).cloned());
    let retry_after = retry_after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let body = Limited::new(answer.into_body(), REFUSAL_MAX).collect();
    let body = match timeout(HEAD_LIMIT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) | Err(_) => Bytes::new(),
    };
    let detail = || {
        let told = serde_json::from_slice::<serde_json::Value>(&body).ok();
        let told = told.and_then(|told| Some(told.get("detail")?.as_str()?.to_owned()));
        let text = told.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(DETAIL_MAX).collect::<String>()
    };
    match status {
        StatusCode::UNAUTHORIZED => Failed::Token,
        StatusCode::BAD_REQUEST => Failed::Malformed(detail()),
        StatusCode::FORBIDDEN => Failed::Denied(detail()),
        StatusCode::PAYLOAD_TOO_LARGE => Failed::TooLarge,
        StatusCode::SERVICE_UNAVAILABLE => Failed::Busy,
        StatusCode::TOO_MANY_REQUESTS => Failed::Limited { retry_after },
        other => Failed::Unexpected(other.as_u16(), detail()),
    }
}

/// Reads events out of pieces of any size.
#[derive(Debug, Default)]
struct Events {
    held: BytesMut,
    summary: Option<Summary>,
}

impl Events {
    fn push(&mut self, data: &[u8], each: &mut impl FnMut(Stream, &str)) -> Result<(), Failed> {
        self.held.extend_from_slice(data);
        while let Some(end) = memchr::memchr(b'\n', &self.held) {
            let line = self.held.split_to(end);
            self.held.advance(1);
            self.line(&line, each)?;
        }
        if self.held.len() > EVENT_MAX {
            return Err(Failed::Broken(format!("a line of more than {EVENT_MAX} bytes")));
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8], each: &mut impl FnMut(Stream, &str)) -> Result<(), Failed> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        if self.summary.is_some() {
            return Err(Failed::Broken("something comes after the summary".to_owned()));
        }
        match serde_json::from_slice(line) {
            Ok(Event::Line { stream, line }) => each(stream, &line),
            Ok(Event::Summary(summary)) => self.summary = Some(summary),
            Err(error) => return Err(Failed::Broken(format!("a line is no event: {error}"))),
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Summary, Failed> {
        if !self.held.is_empty() {
            return Err(Failed::Broken("it broke off inside a line".to_owned()));
        }
        self.summary.take().ok_or_else(|| Failed::Broken("it ended without a summary".to_owned()))
    }
}
