//! A ledger file as the first landed state wrote it, after a first deployment and an upgrade: every later build reads it, goes on
//! with it, and leaves it readable for the build that wrote it.
//!
//! `cargo xtask versions --keep-ledger FILE` makes such a file.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use rusqlite::Connection;
use serde_json::Value;

const APPLICATION: &str = "sample";

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config =
            format!("application = \"{APPLICATION}\"\n[components.api]\n[containers.api]\ncomponent = \"api\"\n");
        std::fs::write(dir.path().join("replank.toml"), config).unwrap();
        std::fs::create_dir(dir.path().join("ledger")).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden_ledger/first.db");
        std::fs::copy(golden, dir.path().join("ledger/replank.db")).unwrap();
        Self(dir)
    }

    #[track_caller]
    fn well(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
        command.args(arguments).env_clear().env("REPLANK_HOME", self.0.path()).env("USER", "alice").current_dir("/");
        let out = command.output().unwrap();
        let told = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{arguments:?}: {told}{}", String::from_utf8_lossy(&out.stderr));
        told
    }

    fn database(&self) -> Connection {
        Connection::open(self.file()).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("ledger/replank.db")
    }
}

/// Names of tables and their columns.
fn columns(database: &Connection) -> BTreeSet<(String, String)> {
    let mut select = database
        .prepare("SELECT t.name, c.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c WHERE t.type = 'table'")
        .unwrap();
    select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect()
}

fn record(database: &Connection) -> Value {
    let bytes: Vec<u8> = database.query_row("SELECT body FROM record", [], |row| row.get(0)).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Where `old` has an object, `new` has one with the same names.
fn says_as_much(old: &Value, new: &Value, at: &str) {
    if let Value::Object(old) = old {
        for (name, value) in old {
            let at = format!("{at}.{name}");
            let there = new.get(name).unwrap_or_else(|| panic!("{at} was lost"));
            says_as_much(value, there, &at);
        }
    }
}

#[test]
fn the_first_landed_states_ledger_is_read_gone_on_with_and_left_readable() {
    let home = Home::new();
    let (before, tables) = (record(&home.database()), columns(&home.database()));
    assert_eq!(before["running"]["version"], "0.11.0", "a deployment and an upgrade were recorded");

    let told = home.well(&["history", "--verify"]);
    let lines: u64 = before["history"]["count"].as_u64().unwrap();
    assert!(told.contains("consistent") && told.contains(&lines.to_string()), "{lines}: {told}");
    let copy = home.0.path().join("copy.db");
    home.well(&["ledger", "backup", copy.to_str().unwrap()]);
    assert_eq!(record(&Connection::open(copy).unwrap()), before);

    // The next line is chained to what is there, and nothing that the other build needs is gone.
    home.well(&["token", "create", "robot", "--reason", "a later build"]);
    home.well(&["history", "--verify"]);
    let after = record(&home.database());
    assert_eq!(after["history"]["count"].as_u64(), Some(lines + 1));
    assert_eq!((&after["format"], &after["min_reader"]), (&Value::from(1), &Value::from(1)));
    says_as_much(&before, &after, "record");
    let lost: Vec<_> = tables.difference(&columns(&home.database())).cloned().collect();
    assert!(lost.is_empty(), "{lost:?}");
}
