//! The server's HTTP: who may ask, how much at once, and what is answered.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::ffi::OsString;
use std::future::Future;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use super::audit::{self, Started};
use super::child::{self, Order};
use super::config::{Config, Mode};
use super::environment::{self, Surroundings};
use super::lines;
use super::place::{self, Places};
use super::sinks::{Kept, Sent};
use crate::policy;
use crate::protocol::{
    CREDENTIAL_FEATURE, EXIT_NOT_STARTED, FEATURES_HEADER, Health, Outcome, Request, Stream, Summary, TOKEN_HEADER,
};

/// A client that has not sent its head, or its body, by then is not going to.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
const BODY_LIMIT: Duration = Duration::from_secs(30);
/// Connections at the same time: programs have their own, smaller limit.
const CONNECTIONS_MAX: usize = 64;
/// Pieces of output that wait for a slow client: beyond them the program waits.
const PIECES: usize = 2;
/// A pause after a failed accept: without file descriptors a tight loop would burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Body = BoxBody<Bytes, Infallible>;

/// Everything that requests share.
#[derive(Debug)]
pub struct Server {
    config: Config,
    places: Places,
    own: BTreeMap<OsString, OsString>,
    slots: Arc<Semaphore>,
    starts: Mutex<BTreeMap<String, VecDeque<Instant>>>,
    number: AtomicU64,
}

/// A refusal: its status, and what the client is told.
struct No(StatusCode, String, Option<u64>);

impl No {
    fn new(status: StatusCode, what: impl Into<String>) -> Self {
        Self(status, what.into(), None)
    }
}

/// What is left to do for a request that may run.
struct Ready {
    order: Order,
    started: Started,
    _fresh: TempDir,
    _slot: OwnedSemaphorePermit,
}

impl Server {
    /// `own` is the process's environment, which programs other than git inherit without the channel's own variables.
    #[must_use]
    pub fn new(config: Config, places: Places, own: BTreeMap<OsString, OsString>) -> Self {
        let slots = Arc::new(Semaphore::new(config.max_concurrency));
        Self { config, places, own, slots, starts: Mutex::default(), number: AtomicU64::new(1) }
    }

    /// Serves until `stop` is ready; what runs then is killed with this process's tasks.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: impl Future<Output = ()> + Send) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let policy = match self.config.mode {
            Mode::Enforce => "enforce",
            Mode::Audit => "audit",
        };
        let listen = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
        let started = json!({"listen": listen, "max_concurrency": self.config.max_concurrency, "policy": policy});
        audit::event("exec_server_started", started);
        let accept = async {
            while let Ok(place) = connections.clone().acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let server = self.clone();
                        tokio::spawn(async move {
                            let service = service_fn(move |request| {
                                let server = server.clone();
                                async move { Ok::<_, Infallible>(server.answer(request).await) }
                            });
                            let connection = http1::Builder::new()
                                .timer(TokioTimer::new())
                                .header_read_timeout(HEAD_LIMIT)
                                .serve_connection(TokioIo::new(stream), service);
                            // A client that breaks off is told of by the program's own end.
                            let _broken_off = connection.await;
                            drop(place);
                        });
                    }
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            }
        };
        tokio::select! {
            () = accept => {}
            () = stop => {}
        }
    }

    async fn answer(&self, request: http::Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let answered = match (request.method(), path.as_str()) {
            (&Method::GET, "/healthz") => {
                let health = Health { status: "ok".to_owned(), max_concurrency: self.config.max_concurrency };
                let mut answer = json_answer(StatusCode::OK, &health);
                let features = header::HeaderValue::from_static(CREDENTIAL_FEATURE);
                answer.headers_mut().insert(FEATURES_HEADER, features);
                Ok(answer)
            }
            (&Method::POST, "/exec") => self.exec(request).await,
            (&Method::POST, "/exec/stream") => self.stream(request).await,
            (_, "/healthz" | "/exec" | "/exec/stream") => {
                Err(No::new(StatusCode::METHOD_NOT_ALLOWED, "this method is not answered here"))
            }
            _ => Err(No::new(StatusCode::NOT_FOUND, "there is nothing here")),
        };
        answered.unwrap_or_else(|No(status, detail, retry_after)| {
            let mut answer = json_answer(status, &json!({"detail": detail}));
            if let Some(seconds) = retry_after {
                answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            answer
        })
    }

    async fn exec(&self, request: http::Request<Incoming>) -> Result<Response<Body>, No> {
        let ready = self.ready(request).await?;
        let mut kept = Kept::new(self.config.max_output);
        let outcome = match child::run(ready.order, &mut kept).await {
            Ok(ended) => {
                ready.started.done(&ended);
                Outcome {
                    exit_code: ended.exit_code,
                    stdout: String::from_utf8_lossy(&kept.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&kept.stderr).into_owned(),
                    stdout_truncated: kept.stdout_truncated,
                    stderr_truncated: kept.stderr_truncated,
                    duration_ms: ended.duration_ms(),
                    timed_out: ended.timed_out,
                }
            }
            Err(error) => {
                ready.started.failed("the program did not start");
                Outcome {
                    exit_code: EXIT_NOT_STARTED,
                    stdout: String::new(),
                    stderr: not_started(&error),
                    stdout_truncated: false,
                    stderr_truncated: false,
                    duration_ms: 0,
                    timed_out: false,
                }
            }
        };
        Ok(json_answer(StatusCode::OK, &outcome))
    }

    async fn stream(&self, request: http::Request<Incoming>) -> Result<Response<Body>, No> {
        let ready = self.ready(request).await?;
        let (pieces, from) = mpsc::channel(PIECES);
        let max_line = self.config.max_line;
        tokio::spawn(async move {
            // As a whole: its directory and its slot go when the program has ended.
            let Ready { order, started, _fresh, _slot } = ready;
            let mut sent = Sent::new(pieces, max_line);
            match child::run(order, &mut sent).await {
                Ok(ended) => {
                    started.done(&ended);
                    let summary = Summary {
                        exit_code: ended.exit_code,
                        duration_ms: ended.duration_ms(),
                        timed_out: ended.timed_out,
                        client_aborted: ended.client_gone,
                    };
                    sent.close(|out| lines::close(&summary, out)).await;
                }
                Err(error) => {
                    started.failed("the program did not start");
                    let summary = Summary {
                        exit_code: EXIT_NOT_STARTED,
                        duration_ms: 0,
                        timed_out: false,
                        client_aborted: false,
                    };
                    let told = not_started(&error);
                    sent.close(|out| {
                        lines::say(Stream::Stderr, &told, out);
                        lines::close(&summary, out);
                    })
                    .await;
                }
            }
        });
        let body = StreamBody::new(ReceiverStream::new(from).map(|piece| Ok(Frame::data(piece))));
        let mut answer = Response::new(BodyExt::boxed(body));
        let kind = header::HeaderValue::from_static("application/x-ndjson");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(answer)
    }

    /// Everything that stands between a request and its program. The slot is taken last: whoever is slow or wrong holds none.
    async fn ready(&self, request: http::Request<Incoming>) -> Result<Ready, No> {
        let given = request.headers().get(TOKEN_HEADER).map(|value| value.as_bytes()).unwrap_or_default();
        if !bool::from(given.ct_eq(self.config.token.reveal().as_bytes())) {
            audit::event("exec_error", json!({"error": "wrong token"}));
            return Err(No::new(StatusCode::UNAUTHORIZED, format!("{TOKEN_HEADER} is missing or wrong")));
        }
        let body = self.body(request).await?;
        let malformed = |what: String| No::new(StatusCode::BAD_REQUEST, what);
        // The parser's own words could repeat a part of the request.
        let request: Request = serde_json::from_slice(&body).map_err(|error| {
            malformed(format!("the body is no request: line {}, column {}", error.line(), error.column()))
        })?;
        request.check().map_err(|why| malformed(why.to_string()))?;
        let rules = &self.config.rules;
        let name = request.argv.first().cloned().unwrap_or_default();
        if let Err(denied) = policy::program(rules, &request) {
            audit::event("exec_error", json!({"error": denied.to_string()}));
            return Err(No::new(StatusCode::FORBIDDEN, denied.to_string()));
        }
        let denied = self.judge(&request).err();
        if let (Mode::Enforce, Some(rule)) = (self.config.mode, &denied) {
            audit::event("exec_error", json!({"program": name, "error": rule}));
            return Err(No::new(StatusCode::FORBIDDEN, rule.clone()));
        }
        self.rate(&name)?;
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            let most = self.config.max_concurrency;
            No::new(StatusCode::SERVICE_UNAVAILABLE, format!("{most} programs run already, which is the most"))
        })?;
        let fresh = self.places.fresh().map_err(|error| internal(&error))?;
        let timeout = Duration::from_secs(request.timeout());
        let order = self.order(request, fresh.path(), timeout).map_err(|error| internal(&error))?;
        let started = Started::tell(&name, self.number.fetch_add(1, Ordering::Relaxed), denied);
        Ok(Ready { order, started, _fresh: fresh, _slot: slot })
    }

    async fn body(&self, request: http::Request<Incoming>) -> Result<Bytes, No> {
        let most = self.config.max_body;
        let too_large = || No::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {most} bytes"));
        let announced =
            request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: usize| length > most) {
            return Err(too_large());
        }
        let body = Limited::new(request.into_body(), most).collect();
        match tokio::time::timeout(BODY_LIMIT, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err(No::new(StatusCode::BAD_REQUEST, "the body broke off")),
            Err(_) => Err(No::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
        }
    }

    /// The policy's word, and what only the file system can say.
    fn judge(&self, request: &Request) -> Result<(), String> {
        let rules = &self.config.rules;
        let allowed = policy::judge(rules, request).map_err(|denied| denied.to_string())?;
        for path in &allowed.inside {
            if !place::is_inside(&rules.clone_root, path).unwrap_or(false) {
                return Err("a link leads out of the clone root".to_owned());
            }
        }
        let is_az = request.argv.first().is_some_and(|name| name == "az");
        let cwd = request.cwd.as_deref().map(Path::new).filter(|_| is_az);
        match cwd.and_then(|cwd| place::azure_settings(&rules.clone_root, cwd)) {
            Some(_) => Err("the clone has an .azure directory, which az would take its settings from".to_owned()),
            None => Ok(()),
        }
    }

    fn rate(&self, program: &str) -> Result<(), No> {
        let Some(rate) = self.config.rate else { return Ok(()) };
        let now = tokio::time::Instant::now().into_std();
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let starts = starts.entry(program.to_owned()).or_default();
        while starts.front().is_some_and(|at| now.duration_since(*at) >= rate.window) {
            starts.pop_front();
        }
        if starts.len() < rate.starts as usize {
            starts.push_back(now);
            return Ok(());
        }
        let free = starts.front().map_or(rate.window, |at| rate.window.saturating_sub(now.duration_since(*at)));
        audit::event("exec_rate_limited", json!({"program": program}));
        let detail = format!("{} starts in {} s are the most", rate.starts, rate.window.as_secs());
        Err(No(StatusCode::TOO_MANY_REQUESTS, detail, Some(free.as_secs() + 1)))
    }

    fn order(&self, request: Request, fresh: &Path, timeout: Duration) -> std::io::Result<Order> {
        let mut input = request.stdin.map(String::into_bytes);
        if let (Some(file), Some(bytes)) = (&request.stdin_file, &input) {
            let path = fresh.join(file);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            private(&path, bytes, 0o600)?;
            input = None;
        }
        let askpass = request.git_credential.as_ref().map(|credential| askpass(fresh, credential)).transpose()?;
        let rules = &self.config.rules;
        let around = Surroundings {
            own: &self.own,
            fresh,
            clone_root: &rules.clone_root,
            remote_is_plain: rules.remote.as_ref().is_some_and(|remote| remote.starts_with("http://")),
            allowed_signers: self.config.allowed_signers.as_deref(),
            askpass: askpass.as_deref(),
        };
        let program = request.argv.first().map(String::as_str).unwrap_or_default();
        let environment = environment::of(program, &around);
        let directory = request.cwd.map_or_else(|| fresh.to_owned(), PathBuf::from);
        Ok(Order { argv: request.argv, directory, environment, input, timeout })
    }
}

/// Files that git asks for user and password, in the request's own directory: nothing of them in an argument or a variable.
fn askpass(fresh: &Path, credential: &crate::protocol::Credential) -> std::io::Result<PathBuf> {
    let (username, password) = (fresh.join(".username"), fresh.join(".password"));
    private(&username, credential.username.as_bytes(), 0o600)?;
    private(&password, credential.password.as_bytes(), 0o600)?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
    let script = format!(
        "#!/bin/sh\ncase \"$1\" in Username*) exec cat {} ;; *) exec cat {} ;; esac\n",
        quoted(&username),
        quoted(&password)
    );
    let path = fresh.join(".askpass");
    private(&path, script.as_bytes(), 0o700)?;
    Ok(path)
}

fn private(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)
}

fn internal(error: &std::io::Error) -> No {
    audit::event("exec_error", json!({"error": format!("a request's directory cannot be used: {}", error.kind())}));
    No::new(StatusCode::INTERNAL_SERVER_ERROR, "the request's directory cannot be made; the server's disk may be full")
}

fn not_started(error: &std::io::Error) -> String {
    format!("the program cannot be started: {error}")
}

fn json_answer(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let text = serde_json::to_vec(body).unwrap_or_default();
    let mut answer = Response::new(BodyExt::boxed(Full::new(Bytes::from(text))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    answer
}
