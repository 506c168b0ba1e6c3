//! A real git smart HTTP server (`git http-backend`) on loopback that can be told to misbehave.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

/// How the server answers from now on.
#[derive(Debug, Clone)]
pub(crate) enum Mode {
    Honest,
    /// This status and header lines for everything.
    Status(u16, &'static str),
    /// 200 with this type and body for everything.
    Body(&'static str, Vec<u8>),
    /// Accepts and says nothing.
    Hang,
    /// Ignores the Git-Protocol header.
    OldProtocol,
    /// 401 without exactly this Authorization header.
    Auth(String),
    /// Honest until git asks for the pack; then half of it and a closed connection.
    CutPack,
    /// Honest until git asks for the pack; then nothing more.
    HangPack,
    /// Honest to Replank's own requests; git itself is sent to this address.
    RedirectGit(String),
}

#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) port: u16,
    pub(crate) mode: Arc<Mutex<Mode>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        let mode = Arc::new(Mutex::new(Mode::Honest));
        let (root, shared) = (root.to_owned(), Arc::clone(&mode));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (root, mode) = (root.clone(), shared.lock().expect("lock").clone());
                tokio::spawn(async move { serve(stream, root, mode).await });
            }
        });
        Self { port, mode, task }
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().expect("lock") = mode;
    }
}

async fn serve(mut stream: TcpStream, root: PathBuf, mode: Mode) {
    let mut bytes = Vec::new();
    let head = loop {
        let mut buffer = [0; 8192];
        match stream.read(&mut buffer).await {
            Ok(n) if n > 0 => bytes.extend_from_slice(&buffer[..n]),
            _ => return,
        }
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let header = |name: &str| {
        let found = text.lines().skip(1).filter_map(|l| l.split_once(':')).find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
    };
    let mut body = bytes[head + 4..].to_vec();
    let length: usize = header("content-length").parse().unwrap_or(0);
    while body.len() < length {
        let mut buffer = [0; 8192];
        match stream.read(&mut buffer).await {
            Ok(n) if n > 0 => body.extend_from_slice(&buffer[..n]),
            _ => return,
        }
    }
    let wants_pack = body.windows(13).any(|w| w == b"command=fetch");
    let reply = |status: u16, headers: &str, body: &[u8]| {
        let mut out =
            format!("HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n", body.len())
                .into_bytes();
        out.extend_from_slice(body);
        out
    };
    let out = match &mode {
        Mode::Status(status, headers) => reply(*status, headers, b"no"),
        Mode::Body(kind, body) => reply(200, &format!("content-type: {kind}\r\n"), body),
        Mode::Auth(expect) if header("authorization") != *expect => {
            reply(401, "www-authenticate: Basic realm=x\r\n", b"")
        }
        Mode::RedirectGit(to) if header("user-agent").starts_with("git/") => {
            let target = text.split(' ').nth(1).unwrap_or_default();
            reply(302, &format!("location: {to}{target}\r\n"), b"")
        }
        Mode::Hang => return std::future::pending().await,
        Mode::HangPack if wants_pack => return std::future::pending().await,
        Mode::Honest | Mode::OldProtocol | Mode::Auth(_) | Mode::CutPack | Mode::HangPack | Mode::RedirectGit(_) => {
            let mut words = text.lines().next().unwrap_or_default().split(' ');
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let protocol = if matches!(mode, Mode::OldProtocol) { String::new() } else { header("git-protocol") };
            let mut child = Command::new("git")
                .arg("http-backend")
                .env("GIT_PROJECT_ROOT", &root)
                .env("GIT_HTTP_EXPORT_ALL", "1")
                .env("GIT_CONFIG_COUNT", "1")
                .env("GIT_CONFIG_KEY_0", "safe.directory")
                .env("GIT_CONFIG_VALUE_0", "*")
                .env("PATH_INFO", path)
                .env("QUERY_STRING", query)
                .env("REQUEST_METHOD", method)
                .env("CONTENT_TYPE", header("content-type"))
                .env("CONTENT_LENGTH", body.len().to_string())
                .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
                .env("GIT_PROTOCOL", protocol)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .expect("git http-backend");
            let mut stdin = child.stdin.take().expect("stdin");
            stdin.write_all(&body).await.expect("body");
            drop(stdin);
            let cgi = child.wait_with_output().await.expect("output").stdout;
            let at = cgi.windows(4).position(|w| w == b"\r\n\r\n").expect("CGI header");
            let head = String::from_utf8_lossy(&cgi[..at]).into_owned();
            let status =
                head.lines().find_map(|l| l.strip_prefix("Status: ")).and_then(|s| s[..3].parse().ok()).unwrap_or(200);
            reply(status, &format!("{head}\r\n"), &cgi[at + 4..])
        }
    };
    let cut = if matches!(mode, Mode::CutPack) && wants_pack { out.len() / 2 } else { out.len() };
    // A client that has seen enough closes; that is its right.
    if stream.write_all(&out[..cut]).await.is_ok() {
        stream.shutdown().await.ok();
    }
}
