//! Turns BuildKit's status messages into log lines and step counts, in bounded memory whatever a build prints.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bollard::moby::buildkit::v1::{StatusResponse, Vertex};
use replank_core::ports::{Log, Progress, Stream};

use super::hide::Hide;

/// A line without an end is cut into pieces of this size, so that a build that never ends a line still shows.
const LINE_MAX: usize = 64 * 1024;
/// Steps that are followed; a Dockerfile has tens.
const STEPS_MAX: usize = 4_000;
/// Lines of a step's output that an error quotes, and how long each may be.
const TAIL_LINES: usize = 8;
const TAIL_LINE_MAX: usize = 160;
/// A step's name in lines and progress.
const NAME_MAX: usize = 400;

#[derive(Debug, Default)]
struct Step {
    number: usize,
    name: String,
    begun: Option<Duration>,
    over: bool,
    /// Of stdout and stderr: bytes that may begin a secret, and the line so far.
    streams: [Partial; 2],
    tail: VecDeque<String>,
    /// Downloads and exports that were already said to have begun or ended.
    told: HashMap<String, bool>,
}

#[derive(Debug, Default)]
struct Partial {
    held: Vec<u8>,
    line: Vec<u8>,
}

/// The step that ended a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) step: String,
    /// As BuildKit says it, without secrets.
    pub(super) error: String,
    pub(super) tail: Vec<String>,
}

pub(super) struct Tracker<'a> {
    log: &'a dyn Log,
    hide: &'a Hide,
    steps: HashMap<String, Step>,
    done: u32,
    failed: Option<String>,
    error: String,
}

impl<'a> Tracker<'a> {
    pub(super) fn new(log: &'a dyn Log, hide: &'a Hide) -> Self {
        Self { log, hide, steps: HashMap::new(), done: 0, failed: None, error: String::new() }
    }

    fn say(&self, text: &str) {
        self.log.write(Stream::Stdout, self.hide.text(&format!("{text}\n")).as_bytes());
    }

    pub(super) fn take(&mut self, status: StatusResponse) {
        for vertex in status.vertexes {
            self.vertex(vertex);
        }
        for s in status.statuses {
            let Some(step) = self.steps.get_mut(&s.vertex) else { continue };
            if step.told.len() >= STEPS_MAX {
                continue;
            }
            let over = s.completed.is_some();
            let before = step.told.insert(s.id.clone(), over);
            if before.is_none() || (over && before == Some(false)) {
                let number = step.number;
                let name: String = s.id.chars().take(NAME_MAX).collect();
                self.say(&format!("#{number} {name}{}", if over { " done" } else { "" }));
            }
        }
        for entry in status.logs {
            let stream = if entry.stream == 2 { Stream::Stderr } else { Stream::Stdout };
            self.output(&entry.vertex, stream, &entry.msg);
        }
    }

    fn vertex(&mut self, vertex: Vertex) {
        if !self.steps.contains_key(&vertex.digest) {
            if self.steps.len() >= STEPS_MAX {
                return;
            }
            let name = vertex.name.chars().take(NAME_MAX).collect();
            let number = self.steps.len() + 1;
            self.steps.insert(vertex.digest.clone(), Step { number, name, ..Step::default() });
        }
        let started = vertex.started.map(|t| since_epoch(t.seconds, t.nanos));
        let completed = vertex.completed.map(|t| since_epoch(t.seconds, t.nanos));
        let Some(step) = self.steps.get_mut(&vertex.digest) else { return };
        let (number, name) = (step.number, step.name.clone());
        let begins = started.is_some() && step.begun.is_none();
        if begins {
            step.begun = started;
        }
        // A vertex can be reported again after its end, for instance once for its cache and once for its result.
        let ends = completed.is_some() && !step.over;
        let took = completed.zip(step.begun).map_or(Duration::ZERO, |(end, begun)| end.saturating_sub(begun));
        if begins {
            self.say(&format!("#{number} {name}"));
        }
        if ends {
            self.flush(&vertex.digest);
            if let Some(step) = self.steps.get_mut(&vertex.digest) {
                step.over = true;
            }
            self.done += 1;
            if !vertex.error.is_empty() {
                self.say(&format!("#{number} ERROR after {:.1}s: {}", took.as_secs_f64(), vertex.error));
                // The first to fail is the cause: the others are cancelled because of it.
                if self.failed.is_none() {
                    self.failed = Some(vertex.digest.clone());
                    self.error = vertex.error;
                }
            } else if vertex.cached {
                self.say(&format!("#{number} CACHED"));
            } else {
                self.say(&format!("#{number} DONE {:.1}s", took.as_secs_f64()));
            }
        }
        if begins || ends {
            let total = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
            let step = self.hide.text(&name).into_owned();
            self.log.progress(Progress { done: self.done.min(total), total, step });
        }
    }

    fn output(&mut self, digest: &str, stream: Stream, bytes: &[u8]) {
        let Some(step) = self.steps.get_mut(digest) else {
            return;
        };
        let prefix = format!("#{} ", step.number);
        let partial = &mut step.streams[usize::from(stream == Stream::Stderr)];
        let mut clear = Vec::with_capacity(bytes.len());
        self.hide.pass(&mut partial.held, bytes, &mut clear);
        let mut out = Vec::with_capacity(clear.len() + prefix.len());
        for piece in clear.split_inclusive(|b| *b == b'\n') {
            for piece in piece.chunks(LINE_MAX) {
                partial.line.extend_from_slice(piece);
                if partial.line.len() >= LINE_MAX || piece.ends_with(b"\n") {
                    emit(&prefix, &mut partial.line, &mut step.tail, &mut out);
                }
            }
        }
        if !out.is_empty() {
            self.log.write(stream, &out);
        }
    }

    /// Writes out what of a step's output had no line end yet.
    fn flush(&mut self, digest: &str) {
        let Some(step) = self.steps.get_mut(digest) else { return };
        let prefix = format!("#{} ", step.number);
        for (partial, stream) in step.streams.iter_mut().zip([Stream::Stdout, Stream::Stderr]) {
            let held = std::mem::take(&mut partial.held);
            partial.line.extend_from_slice(&held);
            if !partial.line.is_empty() {
                let mut out = Vec::new();
                emit(&prefix, &mut partial.line, &mut step.tail, &mut out);
                self.log.write(stream, &out);
            }
        }
    }

    /// Ends the log of a build.
    pub(super) fn finish(&mut self) {
        let all: Vec<String> = self.steps.keys().cloned().collect();
        for digest in all {
            self.flush(&digest);
        }
    }

    pub(super) fn failed(&self) -> Option<Failed> {
        let step = self.steps.get(self.failed.as_ref()?)?;
        Some(Failed {
            step: self.hide.text(&step.name).into_owned(),
            error: self.hide.text(&self.error).into_owned(),
            tail: step.tail.iter().map(|line| self.hide.text(line).into_owned()).collect(),
        })
    }

    /// References of base images, as the steps' names give them: `[build 1/3] FROM docker.io/library/alpine@sha256:…`.
    pub(super) fn bases(&self) -> Vec<String> {
        let mut all: Vec<String> =
            self.steps.values().filter_map(|step| base_of(&step.name)).map(str::to_owned).collect();
        all.sort();
        all.dedup();
        all
    }
}

/// Only the words right behind the bracket count: what follows an instruction's name is the release's own text.
fn base_of(name: &str) -> Option<&str> {
    let (_, instruction) = name.strip_prefix('[')?.split_once("] ")?;
    instruction.strip_prefix("FROM ")?.split_whitespace().next()
}

fn emit(prefix: &str, line: &mut Vec<u8>, tail: &mut VecDeque<String>, out: &mut Vec<u8>) {
    out.extend_from_slice(prefix.as_bytes());
    out.extend_from_slice(line);
    if !line.ends_with(b"\n") {
        out.push(b'\n');
    }
    // Cut before it is decoded: most of a long line would be thrown away anyway.
    let short = &line[..line.len().min(TAIL_LINE_MAX * 4)];
    let text: String = String::from_utf8_lossy(short.trim_ascii()).chars().take(TAIL_LINE_MAX).collect();
    if !text.is_empty() {
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
    line.clear();
}

fn since_epoch(seconds: i64, nanos: i32) -> Duration {
    Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanos).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bollard::moby::buildkit::v1::VertexLog;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Lines(Mutex<Vec<u8>>);

    impl Log for Lines {
        fn write(&self, _: Stream, bytes: &[u8]) {
            self.0.lock().expect("lock").extend_from_slice(bytes);
        }
        fn progress(&self, _: Progress) {}
    }

    fn log(msg: &[u8]) -> StatusResponse {
        let logs = vec![VertexLog { vertex: "v".to_owned(), stream: 1, msg: msg.to_vec(), ..VertexLog::default() }];
        StatusResponse { logs, ..StatusResponse::default() }
    }

    #[test]
    fn output_is_cut_into_lines_and_bounded() {
        let lines = Lines::default();
        let hide = Hide::new([&b"geheim"[..]]);
        let mut tracker = Tracker::new(&lines, &hide);
        let vertex = Vertex { digest: "v".to_owned(), name: "[1/2] RUN x".to_owned(), ..Vertex::default() };
        tracker.take(StatusResponse { vertexes: vec![vertex], ..StatusResponse::default() });
        for chunk in [&b"one\ntw"[..], b"o\nge", b"heim\n\xff\xfe"] {
            tracker.take(log(chunk));
        }
        for _ in 0..10 {
            tracker.take(log(&vec![b'x'; LINE_MAX]));
            assert!(tracker.steps["v"].streams[0].line.len() < LINE_MAX);
        }
        tracker.finish();
        let text = lines.0.into_inner().expect("lock");
        assert!(
            text.starts_with(b"#1 one\n#1 two\n#1 ***\n#1 \xff\xfexxx"),
            "{:?}",
            String::from_utf8_lossy(&text[..60])
        );
        assert_eq!(text.iter().filter(|b| **b == b'x').count(), 10 * LINE_MAX, "nothing is dropped");
    }

    #[test]
    fn bases_are_read_from_step_names() {
        for (name, expect) in [
            ("[1/3] FROM docker.io/library/alpine@sha256:ab", Some("docker.io/library/alpine@sha256:ab")),
            ("[build 1/3] FROM docker.io/library/base:1", Some("docker.io/library/base:1")),
            ("[2/3] COPY a FROM b", None),
            ("[internal] load metadata for docker.io/library/base:1", None),
            // A release's author who would have another base recorded than was used.
            ("[2/3] RUN echo '[1/1] FROM docker.io/library/trusted@sha256:ab'", None),
            ("[2/3] RUN [1/3] FROM docker.io/library/trusted@sha256:ab", None),
            ("[2/3] COPY [a] FROM b /", None),
            ("RUN x] FROM docker.io/library/trusted@sha256:ab", None),
        ] {
            assert_eq!(base_of(name), expect, "{name}");
        }
    }
}
