//! A file of allowed SSH signers, less the keys whose time is not now.
//!
//! git holds a key's time against the date that stands in the tag, and that date is the signer's own word: whoever has a key
//! that has expired would only have to date back. So the lines are judged by the clock here, and git sees those that are left.

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};

/// A key that would count at another time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    pub principals: String,
    /// `SHA256:…`, as `ssh-keygen -l` shows it.
    pub fingerprint: String,
    /// `expired on 20240131`, or `is not valid before …`.
    pub why: String,
}

#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) text: String,
    pub(super) unfit: Vec<Unfit>,
}

/// The lines whose keys count now. A line that cannot be understood spoils the whole file: it might be the one that says when
/// a key ends.
pub(super) fn fit_at(text: &str, now: SystemTime) -> Result<Kept, String> {
    let now = jiff::Timestamp::try_from(now).map_err(|_| "the clock is out of range".to_owned())?;
    let now = now.strftime("%Y%m%d%H%M%S").to_string();
    let mut kept = Kept::default();
    for (number, line) in text.lines().enumerate() {
        let entry = read(line).map_err(|why| format!("line {}: {why}", number + 1))?;
        let Some(entry) = entry else { continue };
        match entry.unfit_at(&now) {
            Some(why) => kept.unfit.push(Unfit { principals: entry.principals, fingerprint: entry.fingerprint, why }),
            None => {
                kept.text.push_str(line);
                kept.text.push('\n');
            }
        }
    }
    Ok(kept)
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    principals: String,
    fingerprint: String,
    /// Fourteen digits, in UTC.
    after: Option<String>,
    before: Option<String>,
}

impl Entry {
    fn unfit_at(&self, now: &str) -> Option<String> {
        match (&self.after, &self.before) {
            (_, Some(before)) if now > before.as_str() => Some(format!("expired at {before} UTC")),
            (Some(after), _) if now < after.as_str() => Some(format!("is not valid before {after} UTC")),
            _ => None,
        }
    }
}

const NO_ENTRY: &str = "this is not `principals [options] type key`";

/// One line: `principals [options] type key [comment]`.
fn read(line: &str) -> Result<Option<Entry>, &'static str> {
    let line = line.trim_matches([' ', '\t', '\r']);
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (principals, rest) = word(line)?;
    let (mut after, mut before) = (None, None);
    if rest.is_empty() {
        return Err(NO_ENTRY);
    }
    let rest = if is_key_type(rest) {
        rest
    } else {
        let (options, rest) = word(rest)?;
        for option in split(options) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name.to_ascii_lowercase().as_str() {
                "valid-after" => after = Some(time(value)?),
                "valid-before" => before = Some(time(value)?),
                "namespaces" => {}
                "cert-authority" => {
                    return Err("certificates are not taken: their time would be the tag's own; name each key");
                }
                _ => return Err("an option is not known"),
            }
        }
        rest
    };
    if !is_key_type(rest) {
        return Err(NO_ENTRY);
    }
    let (_, rest) = word(rest)?;
    let (key, _) = word(rest)?;
    let key = STANDARD.decode(key).map_err(|_| "the key is not in base64")?;
    if key.is_empty() {
        return Err("the key is missing");
    }
    let fingerprint = format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(&key)));
    Ok(Some(Entry { principals: principals.trim_matches('"').to_owned(), fingerprint, after, before }))
}

fn is_key_type(rest: &str) -> bool {
    ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|start| rest.starts_with(start))
}

/// The first word, quoted parts whole, and what stands after the blanks behind it.
fn word(text: &str) -> Result<(&str, &str), &'static str> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' | '\t' if !quoted => return Ok((&text[..at], text[at..].trim_start_matches([' ', '\t']))),
            _ => {}
        }
    }
    if quoted { Err("a quotation mark is not closed") } else { Ok((text, "")) }
}

/// At the commas outside of quotes.
fn split(options: &str) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let is_end = |c: char| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' => return !quoted,
            _ => {}
        }
        false
    };
    options.split(is_end).collect()
}

/// `"YYYYMMDD"`, or with hours, minutes and seconds, made fourteen digits.
fn time(value: &str) -> Result<String, &'static str> {
    const RULE: &str = "a time is not \"YYYYMMDD\", \"YYYYMMDDHHMM\" or \"YYYYMMDDHHMMSS\"";
    let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).ok_or(RULE)?;
    let upper = value.to_ascii_uppercase();
    let digits = upper.strip_suffix("UTC").or_else(|| upper.strip_suffix('Z')).unwrap_or(&upper);
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(RULE);
    }
    Ok(format!("{digits:0<14}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    /// 2023-11-14 22:13:20 UTC.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    #[test]
    fn lines_count_at_their_time_alone() {
        #[track_caller]
        fn check(options: &str, expect: Option<&str>) {
            let line = format!("alice@example.com,bob {options} {KEY} a comment");
            let kept = fit_at(&line, now()).expect("a file");
            let why = kept.unfit.first().map(|unfit| unfit.why.as_str());
            assert_eq!(why, expect, "{line}");
            assert_eq!(kept.text.is_empty(), expect.is_some(), "{line}");
            assert!(kept.unfit.iter().all(|unfit| unfit.principals == "alice@example.com,bob"));
        }
        check("", None);
        check("namespaces=\"git,file\"", None);
        check("valid-before=\"20991231\"", None);
        check("valid-before=\"20231114\"", Some("expired at 20231114000000 UTC"));
        check("valid-before=\"20231114221320Z\"", None);
        check("valid-before=\"202311142213\"", Some("expired at 20231114221300 UTC"));
        check("VALID-BEFORE=\"20200101utc\"", Some("expired at 20200101000000 UTC"));
        check("namespaces=\"git, x\",valid-before=\"20200101\"", Some("expired at 20200101000000 UTC"));
        check("valid-after=\"20231115\"", Some("is not valid before 20231115000000 UTC"));
        check("valid-after=\"20200101\",valid-before=\"20240101\"", None);
    }

    #[test]
    fn what_is_not_understood_spoils_the_file() {
        for (line, expect) in [
            ("alice", "this is not"),
            ("alice cert-authority ssh-ed25519 AAAA", "certificates are not taken"),
            ("alice valid-before=20200101 ssh-ed25519 AAAA", "a time is not"),
            ("alice valid-before=\"2020\" ssh-ed25519 AAAA", "a time is not"),
            ("alice valid-until=\"20200101\" ssh-ed25519 AAAA", "an option is not known"),
            ("alice valid-before=\"20200101 ssh-ed25519 AAAA", "is not closed"),
            ("alice ssh-ed25519 ***", "not in base64"),
            ("alice ssh-ed25519", "is missing"),
        ] {
            let text = format!("# a comment\n\n{KEY_LINE}\n{line}\n", KEY_LINE = format_args!("bob {KEY}"));
            let why = fit_at(&text, now()).expect_err(line);
            assert!(why.starts_with("line 4: ") && why.contains(expect), "{line}: {why}");
        }
        assert!(fit_at("", now()).is_ok_and(|kept| kept.text.is_empty()));
    }

    #[test]
    fn fingerprints_are_ssh_s_own() {
        let kept = fit_at(&format!("\"a b\" valid-before=\"20200101\" {KEY}"), now()).expect("a file");
        // `ssh-keygen -l` on the key above.
        assert_eq!(kept.unfit[0].fingerprint, "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU");
        assert_eq!(kept.unfit[0].principals, "a b");
    }
}
