//! Predictions from made-up histories, and what a swap will come to.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use replank_core::history::{Audit, Line, seal};
use replank_core::outline::{Gap, Stage, fates, stages};
use replank_core::phase::{Mode, State};
use replank_core::predict::{Kind, Spread, done, predict};
use replank_core::record::{ContainerPlan, Head, Overlap, Plan};
use replank_core::words::{ComponentName, ContainerName, JobId, Millis};

const SINGLE: Kind = Kind { mode: Mode::Single, build_only: false };
const BLUE_GREEN: Kind = Kind { mode: Mode::BlueGreen, build_only: false };
const BUILD_ONLY: Kind = Kind { mode: Mode::Single, build_only: true };

#[test]
fn percentiles_are_measured_durations_and_unknown_below_three() {
    for (durations, expect) in [
        (vec![], None),
        (vec![5], None),
        (vec![5, 6], None),
        (vec![7, 5, 6], Some((6, 7))),
        (vec![4, 1, 3, 2], Some((2, 4))),
        (vec![9; 3], Some((9, 9))),
        ((1..=10).rev().collect(), Some((5, 9))),
        ((1..=11).collect(), Some((6, 10))),
        ((1..=100).collect(), Some((50, 90))),
        (vec![u64::MAX, 0, 1], Some((1, u64::MAX))),
    ] {
        let got = Spread::of(durations.clone()).map(|spread| (spread.p50, spread.p90));
        assert_eq!(got, expect, "{durations:?}");
    }
}

/// A history that is written job by job, a second after the other.
#[derive(Default)]
struct History {
    events: Vec<Audit>,
    now: i64,
    jobs: u32,
}

impl History {
    fn line(&mut self, job: &str, event: &str, fields: &[(&str, &str)]) {
        let mut audit = Audit::new(Millis(self.now), JobId::new(job).ok().as_ref(), event);
        for (name, value) in fields {
            audit = audit.with(name, *value);
        }
        self.events.push(audit);
    }

    /// A job of these phases, each so many seconds long, that ends in `end`.
    fn job(&mut self, mode: Option<Mode>, phases: &[(State, i64)], end: State) {
        self.jobs += 1;
        let id = format!("job-{}", self.jobs);
        self.line(&id, "start", &[("state", "queued"), ("mode", mode.map_or("", Mode::name))]);
        let states = phases.iter().map(|(state, _)| *state).skip(1).chain([end]);
        for ((state, seconds), next) in phases.iter().zip(states) {
            if *state == State::RollingOut {
                self.line(&id, "intended", &[("op", "stop-old")]);
                // Somebody else's line, and one without a meaning here.
                self.line("job-9999", "observed", &[("op", "start-new"), ("state", "succeeded")]);
                self.line(&id, "took_over", &[]);
            }
            self.now += seconds * 1_000;
            if *state == State::RollingOut {
                self.line(&id, "observed", &[("op", "start-new")]);
            }
            self.line(&id, "moved", &[("state", next.name())]);
        }
        if let Some(last) = self.events.last_mut()
            && phases.len() == 3
            && end == State::Succeeded
        {
            last.detail.insert("build_only".to_owned(), true.into());
        }
        // What follows is another story: a rollback of the same job.
        self.now += 77_000;
        self.line(&id, "rollback_start", &[("state", "rolling_back")]);
        self.now += 77_000;
        self.line(&id, "rollback_done", &[("state", "rolled_back")]);
    }

    fn lines(&self) -> Vec<Line> {
        seal(&Head::default(), &self.events).0
    }
}

fn whole(kind: Kind, seconds: i64) -> Vec<(State, i64)> {
    kind.phases().iter().map(|state| (*state, seconds)).collect()
}

#[test]
fn only_jobs_of_the_same_kind_that_succeeded_count() {
    let mut history = History::default();
    for seconds in [1, 2, 3] {
        history.job(Some(Mode::Single), &whole(SINGLE, seconds), State::Succeeded);
        history.job(Some(Mode::Single), &whole(SINGLE, 1_000), State::FailedRollout);
        history.job(Some(Mode::Single), &whole(BUILD_ONLY, 10 * seconds), State::Succeeded);
        history.job(Some(Mode::BlueGreen), &whole(BLUE_GREEN, 100), State::RolledBack);
    }
    history.job(Some(Mode::BlueGreen), &whole(BLUE_GREEN, 100), State::Succeeded);
    let lines = history.lines();
    let single = predict(&lines, SINGLE);
    assert_eq!(single.jobs, 3);
    assert_eq!(single.total, Some(Spread { p50: 10_000, p90: 15_000 }));
    assert_eq!(single.phases.len(), 5);
    assert!(single.phases.iter().all(|(_, spread)| *spread == Some(Spread { p50: 2_000, p90: 3_000 })), "{single:?}");
    assert_eq!((single.early_gap, single.late_gap), (Some(Spread { p50: 2_000, p90: 3_000 }), None));
    let built = predict(&lines, BUILD_ONLY);
    assert_eq!((built.jobs, built.total), (3, Some(Spread { p50: 60_000, p90: 90_000 })));
    let blue_green = predict(&lines, BLUE_GREEN);
    assert_eq!((blue_green.jobs, blue_green.total), (1, None));
    assert!(blue_green.phases.len() == 7 && blue_green.phases.iter().all(|(_, spread)| spread.is_none()));
    // A tail that begins in the middle of a job knows nothing of that job.
    let first_end = lines.iter().position(|line| String::from_utf8_lossy(&line.bytes).contains("succeeded")).unwrap();
    assert_eq!(predict(&lines[first_end..], SINGLE).jobs, 2);
    assert_eq!(predict(&[], SINGLE).jobs, 0);
    let broken = [Line { seq: 0, bytes: b"no json".to_vec() }, Line { seq: 1, bytes: b"[1]".to_vec() }];
    assert_eq!(done(&broken), []);
}

#[test]
fn lines_that_do_not_name_the_mode_are_judged_by_their_phases_and_only_the_newest_jobs_count() {
    let mut history = History::default();
    (0..3).for_each(|_| history.job(None, &whole(BLUE_GREEN, 4), State::Succeeded));
    (0..30).for_each(|n| history.job(None, &whole(SINGLE, n), State::Succeeded));
    let lines = history.lines();
    assert_eq!(predict(&lines, BLUE_GREEN).total, Some(Spread { p50: 28_000, p90: 28_000 }));
    let single = predict(&lines, SINGLE);
    // The 20 newest took 10 to 29 s for each phase.
    assert_eq!((single.jobs, single.phases[0].1), (20, Some(Spread { p50: 19_000, p90: 27_000 })));
}

fn plan(containers: &[(&str, Overlap)]) -> Plan {
    let one = |(name, overlap): &(&str, Overlap)| {
        let component = ComponentName::new(*name).unwrap();
        (ContainerName::new(*name).unwrap(), ContainerPlan { component, overlap: *overlap, controller: *name == "ctl" })
    };
    Plan { containers: containers.iter().map(one).collect(), ..Plan::default() }
}

#[test]
fn stages_come_in_the_order_of_a_swap() {
    use Overlap::*;
    let names = |names: &[&str]| {
        names.iter().map(|name| ContainerName::new(*name).unwrap()).collect::<std::collections::BTreeSet<_>>()
    };
    let both = plan(&[("api", Allowed), ("beat", StartAfterCutover), ("ctl", Allowed), ("worker", StopOldFirst)]);
    let expect = vec![
        Stage::StopOld(names(&["worker"])),
        Stage::StartNew(names(&["api", "ctl", "worker"])),
        Stage::Prove,
        Stage::CutOver,
        Stage::HandOver,
        Stage::StopOldLate(names(&["beat"])),
        Stage::StartNewLate(names(&["beat"])),
        Stage::Confirm,
        Stage::Retire(names(&["api", "ctl"])),
    ];
    assert_eq!(stages(Some(&both), &both, Mode::BlueGreen), expect);
    let without = |stage: &Stage| !matches!(stage, Stage::Confirm);
    let single: Vec<Stage> = expect.into_iter().filter(without).collect();
    assert_eq!(stages(Some(&both), &both, Mode::Single), single);
    // Where nothing ran, nothing stops, and there is nobody to stay warm.
    let plain = plan(&[("api", Allowed)]);
    assert_eq!(stages(None, &plain, Mode::BlueGreen), [Stage::StartNew(names(&["api"])), Stage::Prove, Stage::CutOver]);
}

#[test]
fn gaps_follow_from_how_the_old_side_stops_and_the_new_one_starts() {
    use Overlap::*;
    let all = [Allowed, StopOldFirst, StartAfterCutover];
    let mut seen = BTreeMap::new();
    for before in all {
        for after in all {
            let fates = fates(Some(&plan(&[("api", before)])), &plan(&[("api", after)]));
            seen.insert(format!("{before:?} {after:?}"), fates[&ContainerName::new("api").unwrap()].gap);
        }
    }
    for (case, gap) in seen {
        let expect = match case.as_str() {
            "StopOldFirst Allowed" | "StopOldFirst StopOldFirst" => Gap::Early,
            "StartAfterCutover StartAfterCutover" => Gap::Late,
            "StopOldFirst StartAfterCutover" => Gap::Long,
            _ => Gap::None,
        };
        assert_eq!(gap, expect, "{case}");
    }
    let moved = fates(Some(&plan(&[("old", StopOldFirst)])), &plan(&[("new", StopOldFirst)]));
    let of = |name: &str| moved[&ContainerName::new(name).unwrap()];
    assert!(of("old").goes && !of("old").is_new && of("old").gap == Gap::None);
    assert!(of("new").is_new && !of("new").goes && of("new").gap == Gap::None);
}
