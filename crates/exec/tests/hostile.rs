//! HTTP as nobody should speak it, and clients that are slow: none of it holds a slot, and the next request is served.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Rig, TOKEN, run, split, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// One slot, which each check wants to find free.
async fn one_slot() -> Rig {
    Rig::start(&[("EXEC_MAX_CONCURRENCY", "1"), ("EXEC_MAX_BODY_BYTES", "1024")]).await
}

fn post(path: &str, rest: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nX-Exec-Token: {TOKEN}\r\n{rest}")
}

/// Everything that the server says until it closes, or until nothing more is to come.
async fn answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A connection that is broken off has said what it had to say.
    stream.read_to_end(&mut text).await.ok();
    String::from_utf8_lossy(&text).into_owned()
}

fn statuses(text: &str) -> Vec<u16> {
    text.match_indices("HTTP/1.").map(|(at, _)| text[at + 9..at + 12].parse().unwrap()).collect()
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_forgotten() {
    let rig = one_slot().await;
    let body = run("echo ran").to_string();
    let length = body.len();
    let fine = |rest: &str| post("/exec", &format!("Connection: close\r\n{rest}"));
    let chunked = |chunks: &str| fine(&format!("Transfer-Encoding: chunked\r\n\r\n{chunks}"));
    let long = "x".repeat(1025);
    // Connections that the server keeps open for more are shut on our side, so that each answer has an end.
    let check = async |name: &str, said: &str, expect: &[u16]| {
        let mut stream = rig.say(said.as_bytes()).await;
        let mut text = Vec::new();
        // What breaks off is not waited for longer than a head may take.
        let all = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut text)).await;
        assert!(all.is_ok(), "{name}: the connection stays: {}", String::from_utf8_lossy(&text));
        let text = String::from_utf8_lossy(&text).into_owned();
        assert_eq!(statuses(&text), expect, "{name}: {text}");
        assert_eq!(rig.exec(run("echo next")).await.stdout, "next\n", "{name}");
    };
    check("bytes", "\u{0}\u{1}\u{2}\u{3}\r\n\r\n", &[400]).await;
    check("text", "hello\r\n\r\n", &[400]).await;
    check("tls", "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}\r\n\r\n", &[400]).await;
    check("http2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[]).await;
    check("version", "POST /exec HTTP/9.9\r\n\r\n", &[400]).await;
    check("method", "FETCH /exec HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", &[405]).await;
    check("path", "POST /../exec HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", &[404]).await;
    check("absolute path", &fine("\r\n").replace("/exec ", "http://evil.example/other "), &[404]).await;
    check("header", &fine("a b: c\r\n\r\n"), &[400]).await;
    check("folded header", &fine("a: b\r\n c\r\n\r\n"), &[400]).await;
    check("one huge header", &fine(&format!("a: {}\r\n\r\n", "x".repeat(600_000))), &[431]).await;
    check("many headers", &fine(&format!("{}\r\n", "a: b\r\n".repeat(200))), &[431]).await;
    check("two tokens", &fine(&format!("X-Exec-Token: wrong\r\nContent-Length: {length}\r\n\r\n{body}")), &[200]).await;
    check("a wrong token first", &fine("\r\n").replace(TOKEN, "wrong"), &[401]).await;
    check("length below zero", &fine(&format!("Content-Length: -1\r\n\r\n{body}")), &[400]).await;
    check("length with a sign", &fine(&format!("Content-Length: +{length}\r\n\r\n{body}")), &[400]).await;
    check("length without end", &fine("Content-Length: 99999999999999999999999\r\n\r\n"), &[400]).await;
    check("two lengths", &fine(&format!("Content-Length: {length}\r\nContent-Length: 3\r\n\r\n{body}")), &[400]).await;
    let twice = format!("Content-Length: {length}\r\nContent-Length: {length}\r\n\r\n{body}");
    check("one length twice", &fine(&twice), &[200]).await;
    let both = format!("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n");
    check("chunks and a length", &fine(&both), &[200]).await;
    check("another coding", &fine(&format!("Transfer-Encoding: gzip\r\n\r\n{body}")), &[400]).await;
    check("no body", &fine("\r\n"), &[400]).await;
    check("chunks", &chunked(&format!("{length:x}\r\n{body}\r\n0\r\n\r\n")), &[200]).await;
    check("a chunk's size", &chunked("zz\r\nx\r\n0\r\n\r\n"), &[400]).await;
    check("a chunk's end", &chunked("1\r\nxyz\r\n0\r\n\r\n"), &[400]).await;
    check("a huge chunk's size", &chunked("ffffffffffffffffff\r\nx"), &[400]).await;
    check("chunks over the cap", &chunked(&format!("{:x}\r\n{long}\r\n0\r\n\r\n", long.len())), &[413]).await;
    check("many chunks over the cap", &chunked(&format!("{}0\r\n\r\n", "1\r\nx\r\n".repeat(2000))), &[413]).await;
    check("length over the cap", &fine(&format!("Content-Length: 1025\r\n\r\n{long}")), &[413]).await;
    let waits = format!("Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n{body}");
    check("expecting to go on", &fine(&waits), &[100, 200]).await;
    check("expecting, over the cap", &fine("Expect: 100-continue\r\nContent-Length: 9999\r\n\r\n"), &[413]).await;
    let stranger = fine("Expect: 100-continue\r\nContent-Length: 99\r\n\r\n").replace(TOKEN, "wrong");
    check("expecting, without a token", &stranger, &[401]).await;
    // Old clients: no chunks in the answer, and its end is the connection's.
    let old =
        |path: &str| post(path, &format!("Content-Length: {length}\r\n\r\n{body}")).replace("HTTP/1.1", "HTTP/1.0");
    check("1.0", &old("/exec"), &[200]).await;
    check("1.0, streamed", &old("/exec/stream"), &[200]).await;
    let mut stream = rig.say(old("/exec/stream").as_bytes()).await;
    let (_, head, body) = split(&answer(&mut stream).await);
    assert!(!head.contains("chunked"), "{head}");
    assert_eq!(support::events(&body).0[0].1, "ran");
    // JSON that is deep, or says something twice.
    let nested = format!("{{\"argv\":{}{}}}", "[".repeat(500), "]".repeat(500));
    for body in [&nested, r#"{"argv":["elb"],"argv":["git"]}"#, "\u{feff}{}", "null", r#"{"argv":["elb",1]}"#] {
        check(body, &fine(&format!("Content-Length: {}\r\n\r\n{body}", body.len())), &[400]).await;
    }
}

/// A body that is refused is heard out: a client in the middle of sending sees the answer and no broken connection.
#[tokio::test]
async fn a_refused_body_is_answered() {
    let rig = Rig::start(&[]).await;
    let most = 8 << 20;
    let body = |length: usize| {
        let argv = json!({"argv": ["elb"], "stdin": ""}).to_string();
        format!("{}{}", argv, " ".repeat(length - argv.len()))
    };
    for (name, length, token, expect) in [
        ("at the cap", most, TOKEN, 200),
        ("over it", most + 1, TOKEN, 413),
        ("far over it", 4 * most, TOKEN, 413),
        ("without a token", 900_000, "wrong", 401),
    ] {
        for chunked in [false, true] {
            let head = post("/exec", "Connection: close\r\n").replace(TOKEN, token);
            let body = body(length);
            let text = if chunked {
                format!("{head}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
            } else {
                format!("{head}Content-Length: {length}\r\n\r\n{body}")
            };
            let mut stream = TcpStream::connect(rig.address).await.unwrap();
            stream.write_all(text.as_bytes()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(statuses(&answer(&mut stream).await), [expect], "{name}, chunked: {chunked}");
        }
    }
}

/// One connection serves many requests, also such as were sent before the first was answered.
#[tokio::test]
async fn a_connection_is_used_again() {
    let rig = one_slot().await;
    let body = run("echo ran").to_string();
    let request = |path: &str| post(path, &format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    let health = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = request("/exec").replace("Host: x", "Host: x\r\nConnection: close");
    let all =
        [&request("/exec"), &request("/exec/stream"), health, &request("/exec"), &last].map(String::from).concat();
    let mut stream = rig.say(all.as_bytes()).await;
    let text = answer(&mut stream).await;
    assert_eq!(statuses(&text), [200; 5], "{text}");
    assert_eq!(text.matches("\"ran").count(), 4, "{text}");
}

/// Heads and bodies that never come, and connections that say nothing: more of them than the server keeps at a time. Who comes
/// after them waits for as long as a head may take, and no longer.
#[tokio::test]
async fn slow_requests_pass() {
    let rig = one_slot().await;
    let mut slow = Vec::new();
    for number in 0..80 {
        let said = match number % 8 {
            0 | 1 => String::new(),
            2 | 3 => "POST /exec HTT".to_owned(),
            4..7 => post("/exec", "A: "),
            _ => post("/exec", "Content-Length: 100\r\n\r\n{").replace(TOKEN, "wrong"),
        };
        slow.push(rig.say(said.as_bytes()).await);
    }
    let next = tokio::time::timeout(Duration::from_secs(25), rig.exec(run("echo ran"))).await;
    assert_eq!(next.expect("they are given up").stdout, "ran\n");
    // Nor does a body that does not end, from somebody with a token, hold the slot.
    let _slow = rig.say(post("/exec", "Content-Length: 100\r\n\r\n{").as_bytes()).await;
    assert_eq!(rig.exec(run("echo ran")).await.stdout, "ran\n");
}

/// Bytes that a process has written, and what it waits for.
fn written(pid: &str) -> (u64, String) {
    let at = Path::new("/proc").join(pid.trim());
    let io = std::fs::read_to_string(at.join("io")).unwrap_or_default();
    let bytes = io.lines().find_map(|line| line.strip_prefix("wchar: ")).map_or(0, |bytes| bytes.parse().unwrap());
    let stat = std::fs::read_to_string(at.join("stat")).unwrap_or_default();
    (bytes, stat.rsplit(')').next().unwrap_or_default().trim_start().chars().take(1).collect())
}

/// A client that reads nothing holds its program back before much is written, and gets all of it when it reads on.
#[tokio::test]
async fn a_slow_reader_holds_its_program_back_and_loses_nothing() {
    const LINES: usize = 3_000_000;
    let rig = one_slot().await;
    let marker = rig.place.path().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec seq {LINES}", marker.display());
    let mut stream = rig.begin("/exec/stream", &run(&script)).await;
    until(|| marker.exists()).await;
    let pid = std::fs::read_to_string(&marker).unwrap();
    // Asleep, and no byte further for a while: it waits for its pipe.
    let (mut last, mut times) = (0, 0);
    while times < 50 {
        let (bytes, state) = written(&pid);
        times = if bytes == last && bytes > 0 && state == "S" { times + 1 } else { 0 };
        last = bytes;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(last < 16_000_000, "{last} bytes were taken from it");
    let text = answer(&mut stream).await;
    let (lines, summary) = support::events(&split(&text).2);
    assert_eq!((summary.exit_code, lines.len()), (0, LINES));
    assert!(lines.iter().enumerate().all(|(at, (_, line))| *line == (at + 1).to_string()));
}

/// A client that takes nothing holds neither slot nor directory once its program has ended, and its connection not for ever.
#[tokio::test]
async fn a_stuck_reader_holds_nothing() {
    let rig = one_slot().await;
    let marker = rig.place.path().join("began");
    let loud = |then: &str| format!("touch {}; {then}", marker.display());
    let mut stuck = Vec::new();
    for (path, script, seconds) in [
        // More than the sockets hold, so that the answer stands in the server.
        ("/exec", loud("head -c 8000000 /dev/zero"), 60),
        ("/exec/stream", loud("yes | head -c 100000"), 60),
        // Killed by its time, while the client does not even take what it has said.
        ("/exec/stream", loud("yes"), 1),
    ] {
        let mut request = run(&script);
        request["timeout_seconds"] = json!(seconds);
        stuck.push(rig.begin(path, &request).await);
        until(|| marker.exists()).await;
        std::fs::remove_file(&marker).unwrap();
        let begun = Instant::now();
        while rig.post("/exec", &run("true")).await.0 == 503 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{path} {script}: the slot is still taken");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        until(|| rig.requests().is_empty()).await;
    }
    // More such clients than there are connections, who ask without a token and never read: they are given up.
    let much = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100_000);
    let mut deaf = Vec::new();
    for _ in 0..64 {
        let stream = TcpStream::connect(rig.address).await.unwrap();
        let (read, mut write) = stream.into_split();
        let much = much.clone();
        deaf.push((read, tokio::spawn(async move { write.write_all(much.as_bytes()).await })));
    }
    let next = tokio::time::timeout(Duration::from_secs(60), rig.exec(run("echo ran"))).await;
    assert_eq!(next.expect("they are given up").stdout, "ran\n");
    drop((stuck, deaf));
}
