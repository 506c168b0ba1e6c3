//! One controller process for each revision: a file lock that ends with its holder, however it ends.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use replank_core::fault::Fault;
use replank_core::record::ControllerId;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

const PREFIX: &str = "controller-";
const SUFFIX: &str = ".lock";
const HOST: &str = "host";

/// Held for as long as the process lives.
#[derive(Debug)]
pub struct ControllerLock {
    _file: File,
}

impl ControllerLock {
    /// Takes the lock of `controller` in the ledger's directory, which all controllers of an application share.
    pub fn take(directory: &Path, controller: &ControllerId) -> Result<Self, Fault> {
        let name = match controller {
            ControllerId::Host => HOST.to_owned(),
            ControllerId::Revision(id) => id.to_string(),
        };
        Self::of_file(&directory.join(format!("{PREFIX}{name}{SUFFIX}")), &name)
    }

    /// Takes the locks of all controllers that ever served here, for what none of them may be there for. Whoever starts while
    /// they are held is refused as a second process of its revision.
    pub fn take_all(directory: &Path) -> Result<Vec<Self>, Fault> {
        let unlisted = |e: std::io::Error| {
            Fault::permanent(format!("the ledger's directory {} cannot be listed", directory.display()))
                .advice("make the directory readable and writable for this user")
                .because(e)
        };
        let mut all = vec![Self::take(directory, &ControllerId::Host)?];
        for entry in std::fs::read_dir(directory).map_err(unlisted)? {
            let entry = entry.map_err(unlisted)?;
            let file = entry.file_name();
            let name = file.to_str().and_then(|file| file.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
            if let Some(name) = name.filter(|name| *name != HOST) {
                all.push(Self::of_file(&entry.path(), name)?);
            }
        }
        Ok(all)
    }

    fn of_file(path: &Path, name: &str) -> Result<Self, Fault> {
        let failed = |e: std::io::Error| {
            Fault::permanent(format!("the lock file {} cannot be opened", path.display()))
                .advice("make the directory writable for this user")
                .because(e)
        };
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(Errno::WOULDBLOCK) => Err(Fault::permanent(format!("another replank process serves {name} already"))
                .advice("stop that one first; two controllers of one revision would do everything twice")),
            Err(error) => Err(failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_in_one_revision_are_refused_and_two_revisions_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let green = ControllerId::Revision("v0-1-0-a".parse().expect("a revision"));
        let first = ControllerLock::take(dir.path(), &green).expect("free");
        let second = ControllerLock::take(dir.path(), &green).expect_err("taken");
        assert!(second.what.contains("already"), "{second}");
        ControllerLock::take(dir.path(), &ControllerId::Host).expect("another controller");
        assert!(ControllerLock::take_all(dir.path()).is_err(), "one of them serves");
        drop(first);
        let all = ControllerLock::take_all(dir.path()).expect("nobody serves");
        ControllerLock::take(dir.path(), &green).expect_err("nobody may begin");
        drop(all);
        ControllerLock::take(dir.path(), &green).expect("free again");
    }
}
