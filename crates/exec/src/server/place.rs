//! Where programs run: fresh directories that go when their request does, and clones that stay below their root.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::TempDir;

use super::audit;

/// No request lasts longer than its longest time-out, so what is older has no owner: the server was killed.
const STALE: Duration = Duration::from_secs(2 * 3_600);

/// A clone lives as long as its job, and no job lasts for a day.
const STALE_CLONE: Duration = Duration::from_secs(24 * 3_600);

/// The parent of all fresh directories.
#[derive(Debug)]
pub struct Places {
    parent: PathBuf,
}

impl Places {
    /// Makes the parent, for this user alone, and removes what an earlier server left in it long before `now`.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(parent: PathBuf, now: SystemTime) -> io::Result<Self> {
        // Programs run elsewhere, and are told of their directories by path.
        let parent = std::path::absolute(parent)?;
        make_private(&parent)?;
        // Below a directory for everybody somebody else may have been first, and could put his own in place of each request's.
        if std::fs::symlink_metadata(&parent)?.uid() != rustix::process::geteuid().as_raw() {
            let what = format!("{} belongs to another user", parent.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        std::fs::set_permissions(&parent, Permissions::from_mode(0o700))?;
        sweep(&parent, now, STALE)?;
        Ok(Self { parent })
    }

    /// A directory for one request, removed when it is dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn fresh(&self) -> io::Result<Fresh> {
        let private = Permissions::from_mode(0o700);
        let whole = tempfile::Builder::new().prefix("request-").permissions(private).tempdir_in(&self.parent)?;
        let fresh = Fresh { work: whole.path().join("work"), own: whole.path().join("own"), whole };
        make_private(&fresh.work)?;
        make_private(&fresh.own)?;
        Ok(fresh)
    }
}

/// One request's directory, in two parts: what a client may write in must not be taken for the settings of a user's home.
#[derive(Debug)]
pub struct Fresh {
    whole: TempDir,
    /// Where a program is started, unless the request says otherwise, and where a file of the request lies.
    pub work: PathBuf,
    /// Where nothing of the request gets by its name: git's home, what it is told when it asks, and temporary files.
    pub own: PathBuf,
}

impl Fresh {
    /// Removes it, and says why where that fails; what is left is swept later.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn close(self) -> io::Result<()> {
        self.whole.close()
    }
}

/// Removes clones that no job can need any more: the channel itself removes nothing.
///
/// # Errors
/// When the root cannot be read.
pub fn sweep_clones(root: &Path, now: SystemTime) -> io::Result<()> {
    sweep(root, now, STALE_CLONE)
}

fn sweep(parent: &Path, now: SystemTime, older: Duration) -> io::Result<()> {
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let meta = entry.metadata();
        let age = meta.and_then(|meta| meta.modified()).ok().and_then(|at| now.duration_since(at).ok());
        if age.is_some_and(|age| age > older) {
            let path = entry.path();
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let gone = if is_directory { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            // It may be going by itself, or belong to somebody else: neither is a reason to stop.
            if let Err(error) = gone {
                audit::event(
                    "exec_error",
                    json!({"error": format!("a stale directory could not be removed: {error}")}),
                );
            }
        }
    }
    Ok(())
}

/// A directory for this user alone; one that is there must be a directory and no link.
///
/// # Errors
/// When it cannot be made, or something else is in its place.
pub fn make_private(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{} is no directory", path.display()))),
        Err(_) => std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path),
    }
}

/// Whether a path leads below `root` when every link in it is followed. What does not exist yet is judged by its nearest
/// ancestor that does.
///
/// # Errors
/// When the file system cannot be asked.
pub fn is_inside(root: &Path, path: &Path) -> io::Result<bool> {
    let root = root.canonicalize()?;
    let mut known = path;
    loop {
        match known.canonicalize() {
            Ok(real) => return Ok(real.starts_with(&root) && (known != path || real != root)),
            // A link to nowhere would become a way out as soon as somebody makes its target.
            Err(error) if error.kind() == io::ErrorKind::NotFound && known.symlink_metadata().is_err() => {
                match known.parent() {
                    Some(parent) => known = parent,
                    None => return Ok(false),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Settings that the Azure CLI would read from the directory it is started in, or from one above it. It looks for a directory
/// named as its own one, which is `config_dir` or `.azure`.
#[must_use]
pub fn azure_settings(root: &Path, cwd: &Path, config_dir: Option<&Path>) -> Option<PathBuf> {
    let name = config_dir.and_then(Path::file_name).unwrap_or(OsStr::new(".azure"));
    cwd.ancestors()
        .take_while(|directory| directory.starts_with(root))
        .map(|directory| directory.join(name))
        .find(|settings| settings.symlink_metadata().is_ok())
}
