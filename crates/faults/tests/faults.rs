//! One fault in each phase, and one of each kind on each side of a step, on the real parts; the whole matrix is
//! `cargo xtask faults`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use replank_core::phase::State;
use replank_faults::matrix::{Scenario, Stage};
use replank_testbed::Engine;

/// The phase that the row is in when it strikes, the job, and the fault: at steps that no other test strikes.
const STRUCK: [(State, Scenario, &str); 9] = [
    (State::Queued, Scenario::BlueGreen, "kill before record claimed"),
    (State::Fetching, Scenario::BlueGreen, "permanent before fetch"),
    (State::Building, Scenario::BlueGreen, "transient before build"),
    (State::Patching, Scenario::BlueGreen, "permanent before protect"),
    (State::RollingOut, Scenario::BlueGreen, "kill after change start"),
    (State::Validating, Scenario::BlueGreen, "stop before record cut_over_intended"),
    (State::Confirming, Scenario::BlueGreen, "kill before record handed_over"),
    (State::Confirming, Scenario::BlueGreen, "indeterminate after record intended settle"),
    (State::RollingBack, Scenario::Rollback, "kill after change start"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_fault_in_each_phase_is_got_over_or_ends_the_job_safely() {
    let in_flight = State::ALL.into_iter().filter(|state| state.in_flight());
    let struck: BTreeSet<State> = STRUCK.iter().map(|(phase, ..)| *phase).collect();
    assert_eq!(struck, in_flight.collect(), "every phase of a job has its fault");

    let program = PathBuf::from(env!("CARGO_BIN_EXE_replank-with-faults"));
    let mut stage = Stage::start(Engine::from_env().unwrap(), program, Scenario::BlueGreen).unwrap();
    for scenario in [Scenario::BlueGreen, Scenario::Rollback] {
        assert!(stage.turn_to(scenario));
        let points = stage.points().await.unwrap();
        for (phase, _, text) in STRUCK.iter().filter(|(_, of, _)| *of == scenario) {
            let named = points.iter().find(|point| point.to_string().starts_with(text));
            let point = named.unwrap_or_else(|| panic!("{text} is not among {points:?}"));
            let outcome = stage.strike(point).await.unwrap();
            let (took, resumed) = (outcome.took.as_secs_f64(), outcome.resumed_s);
            eprintln!("{} {text}: {took:.1} s, went on after {resumed:?} s", scenario.name());
            assert!(outcome.violations.is_empty(), "{text}: {}", outcome.violations.join("\n"));
            assert_eq!(outcome.phase, Some(*phase), "{text}");
        }
    }
}
