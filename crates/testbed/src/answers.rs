//! A server of scripted answers: for what a real one cannot be made to say.

use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use anyhow::Result;

use crate::cleanup::lock;

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// `GET /path?query`
    pub first: String,
    /// The other lines of the head, lower case.
    pub head: String,
    pub body: String,
}

/// Serves for as long as the process lives: tests are short.
#[derive(Debug, Clone)]
pub struct Answers {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Answers {
    /// `answer` gives the status with further head lines (`200 OK\r\nName: value`), and the body. It is told its own address.
    ///
    /// # Errors
    /// When there is no port to listen on.
    pub fn start(answer: impl Fn(&Asked, SocketAddr) -> (String, String) + Send + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let this = Self { address: listener.local_addr()?, asked: Arc::default() };
        let (address, asked) = (this.address, this.asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream);
                let Some(request) = read(&mut reader) else { continue };
                let (head, body) = answer(&request, address);
                lock(&asked).push(request);
                let length = body.len();
                let whole = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
                // A client that has had enough is none of the server's business.
                reader.get_mut().write_all(whole.as_bytes()).ok();
            }
        });
        Ok(this)
    }

    /// What was asked so far, oldest first.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.asked).clone()
    }
}

fn read(reader: &mut impl std::io::BufRead) -> Option<Asked> {
    let (mut lines, mut line, mut length) = (Vec::new(), String::new(), 0);
    while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        lines.push(line.trim_end().to_owned());
        line.clear();
    }
    let (first, head) = lines.split_first()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Asked {
        first: first.trim_end_matches(" HTTP/1.1").to_owned(),
        head: head.join("\n").to_ascii_lowercase(),
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}
