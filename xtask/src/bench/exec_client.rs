//! A client of the exec channel that costs next to nothing, so that what is measured is the server.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use replank_exec::protocol::{Event, TOKEN_HEADER};
use serde_json::{Value, json};

/// No answer, and no piece of one, takes longer on a slow, shared machine; more means that it hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// As much as the kernel hands over at once.
const BUFFER: usize = 256 * 1024;
/// A summary is shorter than that.
const TAIL: usize = 512;

/// Where the server is, and what it asks for.
#[derive(Debug, Clone)]
pub(super) struct Channel {
    pub(super) address: SocketAddr,
    pub(super) token: String,
}

impl Channel {
    pub(super) fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Connection { from: BufReader::with_capacity(BUFFER, stream), token: self.token.clone() })
    }

    /// Reads everything that a program prints, and drops it; answers how many bytes all events before the summary had.
    pub(super) fn discard(&self, argv: &[&str]) -> Result<usize> {
        let (mut bytes, mut tail) = (0, Vec::new());
        self.connect()?.post("/exec/stream", argv, |piece| {
            bytes += piece.len();
            tail.extend_from_slice(&piece[piece.len().saturating_sub(TAIL)..]);
            let from = tail.len().saturating_sub(TAIL);
            tail.drain(..from);
            Ok(())
        })?;
        let last = tail.strip_suffix(b"\n").context("the answer does not end in a whole line")?;
        let from = last.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        ended_well(&serde_json::from_slice(&last[from..])?)?;
        Ok(bytes - (tail.len() - from))
    }

    /// The same, but each event must be one, and its line is handed on with its number.
    pub(super) fn read(&self, argv: &[&str], mut each: impl FnMut(usize, &str) -> Result<()>) -> Result<usize> {
        let (mut bytes, mut number) = (0, 0);
        let (mut open, mut last) = (Vec::new(), None);
        let mut line = |text: &[u8]| -> Result<()> {
            ensure!(last.is_none(), "something comes after the summary");
            match serde_json::from_slice(text).context("an event is no JSON of ours")? {
                Event::Line { line, .. } => {
                    each(number, &line)?;
                    number += 1;
                    bytes += text.len() + 1;
                }
                summary @ Event::Summary(_) => last = Some(summary),
            }
            Ok(())
        };
        self.connect()?.post("/exec/stream", argv, |piece| {
            for part in piece.split_inclusive(|byte| *byte == b'\n') {
                open.extend_from_slice(part);
                if let Some(whole) = open.strip_suffix(b"\n") {
                    line(whole)?;
                    open.clear();
                }
            }
            Ok(())
        })?;
        ensure!(open.is_empty(), "the answer does not end in a whole line");
        ended_well(&last.context("the answer has no summary")?)?;
        Ok(bytes)
    }
}

/// Everything else measures something else.
fn ended_well(last: &Event) -> Result<()> {
    match last {
        Event::Summary(summary) if summary.exit_code == 0 && !summary.timed_out => Ok(()),
        other => bail!("the stream ends with {other:?}"),
    }
}

/// A connection that is kept from one request to the next.
#[derive(Debug)]
pub(super) struct Connection {
    from: BufReader<TcpStream>,
    token: String,
}

impl Connection {
    /// The whole answer of `POST /exec`.
    pub(super) fn exec(&mut self, argv: &[&str]) -> Result<Value> {
        let mut answer = Vec::new();
        self.post("/exec", argv, |piece| {
            answer.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Hands the answer's body to `each` as it comes, without copying it.
    fn post(&mut self, path: &str, argv: &[&str], mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let body = json!({"argv": argv, "timeout_seconds": LIMIT.as_secs()}).to_string();
        let (token, length) = (&self.token, body.len());
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: exec\r\n{TOKEN_HEADER}: {token}\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.from.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let mut length = None;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            match header.split_once(": ") {
                Some(("content-length", value)) => length = Some(value.parse()?),
                Some(_) => {}
                None => break,
            }
        }
        match length {
            _ if !status.starts_with("HTTP/1.1 200 ") => bail!("the server answers {status}"),
            Some(length) => self.take(length, &mut each),
            // A stream has no length: it comes in chunks.
            None => loop {
                let size = usize::from_str_radix(&self.line()?, 16).context("the size of a chunk")?;
                self.take(size, &mut each)?;
                ensure!(self.line()?.is_empty(), "a chunk does not end where it says");
                if size == 0 {
                    return Ok(());
                }
            },
        }
    }

    fn take(&mut self, length: usize, each: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let here = self.from.fill_buf()?;
            let piece = &here[..here.len().min(left)];
            ensure!(!piece.is_empty(), "the server broke off");
            each(piece)?;
            let count = piece.len();
            left -= count;
            self.from.consume(count);
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        ensure!(line.ends_with("\r\n"), "the server broke off");
        Ok(line.trim_end().to_owned())
    }
}
