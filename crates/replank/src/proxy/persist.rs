//! The routes on the volume: the old ones or the new ones, never a mixture.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::limits::FILE_BYTES;
use super::proxy_api::{ROUTES, Routes};

/// Name of the file that is written before it takes [`ROUTES`]' place.
const NEXT: &str = "routes.json.next";

/// Reads a small file; one that is too large is an error rather than memory.
pub(crate) fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// The kept routes; `None` where none were ever kept.
pub(crate) fn load(dir: &Path) -> io::Result<Option<Routes>> {
    match read_small(&dir.join(ROUTES)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Keeps the routes so that they survive a crash at any moment. After an error the old or the new ones are there.
pub(crate) fn store(dir: &Path, routes: &Routes) -> io::Result<()> {
    let next = dir.join(NEXT);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    file.write_all(&serde_json::to_vec_pretty(routes)?)?;
    file.sync_all()?;
    fs::rename(&next, dir.join(ROUTES))?;
    File::open(dir)?.sync_all()
}
