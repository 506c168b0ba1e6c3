//! The whole way to a token, against servers that answer as the identity endpoint and the registry do.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use replank_testbed::answers::Answers;

use super::super::{OciClient, OciConfig};
use super::*;

#[tokio::test]
async fn a_machine_s_identity_becomes_a_registry_s_token() {
    let digest = format!("sha256:{}", "d".repeat(64));
    let told = digest.clone();
    let registry = Answers::start(move |asked, at| {
        let ok = "200 OK".to_owned();
        if asked.first.starts_with("POST /oauth2/exchange") {
            (ok, r#"{"refresh_token":"the-refresh-token"}"#.to_owned())
        } else if asked.first.starts_with("POST /oauth2/token") {
            (ok, r#"{"access_token":"the-access-token"}"#.to_owned())
        } else if asked.head.contains("authorization: bearer the-access-token") {
            (format!("200 OK\r\nDocker-Content-Digest: {told}"), String::new())
        } else {
            let challenge = format!("Bearer realm=\"http://{at}/oauth2/token\",service=\"{at}\",scope=\"x\"");
            (format!("401 Unauthorized\r\nWWW-Authenticate: {challenge}"), "{}".to_owned())
        }
    })
    .expect("a server");
    let token = r#"{"access_token":"the-entra-token","expires_on":"1"}"#;
    let identity = Answers::start(|_, _| ("200 OK".to_owned(), token.to_owned())).expect("a server");
    let registry_at = registry.address;
    let machine =
        MachineIdentity { client_id: Some("the client".to_owned()), endpoint: Some(endpoint(identity.address)) };
    let config = OciConfig { machine: BTreeMap::from([(registry_at.to_string(), machine)]), ..OciConfig::default() };
    let client = OciClient::new(config).expect("client");
    let repository = format!("{registry_at}/team/api");
    for _ in 0..2 {
        let found = client.head(&repository, "v1").await.expect("an answer").expect("a digest");
        assert_eq!(found.as_str(), digest);
    }
    let asked = registry.asked();
    let firsts: Vec<&str> = asked.iter().map(|asked| asked.first.as_str()).collect();
    let head = "HEAD /v2/team/api/manifests/v1";
    let (exchange, token) = ("POST /oauth2/exchange", "POST /oauth2/token");
    assert_eq!(firsts, [head, exchange, token, head, head], "the token is kept");
    let fields = |at: usize| -> BTreeMap<String, String> {
        let url = Url::parse(&format!("http://x/?{}", asked[at].body)).expect("a form");
        url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
    };
    let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let service = registry_at.to_string();
    assert_eq!(
        fields(1),
        of(&[
            ("grant_type", "access_token"),
            ("service", &service),
            ("tenant", ""),
            ("access_token", "the-entra-token")
        ])
    );
    assert_eq!(
        fields(2),
        of(&[
            ("grant_type", "refresh_token"),
            ("service", &service),
            ("scope", "repository:team/api:pull,metadata_read"),
            ("refresh_token", "the-refresh-token")
        ])
    );
    let told = identity.asked().remove(0);
    assert_eq!(
        told.first,
        "GET /msi/token?resource=https%3A%2F%2Fcontainerregistry.azure.net&api-version=2019-08-01&client_id=the+client"
    );
    assert!(told.head.contains("x-identity-header: rotating"), "{told:?}");
}

fn endpoint(at: SocketAddr) -> (String, String) {
    (format!("http://{at}/msi/token"), "rotating".to_owned())
}

/// Without an identity nobody signs in, and the registry's refusal is told with what to do.
#[tokio::test]
async fn refusals_say_which_right_is_missing() {
    let registry = Answers::start(|asked, at| {
        if asked.first.starts_with("POST") {
            ("403 Forbidden".to_owned(), "{}".to_owned())
        } else {
            let challenge = format!("Bearer realm=\"http://{at}/oauth2/token\",service=\"{at}\"");
            (format!("401 Unauthorized\r\nWWW-Authenticate: {challenge}"), "{}".to_owned())
        }
    })
    .expect("a server")
    .address;
    let identity = |status: &'static str| {
        let answer = move |_: &_, _| (status.to_owned(), r#"{"access_token":"secret-token"}"#.to_owned());
        Answers::start(answer).expect("a server").address
    };
    for (endpoint_of, class, part) in [
        (Some(endpoint(identity("200 OK"))), Class::Permanent, "AcrPull"),
        (Some(endpoint(identity("400 Bad Request"))), Class::Permanent, "managed identity is assigned"),
        (None, Class::Permanent, "credentials"),
    ] {
        let machine = MachineIdentity { client_id: None, endpoint: endpoint_of };
        let config = OciConfig { machine: BTreeMap::from([(registry.to_string(), machine)]), ..OciConfig::default() };
        let client = OciClient::new(config).expect("client");
        let fault = client.head(&format!("{registry}/api"), "v1").await.expect_err("refused");
        let told = format!("{}; {}", fault.chain(), fault.advice);
        assert!(fault.class == class && told.contains(part) && !told.contains("secret-token"), "{told}");
    }
}
