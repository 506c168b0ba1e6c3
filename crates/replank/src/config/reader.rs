//! Reads TOML into serde types and collects every problem with its place, instead of stopping at the first.
//!
//! The text becomes a tree of nodes with spans. A pass of serde over the tree records what it cannot take, spoils that
//! node and starts over without it, until a pass ends well. Each pass spoils at least one node, so the loop is bounded.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;

use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};
use toml::de::{DeTable, DeValue};

/// Longest configuration that is read: beyond it somebody named the wrong file.
pub const TEXT_MAX: usize = 1024 * 1024;
/// Most problems told at once: more of them help nobody.
pub const PROBLEMS_MAX: usize = 50;
/// Deepest nesting: no setting is deeper than six, and a hostile manifest must not use up the stack.
const DEPTH_MAX: usize = 12;

/// One thing that is wrong, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: String,
    /// Counted from 1; 0 where the problem has no place in the file.
    pub line: usize,
    pub column: usize,
    /// `containers.api.probe`; empty for the file as a whole.
    pub key: String,
    pub what: String,
    pub advice: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        f.write_str(": ")?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)?;
        if !self.advice.is_empty() {
            write!(f, "; {}", self.advice)?;
        }
        Ok(())
    }
}

/// A parsed text, and what was found wrong with it so far.
#[derive(Debug)]
pub struct Document {
    file: String,
    text: String,
    root: Node,
    found: RefCell<Vec<Problem>>,
    /// Said about an unknown key, after the suggestion.
    unknown_advice: &'static str,
}

#[derive(Debug)]
struct Node {
    span: Range<usize>,
    spoiled: Cell<bool>,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Text(String),
    Whole(i64),
    Real(f64),
    Truth(bool),
    Date,
    List(Vec<Node>),
    Table(Vec<(String, Range<usize>, Node)>),
}

impl Document {
    /// Parses; what is not TOML at all is told with its places.
    pub fn parse(file: &str, text: &str, unknown_advice: &'static str) -> Result<Self, Vec<Problem>> {
        let place = |span: Option<Range<usize>>, what: String, advice: &str| {
            let (line, column) = span.map_or((0, 0), |s| place_of(text, s.start));
            let (what, advice) = (plain(&what), advice.to_owned());
            Problem { file: file.to_owned(), line, column, key: String::new(), what, advice }
        };
        if text.len() > TEXT_MAX {
            let what = format!("the file has {} bytes and {TEXT_MAX} are the most", text.len());
            return Err(vec![place(None, what, "name the right file")]);
        }
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            let told = errors.iter().take(PROBLEMS_MAX).map(|e| {
                place(e.span(), format!("this is not valid TOML: {}", e.message().trim().replace('\n', ", ")), "")
            });
            return Err(told.collect());
        }
        let span = table.span();
        let root = Node::table(table.into_inner(), span, 0).map_err(|span| {
            vec![place(Some(span), "this is nested too deeply".to_owned(), "no setting is that deep")]
        })?;
        Ok(Self { file: file.to_owned(), text: text.to_owned(), root, found: RefCell::new(Vec::new()), unknown_advice })
    }

    /// What could be read; `None` where the whole is unusable. Everything else that is wrong is in [`Self::problems`].
    pub fn read<T: DeserializeOwned>(&self) -> Option<T> {
        for _ in 0..=self.root.count() {
            match T::deserialize(De { doc: self, node: &self.root, path: String::new() }) {
                Ok(value) => return Some(value),
                Err(failure) => {
                    self.settle(&self.root, "", failure);
                    if self.root.spoiled.get() {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// The names in a table, those included that could not be read.
    pub fn keys(&self, path: &[&str]) -> Vec<&str> {
        match self.find(path).map(|(_, node)| &node.value) {
            Some(Value::Table(entries)) => entries.iter().map(|(name, _, _)| name.as_str()).collect(),
            _ => Vec::new(),
        }
    }

    /// Adds a problem at a key, or at the deepest of its tables that exists.
    pub fn problem(&self, path: &[&str], what: impl Into<String>, advice: impl Into<String>) {
        // The file as a whole has no place that would help.
        let at = (1..=path.len()).rev().find_map(|n| self.find(&path[..n])?.0).map(|span| span.start);
        self.push(at, path.join("."), what.into(), advice.into());
    }

    /// True where the key stands in the file, readable or not.
    pub fn has(&self, path: &[&str]) -> bool {
        self.find(path).is_some()
    }

    /// Everything found, in the order of the file.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all = self.found.borrow().clone();
        all.sort_by_key(|p| (p.line, p.column));
        all.dedup();
        all.truncate(PROBLEMS_MAX);
        all
    }

    fn push(&self, at: Option<usize>, key: String, what: String, advice: String) {
        let (line, column) = at.map_or((0, 0), |at| place_of(&self.text, at));
        let (key, what, advice) = (plain(&key), plain(&what), plain(&advice));
        self.found.borrow_mut().push(Problem { file: self.file.clone(), line, column, key, what, advice });
    }

    fn find(&self, path: &[&str]) -> Option<(Option<Range<usize>>, &Node)> {
        let mut at = (None, &self.root);
        for part in path {
            let Value::Table(entries) = &at.1.value else {
                return None;
            };
            let (_, span, node) = entries.iter().find(|(name, _, _)| name == part)?;
            at = (Some(span.clone()), node);
        }
        Some(at)
    }

    /// Records a failure at the innermost node that has it, once.
    fn settle(&self, node: &Node, path: &str, failure: Failure) -> Failure {
        match failure {
            Failure::Reported => return Failure::Reported,
            Failure::Missing(name) => {
                // A key that is there and wrong, or that was probably meant, is told already.
                let meant = |key: &str| nearest(key, std::iter::once(name)).is_some();
                let told = matches!(&node.value, Value::Table(entries)
                    if entries.iter().any(|(key, _, child)| child.spoiled.get() && meant(key)));
                if !told {
                    let advice = format!("add `{name} = …`");
                    self.push(Some(node.span.start), path.to_owned(), format!("`{name}` is missing"), advice);
                }
            }
            Failure::Fresh(what) => self.push(Some(node.span.start), path.to_owned(), what, String::new()),
        }
        node.spoiled.set(true);
        Failure::Reported
    }
}

/// Names and values are whoever's wrote the file, a release's author too: what a terminal would obey is made visible.
fn plain(text: &str) -> String {
    let is_plain = |c: char| c == ' ' || c.is_ascii_graphic();
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            out.push(c);
        } else {
            out.extend(c.escape_debug());
        }
    }
    out
}

/// Line and column, counted from 1; columns in characters.
fn place_of(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
    (line, column)
}

impl Node {
    fn table(table: DeTable<'_>, span: Range<usize>, depth: usize) -> Result<Self, Range<usize>> {
        if depth > DEPTH_MAX {
            return Err(span);
        }
        let mut entries = Vec::with_capacity(table.len());
        for (key, value) in table {
            let at = key.span();
            let node = Self::value(value.span(), value.into_inner(), depth + 1)?;
            // A table's own span begins at its header; the key is where a person looks.
            entries.push((key.into_inner().into_owned(), at, node));
        }
        Ok(Self { span, spoiled: Cell::new(false), value: Value::Table(entries) })
    }

    fn value(span: Range<usize>, value: DeValue<'_>, depth: usize) -> Result<Self, Range<usize>> {
        let value = match value {
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Boolean(truth) => Value::Truth(truth),
            DeValue::Datetime(_) => Value::Date,
            DeValue::Integer(number) => {
                match i64::from_str_radix(number.as_str(), number.radix()) {
                    Ok(number) => Value::Whole(number),
                    // Too large for any setting: kept as a text, so that the type error names it.
                    Err(_) => Value::Text(number.as_str().to_owned()),
                }
            }
            DeValue::Float(number) => Value::Real(number.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Array(list) => {
                if depth > DEPTH_MAX {
                    return Err(span);
                }
                let nodes = list.into_iter().map(|v| Self::value(v.span(), v.into_inner(), depth + 1));
                Value::List(nodes.collect::<Result<_, _>>()?)
            }
            DeValue::Table(table) => return Self::table(table, span, depth),
        };
        Ok(Self { span, spoiled: Cell::new(false), value })
    }

    fn count(&self) -> usize {
        1 + match &self.value {
            Value::List(nodes) => nodes.iter().map(Node::count).sum(),
            Value::Table(entries) => entries.iter().map(|(_, _, node)| node.count()).sum(),
            _ => 0,
        }
    }
}

#[derive(Debug)]
enum Failure {
    /// Already among the problems.
    Reported,
    Missing(&'static str),
    Fresh(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reported => f.write_str("already told"),
            Self::Missing(name) => write!(f, "`{name}` is missing"),
            Self::Fresh(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Failure {}

impl de::Error for Failure {
    fn custom<T: fmt::Display>(what: T) -> Self {
        Self::Fresh(what.to_string())
    }
    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::Fresh(format!("expected {expected}, found {found}"))
    }
    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::Fresh(format!("expected {expected}, found {found}"))
    }
    fn missing_field(name: &'static str) -> Self {
        Self::Missing(name)
    }
    fn unknown_variant(found: &str, expected: &'static [&'static str]) -> Self {
        Self::Fresh(format!("{found:?} is not one of {}", listed(expected)))
    }
}

/// `a`, `b` or `c`.
fn listed(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
    match quoted.split_last() {
        None => "nothing".to_owned(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}

/// The known name that was probably meant.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|k| (strsim::damerau_levenshtein(&name.to_lowercase(), k), k))
        // A third of the letters wrong is a typing error; more is another word.
        .filter(|(distance, k)| *distance <= 1 + k.len().max(name.len()) / 4)
        .min()
        .map(|(_, k)| k)
}

struct De<'a> {
    doc: &'a Document,
    node: &'a Node,
    path: String,
}

impl<'de> de::Deserializer<'de> for De<'_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_str(text),
            Value::Whole(number) => visitor.visit_i64(*number),
            Value::Real(number) => visitor.visit_f64(*number),
            Value::Truth(truth) => visitor.visit_bool(*truth),
            Value::Date => Err(de::Error::invalid_type(de::Unexpected::Other("a date"), &visitor)),
            Value::List(nodes) => visitor.visit_seq(Items { de: &self, nodes: nodes.iter(), index: 0 }),
            Value::Table(entries) => visitor.visit_map(Entries { de: &self, entries: entries.iter(), next: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        let Value::Table(entries) = &self.node.value else {
            let found = match &self.node.value {
                Value::Text(text) => de::Unexpected::Str(text),
                Value::Whole(number) => de::Unexpected::Signed(*number),
                Value::Real(number) => de::Unexpected::Float(*number),
                Value::Truth(truth) => de::Unexpected::Bool(*truth),
                Value::Date => de::Unexpected::Other("a date"),
                Value::List(_) => de::Unexpected::Seq,
                Value::Table(_) => de::Unexpected::Map,
            };
            return Err(Failure::Fresh(format!("expected a table, found {found}")));
        };
        for (name, span, node) in entries {
            if node.spoiled.get() || fields.contains(&name.as_str()) {
                continue;
            }
            node.spoiled.set(true);
            let advice = match nearest(name, fields.iter().copied()) {
                Some(known) => format!("did you mean `{known}`?"),
                None if self.doc.unknown_advice.is_empty() => {
                    format!("known here: {}", fields.join(", "))
                }
                None => self.doc.unknown_advice.to_owned(),
            };
            self.doc.push(Some(span.start), self.child(name), "this key is not known".to_owned(), advice);
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            Value::Table(entries) if entries.len() == 1 => {
                let (name, _, node) = &entries[0];
                visitor.visit_enum(Chosen { name, de: De { doc: self.doc, node, path: self.child(name) } })
            }
            Value::Table(_) => Err(Failure::Fresh(format!("expected exactly one of {}", listed(variants)))),
            _ => Err(Failure::Fresh(format!("expected {}", listed(variants)))),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

impl De<'_> {
    fn child(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

struct Items<'a> {
    de: &'a De<'a>,
    nodes: std::slice::Iter<'a, Node>,
    index: usize,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = Failure;
    fn next_element_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Failure> {
        let Some(node) = self.nodes.by_ref().find(|n| !n.spoiled.get()) else {
            return Ok(None);
        };
        let path = format!("{}[{}]", self.de.path, self.index);
        self.index += 1;
        let doc = self.de.doc;
        seed.deserialize(De { doc, node, path: path.clone() }).map(Some).map_err(|f| doc.settle(node, &path, f))
    }
}

struct Entries<'a> {
    de: &'a De<'a>,
    entries: std::slice::Iter<'a, (String, Range<usize>, Node)>,
    next: Option<&'a (String, Range<usize>, Node)>,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = Failure;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Failure> {
        self.next = self.entries.by_ref().find(|(_, _, node)| !node.spoiled.get());
        let Some((name, span, node)) = self.next else {
            return Ok(None);
        };
        let key: de::value::StrDeserializer<'_, Failure> = name.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|failure| {
            node.spoiled.set(true);
            if !matches!(failure, Failure::Reported) {
                self.de.doc.push(Some(span.start), self.de.child(name), failure.to_string(), String::new());
            }
            Failure::Reported
        })
    }

    fn next_value_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Failure> {
        let Some((name, _, node)) = self.next.take() else {
            return Err(Failure::Fresh("a value without a key".to_owned()));
        };
        let (doc, path) = (self.de.doc, self.de.child(name));
        seed.deserialize(De { doc, node, path: path.clone() }).map_err(|f| doc.settle(node, &path, f))
    }
}

struct Chosen<'a> {
    name: &'a str,
    de: De<'a>,
}

impl<'a, 'de> de::EnumAccess<'de> for Chosen<'a> {
    type Error = Failure;
    type Variant = De<'a>;
    fn variant_seed<T: de::DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, De<'a>), Failure> {
        let key: de::value::StrDeserializer<'_, Failure> = self.name.into_deserializer();
        Ok((seed.deserialize(key)?, self.de))
    }
}

impl<'de> de::VariantAccess<'de> for De<'_> {
    type Error = Failure;
    fn unit_variant(self) -> Result<(), Failure> {
        Err(Failure::Fresh("expected a plain text".to_owned()))
    }
    fn newtype_variant_seed<T: de::DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Failure> {
        seed.deserialize(self)
    }
    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Failure> {
        de::Deserializer::deserialize_any(self, visitor)
    }
    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Failure> {
        de::Deserializer::deserialize_struct(self, "", fields, visitor)
    }
}
