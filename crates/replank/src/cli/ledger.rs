//! `replank ledger` as it is typed, and what it tells.

use std::path::PathBuf;

use clap::Subcommand;
use replank_core::ports::LedgerError;
use replank_core::record::Record;
use serde_json::json;

use super::commands::{Done, Run};
use super::failure::{Code, Failure};
use super::{Reason, show, tokens};
use crate::ledger_file::{self, Failed};
use crate::plain;
use replank_adapters::sqlite::Remembered;

#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// Copy the ledger into a new file, while it is in use, and verify the copy.
    ///
    /// The copy holds everything: record, history, build logs, and the hashes of tokens. It is readable by its owner alone.
    #[command(after_help = "Example: replank ledger backup /backup/shop-$(date +%F).db")]
    Backup {
        /// New file; nothing is overwritten
        file: PathBuf,
    },
    /// Put a backup in the ledger's place. Every controller must be stopped.
    ///
    /// The backup is verified before anything is touched: that it is whole, of this application and installation, readable by
    /// this Replank, and its history consistent with its anchor. What it replaces is kept beside it, and the history says who
    /// restored what, and why. Tokens that were revoked since the backup stay revoked, and tags that were seen since then stay
    /// pinned to their commits, as long as the replaced ledger can be read; else look at `replank token list`.
    #[command(
        after_help = "Example:\n  docker stop $(docker ps -q --filter name=-controller)\n  replank ledger restore /backup/shop-2026-01-31.db --reason \"the disk failed\""
    )]
    Restore {
        /// A file that `replank ledger backup` made
        file: PathBuf,
        #[command(flatten)]
        why: Reason,
    },
}

impl Run<'_> {
    pub(super) async fn ledger(&self, command: LedgerCommand) -> Done {
        let settings = self.settings()?;
        match command {
            LedgerCommand::Backup { file } => {
                let file = absolute(file)?;
                let made = ledger_file::backup(&settings, &file).await.map_err(failure)?;
                let shown = json!({ "file": file, "bytes": made.bytes, "history": made.record.history, "state": made.record.phase.state().name() });
                self.print(&shown, |out, _| {
                    writeln!(out, "{}: {} bytes, {}", file.display(), made.bytes, head(&made.record))
                })
            }
            LedgerCommand::Restore { file, why } => {
                let file = absolute(file)?;
                let (actor, reason) = (tokens::local_actor(self.env), why.reason.unwrap_or_default());
                tokens::check_reason(&reason)?;
                let done = ledger_file::restore(&settings, &file, actor, reason).await.map_err(failure)?;
                let state = done.record.phase.state();
                let shown = json!({ "file": file, "history": done.record.history, "state": state.name(),
                    "kept": done.kept, "replaced": done.replaced,
                    "still_revoked": done.remembered.map(|news| news.revoked),
                    "still_pinned": done.remembered.map(|news| news.pins) });
                self.print(&shown, |out, _| {
                    writeln!(out, "restored from {}: {}", file.display(), head(&done.record))?;
                    if let Some(kept) = &done.kept {
                        writeln!(out, "what it replaced is kept as {}", kept.display())?;
                    }
                    if let Some(replaced) = &done.replaced {
                        let lost = replaced.count.saturating_sub(done.record.history.count.saturating_sub(1));
                        if lost > 0 {
                            let count = show::count(usize::try_from(lost).unwrap_or(usize::MAX), "event");
                            writeln!(out, "{count} since the backup are only in the file that was replaced")?;
                        }
                    }
                    if state.in_flight() {
                        writeln!(
                            out,
                            "a job is in flight in it ({}): it goes on when a controller starts",
                            state.name()
                        )?;
                    }
                    match done.remembered {
                        Some(Remembered { pins: 0, revoked: 0 }) => Ok(()),
                        Some(Remembered { pins, revoked }) => {
                            let (tokens, tags) = (show::count(revoked, "token"), show::count(pins, "tag"));
                            writeln!(out, "{tokens} revoked and {tags} seen since the backup: they stay revoked, and pinned")
                        }
                        None => writeln!(
                            out,
                            "what it replaced cannot be read: tokens that were revoked since the backup open again, so look at \
                             `replank token list`"
                        ),
                    }
                })
            }
        }
    }
}

fn absolute(file: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&file)
        .map_err(|e| Failure::usage(format!("{} cannot be used: {e}; name a file", file.display())))
}

fn head(record: &Record) -> String {
    let count = show::count(usize::try_from(record.history.count).unwrap_or(usize::MAX), "event");
    match &record.history.hash {
        Some(hash) => format!("{count}, consistent with anchor {hash}"),
        None => count,
    }
}

fn failure(failed: Failed) -> Failure {
    match failed {
        Failed::Refused(why) => Failure::new(Code::Refused, plain::line(&why, false)),
        Failed::Verify(broken @ crate::verify::NotVerified::Broken(_)) => {
            Failure::new(Code::Failed, broken.to_string())
        }
        Failed::Verify(crate::verify::NotVerified::Ledger(error)) | Failed::Ledger(error) => ledger(error),
        Failed::Fault(fault) => Failure::from(anyhow::Error::new(fault)),
    }
}

fn ledger(error: LedgerError) -> Failure {
    Failure::from(anyhow::Error::new(error))
}
