//! One signed request under the outbound rule: resolved once, every address judged, pinned, no redirect followed, no body read.

use std::net::{IpAddr, SocketAddr};

use http::StatusCode;
use replank_core::words::Millis;
use replank_exec::outbound::{self, Kind, RESOLVE_TIME, Resolver};

use super::message::Message;
use super::{Hook, signature};

pub enum Outcome {
    Taken,
    /// The receiver says that it never wants to hear again.
    Gone,
    /// To be tried again, and why.
    Failed(String),
}

pub async fn post(hook: &Hook, message: &Message, now: Millis, resolver: &dyn Resolver) -> Outcome {
    let addresses = match addresses(hook, resolver).await {
        Ok(addresses) => addresses,
        Err(why) => return Outcome::Failed(why),
    };
    let client = match client(hook, &addresses) {
        Ok(client) => client,
        Err(error) => return Outcome::Failed(format!("no HTTP client could be made: {error}")),
    };
    let (body, time) = (message.body(), now.0.div_euclid(1_000));
    let request = client
        .post(hook.url.clone())
        .header("content-type", "application/json")
        .header("webhook-id", &message.id)
        .header("webhook-timestamp", time)
        .header("webhook-signature", signature(&hook.secret, &message.id, time, &body))
        .body(body);
    match request.send().await.map(|response| response.status()) {
        Ok(status) if status.is_success() => Outcome::Taken,
        Ok(StatusCode::GONE) => Outcome::Gone,
        Ok(status) if status.is_redirection() => {
            Outcome::Failed(format!("it answered {status}, and redirects are not followed; configure where it leads"))
        }
        Ok(status) => Outcome::Failed(format!("it answered {status}")),
        Err(error) => {
            // The URL may hold a token.
            let error = anyhow::Error::new(error.without_url());
            Outcome::Failed(format!("it cannot be reached: {}", error.root_cause()))
        }
    }
}

/// Where the hook's host is now, judged.
async fn addresses(hook: &Hook, resolver: &dyn Resolver) -> Result<Vec<SocketAddr>, String> {
    let host = hook.url.host_str().unwrap_or_default();
    let port = hook.url.port_or_known_default().unwrap_or(443);
    let answers = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => {
            outbound::admit_name(host, hook.reach).map_err(|refused| refused.to_string())?;
            match tokio::time::timeout(RESOLVE_TIME, resolver.resolve(host, port)).await {
                Ok(Ok(answers)) => answers,
                Ok(Err(error)) => return Err(format!("its host cannot be resolved: {error}")),
                Err(_) => return Err(format!("its host was not resolved within {RESOLVE_TIME:?}")),
            }
        }
    };
    let judged = outbound::admit_all(host, answers, hook.reach).map_err(|refused| refused.to_string())?;
    let is_local = judged.iter().all(|address| outbound::kind(address.ip()) == Kind::Loopback);
    if hook.url.scheme() != "https" && !is_local {
        return Err("http is for this machine only; use https".to_owned());
    }
    Ok(judged)
}

/// Made anew for each request, as the pinned addresses are its own.
fn client(hook: &Hook, addresses: &[SocketAddr]) -> reqwest::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        // A proxy would resolve the name again, by itself.
        .no_proxy()
        .user_agent(concat!("replank/", env!("CARGO_PKG_VERSION")))
        .pool_max_idle_per_host(0)
        .resolve_to_addrs(hook.url.host_str().unwrap_or_default(), addresses);
    if hook.url.scheme() == "http" {
        // No certificates are needed, and a small image has none to load.
        builder = builder.tls_certs_only([]);
    }
    builder.build()
}
