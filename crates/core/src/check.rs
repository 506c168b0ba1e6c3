//! Whether everything that is left behind fits together: the record, its history, what the platform shows, the build logs.
//!
//! It reads and judges, and knows nothing of how any of it came about, so that it can judge what a crash left.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::decide::{build_step, data_step};
use crate::history::{Broken, Line, Verifier};
use crate::phase::{Confirming, Phase, State};
use crate::ports::{LogId, Observation, Running};
use crate::progress;
use crate::record::{ControllerId, Deployment, Overlap, Record};
use crate::swap::{Fit, fit};
use crate::words::{ContainerName, RevisionId};

/// One build log, whole.
#[derive(Debug, Clone)]
pub struct LogSeen {
    pub id: LogId,
    pub bytes: Vec<u8>,
    pub closed: bool,
}

/// Everything there is.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    pub record: &'a Record,
    /// From its first line.
    pub history: &'a [Line],
    /// Absent where there is no platform.
    pub seen: Option<&'a Observation>,
    /// Of the record's job.
    pub logs: &'a [LogSeen],
}

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    #[error("the history is not consistent with its anchor")]
    History(#[from] Broken),
    #[error("line {seq} of the history: {why}")]
    Story { seq: u64, why: String },
    #[error("the record says '{}', and the history ends in {told}", recorded.name())]
    Told { recorded: State, told: String },
    #[error("traffic goes to {seen}, and the record says {recorded}")]
    Traffic { recorded: RevisionId, seen: String },
    #[error("after a restart of its own, the platform would serve {0} instead")]
    Fallback(RevisionId),
    #[error("container {container} may not overlap and runs in {revisions:?}")]
    Doubled { container: ContainerName, revisions: Vec<RevisionId> },
    #[error("what serves is not as it should be: {0}")]
    Serving(String),
    #[error("after a reboot {would:?} would return, and {should} should")]
    Reboot { should: RevisionId, would: Vec<RevisionId> },
    #[error("revision {0} runs beside what serves, and nobody needs it")]
    Beside(RevisionId),
    #[error("{driver} drives, and {serving} serves")]
    Driver { driver: ControllerId, serving: RevisionId },
    #[error("the swap of {0} has no way back")]
    WayBack(RevisionId),
    #[error("commit {commit} made more than one revision: {revisions:?}")]
    Twice { commit: String, revisions: Vec<RevisionId> },
    #[error("the progress of one job fell from {from} to {to} percent")]
    Progress { from: u32, to: u32 },
    #[error("the build log of {component} is not whole: {why}")]
    Log { component: String, why: String },
}

/// What does not fit; empty where all does. For an application at rest, some time after its last job ended.
pub fn at_rest(evidence: &Evidence<'_>) -> Vec<Misfit> {
    let mut misfits = always(evidence);
    let state = evidence.record.phase.state();
    if state.in_flight() {
        misfits.push(Misfit::Told { recorded: state, told: "nothing: the job does not end".to_owned() });
        return misfits;
    }
    if let (Some(serving), Some(seen)) = (&evidence.record.serving, evidence.seen) {
        platform_at_rest(evidence.record, serving, seen, &mut misfits);
    }
    for log in evidence.logs {
        misfits.extend(log_misfit(evidence.record, log));
    }
    misfits
}

/// What must fit at any moment, in flight too.
pub fn always(evidence: &Evidence<'_>) -> Vec<Misfit> {
    let mut misfits = Vec::new();
    let (mut verifier, mut chain, mut story) = (Verifier::default(), Ok(()), Story::default());
    for line in evidence.history {
        let Ok(fields) = serde_json::from_slice::<Map<String, Value>>(&line.bytes) else {
            chain = chain.and(Err(Broken::NotALine { seq: line.seq }));
            break;
        };
        chain = chain.and_then(|()| verifier.parsed(line, &fields));
        misfits.extend(story.goes_on(line.seq, &fields));
    }
    if let Err(broken) = chain.and_then(|()| verifier.finish(&evidence.record.history).map(drop)) {
        misfits.push(broken.into());
    }
    if !story.ends_as(evidence.record) {
        misfits.push(Misfit::Told { recorded: evidence.record.phase.state(), told: format!("{:?}", story.at) });
    }
    if let Phase::RollingOut(swap) | Phase::Validating(swap) | Phase::Confirming(Confirming { swap, .. }) =
        &evidence.record.phase
        && evidence.record.running.is_some()
        && evidence.record.snapshot.is_none()
    {
        misfits.push(Misfit::WayBack(swap.to.revision.clone()));
    }
    if let Some(seen) = evidence.seen {
        misfits.extend(one_revision_per_key(seen));
    }
    misfits
}

/// What does not fit between a record and the one that a commit puts in its place.
pub fn between(before: &Record, after: &Record) -> Option<Misfit> {
    let id = |record: &Record| record.job.as_ref().map(|job| job.id.clone());
    // The way back is a way of its own, and so is another try of it.
    let turns = after.phase.state() == State::RollingBack && before.phase.state() != State::RollingBack;
    let (from, to) = (progress::shown(before), progress::shown(after));
    (id(before) == id(after) && !turns && to < from).then_some(Misfit::Progress { from, to })
}

/// At most one effective platform change per operation key: two revisions of one key would be two.
fn one_revision_per_key(seen: &Observation) -> Vec<Misfit> {
    let mut by_key: BTreeMap<&str, Vec<RevisionId>> = BTreeMap::new();
    for (id, revision) in &seen.revisions {
        if let Some(key) = &revision.key {
            by_key.entry(key.as_str()).or_default().push(id.clone());
        }
    }
    let doubled = by_key.into_values().filter(|ids| ids.len() > 1);
    doubled
        .map(|revisions| {
            let commit = seen.revisions.get(&revisions[0]).and_then(|r| r.commit.as_ref());
            Misfit::Twice { commit: commit.map_or(String::new(), ToString::to_string), revisions }
        })
        .collect()
}

fn platform_at_rest(record: &Record, serving: &Deployment, seen: &Observation, misfits: &mut Vec<Misfit>) {
    if seen.traffic.revision.as_ref() != Some(&serving.revision) {
        let there = seen.traffic.revision.as_ref().map_or_else(|| "nothing".to_owned(), ToString::to_string);
        misfits.push(Misfit::Traffic { recorded: serving.revision.clone(), seen: there });
    }
    misfits.extend(doubled(record, seen));
    let alone: Vec<RevisionId> =
        seen.revisions.iter().filter(|(_, r)| r.returns_alone).map(|(id, _)| id.clone()).collect();
    let Some(running) = &record.running else { return };
    let is_held = running.revision != serving.revision
        || matches!(record.phase, Phase::FailedRollout { .. } | Phase::RollbackFailed { .. });
    // It stands as it stood until somebody decides. What made room for the other side does not return by itself.
    if is_held {
        return;
    }
    match fit(seen, serving, serving.plan.containers.keys()) {
        Fit::Up => {}
        Fit::NotYet(why) | Fit::Crashed(why) | Fit::Foreign(why) => misfits.push(Misfit::Serving(why)),
    }
    if alone != [serving.revision.clone()] {
        misfits.push(Misfit::Reboot { should: serving.revision.clone(), would: alone });
    }
    if let Some(fallback) = seen.traffic.fallback.as_ref().filter(|fallback| **fallback != serving.revision) {
        misfits.push(Misfit::Fallback(fallback.clone()));
    }
    let successor = ControllerId::Revision(serving.revision.clone());
    if serving.plan.has_controller() && record.driver.controller != successor {
        let driver = record.driver.controller.clone();
        misfits.push(Misfit::Driver { driver, serving: serving.revision.clone() });
    }
    let beside = seen.revisions.iter().filter(|(id, there)| **id != serving.revision && there.runs());
    misfits.extend(beside.map(|(id, _)| Misfit::Beside(id.clone())));
}

/// Containers that may not run twice and do.
fn doubled(record: &Record, seen: &Observation) -> Vec<Misfit> {
    let swap = record.phase.swap();
    let known = [record.serving.as_ref(), record.running.as_ref(), swap.map(|s| &s.to)];
    let single: BTreeSet<&ContainerName> = known
        .into_iter()
        .flatten()
        .flat_map(|d| &d.plan.containers)
        .filter(|(_, plan)| plan.overlap != Overlap::Allowed && !plan.controller)
        .map(|(name, _)| name)
        .collect();
    let one = |name: &ContainerName| {
        let runs = seen.revisions.iter().filter(|(_, there)| {
            there.containers.get(name).is_some_and(|container| container.running == Running::Running)
        });
        let revisions: Vec<RevisionId> = runs.map(|(id, _)| id.clone()).collect();
        (revisions.len() > 1).then(|| Misfit::Doubled { container: name.clone(), revisions })
    };
    single.into_iter().filter_map(one).collect()
}

/// A log is whole when each attempt begins with its marker, under the key that the job gives it, and the last line has an end.
fn log_misfit(record: &Record, log: &LogSeen) -> Option<Misfit> {
    let component = log.id.component.to_string();
    let bad = |why: String| Some(Misfit::Log { component: component.clone(), why });
    let job = record.job.as_ref().filter(|job| job.id == log.id.job)?;
    let data = job.data.keys().find(|name| name.as_str() == component);
    let step = data.map_or_else(|| build_step(&log.id.component), data_step);
    let Some(body) = log.bytes.strip_suffix(b"\n") else { return bad("its last line has no end".to_owned()) };
    let mut last = 0;
    for (number, line) in body.split(|byte| *byte == b'\n').enumerate() {
        let marker = std::str::from_utf8(line).ok().and_then(|line| line.strip_prefix("--- attempt "));
        let marked = marker.and_then(|rest| {
            let (attempt, rest) = rest.split_once(", key ")?;
            let (key, _) = rest.split_once(", ")?;
            Some((attempt.parse::<u32>().ok()?, key.to_owned()))
        });
        match marked {
            None if number == 0 => return bad("it does not begin with an attempt's marker".to_owned()),
            None => {}
            Some((attempt, _)) if attempt < last => return bad(format!("attempt {attempt} comes after {last}")),
            Some((attempt, key)) => {
                if key != job.key(&step, attempt).as_str() {
                    return bad(format!("attempt {attempt} has a key that is not this job's"));
                }
                last = attempt;
            }
        }
    }
    if !log.closed {
        return bad("it was never closed".to_owned());
    }
    None
}

/// Where a history, read from its beginning, says that the application is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum At {
    #[default]
    Idle,
    /// Nothing was touched yet.
    Before {
        job: String,
    },
    /// The platform is being changed; `confirming` from the recorded cut-over of blue/green on.
    Swap {
        job: String,
        confirming: bool,
        ops: Ops,
    },
    /// Back by itself inside the confirm window.
    Flip {
        job: String,
        ops: Ops,
    },
    Back {
        ops: Ops,
    },
    Ended(State),
}

/// Operations by name, and whether each was observed.
type Ops = BTreeMap<String, bool>;

#[derive(Debug, Default)]
struct Story {
    at: At,
    /// Ids of jobs that were started: each once.
    started: BTreeSet<String>,
}

/// What has to be seen before anything is called a success.
const PROOF: [&str; 3] = ["start-new", "cut-over", "settle"];

impl Story {
    /// Takes one line in; what is odd about it.
    fn goes_on(&mut self, seq: u64, line: &Map<String, Value>) -> Option<Misfit> {
        let text = |name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (event, job) = (text("event"), text("job_id"));
        let odd = |why: String| Some(Misfit::Story { seq, why });
        let before = self.at.clone();
        let wrong = || odd(format!("'{event}' cannot follow on {before:?}"));
        let proved = |ops: &Ops| PROOF.iter().all(|op| ops.get(*op).copied().unwrap_or(false));
        match event.as_str() {
            "start" => {
                if self.is_in_flight() {
                    return odd(format!("job {job} begins while another one is in flight"));
                }
                if !self.started.insert(job.clone()) {
                    return odd(format!("job {job} begins a second time"));
                }
                self.at = At::Before { job };
            }
            "claimed" | "fetched" | "build_intended" | "built" | "builds_complete" => match &self.at {
                At::Before { job: current } if *current == job => {}
                _ => return wrong(),
            },
            "escape_hatch" => match &self.at {
                At::Before { job: current } if *current == job => {
                    self.at = At::Swap { job, confirming: false, ops: Ops::new() };
                }
                _ => return wrong(),
            },
            "data_step_intended" | "data_step_done" => match &self.at {
                At::Swap { ops, .. } if ops.is_empty() => {}
                _ => return wrong(),
            },
            "landed" | "converged" => match &self.at {
                At::Swap { .. } => {}
                _ => return wrong(),
            },
            "intended" | "observed" | "cut_over_intended" => {
                let op = if event == "cut_over_intended" { "cut-over".to_owned() } else { text("op") };
                let ops = match &mut self.at {
                    At::Swap { ops, confirming, .. } => {
                        *confirming |= event == "cut_over_intended";
                        ops
                    }
                    At::Flip { ops, .. } | At::Back { ops } => ops,
                    At::Idle | At::Before { .. } | At::Ended(_) => return wrong(),
                };
                if event != "observed" {
                    // What a cut-over that is made again takes back has to be seen again.
                    if op == "cut-over" {
                        ops.remove("settle");
                    }
                    ops.insert(op, false);
                } else if let Some(seen) = ops.get_mut(&op) {
                    *seen = true;
                } else {
                    return odd(format!("'{op}' was observed and never intended"));
                }
            }
            "flip_intended" => match &self.at {
                At::Swap { job, confirming: true, .. } => self.at = At::Flip { job: job.clone(), ops: Ops::new() },
                _ => return wrong(),
            },
            "rollback_start" => match &self.at {
                At::Swap { .. } | At::Flip { .. } | At::Ended(_) => self.at = At::Back { ops: Ops::new() },
                At::Idle | At::Before { .. } | At::Back { .. } => return wrong(),
            },
            "succeeded" => {
                let build_only = line.get("build_only") == Some(&Value::Bool(true));
                match &self.at {
                    At::Before { .. } if build_only => {}
                    At::Swap { ops, .. } if proved(ops) => {}
                    At::Swap { .. } => return odd("success was never observed".to_owned()),
                    _ => return wrong(),
                }
                self.at = At::Ended(State::Succeeded);
            }
            "flipped_back" | "rollback_done" => {
                match &self.at {
                    At::Flip { ops, .. } if event == "flipped_back" && proved(ops) => {}
                    At::Back { ops } if event == "rollback_done" && proved(ops) => {}
                    At::Flip { .. } | At::Back { .. } => return odd("the way back was never observed".to_owned()),
                    _ => return wrong(),
                }
                self.at = At::Ended(State::RolledBack);
            }
            "cancelled" => match &self.at {
                At::Before { .. } => self.at = At::Ended(State::FailedPre),
                _ => return wrong(),
            },
            "failed" => {
                let (state, stage) = match &self.at {
                    At::Before { .. } => (State::FailedPre, "pre"),
                    At::Swap { confirming: false, .. } => (State::FailedRollout, "rollout"),
                    At::Swap { confirming: true, .. } | At::Flip { .. } | At::Back { .. } => {
                        (State::RollbackFailed, "rollout")
                    }
                    At::Idle | At::Ended(_) => return wrong(),
                };
                if text("stage") != stage {
                    return odd(format!("it failed at stage '{}', and that was '{stage}'", text("stage")));
                }
                self.at = At::Ended(state);
            }
            "reset" => {
                self.at = match &self.at {
                    At::Before { .. } => At::Ended(State::FailedPre),
                    At::Swap { .. } | At::Flip { .. } | At::Back { .. } => At::Ended(State::FailedRollout),
                    At::Idle | At::Ended(_) => return wrong(),
                };
            }
            "repair_intended"
            | "proved_serves"
            | "way_back_proved"
            | "way_back_lost"
            | "drift_seen"
            | "drift_gone"
            | "drift_accepted"
            | "snapshot_dropped"
            | "orphan_purge_attempt"
            | "orphan_acr_tags"
                if self.is_in_flight() =>
            {
                return wrong();
            }
            // What moves no state may stand anywhere; so may what a newer Replank tells.
            _ => {}
        }
        None
    }

    fn is_in_flight(&self) -> bool {
        match self.at {
            At::Before { .. } | At::Swap { .. } | At::Flip { .. } | At::Back { .. } => true,
            At::Idle | At::Ended(_) => false,
        }
    }

    /// Whether the record stands where its history ends.
    fn ends_as(&self, record: &Record) -> bool {
        let state = record.phase.state();
        match &self.at {
            At::Idle => state == State::Idle,
            At::Before { job } => state.before_swap() && record.job.as_ref().is_some_and(|j| j.id.as_str() == job),
            At::Swap { confirming, .. } => match &record.phase {
                Phase::RollingOut(_) | Phase::Validating(_) => !confirming,
                Phase::Confirming(Confirming { flip, .. }) => *confirming && flip.is_none(),
                _ => false,
            },
            At::Flip { .. } => matches!(&record.phase, Phase::Confirming(Confirming { flip: Some(_), .. })),
            At::Back { .. } => state == State::RollingBack,
            At::Ended(ended) => state == *ended,
        }
    }
}
