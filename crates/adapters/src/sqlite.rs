//! The one SQLite file: where it may lie, how it is opened, and the one thread that owns the connection.

mod backup;
mod whole;

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use replank_core::fault::{Class, Fault};
use replank_core::ports::{LedgerError, LogError};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

pub use backup::{Remembered, Unforgettable};

/// The file's name inside its directory. The directory is what is mounted: `-wal` and `-shm` lie beside the file.
pub const FILE: &str = "replank.db";

/// "Rplk" in the file's header: how a file of ours is told from somebody else's database.
const APPLICATION_ID: i32 = 0x5270_6c6b;

/// Requests waiting for the connection. More than the controller has tasks; beyond it callers wait their turn.
const QUEUE: usize = 64;

/// How long a statement waits for another process before it gives up. A commit holds the lock for milliseconds; well
/// above that, and below the 15 s after which a silent driver loses its turn.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// The WAL file is cut back to this after a checkpoint, so that one burst of logs does not occupy the disk for ever.
const WAL_KEPT_BYTES: i64 = 64 * 1024 * 1024;

/// Each step adds and never changes or removes: an older controller goes on using a newer file. A new column must have a
/// default, and rows are updated in place, never replaced, so that columns that this build does not know survive.
const SCHEMA: &[&str] = &[
    "
CREATE TABLE record (
    app TEXT NOT NULL PRIMARY KEY, version INTEGER NOT NULL, format INTEGER NOT NULL, min_reader INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE TABLE history (
    app TEXT NOT NULL, seq INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (app, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE presence (
    app TEXT NOT NULL, controller TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (app, controller)
) STRICT;
CREATE TABLE first_seen (
    app TEXT NOT NULL, tag TEXT NOT NULL, sha TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (app, tag)
) STRICT;
CREATE TABLE token (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, last_used_at INTEGER
) STRICT;
CREATE UNIQUE INDEX token_name ON token (name) WHERE revoked_at IS NULL;
CREATE TABLE refusal (id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL) STRICT;
CREATE TABLE log (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, component TEXT NOT NULL, fence INTEGER NOT NULL,
    closed INTEGER NOT NULL, length INTEGER NOT NULL, UNIQUE (job, component)
) STRICT;
CREATE TABLE log_chunk (
    log INTEGER NOT NULL REFERENCES log (id) ON DELETE CASCADE, offset INTEGER NOT NULL, bytes BLOB NOT NULL,
    UNIQUE (log, offset)
) STRICT;
",
    "
CREATE TABLE cursor (
    app TEXT NOT NULL, reader TEXT NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (app, reader)
) STRICT;
",
];

/// Tables whose pages are checked when the file is opened: small ones that decisions depend on, and not the logs.
const CHECKED: &[&str] = &["record", "history", "presence", "first_seen", "token"];

/// Why a request failed, before it is put into a port's own error.
#[derive(Debug)]
pub(crate) enum Failed {
    Unavailable(Fault),
    Indeterminate(Fault),
    Unreadable(Fault),
}

impl From<Failed> for LedgerError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Unavailable(fault) => Self::Unavailable(fault),
            Failed::Indeterminate(fault) => Self::Indeterminate(fault),
            Failed::Unreadable(fault) => Self::Unreadable(fault),
        }
    }
}

impl From<Failed> for LogError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Unavailable(fault) | Failed::Unreadable(fault) => Self::Unavailable(fault),
            Failed::Indeterminate(fault) => Self::Indeterminate(fault),
        }
    }
}

/// How the body of a transaction ends when it does not end well; either way nothing is written.
#[derive(Debug)]
pub(crate) enum Stop<E> {
    Sql(rusqlite::Error),
    Refused(E),
}

impl<E> From<rusqlite::Error> for Stop<E> {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

type Work = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle on the open file. Cheap to clone; the connection closes when the last clone is gone.
#[derive(Debug, Clone)]
pub struct Store {
    requests: mpsc::Sender<Work>,
}

impl Store {
    /// Opens `replank.db` in `directory`, and makes both where they are missing (0700 and 0600).
    ///
    /// `Unavailable` where the place or the moment is wrong, `Unreadable` where the file is damaged or not ours; such a
    /// file is left as it is.
    pub async fn open(directory: impl Into<PathBuf>) -> Result<Self, LedgerError> {
        let directory = directory.into();
        Self::on_thread(move || open(&directory)).await
    }

    /// A connection that `open` makes, on a thread of its own.
    async fn on_thread(
        open: impl FnOnce() -> Result<Connection, Failed> + Send + 'static,
    ) -> Result<Self, LedgerError> {
        let (requests, mut inbox) = mpsc::channel::<Work>(QUEUE);
        let (ready, opened) = oneshot::channel();
        let spawned = std::thread::Builder::new().name("replank-sqlite".to_owned()).spawn(move || {
            let mut connection = match open() {
                Ok(connection) => connection,
                // Nobody waits any more: then nobody needs the error either.
                Err(failed) => return drop(ready.send(Err(failed))),
            };
            if ready.send(Ok(())).is_err() {
                return;
            }
            while let Some(work) = inbox.blocking_recv() {
                work(&mut connection);
            }
        });
        if let Err(error) = spawned {
            let fault = Fault::transient("the ledger's thread could not be started").because(error);
            return Err(LedgerError::Unavailable(fault.advice("raise the limit on processes of this container")));
        }
        opened.await.map_err(|_| LedgerError::from(gone()))??;
        Ok(Self { requests })
    }

    /// Runs `work` on the connection's thread. A caller that goes away does not undo what it asked for.
    pub(crate) async fn call<T, E>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Failed> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |connection| drop(answer.send(work(connection))));
        self.requests.send(work).await.map_err(|_| E::from(gone()))?;
        match answered.await {
            Ok(result) => result,
            Err(_) => Err(E::from(Failed::Indeterminate(
                Fault::indeterminate("the ledger's thread ended in the middle of a request")
                    .advice("restart this controller; the file itself is consistent"),
            ))),
        }
    }
}

fn gone() -> Failed {
    let fault = Fault::permanent("the ledger's thread has ended");
    Failed::Unavailable(fault.advice("restart this controller; the file itself is consistent"))
}

/// One transaction that takes the write lock at once, so that what it reads stays true until it commits.
pub(crate) fn write<T, E: From<Failed>>(
    connection: &mut Connection,
    body: impl FnOnce(&Transaction<'_>) -> Result<T, Stop<E>>,
) -> Result<T, E> {
    let sql = |error, stage| E::from(classify(error, stage));
    let transaction =
        connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(|e| sql(e, Stage::Work))?;
    let out = match body(&transaction) {
        Ok(out) => out,
        Err(Stop::Sql(error)) => return Err(sql(error, Stage::Work)),
        Err(Stop::Refused(refused)) => return Err(refused),
    };
    transaction.commit().map_err(|e| sql(e, Stage::Commit))?;
    Ok(out)
}

/// One consistent look. Short: a reader that stays keeps the WAL from being folded back into the file.
pub(crate) fn read<T, E: From<Failed>>(
    connection: &mut Connection,
    body: impl FnOnce(&Transaction<'_>) -> Result<T, Stop<E>>,
) -> Result<T, E> {
    let sql = |error| E::from(classify(error, Stage::Work));
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred).map_err(sql)?;
    match body(&transaction) {
        Ok(out) => Ok(out),
        Err(Stop::Sql(error)) => Err(sql(error)),
        Err(Stop::Refused(refused)) => Err(refused),
    }
}

/// SQLite's integers are signed; nothing that is counted here comes near the limit.
pub(crate) fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The way back from [`int`]; what is stored is never negative.
pub(crate) fn uint(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

// --- Opening ---------------------------------------------------------------------------------------------------

fn open(directory: &Path) -> Result<Connection, Failed> {
    let place = |what: String, error: io::Error| Failed::Unavailable(misplaced(what, error));
    let shown = directory.display();
    if !directory.exists() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|e| place(format!("the ledger's directory {shown} could not be made"), e))?;
    }
    check_place(directory).map_err(Failed::Unavailable)?;
    let file = directory.join(FILE);
    match fs::symlink_metadata(&file) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => {
            let fault = Fault::permanent(format!("{} is not a plain file", file.display()));
            return Err(Failed::Unreadable(
                fault.advice("mount the ledger's directory, not the file, and remove what lies in the file's place"),
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create(directory, &file).map_err(|e| place(format!("{} could not be made", file.display()), e))?;
        }
        Err(error) => return Err(place(format!("{} could not be looked at", file.display()), error)),
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let failed = |e| classify(e, Stage::Work);
    let mut connection = Connection::open_with_flags(&file, flags).map_err(failed)?;
    connection.busy_handler(Some(patience())).map_err(failed)?;
    prepare(&mut connection, &file)?;
    Ok(connection)
}

fn misplaced(what: String, error: io::Error) -> Fault {
    Fault::permanent(what)
        .because(error)
        .advice("give the controller a directory of its own that it may write, and mount the directory, not the file")
}

/// Permanent where a ledger cannot lie in this directory, which exists: locks do not hold on network file systems.
pub fn check_place(directory: &Path) -> Result<(), Fault> {
    let shown = directory.display();
    let stat = rustix::fs::statfs(directory)
        .map_err(|e| misplaced(format!("the file system of {shown} could not be asked for its type"), e.into()))?;
    // The kernel's magic numbers are 32 bits wide; some architectures sign-extend them.
    let Some(name) = network_file_system((stat.f_type as u64 & 0xffff_ffff) as u32) else { return Ok(()) };
    let fault = Fault::permanent(format!("the ledger's directory {shown} lies on {name}"));
    Err(fault.advice(
        "SQLite's locks and shared memory do not hold there: use a directory on a local disk, or a named volume of the \
         container engine",
    ))
}

/// Puts an empty file of mode 0600 in place, if none is there. The file proper is never opened here: closing any
/// descriptor of it would drop the locks that another connection of this process holds on it.
fn create(directory: &Path, file: &Path) -> io::Result<()> {
    let mut random = [0u8; 8];
    getrandom::fill(&mut random).map_err(|_| io::Error::other("no random bytes"))?;
    let fresh = directory.join(format!(".{FILE}.{:016x}", u64::from_ne_bytes(random)));
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?.flush()?;
    let linked = match fs::hard_link(&fresh, file) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    fs::remove_file(&fresh)?;
    linked
}

/// Checks that the file is ours and whole, sets the connection up and brings the schema up to this build's.
fn prepare(connection: &mut Connection, file: &Path) -> Result<(), Failed> {
    let failed = |e| classify(e, Stage::Work);
    let number = |c: &Connection, sql: &str| c.query_row(sql, [], |row| row.get::<_, i64>(0));
    // Reads only, so that a file that is not ours is not touched.
    let application = number(connection, "PRAGMA application_id").map_err(failed)?;
    let objects = number(connection, "SELECT count(*) FROM sqlite_schema").map_err(failed)?;
    if application != i64::from(APPLICATION_ID) && (application != 0 || objects != 0) {
        let fault = Fault::permanent(format!("{} is a database of another program", file.display()));
        return Err(Failed::Unreadable(
            fault.advice("give Replank a directory of its own; the file was left as it is"),
        ));
    }
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(failed)?;
    if !mode.eq_ignore_ascii_case("wal") {
        let fault = Fault::permanent(format!("the file system of {} cannot hold a write-ahead log", file.display()));
        return Err(Failed::Unavailable(fault.advice("use a directory on a local disk with shared memory maps")));
    }
    connection
        .execute_batch(&format!(
            "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA journal_size_limit = {WAL_KEPT_BYTES};
             PRAGMA trusted_schema = OFF;"
        ))
        .map_err(failed)?;
    if number(connection, "PRAGMA user_version").map_err(failed)? < SCHEMA.len() as i64 {
        write(connection, |tx| {
            // Another process may have been faster: look again under the lock.
            let version = number(tx, "PRAGMA user_version")?;
            for (step, sql) in SCHEMA.iter().enumerate().skip(usize::try_from(version).unwrap_or(0)) {
                tx.execute_batch(sql)?;
                tx.pragma_update(None, "user_version", step as i64 + 1)?;
            }
            tx.pragma_update(None, "application_id", APPLICATION_ID)?;
            Ok::<_, Stop<Failed>>(())
        })?;
    }
    for table in CHECKED {
        let verdict: String =
            connection.query_row(&format!("PRAGMA quick_check({table})"), [], |row| row.get(0)).map_err(failed)?;
        if verdict != "ok" {
            return Err(Failed::Unreadable(damaged().because(verdict)));
        }
    }
    Ok(())
}

/// Waits for another process in short, uneven steps. SQLite's own handler sleeps up to 100 ms at a time, and a process
/// that commits without a pause then starves the others for seconds.
fn patience() -> impl FnMut(i32) -> bool + Send + 'static {
    let mut since = Instant::now();
    move |count| {
        if count == 0 {
            since = Instant::now();
        }
        let waited = since.elapsed();
        if waited >= BUSY_MAX {
            return false;
        }
        let uneven = u64::from(waited.subsec_nanos() % 5);
        std::thread::sleep(Duration::from_micros(200 + 300 * (uneven + u64::from(count.unsigned_abs().min(10)))));
        true
    }
}

/// File systems on which POSIX locks or shared memory maps do not hold between hosts or between containers, by the
/// kernel's magic number (linux/magic.h and statfs(2)).
fn network_file_system(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x0000_6969 => "NFS",
        0x0000_517b => "SMB",
        0xff53_4d42 => "CIFS",
        0xfe53_4d42 => "SMB2",
        0x0102_1997 => "9p (a directory shared from the host of a virtual machine)",
        0x6573_5546 => "FUSE (sshfs, a cloud bucket, or a directory shared from a desktop's own disk)",
        0x00c3_6400 => "Ceph",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0000_564c => "NCP",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x2003_0528 => "OrangeFS",
        0x786f_4256 => "a VirtualBox shared folder",
        0xbacb_acbc => "a VMware shared folder",
        _ => return None,
    })
}

// --- Errors ----------------------------------------------------------------------------------------------------

/// Where in a transaction an error came: before `COMMIT` nothing can have been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Work,
    Commit,
}

fn damaged() -> Fault {
    Fault::permanent("the ledger's file is damaged").advice(
        "stop every controller, move the directory's files aside and restore them from a backup; the damaged file was left \
         as it is",
    )
}

/// The one place where SQLite's errors get their meaning: by code, never by text.
fn classify(error: rusqlite::Error, stage: Stage) -> Failed {
    use rusqlite::Error as E;
    let code = match &error {
        E::SqliteFailure(inner, _) => inner.code,
        E::SqlInputError { error: inner, .. } => inner.code,
        // What is stored is not what this build's columns hold.
        E::FromSqlConversionFailure(..)
        | E::IntegralValueOutOfRange(..)
        | E::Utf8Error(..)
        | E::InvalidColumnType(..)
        | E::QueryReturnedNoRows
        | E::QueryReturnedMoreThanOneRow => return Failed::Unreadable(damaged().because(error)),
        // The rest is misuse of the library. The enum may grow, so there is no way to name them all.
        _ => return defect(error),
    };
    let unavailable = |class, what: &str, advice: &str| Failed::Unavailable(Fault::new(class, what).advice(advice));
    match code {
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => unavailable(
            Class::Transient,
            &format!("another process has held the ledger for more than {} s", BUSY_MAX.as_secs()),
            "look for a stopped controller or a shell with an open transaction on replank.db",
        ),
        ErrorCode::DiskFull => unavailable(
            Class::Transient,
            "the disk that holds the ledger is full; nothing was written and nothing is lost",
            "free space on the file system of the ledger's directory",
        ),
        ErrorCode::SystemIoFailure if stage == Stage::Commit => Failed::Indeterminate(
            Fault::indeterminate("the disk failed while the ledger was written")
                .advice("look at the kernel's log for this disk")
                .because(error),
        ),
        ErrorCode::SystemIoFailure => Failed::Unavailable(
            Fault::transient("the disk that holds the ledger failed; nothing was written")
                .advice("look for a full disk, and at the kernel's log for this disk")
                .because(error),
        ),
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Failed::Unreadable(damaged().because(error)),
        ErrorCode::ReadOnly
        | ErrorCode::PermissionDenied
        | ErrorCode::CannotOpen
        | ErrorCode::AuthorizationForStatementDenied => Failed::Unavailable(
            Fault::permanent("the ledger's file cannot be opened for writing")
                .advice("mount the directory read-write and let this controller's user own it and the files in it")
                .because(error),
        ),
        ErrorCode::OutOfMemory
        | ErrorCode::OperationInterrupted
        | ErrorCode::OperationAborted
        | ErrorCode::SchemaChanged
        | ErrorCode::FileLockingProtocolFailed => {
            Failed::Unavailable(Fault::transient("the ledger could not be used just now").because(error))
        }
        ErrorCode::InternalMalfunction
        | ErrorCode::NotFound
        | ErrorCode::TooBig
        | ErrorCode::ConstraintViolation
        | ErrorCode::TypeMismatch
        | ErrorCode::ApiMisuse
        | ErrorCode::NoLargeFileSupport
        | ErrorCode::ParameterOutOfRange
        | ErrorCode::Unknown => defect(error),
        // The library's enum may grow; an unknown code at COMMIT says nothing about the outcome.
        _ if stage == Stage::Commit => {
            Failed::Indeterminate(Fault::indeterminate("the ledger gave an unknown answer").because(error))
        }
        _ => defect(error),
    }
}

fn defect(error: rusqlite::Error) -> Failed {
    Failed::Unavailable(
        Fault::permanent("the ledger refused a request of ours")
            .advice("this is a defect of Replank or a file changed by hand: report it with this text")
            .because(error),
    )
}

#[cfg(test)]
#[path = "sqlite_tests.rs"]
mod tests;
