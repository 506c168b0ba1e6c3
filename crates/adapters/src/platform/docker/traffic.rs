//! The platform's side of the proxy's Unix socket: read its state, give it routes, open tunnels for probes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use replank_core::fault::{Class, Fault};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::proxy_api::{Routes, State};

/// The proxy answers from memory and one small file; a longer wait than this means that it hangs.
const ANSWER: Duration = Duration::from_secs(5);
/// State grows with open containers only; far below this.
const BODY_MAX: usize = 1024 * 1024;

#[derive(Debug, Clone)]
pub struct Proxy {
    socket: PathBuf,
}

/// What became of routes that were sent.
#[derive(Debug)]
pub enum Sent {
    Taken,
    /// The proxy holds routes of a higher generation, or others of the same one.
    Refused(State),
}

impl Proxy {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Transient where the proxy does not answer.
    pub async fn state(&self) -> Result<State, Fault> {
        let request = Request::get("http://proxy/state").header(header::HOST, "proxy").body(Full::default());
        let (status, body) = self.call(request, Class::Transient).await?;
        if status == StatusCode::OK { parse(&body) } else { Err(unexpected(status)) }
    }

    /// Indeterminate where the answer was lost on the way.
    pub async fn put(&self, routes: &Routes) -> Result<Sent, Fault> {
        let body = serde_json::to_vec(routes)
            .map_err(|error| Fault::permanent("the routes cannot be written as JSON").because(error))?;
        let request = Request::put("http://proxy/routes")
            .header(header::HOST, "proxy")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)));
        let (status, body) = self.call(request, Class::Indeterminate).await?;
        match status {
            StatusCode::OK => parse::<State>(&body).map(|_| Sent::Taken),
            StatusCode::CONFLICT => parse(&body).map(Sent::Refused),
            StatusCode::BAD_REQUEST => Err(Fault::permanent("the proxy refused the routes as senseless")
                .advice("check that the proxy was made from the same listeners as this configuration")
                .because(detail(&body))),
            other => Err(unexpected(other)),
        }
    }

    /// A connection to a container's port by the road that traffic takes. The error says what failed, for the operator.
    pub async fn tunnel(&self, container: &str, port: u16) -> Result<TokioIo<Upgraded>, String> {
        let authority = format!("{container}:{port}");
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(authority.as_str())
            .header(header::HOST, authority.as_str())
            .body(Full::default())
            .map_err(|error| error.to_string())?;
        let work = async {
            let mut sender = self.connect().await.map_err(|fault| fault.chain())?;
            let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
            if answer.status() != StatusCode::OK {
                return Err(format!("port {port} cannot be reached (the proxy says {})", answer.status().as_u16()));
            }
            hyper::upgrade::on(answer).await.map(TokioIo::new).map_err(|error| error.to_string())
        };
        timeout(ANSWER, work).await.map_err(|_| "the proxy does not answer".to_owned())?
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Fault> {
        let gone = || {
            Fault::transient(format!("the proxy does not answer at {}", self.socket.display())).advice(
                "check that the proxy's container runs: `docker ps --all --filter label=io.replank.role=proxy`, \
                 then `docker start`",
            )
        };
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| gone().because(error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| gone().because(error))?;
        // Ends with its connection: when the sender and an upgraded tunnel are dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the proxy ended");
            }
        });
        Ok(sender)
    }

    /// `lost` is the class of a failure after the request was sent.
    async fn call(
        &self,
        request: http::Result<Request<Full<Bytes>>>,
        lost: Class,
    ) -> Result<(StatusCode, Bytes), Fault> {
        let request =
            request.map_err(|error| Fault::permanent("a request to the proxy is malformed").because(error))?;
        let mut sender = timeout(ANSWER, self.connect())
            .await
            .map_err(|error| Fault::transient("the proxy does not answer").because(error))??;
        let gone = || Fault::new(lost, "the proxy's answer did not come");
        let work = async {
            let answer = sender.send_request(request).await.map_err(|error| gone().because(error))?;
            let status = answer.status();
            let body =
                Limited::new(answer.into_body(), BODY_MAX).collect().await.map_err(|error| gone().because(error))?;
            Ok((status, body.to_bytes()))
        };
        timeout(ANSWER, work).await.map_err(|error| gone().because(error))?
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::permanent("the proxy's answer is not understood")
            .advice("the proxy may be of another version; upgrade it with its own command")
            .because(error)
    })
}

fn unexpected(status: StatusCode) -> Fault {
    let class = if status.is_server_error() { Class::Transient } else { Class::Permanent };
    Fault::new(class, format!("the proxy answered {}", status.as_u16())).advice("look at the proxy's log")
}

fn detail(body: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let text = value.as_ref().and_then(|v| v.get("detail")).and_then(|v| v.as_str()).unwrap_or("no detail given");
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}
