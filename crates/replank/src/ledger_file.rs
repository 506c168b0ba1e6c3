//! The ledger's file as a whole: a copy made while it is in use, and a copy put back in its place.
//!
//! A restore never leaves the place empty, as a controller that starts would make a new ledger there: what is replaced gets a
//! second name first, and then the new file takes the first one in one step.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::{FILE, Remembered, Store, Unforgettable};
use replank_core::event::Event;
use replank_core::fault::Fault;
use replank_core::ports::{Clock as _, Ids as _, Ledger as _, LedgerError};
use replank_core::record::{Actor, Head, Record};
use replank_core::transition::apply;
use replank_core::words::AppName;

use crate::config::Settings;
use crate::lock::ControllerLock;
use crate::system::{SystemClock, SystemIds};
use crate::{assemble, verify};

/// A controller that beat this recently may still be there, on another machine's kernel too. As the lease (architecture).
const FRESH_MS: u64 = 15_000;
/// SQLite's files beside the one with the data.
const BESIDE: [&str; 2] = ["-wal", "-shm"];

/// A backup that was made and looked at.
#[derive(Debug)]
pub struct Backup {
    pub bytes: u64,
    pub record: Record,
}

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    /// As it stands now, with the line about the restore.
    pub record: Record,
    /// Where the replaced file is; `None` where there was none.
    pub kept: Option<PathBuf>,
    /// The history that was replaced, as far as it could be read.
    pub replaced: Option<Head>,
    /// What the replaced ledger knew beyond the backup and still holds; `None` where it could not be read.
    pub remembered: Option<Remembered>,
}

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// Understood and turned down: nothing was changed.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Verify(#[from] verify::NotVerified),
}

/// Copies the ledger into a new file, and verifies the copy: not what was meant, but what was written.
pub async fn backup(settings: &Settings, to: &Path) -> Result<Backup, Failed> {
    let directory = settings.ledger_dir();
    if !directory.join(FILE).exists() {
        let what = format!(
            "there is no ledger in {}; name the configuration of the application with --config",
            directory.display()
        );
        return Err(Failed::Refused(what));
    }
    if to.symlink_metadata().is_ok() {
        return Err(Failed::Refused(format!(
            "{} exists already, and nothing is overwritten; give another name",
            to.display()
        )));
    }
    let (store, _) = assemble::open_ledger(settings).await?;
    let bytes = store.backup(to.to_path_buf()).await?;
    match looked_at(to, &settings.application).await {
        Ok(record) => Ok(Backup { bytes, record }),
        Err(failed) => {
            // A backup that cannot be restored is worse than none.
            if let Err(error) = fs::remove_file(to) {
                tracing::warn!(%error, file = %to.display(), "a backup that is not good stayed behind");
            }
            Err(failed)
        }
    }
}

/// The record in somebody's file, after everything about the file was found as it should be.
async fn looked_at(file: &Path, application: &AppName) -> Result<Record, Failed> {
    let ledger = SqliteLedger::new(Store::inspect(file.to_path_buf()).await?, application.clone());
    let Some((record, _)) = ledger.load().await? else {
        let what = format!(
            "{} holds nothing about the application {application}; see whether it is another one's backup",
            file.display()
        );
        return Err(Failed::Refused(what));
    };
    verify::history(&ledger).await?;
    Ok(Arc::unwrap_or_clone(record))
}

/// Puts a backup in the ledger's place, with a line in its history that says so.
pub async fn restore(settings: &Settings, file: &Path, actor: Actor, reason: String) -> Result<Restored, Failed> {
    // The file first: a mistake in its name needs no controller to be stopped.
    let wanted = looked_at(file, &settings.application).await?;
    let directory = settings.ledger_dir();
    make(&directory)?;
    let in_use = |fault: Fault| {
        Failed::Refused(format!(
            "the ledger is in use: {}; stop every controller of this application first",
            fault.told().what
        ))
    };
    let _held = ControllerLock::take_all(&directory).map_err(in_use)?;
    let current = directory.join(FILE);
    let replaced = replaced(settings, &current, &wanted).await?;
    let known = unforgettable(&current).await;

    let scratch = Scratch::make(&directory)?;
    let fresh = scratch.0.join(FILE);
    copy(file, &fresh)?;
    // Again, as what was copied need not be what was looked at.
    let record = looked_at(&fresh, &settings.application).await?;
    if record.installation != wanted.installation {
        return Err(Failed::Refused(format!("{} changed while it was read; try again", file.display())));
    }
    let (record, remembered) = told(settings, &scratch.0, file, actor, reason, replaced.clone(), known).await?;
    let kept = swap(&directory, &current, &fresh)?;
    Ok(Restored { record, kept, replaced, remembered })
}

/// What of the replaced file must not be forgotten. As a backup is read: whatever is wrong with it, it is in nobody's way.
async fn unforgettable(current: &Path) -> Option<Unforgettable> {
    current.symlink_metadata().ok()?;
    let known = match Store::inspect(current.to_path_buf()).await {
        Ok(store) => store.unforgettable().await,
        Err(error) => Err(error),
    };
    known
        .inspect_err(
            |error| tracing::warn!(%error, "revoked tokens and pinned tags of the replaced ledger are not known"),
        )
        .ok()
}

/// What is in the ledger's place now. Refused where it belongs to another installation, or a controller is still there.
async fn replaced(settings: &Settings, current: &Path, wanted: &Record) -> Result<Option<Head>, Failed> {
    if current.symlink_metadata().is_err() {
        return Ok(None);
    }
    let (store, ledger) = match assemble::open_ledger(settings).await {
        Ok(opened) => opened,
        // Damaged: what a restore is for. It is kept as it is.
        Err(LedgerError::Unreadable(fault)) => {
            tracing::warn!(why = %fault.told().sentence(), "the ledger that is replaced cannot be read");
            return Ok(None);
        }
        Err(other) => return Err(other.into()),
    };
    let record = match ledger.load().await {
        Ok(found) => found.map(|(record, _)| record),
        Err(LedgerError::Unreadable(fault)) => {
            tracing::warn!(why = %fault.told().sentence(), "the record that is replaced cannot be read");
            None
        }
        Err(other) => return Err(other.into()),
    };
    if let Some(record) = &record
        && record.installation != wanted.installation
    {
        return Err(Failed::Refused(format!(
            "the backup is of installation {} and the ledger of {}: containers and images of one would be nobody's; \
             name the other's configuration, or move this ledger away first",
            wanted.installation, record.installation
        )));
    }
    let now = SystemClock.now();
    let presences = ledger.presences().await?;
    if let Some(fresh) = presences.iter().find(|presence| now.0.saturating_sub(presence.at.0) < FRESH_MS as i64) {
        return Err(Failed::Refused(format!(
            "the controller {} was there less than {} s ago; stop it, wait that long, and try again",
            fresh.controller,
            FRESH_MS / 1_000
        )));
    }
    // One file, which can get another name without losing what lies beside it.
    store.fold().await?;
    Ok(record.map(|record| record.history.clone()))
}

/// Records the restore in the history that is put back.
async fn told(
    settings: &Settings,
    directory: &Path,
    file: &Path,
    actor: Actor,
    reason: String,
    replaced: Option<Head>,
    known: Option<Unforgettable>,
) -> Result<(Record, Option<Remembered>), Failed> {
    let store = Store::open(directory).await?;
    let ledger = SqliteLedger::new(store.clone(), settings.application.clone());
    let Some((record, etag)) = ledger.load().await? else {
        return Err(Failed::Refused(format!("{} holds no record", file.display())));
    };
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let event = Event::LedgerRestored { actor, reason, file: name, replaced };
    let commit = apply(&record, &event, SystemClock.now()).map_err(|refused| Failed::Refused(refused.to_string()))?;
    ledger.commit(Some(&etag), &commit.record, &commit.lines).await?;
    let remembered = match known {
        Some(known) => Some(store.remember(known).await?),
        None => None,
    };
    store.fold().await?;
    Ok((commit.record, remembered))
}

/// The new file takes the place in one step; the old one has a second name by then.
fn swap(directory: &Path, current: &Path, fresh: &Path) -> Result<Option<PathBuf>, Failed> {
    let failed = |what: &str, error: io::Error| {
        Fault::permanent(format!("{what} in {}", directory.display()))
            .because(error)
            .advice("the ledger stands as it was; see whether the directory can be written")
    };
    let mut kept = None;
    if current.symlink_metadata().is_ok() {
        let stamp = SystemClock.now().rfc3339().replace(':', "-");
        let other = |end: &str| directory.join(format!("{FILE}.replaced-{stamp}{end}"));
        fs::hard_link(current, other("")).map_err(|e| failed("the ledger could not be kept", e))?;
        // Where a damaged file was left with them. A log beside a file that it does not belong to would be played into it.
        for end in BESIDE {
            let beside = directory.join(format!("{FILE}{end}"));
            if beside.symlink_metadata().is_ok() {
                fs::rename(&beside, other(end)).map_err(|e| failed("the ledger's log could not be kept", e))?;
            }
        }
        kept = Some(other(""));
    }
    fs::rename(fresh, current).map_err(|e| failed("the backup could not be put in place", e))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| failed("the change is not sure to be on the disk", e))?;
    Ok(kept)
}

fn make(directory: &Path) -> Result<(), Fault> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| {
        Fault::permanent(format!("the directory {} cannot be made", directory.display()))
            .because(e)
            .advice("make its parent writable for this user")
    })
}

fn copy(from: &Path, to: &Path) -> Result<(), Fault> {
    let copied = || {
        let mut source = File::open(from)?;
        let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
        io::copy(&mut source, &mut target)?;
        target.sync_all()
    };
    copied().map_err(|e| {
        Fault::permanent(format!("{} cannot be copied to {}", from.display(), to.display()))
            .because(e)
            .advice("see whether there is room on the disk")
    })
}

/// A directory beside the ledger, on its disk, that is gone afterwards.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn make(directory: &Path) -> Result<Self, Fault> {
        let random = hex::encode(SystemIds.random(8));
        let path = directory.join(format!(".restore-{random}"));
        make(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, directory = %self.0.display(), "a directory that was only needed for a moment stayed behind");
        }
    }
}
