//! Takes known secret values out of a stream of bytes, also where one is cut by chunk or line ends.

use std::borrow::Cow;

/// Shorter values are not hidden: replacing every "a" would say more about the secret than it hides.
const SHORTEST: usize = 4;
const MASK: &[u8] = b"***";

/// The values to hide, longest first.
#[derive(Clone, Default)]
pub(super) struct Hide {
    values: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Hide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hide({} values)", self.values.len())
    }
}

impl Hide {
    /// Each value is hidden as it is, and without the line ends around it: files end in one, and printing them drops it.
    pub(super) fn new<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for value in values {
            all.push(value.trim_ascii().to_vec());
            // Multi-line secrets are printed with other things between the lines.
            all.extend(value.split(|b| *b == b'\n').map(|line| line.trim_ascii().to_vec()));
        }
        all.retain(|v| v.len() >= SHORTEST);
        all.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        all.dedup();
        Self { values: all }
    }

    /// Appends what of `held` and `more` is free of secrets to `out`; keeps in `held` what may be the beginning of one.
    pub(super) fn pass(&self, held: &mut Vec<u8>, more: &[u8], out: &mut Vec<u8>) {
        if self.values.is_empty() {
            out.extend_from_slice(more);
            return;
        }
        held.extend_from_slice(more);
        let mut at = 0;
        while at < held.len() {
            let rest = &held[at..];
            if let Some(value) = self.values.iter().find(|v| rest.starts_with(v)) {
                out.extend_from_slice(MASK);
                at += value.len();
            } else if self.values.iter().any(|v| v.starts_with(rest)) {
                break;
            } else {
                out.push(rest[0]);
                at += 1;
            }
        }
        held.drain(..at);
    }

    /// All of `text` at once.
    pub(super) fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if self.values.is_empty() {
            return Cow::Borrowed(text);
        }
        let (mut held, mut out) = (Vec::new(), Vec::new());
        self.pass(&mut held, text.as_bytes(), &mut out);
        out.extend_from_slice(&held);
        Cow::Owned(String::from_utf8_lossy(&out).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_hidden_wherever_they_are_cut() {
        let hide = Hide::new([&b"s3cret-value\n"[..], b"line one\nline two", b"abc"]);
        for (text, expect) in [
            ("x s3cret-value y", "x *** y"),
            ("s3cret-value", "***"),
            ("s3cret-valu", "s3cret-valu"),
            ("s3s3cret-value", "s3***"),
            ("line one\nline two", "***"),
            ("line two only", "*** only"),
            ("abc is too short to hide", "abc is too short to hide"),
        ] {
            for cut in 0..=text.len() {
                let (mut held, mut out) = (Vec::new(), Vec::new());
                hide.pass(&mut held, &text.as_bytes()[..cut], &mut out);
                hide.pass(&mut held, &text.as_bytes()[cut..], &mut out);
                out.extend_from_slice(&held);
                let got = String::from_utf8_lossy(&out);
                // Cut just before the longer value is complete, its lines are hidden one by one: nothing shows either way.
                assert!(got == expect || !got.contains("line"), "{text:?} cut at {cut}: {got:?}");
            }
        }
    }
}
