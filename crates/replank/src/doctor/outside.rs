//! What is reached over the network: remote, registry, exec server, and what time they say it is.

use replank_adapters::oci::OciClient;
use replank_core::ports::{Clock as _, Source as _};
use replank_exec::client::{Client, Failed};
use replank_exec::protocol::Request;

use super::{Finding, Patient};
use crate::assemble;
use crate::config::{Builder, RegistrySettings};
use crate::system::SystemClock;

/// Certificates, tokens and budgets bear this; a drift that goes on will be seen before it hurts.
const SKEW_MS: i64 = 30_000;
/// Tokens that were issued just now are refused, and histories of two machines tell different stories.
const SKEW_MAX_MS: i64 = 5 * 60_000;

pub async fn remote(patient: Patient<'_>) -> Finding {
    let source = match assemble::source(patient.settings, patient.env, &mut Vec::new()) {
        Ok(Some(source)) => source,
        Ok(None) => {
            return Finding::warning(
                "no remote is configured, so nothing is ever discovered",
                "add `remote` to [source]",
            );
        }
        Err(fault) => return fault.into(),
    };
    match source.refs().await {
        Ok(refs) if refs.tags.is_empty() => {
            let what = format!("{} answers and has no release", source.remote());
            Finding::warning(what, "tag one as vA.B.C, such as v1.0.0")
        }
        Ok(refs) => {
            let count = crate::cli::count(refs.tags.len(), "release");
            Finding::ok(format!("{count} at {}", source.remote()))
        }
        Err(fault) => fault.into(),
    }
}

/// The git binary that clones. Where git runs at the other end of the exec channel, it is that one's affair.
pub async fn git(patient: Patient<'_>) -> Finding {
    if patient.settings.build.builder == Builder::AzExec {
        return Finding::ok("git runs at the exec server");
    }
    match assemble::source(patient.settings, patient.env, &mut Vec::new()) {
        Ok(Some(source)) => match source.check_git(&patient.settings.home).await {
            Ok(()) => Finding::ok("git is new enough"),
            Err(fault) => fault.into(),
        },
        Ok(None) => Finding::ok("no remote is configured, so git is not needed"),
        // Told by the check of the remote.
        Err(_) => {
            Finding::warning("not looked at: the remote's configuration cannot be used", "see the check of the remote")
        }
    }
}

pub async fn exec(patient: Patient<'_>) -> Finding {
    let Some(exec) = &patient.settings.exec else {
        return Finding::ok("the exec channel is not used");
    };
    let token = match assemble::secret(&exec.token, patient.env, "the exec server's token") {
        Ok(token) => token,
        Err(fault) => return fault.into(),
    };
    let client = match Client::new(&exec.url, &token) {
        Ok(client) => client,
        Err(error) => {
            return Finding::failed(
                format!("the exec server cannot be asked: {error}"),
                "set TERMINAL_EXEC_UPSTREAM to http://HOST:PORT",
            );
        }
    };
    let about = match client.about().await {
        Ok(about) => about,
        Err(error) => return Finding::failed(chain(&error), "start the exec server, and see TERMINAL_EXEC_UPSTREAM"),
    };
    // A request without a program: the token is looked at first, and then there is nothing that could be run.
    let nothing = Request { argv: Vec::new(), ..Request::default() };
    match client.run(&nothing).await {
        Err(Failed::Malformed(_) | Failed::Denied(_)) | Ok(_) => Finding::ok(format!(
            "the server at {} takes the token and runs {} programs at once",
            exec.url, about.max_concurrency
        )),
        Err(Failed::Token) => {
            Finding::failed("the exec server refuses the token", "give both the same EXEC_TOKEN, and restart both")
        }
        Err(Failed::Busy | Failed::Limited { .. }) => {
            Finding::warning("the exec server is busy, so the token was not looked at", "look again in a moment")
        }
        Err(error) => Finding::failed(chain(&error), "look at the exec server's log"),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// A client for the registry, and the repository that is pushed to.
fn pushed(patient: Patient<'_>) -> Option<Result<(OciClient, String, &RegistrySettings), Finding>> {
    let registry = patient.settings.registry.as_ref()?;
    let repository = patient.settings.components.values().next()?.repository.clone();
    let client = assemble::registries(patient.settings, &mut Vec::new()).and_then(OciClient::new);
    Some(client.map(|client| (client, repository, registry)).map_err(Finding::from))
}

pub async fn registry(patient: Patient<'_>) -> Finding {
    match pushed(patient) {
        None => Finding::ok("no registry is configured: images stay in the engine"),
        Some(Err(finding)) => finding,
        Some(Ok((_, _, registry))) if !registry.push => Finding::ok("images are not pushed: they stay in the engine"),
        Some(Ok((client, repository, registry))) => match client.try_upload(&repository).await {
            Ok(()) => Finding::ok(format!("{} takes uploads to {repository}", registry.host)),
            Err(fault) => fault.into(),
        },
    }
}

pub async fn clock(patient: Patient<'_>) -> Finding {
    let before = SystemClock.now();
    let mut asked = None;
    if let Ok(Some(source)) = assemble::source(patient.settings, patient.env, &mut Vec::new())
        && let Ok(Some(theirs)) = source.time().await
    {
        asked = Some((theirs, "the remote"));
    }
    if asked.is_none()
        && let Some(Ok((client, repository, _))) = pushed(patient)
        && let Ok(Some(theirs)) = client.time(&repository).await
    {
        asked = Some((theirs, "the registry"));
    }
    let Some((theirs, whose)) = asked else {
        return Finding::warning(
            "neither remote nor registry says what time it is",
            "see that this machine's clock is kept by NTP",
        );
    };
    let after = SystemClock.now();
    // Their answer was made somewhere in between, and is given in whole seconds.
    let ahead = before.0 - theirs.0 - 1_000;
    let behind = theirs.0 - after.0;
    let (skew, word) = if ahead > behind { (ahead, "ahead of") } else { (behind, "behind") };
    let told = format!("this machine's clock is {} s {word} {whose}'s", skew.max(0) / 1_000);
    let advice = "let NTP keep this machine's clock (timedatectl set-ntp true)";
    if skew > SKEW_MAX_MS {
        Finding::failed(told, advice)
    } else if skew > SKEW_MS {
        Finding::warning(told, advice)
    } else {
        Finding::ok(format!("this machine's clock agrees with {whose}'s"))
    }
}
