//! `environment` and `env_file` of a service: what may be shown goes into the configuration, what looks like a secret into a
//! file of its own.

use std::collections::BTreeMap;

use replank_adapters::platform::docker::config::{ContainerConfig, SecretSource};

use super::reading::{Reading, is_extension};
use super::vars;
use super::yaml::{Node, Value};

/// Directory of the secrets below the home.
pub const SECRETS_DIR: &str = "secrets";

/// Variables whose values nobody should read over a shoulder, by the words in their names.
const SECRET_WORDS: [&str; 8] =
    ["PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "CREDENTIAL", "APIKEY", "PRIVATE"];

pub type Variables = BTreeMap<String, String>;

/// The later wins: files in their order, then what stands in the compose file.
pub fn read(reading: &Reading<'_>, node: &Node, key: &str, into: &mut Variables) {
    for (name, value, line) in reading.pairs(node, key) {
        if !is_name(&name) {
            let what = format!("{name:?} is not the name of a variable");
            reading.refuse(line, key, what, "use letters, digits and '_'");
            continue;
        }
        match value.or_else(|| reading.vars.get(&name).cloned()) {
            Some(value) => {
                into.insert(name, value);
            }
            None if into.contains_key(&name) => {}
            None => {
                let what = format!("{name} has no value, and compose would take it from whoever runs it");
                reading.refuse(line, key, what, "give it a value, here or in .env beside the compose file");
            }
        }
    }
}

pub fn files(reading: &Reading<'_>, service: &str, node: &Node, key: &str, into: &mut Variables) {
    let mut one = |path: String, required: bool, line: u64| {
        let inside = match reading.repo.inside(&reading.base, &path) {
            Ok(inside) => inside,
            Err(why) => {
                let advice = "give a file of the repository, or write its variables into `environment`";
                return reading.refuse(line, key, format!("{path:?} {why}"), advice);
            }
        };
        let text = match reading.repo.read(&inside) {
            Ok(Some(text)) => text,
            Ok(None) if !required => return,
            Ok(None) => {
                let advice = "make it, or write `required: false` beside its `path`";
                return reading.refuse(line, key, format!("{path:?} does not exist"), advice);
            }
            Err(why) => return reading.refuse(line, key, format!("{path:?} {why}"), "give a file of variables"),
        };
        match vars::parse_env(&text) {
            Ok(found) => {
                for (at, what) in found.without {
                    reading.note(service, format!("{path}, line {at}: {what}, so it is left out"));
                }
                into.extend(found.vars);
            }
            Err((at, what)) => reading.refuse(line, key, format!("{path:?}, line {at}: {what}"), "mend the file"),
        }
    };
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        Value::Null | Value::Truth(_) | Value::Whole(_) | Value::Real(_) | Value::Text(_) | Value::Map(_) => {
            std::slice::from_ref(node)
        }
    };
    for item in items.iter().filter(|item| item.value != Value::Null) {
        let (mut path, mut required) = (None, true);
        if let Value::Map(entries) = &item.value {
            for (name, value) in entries {
                let at = format!("{key}.{name}");
                match name.as_str() {
                    "path" => path = reading.text(value, &at),
                    "required" => required = reading.truth(value, &at),
                    other if is_extension(other) => {}
                    "format" => {
                        reading.refuse(
                            value.line,
                            at,
                            "files of this format are not read",
                            "use the usual one, without `format`",
                        );
                    }
                    _ => reading.unknown(value.line, at),
                }
            }
        } else {
            path = reading.text(item, key);
        }
        if let Some(path) = path {
            one(path, required, item.line);
        }
    }
}

/// Puts the variables where they belong. `files` is what all services have so far.
pub fn place(variables: Variables, service: &str, run: &mut ContainerConfig, files: &mut BTreeMap<String, String>) {
    for (name, value) in variables {
        if !is_secret(&name, &value) {
            run.env.insert(name, value);
            continue;
        }
        // One file for all who have the same value under the same name; another value gets a file of the service's own.
        let shared = format!("{SECRETS_DIR}/{name}");
        let path = match files.get(&shared) {
            Some(other) if *other != value => format!("{SECRETS_DIR}/{service}.{name}"),
            Some(_) | None => shared,
        };
        files.insert(path.clone(), value);
        run.secrets.insert(name, SecretSource::File(path.into()));
    }
}

pub fn is_secret(name: &str, value: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    let points_at_one = upper.ends_with("_FILE") || upper.ends_with("_PATH") || upper.ends_with("_DIR");
    let has_word = SECRET_WORDS.iter().any(|word| upper.contains(word)) || upper.ends_with("_KEY") || upper == "KEY";
    let has_password = value.split_once("://").is_some_and(|(_, rest)| {
        let authority = rest.split('/').next().unwrap_or_default();
        authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
    });
    !value.is_empty() && ((has_word && !points_at_one) || has_password)
}

fn is_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    first && name.len() <= 128 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_told_from_settings() {
        for (name, value, expect) in [
            ("POSTGRES_PASSWORD", "x", true),
            ("SECRET_KEY_BASE", "x", true),
            ("STRIPE_KEY", "x", true),
            ("DATABASE_URL", "postgres://u:p@db/x", true),
            ("DATABASE_URL", "postgres://u@db/x", false),
            ("PASSWORD_FILE", "/run/secrets/p", false),
            ("PASSWORD", "", false),
            ("KEYBOARD", "x", false),
        ] {
            assert_eq!(is_secret(name, value), expect, "{name}={value}");
        }
    }
}
