//! Builds of several ages, and of two record formats, on one ledger: they hand it to each other in both orders.
//!
//! `cargo xtask versions` builds them and says where they are; without that these tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use replank_faults::judge;
use replank_faults::rig::{Controllers, JOB_LIMIT, Kind, Rig};
use replank_testbed::Engine;
use replank_testbed::process;
use serde_json::Value;

/// The program of the first landed state.
const FIRST: &str = "REPLANK_FIRST_BIN";
/// This state's, with the record format raised.
const RAISED: &str = "REPLANK_RAISED_BIN";

/// Where to put the ledger that the first landed state has written, for the test that every run makes of it.
const KEEP: &str = "REPLANK_KEEP_LEDGER";

fn named(variable: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        eprintln!("SKIPPED: {variable} names no program; `cargo xtask versions` builds it and runs this");
    }
    found
}

fn current() -> Controllers {
    Controllers::with_faults(PathBuf::from(env!("CARGO_BIN_EXE_replank-with-faults")))
}

async fn upgrade(rig: &mut Rig, to: &Controllers, ends: &str) -> Value {
    rig.turn_to(to.clone()).unwrap();
    let tag = rig.release(Kind::Good).unwrap();
    rig.upgrade(&tag).await.unwrap();
    rest(rig, ends).await
}

async fn roll_back(rig: &Rig) -> Value {
    rig.roll_back().await.unwrap();
    rest(rig, "rolled_back").await
}

async fn rest(rig: &Rig, ends: &str) -> Value {
    let row = rig.installed.until_state(JOB_LIMIT, &mut vec![], &replank_faults::rig::RESTING).await.unwrap();
    assert_eq!(row["state"], ends, "{row:#}");
    row
}

/// `history --verify` by a program, on the file itself.
fn verified(rig: &Rig, by: &Controllers) -> Result<String, String> {
    let mut command = rig.installed.command(&["history", "--verify"]);
    let mut mine = std::process::Command::new(&by.program);
    mine.args(command.get_args()).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command = mine;
    process::text(&mut command).map_err(|error| format!("{error:#}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_the_first_landed_state_and_this_one_hand_one_ledger_to_each_other() {
    let Some(program) = named(FIRST) else { return };
    let first = Controllers { runtime: "replank-runtime-first", program, reads: 1 };
    let mut rig = Rig::start(Engine::from_env().unwrap(), first.clone(), "blue-green").unwrap();
    let home = rig.installed.options.home.clone();
    if let Some(file) = std::env::var_os(KEEP) {
        upgrade(&mut rig, &first, "succeeded").await;
        let database = rusqlite::Connection::open(home.join("ledger").join("replank.db")).unwrap();
        database.execute("VACUUM INTO ?1", [file.to_str().unwrap()]).unwrap();
    }

    // Old wrote, new goes on with the job and drives from then on.
    upgrade(&mut rig, &current(), "succeeded").await;
    let (misfits, kept) = judge::judged(&rig).await.unwrap();
    assert!(misfits.is_empty(), "{misfits:?}");
    assert_eq!(kept.record.min_reader, 1, "the way back leads to who reads the first format only");
    // New wrote, old takes over: the way back, and then a release that has it.
    roll_back(&rig).await;
    for by in [&first, &current()] {
        verified(&rig, by).unwrap();
    }
    upgrade(&mut rig, &current(), "succeeded").await;
    upgrade(&mut rig, &first, "succeeded").await;
    roll_back(&rig).await;
    let (misfits, _) = judge::judged(&rig).await.unwrap();
    assert!(misfits.is_empty(), "{misfits:?}");
    for by in [&first, &current()] {
        verified(&rig, by).unwrap();
    }
    assert!(home.join("ledger").join("replank.db").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_raised_format_is_written_once_nobody_needs_the_lower_one_and_then_shuts_it_out() {
    let Some(program) = named(RAISED) else { return };
    let raised = Controllers { runtime: "replank-runtime-raised", program, reads: 2 };
    let mut rig = Rig::start(Engine::from_env().unwrap(), current(), "blue-green").unwrap();

    upgrade(&mut rig, &raised, "succeeded").await;
    // The raised one drives, and the other may have to.
    let kept = judge::kept(&rig.installed.options.home).await.unwrap();
    assert_eq!(kept.record.min_reader, 1);
    roll_back(&rig).await;
    let (misfits, _) = judge::judged(&rig).await.unwrap();
    assert!(misfits.is_empty(), "{misfits:?}");

    // From here on the way back leads to one that reads it.
    upgrade(&mut rig, &raised, "succeeded").await;
    upgrade(&mut rig, &raised, "succeeded").await;
    verified(&rig, &raised).unwrap();
    let refused = verified(&rig, &current()).unwrap_err();
    assert!(refused.contains("the record needs a reader of format 2, and this build reads up to 1"), "{refused}");

    // A release that could not read the record is refused before anything is touched.
    let row = upgrade(&mut rig, &current(), "failed_pre").await;
    let told = row.to_string();
    assert!(told.contains("reads record format 1, and this record needs 2"), "{told}");
    // And among those that can, the way back works.
    roll_back(&rig).await;
    verified(&rig, &raised).unwrap();
}
