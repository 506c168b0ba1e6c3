//! A server of its own for each test, on a real socket, with scripts in the place of the programs that are not installed.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use replank_exec::outbound::Resolver;
use replank_exec::protocol::{Event, Outcome, Stream, Summary};
use replank_exec::server::config::Config;
use replank_exec::server::http::Server;
use replank_exec::server::place::{Places, make_private};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

pub const TOKEN: &str = "0123456789abcdef";

/// A name service that knows nobody: what is sent to the remote ends here, offline.
#[derive(Debug)]
pub struct Nobody;

#[async_trait]
impl Resolver for Nobody {
    async fn resolve(&self, _: &str, _: u16) -> std::io::Result<Vec<SocketAddr>> {
        Err(std::io::Error::other("nobody is known here"))
    }
}

/// The server; ended when it is dropped. `az` and `kubectl` run their second argument as a script, `elb` prints its arguments.
pub struct Rig {
    pub address: SocketAddr,
    pub place: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rig {
    pub async fn start(variables: &[(&str, &str)]) -> Self {
        Self::start_with(variables, &[], Arc::new(Nobody)).await
    }

    /// `own` is what programs may inherit, beside PATH and the token.
    pub async fn start_with(variables: &[(&str, &str)], own: &[(&str, &str)], resolver: Arc<dyn Resolver>) -> Self {
        let place = tempfile::tempdir().unwrap();
        let bin = place.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        let runs = "#!/bin/sh\nshift\nexec sh -c \"$@\"\n";
        for (name, script) in [("kubectl", runs), ("az", runs), ("elb", "#!/bin/sh\nprintf '<%s>\\n' \"$@\"\n")] {
            script_at(&bin.join(name), script);
        }
        let root = place.path().join("clones");
        let root_text = root.display().to_string();
        let mut all = vec![("EXEC_TOKEN", TOKEN), ("EXEC_PORT", "0"), ("EXEC_CLONE_ROOT", root_text.as_str())];
        all.extend(variables);
        let get = |name: &str| all.iter().rev().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let config = Config::read(get).unwrap();
        make_private(&root).unwrap();
        let now = std::fs::metadata(place.path()).unwrap().modified().unwrap();
        let places = Places::open(place.path().join("requests"), now).unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let mut environment: BTreeMap<OsString, OsString> =
            BTreeMap::from([("PATH".into(), path.into()), ("EXEC_TOKEN".into(), TOKEN.into())]);
        environment.extend(own.iter().map(|(name, value)| (name.into(), value.into())));
        let listener = TcpListener::bind(config.listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Arc::new(Server::with_resolver(config, places, environment, resolver));
        let task = tokio::spawn(server.serve(listener, std::future::pending()));
        Self { address, place, task }
    }

    pub fn clones(&self) -> PathBuf {
        self.place.path().join("clones")
    }

    /// What is left of requests.
    pub fn requests(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.place.path().join("requests")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// A connection that has said this.
    pub async fn say(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // A server that has had enough does not read to the end.
        stream.write_all(bytes).await.ok();
        stream
    }

    pub async fn send(&self, head: &str, body: &str) -> TcpStream {
        let text = format!("{head}\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        self.say(text.as_bytes()).await
    }

    /// A request with the token, not waited for.
    pub async fn begin(&self, path: &str, request: &Value) -> TcpStream {
        self.send(&format!("POST {path} HTTP/1.1\r\nX-Exec-Token: {TOKEN}"), &request.to_string()).await
    }

    /// Status, head and body of one request.
    pub async fn ask(&self, head: &str, body: &str) -> (u16, String, String) {
        let mut answer = Vec::new();
        self.send(head, body).await.read_to_end(&mut answer).await.unwrap();
        split(&String::from_utf8(answer).unwrap())
    }

    pub async fn post(&self, path: &str, request: &Value) -> (u16, String, String) {
        self.ask(&format!("POST {path} HTTP/1.1\r\nX-Exec-Token: {TOKEN}"), &request.to_string()).await
    }

    pub async fn exec(&self, request: Value) -> Outcome {
        let (status, _, body) = self.post("/exec", &request).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub async fn stream(&self, request: Value) -> (Vec<(Stream, String)>, Summary) {
        let (status, head, body) = self.post("/exec/stream", &request).await;
        assert!(status == 200 && head.contains("content-type: application/x-ndjson"), "{head}\n{body}");
        events(&body)
    }
}

pub fn script_at(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// Status, head in lower case, and body of an answer.
pub fn split(text: &str) -> (u16, String, String) {
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let head = head.to_ascii_lowercase();
    let body = if head.contains("transfer-encoding: chunked") { unchunk(rest) } else { rest.to_owned() };
    (status, head, body)
}

pub fn events(body: &str) -> (Vec<(Stream, String)>, Summary) {
    let mut lines = Vec::new();
    let mut summary = None;
    for line in body.lines() {
        assert!(summary.is_none(), "something comes after the summary: {line}");
        match serde_json::from_str(line).unwrap() {
            Event::Line { stream, line } => lines.push((stream, line)),
            Event::Summary(last) => summary = Some(last),
        }
    }
    (lines, summary.expect("a summary"))
}

pub fn unchunk(mut text: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        whole.push_str(&rest[..size]);
        text = &rest[size + 2..];
    }
    whole
}

/// A request that runs a script.
pub fn run(script: &str) -> Value {
    json!({"argv": ["kubectl", "run", script]})
}

pub async fn until(is: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 30 s");
}

/// Whether a process does anything any more; dead ones that nobody waits for do not.
pub fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}
