//! What every ledger must do, as plain functions: each backend's tests run them all against the real thing.

use std::collections::BTreeMap;
use std::sync::Arc;

use replank_core::history::{Audit, Verifier, seal};
use replank_core::ports::{
    Cursor, Cursors, Etag, Ledger, LedgerError, Presence, REFUSALS_KEPT, Refusal, Role, Token, Tokens,
};
use replank_core::record::{ControllerId, Record};
use replank_core::words::{AppName, CommitSha, Digest, InstallationId, Millis, RevisionId};

pub(crate) fn record() -> Record {
    let installation = InstallationId::new("0123456789abcdef").expect("installation");
    Record::new(installation, AppName::new("app").expect("app"), Millis(1))
}

/// The record after one more event, and the line for it.
pub(crate) fn after(record: &Record, event: Audit) -> (Record, Vec<replank_core::history::Line>) {
    let (lines, head) = seal(&record.history, &[event]);
    (Record { history: head, generation: record.generation + 1, ..record.clone() }, lines)
}

fn event(name: &str) -> Audit {
    Audit::new(Millis(2), None, name)
}

/// Reads the whole history page by page and compares it with the record's anchor.
pub(crate) async fn verify(ledger: &dyn Ledger) -> u64 {
    let (record, _) = ledger.load().await.expect("load").expect("a record");
    let (mut verifier, mut from) = (Verifier::default(), 0);
    loop {
        let page = ledger.history(from, 1000).await.expect("history");
        if page.is_empty() {
            break;
        }
        page.iter().try_for_each(|line| verifier.line(line)).expect("an unbroken chain");
        from += page.len() as u64;
    }
    verifier.finish(&record.history).expect("consistent with the anchor")
}

/// Two handles on one empty ledger, as two processes would have them.
pub(crate) async fn ledger(one: Arc<dyn Ledger>, two: Arc<dyn Ledger>) {
    first_commit_has_one_winner(&one, &two).await;
    a_stale_etag_a_foreign_one_and_none_conflict(&*one, &*two).await;
    a_gap_or_an_overlap_is_refused_and_nothing_of_it_stays(&*one).await;
    unknown_fields_survive(&*one, &*two).await;
    a_race_has_one_winner_per_version(&one, &two).await;
    history_pages(&*one).await;
    presence_never_conflicts(&*one, &*two).await;
    first_seen_is_for_ever(&*one, &*two).await;
    verify(&*two).await;
}

async fn first_commit_has_one_winner(one: &Arc<dyn Ledger>, two: &Arc<dyn Ledger>) {
    assert!(one.load().await.expect("load").is_none());
    assert!(one.history(0, 10).await.expect("history").is_empty());
    let mut racers = tokio::task::JoinSet::new();
    for n in 0..16u64 {
        let ledger = if n % 2 == 0 { one.clone() } else { two.clone() };
        racers.spawn(async move {
            let (first, lines) = after(&record(), event("first").with("n", n));
            ledger.commit(None, &first, &lines).await
        });
    }
    let results = racers.join_all().await;
    let won = results.iter().filter(|r| r.is_ok()).count();
    let lost = results.iter().filter(|r| matches!(r, Err(LedgerError::Conflict))).count();
    assert_eq!((won, lost), (1, 15), "{results:?}");
    assert_eq!(verify(&**two).await, 1);
}

async fn a_stale_etag_a_foreign_one_and_none_conflict(one: &dyn Ledger, two: &dyn Ledger) {
    let (old, stale) = one.load().await.expect("load").expect("record");
    let (next, lines) = after(&old, event("second"));
    let fresh = one.commit(Some(&stale), &next, &lines).await.expect("commit");
    let (seen, etag) = two.load().await.expect("load").expect("record");
    assert_eq!((&*seen, &etag), (&next, &fresh), "the other handle sees it at once");
    let (later, lines) = after(&next, event("third"));
    for expected in [Some(&stale), Some(&Etag("not ours".to_owned())), None] {
        let refused = two.commit(expected, &later, &lines).await;
        assert!(matches!(refused, Err(LedgerError::Conflict)), "{expected:?}: {refused:?}");
    }
    // A commit need not have lines: progress is no event.
    let quiet = Record { updated_at: Millis(99), ..next.clone() };
    let etag = two.commit(Some(&fresh), &quiet, &[]).await.expect("commit");
    assert_ne!(etag, fresh);
    assert_eq!(two.version().await.expect("version"), Some(etag.clone()), "the version of what a load would give");
    assert_eq!(one.load().await.expect("load").expect("record"), (Arc::new(quiet), etag));
}

async fn a_gap_or_an_overlap_is_refused_and_nothing_of_it_stays(ledger: &dyn Ledger) {
    let (old, etag) = ledger.load().await.expect("load").expect("record");
    let (next, good) = after(&old, event("good"));
    let (_, more) = after(&next, event("more"));
    let at = |seq| replank_core::history::Line { seq, ..good[0].clone() };
    let end = old.history.count;
    let bad = [vec![at(end + 1)], vec![at(end - 1)], vec![at(end), at(end)], vec![at(end), at(end + 2)], more];
    for lines in bad {
        let refused = ledger.commit(Some(&etag), &next, &lines).await;
        assert!(matches!(refused, Err(LedgerError::Conflict)), "{lines:?}: {refused:?}");
    }
    assert_eq!(ledger.load().await.expect("load").expect("record"), (old.clone(), etag));
    assert_eq!(verify(ledger).await, old.history.count);
}

async fn unknown_fields_survive(one: &dyn Ledger, two: &dyn Ledger) {
    let (old, etag) = one.load().await.expect("load").expect("record");
    let mut old = Arc::unwrap_or_clone(old);
    let nested = serde_json::json!({"since": 7, "deep": {"list": [1, {"x": null}], "text": "\u{1f6a2}"}});
    old.extra.insert("of_a_newer_controller".to_owned(), nested.clone());
    one.commit(Some(&etag), &old, &[]).await.expect("commit");
    let (seen, etag) = two.load().await.expect("load").expect("record");
    let (next, lines) = after(&seen, event("by an older controller"));
    two.commit(Some(&etag), &next, &lines).await.expect("commit");
    let (kept, _) = one.load().await.expect("load").expect("record");
    assert_eq!(kept.extra.get("of_a_newer_controller"), Some(&nested));
}

async fn a_race_has_one_winner_per_version(one: &Arc<dyn Ledger>, two: &Arc<dyn Ledger>) {
    const TASKS: u64 = 8;
    const COMMITS: u64 = 25;
    let before = verify(&**one).await;
    let mut racers = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let ledger = if task % 2 == 0 { one.clone() } else { two.clone() };
        racers.spawn(async move {
            let mut won = Vec::new();
            while (won.len() as u64) < COMMITS {
                let (old, etag) = ledger.load().await.expect("load").expect("record");
                let (next, lines) = after(&old, event("race").with("task", task));
                match ledger.commit(Some(&etag), &next, &lines).await {
                    Ok(etag) => won.push((etag.0, lines[0].seq)),
                    Err(LedgerError::Conflict) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            won
        });
    }
    let won: Vec<_> = racers.join_all().await.into_iter().flatten().collect();
    let etags: BTreeMap<_, _> = won.iter().cloned().collect();
    assert_eq!(etags.len() as u64, TASKS * COMMITS, "no version was given twice");
    assert_eq!(verify(&**two).await, before + TASKS * COMMITS);
}

async fn history_pages(ledger: &dyn Ledger) {
    let count = verify(ledger).await;
    let seqs = |lines: Vec<replank_core::history::Line>| lines.iter().map(|l| l.seq).collect::<Vec<_>>();
    assert_eq!(seqs(ledger.history(1, 3).await.expect("history")), [1, 2, 3]);
    assert_eq!(seqs(ledger.history(count - 1, 10).await.expect("history")), [count - 1]);
    assert!(ledger.history(count, 10).await.expect("history").is_empty());
    assert!(ledger.history(0, 0).await.expect("history").is_empty());
}

async fn presence_never_conflicts(one: &dyn Ledger, two: &dyn Ledger) {
    let (old, etag) = one.load().await.expect("load").expect("record");
    let green = ControllerId::Revision(RevisionId::new("green").expect("revision"));
    let presence = |controller: &ControllerId, at| Presence {
        controller: controller.clone(),
        instance: "i".to_owned(),
        reads_format: 1,
        version: "0.1.0".to_owned(),
        at: Millis(at),
    };
    for at in 0..5 {
        one.beat(&presence(&ControllerId::Host, at)).await.expect("beat");
        two.beat(&presence(&green, at)).await.expect("beat");
    }
    let (next, lines) = after(&old, event("beats do not move the etag"));
    one.commit(Some(&etag), &next, &lines).await.expect("commit");
    let seen = two.presences().await.expect("presences");
    assert_eq!(seen.len(), 2);
    assert!(seen.contains(&presence(&green, 4)) && seen.contains(&presence(&ControllerId::Host, 4)));
    one.forget(&ControllerId::Host).await.expect("forget");
    one.forget(&ControllerId::Host).await.expect("forget twice");
    assert_eq!(two.presences().await.expect("presences"), [presence(&green, 4)]);
}

async fn first_seen_is_for_ever(one: &dyn Ledger, two: &dyn Ledger) {
    let sha = |c: char| CommitSha::new(String::from(c).repeat(40)).expect("sha");
    let tag = |name: &str, c| (name.to_owned(), sha(c));
    let got = one.first_seen(&[tag("refs/tags/v1", 'a'), tag("refs/tags/v2", 'b')], Millis(1)).await.expect("pin");
    assert_eq!(got, BTreeMap::from([tag("refs/tags/v1", 'a'), tag("refs/tags/v2", 'b')]));
    let moved = [tag("refs/tags/v1", 'c'), tag("refs/tags/v3", 'd')];
    let got = two.first_seen(&moved, Millis(2)).await.expect("pin");
    assert_eq!(got, BTreeMap::from([tag("refs/tags/v1", 'a'), tag("refs/tags/v3", 'd')]), "the first commit stays");
    assert!(one.first_seen(&[], Millis(3)).await.expect("pin").is_empty());
}

pub(crate) async fn tokens(tokens: &dyn Tokens) {
    let token = |n: u32, name: &str, role| Token {
        id: format!("token-{n}"),
        name: name.to_owned(),
        role,
        hash: Digest::new(format!("sha256:{n:064x}")).expect("digest"),
        created_at: Millis(i64::from(n)),
        expires_at: (n == 2).then_some(Millis(500)),
        revoked_at: None,
        last_used_at: None,
    };
    let (first, second) = (token(1, "ci", Role::Reader), token(2, "anna", Role::Admin));
    tokens.add(&first).await.expect("add");
    tokens.add(&second).await.expect("add");
    for clash in [token(3, "ci", Role::Admin), Token { name: "x".to_owned(), ..first.clone() }] {
        assert!(matches!(tokens.add(&clash).await, Err(LedgerError::Conflict)), "{clash:?}");
    }
    assert_eq!(tokens.by_hash(&second.hash).await.expect("by hash"), Some(second.clone()));
    assert_eq!(tokens.by_hash(&token(9, "", Role::Reader).hash).await.expect("by hash"), None);

    assert!(tokens.revoke("ci", Millis(10)).await.expect("revoke"));
    assert!(!tokens.revoke("ci", Millis(11)).await.expect("revoke twice"));
    assert!(!tokens.revoke("nobody", Millis(11)).await.expect("revoke nobody"));
    // A revoked token is still found, so that its use can be told from an unknown one; its name is free again.
    let revoked = tokens.by_hash(&first.hash).await.expect("by hash").expect("kept");
    assert_eq!(revoked.revoked_at, Some(Millis(10)));
    tokens.add(&token(4, "ci", Role::Reader)).await.expect("add again");
    let names: Vec<_> = tokens.list().await.expect("list").into_iter().map(|t| t.id).collect();
    assert_eq!(names, ["token-1", "token-2", "token-4"]);

    tokens.used("token-2", Millis(1_000)).await.expect("used");
    tokens.used("nobody", Millis(1_000)).await.expect("used");
    let used = tokens.by_hash(&second.hash).await.expect("by hash").expect("token").last_used_at;
    assert_eq!(used, Some(Millis(1_000)));
    tokens.used("token-2", Millis(200_000)).await.expect("used");
    let used = tokens.by_hash(&second.hash).await.expect("by hash").expect("token").last_used_at;
    assert_eq!(used, Some(Millis(200_000)));
}

pub(crate) async fn cursors(one: &dyn Cursors, two: &dyn Cursors) {
    let at = |seq: u64, closing: &str| Cursor { seq, closing: closing.to_owned() };
    assert_eq!(one.cursor("a").await.expect("cursor"), None);
    one.keep_cursor("a", &at(3, "")).await.expect("keep");
    two.keep_cursor("b", &at(9, "job")).await.expect("keep");
    assert_eq!(two.cursor("a").await.expect("cursor"), Some(at(3, "")));
    two.keep_cursor("a", &at(3, "job")).await.expect("keep");
    two.keep_cursor("a", &at(2, "late")).await.expect("keep");
    assert_eq!(one.cursor("a").await.expect("cursor"), Some(at(3, "job")), "never back");
    assert_eq!(one.cursor("b").await.expect("cursor"), Some(at(9, "job")));
}

pub(crate) async fn refusals(tokens: &dyn Tokens, how_many: usize) {
    let refusal = |n: usize| Refusal {
        at: Millis(n as i64),
        actor: "anna".to_owned(),
        from: "127.0.0.1".to_owned(),
        action: "start".to_owned(),
        why: "role".to_owned(),
    };
    for n in 0..how_many {
        tokens.refused(&refusal(n)).await.expect("refused");
    }
    let kept = tokens.refusals(usize::MAX).await.expect("refusals");
    assert_eq!(kept.len(), how_many.min(REFUSALS_KEPT));
    assert_eq!(kept.last(), Some(&refusal(how_many - 1)), "newest last");
    assert_eq!(tokens.refusals(2).await.expect("refusals"), [refusal(how_many - 2), refusal(how_many - 1)]);
}
