//! How much disk a directory takes, watched while somebody fills it. Shared by the two that run git.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a growing directory is measured; the pause grows with what measuring costs.
const MEASURE_EVERY: Duration = Duration::from_millis(200);
/// `st_blocks` counts in units of so many bytes, whatever the file system's block size.
const BLOCK: u64 = 512;

/// Returns when the directory takes more than so many bytes. One that is not there takes none.
pub async fn outgrown(path: &Path, limit: u64) {
    let mut pause = MEASURE_EVERY;
    loop {
        tokio::time::sleep(pause).await;
        let path = path.to_owned();
        let begun = Instant::now();
        // A measurement that was lost (runtime shutting down) says nothing; the next one will.
        if let Ok(used) = tokio::task::spawn_blocking(move || used_bytes(&path, limit)).await
            && used > limit
        {
            return;
        }
        pause = MEASURE_EVERY.max(begun.elapsed() * 2);
    }
}

/// Disk space under a directory, counted until it is over `enough`. What disappears meanwhile counts nothing.
fn used_bytes(root: &Path, enough: u64) -> u64 {
    let mut used = 0;
    let mut dirs: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            used += meta.blocks() * BLOCK;
            if used > enough {
                return used;
            }
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    used
}
