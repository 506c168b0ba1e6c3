//! Output for people: aligned, coloured only on a terminal, times in the local zone.

use std::io::{self, Write};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use replank_core::words::{Millis, Version};
use serde_json::Value;

use crate::http::row::Row;
use crate::plain;

/// How this process may write.
#[derive(Debug, Clone)]
pub struct Style {
    pub colours: bool,
    pub zone: TimeZone,
}

impl Style {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    pub fn good(&self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn bad(&self, text: &str) -> String {
        self.paint("31", text)
    }

    pub fn busy(&self, text: &str) -> String {
        self.paint("36", text)
    }

    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn state(&self, state: &str) -> String {
        match state {
            "succeeded" | "rolled_back" => self.good(state),
            "failed_pre" | "failed_rollout" | "rollback_failed" => self.bad(state),
            "idle" => state.to_owned(),
            _ => self.busy(state),
        }
    }

    /// A time of the wire in the local zone with its offset; what is no time is shown as it is.
    pub fn time(&self, text: &str) -> String {
        match text.parse::<Timestamp>() {
            Ok(at) => at.to_zoned_datetime(self.zone.clone()).strftime("%Y-%m-%d %H:%M:%S %:z").to_string(),
            Err(_) => plain::line(text, false),
        }
    }

    pub fn millis(&self, at: Option<Millis>) -> String {
        at.map(|at| self.time(&at.rfc3339())).unwrap_or_else(|| "never".to_owned())
    }
}

/// `1 image`, `2 images`.
pub fn count(n: usize, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

/// Seconds as `4 s`, `1 min 5 s`, `2 h 3 min`.
pub fn seconds(s: u64) -> String {
    match (s / 3_600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, 0) => format!("{m} min"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// Columns as wide as their widest cell. Cells must not be coloured.
pub fn table(out: &mut dyn Write, rows: &[Vec<String>]) -> io::Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  ", width = *width));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn short(sha: &str) -> &str {
    sha.get(..12).unwrap_or(sha)
}

/// What runs is the newest release, or is made of it: a commit target counts as its base release (contract §1).
fn is_newest(row: &Row) -> bool {
    let base = |text: &str| text.parse::<Version>().ok().map(|version| version.base());
    let latest = base(&row.latest_version);
    latest.is_some() && latest <= base(&row.running_version)
}

pub fn status(out: &mut dyn Write, row: &Row, style: &Style) -> io::Result<()> {
    let clean = |text: &str| plain::line(text, false);
    let mut say = |name: &str, value: String| -> io::Result<()> {
        if value.is_empty() { Ok(()) } else { writeln!(out, "{} {value}", style.dim(&format!("{name:<12}"))) }
    };
    say("application", clean(&row.application))?;
    let running = match (row.running_version.as_str(), row.running_revision.as_str()) {
        ("", _) => "nothing yet".to_owned(),
        (version, "") => clean(version),
        (version, revision) => format!("{version} ({}, revision {})", clean(short(&row.running_sha)), clean(revision)),
    };
    say("running", running)?;
    say(
        "latest",
        match (row.latest_version.as_str(), row.latest_checked_at.as_str()) {
            ("", "") => "never looked".to_owned(),
            ("", at) => format!("no release found, looked at {}", style.time(at)),
            (version, at) => {
                let newest = if is_newest(row) { ", what runs is the newest" } else { "" };
                format!("{} ({}){newest}, looked at {}", clean(version), clean(short(&row.latest_sha)), style.time(at))
            }
        },
    )?;
    say("remote", clean(&row.git_remote))?;
    say("state", style.state(&clean(&row.state)))?;
    if row.failure.is_empty() {
        say("", clean(&row.phase_detail))?;
    } else {
        say("why", clean(&row.failure))?;
        say("what to do", clean(&row.advice))?;
    }
    if !row.job_id.is_empty() {
        let by = if row.started_by.is_empty() { &row.started_by_oid } else { &row.started_by };
        let reason = if row.reason.is_empty() { String::new() } else { format!(" — {}", clean(&row.reason)) };
        say("job", format!("{} to {}, by {}{reason}", clean(&row.job_id), clean(&row.target_version), clean(by)))?;
        say("started", style.time(&row.started_at))?;
    }
    if !row.confirm_deadline.is_empty() {
        say("confirm by", style.time(&row.confirm_deadline))?;
    }
    // At rest there is only housekeeping, which is nobody's concern.
    if !super::watch::at_rest(&row.state) {
        say("next", clean(&row.next_action))?;
    }
    if !row.next_deadline.is_empty() {
        say("until", style.time(&row.next_deadline))?;
    }
    for (at, sentence) in row.drift.iter().enumerate() {
        let accepted = if row.drift_accepted { " (accepted)" } else { "" };
        say(if at == 0 { "drift" } else { "" }, format!("{}{accepted}", clean(sentence)))?;
    }
    if !row.rollback_closed.is_empty() {
        let why = clean(&row.rollback_closed);
        say("rollback", format!("closed, as {why}: restore the data, then `replank rollback --data-restored`"))?;
    } else if !row.rollback_available_until.is_empty() {
        say("rollback", format!("possible until {}", style.time(&row.rollback_available_until)))?;
    }
    Ok(())
}

pub fn candidates(out: &mut dyn Write, found: &Value, style: &Style) -> io::Result<()> {
    let text = |value: &Value, name: &str| plain::line(value[name].as_str().unwrap_or_default(), false);
    let empty = Vec::new();
    let list = |name: &str| found[name].as_array().unwrap_or(&empty);
    if found["configured"] == false {
        return writeln!(out, "no git remote is configured; add [source] to replank.toml");
    }
    // It is so whether the remote answers or not.
    let commits = found["commits_refused"].as_str().map(|why| plain::line(why, false));
    let tell_commits = |out: &mut dyn Write| match &commits {
        Some(why) => writeln!(out, "commits cannot be started: {why}"),
        None => Ok(()),
    };
    if let Some(error) = found["error"].as_str() {
        writeln!(out, "{} {}", style.bad("the remote cannot be read:"), plain::line(error, false))?;
        return tell_commits(out);
    }
    let running = text(found, "running_version");
    let offered = list("candidates");
    let than = if running.is_empty() { String::new() } else { format!(" newer than {running}") };
    if offered.is_empty() {
        let remote = if running.is_empty() {
            format!("no release at {}", text(found, "remote"))
        } else {
            format!("nothing{than}")
        };
        writeln!(out, "{remote}")?;
    } else {
        writeln!(out, "{}{than}:", count(offered.len(), "release"))?;
        let row = |c: &Value| vec![format!("  {}", text(c, "name")), short(&text(c, "commit_sha")).to_owned()];
        table(out, &offered.iter().map(row).collect::<Vec<_>>())?;
    }
    let refused = list("refused");
    if !refused.is_empty() {
        writeln!(out, "{} refused:", count(refused.len(), "release"))?;
        let row = |c: &Value| vec![format!("  {}", text(c, "name")), text(c, "refused")];
        table(out, &refused.iter().map(row).collect::<Vec<_>>())?;
    }
    tell_commits(out)
}

pub fn quarantine(out: &mut dyn Write, found: &Value, style: &Style) -> io::Result<()> {
    let entries = found["quarantine"].as_array().map(Vec::as_slice).unwrap_or_default();
    if entries.is_empty() {
        return writeln!(out, "nothing is quarantined");
    }
    let row = |entry: &Value| {
        let text = |name: &str| plain::line(entry[name].as_str().unwrap_or_default(), false);
        vec![text("version"), short(&text("commit_sha")).to_owned(), style.time(&text("at")), text("reason")]
    };
    let mut rows = vec![["VERSION", "COMMIT", "SINCE", "WHY"].map(str::to_owned).to_vec()];
    rows.extend(entries.iter().map(row));
    table(out, &rows)
}

pub fn drift(out: &mut dyn Write, row: &Row, style: &Style) -> io::Result<()> {
    if row.drift.is_empty() {
        return writeln!(out, "what runs is what was recorded");
    }
    writeln!(out, "what runs is not what was recorded, since {}:", style.time(&row.drift_since))?;
    for sentence in &row.drift {
        writeln!(out, "  {}", plain::line(sentence, false))?;
    }
    if row.drift_accepted {
        writeln!(out, "accepted: an upgrade may start, and makes everything what was chosen")
    } else {
        writeln!(out, "no upgrade starts until it is put right, or accepted with `replank drift --accept --reason WHY`")
    }
}

pub fn refusals(out: &mut dyn Write, refusals: &[Value], style: &Style) -> io::Result<()> {
    if refusals.is_empty() {
        return writeln!(out, "nothing was refused");
    }
    let row = |refusal: &Value| {
        let text = |name: &str| plain::line(refusal[name].as_str().unwrap_or_default(), false);
        let who = [text("name"), text("actor"), "nobody".to_owned()].into_iter().find(|who| !who.is_empty());
        vec![style.time(&text("ts")), who.unwrap_or_default(), text("from"), text("action"), text("why")]
    };
    let mut rows = vec![["TIME", "WHO", "FROM", "WHAT", "WHY NOT"].map(str::to_owned).to_vec()];
    rows.extend(refusals.iter().map(row));
    table(out, &rows)
}

pub fn history(out: &mut dyn Write, events: &[Value], style: &Style) -> io::Result<()> {
    if events.is_empty() {
        return writeln!(out, "nothing has happened yet");
    }
    let row = |event: &Value| {
        let mut detail = Vec::new();
        for (name, value) in event.as_object().into_iter().flatten() {
            if !matches!(name.as_str(), "ts" | "job_id" | "event" | "prev_hash")
                && *value != Value::String(String::new())
            {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                detail.push(format!("{}={}", plain::line(name, false), plain::line(&value, false)));
            }
        }
        let text = |name: &str| plain::line(event[name].as_str().unwrap_or_default(), false);
        vec![style.time(event["ts"].as_str().unwrap_or_default()), text("job_id"), text("event"), detail.join(" ")]
    };
    table(out, &events.iter().map(row).collect::<Vec<_>>())
}
