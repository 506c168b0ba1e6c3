//! A double of a registry that somebody else writes to: it stands in front of a real one, and shows other manifests under
//! the tags that were pushed. No real registry can be brought to that at the right moment.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;

use crate::Registry;
use crate::cleanup::lock;
use crate::installed::client;

/// A layer of the tests' images has a few megabytes.
const BODY_MAX: usize = 256 << 20;
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// Ends when dropped.
#[derive(Debug)]
pub struct Liar {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Shared {
    real: String,
    client: reqwest::Client,
    lies: AtomicBool,
    shown: Mutex<Vec<(String, String)>>,
}

impl Liar {
    /// Honest at first.
    ///
    /// # Errors
    /// When it cannot listen on loopback.
    pub fn start(real: &Registry) -> Result<Self> {
        let shared = Arc::new(Shared {
            real: real.url(),
            client: client(REQUEST_LIMIT)?,
            lies: AtomicBool::new(false),
            shown: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let app = Router::new().fallback(answer).with_state(shared.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let serving = async {
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    axum::serve(listener, app).await
                };
                tokio::select! {
                    ended = serving => if let Err(error) = ended { eprintln!("liar: {error}") },
                    // Sent, or dropped with its owner.
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, shared, stop: Some(stop) })
    }

    /// As [`Registry::name`].
    #[must_use]
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// Whether tags show other manifests from now on.
    pub fn lie(&self, lies: bool) {
        self.shared.lies.store(lies, Ordering::SeqCst);
    }

    /// The digests of the lies so far, each after the true one.
    #[must_use]
    pub fn shown(&self) -> Vec<(String, String)> {
        lock(&self.shared.shown).clone()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody listens any more where the server has ended by itself.
            stop.send(()).ok();
        }
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match pass(&shared, request).await {
        Ok(response) => response,
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

async fn pass(shared: &Shared, request: Request) -> Result<Response> {
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().context("a request without a path")?.as_str().to_owned();
    let body = to_bytes(body, BODY_MAX).await?;
    let url = format!("{}{path}", shared.real);
    // With the caller's own `Host`, so that the addresses in the answer lead here again.
    let mut headers = head.headers;
    headers.remove(header::TRANSFER_ENCODING);
    headers.insert(header::CONTENT_LENGTH, body.len().into());
    let answer = shared.client.request(head.method.clone(), url).headers(headers).body(body).send().await?;
    let status = answer.status();
    let mut headers = answer.headers().clone();
    headers.remove(header::TRANSFER_ENCODING);
    let mut bytes = answer.bytes().await?.to_vec();
    let by_tag = path.rsplit_once("/manifests/").is_some_and(|(_, tag)| !tag.starts_with("sha256:"));
    if head.method == Method::GET && by_tag && status.is_success() && shared.lies.load(Ordering::SeqCst) {
        let digest = |bytes: &[u8]| {
            let hash = hex::encode(Sha256::digest(bytes));
            format!("sha256:{hash}")
        };
        let truth = digest(&bytes);
        // The same image to whoever reads it, under another digest.
        bytes.push(b'\n');
        let lie = digest(&bytes);
        headers.insert("docker-content-digest", lie.parse()?);
        headers.insert(header::ETAG, format!("\"{lie}\"").parse()?);
        headers.insert(header::CONTENT_LENGTH, bytes.len().into());
        lock(&shared.shown).push((truth, lie));
    }
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}
