//! One request: chosen, sent once, and its answer streamed back.

use std::error::Error as StdError;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, request};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::{Sleep, sleep, timeout};

use super::connect::ConnectError;
use super::headers::{self, Client};
use super::limits::{BUFFER_BYTES, HEADERS};
use super::pool::{Pool, Sender};
use super::proxy_api::Backend;
use super::routes::Open;
use super::server::Shared;

type BoxError = Box<dyn StdError + Send + Sync>;

/// A client's request body on its way to the backend, at the backend's pace.
#[derive(Debug)]
pub(crate) struct Upload {
    body: Option<Incoming>,
    stall: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Upload {
    fn new(body: Incoming, stall: Duration) -> Self {
        Self { body: Some(body), stall, waiting: None }
    }

    fn none() -> Self {
        Self { body: None, stall: Duration::ZERO, waiting: None }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        if let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) {
            this.waiting = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let stall = this.stall;
        let waiting = this.waiting.get_or_insert_with(|| Box::pin(sleep(stall)));
        waiting.as_mut().poll(cx).map(|()| {
            Some(Err(io::Error::new(io::ErrorKind::TimedOut, "the client's request body stands still").into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// An answer on its way to the client, at the client's pace. The request counts as open until this is gone.
#[derive(Debug)]
pub(crate) enum Download {
    Text(Option<Bytes>),
    Stream { body: Incoming, ended: bool, back: Option<Back>, _open: Open },
}

/// The connection that an answer comes from and where it is kept afterwards.
#[derive(Debug)]
pub(crate) struct Back {
    pool: Arc<Pool>,
    backend: Backend,
    sender: Sender,
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Stream { body, ended, .. } => {
                let frame = Pin::new(body).poll_frame(cx);
                if matches!(frame, Poll::Ready(None)) {
                    *ended = true;
                }
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Stream { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Self::Stream { body, .. } => body.size_hint(),
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Self::Stream { body, ended, back, .. } = self
            && (*ended || body.is_end_stream())
            && let Some(Back { pool, backend, sender }) = back.take()
        {
            pool.give_back(backend, sender);
        }
    }
}

/// Why a request got no answer from the application. What the client reads says nothing about addresses or containers.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("bad request: {0}")]
    Request(&'static str),
    #[error("nothing is deployed here")]
    NoRoute,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the application ended the connection without an answer")]
    Exchange(#[source] hyper::Error),
    #[error("the request's body did not arrive")]
    Body(#[source] hyper::Error),
    #[error("the application did not answer in time")]
    TimedOut,
    #[error("the application switched to a protocol that nobody asked for")]
    Uninvited,
}

impl Failed {
    fn answer(&self) -> (StatusCode, String) {
        let (status, why) = match self {
            Self::Request(why) => (StatusCode::BAD_REQUEST, format!("the request cannot be understood: {why}")),
            Self::Body(_) => (StatusCode::REQUEST_TIMEOUT, "the request's body did not arrive".to_owned()),
            Self::NoRoute => (StatusCode::SERVICE_UNAVAILABLE, "nothing is deployed here at the moment".to_owned()),
            Self::Connect(ConnectError::Gone(_) | ConnectError::Refused(_)) => {
                (StatusCode::BAD_GATEWAY, "the application is not reachable at the moment".to_owned())
            }
            Self::Connect(ConnectError::TimedOut) | Self::TimedOut => {
                (StatusCode::GATEWAY_TIMEOUT, "the application did not answer in time".to_owned())
            }
            Self::Exchange(_) | Self::Uninvited => {
                (StatusCode::BAD_GATEWAY, "the application ended the connection without an answer".to_owned())
            }
        };
        (status, format!("{} {why}\n", status.as_u16()))
    }
}

/// Answers one request of a listener's client.
pub(crate) async fn handle(
    shared: &Arc<Shared>,
    listener: &str,
    client: Client,
    request: Request<Incoming>,
) -> Response<Download> {
    let (version, method) = (request.version(), request.method().clone());
    let failed = match forward(shared, listener, client, request).await {
        Ok(answer) => return answer,
        Err(failed) => failed,
    };
    let (status, line) = failed.answer();
    if status.is_server_error() {
        tracing::warn!(listener, %method, status = status.as_u16(), error = %Chain(&failed), "a request got no answer from the application");
    }
    let mut answer = Response::new(Download::Text(Some(Bytes::from(line))));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if version < Version::HTTP_2 {
        // What is left of the request's body is not worth reading.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// An error with its causes on one line.
struct Chain<'a>(&'a dyn StdError);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

async fn forward(
    shared: &Arc<Shared>,
    listener: &str,
    client: Client,
    mut request: Request<Incoming>,
) -> Result<Response<Download>, Failed> {
    if request.method() == Method::CONNECT {
        return Err(Failed::Request("CONNECT is not for this port"));
    }
    let host = headers::host(request.version(), request.uri(), request.headers()).map_err(Failed::Request)?;
    let wanted = headers::upgrade(request.version(), request.headers());
    // From here on the request belongs to this side, whatever the routes become.
    let (backend, open) = shared.table.choose(listener).ok_or(Failed::NoRoute)?;
    let ours = wanted.as_ref().map(|_| hyper::upgrade::on(&mut request));

    let (mut parts, body) = request.into_parts();
    headers::prepare(&mut parts.headers, client, host);
    parts.uri = origin_form(&parts.uri)?;
    parts.version = Version::HTTP_11;
    parts.extensions = http::Extensions::new();
    if let Some(protocol) = wanted {
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(header::UPGRADE, protocol);
    }

    let exchange = exchange(shared, &backend, parts, body, ours.is_some());
    let (mut answer, sender) = exchange.await?;

    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(ours) = ours else { return Err(Failed::Uninvited) };
        let protocol = headers::upgrade(Version::HTTP_11, answer.headers());
        let theirs = hyper::upgrade::on(&mut answer);
        shared.tasks.spawn(async move {
            // Held while bytes flow, so that the connection counts as open.
            let _open = open;
            let _sender = sender;
            match tokio::try_join!(ours, theirs) {
                Ok((ours, theirs)) => super::tcp::join(TokioIo::new(ours), TokioIo::new(theirs)).await,
                Err(error) => tracing::debug!(%error, "an upgrade did not come about"),
            }
        });
        let (mut parts, _) = answer.into_parts();
        headers::strip(&mut parts.headers);
        parts.extensions = http::Extensions::new();
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            parts.headers.insert(header::UPGRADE, protocol);
        }
        return Ok(Response::from_parts(parts, Download::Text(None)));
    }

    let (mut parts, body) = answer.into_parts();
    headers::strip(&mut parts.headers);
    parts.version = Version::HTTP_11;
    parts.extensions = http::Extensions::new();
    let back = Back { pool: Arc::clone(&shared.pool), backend, sender };
    Ok(Response::from_parts(parts, Download::Stream { body, ended: false, back: Some(back), _open: open }))
}

fn origin_form(uri: &Uri) -> Result<Uri, Failed> {
    match uri.path_and_query() {
        Some(path) => Uri::try_from(path.as_str()).map_err(|_| Failed::Request("the path is not valid")),
        None => Ok(Uri::from_static("/")),
    }
}

/// Sends a request once. Only a request without a body that RFC 9110 calls safe may go over a kept connection, and only
/// such a request is sent again, once, when that connection turns out to be closed.
async fn exchange(
    shared: &Arc<Shared>,
    backend: &Backend,
    parts: request::Parts,
    body: Incoming,
    upgrading: bool,
) -> Result<(Response<Incoming>, Sender), Failed> {
    let patience = shared.limits.response_headers;
    let safe = matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    if safe
        && body.is_end_stream()
        && !upgrading
        && let Some(mut sender) = shared.pool.take(backend)
    {
        let request = Request::from_parts(parts.clone(), Upload::none());
        match timeout(patience, sender.send_request(request)).await {
            Ok(Ok(answer)) => return Ok((answer, sender)),
            Ok(Err(error)) if error.is_parse() => return Err(Failed::Exchange(error)),
            Ok(Err(error)) => tracing::debug!(%error, "a kept connection was closed"),
            Err(_) => return Err(Failed::TimedOut),
        }
    }

    let stream = shared.connector.patiently(backend).await?;
    let handshake =
        http1::Builder::new().max_headers(HEADERS).max_buf_size(BUFFER_BYTES).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(Failed::Exchange)?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to a backend ended");
        }
    });
    let request = Request::from_parts(parts, Upload::new(body, shared.limits.body_stall));
    match timeout(patience, sender.send_request(request)).await {
        Ok(Ok(answer)) => Ok((answer, sender)),
        Ok(Err(error)) if error.is_user() || error.is_body_write_aborted() => Err(Failed::Body(error)),
        Ok(Err(error)) => Err(Failed::Exchange(error)),
        Err(_) => Err(Failed::TimedOut),
    }
}
