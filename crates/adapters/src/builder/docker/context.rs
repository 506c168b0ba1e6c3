//! What of a release's tree goes to the engine for one build: found, judged and bounded before anything is sent.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use replank_core::fault::Fault;

use super::ignore::{Ignore, Inherited, inside};

/// A `.dockerignore` or a Dockerfile larger than this is not one that a person wrote.
const TEXT_MAX: u64 = 1 << 20;
/// Deeper trees than this do not fit into a path that a kernel takes.
const DEPTH_MAX: usize = 128;

/// How much a build context may hold after its ignore file was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextLimits {
    /// Files, directories and links together. Each costs memory here and an inode in the engine.
    pub entries: usize,
    /// Bytes of all files together.
    pub bytes: u64,
}

impl Default for ContextLimits {
    fn default() -> Self {
        Self { entries: 200_000, bytes: 2 << 30 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Dir,
    File {
        size: u64,
    },
    /// Stored as it is, never followed.
    Link {
        target: String,
    },
}

/// One thing in a context, with the path that the engine knows it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: String,
    pub(super) kind: Kind,
    /// Permission bits only.
    pub(super) mode: u32,
    /// Nanoseconds since the epoch: with the size, what the engine tells a changed file by when it has an older copy.
    pub(super) modified_ns: i64,
}

/// A directory's entries in the order that the engine expects: depth first, names by their bytes.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) dir: PathBuf,
    pub(super) entries: Vec<Entry>,
}

/// Everything that one build reads.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) context: Root,
    /// The Dockerfile's own directory, of which only the Dockerfile and its ignore file are shown.
    pub(super) dockerfile: Root,
    /// The Dockerfile's name in that directory.
    pub(super) dockerfile_name: String,
    /// Bytes of all files, for the log.
    pub(super) bytes: u64,
}

/// Looks at the tree. Blocking. Nothing outside `tree` is read, whatever links say.
pub(super) fn gather(tree: &Path, context: &str, dockerfile: &str, limits: ContextLimits) -> Result<Context, Fault> {
    let root = fs::canonicalize(tree)
        .map_err(|e| Fault::transient(format!("the release's tree {} cannot be read", tree.display())).because(e))?;
    let context_dir = within(&root, context, "build context")?;
    if !context_dir.is_dir() {
        return Err(Fault::permanent(format!("the build context {context:?} is not a directory of the release"))
            .advice("set the component's context to a directory that the release's commit has"));
    }
    let file = within(&root, dockerfile, "Dockerfile")?;
    let meta = fs::metadata(&file).map_err(|e| unreadable(&file, e))?;
    if !meta.is_file() || meta.len() > TEXT_MAX {
        return Err(Fault::permanent(format!(
            "{dockerfile:?} is not a Dockerfile: not a file of at most {TEXT_MAX} bytes"
        ))
        .advice("set the component's dockerfile to a file that the release's commit has"));
    }
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|n| n.to_str())) else {
        return Err(Fault::permanent(format!("the Dockerfile's name {dockerfile:?} is not UTF-8")).advice("rename it"));
    };

    let mut shown = vec![entry_of(&file, name.to_owned())?];
    let own = format!("{name}.dockerignore");
    let mut ignore_text = read_text(&dir.join(&own))?;
    if ignore_text.is_some() {
        shown.push(entry_of(&dir.join(&own), own)?);
    } else {
        ignore_text = read_text(&context_dir.join(".dockerignore"))?;
    }
    let ignore = Ignore::parse(ignore_text.as_deref().unwrap_or("")).map_err(|e| {
        Fault::permanent("the ignore file of the build context is not valid")
            .advice("correct it in the release")
            .because(e)
    })?;

    let mut walk = Walk { ignore, limits, entries: Vec::new(), bytes: 0 };
    walk.dir(&context_dir, "", &Inherited::default(), false, 0)?;
    Ok(Context {
        context: Root { dir: context_dir, entries: walk.entries },
        dockerfile: Root { dir: dir.to_owned(), entries: shown },
        dockerfile_name: name.to_owned(),
        bytes: walk.bytes,
    })
}

/// A path of the release, resolved; refused where it leaves the tree by name or through a link.
fn within(root: &Path, path: &str, what: &str) -> Result<PathBuf, Fault> {
    let escapes = || {
        Fault::permanent(format!("the {what} {path:?} lies outside of the release's tree"))
            .advice("use a path relative to the root of the repository that stays inside it")
    };
    let relative = inside(path).ok_or_else(escapes)?;
    let full = fs::canonicalize(root.join(relative)).map_err(|e| {
        Fault::permanent(format!("the release has no {what} {path:?}"))
            .advice("check the path in the configuration against the release's commit")
            .because(e)
    })?;
    if full.starts_with(root) { Ok(full) } else { Err(escapes()) }
}

fn unreadable(path: &Path, error: std::io::Error) -> Fault {
    Fault::transient(format!("{} cannot be read", path.display())).because(error)
}

/// A small text file that may be absent. A link is not followed: it could show what is not the release's.
fn read_text(path: &Path) -> Result<Option<String>, Fault> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() && meta.len() <= TEXT_MAX => {
            let bytes = fs::read(path).map_err(|e| unreadable(path, e))?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
        Ok(_) => Err(Fault::permanent(format!("{} is not a plain file of at most {TEXT_MAX} bytes", path.display()))
            .advice("make it a plain file in the release")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(unreadable(path, e)),
    }
}

fn entry_of(full: &Path, path: String) -> Result<Entry, Fault> {
    let meta = fs::symlink_metadata(full).map_err(|e| unreadable(full, e))?;
    let kind = if meta.is_dir() {
        Kind::Dir
    } else if meta.is_file() {
        Kind::File { size: meta.len() }
    } else if meta.is_symlink() {
        let target = fs::read_link(full).map_err(|e| unreadable(full, e))?;
        let Some(target) = target.to_str() else {
            return Err(not_utf8(full));
        };
        Kind::Link { target: target.to_owned() }
    } else {
        return Err(Fault::permanent(format!(
            "the build context holds {path:?}, which is neither file, directory nor link"
        ))
        .advice("remove it, or leave it out with a .dockerignore"));
    };
    let modified_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
    Ok(Entry { path, kind, mode: meta.mode() & 0o7777, modified_ns })
}

fn not_utf8(path: &Path) -> Fault {
    Fault::permanent(format!("a name in the build context is not UTF-8: {}", path.display()))
        .advice("rename it, or leave it out with a .dockerignore")
}

struct Walk {
    ignore: Ignore,
    limits: ContextLimits,
    entries: Vec<Entry>,
    bytes: u64,
}

impl Walk {
    /// `out`: this directory itself is left out, and shown only if something below it is not.
    fn dir(&mut self, full: &Path, at: &str, inherited: &Inherited, out: bool, depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(Fault::permanent(format!("the build context is more than {DEPTH_MAX} directories deep"))
                .advice("flatten it, or leave it out with a .dockerignore"));
        }
        let mut names: Vec<_> = fs::read_dir(full)
            .and_then(|dir| dir.map(|e| e.map(|e| e.file_name())).take(self.limits.entries + 1).collect())
            .map_err(|e| unreadable(full, e))?;
        if names.len() > self.limits.entries {
            return Err(self.too_many());
        }
        names.sort_unstable();
        for name in names {
            let child = full.join(&name);
            let text = name.to_string_lossy();
            let path = if at.is_empty() { text.into_owned() } else { format!("{at}/{text}") };
            let (left_out, handed_on) = self.ignore.check(&path, inherited);
            // The engine asks for the root's ignore file even where that names itself.
            if left_out && path != ".dockerignore" {
                let is_dir = fs::symlink_metadata(&child).is_ok_and(|m| m.is_dir());
                if is_dir && self.ignore.may_return_below(&path) {
                    self.dir(&child, &path, &handed_on, true, depth + 1)?;
                }
                continue;
            }
            if name.to_str().is_none() {
                return Err(not_utf8(&child));
            }
            let entry = entry_of(&child, path.clone())?;
            if out {
                self.parents(full, at)?;
            }
            let is_dir = entry.kind == Kind::Dir;
            self.push(entry)?;
            if is_dir {
                self.dir(&child, &path, &handed_on, false, depth + 1)?;
            }
        }
        Ok(())
    }

    /// Adds the directories above something that an exception brought back, where they are not there yet.
    fn parents(&mut self, full: &Path, at: &str) -> Result<(), Fault> {
        let known = |entries: &[Entry], path: &str| {
            // Depth-first order: a parent that was added stands before this, after everything of its own elder siblings.
            entries.iter().rev().any(|e| e.path == path)
        };
        let mut missing = Vec::new();
        let (mut full, mut at) = (full, at);
        while !at.is_empty() && !known(&self.entries, at) {
            missing.push((full.to_owned(), at.to_owned()));
            at = at.rsplit_once('/').map_or("", |(parent, _)| parent);
            full = full.parent().unwrap_or(full);
        }
        for (full, at) in missing.into_iter().rev() {
            self.push(entry_of(&full, at)?)?;
        }
        Ok(())
    }

    fn push(&mut self, entry: Entry) -> Result<(), Fault> {
        if self.entries.len() >= self.limits.entries {
            return Err(self.too_many());
        }
        if let Kind::File { size } = entry.kind {
            self.bytes = self.bytes.saturating_add(size);
            if self.bytes > self.limits.bytes {
                return Err(Fault::permanent(format!(
                    "the build context is larger than {} MiB",
                    self.limits.bytes >> 20
                ))
                .advice("leave out with a .dockerignore what the build does not read, or raise the limit"));
            }
        }
        self.entries.push(entry);
        Ok(())
    }

    fn too_many(&self) -> Fault {
        Fault::permanent(format!("the build context has more than {} entries", self.limits.entries))
            .advice("leave out with a .dockerignore what the build does not read, or raise the limit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replank_core::fault::Class;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("directory");
        for (path, text) in files {
            let full = dir.path().join(path);
            fs::create_dir_all(full.parent().expect("parent")).expect("directories");
            fs::write(full, text).expect("file");
        }
        dir
    }

    fn paths(dir: &Path, context: &str, dockerfile: &str) -> Vec<String> {
        let context = gather(dir, context, dockerfile, ContextLimits::default()).expect("context");
        context.context.entries.into_iter().map(|e| e.path).collect()
    }

    #[test]
    fn entries_come_depth_first_and_filtered() {
        let dir = tree(&[
            ("Dockerfile", ""),
            (".dockerignore", "*\n!src/keep\n!a.txt\n"),
            ("a.txt", ""),
            ("src/keep/x", ""),
            ("src/drop", ""),
            ("other/y", ""),
        ]);
        assert_eq!(paths(dir.path(), ".", "Dockerfile"), [".dockerignore", "a.txt", "src", "src/keep", "src/keep/x"]);
        // The slash sorts before everything else.
        let dir = tree(&[("Dockerfile", ""), ("a/b", ""), ("a.txt", ""), ("a-b", "")]);
        assert_eq!(paths(dir.path(), ".", "Dockerfile"), ["Dockerfile", "a", "a/b", "a-b", "a.txt"]);
    }

    #[test]
    fn the_dockerfiles_own_ignore_file_wins() {
        let dir = tree(&[
            ("ctx/.dockerignore", "b"),
            ("ctx/a", ""),
            ("ctx/b", ""),
            ("build/api.Dockerfile", ""),
            ("build/api.Dockerfile.dockerignore", "a"),
        ]);
        assert_eq!(paths(dir.path(), "ctx", "build/api.Dockerfile"), [".dockerignore", "b"]);
    }

    #[test]
    fn links_are_stored_and_never_followed() {
        let dir = tree(&[("Dockerfile", "")]);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).expect("link");
        let context = gather(dir.path(), ".", "Dockerfile", ContextLimits::default()).expect("context");
        assert_eq!(context.context.entries[1].kind, Kind::Link { target: "/etc/passwd".to_owned() });
        assert_eq!(context.bytes, 0);
    }

    /// What an ignore file leads to would be read into an error's words.
    #[test]
    fn an_ignore_file_that_is_a_link_is_refused() {
        for (context, name) in [(".", ".dockerignore"), (".", "Dockerfile.dockerignore"), ("ctx", "ctx/.dockerignore")]
        {
            let dir = tree(&[("Dockerfile", ""), ("ctx/a", "")]);
            std::os::unix::fs::symlink("/etc/passwd", dir.path().join(name)).expect("link");
            let fault = gather(dir.path(), context, "Dockerfile", ContextLimits::default()).expect_err(name);
            assert!(fault.class == Class::Permanent && fault.what.contains("not a plain file"), "{}", fault.chain());
            assert!(!fault.chain().contains("root:"), "{}", fault.chain());
        }
    }

    #[test]
    fn what_leaves_the_tree_or_the_limits_is_refused() {
        let dir = tree(&[("Dockerfile", ""), ("big", "0123456789"), ("sub/x", "")]);
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).expect("link");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("passwd")).expect("link");
        let roomy = ContextLimits::default();
        for (context, dockerfile, limits, expect) in [
            ("../x", "Dockerfile", roomy, "outside"),
            (".", "../Dockerfile", roomy, "outside"),
            ("out", "Dockerfile", roomy, "outside"),
            (".", "passwd", roomy, "outside"),
            ("/etc", "Dockerfile", roomy, "outside"),
            ("nowhere", "Dockerfile", roomy, "no build context"),
            (".", "nowhere", roomy, "no Dockerfile"),
            ("Dockerfile", "Dockerfile", roomy, "not a directory"),
            (".", "sub", roomy, "not a Dockerfile"),
            (".", "Dockerfile", ContextLimits { entries: 100, bytes: 9 }, "larger than"),
            (".", "Dockerfile", ContextLimits { entries: 3, bytes: 100 }, "more than 3 entries"),
        ] {
            let fault = gather(dir.path(), context, dockerfile, limits).expect_err(expect);
            assert_eq!(fault.class, Class::Permanent, "{expect}");
            assert!(fault.what.contains(expect), "{:?} should say {expect:?}", fault.what);
            assert!(!fault.advice.is_empty(), "{expect}");
        }
    }

    #[test]
    fn special_files_are_refused_unless_ignored() {
        let dir = tree(&[("Dockerfile", "")]);
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("sock")).expect("socket");
        let fault = gather(dir.path(), ".", "Dockerfile", ContextLimits::default()).expect_err("a socket");
        assert!(fault.what.contains("sock"), "{}", fault.what);
        fs::write(dir.path().join(".dockerignore"), "sock").expect("ignore file");
        assert_eq!(paths(dir.path(), ".", "Dockerfile"), [".dockerignore", "Dockerfile"]);
    }
}
