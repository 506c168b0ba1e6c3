//! What every log store must do, as plain functions: each backend's tests run them all against the real thing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use replank_core::ports::{LogError, LogId, LogStore};
use replank_core::words::{ComponentName, JobId};

pub(crate) fn id(job: &str, component: &str) -> LogId {
    LogId { job: JobId::new(job).expect("job"), component: ComponentName::new(component).expect("component") }
}

pub(crate) async fn whole(logs: &dyn LogStore, id: &LogId) -> Option<(Vec<u8>, bool)> {
    let (mut bytes, mut from) = (Vec::new(), 0);
    loop {
        let chunk = logs.read(id, from, 1 << 20).await.expect("read")?;
        bytes.extend_from_slice(&chunk.bytes);
        if chunk.bytes.is_empty() {
            return Some((bytes, chunk.closed));
        }
        from = chunk.next;
    }
}

/// Two handles on one empty store, as two processes would have them.
pub(crate) async fn logs(one: Arc<dyn LogStore>, two: Arc<dyn LogStore>) {
    never_begun_differs_from_empty(&*one).await;
    appends_go_on_from_their_offset(&*one, &*two).await;
    a_later_attempt_fences_the_earlier(&*one, &*two).await;
    any_cut_of_reading_gives_the_same_bytes(&*two).await;
    a_follower_sees_everything_in_order(&one, &one, Duration::from_millis(100)).await;
    a_follower_sees_everything_in_order(&one, &two, Duration::from_secs(2)).await;
    waiting_ends(&*one).await;
}

async fn never_begun_differs_from_empty(logs: &dyn LogStore) {
    let id = id("job-empty", "api");
    assert_eq!(logs.read(&id, 0, 100).await.expect("read"), None);
    let writer = logs.begin(&id, b"").await.expect("begin");
    let chunk = logs.read(&id, 0, 100).await.expect("read").expect("begun");
    assert_eq!((chunk.bytes.len(), chunk.next, chunk.closed), (0, 0, false));
    logs.close(&writer).await.expect("close");
    logs.close(&writer).await.expect("close twice");
    assert!(logs.read(&id, 0, 100).await.expect("read").expect("begun").closed);
}

async fn appends_go_on_from_their_offset(one: &dyn LogStore, two: &dyn LogStore) {
    let id = id("job-offset", "api");
    let mut writer = one.begin(&id, b"--- attempt 1\n").await.expect("begin");
    assert_eq!(writer.offset, 14);
    let mut twin = writer.clone();
    one.append(&mut writer, b"one\n").await.expect("append");
    one.append(&mut writer, b"").await.expect("append nothing");
    assert_eq!(writer.offset, 18);
    // A writer whose append was taken without its knowing.
    let refused = two.append(&mut twin, b"one\n").await;
    assert!(matches!(refused, Err(LogError::Offset { actual: 18 })), "{refused:?}");
    assert_eq!(twin.offset, 14, "a refused append moves nothing");
    twin.offset = 18;
    two.append(&mut twin, b"two\n").await.expect("append");
    assert_eq!(whole(one, &id).await, Some((b"--- attempt 1\none\ntwo\n".to_vec(), false)));
    let beyond = one.read(&id, 1_000, 10).await.expect("read").expect("begun");
    assert_eq!((beyond.bytes.len(), beyond.next), (0, 1_000));
}

async fn a_later_attempt_fences_the_earlier(one: &dyn LogStore, two: &dyn LogStore) {
    let id = id("job-fence", "api");
    let mut old = one.begin(&id, b"--- attempt 1\n").await.expect("begin");
    one.append(&mut old, b"old\n").await.expect("append");
    let mut new = two.begin(&id, b"--- attempt 2\n").await.expect("begin");
    assert!(new.fence > old.fence);
    for bytes in [&b"late\n"[..], b""] {
        assert!(matches!(one.append(&mut old, bytes).await, Err(LogError::Fenced)));
    }
    assert!(matches!(one.close(&old).await, Err(LogError::Fenced)));
    two.append(&mut new, b"new\n").await.expect("append");
    two.close(&new).await.expect("close");
    assert!(matches!(two.append(&mut new, b"after\n").await, Err(LogError::Fenced)), "closed is closed");
    let all = b"--- attempt 1\nold\n--- attempt 2\nnew\n".to_vec();
    assert_eq!(whole(one, &id).await, Some((all, true)));
    // A third attempt opens it again.
    one.begin(&id, b"--- attempt 3\n").await.expect("begin");
    assert!(!two.read(&id, 0, 1_000).await.expect("read").expect("begun").closed);
}

async fn any_cut_of_reading_gives_the_same_bytes(logs: &dyn LogStore) {
    let id = id("job-cut", "api");
    let mut writer = logs.begin(&id, b"begin\n").await.expect("begin");
    let mut all = b"begin\n".to_vec();
    for n in 0..40usize {
        let bytes: Vec<u8> = (0..n * 7 % 61).map(|i| (i * n) as u8).collect();
        logs.append(&mut writer, &bytes).await.expect("append");
        all.extend_from_slice(&bytes);
    }
    for max in [1, 7, 64, 10_000] {
        let (mut got, mut from) = (Vec::new(), 0);
        loop {
            let chunk = logs.read(&id, from, max).await.expect("read").expect("begun");
            assert!(chunk.bytes.len() <= max);
            if chunk.bytes.is_empty() {
                break;
            }
            got.extend_from_slice(&chunk.bytes);
            from = chunk.next;
        }
        assert_eq!(got, all, "max {max}");
    }
}

async fn a_follower_sees_everything_in_order(from: &Arc<dyn LogStore>, by: &Arc<dyn LogStore>, within: Duration) {
    let id = id(&format!("job-follow-{}", within.as_millis()), "api");
    let follower = tokio::spawn({
        let (by, id) = (by.clone(), id.clone());
        async move {
            let (mut got, mut next, mut slowest) = (Vec::new(), 0, Duration::ZERO);
            loop {
                by.changed(&id, next).await.expect("changed");
                let Some(chunk) = by.read(&id, next, 1 << 20).await.expect("read") else { continue };
                if let Some(sent) = chunk.bytes.strip_suffix(b"\n").and_then(|line| line.rsplit(|b| *b == b' ').next())
                {
                    let sent: u128 = std::str::from_utf8(sent).expect("utf-8").parse().expect("a time");
                    let late = now().saturating_sub(sent);
                    slowest = slowest.max(Duration::from_micros(late as u64));
                }
                got.extend_from_slice(&chunk.bytes);
                next = chunk.next;
                if chunk.closed {
                    return (got, slowest);
                }
            }
        }
    });
    let mut all = format!("--- attempt 1 {}\n", now()).into_bytes();
    let mut writer = from.begin(&id, &all).await.expect("begin");
    for n in 0..20 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let line = format!("line {n} {}\n", now()).into_bytes();
        from.append(&mut writer, &line).await.expect("append");
        all.extend_from_slice(&line);
    }
    from.close(&writer).await.expect("close");
    let (got, slowest) = tokio::time::timeout(Duration::from_secs(10), follower).await.expect("in time").expect("join");
    assert_eq!(String::from_utf8(got), String::from_utf8(all));
    // The bound of the machine is not the point: without the wake-up every line would wait for a poll.
    println!("slowest line to the follower: {slowest:?} (target {within:?})");
    assert!(slowest < within.max(Duration::from_secs(5)), "{slowest:?}");
}

#[expect(clippy::disallowed_methods, reason = "what a person's watch would show, not what the store is told")]
fn now() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_micros()
}

async fn waiting_ends(logs: &dyn LogStore) {
    let begun = Instant::now();
    logs.changed(&id("job-none", "api"), 0).await.expect("changed");
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_millis(500), "it waited for news: {waited:?}");
    assert!(waited < Duration::from_secs(5), "and not for ever: {waited:?}");
    // Closed: nothing more comes, so there is nothing to wait for.
    let begun = Instant::now();
    logs.changed(&id("job-empty", "api"), 0).await.expect("changed");
    assert!(begun.elapsed() < Duration::from_millis(500));
}
