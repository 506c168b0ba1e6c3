//! Records, jobs and deployments to test with.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;

use replank_core::fault::Told;
use replank_core::image::{ImageId, Images};
use replank_core::phase::*;
use replank_core::record::*;
use replank_core::words::*;

pub fn sha(digit: char) -> CommitSha {
    CommitSha::new(digit.to_string().repeat(40)).unwrap()
}

pub fn app() -> ComponentName {
    ComponentName::new("app").unwrap()
}

pub fn images(digit: char) -> Images {
    let id = Digest::new(format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
    BTreeMap::from([(app(), ImageId::Engine { id, name: "app".to_owned() })])
}

pub fn plan() -> Plan {
    let container = |overlap, controller| ContainerPlan { component: app(), overlap, controller };
    Plan {
        containers: BTreeMap::from([
            (ContainerName::new("app").unwrap(), container(Overlap::Allowed, true)),
            (ContainerName::new("worker").unwrap(), container(Overlap::StopOldFirst, false)),
        ]),
        ..Plan::default()
    }
}

pub fn job(id: &str, minor: u64, mode: Mode) -> Job {
    let digit = char::from_digit(minor as u32, 10).unwrap();
    Job {
        id: JobId::new(id).unwrap(),
        target: Target {
            kind: TargetKind::Release,
            version: Version::release(0, minor, 0),
            commit: sha(digit),
            raw_ref: format!("refs/tags/v0.{minor}.0"),
        },
        nonce: Nonce::new("0".repeat(32)).unwrap(),
        actor: Actor { oid: "op".to_owned(), name: String::new(), from: String::new() },
        reason: String::new(),
        idempotency_key: None,
        started_at: Millis(0),
        mode,
        on_rollout_failure: OnRolloutFailure::Hold,
        build_only: false,
        reuse: None,
        accept_one_way: false,
        downgrade: None,
        data: Default::default(),
        reached: Default::default(),
        extra: BTreeMap::new(),
    }
}

/// The deployment of version 0.`minor`.0 as the job `id` makes it.
pub fn deployment(id: &str, minor: u64) -> Deployment {
    let job = job(id, minor, Mode::Single);
    let digit = char::from_digit(minor as u32, 10).unwrap();
    let key = job.key("revision", 1);
    let short: String = key.as_str().chars().take(8).collect();
    Deployment {
        revision: RevisionId::new(format!("v0-{minor}-0-{short}")).unwrap(),
        key,
        version: Version::release(0, minor, 0),
        commit: sha(digit),
        images: images(digit),
        plan: plan(),
        reads_format: None,
    }
}

pub fn snapshot_of(deployment: Deployment) -> Snapshot {
    Snapshot {
        deployment,
        taken_at: Millis(0),
        keep_until: Millis(90 * 24 * 3_600 * 1_000),
        proved_at: Millis(0),
        lost: None,
        closed: None,
        extra: BTreeMap::new(),
    }
}

/// An application whose version 0.1.0 runs and is driven by its own controller.
pub fn running_record() -> Record {
    let id = InstallationId::new("a".repeat(16)).unwrap();
    let mut record = Record::new(id, AppName::new("shop").unwrap(), Millis(0));
    let old = deployment("job-0", 1);
    record.driver.controller = ControllerId::Revision(old.revision.clone());
    record.running = Some(old.clone());
    record.serving = Some(old);
    record
}

pub fn fetched() -> Fetched {
    let recipe = Recipe {
        dockerfile: "Dockerfile".to_owned(),
        context: ".".to_owned(),
        target: None,
        args: BTreeMap::new(),
        platform: None,
        secrets: vec![],
        repository: "shop/app".to_owned(),
        unlabelled: false,
    };
    Fetched { recipes: BTreeMap::from([(app(), recipe)]), manifest: serde_json::Value::Null, signed_by: None }
}

fn observed(ops: &[Op]) -> BTreeMap<Op, OpState> {
    let state = |op: &Op| {
        let generation = u64::from(matches!(op, Op::CutOver | Op::Settle));
        (*op, OpState { attempt: 1, generation, intended_at: Millis(0), observed_at: Some(Millis(0)) })
    };
    ops.iter().map(state).collect()
}

/// A record in `state`, with a swap that is as far as that state allows.
pub fn record_in(state: State, mode: Mode) -> Record {
    let mut record = running_record();
    let old = record.running.clone().unwrap();
    let new = deployment("job-1", 2);
    record.job = Some(job("job-1", 2, mode));
    let way_back = WayBack::Snapshot(Box::new(snapshot_of(old.clone())));
    let mut swap = Swap::new(Some(old.clone()), new.clone(), mode, way_back.clone());
    swap.ops = observed(&[Op::StopOld, Op::StartNew, Op::CutOver, Op::Settle]);
    let mut back = Swap::new(Some(new.clone()), old.clone(), mode, way_back);
    back.ops = swap.ops.clone();
    let fault = Told::permanent("it failed", "");
    if !state.before_swap() && state != State::Idle {
        record.snapshot = Some(snapshot_of(old));
    }
    record.phase = match state {
        State::Idle => Phase::Idle,
        State::Queued => Phase::Queued,
        State::Fetching => Phase::Fetching,
        State::Building => {
            let built = Built {
                image: images('2')[&app()].clone(),
                bases: BTreeMap::new(),
                queued_ms: 0,
                built_ms: 0,
                adopted: false,
            };
            let build = Build { attempt: 1, intended_at: Millis(0), built: Some(built) };
            Phase::Building(Building { fetched: fetched(), builds: BTreeMap::from([(app(), build)]) })
        }
        State::Patching => {
            Phase::Patching(Patching { attempts: Default::default(), fetched: fetched(), images: images('2') })
        }
        State::RollingOut => Phase::RollingOut(swap),
        State::Validating => Phase::Validating(swap),
        State::Confirming => {
            let flip = Flip { swap: back, why: "bad".to_owned(), since: Millis(0) };
            Phase::Confirming(Confirming { swap, deadline: None, flip: Some(flip) })
        }
        State::Succeeded => Phase::Succeeded { built_only: None },
        State::FailedPre => Phase::FailedPre { fault },
        State::FailedRollout => Phase::FailedRollout { fault, swap },
        State::RollingBack => Phase::RollingBack(RollingBack { swap: back, reason: String::new() }),
        State::RolledBack => Phase::RolledBack { reason: String::new() },
        State::RollbackFailed => Phase::RollbackFailed { fault, swap: back },
    };
    record
}
