//! What git may be asked to do: clone the one remote below the clone root, and look at what is there.

use std::path::Path;

use super::options::{Known, UNKNOWN, flag, maybe, read, value};
use super::{Allowed, Judged, Rules, below_root, bound, relative, rule, url};

const REF_MAX: usize = 256;

/// The settings that `-c` may give. None names a program, a file or a host.
const SETTINGS: [&str; 4] =
    ["advice.detachedHead=false", "http.followRedirects=false", "protocol.version=2", "credential.helper="];

pub(super) fn judge(rules: &Rules, words: &[&str], cwd: Option<&Path>) -> Judged<Allowed> {
    let mut rest = words;
    let mut chosen = None;
    let command = loop {
        match rest {
            // Once: a second one would be taken from the first.
            ["-C", path, more @ ..] if chosen.is_none() => {
                chosen = Some(Path::new(*path));
                rest = more;
            }
            ["-c", setting, more @ ..] => {
                if !SETTINGS.contains(setting) {
                    return rule("git may not be given this setting");
                }
                rest = more;
            }
            ["--no-pager", more @ ..] => rest = more,
            [word, ..] if word.starts_with('-') => return Err(UNKNOWN),
            [command, more @ ..] => {
                rest = more;
                break *command;
            }
            [] => return rule("git needs a subcommand"),
        }
    };
    let mut inside = Vec::new();
    for path in [cwd, chosen].into_iter().flatten() {
        inside.push(clone_directory(rules, path)?.to_owned());
    }
    let clones = inside.clone();
    let in_clone = !clones.is_empty();
    match command {
        "clone" => inside.push(clone(rules, rest)?.into()),
        "ls-remote" => ls_remote(rules, rest, in_clone)?,
        // All others work on a clone: without a directory git would look for one upwards from wherever it is.
        _ if !in_clone => return rule("the directory of the clone is missing"),
        "fetch" => fetch(rules, rest)?,
        "checkout" => checkout(rules, rest)?,
        "config" => config(rules, rest)?,
        "status" => status(rules, rest)?,
        "clean" => clean(rest)?,
        "rev-parse" => rev_parse(rules, rest)?,
        "verify-tag" => verify_tag(rules, rest)?,
        _ => return rule("git may not be asked for this subcommand"),
    }
    let talks = matches!(command, "clone" | "fetch" | "ls-remote");
    // The last one is the target of a clone, or where git goes on -C.
    let fills = inside.last().filter(|_| matches!(command, "clone" | "fetch" | "checkout")).cloned();
    Ok(Allowed { inside, clones, context: None, fills, talks })
}

fn clone<'a>(rules: &Rules, words: &[&'a str]) -> Judged<&'a Path> {
    const KNOWN: [Known; 8] = [
        value(&["--depth"], number),
        flag(&["--single-branch"]),
        value(&["--branch", "-b"], reference),
        flag(&["--no-checkout", "-n"]),
        flag(&["--no-tags"]),
        flag(&["--quiet", "-q"]),
        flag(&["--progress"]),
        flag(&["--no-recurse-submodules"]),
    ];
    let found = read(rules, &KNOWN, words)?;
    let [remote, target] = found.words[..] else {
        return rule("git clone needs the remote and a directory, and no more");
    };
    is_remote(rules, remote)?;
    clone_directory(rules, Path::new(target))
}

/// A directory that git works in: directly below the clone root and by no hidden name. Deeper down a release can have put a
/// whole repository with settings of its own, and a clone named `.git` would be one for its neighbours.
fn clone_directory<'a>(rules: &Rules, path: &'a Path) -> Judged<&'a Path> {
    let path = below_root(rules, path)?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let plain = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if plain && path.parent() == Some(&rules.clone_root) {
        Ok(path)
    } else {
        rule("the clone's directory must lie directly below the clone root, by a plain name")
    }
}

fn fetch(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 5] = [
        value(&["--depth"], number),
        flag(&["--quiet", "-q"]),
        flag(&["--no-tags"]),
        flag(&["--force", "-f"]),
        flag(&["--no-recurse-submodules"]),
    ];
    let found = read(rules, &KNOWN, words)?;
    let (remote, references) = found.words.split_first().unwrap_or((&"origin", &[]));
    origin_or_remote(rules, remote)?;
    references.iter().try_for_each(|text| {
        let text = text.strip_prefix('+').unwrap_or(text);
        match text.split_once(':') {
            Some((from, to)) => reference(rules, from).and_then(|()| reference(rules, to)),
            None => reference(rules, text),
        }
    })
}

fn checkout(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 3] = [flag(&["--detach"]), flag(&["--quiet", "-q"]), flag(&["--force", "-f"])];
    let found = read(rules, &KNOWN, words)?;
    match found.words[..] {
        [target] => reference(rules, target),
        _ => rule("git checkout needs one commit or reference, and no more"),
    }
}

/// The one setting that may be read and written is the remote's URL: every other one might name a program for later.
fn config(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 3] = [flag(&["--get"]), flag(&["--local"]), flag(&["--replace-all"])];
    const URL: &str = "remote.origin.url";
    let found = read(rules, &KNOWN, words)?;
    match found.words[..] {
        [URL] => Ok(()),
        [URL, to] if !found.has("--get") => {
            is_remote(rules, to)?;
            if url::has_user(to) { rule("a URL that is kept may not carry a credential") } else { Ok(()) }
        }
        _ => rule("git config is for remote.origin.url alone"),
    }
}

fn status(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 5] = [
        maybe(&["--porcelain"], word),
        flag(&["--short", "-s"]),
        flag(&["--branch"]),
        maybe(&["--untracked-files"], word),
        maybe(&["--ignored"], word),
    ];
    no_words(&read(rules, &KNOWN, words)?.words)
}

fn clean(words: &[&str]) -> Judged<()> {
    const LONG: [&str; 3] = ["--force", "--quiet", "--dry-run"];
    let short = |word: &str| {
        word.strip_prefix('-')
            .is_some_and(|letters| !letters.is_empty() && letters.chars().all(|c| "dfnqxX".contains(c)))
    };
    if words.iter().all(|word| LONG.contains(word) || short(word)) { Ok(()) } else { Err(UNKNOWN) }
}

fn rev_parse(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 5] = [
        flag(&["--verify"]),
        flag(&["--quiet", "-q"]),
        maybe(&["--short"], number),
        flag(&["--show-toplevel"]),
        flag(&["--is-inside-work-tree"]),
    ];
    // `^{commit}` and its like peel, and `HEAD:path` names what a commit has there, which is only ever an object's id; everything
    // else is a reference.
    let peeled = |text: &str| {
        if let Some((commit, path)) = text.split_once(':') {
            reference(rules, commit)?;
            relative(path)?;
            // Two dots would make it a range, and the other signs mean something to git that no path needs.
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._/-+ ".contains(&b);
            let is_plain = !path.contains("..") && path.bytes().all(plain);
            return if is_plain { Ok(()) } else { rule("the path must be relative and stay in the clone") };
        }
        let base = text.split_once("^{").map_or(text, |(base, kind)| match kind {
            "}" | "commit}" | "tree}" | "blob}" | "tag}" => base,
            _ => text,
        });
        reference(rules, base)
    };
    read(rules, &KNOWN, words)?.words.into_iter().try_for_each(peeled)
}

fn verify_tag(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 2] = [flag(&["--raw"]), flag(&["--verbose", "-v"])];
    match read(rules, &KNOWN, words)?.words[..] {
        [tag] => reference(rules, tag),
        _ => rule("git verify-tag needs one tag"),
    }
}

fn ls_remote(rules: &Rules, words: &[&str], in_clone: bool) -> Judged<()> {
    const KNOWN: [Known; 6] = [
        flag(&["--tags", "-t"]),
        flag(&["--heads", "-h"]),
        flag(&["--refs"]),
        flag(&["--quiet", "-q"]),
        flag(&["--exit-code"]),
        flag(&["--symref"]),
    ];
    let found = read(rules, &KNOWN, words)?;
    let Some((remote, patterns)) = found.words.split_first() else { return rule("git ls-remote needs the remote") };
    if in_clone {
        origin_or_remote(rules, remote)?;
    } else {
        is_remote(rules, remote)?;
    }
    patterns.iter().try_for_each(|pattern| reference(rules, &pattern.replace('*', "x")))
}

/// The clone's own remote is compared with the configured one where the clone is.
fn origin_or_remote(rules: &Rules, text: &str) -> Judged<()> {
    if text == "origin" { ours(rules).map(|_| ()) } else { is_remote(rules, text) }
}

fn ours(rules: &Rules) -> Judged<&str> {
    bound(rules.remote.as_ref(), "UPGRADE_GIT_REMOTE is not set, so no remote is allowed")
}

fn is_remote(rules: &Rules, text: &str) -> Judged<()> {
    let ours = ours(rules)?;
    if url::same(ours, text) { Ok(()) } else { rule("the remote is not the configured one") }
}

/// A commit, or a reference's name: what `git check-ref-format` takes, less what is rare.
fn reference(_: &Rules, text: &str) -> Judged<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._/-+".contains(&b);
    let fine = !text.is_empty()
        && text.len() <= REF_MAX
        && text.bytes().all(plain)
        && !text.starts_with(['-', '/', '.', '+'])
        && !text.contains("..")
        && !text.contains("//");
    if fine { Ok(()) } else { rule("this is not a commit or a plain reference") }
}

fn number(_: &Rules, text: &str) -> Judged<()> {
    let digits = !text.is_empty() && text.len() <= 6 && text.bytes().all(|b| b.is_ascii_digit());
    if digits { Ok(()) } else { rule("an option's value is not a small number") }
}

fn word(_: &Rules, text: &str) -> Judged<()> {
    let fine =
        !text.is_empty() && text.len() <= 16 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if fine { Ok(()) } else { rule("an option's value is not a plain word") }
}

fn no_words(words: &[&str]) -> Judged<()> {
    if words.is_empty() { Ok(()) } else { rule("paths are not allowed here") }
}
