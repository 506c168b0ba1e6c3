//! What opening refuses, what a full, damaged or locked file looks like, and that nothing is lost by it.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use replank_core::ports::{Etag, Ledger as _};
use replank_core::words::AppName;

use super::*;
use crate::ledger::SqliteLedger;
use crate::ledger::conformance::{after, record, verify};

fn event() -> replank_core::history::Audit {
    replank_core::history::Audit::new(replank_core::words::Millis(1), None, "event")
}

fn ledger(store: &Store) -> SqliteLedger {
    SqliteLedger::new(store.clone(), AppName::new("app").expect("app"))
}

#[test]
fn network_file_systems_are_named() {
    #[track_caller]
    fn check(magic: u32, expect: Option<&str>) {
        let name = network_file_system(magic);
        assert_eq!(name.is_some(), expect.is_some(), "{magic:#x}: {name:?}");
        assert!(name.unwrap_or("").contains(expect.unwrap_or("")), "{magic:#x}: {name:?}");
    }
    check(0x6969, Some("NFS"));
    check(0xff53_4d42, Some("CIFS"));
    check(0xfe53_4d42, Some("SMB2"));
    check(0x0102_1997, Some("9p"));
    check(0x6573_5546, Some("FUSE"));
    check(0x00c3_6400, Some("Ceph"));
    check(0xef53, None); // ext4
    check(0x5846_5342, None); // XFS
    check(0x9123_683e, None); // Btrfs
    check(0x0102_1994, None); // tmpfs
    check(0x794c_7630, None); // overlayfs: the development case
}

#[tokio::test]
async fn what_it_makes_is_for_its_user_alone() {
    let dir = tempfile::tempdir().expect("dir");
    let place = dir.path().join("deep/ledger");
    let store = Store::open(&place).await.expect("open");
    ledger(&store).commit(None, &record(), &[]).await.expect("commit");
    let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
    assert_eq!(mode(&place), 0o700);
    for entry in fs::read_dir(&place).expect("list") {
        let path = entry.expect("entry").path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    assert_eq!(fs::read_dir(&place).expect("list").count(), 3, "the file, its WAL and its shared memory, nothing else");
}

#[tokio::test]
async fn settings_are_what_promises_rest_on() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path()).await.expect("open");
    let settings = store
        .call(|c| {
            let get =
                |name: &str| c.query_row(&format!("PRAGMA {name}"), [], |r| r.get::<_, rusqlite::types::Value>(0));
            ["journal_mode", "synchronous", "foreign_keys", "application_id"]
                .map(get)
                .into_iter()
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| classify(e, Stage::Work))
        })
        .await
        .map_err(LedgerError::from)
        .expect("settings");
    use rusqlite::types::Value;
    let expect =
        [Value::Text("wal".to_owned()), Value::Integer(2), Value::Integer(1), Value::Integer(APPLICATION_ID.into())];
    assert_eq!(settings, expect);
}

#[track_caller]
fn unreadable(result: Result<Store, LedgerError>, advice: &str) {
    match result {
        Err(LedgerError::Unreadable(fault)) => assert!(fault.advice.contains(advice), "{fault:?}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_that_is_not_ours_or_is_damaged_is_left_as_it_is() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join(FILE);
    let foreign = Connection::open(&file).expect("open");
    foreign.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").expect("fill");
    drop(foreign);
    let before = fs::read(&file).expect("read");
    unreadable(Store::open(dir.path()).await, "directory of its own");
    assert_eq!(fs::read(&file).expect("read"), before);

    let noise: Vec<u8> = (0..20_000u32).map(|n| ((n * 7919) >> 3) as u8).collect();
    fs::write(&file, &noise).expect("write");
    unreadable(Store::open(dir.path()).await, "backup");
    assert_eq!(fs::read(&file).expect("read"), noise);

    fs::remove_file(&file).expect("remove");
    fs::create_dir(&file).expect("a directory in its place");
    unreadable(Store::open(dir.path()).await, "not the file");
    fs::remove_dir(&file).expect("remove");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &file).expect("symlink");
    unreadable(Store::open(dir.path()).await, "not the file");
}

#[tokio::test]
async fn pages_overwritten_in_the_middle_are_found_when_it_is_opened() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path()).await.expect("open");
    let (mut state, mut etag) = (record(), None::<Etag>);
    for _ in 0..50 {
        let (next, lines) = after(&state, event().with("text", "x".repeat(500)));
        etag = Some(ledger(&store).commit(etag.as_ref(), &next, &lines).await.expect("commit"));
        state = next;
    }
    drop(store);
    // The thread folds the WAL back into the file when it closes: wait for that, bounded.
    let (file, wal) = (dir.path().join(FILE), dir.path().join(format!("{FILE}-wal")));
    for _ in 0..500 {
        if !wal.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut bytes = fs::read(&file).expect("read");
    let end = bytes.len();
    assert!(end > 8 * 4096);
    bytes[4096..end - 4096].fill(0xa5);
    fs::write(&file, &bytes).expect("write");
    unreadable(Store::open(dir.path()).await, "backup");
    assert_eq!(fs::read(&file).expect("read"), bytes);
}

#[tokio::test]
async fn a_place_where_nothing_can_be_made_is_unavailable_with_advice() {
    let dir = tempfile::tempdir().expect("dir");
    let plain = dir.path().join("plain");
    fs::write(&plain, b"").expect("write");
    match Store::open(plain.join("ledger")).await {
        Err(LedgerError::Unavailable(fault)) => assert!(fault.advice.contains("mount the directory"), "{fault:?}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lock_held_too_long_is_unavailable_and_passes() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path()).await.expect("open");
    let holder = Connection::open(dir.path().join(FILE)).expect("open");
    holder.execute_batch("BEGIN IMMEDIATE").expect("lock");
    assert!(ledger(&store).load().await.expect("readers do not wait").is_none());
    match ledger(&store).commit(None, &record(), &[]).await {
        Err(LedgerError::Unavailable(fault)) => {
            assert_eq!(fault.class, Class::Transient);
            assert!(fault.what.contains("held the ledger"), "{fault:?}");
        }
        other => panic!("{other:?}"),
    }
    holder.execute_batch("ROLLBACK").expect("unlock");
    ledger(&store).commit(None, &record(), &[]).await.expect("commit");
}

/// A small file system of its own, gone with the value.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "replank-test"])
            .arg(dir.path())
            .status()
            .expect("mount(8) runs");
        assert!(done.success(), "a small tmpfs is needed for the full disk; run the tests as root");
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(done.is_ok_and(|s| s.success()), "umount {}", self.0.path().display());
    }
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_passes() {
    let small = Small::new("2m");
    let store = Store::open(small.0.path().join("ledger")).await.expect("open");
    let ledger = ledger(&store);
    let (mut state, mut etag) = (record(), None::<Etag>);
    let filler = small.0.path().join("filler");
    for round in 0..3 {
        let (next, lines) = after(&state, event());
        etag = Some(ledger.commit(etag.as_ref(), &next, &lines).await.expect("commit"));
        state = next;
        // As large as it gets: the write ends in ENOSPC.
        assert!(fs::write(&filler, vec![0; 4 << 20]).is_err());
        let mut refused = 0;
        for _ in 0..20 {
            let (next, lines) = after(&state, event().with("text", "x".repeat(20_000)));
            match ledger.commit(etag.as_ref(), &next, &lines).await {
                // There may be room left in pages that are already the file's.
                Ok(new) => (state, etag) = (next, Some(new)),
                Err(LedgerError::Unavailable(fault)) => {
                    assert_eq!(fault.class, Class::Transient);
                    assert!(fault.advice.contains("full disk") || fault.advice.contains("free space"), "{fault:?}");
                    refused += 1;
                }
                other => panic!("{other:?}"),
            }
            let (seen, at) = ledger.load().await.expect("load").expect("record");
            assert_eq!((&*seen, Some(&at)), (&state, etag.as_ref()), "exactly what was acknowledged");
        }
        assert!(refused > 0, "round {round}: the disk was not full");
        fs::remove_file(&filler).expect("free");
        let (next, lines) = after(&state, event());
        etag = Some(ledger.commit(etag.as_ref(), &next, &lines).await.expect("it passes"));
        state = next;
        assert_eq!(verify(&ledger).await, state.history.count);
    }
}

#[test]
fn every_code_has_its_meaning() {
    #[track_caller]
    fn check(code: i32, stage: Stage, expect: &str) {
        let error = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        let got = match classify(error, stage) {
            Failed::Unavailable(fault) => format!("unavailable {:?}", fault.class),
            Failed::Indeterminate(fault) => format!("indeterminate {:?}", fault.class),
            Failed::Unreadable(fault) => format!("unreadable {:?}", fault.class),
        };
        assert_eq!(got, expect, "code {code} at {stage:?}");
    }
    use rusqlite::ffi;
    for stage in [Stage::Work, Stage::Commit] {
        check(ffi::SQLITE_BUSY, stage, "unavailable Transient");
        check(ffi::SQLITE_FULL, stage, "unavailable Transient");
        check(ffi::SQLITE_CORRUPT, stage, "unreadable Permanent");
        check(ffi::SQLITE_NOTADB, stage, "unreadable Permanent");
        check(ffi::SQLITE_READONLY, stage, "unavailable Permanent");
        check(ffi::SQLITE_CANTOPEN, stage, "unavailable Permanent");
        check(ffi::SQLITE_NOMEM, stage, "unavailable Transient");
        check(ffi::SQLITE_MISUSE, stage, "unavailable Permanent");
    }
    check(ffi::SQLITE_IOERR_FSYNC, Stage::Work, "unavailable Transient");
    check(ffi::SQLITE_IOERR_FSYNC, Stage::Commit, "indeterminate Indeterminate");
    check(ffi::SQLITE_IOERR_WRITE, Stage::Commit, "indeterminate Indeterminate");
}
