//! One fault of each kind on each side of a step, on the real parts; the whole matrix is `cargo xtask faults`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use replank_faults::matrix::{Scenario, Stage};
use replank_testbed::Engine;

/// One of each effect and side, at steps that no other test strikes.
const STRUCK: [&str; 5] = [
    "kill before record handed_over",
    "kill after change start",
    "stop before change shift",
    "transient before build",
    "indeterminate after record intended settle",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_fault_of_each_kind_ends_as_if_it_had_not_been() {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_replank-with-faults"));
    let mut stage = Stage::start(Engine::from_env().unwrap(), program, Scenario::BlueGreen).unwrap();
    let points = stage.points().await.unwrap();
    for text in STRUCK {
        let named = points.iter().find(|point| point.to_string().starts_with(text));
        let point = named.unwrap_or_else(|| panic!("{text} is not among {points:?}"));
        let outcome = stage.strike(point).await.unwrap();
        eprintln!("{text}: {:.1} s, went on after {:?} s", outcome.took.as_secs_f64(), outcome.resumed_s);
        assert!(outcome.violations.is_empty(), "{text}: {}", outcome.violations.join("\n"));
    }
}
