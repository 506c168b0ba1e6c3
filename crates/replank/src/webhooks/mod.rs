//! Webhooks: the driver tells others what the history says, signed, at least once, and never in the way of the loop.
//!
//! The history is the queue. Each hook has a cursor in the ledger: how many lines it has done with. So nothing is lost by a crash,
//! and whoever drives next goes on where this one stopped. A hook that hangs holds up nobody but itself.

mod message;
mod send;
mod sign;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use replank_core::phase::{Confirming, Phase};
use replank_core::ports::{Clock, Cursor, Cursors, Ledger, LedgerError};
use replank_core::record::{ControllerId, Record};
use replank_core::words::{Digest, Millis};
use replank_exec::outbound::{Reach, Resolver};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use crate::config::WebhookEvent as Event;
use crate::engine::api::Live;
use message::Message;
use send::Outcome;
pub use sign::{Secret, signature};

/// Lines looked at in one go.
const PAGE: usize = 100;
/// A burst of changes is looked at once.
const SETTLE: Duration = Duration::from_millis(200);

/// One configured receiver.
#[derive(Debug, Clone)]
pub struct Hook {
    pub url: url::Url,
    pub secret: Secret,
    pub events: BTreeSet<Event>,
    pub reach: Reach,
}

impl Hook {
    /// The cursor's name: another URL is another reader. The URL itself may hold a token, so it is not stored.
    fn reader(&self) -> String {
        format!("webhook {}", Digest::of(self.url.as_str().as_bytes()))
    }

    /// What may be shown of it.
    fn shown(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }
}

/// How often and for how long. The defaults are for production; tests make them small.
#[derive(Debug, Clone)]
pub struct Pace {
    /// How long one attempt may take, from the name's resolution to the answer's head.
    pub attempt: Duration,
    /// Wait after the first failure; it doubles with each further one.
    pub first: Duration,
    pub longest: Duration,
    /// What could not be told for this long is not told any more.
    pub give_up_ms: u64,
    /// How often is looked without being woken.
    pub poll: Duration,
    /// How long before its end the closing of a confirm window is told; half of a window that is shorter than twice this.
    pub closing_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(10),
            first: Duration::from_secs(5),
            longest: Duration::from_secs(600),
            give_up_ms: 24 * 3_600 * 1_000,
            poll: Duration::from_secs(5),
            closing_ms: 60_000,
        }
    }
}

/// Everything that delivery needs.
#[derive(Debug, Clone)]
pub struct Courier {
    pub ledger: Arc<dyn Ledger>,
    pub cursors: Arc<dyn Cursors>,
    pub clock: Arc<dyn Clock>,
    pub resolver: Arc<dyn Resolver>,
    /// Only the driver tells, so that two controllers rarely say the same thing.
    pub me: ControllerId,
    pub live: watch::Receiver<Live>,
    pub pace: Pace,
}

/// What a round came to.
enum Round {
    /// Nothing is left to tell before this time, or before something changes.
    Done(Option<Millis>),
    Failed,
}

impl Courier {
    /// Delivers for ever. Dropping the future ends it; what was under way is told again by whoever comes next.
    pub async fn run(self, hooks: Vec<Hook>) {
        let mut tasks = JoinSet::new();
        for hook in hooks {
            tasks.spawn(self.clone().serve(hook));
        }
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a webhook's delivery ended in a defect");
            }
        }
    }

    async fn serve(mut self, hook: Hook) {
        let mut failures = 0;
        loop {
            let until = match self.round(&hook).await {
                Ok(Round::Done(until)) => {
                    failures = 0;
                    until
                }
                Ok(Round::Failed) => {
                    let wait = self.pace.first * 2_u32.saturating_pow(failures);
                    failures = (failures + 1).min(16);
                    tokio::time::sleep(wait.min(self.pace.longest)).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(error = %crate::engine::describe(&error), "webhooks wait for the ledger");
                    tokio::time::sleep(self.pace.poll).await;
                    continue;
                }
            };
            let left = until.map(|at| Duration::from_millis(at.since(self.clock.now())));
            let wait = left.unwrap_or(self.pace.poll).clamp(SETTLE, self.pace.poll.max(SETTLE));
            // An error means that the engine is gone, and then this task is too in a moment.
            if let Ok(Ok(())) = tokio::time::timeout(wait, self.live.changed()).await {
                tokio::time::sleep(SETTLE).await;
            }
        }
    }

    async fn round(&self, hook: &Hook) -> Result<Round, LedgerError> {
        let Some((record, _)) = self.ledger.load().await? else { return Ok(Round::Done(None)) };
        if record.driver.controller != self.me {
            return Ok(Round::Done(None));
        }
        let reader = hook.reader();
        let mut cursor = match self.cursors.cursor(&reader).await? {
            Some(cursor) => cursor,
            // A new receiver is told what happens from now on.
            None => {
                let cursor = Cursor { seq: record.history.count, closing: String::new() };
                self.cursors.keep_cursor(&reader, &cursor).await?;
                cursor
            }
        };
        while cursor.seq < record.history.count {
            let page = self.ledger.history(cursor.seq, PAGE).await?;
            if page.is_empty() {
                break;
            }
            for line in page {
                for message in Message::of_line(&record, &line, hook) {
                    let message = message.with_start(self.ledger.as_ref(), line.seq).await?;
                    if !self.tell(hook, &message).await {
                        self.cursors.keep_cursor(&reader, &cursor).await?;
                        return Ok(Round::Failed);
                    }
                }
                cursor.seq = line.seq + 1;
            }
            self.cursors.keep_cursor(&reader, &cursor).await?;
        }
        self.closing(hook, &record, &mut cursor).await
    }

    /// A confirm window that ends soon: no line of the history, since nothing has happened yet.
    async fn closing(&self, hook: &Hook, record: &Record, cursor: &mut Cursor) -> Result<Round, LedgerError> {
        let Phase::Confirming(Confirming { deadline: Some(deadline), flip: None, .. }) = &record.phase else {
            return Ok(Round::Done(None));
        };
        let job = record.job.as_ref().map(|job| job.id.to_string()).unwrap_or_default();
        if !hook.events.contains(&Event::ConfirmWindowClosing) || cursor.closing == job {
            return Ok(Round::Done(None));
        }
        let lead = self.pace.closing_ms.min(deadline.since(record.entered_at) / 2);
        let due = Millis(deadline.0.saturating_sub(i64::try_from(lead).unwrap_or(i64::MAX)));
        if self.clock.now() < due {
            return Ok(Round::Done(Some(due)));
        }
        if !self.tell(hook, &Message::closing(record, *deadline, hook)).await {
            return Ok(Round::Failed);
        }
        cursor.closing = job;
        self.cursors.keep_cursor(&hook.reader(), cursor).await?;
        Ok(Round::Done(None))
    }

    /// One attempt. True where there is nothing more to do: told, or never to be told.
    async fn tell(&self, hook: &Hook, message: &Message) -> bool {
        let (now, event) = (self.clock.now(), message.event.name());
        let sent = send::post(hook, message, now, self.resolver.as_ref());
        let outcome = match tokio::time::timeout(self.pace.attempt, sent).await {
            Ok(outcome) => outcome,
            Err(_) => Outcome::Failed(format!("there was no answer within {:?}", self.pace.attempt)),
        };
        match outcome {
            Outcome::Taken => {
                tracing::info!(host = hook.shown(), event, id = message.id, "a webhook was told");
                true
            }
            Outcome::Gone => {
                tracing::error!(
                    host = hook.shown(),
                    event,
                    "a webhook's receiver is gone (410); take it out of [[webhooks]]"
                );
                true
            }
            Outcome::Failed(why) if now.since(message.at) > self.pace.give_up_ms => {
                tracing::error!(
                    host = hook.shown(),
                    event,
                    why,
                    "a webhook could not be told, and is not tried any more"
                );
                true
            }
            Outcome::Failed(why) => {
                tracing::warn!(host = hook.shown(), event, why, "a webhook could not be told; it is tried again");
                false
            }
        }
    }
}
