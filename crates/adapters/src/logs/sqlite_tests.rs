//! The log store's conformance on SQLite, and its retention.

use super::*;
use crate::logs::conformance::{self, id, whole};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms_over_two_connections() {
    let dir = tempfile::tempdir().expect("dir");
    let one = SqliteLogs::new(Store::open(dir.path()).await.expect("open"));
    let two = SqliteLogs::new(Store::open(dir.path()).await.expect("open"));
    conformance::logs(Arc::new(one), Arc::new(two)).await;
}

#[tokio::test]
async fn an_append_over_the_limit_is_refused_and_one_at_it_is_taken() {
    let dir = tempfile::tempdir().expect("dir");
    let logs = SqliteLogs::new(Store::open(dir.path()).await.expect("open"));
    let mut writer = logs.begin(&id("job-big", "api"), b"").await.expect("begin");
    let refused = logs.append(&mut writer, &vec![b'x'; APPEND_MAX + 1]).await;
    assert!(matches!(refused, Err(LogError::Unavailable(_))), "{refused:?}");
    logs.append(&mut writer, &vec![b'x'; APPEND_MAX]).await.expect("append");
    assert_eq!(whole(&logs, &writer.id).await.expect("begun").0.len(), APPEND_MAX);
}

#[tokio::test]
async fn pruning_keeps_the_jobs_that_began_last() {
    let dir = tempfile::tempdir().expect("dir");
    let logs = SqliteLogs::new(Store::open(dir.path()).await.expect("open"));
    for job in ["job1", "job2", "job3"] {
        for component in ["api", "web"] {
            let mut writer = logs.begin(&id(job, component), b"begin\n").await.expect("begin");
            logs.append(&mut writer, b"line\n").await.expect("append");
        }
    }
    let mut old = logs.begin(&id("job1", "api"), b"again\n").await.expect("begin");
    assert_eq!(logs.prune(3).await.expect("prune"), 0);
    assert_eq!(logs.prune(1).await.expect("prune"), 2);
    assert_eq!(whole(&logs, &id("job1", "api")).await, None);
    assert_eq!(whole(&logs, &id("job3", "web")).await, Some((b"begin\nline\n".to_vec(), false)));
    assert!(matches!(logs.append(&mut old, b"late\n").await, Err(LogError::Fenced)));
    let chunks: i64 = logs
        .read_tx(|tx| Ok(tx.query_row("SELECT count(*) FROM log_chunk", [], |row| row.get(0))?))
        .await
        .expect("count");
    assert_eq!(chunks, 4, "the chunks went with their logs");
}
