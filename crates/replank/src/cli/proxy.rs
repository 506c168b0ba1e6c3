//! `replank proxy`: the process, and its own upgrade, as they are typed.

use std::time::Duration;

use clap::{Args, Subcommand};
use replank_adapters::platform::docker::{DRAIN_MAX, Mended};
use serde_json::json;

use super::commands::{Done, Run};
use super::failure::{Code, Failure};
use super::{Reason, tokens};
use crate::plain;
use crate::proxy::ProxyArgs;
use crate::proxy_upgrade::{self, Failed};

/// Requests of usual length end within this, and a stream that does not end costs everybody else no more.
const DRAIN_SECONDS: u64 = 5;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Proxy {
    #[command(subcommand)]
    pub command: Option<ProxyCommand>,
    #[command(flatten)]
    pub run: Option<ProxyArgs>,
}

#[derive(Debug, Subcommand)]
pub enum ProxyCommand {
    /// Replace the proxy by one of another image, on the same ports and with the same routes. Needs the engine and the
    /// ledger, not the service; refused while an upgrade of the application is in flight.
    ///
    /// The image is tried first, on a copy of configuration and routes. Then the old proxy takes no more connections, ends
    /// what is open, and the new one takes its ports: for that long, usually well below two seconds, new connections are
    /// refused, and the command says how long it was. A new proxy that does not serve is taken away again, and the old one
    /// comes back. Killed in the middle, it is brought to its end by a controller, by its next run, and by nobody after a
    /// reboot, which one of the two proxies survives at every moment.
    #[command(
        after_help = "Examples:\n  replank proxy upgrade                         to this very program, or [proxy] image\n  docker exec CONTROLLER replank proxy upgrade  to the program of the running controller\n  replank proxy upgrade --image replank:1.4.0 --reason \"a fix\""
    )]
    Upgrade(Upgrade),
}

#[derive(Debug, Args)]
pub struct Upgrade {
    /// Image that the engine has, whose entry point is `replank` [default: [proxy] image, or made from this program]
    #[arg(long)]
    image: Option<String>,
    /// How long open requests get to end, 0 to 9; new connections wait for them
    #[arg(long, value_name = "SECONDS", default_value_t = DRAIN_SECONDS, value_parser = clap::value_parser!(u64).range(0..=DRAIN_MAX.as_secs()))]
    drain: u64,
    #[command(flatten)]
    why: Reason,
}

impl Run<'_> {
    pub(super) async fn proxy(&self, command: ProxyCommand) -> Done {
        let ProxyCommand::Upgrade(Upgrade { image, drain, why }) = command;
        let settings = self.settings()?;
        let (actor, reason) = (tokens::local_actor(self.env), why.reason.unwrap_or_default());
        tokens::check_reason(&reason)?;
        let done = proxy_upgrade::upgrade(&settings, image, Duration::from_secs(drain), actor, reason).await;
        let done = done.map_err(|failed| match failed {
            Failed::Refused(why) => Failure::new(Code::Refused, plain::line(&why, false)),
            Failed::Other(error) => Failure::from(error),
        })?;
        let mended = done.mended.map(|mended| match mended {
            Mended::Finished => "finished",
            Mended::Restored => "restored",
        });
        let gap = done.renewed.gap.map(|gap| u64::try_from(gap.as_millis()).unwrap_or(u64::MAX));
        let shown = json!({ "image": done.image, "from": done.renewed.from, "to": done.renewed.to,
            "changed": gap.is_some(), "gap_ms": gap, "earlier": mended });
        self.print(&shown, |out, _| {
            if let Some(mended) = mended {
                writeln!(out, "an earlier upgrade was cut short, and was {mended} first")?;
            }
            writeln!(out, "the proxy runs {}: {}", done.image, proxy_upgrade::in_words(&done.renewed))
        })
    }
}
