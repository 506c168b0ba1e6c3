//! What may be shown of text that others wrote: secrets hidden, and nothing in it that a terminal or a page would obey.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};

use regex::{Captures, Regex, RegexSet};

/// What stands in a secret's place.
pub const MASK: &str = "***";

/// A line is cut here, as on the exec channel (contract §5), so that a build that never ends a line costs bounded memory.
pub const LINE_MAX: usize = 64 * 1024;

/// How a cut line ends (contract §5).
pub const CUT: &str = " [truncated:line-over-cap]";

/// Known values below this length are not searched for: they would hide half of every log and protect nothing.
pub const SECRET_MIN: usize = 4;

/// Line ends inside a known value after which it counts as a new text: a wrapped value has one at a time.
const WRAP_MAX: usize = 4;

/// An unfinished value of at least this length is hidden when its line has to be given away before it is known how it
/// goes on; fewer characters say nothing.
const PARTIAL_MIN: usize = 6;

/// Lines of one private key that are hidden: four times what the largest usual key has.
const KEY_LINES_MAX: u32 = 400;

/// Letters that may stand in an SGR escape; a longer one is no colour.
const SGR_MAX: usize = 32;

// --- Known values ------------------------------------------------------------------------------------------------

/// A trie with failure links over all known values (Aho and Corasick), so that many values cost one pass.
#[derive(Debug, Default)]
struct Known {
    next: HashMap<(u32, u8), u32>,
    /// The first step by byte, apart: nearly every byte of a log ends here.
    root: Vec<u32>,
    /// Per state: where to go on after a mismatch, how long its prefix is, and the longest value that ends in it.
    fail: Vec<u32>,
    depth: Vec<usize>,
    ends: Vec<usize>,
}

impl Known {
    fn new(secrets: &[String]) -> Self {
        let mut known = Self { next: HashMap::new(), root: vec![0; 256], fail: vec![0], depth: vec![0], ends: vec![0] };
        for secret in secrets {
            // Line ends are skipped in the text, so they are no part of the value either (keys in PEM form).
            let bare: Vec<u8> = secret.trim().bytes().filter(|b| !is_line_end(*b)).collect();
            if bare.len() < SECRET_MIN {
                continue;
            }
            known.insert(&bare);
            for form in encoded(secret.trim().as_bytes()) {
                known.insert(&form);
            }
        }
        known.link();
        known
    }

    fn insert(&mut self, value: &[u8]) {
        let mut state = 0u32;
        for (at, byte) in value.iter().enumerate() {
            let fresh = self.fail.len() as u32;
            let entry = *self.next.entry((state, *byte)).or_insert(fresh);
            if entry == fresh {
                self.fail.push(0);
                self.depth.push(at + 1);
                self.ends.push(0);
            }
            state = entry;
        }
        self.ends[state as usize] = value.len();
    }

    fn link(&mut self) {
        for ((from, byte), to) in &self.next {
            if *from == 0 {
                self.root[usize::from(*byte)] = *to;
            }
        }
        let mut edges: Vec<_> = self.next.iter().map(|((from, byte), to)| (*from, *byte, *to)).collect();
        // By depth: a state's failure link points to a shorter prefix, which is done by then.
        edges.sort_by_key(|(_, _, to)| self.depth[*to as usize]);
        for (from, byte, to) in edges {
            let fail = if from == 0 { 0 } else { self.step(self.fail[from as usize], byte) };
            self.fail[to as usize] = fail;
            self.ends[to as usize] = self.ends[to as usize].max(self.ends[fail as usize]);
        }
    }

    fn step(&self, mut state: u32, byte: u8) -> u32 {
        while state != 0 {
            match self.next.get(&(state, byte)) {
                Some(to) => return *to,
                None => state = self.fail[state as usize],
            }
        }
        self.root[usize::from(byte)]
    }

    fn is_empty(&self) -> bool {
        self.next.is_empty()
    }
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// The forms in which a value appears without being written out: base64 at each of the three alignments, plain and
/// URL-safe, percent-encoded, and as a JSON string.
fn encoded(value: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = Vec::new();
    for alphabet in [*b"+/", *b"-_"] {
        for lead in 0..3usize {
            let mut padded = vec![0u8; lead];
            padded.extend_from_slice(value);
            let mut text = base64(&padded, alphabet);
            // The first characters mix in what stands before the value; the last one, where the value does not fill its
            // group, what stands after it, if anything does.
            text.drain(..[0, 2, 3][lead]);
            forms.push(text.clone());
            if !padded.len().is_multiple_of(3) {
                text.pop();
                forms.push(text);
            }
        }
    }
    let mut percent = String::new();
    for byte in value {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
            percent.push(char::from(*byte));
        } else {
            let _infallible = write!(percent, "%{byte:02X}");
        }
    }
    forms.push(percent.to_ascii_lowercase().into_bytes());
    forms.push(percent.into_bytes());
    if let Ok(json) = serde_json::to_string(&String::from_utf8_lossy(value)) {
        forms.push(json.trim_matches('"').as_bytes().to_vec());
    }
    forms.retain(|form| form.len() >= SECRET_MIN);
    forms
}

/// Base64 without padding.
fn base64(bytes: &[u8], last_two: [u8; 2]) -> Vec<u8> {
    let digit = |n: u32| match (n & 63) as u8 {
        n @ 0..=25 => b'A' + n,
        n @ 26..=51 => b'a' + (n - 26),
        n @ 52..=61 => b'0' + (n - 52),
        n => last_two[usize::from(n - 62)],
    };
    let mut text = Vec::with_capacity(bytes.len() * 4 / 3 + 3);
    for group in bytes.chunks(3) {
        let at = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..=group.len() {
            text.push(digit(bits >> (18 - 6 * place)));
        }
    }
    text
}

// --- The stream --------------------------------------------------------------------------------------------------

/// Masks one stream of bytes that comes in any chunks, and gives whole lines.
#[derive(Debug, Clone)]
pub struct Masker {
    known: Arc<Known>,
    state: u32,
    /// Bytes that may still turn out to be the beginning of a known value, with whether each is already part of one.
    held: VecDeque<(u8, bool)>,
    /// Places in `held` of the bytes that count, as absolute numbers; `base` is the number of `held`'s first byte.
    places: VecDeque<u64>,
    base: u64,
    line_ends: usize,
    /// The line so far; what went over the limit is gone.
    line: Vec<u8>,
    cut: bool,
    /// The last byte given to `line` was part of a known value.
    in_mask: bool,
    key_lines: u32,
}

impl Masker {
    /// `secrets`: values that must never appear, in clear or encoded, even wrapped over lines.
    pub fn new(secrets: &[String]) -> Self {
        Self {
            known: Arc::new(Known::new(secrets)),
            state: 0,
            held: VecDeque::new(),
            places: VecDeque::new(),
            base: 0,
            line_ends: 0,
            line: Vec::new(),
            cut: false,
            in_mask: false,
            key_lines: 0,
        }
    }

    /// A masker of the same values for another stream, at its beginning.
    pub fn fresh(&self) -> Self {
        Self { known: self.known.clone(), ..Self::new(&[]) }
    }

    /// Takes bytes and gives the lines that they completed, each with its line end.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        if self.known.is_empty() {
            bytes.iter().for_each(|byte| self.take(*byte, false, &mut out));
            return out;
        }
        for byte in bytes {
            if self.state == 0 && self.known.root[usize::from(*byte)] == 0 {
                // No value is under way and none begins: nothing is held.
                self.base += 1;
                self.take(*byte, false, &mut out);
                continue;
            }
            self.hold(*byte);
            let keep_from = self.first_open();
            self.release(keep_from, &mut out);
        }
        out
    }

    /// Gives complete lines that are held back only because their end might be the beginning of a known value: for a
    /// stream that has been silent for a while. What goes on later is still hidden.
    pub fn idle(&mut self, out_of: &mut Vec<u8>) {
        let Some(last) = self.held.iter().rposition(|(byte, _)| *byte == b'\n') else { return };
        self.hide_open();
        self.release(self.base + last as u64 + 1, out_of);
    }

    /// The rest, with a line end where it had none.
    pub fn finish(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        self.hide_open();
        self.release(u64::MAX, &mut out);
        self.state = 0;
        if !self.line.is_empty() || self.cut || self.in_mask {
            self.end_line(&mut out);
        }
        out
    }

    fn hold(&mut self, byte: u8) {
        let place = self.base + self.held.len() as u64;
        self.held.push_back((byte, false));
        if is_line_end(byte) {
            self.line_ends += 1;
            if self.line_ends > WRAP_MAX {
                self.state = 0;
            }
            return;
        }
        self.line_ends = 0;
        self.places.push_back(place);
        self.state = self.known.step(self.state, byte);
        let found = self.known.ends[self.state as usize];
        if found > 0 {
            self.hide_last(found);
        }
    }

    /// Marks everything from the `count`th last byte that counts on as hidden, as far as it is still here.
    fn hide_last(&mut self, count: usize) {
        let first = self.places.len().checked_sub(count).and_then(|at| self.places.get(at)).copied();
        let first = first.unwrap_or(self.base).saturating_sub(self.base) as usize;
        self.held.iter_mut().skip(first).for_each(|(_, hidden)| *hidden = true);
    }

    fn hide_open(&mut self) {
        let open = self.known.depth[self.state as usize];
        if open >= PARTIAL_MIN {
            self.hide_last(open);
        }
    }

    /// The first byte that a match could still begin with.
    fn first_open(&self) -> u64 {
        let open = self.known.depth[self.state as usize];
        let end = self.base + self.held.len() as u64;
        if open == 0 {
            return end;
        }
        self.places.len().checked_sub(open).and_then(|at| self.places.get(at)).copied().unwrap_or(self.base)
    }

    fn release(&mut self, before: u64, out: &mut Vec<u8>) {
        while self.base < before {
            let Some((byte, hidden)) = self.held.pop_front() else { break };
            self.base += 1;
            while self.places.front().is_some_and(|place| *place < self.base) {
                self.places.pop_front();
            }
            self.take(byte, hidden, out);
        }
    }

    /// One byte for the line; hidden ones leave one mask for each run and line.
    fn take(&mut self, byte: u8, hidden: bool, out: &mut Vec<u8>) {
        if byte == b'\n' {
            self.end_line(out);
        } else if hidden && !is_line_end(byte) {
            if !self.in_mask {
                self.in_mask = true;
                self.keep(MASK.as_bytes());
            }
        } else if !hidden {
            self.in_mask = false;
            self.keep(&[byte]);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.line.len() + bytes.len() <= LINE_MAX {
            self.line.extend_from_slice(bytes);
        } else {
            self.cut = true;
        }
    }

    fn end_line(&mut self, out: &mut Vec<u8>) {
        let line = std::mem::take(&mut self.line);
        let line = line.strip_suffix(b"\r").unwrap_or(&line);
        let shown = shown(line);
        if self.is_key_material(&shown) {
            out.extend_from_slice(MASK.as_bytes());
        } else {
            out.extend_from_slice(hide_patterns(shown).as_bytes());
        }
        if std::mem::take(&mut self.cut) {
            out.extend_from_slice(CUT.as_bytes());
        }
        out.push(b'\n');
        self.in_mask = false;
    }

    /// Follows private keys in PEM form over their lines.
    fn is_key_material(&mut self, line: &str) -> bool {
        if line.contains("-----BEGIN ") && line.contains("PRIVATE KEY-----") {
            self.key_lines = if line.contains("-----END ") { 0 } else { KEY_LINES_MAX };
            return true;
        }
        if self.key_lines == 0 {
            return false;
        }
        self.key_lines = if line.contains("-----END ") { 0 } else { self.key_lines - 1 };
        true
    }
}

/// Masks a short text as a whole: errors, notes, one log line. Line ends stay.
pub fn mask_text(text: &str) -> String {
    mask_text_with(&Masker::new(&[]), text)
}

/// The same with known values.
pub fn mask_text_with(masker: &Masker, text: &str) -> String {
    let mut masker = masker.fresh();
    let mut out = masker.push(text.as_bytes());
    out.extend_from_slice(&masker.finish());
    if !text.ends_with('\n') && out.last() == Some(&b'\n') {
        out.pop();
    }
    // Only UTF-8 leaves a masker.
    String::from_utf8_lossy(&out).into_owned()
}

/// Masks a sentence that is stored or told to others: an error, a reason, what a remote or a container said. On one line and
/// without colours, since nobody knows where it will be shown. At most `max` characters.
pub fn mask_sentence(text: &str, max: usize) -> String {
    mask_sentence_with(&Masker::new(&[]), text).chars().take(max).collect()
}

/// The same with known values, and whole.
pub fn mask_sentence_with(masker: &Masker, text: &str) -> String {
    let masked = mask_text_with(masker, text);
    let (mut plain, mut rest) = (String::with_capacity(masked.len()), masked.as_str());
    while let Some(at) = rest.find('\u{1b}') {
        plain.push_str(&rest[..at]);
        // Nothing but colours begins with it any more.
        rest = &rest[at + sgr(&rest[at..]).map_or(1, str::len)..];
    }
    plain.push_str(rest);
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

// --- What a terminal or a page would obey ------------------------------------------------------------------------

/// A line with everything made visible that is not text, a tab or a colour.
fn shown(line: &[u8]) -> String {
    let mut out = String::with_capacity(line.len());
    for chunk in line.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(c) = rest.chars().next() {
            if let Some(sgr) = sgr(rest) {
                out.push_str(sgr);
                rest = &rest[sgr.len()..];
                continue;
            }
            rest = &rest[c.len_utf8()..];
            let code = u32::from(c);
            match c {
                '\t' => out.push(c),
                // The pictures of the control characters, in the same order.
                '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + code)),
                '\u{7f}' => out.push('\u{2421}'),
                _ if is_obeyed(c) => {
                    let _infallible = write!(out, "\\u{{{code:x}}}");
                }
                _ => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _infallible = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Characters beyond ASCII that change how others are shown, or show nothing themselves.
pub fn is_obeyed(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The SGR escape (`ESC [ digits and semicolons m`) at the beginning of a text.
fn sgr(text: &str) -> Option<&str> {
    let inner = text.strip_prefix("\u{1b}[")?;
    let length = inner.bytes().take(SGR_MAX).take_while(|b| b.is_ascii_digit() || matches!(b, b';' | b':')).count();
    (inner.as_bytes().get(length) == Some(&b'm')).then(|| &text[..2 + length + 1])
}

// --- What looks like a secret ------------------------------------------------------------------------------------

/// When a match is a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    /// The word before it is an everyday word too, so the value must not look like one.
    NotAWord,
}

/// Pattern and condition. The group `v` is hidden, and what is before it stays. `(?i-u:…)`: ASCII letters in either case.
const PATTERNS: &[(&str, When)] = &[
    // Headers that carry nothing but credentials.
    (
        r#"(?i-u:(?:proxy-)?authorization)\\*["']?[ \t]*[:=][ \t]*\\*["']?(?:[A-Za-z]+[ \t]+)?(?<v>[^\s"'\\]+)"#,
        When::Always,
    ),
    (r"(?i-u:(?:set-)?cookie)[ \t]*:[ \t]*(?<v>[^\s].*)", When::Always),
    (r"(?i-u:\bbearer)[ \t]+(?<v>[A-Za-z0-9._~+/=:-]{8,})", When::Always),
    (r"(?i-u:\bbasic)[ \t]+(?<v>[A-Za-z0-9+/_-]{4,}={0,2})", When::NotAWord),
    // URL userinfo: greedy, for passwords with an '@' of their own.
    (r#"[A-Za-z][A-Za-z0-9+.-]*://(?<v>[^\s/?#"'<>]+)@"#, When::Always),
    // Tokens that say what they are.
    (r"(?<v>gh[pousr]_[A-Za-z0-9]{10,})", When::Always),
    (r"(?<v>github_pat_[A-Za-z0-9_]{10,})", When::Always),
    (r"(?<v>gl(?:pat|ptt|dt|rt|cbt|ft|imt|agent|soat)-[A-Za-z0-9_.-]{10,})", When::Always),
    (r"(?<v>npm_[A-Za-z0-9]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,})", When::Always),
    (r"(?<v>(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16})", When::Always),
    (r"(?<v>eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?)", When::Always),
    // Signatures in URLs: SAS and its like.
    (
        r#"(?i-u:\b(?:sig|signature|x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature))=(?<v>[^\s&"']+)"#,
        When::Always,
    ),
    // Options with a value of their own.
    (
        r#"(?i-u:--?[a-z0-9-]*(?:password|passwd|passphrase|secret|token|api-?key)[a-z0-9-]*)[ \t]+(?<v>"[^"]*"?|'[^']*'?|[^\s-]\S*)"#,
        When::Always,
    ),
    (r"(?:[ \t]-u|--user)[ \t]*[=]?[ \t]*[^\s:=-][^\s:]*:(?<v>\S+)", When::Always),
    // key=value, "key": "value" and the like, also inside quoted JSON.
    (
        r#"(?i-u:password|passwd|passphrase|pwd|secret|token|credential|api[_-]?key|account[_-]?key|access[_-]?key|private[_-]?key)[A-Za-z0-9_.-]*(?:\\*["'][ \t]*[:=]>?|[ \t]*=>?)[ \t]*(?<v>\\*"(?:[^"\\]|\\.)*\\*"?|\\*'[^']*'?|[^\s"'&]+)"#,
        When::Always,
    ),
    (
        r#"(?i-u:password|passwd|passphrase|pwd|secret|credential)[A-Za-z0-9_.-]*[ \t]*:[ \t]*(?<v>\\*"(?:[^"\\]|\\.)*\\*"?|'[^']*'?|[^\s"':][^\s"']*)"#,
        When::Always,
    ),
    // A bare word before a colon is what compilers write too: `unexpected token: fn`.
    (
        r#"(?i-u:token|api[_-]?key|account[_-]?key|access[_-]?key|private[_-]?key)[A-Za-z0-9_.-]*[ \t]*:[ \t]*(?<v>[^\s"':][^\s"']*|"[^"]*"?|'[^']*'?)"#,
        When::NotAWord,
    ),
];

struct Patterns {
    any: RegexSet,
    each: Vec<(Regex, When)>,
}

static COMPILED: LazyLock<Patterns> = LazyLock::new(|| {
    let broken = |e: regex::Error| -> ! { unreachable!("the patterns are constants, and a test compiles them: {e}") };
    let any = RegexSet::new(PATTERNS.iter().map(|(p, _)| *p)).unwrap_or_else(|e| broken(e));
    let compile = |(p, when): &(&str, When)| (Regex::new(p).unwrap_or_else(|e| broken(e)), *when);
    Patterns { any, each: PATTERNS.iter().map(compile).collect() }
});

fn hide_patterns(mut line: String) -> String {
    let patterns = &*COMPILED;
    // Nearly every line has none: one pass says so.
    for index in patterns.any.matches(&line) {
        let Some((pattern, when)) = patterns.each.get(index) else { continue };
        let replaced = pattern.replace_all(&line, |found: &Captures<'_>| {
            let whole = &found[0];
            let (Some(all), Some(value)) = (found.get(0), found.name("v")) else { return whole.to_owned() };
            if *when == When::NotAWord && is_word(value.as_str()) {
                return whole.to_owned();
            }
            let (before, after) = (value.start() - all.start(), value.end() - all.start());
            let (open, close) = quotes(value.as_str());
            format!("{}{open}{MASK}{close}{}", &whole[..before], &whole[after..])
        });
        if let std::borrow::Cow::Owned(replaced) = replaced {
            line = replaced;
        }
    }
    line
}

/// The quotes around a value: they stay, so that what was JSON still is, and masking twice is masking once.
fn quotes(value: &str) -> (&str, &str) {
    let length = value.bytes().take_while(|b| *b == b'\\').count();
    match value.as_bytes().get(length) {
        Some(b'"' | b'\'') => {
            let open = &value[..=length];
            let closed = value.len() > open.len() && value.ends_with(&open[length..]);
            (
                open,
                if closed && value[open.len()..].ends_with(open) {
                    open
                } else if closed {
                    &open[length..]
                } else {
                    ""
                },
            )
        }
        Some(_) | None => ("", ""),
    }
}

/// An everyday word or a piece of code rather than a random value.
fn is_word(value: &str) -> bool {
    let letters = value.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    letters.len() < 20
        && !letters.bytes().any(|b| b.is_ascii_digit() || matches!(b, b'=' | b'+' | b'/'))
        && !letters.chars().skip(1).any(|c| c.is_ascii_uppercase())
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
