//! Writing what came of it: nothing is overwritten unasked, nothing is followed, and secrets are for their owner alone.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Outcome;

/// One file and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Written {
    pub path: PathBuf,
    /// False: it was there, and stays as it is.
    pub written: bool,
}

/// Why nothing, or not everything, was written.
#[derive(Debug, thiserror::Error)]
pub enum NotSaved {
    #[error("{} exists already; look at it, then replace it with --force, or write elsewhere with --output", .0.display())]
    Exists(PathBuf),
    #[error("{path} cannot be written: {1}; choose another directory with --output", path = .0.display())]
    Io(PathBuf, #[source] std::io::Error),
    #[error("{} leads out of the repository by a link; take the link away", .0.display())]
    LeadsOut(PathBuf),
}

/// Writes the configuration to `target`, secrets beside it, and the controller's Dockerfile into the repository. Whatever is in
/// the way is found before anything is written.
pub fn save(outcome: &Outcome, target: &Path, force: bool) -> Result<Vec<Written>, NotSaved> {
    let home = target.parent().unwrap_or(Path::new("/"));
    let secrets: Vec<(PathBuf, &String)> =
        outcome.plan.secret_files.iter().map(|(path, value)| (home.join(path), value)).collect();
    if !force {
        let in_the_way = |path: &&PathBuf| path.symlink_metadata().is_ok();
        let mut all = std::iter::once(target.to_path_buf()).chain(secrets.iter().map(|(path, _)| path.clone()));
        if let Some(path) = all.find(|path| in_the_way(&path)) {
            return Err(NotSaved::Exists(path));
        }
    }
    let dockerfile = outcome.root.join(outcome.plan.controller.dockerfile());
    let directory = dockerfile.parent().unwrap_or(&outcome.root);
    make_dir(directory, 0o755)?;
    // Between this look and the write nobody but the repository's owner can put a link there.
    match std::fs::canonicalize(directory) {
        Ok(real) if real.starts_with(&outcome.root) => {}
        Ok(_) | Err(_) => return Err(NotSaved::LeadsOut(directory.to_path_buf())),
    }
    make_dir(home, 0o750)?;
    if !secrets.is_empty() {
        make_dir(&home.join(super::environment::SECRETS_DIR), 0o700)?;
    }
    let mut written = Vec::new();
    for (path, value) in &secrets {
        put(path, value, 0o600, force)?;
        written.push(Written { path: path.clone(), written: true });
    }
    let is_new = force || dockerfile.symlink_metadata().is_err();
    if is_new {
        put(&dockerfile, &outcome.dockerfile, 0o644, force)?;
    }
    written.push(Written { path: dockerfile, written: is_new });
    // The configuration comes last: where it is, the rest is.
    put(target, &outcome.toml, 0o644, force)?;
    written.push(Written { path: target.to_path_buf(), written: true });
    Ok(written)
}

fn make_dir(path: &Path, mode: u32) -> Result<(), NotSaved> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|e| NotSaved::Io(path.to_path_buf(), e))
}

/// A new file; with `force` it takes the place of another one, or of a link, as a whole.
fn put(path: &Path, text: &str, mode: u32, force: bool) -> Result<(), NotSaved> {
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::AlreadyExists => NotSaved::Exists(path.to_path_buf()),
        _ => NotSaved::Io(path.to_path_buf(), e),
    };
    let new = if force { path.with_added_extension("replank-new") } else { path.to_path_buf() };
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if force { std::fs::rename(&new, path) } else { Ok(()) }
    };
    write().map_err(failed)
}
