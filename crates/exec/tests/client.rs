//! The asking end: against the server of today, and against answers that another server could give.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use replank_exec::client::{BadUpstream, Client, Failed};
use replank_exec::protocol::{Credential, Request, Stream};
use replank_exec::server::config::Config;
use replank_exec::server::http::Server;
use replank_exec::server::place::{Places, make_private};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const TOKEN: &str = "0123456789abcdef";

/// The real server with a `kubectl` that runs its second argument as a script.
struct Rig {
    client: Client,
    place: tempfile::TempDir,
    task: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn rig() -> Rig {
    let place = tempfile::tempdir().unwrap();
    let (bin, root) = (place.path().join("bin"), place.path().join("clones"));
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(bin.join("kubectl"), "#!/bin/sh\nexec sh -c \"$2\"\n").unwrap();
    std::fs::set_permissions(bin.join("kubectl"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    make_private(&root).unwrap();
    let config = Config::read(|name| match name {
        "EXEC_TOKEN" => Some(TOKEN.to_owned()),
        "EXEC_PORT" => Some("0".to_owned()),
        "EXEC_CLONE_ROOT" => Some(root.display().to_string()),
        _ => None,
    });
    let now = std::fs::metadata(place.path()).unwrap().modified().unwrap();
    let places = Places::open(place.path().join("requests"), now).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(&listener.local_addr().unwrap().to_string(), TOKEN).unwrap();
    let server = Arc::new(Server::new(config.unwrap(), places, BTreeMap::from([("PATH".into(), path.into())])));
    let task = tokio::spawn(server.serve(listener, std::future::pending()));
    Rig { client, place, task }
}

fn run(script: &str) -> Request {
    Request { argv: ["kubectl", "run", script].map(str::to_owned).to_vec(), ..Request::default() }
}

#[test]
fn an_upstream_is_a_host_and_a_port() {
    for (upstream, expect) in [
        ("http://127.0.0.1:7682", Some("127.0.0.1:7682")),
        ("http://localhost:7682/", Some("localhost:7682")),
        ("127.0.0.1:7682", Some("127.0.0.1:7682")),
        (" terminal:7682 ", Some("terminal:7682")),
        ("http://[::1]:7682", Some("[::1]:7682")),
        ("https://127.0.0.1:7682", None),
        ("http://127.0.0.1", None),
        ("http://user@127.0.0.1:7682", None),
        ("http://127.0.0.1:7682/exec", None),
        ("", None),
    ] {
        let client = Client::new(upstream, TOKEN);
        assert_eq!(client.as_ref().ok().map(Client::at), expect, "{upstream}");
        if let Err(error) = client {
            assert_eq!(error, BadUpstream);
        }
    }
    assert!(!format!("{:?}", Client::new("127.0.0.1:1", TOKEN)).contains(TOKEN), "the token shows");
}

#[tokio::test]
async fn both_ends_of_today_agree() {
    let rig = rig().await;
    let about = rig.client.about().await.unwrap();
    assert_eq!((about.max_concurrency, about.takes_credentials), (4, true));
    let done = rig.client.run(&run("echo out; echo err >&2; exit 3")).await.unwrap();
    assert_eq!((done.exit_code, done.stdout.as_str(), done.stderr.as_str()), (3, "out\n", "err\n"));
    let mut lines = Vec::new();
    let script = "printf 'one\\n\\377\\n'; echo two >&2; seq 1 5000; printf last; exit 4";
    let summary = rig.client.stream(&run(script), |stream, line| lines.push((stream, line.to_owned()))).await.unwrap();
    assert_eq!((summary.exit_code, summary.timed_out, summary.client_aborted), (4, false, false));
    let out: Vec<&str> = lines.iter().filter(|l| l.0 == Stream::Stdout).map(|l| l.1.as_str()).collect();
    assert_eq!(
        (out.len(), out[0], out[1], out[2], out[5001], out[5002]),
        (5003, "one", "\u{fffd}", "1", "5000", "last")
    );
    assert!(lines.contains(&(Stream::Stderr, "two".to_owned())));
    // A program that is not there is an outcome, not a failure of the channel.
    let missing = Request { argv: vec!["azcopy".to_owned()], ..Request::default() };
    assert_eq!(rig.client.run(&missing).await.unwrap().exit_code, 127);
    assert_eq!(rig.client.stream(&missing, |_, _| {}).await.unwrap().exit_code, 127);
    let timed = Request { timeout_seconds: Some(1), ..run("sleep 600") };
    let summary = rig.client.stream(&timed, |_, _| {}).await.unwrap();
    assert_eq!((summary.exit_code, summary.timed_out), (124, true));
}

/// Letting go of a request ends its program, in both forms.
#[tokio::test]
async fn who_lets_go_ends_the_program() {
    let rig = rig().await;
    for streams in [false, true] {
        let marker = rig.place.path().join(format!("pid-{streams}"));
        let request = run(&format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 600", marker.display()));
        let client = rig.client.clone();
        let asking = tokio::spawn(async move {
            if streams {
                client.stream(&request, |_, _| {}).await.map(drop)
            } else {
                client.run(&request).await.map(drop)
            }
        });
        until(|| marker.exists()).await;
        asking.abort();
        let stat = format!("/proc/{}/stat", std::fs::read_to_string(&marker).unwrap().trim());
        until(|| std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "))).await;
    }
}

#[tokio::test]
async fn refusals_are_told_apart() {
    let rig = rig().await;
    let wrong = Client::new(rig.client.at(), "another-token-of-16").unwrap();
    assert!(matches!(wrong.run(&run("true")).await, Err(Failed::Token)));
    assert!(matches!(wrong.stream(&run("true"), |_, _| {}).await, Err(Failed::Token)));
    let no = Request { argv: vec!["sh".to_owned()], ..Request::default() };
    match rig.client.run(&no).await {
        Err(Failed::Denied(why)) => assert_eq!(why, "the program is not in the allowlist"),
        other => panic!("{other:?}"),
    }
    let malformed = Request { cwd: Some("here".to_owned()), ..run("true") };
    assert!(matches!(rig.client.run(&malformed).await, Err(Failed::Malformed(_))));
    let large = Request { stdin: Some("x".repeat(9 << 20)), ..run("true") };
    assert!(matches!(rig.client.run(&large).await, Err(Failed::TooLarge)), "the server need not read it all");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let nobody = Client::new(&closed.to_string(), TOKEN).unwrap();
    assert!(matches!(nobody.run(&run("true")).await, Err(Failed::Unreachable { .. })));
    assert!(matches!(nobody.about().await, Err(Failed::Unreachable { .. })));
}

/// One answer, whatever is asked; and what was asked.
async fn answering(answer: &str) -> (Client, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(&listener.local_addr().unwrap().to_string(), TOKEN).unwrap();
    let answer = answer.to_owned();
    let asked = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut got = Vec::new();
        let mut buffer = [0; 4096];
        // A request's body is JSON: it is whole when it ends in a brace.
        while !(got.ends_with(b"}") || (got.starts_with(b"GET") && got.ends_with(b"\r\n\r\n"))) {
            let count = stream.read(&mut buffer).await.unwrap();
            assert!(count > 0, "the client has gone");
            got.extend_from_slice(&buffer[..count]);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        String::from_utf8(got).unwrap()
    });
    (client, asked)
}

fn ok(kind: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// What the contract's other servers say, to the letter, is understood; what is asked of them is the contract's, to the letter.
#[tokio::test]
async fn another_server_of_the_contract_is_understood() {
    let body = r#"{"exit_code":0,"stdout":"x","stderr":"","stdout_truncated":false,"stderr_truncated":true,"duration_ms":12,"timed_out":false,"more":1}"#;
    let (client, asked) = answering(&ok("application/json", body)).await;
    let request = Request {
        argv: vec!["git".to_owned(), "status".to_owned()],
        cwd: Some("/tmp/elb-upgrade/job".to_owned()),
        timeout_seconds: Some(60),
        ..Request::default()
    };
    let done = client.run(&request).await.unwrap();
    assert_eq!((done.stdout.as_str(), done.stderr_truncated, done.duration_ms), ("x", true, 12));
    let asked = asked.await.unwrap();
    let (head, sent) = asked.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /exec HTTP/1.1\r\n"), "{head}");
    assert!(head.to_ascii_lowercase().contains(&format!("x-exec-token: {TOKEN}")), "{head}");
    let sent: Value = serde_json::from_str(sent).unwrap();
    let expect = serde_json::json!({"argv": ["git", "status"], "cwd": "/tmp/elb-upgrade/job", "timeout_seconds": 60});
    assert_eq!(sent, expect, "what is not set is not sent");

    let events = concat!(
        "{\"stream\":\"stdout\",\"line\":\"a \\\"quoted\\\" line\"}\n",
        "{\"stream\":\"stderr\",\"line\":\"\"}\n",
        "\n",
        "{\"exit_code\":1,\"duration_ms\":5,\"timed_out\":false,\"client_aborted\":false}\n"
    );
    let (client, asked) = answering(&ok("application/x-ndjson", events)).await;
    let mut lines = Vec::new();
    let credential = Credential { username: "u".to_owned(), password: "p".to_owned() };
    let request = Request { git_credential: Some(credential), ..request };
    let summary = client.stream(&request, |stream, line| lines.push((stream, line.to_owned()))).await.unwrap();
    assert_eq!(lines, [(Stream::Stdout, "a \"quoted\" line".to_owned()), (Stream::Stderr, String::new())]);
    assert_eq!(summary.exit_code, 1);
    let asked = asked.await.unwrap();
    assert!(asked.starts_with("POST /exec/stream HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains(r#""git_credential":{"username":"u","password":"p"}"#), "{asked}");

    let (client, asked) = answering(&ok("application/json", r#"{"status":"ok","max_concurrency":2}"#)).await;
    let about = client.about().await.unwrap();
    assert_eq!((about.max_concurrency, about.takes_credentials), (2, false));
    assert!(!asked.await.unwrap().to_ascii_lowercase().contains("x-exec-token"), "health needs no token");
}

#[tokio::test]
async fn answers_that_make_no_sense_are_never_taken_for_success() {
    let line = "{\"stream\":\"stdout\",\"line\":\"x\"}\n";
    let end = "{\"exit_code\":0,\"duration_ms\":5,\"timed_out\":false,\"client_aborted\":false}\n";
    for (body, why) in [
        (String::new(), "without a summary"),
        (line.to_owned(), "without a summary"),
        (format!("{line}{{\"exit_code\":0"), "inside a line"),
        (format!("{end}{line}"), "after the summary"),
        (format!("{end}{end}"), "after the summary"),
        ("<html>\n".to_owned(), "no event"),
        ("{\"stream\":\"other\",\"line\":\"x\"}\n".to_owned(), "no event"),
    ] {
        let (client, _) = answering(&ok("application/x-ndjson", &body)).await;
        match client.stream(&run("x"), |_, _| {}).await {
            Err(Failed::Broken(told)) => assert!(told.contains(why), "{body:?}: {told}"),
            other => panic!("{body:?}: {other:?}"),
        }
    }
    // It broke off before its announced end.
    let cut = format!("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{line}{end}");
    let (client, _) = answering(&cut).await;
    assert!(matches!(client.stream(&run("x"), |_, _| {}).await, Err(Failed::Broken(_))));
    let (client, _) = answering(&ok("application/json", "{}")).await;
    assert!(matches!(client.run(&run("x")).await, Err(Failed::Broken(_))));
}

#[tokio::test]
async fn statuses_are_the_contract_s() {
    let answer = |status: &str, more: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    for (head, more, body, expect) in [
        ("503 Busy", "", "{}", "the exec server is busy"),
        ("429 Slow", "Retry-After: 7\r\n", "{}", "7"),
        ("429 Slow", "", "", "the exec server limits"),
        ("403 No", "", "{\"detail\":\"not\\nthis\"}", "does not allow this: not this"),
        ("400 Bad", "", "plain words", "malformed: plain words"),
        ("413 Large", "", "", "too large"),
        ("500 Oops", "", "{\"error\":1}", "status 500"),
        ("302 Elsewhere", "Location: http://example.org/\r\n", "", "status 302"),
    ] {
        let (client, _) = answering(&answer(head, more, body)).await;
        let failed = client.run(&run("x")).await.unwrap_err();
        let told = match &failed {
            Failed::Limited { retry_after: Some(seconds) } => seconds.to_string(),
            other => other.to_string(),
        };
        assert!(told.contains(expect), "{head}: {told}");
    }
}

/// A reader that takes its time holds the program back, and loses nothing.
#[tokio::test]
async fn a_slow_reader_gets_every_line() {
    let rig = rig().await;
    let (mut count, mut last) = (0, String::new());
    let each = |_: Stream, line: &str| {
        if count % 20_000 == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        count += 1;
        last = line.to_owned();
    };
    let summary = rig.client.stream(&run("seq 1 200000"), each).await.unwrap();
    assert_eq!((summary.exit_code, count, last.as_str()), (0, 200_000, "200000"));
}

async fn until(is: impl Fn() -> bool) {
    for _ in 0..1_000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s");
}
