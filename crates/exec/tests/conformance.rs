//! The contract's sentences about what a program is given and what is answered, each through a real socket with a real child,
//! by both routes.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use replank_exec::protocol::{Request, Stream};
use serde_json::{Value, json};
use support::{Rig, TOKEN, lives, run, until};
use tokio::io::AsyncReadExt as _;

/// What a request ends in, by either route.
#[derive(Debug, PartialEq, Eq)]
struct Ending {
    exit_code: i32,
    stdout: String,
    stderr: String,
    timed_out: bool,
}

/// The same request by both routes; lines of the stream are put together again.
async fn both(rig: &Rig, request: &Value) -> [Ending; 2] {
    let done = rig.exec(request.clone()).await;
    let (lines, summary) = rig.stream(request.clone()).await;
    assert!(!summary.client_aborted && !done.stdout_truncated && !done.stderr_truncated);
    let of = |wanted: Stream| -> String {
        lines.iter().filter(|(stream, _)| *stream == wanted).map(|(_, line)| format!("{line}\n")).collect()
    };
    [
        Ending { exit_code: done.exit_code, stdout: done.stdout, stderr: done.stderr, timed_out: done.timed_out },
        Ending {
            exit_code: summary.exit_code,
            stdout: of(Stream::Stdout),
            stderr: of(Stream::Stderr),
            timed_out: summary.timed_out,
        },
    ]
}

#[tokio::test]
async fn a_program_gets_what_was_sent_and_its_end_comes_back() {
    let rig = Rig::start(&[]).await;
    let check = async |request: Value, exit_code: i32, stdout: &str, stderr: &str| {
        let expect = || Ending { exit_code, stdout: stdout.to_owned(), stderr: stderr.to_owned(), timed_out: false };
        assert_eq!(both(&rig, &request).await, [expect(), expect()], "{request}");
    };
    check(run("echo out; echo err >&2; exit 3"), 3, "out\n", "err\n").await;
    check(run("true"), 0, "", "").await;
    check(run("kill -TERM $$"), 143, "", "").await;
    // No shell, ever: words arrive as they are.
    let words = ["$(id)", "; id", "*", "a b", "", "'", "\"", "`id`", "-x", "ä\u{202e}"];
    let argv: Vec<&str> = ["elb"].into_iter().chain(words).collect();
    let printed: String = words.iter().map(|word| format!("<{word}>\n")).collect();
    check(json!({"argv": argv}), 0, &printed, "").await;
    // Standard input: what was sent, and its end; without any, an end at once.
    check(json!({"argv": ["kubectl", "run", "cat"], "stdin": "one\ntwo\n"}), 0, "one\ntwo\n", "").await;
    check(json!({"argv": ["kubectl", "run", "cat"], "stdin": ""}), 0, "", "").await;
    check(run("cat"), 0, "", "").await;
    // A file instead, below the working directory, for its owner alone.
    let file = |script: &str| json!({"argv": ["kubectl", "run", script], "stdin": "in\n", "stdin_file": "a/b.c"});
    check(file("cat a/b.c; cat"), 0, "in\n", "").await;
    check(file("stat -c %a a/b.c"), 0, "600\n", "").await;
    // A working directory of its own, empty and private; or the one that was asked for.
    check(run("ls -A; stat -c %a ."), 0, "700\n", "").await;
    check(json!({"argv": ["kubectl", "run", "pwd"], "cwd": "/"}), 0, "/\n", "").await;
    // Neither the token nor anything else of the channel's own.
    check(run("env | grep -c EXEC_"), 1, "0\n", "").await;
    // What is not known is ignored, and what is null is absent.
    check(json!({"argv": ["kubectl", "run", "pwd"], "cwd": "/", "newer": {"a": 1}}), 0, "/\n", "").await;
    check(
        json!({"argv": ["kubectl", "run", "cat"], "stdin": null, "stdin_file": null, "timeout_seconds": null, "git_credential": null}),
        0,
        "",
        "",
    )
    .await;
    // Bytes that are no text do no harm.
    check(run("printf 'a\\377b\\n'"), 0, "a\u{fffd}b\n", "").await;
}

/// Each request has its own directory; it is gone when the answer comes, with whatever the program has left there.
#[tokio::test]
async fn directories_are_fresh_and_go() {
    let rig = Rig::start(&[]).await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..2 {
        for ending in both(&rig, &run("pwd; mkdir -p x/y; echo z > x/y/z; chmod 400 x/y/z")).await {
            assert!(seen.insert(ending.stdout.clone()), "the directory is not a new one");
            assert!(!std::path::Path::new(ending.stdout.trim()).exists());
        }
    }
    assert_eq!(seen.len(), 4);
    assert!(rig.requests().is_empty(), "{:?}", rig.requests());
}

#[tokio::test]
async fn a_program_that_cannot_start_is_127_by_both_routes() {
    let rig = Rig::start(&[]).await;
    for request in [json!({"argv": ["azcopy"]}), json!({"argv": ["kubectl", "run", "true"], "cwd": "/not/there"})] {
        for ending in both(&rig, &request).await {
            assert_eq!((ending.exit_code, ending.stdout.as_str(), ending.timed_out), (127, "", false));
            assert!(ending.stderr.contains("cannot be started"), "{ending:?}");
            assert_eq!(ending.stderr.trim_end().lines().count(), 1, "{ending:?}");
        }
    }
    // Where nobody can say an address, git does not have to find out, and it looks as if it had.
    let rig = Rig::start(&[("UPGRADE_GIT_REMOTE", "https://git.example.com/a.git")]).await;
    for ending in both(&rig, &json!({"argv": ["git", "ls-remote", "https://git.example.com/a.git"]})).await {
        assert_eq!(ending.exit_code, 128, "{ending:?}");
        assert!(ending.stderr.starts_with("fatal: the remote's host git.example.com cannot be resolved"), "{ending:?}");
    }
}

/// Default 60 seconds, and whatever number is asked for becomes 1 to 1800.
#[test]
fn times_are_clamped() {
    #[track_caller]
    fn check(field: &str, expect: Option<u64>) {
        let text = format!(r#"{{"argv":["git"]{field}}}"#);
        let found = serde_json::from_str::<Request>(&text).ok().map(|request| request.timeout());
        assert_eq!(found, expect, "{text}");
    }
    check("", Some(60));
    check(r#","timeout_seconds":null"#, Some(60));
    for (number, expect) in [
        ("0", 1),
        ("1", 1),
        ("60", 60),
        ("1799", 1799),
        ("1800", 1800),
        ("1801", 1800),
        ("-5", 1),
        ("2.7", 2),
        ("1e3", 1000),
        ("1e300", 1800),
        ("-1e300", 1),
        ("18446744073709551615", 1800),
        ("99999999999999999999", 1800),
    ] {
        check(&format!(r#","timeout_seconds":{number}"#), Some(expect));
    }
    for text in ["\"60\"", "true", "[]", "{}"] {
        check(&format!(r#","timeout_seconds":{text}"#), None);
    }
}

/// SIGTERM to the whole group when the time is over, SIGKILL five seconds later, 124; also for those whom the program started,
/// who ignore SIGTERM and have let go of the outputs.
#[tokio::test]
async fn time_over_is_124_by_both_routes() {
    let rig = Rig::start(&[("EXEC_MAX_CONCURRENCY", "8")]).await;
    let pids = rig.place.path().join("pids");
    let deaf = "trap '' TERM; while :; do sleep 1; done";
    let hidden = format!("sh -c \"{deaf}\" >/dev/null 2>&1 & echo $! >> {}", pids.display());
    let check = async |script: String, stdout: &str, waits: bool| {
        let request = json!({"argv": ["kubectl", "run", script], "timeout_seconds": 1});
        let begun = Instant::now();
        let (done, (lines, summary)) = tokio::join!(rig.exec(request.clone()), rig.stream(request));
        assert_eq!((done.exit_code, done.timed_out, done.stdout.as_str()), (124, true, stdout), "{script}");
        assert_eq!((summary.exit_code, summary.timed_out, summary.client_aborted), (124, true, false), "{script}");
        assert_eq!(lines.iter().map(|(_, line)| format!("{line}\n")).collect::<String>(), stdout);
        let took = begun.elapsed();
        assert_eq!(took >= Duration::from_secs(6), waits, "{script}: {took:?}");
        for millis in [done.duration_ms, summary.duration_ms] {
            assert!((1_000..9_000).contains(&millis), "{script}: {millis}");
        }
    };
    let hears = "trap 'echo told; exit 0' TERM; sleep 60 & wait".to_owned();
    let deaf = format!("echo said; {deaf}");
    tokio::join!(
        check(hears, "told\n", false),
        check(deaf, "said\n", true),
        check(format!("{hidden}; sleep 60"), "", true)
    );
    for pid in std::fs::read_to_string(&pids).unwrap().lines() {
        assert!(!lives(pid), "process {pid} outlived its request");
    }
}

/// 8 MiB of each stream and not a byte more; the rest is read all the same, so that the program is not held up.
#[tokio::test]
async fn streams_are_capped_at_8_mib_each() {
    const CAP: usize = 8 << 20;
    let rig = Rig::start(&[]).await;
    let check = async |out: usize, err: usize| {
        let script = format!("head -c {out} /dev/zero | tr '\\0' o; head -c {err} /dev/zero | tr '\\0' e >&2; exit 5");
        let done = rig.exec(run(&script)).await;
        assert_eq!((done.exit_code, done.timed_out), (5, false));
        assert_eq!((done.stdout.len(), done.stdout_truncated), (out.min(CAP), out > CAP));
        assert_eq!((done.stderr.len(), done.stderr_truncated), (err.min(CAP), err > CAP));
    };
    check(CAP, CAP + 1).await;
    check(3 * CAP, 0).await;
    // A character that the cap would cut in two is left out.
    let rig = Rig::start(&[("EXEC_RUN_MAX_OUTPUT_BYTES", "1024")]).await;
    let done = rig.exec(run("printf x; for i in 1 2 3 4 5 6; do printf 'ääääääääääääääääääääääääääääääääääääääääääääääääää'; printf 'ääääääääääääääääääääääääääääääääääääääääääääääääää'; done")).await;
    assert_eq!((done.stdout.len(), done.stdout_truncated), (1023, true));
    assert!(!done.stdout.contains('\u{fffd}'));
}

/// Lines of the stream are cut at 64 KiB with the contract's mark, and all come, whatever the program prints.
#[tokio::test]
async fn lines_over_64_kib_are_cut() {
    let rig = Rig::start(&[]).await;
    let check = async |length: usize| {
        let script = format!("head -c {length} /dev/zero | tr '\\0' x; echo; echo next");
        let (lines, summary) = rig.stream(run(&script)).await;
        assert_eq!(summary.exit_code, 0);
        let cut = if length > 65_536 { " [truncated:line-over-cap]" } else { "" };
        let first = format!("{}{cut}", "x".repeat(length.min(65_536)));
        assert!(lines.len() == 2 && lines[0].1 == first && lines[1].1 == "next", "{length}: {} lines", lines.len());
    };
    check(65_536).await;
    check(65_537).await;
    check(10_000_000).await;
}

/// Lines are sent as they come, not at the end.
#[tokio::test]
async fn lines_come_while_the_program_runs() {
    let rig = Rig::start(&[]).await;
    let go = rig.place.path().join("go");
    let script = format!("echo first; while ! [ -e {} ]; do sleep 0.01; done; echo second", go.display());
    let mut stream = rig.begin("/exec/stream", &run(&script)).await;
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains(r#"{"stream":"stdout","line":"first"}"#) {
        assert_ne!(stream.read_buf(&mut text).await.unwrap(), 0, "{}", String::from_utf8_lossy(&text));
    }
    std::fs::write(go, "").unwrap();
    stream.read_to_end(&mut text).await.unwrap();
    let (lines, summary) = support::events(&support::split(&String::from_utf8(text).unwrap()).2);
    assert_eq!((lines.len(), summary.exit_code), (2, 0));
}

/// A client that goes away, however it does, takes its program along at once, and whomever that started.
#[tokio::test]
async fn a_client_that_goes_kills_the_group() {
    let rig = Rig::start(&[("EXEC_MAX_CONCURRENCY", "16")]).await;
    let check = async |name: &str,
                       path: &str,
                       leave: &dyn Fn(tokio::net::TcpStream) -> Option<tokio::net::TcpStream>,
                       beyond: &str| {
        let pids = rig.place.path().join(name);
        // The program itself, one that hears nothing, and one that hears nothing and has let go of the outputs.
        let script = format!(
            "trap '' TERM; sleep 600 & echo $$ $! > {0}.new; sleep 600 >/dev/null 2>&1 & echo $! >> {0}.new; mv {0}.new {0}; wait",
            pids.display()
        );
        let mut stream = rig.begin(path, &run(&script)).await;
        tokio::io::AsyncWriteExt::write_all(&mut stream, beyond.as_bytes()).await.unwrap();
        until(|| pids.exists()).await;
        let begun = Instant::now();
        let _kept = leave(stream);
        for pid in std::fs::read_to_string(&pids).unwrap().split_whitespace() {
            until(|| !lives(pid)).await;
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(4), "{name}: {took:?}, which is not at once");
    };
    let next = format!("POST /exec HTTP/1.1\r\nX-Exec-Token: {TOKEN}\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
    let close = |stream: tokio::net::TcpStream| -> Option<tokio::net::TcpStream> {
        drop(stream);
        None
    };
    let reset = |stream: tokio::net::TcpStream| -> Option<tokio::net::TcpStream> {
        stream.set_zero_linger().unwrap();
        None
    };
    let half = |stream: tokio::net::TcpStream| -> Option<tokio::net::TcpStream> {
        let stream = stream.into_std().unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        Some(tokio::net::TcpStream::from_std(stream).unwrap())
    };
    for (path, name) in [("/exec", "run"), ("/exec/stream", "stream")] {
        check(&format!("{name}-close"), path, &close, "").await;
        check(&format!("{name}-reset"), path, &reset, "").await;
        check(&format!("{name}-half"), path, &half, "").await;
        // Behind these bytes HTTP alone would not see the end.
        check(&format!("{name}-line"), path, &close, "\r\n").await;
        check(&format!("{name}-next"), path, &close, &next).await;
        check(&format!("{name}-much"), path, &reset, &next.repeat(100)).await;
    }
    until(|| rig.requests().is_empty()).await;
}

/// Past its limit a program is refused until the time that is told has passed, and only that program; who waits for a slot does
/// not use up starts.
#[tokio::test]
async fn rates_are_told_and_pass() {
    let strict = [
        ("STRICT_EXEC_RATE_LIMIT", "true"),
        ("EXEC_RATE_LIMIT_PER_WINDOW", "2"),
        ("EXEC_RATE_LIMIT_WINDOW_SECONDS", "4"),
        ("EXEC_MAX_CONCURRENCY", "1"),
    ];
    let rig = Rig::start(&strict).await;
    let go = rig.place.path().join("go");
    let marker = rig.place.path().join("runs");
    let script = format!("touch {}; while ! [ -e {} ]; do sleep 0.01; done", marker.display(), go.display());
    let mut busy = rig.begin("/exec", &run(&script)).await;
    until(|| marker.exists()).await;
    for _ in 0..5 {
        assert_eq!(rig.post("/exec", &run("true")).await.0, 503);
    }
    std::fs::write(go, "").unwrap();
    busy.read_to_end(&mut Vec::new()).await.unwrap();
    // Both starts have to fall into one window for what follows; where the machine is slow, the first has left it again.
    let mut refused = None;
    for _ in 0..10 {
        let (status, head, _) = rig.post("/exec", &run("true")).await;
        if status == 429 {
            refused = Some(head);
            break;
        }
        assert_eq!(status, 200);
    }
    let head = refused.expect("a refusal");
    let seconds: u64 = head.split("retry-after: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
    assert!((1..=5).contains(&seconds), "{head}");
    assert_eq!(rig.post("/exec", &json!({"argv": ["elb"]})).await.0, 200, "another program has its own count");
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert_eq!(rig.post("/exec", &run("true")).await.0, 200);
}
