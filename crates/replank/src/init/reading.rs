//! What is read of a compose file is mapped, ignored with a note, or refused at its place: the means for all three.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::repo::Repo;
use super::vars::{self, Vars};
use super::yaml::{Node, Value};

/// Most refusals that are told: more of them help nobody.
const REFUSALS_MAX: usize = 50;

/// One thing that cannot be reproduced, where it stands, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub file: String,
    /// Counted from 1; 0 where there is no line.
    pub line: u64,
    /// `services.web.network_mode`; empty for the file as a whole.
    pub key: String,
    pub what: String,
    pub advice: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        f.write_str(": ")?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}; {}", self.what, self.advice)
    }
}

#[derive(Debug, Default)]
struct Found {
    refused: Vec<Refusal>,
    /// By service; under the empty name what concerns the file as a whole.
    notes: BTreeMap<String, Vec<String>>,
}

/// The compose file that is being read, and what came of it so far.
#[derive(Debug)]
pub struct Reading<'a> {
    pub repo: &'a Repo,
    /// The file's path in the tree.
    pub file: String,
    /// Its directory in the tree: every relative path begins there.
    pub base: String,
    pub vars: Vars,
    /// What compose calls the project; part of the names of its volumes and networks.
    pub project: String,
    found: RefCell<Found>,
}

impl<'a> Reading<'a> {
    pub fn new(repo: &'a Repo, file: &str, vars: Vars) -> Self {
        let base = file.rsplit_once('/').map_or(".", |(base, _)| base).to_owned();
        Self { repo, file: file.to_owned(), base, vars, project: String::new(), found: RefCell::default() }
    }

    pub fn refuse(&self, line: u64, key: impl Into<String>, what: impl Into<String>, advice: impl Into<String>) {
        let refused = &mut self.found.borrow_mut().refused;
        if refused.len() < REFUSALS_MAX {
            let (file, key, what, advice) = (self.file.clone(), key.into(), what.into(), advice.into());
            refused.push(Refusal { file, line, key, what, advice });
        }
    }

    /// For the comment above a service's table; `""` for the file as a whole.
    pub fn note(&self, service: &str, text: impl Into<String>) {
        self.found.borrow_mut().notes.entry(service.to_owned()).or_default().push(text.into());
    }

    pub fn refused(&self) -> Vec<Refusal> {
        let mut all = self.found.borrow().refused.clone();
        all.sort_by_key(|r| r.line);
        all.dedup();
        all
    }

    pub fn notes(&self, service: &str) -> Vec<String> {
        self.found.borrow().notes.get(service).cloned().unwrap_or_default()
    }

    /// A text with its variables replaced. What has no value is refused by name.
    pub fn replaced(&self, text: &str, line: u64, key: &str) -> Option<String> {
        match vars::interpolate(text, &self.vars) {
            Ok(text) => Some(text),
            Err(missing) => {
                let advice = "set it in .env beside the compose file, or write ${NAME:-DEFAULT}; $$ is a plain $";
                self.refuse(line, key, missing.to_string(), advice);
                None
            }
        }
    }

    /// One word, number or truth as a text.
    pub fn text(&self, node: &Node, key: &str) -> Option<String> {
        match &node.value {
            Value::Text(text) => self.replaced(text, node.line, key),
            Value::Whole(number) => Some(number.to_string()),
            Value::Truth(truth) => Some(truth.to_string()),
            // Other sizes are written in other ways by compose, and which digits stood in the file is not known any more.
            Value::Real(number) if *number == 0.0 || (1e-4..1e15).contains(&number.abs()) => Some(number.to_string()),
            Value::Real(_) | Value::Null | Value::List(_) | Value::Map(_) => {
                self.refuse(
                    node.line,
                    key,
                    "this is not a text",
                    "write one text, in quotes where it looks like a number",
                );
                None
            }
        }
    }

    /// A list of texts, or one.
    pub fn texts(&self, node: &Node, key: &str) -> Vec<String> {
        match &node.value {
            Value::List(items) => items.iter().filter_map(|item| self.text(item, key)).collect(),
            Value::Null => Vec::new(),
            Value::Text(_) | Value::Whole(_) | Value::Truth(_) | Value::Real(_) | Value::Map(_) => {
                self.text(node, key).into_iter().collect()
            }
        }
    }

    /// A truth, also one that a variable gives.
    pub fn truth(&self, node: &Node, key: &str) -> bool {
        match &node.value {
            Value::Truth(truth) => *truth,
            Value::Null => false,
            Value::Text(_) | Value::Whole(_) | Value::Real(_) | Value::List(_) | Value::Map(_) => {
                match self.text(node, key).as_deref() {
                    Some("true") => true,
                    Some("false") | None => false,
                    Some(other) => {
                        self.refuse(node.line, key, format!("{other:?} is not true or false"), "write true or false");
                        false
                    }
                }
            }
        }
    }

    pub fn number(&self, node: &Node, key: &str) -> Option<u64> {
        let text = self.text(node, key)?;
        let number = text.parse().ok();
        if number.is_none() {
            self.refuse(node.line, key, format!("{text:?} is not a whole number"), "write a whole number");
        }
        number
    }

    /// `NAME: value` or `- NAME=value`. `None` beside a name: it has no value of its own.
    pub fn pairs(&self, node: &Node, key: &str) -> Vec<(String, Option<String>, u64)> {
        match &node.value {
            Value::Map(entries) => entries
                .iter()
                .filter_map(|(name, value)| {
                    let at = format!("{key}.{name}");
                    let text = if value.value == Value::Null { None } else { Some(self.text(value, &at)?) };
                    Some((name.clone(), text, value.line))
                })
                .collect(),
            Value::List(items) => items
                .iter()
                .filter_map(|item| {
                    let text = self.text(item, key)?;
                    Some(match text.split_once('=') {
                        Some((name, value)) => (name.to_owned(), Some(value.to_owned()), item.line),
                        None => (text, None, item.line),
                    })
                })
                .collect(),
            Value::Null => Vec::new(),
            Value::Text(_) | Value::Whole(_) | Value::Truth(_) | Value::Real(_) => {
                self.refuse(
                    node.line,
                    key,
                    "this is no list of names and values",
                    "write NAME: VALUE on lines of their own",
                );
                Vec::new()
            }
        }
    }

    /// The entries of what must be a table.
    pub fn table<'n>(&self, node: &'n Node, key: &str) -> &'n [(String, Node)] {
        if !matches!(node.value, Value::Map(_) | Value::Null) {
            self.refuse(node.line, key, "this is not a table", "write KEY: VALUE on lines of their own");
        }
        node.entries()
    }

    /// A key that compose does not have, or that is newer than this program.
    pub fn unknown(&self, line: u64, key: String) {
        self.refuse(
            line,
            key,
            "this key is not known",
            "take it out, or rename it to x-… where compose shall not read it either",
        );
    }
}

/// True for `x-…`: by compose's own rule it means nothing.
pub fn is_extension(key: &str) -> bool {
    key.starts_with("x-")
}
