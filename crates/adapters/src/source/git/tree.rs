//! Path safety in a fetched tree: what is opened lies inside it, whatever symlinks say.
//!
//! Paths are walked one component at a time on directory handles, and symlinks are resolved here instead of by the kernel, so
//! that a fault can name the component, and the rule holds where `openat2` is missing or filtered (older seccomp profiles).

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use replank_core::fault::Fault;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat, readlinkat};
use rustix::io::Errno;

/// Linux's own limit for a path.
const MAX_PATH: usize = 4_096;
/// Linux's own limit for symlinks in one path.
const MAX_LINKS: usize = 40;

/// Something inside the tree, symlinks resolved.
struct Found {
    /// Relative to the tree; empty for the tree itself.
    real: PathBuf,
    kind: FileType,
    /// Directory in which it lies, and its name there; `None` for the tree itself.
    place: Option<(OwnedFd, OsString)>,
}

/// Checks a path's form alone: relative, inside, without git's own directory.
pub fn check_relative(rel: &str) -> Result<(), Fault> {
    let bad = |why: &str| {
        let shown: String = rel.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        Fault::permanent(format!("the path {shown:?} {why}")).advice("use a path relative to the repository's root")
    };
    if rel.is_empty() {
        return Err(bad("is empty"));
    }
    if rel.len() > MAX_PATH {
        return Err(bad("is too long"));
    }
    if rel.starts_with('/') {
        return Err(bad("is absolute"));
    }
    if rel.chars().any(char::is_control) {
        return Err(bad("has control characters"));
    }
    for part in rel.split('/') {
        if part == ".." {
            return Err(bad("leads out of the tree with '..'"));
        }
        if part.eq_ignore_ascii_case(".git") {
            return Err(bad("leads into git's own directory"));
        }
    }
    Ok(())
}

/// Reads a file of at most `max` bytes; `None` where there is none. Faults (permanent): it lies outside, is no regular file,
/// or is larger.
pub fn read_file(tree: &Path, rel: &str, max: usize) -> Result<Option<Vec<u8>>, Fault> {
    check_relative(rel)?;
    let Some(found) = walk(tree, rel)? else {
        return Ok(None);
    };
    let Some((dir, name)) = found.place.filter(|_| found.kind == FileType::RegularFile) else {
        return Err(Fault::permanent(format!("{rel:?} is not a regular file")).advice("put a regular file there"));
    };
    let io = |e: std::io::Error| Fault::transient(format!("{rel:?} cannot be read from the tree")).because(e);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(&dir, &name, flags, Mode::empty()).map_err(|e| io(e.into()))?);
    let mut bytes = Vec::new();
    file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() > max {
        return Err(Fault::permanent(format!("{rel:?} is larger than {max} bytes")).advice("make the file smaller"));
    }
    Ok(Some(bytes))
}

/// The real place of a regular file, relative to the tree. `what` names it in the fault: "the Dockerfile of api".
pub fn require_file(tree: &Path, rel: &str, what: &str) -> Result<PathBuf, Fault> {
    require(tree, rel, what, FileType::RegularFile, "a regular file")
}

/// The real place of a directory, relative to the tree; empty for the tree itself.
pub fn require_dir(tree: &Path, rel: &str, what: &str) -> Result<PathBuf, Fault> {
    require(tree, rel, what, FileType::Directory, "a directory")
}

fn require(tree: &Path, rel: &str, what: &str, kind: FileType, name: &str) -> Result<PathBuf, Fault> {
    let advice = "correct the path in the configuration or in the release";
    let bad = |why: &str| Fault::permanent(format!("{what}, {rel:?}, {why}")).advice(advice);
    check_relative(rel).map_err(|e| bad("is not a usable path").because(e))?;
    match walk(tree, rel).map_err(|e| Fault { source: Some(Box::new(e)), ..bad("cannot be used") })? {
        None => Err(bad("is not in the release")),
        Some(found) if found.kind == kind => Ok(found.real),
        Some(_) => Err(bad(&format!("is not {name}"))),
    }
}

fn walk(tree: &Path, rel: &str) -> Result<Option<Found>, Fault> {
    let outside = |at: &Path, to: &OsStr| {
        let (at, to) = (at.display(), super::refs::tame(to.as_bytes()));
        Fault::permanent(format!("the symlink {at} ({to}) leads out of the tree"))
            .advice("keep what is built inside the repository")
    };
    let failed = |e: Errno| Fault::transient("the fetched tree cannot be read").because(std::io::Error::from(e));
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, tree, directory, Mode::empty()).map_err(failed)?;
    let mut dirs: Vec<(OsString, OwnedFd)> = Vec::new();
    let mut todo: VecDeque<OsString> = parts(rel.as_bytes()).collect();
    let mut links = 0;
    while let Some(part) = todo.pop_front() {
        let at = || dirs.iter().map(|(name, _)| name.as_os_str()).chain([part.as_os_str()]).collect::<PathBuf>();
        if part == ".." {
            // Only symlinks bring these; `check_relative` refuses them in the path itself. At the root they were refused below.
            dirs.pop();
            continue;
        }
        if part.as_bytes().eq_ignore_ascii_case(b".git") {
            return Err(outside(&at(), &part));
        }
        let here: BorrowedFd<'_> = dirs.last().map_or(root.as_fd(), |(_, fd)| fd.as_fd());
        let handle = match openat(here, &part, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(handle) => handle,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        match FileType::from_raw_mode(fstat(&handle).map_err(failed)?.st_mode) {
            FileType::Directory => dirs.push((part, handle)),
            FileType::Symlink => {
                links += 1;
                let to = OsString::from_vec(readlinkat(&handle, "", Vec::new()).map_err(failed)?.into_bytes());
                if links > MAX_LINKS {
                    return Err(Fault::permanent(format!("too many symlinks at {}", at().display()))
                        .advice("remove the loop of symlinks from the repository"));
                }
                if to.as_bytes().starts_with(b"/") || climbs_out(&to, dirs.len()) {
                    return Err(outside(&at(), &to));
                }
                for step in parts(to.as_bytes()).rev().collect::<Vec<_>>() {
                    todo.push_front(step);
                }
            }
            _ if !todo.is_empty() => return Ok(None),
            kind => {
                let real = at();
                let dir = match dirs.pop() {
                    Some((_, fd)) => fd,
                    None => root,
                };
                return Ok(Some(Found { real, kind, place: Some((dir, part)) }));
            }
        }
    }
    let real = dirs.iter().map(|(name, _)| name.as_os_str()).collect();
    Ok(Some(Found { real, kind: FileType::Directory, place: None }))
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = OsString> {
    path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").map(|p| OsString::from_vec(p.to_vec()))
}

/// True where a symlink's text climbs above the tree from `depth` directories below its root. Textual depth is only right while
/// no later component is a symlink itself; those are judged in their turn, and popping at the root stays at the root.
fn climbs_out(to: &OsStr, depth: usize) -> bool {
    let mut depth = depth;
    for part in parts(to.as_bytes()) {
        if part == ".." {
            match depth.checked_sub(1) {
                Some(up) => depth = up,
                None => return true,
            }
        } else {
            depth += 1;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use replank_core::fault::Class;

    use super::*;

    fn world() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("directory");
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("api/deep")).expect("directories");
        std::fs::create_dir_all(tree.join(".git")).expect("directories");
        std::fs::write(tree.join(".git/config"), "secret").expect("file");
        std::fs::write(dir.path().join("outside"), "outside").expect("file");
        std::fs::write(tree.join("api/Dockerfile"), "FROM scratch\n").expect("file");
        for (to, at) in [
            ("/etc/passwd", "passwd"),
            ("/etc", "etc"),
            ("../outside", "out"),
            ("api/../../outside", "out2"),
            ("api", "link"),
            ("../api/Dockerfile", "api/up"),
            ("deep/../Dockerfile", "api/round"),
            ("loop", "loop"),
            (".git", "hidden"),
            ("deeplink/../../outside", "trick"),
            ("api/deep", "deeplink"),
            ("nothing", "dangling"),
            ("/proc/self/root", "magic"),
        ] {
            symlink(to, tree.join(at)).expect("link");
        }
        dir
    }

    #[test]
    fn paths_stay_in_the_tree() {
        let dir = world();
        let tree = dir.path().join("tree");
        // Ok(Some): content is there; Ok(None): nothing there; Err: a part of the fault.
        for (rel, expect) in [
            ("api/Dockerfile", Ok(true)),
            ("./api//Dockerfile", Ok(true)),
            ("link/Dockerfile", Ok(true)),
            ("api/up", Ok(true)),
            ("api/round", Ok(true)),
            ("nothing", Ok(false)),
            ("dangling", Ok(false)),
            ("api/Dockerfile/x", Ok(false)),
            ("", Err("is empty")),
            ("/etc/passwd", Err("absolute")),
            ("../outside", Err("'..'")),
            ("api/../../outside", Err("'..'")),
            (".git/config", Err("git's own")),
            (".GIT/config", Err("git's own")),
            ("hidden/config", Err("out of the tree")),
            ("passwd", Err("out of the tree")),
            ("etc/passwd", Err("out of the tree")),
            ("out", Err("out of the tree")),
            ("out2", Err("out of the tree")),
            ("magic/etc/passwd", Err("out of the tree")),
            ("loop", Err("too many symlinks")),
            ("api", Err("not a regular file")),
            ("a\0b", Err("control")),
        ] {
            let got = read_file(&tree, rel, 1_000);
            match (&got, expect) {
                (Ok(Some(bytes)), Ok(true)) => assert_eq!(bytes, b"FROM scratch\n", "{rel}"),
                (Ok(None), Ok(false)) => {}
                (Err(fault), Err(part)) => {
                    assert_eq!(fault.class, Class::Permanent, "{rel}");
                    assert!(fault.chain().contains(part), "{rel}: {}", fault.chain());
                }
                _ => panic!("{rel}: {got:?}"),
            }
        }
        // Resolved step by step this one is api/outside, which is not there; never the file outside.
        assert!(!matches!(read_file(&tree, "trick", 1_000), Ok(Some(_))));
        assert!(read_file(&tree, "api/Dockerfile", 12).is_err());
    }

    #[test]
    fn what_is_required_is_named() {
        let dir = world();
        let tree = dir.path().join("tree");
        assert_eq!(require_file(&tree, "link/Dockerfile", "x").expect("file"), Path::new("api/Dockerfile"));
        assert_eq!(require_dir(&tree, ".", "x").expect("dir"), Path::new(""));
        assert_eq!(require_dir(&tree, "link", "x").expect("dir"), Path::new("api"));
        for fault in [
            require_file(&tree, "web/Dockerfile", "the Dockerfile of web").expect_err("missing"),
            require_file(&tree, "passwd", "the Dockerfile of web").expect_err("outside"),
            require_dir(&tree, "api/Dockerfile", "the Dockerfile of web").expect_err("a file"),
        ] {
            assert!(fault.what.starts_with("the Dockerfile of web, "), "{}", fault.what);
            assert_eq!(fault.class, Class::Permanent);
        }
    }
}
