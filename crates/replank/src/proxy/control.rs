//! The control socket: who can open it says where traffic goes.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::limits::{ACCEPT_PAUSE, CHECK, CONTROL_BODY_BYTES, CONTROL_CONNECTIONS};
use super::proxy_api::{Backend, Routes, SOCKET, State};
use super::routes::{Refused, is_container_id};
use super::server::Shared;
use super::tcp;

type Answer = Response<Full<Bytes>>;

/// Binds the control socket, readable by its owner only. Only the holder of the directory's lock gets here, so a socket
/// file that nobody listens on is a leftover.
pub(crate) fn bind(dir: &Path) -> anyhow::Result<UnixListener> {
    let path = dir.join(SOCKET);
    anyhow::ensure!(
        std::os::unix::net::UnixStream::connect(&path).is_err(),
        "somebody listens on {} already; stop it first",
        path.display()
    );
    // Under its name only once nobody else may open it.
    let next = dir.join(format!("{SOCKET}.next"));
    let fresh = || -> io::Result<UnixListener> {
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&next)?;
        fs::set_permissions(&next, Permissions::from_mode(0o600))?;
        fs::rename(&next, &path)?;
        Ok(listener)
    };
    fresh().with_context(|| format!("the control socket {} cannot be made", path.display()))
}

/// Serves the control socket for as long as the process lives: a proxy that drains still tells what is open.
pub(crate) async fn accept(shared: Arc<Shared>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONTROL_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a control connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, request).await) }
            });
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(shared.limits.header_read);
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
                tracing::debug!(%error, "a control connection ended");
            }
        });
    }
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    if request.method() == Method::CONNECT {
        return tunnel(shared, request).await;
    }
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/state") => json(StatusCode::OK, &shared.table.state()),
        (&Method::PUT, "/routes") => put(shared, request).await,
        (_, "/state" | "/routes") => detail(StatusCode::METHOD_NOT_ALLOWED, "GET /state and PUT /routes"),
        _ => detail(StatusCode::NOT_FOUND, "GET /state, PUT /routes and CONNECT <container id>:<port>"),
    }
}

async fn put(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    let body = match Limited::new(request.into_body(), CONTROL_BODY_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return detail(StatusCode::BAD_REQUEST, &format!("the routes did not arrive whole: {error}")),
    };
    let routes: Routes = match serde_json::from_slice(&body) {
        Ok(routes) => routes,
        Err(error) => return detail(StatusCode::BAD_REQUEST, &format!("these are no routes: {error}")),
    };
    let generation = routes.generation;
    let table = Arc::clone(&shared.table);
    // In a task of its own: a controller that dies in the middle must not leave disk and memory apart.
    let outcome = tokio::spawn(async move { table.put(routes).await }).await;
    match outcome {
        Ok(Ok(state)) => {
            tracing::info!(generation, serving = state.serving.as_deref(), "routes taken");
            json(StatusCode::OK, &state)
        }
        Ok(Err(Refused::Stale)) => {
            tracing::warn!(generation, "routes refused: others of this or a higher generation are in force");
            json(StatusCode::CONFLICT, &shared.table.state())
        }
        Ok(Err(Refused::Senseless(why))) => detail(StatusCode::BAD_REQUEST, &why),
        Ok(Err(error @ Refused::NotKept(_))) => {
            tracing::error!(generation, error = ?error, "routes refused");
            detail(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())
        }
        Err(error) => detail(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// `CONNECT <container id>:<port>`: one attempt, because a probe wants to know how it is now.
async fn tunnel(shared: &Arc<Shared>, mut request: Request<Incoming>) -> Answer {
    let target =
        request.uri().authority().and_then(|authority| Some((authority.host().to_owned(), authority.port_u16()?)));
    let Some((container, port)) = target.filter(|(container, port)| is_container_id(container) && *port != 0) else {
        return detail(StatusCode::BAD_REQUEST, "CONNECT takes <container id>:<port>");
    };
    let backend = Backend { container, port };
    let open = shared.table.open(&backend.container);
    let stream = match shared.connector.once(&backend).await {
        Ok(stream) => stream,
        Err(error) => return detail(StatusCode::BAD_GATEWAY, &error.to_string()),
    };
    let upgraded = hyper::upgrade::on(&mut request);
    shared.tasks.spawn(async move {
        let _open = open;
        match upgraded.await {
            Ok(upgraded) => tcp::join(TokioIo::new(upgraded), stream).await,
            Err(error) => tracing::debug!(%error, "a tunnel did not come about"),
        }
    });
    Response::new(Full::default())
}

#[derive(Serialize)]
struct Detail<'a> {
    detail: &'a str,
}

fn detail(status: StatusCode, detail: &str) -> Answer {
    json(status, &Detail { detail })
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let (status, text) = match serde_json::to_vec(body) {
        Ok(text) => (status, text),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, b"{\"detail\":\"the answer cannot be written\"}".to_vec()),
    };
    let mut answer = Response::new(Full::from(text));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    answer
}

/// Whether the proxy on a directory answers; the health check of its container.
pub(crate) async fn check(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join(SOCKET);
    let ask = async {
        let stream = UnixStream::connect(&path).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get("/state").header(header::HOST, "proxy").body(Full::<Bytes>::default())?;
        let answer = sender.send_request(request).await?;
        anyhow::ensure!(answer.status() == StatusCode::OK, "it answered {}", answer.status());
        let body =
            Limited::new(answer.into_body(), CONTROL_BODY_BYTES).collect().await.map_err(anyhow::Error::from_boxed)?;
        serde_json::from_slice::<State>(&body.to_bytes())?;
        Ok(())
    };
    timeout(CHECK, ask)
        .await
        .unwrap_or_else(|_| Err(anyhow::anyhow!("it did not answer within {} s", CHECK.as_secs())))
        .with_context(|| format!("no proxy answers on {}", path.display()))
}
