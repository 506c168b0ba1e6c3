//! What clients of a listener see: before, during and after a switch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use replank::proxy::Limits;
use replank_adapters::platform::docker::proxy_api::{Protocol, Routes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::rig::{App, Rig, echo, head, id, listener, say, side, soon, until};

type Http = Client<HttpConnector, Full<Bytes>>;

/// A keep-alive client that never sends a request twice by itself.
fn client() -> Http {
    Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http()
}

async fn ask(client: &Http, method: &str, url: &str, body: &'static str) -> Result<(StatusCode, String), String> {
    let request = Request::builder().method(method).uri(url).body(Full::from(body)).unwrap();
    let answer = client.request(request).await.map_err(|error| format!("{error:?}"))?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(|error| format!("{error:?}"))?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_fails_no_request_and_none_reaches_the_old_side_after_it() {
    const CLIENTS: u64 = 8;
    const SWITCHES: u64 = 50;
    const PER_SWITCH: u64 = 110;
    let rig = Rig::web().await;
    let (_a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    rig.route(0, 'a').await;

    // Generations whose switch was begun, and was acknowledged. Even ones are a's.
    let begun = Arc::new(AtomicU64::new(0));
    let acknowledged = Arc::new(AtomicU64::new(0));
    let (asked, certain) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (begun, acknowledged) = (Arc::clone(&begun), Arc::clone(&acknowledged));
            let (asked, certain) = (Arc::clone(&asked), Arc::clone(&certain));
            let (client, url) = (client(), rig.url("/"));
            tokio::spawn(async move {
                while acknowledged.load(Ordering::SeqCst) < SWITCHES {
                    let before = acknowledged.load(Ordering::SeqCst);
                    let (method, body) = if number % 2 == 0 { ("GET", "") } else { ("POST", "xy") };
                    let answer = ask(&client, method, &url, body).await;
                    let after = begun.load(Ordering::SeqCst);
                    let (status, text) = answer.expect("a request failed");
                    assert_eq!(status, StatusCode::OK, "{text}");
                    if before == after {
                        let expect = if before % 2 == 0 { 'a' } else { 'b' };
                        assert!(text.starts_with(expect), "generation {before} is {expect}'s, but {text:?} answered");
                        certain.fetch_add(1, Ordering::SeqCst);
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let own = client();
    for generation in 1..=SWITCHES {
        let goal = asked.load(Ordering::SeqCst) + PER_SWITCH;
        until("clients go on", async || {
            asked.load(Ordering::SeqCst) >= goal || clients.iter().any(|c| c.is_finished())
        })
        .await;
        let digit = if generation % 2 == 0 { 'a' } else { 'b' };
        begun.store(generation, Ordering::SeqCst);
        rig.route(generation, digit).await;
        acknowledged.store(generation, Ordering::SeqCst);
        let (_, text) = ask(&own, "GET", &rig.url("/"), "").await.unwrap();
        assert_eq!(text, digit.to_string(), "the first request after the switch");
    }
    for client in clients {
        client.await.unwrap();
    }
    assert!(asked.load(Ordering::SeqCst) >= 5_000);
    assert!(certain.load(Ordering::SeqCst) >= 1_000, "the test proved too little");
    rig.closed().await;
}

#[tokio::test]
async fn kept_alive_connections_are_told_to_close_after_a_switch() {
    let rig = Rig::web().await;
    let (_a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    rig.route(1, 'a').await;
    let mut stream = rig.raw("web").await;
    for (expect, closes) in [(b'a', false), (b'b', true)] {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let head = head(&mut stream).await.to_lowercase();
        assert_eq!(head.contains("connection: close"), closes, "{head}");
        assert_eq!(stream.read_u8().await.unwrap(), expect);
        if !closes {
            rig.route(2, 'b').await;
        }
    }
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0, "closed after the answer");
}

const UPGRADE: &[u8] = b"GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

#[tokio::test]
async fn upgraded_connections_stay_with_their_side() {
    let rig = Rig::web().await;
    let (_a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    rig.route(1, 'a').await;
    let mut old = rig.raw("web").await;
    old.write_all(UPGRADE).await.unwrap();
    let head_of_old = head(&mut old).await.to_lowercase();
    assert!(head_of_old.starts_with("http/1.1 101") && head_of_old.contains("upgrade: websocket"), "{head_of_old}");
    assert_eq!(say(&mut old, "one").await, "aone");
    rig.route(2, 'b').await;
    assert_eq!(say(&mut old, "two").await, "atwo");
    let mut new = rig.raw("web").await;
    new.write_all(UPGRADE).await.unwrap();
    head(&mut new).await;
    assert_eq!(say(&mut new, "three").await, "bthree");
    assert_eq!(rig.open().await, [(id('a'), 1), (id('b'), 1)].into());
    drop(old);
    until("the old one is gone", async || rig.open().await == [(id('b'), 1)].into()).await;
    drop(new);
    rig.closed().await;
}

#[tokio::test]
async fn a_stream_of_events_flows_at_once_and_survives_a_switch() {
    let rig = Rig::web().await;
    let (a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    rig.route(1, 'a').await;
    let request = Request::get(rig.url("/events")).body(Full::default()).unwrap();
    let mut answer = client().request(request).await.unwrap();
    let mut next = async || {
        let frame = soon(answer.body_mut().frame()).await;
        frame.map(|frame| String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap())
    };
    a.events.send("one").unwrap();
    assert_eq!(next().await.as_deref(), Some("data: aone\n\n"));
    rig.route(2, 'b').await;
    assert_eq!(rig.open().await, [(id('a'), 1)].into());
    a.events.send("two").unwrap();
    assert_eq!(next().await.as_deref(), Some("data: atwo\n\n"));
    a.events.send("end").unwrap();
    assert_eq!(next().await, None);
    rig.closed().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_the_backend_back() {
    const BOUND: u64 = 32 * 1024 * 1024;
    let rig = Rig::web().await;
    let a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let mut stream = rig.raw("web").await;
    stream.write_all(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    head(&mut stream).await;
    let mut before = 0;
    let mut still = 0;
    until("the flood stands still", async || {
        let now = a.flooded.load(Ordering::SeqCst);
        still = if now == before { still + 1 } else { 0 };
        before = now;
        assert!(now < BOUND, "{now} bytes were taken for a client that reads nothing");
        still >= 30
    })
    .await;
    drop(stream);
    rig.closed().await;
}

#[tokio::test]
async fn h2_without_tls_is_spoken_and_moves_without_loss() {
    let rig = Rig::web().await;
    let (_a, _b) = (App::start(&rig.names, 'a').await, App::start(&rig.names, 'b').await);
    rig.route(1, 'a').await;
    // A request that the client had not sent when GOAWAY came is the client's to send on the next connection.
    let client: Http = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    for generation in 2..12 {
        let many = (0..40).map(|_| {
            let (client, url) = (client.clone(), rig.url("/"));
            tokio::spawn(async move { ask(&client, "POST", &url, "xyz").await })
        });
        let many: Vec<_> = many.collect();
        let digit = if generation % 2 == 0 { 'b' } else { 'a' };
        rig.route(generation, digit).await;
        for one in many {
            let (status, text) = soon(one).await.unwrap().expect("a request failed");
            assert!(status == StatusCode::OK && text.ends_with(" 3"), "{status} {text}");
        }
        assert_eq!(ask(&client, "GET", &rig.url("/"), "").await.unwrap().1, digit.to_string());
    }
    rig.closed().await;
}

#[tokio::test]
async fn raw_tcp_stays_with_its_side_and_half_closes() {
    let rig = Rig::with(Limits::default(), &[("db", listener(Protocol::Tcp))]).await;
    for digit in ['a', 'b'] {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        rig.names.set(&id(digit), socket.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                tokio::spawn(async move {
                    echo(digit, &mut stream).await;
                    // Reached when the client has closed its half: the other half must still work.
                    let _gone = stream.write_all(b"bye").await;
                });
            }
        });
    }
    let to = |generation, digit| Routes { generation, primary: side(digit, &["db"]), fallback: None };
    assert_eq!(rig.put(&to(1, 'a')).await.0, StatusCode::OK);
    let mut old = rig.raw("db").await;
    assert_eq!(say(&mut old, "x").await, "ax");
    assert_eq!(rig.put(&to(2, 'b')).await.0, StatusCode::OK);
    assert_eq!(say(&mut old, "y").await, "ay");
    let mut new = rig.raw("db").await;
    assert_eq!(say(&mut new, "z").await, "bz");
    assert_eq!(rig.open().await, [(id('a'), 1), (id('b'), 1)].into());
    old.shutdown().await.unwrap();
    let mut rest = String::new();
    soon(old.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "bye");
    drop(new);
    rig.closed().await;
}

#[tokio::test]
async fn headers_are_cleaned_on_both_ways() {
    let rig = Rig::web().await;
    let _a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let request = Request::get(rig.url("/headers"))
        .header("host", "shop.example")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-host", "evil.example")
        .header("connection", "x-drop")
        .header("x-drop", "1")
        .header("te", "trailers")
        .body(Full::default())
        .unwrap();
    let answer = client().request(request).await.unwrap();
    assert!(answer.headers().get("x-private").is_none(), "{:?}", answer.headers());
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let mut lines: Vec<&str> = std::str::from_utf8(&body).unwrap().lines().collect();
    lines.sort_unstable();
    let expect = [
        "host: shop.example",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: shop.example",
        "x-forwarded-proto: http",
    ];
    assert_eq!(lines, expect);
}

#[tokio::test]
async fn stopping_lets_open_requests_end() {
    let rig = Rig::web().await;
    let a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let request = Request::get(rig.url("/events")).body(Full::default()).unwrap();
    let answer = client().request(request).await.unwrap();
    let address = rig.at("web");
    let Rig { proxy, dir, .. } = rig;
    let stop = tokio::spawn(proxy.stop());
    until("no new connections", async || tokio::net::TcpStream::connect(address).await.is_err()).await;
    a.events.send("last").unwrap();
    a.events.send("end").unwrap();
    let body = soon(answer.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(&body[..], b"data: alast\n\n");
    soon(stop).await.unwrap();
    assert!(!dir.path().join("control.sock").exists());
}
