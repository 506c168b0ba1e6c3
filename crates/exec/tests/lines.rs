//! Lines as the client gets them: whole, in order, cut where they are too long, whatever the bytes are and however they come.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use replank_exec::protocol::{CUT_MARK, Event, Stream};
use replank_exec::server::lines::Cutter;

fn cut(max: usize, chunks: &[&[u8]]) -> Vec<String> {
    let (mut cutter, mut out) = (Cutter::new(Stream::Stdout, max), Vec::new());
    for chunk in chunks {
        cutter.push(chunk, &mut out);
    }
    cutter.finish(&mut out);
    assert!(out.is_empty() || out.ends_with(b"}\n"), "{out:?}");
    let events = out.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    events
        .map(|line| match serde_json::from_slice(line).unwrap() {
            Event::Line { stream: Stream::Stdout, line } => line,
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn lines_are_cut_at_their_ends_alone() {
    #[track_caller]
    fn check(chunks: &[&str], expect: &[&str]) {
        let chunks: Vec<&[u8]> = chunks.iter().map(|chunk| chunk.as_bytes()).collect();
        assert_eq!(cut(8, &chunks), expect);
    }
    check(&[], &[]);
    check(&["a\nb\n"], &["a", "b"]);
    check(&["a\nb"], &["a", "b"]);
    check(&["a", "b", "\n", "c"], &["ab", "c"]);
    check(&["\n\n"], &["", ""]);
    check(&["a\r\nb\r"], &["a\r", "b\r"]);
    check(&["\"\\\t\u{1b}\n"], &["\"\\\t\u{1b}"]);
    // Exactly as long as allowed, and one byte more, in one piece and in several.
    check(&["12345678\n"], &["12345678"]);
    check(&["123456789\nx\n"], &[&format!("12345678{CUT_MARK}"), "x"]);
    check(&["1234", "56789", "0\nx"], &[&format!("12345678{CUT_MARK}"), "x"]);
    check(&["12345678", "\n"], &["12345678"]);
    check(&["12345678", "9"], &[&format!("12345678{CUT_MARK}")]);
    // A character that would be cut in two is left out; one that fits stays.
    check(&["123456789\n", "1234567ä\n"], &[&format!("12345678{CUT_MARK}"), &format!("1234567{CUT_MARK}")]);
    check(&["123456ä\n"], &["123456ä"]);
    check(&["123456äx\n"], &[&format!("123456ä{CUT_MARK}")]);
}

#[test]
fn bytes_that_are_no_text_are_replaced_and_nothing_else_is_lost() {
    assert_eq!(cut(64, &[b"a\xff\xfeb\n", b"c\x00d\n"]), ["a\u{fffd}\u{fffd}b", "c\u{0}d"]);
    // Damage at the cut is the program's own and stays.
    assert_eq!(cut(4, &[b"abc\xffd\n"]), [format!("abc\u{fffd}{CUT_MARK}")]);
}

proptest! {
    /// How the bytes are parted on their way makes no difference, and neither memory nor a line grows beyond its bound.
    #[test]
    fn pieces_make_no_difference(
        bytes in proptest::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n')], 0..400),
        parts in proptest::collection::vec(0_usize..400, 0..8),
        max in 1_usize..50,
    ) {
        let whole = cut(max, &[&bytes]);
        let mut at: Vec<usize> = parts.into_iter().map(|part| part.min(bytes.len())).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        let pieces: Vec<&[u8]> = at.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect();
        prop_assert_eq!(&cut(max, &pieces), &whole);
        // The plain reading of the contract.
        let mut lines: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
        if lines.last().is_some_and(|last| last.is_empty()) {
            lines.pop();
        }
        prop_assert_eq!(lines.len(), whole.len());
        for (line, shown) in lines.iter().zip(&whole) {
            if line.len() <= max {
                prop_assert_eq!(shown, &String::from_utf8_lossy(line));
            } else {
                let kept = shown.strip_suffix(CUT_MARK).expect("marked as cut");
                // A replaced byte is shown as three.
                prop_assert!(kept.len() <= 3 * max);
                let prefix = String::from_utf8_lossy(&line[..max]);
                prop_assert!(prefix.starts_with(kept), "{kept:?} {prefix:?}");
            }
        }
    }
}
