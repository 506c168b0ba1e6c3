//! What a request means, what is offered, and what a start takes of it: tables.

use replank_core::image::Images;
use replank_core::record::{Deployment, Latest, Plan};
use replank_core::words::{AppName, InstallationId, JobId, Nonce, OpKey, RevisionId};

use super::*;

fn sha(digit: char) -> CommitSha {
    CommitSha::new(digit.to_string().repeat(40)).unwrap()
}

fn version(text: &str) -> Version {
    text.parse().unwrap()
}

fn tag(text: &str, digit: char, refused: Option<&str>) -> TagRef {
    TagRef {
        version: version(text),
        raw_ref: format!("refs/tags/v{text}"),
        commit: sha(digit),
        tag_object: None,
        refused: refused.map(str::to_owned),
    }
}

/// An application that runs `running`, at commit 111….
fn record(running: Option<&str>) -> Record {
    let id = InstallationId::new("i".repeat(16)).unwrap();
    let mut record = Record::new(id, AppName::new("shop").unwrap(), Millis(0));
    let nonce = Nonce::new("a".repeat(32)).unwrap();
    record.running = running.map(|running| Deployment {
        revision: RevisionId::new("r-1").unwrap(),
        key: OpKey::derive(&JobId::new("job-0").unwrap(), "deploy", 1, &nonce),
        version: version(running),
        commit: sha('1'),
        images: Images::new(),
        plan: Plan::default(),
        reads_format: None,
    });
    record
}

fn refs(tags: Vec<TagRef>, head: Option<char>) -> Refs {
    Refs { tags, branch: head.map(|digit| ("refs/heads/main".to_owned(), sha(digit))) }
}

#[test]
fn a_request_means_what_its_words_say() {
    let full = "2".repeat(40);
    let commit = || Ok(Wanted::Commit { sha: sha('2') });
    let of_release = |sha| Ok(Wanted::Release { version: version("0.2.0"), sha });
    let (derived, other) = ("0.1.0-commit.2222222", "0.1.0-commit.3333333");
    let (release, on_commit) = (Some(TargetKind::Release), Some(TargetKind::Commit));
    for (kind, target, target_sha, expect) in [
        (None, None, None, Ok(Wanted::Newest)),
        (release, None, None, Ok(Wanted::Newest)),
        (None, Some("0.2.0"), None, of_release(None)),
        (None, Some("v0.2.0"), None, of_release(None)),
        (release, Some("0.2.0"), Some(full.as_str()), of_release(Some(sha('2')))),
        (None, Some("0.2.0"), Some(&full), of_release(Some(sha('2')))),
        (None, None, Some(&full), commit()),
        (on_commit, None, Some(&full), commit()),
        // The derived version may come along, as the row shows it.
        (on_commit, Some(derived), Some(&full), commit()),
        (None, Some(derived), Some(&full), commit()),
        (on_commit, Some(other), Some(&full), Err("name two commits")),
        (None, Some(other), Some(&full), Err("name two commits")),
        (None, Some(derived), None, Err("send target_sha")),
        (release, Some(derived), Some(&full), Err("send target_sha")),
        (on_commit, None, None, Err("needs target_sha")),
        (on_commit, Some("0.2.0"), None, Err("needs target_sha")),
        (on_commit, Some("0.2.0"), Some(&full), Err("send only target_sha")),
        (release, None, Some(&full), Err("needs target_version")),
        (None, Some("0.2"), None, Err("is not valid")),
        (None, Some("00.2.0"), None, Err("is not valid")),
        (None, None, Some("2222222"), Err("is not valid")),
        (None, None, Some(&full[..39]), Err("is not valid")),
    ] {
        let request = StartRequest {
            target_kind: kind,
            target_version: target.map(str::to_owned),
            target_sha: target_sha.map(str::to_owned),
            ..StartRequest::default()
        };
        match (wanted(&request), expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect, "{request:?}"),
            (Err(Refusal::Invalid(why)), Err(part)) => assert!(why.contains(part), "{request:?}: {why}"),
            other => panic!("{request:?}: {other:?}"),
        }
    }
}

#[test]
fn newer_releases_are_offered_newest_first_and_at_most_twenty() {
    let names = |tags: &[TagRef]| tags.iter().map(|tag| tag.version.to_string()).collect::<Vec<_>>();
    let few = refs(vec![tag("0.3.0", '3', Some("moved")), tag("0.2.0", '2', None), tag("0.1.0", '1', None)], None);
    for (running, offered, refused) in [
        (None, vec!["0.2.0", "0.1.0"], vec!["0.3.0"]),
        (Some("0.1.0"), vec!["0.2.0"], vec!["0.3.0"]),
        // A commit target counts as its base release.
        (Some("0.1.0-commit.1111111"), vec!["0.2.0"], vec!["0.3.0"]),
        (Some("0.2.0"), vec![], vec!["0.3.0"]),
        (Some("0.2.0-commit.1111111"), vec![], vec!["0.3.0"]),
        (Some("0.3.0"), vec![], vec![]),
    ] {
        let found = offer(&few, Running::of(&record(running), None));
        assert_eq!(
            (names(&found.0), names(&found.1)),
            (offered.iter().map(|v| (*v).to_owned()).collect(), refused.iter().map(|v| (*v).to_owned()).collect()),
            "{running:?}"
        );
    }
    assert_eq!(newest(&few), Some((version("0.2.0"), sha('2'))), "newer or not, and never a refused one");
    assert_eq!(newest(&refs(vec![tag("0.3.0", '3', Some("moved"))], None)), None);

    let many = refs((1..=25).rev().map(|minor| tag(&format!("0.{minor}.0"), '2', None)).collect(), None);
    let (offered, _) = offer(&many, Running::of(&record(Some("0.1.0")), None));
    assert_eq!(offered.len(), OFFERED_MAX);
    assert_eq!((names(&offered[..1]), names(&offered[19..])), (vec!["0.25.0".to_owned()], vec!["0.6.0".to_owned()]));
}

#[test]
fn a_start_takes_only_releases_that_were_offered() {
    let mut tags: Vec<TagRef> = (1..=25).rev().map(|minor| tag(&format!("0.{minor}.0"), '2', None)).collect();
    tags[1].refused = Some("a branch has its name".to_owned());
    let many = refs(tags, None);
    for (running, target, at, expect) in [
        (Some("0.1.0"), "0.25.0", None, Ok(())),
        (Some("0.1.0"), "0.25.0", Some('2'), Ok(())),
        (Some("0.1.0"), "0.25.0", Some('3'), Err("and not at 333")),
        (Some("0.1.0"), "0.24.0", None, Err("a branch has its name")),
        (Some("0.1.0"), "0.26.0", None, Err("offers no release v0.26.0 (its newest is v0.25.0)")),
        // Twenty are offered, the refused one not among them; newer than what runs is not enough.
        (Some("0.1.0"), "0.5.0", None, Ok(())),
        (Some("0.1.0"), "0.4.0", None, Err("not among the 20 newest")),
        (Some("0.4.0"), "0.5.0", None, Ok(())),
        (Some("0.5.0"), "0.5.0", None, Err("not newer than what runs (0.5.0)")),
        (Some("0.5.0"), "0.4.0", None, Err("not newer")),
        (Some("0.5.0-commit.1111111"), "0.5.0", None, Err("not newer")),
        (None, "0.4.0", None, Err("not among the 20 newest")),
    ] {
        let wanted = Wanted::Release { version: version(target), sha: at.map(sha) };
        match (choose(&wanted, Way::Up, &many, &record(running), None), expect) {
            (Ok(chosen), Ok(())) => {
                let target = tag(target, '2', None);
                let expect = Target {
                    kind: TargetKind::Release,
                    version: target.version,
                    commit: target.commit,
                    raw_ref: target.raw_ref,
                };
                assert_eq!(chosen, expect, "{running:?} to {wanted:?}");
            }
            (Err(Refusal::Conflict(why)), Err(part)) => assert!(why.contains(part), "{running:?} to {wanted:?}: {why}"),
            other => panic!("{running:?} to {wanted:?}: {other:?}"),
        }
    }
    let newest = |running| choose(&Wanted::Newest, Way::Up, &many, &record(Some(running)), None);
    assert_eq!(newest("0.1.0").unwrap().version, version("0.25.0"));
    assert!(matches!(newest("0.25.0"), Err(Refusal::Conflict(why)) if why.contains("no newer release")));
}

#[test]
fn a_commit_target_is_the_recorded_head_and_not_what_runs() {
    for (case, running, follow, head, known, expect) in [
        ("the recorded head", Some("0.1.0"), true, Some('2'), Some('2'), Ok("0.1.0-commit.222222222222")),
        // From one commit to the next the base release stays.
        ("on a commit", Some("0.1.0-commit.1111111"), true, Some('2'), Some('2'), Ok("0.1.0-commit.222222222222")),
        ("commits are not followed", Some("0.1.0"), false, Some('2'), Some('2'), Err("switch track_commits on")),
        ("not the head", Some("0.1.0"), true, Some('3'), Some('3'), Err("not the recorded head")),
        ("the head was never recorded", Some("0.1.0"), true, Some('2'), None, Err("run a check")),
        ("another head was recorded", Some("0.1.0"), true, Some('2'), Some('3'), Err("run a check")),
        ("the head moved on", Some("0.1.0"), true, Some('3'), Some('2'), Err("run a check")),
        ("the branch has gone", Some("0.1.0"), true, None, Some('2'), Err("not the recorded head")),
        ("nothing runs", None, true, Some('2'), Some('2'), Err("start a release first")),
    ] {
        let mut record = record(running);
        record.track_commits = follow;
        record.latest = Latest { branch_head: known.map(sha), ..Latest::default() };
        let wanted = Wanted::Commit { sha: sha('2') };
        match (choose(&wanted, Way::Up, &refs(vec![], head), &record, None), expect) {
            (Ok(chosen), Ok(derived)) => {
                let expect = Target {
                    kind: TargetKind::Commit,
                    version: version(derived),
                    commit: sha('2'),
                    raw_ref: "refs/heads/main".to_owned(),
                };
                assert_eq!(chosen, expect, "{case}");
                // The same start again is the same job.
                assert!(wanted.is(&chosen) && !Wanted::Commit { sha: sha('3') }.is(&chosen), "{case}");
            }
            (Err(Refusal::Conflict(why)), Err(part)) => assert!(why.contains(part), "{case}: {why}"),
            other => panic!("{case}: {other:?}"),
        }
    }
    let mut record = record(Some("0.1.0"));
    record.latest.branch_head = Some(sha('1'));
    let same = choose(&Wanted::Commit { sha: sha('1') }, Way::Up, &refs(vec![], Some('1')), &record, None);
    assert!(matches!(same, Err(Refusal::Conflict(why)) if why.contains("what runs already")));
}

/// Where nothing is run from here, the service's own version is what runs, at a commit that nobody knows.
#[test]
fn what_only_builds_compares_with_its_own_version() {
    let own = version("0.2.0");
    let tags = refs(vec![tag("0.3.0", '3', None), tag("0.2.0", '2', None), tag("0.1.0", '1', None)], Some('8'));
    let mut record = record(None);
    record.latest = Latest { branch_head: Some(sha('8')), ..Latest::default() };
    let names = |own| -> Vec<String> {
        offer(&tags, Running::of(&record, own)).0.iter().map(|tag| tag.version.to_string()).collect()
    };
    assert_eq!(names(Some(&own)), ["0.3.0"]);
    assert_eq!(names(None), ["0.3.0", "0.2.0", "0.1.0"], "everything is newer than nothing");
    let commit = Wanted::Commit { sha: sha('8') };
    let target = choose(&commit, Way::Up, &tags, &record, Some(&own)).unwrap();
    assert_eq!(target.version.to_string(), format!("0.2.0-commit.{}", "8".repeat(12)));
    assert!(choose(&commit, Way::Up, &tags, &record, None).is_err());
}

#[test]
fn a_downgrade_leads_to_what_is_older_and_was_never_moved() {
    let many = refs(
        vec![
            tag("0.5.0", 'a', None),
            tag("0.4.0", '1', None),
            tag("0.3.0", 'c', None),
            tag("0.2.0", 'd', Some("it was moved")),
        ],
        None,
    );
    let to = |target: &str, running: Option<&str>| {
        let wanted = Wanted::Release { version: version(target), sha: None };
        choose(&wanted, Way::Down, &many, &record(running), None).map(|target| target.version.to_string())
    };
    assert_eq!(to("0.3.0", Some("0.4.0")).unwrap(), "0.3.0");
    // Made of 0.3.0, and later: the release itself is a step back from it.
    assert_eq!(to("0.3.0", Some("0.3.0-commit.1111111")).unwrap(), "0.3.0");
    for (target, running, expect) in [
        ("0.5.0", Some("0.4.0"), "0.5.0 is newer than what runs (0.4.0); start it as an upgrade"),
        ("0.4.0", Some("0.4.0"), "0.4.0 is what runs already"),
        ("0.2.0", Some("0.4.0"), "cannot be started: it was moved"),
        ("0.1.0", Some("0.4.0"), "the remote offers no release v0.1.0"),
        ("0.3.0", None, "nothing runs yet"),
    ] {
        let refused = to(target, running).unwrap_err().to_string();
        assert!(refused.contains(expect), "{target}: {refused}");
    }
}
