//! Git remotes that are away, lie, or change their mind.

use std::time::Duration;

use replank_testbed::git::Fault;

use crate::rig::{Options, Rig, refused, release};
use replank_testbed::repo::Entry;

/// Candidates are kept for 15 s.
const FRESH: Duration = Duration::from_secs(16);

#[test]
fn a_remote_that_is_away_or_hostile_is_told_and_nothing_else_stops() {
    let mut rig = Rig::start(Options::default());
    let id = rig.publish("0.1.1", &release("0.1.1"));
    let hostile: Vec<(&str, Fault, &[&str])> = vec![
        ("redirects", Fault::Redirect("http://169.254.169.254".to_owned()), &["redirect"]),
        ("answers with a page", Fault::Page("<html>\u{1b}[31mplease sign in".to_owned()), &["text/html"]),
        ("wants a sign-in", Fault::Status(401), &["credential"]),
        ("has no such repository", Fault::Status(404), &["address"]),
        ("is broken", Fault::Status(503), &["503"]),
        ("talks without end", Fault::HugeBody(64 * 1024 * 1024), &["larger than 4194304 bytes"]),
        ("cuts its answer", Fault::CutAfter(20), &["git remote"]),
    ];
    for (name, fault, parts) in hostile {
        rig.git.set_fault(fault);
        look(&mut rig, name, parts);
    }
    rig.git.stop();
    look(&mut rig, "is away", &["cannot be reached"]);
    rig.git.start_again().unwrap();
    // Names that no git would write are not offered, and do not reach a terminal. Last, as a good look is kept for a while.
    rig.git.set_fault(Fault::Refs(vec![
        (id.clone(), b"refs/tags/v0.1.2\x1b]0;owned\x07".to_vec()),
        (id.clone(), b"refs/tags/v0.1.3\r\xe2\x80\xae".to_vec()),
    ]));
    look(&mut rig, "has control characters in a name", &[]);
    rig.git.set_fault(Fault::None);
    rig.goes_on("0.2.0");
    // What git was told and said is where the advice of a failed fetch sends people.
    let told = rig.told();
    assert!(told.contains("fetch: $ git clone --depth 1") && told.contains("fetch: Cloning into"), "{told}");
}

/// Candidates say what is wrong with the remote, a check fails with one line, and no job begins.
fn look(rig: &mut Rig, name: &str, parts: &[&str]) {
    // A failure is kept for 15 s, and a controller that has just started knows of none.
    drop(rig.serving.take());
    rig.serve();
    let out = rig.cli(&["candidates", "--json"]);
    assert!(out.status.success(), "{name}: {out:?}");
    let found: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let error = found["error"].as_str().unwrap_or_default();
    eprintln!("{name}: {error}");
    let raw = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!raw.trim().chars().any(|c| c.is_control() || c == '\u{202e}'), "{name}: {raw:?}");
    for shown in [rig.cli(&["candidates"]), rig.cli(&["status"])] {
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.status.success() && !text.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{name}: {text:?}");
    }
    if parts.is_empty() {
        assert_eq!(found["candidates"].as_array().map(Vec::len), Some(0), "{name}: {found}");
        return;
    }
    for part in parts {
        assert!(error.contains(part), "{name}: {part:?} is not in {error:?}");
    }
    assert!(error.contains("; "), "{name}: nothing says what to do: {error}");
    let start = rig.cli(&["start", "0.1.1", "--yes", "--no-wait"]);
    refused(&start, 4, parts);
    assert_eq!(rig.status()["state"], "succeeded", "{name}");
}

fn accept(rig: &Rig, version: &str, commit: &str) -> std::process::Output {
    rig.cli(&["accept-moved-tag", version, "--commit", commit, "--reason", "it was on the wrong branch"])
}

#[test]
fn a_moved_tag_is_refused_and_both_commits_are_named() {
    let mut rig = Rig::start(Options::default());
    let first = rig.publish("0.1.1", &release("0.1.1"));
    // The look that pins it; the one at the start of the service may have been a moment too early.
    std::thread::sleep(FRESH);
    let offered = rig.cli(&["candidates"]);
    assert!(String::from_utf8_lossy(&offered.stdout).contains("v0.1.1"), "{offered:?}");

    // Between the look and the fetch.
    let second = rig.repo.commit(&[Entry::file("NOTES", "another one\n")], "moved").unwrap();
    rig.repo.tag("v0.1.1", &second, "moved").unwrap();
    rig.fails("0.1.1", &[&first, &second]);

    // And at the next look: the commit that was seen first counts for ever.
    std::thread::sleep(FRESH);
    let out = rig.cli(&["candidates"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && text.contains(&first[..7]) && text.contains(&second[..7]), "{text}");
    refused(&rig.cli(&["start", "0.1.1", "--yes", "--no-wait"]), 3, &[&first, &second, "new version"]);

    // An administrator may take it as it is now, and nothing else that it may become.
    refused(&accept(&rig, "0.1.1", &first), 3, &[&second, "look at what that is"]);
    refused(
        &accept(&rig, "0.1.0", rig.status()["running_sha"].as_str().expect("a commit")),
        3,
        &["where it always was"],
    );
    refused(&accept(&rig, "0.7.0", &second), 3, &["no release v0.7.0"]);
    let accepted = accept(&rig, "0.1.1", &second);
    assert!(accepted.status.success(), "{accepted:?}");
    let out = rig.cli(&["candidates"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("1 release newer") && !text.contains("refused"), "{text}");
    let told = rig.history().into_iter().find(|event| event["event"] == "moved_tag_accepted").expect("a line");
    assert_eq!(
        (told["ref"].as_str(), told["from_sha"].as_str(), told["sha"].as_str(), told["reason"].as_str()),
        (Some("refs/tags/v0.1.1"), Some(first.as_str()), Some(second.as_str()), Some("it was on the wrong branch"))
    );

    // Put back, it is moved again.
    rig.repo.tag("v0.1.1", &first, "back").unwrap();
    refused(&accept(&rig, "0.1.1", &second), 3, &[&first, "look at what that is"]);
    rig.repo.tag("v0.1.1", &second, "and forth").unwrap();
    // The look that has seen it elsewhere counts for two seconds.
    std::thread::sleep(Duration::from_millis(2_500));
    let row = rig.run("0.1.1");
    assert_eq!(row["state"], "succeeded", "{row}");
    assert_eq!(row["running_sha"], second.as_str());
}

#[test]
fn a_branch_of_a_tags_name_refuses_the_candidate() {
    let mut rig = Rig::start(Options::default());
    let id = rig.publish("0.1.1", &release("0.1.1"));
    rig.repo.branch("v0.1.1", &id).unwrap();
    let out = rig.cli(&["candidates"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("v0.1.1") && text.contains("branch"), "{text}");
    refused(&rig.cli(&["start", "0.1.1", "--yes", "--no-wait"]), 3, &["v0.1.1", "branch"]);
    assert_eq!(rig.status()["job_id"].as_str().map(|id| id.starts_with("v0.1.0")), Some(true));
    rig.repo.delete_ref("refs/heads/v0.1.1").unwrap();
    rig.goes_on("0.2.0");
}
