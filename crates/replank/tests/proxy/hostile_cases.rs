//! Clients and backends that misbehave: what is never sent twice, cut off, refused, and never told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use replank::proxy::Limits;
use replank_adapters::platform::docker::proxy_api::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::rig::{App, Rig, head, id, listener, raw_exchange, soon};

/// A backend that answers each connection's first request if it is a GET, and closes after reading whatever comes next.
/// Returns how many requests it has read, by whether they were GETs.
async fn fickle(rig: &Rig, digit: char) -> (Arc<AtomicU64>, Arc<AtomicU64>) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    rig.names.set(&id(digit), socket.local_addr().unwrap());
    let (gets, others) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let counters = (Arc::clone(&gets), Arc::clone(&others));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            let (gets, others) = counters.clone();
            tokio::spawn(async move {
                let first = head(&mut stream).await;
                if !first.starts_with("GET") {
                    others.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                gets.fetch_add(1, Ordering::SeqCst);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
                let mut buffer = [0; 1024];
                if let Ok(1..) = stream.read(&mut buffer).await {
                    let counter = if buffer.starts_with(b"GET") { &gets } else { &others };
                    counter.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    (gets, others)
}

#[tokio::test]
async fn what_is_not_idempotent_is_sent_once() {
    let rig = Rig::web().await;
    let (gets, others) = fickle(&rig, 'a').await;
    rig.route(1, 'a').await;
    for (method, status) in [("POST", "502"), ("DELETE", "502"), ("PATCH", "502"), ("PUT", "502")] {
        // A kept connection lies ready each time.
        let warm = raw_exchange(&rig, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(warm.contains(" 200 "), "{warm}");
        let before = others.load(Ordering::SeqCst);
        let answer = raw_exchange(&rig, &format!("{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{method}: {answer}");
        assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
        assert_eq!(others.load(Ordering::SeqCst), before + 1, "{method}");
    }
    // A GET that meets a closed connection is sent again, once, over a new one.
    let before = gets.load(Ordering::SeqCst);
    let answer = raw_exchange(&rig, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    assert!(answer.contains(" 200 "), "{answer}");
    assert!(gets.load(Ordering::SeqCst) <= before + 2);
    rig.closed().await;
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let limits = Limits { header_read: Duration::from_millis(300), ..Limits::default() };
    let rig = Rig::with(limits, &[("web", listener(Protocol::Http))]).await;
    let a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    for begin in ["", "P", "PRI", "G", "GET / HTTP/1.1\r\nHost: x\r\nX-Slow:"] {
        let mut stream = rig.raw("web").await;
        stream.write_all(begin.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // A reset counts as cut off too. h2's own ping ends a silent connection after its prior-knowledge preface.
        if begin != "PRI" {
            let _end = soon(stream.read_to_end(&mut rest)).await;
        }
    }
    // One byte at a time does not help.
    let mut stream = rig.raw("web").await;
    let start = Instant::now();
    let dripping = async {
        for byte in b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ".iter().chain(std::iter::repeat_n(&b'a', 200)) {
            stream.write_all(&[*byte]).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        stream.read_to_end(&mut Vec::new()).await
    };
    let _cut = soon(dripping).await;
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(a.seen(), 0);
    rig.closed().await;
}

#[tokio::test]
async fn ambiguous_requests_reach_nobody_twice() {
    let rig = Rig::web().await;
    let a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let huge = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(200 * 1024));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(300));
    for (request, refusal) in [
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na", "400"),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "400"),
        ("POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\nBad Name: 1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", "400"),
        ("CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
        (&huge, "431"),
        (&many, "431"),
    ] {
        let answer = raw_exchange(&rig, request).await;
        let begin = &request[..request.len().min(60)];
        assert!(answer.starts_with(&format!("HTTP/1.1 {refusal} ")), "{begin:?}: {answer}");
    }
    assert_eq!(a.seen(), 0);
    // Both lengths: whichever the proxy believed, the backend may see one request only, framed anew.
    for lengths in
        ["Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n"]
    {
        let before = a.seen();
        let smuggled = "5c\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
        let request = format!("POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lengths}\r\n0\r\n\r\n{smuggled}");
        let answer = raw_exchange(&rig, &request).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(a.seen() <= before + 1, "{lengths:?}");
    }
    rig.closed().await;
}

#[tokio::test]
async fn a_backend_that_is_gone_is_reported_at_once_and_not_described() {
    let rig = Rig::web().await;
    let start = Instant::now();
    let nothing = raw_exchange(&rig, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(nothing.starts_with("HTTP/1.1 503 "), "{nothing}");
    rig.route(1, 'a').await;
    let gone = raw_exchange(&rig, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc").await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(gone.starts_with("HTTP/1.1 502 "), "{gone}");
    let (head, body) = gone.split_once("\r\n\r\n").unwrap();
    assert!(head.to_lowercase().contains("connection: close"), "{head}");
    assert_eq!(body.lines().count(), 1, "{body}");
    assert!(!gone.contains("aaaa") && !gone.contains("127.0.0.1"), "{gone}");
    rig.closed().await;
}

#[tokio::test]
async fn a_backend_that_restarts_is_waited_for() {
    let rig = Rig::web().await;
    let a = App::start(&rig.names, 'a').await;
    // A port that refuses: bound once, closed again.
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    rig.names.set(&id('a'), refusing);
    rig.route(1, 'a').await;
    let mut stream = rig.raw("web").await;
    stream.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx").await.unwrap();
    crate::rig::until("the request waits", async || rig.open().await == [(id('a'), 1)].into()).await;
    rig.names.set(&id('a'), a.address);
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.ends_with("a 1"), "{answer}");
    assert_eq!(a.seen(), 1);
}

#[tokio::test]
async fn an_address_that_became_a_strangers_gets_nothing() {
    let rig = Rig::web().await;
    let stranger = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let warm =
        raw_exchange(&rig, "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx").await;
    assert!(warm.ends_with("a 1"), "{warm}");
    // The container is gone: its name does not resolve, though somebody answers at its address.
    rig.names.forget(&id('a'));
    let answer = raw_exchange(&rig, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx").await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert_eq!(stranger.seen(), 1);
}

#[tokio::test]
async fn h2c_is_never_passed_through_by_upgrade() {
    let rig = Rig::web().await;
    let _a = App::start(&rig.names, 'a').await;
    rig.route(1, 'a').await;
    let request = "GET /headers HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n";
    let answer = raw_exchange(&rig, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(!answer.to_lowercase().contains("h2c") && !answer.to_lowercase().contains("http2-settings"), "{answer}");
}
