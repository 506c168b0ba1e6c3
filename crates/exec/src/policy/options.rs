//! Reading options as the programs do, but strictly: exact names, each known, each value checked.

use super::{Denied, Judged, Rules, rule};

/// What an option takes.
pub(super) enum Takes {
    Nothing,
    /// A value in the next word, or after `=`.
    Value(fn(&Rules, &str) -> Judged<()>),
    /// Nothing, or a value after `=`.
    Maybe(fn(&Rules, &str) -> Judged<()>),
}

pub(super) struct Known {
    pub(super) names: &'static [&'static str],
    pub(super) takes: Takes,
}

pub(super) const fn flag(names: &'static [&'static str]) -> Known {
    Known { names, takes: Takes::Nothing }
}

pub(super) const fn value(names: &'static [&'static str], check: fn(&Rules, &str) -> Judged<()>) -> Known {
    Known { names, takes: Takes::Value(check) }
}

pub(super) const fn maybe(names: &'static [&'static str], check: fn(&Rules, &str) -> Judged<()>) -> Known {
    Known { names, takes: Takes::Maybe(check) }
}

/// What was found: options by their first name with their values, and the other words in order.
#[derive(Debug, Default)]
pub(super) struct Found<'a> {
    pub(super) options: Vec<(&'static str, Option<&'a str>)>,
    pub(super) words: Vec<&'a str>,
}

impl Found<'_> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.options.iter().any(|(known, _)| *known == name)
    }
}

/// Reads all words. An abbreviation, a cluster of short options and `--` are refused, since none is needed and each is a way
/// to say an option that this table would not see.
pub(super) fn read<'a>(rules: &Rules, known: &[Known], words: &[&'a str]) -> Judged<Found<'a>> {
    let mut found = Found::default();
    let mut rest = words.iter().copied();
    while let Some(word) = rest.next() {
        if !word.starts_with('-') {
            found.words.push(word);
            continue;
        }
        let (name, joined) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (word, None),
        };
        let Some(option) = known.iter().find(|option| option.names.contains(&name)) else {
            return Err(UNKNOWN);
        };
        let given = match (&option.takes, joined) {
            (Takes::Nothing, None) | (Takes::Maybe(_), None) => None,
            (Takes::Nothing, Some(_)) => return rule("an option that takes no value has one"),
            (Takes::Maybe(check), Some(value)) => {
                check(rules, value)?;
                Some(value)
            }
            (Takes::Value(check), joined) => {
                let Some(value) = joined.or_else(|| rest.next()) else { return rule("an option lacks its value") };
                // The programs differ in what they make of such a value; nobody needs one.
                if value.starts_with('-') {
                    return rule("an option's value begins with '-'");
                }
                check(rules, value)?;
                Some(value)
            }
        };
        found.options.push((option.names[0], given));
    }
    Ok(found)
}

pub(super) const UNKNOWN: Denied = Denied::Rule("an option is not allowed");
