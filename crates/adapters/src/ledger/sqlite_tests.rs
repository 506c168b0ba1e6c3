//! The ledger's conformance on SQLite, and what is special about it.

use std::sync::Arc;

use replank_core::record::Record;

use super::*;
use crate::ledger::conformance;

async fn two(dir: &std::path::Path) -> (SqliteLedger, SqliteLedger) {
    let app = AppName::new("app").expect("app");
    let one = SqliteLedger::new(Store::open(dir).await.expect("open"), app.clone());
    let two = SqliteLedger::new(Store::open(dir).await.expect("open"), app);
    (one, two)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms_over_two_connections() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, two) = two(dir.path()).await;
    conformance::ledger(Arc::new(one), Arc::new(two)).await;
}

#[tokio::test]
async fn cursors_conform() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, two) = two(dir.path()).await;
    conformance::cursors(&one, &two).await;
}

#[tokio::test]
async fn tokens_conform() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, _) = two(dir.path()).await;
    conformance::tokens(&one).await;
    conformance::refusals(&one, 20).await;
}

#[tokio::test]
async fn refusals_are_bounded() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, _) = two(dir.path()).await;
    // As if a flood had come before: the ids stand just under the bound.
    one.store
        .call(|c| {
            write(c, |tx| {
                let many = "WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
                            INSERT INTO refusal (body) SELECT x'00' FROM n";
                tx.execute(many, [REFUSALS_KEPT as i64 + 5])?;
                Ok::<_, Stop<LedgerError>>(())
            })
        })
        .await
        .expect("flood");
    let last = Refusal { at: Millis(1), actor: "a".into(), from: "f".into(), action: "x".into(), why: "w".into() };
    one.refused(&last).await.expect("refused");
    let count: i64 = one
        .store
        .call(|c| {
            read(c, |tx| Ok::<_, Stop<LedgerError>>(tx.query_row("SELECT count(*) FROM refusal", [], |r| r.get(0))?))
        })
        .await
        .expect("count");
    assert_eq!(count, REFUSALS_KEPT as i64);
    assert_eq!(one.refusals(1).await.expect("refusals"), [last]);
}

#[tokio::test]
async fn two_applications_in_one_file_do_not_meet() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, _) = two(dir.path()).await;
    let other = SqliteLedger::new(one.store.clone(), AppName::new("other").expect("app"));
    let (next, lines) =
        conformance::after(&conformance::record(), replank_core::history::Audit::new(Millis(1), None, "a"));
    one.commit(None, &next, &lines).await.expect("commit");
    assert!(other.load().await.expect("load").is_none());
    other.commit(None, &next, &lines).await.expect("commit");
    assert_eq!(conformance::verify(&other).await, 1);
}

/// Rewrites the stored record as another build would have left it.
async fn store_body(ledger: &SqliteLedger, min_reader: u32, body: Vec<u8>) {
    ledger
        .store
        .call(move |c| {
            write(c, |tx| {
                tx.execute("UPDATE record SET body = ?1, min_reader = ?2", params![body, min_reader])?;
                Ok::<_, Stop<LedgerError>>(())
            })
        })
        .await
        .expect("update");
}

#[tokio::test]
async fn a_record_for_newer_readers_or_without_sense_is_never_written_over() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, _) = two(dir.path()).await;
    let record = conformance::record();
    let etag = one.commit(None, &record, &[]).await.expect("commit");
    let newer = Record { min_reader: FORMAT + 1, ..record.clone() };
    store_body(&one, FORMAT + 1, serde_json::to_vec(&newer).expect("json")).await;
    let Err(LedgerError::Unreadable(fault)) = one.load().await else { panic!("it was read") };
    assert!(fault.advice.contains("newer Replank"), "{fault:?}");
    let refused = one.commit(Some(&etag), &record, &[]).await;
    assert!(matches!(refused, Err(LedgerError::Unreadable(_))), "{refused:?}");
    store_body(&one, 1, b"{\"format\":1".to_vec()).await;
    let Err(LedgerError::Unreadable(fault)) = one.load().await else { panic!("it was read") };
    assert!(fault.advice.contains("backup"), "{fault:?}");
}

#[tokio::test]
async fn a_newer_schema_is_used_and_its_columns_are_kept() {
    let dir = tempfile::tempdir().expect("dir");
    let (one, _) = two(dir.path()).await;
    let etag = one.commit(None, &conformance::record(), &[]).await.expect("commit");
    one.store
        .call(|c| {
            write(c, |tx| {
                tx.execute_batch(
                    "ALTER TABLE record ADD COLUMN later TEXT NOT NULL DEFAULT 'x'; UPDATE record SET later = 'kept';
                     CREATE TABLE later (a); PRAGMA user_version = 99;",
                )?;
                Ok::<_, Stop<LedgerError>>(())
            })
        })
        .await
        .expect("migrate");
    let (again, _) = two(dir.path()).await;
    again.commit(Some(&etag), &conformance::record(), &[]).await.expect("commit");
    let later: String = again
        .store
        .call(|c| read(c, |tx| Ok::<_, Stop<LedgerError>>(tx.query_row("SELECT later FROM record", [], |r| r.get(0))?)))
        .await
        .expect("select");
    assert_eq!(later, "kept");
}
