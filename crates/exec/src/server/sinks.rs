//! Where a program's output goes: into one bounded answer, or line by line to a client that reads along.

use bytes::Bytes;
use tokio::sync::mpsc;

use super::child::Sink;
use super::lines::Cutter;
use crate::protocol::Stream;

/// For `POST /exec`: keeps so much of each output and drops the rest, so that the program is never held back.
#[derive(Debug)]
pub struct Kept {
    max: usize,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stdout_truncated: bool,
    pub stderr_truncated: bool,
}

impl Kept {
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { max, stdout: Vec::new(), stderr: Vec::new(), stdout_truncated: false, stderr_truncated: false }
    }
}

impl Sink for Kept {
    async fn take(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        let (kept, truncated) = match stream {
            Stream::Stdout => (&mut self.stdout, &mut self.stdout_truncated),
            Stream::Stderr => (&mut self.stderr, &mut self.stderr_truncated),
        };
        let room = self.max - kept.len();
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        *truncated |= bytes.len() > room;
        true
    }

    /// The request's own future is dropped when its client goes.
    async fn gone(&mut self) {
        std::future::pending().await
    }
}

/// For `POST /exec/stream`: what one read brought goes out as one piece.
#[derive(Debug)]
pub struct Sent {
    out: mpsc::Sender<Bytes>,
    stdout: Cutter,
    stderr: Cutter,
}

impl Sent {
    #[must_use]
    pub fn new(out: mpsc::Sender<Bytes>, max_line: usize) -> Self {
        Self { out, stdout: Cutter::new(Stream::Stdout, max_line), stderr: Cutter::new(Stream::Stderr, max_line) }
    }

    /// The lines that have not ended, and then `last`.
    pub async fn close(mut self, last: impl FnOnce(&mut Vec<u8>)) {
        let mut rest = Vec::new();
        self.stdout.finish(&mut rest);
        self.stderr.finish(&mut rest);
        last(&mut rest);
        // A client that has gone needs no summary.
        let _gone = self.out.send(rest.into()).await;
    }
}

impl Sink for Sent {
    async fn take(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        // Events are longer than their lines by their frame; most lines are not short.
        let mut out = Vec::with_capacity(bytes.len() * 2);
        match stream {
            Stream::Stdout => self.stdout.push(bytes, &mut out),
            Stream::Stderr => self.stderr.push(bytes, &mut out),
        }
        out.is_empty() || self.out.send(out.into()).await.is_ok()
    }

    async fn gone(&mut self) {
        self.out.closed().await;
    }
}
