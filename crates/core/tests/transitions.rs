//! The table of the wire contract, pair by pair: every (from, to) of the 14 x 14 states is either in the table and reachable
//! by an event, or not in the table and reachable by none.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use replank_core::event::{Event, ProxyStep, TokenChange};
use replank_core::fault::Told;
use replank_core::phase::*;
use replank_core::ports::Role;
use replank_core::record::*;
use replank_core::transition::{Refused, apply, next};
use replank_core::words::*;
use support::*;

use State::*;

/// The table, written out by hand from the contract.
fn allowed() -> BTreeSet<(State, State)> {
    let mut pairs = BTreeSet::new();
    let mut add = |from: &[State], to: State| pairs.extend(from.iter().map(|f| (*f, to)));
    add(&[Idle, Succeeded, FailedPre, FailedRollout, RolledBack, RollbackFailed], Queued);
    add(&[Queued], Fetching);
    add(&[Fetching], Building);
    add(&[Building], Patching);
    add(&[Patching], RollingOut);
    // Build-only.
    add(&[Building], Succeeded);
    // Failures, cancel and reset before the platform was touched.
    add(&[Queued, Fetching, Building, Patching], FailedPre);
    // Single mode.
    add(&[RollingOut], Succeeded);
    add(&[RollingOut], FailedRollout);
    // Blue/green.
    add(&[RollingOut], Validating);
    add(&[Validating], Confirming);
    add(&[Confirming], Succeeded);
    add(&[Validating], FailedRollout);
    add(&[Confirming], RolledBack);
    add(&[Confirming], RollbackFailed);
    // Rollback.
    add(&[RollingOut, Validating, Confirming, Succeeded, FailedRollout, RollbackFailed, FailedPre], RollingBack);
    add(&[RollingBack], RolledBack);
    add(&[RollingBack], RollbackFailed);
    // Reset: any in flight.
    add(&[Confirming, RollingBack], FailedRollout);
    pairs
}

fn actor() -> Actor {
    Actor { oid: "op".to_owned(), name: String::new(), from: String::new() }
}

fn step() -> ContainerName {
    ContainerName::new("migrate-app").unwrap()
}

/// One of every kind of event, with the data that gives it its best chance.
fn events(record: &Record) -> Vec<Event> {
    let old = deployment("job-0", 1);
    let way_back = WayBack::Snapshot(Box::new(snapshot_of(old.clone())));
    let built = Built {
        image: images('2')[&app()].clone(),
        bases: Default::default(),
        queued_ms: 0,
        built_ms: 0,
        adopted: false,
    };
    let fault = Told::permanent("it failed", "");
    let all = vec![
        Event::Start { job: Box::new(job("job-9", 3, Mode::Single)), override_quarantine: false },
        Event::RollbackStarted { actor: actor(), reason: String::new(), data_restored: false },
        Event::Cancelled { actor: actor(), reason: String::new() },
        Event::Reset { actor: actor(), reason: String::new() },
        Event::Kept { actor: actor(), reason: String::new() },
        Event::QuarantineLifted { actor: actor(), commit: sha('2'), reason: String::new() },
        Event::MovedTagAccepted {
            actor: actor(),
            reason: String::new(),
            raw_ref: "refs/tags/v1.0.0".to_owned(),
            from: sha('1'),
            to: sha('2'),
        },
        Event::DriftAccepted { actor: actor(), reason: String::new(), what: vec!["container app is gone".to_owned()] },
        Event::TrackCommits { actor: actor(), on: false },
        Event::TokenChanged {
            actor: actor(),
            id: String::new(),
            name: String::new(),
            role: Role::Reader,
            change: TokenChange::Revoked,
            reason: String::new(),
        },
        Event::LedgerRestored { actor: actor(), reason: String::new(), file: String::new(), replaced: None },
        proxy_upgraded(ProxyStep::Begun),
        Event::RefsSeen { latest: Latest::default() },
        Event::HandedOver { to: ControllerId::Host },
        Event::TookOver { by: ControllerId::Host },
        Event::Claimed,
        Event::Fetched(fetched()),
        Event::BuildIntended { component: app() },
        Event::BuildDone { component: app(), built },
        Event::BuildsComplete,
        Event::Progressed { percent: 50 },
        Event::Prepared { to: Box::new(deployment("job-1", 2)), way_back, escape_hatch: vec![] },
        Event::StepIntended { step: step() },
        Event::StepDone { step: step() },
        Event::OpIntended { op: Op::StartNew },
        Event::OpObserved { op: Op::StartNew },
        Event::Landed,
        Event::CutOverIntended,
        Event::Converged { deadline: Millis(1) },
        Event::FlipIntended { why: String::new() },
        Event::Completed,
        Event::Failed { fault },
        Event::FlippedBack,
        Event::RolledBack,
        Event::RepairIntended { why: String::new() },
        Event::ProvedServes { why: String::new() },
        Event::WayBackProved { lost: String::new() },
        Event::DriftSeen { what: vec![] },
        Event::SnapshotDropped { why: String::new() },
        Event::PurgeTried { removed: vec![], why: String::new() },
    ];
    let _ = record;
    all
}

/// Puts who and why into a command, and answers whether a reason belongs to it; `None` for what no person gives.
///
/// Named one by one: a new kind of event does not compile until it stands here, and must be added to [`events`] then.
fn by_a_person(event: &mut Event, who: &Actor, why: &str) -> Option<bool> {
    match event {
        Event::Start { job, override_quarantine } => {
            (job.actor, job.reason, *override_quarantine) = (who.clone(), why.to_owned(), true);
            Some(true)
        }
        Event::RollbackStarted { actor, reason, .. }
        | Event::Cancelled { actor, reason }
        | Event::Reset { actor, reason }
        | Event::Kept { actor, reason }
        | Event::QuarantineLifted { actor, reason, .. }
        | Event::MovedTagAccepted { actor, reason, .. }
        | Event::DriftAccepted { actor, reason, .. }
        | Event::TokenChanged { actor, reason, .. }
        | Event::LedgerRestored { actor, reason, .. }
        | Event::ProxyUpgraded { actor, reason, .. } => {
            (*actor, *reason) = (who.clone(), why.to_owned());
            Some(true)
        }
        Event::TrackCommits { actor, .. } => {
            *actor = who.clone();
            Some(false)
        }
        Event::RefsSeen { .. }
        | Event::HandedOver { .. }
        | Event::TookOver { .. }
        | Event::Claimed
        | Event::Fetched(_)
        | Event::BuildIntended { .. }
        | Event::BuildDone { .. }
        | Event::BuildsComplete
        | Event::Progressed { .. }
        | Event::Prepared { .. }
        | Event::StepIntended { .. }
        | Event::StepDone { .. }
        | Event::OpIntended { .. }
        | Event::OpObserved { .. }
        | Event::Landed
        | Event::CutOverIntended
        | Event::Converged { .. }
        | Event::FlipIntended { .. }
        | Event::Completed
        | Event::Failed { .. }
        | Event::FlippedBack
        | Event::RolledBack
        | Event::RepairIntended { .. }
        | Event::ProvedServes { .. }
        | Event::WayBackProved { .. }
        | Event::DriftSeen { .. }
        | Event::SnapshotDropped { .. }
        | Event::PurgeTried { .. } => None,
    }
}

/// Every way to be in a state that changes what may follow.
fn variants(state: State) -> Vec<Record> {
    let mut records = vec![record_in(state, Mode::Single), record_in(state, Mode::BlueGreen)];
    for mut record in records.clone() {
        record.job.as_mut().unwrap().build_only = true;
        records.push(record);
    }
    if state == Confirming {
        let mut open = record_in(state, Mode::BlueGreen);
        let Phase::Confirming(c) = &mut open.phase else { unreachable!() };
        (c.flip, c.deadline) = (None, Some(Millis(0)));
        records.push(open);
    }
    records
}

#[test]
fn the_contracts_table_pair_by_pair() {
    let mut reached = BTreeSet::new();
    for from in State::ALL {
        for record in variants(from) {
            for event in events(&record) {
                if let Ok(phase) = next(&record, &event, Millis(5)) {
                    let to = phase.state();
                    // Staying is no transition, except that rollback from a rollback's failure and the like are listed.
                    if to != from {
                        reached.insert((from, to));
                    }
                }
            }
        }
    }
    let allowed = allowed();
    for from in State::ALL {
        for to in State::ALL.into_iter().filter(|to| *to != from) {
            let pair = (from, to);
            assert_eq!(
                reached.contains(&pair),
                allowed.contains(&pair),
                "{} -> {}: reachable must equal the contract's table",
                from.name(),
                to.name()
            );
        }
    }
}

#[test]
fn a_start_is_refused_in_flight_and_accepted_in_every_resting_state() {
    for state in State::ALL {
        let record = record_in(state, Mode::BlueGreen);
        let event = Event::Start { job: Box::new(job("job-9", 3, Mode::Single)), override_quarantine: false };
        match next(&record, &event, Millis(0)) {
            Ok(Phase::Queued) => assert!(!state.in_flight(), "{}", state.name()),
            Err(Refused::InFlight { from }) => assert!(state.in_flight() && from == state),
            other => panic!("{}: {other:?}", state.name()),
        }
    }
}

/// Elsewhere a result was removed after ten seconds, and nobody who looked later learned of it. Here only a person ends one.
#[test]
fn lesson_21_a_final_state_stays_until_somebody_starts_something() {
    for state in State::ALL.into_iter().filter(|state| !state.in_flight()) {
        for record in variants(state) {
            for event in events(&record) {
                // Long after.
                let Ok(phase) = next(&record, &event, Millis(i64::MAX / 2)) else { continue };
                let by_a_person = matches!(event, Event::Start { .. } | Event::RollbackStarted { .. });
                assert!(phase.state() == state || by_a_person, "{} ended {}", event.name(), state.name());
            }
        }
    }
}

#[test]
fn a_rollback_without_a_snapshot_is_refused_by_name() {
    let mut record = record_in(Succeeded, Mode::Single);
    record.snapshot = None;
    let event = Event::RollbackStarted { actor: actor(), reason: String::new(), data_restored: false };
    assert_eq!(next(&record, &event, Millis(0)), Err(Refused::NoSnapshot));
}

#[test]
fn a_rollback_to_a_controller_that_could_not_read_the_record_is_refused_in_every_state() {
    let event = Event::RollbackStarted { actor: actor(), reason: String::new(), data_restored: true };
    let mut refused = 0;
    for (state, mode) in State::ALL.into_iter().flat_map(|state| [(state, Mode::Single), (state, Mode::BlueGreen)]) {
        let record = record_in(state, mode);
        let Ok(Phase::RollingBack(_)) = next(&record, &event, Millis(0)) else { continue };
        let mut behind = record;
        behind.min_reader += 1;
        let answer = next(&behind, &event, Millis(0));
        assert!(matches!(answer, Err(Refused::Unreadable { reads: 1, needs: 2, .. })), "{}: {answer:?}", state.name());
        refused += 1;
    }
    assert!(refused > 0, "no state leads to a rollback");
}

#[test]
fn success_needs_the_swap_to_be_observed() {
    for op in [Op::StartNew, Op::CutOver, Op::Settle] {
        let mut record = record_in(RollingOut, Mode::Single);
        let Phase::RollingOut(swap) = &mut record.phase else { unreachable!() };
        swap.ops.get_mut(&op).unwrap().observed_at = None;
        assert!(matches!(next(&record, &Event::Completed, Millis(0)), Err(Refused::Inconsistent { .. })), "{op:?}");
    }
}

#[test]
fn a_swap_needs_a_way_back_to_what_runs() {
    let record = record_in(Patching, Mode::Single);
    let prepared = |way_back| Event::Prepared { to: Box::new(deployment("job-1", 2)), way_back, escape_hatch: vec![] };
    assert!(next(&record, &prepared(WayBack::FirstDeployment), Millis(0)).is_err());
    let other = WayBack::Snapshot(Box::new(snapshot_of(deployment("job-7", 4))));
    assert!(next(&record, &prepared(other), Millis(0)).is_err());
}

#[test]
fn a_quarantined_commit_needs_the_override() {
    let failed = apply(
        &record_in(Validating, Mode::BlueGreen),
        &Event::Failed { fault: Told::permanent("probes fail", "") },
        Millis(3),
    )
    .unwrap()
    .record;
    let again =
        |override_quarantine| Event::Start { job: Box::new(job("job-2", 2, Mode::Single)), override_quarantine };
    assert!(matches!(next(&failed, &again(false), Millis(4)), Err(Refused::Quarantined { .. })));
    let started = apply(&failed, &again(true), Millis(4)).unwrap().record;
    assert_eq!(started.phase.state(), Queued);
    assert!(started.quarantine.is_empty());
    // Or it is lifted, with a reason that stays in the history.
    let lift = Event::QuarantineLifted { actor: actor(), commit: sha('2'), reason: "it was the disk".to_owned() };
    let lifted = apply(&failed, &lift, Millis(5)).unwrap();
    assert!(next(&lifted.record, &again(false), Millis(6)).is_ok());
    let line = String::from_utf8(lifted.lines[0].bytes.clone()).unwrap();
    assert!(
        line.contains("it was the disk") && line.contains("\"oid\":\"op\"") && line.contains(sha('2').as_str()),
        "{line}"
    );
    assert!(matches!(apply(&lifted.record, &lift, Millis(7)), Err(Refused::Inconsistent { .. })), "once");
}

/// Quarantine is of the commit: neither another tag on it nor another image of it is another release.
#[test]
fn neither_a_new_tag_nor_a_new_build_slips_past_the_quarantine() {
    let failed = |state, mode| {
        let fault = Told::permanent("probes fail", "");
        apply(&record_in(state, mode), &Event::Failed { fault }, Millis(3)).unwrap().record
    };
    for record in [failed(Validating, Mode::BlueGreen), failed(RollingOut, Mode::Single)] {
        let start = |minor: u64, commit: char| {
            let mut job = job("job-2", minor, Mode::Single);
            (job.target.version, job.target.commit) = (Version::release(0, minor, 0), sha(commit));
            job.target.raw_ref = format!("refs/tags/v0.{minor}.0");
            next(&record, &Event::Start { job: Box::new(job), override_quarantine: false }, Millis(4))
        };
        assert!(matches!(start(2, '2'), Err(Refused::Quarantined { .. })));
        for retagged in [3, 9] {
            let refused = start(retagged, '2').expect_err("the same commit under another tag");
            // The version that failed is named, and not the one that it is called now.
            assert!(
                matches!(&refused, Refused::Quarantined { .. }) && refused.to_string().contains("0.2.0"),
                "{refused}"
            );
        }
        // Another commit may be started, also under the number that failed.
        assert!(start(2, '7').is_ok() && start(3, '3').is_ok());
    }
}

/// Whoever reads the history learns of each command who gave it, when, why, and from where.
#[test]
fn each_command_is_in_the_history_with_who_when_why_and_from_where() {
    let alice = Actor { oid: "token:7".to_owned(), name: "alice".to_owned(), from: "10.1.2.3".to_owned() };
    let why = "because of the outage".to_owned();
    let mut told = BTreeSet::new();
    for state in State::ALL {
        for mut record in variants(state) {
            let drift = apply(&record, &Event::DriftSeen { what: vec!["container app is gone".to_owned()] }, Millis(4));
            let drifted = drift.map(|commit| commit.record);
            let fault = Told::permanent("probes fail", "");
            if let Ok(failed) = apply(&record, &Event::Failed { fault }, Millis(4)) {
                record.quarantine.extend(failed.record.quarantine);
            }
            for record in [Some(record), drifted.ok()].into_iter().flatten() {
                for mut event in events(&record) {
                    let Some(has_reason) = by_a_person(&mut event, &alice, &why) else { continue };
                    if let Event::TrackCommits { on, .. } = &mut event {
                        *on = !record.track_commits;
                    }
                    let Ok(commit) = apply(&record, &event, Millis(5)) else { continue };
                    let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
                    let expect = serde_json::json!({ "oid": "token:7", "name": "alice", "from": "10.1.2.3" });
                    assert_eq!((&line["actor"], &line["ts"]), (&expect, &Millis(5).rfc3339().into()), "{line}");
                    if has_reason {
                        assert_eq!(line["reason"], why.as_str(), "{line}");
                    }
                    told.insert(line["event"].as_str().unwrap().to_owned());
                }
            }
        }
    }
    assert_eq!(told.len(), 12, "a command was refused everywhere: {told:?}");
}

#[test]
fn every_commit_adds_exactly_one_line_but_for_looks_that_found_nothing_and_percents() {
    for state in State::ALL {
        for record in variants(state) {
            for event in events(&record) {
                let Ok(commit) = apply(&record, &event, Millis(5)) else {
                    continue;
                };
                let expect = usize::from(!matches!(event, Event::RefsSeen { .. } | Event::Progressed { .. }));
                assert_eq!(commit.lines.len(), expect, "{} in {}", event.name(), state.name());
                assert_eq!(commit.record.history.count, record.history.count + expect as u64);
                // Whoever follows the history alone learns each state, and which failures wait for a person.
                let line =
                    commit.lines.first().map_or_else(String::new, |l| String::from_utf8_lossy(&l.bytes).into_owned());
                let to = commit.record.phase.state();
                let told = line.contains(&format!("\"state\":\"{}\"", to.name()));
                assert_eq!(told, to != state, "{} in {}: {line}", event.name(), state.name());
                let holds = record.job.as_ref().is_some_and(|j| j.on_rollout_failure == OnRolloutFailure::Hold);
                let held = to == State::FailedRollout && to != state && holds;
                assert_eq!(line.contains("\"held\":true"), held, "{} in {}: {line}", event.name(), state.name());
            }
        }
    }
}

/// What a look at the remote puts into the history, told from one that found nothing new to start (audit of `candidate_detected`).
#[test]
fn a_look_is_an_event_only_when_something_newer_appeared() {
    let release = |minor: u64| Some((Version::release(0, minor, 0), sha('5')));
    let check = |known: Latest, seen: Latest, track_commits: bool, expect: &[(&str, &str)]| {
        // Version 0.1.0 at commit 111… runs.
        let mut record = running_record();
        (record.latest, record.track_commits) = (known, track_commits);
        let commit = apply(&record, &Event::RefsSeen { latest: seen.clone() }, Millis(5)).unwrap();
        assert_eq!(commit.record.latest, seen, "what was seen is kept whether it is an event or not");
        let lines: Vec<serde_json::Value> =
            commit.lines.iter().map(|line| serde_json::from_slice(&line.bytes).unwrap()).collect();
        assert_eq!(lines.len(), usize::from(!expect.is_empty()), "{seen:?}");
        for name in ["version", "sha", "branch_head"] {
            let wanted = expect.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
            assert_eq!(lines.first().and_then(|line| line[name].as_str()), wanted, "{name} of {seen:?}");
        }
    };
    let at = |release: Option<(Version, CommitSha)>, head: Option<char>| Latest {
        release,
        branch_head: head.map(sha),
        checked_at: Some(Millis(5)),
        own: None,
    };
    let five = sha('5');
    let (first, second) =
        ([("version", "0.2.0"), ("sha", five.as_str())], [("version", "0.3.0"), ("sha", five.as_str())]);
    check(Latest::default(), at(release(2), None), true, &first);
    check(at(release(2), None), at(release(2), None), true, &[]);
    check(at(release(2), None), at(release(3), None), true, &second);
    // Up to date: what runs is the newest, and after an upgrade it still is.
    check(Latest::default(), at(release(1), None), true, &[]);
    check(at(release(2), None), at(release(1), None), true, &[]);
    check(at(release(2), None), at(None, None), true, &[]);
    // The newest tag was moved or has gone: the one before it is no news.
    check(at(release(3), None), at(release(2), None), true, &[]);
    // Heads of the tracking branch, while commits are followed: not the one that runs, and each once.
    let eight = sha('8');
    check(at(release(1), None), at(release(1), Some('8')), true, &[("branch_head", eight.as_str())]);
    check(at(release(1), Some('8')), at(release(1), Some('8')), true, &[]);
    check(at(release(1), None), at(release(1), Some('1')), true, &[]);
    check(at(release(1), None), at(release(1), Some('8')), false, &[]);
    // One line for both.
    let both = [first[0], first[1], ("branch_head", eight.as_str())];
    check(at(release(1), None), at(release(2), Some('8')), true, &both);
}

#[test]
fn a_changed_token_is_one_line_and_changes_nothing_else() {
    for state in State::ALL {
        let record = record_in(state, Mode::BlueGreen);
        let event = Event::TokenChanged {
            actor: Actor { oid: "uid:0".to_owned(), name: "alice".to_owned(), from: "host".to_owned() },
            id: "token:1".to_owned(),
            name: "robot".to_owned(),
            role: Role::Admin,
            change: TokenChange::Created,
            reason: "night shift".to_owned(),
        };
        let mut commit = apply(&record, &event, Millis(5)).unwrap();
        let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
        let expect = serde_json::json!({ "ts": Millis(5).rfc3339(), "job_id": "", "event": "token_changed",
            "prev_hash": line["prev_hash"], "actor": { "oid": "uid:0", "name": "alice", "from": "host" },
            "token_id": "token:1", "token": "robot", "role": "admin", "change": "created", "reason": "night shift" });
        assert_eq!(line, expect, "{}", state.name());
        (commit.record.history, commit.record.updated_at) = (record.history.clone(), record.updated_at);
        assert_eq!(commit.record, record, "{}", state.name());
    }
}

fn proxy_upgraded(step: ProxyStep) -> Event {
    let (reason, image, outcome) = ("a fix".to_owned(), "replank:2".to_owned(), "40 ms".to_owned());
    Event::ProxyUpgraded { actor: actor(), reason, step, image, outcome }
}

#[test]
fn an_upgrade_of_the_proxy_begins_at_rest_and_ends_whenever_it_ends() {
    for state in State::ALL {
        let record = record_in(state, Mode::BlueGreen);
        let begun = apply(&record, &proxy_upgraded(ProxyStep::Begun), Millis(5));
        assert_eq!(begun.is_err(), state.in_flight(), "{}", state.name());
        for step in [ProxyStep::Done, ProxyStep::Failed, ProxyStep::Finished, ProxyStep::Restored] {
            let mut commit = apply(&record, &proxy_upgraded(step), Millis(5)).unwrap();
            let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
            let expect = serde_json::json!({ "ts": Millis(5).rfc3339(), "job_id": "", "event": "proxy_upgraded",
                "prev_hash": line["prev_hash"], "actor": actor(), "step": step, "image": "replank:2", "reason": "a fix",
                "outcome": "40 ms" });
            assert_eq!(line, expect);
            (commit.record.history, commit.record.updated_at) = (record.history.clone(), record.updated_at);
            assert_eq!(commit.record, record, "{}", state.name());
        }
    }
}

#[test]
fn a_restored_ledger_is_one_line_and_changes_nothing_else() {
    let record = record_in(State::Succeeded, Mode::Single);
    let replaced = Some(Head { count: 9, hash: Some(Digest::of(b"x")) });
    let reason = "the disk failed".to_owned();
    let event = Event::LedgerRestored { actor: actor(), reason, file: "copy.db".to_owned(), replaced };
    let mut commit = apply(&record, &event, Millis(5)).unwrap();
    let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
    assert_eq!((&line["event"], &line["job_id"]), (&"ledger_restored".into(), &"".into()));
    assert_eq!((&line["file"], &line["reason"]), (&"copy.db".into(), &"the disk failed".into()));
    assert_eq!((&line["lines"], &line["replaced_lines"]), (&record.history.count.into(), &9.into()));
    assert_eq!(line["replaced_head"], Digest::of(b"x").to_string());
    (commit.record.history, commit.record.updated_at) = (record.history.clone(), record.updated_at);
    assert_eq!(commit.record, record);
}

#[test]
fn a_confirmation_says_why() {
    let mut open = record_in(Confirming, Mode::BlueGreen);
    let Phase::Confirming(c) = &mut open.phase else { unreachable!() };
    (c.flip, c.deadline) = (None, Some(Millis(9)));
    let event = Event::Kept { actor: actor(), reason: "looks good".to_owned() };
    let commit = apply(&open, &event, Millis(5)).unwrap();
    let line: serde_json::Value = serde_json::from_slice(&commit.lines[0].bytes).unwrap();
    assert_eq!((line["event"].as_str(), line["reason"].as_str()), (Some("kept"), Some("looks good")));
}

#[test]
fn budgets_count_from_the_phase_not_from_the_job() {
    let mut record = record_in(Queued, Mode::Single);
    record.entered_at = Millis(10);
    let fetching = apply(&record, &Event::Claimed, Millis(777)).unwrap().record;
    assert_eq!(fetching.entered_at, Millis(777));
    let still = apply(&fetching, &Event::TookOver { by: ControllerId::Host }, Millis(900)).unwrap().record;
    assert_eq!(still.entered_at, Millis(777), "a take-over gives no new budget");
}

#[test]
fn the_stored_form_survives_and_keeps_unknown_fields() {
    use replank_core::format;
    for state in State::ALL {
        for record in variants(state) {
            let mut value: serde_json::Value = serde_json::from_slice(&format::write(&record).unwrap()).unwrap();
            value["a_newer_field"] = serde_json::json!({"deep": [1, 2]});
            value["job"]["a_newer_job_field"] = serde_json::json!("x");
            let read = format::read(&serde_json::to_vec(&value).unwrap()).unwrap();
            let again: serde_json::Value = serde_json::from_slice(&format::write(&read).unwrap()).unwrap();
            assert_eq!(again, value, "{}", state.name());
            assert_eq!(read.phase, record.phase);
        }
    }
    let mut value: serde_json::Value = serde_json::from_slice(&format::write(&running_record()).unwrap()).unwrap();
    value["min_reader"] = serde_json::json!(format::FORMAT + 1);
    assert!(matches!(format::read(&serde_json::to_vec(&value).unwrap()), Err(format::FormatError::TooNew { .. })));
}

/// What a builder pushes without a label, and nobody needs because its job has failed, is remembered by its tag.
#[test]
fn what_a_failed_job_pushed_without_a_label_is_remembered() {
    let fail = |record: &Record| {
        let failed = Event::Failed { fault: Told::permanent("no", "") };
        apply(record, &failed, Millis(9)).unwrap().record.orphans
    };
    let unlabelled = |state| {
        let mut record = record_in(state, Mode::Single);
        match &mut record.phase {
            Phase::Building(b) => b.fetched.recipes.get_mut(&app()).unwrap().unlabelled = true,
            Phase::Patching(p) => {
                p.fetched.recipes.get_mut(&app()).unwrap().unlabelled = true;
                p.attempts.insert(app(), 1);
            }
            _ => {}
        }
        record
    };
    for state in [Building, Patching] {
        assert_eq!(fail(&record_in(state, Mode::Single)), [], "what has a label is found by it");
        let record = unlabelled(state);
        let orphan = Orphan {
            repository: "shop/app".to_owned(),
            version: Version::release(0, 2, 0),
            key: record.job.as_ref().unwrap().key("build-app", 1),
            since: Millis(9),
            seen: true,
            tried_at: None,
        };
        assert_eq!(fail(&record), std::slice::from_ref(&orphan), "{}", state.name());
        let cancel = Event::Cancelled { actor: actor(), reason: String::new() };
        assert_eq!(apply(&record, &cancel, Millis(9)).unwrap().record.orphans, [orphan]);
    }
    let mut begun = unlabelled(Building);
    let Phase::Building(building) = &mut begun.phase else { unreachable!() };
    building.builds.get_mut(&app()).unwrap().built = None;
    assert_eq!(fail(&begun).iter().map(|orphan| orphan.seen).collect::<Vec<_>>(), [false]);
    for state in [Queued, Fetching] {
        assert_eq!(fail(&unlabelled(state)), [], "nothing was built yet");
    }
    let mut many = unlabelled(Building);
    let one = fail(&many).remove(0);
    many.orphans = vec![Orphan { since: Millis(1), ..one }; ORPHANS_MAX];
    let left = fail(&many);
    assert_eq!((left.len(), left.last().unwrap().since), (ORPHANS_MAX, Millis(9)), "the oldest go");
}

/// A build-only job's images serve a later job of the same commit, also after one in between has failed; never another commit,
/// and never under another recipe.
#[test]
fn what_was_only_built_is_used_by_the_next_job_of_its_commit() {
    let mut built = record_in(Building, Mode::Single);
    built.job.as_mut().unwrap().build_only = true;
    let before = built.clone();
    let done = apply(&built, &Event::BuildsComplete, Millis(1)).unwrap().record;
    let Phase::Succeeded { built_only: Some(made) } = &done.phase else { panic!("{:?}", done.phase) };
    assert_eq!((&made.commit, &made.images), (&sha('2'), &images('2')));
    assert_eq!((&done.running, &done.snapshot), (&before.running, &before.snapshot), "traffic and way back untouched");

    let start = |record: &Record, minor| {
        let event = Event::Start { job: Box::new(job("job-2", minor, Mode::Single)), override_quarantine: false };
        apply(record, &event, Millis(2)).unwrap().record
    };
    let started = start(&done, 2);
    let reuse = |record: &Record| record.job.as_ref().unwrap().reuse.clone();
    assert_eq!(reuse(&started).as_ref(), Some(made));
    let recipe = fetched().recipes[&app()].clone();
    assert_eq!(made.image(&app(), &recipe), Some(&images('2')[&app()]));
    assert_eq!(made.image(&app(), &Recipe { dockerfile: "other".to_owned(), ..recipe }), None);
    assert!(started.images().any(|image| *image == images('2')[&app()]), "clean-up must know that it is needed");

    let failed = apply(&started, &Event::Failed { fault: Told::permanent("no", "") }, Millis(3)).unwrap().record;
    assert_eq!(reuse(&start(&failed, 2)).as_ref(), Some(made), "a failure uses nothing up");
    assert_eq!(reuse(&start(&done, 3)), None, "another commit");
}
