//! A compose file's text as a tree of nodes with their lines, within limits: it is somebody else's input.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// Most nodes of a compose file, aliases counted as often as they are used: real ones have a few hundred.
const NODES_MAX: usize = 50_000;
/// Deepest nesting: compose's own schema needs eight.
const DEPTH_MAX: usize = 32;
/// Most uses of anchors, and most events that they may stand for: what an alias bomb runs into.
const ALIASES_MAX: usize = 1_000;
const REPLAYED_MAX: usize = 50_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where it is used, counted from 1; 0 where the parser has no place for it.
    pub line: u64,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    Truth(bool),
    Whole(i64),
    Real(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

/// Why a text is not read: the line, counted from 1 (0 for the whole), and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    pub line: u64,
    pub what: String,
}

/// Reads one document. A key that stands twice is an error: compose refuses it too, and which one was meant nobody knows.
pub fn parse(text: &str) -> Result<Node, Unreadable> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_documents: 1,
        },
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        merge_keys: serde_saphyr::MergeKeyPolicy::Merge,
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: REPLAYED_MAX,
            max_replay_stack_depth: DEPTH_MAX,
            max_alias_expansions_per_anchor: ALIASES_MAX,
        },
        // As compose's own parser: `yes` and `0755` are texts, not a truth and not a number.
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        // `!reset`, `!override` and whatever else a tag may ask for is not understood here.
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let root: Spanned<Value> = serde_saphyr::from_str_with_options(text, options).map_err(|error| Unreadable {
        line: error.location().map_or(0, |at| at.line()),
        // For people: the other words speak of the library's own settings.
        what: error
            .render_with_formatter(&serde_saphyr::UserMessageFormatter)
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
    })?;
    Ok(node(root))
}

fn node(spanned: Spanned<Value>) -> Node {
    Node { line: spanned.referenced.line(), value: spanned.value }
}

impl Node {
    /// The entries of a table; none for anything else.
    pub fn entries(&self) -> &[(String, Node)] {
        match &self.value {
            Value::Map(entries) => entries,
            Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::List(_) => &[],
        }
    }

    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|(name, _)| name == key).map(|(_, node)| node)
    }

    /// True for what says the same as leaving the key out.
    pub fn is_nothing(&self) -> bool {
        match &self.value {
            Value::Null | Value::Truth(false) => true,
            Value::Text(text) => text.is_empty(),
            Value::List(items) => items.is_empty(),
            Value::Map(entries) => entries.is_empty(),
            Value::Truth(true) | Value::Whole(_) | Value::Real(_) => false,
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        Value::deserialize(from)
    }
    fn visit_bool<E>(self, truth: bool) -> Result<Value, E> {
        Ok(Value::Truth(truth))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Whole(number))
    }
    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        i64::try_from(number).map(Value::Whole).map_err(|_| E::custom(format!("{number} is too large a number")))
    }
    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Real(number))
    }
    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }
    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Value>>()? {
            items.push(node(item));
        }
        Ok(Value::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            entries.push((key, node(map.next_value::<Spanned<Value>>()?)));
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_that_compose_reads() {
        let root = parse("a: yes\nb: 0755\nc: 22:22\nd: 1.10\ne: ~\nf: &x {g: 1}\nh: {<<: *x, i: 2}\n").expect("YAML");
        let at = |key: &str| root.get(key).expect("there");
        assert_eq!(at("a").value, Value::Text("yes".into()));
        assert_eq!(at("b").value, Value::Text("0755".into()));
        assert_eq!(at("c").value, Value::Text("22:22".into()));
        assert_eq!(at("d").value, Value::Real(1.1));
        assert_eq!(at("e").value, Value::Null);
        assert_eq!(at("h").get("g").map(|n| &n.value), Some(&Value::Whole(1)));
        assert_eq!(at("h").get("i").map(|n| &n.value), Some(&Value::Whole(2)));
        assert_eq!(at("b").line, 2);
    }

    #[test]
    fn hostile_texts_end_at_a_limit() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let ten = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb.push_str(&format!("a{n}: &a{n} [{ten}]\n"));
        }
        assert!(parse(&bomb).is_err());
        assert!(parse(&"[".repeat(10_000)).is_err());
        assert!(parse(&format!("a: {}1{}", "[".repeat(40), "]".repeat(40))).is_err());
        assert_eq!(parse("a: 1\nb: 2\na: 3\n").map_err(|e| e.line), Err(3));
        assert!(parse("a: !reset null\n").is_err());
        assert!(parse("a: 1\n---\nb: 2\n").is_err(), "two documents");
    }
}
