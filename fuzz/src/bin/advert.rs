//! What a git remote says: its capabilities, its refs, and the head of a tag object. Nothing that is not there is ever offered.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../obeyed.rs"]
mod obeyed;

use obeyed::obeyed;
use replank_adapters::source::git::{capable, listed};
use replank_adapters::source::judge;
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, Version};

const COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fuzz_target!(|input: &[u8]| {
    let Some((mode, rest)) = input.split_first() else { return };
    match mode % 4 {
        // As it came, in packets or not.
        0 => {
            told(capable(rest));
            look(rest, mode & 4 != 0);
        }
        // Each line a packet, so that more is reached than the reading of lengths.
        1 => look(&packets(rest), mode & 4 != 0),
        2 => told(capable(&packets(rest))),
        _ => tag(rest),
    }
});

fn packets(lines: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        all.extend(format!("{:04x}", line.len() + 4).bytes());
        all.extend(line);
    }
    all.extend(b"0000");
    all
}

/// What a server says may be shown: no controls, nothing that turns text around, nothing that cannot be seen.
fn told(result: Result<(), String>) {
    if let Err(why) = result {
        assert!(!why.contains(|c: char| c.is_control() || obeyed(c)), "{why:?}");
    }
}

fn look(answer: &[u8], signed: bool) {
    let refs = match listed(answer, signed) {
        Ok(refs) => refs,
        Err(why) => return told(Err(why)),
    };
    let stands = |text: &str| answer.windows(text.len()).any(|part| part == text.as_bytes());
    let mut last = None;
    for tag in &refs.tags {
        let name = tag.raw_ref.strip_prefix("refs/tags/v").expect("a release's ref");
        let numbers: Vec<u64> = name.split('.').map(|part| part.parse().expect("a number")).collect();
        let [major, minor, patch] = numbers[..] else { panic!("{name} is no release") };
        assert_eq!(name, format!("{major}.{minor}.{patch}"), "one spelling for each release");
        assert!(last.is_none_or(|last| last > numbers), "newest first, and each once");
        last = Some(numbers);
        assert!(stands(&format!("{} {}", tag.tag_object.as_ref().unwrap_or(&tag.commit), tag.raw_ref)), "{tag:?}");
        assert!(stands(tag.commit.as_str()), "{tag:?}");
        assert!(
            !signed || tag.tag_object.is_some() || tag.refused.is_some(),
            "no signature without an object: {tag:?}"
        );
        told(tag.refused.clone().map_or(Ok(()), Err));
    }
    if let Some((name, head)) = &refs.branch {
        assert!(!signed && name == "refs/heads/main" && stands(&format!("{head} refs/heads/main")));
    }
}

/// A signer is named only for this tag of this commit, in the one form that git writes.
fn tag(rest: &[u8]) {
    let Some((flags, rest)) = rest.split_first() else { return };
    let at = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let (object, words) = (&rest[..at], String::from_utf8_lossy(&rest[at..]));
    let target = Target {
        kind: TargetKind::Release,
        version: Version::release(1, 2, 3),
        commit: CommitSha::new(COMMIT).expect("a commit"),
        raw_ref: "refs/tags/v1.2.3".to_owned(),
    };
    let is_good = flags & 1 != 0;
    match judge(&target, object, is_good, &words) {
        Ok(signer) => {
            let head = format!("object {COMMIT}\ntype commit\ntag v1.2.3\ntagger ");
            assert!(is_good && object.starts_with(head.as_bytes()) && !signer.is_empty());
            told(Err(signer));
        }
        Err(fault) => told(Err(fault.chain())),
    }
}
