//! Variables: `.env` files, and `${X}` in a compose file's texts as compose replaces it.

use std::collections::BTreeMap;

/// Deepest `${A:-${B:-…}}`.
const NESTING_MAX: usize = 8;
/// Longest text after replacement: an environment has room for 128 KiB in one string on Linux.
const TEXT_MAX: usize = 128 * 1024;

/// What a file of variables says, by name. Names are not checked here.
pub type Vars = BTreeMap<String, String>;

/// A file of variables as it was read.
#[derive(Debug, Default)]
pub struct EnvFile {
    pub vars: Vars,
    /// Lines that give no value, counted from 1, and why: of no harm where nothing needs them.
    pub without: Vec<(u64, String)>,
}

/// Reads a `.env` file. The error names the line, counted from 1, and what is wrong with it.
pub fn parse_env(text: &str) -> Result<EnvFile, (u64, String)> {
    let mut file = EnvFile::default();
    for (index, line) in text.lines().enumerate() {
        let number = index as u64 + 1;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let (name, raw) = line.split_once('=').map_or((line, None), |(name, raw)| (name, Some(raw.trim_start())));
        let name = name.trim();
        if !is_name(name) {
            return Err((number, "this is not NAME=VALUE".to_owned()));
        }
        let Some(raw) = raw else {
            // A bare name means "as in compose's own environment", which nobody here knows.
            file.without.push((number, format!("{name} has no value")));
            continue;
        };
        match value(raw, &file.vars) {
            Ok(value) => {
                file.vars.insert(name.to_owned(), value);
            }
            Err(Unread::Missing(missing)) => file.without.push((number, format!("{name} has no value: {missing}"))),
            Err(Unread::Quote) => {
                return Err((number, "the quote does not end on this line; write the value on one line".to_owned()));
            }
        }
    }
    Ok(file)
}

enum Unread {
    Missing(Missing),
    Quote,
}

fn value(raw: &str, vars: &Vars) -> Result<String, Unread> {
    let quoted = |quote: char| {
        let rest = raw.strip_prefix(quote)?;
        let mut escaped = false;
        let end = rest.char_indices().find(|(_, c)| {
            let is_end = *c == quote && !escaped;
            escaped = *c == '\\' && !escaped && quote == '"';
            is_end
        });
        Some(end.map(|(at, _)| &rest[..at]).ok_or(Unread::Quote))
    };
    if let Some(inner) = quoted('\'') {
        return Ok(inner?.to_owned());
    }
    let text = match quoted('"') {
        Some(inner) => unescaped(inner?),
        None => raw.find(" #").map_or(raw, |at| &raw[..at]).trim_end().to_owned(),
    };
    interpolate(&text, vars).map_err(Unread::Missing)
}

/// Inside of double quotes.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match (c, rest.as_str().chars().next()) {
            ('\\', Some(next @ ('n' | 'r' | 't' | '"' | '\\'))) => {
                out.push(match next {
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    other => other,
                });
                rest.next();
            }
            _ => out.push(c),
        }
    }
    out
}

fn is_name(name: &str) -> bool {
    name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Why a text with variables has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error("${{{0}}} has no value: .env does not set it, and it has no default")]
    Variable(String),
    #[error("${{{0}}} is demanded: {1}")]
    Demanded(String, String),
    #[error("{0:?} is no variable of compose's")]
    Syntax(String),
    #[error("its variables are nested too deeply, or make it too long")]
    TooMuch,
}

/// Replaces every variable, or names the first that has no value. Compose would put nothing in its place and go on.
pub fn interpolate(text: &str, vars: &Vars) -> Result<String, Missing> {
    replace(text, vars, 0)
}

fn replace(text: &str, vars: &Vars, depth: usize) -> Result<String, Missing> {
    if depth > NESTING_MAX {
        return Err(Missing::TooMuch);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(inner) = rest.strip_prefix('{') {
            let end = closing(inner).ok_or_else(|| Missing::Syntax(format!("${rest}")))?;
            out.push_str(&braced(&inner[..end], vars, depth)?);
            rest = &inner[end + 1..];
        } else {
            let length = rest.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
            let (name, after) = rest.split_at(length);
            if !is_name(name) {
                return Err(Missing::Syntax(format!("${rest}")));
            }
            out.push_str(vars.get(name).ok_or_else(|| Missing::Variable(name.to_owned()))?);
            rest = after;
        }
        if out.len() > TEXT_MAX {
            return Err(Missing::TooMuch);
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the brace that was opened just before `text` closes.
fn closing(text: &str) -> Option<usize> {
    let mut open = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => return Some(at),
            '}' => open -= 1,
            _ => {}
        }
    }
    None
}

fn braced(inner: &str, vars: &Vars, depth: usize) -> Result<String, Missing> {
    let length = inner.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
    let (name, rest) = inner.split_at(length);
    if !is_name(name) {
        return Err(Missing::Syntax(format!("${{{inner}}}")));
    }
    let (also_empty, rest) = rest.strip_prefix(':').map_or((false, rest), |rest| (true, rest));
    let set = vars.get(name).filter(|value| !(also_empty && value.is_empty()));
    let mut rest = rest.chars();
    match (rest.next(), rest.as_str()) {
        (None, _) if !also_empty => set.cloned().ok_or_else(|| Missing::Variable(name.to_owned())),
        (Some('-'), default) => set.cloned().map_or_else(|| replace(default, vars, depth + 1), Ok),
        (Some('?'), why) => set.cloned().ok_or_else(|| Missing::Demanded(name.to_owned(), why.to_owned())),
        (Some('+'), instead) if set.is_some() => replace(instead, vars, depth + 1),
        (Some('+'), _) => Ok(String::new()),
        (Some(_) | None, _) => Err(Missing::Syntax(format!("${{{inner}}}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_as_compose_does_or_named() {
        let vars = parse_env("# c\nA=1\nexport B='x y'\nE=\nC=\"q\\\"$A\" \nD=plain # comment\nF\nG=${NONE}\n")
            .expect("a file");
        assert_eq!(vars.without.iter().map(|w| w.0).collect::<Vec<_>>(), [7, 8]);
        let vars = vars.vars;
        assert_eq!(vars.get("C").map(String::as_str), Some("q\"1"));
        assert_eq!(vars.get("D").map(String::as_str), Some("plain"));
        for (text, expect) in [
            ("a$$b", Ok("a$b")),
            ("${A}:$B", Ok("1:x y")),
            ("${X:-d}${X-e}", Ok("de")),
            ("${E:-d}|${E-d}", Ok("d|")),
            ("${X:-${Y:-z}}", Ok("z")),
            ("${A:+set}${X+set}", Ok("set")),
            ("${X}", Err("${X} has no value: .env does not set it, and it has no default")),
            ("${X:?say it}", Err("${X} is demanded: say it")),
            ("${A", Err("\"${A\" is no variable of compose's")),
            ("$1", Err("\"$1\" is no variable of compose's")),
            ("${A!}", Err("\"${A!}\" is no variable of compose's")),
        ] {
            let found = interpolate(text, &vars).map_err(|e| e.to_string());
            assert_eq!(found.as_deref().map_err(String::as_str), expect, "{text}");
        }
        let deep = format!("{}x{}", "${Q:-".repeat(50), "}".repeat(50));
        assert_eq!(interpolate(&deep, &vars), Err(Missing::TooMuch));
        assert_eq!(parse_env("A=1\nB-\n").map(|_| ()).map_err(|e| e.0), Err(2));
        assert_eq!(parse_env("A='x\n").map(|_| ()).map_err(|e| e.0), Err(1));
    }
}
