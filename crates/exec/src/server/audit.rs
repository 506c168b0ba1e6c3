//! The audit trail: one JSON line on standard error for each event, with the program's name and nothing else of a request.

use std::io::Write as _;

use serde_json::{Map, Value, json};

use super::child::Ended;

/// An event with its details.
pub fn event(name: &str, details: Value) {
    let mut line = Map::from_iter([("event".to_owned(), Value::from(name))]);
    if let Value::Object(details) = details {
        line.extend(details);
    }
    // Where nobody reads standard error any more there is nobody to tell, and no program has to fail for it.
    let _unread = writeln!(std::io::stderr().lock(), "{}", Value::Object(line));
}

/// A program that was started: its end is told in any case, also when the client's departure takes the request away.
#[derive(Debug)]
pub struct Started {
    program: String,
    number: u64,
    is_told: bool,
}

impl Started {
    /// `rule` is what would have refused it, were the policy enforced.
    #[must_use]
    pub fn tell(program: &str, number: u64, rule: Option<String>) -> Self {
        event("exec_start", json!({"number": number, "program": program, "policy_would_refuse": rule}));
        Self { program: program.to_owned(), number, is_told: false }
    }

    pub fn done(mut self, ended: &Ended) {
        self.is_told = true;
        let details = json!({
            "number": self.number,
            "program": self.program,
            "exit_code": ended.exit_code,
            "duration_ms": ended.duration_ms(),
            "timed_out": ended.timed_out,
            "client_aborted": ended.client_gone,
        });
        event("exec_done", details);
    }

    #[must_use]
    pub fn program(&self) -> &str {
        &self.program
    }

    pub fn failed(mut self, exit_code: i32) {
        self.is_told = true;
        let why = "the program did not start";
        let details = json!({"number": self.number, "program": self.program, "exit_code": exit_code, "error": why});
        event("exec_error", details);
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.is_told {
            let details = json!({"number": self.number, "program": self.program, "client_aborted": true});
            event("exec_done", details);
        }
    }
}
