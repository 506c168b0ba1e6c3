//! Git's pkt-line framing: pure, bounded by its input, never panics.

/// Largest packet that git itself sends (gitprotocol-common: 65520, length digits included).
const MAX_PACKET: usize = 65_520;
const HEADER: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pkt<'a> {
    /// `0000`
    Flush,
    /// `0001`
    Delim,
    /// `0002`
    ResponseEnd,
    Data(&'a [u8]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PktError {
    #[error("a packet's length is not four hexadecimal digits of an allowed length")]
    Length,
    #[error("the answer ends inside a packet")]
    Truncated,
}

/// Reads packets one after the other; after an error there are no more.
#[derive(Debug, Clone)]
pub(super) struct Pkts<'a> {
    rest: &'a [u8],
}

pub(super) fn read(bytes: &[u8]) -> Pkts<'_> {
    Pkts { rest: bytes }
}

impl<'a> Pkts<'a> {
    fn take(&mut self) -> Result<Pkt<'a>, PktError> {
        let header = self.rest.get(..HEADER).ok_or(PktError::Truncated)?;
        let mut length = 0usize;
        for digit in header {
            let digit = char::from(*digit).to_digit(16).ok_or(PktError::Length)?;
            length = length * 16 + digit as usize;
        }
        let (pkt, used) = match length {
            0 => (Pkt::Flush, HEADER),
            1 => (Pkt::Delim, HEADER),
            2 => (Pkt::ResponseEnd, HEADER),
            HEADER..=MAX_PACKET => (Pkt::Data(self.rest.get(HEADER..length).ok_or(PktError::Truncated)?), length),
            _ => return Err(PktError::Length),
        };
        self.rest = &self.rest[used..];
        Ok(pkt)
    }
}

impl<'a> Iterator for Pkts<'a> {
    type Item = Result<Pkt<'a>, PktError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let taken = self.take();
        if taken.is_err() {
            self.rest = &[];
        }
        Some(taken)
    }
}

/// Appends a line; longer ones than a packet holds are a mistake of the caller and are cut.
pub(super) fn write(out: &mut Vec<u8>, line: &str) {
    let bytes = &line.as_bytes()[..line.len().min(MAX_PACKET - HEADER)];
    out.extend_from_slice(format!("{:04x}", bytes.len() + HEADER).as_bytes());
    out.extend_from_slice(bytes);
}

pub(super) const FLUSH: &[u8] = b"0000";
pub(super) const DELIM: &[u8] = b"0001";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn packets_read() {
        fn check(input: &[u8], expect: &[Result<Pkt<'_>, PktError>]) {
            assert_eq!(read(input).collect::<Vec<_>>(), expect, "{:?}", String::from_utf8_lossy(input));
        }
        check(b"", &[]);
        check(b"0000", &[Ok(Pkt::Flush)]);
        check(b"000100020000", &[Ok(Pkt::Delim), Ok(Pkt::ResponseEnd), Ok(Pkt::Flush)]);
        check(b"0004", &[Ok(Pkt::Data(b""))]);
        check(b"0006a\n0000", &[Ok(Pkt::Data(b"a\n")), Ok(Pkt::Flush)]);
        check(b"000Ba", &[Err(PktError::Truncated)]);
        check(b"0003", &[Err(PktError::Length)]);
        check(b"+006ab", &[Err(PktError::Length)]);
        check(b" 006ab", &[Err(PktError::Length)]);
        check(b"fff1", &[Err(PktError::Length)]);
        check(b"ffff", &[Err(PktError::Length)]);
        check(b"00", &[Err(PktError::Truncated)]);
        check(b"<html>", &[Err(PktError::Length)]);
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
            prop_assert!(read(&bytes).count() <= bytes.len() / HEADER + 1);
        }

        #[test]
        fn what_is_written_reads_back(lines in proptest::collection::vec("[ -~]{0,300}", 0..20)) {
            let mut out = Vec::new();
            for line in &lines {
                write(&mut out, line);
            }
            let back: Vec<_> = read(&out).map(|p| match p {
                Ok(Pkt::Data(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
                other => format!("{other:?}"),
            }).collect();
            prop_assert_eq!(back, lines);
        }
    }
}
