//! Requests of a build that bollard cannot make: a session with files and secrets, and a build whose connection ends with
//! the future that holds it.

use std::path::PathBuf;
use std::time::Duration;

use bollard::models::BuildInfo;
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use replank_core::fault::Fault;
use tokio::net::UnixStream;

use crate::engine::{ANSWER_TIMEOUT, API_VERSION, Engine, status};

/// One JSON line of a build. BuildKit gathers what came within 100 ms, at most a few MiB; base64 makes it more.
const LINE_MAX: usize = 64 << 20;
/// An error's text is cut there.
const ERROR_MAX: usize = 16 << 10;
/// A cancel that is lost does no harm beyond a build that runs to its end, so nobody waits long for it.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub(super) struct Wire {
    socket: PathBuf,
}

/// A connection that is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Connection(tokio::task::JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) connection: Connection,
}

impl Wire {
    pub(super) fn new(engine: &Engine) -> Self {
        Self { socket: engine.socket().to_owned() }
    }

    fn unreachable(&self) -> Fault {
        Fault::transient(format!("the Docker engine at {} cannot be reached", self.socket.display()))
            .advice("check that the Docker engine runs and that its socket is mounted and may be used")
    }

    /// Posts without a body. Answers are successes or an upgrade; everything else is a fault by its status code.
    pub(super) async fn post(
        &self,
        path: &str,
        query: &[(&str, String)],
        headers: &[(&str, &str)],
    ) -> Result<Answer, Fault> {
        let ours =
            |e: &dyn std::fmt::Display| Fault::permanent(format!("a request to the Docker engine cannot be made: {e}"));
        let (major, minor) = (API_VERSION.major_version, API_VERSION.minor_version);
        let base = format!("http://engine/v{major}.{minor}{path}");
        let url = reqwest::Url::parse_with_params(&base, query).map_err(|e| ours(&e))?;
        let target = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        let mut request = Request::builder().method(Method::POST).uri(target).header("host", "engine");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| ours(&e))?;

        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable().because(e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.unreachable().because(e))?;
        let connection = Connection(tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the engine ended");
            }
        }));
        let response = tokio::time::timeout(ANSWER_TIMEOUT, sender.send_request(request))
            .await
            .map_err(|e| Fault::transient("the Docker engine does not answer").because(e))?
            .map_err(|e| Fault::transient("the Docker engine went away").because(e))?;
        let code = response.status();
        if code.is_success() || code == http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Answer { response, connection });
        }
        let body = http_body_util::Limited::new(response.into_body(), ERROR_MAX).collect().await;
        let text = body.map(|b| String::from_utf8_lossy(&b.to_bytes()).into_owned()).unwrap_or_default();
        let (class, advice) = status(code.as_u16());
        Err(Fault::new(class, format!("the Docker engine refused {path} with status {}", code.as_u16()))
            .advice(advice)
            .because(text))
    }

    /// Asks the engine to end a build, from a place that cannot wait.
    pub(super) fn cancel_soon(&self, build: &str) {
        let (wire, build) = (self.clone(), build.to_owned());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            let query = [("id", build)];
            let asked = tokio::time::timeout(CANCEL_TIMEOUT, wire.post("/build/cancel", &query, &[])).await;
            if let Ok(Err(error)) = asked {
                // The dropped connection has ended the build already, or it was over.
                tracing::debug!(error = error.chain(), "a build could not be cancelled by name");
            }
        });
    }
}

/// The messages of a running build, one JSON line each.
#[derive(Debug)]
pub(super) struct Messages {
    body: Incoming,
    buffer: BytesMut,
    /// Up to here the buffer has no line end.
    searched: usize,
    _connection: Connection,
}

/// BuildKit copies a step's name from the Dockerfile byte by byte, and where those are no UTF-8 its progress cannot be
/// decoded. Progress is left out then: what the message says beside it, such as the error, still counts.
fn message(line: &[u8]) -> Result<BuildInfo, Fault> {
    let unreadable = |e: serde_json::Error| {
        Fault::transient("a message of the Docker engine about the build cannot be read").because(e)
    };
    let error = match serde_json::from_slice(line) {
        Ok(message) => return Ok(message),
        Err(error) => error,
    };
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line).map_err(unreadable)?;
    if fields.remove("aux").is_none() {
        return Err(unreadable(error));
    }
    tracing::debug!(%error, "a progress message of the build is left out");
    serde_json::from_value(fields.into()).map_err(unreadable)
}

impl Messages {
    pub(super) fn new(answer: Answer) -> Self {
        let Answer { response, connection } = answer;
        Self { body: response.into_body(), buffer: BytesMut::new(), searched: 0, _connection: connection }
    }

    /// The next message; `None` at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<BuildInfo>, Fault> {
        let gone = || Fault::transient("the Docker engine went away during the build");
        loop {
            if let Some(found) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.searched + found + 1);
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return message(&line).map(Some);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > LINE_MAX {
                return Err(Fault::permanent("a message of the Docker engine about the build has no end")
                    .advice("report it with the engine's version"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(e)) => return Err(gone().because(e)),
                None if self.buffer.is_empty() => return Ok(None),
                None => self.buffer.extend_from_slice(b"\n"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_that_cannot_be_decoded_does_not_end_a_build() {
        let odd = message(br#"{"id":"moby.buildkit.trace","aux":"/////w=="}"#).expect("left out");
        assert_eq!((odd.id.as_deref(), odd.aux.is_none()), (Some("moby.buildkit.trace"), true));
        let both = message(br#"{"aux":"/////w==","errorDetail":{"message":"exit code: 5"}}"#).expect("the rest");
        assert_eq!(both.error_detail.and_then(|e| e.message).as_deref(), Some("exit code: 5"));
        for broken in [&b"not json"[..], br#"{"errorDetail":7}"#] {
            assert!(message(broken).is_err());
        }
    }
}
