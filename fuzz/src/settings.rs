//! The binary's own reader of settings, for the targets that feed it, and what all of its refusals have in common.

// All of it is used in the binary.
#[allow(dead_code)]
#[path = "../../crates/replank/src/config/mod.rs"]
pub mod config;

#[path = "obeyed.rs"]
mod obeyed;

use config::Problems;
use obeyed::obeyed;

/// A refusal names what is wrong, at a place that exists, in text that a terminal can be given.
pub fn told(text: &str, problems: &Problems) {
    assert!((1..=50).contains(&problems.0.len()), "{} problems", problems.0.len());
    let lines = text.matches('\n').count() + 1;
    for problem in &problems.0 {
        assert!(!problem.what.is_empty() && problem.line <= lines, "{problem:?}");
        let shown = problem.to_string();
        assert!(!shown.contains(|c: char| c.is_control() || obeyed(c)), "{shown:?}");
    }
}
