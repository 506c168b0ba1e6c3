//! `replank ledger backup` and `restore`: a copy of a ledger in use, and a copy put back; what is no good copy is refused, and
//! what was there stands as it was.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use replank::lock::ControllerLock;
use replank::system::SystemClock;
use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::Store;
use replank_core::event::Event;
use replank_core::ports::{Clock as _, Ledger as _, Presence};
use replank_core::record::{Actor, ControllerId};
use replank_core::transition::apply;
use replank_core::words::{AppName, CommitSha, Millis};
use serde_json::Value;

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self::of("shop")
    }

    /// With one event in its history.
    fn of(application: &str) -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let config =
            format!("application = \"{application}\"\n[components.api]\n[containers.api]\ncomponent = \"api\"\n");
        fs::write(home.path("replank.toml"), config).unwrap();
        home.well(&["token", "create", "first"]);
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
        command.args(arguments).env_clear().env("REPLANK_HOME", self.0.path()).env("SUDO_USER", "alice");
        command.current_dir(self.0.path()).output().unwrap()
    }

    #[track_caller]
    fn well(&self, arguments: &[&str]) -> String {
        let out = self.run(arguments);
        assert!(out.status.success(), "{arguments:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.well(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// It is refused in these words, and the ledger is byte for byte what it was.
    #[track_caller]
    fn refuses(&self, file: &Path, words: &str) {
        let before = self.ledger();
        let out = self.run(&["ledger", "restore", file.to_str().unwrap()]);
        let told = text(&out.stderr);
        assert!(matches!(out.status.code(), Some(1 | 3)), "{:?} {told}", out.status);
        assert!(told.contains(words), "wanted {words}, got {told}");
        assert_eq!(self.ledger(), before, "{words}");
        self.has_no_scraps();
    }

    #[track_caller]
    fn has_no_scraps(&self) {
        let names =
            fs::read_dir(self.path("ledger")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let scraps: Vec<String> =
            names.filter(|name| name.starts_with(".restore") || name.starts_with(".replank")).collect();
        assert!(scraps.is_empty(), "{scraps:?}");
    }

    /// What is in it, whichever file holds which page.
    fn ledger(&self) -> Vec<Vec<u8>> {
        let database = rusqlite::Connection::open(self.path("ledger/replank.db")).unwrap();
        let mut select = database.prepare("SELECT bytes FROM history UNION ALL SELECT body FROM record").unwrap();
        select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    fn events(&self) -> Vec<Value> {
        let database = rusqlite::Connection::open(self.path("ledger/replank.db")).unwrap();
        let mut select = database.prepare("SELECT bytes FROM history ORDER BY seq").unwrap();
        let lines = select.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        lines.map(|line| serde_json::from_slice(&line.unwrap()).unwrap()).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_backup_is_whole_private_and_new() {
    let home = Home::new();
    let made = home.json(&["ledger", "backup", "copy.db"]);
    let file = home.path("copy.db");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(made["bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!((&made["history"]["count"], &made["state"]), (&1.into(), &"idle".into()));
    let again = home.run(&["ledger", "backup", "copy.db"]);
    assert_eq!(again.status.code(), Some(3), "{}", text(&again.stderr));
    symlink(home.path("elsewhere"), home.path("link.db")).unwrap();
    assert_eq!(home.run(&["ledger", "backup", "link.db"]).status.code(), Some(3));
    assert!(!home.path("elsewhere").exists());
    let told = home.run(&["ledger", "backup", "none/copy.db"]);
    assert!(told.status.code() == Some(1) && text(&told.stderr).contains("cannot be made"), "{}", text(&told.stderr));
    let shown = home.well(&["ledger", "backup", "other.db"]);
    assert!(shown.contains("1 event, consistent with anchor sha256:"), "{shown}");
    // Nothing to copy, and nothing is made of the attempt.
    fs::remove_dir_all(home.path("ledger")).unwrap();
    assert_eq!(home.run(&["ledger", "backup", "third.db"]).status.code(), Some(3));
    assert!(!home.path("ledger").exists() && !home.path("third.db").exists());
    // A history that somebody edited is not handed on as if it were good.
    let home = Home::new();
    let database = rusqlite::Connection::open(home.path("ledger/replank.db")).unwrap();
    database.execute("UPDATE history SET bytes = CAST(bytes || ' ' AS BLOB)", []).unwrap();
    drop(database);
    let out = home.run(&["ledger", "backup", "copy.db"]);
    assert!(out.status.code() == Some(1) && text(&out.stderr).contains("NOT consistent"), "{}", text(&out.stderr));
    assert!(!home.path("copy.db").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_beside_a_writer_is_consistent() {
    let home = Home::new();
    let store = Store::open(home.path("ledger")).await.unwrap();
    let ledger = SqliteLedger::new(store, AppName::new("shop").unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let writer = tokio::spawn(async move {
        let mut count = 0_u32;
        while !stop.load(Ordering::Relaxed) {
            let (record, etag) = ledger.load().await.unwrap().unwrap();
            let actor = Actor { oid: "uid:0".into(), name: String::new(), from: "host".into() };
            let event = Event::TrackCommits { actor, on: count.is_multiple_of(2) };
            let commit = apply(&record, &event, SystemClock.now()).unwrap();
            ledger.commit(Some(&etag), &commit.record, &commit.lines).await.unwrap();
            count += 1;
        }
        count
    });
    let home = Arc::new(home);
    let other = home.clone();
    let counts: Vec<u64> = tokio::task::spawn_blocking(move || {
        let one =
            |n: usize| other.json(&["ledger", "backup", &format!("{n}.db")])["history"]["count"].as_u64().unwrap();
        (0..5).map(one).collect()
    })
    .await
    .unwrap();
    done.store(true, Ordering::Relaxed);
    assert!(writer.await.unwrap() > 5);
    assert!(counts.is_sorted() && counts.first() < counts.last(), "{counts:?}");
}

#[test]
fn a_restore_says_so_in_the_history_and_keeps_what_it_replaced() {
    let home = Home::new();
    home.well(&["ledger", "backup", "copy.db"]);
    home.well(&["token", "create", "second"]);
    home.well(&["token", "revoke", "first"]);
    let before = home.ledger();
    let shown = home.well(&["ledger", "restore", "copy.db", "--reason", "the disk failed"]);
    assert!(shown.contains("2 events since the backup are only in the file that was replaced"), "{shown}");
    // Who was shut out since the backup stays out.
    assert!(shown.contains("1 token revoked and 0 tags seen since the backup"), "{shown}");
    let first = home.json(&["token", "list"])["tokens"][0].clone();
    assert!(first["name"] == "first" && first["revoked_at"].is_string(), "{first}");
    let events = home.events();
    let last = events.last().unwrap();
    assert_eq!(events.len(), 2);
    assert_eq!(
        (&last["event"], &last["reason"], &last["file"]),
        (&"ledger_restored".into(), &"the disk failed".into(), &"copy.db".into())
    );
    assert_eq!(
        (&last["actor"]["name"], &last["lines"], &last["replaced_lines"]),
        (&"alice".into(), &1.into(), &3.into())
    );
    assert!(last["replaced_head"].as_str().unwrap().starts_with("sha256:"));
    assert!(home.well(&["history", "--verify"]).contains("consistent with anchor: 2 events"));
    assert!(home.well(&["token", "list"]).contains("first"));
    assert_eq!(fs::metadata(home.path("ledger/replank.db")).unwrap().permissions().mode() & 0o777, 0o600);
    home.has_no_scraps();
    // What was replaced is a whole ledger itself, and can be put back.
    let kept = fs::read_dir(home.path("ledger")).unwrap().map(|entry| entry.unwrap().path());
    let kept: Vec<PathBuf> = kept.filter(|path| path.to_str().unwrap().contains(".replaced-")).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    home.well(&["ledger", "restore", kept[0].to_str().unwrap()]);
    assert_eq!(home.events().len(), 4);
    assert!(before.iter().filter(|part| part.starts_with(b"{\"ts\"")).all(|line| home.ledger().contains(line)));
}

#[tokio::test]
async fn a_tag_that_was_seen_since_the_backup_stays_pinned() {
    let home = Home::new();
    let (one, two) = (CommitSha::new("1".repeat(40)).unwrap(), CommitSha::new("2".repeat(40)).unwrap());
    let pinned = async |tag: &str, sha: &CommitSha| {
        let ledger = SqliteLedger::new(Store::open(home.path("ledger")).await.unwrap(), AppName::new("shop").unwrap());
        ledger.first_seen(&[(tag.to_owned(), sha.clone())], SystemClock.now()).await.unwrap()[tag].clone()
    };
    let restored = || {
        // The thread that had the ledger open ends by itself.
        for _ in 0..50 {
            let out = home.run(&["ledger", "restore", "copy.db", "--json"]);
            if out.status.success() {
                return serde_json::from_slice::<Value>(&out.stdout).unwrap();
            }
            assert!(text(&out.stderr).contains("another process"), "{}", text(&out.stderr));
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("it is never restored");
    };
    assert_eq!(pinned("refs/tags/v1.0.0", &one).await, one);
    home.well(&["ledger", "backup", "copy.db"]);
    assert_eq!(pinned("refs/tags/v1.1.0", &one).await, one);
    assert_eq!(restored()["still_pinned"], 1);
    // Moved in the meantime: refused as before.
    assert_eq!(pinned("refs/tags/v1.1.0", &two).await, one);
    assert_eq!(pinned("refs/tags/v1.0.0", &two).await, one);
    fs::write(home.path("ledger/replank.db"), "nothing that can be read").unwrap();
    assert!(restored()["still_pinned"].is_null());
}

#[test]
fn a_damaged_or_lost_ledger_can_be_restored() {
    let home = Home::new();
    home.well(&["ledger", "backup", "copy.db"]);
    fs::write(home.path("ledger/replank.db"), "no database, and long enough to be looked at as one: ".repeat(500))
        .unwrap();
    // Its log would mend it.
    fs::remove_file(home.path("ledger/replank.db-wal")).ok();
    assert!(!home.run(&["history", "--verify"]).status.success());
    home.well(&["ledger", "restore", "copy.db"]);
    assert!(home.well(&["history", "--verify"]).contains("2 events"));
    fs::remove_dir_all(home.path("ledger")).unwrap();
    home.well(&["ledger", "restore", "copy.db"]);
    assert!(home.well(&["history", "--verify"]).contains("2 events"));
    assert!(home.events().last().unwrap()["replaced_lines"].is_null());
}

#[tokio::test]
async fn nothing_is_restored_under_a_controller() {
    let home = Home::new();
    home.well(&["ledger", "backup", "copy.db"]);
    let revision = ControllerId::Revision("v0-1-0-a".parse().unwrap());
    for controller in [ControllerId::Host, revision.clone()] {
        let held = ControllerLock::take(&home.path("ledger"), &controller).unwrap();
        home.refuses(&home.path("copy.db"), "the ledger is in use");
        drop(held);
    }
    let ledger = SqliteLedger::new(Store::open(home.path("ledger")).await.unwrap(), AppName::new("shop").unwrap());
    let beat = |at: Millis| Presence {
        controller: revision.clone(),
        instance: "x".into(),
        reads_format: 1,
        version: "1".into(),
        at,
    };
    ledger.beat(&beat(SystemClock.now())).await.unwrap();
    home.refuses(&home.path("copy.db"), "was there less than 15 s ago; stop it");
    ledger.beat(&beat(Millis(SystemClock.now().0 - 16_000))).await.unwrap();
    // Somebody has it open, lock or not.
    let other = rusqlite::Connection::open(home.path("ledger/replank.db")).unwrap();
    other.execute_batch("BEGIN; SELECT * FROM record;").unwrap();
    home.refuses(&home.path("copy.db"), "");
    drop(other);
    drop(ledger);
    // Its thread ends by itself.
    for _ in 0..50 {
        if home.run(&["ledger", "restore", "copy.db"]).status.success() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("it is never restored");
}

#[test]
fn what_is_no_good_backup_is_refused() {
    let home = Home::new();
    home.well(&["ledger", "backup", "good.db"]);
    let good = fs::read(home.path("good.db")).unwrap();
    let put = |name: &str, bytes: &[u8]| {
        fs::write(home.path(name), bytes).unwrap();
        home.path(name)
    };
    let edited = |name: &str, sql: &str| {
        let file = put(name, &good);
        let database = rusqlite::Connection::open(&file).unwrap();
        database.execute_batch(sql).unwrap();
        file
    };
    home.refuses(&home.path("nothing.db"), "cannot be read");
    home.refuses(&put("empty.db", b""), "no ledger of Replank");
    home.refuses(&put("cut.db", &good[..good.len() / 2]), "");
    home.refuses(&put("cut-a-little.db", &good[..good.len() - 4096]), "");
    let mut flipped = good.clone();
    // The head of the second page: a table's root.
    flipped[4096..4196].fill(0xff);
    home.refuses(&put("flipped.db", &flipped), "");
    home.refuses(&put("text.db", "hello ".repeat(2_000).as_bytes()), "no whole ledger");
    home.refuses(&edited("foreign.db", "PRAGMA application_id = 7"), "no ledger of Replank");
    home.refuses(&edited("newer.db", "PRAGMA user_version = 99"), "written by a newer Replank");
    home.refuses(&edited("newer-record.db", "UPDATE record SET body = CAST(replace(CAST(body AS TEXT), '\"min_reader\":1', '\"min_reader\":9') AS BLOB)"), "format 9");
    home.refuses(
        &edited("trigger.db", "CREATE TRIGGER t AFTER INSERT ON history BEGIN DELETE FROM token; END"),
        "no ledger of Replank",
    );
    home.refuses(&edited("lies.db", "UPDATE history SET bytes = CAST(bytes || ' ' AS BLOB)"), "NOT consistent");
    home.refuses(&edited("short.db", "DELETE FROM history"), "NOT consistent");
    home.refuses(&edited("no-record.db", "DELETE FROM record"), "holds nothing about the application shop");
    let other = Home::of("other");
    other.well(&["ledger", "backup", "other.db"]);
    home.refuses(&other.path("other.db"), "holds nothing about the application shop");
    let twin = Home::new();
    twin.well(&["ledger", "backup", "twin.db"]);
    home.refuses(&twin.path("twin.db"), "the backup is of installation");
    home.refuses(&home.path("ledger"), "not a plain file");
    symlink(home.path("good.db"), home.path("link.db")).unwrap();
    home.refuses(&home.path("link.db"), "not a plain file");
    fs::write(put("live.db", &good).with_extension("db-wal"), "x").unwrap();
    home.refuses(&home.path("live.db"), "a ledger in use");
    // And names that mean something in a URI are names.
    fs::write(home.path("good?mode=rw#%41.db"), &good).unwrap();
    home.well(&["ledger", "restore", "good?mode=rw#%41.db"]);
}
