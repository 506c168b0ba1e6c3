//! A keyring that gpg can read in place, from what `gpg --export` writes; and the settings under which gpg knows nothing else.
//!
//! gpg and not gpgv: gpgv looks neither at a key's end nor at its revocation, and git cannot drive it. Not a library: the
//! well-kept ones bring a hundred crates and more into a program that most operators run without a single OpenPGP key.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const END: &str = "-----END PGP PUBLIC KEY BLOCK-----";
/// Packet tags of RFC 9580, §5.
const PUBLIC_KEY: u8 = 6;
const SECRET_KEY: u8 = 5;

/// Binary packets, of one armored block or several, or of what is binary already.
pub(super) fn keyring(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    let binary = match bytes.first() {
        None => return Err("it is empty"),
        Some(first) if first & 0x80 != 0 => bytes.to_vec(),
        Some(_) => dearmored(std::str::from_utf8(bytes).map_err(|_| NO_KEYS)?)?,
    };
    match binary.first().map(|first| packet_tag(*first)) {
        Some(PUBLIC_KEY) => Ok(binary),
        Some(SECRET_KEY) => Err("it holds a private key: give what `gpg --export` writes"),
        _ => Err(NO_KEYS),
    }
}

const NO_KEYS: &str = "it holds no public keys as `gpg --export` writes them";

fn packet_tag(first: u8) -> u8 {
    // Bit 6 tells the newer form of a packet's head, where the tag has six bits, from the older one, where it has four.
    if first & 0x40 != 0 { first & 0x3f } else { (first >> 2) & 0x0f }
}

fn dearmored(text: &str) -> Result<Vec<u8>, &'static str> {
    let mut binary = Vec::new();
    let mut lines = text.lines().map(str::trim_end);
    while lines.any(|line| line == BEGIN) {
        // Headers such as a comment end at an empty line.
        if !lines.any(str::is_empty) {
            return Err("an armored block has no content");
        }
        let mut body = String::new();
        loop {
            match lines.next() {
                Some(END) => break,
                // The checksum; gpg looks at the packets themselves.
                Some(line) if line.starts_with('=') => {}
                Some(line) => body.push_str(line),
                None => return Err("an armored block does not end"),
            }
        }
        binary.extend(STANDARD.decode(&body).map_err(|_| "an armored block is not in base64")?);
    }
    Ok(binary)
}

/// gpg's settings: these keys alone, each of them trusted, and nothing fetched, started or written.
pub(super) fn settings(keyring: &Path) -> String {
    format!(
        "no-default-keyring\nkeyring {}\ntrust-model always\nno-auto-key-retrieve\nno-auto-check-trustdb\nno-autostart\nlock-never\n\
         weak-digest SHA1\n",
        keyring.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyrings_are_read_or_refused() {
        let armored = |body: &str| format!("{BEGIN}\nComment: x\n\n{body}\n=abcd\n{END}\n");
        for (input, expect) in [
            (b"".to_vec(), Err("it is empty")),
            (b"\x99\x01".to_vec(), Ok(b"\x99\x01".to_vec())),
            (b"\xc6\x01".to_vec(), Ok(b"\xc6\x01".to_vec())),
            (b"\x95\x01".to_vec(), Err("it holds a private key: give what `gpg --export` writes")),
            (b"\x88\x01".to_vec(), Err(NO_KEYS)),
            (b"hello".to_vec(), Err(NO_KEYS)),
            (
                format!("pub  key\n{}\n{}", armored("mQE="), armored("mQI=")).into_bytes(),
                Ok(b"\x99\x01\x99\x02".to_vec()),
            ),
            (armored("m\nQE=").replace('\n', "\r\n").into_bytes(), Ok(b"\x99\x01".to_vec())),
            (armored("?").into_bytes(), Err("an armored block is not in base64")),
            (format!("{BEGIN}\n\nmQE=\n").into_bytes(), Err("an armored block does not end")),
            (format!("{BEGIN}\nmQE=\n").into_bytes(), Err("an armored block has no content")),
        ] {
            assert_eq!(keyring(&input), expect, "{:?}", String::from_utf8_lossy(&input));
        }
    }
}
