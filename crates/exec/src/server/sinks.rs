//! Where a program's output goes: into one bounded answer, or line by line to a client that reads along.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::child::{Ended, Sink};
use super::connection::Client;
use super::lines::{self, Cutter};
use super::order::NotRun;
use crate::protocol::{Outcome, Stream, Summary};

/// For `POST /exec`: keeps so much of each output and drops the rest, so that the program is never held back.
#[derive(Debug)]
pub struct Kept {
    max: usize,
    client: Client,
    answer: oneshot::Sender<Outcome>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    stdout_truncated: bool,
    stderr_truncated: bool,
}

impl Kept {
    #[must_use]
    pub fn new(max: usize, client: Client, answer: oneshot::Sender<Outcome>) -> Self {
        let (stdout, stderr) = (Vec::new(), Vec::new());
        Self { max, client, answer, stdout, stderr, stdout_truncated: false, stderr_truncated: false }
    }

    /// Answers with what was kept, or, where the program did not run, with why.
    pub fn close(self, ended: Result<Ended, NotRun>) {
        let mut outcome = Outcome {
            exit_code: 0,
            stdout: text(self.stdout, self.stdout_truncated),
            stderr: text(self.stderr, self.stderr_truncated),
            stdout_truncated: self.stdout_truncated,
            stderr_truncated: self.stderr_truncated,
            duration_ms: 0,
            timed_out: false,
        };
        match ended {
            Ok(ended) => {
                outcome.exit_code = ended.exit_code;
                outcome.duration_ms = ended.duration_ms();
                outcome.timed_out = ended.timed_out;
            }
            Err(NotRun { exit_code, why }) => {
                outcome.exit_code = exit_code;
                outcome.stderr = why;
            }
        }
        // A client that has gone needs no answer.
        let _gone = self.answer.send(outcome);
    }
}

/// A character that the limit has cut in two is taken off: it would be shown as damage that the program did not do.
fn text(mut bytes: Vec<u8>, is_truncated: bool) -> String {
    if is_truncated {
        let tail = bytes.len().saturating_sub(3);
        if let Some(at) = (tail..bytes.len()).rev().find(|at| bytes[*at] & 0xC0 != 0x80)
            && std::str::from_utf8(&bytes[at..]).is_err_and(|error| error.error_len().is_none())
        {
            bytes.truncate(at);
        }
    }
    // The usual case is not copied.
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
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

    async fn gone(&mut self) {
        tokio::select! {
            () = self.client.gone() => {}
            () = self.answer.closed() => {}
        }
    }
}

/// For `POST /exec/stream`: what one read brought goes out as one piece.
#[derive(Debug)]
pub struct Sent {
    client: Client,
    out: mpsc::Sender<Bytes>,
    stdout: Cutter,
    stderr: Cutter,
}

impl Sent {
    #[must_use]
    pub fn new(out: mpsc::Sender<Bytes>, client: Client, max_line: usize) -> Self {
        Self {
            client,
            out,
            stdout: Cutter::new(Stream::Stdout, max_line),
            stderr: Cutter::new(Stream::Stderr, max_line),
        }
    }

    /// The lines that have not ended, or why the program did not run, and then the summary.
    pub async fn close(mut self, ended: Result<Ended, NotRun>) {
        let mut rest = Vec::new();
        self.stdout.finish(&mut rest);
        self.stderr.finish(&mut rest);
        let summary = match ended {
            Ok(ended) => Summary {
                exit_code: ended.exit_code,
                duration_ms: ended.duration_ms(),
                timed_out: ended.timed_out,
                client_aborted: ended.client_gone,
            },
            Err(NotRun { exit_code, why }) => {
                lines::say(Stream::Stderr, &why, &mut rest);
                Summary { exit_code, duration_ms: 0, timed_out: false, client_aborted: false }
            }
        };
        lines::close(&summary, &mut rest);
        // A client that has gone needs no summary, and one that takes nothing is given up with its connection.
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
        tokio::select! {
            () = self.client.gone() => {}
            () = self.out.closed() => {}
        }
    }
}
