//! The server's HTTP: who may ask, how much at once, and what is answered.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::ffi::OsString;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use super::audit::{self, Started};
use super::clone;
use super::config::{Config, Mode};
use super::connection::{self, Client};
use super::order::{NotRun, Ready};
use super::place::{self, Places};
use super::remote::Unreached;
use super::sinks::{Kept, Sent};
use crate::outbound::{Resolver, SystemResolver};
use crate::policy::{self, Allowed};
use crate::protocol::{CREDENTIAL_FEATURE, EXIT_UNREACHED, FEATURES_HEADER, Health, Request, TOKEN_HEADER};

/// A client that has not sent its head, or its body, by then is not going to.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
const BODY_LIMIT: Duration = Duration::from_secs(30);
/// What is still read of a body that is refused, and for how long: a client that is in the middle of sending would see a broken
/// connection and not the answer. Whoever has no token is not listened to for long.
const REFUSED_MAX: usize = 64 * 1024 * 1024;
const STRANGER_MAX: usize = 1024 * 1024;
const STRANGER_LIMIT: Duration = Duration::from_secs(2);
/// Longest name of a program that the audit trail repeats.
const NAME_MAX: usize = 32;
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
    resolver: Arc<dyn Resolver>,
    slots: Arc<Semaphore>,
    starts: Mutex<BTreeMap<String, VecDeque<Instant>>>,
    number: AtomicU64,
    /// Wall time, for the ends of keys.
    clock: Option<fn() -> SystemTime>,
}

/// A refusal: its status, and what the client is told.
struct No(StatusCode, String, Option<u64>);

impl No {
    fn new(status: StatusCode, what: impl Into<String>) -> Self {
        Self(status, what.into(), None)
    }
}

/// What the judges say of a request.
#[derive(Default)]
pub(super) struct Judged {
    /// Where git finds the remote.
    pub(super) pin: Option<String>,
    /// The clone that it fills.
    pub(super) fills: Option<PathBuf>,
    /// There is no way to the remote, and git does not have to find out.
    unreached: Option<NotRun>,
}

impl Server {
    /// `own` is the process's environment, which programs other than git inherit without the channel's own variables.
    #[must_use]
    pub fn new(config: Config, places: Places, own: BTreeMap<OsString, OsString>) -> Self {
        Self::with_resolver(config, places, own, Arc::new(SystemResolver))
    }

    /// As [`Server::new`], with another name service.
    #[must_use]
    pub fn with_resolver(
        config: Config,
        places: Places,
        own: BTreeMap<OsString, OsString>,
        resolver: Arc<dyn Resolver>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(config.max_concurrency));
        Self { config, places, own, resolver, slots, starts: Mutex::default(), number: AtomicU64::new(1), clock: None }
    }

    /// With the clock that ends of keys are held against. Without one no signature is ever good.
    #[must_use]
    pub fn timed(self, clock: fn() -> SystemTime) -> Self {
        Self { clock: Some(clock), ..self }
    }

    pub(super) fn clock(&self) -> Option<fn() -> SystemTime> {
        self.clock
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn own(&self) -> &BTreeMap<OsString, OsString> {
        &self.own
    }

    /// Serves until `stop` is ready; what runs then is killed with this process's tasks.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: impl Future<Output = ()> + Send) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let policy = match self.config.mode {
            Mode::Enforce => "enforce",
            Mode::Audit => "audit",
        };
        let listen = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
        let started = json!({
            "listen": listen,
            "max_concurrency": self.config.max_concurrency,
            "policy": policy,
            "programs": self.config.rules.programs,
            "loopback_remote_allowed": self.config.reach.loopback,
            "private_remote_allowed": self.config.reach.private,
        });
        audit::event("exec_server_started", started);
        let accept = async {
            while let Ok(place) = connections.clone().acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let server = self.clone();
                        tokio::spawn(async move {
                            server.converse(stream).await;
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

    async fn converse(self: Arc<Self>, stream: TcpStream) {
        let Ok((link, client, watch)) = connection::open(stream) else { return };
        let service = service_fn(move |request| {
            let (server, client) = (self.clone(), client.clone());
            async move { Ok::<_, Infallible>(server.answer(request, client).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .serve_connection(TokioIo::new(link), service);
        tokio::select! {
            // A client that breaks off is told of by the program's own end.
            _broken_off = connection => {}
            () = watch => {}
        }
    }

    async fn answer(&self, request: http::Request<Incoming>, client: Client) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let answered = match (request.method(), path.as_str()) {
            (&Method::GET, "/healthz") => {
                let health = Health { status: "ok".to_owned(), max_concurrency: self.config.max_concurrency };
                let mut answer = json_answer(StatusCode::OK, &health);
                let features = header::HeaderValue::from_static(CREDENTIAL_FEATURE);
                answer.headers_mut().insert(FEATURES_HEADER, features);
                Ok(answer)
            }
            (&Method::POST, "/exec") => self.exec(request, client).await,
            (&Method::POST, "/exec/stream") => self.stream(request, client).await,
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

    async fn exec(&self, request: http::Request<Incoming>, client: Client) -> Result<Response<Body>, No> {
        let ready = self.ready(request, &client).await?;
        let (answer, waiting) = oneshot::channel();
        let mut kept = Kept::new(self.config.max_output, client, answer);
        // Apart from the connection, so that the program is seen to its end when that breaks off.
        tokio::spawn(async move {
            let ended = ready.run(&mut kept).await;
            kept.close(ended);
        });
        match waiting.await {
            Ok(outcome) => Ok(json_answer(StatusCode::OK, &outcome)),
            Err(_) => Err(No::new(StatusCode::INTERNAL_SERVER_ERROR, "the program was lost; look at the server's log")),
        }
    }

    async fn stream(&self, request: http::Request<Incoming>, client: Client) -> Result<Response<Body>, No> {
        let ready = self.ready(request, &client).await?;
        let (pieces, from) = mpsc::channel(PIECES);
        let mut sent = Sent::new(pieces, client, self.config.max_line);
        tokio::spawn(async move {
            let ended = ready.run(&mut sent).await;
            sent.close(ended).await;
        });
        let body = StreamBody::new(ReceiverStream::new(from).map(|piece| Ok(Frame::data(piece))));
        let mut answer = Response::new(BodyExt::boxed(body));
        let kind = header::HeaderValue::from_static("application/x-ndjson");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(answer)
    }

    /// Everything that stands between a request and its program. The slot is taken last: whoever is slow or wrong holds none.
    async fn ready(&self, request: http::Request<Incoming>, client: &Client) -> Result<Ready, No> {
        let given = request.headers().get(TOKEN_HEADER).map(|value| value.as_bytes()).unwrap_or_default();
        if !bool::from(given.ct_eq(self.config.token.reveal().as_bytes())) {
            audit::event("exec_error", json!({"error": "wrong token"}));
            hear_out(request, STRANGER_MAX, STRANGER_LIMIT).await;
            return Err(No::new(StatusCode::UNAUTHORIZED, format!("{TOKEN_HEADER} is missing or wrong")));
        }
        let body = self.body(request).await?;
        let request = Request::read(&body).map_err(|why| No::new(StatusCode::BAD_REQUEST, why.to_string()))?;
        let name = request.argv.first().cloned().unwrap_or_default();
        // What is no program's name is not told: it may be anything.
        let told = Some(&name).filter(|name| name.len() <= NAME_MAX && name.bytes().all(|b| b.is_ascii_graphic()));
        let refused = |why: &str| {
            audit::event("exec_error", json!({"program": told, "error": why}));
            No::new(StatusCode::FORBIDDEN, why)
        };
        policy::program(&self.config.rules, &request).map_err(|denied| refused(&denied.to_string()))?;
        let (judged, would_refuse) = match (self.judge(&request).await, self.config.mode) {
            (Ok(judged), _) => (judged, None),
            (Err(rule), Mode::Enforce) => return Err(refused(&rule)),
            (Err(rule), Mode::Audit) => (Judged::default(), Some(rule)),
        };
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            audit::event("exec_error", json!({"program": name, "error": "busy"}));
            let most = self.config.max_concurrency;
            No::new(StatusCode::SERVICE_UNAVAILABLE, format!("{most} programs run already, which is the most"))
        })?;
        // Counted once it is sure to start: a client that waits for a slot must not use up its rate by asking.
        self.rate(&name)?;
        let fresh = self.places.fresh().map_err(|error| internal(&error))?;
        let order = match &judged.unreached {
            Some(not_run) => Err(not_run.clone()),
            None => self.order(request, &fresh, &judged).map_err(|error| internal(&error))?,
        };
        let started = Started::tell(&name, self.number.fetch_add(1, Ordering::Relaxed), would_refuse);
        Ok(Ready { order, started, fresh, slot, running: client.running() })
    }

    async fn body(&self, request: http::Request<Incoming>) -> Result<Bytes, No> {
        let most = self.config.max_body;
        let too_large = || No::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {most} bytes"));
        let announced =
            request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: usize| length > most) {
            hear_out(request, REFUSED_MAX, BODY_LIMIT).await;
            return Err(too_large());
        }
        let mut whole = Vec::with_capacity(announced.unwrap_or_default());
        let reading = async {
            let mut body = request.into_body();
            let mut read = 0;
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame.map_err(|_| No::new(StatusCode::BAD_REQUEST, "the body broke off"))?.into_data()
                else {
                    continue;
                };
                read += data.len();
                if read > REFUSED_MAX {
                    break;
                }
                if read <= most {
                    whole.extend_from_slice(&data);
                }
            }
            if read > most { Err(too_large()) } else { Ok(()) }
        };
        match tokio::time::timeout(BODY_LIMIT, reading).await {
            Ok(read) => read.map(|()| whole.into()),
            Err(_) => Err(No::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
        }
    }

    /// The policy's word, and what only the file system and the name service can say.
    async fn judge(&self, request: &Request) -> Result<Judged, String> {
        let rules = &self.config.rules;
        let allowed = policy::judge(rules, request).map_err(|denied| denied.to_string())?;
        self.look(request, &allowed)?;
        let mut judged = Judged { fills: allowed.fills, ..Judged::default() };
        let Some(remote) = self.config.remote.as_ref().filter(|_| allowed.talks) else { return Ok(judged) };
        match remote.pin(self.resolver.as_ref(), &self.own).await {
            Ok(pin) => judged.pin = pin,
            Err(why @ Unreached::Unresolved(..)) => {
                judged.unreached = Some(NotRun { exit_code: EXIT_UNREACHED, why: format!("fatal: {why}") });
            }
            Err(refused) => return Err(refused.to_string()),
        }
        Ok(judged)
    }

    fn look(&self, request: &Request, allowed: &Allowed) -> Result<(), String> {
        let rules = &self.config.rules;
        let unreadable = |_| "the clone cannot be read".to_owned();
        if allowed.context.as_ref().is_some_and(|context| !context.is_dir()) {
            return Err("the build's context is no directory of the clone".to_owned());
        }
        for path in &allowed.inside {
            if !place::is_inside(&rules.clone_root, path).unwrap_or(false) {
                return Err("a link leads out of the clone root".to_owned());
            }
        }
        for directory in &allowed.clones {
            if let Some(strange) = clone::strange(directory, rules.remote.as_deref()).map_err(unreadable)? {
                return Err(strange.to_string());
            }
        }
        let is_az = request.argv.first().is_some_and(|name| name == "az");
        let cwd = request.cwd.as_deref().map(Path::new).filter(|_| is_az);
        match cwd.and_then(|cwd| place::azure_settings(&rules.clone_root, cwd, self.azure_config())) {
            Some(_) => Err("the clone has a directory that az would take its settings from, such as .azure".to_owned()),
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
}

/// Reads what a client is still sending, and forgets it. One that waits to be told to go on is not.
async fn hear_out(request: http::Request<Incoming>, most: usize, limit: Duration) {
    if request.headers().contains_key(header::EXPECT) {
        return;
    }
    let reading = async {
        let mut body = request.into_body();
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > most {
                break;
            }
        }
    };
    // Whether it came to its end makes no difference to the answer.
    let _in_time = tokio::time::timeout(limit, reading).await;
}

fn internal(error: &std::io::Error) -> No {
    audit::event("exec_error", json!({"error": format!("a request's directory cannot be used: {}", error.kind())}));
    No::new(StatusCode::INTERNAL_SERVER_ERROR, "the request's directory cannot be made; the server's disk may be full")
}

fn json_answer(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let text = serde_json::to_vec(body).unwrap_or_default();
    let mut answer = Response::new(BodyExt::boxed(Full::new(Bytes::from(text))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    answer
}
