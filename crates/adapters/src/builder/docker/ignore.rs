//! What a `.dockerignore` leaves out of a build context: Docker's own rules, which are not those of `.gitignore`.

use std::path::{Component, Path};

use regex::Regex;

/// Bounds the work of one walk (entries times patterns); real files have a few dozen lines.
pub(super) const PATTERNS_MAX: usize = 1_000;

#[derive(Debug, thiserror::Error)]
pub(super) enum IgnoreError {
    #[error("the pattern {0:?} is not valid")]
    Pattern(String),
    #[error("there are more than {PATTERNS_MAX} patterns")]
    TooMany,
}

#[derive(Debug)]
struct Pattern {
    exception: bool,
    regex: Regex,
    /// The pattern as far as it names directories literally: below what it may reach.
    text: String,
}

/// An ordered list of patterns; the last one that matches a path or one of its parents decides.
#[derive(Debug, Default)]
pub(super) struct Ignore {
    patterns: Vec<Pattern>,
}

/// Which patterns matched a directory or one of its parents: what its children inherit.
#[derive(Debug, Clone, Default)]
pub(super) struct Inherited(Vec<bool>);

impl Ignore {
    /// Reads a `.dockerignore`: comments, blank lines, surrounding space, leading and trailing slashes and a byte order
    /// mark do not count.
    pub(super) fn parse(text: &str) -> Result<Self, IgnoreError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self::new(text.lines().filter(|line| !line.starts_with('#')))
    }

    pub(super) fn new<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Self, IgnoreError> {
        let mut patterns = Vec::new();
        for line in lines {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            if patterns.len() == PATTERNS_MAX {
                return Err(IgnoreError::TooMany);
            }
            let (exception, rest) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            if rest.is_empty() {
                return Err(IgnoreError::Pattern(line.chars().take(80).collect()));
            }
            let text = clean(rest);
            let regex = Regex::new(&translate(&text))
                .map_err(|_| IgnoreError::Pattern(line.chars().take(80).collect::<String>()))?;
            patterns.push(Pattern { exception, regex, text });
        }
        Ok(Self { patterns })
    }

    /// Whether `path` (relative, with '/') is left out, and what its children inherit if it is a directory.
    pub(super) fn check(&self, path: &str, parent: &Inherited) -> (bool, Inherited) {
        let mut out = false;
        let mut hits = Vec::with_capacity(self.patterns.len());
        for (i, pattern) in self.patterns.iter().enumerate() {
            let hit = parent.0.get(i).copied().unwrap_or(false) || pattern.regex.is_match(path);
            if hit {
                out = !pattern.exception;
            }
            hits.push(hit);
        }
        (out, Inherited(hits))
    }

    /// Whether an exception could bring something below the left-out directory `dir` back. Errs on the side of looking.
    pub(super) fn may_return_below(&self, dir: &str) -> bool {
        self.patterns.iter().filter(|p| p.exception).any(|p| {
            let literal = p.text.split(['*', '?', '[', '\\']).next().unwrap_or("");
            let wild = literal.len() < p.text.len();
            p.text.starts_with(&format!("{dir}/")) || (wild && (dir.starts_with(literal) || literal.starts_with(dir)))
        })
    }
}

/// Lexical cleaning as Go's `filepath.Clean` does it, and without the leading slash.
fn clean(pattern: &str) -> String {
    let rooted = pattern.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in pattern.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|p| *p != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

/// The regular expression of a pattern: `*` and `?` stay within a name, `**` spans any number of them.
fn translate(pattern: &str) -> String {
    let mut regex = String::from("^(?s:");
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                if chars.peek() == Some(&'/') {
                    chars.next();
                }
                // A pattern that ends in "**" takes everything; elsewhere "**" is any number of directories, or none.
                regex.push_str(if chars.peek().is_none() { ".*" } else { "(?:.*/)?" });
            }
            '*' => regex.push_str("[^/]*"),
            '?' => regex.push_str("[^/]"),
            '\\' => match chars.next() {
                Some(next) => regex.push_str(&regex::escape(next.encode_utf8(&mut [0; 4]))),
                None => regex.push_str("\\\\"),
            },
            '[' => {
                // A class as in Go's filepath.Match: '^' negates, '\\' escapes, ranges with '-'.
                regex.push('[');
                if chars.peek() == Some(&'^') {
                    regex.push('^');
                    chars.next();
                }
                while let Some(c) = chars.next() {
                    match c {
                        ']' => {
                            regex.push(']');
                            break;
                        }
                        '-' => regex.push('-'),
                        '\\' => {
                            if let Some(next) = chars.next() {
                                regex.push_str(&regex::escape(next.encode_utf8(&mut [0; 4])));
                            }
                        }
                        // These mean something in this library's classes and nothing in Docker's.
                        '[' | '&' | '~' | '^' => {
                            regex.push('\\');
                            regex.push(c);
                        }
                        c => regex.push(c),
                    }
                }
            }
            c => regex.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    regex.push_str(")$");
    regex
}

/// The pattern of one name, by the same rules; nothing where it is not valid.
pub(super) fn name_pattern(name: &str) -> Option<Regex> {
    Regex::new(&translate(name)).ok()
}

/// A relative path with '/' and without '.', or nothing where it would leave its root.
pub(super) fn inside(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::CurDir => {}
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Judges a path the way a walk does: from the top, each directory handing on what it matched.
    fn ignored(patterns: &str, path: &str) -> bool {
        let ignore = Ignore::parse(patterns).expect("patterns");
        let mut inherited = Inherited::default();
        let mut out = false;
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            (out, inherited) = ignore.check(&path[..at], &inherited);
        }
        out
    }

    #[test]
    fn documented_rules() {
        // From Docker's reference of the file's format, and the table of its own matcher's tests.
        for (patterns, path, expect) in [
            ("# comment\n*/temp*", "somedir/temporary.txt", true),
            ("*/temp*", "somedir/temp", true),
            ("*/temp*", "somedir/temp/deep/file", true),
            ("*/temp*", "temp", false),
            ("*/temp*", "a/b/temp", false),
            ("*/*/temp*", "somedir/subdir/temporary.txt", true),
            ("*/*/temp*", "somedir/temporary.txt", false),
            ("temp?", "tempa", true),
            ("temp?", "temp", false),
            ("temp?", "tempab", false),
            ("**/*.go", "main.go", true),
            ("**/*.go", "a/b/c/main.go", true),
            ("*.md\n!README.md", "README.md", false),
            ("*.md\n!README.md", "LICENSE.md", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-more.md", false),
            ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", false),
            ("/foo/bar", "foo/bar", true),
            ("foo/bar/", "foo/bar", true),
            ("foo/bar", "foo/bar/baz", true),
            ("foo/bar", "x/foo/bar", false),
            ("*", "anything/at/all", true),
            ("*\n!src", "src/main.rs", false),
            ("*\n!src", "other/main.rs", true),
            ("*\n!src/*.rs", "src/main.rs", false),
            ("*\n!src/*.rs", "src/main.c", true),
            ("**", "a/b", true),
            ("**/", "a", true),
            ("a/**", "a/b/c", true),
            ("a/**", "a", false),
            ("**/b", "b", true),
            ("**/b", "a/b", true),
            ("**/b", "a/b/c", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("abc.def", "abcdef", false),
            ("abc.def", "abcZdef", false),
            ("**file", "dir/file", true),
            ("**/file", "dir/dir2/file.txt", false),
            ("a(b)c/def", "a(b)c/def", true),
            ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("\u{feff}foo", "foo", true),
            ("  foo  ", "foo", true),
            ("! foo\nfoo", "foo", true),
            ("foo\n! foo", "foo", false),
            ("./foo", "foo", true),
            ("foo/../bar", "bar", true),
            ("../foo", "foo", false),
            (" # not a comment", "# not a comment", true),
            ("a b", "a b", true),
            (".git", ".git/config", true),
            (".git", "sub/.git/config", false),
            ("dir\n!dir/keep", "dir/keep/x", false),
            ("dir\n!dir/keep", "dir/other", true),
        ] {
            assert_eq!(ignored(patterns, path), expect, "{patterns:?} on {path:?}");
        }
    }

    #[test]
    fn exceptions_are_looked_for_below_what_is_left_out() {
        for (patterns, dir, expect) in [
            ("dir\n!dir/keep", "dir", true),
            ("dir\n!other/keep", "dir", false),
            ("*\n!**/keep", "deep/dir", true),
            ("*", "dir", false),
            ("*\n!a*/b", "abc", true),
        ] {
            let ignore = Ignore::parse(patterns).expect("patterns");
            assert_eq!(ignore.may_return_below(dir), expect, "{patterns:?} below {dir:?}");
        }
    }

    #[test]
    fn bad_patterns_are_refused_by_name() {
        for patterns in ["!", "[", "a[b", "[z-a]"] {
            assert!(Ignore::parse(patterns).is_err(), "{patterns:?}");
        }
    }

    #[test]
    fn paths_stay_inside() {
        for (path, expect) in [
            (".", Some("")),
            ("a/./b/", Some("a/b")),
            ("a/../b", Some("b")),
            ("../b", None),
            ("a/../../b", None),
            ("/etc", None),
        ] {
            assert_eq!(inside(path).as_deref(), expect, "{path:?}");
        }
    }
}
