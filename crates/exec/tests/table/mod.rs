//! The policy's table and what must hold of every request that it allows; shared with the fuzzer, which reads such lines too.

use std::path::{Component, Path};

use replank_exec::policy::{Allowed, CLONE_ROOT, Rules};
use replank_exec::protocol::Request;

const REMOTE: &str = "https://git.example.com/acme/app.git";
const REGISTRY: &str = "platformacr";
const APP: &str = "platform-app";
const GROUP: &str = "platform-rg";

pub fn rules() -> Rules {
    Rules {
        remote: Some(REMOTE.to_owned()),
        registry: Some(REGISTRY.to_owned()),
        container_app: Some(APP.to_owned()),
        resource_group: Some(GROUP.to_owned()),
        ..Rules::default()
    }
}

/// Every line with what is expected of it: `allowed`, or the rule that refuses it.
pub fn lines() -> Vec<(&'static str, &'static str)> {
    let mut expect = "";
    let mut all = Vec::new();
    for line in include_str!("../policy.txt").lines() {
        if let Some(rule) = line.strip_prefix("== ") {
            expect = rule;
        } else if !line.is_empty() && !line.starts_with('#') {
            all.push((expect, line));
        }
    }
    all
}

/// The request that a line means; `None` when it has no cwd.
pub fn request(line: &str) -> Option<Request> {
    let (cwd, argv) = line.split_once(" | ")?;
    let whole = |word: &str| {
        word.replace("ROOT", CLONE_ROOT)
            .replace("REMOTE", REMOTE)
            .replace("SHA", &"a1".repeat(20))
            .replace("DIGEST", &"c3".repeat(32))
            .replace("<_>", " ")
            .replace("<nl>", "\n")
            .replace("<cr>", "\r")
            .replace("<tab>", "\t")
            .replace("<esc>", "\u{1b}")
            .replace("<long>", &"x".repeat(5_000))
            .replace("<>", "")
    };
    let cwd = (cwd != "-").then(|| whole(cwd));
    Some(Request { argv: argv.split(' ').map(whole).collect(), cwd, ..Request::default() })
}

/// What is wrong with an allowed request of git or az: a word that names a program, a file or a place outside, said without
/// the policy's own means. The other programs are ways out by their nature.
pub fn way_out(request: &Request, allowed: &Allowed) -> Option<String> {
    let program = request.argv.first().map(String::as_str).unwrap_or_default();
    if !["git", "az"].contains(&program) {
        return None;
    }
    if let Some(path) = allowed.inside.iter().find(|path| !is_below_root(path)) {
        return Some(format!("{path:?} is not below the clone root"));
    }
    if let Some(cwd) = request.cwd.as_deref().filter(|cwd| !allowed.inside.iter().any(|path| path == Path::new(cwd))) {
        return Some(format!("links in {cwd:?} are not followed"));
    }
    let is_build = request.argv.iter().skip(1).take(2).eq(["acr", "build"]);
    let mut before = program;
    for word in &request.argv[1..] {
        let (option, value) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ if word.starts_with('-') => (word.as_str(), None),
            _ => (before, Some(word.as_str())),
        };
        let bad_names = ["pack", "exec", "config", "template", "filter", "-dir", "tree", "ssh", "@", "yaml"];
        // A question, and no choice of a tree.
        let is_asking = word == "--is-inside-work-tree";
        let is_bad = word == "--" || bad_names.iter().any(|bad| option.contains(bad));
        let is_bad_option = word.starts_with('-') && is_bad && !is_asking;
        let is_bad_value = value.is_some_and(|value| match program {
            "git" => is_bad_for_git(option, value),
            _ => is_bad_for_az(is_build, option, value),
        });
        if is_bad_option || is_bad_value {
            return Some(format!("{word:?} after {before:?}"));
        }
        before = word;
    }
    None
}

/// `option` is what stands before the value, which need not be an option that takes one.
fn is_bad_for_git(option: &str, value: &str) -> bool {
    const BAD_SETTINGS: [&str; 8] = ["core.", "alias.", "gpg.", "filter.", "include", "url.", "helper=!", "hooks"];
    let lower = value.to_lowercase();
    if option == "-c" && BAD_SETTINGS.iter().any(|bad| lower.contains(bad)) {
        return true;
    }
    if ["://", "::", "@"].iter().any(|sign| value.contains(sign)) {
        let place = lower.strip_prefix("https://").and_then(|rest| rest.split_once('/'));
        let is_here = |(authority, _): (&str, &str)| authority.rsplit('@').next() == Some("git.example.com");
        // Hosts are the same in capitals, paths are not.
        return !(place.is_some_and(is_here) && value.ends_with("/acme/app.git"));
    }
    // A name may have dots; what is no path is a reference, and two dots make it a range.
    let is_out = if value.starts_with('/') { !is_below_root(Path::new(value)) } else { value.contains("..") };
    is_out || value.chars().any(char::is_control)
}

fn is_bad_for_az(is_build: bool, option: &str, value: &str) -> bool {
    let wrong_name = match option {
        "--registry" | "-r" => !value.eq_ignore_ascii_case(REGISTRY),
        "--name" | "-n" => !value.eq_ignore_ascii_case(APP),
        "--resource-group" | "-g" => !value.eq_ignore_ascii_case(GROUP),
        _ => false,
    };
    // Arguments of a build are for the Dockerfile, which runs elsewhere.
    let wrong_place = is_build
        && option != "--build-arg"
        && (value.starts_with('/') || value.contains("://") || value.split('/').any(|part| part == ".."));
    wrong_name || wrong_place || value.starts_with('@') || value.contains("=@") || value.chars().any(char::is_control)
}

fn is_below_root(path: &Path) -> bool {
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    is_plain && path.starts_with(CLONE_ROOT) && path != Path::new(CLONE_ROOT)
}
