//! One controller process for each revision: a file lock that ends with its holder, however it ends.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use replank_core::fault::Fault;
use replank_core::record::ControllerId;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Held for as long as the process lives.
#[derive(Debug)]
pub struct ControllerLock {
    _file: File,
}

impl ControllerLock {
    /// Takes the lock of `controller` in the ledger's directory, which all controllers of an application share.
    pub fn take(directory: &Path, controller: &ControllerId) -> Result<Self, Fault> {
        let name = match controller {
            ControllerId::Host => "host".to_owned(),
            ControllerId::Revision(id) => id.to_string(),
        };
        let path = directory.join(format!("controller-{name}.lock"));
        let failed = |e: std::io::Error| {
            Fault::permanent(format!("the lock file {} cannot be opened", path.display()))
                .advice("make the directory writable for this user")
                .because(e)
        };
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(failed)?;
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
        drop(first);
        ControllerLock::take(dir.path(), &green).expect("free again");
    }
}
