//! The simulation itself: a seed is one story, and a mistake in what production counts on does not go unseen.
#![allow(clippy::unwrap_used)]

use replank_sim::{Mutant, Outcome, play};

/// What the universes of so many seeds come to, until one of them has a violation.
fn first_violation(mutant: Option<Mutant>, seeds: u64) -> Option<Outcome> {
    (1..=seeds).map(|seed| play(seed, 5, false, mutant)).find(|outcome| !outcome.violations.is_empty())
}

#[test]
fn a_seed_is_one_story() {
    for seed in 1..6 {
        let (once, again) = (play(seed, 4, true, None), play(seed, 4, true, None));
        assert!(once.trace.len() > 50, "something happened");
        assert_eq!(once.trace, again.trace, "seed {seed}");
    }
    assert_ne!(play(1, 2, true, None).trace, play(2, 2, true, None).trace);
}

#[test]
fn a_few_universes_are_in_order_and_see_every_end() {
    let outcomes: Vec<Outcome> = (1..60).map(|seed| play(seed, 5, false, None)).collect();
    for outcome in &outcomes {
        assert_eq!(outcome.violations, Vec::<String>::new(), "seed {}", outcome.seed);
    }
    for end in ["succeeded", "failed_pre", "failed_rollout", "rolled_back", "rollback_failed"] {
        assert!(outcomes.iter().any(|outcome| outcome.ends.contains_key(end)), "no job ended as {end}");
    }
    assert!(outcomes.iter().map(|outcome| outcome.faults).sum::<u64>() > 300);
}

fn is_noticed(mutant: Mutant, by: &str) {
    let found = first_violation(Some(mutant), 400).unwrap_or_else(|| panic!("{mutant:?} went unseen"));
    assert!(found.violations.iter().any(|violation| violation.contains(by)), "{mutant:?}: {:?}", found.violations);
}

#[test]
fn a_ledger_without_compare_and_swap_is_noticed() {
    is_noticed(Mutant::NoCompareAndSwap, "history");
}

#[test]
fn images_that_are_not_protected_are_noticed() {
    is_noticed(Mutant::ProtectsNothing, "no protected way back");
}

#[test]
fn probes_that_always_pass_are_noticed() {
    is_noticed(Mutant::ProbesLie, "without proof");
}

#[test]
fn a_proxy_that_obeys_the_dead_is_noticed() {
    let found = first_violation(Some(Mutant::ProxyIgnoresGenerations), 2_000);
    assert!(found.is_some(), "a late change of traffic went unseen");
}
