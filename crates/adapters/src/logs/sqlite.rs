//! Build logs in the SQLite file: chunks that are written once and never changed.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use replank_core::fault::Fault;
use replank_core::ports::{LogChunk, LogError, LogId, LogStore, LogWriter};
use rusqlite::{OptionalExtension as _, Transaction, params};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::sqlite::{Stop, Store, int, read, uint, write};

/// Contract §4: at most 3 MiB per append.
pub const APPEND_MAX: usize = 3 * 1024 * 1024;

/// One answer, whatever was asked for, so that a follower costs a bounded amount of memory.
const READ_MAX: usize = 4 * 1024 * 1024;

/// How often a follower looks for what another process wrote; in this process it is woken at once.
const POLL_EVERY: Duration = Duration::from_millis(200);

/// How long `changed` waits before it lets the caller look for itself (the port's bound).
const PATIENCE: Duration = Duration::from_secs(1);

type Step<T> = Result<T, Stop<LogError>>;

#[derive(Debug, Clone)]
pub struct SqliteLogs {
    store: Store,
    /// Beats with every change that this process makes to any log.
    pulse: Arc<watch::Sender<()>>,
}

/// A log's row.
struct Row {
    id: i64,
    fence: i64,
    closed: bool,
    length: i64,
}

fn row(tx: &Transaction<'_>, id: &LogId) -> Step<Option<Row>> {
    let select = "SELECT id, fence, closed, length FROM log WHERE job = ?1 AND component = ?2";
    let found = tx.query_row(select, [id.job.as_str(), id.component.as_str()], |row| {
        Ok(Row { id: row.get(0)?, fence: row.get(1)?, closed: row.get(2)?, length: row.get(3)? })
    });
    Ok(found.optional()?)
}

fn add(tx: &Transaction<'_>, log: i64, offset: i64, bytes: &[u8]) -> Step<()> {
    if !bytes.is_empty() {
        tx.execute("INSERT INTO log_chunk (log, offset, bytes) VALUES (?1, ?2, ?3)", params![log, offset, bytes])?;
        tx.execute("UPDATE log SET length = ?2 WHERE id = ?1", params![log, offset + int(bytes.len() as u64)])?;
    }
    Ok(())
}

/// The log of a writer that still has the right to it.
fn own(tx: &Transaction<'_>, writer: &LogWriter) -> Step<Row> {
    match row(tx, &writer.id)? {
        Some(row) if uint(row.fence) == writer.fence && !row.closed => Ok(row),
        // Another attempt began, this one was closed, or the log was pruned away: it is no longer this writer's.
        Some(_) | None => Err(Stop::Refused(LogError::Fenced)),
    }
}

fn check_size(bytes: &[u8]) -> Result<(), LogError> {
    if bytes.len() <= APPEND_MAX {
        return Ok(());
    }
    let what = format!("an append of {} bytes is over the limit of {APPEND_MAX}", bytes.len());
    Err(LogError::Unavailable(Fault::permanent(what).advice("this is a defect of Replank: report it")))
}

impl SqliteLogs {
    pub fn new(store: Store) -> Self {
        Self { store, pulse: Arc::new(watch::Sender::new(())) }
    }

    async fn write<T: Send + 'static>(
        &self,
        body: impl FnOnce(&Transaction<'_>) -> Step<T> + Send + 'static,
    ) -> Result<T, LogError> {
        let done = self.store.call(move |connection| write(connection, body)).await;
        // Also after a failure: it may have been written, and a needless look costs microseconds.
        self.pulse.send_replace(());
        done
    }

    async fn read_tx<T: Send + 'static>(
        &self,
        body: impl FnOnce(&Transaction<'_>) -> Step<T> + Send + 'static,
    ) -> Result<T, LogError> {
        self.store.call(move |connection| read(connection, body)).await
    }
}

#[async_trait]
impl LogStore for SqliteLogs {
    async fn begin(&self, id: &LogId, marker: &[u8]) -> Result<LogWriter, LogError> {
        check_size(marker)?;
        let (id, marker) = (id.clone(), marker.to_vec());
        self.write(move |tx| {
            tx.execute(
                "INSERT INTO log (job, component, fence, closed, length) VALUES (?1, ?2, 1, 0, 0)
                 ON CONFLICT (job, component) DO UPDATE SET fence = fence + 1, closed = 0",
                [id.job.as_str(), id.component.as_str()],
            )?;
            let Some(row) = row(tx, &id)? else { return Err(Stop::Sql(rusqlite::Error::QueryReturnedNoRows)) };
            add(tx, row.id, row.length, &marker)?;
            Ok(LogWriter { fence: uint(row.fence), offset: uint(row.length) + marker.len() as u64, id })
        })
        .await
    }

    async fn append(&self, writer: &mut LogWriter, bytes: &[u8]) -> Result<(), LogError> {
        check_size(bytes)?;
        let (now, bytes) = (writer.clone(), bytes.to_vec());
        writer.offset = self
            .write(move |tx| {
                let row = own(tx, &now)?;
                if uint(row.length) != now.offset {
                    return Err(Stop::Refused(LogError::Offset { actual: uint(row.length) }));
                }
                add(tx, row.id, row.length, &bytes)?;
                Ok(now.offset + bytes.len() as u64)
            })
            .await?;
        Ok(())
    }

    async fn close(&self, writer: &LogWriter) -> Result<(), LogError> {
        let writer = writer.clone();
        self.write(move |tx| {
            match row(tx, &writer.id)? {
                // Closing twice is closing once.
                Some(row) if uint(row.fence) == writer.fence => {
                    tx.execute("UPDATE log SET closed = 1 WHERE id = ?1", [row.id])?;
                    Ok(())
                }
                Some(_) | None => Err(Stop::Refused(LogError::Fenced)),
            }
        })
        .await
    }

    async fn read(&self, id: &LogId, from: u64, max: usize) -> Result<Option<LogChunk>, LogError> {
        let id = id.clone();
        let max = max.min(READ_MAX);
        self.read_tx(move |tx| {
            let Some(row) = row(tx, &id)? else { return Ok(None) };
            let mut bytes = Vec::new();
            if from < uint(row.length) {
                let mut select = tx.prepare(
                    "SELECT offset, bytes FROM log_chunk WHERE log = ?1 AND offset >=
                         (SELECT max(offset) FROM log_chunk WHERE log = ?1 AND offset <= ?2)
                     ORDER BY offset",
                )?;
                let mut rows = select.query(params![row.id, int(from)])?;
                while bytes.len() < max {
                    let Some(chunk) = rows.next()? else { break };
                    let stored = chunk.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
                    let skip = usize::try_from(from.saturating_sub(uint(chunk.get(0)?))).unwrap_or(usize::MAX);
                    let fresh = stored.get(skip..).unwrap_or_default();
                    bytes.extend_from_slice(&fresh[..fresh.len().min(max - bytes.len())]);
                }
            }
            let next = from + bytes.len() as u64;
            Ok(Some(LogChunk { bytes, next, closed: row.closed && next >= uint(row.length) }))
        })
        .await
    }

    /// Each job is a transaction of its own, so that nobody waits long.
    async fn prune(&self, keep_jobs: usize) -> Result<usize, LogError> {
        let keep = int(keep_jobs as u64);
        let jobs: Vec<String> = self
            .read_tx(move |tx| {
                let mut select =
                    tx.prepare("SELECT job FROM log GROUP BY job ORDER BY max(id) DESC LIMIT -1 OFFSET ?1")?;
                let jobs = select.query_map([keep], |row| row.get(0))?;
                Ok(jobs.collect::<Result<_, _>>()?)
            })
            .await?;
        for job in &jobs {
            let job = job.clone();
            // The chunks go with their log (ON DELETE CASCADE).
            self.write(move |tx| Ok(tx.execute("DELETE FROM log WHERE job = ?1", [job])?)).await?;
        }
        Ok(jobs.len())
    }

    async fn changed(&self, id: &LogId, from: u64) -> Result<(), LogError> {
        let until = Instant::now() + PATIENCE;
        // Armed before the look, so that a change between the two is not missed.
        let mut pulse = self.pulse.subscribe();
        loop {
            let id = id.clone();
            let news = self
                .read_tx(move |tx| Ok(row(tx, &id)?.is_some_and(|row| uint(row.length) > from || row.closed)))
                .await?;
            let now = Instant::now();
            if news || now >= until {
                return Ok(());
            }
            tokio::select! {
                // Fails only when every sender is gone, and one lives in `self`.
                _ = pulse.changed() => {}
                () = tokio::time::sleep_until((now + POLL_EVERY).min(until)) => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "sqlite_tests.rs"]
mod tests;
