//! The file as a copy: made while it is in use, and looked at without being changed.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use replank_core::fault::Fault;
use replank_core::ports::LedgerError;
use rusqlite::{Connection, OpenFlags, params};

use super::{APPLICATION_ID, Failed, SCHEMA, Stage, Store, classify, damaged, read, write};

/// What only ever grows, and must outlive a ledger that is put back: the commit that each tag was first seen at, and which
/// tokens were revoked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unforgettable {
    /// Application, tag, commit, time.
    pins: Vec<(String, String, String, i64)>,
    /// Id and time.
    revoked: Vec<(String, i64)>,
}

/// How much of it was news to the ledger that it was told to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Remembered {
    pub pins: usize,
    pub revoked: usize,
}

impl Store {
    /// Of every application in the file.
    pub async fn unforgettable(&self) -> Result<Unforgettable, LedgerError> {
        self.call(|connection| {
            read(connection, |tx| {
                let mut pins = tx.prepare("SELECT app, tag, sha, at FROM first_seen")?;
                let pins = pins.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
                let mut revoked = tx.prepare("SELECT id, revoked_at FROM token WHERE revoked_at IS NOT NULL")?;
                let revoked = revoked.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
                Ok(Unforgettable { pins: pins.collect::<Result<_, _>>()?, revoked: revoked.collect::<Result<_, _>>()? })
            })
        })
        .await
    }

    /// Adds what is not known. What is known stays: a pin of its own is the older one.
    pub async fn remember(&self, what: Unforgettable) -> Result<Remembered, LedgerError> {
        self.call(move |connection| {
            write(connection, |tx| {
                let mut news = Remembered::default();
                let mut pin = tx.prepare(
                    "INSERT INTO first_seen (app, tag, sha, at) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                )?;
                for (app, tag, sha, at) in &what.pins {
                    news.pins += pin.execute(params![app, tag, sha, at])?;
                }
                let mut revoke = tx.prepare("UPDATE token SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL")?;
                for (id, at) in &what.revoked {
                    news.revoked += revoke.execute(params![id, at])?;
                }
                Ok(news)
            })
        })
        .await
    }

    /// Writes a consistent copy to `to`, a new file of mode 0600, while others go on reading and writing. Answers its size.
    /// `Unavailable` where the file exists or cannot be made; then nothing is left behind.
    pub async fn backup(&self, to: PathBuf) -> Result<u64, LedgerError> {
        self.call(move |connection| copy(connection, &to)).await
    }

    /// Opens somebody's copy to be read and nothing else: its schema is left as it is, and so is what lies beside it.
    /// `Unreadable` where it is no ledger, or one of a newer Replank.
    pub async fn inspect(file: PathBuf) -> Result<Self, LedgerError> {
        Self::on_thread(move || read_only(&file)).await
    }

    /// Folds everything into the one file, so that it can be moved: nothing lies beside it any more. `Unavailable` while
    /// another process has it open.
    pub async fn fold(&self) -> Result<(), LedgerError> {
        self.call(|connection| {
            let failed = |e| LedgerError::from(classify(e, Stage::Work));
            let mode: String =
                connection.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0)).map_err(failed)?;
            if mode.eq_ignore_ascii_case("delete") {
                return Ok(());
            }
            let fault = Fault::transient("another process has the ledger open");
            Err(LedgerError::Unavailable(fault.advice("stop every controller of this application, then try again")))
        })
        .await
    }
}

fn copy(connection: &Connection, to: &Path) -> Result<u64, LedgerError> {
    let place = |error: io::Error| {
        let advice = match error.kind() {
            io::ErrorKind::AlreadyExists => "it exists already: nothing is overwritten, give another name",
            _ => "choose a directory that this user may write, with room for the whole ledger",
        };
        let fault = Fault::permanent(format!("the backup {} cannot be made", to.display()));
        LedgerError::Unavailable(fault.advice(advice).because(error))
    };
    let name =
        to.file_name().and_then(|name| name.to_str()).ok_or_else(|| place(io::ErrorKind::InvalidFilename.into()))?;
    if to.symlink_metadata().is_ok() {
        return Err(place(io::ErrorKind::AlreadyExists.into()));
    }
    let mut random = [0_u8; 8];
    getrandom::fill(&mut random).map_err(|_| place(io::Error::other("no random bytes")))?;
    // Under another name until it is whole: half a backup must not be taken for one.
    let fresh = to.with_file_name(format!(".{name}.{:016x}", u64::from_ne_bytes(random)));
    let path = fresh.to_str().ok_or_else(|| place(io::ErrorKind::InvalidFilename.into()))?.to_owned();
    let made = || {
        // An empty file of ours: SQLite takes it, and its mode is right from the first byte.
        let file =
            fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&fresh).map_err(place)?;
        connection.execute("VACUUM INTO ?1", [&path]).map_err(|e| LedgerError::from(classify(e, Stage::Work)))?;
        file.sync_all().map_err(place)?;
        let bytes = file.metadata().map_err(place)?.len();
        // A link is refused where the name was taken in the meantime; a rename would not be.
        fs::hard_link(&fresh, to).map_err(place)?;
        Ok(bytes)
    };
    let made = made();
    if let Err(error) = fs::remove_file(&fresh)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, file = %fresh.display(), "a file that was only needed for a moment stayed behind");
    }
    made
}

fn read_only(file: &Path) -> Result<Connection, Failed> {
    let shown = file.display();
    let unusable = |what: String, advice: &str| Failed::Unreadable(Fault::permanent(what).advice(advice));
    let not_ours =
        || unusable(format!("{shown} is no ledger of Replank"), "name a file that `replank ledger backup` made");
    match fs::symlink_metadata(file) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(unusable(format!("{shown} is not a plain file"), "name the file itself")),
        Err(error) => {
            let fault = Fault::permanent(format!("{shown} cannot be read")).because(error);
            return Err(Failed::Unreadable(fault.advice("name a file that `replank ledger backup` made")));
        }
    }
    let mut beside = file.as_os_str().to_owned();
    beside.push("-wal");
    if Path::new(&beside).exists() {
        let advice =
            "make a backup of it with `replank ledger backup`: a copy of the file alone lacks its newest changes";
        return Err(unusable(format!("{shown} is a ledger in use, or a part of one"), advice));
    }
    let failed = |error| match classify(error, Stage::Work) {
        // Whatever SQLite has to say about a file that is not a whole database, it is not usable as a backup.
        Failed::Unavailable(fault) | Failed::Indeterminate(fault) | Failed::Unreadable(fault) => Failed::Unreadable(
            Fault::permanent(format!("{shown} is no whole ledger of Replank"))
                .because(fault.told().what)
                .advice("take another backup; this file is damaged, cut short, or something else"),
        ),
    };
    // Immutable: neither a lock nor a log is made beside somebody's file.
    let path: String = file.to_string_lossy().bytes().map(uri_byte).collect();
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(format!("file:{path}?immutable=1"), flags).map_err(failed)?;
    connection.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;").map_err(failed)?;
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(failed);
    if number("PRAGMA application_id")? != i64::from(APPLICATION_ID) {
        return Err(not_ours());
    }
    let version = number("PRAGMA user_version")?;
    if version > SCHEMA.len() as i64 {
        let what = format!("{shown} was written by a newer Replank");
        return Err(unusable(what, "use that version, or a newer one"));
    }
    // A trigger or a view would act in the ledger's name once it is in place; Replank makes neither.
    let foreign =
        "SELECT count(*) FROM sqlite_schema WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'";
    if version < 1 || number(foreign)? != 0 {
        return Err(not_ours());
    }
    let verdict: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if verdict != "ok" {
        return Err(Failed::Unreadable(damaged().because(verdict)));
    }
    Ok(connection)
}

/// A path's byte in a URI: everything but the plainest is escaped.
fn uri_byte(byte: u8) -> String {
    if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
        char::from(byte).to_string()
    } else {
        format!("%{byte:02X}")
    }
}
