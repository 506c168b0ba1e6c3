//! A real git server: smart HTTP through `git http-backend`, with switches for what a remote can do to a client.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::oneshot;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::cleanup::lock;
use crate::{process, repo};

/// git's own answers have a handful of header lines; more is a broken backend.
const HEADER_LINES_LIMIT: usize = 32;

/// Old entries go first; a test asks about a few.
const SEEN_LIMIT: usize = 10_000;

/// Requests that hang or stream on are cut off when the server stops.
const STOP_LIMIT: Duration = Duration::from_millis(100);

/// What every request is answered with, instead of the repository.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// A status without a body.
    Status(u16),
    /// Takes the request and never answers.
    Hang,
    /// 302 to this address, with the request's path and query behind it.
    Redirect(String),
    /// 200 with so many bytes of well-formed refs.
    HugeBody(u64),
    /// 200 with a page, as a sign-in portal or a wrong path answers.
    Page(String),
    /// The right answer to the request for capabilities, and these refs, each with its commit, whatever was asked.
    Refs(Vec<(String, Vec<u8>)>),
    /// The right answer's head and so many bytes of its body, then the connection is cut.
    CutAfter(u64),
    /// Of an answer that is longer than so many bytes, the first of them; then the connection stands still. Refs are short and
    /// pass, a clone's objects do not. See [`GitServer::stalled`].
    StallAfter(u64),
}

#[derive(Debug, Clone)]
pub struct GitServerOptions {
    /// Loopback, or an engine's gateway where containers are to reach it.
    pub bind: IpAddr,
    /// User name and password that every request must bring.
    pub sign_in: Option<(String, String)>,
}

impl Default for GitServerOptions {
    fn default() -> Self {
        Self { bind: IpAddr::V4(Ipv4Addr::LOCALHOST), sign_in: None }
    }
}

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub uri: String,
    /// The `Git-Protocol` header, such as `version=2`.
    pub protocol: Option<String>,
    pub authorized: bool,
}

/// Serves the bare repositories below a directory; ends when dropped.
#[derive(Debug)]
pub struct GitServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    sign_in: Option<String>,
    fault: Mutex<Fault>,
    seen: Mutex<Vec<Seen>>,
    stalled: AtomicUsize,
}

impl GitServer {
    /// Serves `root` on an ephemeral port, on a thread of its own.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn start(root: &Path, options: &GitServerOptions) -> Result<Self> {
        let sign_in = options.sign_in.as_ref().map(|(user, password)| {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
        });
        let shared = Arc::new(Shared {
            root: root.canonicalize()?,
            sign_in,
            fault: Mutex::default(),
            seen: Mutex::default(),
            stalled: AtomicUsize::new(0),
        });
        let listener = listen(SocketAddr::new(options.bind, 0))?;
        let address = listener.local_addr()?;
        let running = serve(listener, &shared)?;
        Ok(Self { address, shared, running: Mutex::new(Some(running)) })
    }

    /// `http://127.0.0.1:41234/sample.git` for `sample`.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}.git", self.address)
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From the next request on.
    pub fn set_fault(&self, fault: Fault) {
        *lock(&self.shared.fault) = fault;
    }

    /// The requests so far, oldest first.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.seen).clone()
    }

    /// How many answers have come to a standstill by [`Fault::StallAfter`] so far.
    #[must_use]
    pub fn stalled(&self) -> usize {
        self.shared.stalled.load(Ordering::SeqCst)
    }

    /// Forgets the requests so far.
    pub fn forget_seen(&self) {
        lock(&self.shared.seen).clear();
    }

    /// Connections are refused from now on, and open ones cut.
    pub fn stop(&self) {
        if let Some(running) = lock(&self.running).take() {
            // Nobody listens any more when the thread has ended by itself; then it is stopped as well.
            running.stop.send(()).ok();
            running.thread.join().ok();
        }
    }

    /// Listens on the same port again; does nothing when it runs.
    ///
    /// # Errors
    /// When somebody else has taken the port.
    pub fn start_again(&self) -> Result<()> {
        let mut running = lock(&self.running);
        if running.is_none() {
            *running = Some(serve(listen(self.address)?, &self.shared)?);
        }
        Ok(())
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(address: SocketAddr) -> Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A thread and a runtime of its own: works the same from tests with and without a runtime, and stops for sure.
fn serve(listener: std::net::TcpListener, shared: &Arc<Shared>) -> Result<Running> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let app = Router::new().fallback(answer).with_state(Arc::clone(shared));
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        runtime.block_on(async {
            let serving = async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(listener, app).await
            };
            tokio::select! {
                ended = serving => if let Err(error) = ended { eprintln!("git server: {error}") },
                _ = stopped => {}
            }
        });
        runtime.shutdown_timeout(STOP_LIMIT);
    });
    Ok(Running { stop, thread })
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let seen = note(&shared, &request);
    let fault = lock(&shared.fault).clone();
    match &fault {
        Fault::None | Fault::CutAfter(_) | Fault::StallAfter(_) => {}
        Fault::Status(code) => {
            return StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR).into_response();
        }
        Fault::Hang => std::future::pending().await,
        Fault::Redirect(to) => {
            let to = format!("{}{}", to.trim_end_matches('/'), seen.uri);
            return (StatusCode::FOUND, [(header::LOCATION, to)]).into_response();
        }
        Fault::HugeBody(bytes) => return huge(*bytes, &seen.uri),
        Fault::Page(text) => return ([(header::CONTENT_TYPE, "text/html")], text.clone()).into_response(),
        Fault::Refs(refs) if seen.method == "POST" => return listed(refs),
        Fault::Refs(_) => {}
    }
    if !seen.authorized {
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Basic realm=\"git\"")]).into_response();
    }
    match backend(&shared.root, request).await {
        Ok(response) => match fault {
            Fault::CutAfter(bytes) => cut(response, bytes),
            Fault::StallAfter(bytes) => stall(response, bytes, shared),
            _ => response,
        },
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")).into_response(),
    }
}

/// Writes the request down for [`GitServer::seen`].
fn note(shared: &Shared, request: &Request) -> Seen {
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let entry = Seen {
        method: request.method().to_string(),
        uri: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        protocol: header("git-protocol"),
        authorized: shared.sign_in.is_none() || header("authorization") == shared.sign_in,
    };
    let mut seen = lock(&shared.seen);
    if seen.len() >= SEEN_LIMIT {
        seen.remove(0);
    }
    seen.push(entry.clone());
    entry
}

/// One request through `git http-backend`, by the rules of CGI.
async fn backend(root: &Path, request: Request) -> Result<Response> {
    let (head, body) = request.into_parts();
    let mut command = tokio::process::Command::from(repo::isolated());
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        // The repositories may belong to another user than the one who serves them; they are the test's own.
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("REQUEST_METHOD", head.method.as_str())
        .env("PATH_INFO", head.uri.path())
        .env("QUERY_STRING", head.uri.query().unwrap_or_default())
        .env("REMOTE_ADDR", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let passed = [
        (header::CONTENT_TYPE, "CONTENT_TYPE"),
        (header::CONTENT_LENGTH, "CONTENT_LENGTH"),
        (header::CONTENT_ENCODING, "HTTP_CONTENT_ENCODING"),
        (HeaderName::from_static("git-protocol"), "GIT_PROTOCOL"),
    ];
    for (name, variable) in passed {
        if let Some(value) = head.headers.get(name).and_then(|value| value.to_str().ok()) {
            command.env(variable, value);
        }
    }
    let mut child = command.spawn().context("cannot start git http-backend")?;
    let mut input = child.stdin.take().context("no input to git http-backend")?;
    let output = child.stdout.take().context("no output of git http-backend")?;
    tokio::spawn(async move {
        let mut body = StreamReader::new(body.into_data_stream().map_err(std::io::Error::other));
        // A client that goes away, or a backend that has read enough: the backend sees the end and ends too.
        tokio::io::copy(&mut body, &mut input).await.ok();
        input.shutdown().await.ok();
        drop(input);
        child.wait().await.ok();
    });

    let mut output = BufReader::new(output);
    let (status, headers) = head_of(&mut output).await?;
    Ok((status, headers, Body::from_stream(ReaderStream::new(output))).into_response())
}

async fn head_of(output: &mut (impl AsyncBufReadExt + Unpin)) -> Result<(StatusCode, HeaderMap)> {
    let mut status = StatusCode::OK;
    let mut headers = HeaderMap::new();
    let mut line = String::new();
    for _ in 0..HEADER_LINES_LIMIT {
        line.clear();
        output.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            anyhow::ensure!(line == "\r\n" || line == "\n", "git http-backend answered without a header: {line:?}");
            return Ok((status, headers));
        };
        if name.eq_ignore_ascii_case("status") {
            let code = value.split_whitespace().next().unwrap_or_default();
            status = StatusCode::from_bytes(code.as_bytes())?;
        } else {
            headers.append(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(value.trim())?);
        }
    }
    anyhow::bail!("git http-backend answered with more than {HEADER_LINES_LIMIT} header lines")
}

/// Refs without end, in the form that the client asked for.
fn huge(bytes: u64, uri: &str) -> Response {
    let (content_type, first) = if uri.contains("/info/refs") {
        ("application/x-git-upload-pack-advertisement", "001e# service=git-upload-pack\n0000")
    } else {
        ("application/x-git-upload-pack-result", "")
    };
    let line = format!("{:04x}{} refs/tags/v9.9.9\n", 4 + 40 + 1 + 16 + 1, "a".repeat(40));
    let chunk = Bytes::from(line.repeat(1024));
    let chunks = stream::unfold(0_u64, move |sent| {
        let chunk = if sent == 0 && !first.is_empty() { Bytes::from_static(first.as_bytes()) } else { chunk.clone() };
        let length = chunk.len() as u64;
        async move { (sent < bytes).then(|| (Ok::<_, std::io::Error>(chunk), sent + length)) }
    });
    ([(header::CONTENT_TYPE, content_type)], Body::from_stream(chunks)).into_response()
}

/// An answer to `ls-refs` with names that no git would write.
fn listed(refs: &[(String, Vec<u8>)]) -> Response {
    let mut body = Vec::new();
    for (commit, name) in refs {
        body.extend_from_slice(format!("{:04x}{commit} ", 4 + commit.len() + 1 + name.len() + 1).as_bytes());
        body.extend_from_slice(name);
        body.push(b'\n');
    }
    body.extend_from_slice(b"0000");
    ([(header::CONTENT_TYPE, "application/x-git-upload-pack-result")], body).into_response()
}

fn cut(response: Response, bytes: u64) -> Response {
    let (head, body) = response.into_parts();
    let mut left = bytes;
    let chunks = body.into_data_stream().map_err(std::io::Error::other).and_then(move |mut chunk| {
        let take = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let is_over = left == 0;
        left -= take as u64;
        chunk.truncate(take);
        async move { if is_over { Err(std::io::Error::other("cut as ordered")) } else { Ok(chunk) } }
    });
    Response::from_parts(head, Body::from_stream(chunks))
}

fn stall(response: Response, bytes: u64, shared: Arc<Shared>) -> Response {
    let (head, body) = response.into_parts();
    let begin = (body.into_data_stream().boxed(), bytes, shared);
    let chunks = stream::unfold(begin, |(mut chunks, left, shared)| async move {
        let mut chunk = chunks.next().await?;
        let Ok(bytes) = &mut chunk else { return Some((chunk, (chunks, left, shared))) };
        if left == 0 {
            shared.stalled.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        let all = bytes.len();
        let rest = bytes.split_off(all.min(usize::try_from(left).unwrap_or(usize::MAX)));
        let left = left - (all - rest.len()) as u64;
        // What was cut off is what the next turn stands still before.
        let ahead = stream::iter((!rest.is_empty()).then_some(Ok(rest)));
        Some((chunk, (ahead.chain(chunks).boxed(), left, shared)))
    });
    Response::from_parts(head, Body::from_stream(chunks))
}

/// The git binary must know the server's half of smart HTTP; distributions package it apart at times.
///
/// # Errors
/// When it is missing.
pub fn check_backend() -> Result<()> {
    let directory = process::text(repo::isolated().arg("--exec-path"))?;
    anyhow::ensure!(
        Path::new(&directory).join("git-http-backend").exists(),
        "git here has no http-backend; install Debian's git"
    );
    Ok(())
}
