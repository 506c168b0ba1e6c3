//! `replank plan` as it is typed and shown, and its short form before a start is confirmed.

use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use clap::Args;

use super::client::Client;
use super::commands::{Done, Run};
use super::failure::{Code, Failure};
use super::show::{self, Style, seconds};
use crate::engine::planned::{Check, PlanRequest, UpgradePlan};
use crate::plain;

pub const HELP: &str = "\
Exit codes:
  0  a start would not be refused
  3  a start would be refused; the plan says why

Examples:
  replank plan                  the newest release
  replank plan 1.4.0 --json     for scripts
  replank plan 1.4.0 --accept-one-way";

/// Commits and changes that are shown to people; --json has all of them.
const SHOWN_MAX: usize = 20;

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Release to plan for, such as 1.4.0 [default: the newest]
    #[arg(value_name = "VERSION", conflicts_with = "commit")]
    pub release: Option<String>,
    /// Full id of a commit of the tracking branch
    #[arg(long, value_name = "SHA")]
    pub commit: Option<String>,
    /// Plan for `replank start` with this flag: images are built and pushed, and nothing that runs is touched
    #[arg(long)]
    pub build_only: bool,
    /// The same: a commit that failed before is started
    #[arg(long)]
    pub override_quarantine: bool,
    /// The same: a release is started after which the version before it cannot use the data
    #[arg(long)]
    pub accept_one_way: bool,
}

async fn fetch(client: &Client, request: &PlanRequest) -> Result<UpgradePlan, Failure> {
    let mut query = Vec::new();
    for (name, value) in [("target_version", &request.target_version), ("target_sha", &request.target_sha)] {
        if let Some(value) = value {
            // A word with anything else in it is no version and no commit, and the service is not asked about it.
            if value.is_empty() || !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                return Err(Failure::usage(format!("{value:?} is neither a version nor a commit")));
            }
            query.push(format!("{name}={value}"));
        }
    }
    for (name, on) in [
        ("build_only", request.build_only),
        ("override_quarantine", request.override_quarantine),
        ("accept_one_way", request.accept_one_way),
    ] {
        query.extend(on.then(|| format!("{name}=true")));
    }
    client.get(&format!("/api/upgrade/plan?{}", query.join("&"))).await
}

impl Run<'_> {
    pub(super) async fn plan(&self, args: PlanArgs) -> Done {
        let request = PlanRequest {
            target_version: args.release,
            target_sha: args.commit,
            build_only: args.build_only,
            override_quarantine: args.override_quarantine,
            accept_one_way: args.accept_one_way,
        };
        let plan = fetch(&self.client()?, &request).await?;
        let value = serde_json::to_value(&plan).unwrap_or_default();
        self.print(&value, |out, style| show_plan(out, &plan, style))?;
        Ok(if plan.refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(Code::Refused as u8) })
    }

    /// Before somebody is asked: what closes, what stands still, and what would be refused. Scripts, which are not asked, are not
    /// told either.
    pub(super) async fn tell_before(
        &self,
        client: &Client,
        args: &super::Start,
        version: Option<&str>,
    ) -> Result<(), Failure> {
        if !io::stdin().is_terminal() {
            return Ok(());
        }
        let request = PlanRequest {
            target_version: version.map(str::to_owned),
            target_sha: args.commit.clone(),
            build_only: args.build_only,
            override_quarantine: args.override_quarantine,
            accept_one_way: args.accept_one_way,
        };
        // A service that cannot plan may still start; it will say what stands against that.
        let Ok(plan) = fetch(client, &request).await else { return Ok(()) };
        if let Some(why) = plan.refused.first() {
            return Err(Failure::new(Code::Refused, plain::line(why, false)));
        }
        let mut err = io::stderr().lock();
        if !plan.data.closes.is_empty() {
            writeln!(
                err,
                "One-way: {}. A rollback then needs {}.",
                clean(&plan.data.closes),
                clean(&plan.data.rollback)
            )?;
        }
        writeln!(
            err,
            "Interruption: {}. Takes {}.",
            downtime(&plan),
            between(plan.prediction.total_p50_ms, plan.prediction.total_p90_ms)
        )?;
        Ok(())
    }
}

fn clean(text: &str) -> String {
    plain::line(text, false)
}

fn time(ms: u64) -> String {
    if ms < 10_000 { format!("{}.{} s", ms / 1_000, ms % 1_000 / 100) } else { seconds(ms / 1_000) }
}

fn between(p50: Option<u64>, p90: Option<u64>) -> String {
    match (p50, p90) {
        (Some(p50), Some(p90)) => format!("{}, nine times in ten at most {}", time(p50), time(p90)),
        (None, _) | (_, None) => "unknown".to_owned(),
    }
}

fn downtime(plan: &UpgradePlan) -> String {
    if plan.build_only {
        return "none: nothing that runs is touched".to_owned();
    }
    if !plan.unknown.is_empty() || plan.steps.is_empty() {
        return "unknown".to_owned();
    }
    if plan.downtime.containers.is_empty() {
        return "none: everything overlaps with its successor".to_owned();
    }
    let names: Vec<String> = plan.downtime.containers.iter().map(|name| clean(name)).collect();
    format!("{} stands still; how long: {}", names.join(", "), between(plan.downtime.p50_ms, plan.downtime.p90_ms))
}

fn check_line(out: &mut dyn Write, style: &Style, check: &Check) -> io::Result<()> {
    let word = match check.verdict.as_str() {
        "ok" => style.good("ok     "),
        "refused" => style.bad("refused"),
        _ => style.busy("warning"),
    };
    writeln!(out, "  {word}  {:<9} {}", clean(&check.name), clean(&check.what))?;
    if check.advice.is_empty() { Ok(()) } else { writeln!(out, "{:21}→ {}", "", clean(&check.advice)) }
}

fn show_plan(out: &mut dyn Write, plan: &UpgradePlan, style: &Style) -> io::Result<()> {
    let from = if plan.from_version.is_empty() { "nothing".to_owned() } else { clean(&plan.from_version) };
    let only = if plan.build_only { ", build only" } else { "" };
    writeln!(out, "{from} → {} ({}){only}", clean(&plan.to_version), clean(plan.to_sha.get(..12).unwrap_or_default()))?;
    for why in &plan.refused {
        writeln!(out, "{} {}", style.bad("A start would be refused:"), clean(why))?;
    }
    let head = |out: &mut dyn Write, text: &str| writeln!(out, "\n{}", style.dim(text));
    let mut about = vec![vec!["  mode".to_owned(), clean(&plan.mode)]];
    if plan.confirm_window_seconds > 0 {
        about.push(vec!["  confirm window".to_owned(), seconds(plan.confirm_window_seconds)]);
    }
    about.push(vec!["  interruption".to_owned(), downtime(plan)]);
    about.push(vec!["  takes".to_owned(), between(plan.prediction.total_p50_ms, plan.prediction.total_p90_ms)]);
    let way_back =
        if plan.data.closes.is_empty() { String::new() } else { format!("closes: {}; ", clean(&plan.data.closes)) };
    about.push(vec!["  going back needs".to_owned(), format!("{way_back}{}", clean(&plan.data.rollback))]);
    writeln!(out)?;
    show::table(out, &about)?;
    if !plan.unknown.is_empty() {
        writeln!(out, "  what would be built and changed is not known: {}", clean(&plan.unknown))?;
    }
    if !plan.images.is_empty() {
        head(out, "Images")?;
        let row = |image: &crate::engine::planned::PlannedImage| {
            let how = if image.reused {
                "made already".to_owned()
            } else {
                format!("{} in {}", clean(&image.dockerfile), clean(&image.context))
            };
            vec![format!("  {}", clean(&image.component)), how]
        };
        show::table(out, &plan.images.iter().map(row).collect::<Vec<_>>())?;
    }
    if !plan.steps.is_empty() {
        head(out, "Steps")?;
        let row = |(number, step): (usize, &crate::engine::planned::PlannedStep)| {
            let names: Vec<String> = step.containers.iter().map(|name| clean(name)).collect();
            let what = if names.is_empty() {
                clean(&step.what)
            } else {
                format!("{}: {}", names.join(", "), clean(&step.what))
            };
            vec![format!("  {:>2}  {}", number + 1, clean(&step.kind).replace('_', " ")), what]
        };
        show::table(out, &plan.steps.iter().enumerate().map(row).collect::<Vec<_>>())?;
    }
    if !plan.changes.is_empty() {
        head(out, "Changes of how it is built and run")?;
        let row = |change: &crate::engine::planned::Change| {
            let was = if change.from.is_empty() { "—".to_owned() } else { clean(&change.from) };
            let is = if change.to.is_empty() { "—".to_owned() } else { clean(&change.to) };
            vec![format!("  {}", clean(&change.what)), format!("{was} → {is}"), format!("by the {}", clean(&change.by))]
        };
        show::table(out, &plan.changes.iter().take(SHOWN_MAX).map(row).collect::<Vec<_>>())?;
        let more = plan.more_changes + plan.changes.len().saturating_sub(SHOWN_MAX);
        if more > 0 {
            writeln!(out, "  and {more} more")?;
        }
    }
    head(out, "Commits")?;
    if !plan.commits.unknown.is_empty() {
        writeln!(out, "  not known: {}", clean(&plan.commits.unknown))?;
    } else if plan.commits.list.is_empty() {
        writeln!(out, "  none between")?;
    }
    let row = |commit: &crate::engine::planned::Commit| {
        let (sha, at) = (commit.sha.get(..12).unwrap_or_default(), commit.at.get(..10).unwrap_or_default());
        vec![format!("  {}", clean(sha)), clean(at), clean(&commit.author), clean(&commit.subject)]
    };
    show::table(out, &plan.commits.list.iter().take(SHOWN_MAX).map(row).collect::<Vec<_>>())?;
    let hidden = plan.commits.list.len().saturating_sub(SHOWN_MAX);
    match (hidden, plan.commits.more) {
        (0, false) => {}
        (0, true) => writeln!(out, "  and more")?,
        (hidden, more) => writeln!(out, "  and {hidden}{} more", if more { " or" } else { "" })?,
    }
    if !plan.notes.is_empty() {
        head(out, "Notes of the release")?;
        for line in plan.notes.lines() {
            writeln!(out, "  {}", clean(line))?;
        }
    }
    head(out, "Takes, by phase")?;
    let row = |phase: &crate::engine::planned::PhaseTime| {
        vec![format!("  {}", clean(&phase.phase)), between(phase.p50_ms, phase.p90_ms)]
    };
    show::table(out, &plan.prediction.phases.iter().map(row).collect::<Vec<_>>())?;
    writeln!(out, "  by {}", show::count(plan.prediction.jobs, "past job of its kind"))?;
    head(out, "Checks")?;
    plan.checks.iter().try_for_each(|check| check_line(out, style, check))?;
    head(out, "If it fails")?;
    plan.on_failure.iter().try_for_each(|told| writeln!(out, "  {}", clean(told)))
}
