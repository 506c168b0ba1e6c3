//! The masking of logs: a known secret survives in no form of chunks, and what comes out is the same for all of them.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../obeyed.rs"]
mod obeyed;

use obeyed::obeyed;
use replank_core::mask::Masker;

/// Stands in an input for the secret, so that the fuzzer need not find it.
const PLACE: u8 = b'~';
const SECRET: &str = "s3cr3t-Value+/9=";

fuzz_target!(|input: &[u8]| {
    let Some((seed, rest)) = input.split_first() else { return };
    let text: Vec<u8> =
        rest.iter().flat_map(|byte| if *byte == PLACE { SECRET.as_bytes().to_vec() } else { vec![*byte] }).collect();
    let masker = Masker::new(&[SECRET.to_owned()]);
    let whole = masked(&masker, &text, |_| text.len().max(1), false);
    look(&text, &whole);
    for step in [1, 2, 3, usize::from(*seed).max(1)] {
        assert_eq!(masked(&masker, &text, |_| step, false), whole, "chunks of {step}");
    }
    // Of lengths that the input itself gives.
    let uneven = |at: usize| usize::from(text[at] % 17) + 1;
    assert_eq!(masked(&masker, &text, uneven, false), whole, "uneven chunks");
    // A stream that falls silent again and again gives its lines away earlier, and the secret no more than before.
    let silent = masked(&masker, &text, uneven, true);
    assert!(!contains(&silent, SECRET.as_bytes()), "{:?}", String::from_utf8_lossy(&silent));
});

fn masked(masker: &Masker, text: &[u8], length: impl Fn(usize) -> usize, idle: bool) -> Vec<u8> {
    let mut masker = masker.fresh();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let end = (at + length(at)).min(text.len());
        out.extend(masker.push(&text[at..end]));
        if idle {
            masker.idle(&mut out);
        }
        at = end;
    }
    out.extend(masker.finish());
    out
}

fn look(text: &[u8], out: &[u8]) {
    let shown = std::str::from_utf8(out).expect("UTF-8");
    assert!(!contains(out, SECRET.as_bytes()), "{shown:?}");
    let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
    let unended = usize::from(text.last().is_some_and(|byte| *byte != b'\n'));
    assert_eq!(lines(out), lines(text) + unended, "{shown:?}");
    let mut rest = shown;
    while let Some(at) = rest.find(|c: char| c.is_control() && c != '\n' && c != '\t') {
        let escape = rest[at..].strip_prefix("\u{1b}[").expect("a control character that is no colour");
        let end = escape.find(|c: char| !c.is_ascii_digit() && c != ';' && c != ':').expect("an escape without an end");
        assert!(escape[end..].starts_with('m'), "{:?}", &rest[at..]);
        rest = &escape[end..];
    }
    assert!(!shown.contains(obeyed), "{shown:?}");
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}
