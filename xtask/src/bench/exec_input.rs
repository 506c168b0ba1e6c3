//! What the programs of `exec-stream` print. The same in every run, so that figures can be compared.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Result;

pub(super) const LINES: usize = 1_000_000;
pub(super) const LINES_FEW: usize = 100_000;
pub(super) const LONG_LINE_BYTES: usize = 100_000_000;
pub(super) const BINARY_BYTES: usize = 64 << 20;

/// So many lines as builds print them, 60 to 100 bytes each: some with colours, quotes, tabs or letters beyond ASCII.
pub(super) fn lines(path: &Path, count: usize) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    for n in 0..count {
        let (unit, seconds) = (n % 1_000, n as f64 / 10_000.0);
        match n % 8 {
            0 => writeln!(out, "#14 {seconds:.3} [{unit}/1000] cc -O2 -g -Wall -Isrc/include -c src/unit_{unit}.c")?,
            1 => writeln!(out, "#14 {seconds:.3} src/unit_{unit}.c:{unit}:17: warning: unused variable \"count\"")?,
            2 => writeln!(out, "{n:07} fetched library-{unit} 1.{unit}.0 (sha256 {n:032x})")?,
            3 => {
                writeln!(out, "\u{1b}[32m   Compiling\u{1b}[0m component-{unit} v0.{unit}.1 (/src/components/{unit})")?
            }
            4 => writeln!(out, "Step {unit}/1000 : RUN make -j4 unit-{unit} && install -m 0755 unit-{unit} /usr/bin")?,
            5 => writeln!(out, "\tinstalled /usr/share/locale/{unit}/messages for Français, Español and 日本語 ({n})")?,
            6 => writeln!(out, "2026-01-01T00:00:{seconds:09.6}Z level=info unit={unit} msg=layer pushed size={n}")?,
            _ => writeln!(out, "test suite::module_{unit}::case_{n}_keeps_what_it_was_given_before ... ok")?,
        }
    }
    Ok(out.flush()?)
}

pub(super) fn long_line(path: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let piece = [b'x'; 100_000];
    for _ in 0..LONG_LINE_BYTES / piece.len() {
        out.write_all(&piece)?;
    }
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Bytes without any pattern, and so a line end in every 256 of them; answers how many lines that makes.
pub(super) fn binary(path: &Path) -> Result<usize> {
    let mut out = BufWriter::new(File::create(path)?);
    let (mut state, mut ends) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    for _ in 0..BINARY_BYTES / 8 - 1 {
        // Xorshift, as Marsaglia published it: no pattern is all that is asked of it.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bytes = state.to_le_bytes();
        ends += bytes.iter().filter(|byte| **byte == b'\n').count();
        out.write_all(&bytes)?;
    }
    out.write_all(b"the end\n")?;
    out.flush()?;
    Ok(ends + 1)
}
