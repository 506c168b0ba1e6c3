//! A proxy on loopback with backends that a test can command.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use replank::proxy::{Limits, Proxy, Resolver, Start};
use replank_adapters::platform::docker::proxy_api::{
    Backend, CONFIG, Config, Listener, Protocol, Routes, SOCKET, Side, State,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout};

/// Nothing in these tests takes this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("took too long")
}

/// Asks again until the answer is yes.
pub(crate) async fn until(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !ask().await {
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Where containers are, as a test says.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<HashMap<String, SocketAddr>>);

impl Names {
    pub(crate) fn set(&self, container: &str, address: SocketAddr) {
        self.0.lock().unwrap().insert(container.to_owned(), address);
    }

    pub(crate) fn forget(&self, container: &str) {
        self.0.lock().unwrap().remove(container);
    }
}

#[async_trait]
impl Resolver for Names {
    async fn resolve(&self, container: &str, _: u16) -> io::Result<Vec<SocketAddr>> {
        let found = self.0.lock().unwrap().get(container).copied();
        found.map(|address| vec![address]).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such name"))
    }
}

/// A container id that is all one digit.
pub(crate) fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

pub(crate) fn side(digit: char, listeners: &[&str]) -> Side {
    let backends = listeners.iter().map(|name| ((*name).to_owned(), Backend { container: id(digit), port: 80 }));
    Side { revision: format!("rev-{digit}"), backends: backends.collect() }
}

pub(crate) fn routes(generation: u64, digit: char) -> Routes {
    Routes { generation, primary: side(digit, &["web"]), fallback: None }
}

pub(crate) fn listener(protocol: Protocol) -> Listener {
    Listener { port: 0, protocol, tls: None }
}

pub(crate) fn configure(dir: &Path, listeners: &[(&str, Listener)]) {
    let listeners = listeners.iter().map(|(name, listener)| ((*name).to_owned(), listener.clone())).collect();
    std::fs::write(dir.join(CONFIG), serde_json::to_vec(&Config { listeners }).unwrap()).unwrap();
}

/// A running proxy and its backends' names.
pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) names: Arc<Names>,
    pub(crate) proxy: Proxy,
}

impl Rig {
    /// One HTTP listener, `web`, default limits.
    pub(crate) async fn web() -> Self {
        Self::with(Limits::default(), &[("web", listener(Protocol::Http))]).await
    }

    pub(crate) async fn with(limits: Limits, listeners: &[(&str, Listener)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        configure(dir.path(), listeners);
        Self::on(dir, Arc::default(), limits).await
    }

    pub(crate) async fn on(dir: tempfile::TempDir, names: Arc<Names>, limits: Limits) -> Self {
        let proxy = start(dir.path(), &names, limits).await.unwrap();
        Self { dir, names, proxy }
    }

    /// Loopback address of a listener.
    pub(crate) fn at(&self, name: &str) -> SocketAddr {
        ([127, 0, 0, 1], self.proxy.addresses()[name].port()).into()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.at("web"))
    }

    pub(crate) async fn put(&self, routes: &Routes) -> (StatusCode, String) {
        put(self.dir.path(), routes).await
    }

    pub(crate) async fn route(&self, generation: u64, digit: char) {
        let (status, text) = self.put(&routes(generation, digit)).await;
        assert_eq!(status, StatusCode::OK, "{text}");
    }

    pub(crate) async fn state(&self) -> State {
        state(self.dir.path()).await
    }

    pub(crate) async fn open(&self) -> BTreeMap<String, u64> {
        self.state().await.open
    }

    /// Every counter returns to zero.
    pub(crate) async fn closed(&self) {
        until("nothing is open", async || self.open().await.is_empty()).await;
    }

    pub(crate) async fn raw(&self, name: &str) -> TcpStream {
        TcpStream::connect(self.at(name)).await.unwrap()
    }
}

pub(crate) async fn start(dir: &Path, names: &Arc<Names>, limits: Limits) -> anyhow::Result<Proxy> {
    let resolver = Arc::clone(names) as Arc<dyn Resolver>;
    Proxy::start(Start { dir: dir.to_owned(), resolver, limits }).await
}

pub(crate) async fn control(
    dir: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> anyhow::Result<(StatusCode, String)> {
    let stream = UnixStream::connect(dir.join(SOCKET)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request =
        Request::builder().method(method).uri(path).header("host", "proxy").body(Full::new(Bytes::from(body)))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

pub(crate) async fn put(dir: &Path, routes: &Routes) -> (StatusCode, String) {
    soon(control(dir, Method::PUT, "/routes", serde_json::to_vec(routes).unwrap())).await.unwrap()
}

pub(crate) async fn state(dir: &Path) -> State {
    let (status, text) = soon(control(dir, Method::GET, "/state", vec![])).await.unwrap();
    assert_eq!(status, StatusCode::OK);
    serde_json::from_str(&text).unwrap()
}

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// An application: answers with its digit, and does what paths ask for.
pub(crate) struct App {
    pub(crate) address: SocketAddr,
    /// Sends a server-sent event to whoever is on `/events`.
    pub(crate) events: broadcast::Sender<&'static str>,
    /// Requests that it got.
    pub(crate) seen: Arc<AtomicU64>,
    /// Bytes that it could write on `/flood`.
    pub(crate) flooded: Arc<AtomicU64>,
}

impl App {
    /// Starts it, and names it as container `digit`.
    pub(crate) async fn start(names: &Names, digit: char) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = Self {
            address: listener.local_addr().unwrap(),
            events: broadcast::Sender::new(16),
            seen: Arc::default(),
            flooded: Arc::default(),
        };
        names.set(&id(digit), app.address);
        let (events, seen, flooded) = (app.events.clone(), Arc::clone(&app.seen), Arc::clone(&app.flooded));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (events, seen, flooded) = (events.clone(), Arc::clone(&seen), Arc::clone(&flooded));
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        seen.fetch_add(1, Ordering::SeqCst);
                        let (events, flooded) = (events.clone(), Arc::clone(&flooded));
                        async move { Ok::<_, Infallible>(answer(digit, request, events, flooded).await) }
                    });
                    let served =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    let _closed_by_peer = served.with_upgrades().await;
                });
            }
        });
        app
    }

    pub(crate) fn seen(&self) -> u64 {
        self.seen.load(Ordering::SeqCst)
    }
}

fn text(text: impl Into<Bytes>) -> Response<Body> {
    Response::new(Full::new(text.into()).boxed_unsync())
}

async fn answer(
    digit: char,
    mut request: Request<Incoming>,
    events: broadcast::Sender<&'static str>,
    flooded: Arc<AtomicU64>,
) -> Response<Body> {
    match request.uri().path() {
        "/headers" => {
            let lines =
                request.headers().iter().map(|(n, v)| format!("{n}: {}\n", String::from_utf8_lossy(v.as_bytes())));
            let mut answer = text(lines.collect::<String>());
            answer.headers_mut().insert("connection", "x-private".parse().unwrap());
            answer.headers_mut().insert("x-private", "1".parse().unwrap());
            answer
        }
        "/events" => {
            let events = tokio_stream::wrappers::BroadcastStream::new(events.subscribe());
            let frames = events
                .take_while(|event| std::future::ready(!matches!(event, Ok("end") | Err(_))))
                .map(move |event| Ok(Frame::data(Bytes::from(format!("data: {digit}{}\n\n", event.unwrap())))));
            Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
        }
        "/flood" => {
            let frames = futures_util::stream::repeat_with(move || {
                flooded.fetch_add(64 * 1024, Ordering::SeqCst);
                Ok(Frame::data(Bytes::from_static(&[b'x'; 64 * 1024])))
            });
            Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
        }
        "/upgrade" => {
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgraded.await.unwrap());
                echo(digit, &mut io).await;
            });
            let mut answer = text("");
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            answer.headers_mut().insert("connection", "Upgrade".parse().unwrap());
            answer.headers_mut().insert("upgrade", "websocket".parse().unwrap());
            answer
        }
        _ => {
            let body = request.into_body().collect().await.map(|body| body.to_bytes().len());
            text(match body {
                Ok(0) => digit.to_string(),
                Ok(length) => format!("{digit} {length}"),
                Err(_) => "broken".to_owned(),
            })
        }
    }
}

/// Sends back what comes, with its digit before it.
pub(crate) async fn echo(digit: char, io: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin)) {
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = io.read(&mut buffer).await {
        let mut reply = vec![u8::try_from(digit).unwrap()];
        reply.extend_from_slice(&buffer[..length]);
        if io.write_all(&reply).await.is_err() {
            return;
        }
    }
}

/// Says a line over a tunnel and reads the reply to it.
pub(crate) async fn say(io: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin), line: &str) -> String {
    io.write_all(line.as_bytes()).await.unwrap();
    let mut reply = vec![0; line.len() + 1];
    soon(io.read_exact(&mut reply)).await.unwrap();
    String::from_utf8(reply).unwrap()
}

/// Reads up to the empty line that ends an answer's headers.
pub(crate) async fn head(io: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(io.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Sends bytes and reads everything until the proxy closes.
pub(crate) async fn raw_exchange(rig: &Rig, request: &str) -> String {
    let mut stream = rig.raw("web").await;
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}
