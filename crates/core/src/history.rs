//! The history: one JSON line per event, each naming the hash of the line before it (contract §3).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::phase::State;
use crate::record::Head;
use crate::words::{Digest, JobId, Millis};

/// An audit event before it is sealed into the chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Audit {
    pub at: Millis,
    pub job: Option<JobId>,
    pub event: String,
    pub detail: Map<String, Value>,
}

impl Audit {
    pub fn new(at: Millis, job: Option<&JobId>, event: &str) -> Self {
        Self { at, job: job.cloned(), event: event.to_owned(), detail: Map::new() }
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(name.to_owned(), value.into());
        self
    }
}

/// A stored line: its place in the chain, from 0, and its bytes without the line end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Line {
    pub seq: u64,
    pub bytes: Vec<u8>,
}

/// A stored line taken apart, for whoever reads the history to learn from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry(Map<String, Value>);

impl Entry {
    /// `None` where it is no JSON object: the verification of the history tells that, and nobody else has to.
    pub fn read(line: &Line) -> Option<Self> {
        serde_json::from_slice(&line.bytes).ok().map(Self)
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// A field's text; empty where there is none.
    pub fn text(&self, name: &str) -> &str {
        self.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    pub fn event(&self) -> &str {
        self.text("event")
    }

    /// Empty for what belongs to no job.
    pub fn job(&self) -> &str {
        self.text("job_id")
    }

    pub fn at(&self) -> Option<Millis> {
        Millis::parse(self.text("ts"))
    }

    /// The state that the line led to, where it changed that.
    pub fn state(&self) -> Option<State> {
        State::named(self.text("state"))
    }

    pub fn is(&self, flag: &str) -> bool {
        self.get(flag) == Some(&Value::Bool(true))
    }
}

/// Chains events to the end of the history. The new head goes into the record in the same commit.
pub fn seal(head: &Head, events: &[Audit]) -> (Vec<Line>, Head) {
    let mut head = head.clone();
    let mut lines = Vec::with_capacity(events.len());
    for event in events {
        let mut object = Map::new();
        object.insert("ts".to_owned(), event.at.rfc3339().into());
        object.insert("job_id".to_owned(), event.job.as_ref().map_or("", |j| j.as_str()).into());
        object.insert("event".to_owned(), event.event.clone().into());
        object.insert("prev_hash".to_owned(), head.hash.as_ref().map_or("", |h| h.as_str()).into());
        for (name, value) in &event.detail {
            // A detail can never pose as one of the chain's own fields.
            object.entry(name.clone()).or_insert_with(|| value.clone());
        }
        let bytes = Value::Object(object).to_string().into_bytes();
        head = Head { count: head.count + 1, hash: Some(Digest::of(&bytes)) };
        lines.push(Line { seq: head.count - 1, bytes });
    }
    (lines, head)
}

/// What is wrong with a chain, at its first wrong place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("line {seq} is not the JSON object it should be")]
    NotALine { seq: u64 },
    #[error("line {seq} does not follow from the line before it: one of the two was edited, or a line is missing")]
    Chain { seq: u64 },
    #[error("line {expected} is missing; the next one found is {found}")]
    Gap { expected: u64, found: u64 },
    #[error("the record anchors {anchored} lines and {found} were found: the end was cut or added to")]
    Count { anchored: u64, found: u64 },
    #[error("the last line is not the one that the record anchors")]
    Tail,
}

/// Follows a chain line by line, so that a long history needs no memory.
#[derive(Debug, Default)]
pub struct Verifier {
    seen: Head,
}

impl Verifier {
    pub fn line(&mut self, line: &Line) -> Result<(), Broken> {
        let seq = self.seen.count;
        let parsed: Map<String, Value> = serde_json::from_slice(&line.bytes).map_err(|_| Broken::NotALine { seq })?;
        self.parsed(line, &parsed)
    }

    /// The same for who needs the line's fields as well.
    pub(crate) fn parsed(&mut self, line: &Line, fields: &Map<String, Value>) -> Result<(), Broken> {
        let seq = self.seen.count;
        if line.seq != seq {
            return Err(Broken::Gap { expected: seq, found: line.seq });
        }
        let prev = fields.get("prev_hash").and_then(Value::as_str).ok_or(Broken::NotALine { seq })?;
        if prev != self.seen.hash.as_ref().map_or("", |h| h.as_str()) {
            return Err(Broken::Chain { seq });
        }
        self.seen = Head { count: seq + 1, hash: Some(Digest::of(&line.bytes)) };
        Ok(())
    }

    /// Compares the end with what the record anchors. Consistent with the anchor is all that this can say.
    pub fn finish(self, anchor: &Head) -> Result<u64, Broken> {
        if self.seen.count != anchor.count {
            return Err(Broken::Count { anchored: anchor.count, found: self.seen.count });
        }
        if self.seen.hash != anchor.hash {
            return Err(Broken::Tail);
        }
        Ok(self.seen.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(n: usize) -> (Vec<Line>, Head) {
        let events: Vec<Audit> =
            (0..n).map(|i| Audit::new(Millis(i as i64), None, "start").with("n", i as u64)).collect();
        seal(&Head::default(), &events)
    }

    fn verify(lines: &[Line], anchor: &Head) -> Result<u64, Broken> {
        let mut verifier = Verifier::default();
        lines.iter().try_for_each(|l| verifier.line(l))?;
        verifier.finish(anchor)
    }

    #[test]
    fn an_untouched_chain_agrees_with_its_anchor() {
        let (lines, head) = chain(5);
        assert_eq!(verify(&lines, &head), Ok(5));
        assert_eq!(verify(&[], &Head::default()), Ok(0));
    }

    #[test]
    fn sealing_in_two_steps_equals_sealing_at_once() {
        let (all, head) = chain(4);
        let events: Vec<Audit> = (0..4).map(|i| Audit::new(Millis(i), None, "start").with("n", i as u64)).collect();
        let (first, middle) = seal(&Head::default(), &events[..2]);
        let (second, end) = seal(&middle, &events[2..]);
        assert_eq!([first, second].concat(), all);
        assert_eq!(end, head);
    }

    #[test]
    fn every_edit_cut_and_swap_shows() {
        let (lines, head) = chain(5);
        for victim in 0..5 {
            let mut edited = lines.clone();
            let text = String::from_utf8(edited[victim].bytes.clone()).expect("utf-8");
            edited[victim].bytes = text.replace("\"start\"", "\"stars\"").into_bytes();
            assert!(verify(&edited, &head).is_err(), "edit of line {victim}");

            let mut missing = lines.clone();
            missing.remove(victim);
            assert!(verify(&missing, &head).is_err(), "loss of line {victim}");
        }
        assert!(matches!(verify(&lines[..4], &head), Err(Broken::Count { anchored: 5, found: 4 })));
        let mut swapped = lines.clone();
        swapped.swap(1, 2);
        assert!(verify(&swapped, &head).is_err());
    }

    #[test]
    fn a_detail_cannot_pose_as_a_chain_field() {
        let event = Audit::new(Millis(0), None, "start").with("prev_hash", "sha256:forged").with("event", "succeeded");
        let (lines, _) = seal(&Head::default(), &[event]);
        let value: Value = serde_json::from_slice(&lines[0].bytes).expect("json");
        assert_eq!(value["prev_hash"], "");
        assert_eq!(value["event"], "start");
    }
}
