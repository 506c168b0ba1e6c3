//! The matrix: for each job that can be played, its steps as an undisturbed run shows them, and every fault at each of them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use replank_core::phase::State;
use replank_testbed::Engine;
use serde_json::Value;

use crate::gate::{self, At};
use crate::judge::{self, Kept};
use crate::point::{EVENTS, Effect, Played, Point, Side, Step};
use crate::rig::{Controllers, JOB_LIMIT, Kind, RESTING, Rig};

/// Promise 1: from the death of a controller, or the return of one that stood still alone.
pub const RESUME_LIMIT_SECONDS: f64 = 30.0;
/// How long a stopped controller stands still where nobody takes over: beyond the lease of 15 s.
const STOPPED: Duration = Duration::from_secs(18);
/// Between two looks for who stands at the fault: a kill must come before anything else does.
const LOOK_EVERY: Duration = Duration::from_millis(3);
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// Of a failed rollout: until the way back has been taken.
const PUT_RIGHT_LIMIT: Duration = Duration::from_secs(120);

/// A job that is played, again and again, with another fault each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    /// An upgrade in blue/green mode, under load.
    BlueGreen,
    /// The way back from one.
    Rollback,
    /// An upgrade to a release that degrades inside its confirm window.
    Degrading,
    /// An upgrade with a data step and the backup before it.
    Data,
    /// An upgrade in single mode.
    Single,
}

impl Scenario {
    pub const ALL: [Self; 5] = [Self::BlueGreen, Self::Rollback, Self::Degrading, Self::Data, Self::Single];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BlueGreen => "blue-green",
            Self::Rollback => "rollback",
            Self::Degrading => "degrading",
            Self::Data => "data",
            Self::Single => "single",
        }
    }

    fn mode(self) -> &'static str {
        match self {
            Self::BlueGreen | Self::Rollback | Self::Degrading | Self::Data => "blue-green",
            Self::Single => "single",
        }
    }

    /// How it ends undisturbed.
    fn ends(self) -> &'static str {
        match self {
            Self::BlueGreen | Self::Data | Self::Single => "succeeded",
            Self::Rollback | Self::Degrading => "rolled_back",
        }
    }

    /// Events that an undisturbed run must show; which of them it shows how often is found by looking.
    fn shows(self, played: Played) -> bool {
        match (self, played) {
            (Self::BlueGreen, Played::Upgrade)
            | (Self::Rollback, Played::Rollback)
            | (Self::Degrading, Played::Degrading)
            | (Self::Data, Played::Data) => true,
            (
                Self::BlueGreen | Self::Rollback | Self::Degrading | Self::Data | Self::Single,
                Played::Upgrade | Played::Rollback | Played::Degrading | Played::Data | Played::Fault | Played::Alone,
            ) => false,
        }
    }

    /// The first step that another scenario's job does not have as well; `None` for all of them.
    fn begins_to_differ(self) -> Option<&'static str> {
        match self {
            Self::BlueGreen | Self::Rollback => None,
            Self::Degrading => Some("record flip_intended"),
            Self::Data => Some("record data_step_intended backup"),
            Self::Single => Some("record escape_hatch"),
        }
    }

    /// The last one of that kind: what follows it is struck in another scenario.
    fn is_alike_again(self) -> Option<&'static str> {
        match self {
            Self::BlueGreen | Self::Rollback | Self::Degrading | Self::Single => None,
            Self::Data => Some("record data_step_done migrate-worker"),
        }
    }

    fn release(self) -> Kind {
        match self {
            Self::BlueGreen | Self::Rollback | Self::Single => Kind::Good,
            Self::Degrading => Kind::Degrading,
            Self::Data => Kind::Migrating,
        }
    }

    /// No request may fail: in single mode the plan shows a gap, and only an unconfirmed release may answer badly.
    fn is_without_a_gap(self) -> bool {
        match self {
            Self::BlueGreen | Self::Rollback | Self::Degrading | Self::Data => true,
            Self::Single => false,
        }
    }
}

/// The states in which a job may end after a fault.
#[must_use]
pub fn may_end(scenario: Scenario, point: &Point) -> Vec<&'static str> {
    let undisturbed = scenario.ends();
    match point.effect {
        // Whatever dies, stands still or may pass by itself: the job ends as it would have.
        Effect::Kill | Effect::Stop | Effect::Transient | Effect::Conflict | Effect::Indeterminate => vec![undisturbed],
        // A ledger that cannot be used is waited for.
        Effect::Permanent if point.step.event().is_some() => vec![undisturbed],
        Effect::Permanent => {
            let step = point.step.0.as_str();
            if scenario == Scenario::Rollback {
                // A way back that is refused for good is held, and told.
                vec!["rollback_failed", undisturbed]
            } else if step == "fetch" || step == "plan" || step == "protect" || step.starts_with("build ") {
                // Nothing was touched.
                vec!["failed_pre"]
            } else {
                // After the cut-over of blue/green the way back is taken by itself; what is only tidied up at rest comes later.
                vec!["failed_rollout", "rollback_failed", "rolled_back", undisturbed]
            }
        }
    }
}

/// What came of one fault.
#[derive(Debug)]
pub struct Outcome {
    pub violations: Vec<String>,
    /// From the fault to the next recorded event; absent where everything was recorded already.
    pub resumed_s: Option<f64>,
    /// The state of the row at the fault, as whoever was struck saw it.
    pub phase: Option<State>,
    pub took: Duration,
}

/// One scenario's installation, and what it has seen.
#[derive(Debug)]
pub struct Stage {
    pub scenario: Scenario,
    rig: Rig,
}

impl Stage {
    /// # Errors
    /// As [`Rig::start`].
    pub fn start(engine: Engine, program: PathBuf, scenario: Scenario) -> Result<Self> {
        Ok(Self { scenario, rig: Rig::with_data(engine, Controllers::with_faults(program), scenario.mode())? })
    }

    /// An installation serves every scenario of its mode.
    pub fn turn_to(&mut self, scenario: Scenario) -> bool {
        let fits = scenario.mode() == self.scenario.mode();
        if fits {
            self.scenario = scenario;
        }
        fits
    }

    /// Runs the job undisturbed and answers every fault that can strike in it.
    ///
    /// # Errors
    /// When it does not end as it should, or does not show what it must.
    pub async fn points(&mut self) -> Result<Vec<Point>> {
        let prepared = self.prepare().await?;
        std::fs::write(self.rig.gate(gate::TRACE), "")?;
        let told = self.play(&prepared, None).await?;
        let trace = std::fs::read_to_string(self.rig.gate(gate::TRACE))?;
        std::fs::remove_file(self.rig.gate(gate::TRACE))?;
        ensure!(told.violations.is_empty(), "undisturbed: {}", told.violations.join("; "));
        let mut steps: Vec<(Side, Step, usize)> = Vec::new();
        let mut passed: Vec<&str> = Vec::new();
        let mut differs = self.scenario.begins_to_differ().is_none();
        let mut seen = BTreeSet::new();
        for line in gate::of_the_job(&trace) {
            let (side, step) = line.split_once(' ').context("a line of the trace has two parts")?;
            let side = if side == "before" { Side::Before } else { Side::After };
            differs |= self.scenario.begins_to_differ() == Some(step);
            passed.push(line);
            let nth = passed.iter().filter(|one| **one == line).count();
            let step = Step(step.to_owned());
            seen.extend(step.event().map(str::to_owned));
            let is_new = !steps.iter().any(|(s, known, _)| *s == side && known.kind() == step.kind());
            let is_last = side == Side::After && self.scenario.is_alike_again() == Some(step.0.as_str());
            if differs && is_new && step.is_of_a_job() {
                steps.push((side, step, nth));
            }
            if is_last {
                break;
            }
        }
        for (event, _) in EVENTS.iter().filter(|(_, played)| self.scenario.shows(*played)) {
            ensure!(seen.contains(*event), "an undisturbed {} does not record '{event}'", self.scenario.name());
        }
        let all = steps.into_iter().flat_map(|(side, step, nth)| {
            let effects = step.effects(side).into_iter();
            effects.map(move |effect| Point { step: step.clone(), side, nth, effect })
        });
        Ok(all.collect())
    }

    /// Plays the job with one fault in it.
    ///
    /// # Errors
    /// When the rig itself fails, after which it is of no more use.
    pub async fn strike(&mut self, point: &Point) -> Result<Outcome> {
        let prepared = self.prepare().await?;
        std::fs::write(self.rig.gate(gate::TRACE), "")?;
        for file in [gate::STRUCK, gate::AT, gate::GO] {
            if self.rig.gate(file).exists() {
                std::fs::remove_file(self.rig.gate(file))?;
            }
        }
        // Whole or not at all, as controllers look at any moment.
        let next = self.rig.gate("armed.next");
        std::fs::write(&next, serde_json::to_vec(point)?)?;
        std::fs::rename(next, self.rig.gate(gate::ARMED))?;
        let outcome = self.play(&prepared, Some(point)).await;
        // Not come to: it must not strike the next one.
        std::fs::remove_file(self.rig.gate(gate::ARMED)).ok();
        outcome
    }

    /// What has to be so before the job: the release to start, or for a rollback the one that was upgraded to.
    async fn prepare(&mut self) -> Result<String> {
        self.put_right().await?;
        let tag = self.rig.release(self.scenario.release())?;
        if self.scenario == Scenario::Rollback {
            self.rig.upgrade(&tag).await?;
            self.rig.installed.until_state(JOB_LIMIT, &mut vec![], &["succeeded"]).await?;
            let (misfits, _) = judge::judged(&self.rig).await?;
            ensure!(misfits.is_empty(), "before the rollback: {}", misfits.join("; "));
        }
        Ok(tag)
    }

    /// A failed job's remains are in the way of the next one.
    async fn put_right(&self) -> Result<()> {
        let row = self.rig.installed.until_state(JOB_LIMIT, &mut vec![], &RESTING).await?;
        if row["state"] == "failed_rollout" || row["state"] == "rollback_failed" {
            self.rig.roll_back().await?;
            self.rig.installed.until_state(PUT_RIGHT_LIMIT, &mut vec![], &["rolled_back"]).await?;
            let (misfits, _) = judge::judged(&self.rig).await?;
            ensure!(misfits.is_empty(), "after putting it right: {}", misfits.join("; "));
        }
        Ok(())
    }

    async fn play(&mut self, tag: &str, point: Option<&Point>) -> Result<Outcome> {
        let begun = Instant::now();
        let since = judge::kept(&self.rig.installed.options.home).await?.history.len();
        let (_, copied_before) = self.rig.data_steps(tag)?;
        let load = self.rig.load()?;
        let start = async {
            if self.scenario == Scenario::Rollback {
                self.rig.roll_back().await
            } else {
                self.rig.upgrade(tag).await.map(drop)
            }
        };
        let struck = async {
            match point {
                Some(point) => self.struck(point).await,
                None => Ok(Struck::Nothing),
            }
        };
        let (started, struck) = tokio::join!(start, struck);
        started?;
        let mut violations = Vec::new();
        let (from, phase) = match struck? {
            Struck::At(from, phase) => (Some(from), Some(phase)),
            Struck::Nothing => (None, None),
            Struck::Missed => {
                violations.push("the fault did not strike: the job never came there".to_owned());
                (None, None)
            }
        };
        let row = match self.rig.installed.until_state(JOB_LIMIT, &mut vec![], &RESTING).await {
            Ok(row) => row,
            Err(error) => {
                let kept = judge::kept(&self.rig.installed.options.home).await?;
                bail!("the job does not end: {error:#}; its last events: {}", last_events(&kept, since));
            }
        };
        let (misfits, kept) = judge::judged(&self.rig).await?;
        violations.extend(misfits);
        let state = row["state"].as_str().unwrap_or_default();
        let wanted = point.map_or_else(|| vec![self.scenario.ends()], |point| may_end(self.scenario, point));
        if !wanted.contains(&state) {
            violations.push(format!("it ended as {state} and not as {}: {}", wanted.join(" or "), row["phase_detail"]));
        }
        let (migrated, copied) = self.rig.data_steps(tag)?;
        let (least, most) = match (self.scenario, state) {
            (Scenario::Data, "succeeded") => (1, 1),
            (Scenario::Data, _) => (0, 1),
            (Scenario::BlueGreen | Scenario::Rollback | Scenario::Degrading | Scenario::Single, _) => (0, 0),
        };
        let copies = copied - copied_before;
        if migrated < least || migrated > most || copies < migrated || copies > most {
            violations.push(format!("its data step ran {migrated} times, and {copies} copies were made before it"));
        }
        let totals = load.stop().await;
        if self.scenario.is_without_a_gap() && totals.failed > 0 {
            violations.push(format!("{} of {} requests failed: {:?}", totals.failed, totals.requests, totals.failures));
        }
        let resumed_s = from.and_then(|from| {
            let events = kept.history[since.min(kept.history.len())..].iter();
            let times = events.filter_map(|line| {
                let fields: Value = serde_json::from_slice(&line.bytes).ok()?;
                let at: jiff::Timestamp = fields["ts"].as_str()?.parse().ok()?;
                Some(at.as_millisecond())
            });
            #[expect(clippy::cast_precision_loss, reason = "seconds of one job")]
            times.filter(|at| *at > from).min().map(|next| (next - from) as f64 / 1000.0)
        });
        if let Some(resumed) = resumed_s.filter(|resumed| *resumed > RESUME_LIMIT_SECONDS) {
            violations.push(format!("it went on after {resumed:.1} s"));
        }
        if !violations.is_empty() {
            eprintln!("{}", last_events(&kept, since));
        }
        Ok(Outcome { violations, resumed_s, phase, took: begun.elapsed() })
    }

    /// Waits for the fault and does what only the outside can. Answers when the time without a controller began.
    async fn struck(&self, point: &Point) -> Result<Struck> {
        let end = Instant::now() + JOB_LIMIT;
        let file = self.rig.gate(gate::AT);
        let (mut rested, mut looked) = (None::<Instant>, Instant::now());
        let at: At = loop {
            if let Ok(bytes) = std::fs::read(&file) {
                break serde_json::from_slice(&bytes)?;
            }
            // At rest for long: what is done there was done. Not asked often, nor waited for: the fault must be met at once.
            if looked.elapsed() > STATUS_EVERY {
                looked = Instant::now();
                let row = tokio::time::timeout(STATUS_EVERY, self.rig.installed.status()).await;
                let is_over = row.is_ok_and(|row| row.is_ok_and(|row| row["state"] == self.scenario.ends()));
                rested = if is_over { rested.or_else(|| Some(Instant::now())) } else { None };
            }
            let is_settled = rested.is_some_and(|since| since.elapsed() > STOPPED);
            if is_settled || Instant::now() >= end {
                return Ok(Struck::Missed);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        match point.effect {
            Effect::Kill => {
                self.rig.signal(&at.controller, "KILL")?;
                Ok(Struck::At(judge::now().0, at.phase))
            }
            Effect::Stop => {
                self.rig.signal(&at.controller, "STOP")?;
                let stopped = judge::now().0;
                let until = Instant::now() + STOPPED;
                let mut others = false;
                while Instant::now() < until && !others {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    others = self.taken_over(stopped).await?;
                }
                std::fs::write(self.rig.gate(gate::GO), "")?;
                let resumed = judge::now().0;
                // Whoever made room meanwhile was stopped by the engine, and does not return.
                self.rig.signal(&at.controller, "CONT").ok();
                Ok(Struck::At(if others { stopped } else { resumed }, at.phase))
            }
            Effect::Transient | Effect::Permanent | Effect::Conflict | Effect::Indeterminate => {
                Ok(Struck::At(judge::now().0, at.phase))
            }
        }
    }

    /// Whether another controller has recorded that it took over since then.
    async fn taken_over(&self, since: i64) -> Result<bool> {
        let kept = judge::kept(&self.rig.installed.options.home).await?;
        Ok(kept.history.iter().rev().take(50).any(|line| {
            serde_json::from_slice::<Value>(&line.bytes).is_ok_and(|fields| {
                let at = fields["ts"].as_str().and_then(|ts| ts.parse::<jiff::Timestamp>().ok());
                fields["event"] == "took_over" && at.is_some_and(|at| at.as_millisecond() > since)
            })
        }))
    }
}

enum Struck {
    Nothing,
    Missed,
    /// Milliseconds since 1970, and the state of the row.
    At(i64, State),
}

fn last_events(kept: &Kept, since: usize) -> String {
    let events = kept.history[since.min(kept.history.len())..].iter().map(|line| {
        let fields: Value = serde_json::from_slice(&line.bytes).unwrap_or_default();
        let about = ["op", "component", "step", "why", "to"].iter().find_map(|name| fields[name].as_str());
        let word = |name: &str| fields[name].as_str().unwrap_or_default().to_owned();
        format!("  {} {} {}", word("ts"), word("event"), about.unwrap_or_default())
    });
    events.collect::<Vec<_>>().join("\n")
}
