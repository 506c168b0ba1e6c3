//! What was refused, as it is written down (`replank history --refusals`), whichever face it was asked through.

use replank_core::mask::mask_sentence;
use replank_core::ports::{Refusal, Tokens};
use replank_core::words::Millis;

/// Longest method and path, or command, that are written down with a refusal.
const ACTION_MAX: usize = 128;
/// Longest reason that is: it may repeat some of what was asked for.
const WHY_MAX: usize = 500;

/// Who asked, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub at: Millis,
    pub actor: &'a str,
    pub from: &'a str,
    pub action: &'a str,
}

/// Never fails the answer that it belongs to.
pub async fn write_down(store: &dyn Tokens, asked: Asked<'_>, why: &str) {
    let refusal = Refusal {
        at: asked.at,
        actor: asked.actor.to_owned(),
        from: asked.from.to_owned(),
        action: mask_sentence(asked.action, ACTION_MAX),
        why: mask_sentence(why, WHY_MAX),
    };
    if let Err(error) = store.refused(&refusal).await {
        tracing::warn!(%error, action = %refusal.action, why, "a refusal was not written down");
    }
}
