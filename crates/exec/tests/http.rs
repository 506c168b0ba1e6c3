//! The server over real sockets with real programs: who may ask, how much, and what is answered.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use replank_exec::protocol::{CUT_MARK, Stream};
use serde_json::{Value, json};
use support::{Rig, TOKEN, run, until};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

#[tokio::test]
async fn health_needs_no_token_and_everything_else_does() {
    let rig = Rig::start(&[]).await;
    let (status, _, body) = rig.ask("GET /healthz HTTP/1.1", "").await;
    assert_eq!((status, body.as_str()), (200, r#"{"status":"ok","max_concurrency":4}"#));
    let body = run("true").to_string();
    for token in
        ["", "\r\nX-Exec-Token: wrong", "\r\nX-Exec-Token: 0123456789abcde", "\r\nX-Exec-Token: 0123456789abcdefg"]
    {
        for path in ["/exec", "/exec/stream"] {
            let (status, _, answer) = rig.ask(&format!("POST {path} HTTP/1.1{token}"), &body).await;
            assert_eq!(status, 401, "{token:?}: {answer}");
        }
    }
    assert_eq!(rig.post("/exec", &run("true")).await.0, 200);
    assert_eq!(rig.post("/other", &run("true")).await.0, 404);
    assert_eq!(rig.ask(&format!("GET /exec HTTP/1.1\r\nX-Exec-Token: {TOKEN}"), "").await.0, 405);
}

#[tokio::test]
async fn a_program_s_outcome_comes_back() {
    let rig = Rig::start(&[("EXEC_RUN_MAX_OUTPUT_BYTES", "2048")]).await;
    let done = rig.exec(run("echo out; echo err >&2; exit 3")).await;
    assert_eq!((done.exit_code, done.stdout.as_str(), done.stderr.as_str()), (3, "out\n", "err\n"));
    assert!(!done.timed_out && !done.stdout_truncated && !done.stderr_truncated);
    let done = rig.exec(run("head -c 5000 /dev/zero | tr '\\0' x; echo err >&2")).await;
    assert_eq!((done.stdout.len(), done.stdout_truncated, done.stderr_truncated), (2048, true, false));
    let done = rig.exec(json!({"argv": ["kubectl", "run", "cat; pwd; cat a/b"], "stdin": "hello "})).await;
    assert!(done.stdout.starts_with("hello ") && done.stdout.contains("request-"), "{done:?}");
    let done =
        rig.exec(json!({"argv": ["kubectl", "run", "cat; cat a/b"], "stdin": "hello", "stdin_file": "a/b"})).await;
    assert_eq!(done.stdout, "hello");
    let done = rig.exec(json!({"argv": ["azcopy"]})).await;
    assert_eq!((done.exit_code, done.stderr.contains("cannot be started")), (127, true), "{done:?}");
    let done = rig.exec(json!({"argv": ["kubectl", "run", "sleep 600"], "timeout_seconds": 0})).await;
    assert_eq!((done.exit_code, done.timed_out), (124, true));
    let done = rig.exec(run("env")).await;
    assert!(!done.stdout.contains(TOKEN), "the token is in the program's environment");
    assert!(rig.requests().is_empty(), "{:?}", rig.requests());
}

#[tokio::test]
async fn lines_come_as_events_and_a_summary_last() {
    let rig = Rig::start(&[("EXEC_STREAM_LINE_MAX_BYTES", "64")]).await;
    let (lines, summary) = rig.stream(run("echo one; echo two >&2; sleep 0.2; printf 'three\\nfour'; exit 5")).await;
    assert_eq!((summary.exit_code, summary.timed_out, summary.client_aborted), (5, false, false));
    let of = |wanted: Stream| {
        lines.iter().filter(|(stream, _)| *stream == wanted).map(|(_, line)| line.as_str()).collect::<Vec<_>>()
    };
    assert_eq!((of(Stream::Stdout), of(Stream::Stderr)), (vec!["one", "three", "four"], vec!["two"]));
    let (lines, _) = rig.stream(run("head -c 1000 /dev/zero | tr '\\0' x; echo; printf '\\377\\n'")).await;
    assert_eq!(
        lines,
        [(Stream::Stdout, format!("{}{CUT_MARK}", "x".repeat(64))), (Stream::Stdout, "\u{fffd}".to_owned())]
    );
    let (lines, summary) = rig.stream(json!({"argv": ["azcopy"]})).await;
    assert_eq!((lines.len(), lines[0].0, summary.exit_code), (1, Stream::Stderr, 127));
    assert!(rig.requests().is_empty(), "{:?}", rig.requests());
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_its_status() {
    let rig = Rig::start(&[("EXEC_MAX_BODY_BYTES", "1024")]).await;
    for (status, body) in [
        (400, "".to_owned()),
        (400, "{".to_owned()),
        (400, "[]".to_owned()),
        (400, json!({"argv": []}).to_string()),
        (400, json!({"argv": "git"}).to_string()),
        (400, json!({"argv": ["/bin/sh"]}).to_string()),
        (400, json!({"argv": ["git", "a\0b"]}).to_string()),
        (400, json!({"argv": ["git"], "cwd": "tmp"}).to_string()),
        (400, json!({"argv": ["git"], "stdin_file": "x"}).to_string()),
        (400, json!({"argv": ["git"], "stdin": "", "stdin_file": "../x"}).to_string()),
        (400, json!({"argv": ["git"], "stdin": "", "stdin_file": "/x"}).to_string()),
        (403, json!({"argv": ["sh", "-c", "id"]}).to_string()),
        (403, json!({"argv": ["git", "push"]}).to_string()),
        (403, json!({"argv": ["az", "account", "get-access-token"]}).to_string()),
        (413, json!({"argv": ["git", "x".repeat(2000)]}).to_string()),
    ] {
        for path in ["/exec", "/exec/stream"] {
            let head = format!("POST {path} HTTP/1.1\r\nX-Exec-Token: {TOKEN}");
            let (found, _, answer) = rig.ask(&head, &body).await;
            assert_eq!(found, status, "{body}: {answer}");
            let told: Value = serde_json::from_str(&answer).unwrap();
            assert!(told["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{answer}");
        }
    }
}

#[tokio::test]
async fn links_and_settings_in_a_clone_are_refused() {
    let remote = ("UPGRADE_GIT_REMOTE", "https://git.example.com/a.git");
    let rig = Rig::start(&[remote, ("PLATFORM_ACR_NAME", "acr")]).await;
    let clone = rig.place.path().join("clones/job-1");
    std::fs::create_dir(&clone).unwrap();
    std::os::unix::fs::symlink("/etc", clone.join("out")).unwrap();
    std::os::unix::fs::symlink("/", rig.place.path().join("clones/job-2")).unwrap();
    let build = |context: &str| json!({"argv": ["az", "acr", "build", "--registry", "acr", "--image", "a:1", context], "cwd": clone});
    for (request, expect) in [
        (build("out"), "a link leads out of the clone root"),
        (
            json!({"argv": ["git", "status"], "cwd": rig.place.path().join("clones/job-2")}),
            "a link leads out of the clone root",
        ),
    ] {
        let (status, _, body) = rig.post("/exec", &request).await;
        assert!(status == 403 && body.contains(expect), "{status} {body}");
    }
    assert_eq!(rig.post("/exec", &build(".")).await.0, 200);
    std::fs::create_dir(clone.join(".azure")).unwrap();
    let (status, _, body) = rig.post("/exec", &build(".")).await;
    assert!(status == 403 && body.contains(".azure"), "{status} {body}");
}

#[tokio::test]
async fn audit_mode_lets_pass_what_enforce_would_refuse() {
    let rig = Rig::start(&[("EXEC_POLICY", "audit")]).await;
    assert_eq!(rig.exec(json!({"argv": ["az", "x", "echo hello"]})).await.stdout, "hello\n");
    assert_eq!(rig.post("/exec", &json!({"argv": ["sh", "-c", "id"]})).await.0, 403);
}

/// Who is slow, wrong or gone holds no slot; who is beyond them is told at once.
#[tokio::test]
async fn slots_are_for_programs_alone() {
    let rig = Rig::start(&[("EXEC_MAX_CONCURRENCY", "1")]).await;
    // Half a head, and half a body.
    let mut slow = Vec::new();
    for text in ["POST /exec HT", "POST /exec HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"] {
        let mut stream = TcpStream::connect(rig.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    assert_eq!(rig.exec(run("echo x")).await.stdout, "x\n");

    let marker = rig.place.path().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 600", marker.display());
    let head = format!("POST /exec/stream HTTP/1.1\r\nX-Exec-Token: {TOKEN}");
    let busy = rig.send(&head, &run(&script).to_string()).await;
    until(|| marker.exists()).await;
    let (status, _, body) = rig.post("/exec", &run("true")).await;
    assert!(status == 503 && body.contains("1 programs run already"), "{status} {body}");
    // The client goes, and its program with it, although it says nothing.
    drop(busy);
    let pid = std::fs::read_to_string(&marker).unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
    until(|| std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "))).await;
    until(|| rig.requests().is_empty()).await;
    assert_eq!(rig.post("/exec", &run("true")).await.0, 200);

    // The same for an answer that is given at the end.
    std::fs::remove_file(&marker).unwrap();
    let busy = rig.send(&head.replace("/stream", ""), &run(&script).to_string()).await;
    until(|| marker.exists()).await;
    drop(busy);
    until(|| rig.requests().is_empty()).await;
    assert_eq!(rig.post("/exec", &run("true")).await.0, 200);
}

#[tokio::test]
async fn starts_are_counted_for_each_program_where_that_is_wanted() {
    let rig = Rig::start(&[("STRICT_EXEC_RATE_LIMIT", "true"), ("EXEC_RATE_LIMIT_PER_WINDOW", "2")]).await;
    for expect in [200, 200, 429] {
        let (status, head, body) = rig.post("/exec", &run("true")).await;
        assert_eq!(status, expect, "{body}");
        assert_eq!(head.contains("\r\nretry-after: "), expect == 429, "{head}");
    }
    assert_eq!(rig.post("/exec", &json!({"argv": ["azcopy"]})).await.0, 200);
}
