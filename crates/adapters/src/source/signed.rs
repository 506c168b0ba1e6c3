//! What a signed tag must say of itself, and who signed it: judged from the tag object and the words of `git verify-tag --raw`.
//!
//! `verify-tag` alone is not enough. It accepts an object under any name, so that somebody who can push but not sign could push
//! an old release's object as a new one; and it does not look at what the tag leads to.

use replank_core::fault::Fault;
use replank_core::record::Target;
use replank_core::words::CommitSha;
use replank_exec::signers::{Unfit, Unusable};

use super::git::tame;

/// Longest tag object that is read: its message holds a release's notes.
pub(super) const TAG_MAX: usize = 1024 * 1024;
/// Longest words of git and its helpers about one signature.
pub(super) const WORDS_MAX: usize = 64 * 1024;

const PUBLISH: &str = "publish a new version with a tag that one of the configured keys signed (git tag -s)";

/// Why commits of a branch are no targets where signatures are asked for.
pub(super) const NO_COMMITS: &str = "only signed tags are accepted (source.verify), and a commit of a branch carries none; \
     start a release, or set source.verify to \"none\"";

/// Why a tag without an object of its own is refused.
pub(super) fn lightweight(tag: &str) -> String {
    format!("the tag {tag} is lightweight, so it carries no signature, and only signed tags are accepted; {PUBLISH}")
}

pub(super) fn unusable(why: Unusable) -> Fault {
    Fault::permanent("signatures of tags cannot be checked").advice(why.advice()).because(why)
}

/// What git says about a tag object.
pub(super) struct Said<'a> {
    /// The object, at least up to where its signature begins.
    pub(super) object: &'a [u8],
    /// git's exit code was 0.
    pub(super) is_good: bool,
    /// Its error output.
    pub(super) words: &'a str,
}

/// The signer, as the operator's keys name him; or why the tag is refused. Never a matter of time: faults are permanent.
pub(super) fn judge(target: &Target, said: &Said<'_>, unfit: &[Unfit]) -> Result<String, Fault> {
    let tag = target.version.tag();
    let refused = |why: String| {
        Fault::permanent(format!("the tag {tag} is refused: {why}")).advice(format!("{PUBLISH}; nothing was built"))
    };
    if said.object.is_empty() && !said.is_good {
        // Through the exec channel a git that died while it checked has not shown the object either.
        return Err(refused(reason(said.words, unfit)).because(format!("git says: {}", tame(said.words.as_bytes()))));
    }
    let header = Header::read(said.object).ok_or_else(|| refused("its object is not as git writes one".to_owned()))?;
    header.check(&tag, &target.commit).map_err(refused)?;
    let signer = signer(said.words).filter(|_| said.is_good);
    signer.ok_or_else(|| {
        let words = tame(said.words.as_bytes());
        refused(reason(said.words, unfit)).because(format!("git says: {words}"))
    })
}

/// The head of a tag object: these four lines in this order, and nothing else.
#[derive(Debug, PartialEq, Eq)]
struct Header<'a> {
    object: &'a str,
    kind: &'a str,
    tag: &'a str,
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut lines = bytes.split(|b| *b == b'\n');
        let mut field =
            |name: &str| lines.next()?.strip_prefix(name.as_bytes()).and_then(|value| std::str::from_utf8(value).ok());
        let header = Self { object: field("object ")?, kind: field("type ")?, tag: field("tag ")? };
        field("tagger ")?;
        lines.next()?.is_empty().then_some(header)
    }

    fn check(&self, tag: &str, commit: &CommitSha) -> Result<(), String> {
        let shown = |text: &str| tame(text.as_bytes());
        if self.tag != tag {
            return Err(format!(
                "its object says that it is {}: another tag's object was put under this name",
                shown(self.tag)
            ));
        }
        match self.kind {
            "commit" if self.object == commit.as_str() => Ok(()),
            "commit" => Err(format!("what is signed is commit {}, and {commit} was chosen", shown(self.object))),
            "tag" => Err("it is a tag of another tag, and only a tag of a commit is accepted".to_owned()),
            other => Err(format!("what is signed is no commit but a {}", shown(other))),
        }
    }
}

const SSH_GOOD: &str = "Good \"git\" signature for ";
const SSH_UNKNOWN: &str = "Good \"git\" signature with ";
const STATUS: &str = "[GNUPG:] ";

/// The words behind one of gpg's status words.
fn status<'a>(words: &'a str, name: &str) -> Option<&'a str> {
    words.lines().filter_map(|line| line.strip_prefix(STATUS)).find_map(|line| {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        (first == name).then_some(rest)
    })
}

fn signer(words: &str) -> Option<String> {
    if let Some(rest) = words.lines().find_map(|line| line.strip_prefix(SSH_GOOD)) {
        let (name, key) = rest.rsplit_once(" with ")?;
        return Some(tame(format!("{name} ({key})").as_bytes()));
    }
    let (_, name) = status(words, "GOODSIG")?.split_once(' ')?;
    // The last word is the primary key's fingerprint, which is what people know a key by.
    let key = status(words, "VALIDSIG")?.split(' ').next_back()?;
    Some(tame(format!("{name} (OpenPGP key {key})").as_bytes()))
}

/// The nearest that can be told from git's words. It decides nothing.
fn reason(words: &str, unfit: &[Unfit]) -> String {
    if words.contains("no signature found") {
        return "it is not signed".to_owned();
    }
    let of_key = |rest: &str| tame(rest.as_bytes());
    for (name, what) in [
        ("REVKEYSIG", "it is signed with a key that was revoked"),
        ("EXPKEYSIG", "it is signed with a key that has expired"),
        ("EXPSIG", "its signature has expired"),
        ("BADSIG", "its signature does not fit its content"),
    ] {
        if let Some(rest) = status(words, name) {
            return format!("{what} ({})", of_key(rest));
        }
    }
    if let Some(rest) = status(words, "ERRSIG") {
        return format!("it is signed with a key that is not in the keyring ({})", of_key(rest));
    }
    let Some(key) = words.lines().find_map(|line| line.strip_prefix(SSH_UNKNOWN)) else {
        return "its signature cannot be verified with the configured keys".to_owned();
    };
    match unfit.iter().find(|unfit| key.ends_with(&unfit.fingerprint)) {
        Some(unfit) => {
            format!("it is signed with a key of {} that {} ({})", unfit.principals, unfit.why, of_key(key))
        }
        None => format!("it is signed with a key that is not among the allowed signers now ({})", of_key(key)),
    }
}

#[cfg(test)]
mod tests {
    use replank_core::record::TargetKind;

    use super::*;

    const COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const GOOD: &str = "Good \"git\" signature for alice@example.com with ED25519 key SHA256:abc\n";

    fn target() -> Target {
        Target {
            kind: TargetKind::Release,
            version: "1.2.3".parse().expect("a version"),
            commit: CommitSha::new(COMMIT).expect("a commit"),
            raw_ref: "refs/tags/v1.2.3".to_owned(),
        }
    }

    #[track_caller]
    fn check(object: &str, is_good: bool, words: &str, expect: Result<&str, &str>) {
        let unfit = [Unfit {
            principals: "bob".to_owned(),
            fingerprint: "SHA256:old".to_owned(),
            why: "expired at 2020 UTC".to_owned(),
        }];
        let judged = judge(&target(), &Said { object: object.as_bytes(), is_good, words }, &unfit);
        match (judged, expect) {
            (Ok(signer), Ok(expect)) => assert_eq!(signer, expect),
            (Err(fault), Err(expect)) => {
                assert!(fault.chain().contains(expect), "{expect:?} is not in {:?}", fault.chain());
                assert!(!fault.advice.is_empty());
            }
            (got, expect) => panic!("{got:?} instead of {expect:?}"),
        }
    }

    fn object(object: &str, kind: &str, tag: &str) -> String {
        format!("object {object}\ntype {kind}\ntag {tag}\ntagger a <a@b> 1 +0000\n\nnotes\n")
    }

    #[test]
    fn the_object_must_be_of_this_tag_and_this_commit() {
        let fine = object(COMMIT, "commit", "v1.2.3");
        check(&fine, true, GOOD, Ok("alice@example.com (ED25519 key SHA256:abc)"));
        check(&object(COMMIT, "commit", "v1.0.0"), true, GOOD, Err("its object says that it is v1.0.0"));
        check(&object(COMMIT, "commit", "v1.2.3 "), true, GOOD, Err("another tag's object"));
        check(&object(COMMIT, "tag", "v1.2.3"), true, GOOD, Err("a tag of another tag"));
        check(&object(COMMIT, "tree", "v1.2.3"), true, GOOD, Err("no commit but a tree"));
        check(&object(&"b".repeat(40), "commit", "v1.2.3"), true, GOOD, Err("what is signed is commit bbbb"));
        let odd = "its object is not as git writes one";
        for bad in [
            "",
            "tag v1.2.3\n",
            &fine.replace("\n\n", "\nextra x\n\n"),
            &fine.replace("type commit\n", "type commit\ntype tag\n"),
            &fine.replace("tagger", "author"),
            &format!("\n{fine}"),
            &format!("-----BEGIN SSH SIGNATURE-----\n{fine}"),
        ] {
            check(bad, true, GOOD, Err(odd));
        }
    }

    #[test]
    fn a_signer_is_named_or_nobody_signed() {
        check("", false, "", Err("its signature cannot be verified"));
        let fine = object(COMMIT, "commit", "v1.2.3");
        let gpg = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 1234 Alice <a@b>\n[GNUPG:] VALIDSIG AAAA 2024-01-01 1 0 4 0 22 8 00 BBBB\n";
        check(&fine, true, gpg, Ok("Alice <a@b> (OpenPGP key BBBB)"));
        for (is_good, words, why) in [
            (false, GOOD, "cannot be verified"),
            (true, "", "cannot be verified"),
            (false, "error: no signature found\n", "it is not signed"),
            (
                true,
                "Good \"git\" signature with ED25519 key SHA256:new\n",
                "not among the allowed signers now (ED25519 key SHA256:new)",
            ),
            (
                false,
                "Good \"git\" signature with ED25519 key SHA256:old\nNo principal matched.\n",
                "a key of bob that expired at 2020 UTC",
            ),
            (false, "[GNUPG:] EXPKEYSIG 1234 Alice\n", "a key that has expired (1234 Alice)"),
            (false, "[GNUPG:] REVKEYSIG 1234 Alice\n", "was revoked"),
            (false, "[GNUPG:] EXPSIG 1234 Alice\n", "its signature has expired"),
            (false, "[GNUPG:] BADSIG 1234 Alice\n", "does not fit"),
            (false, "[GNUPG:] ERRSIG 1234 1 8 00 1 9 -\n[GNUPG:] NO_PUBKEY 1234\n", "not in the keyring"),
            // Half of gpg's word is none.
            (true, "[GNUPG:] GOODSIG 1234 Alice\n", "cannot be verified"),
        ] {
            check(&fine, is_good, words, Err(why));
        }
    }
}
