//! The HTTP face from outside: status codes of the contract, sign-in, and what attackers send.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use replank::engine::api::Refusal;
use replank::http::{Limits, Options, dev_bypass};
use replank_core::phase::*;
use replank_core::ports::Clock as _;
use replank_core::record::Snapshot;
use replank_core::words::Millis;
use serde_json::{Value, json};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> Options {
    Options {
        hosts: ["upgrade.example.org".to_owned(), "replank:8086".to_owned()].into(),
        remote: "https://user:pw@git.test/shop.git".to_owned(),
        version: "0.1.0".to_owned(),
        ..Options::default()
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// One request with exactly these header lines, over a connection of its own.
async fn raw(server: &Server, request: &str, headers: &[String], body: &str) -> Answer {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut text = format!("{request} HTTP/1.1\r\nConnection: close\r\n");
    for header in headers {
        text.push_str(&format!("{header}\r\n"));
    }
    text.push_str("\r\n");
    stream.write_all((text + body).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") { dechunk(body) } else { body.to_owned() };
    Answer { status, head: head.to_lowercase(), body }
}

fn dechunk(mut rest: &str) -> String {
    let mut out = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
    }
    out
}

fn headers(server: &Server, token: &str, body: Option<&str>) -> Vec<String> {
    let mut headers = vec![format!("Host: {}", server.address)];
    if !token.is_empty() {
        headers.push(format!("Authorization: Bearer {token}"));
    }
    if let Some(body) = body {
        headers.push(format!("Content-Length: {}", body.len()));
        if !body.is_empty() {
            headers.push("Content-Type: application/json".to_owned());
        }
    }
    headers
}

async fn get(server: &Server, token: &str, path: &str) -> Answer {
    raw(server, &format!("GET {path}"), &headers(server, token, None), "").await
}

async fn post(server: &Server, token: &str, path: &str, body: &str) -> Answer {
    raw(server, &format!("POST {path}"), &headers(server, token, Some(body)), body).await
}

#[tokio::test]
async fn every_route_knows_who_may() {
    let server = Server::start(options()).await;
    let start = r#"{"confirm_downtime":true}"#;
    for (method, path, body, anyone, reader, admin) in [
        ("GET", "/livez", "", 200, 200, 200),
        ("GET", "/readyz", "", 200, 200, 200),
        ("GET", "/api/health", "", 200, 200, 200),
        ("GET", "/api/upgrade/status", "", 401, 200, 200),
        ("GET", "/api/upgrade/candidates", "", 401, 200, 200),
        ("POST", "/api/upgrade/check", "", 401, 200, 200),
        ("POST", "/api/upgrade/settings", r#"{"track_commits":false}"#, 401, 200, 200),
        ("GET", "/api/upgrade/history", "", 401, 200, 200),
        ("GET", "/api/upgrade/plan", "", 401, 200, 200),
        ("GET", "/api/upgrade/plan?target_version=0.2.0&accept_one_way=true", "", 401, 200, 200),
        ("POST", "/api/upgrade/start", start, 401, 403, 202),
        ("POST", "/api/upgrade/rollback", "", 401, 403, 202),
        ("POST", "/api/upgrade/cancel", "", 401, 403, 202),
        ("POST", "/api/upgrade/confirm", "", 401, 403, 202),
        ("POST", "/api/upgrade/reset", r#"{"reason":"stuck"}"#, 401, 403, 202),
        ("GET", "/api/upgrade/quarantine", "", 401, 200, 200),
        ("POST", "/api/upgrade/quarantine", r#"{"lift":"0.3.0","reason":"the disk was full"}"#, 401, 403, 202),
        (
            "POST",
            "/api/upgrade/drift",
            r#"{"accept":["container web is gone"],"reason":"it is not needed"}"#,
            401,
            403,
            202,
        ),
        (
            "POST",
            "/api/upgrade/downgrade",
            r#"{"target_version":"0.0.9","confirm_downtime":true,"reason":"it is slow"}"#,
            401,
            403,
            202,
        ),
        (
            "POST",
            "/api/upgrade/moved-tag",
            r#"{"version":"0.3.0","commit_sha":"0123456789abcdef0123456789abcdef01234567","reason":"a typo in the notes"}"#,
            401,
            403,
            202,
        ),
        ("GET", "/api/upgrade/rollback-preflight", "", 401, 403, 200),
        ("GET", "/api/upgrade/escape-hatch", "", 401, 403, 200),
        ("GET", "/api/upgrade/jobs/job-1/build-log/api", "", 401, 403, 200),
    ] {
        for (token, expect) in [("", anyone), (READER, reader), (ADMIN, admin)] {
            let body_of = (method == "POST").then_some(body);
            let answer = raw(&server, &format!("{method} {path}"), &headers(&server, token, body_of), body).await;
            assert_eq!(answer.status, expect, "{method} {path} as {token:?}: {}", answer.body);
            if expect >= 400 {
                assert!(answer.json()["detail"].is_string(), "{method} {path}");
            }
            for header in [
                "content-security-policy: default-src 'none'; frame-ancestors 'none';",
                "x-frame-options: deny",
                "x-content-type-options: nosniff",
                "cache-control: no-store",
                "referrer-policy:",
            ] {
                assert!(answer.head.contains(header), "{method} {path} lacks {header}");
            }
        }
    }
}

#[tokio::test]
async fn bad_requests_have_the_contract_s_codes() {
    let server = Server::start(options()).await;
    let long = "x".repeat(281);
    for (path, body, expect) in [
        ("start", r#"{}"#.to_owned(), 422),
        // Found by the fuzz target `bodies`: an array was taken for the fields in their order.
        ("start", "[null,null,null,true]".to_owned(), 422),
        ("reset", r#"["stuck"]"#.to_owned(), 422),
        ("check", "[[]]".to_owned(), 422),
        ("settings", "[true]".to_owned(), 422),
        ("start", r#"{"confirm_downtime":false}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"target_version":"1.2"}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"target_sha":"abc"}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"target_kind":"commit"}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"target_kind":"branch"}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"remote":"https://evil.test/x.git"}"#.to_owned(), 422),
        ("start", r#"{"confirm_downtime":true,"idempotency_key":"a b"}"#.to_owned(), 422),
        ("start", format!(r#"{{"confirm_downtime":true,"reason":"{long}"}}"#), 422),
        ("start", "{".to_owned(), 400),
        ("start", String::new(), 400),
        ("start", format!("{{\"reason\":\"{}\"}}", "x".repeat(20_000)), 413),
        ("rollback", format!(r#"{{"reason":"{long}"}}"#), 422),
        ("rollback", r#"{"reason":"ä"}"#.to_owned(), 202),
        ("reset", "{}".to_owned(), 422),
        ("settings", "{}".to_owned(), 422),
        ("downgrade", r#"{"target_version":"0.0.9","confirm_downtime":true}"#.to_owned(), 422),
        ("downgrade", r#"{"target_version":"0.0.9","confirm_downtime":true,"reason":" "}"#.to_owned(), 422),
        ("downgrade", r#"{"target_version":"0.0.9","reason":"x"}"#.to_owned(), 422),
        ("downgrade", r#"{"target_version":"old","confirm_downtime":true,"reason":"x"}"#.to_owned(), 422),
        (
            "downgrade",
            r#"{"target_version":"0.0.9-commit.0123456","confirm_downtime":true,"reason":"x"}"#.to_owned(),
            422,
        ),
        ("moved-tag", r#"{"version":"0.3.0","commit_sha":"0123456","reason":"x"}"#.to_owned(), 422),
        ("moved-tag", format!(r#"{{"version":"latest","commit_sha":"{SHA}","reason":"x"}}"#), 422),
        ("moved-tag", format!(r#"{{"version":"0.3.0","commit_sha":"{SHA}","reason":""}}"#), 422),
        ("moved-tag", format!(r#"{{"version":"0.3.0-commit.{}","commit_sha":"{SHA}","reason":"x"}}"#, &SHA[..7]), 422),
        ("drift", r#"{"accept":[],"reason":"x"}"#.to_owned(), 422),
        ("drift", r#"{"accept":["container web is gone"],"reason":"  "}"#.to_owned(), 422),
        ("drift", r#"{"accept":true,"reason":"x"}"#.to_owned(), 422),
        ("quarantine", r#"{"lift":"0.3.0"}"#.to_owned(), 422),
        ("quarantine", r#"{"lift":"0.3.0","reason":" "}"#.to_owned(), 422),
        ("quarantine", r#"{"lift":"all","reason":"why not"}"#.to_owned(), 422),
        ("nothing", "{}".to_owned(), 404),
        ("status", "{}".to_owned(), 405),
    ] {
        let answer = post(&server, ADMIN, &format!("/api/upgrade/{path}"), &body).await;
        assert_eq!(answer.status, expect, "{path} {}: {}", &body[..body.len().min(80)], answer.body);
        assert!(answer.status < 300 || answer.json()["detail"].is_string());
    }
    assert_eq!(server.engine.calls.lock().unwrap().len(), 1, "only the good one reached the engine");
    for (path, expect) in [
        ("history?limit=0", 400),
        ("history?limit=x", 400),
        ("history?limit=2", 200),
        ("jobs/..%2f..%2fetc/build-log/api", 400),
        ("jobs/abc/build-log/api", 400),
        ("jobs/job-1/build-log/none", 400),
        ("jobs/job-1/build-log/api?from=-1", 400),
        ("jobs/job-1/build-log/api?follow=maybe", 400),
        ("jobs/job-9/build-log/api", 404),
        ("plan?accept_one_way=maybe", 400),
        ("plan?remote=https://evil.test/x.git", 400),
    ] {
        let answer = get(&server, ADMIN, &format!("/api/upgrade/{path}")).await;
        assert_eq!(answer.status, expect, "{path}: {}", answer.body);
    }
}

#[tokio::test]
async fn refusals_of_the_engine_keep_their_codes() {
    let server = Server::start(options()).await;
    for (refusal, expect, retry) in [
        (Refusal::Invalid("bad".into()), 422, None),
        (Refusal::Conflict("one is in flight".into()), 409, None),
        (Refusal::NotFound("no snapshot".into()), 404, None),
        (Refusal::TooSoon { retry_after_s: 12 }, 429, Some("retry-after: 12")),
        (Refusal::Unavailable("the ledger is away".into()), 503, Some("retry-after: 1")),
    ] {
        let text = refusal.to_string();
        *server.engine.refuse.lock().unwrap() = Some(refusal);
        let answer = post(&server, ADMIN, "/api/upgrade/check", "").await;
        assert_eq!((answer.status, answer.json()["detail"].as_str()), (expect, Some(text.as_str())));
        assert!(retry.is_none_or(|line| answer.head.contains(line)), "{}", answer.head);
    }
    *server.engine.refuse.lock().unwrap() = Some(Refusal::Unavailable("secret reason".into()));
    let answer = get(&server, "", "/readyz").await;
    assert_eq!(answer.status, 503);
    assert!(!answer.body.contains("secret reason"));
}

#[tokio::test]
async fn tokens_expire_are_revoked_and_are_limited() {
    let server = Server::start(options()).await;
    server.tokens.all.lock().unwrap()[1].expires_at = Some(Millis(1_700_000_100_001));
    assert_eq!(get(&server, READER, "/api/upgrade/status").await.status, 200);
    server.clock.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(get(&server, READER, "/api/upgrade/status").await.status, 401);
    server.tokens.all.lock().unwrap()[0].revoked_at = Some(Millis(1));
    assert_eq!(get(&server, ADMIN, "/api/upgrade/status").await.status, 401);
    server.tokens.all.lock().unwrap()[0].revoked_at = None;
    let mut last = 0;
    for _ in 0..12 {
        last = get(&server, "rpk_wrong", "/api/upgrade/status").await.status;
    }
    assert_eq!(last, 429);
    // An attacker behind the same address must not lock the administrator out.
    assert_eq!(get(&server, ADMIN, "/api/upgrade/status").await.status, 200);
    assert!(server.tokens.all.lock().unwrap()[0].last_used_at.is_some());
    let refused = server.tokens.refused.lock().unwrap();
    assert!((1..=12).contains(&refused.len()) && refused.iter().all(|r| r.from == "127.0.0.1"));
    assert!(refused.iter().all(|r| !format!("{r:?}").contains("rpk_")), "no token is written down");
}

/// The status may know a token for a moment longer; whoever would change something is asked for anew.
#[tokio::test]
async fn a_revoked_token_starts_nothing_although_it_was_just_seen() {
    let server = Server::start(options()).await;
    assert_eq!(get(&server, ADMIN, "/api/upgrade/status").await.status, 200);
    server.tokens.all.lock().unwrap()[0].revoked_at = Some(Millis(1));
    for (path, body) in [
        ("start", r#"{"confirm_downtime":true}"#),
        ("rollback", "{}"),
        ("cancel", "{}"),
        ("reset", r#"{"reason":"stuck"}"#),
    ] {
        assert_eq!(post(&server, ADMIN, &format!("/api/upgrade/{path}"), body).await.status, 401, "{path}");
    }
    // A role that was taken away counts from now on as well.
    server.tokens.all.lock().unwrap()[0].revoked_at = None;
    assert_eq!(get(&server, ADMIN, "/api/upgrade/status").await.status, 200);
    server.tokens.all.lock().unwrap()[0].role = replank_core::ports::Role::Reader;
    assert_eq!(post(&server, ADMIN, "/api/upgrade/rollback", "{}").await.status, 403);
    assert!(server.engine.calls.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_administrators_were_refused_is_written_down() {
    let server = Server::start(options()).await;
    let written = || std::mem::take(&mut *server.tokens.refused.lock().unwrap());
    let long = format!("{{\"reason\":\"{}\"}}", "x".repeat(281));
    for (path, body, refusal, status) in [
        ("start", r#"{"confirm_downtime":true}"#, Some(Refusal::Conflict("commit 0123 is quarantined".into())), 409),
        ("start", r#"{"confirm_downtime":true}"#, Some(Refusal::Conflict("an upgrade is in flight".into())), 409),
        ("start", r#"{"confirm_downtime":true}"#, Some(Refusal::Invalid("00.1 is no version".into())), 422),
        ("start", r#"{"confirm_downtime":false}"#, None, 422),
        ("start", r#"{"confirm_downtime":true,"remote":"https://evil.test/x.git"}"#, None, 422),
        ("rollback", "{}", Some(Refusal::Conflict("there is no snapshot".into())), 409),
        ("rollback", long.as_str(), None, 422),
        ("cancel", "{}", Some(Refusal::Conflict("wrong state".into())), 409),
        ("confirm", "{}", Some(Refusal::Conflict("wrong state".into())), 409),
        ("reset", r#"{"reason":"stuck"}"#, Some(Refusal::Conflict("wrong state".into())), 409),
        ("reset", r#"{"reason":" "}"#, None, 422),
        ("quarantine", r#"{"lift":"0.3.0","reason":"x"}"#, Some(Refusal::Conflict("not quarantined".into())), 409),
    ] {
        *server.engine.refuse.lock().unwrap() = refusal;
        let answer = post(&server, ADMIN, &format!("/api/upgrade/{path}"), body).await;
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        let rows = written();
        assert_eq!(rows.len(), 1, "{path} {body}");
        let row = &rows[0];
        assert_eq!(
            (row.actor.as_str(), row.from.as_str(), row.action.as_str(), row.at),
            (
                format!("token:{ADMIN}").as_str(),
                "127.0.0.1",
                format!("POST /api/upgrade/{path}").as_str(),
                server.clock.now()
            )
        );
        assert!(answer.json()["detail"].as_str().unwrap().starts_with(&row.why), "{row:?}");
    }
    // What goes well stands in the history, and a service that cannot answer has refused nobody.
    assert_eq!(post(&server, ADMIN, "/api/upgrade/confirm", r#"{"reason":"fine"}"#).await.status, 202);
    assert_eq!(
        server.engine.calls.lock().unwrap().last().unwrap().0,
        "keep fine",
        "a confirmation's reason gets there"
    );
    *server.engine.refuse.lock().unwrap() = Some(Refusal::Unavailable("the ledger is away".into()));
    assert_eq!(post(&server, ADMIN, "/api/upgrade/rollback", "").await.status, 503);
    assert!(written().is_empty());
    // A flood from outside has a bound of its own, and so has this one.
    for _ in 0..70 {
        get(&server, "", "/nothing?x").await;
        raw(&server, "GET /", &["Host: evil.test".to_owned()], "").await;
    }
    assert!(written().len() <= 60);
    for _ in 0..70 {
        post(&server, ADMIN, "/api/upgrade/start", "{}").await;
    }
    let rows = written();
    assert!((40..=60).contains(&rows.len()), "{} rows", rows.len());
}

#[tokio::test]
async fn other_identities_are_not_believed() {
    let server = Server::start(options()).await;
    for header in [
        "X-MS-CLIENT-PRINCIPAL-ID: 00000000-0000-0000-0000-000000000000",
        "X-MS-CLIENT-PRINCIPAL: eyJ9",
        "Authorization: Basic YWRtaW46YWRtaW4=",
        "Authorization: Bearer",
        "Cookie: token=rpk_admin",
        "X-Forwarded-For: 127.0.0.1",
    ] {
        let headers = vec![format!("Host: {}", server.address), header.to_owned()];
        assert_eq!(raw(&server, "GET /api/upgrade/status", &headers, "").await.status, 401, "{header}");
        assert_eq!(raw(&server, "GET /api/upgrade/status?token=rpk_admin", &headers, "").await.status, 401, "{header}");
    }
}

#[tokio::test]
async fn hosts_origins_and_forms_of_others_are_refused() {
    let server = Server::start(options()).await;
    let own = server.address.to_string();
    let json = "Content-Type: application/json";
    for (host, extra, expect) in [
        (own.as_str(), vec![json], 202),
        ("localhost", vec![json], 202),
        ("[::1]:99", vec![json], 202),
        ("UPGRADE.example.org", vec![json], 202),
        ("upgrade.example.org:443", vec![json], 202),
        ("replank:8086", vec![json], 202),
        ("replank", vec![json], 421),
        ("evil.test", vec![json], 421),
        ("localhost.evil.test", vec![json], 421),
        ("127.0.0.1.evil.test", vec![json], 421),
        ("user@localhost", vec![json], 421),
        ("", vec![json], 421),
        ("localhost", vec!["Host: evil.test", json], 400),
        ("localhost", vec![json, "Origin: http://localhost"], 202),
        ("localhost", vec![json, "Origin: https://localhost"], 202),
        ("localhost", vec![json, "Origin: http://localhost:3000"], 403),
        ("localhost", vec![json, "Origin: https://evil.test"], 403),
        ("localhost", vec![json, "Origin: null"], 403),
        ("localhost", vec![json, "Sec-Fetch-Site: same-origin"], 202),
        ("localhost", vec![json, "Sec-Fetch-Site: none"], 202),
        ("localhost", vec![json, "Sec-Fetch-Site: same-site"], 403),
        ("localhost", vec![json, "Sec-Fetch-Site: cross-site"], 403),
        ("localhost", vec!["Content-Type: text/plain"], 415),
        ("localhost", vec!["Content-Type: application/x-www-form-urlencoded"], 415),
        ("localhost", vec!["Content-Type: application/jsonp"], 415),
        ("localhost", vec!["Content-Type: application/json; charset=utf-8"], 202),
        ("localhost", vec![], 415),
    ] {
        let mut headers =
            vec![format!("Host: {host}"), format!("Authorization: Bearer {ADMIN}"), "Content-Length: 2".to_owned()];
        headers.extend(extra.iter().map(|h| (*h).to_owned()));
        let answer = raw(&server, "POST /api/upgrade/rollback", &headers, "{}").await;
        assert_eq!(answer.status, expect, "{host:?} {extra:?}: {}", answer.body);
    }
    assert!(!server.tokens.refused.lock().unwrap().is_empty());
    // Probes come by address, under any name.
    let answer = raw(&server, "GET /livez", &["Host: 10.0.0.7:8086".to_owned()], "").await;
    assert_eq!(answer.status, 200);
}

/// Path of each operation of the API's own document that has this method, with its parameters filled in.
fn routes(method: &str) -> Vec<String> {
    let document: Value = serde_json::from_slice(&replank::http::document_text()).unwrap();
    let paths = document["paths"].as_object().unwrap().iter();
    let with = paths.filter(|(_, item)| item.get(method).is_some());
    with.map(|(path, _)| path.replace("{job_id}", "job-1").replace("{component}", "api")).collect()
}

/// Whatever is added later is under the same guard, or shows here.
#[tokio::test]
async fn every_mutation_refuses_other_sites_forms_and_names() {
    let server = Server::start(options()).await;
    let posts = routes("post");
    assert!(posts.len() >= 10, "{posts:?}");
    for method in ["put", "patch", "delete"] {
        assert!(routes(method).is_empty(), "a {method} is not asked below");
    }
    let json = "Content-Type: application/json";
    for path in &posts {
        for (host, extra, expect) in [
            ("localhost", vec!["Content-Type: text/plain"], 415),
            ("localhost", vec!["Content-Type: multipart/form-data; boundary=x"], 415),
            ("localhost", vec![], 415),
            ("localhost", vec![json, "Origin: https://evil.test"], 403),
            ("localhost", vec![json, "Origin: null"], 403),
            ("localhost", vec![json, "Sec-Fetch-Site: cross-site"], 403),
            ("evil.test", vec![json, "Origin: http://evil.test", "Sec-Fetch-Site: same-origin"], 421),
        ] {
            let mut headers =
                vec![format!("Host: {host}"), format!("Authorization: Bearer {ADMIN}"), "Content-Length: 2".to_owned()];
            headers.extend(extra.iter().map(|header| (*header).to_owned()));
            let answer = raw(&server, &format!("POST {path}"), &headers, "{}").await;
            assert_eq!(answer.status, expect, "{path} {host} {extra:?}: {}", answer.body);
        }
    }
    assert!(server.engine.calls.lock().unwrap().is_empty(), "something reached the engine");
}

/// Addresses are written down by proxies, browsers and people; so no route takes a token from one, streams included.
#[tokio::test]
async fn no_route_takes_a_token_from_its_address() {
    let server = Server::start(options()).await;
    let open = ["/livez", "/readyz", "/api/health", "/openapi.json"];
    let host = [format!("Host: {}", server.address)];
    for path in routes("get").iter().filter(|path| !open.contains(&path.as_str())) {
        for query in ["token", "access_token", "ticket", "authorization", "bearer"] {
            let answer = raw(&server, &format!("GET {path}?{query}={ADMIN}"), &host, "").await;
            assert!([400, 401].contains(&answer.status), "{path}?{query}: {} {}", answer.status, answer.body);
        }
        let user = vec![format!("Host: {ADMIN}@localhost")];
        assert_eq!(raw(&server, &format!("GET {path}"), &user, "").await.status, 421, "{path}");
    }
}

#[tokio::test]
async fn what_was_refused_is_written_down_without_tricks() {
    let server = Server::start(options()).await;
    let body = "{\"confirm_downtime\":true,\"x\u{202e}\u{200b}\\u001b]0;t\\u0007\":1}";
    assert_eq!(post(&server, ADMIN, "/api/upgrade/start", body).await.status, 422);
    let rows = server.tokens.refused.lock().unwrap();
    assert_eq!(rows.len(), 1);
    let obeyed = |c: char| c.is_control() || replank_core::mask::is_obeyed(c);
    assert!(rows[0].why.contains("unknown field") && !rows[0].why.contains(obeyed), "{:?}", rows[0]);
}

#[tokio::test]
async fn the_development_identity_is_local_only() {
    let server = Server::start(Options { dev_bypass: true, ..options() }).await;
    assert_eq!(get(&server, "", "/api/upgrade/escape-hatch").await.status, 200);
    assert_eq!(get(&server, "rpk_wrong", "/api/upgrade/status").await.status, 401, "a wrong token is no developer");
    for (host, expect) in [("localhost", 200), ("upgrade.example.org", 401)] {
        let answer = raw(&server, "GET /api/upgrade/status", &[format!("Host: {host}")], "").await;
        assert_eq!(answer.status, expect, "{host}");
    }
    let loopback = "127.0.0.1:8086".parse().unwrap();
    let public = "0.0.0.0:8086".parse().unwrap();
    assert_eq!(dev_bypass(false, public, None, Some("x")), Ok(false));
    assert_eq!(dev_bypass(true, loopback, None, None), Ok(true));
    assert!(dev_bypass(true, public, None, None).is_err());
    assert!(dev_bypass(true, loopback, Some("r-1"), None).is_err());
    assert!(dev_bypass(true, loopback, None, Some("app")).is_err());
}

#[tokio::test]
async fn the_row_is_the_contract_s() {
    let server = Server::start(options()).await;
    let row = get(&server, READER, "/api/upgrade/status").await.json();
    let golden = "running_version running_sha running_revision latest_version latest_sha latest_checked_at \
        latest_commit_sha git_remote track_commits state target_version target_sha target_kind job_id started_by_oid \
        started_at phase_detail phase_progress build_log_blob rollback_available_until green_revision blue_revision \
        confirm_deadline traffic_serving validating_started_at rolling_out_started_at idempotency_key updated_at \
        current_images rollback_target";
    for name in golden.split_whitespace() {
        let value = &row[name];
        let fine = match name {
            "track_commits" => value.is_boolean(),
            "phase_progress" => value.is_u64(),
            "current_images" | "rollback_target" => value.is_object(),
            _ => value.is_string(),
        };
        assert!(fine, "{name}: {value}");
    }
    assert_eq!(row["state"], "idle");
    assert_eq!(row["git_remote"], "https://git.test/shop.git");
    assert_eq!(row["updated_at"], "2023-11-14T22:13:20.000Z");
    assert_eq!(row["current_images"]["api"], format!("registry.test/api@sha256:{}", "1".repeat(64)));
    assert!(row.get("etag").is_none());

    // A swap in blue/green mode, and a failure with a long text.
    let snapshot = Snapshot {
        deployment: deployment("0.1.0", '1'),
        taken_at: Millis(0),
        keep_until: Millis(1_700_000_200_000),
        proved_at: Millis(0),
        lost: None,
        closed: None,
        extra: Default::default(),
    };
    let way_back = WayBack::Snapshot(Box::new(snapshot.clone()));
    let swap = Swap::new(Some(deployment("0.1.0", '1')), deployment("0.2.0", '2'), Mode::BlueGreen, way_back);
    server.engine.set(|record| {
        record.job = Some(job("0.2.0"));
        record.snapshot = Some(snapshot);
        record.serving = Some(deployment("0.2.0", '2'));
        let deadline = Some(Millis(1_700_000_150_000));
        record.phase = Phase::Confirming(Confirming { swap: swap.clone(), deadline, flip: None });
    });
    let row = get(&server, READER, "/api/upgrade/status").await.json();
    let expect = json!({ "state": "confirming", "blue_revision": "r-1", "green_revision": "r-2", "traffic_serving": "green",
        "confirm_deadline": "2023-11-14T22:15:50.000Z", "rollback_available_until": "2023-11-14T22:16:40.000Z",
        "target_version": "0.2.0", "target_kind": "release", "started_by_oid": "token:1" });
    for (name, value) in expect.as_object().unwrap() {
        assert_eq!(&row[name], value, "{name}");
    }
    server.engine.set(|record| {
        let fault = replank_core::fault::Told::permanent("ü".repeat(500), "");
        record.phase = Phase::FailedRollout { fault, swap: swap.clone() };
    });
    let row = get(&server, READER, "/api/upgrade/status").await.json();
    assert_eq!(row["phase_detail"].as_str().unwrap().chars().count(), 240);
    assert_eq!(row["rollback_closed"], "");

    // A way back that the data have closed is no way back until they are restored.
    server.engine.set(|record| {
        if let Some(snapshot) = &mut record.snapshot {
            snapshot.closed = Some("0.2.0 has had the data".to_owned());
        }
        let fault = replank_core::fault::Told::permanent("it does not come up", "");
        let mut swap = swap.clone();
        if let WayBack::Snapshot(snapshot) = &mut swap.way_back {
            snapshot.closed = Some("0.2.0 has had the data".to_owned());
        }
        record.phase = Phase::FailedRollout { fault, swap };
    });
    let row = get(&server, READER, "/api/upgrade/status").await.json();
    assert_eq!(row["rollback_closed"], "0.2.0 has had the data");
}

#[tokio::test]
async fn candidates_and_history_have_the_contract_s_shape() {
    let server = Server::start(options()).await;
    let found = get(&server, READER, "/api/upgrade/candidates").await.json();
    let expect = json!({ "configured": true, "remote": "https://git.test/shop.git", "running_version": "0.1.0",
        "candidates": [{ "name": "v0.2.0", "raw_ref": "refs/tags/v0.2.0", "commit_sha": SHA }],
        "refused": [{ "name": "v0.3.0", "raw_ref": "refs/tags/v0.3.0", "commit_sha": SHA, "refused": "the tag was moved" }],
        "commits_refused": "only signed tags are accepted\u{1b}[2J" });
    assert_eq!(found, expect);
    server.engine.is_alone.store(true, std::sync::atomic::Ordering::SeqCst);
    let alone = get(&server, READER, "/api/upgrade/candidates").await.json();
    let expect =
        json!({ "configured": false, "remote": null, "running_version": "0.1.0", "candidates": [], "refused": [] });
    assert_eq!(alone, expect, "without a remote");
    let events = get(&server, READER, "/api/upgrade/history?limit=2").await.json();
    assert_eq!(
        events["events"].as_array().unwrap().iter().map(|e| e["n"].as_i64().unwrap()).collect::<Vec<_>>(),
        [1, 2]
    );
    let hatch = get(&server, ADMIN, "/api/upgrade/escape-hatch").await.json();
    assert_eq!(hatch["commands"], json!(["docker start x"]));
    assert_eq!(hatch["container_app"], "");
}

/// Reads a stream until `enough` says so.
async fn read_until(stream: &mut TcpStream, enough: impl Fn(&str) -> bool) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while !enough(&String::from_utf8_lossy(&all)) {
        let n = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.expect("in time").unwrap();
        assert!(n > 0, "ended early: {}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

async fn open(server: &Server, token: &str, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\n{}\r\n\r\n", headers(server, token, None).join("\r\n"));
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn events_come_at_once_on_change_and_with_heartbeats_until_the_end() {
    let limits = Limits { heartbeat: Duration::from_millis(300), ..Limits::default() };
    let mut server = Server::start(Options { limits, ..options() }).await;
    let mut stream = open(&server, READER, "/api/upgrade/events").await;
    let first = read_until(&mut stream, |t| t.contains("\"state\":\"idle\"")).await;
    assert!(first.contains("content-type: text/event-stream"));
    // A burst is told in few events, and the last state is among them.
    for _ in 0..200 {
        server.engine.set(|record| record.phase = Phase::Fetching);
    }
    server.engine.set(|record| {
        record.job = Some(job("0.2.0"));
        record.phase = Phase::Queued;
    });
    let burst = read_until(&mut stream, |t| t.contains("\"state\":\"queued\"")).await;
    assert!(burst.matches("event: status").count() <= 3, "{burst}");
    read_until(&mut stream, |t| t.contains(": still here")).await;
    // A revoked token's stream ends with the next heartbeat.
    let mut revoked = open(&server, ADMIN, "/api/upgrade/events").await;
    read_until(&mut revoked, |t| t.contains("event: status")).await;
    server.tokens.all.lock().unwrap()[0].revoked_at = Some(Millis(1));
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, revoked.read_to_end(&mut rest)).await.unwrap().ok();
    // Open streams do not hold a shutdown.
    server.stop();
    tokio::time::timeout(PATIENCE, &mut server.task).await.expect("the server stops").unwrap();
}

#[tokio::test]
async fn streams_are_capped_per_caller() {
    let limits = Limits { streams_per_caller: 2, ..Limits::default() };
    let server = Server::start(Options { limits, ..options() }).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = open(&server, READER, "/api/upgrade/events").await;
        read_until(&mut stream, |t| t.contains("event: status")).await;
        streams.push(stream);
    }
    assert_eq!(get(&server, READER, "/api/upgrade/events").await.status, 429);
    let mut other = open(&server, ADMIN, "/api/upgrade/events").await;
    read_until(&mut other, |t| t.contains("event: status")).await;
    drop(streams);
    // A place comes back when the server notices that a reader is gone: with the next event.
    for _ in 0..200 {
        server.engine.set(|_| {});
        let mut stream = open(&server, READER, "/api/upgrade/events").await;
        let head = read_until(&mut stream, |t| t.contains("\r\n\r\n")).await;
        if head.starts_with("HTTP/1.1 200") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the places never came back");
}

#[tokio::test]
async fn slow_readers_are_dropped() {
    let limits = Limits { write: Duration::from_millis(300), ..Limits::default() };
    let server = Server::start(Options { limits, ..options() }).await;
    server.engine.grow(&vec![b'x'; 32 * 1024 * 1024], true);
    let mut stream = open(&server, ADMIN, "/api/upgrade/jobs/job-1/build-log/api").await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let mut got = Vec::new();
    drop(tokio::time::timeout(PATIENCE, stream.read_to_end(&mut got)).await.expect("cut, not held"));
    assert!(got.len() < 32 * 1024 * 1024, "all {} bytes came", got.len());
}

#[tokio::test]
async fn logs_pass_through_from_an_offset_and_are_followed() {
    let server = Server::start(options()).await;
    server.engine.set(|record| {
        record.job = Some(job("0.2.0"));
        record.phase = Phase::Queued;
    });
    let path = "/api/upgrade/jobs/job-1/build-log/api";
    let empty = get(&server, ADMIN, path).await;
    assert_eq!((empty.status, empty.body.as_str()), (200, ""), "not begun is an empty answer (lesson 13)");
    let mut stream = open(&server, ADMIN, &format!("{path}?follow=1")).await;
    read_until(&mut stream, |t| t.contains("\r\n\r\n")).await;
    server.engine.grow(b"step 1\n", false);
    read_until(&mut stream, |t| t.contains("step 1\n")).await;
    server.engine.grow(b"step 2\n", true);
    read_until(&mut stream, |t| t.contains("step 2\n") && t.ends_with("0\r\n\r\n")).await;
    for (query, expect) in
        [("", "step 1\nstep 2\n"), ("?from=7", "step 2\n"), ("?from=99", ""), ("?follow=1&from=7", "step 2\n")]
    {
        let answer = get(&server, ADMIN, &format!("{path}{query}")).await;
        assert_eq!(answer.body, expect, "{query}");
        assert!(answer.head.contains("content-type: text/plain; charset=utf-8"));
    }
    // A log that its dead writer never closed ends with its job.
    *server.engine.log.lock().unwrap() = (Some(b"half".to_vec()), false);
    server.engine.set(|record| record.phase = Phase::Idle);
    assert_eq!(get(&server, ADMIN, &format!("{path}?follow=1")).await.body, "half");
}

#[tokio::test]
async fn huge_heads_and_slow_heads_are_cut() {
    let limits = Limits { head: Duration::from_millis(300), ..Limits::default() };
    let server = Server::start(Options { limits, ..options() }).await;
    let many: Vec<String> = (0..200).map(|i| format!("X-{i}: y")).collect();
    assert_eq!(raw(&server, "GET /livez", &many, "").await.status, 431);
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let mut rest = Vec::new();
    drop(tokio::time::timeout(PATIENCE, slow.read_to_end(&mut rest)).await.expect("cut in time"));
}
