//! The one error that crosses a port: what failed, why, what to do next, and how the engine must treat it.

use std::error::Error as StdError;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::mask::{Masker, mask_sentence_with};

/// How the engine treats a failure. Adapters classify once and exhaustively; they never retry on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// May pass by itself: tried again with backoff inside the phase's budget.
    Transient,
    /// Will not pass by itself: the phase fails now.
    Permanent,
    /// Somebody else was there first: observe again.
    Conflict,
    /// May or may not have happened: observe before anything else.
    Indeterminate,
}

/// A failure as the operator reads it. All three texts are masked and free of secrets by the adapter that made them.
#[derive(Debug)]
pub struct Fault {
    pub class: Class,
    /// What failed, as a sentence without a full stop: "the push of api was refused".
    pub what: String,
    /// What to do next; empty when nothing but waiting helps.
    pub advice: String,
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Fault {
    pub fn new(class: Class, what: impl Into<String>) -> Self {
        Self { class, what: what.into(), advice: String::new(), source: None }
    }

    pub fn transient(what: impl Into<String>) -> Self {
        Self::new(Class::Transient, what)
    }

    pub fn permanent(what: impl Into<String>) -> Self {
        Self::new(Class::Permanent, what)
    }

    pub fn conflict(what: impl Into<String>) -> Self {
        Self::new(Class::Conflict, what)
    }

    pub fn indeterminate(what: impl Into<String>) -> Self {
        Self::new(Class::Indeterminate, what)
    }

    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The cause chain on one line: `what: cause: cause`.
    pub fn chain(&self) -> String {
        let mut text = self.what.clone();
        let mut cause: Option<&dyn StdError> = self.source.as_deref().map(|e| e as &dyn StdError);
        while let Some(error) = cause {
            let layer = error.to_string();
            // Libraries differ on whether a Display repeats its source; say each thing once.
            if !text.ends_with(&layer) {
                text.push_str(": ");
                text.push_str(&layer);
            }
            cause = error.source();
        }
        text
    }

    /// What the record keeps of it, and everybody is told. Masked here once more, whatever the adapter did: a cause can be what
    /// a remote, a registry or a build said.
    pub fn told(&self) -> Told {
        self.told_with(&Masker::new(&[]))
    }

    /// The same without values that are known to be secret.
    pub fn told_with(&self, masker: &Masker) -> Told {
        let short = |text: &str| cut(mask_sentence_with(masker, text));
        Told { class: self.class, what: short(&self.chain()), advice: short(&self.advice) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for Fault {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn StdError + 'static))
    }
}

/// A failure in stored form: text only, masked, one line each.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Told {
    pub class: Class,
    pub what: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

impl Told {
    pub fn permanent(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { class: Class::Permanent, what: what.into(), advice: advice.into() }
    }

    /// What and advice in one sentence, for a log or a status line.
    pub fn sentence(&self) -> String {
        if self.advice.is_empty() { self.what.clone() } else { format!("{}; {}", self.what, self.advice) }
    }
}

/// Longest text that the record keeps of a failure; the full text is in the log.
const TOLD_MAX: usize = 1_000;

fn cut(text: String) -> String {
    if text.chars().count() <= TOLD_MAX { text } else { text.chars().take(TOLD_MAX - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lesson 15: a broker's connection string, password included, was about to reach the page inside an error.
    #[test]
    fn lesson_15_what_is_told_of_a_failure_holds_no_secret_and_no_control() {
        let broker = "cannot connect to amqps://app:hunter2@broker.test/vhost\u{1b}]0;owned\u{7}\u{202e}";
        let fault = Fault::transient("the health check failed")
            .because(Fault::permanent("the build said AccountKey=c2VjcmV0== and my-own-value").because(broker))
            .advice("set password=hunter3 again\u{200b}");
        let told = fault.told_with(&Masker::new(&["my-own-value".to_owned()]));
        let text = told.sentence();
        for secret in ["hunter", "c2VjcmV0", "my-own-value"] {
            assert!(!text.contains(secret), "{secret}: {text}");
        }
        assert!(!text.contains(|c: char| c.is_control() || crate::mask::is_obeyed(c)), "{text:?}");
        // What is no secret stays, also where nobody knows a value.
        assert!(text.contains("broker.test") && text.contains("the health check failed: the build said"), "{text}");
        assert!(!fault.told().sentence().contains("hunter"));
    }
}
