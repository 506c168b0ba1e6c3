//! The tests that `docs/security-tests.md` names: each is where the document says, so that a rule does not lose its attack unseen.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DOCUMENT: &str = "docs/security-tests.md";
/// Below this the document's form has changed, and nothing would be checked any more.
const NAMED_MIN: usize = 100;
/// What makes a function a test: an attribute on a line of its own, with others between it and the function.
const TEST: [&str; 2] = ["#[test]", "#[tokio::test"];

/// What the document names and what is not there.
pub(crate) fn problems(root: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(root.join(DOCUMENT)).context(DOCUMENT)?;
    let mut files = BTreeMap::new();
    for (file, _) in named(&text) {
        // What cannot be read is a file without tests, and told as such below.
        files.insert(file, fs::read_to_string(root.join("crates").join(file)).unwrap_or_default());
    }
    let mut problems = missing(&text, |file| files.get(file).map_or("", String::as_str));
    let count = named(&text).count();
    if count < NAMED_MIN {
        problems.push(format!("{DOCUMENT}: only {count} tests are named in the form `CRATE/FILE.rs::TEST`"));
    }
    Ok(problems)
}

/// File below `crates/` and function of each test that is named: `adapters/tests/x.rs::y` between backticks.
fn named(text: &str) -> impl Iterator<Item = (&str, &str)> {
    // Every other piece stands between backticks.
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    quoted.filter_map(|word| word.split_once("::")).filter(|(file, _)| file.ends_with(".rs"))
}

fn missing<'a>(text: &str, content: impl Fn(&str) -> &'a str) -> Vec<String> {
    let gone = named(text).filter(|(file, name)| !has(content(file), name));
    let mut problems: Vec<String> = gone
        .map(|(file, name)| {
            format!("{DOCUMENT}: there is no test {name} in crates/{file}; name the one that attacks the rule")
        })
        .collect();
    // A line of a table with nothing behind it is a rule that nobody attacks.
    let rules = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| Rule ") && !line.starts_with("| What "));
    let bare = rules.filter(|line| named(line).next().is_none());
    problems.extend(bare.map(|line| format!("{DOCUMENT}: no test attacks this: {line}")));
    problems
}

/// Whether a source has this function, as a test or among a `proptest!`.
fn has(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    lines.iter().enumerate().any(|(at, line)| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        let is_it =
            line.strip_prefix("fn ").and_then(|rest| rest.strip_prefix(name)).is_some_and(|rest| rest.starts_with('('));
        let mut above = lines[..at].iter().rev().take_while(|above| above.starts_with("#[") || above.starts_with("//"));
        is_it && above.any(|above| TEST.iter().any(|test| above.starts_with(test)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_are_gone_are_told() {
        const FILE: &str = "#[test]\nfn one() {}\n\n#[tokio::test(flavor = \"multi_thread\")]\n// why\nasync fn two() {}\n\nfn three() {}\n";
        let check = |text: &str, expect: usize| {
            let found = missing(text, |file| if file == "a/b.rs" { FILE } else { "" });
            assert_eq!(found.len(), expect, "{text}: {found:?}");
        };
        check("| a rule | it | `a/b.rs::one`, `a/b.rs::two` |", 0);
        check("| a rule | `http/guard.rs` | `a/b.rs::one` |", 0);
        check("| a rule | it | `a/b.rs::on` |", 1);
        check("| a rule | it | `a/c.rs::one` |", 1);
        // A function is no test, and a rule without one is told.
        check("| a rule | it | `a/b.rs::three` |", 1);
        check("| a rule | `http/guard.rs` | |", 1);
        check("| Rule | What keeps it | Attacked by |\n|---|---|---|\n", 0);
    }
}
