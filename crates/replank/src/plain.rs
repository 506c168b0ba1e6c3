//! Hostile text made safe for a terminal: only colours survive; everything else that steers it is made visible. The plan, the
//! generated configuration and the commands show such text, and none of them has to know of another.

use replank_core::mask::is_obeyed;

/// Longest colour sequence that is passed on; real ones have a dozen bytes.
const SGR_MAX: usize = 32;

/// One line, without its end.
pub fn line(text: &str, colours: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if c == '\u{1b}'
            && let Some(length) = sgr(rest)
        {
            if colours {
                out.push_str(&rest[..length]);
            }
            rest = &rest[length..];
            continue;
        }
        push(&mut out, c);
        rest = &rest[c.len_utf8()..];
    }
    if colours && out.contains('\u{1b}') {
        // A colour must not run on into what follows.
        out.push_str("\u{1b}[0m");
    }
    out
}

fn push(out: &mut String, c: char) {
    match c {
        '\t' => out.push(c),
        // The pictures of the control characters.
        '\0'..='\u{1f}' => out.push(char::from_u32(0x2400 + c as u32).unwrap_or('\u{fffd}')),
        '\u{7f}' => out.push('\u{2421}'),
        _ if is_obeyed(c) => out.push_str(&format!("<U+{:04X}>", c as u32)),
        _ => out.push(c),
    }
}

/// The length of a colour sequence at the beginning.
fn sgr(text: &str) -> Option<usize> {
    let body = text.strip_prefix("\u{1b}[")?;
    let length = body.bytes().take(SGR_MAX).take_while(|b| b.is_ascii_digit() || *b == b';').count();
    (body.as_bytes().get(length) == Some(&b'm')).then_some(length + 3)
}

/// Bytes in any chunks, out in whole lines.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
}

/// A longer line is given out in parts, so that one without an end cannot fill the memory.
const LINE_MAX: usize = 64 * 1024;

impl Lines {
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            self.pending.extend_from_slice(part);
            if self.pending.ends_with(b"\n") || self.pending.len() > LINE_MAX {
                self.finish(&mut each);
            }
        }
    }

    pub fn finish(&mut self, mut each: impl FnMut(&str)) {
        if self.pending.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(&self.pending);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        // A line that ends in CR LF is an ordinary line.
        each(text.strip_suffix('\r').unwrap_or(text));
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_colours_survive() {
        for (input, coloured, plain) in [
            ("plain", "plain", "plain"),
            ("\u{1b}[31mred", "\u{1b}[31mred\u{1b}[0m", "red"),
            ("\u{1b}[2Jcleared", "␛[2Jcleared", "␛[2Jcleared"),
            ("\u{1b}]0;title\u{7}", "␛]0;title␇", "␛]0;title␇"),
            ("over\rwritten", "over␍written", "over␍written"),
            ("a\u{202e}b", "a<U+202E>b", "a<U+202E>b"),
            ("a\u{9b}31mb", "a<U+009B>31mb", "a<U+009B>31mb"),
            // What shows nothing and yet makes two names look like one.
            ("v1\u{200b}.0\u{ad}\u{2060}", "v1<U+200B>.0<U+00AD><U+2060>", "v1<U+200B>.0<U+00AD><U+2060>"),
            ("a\u{61c}\u{2066}b\u{e0041}", "a<U+061C><U+2066>b<U+E0041>", "a<U+061C><U+2066>b<U+E0041>"),
        ] {
            assert_eq!(line(input, true), coloured, "{input:?}");
            assert_eq!(line(input, false), plain, "{input:?}");
        }
    }

    #[test]
    fn lines_do_not_depend_on_chunks() {
        let text = "one\r\ntwo ü\nthree".as_bytes();
        for size in 1..text.len() {
            let (mut lines, mut got) = (Lines::default(), Vec::new());
            text.chunks(size).for_each(|chunk| lines.push(chunk, |l| got.push(l.to_owned())));
            lines.finish(|l| got.push(l.to_owned()));
            assert_eq!(got, ["one", "two ü", "three"], "in chunks of {size}");
        }
    }
}
