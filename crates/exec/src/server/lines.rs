//! Cuts what a program prints into lines and writes them as events, many at a time.

use std::borrow::Cow;

use crate::protocol::{CUT_MARK, Stream};

/// One of a program's two outputs on its way to the client.
#[derive(Debug)]
pub struct Cutter {
    /// `{"stream":"stdout","line":`
    head: &'static [u8],
    /// Most bytes of a line; what is beyond them is dropped up to the line's end.
    max: usize,
    /// The line that has not ended yet, never more than `max`.
    open: Vec<u8>,
    is_over: bool,
}

impl Cutter {
    #[must_use]
    pub fn new(stream: Stream, max: usize) -> Self {
        let head: &[u8] = match stream {
            Stream::Stdout => br#"{"stream":"stdout","line":"#,
            Stream::Stderr => br#"{"stream":"stderr","line":"#,
        };
        Self { head, max, open: Vec::new(), is_over: false }
    }

    /// Takes the next bytes; each line that ends in them is appended to `out` as one event.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(at) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(at);
            rest = &after[1..];
            if self.open.is_empty() && !self.is_over && line.len() <= self.max {
                // The usual case: the whole line is here, and is not copied before it is written.
                self.write(line, out);
            } else {
                self.keep(line);
                self.end(out);
            }
        }
        self.keep(rest);
    }

    /// The program has closed its end: what stands after the last line end is a line too.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if !self.open.is_empty() || self.is_over {
            self.end(out);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = self.max - self.open.len();
        self.open.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.is_over |= bytes.len() > room;
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        let mut line = std::mem::take(&mut self.open);
        if std::mem::take(&mut self.is_over) {
            // A character that was cut in two would be shown as damage that the program did not do.
            line.truncate(whole(&line));
            line.extend_from_slice(CUT_MARK.as_bytes());
        }
        self.write(&line, out);
        line.clear();
        self.open = line;
    }

    fn write(&self, line: &[u8], out: &mut Vec<u8>) {
        // To see that a line is text is much faster than to repair it, and most lines are.
        let text = std::str::from_utf8(line).map_or_else(|_| String::from_utf8_lossy(line), Cow::Borrowed);
        out.extend_from_slice(self.head);
        // Writing to memory cannot fail, and a text is always JSON.
        if serde_json::to_writer(&mut *out, &text).is_err() {
            out.extend_from_slice(b"\"\"");
        }
        out.extend_from_slice(b"}\n");
    }
}

/// How many of the bytes are left when a character that is cut in two at the end is taken off.
fn whole(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    match (tail..bytes.len()).rev().find(|at| bytes[*at] & 0xC0 != 0x80) {
        Some(at) if std::str::from_utf8(&bytes[at..]).is_err_and(|error| error.error_len().is_none()) => at,
        _ => bytes.len(),
    }
}

/// One line of ours, such as why a program did not start.
pub fn say(stream: Stream, text: &str, out: &mut Vec<u8>) {
    let mut cutter = Cutter::new(stream, usize::MAX);
    cutter.push(text.as_bytes(), out);
    cutter.finish(out);
}

/// The last line of a stream.
pub fn close(summary: &crate::protocol::Summary, out: &mut Vec<u8>) {
    // As above: memory, and numbers.
    if serde_json::to_writer(&mut *out, summary).is_ok() {
        out.push(b'\n');
    }
}
