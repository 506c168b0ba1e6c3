//! One client connection of an HTTP listener: which HTTP it speaks, and how it ends after a switch.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::forward::{Download, handle};
use super::headers::Client;
use super::limits::{BUFFER_BYTES, H2_PING, H2_RESETS, H2_STREAMS, HEADER_BYTES, HEADERS};
use super::server::Shared;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    Two,
}

/// The first bytes of h2 (RFC 9113 §3.4); no HTTP/1.1 method begins with them.
const H2_BEGINS: &[u8] = b"PRI";
/// Between two looks at a connection that has sent one or two bytes only.
const PEEK_PAUSE: Duration = Duration::from_millis(5);

/// Finds out which HTTP a client without TLS speaks, without taking anything from the connection. `None` where it
/// sends nothing for too long.
pub(crate) async fn sniff(stream: &TcpStream, patience: Duration) -> Option<Http> {
    let look = async {
        let mut begin = [0; H2_BEGINS.len()];
        loop {
            let length = stream.peek(&mut begin).await.ok().filter(|length| *length > 0)?;
            if begin[..length] != H2_BEGINS[..length] {
                return Some(Http::One);
            }
            if length == H2_BEGINS.len() {
                return Some(Http::Two);
            }
            sleep(PEEK_PAUSE).await;
        }
    };
    timeout(patience, look).await.ok().flatten()
}

/// Serves one connection to its end.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    listener: &Arc<str>,
    client: Client,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    http: Http,
) {
    let outcome = match http {
        Http::One => serve_one(shared, listener, client, io).await,
        Http::Two => serve_two(shared, listener, client, io).await,
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, listener = &**listener, "a client's connection ended");
    }
}

/// HTTP/1.1: after a switch the next answer ends the connection. It is not closed while idle: a request could be on its
/// way, and the client would see it fail.
async fn serve_one(
    shared: &Arc<Shared>,
    listener: &Arc<str>,
    client: Client,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> hyper::Result<()> {
    let epoch = shared.table.epoch();
    let born = *epoch.borrow();
    let service = service_fn(|request| {
        let epoch = &epoch;
        async move {
            let mut answer = handle(shared, listener, client, request).await;
            let moved = *epoch.borrow() != born || shared.stopping.is_cancelled();
            if moved && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<Response<Download>, Infallible>(answer)
        }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(shared.limits.header_read)
        .max_headers(HEADERS)
        .max_header_size(HEADER_BYTES)
        .max_buf_size(BUFFER_BYTES);
    let connection = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        outcome = &mut connection => return outcome,
        () = shared.stopping.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// h2: after a switch, and when it is idle, the client is told to open a new connection (GOAWAY); its open requests end first.
async fn serve_two(
    shared: &Arc<Shared>,
    listener: &Arc<str>,
    client: Client,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> hyper::Result<()> {
    let mut epoch = shared.table.epoch();
    let active = Arc::new(AtomicUsize::new(0));
    let service = service_fn(|request| {
        let (shared, listener) = (Arc::clone(shared), Arc::clone(listener));
        let busy = Busy::new(&active);
        async move {
            let answer = handle(&shared, &listener, client, request).await;
            drop(busy);
            Ok::<Response<Download>, Infallible>(answer)
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .max_header_list_size(HEADER_BYTES as u32)
        .max_pending_accept_reset_streams(H2_RESETS)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PING);
    let connection = builder.serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let mut idle_since = Instant::now();
    loop {
        tokio::select! {
            outcome = &mut connection => return outcome,
            _ = epoch.changed() => break,
            () = shared.stopping.cancelled() => break,
            () = sleep(shared.limits.h2_idle / 4) => {
                if active.load(Ordering::Relaxed) > 0 {
                    idle_since = Instant::now();
                } else if idle_since.elapsed() >= shared.limits.h2_idle {
                    break;
                }
            }
        }
    }
    // Open requests end, then the connection.
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// Counts a request of an h2 connection until its headers are answered; an answer that streams on keeps the connection
/// open even after GOAWAY.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(active: &Arc<AtomicUsize>) -> Self {
        active.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(active))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
