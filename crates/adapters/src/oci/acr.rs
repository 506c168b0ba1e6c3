//! Signing in to an Azure container registry as the machine: the platform's identity endpoint gives a token for the registry
//! service, which the registry exchanges for one of its own.

use std::collections::HashMap;

use http::StatusCode;
use replank_core::fault::{Class, Fault};
use reqwest::{Client, Response, Url};
use serde::Deserialize;

use super::{Place, read};

/// The audience of the data plane.
const RESOURCE: &str = "https://containerregistry.azure.net";
const IDENTITY_VERSION: &str = "2019-08-01";
/// Tokens are a few KiB.
const ANSWER_MAX: usize = 256 << 10;

/// The machine's identity, as Container Apps offers it by the variables `IDENTITY_ENDPOINT` and `IDENTITY_HEADER`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineIdentity {
    /// Which of several identities; the only one where absent.
    pub client_id: Option<String>,
    /// Endpoint and header, for who knows better than the environment.
    pub endpoint: Option<(String, String)>,
}

impl MachineIdentity {
    /// The header rotates, so the environment is read each time. `None` where it offers no identity.
    fn offered(&self) -> Option<(String, String)> {
        self.endpoint
            .clone()
            .or_else(|| Some((std::env::var("IDENTITY_ENDPOINT").ok()?, std::env::var("IDENTITY_HEADER").ok()?)))
    }
}

#[derive(Deserialize)]
struct Tokens {
    access_token: Option<String>,
    refresh_token: Option<String>,
}

impl MachineIdentity {
    /// The value of an `Authorization` header for `scope`; `None` where there is no identity.
    pub(super) async fn authorize(
        &self,
        plain: &Client,
        registry: &Client,
        place: &Place,
        service: &str,
        scope: &str,
    ) -> Result<Option<String>, Fault> {
        let Some((endpoint, header)) = self.offered() else { return Ok(None) };
        let entra = self.entra(plain, &endpoint, &header).await?;
        let exchange =
            [("grant_type", "access_token"), ("service", service), ("tenant", ""), ("access_token", entra.as_str())];
        let refresh = post(registry, place, "oauth2/exchange", &exchange).await?.refresh_token;
        let refresh = refresh.ok_or_else(|| nothing(place, "it exchanges no token"))?;
        let ask = [
            ("grant_type", "refresh_token"),
            ("service", service),
            ("scope", scope),
            ("refresh_token", refresh.as_str()),
        ];
        let access = post(registry, place, "oauth2/token", &ask).await?.access_token;
        access.map(|token| Some(format!("Bearer {token}"))).ok_or_else(|| nothing(place, "it gives no access token"))
    }

    async fn entra(&self, client: &Client, endpoint: &str, header: &str) -> Result<String, Fault> {
        let advice = "check that a managed identity is assigned to the app, and AZURE_CLIENT_ID where it has several";
        let bad = |why: &str| Fault::permanent(format!("the machine's identity gives no token: {why}")).advice(advice);
        let mut url = Url::parse(endpoint).map_err(|_| bad("IDENTITY_ENDPOINT is no URL"))?;
        url.query_pairs_mut().append_pair("resource", RESOURCE).append_pair("api-version", IDENTITY_VERSION);
        if let Some(id) = &self.client_id {
            url.query_pairs_mut().append_pair("client_id", id);
        }
        let asked = client.get(url).header("X-IDENTITY-HEADER", header).send().await;
        // Right after a container's start the endpoint may refuse connections (azure-container-apps 568).
        let unreachable = || Fault::transient("the machine's identity endpoint cannot be reached").advice(advice);
        let answer = asked.map_err(|e| unreachable().because(e.without_url()))?;
        let status = answer.status();
        if !status.is_success() {
            return Err(Fault { class: class(status), ..bad(&format!("its endpoint answers {}", status.as_u16())) });
        }
        let tokens = tokens(answer).await.map_err(|fault| bad("its answer cannot be read").because(fault))?;
        tokens.access_token.ok_or_else(|| bad("its answer has none"))
    }
}

fn class(status: StatusCode) -> Class {
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        Class::Transient
    } else {
        Class::Permanent
    }
}

fn nothing(place: &Place, why: &str) -> Fault {
    Fault::permanent(format!("the registry {} takes the machine's identity for nobody: {why}", place.host))
        .advice("give the identity the role AcrPull (and AcrDelete for cleaning up) on the registry")
}

async fn post(client: &Client, place: &Place, path: &str, form: &[(&str, &str)]) -> Result<Tokens, Fault> {
    let fields: HashMap<&str, &str> = form.iter().copied().collect();
    let mut url = place.base.clone();
    url.set_path(path);
    // The form's encoding is a query's.
    let mut encoder = url.clone();
    encoder.query_pairs_mut().clear().extend_pairs(fields);
    let body = encoder.query().unwrap_or_default().to_owned();
    let request = client.post(url).header("content-type", "application/x-www-form-urlencoded").body(body);
    let sent = request.send().await;
    let answer = sent.map_err(|e| {
        Fault::transient(format!("the registry {} cannot be reached", place.host)).because(e.without_url())
    })?;
    let status = answer.status();
    if !status.is_success() {
        let why = format!("/{path} answers {}", status.as_u16());
        return Err(Fault { class: class(status), ..nothing(place, &why) });
    }
    tokens(answer).await
}

async fn tokens(answer: Response) -> Result<Tokens, Fault> {
    let bytes = read(answer, ANSWER_MAX).await?;
    serde_json::from_slice(&bytes).map_err(|_| Fault::permanent("a token's answer is not what it should be"))
}

#[cfg(test)]
mod tests;
