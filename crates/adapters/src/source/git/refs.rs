//! From the lines of a ref advertisement to releases: pure, and suspicious of every name.

use std::collections::{BTreeMap, BTreeSet};

use replank_core::mask::mask_sentence;
use replank_core::ports::{Refs, TagRef};
use replank_core::words::{CommitSha, Version};

use super::pkt::{self, Pkt, PktError};
use crate::source::signed::lightweight;

/// Releases that are handed on, newest first; nobody upgrades to the 1,001st.
pub(super) const MAX_TAGS: usize = 1_000;

const TAGS: &str = "refs/tags/";
const HEADS: &str = "refs/heads/";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RefLine {
    pub(super) name: String,
    pub(super) object: CommitSha,
    /// What an annotated tag leads to in the end.
    pub(super) peeled: Option<CommitSha>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRefs {
    #[error(transparent)]
    Pkt(#[from] PktError),
    #[error("a line is not an object id, a blank and a name")]
    Line,
    #[error("the list of refs does not end with a flush packet")]
    Unended,
    /// The server's own words, without control characters.
    #[error("the server says: {0}")]
    Said(String),
}

/// Reads the answer to `ls-refs`. Names that are not UTF-8 cannot be release tags and are skipped.
pub(super) fn parse(answer: &[u8]) -> Result<Vec<RefLine>, BadRefs> {
    let mut lines = Vec::new();
    for pkt in pkt::read(answer) {
        match pkt? {
            Pkt::Data(line) => lines.extend(parse_line(line)?),
            Pkt::Flush => return Ok(lines),
            Pkt::Delim | Pkt::ResponseEnd => return Err(BadRefs::Line),
        }
    }
    Err(BadRefs::Unended)
}

fn parse_line(line: &[u8]) -> Result<Option<RefLine>, BadRefs> {
    if let Some(said) = line.strip_prefix(b"ERR ") {
        return Err(BadRefs::Said(tame(said)));
    }
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut words = line.split(|b| *b == b' ');
    let (Some(object), Some(name)) = (words.next(), words.next()) else {
        return Err(BadRefs::Line);
    };
    if object == b"unborn" {
        return Ok(None);
    }
    let object = sha(object).ok_or(BadRefs::Line)?;
    let mut peeled = None;
    for word in words {
        // Attributes of later protocol extensions are none of ours.
        if let Some(hex) = word.strip_prefix(b"peeled:") {
            peeled = Some(sha(hex).ok_or(BadRefs::Line)?);
        }
    }
    Ok(String::from_utf8(name.to_vec()).ok().map(|name| RefLine { name, object, peeled }))
}

fn sha(hex: &[u8]) -> Option<CommitSha> {
    std::str::from_utf8(hex).ok().and_then(|text| CommitSha::new(text).ok())
}

/// Longest of a remote's words that are looked at, and the characters of them that are shown.
const SAID_MAX: usize = 4_096;
const SHOWN_MAX: usize = 300;

/// A remote's words, fit to be shown: masked, on one line, with nothing in them that a terminal or a page obeys.
pub(in crate::source) fn tame(bytes: &[u8]) -> String {
    let said = String::from_utf8_lossy(&bytes[..bytes.len().min(SAID_MAX)]);
    mask_sentence(&said).chars().take(SHOWN_MAX).collect()
}

/// The release that a name stands for: only the one spelling `vA.B.C`.
fn release(name: &str) -> Option<Version> {
    let version: Version = name.parse().ok()?;
    (version.commit.is_none() && version.tag() == name).then_some(version)
}

/// Picks release tags and the tracking branch's head. Where tags must be signed, one without an object of its own is refused,
/// and the branch, whose commits carry no tag, is left out.
pub(super) fn choose(lines: &[RefLine], tracking: &str, signed: bool) -> Refs {
    let branches: BTreeSet<&str> = lines.iter().filter_map(|line| line.name.strip_prefix(HEADS)).collect();
    let mut tags: BTreeMap<(u64, u64, u64), TagRef> = BTreeMap::new();
    for line in lines {
        let Some(name) = line.name.strip_prefix(TAGS) else {
            continue;
        };
        let Some(version) = release(name) else {
            continue;
        };
        let refused = branches.contains(name).then(|| {
            format!(
                "the remote has a branch named {name} as well, and git prefers the branch; delete or rename the branch"
            )
        });
        let refused = refused.or_else(|| (signed && line.peeled.is_none()).then(|| lightweight(name)));
        let tag = TagRef {
            raw_ref: line.name.clone(),
            commit: line.peeled.clone().unwrap_or_else(|| line.object.clone()),
            tag_object: line.peeled.is_some().then(|| line.object.clone()),
            refused,
            version: version.clone(),
        };
        tags.entry(version.base())
            .and_modify(|first| first.refused = Some(format!("the remote names {} twice", first.raw_ref)))
            .or_insert(tag);
    }
    let wanted = format!("{HEADS}{tracking}");
    let branch =
        lines.iter().find(|line| !signed && line.name == wanted).map(|line| (line.name.clone(), line.object.clone()));
    Refs { tags: tags.into_values().rev().take(MAX_TAGS).collect(), branch }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(c: char) -> String {
        c.to_string().repeat(40)
    }

    fn answer(lines: &[String]) -> Vec<u8> {
        let mut out = Vec::new();
        for line in lines {
            pkt::write(&mut out, line);
        }
        out.extend_from_slice(pkt::FLUSH);
        out
    }

    #[test]
    fn lines_are_read_or_refused() {
        let a = hex('a');
        for (line, expect) in [
            (format!("{a} refs/tags/v1.0.0\n"), Ok(1)),
            (format!("{a} refs/tags/v1.0.0 peeled:{}\n", hex('b')), Ok(1)),
            (format!("{a} HEAD symref-target:refs/heads/main"), Ok(1)),
            ("unborn HEAD symref-target:refs/heads/main\n".to_owned(), Ok(0)),
            (format!("{a}\n"), Err(BadRefs::Line)),
            ("xyz refs/tags/v1.0.0\n".to_owned(), Err(BadRefs::Line)),
            (format!("{} refs/tags/v1.0.0\n", a.to_uppercase()), Err(BadRefs::Line)),
            (format!("{a} refs/tags/v1.0.0 peeled:x\n"), Err(BadRefs::Line)),
            // A colour goes, and everything else that steers a terminal is made visible.
            ("ERR no \u{1b}[31maccess\u{202e}\u{7}\n".to_owned(), Err(BadRefs::Said("no access\\u{202e}␇".to_owned()))),
        ] {
            assert_eq!(parse(&answer(std::slice::from_ref(&line))).map(|l| l.len()), expect, "{line:?}");
        }
        assert_eq!(parse(b""), Err(BadRefs::Unended));
        assert_eq!(parse(b"0001"), Err(BadRefs::Line));
    }

    #[test]
    fn names_that_are_not_utf8_are_skipped() {
        let mut out = Vec::new();
        let mut line = format!("{} refs/tags/v1.0.", hex('a')).into_bytes();
        line.push(0xff);
        out.extend_from_slice(format!("{:04x}", line.len() + 4).as_bytes());
        out.extend_from_slice(&line);
        out.extend_from_slice(pkt::FLUSH);
        assert_eq!(parse(&out), Ok(vec![]));
    }

    #[test]
    fn only_release_tags_are_chosen_newest_first() {
        let mut lines: Vec<String> = [
            "refs/tags/v1.2.3",
            "refs/tags/v1.10.0",
            "refs/tags/v1.9.0",
            "refs/tags/1.2.4",
            "refs/tags/v01.2.3",
            "refs/tags/v1.2",
            "refs/tags/v1.2.3-rc.1",
            "refs/tags/v1.2.3-commit.0123456",
            "refs/tags/v1.2.3^{}",
            "refs/tags/../v9.9.9",
            "refs/tags/x/v9.9.9",
            "refs/tags/v9.9.9\u{7}",
            "refs/tags/v9.9.9\u{202e}",
            "refs/heads/main2",
            "refs/heads/main",
            "refs/tags/--upload-pack=x",
            "refs/remotes/v8.0.0",
            "refs/heads/v1.9.0",
        ]
        .iter()
        .map(|name| format!("{} {name}\n", hex('a')))
        .collect();
        lines.push(format!("{} refs/tags/v2.0.0 peeled:{}\n", hex('c'), hex('d')));
        lines.push(format!("{} refs/tags/v3.0.0\n", hex('1')));
        lines.push(format!("{} refs/tags/v3.0.0\n", hex('2')));
        lines.push(format!("{} refs/tags/{}\n", hex('e'), "v".repeat(4_000)));
        let refs = choose(&parse(&answer(&lines)).expect("lines"), "main", false);
        let seen: Vec<_> = refs.tags.iter().map(|t| (t.version.to_string(), t.refused.is_some())).collect();
        let expect = [("3.0.0", true), ("2.0.0", false), ("1.10.0", false), ("1.9.0", true), ("1.2.3", false)];
        assert_eq!(seen, expect.map(|(v, r)| (v.to_owned(), r)));
        assert_eq!(refs.tags[1].commit.as_str(), hex('d'));
        assert_eq!(refs.tags[1].tag_object.as_ref().map(CommitSha::as_str), Some(hex('c').as_str()));
        assert_eq!(refs.tags[2].tag_object, None);
        assert_eq!(refs.branch.map(|(name, _)| name).as_deref(), Some("refs/heads/main"));
        // Where tags must be signed, only the annotated one is left, and no commit of the branch.
        let refs = choose(&parse(&answer(&lines)).expect("lines"), "main", true);
        let offered: Vec<_> = refs.tags.iter().filter(|t| t.refused.is_none()).map(|t| t.version.to_string()).collect();
        assert_eq!((offered, refs.branch), (vec!["2.0.0".to_owned()], None));
        assert!(refs.tags[2].refused.as_ref().is_some_and(|why| why.contains("v1.10.0 is lightweight")));
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1_000)) {
            prop_assert!(parse(&bytes).map_or(true, |lines| lines.len() <= bytes.len()));
        }

        #[test]
        fn chosen_names_are_always_canonical(names in proptest::collection::vec("(refs/(tags|heads)/)?v?[0-9]{1,3}(\\.[0-9]{1,3}){1,3}(-[a-z.0-9]{1,8})?", 0..60)) {
            let lines: Vec<String> = names.iter().map(|n| format!("{} {n}\n", hex('a'))).collect();
            let refs = choose(&parse(&answer(&lines)).expect("lines"), "main", false);
            for pair in refs.tags.windows(2) {
                prop_assert!(pair[0].version.base() > pair[1].version.base());
            }
            for tag in &refs.tags {
                prop_assert_eq!(&tag.raw_ref, &format!("refs/tags/{}", tag.version.tag()));
                prop_assert!(names.contains(&tag.raw_ref));
            }
        }
    }
}
