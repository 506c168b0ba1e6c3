//! `replank proxy upgrade`, and what a controller does about one that was cut short. What is done stands in the history: before
//! it is done, and what came of it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use replank_adapters::platform::docker::{DockerPlatform, Mended, Renewed, Vantage};
use replank_core::event::{Event, ProxyStep};
use replank_core::fault::Fault;
use replank_core::ports::{Clock as _, Ledger, LedgerError};
use replank_core::record::{Actor, ControllerId, Record};
use replank_core::transition::{Refused, apply};

use crate::assemble;
use crate::config::Settings;
use crate::system::SystemClock;

/// How often a controller looks whether an upgrade was cut short: one look at one file's name.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A commit that loses this many races in a row meets more than a busy engine.
const RACES_MAX: u32 = 50;

/// Why the proxy is what it was.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// Understood and turned down: nothing was changed.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self::Other(fault.into())
    }
}

/// What was done.
#[derive(Debug)]
pub struct Done {
    /// The image, as it was named.
    pub image: String,
    pub renewed: Renewed,
    /// What became of an earlier upgrade that was cut short.
    pub mended: Option<Mended>,
}

/// Replaces the proxy by one of `image`: without one, what the configuration says, or this very program.
pub async fn upgrade(
    settings: &Settings,
    image: Option<String>,
    drain: Duration,
    actor: Actor,
    reason: String,
) -> Result<Done, Failed> {
    if !settings.platform.runs {
        return Err(Failed::Refused(
            "this configuration runs nothing, so that there is no proxy to upgrade".to_owned(),
        ));
    }
    let (_, ledger) = assemble::open_ledger(settings).await.map_err(anyhow::Error::from)?;
    let Some((record, _)) = ledger.load().await.map_err(anyhow::Error::from)? else {
        return Err(Failed::Refused("nothing is deployed here; run `replank deploy` first".to_owned()));
    };
    if record.phase.state().in_flight() {
        return Err(in_flight(&Refused::InFlight { from: record.phase.state() }));
    }
    let vantage = match assemble::me(settings)? {
        ControllerId::Host => Vantage::Host,
        ControllerId::Revision(revision) => Vantage::Inside(revision),
    };
    let platform = DockerPlatform::new(settings.docker(record.installation.clone()), vantage, Arc::new(SystemClock))?;
    let image = match image.or_else(|| settings.platform.proxy.image.clone()) {
        Some(image) => image,
        None => {
            let binary = std::env::current_exe().context("the path of this program is not known")?;
            platform.proxy_image(&binary).await?
        }
    };
    let (mut renewal, mended) = platform.proxy_upgrade().await?;
    if let Some(mended) = mended {
        note(ledger.as_ref(), &told(mended)).await?;
    }
    let event = |step, outcome: String| Event::ProxyUpgraded {
        actor: actor.clone(),
        reason: reason.clone(),
        step,
        image: image.clone(),
        outcome,
    };
    // From here on a job may start again, and waits with its first change of the platform.
    let record = note(ledger.as_ref(), &event(ProxyStep::Begun, String::new())).await?;
    let outcome = renewal.run(&image, record.running.as_ref(), drain).await;
    let last = match &outcome {
        Ok(renewed) => event(ProxyStep::Done, in_words(renewed)),
        Err(fault) => event(ProxyStep::Failed, fault.told().what),
    };
    let noted = note(ledger.as_ref(), &last).await;
    renewal.finish()?;
    let renewed = outcome?;
    noted?;
    Ok(Done { image, renewed, mended })
}

/// What an upgrade came to, for the history and for people.
pub fn in_words(renewed: &Renewed) -> String {
    match renewed.gap {
        Some(gap) => format!("no connection was taken for {} ms", gap.as_millis()),
        None => "it ran this image already".to_owned(),
    }
}

/// Brings upgrades to their end that were cut short, for as long as it is polled.
pub async fn look_after(platform: Arc<DockerPlatform>, ledger: Arc<dyn Ledger>) {
    loop {
        match platform.mend_proxy().await {
            Ok(None) => {}
            Ok(Some(mended)) => {
                tracing::warn!(?mended, "an upgrade of the proxy was cut short, and is brought to its end");
                if let Err(error) = note(ledger.as_ref(), &told(mended)).await {
                    tracing::error!(%error, "the history cannot tell of it");
                }
            }
            Err(fault) => {
                tracing::error!(error = %fault.chain(), "an upgrade of the proxy was cut short and cannot be brought to its end");
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn told(mended: Mended) -> Event {
    let (step, outcome) = match mended {
        Mended::Finished => (ProxyStep::Finished, "an upgrade was cut short: the new proxy serves"),
        Mended::Restored => (ProxyStep::Restored, "an upgrade was cut short: the old proxy serves"),
    };
    let (actor, outcome) = (Actor::system(), outcome.to_owned());
    Event::ProxyUpgraded { actor, reason: String::new(), step, image: String::new(), outcome }
}

fn in_flight(refused: &Refused) -> Failed {
    Failed::Refused(format!("{refused}; the proxy is upgraded at rest alone"))
}

async fn note(ledger: &dyn Ledger, event: &Event) -> Result<Record, Failed> {
    for _ in 0..RACES_MAX {
        let loaded = ledger.load().await.map_err(anyhow::Error::from)?;
        let (record, etag) = loaded.context("the application has no record")?;
        let commit = apply(&record, event, SystemClock.now()).map_err(|refused| in_flight(&refused))?;
        match ledger.commit(Some(&etag), &commit.record, &commit.lines).await {
            Ok(_) => return Ok(commit.record),
            // Said twice is better than not at all: an unknown outcome is tried again.
            Err(LedgerError::Conflict | LedgerError::Indeterminate(_)) => {}
            Err(error) => return Err(anyhow::Error::from(error).into()),
        }
    }
    Err(Failed::Refused("the record changes faster than this command can follow; try again".to_owned()))
}
