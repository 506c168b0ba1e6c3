//! Follows a job to its end: live bars on a terminal, plain lines elsewhere, and through a change of the service itself.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::client::Client;
use super::failure::{Code, Failure};
use super::show::{Style, seconds};
use crate::http::row::Row;
use crate::plain::{self, Lines};

/// First and longest wait before a new connection.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(3));
/// One event is a row: a few kilobytes. A stream that sends no end of an event is not ours.
const EVENT_MAX: usize = 1024 * 1024;
/// Lines of a failed build's log that are shown.
const TAIL_LINES: usize = 20;

/// How a job is shown while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// Bars on standard error.
    Bars,
    Lines,
    /// One JSON object a line: the rows as they come.
    Json,
}

pub fn at_rest(state: &str) -> bool {
    matches!(state, "idle" | "succeeded" | "failed_pre" | "failed_rollout" | "rolled_back" | "rollback_failed")
}

/// Parses `text/event-stream` in any chunks; gives the data of `status` and `trouble` events.
#[derive(Debug, Default)]
struct Parser {
    pending: Vec<u8>,
}

impl Parser {
    fn push(&mut self, bytes: &[u8]) -> Result<Vec<(String, String)>, Failure> {
        self.pending.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.pending.windows(2).position(|w| w == b"\n\n") {
            let block: Vec<u8> = self.pending.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&block);
            let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().to_owned());
            if let Some(data) = field("data:") {
                events.push((field("event:").unwrap_or_default(), data));
            }
        }
        if self.pending.len() > EVENT_MAX {
            return Err(Failure::new(Code::Failed, "the service sent an event without an end; check --url"));
        }
        Ok(events)
    }
}

/// Watches the job until it rests. Ctrl-C and the time limit end the watching, never the job.
pub async fn watch(client: &Client, job: &str, face: Face, style: &Style, limit: Duration) -> Result<Row, Failure> {
    let mut screen = Screen::new(face, style.clone());
    // Caught before anything is shown: whoever sees that it watches may press Ctrl-C.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = tokio::select! {
        ended = follow(client, job, &mut screen) => ended,
        _ = interrupt.recv() => Err(Failure::new(
            Code::Interrupted,
            format!("stopped watching; job {job} goes on. See `replank status --watch`, or end it with `replank cancel`"),
        )),
        () = tokio::time::sleep(limit) => Err(Failure::new(
            Code::TimedOut,
            format!("stopped watching after {}; job {job} goes on. See `replank status --watch`", seconds(limit.as_secs())),
        )),
    };
    screen.close();
    let row = ended?;
    if face != Face::Json && matches!(row.state.as_str(), "failed_pre") {
        for component in &screen.unfinished {
            tail(client, job, component, style).await?;
        }
    }
    Ok(row)
}

async fn follow(client: &Client, job: &str, screen: &mut Screen) -> Result<Row, Failure> {
    let mut wait = BACKOFF.0;
    loop {
        let lost = match client.stream("/api/upgrade/events").await {
            Err(failure) => failure,
            Ok(mut chunks) => {
                let mut parser = Parser::default();
                loop {
                    let bytes = match chunks.next_beat().await {
                        Ok(Some(bytes)) => bytes,
                        Ok(None) => {
                            break Failure::new(Code::Unreachable, "the service ended the stream");
                        }
                        Err(failure) => break failure,
                    };
                    for (event, data) in parser.push(&bytes)? {
                        if event == "trouble" {
                            screen.note("the service cannot read its own state now; waiting")?;
                        }
                        let Some(row) = (event == "status").then(|| serde_json::from_str::<Row>(&data).ok()).flatten()
                        else {
                            continue;
                        };
                        wait = BACKOFF.0;
                        screen.connected()?;
                        if row.job_id != job {
                            let message = format!("job {job} is over and another one began; see `replank history`");
                            return Err(Failure::new(Code::Failed, message));
                        }
                        screen.show(&row, &data)?;
                        if at_rest(&row.state) {
                            return Ok(row);
                        }
                    }
                }
            }
        };
        // No sign-in will come of waiting, and a wrong address either; a service that is being replaced comes back.
        if !matches!(lost.code, Code::Unreachable) {
            return Err(lost);
        }
        screen.lost(&lost)?;
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

async fn tail(client: &Client, job: &str, component: &str, style: &Style) -> Result<(), Failure> {
    let mut lines = Lines::default();
    let mut last = std::collections::VecDeque::new();
    let mut keep = |line: &str| {
        last.push_back(plain::line(line, style.colours));
        if last.len() > TAIL_LINES {
            last.pop_front();
        }
    };
    let Ok(mut chunks) = client.stream(&format!("/api/upgrade/jobs/{job}/build-log/{component}")).await else {
        return Ok(());
    };
    while let Ok(Some(bytes)) = chunks.next().await {
        lines.push(&bytes, &mut keep);
    }
    lines.finish(&mut keep);
    if last.is_empty() {
        return Ok(());
    }
    let mut err = io::stderr().lock();
    writeln!(
        err,
        "{}",
        style.dim(&format!("end of the log of {component} (all of it: replank logs {component} --job {job}):"))
    )?;
    for line in last {
        writeln!(err, "  {line}")?;
    }
    Ok(())
}

struct Screen {
    face: Face,
    style: Style,
    bars: Option<Bars>,
    state: String,
    since: Instant,
    built: BTreeMap<String, bool>,
    /// Components that were being built when last seen.
    unfinished: Vec<String>,
    is_lost: bool,
    last_json: String,
}

struct Bars {
    all: MultiProgress,
    whole: ProgressBar,
    components: BTreeMap<String, ProgressBar>,
}

fn bar_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─")
}

impl Screen {
    fn new(face: Face, style: Style) -> Self {
        let bars = (face == Face::Bars).then(|| {
            let all = MultiProgress::new();
            let whole = all.add(ProgressBar::new(100));
            whole.set_style(bar_style("{spinner} {prefix:<14} {bar:30} {percent:>3}%  {wide_msg}"));
            whole.enable_steady_tick(Duration::from_millis(120));
            Bars { all, whole, components: BTreeMap::new() }
        });
        let (state, since) = (String::new(), Instant::now());
        let (built, unfinished) = (BTreeMap::new(), Vec::new());
        Self { face, style, bars, state, since, built, unfinished, is_lost: false, last_json: String::new() }
    }

    fn note(&self, text: &str) -> io::Result<()> {
        match (&self.bars, self.face) {
            (Some(bars), _) => bars.all.println(text),
            (None, Face::Json) => Ok(()),
            (None, _) => writeln!(io::stderr(), "{text}"),
        }
    }

    fn lost(&mut self, why: &Failure) -> io::Result<()> {
        if let Some(bars) = &self.bars {
            bars.whole.set_message("the service is away, perhaps being replaced; trying again");
        }
        if std::mem::replace(&mut self.is_lost, true) {
            return Ok(());
        }
        self.note(&format!("{why}; the job goes on, trying again"))
    }

    fn connected(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.is_lost) { self.note("connected again") } else { Ok(()) }
    }

    fn show(&mut self, row: &Row, data: &str) -> io::Result<()> {
        if self.face == Face::Json {
            if data != self.last_json {
                data.clone_into(&mut self.last_json);
                let mut out = io::stdout().lock();
                writeln!(out, "{data}")?;
                return out.flush();
            }
            return Ok(());
        }
        if row.state != self.state {
            if !self.state.is_empty() {
                let took = seconds(self.since.elapsed().as_secs());
                self.note(&format!("{} {} {}", self.style.good("✓"), self.state, self.style.dim(&took)))?;
            }
            row.state.clone_into(&mut self.state);
            self.since = Instant::now();
            if self.bars.is_none() && !at_rest(&row.state) {
                self.note(&format!("  {} {}", row.state, plain::line(&row.phase_detail, false)))?;
            }
        }
        if row.state == "building" {
            let building = row.components.iter().filter(|(_, c)| c.state == "building");
            self.unfinished = building.map(|(name, _)| name.clone()).collect();
        }
        for (name, component) in &row.components {
            if component.state == "built" && self.built.insert(name.clone(), true).is_none() && self.bars.is_none() {
                self.note(&format!("  {name} is built"))?;
            }
        }
        if let Some(bars) = &mut self.bars {
            bars.show(row);
        }
        Ok(())
    }

    fn close(&mut self) {
        if let Some(bars) = &self.bars {
            bars.components.values().chain([&bars.whole]).for_each(ProgressBar::finish_and_clear);
        }
    }
}

impl Bars {
    fn show(&mut self, row: &Row) {
        self.whole.set_prefix(row.state.clone());
        self.whole.set_position(row.phase_progress.into());
        self.whole.set_message(plain::line(&row.phase_detail, false));
        for (name, component) in &row.components {
            let bar = self.components.entry(name.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(1));
                bar.set_style(bar_style("  {prefix:<14} {bar:30} {pos}/{len}  {wide_msg}"));
                bar.set_prefix(name.clone());
                bar
            });
            bar.set_length(u64::from(component.total.max(1)));
            if component.state == "built" {
                bar.set_position(u64::from(component.total.max(1)));
                bar.set_message("built");
            } else {
                bar.set_position(component.done.into());
                bar.set_message(plain::line(&component.step, false));
            }
        }
        if row.state != "building" {
            std::mem::take(&mut self.components).values().for_each(ProgressBar::finish_and_clear);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_do_not_depend_on_chunks() {
        let text = b"retry: 1000\nevent: status\nid: 1\ndata: {\"a\":1}\n\n: beat\n\nevent: trouble\ndata: x\n\n";
        for size in 1..text.len() {
            let mut parser = Parser::default();
            let events: Vec<_> = text.chunks(size).flat_map(|c| parser.push(c).expect("bounded")).collect();
            let expect = [("status", "{\"a\":1}"), ("trouble", "x")].map(|(e, d)| (e.to_owned(), d.to_owned()));
            assert_eq!(events, expect, "in chunks of {size}");
        }
    }
}
