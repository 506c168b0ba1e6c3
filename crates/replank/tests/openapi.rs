//! The API's document against the server that it describes: who may, which answers, in what form. Both directions.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use replank::http::{Options, document_text};
use reqwest::Method;
use serde_json::Value;
use support::*;

const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];
const PROBLEM: &str = "application/problem+json";

fn document() -> Value {
    serde_json::from_slice(&document_text()).unwrap()
}

/// Path, method and description of each operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().iter();
        methods.map(|(method, operation)| (path.clone(), method.clone(), operation.clone())).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_path).collect()
}

fn filled(path: &str) -> String {
    path.replace("{job_id}", "job-1").replace("{component}", "api")
}

struct Answer {
    status: u16,
    kind: String,
    allow: String,
    body: String,
}

impl Answer {
    /// An error is a problem, whole, and says its own status.
    fn check(&self, what: &str) {
        if self.status < 400 {
            return;
        }
        assert_eq!(self.kind, PROBLEM, "{what}: {} {}", self.status, self.body);
        let problem: BTreeMap<String, Value> = serde_json::from_str(&self.body).unwrap();
        let names: Vec<&str> = problem.keys().map(String::as_str).collect();
        assert_eq!(names, ["detail", "status", "title", "type"], "{what}");
        assert_eq!(problem["status"], self.status, "{what}");
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{what}");
    }
}

struct Asker {
    client: reqwest::Client,
    base: String,
}

impl Asker {
    fn of(server: &Server) -> Self {
        // Another test of this process may have been faster; then that one serves.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = reqwest::Client::builder().tls_certs_only([]).no_proxy().build().unwrap();
        Self { client, base: server.url() }
    }

    async fn ask(&self, method: &str, path: &str, token: &str, body: Option<&str>) -> Answer {
        let method: Method = method.to_uppercase().parse().unwrap();
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        let response = request.send().await.unwrap();
        let header =
            |name: &str| response.headers().get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
        let (status, kind, allow) = (response.status().as_u16(), header("content-type"), header("allow"));
        // The stream of events has no end.
        let body = if kind.starts_with("text/event-stream") { String::new() } else { response.text().await.unwrap() };
        Answer { status, kind, allow, body }
    }
}

#[test]
fn the_document_is_whole() {
    let document = document();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(document["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        assert!(METHODS.contains(&method.as_str()), "{path} {method}");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path} says nothing");
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{path}: its id is another's too");
        for (status, answer) in operation["responses"].as_object().unwrap() {
            assert!(answer["description"].as_str().is_some_and(|text| !text.is_empty()), "{path} {status}");
            let kinds: Vec<_> = answer["content"].as_object().unwrap().keys().collect();
            assert_eq!(status.parse::<u16>().unwrap() >= 400, kinds == [PROBLEM], "{path} {status}: {kinds:?}");
        }
        assert_eq!(method == "post", operation.get("requestBody").is_some(), "{path}");
    }
    // Each reference leads somewhere.
    let text = document.to_string();
    for name in text.split("\"#/components/").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let found = name.split('/').try_fold(&document["components"], |at, part| at.get(part));
        assert!(found.is_some(), "{name} is nowhere");
    }
}

#[tokio::test]
async fn the_server_does_what_the_document_says() {
    let server = Server::start(Options::default()).await;
    let asker = Asker::of(&server);
    let document = document();
    for (path, method, operation) in operations(&document) {
        let roles: Option<Vec<&str>> = operation["security"]
            .as_array()
            .map(|all| all[0]["token"].as_array().unwrap().iter().map(|role| role.as_str().unwrap()).collect());
        let documented = operation["responses"].as_object().unwrap();
        for (token, body) in
            [("", "{}"), (READER, "{}"), (ADMIN, "{}"), (ADMIN, "["), (ADMIN, "[]"), (ADMIN, "{\"x\":1}")]
        {
            let body = (method != "get").then_some(body);
            let answer = asker.ask(&method, &filled(&path), token, body).await;
            let what = format!("{method} {path} as {token:?} with {body:?}: {} {}", answer.status, answer.body);
            answer.check(&what);
            let expect = match (token, roles.as_deref()) {
                (_, None) => None,
                ("", Some(_)) => Some(401),
                (READER, Some(["admin"])) => Some(403),
                (_, Some(_)) => None,
            };
            assert_eq!(matches!(answer.status, 401 | 403).then_some(answer.status), expect, "{what}");
            let told = documented.get(&answer.status.to_string()).unwrap_or_else(|| panic!("undocumented: {what}"));
            assert!(told["content"].get(&answer.kind).is_some(), "{} is not documented: {what}", answer.kind);
        }
        // What is not in the document is not there.
        let item = &document["paths"][&path];
        for other in METHODS.iter().filter(|other| item.get(*other).is_none()) {
            let answer = asker.ask(other, &filled(&path), ADMIN, Some("{}")).await;
            let what = format!("{other} {path}");
            assert_eq!(answer.status, 405, "{what}");
            answer.check(&what);
            assert!(answer.allow.contains(&method.to_uppercase()), "{what}: {:?}", answer.allow);
        }
    }
    let served = asker.ask("get", "/openapi.json", "", None).await;
    assert_eq!(served.body.as_bytes(), document_text());
}

#[tokio::test]
async fn whatever_is_refused_is_refused_as_a_problem() {
    let server = Server::start(Options::default()).await;
    let asker = Asker::of(&server);
    let long = format!("{{\"reason\":\"{}\"}}", "x".repeat(20_000));
    for (method, path, body, expect) in [
        ("get", "/nothing", None, 404),
        ("get", "/api/upgrade/", None, 404),
        ("post", "/api/upgrade/status", Some("{}"), 405),
        ("get", "/api/upgrade/history?limit=", None, 400),
        ("get", "/api/upgrade/history?limit=+5", None, 400),
        ("get", "/api/upgrade/history?limit=-1", None, 400),
        ("get", "/api/upgrade/history?limit=1&limit=2", None, 400),
        ("get", "/api/upgrade/history?limit=99999999999999999999999", None, 200),
        ("get", "/api/upgrade/jobs/job-1/build-log/api?follow=", None, 400),
        ("get", "/api/upgrade/jobs/%ff%fe%fd%fc/build-log/api", None, 400),
        ("post", "/api/upgrade/rollback", Some(long.as_str()), 413),
        ("post", "/api/upgrade/rollback", Some("null"), 202),
        ("post", "/api/upgrade/rollback", Some("  "), 400),
        ("post", "/api/upgrade/rollback", Some("[\"why\"]"), 422),
        ("post", "/api/upgrade/rollback", Some("\"why\""), 422),
        ("post", "/api/upgrade/settings", Some("[true]"), 422),
        ("post", "/api/upgrade/settings", Some("null"), 422),
        ("post", "/api/upgrade/settings", Some("{\"track_commits\":true} x"), 400),
        ("post", "/api/upgrade/reset", Some("{\"reason\":null}"), 422),
    ] {
        let answer = asker.ask(method, path, ADMIN, body).await;
        let what = format!("{method} {path} {:?}", body.map(|body| &body[..body.len().min(40)]));
        assert_eq!(answer.status, expect, "{what}: {}", answer.body);
        answer.check(&what);
    }
    let request = asker.client.post(format!("{}/api/upgrade/rollback", server.url())).bearer_auth(ADMIN);
    let answer = request.header("content-type", "text/plain").body("{}").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (415, &PROBLEM.parse().unwrap()));
    let request = asker.client.get(format!("{}/api/upgrade/status", server.url())).header("host", "evil.test");
    let answer = request.send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (421, &PROBLEM.parse().unwrap()));
}
