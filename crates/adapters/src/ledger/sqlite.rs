//! Record, history, presence, pinned tags and tokens in the SQLite file.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use replank_core::fault::Fault;
use replank_core::format::{self, FORMAT, FormatError};
use replank_core::history::Line;
use replank_core::ports::{
    Cursor, Cursors, Etag, Ledger, LedgerError, Presence, REFUSALS_KEPT, Refusal, Role, Token, Tokens,
};
use replank_core::record::{ControllerId, Record};
use replank_core::words::{AppName, CommitSha, Digest, Millis};
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};

use crate::sqlite::{Stop, Store, int, read, uint, write};

/// A record beyond this is a defect: a whole job with its plan is some tens of kilobytes.
const RECORD_MAX: usize = 16 * 1024 * 1024;

/// Lines given in one answer, whatever was asked for: some megabytes.
const HISTORY_PAGE_MAX: usize = 10_000;

/// A token's last use is written at most this often, so that reading does not cost a write each time.
const USED_EVERY_MS: i64 = 60_000;

type Step<T> = Result<T, Stop<LedgerError>>;

/// The ledger of one application in a file that may hold several.
#[derive(Debug, Clone)]
pub struct SqliteLedger {
    store: Store,
    app: AppName,
}

impl SqliteLedger {
    pub fn new(store: Store, app: AppName) -> Self {
        Self { store, app }
    }

    async fn write<T: Send + 'static>(
        &self,
        body: impl FnOnce(&Transaction<'_>, &str) -> Step<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let app = self.app.clone();
        self.store.call(move |connection| write(connection, |tx| body(tx, app.as_str()))).await
    }

    async fn read<T: Send + 'static>(
        &self,
        body: impl FnOnce(&Transaction<'_>, &str) -> Step<T> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let app = self.app.clone();
        self.store.call(move |connection: &mut Connection| read(connection, |tx| body(tx, app.as_str()))).await
    }
}

fn unreadable(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LedgerError {
    LedgerError::Unreadable(Fault::permanent(what).because(source).advice(
        "it was changed by hand or by another program: restore the ledger's directory from a backup; nothing was written",
    ))
}

fn too_new(error: FormatError) -> LedgerError {
    match error {
        FormatError::TooNew { .. } => LedgerError::Unreadable(
            Fault::permanent("the record was written by a newer Replank")
                .because(error)
                .advice("start the newer Replank again; nothing was written"),
        ),
        FormatError::Corrupt(_) => unreadable("the stored record is not a record", error),
    }
}

fn stop<T>(error: LedgerError) -> Step<T> {
    Err(Stop::Refused(error))
}

#[async_trait]
impl Ledger for SqliteLedger {
    async fn load(&self) -> Result<Option<(Arc<Record>, Etag)>, LedgerError> {
        let row = self
            .read(|tx, app| {
                let found = tx
                    .prepare_cached("SELECT version, body FROM record WHERE app = ?1")?
                    .query_row([app], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?)))
                    .optional()?;
                Ok(found)
            })
            .await?;
        match row {
            None => Ok(None),
            Some((version, body)) => {
                let record = Arc::new(format::read(&body).map_err(too_new)?);
                Ok(Some((record, Etag(version.to_string()))))
            }
        }
    }

    async fn version(&self) -> Result<Option<Etag>, LedgerError> {
        let version = self
            .read(|tx, app| {
                let found =
                    tx.query_row("SELECT version FROM record WHERE app = ?1", [app], |row| row.get::<_, i64>(0));
                Ok(found.optional()?)
            })
            .await?;
        Ok(version.map(|version| Etag(version.to_string())))
    }

    async fn commit(&self, expected: Option<&Etag>, record: &Record, lines: &[Line]) -> Result<Etag, LedgerError> {
        let defect = |what: &str| {
            LedgerError::Unavailable(Fault::permanent(what).advice("this is a defect of Replank: report it"))
        };
        let body = format::write(record).map_err(|e| match e {
            FormatError::TooNew { .. } | FormatError::Corrupt(_) => defect("the record has no stored form"),
        })?;
        if body.len() > RECORD_MAX {
            return Err(defect("the record is larger than any record can be"));
        }
        let expected = match expected.map(|etag| etag.0.parse::<i64>()) {
            None => None,
            Some(Ok(version)) => Some(version),
            // Not an etag of ours, so not the stored one either.
            Some(Err(_)) => return Err(LedgerError::Conflict),
        };
        let (format, own_min_reader) = (record.format, record.min_reader);
        let lines = lines.to_vec();
        self.write(move |tx, app| {
            // In one look; there is a row even where nothing is stored yet.
            let (stored, min_reader, end) = tx
                .prepare_cached(
                    "SELECT r.version, r.min_reader, (SELECT coalesce(max(seq) + 1, 0) FROM history WHERE app = ?1)
                     FROM (SELECT 1) LEFT JOIN record r ON r.app = ?1",
                )?
                .query_row([app], |row| {
                    Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<u32>>(1)?, row.get::<_, i64>(2)?))
                })?;
            if stored != expected {
                return stop(LedgerError::Conflict);
            }
            if let Some(min_reader) = min_reader
                && let Err(error) = format::is_readable(min_reader, FORMAT)
            {
                return stop(too_new(error));
            }
            let mut insert = tx.prepare_cached("INSERT INTO history (app, seq, bytes) VALUES (?1, ?2, ?3)")?;
            for (line, seq) in lines.iter().zip(end..) {
                if line.seq != uint(seq) {
                    return stop(LedgerError::Conflict);
                }
                insert.execute(params![app, seq, line.bytes])?;
            }
            let version = expected.unwrap_or(0) + 1;
            // Updated in place: a newer controller's columns keep their values.
            let put = match expected {
                Some(_) => "UPDATE record SET version = ?2, format = ?3, min_reader = ?4, body = ?5 WHERE app = ?1",
                None => "INSERT INTO record (app, version, format, min_reader, body) VALUES (?1, ?2, ?3, ?4, ?5)",
            };
            tx.prepare_cached(put)?.execute(params![app, version, format, own_min_reader, body])?;
            Ok(Etag(version.to_string()))
        })
        .await
    }

    async fn history(&self, from: u64, limit: usize) -> Result<Vec<Line>, LedgerError> {
        let limit = limit.min(HISTORY_PAGE_MAX) as i64;
        self.read(move |tx, app| {
            let mut select =
                tx.prepare("SELECT seq, bytes FROM history WHERE app = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3")?;
            let lines = select.query_map(params![app, int(from), limit], |row| {
                Ok(Line { seq: uint(row.get(0)?), bytes: row.get(1)? })
            })?;
            Ok(lines.collect::<Result<_, _>>()?)
        })
        .await
    }

    async fn beat(&self, presence: &Presence) -> Result<(), LedgerError> {
        let controller = presence.controller.to_string();
        let body = serde_json::to_vec(presence).map_err(|e| unreadable("the heartbeat has no stored form", e))?;
        self.write(move |tx, app| {
            tx.execute(
                "INSERT INTO presence (app, controller, body) VALUES (?1, ?2, ?3)
                 ON CONFLICT (app, controller) DO UPDATE SET body = excluded.body",
                params![app, controller, body],
            )?;
            Ok(())
        })
        .await
    }

    async fn presences(&self) -> Result<Vec<Presence>, LedgerError> {
        let bodies: Vec<Vec<u8>> = self
            .read(|tx, app| {
                let mut select = tx.prepare("SELECT body FROM presence WHERE app = ?1 ORDER BY controller")?;
                let bodies = select.query_map([app], |row| row.get(0))?;
                Ok(bodies.collect::<Result<_, _>>()?)
            })
            .await?;
        let parse = |body: &Vec<u8>| serde_json::from_slice(body);
        bodies.iter().map(parse).collect::<Result<_, _>>().map_err(|e| unreadable("a stored heartbeat is not one", e))
    }

    async fn forget(&self, controller: &ControllerId) -> Result<(), LedgerError> {
        let controller = controller.to_string();
        self.write(move |tx, app| {
            tx.execute("DELETE FROM presence WHERE app = ?1 AND controller = ?2", params![app, controller])?;
            Ok(())
        })
        .await
    }

    async fn first_seen(
        &self,
        tags: &[(String, CommitSha)],
        now: Millis,
    ) -> Result<BTreeMap<String, CommitSha>, LedgerError> {
        fn pinned(tx: &Transaction<'_>, app: &str, tags: &[(String, CommitSha)]) -> Step<BTreeMap<String, String>> {
            let mut select = tx.prepare("SELECT sha FROM first_seen WHERE app = ?1 AND tag = ?2")?;
            let mut found = BTreeMap::new();
            for (tag, _) in tags {
                if let Some(sha) = select.query_row([app, tag.as_str()], |row| row.get(0)).optional()? {
                    found.insert(tag.clone(), sha);
                }
            }
            Ok(found)
        }
        let wanted = tags.to_vec();
        // Nearly always all are known, and then nobody has to wait for the write lock.
        let mut found = self.read(move |tx, app| pinned(tx, app, &wanted)).await?;
        if tags.iter().any(|(tag, _)| !found.contains_key(tag)) {
            let wanted = tags.to_vec();
            found = self
                .write(move |tx, app| {
                    let mut insert = tx.prepare(
                        "INSERT INTO first_seen (app, tag, sha, at) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                    )?;
                    for (tag, sha) in &wanted {
                        insert.execute(params![app, tag, sha.as_str(), now.0])?;
                    }
                    pinned(tx, app, &wanted)
                })
                .await?;
        }
        let parse = |(tag, sha): (String, String)| CommitSha::new(sha).map(|sha| (tag, sha));
        found.into_iter().map(parse).collect::<Result<_, _>>().map_err(|e| unreadable("a pinned commit is not one", e))
    }
}

#[async_trait]
impl Cursors for SqliteLedger {
    async fn cursor(&self, reader: &str) -> Result<Option<Cursor>, LedgerError> {
        let reader = reader.to_owned();
        let body: Option<Vec<u8>> = self
            .read(move |tx, app| {
                let mut select = tx.prepare("SELECT body FROM cursor WHERE app = ?1 AND reader = ?2")?;
                Ok(select.query_row([app, reader.as_str()], |row| row.get(0)).optional()?)
            })
            .await?;
        let parse = |body: Vec<u8>| serde_json::from_slice(&body);
        body.map(parse).transpose().map_err(|e| unreadable("a stored cursor is not one", e))
    }

    async fn keep_cursor(&self, reader: &str, cursor: &Cursor) -> Result<(), LedgerError> {
        let (reader, seq) = (reader.to_owned(), int(cursor.seq));
        let body = serde_json::to_vec(cursor).map_err(|e| unreadable("the cursor has no stored form", e))?;
        self.write(move |tx, app| {
            tx.execute(
                "INSERT INTO cursor (app, reader, seq, body) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (app, reader) DO UPDATE SET seq = excluded.seq, body = excluded.body
                 WHERE excluded.seq >= cursor.seq",
                params![app, reader, seq, body],
            )?;
            Ok(())
        })
        .await
    }
}

const TOKEN_COLUMNS: &str = "id, name, role, hash, created_at, expires_at, revoked_at, last_used_at";

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Reader => "reader",
        Role::Admin => "admin",
    }
}

fn token(row: &Row<'_>) -> rusqlite::Result<Result<Token, LedgerError>> {
    let role: String = row.get(2)?;
    let role = match role.as_str() {
        "reader" => Role::Reader,
        "admin" => Role::Admin,
        // A role of a newer Replank: never guess what it may do.
        _ => return Ok(Err(unreadable("a stored token has an unknown role", role))),
    };
    let hash = match Digest::new(row.get::<_, String>(3)?) {
        Ok(hash) => hash,
        Err(error) => return Ok(Err(unreadable("a stored token's hash is not one", error))),
    };
    let millis = |column| row.get::<_, Option<i64>>(column).map(|at| at.map(Millis));
    Ok(Ok(Token {
        id: row.get(0)?,
        name: row.get(1)?,
        role,
        hash,
        created_at: Millis(row.get(4)?),
        expires_at: millis(5)?,
        revoked_at: millis(6)?,
        last_used_at: millis(7)?,
    }))
}

#[async_trait]
impl Tokens for SqliteLedger {
    async fn add(&self, token: &Token) -> Result<(), LedgerError> {
        let token = token.clone();
        self.write(move |tx, _| {
            let clash = "SELECT 1 FROM token WHERE (name = ?1 AND revoked_at IS NULL) OR id = ?2 OR hash = ?3";
            let keys = params![token.name, token.id, token.hash.as_str()];
            if tx.query_row(clash, keys, |_| Ok(())).optional()?.is_some() {
                return stop(LedgerError::Conflict);
            }
            let millis = |at: Option<Millis>| at.map(|at| at.0);
            tx.execute(
                &format!("INSERT INTO token ({TOKEN_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"),
                params![
                    token.id,
                    token.name,
                    role_name(token.role),
                    token.hash.as_str(),
                    token.created_at.0,
                    millis(token.expires_at),
                    millis(token.revoked_at),
                    millis(token.last_used_at),
                ],
            )?;
            Ok(())
        })
        .await
    }

    async fn by_hash(&self, hash: &Digest) -> Result<Option<Token>, LedgerError> {
        let hash = hash.clone();
        self.read(move |tx, _| {
            let select = format!("SELECT {TOKEN_COLUMNS} FROM token WHERE hash = ?1");
            match tx.prepare_cached(&select)?.query_row([hash.as_str()], token).optional()? {
                None => Ok(None),
                Some(Ok(found)) => Ok(Some(found)),
                Some(Err(error)) => stop(error),
            }
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Token>, LedgerError> {
        self.read(|tx, _| {
            let mut select = tx.prepare(&format!("SELECT {TOKEN_COLUMNS} FROM token ORDER BY created_at, id"))?;
            let rows: Vec<_> = select.query_map([], token)?.collect::<Result<_, _>>()?;
            rows.into_iter().collect::<Result<_, _>>().map_err(Stop::Refused)
        })
        .await
    }

    async fn revoke(&self, name: &str, at: Millis) -> Result<bool, LedgerError> {
        let name = name.to_owned();
        self.write(move |tx, _| {
            let revoke = "UPDATE token SET revoked_at = ?2 WHERE name = ?1 AND revoked_at IS NULL";
            Ok(tx.execute(revoke, params![name, at.0])? > 0)
        })
        .await
    }

    async fn used(&self, id: &str, at: Millis) -> Result<(), LedgerError> {
        let (id, before) = (id.to_owned(), at.0.saturating_sub(USED_EVERY_MS));
        let which = "id = ?1 AND (last_used_at IS NULL OR last_used_at <= ?2)";
        let due = {
            let id = id.clone();
            self.read(move |tx, _| {
                let select = format!("SELECT 1 FROM token WHERE {which}");
                Ok(tx.query_row(&select, params![id, before], |_| Ok(())).optional()?.is_some())
            })
            .await?
        };
        if !due {
            return Ok(());
        }
        self.write(move |tx, _| {
            tx.execute(&format!("UPDATE token SET last_used_at = ?3 WHERE {which}"), params![id, before, at.0])?;
            Ok(())
        })
        .await
    }

    async fn refused(&self, refusal: &Refusal) -> Result<(), LedgerError> {
        let body = serde_json::to_vec(refusal).map_err(|e| unreadable("the refusal has no stored form", e))?;
        self.write(move |tx, _| {
            tx.execute("INSERT INTO refusal (body) VALUES (?1)", [body])?;
            // Ids grow by one, so the newest ones are those above the last id less what is kept.
            tx.execute("DELETE FROM refusal WHERE id <= ?1", [tx.last_insert_rowid() - REFUSALS_KEPT as i64])?;
            Ok(())
        })
        .await
    }

    /// The newest `limit`, oldest of them first.
    async fn refusals(&self, limit: usize) -> Result<Vec<Refusal>, LedgerError> {
        let limit = limit.min(REFUSALS_KEPT) as i64;
        let bodies: Vec<Vec<u8>> = self
            .read(move |tx, _| {
                let mut select = tx.prepare("SELECT body FROM refusal ORDER BY id DESC LIMIT ?1")?;
                let bodies = select.query_map([limit], |row| row.get(0))?;
                Ok(bodies.collect::<Result<_, _>>()?)
            })
            .await?;
        let parse = |body: &Vec<u8>| serde_json::from_slice(body);
        let parsed = bodies.iter().rev().map(parse).collect::<Result<_, _>>();
        parsed.map_err(|e| unreadable("a stored refusal is not one", e))
    }
}

#[cfg(test)]
#[path = "sqlite_tests.rs"]
mod tests;
