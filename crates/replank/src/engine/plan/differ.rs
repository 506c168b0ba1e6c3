//! What is other in one run spec than in another: paths and short values, for people. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

/// Longest value that is shown, in characters.
const VALUE_MAX: usize = 120;
/// Deeper than any run spec of ours; what lies below is compared as a whole.
const DEPTH_MAX: usize = 16;
/// Below these a value may be a secret, whatever its operator meant it to be: it is compared and never shown.
const HIDDEN: [&str; 3] = ["env", "secrets", "secret_hashes"];
const NOT_SHOWN: &str = "(not shown)";

/// Every leaf by its path, with what may be shown of it.
pub fn leaves(value: &Value) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    walk(value, "", 0, &mut found);
    found
}

fn walk(value: &Value, at: &str, depth: usize, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) if depth < DEPTH_MAX => {
            for (name, field) in fields {
                let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                walk(field, &path, depth + 1, found);
            }
        }
        // Element by element, as there may be variables in them.
        Value::Array(list) if depth < DEPTH_MAX && list.iter().any(|one| one.is_object() || one.is_array()) => {
            for (index, one) in list.iter().enumerate() {
                walk(one, &format!("{at}.{index}"), depth + 1, found);
            }
        }
        Value::Null => {}
        other => _ = found.insert(at.to_owned(), other.clone()),
    }
}

/// The paths whose values differ, each with the old and the new one as they may be shown.
pub fn differences(old: &Value, new: &Value) -> BTreeMap<String, (String, String)> {
    let (old, new) = (leaves(old), leaves(new));
    let paths = old.keys().chain(new.keys()).filter(|path| old.get(*path) != new.get(*path));
    paths.map(|path| (path.clone(), (shown(path, old.get(path)), shown(path, new.get(path))))).collect()
}

fn shown(path: &str, value: Option<&Value>) -> String {
    let Some(value) = value else { return String::new() };
    let is_deep = |value: &Value| value.is_object() || value.is_array();
    let holds_more = value.is_object() || value.as_array().is_some_and(|list| list.iter().any(is_deep));
    if holds_more || path.split('.').any(|part| HIDDEN.contains(&part)) {
        return NOT_SHOWN.to_owned();
    }
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= VALUE_MAX { text } else { text.chars().take(VALUE_MAX - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_told_by_path_and_no_variable_s_value_is() {
        let old = json!({"a": {"b": 1, "same": [1, 2], "env": {"KEY": "hunter2", "GONE": "x"}}, "nil": null});
        let new = json!({"a": {"b": 2, "same": [1, 2], "env": {"KEY": "hunter3"}}, "list": ["x"], "secrets": {"S": 1}, "steps": [{"run": {"env": {"KEY": "hunter4"}}}]});
        let told = differences(&old, &new);
        let expect = [
            ("a.b", "1", "2"),
            ("a.env.GONE", NOT_SHOWN, ""),
            ("a.env.KEY", NOT_SHOWN, NOT_SHOWN),
            ("list", "", "[\"x\"]"),
            ("secrets.S", "", NOT_SHOWN),
            ("steps.0.run.env.KEY", "", NOT_SHOWN),
        ];
        let got: Vec<_> = told.iter().map(|(path, (from, to))| (path.as_str(), from.as_str(), to.as_str())).collect();
        assert_eq!(got, expect);
        assert!(differences(&json!({"x": "y".repeat(500)}), &json!({}))["x"].0.chars().count() == VALUE_MAX);
    }
}
