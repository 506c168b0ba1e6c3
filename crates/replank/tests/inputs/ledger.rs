//! A ledger that is damaged, or not ours.

use std::os::unix::fs::FileExt as _;

use crate::rig::{Options, Rig, get, refused, said};

#[test]
fn a_damaged_ledger_is_refused_in_one_line_and_left_as_it_is() {
    let mut rig = Rig::start(Options::default());
    drop(rig.serving.take());
    let file = rig.home.join("ledger/replank.db");
    // Nothing runs: what stands in the write-ahead log belongs into the file, as after any orderly end.
    let whole =
        std::process::Command::new("sqlite3").arg(&file).arg("PRAGMA wal_checkpoint(TRUNCATE)").output().unwrap();
    assert!(whole.status.success(), "{whole:?}");
    let good = std::fs::read(&file).unwrap();
    let damages: [(&str, u64, usize); 3] =
        [("the middle", 4096, good.len() - 8192), ("the head", 0, 100), ("everything", 0, good.len())];
    for (name, at, length) in damages {
        let noise: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(167).wrapping_add(13)).collect();
        std::fs::write(&file, &good).unwrap();
        let handle = std::fs::File::options().write(true).open(&file).unwrap();
        handle.write_all_at(&noise, at).unwrap();
        drop(handle);
        let damaged = std::fs::read(&file).unwrap();
        let commands: [&[&str]; 5] =
            [&["serve"], &["deploy"], &["history", "--verify"], &["escape-hatch"], &["token", "list"]];
        for command in commands {
            // The last three ask the service first, or need none.
            let out = rig.cli(command);
            eprint!("{name}, {command:?}: ");
            let code = out.status.code().unwrap_or_default();
            let line = refused(&out, code, &["ledger"]);
            assert!(matches!(code, 1 | 4), "{line}");
            assert!(line.contains("damaged") || line.contains("another program"), "{line}");
            assert!(
                line.contains("backup") || line.contains("directory of its own"),
                "nothing says what to do: {line}"
            );
            assert!(std::fs::read(&file).unwrap() == damaged, "{name}: {command:?} changed the file");
        }
        // The service is down, and that is what the rest says.
        refused(&rig.cli(&["status"]), 4, &["cannot be reached", "replank serve"]);
    }
    // What runs needs none of it, and with the backup in place all goes on.
    let (code, _) = get(rig.web, "/version", "").unwrap();
    assert_eq!(code, 200);
    std::fs::write(&file, &good).unwrap();
    for suffix in ["-wal", "-shm"] {
        let beside = rig.home.join(format!("ledger/replank.db{suffix}"));
        if beside.exists() {
            std::fs::remove_file(beside).unwrap();
        }
    }
    rig.serve();
    rig.goes_on("0.2.0");
}

#[test]
fn another_programs_database_and_a_directory_in_the_files_place_are_refused() {
    let rig = Rig::prepare(Options::default());
    let file = rig.home.join("ledger/replank.db");
    std::fs::remove_dir_all(rig.home.join("ledger")).unwrap();
    std::fs::create_dir_all(rig.home.join("ledger")).unwrap();
    let made = std::process::Command::new("sqlite3").arg(&file).arg("CREATE TABLE theirs (a)").output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let theirs = std::fs::read(&file).unwrap();
    refused(&rig.cli(&["serve"]), 1, &["another program", "directory of its own"]);
    assert!(std::fs::read(&file).unwrap() == theirs);
    std::fs::remove_file(&file).unwrap();
    // What an engine makes of a mounted file that was not there.
    std::fs::create_dir(&file).unwrap();
    refused(&rig.cli(&["serve"]), 1, &["is not a plain file", "mount the ledger's directory"]);
    std::fs::remove_dir(&file).unwrap();
    let out = rig.cli(&["deploy", "0.1.0"]);
    assert!(out.status.success(), "{}", said(&out));
}
