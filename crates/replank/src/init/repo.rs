//! The repository's directory: what may be read of it, and what it says about its remote and its Dockerfiles. Nothing is run.

use std::io::Read as _;
use std::path::{Component, Path, PathBuf};

use super::dockerfile::{self, Dockerfile};

/// Longest file that is read: people write these by hand.
pub const FILE_MAX: u64 = 1024 * 1024;
/// Deepest directory, and most entries, in the search for Dockerfiles: a checkout with dependencies has millions.
const SEARCH_DEPTH: usize = 4;
const SEARCH_MAX: usize = 20_000;
/// Most Dockerfiles that are listed.
const DOCKERFILES_MAX: usize = 64;
/// Directories of other people's code.
const NOT_SEARCHED: [&str; 5] = ["node_modules", "vendor", "target", "dist", "venv"];

#[derive(Debug)]
pub struct Repo {
    /// Without links.
    root: PathBuf,
}

impl Repo {
    /// The error is one sentence with advice.
    pub fn open(directory: &Path) -> Result<Self, String> {
        let root = std::fs::canonicalize(directory)
            .map_err(|e| format!("the repository {} cannot be read: {e}; name its directory", directory.display()))?;
        if !root.is_dir() {
            return Err(format!("{} is not a directory; name the repository's directory", directory.display()));
        }
        Ok(Self { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below `base` (itself relative to the root) as a path in the tree, such as `api/Dockerfile`; `.` for the root.
    /// The error says why it is none.
    pub fn inside(&self, base: &str, path: &str) -> Result<String, String> {
        if path.is_empty() || path.chars().any(|c| c.is_control() || c == '\\') {
            return Err("is not a plain path".to_owned());
        }
        let mut parts: Vec<&str> = Vec::new();
        for part in Path::new(base).components().chain(Path::new(path).components()) {
            match part {
                Component::Normal(name) => parts.push(name.to_str().ok_or("is not UTF-8")?),
                Component::CurDir => {}
                Component::ParentDir => {
                    parts.pop().ok_or("leaves the repository")?;
                }
                Component::RootDir | Component::Prefix(_) => return Err("is absolute".to_owned()),
            }
        }
        let path = if parts.is_empty() { ".".to_owned() } else { parts.join("/") };
        // A link that leads out is followed by nobody: neither here nor when a release is built.
        match std::fs::canonicalize(self.root.join(&path)) {
            Ok(real) if !real.starts_with(&self.root) => Err("is a link that leaves the repository".to_owned()),
            Ok(_) | Err(_) => Ok(path),
        }
    }

    /// Text of a file in the tree; `None` where there is none. The error says why it is not read.
    pub fn read(&self, path: &str) -> Result<Option<String>, String> {
        let path = self.inside(".", path)?;
        let at = self.root.join(path);
        let failed = |e: std::io::Error| format!("cannot be read: {e}");
        // Looked at before it is opened: to open a pipe is to wait for somebody who writes.
        match std::fs::metadata(&at) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Err("is not a file".to_owned()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        }
        let file = std::fs::File::open(at).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(format!("has more than {FILE_MAX} bytes"));
        }
        String::from_utf8(bytes).map(Some).map_err(|e| format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
    }

    pub fn is_file(&self, path: &str) -> bool {
        self.inside(".", path).is_ok_and(|path| self.root.join(path).is_file())
    }

    pub fn is_dir(&self, path: &str) -> bool {
        self.inside(".", path).is_ok_and(|path| self.root.join(path).is_dir())
    }

    pub fn dockerfile(&self, path: &str) -> Result<Option<Dockerfile>, String> {
        Ok(self.read(path)?.map(|text| dockerfile::read(&text)))
    }

    /// Paths of all Dockerfiles, in order. False beside them: the search ended early.
    pub fn dockerfiles(&self) -> (Vec<String>, bool) {
        let mut search = Search { left: SEARCH_MAX, found: Vec::new() };
        search.below(&self.root, "", 0);
        search.found.sort();
        let whole = search.left > 0 && search.found.len() <= DOCKERFILES_MAX;
        search.found.truncate(DOCKERFILES_MAX);
        (search.found, whole)
    }

    /// What git calls the remote, and the branch that is checked out. Read as a text: git's own reader runs programs.
    pub fn origin(&self) -> Option<String> {
        let text = self.read(".git/config").ok().flatten()?;
        let mut is_origin = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                is_origin = line == "[remote \"origin\"]";
            } else if is_origin
                && let Some((key, value)) = line.split_once('=')
                && key.trim() == "url"
            {
                return Some(value.trim().to_owned());
            }
        }
        None
    }

    pub fn branch(&self) -> Option<String> {
        let head = self.read(".git/HEAD").ok().flatten()?;
        let branch = head.trim().strip_prefix("ref: refs/heads/")?.to_owned();
        branch.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b)).then_some(branch)
    }
}

struct Search {
    left: usize,
    found: Vec<String>,
}

impl Search {
    fn below(&mut self, directory: &Path, path: &str, depth: usize) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let at = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            // Links are not followed: their target is found where it is.
            let Ok(kind) = entry.file_type() else { continue };
            let is_dockerfile =
                name == "Dockerfile" || name.starts_with("Dockerfile.") || name.ends_with(".Dockerfile");
            if kind.is_file() && is_dockerfile && !name.ends_with(".dockerignore") {
                self.found.push(at);
            } else if kind.is_dir()
                && depth + 1 < SEARCH_DEPTH
                && !name.starts_with('.')
                && !NOT_SEARCHED.contains(&name.as_str())
            {
                self.below(&entry.path(), &at, depth + 1);
            }
        }
    }
}

/// The remote as Replank reads it: https, ending in `.git`, without a user. `None` where it cannot be made one.
pub fn https_remote(url: &str) -> Option<String> {
    let (host, path) = if let Some(rest) = url.strip_prefix("https://") {
        let (authority, path) = rest.split_once('/')?;
        (authority.rsplit_once('@').map_or(authority, |(_, host)| host), path)
    } else if let Some(rest) = url.strip_prefix("ssh://") {
        let (authority, path) = rest.split_once('/')?;
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        // The port is ssh's.
        (host.split(':').next().unwrap_or(host), path)
    } else if url.contains("://") {
        return None;
    } else {
        let (host, path) = url.split_once(':')?;
        (host.rsplit_once('@').map_or(host, |(_, host)| host), path)
    };
    let path = path.trim_matches('/');
    let path = path.strip_suffix(".git").unwrap_or(path);
    let plain = |text: &str, more: &[u8]| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b) || more.contains(&b))
    };
    (plain(host, b":") && plain(path, b"/~+") && !path.split('/').any(|p| p == ".."))
        .then(|| format!("https://{host}/{path}.git"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_become_https_and_lose_their_user() {
        for (url, expect) in [
            ("https://git.test/acme/shop.git", Some("https://git.test/acme/shop.git")),
            ("https://bot:secret@git.test:8443/acme/shop", Some("https://git.test:8443/acme/shop.git")),
            ("git@git.test:acme/shop.git", Some("https://git.test/acme/shop.git")),
            ("ssh://git@git.test:2222/acme/shop.git", Some("https://git.test/acme/shop.git")),
            ("/srv/git/shop.git", None),
            ("http://git.test/shop.git", None),
            ("https://git.test/../x\"\n", None),
        ] {
            assert_eq!(https_remote(url).as_deref(), expect, "{url}");
        }
    }
}
