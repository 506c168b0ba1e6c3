//! What can go wrong between the controller, the exec server and the registry: told apart, and nothing left behind.

use std::time::{Duration, Instant};

use crate::rig::{Options, Rig, release};
use replank_testbed::repo::Entry;

#[test]
fn the_exit_code_decides_nothing() {
    let rig = Rig::start(Options::default());
    rig.az.refuse_login().unwrap();
    rig.az.set_mode("elb-api", "lie").unwrap();
    let row =
        rig.fails(&["1.0.0"], &["az acr build of api ended without an error, but the registry has no image of it"]);
    let log = rig.log(&row, "api");
    assert!(log.contains("az login ended with exit code 1: ERROR: no identity"), "best effort, and told: {log}");
    rig.az.set_mode("elb-api", "fail").unwrap();
    let row =
        rig.fails(&["1.0.0"], &["az acr build of api failed with exit code 1", "its last words", "the step failed"]);
    assert!(!row.to_string().contains("hunter2") && !rig.log(&row, "api").contains("hunter2"), "{row}");
    // Mended, it goes through.
    rig.az.set_mode("elb-api", "build").unwrap();
    rig.succeeds(&["1.0.0"]);
}

/// What a failed job pushed is removed where that is permitted.
#[test]
fn what_a_failed_job_pushed_is_removed() {
    let rig = Rig::start(Options::default());
    rig.az.set_mode("elb-frontend", "fail").unwrap();
    let row = rig.fails(&["1.0.0"], &["az acr build of frontend failed"]);
    rig.until("the orphan is gone", |rig| rig.tags("elb-api").is_empty());
    rig.until("it is told", |rig| {
        !rig.events("orphan_purge_attempt").is_empty() || !rig.events("orphan_acr_tags").is_empty()
    });
    let told: Vec<_> = rig.events("orphan_acr_tags");
    // The frontend's own may still come, as nobody saw how its build ended; the api's is gone.
    let first = &told[0];
    let removed = first["removed"].to_string();
    assert!(removed.contains("/elb-api:v1.0.0-") && !removed.contains("frontend"), "{first}");
    assert!(first["left"].to_string().contains("/elb-frontend:v1.0.0-"), "{first}");
    assert_eq!(first["job_id"], row["job_id"]);
    // Base images and what other jobs made stay.
    assert_eq!(rig.tags("elb-terminal-base").len(), 1);
    rig.az.set_mode("elb-frontend", "build").unwrap();
    rig.succeeds(&["1.0.0"]);
    assert_eq!(rig.tags("elb-api").len(), 2);
}

#[test]
fn what_cannot_be_removed_is_recorded() {
    let rig = Rig::start(Options { keeps_images: true, ..Options::default() });
    rig.az.set_mode("elb-frontend", "fail").unwrap();
    rig.fails(&["1.0.0"], &["az acr build of frontend failed"]);
    rig.until("it is recorded", |rig| !rig.events("orphan_acr_tags").is_empty());
    let told = rig.events("orphan_acr_tags").remove(0);
    assert!(told["left"].to_string().contains("/elb-api:v1.0.0-"), "{told}");
    assert!(told["why"].as_str().is_some_and(|why| !why.is_empty()), "{told}");
    assert_eq!(rig.tags("elb-api").len(), 2, "it is still there");
}

/// Time-out, unreachable server, wrong token, busy and limited: each is told as what it is.
#[test]
fn failures_of_the_channel_are_told_apart() {
    let mut rig = Rig::start(Options {
        exec_env: vec![
            ("EXEC_MAX_CONCURRENCY", "1".to_owned()),
            ("STRICT_EXEC_RATE_LIMIT", "true".to_owned()),
            ("EXEC_RATE_LIMIT_PER_WINDOW", "6".to_owned()),
            ("EXEC_RATE_LIMIT_WINDOW_SECONDS", "2".to_owned()),
        ],
        ..Options::default()
    });
    // Limited and busy wait inside the budget: git is started more often than six times in two seconds.
    let row = rig.succeeds(&["1.0.0"]);
    let limited = rig.exec.as_ref().unwrap().told().matches("exec_rate_limited").count();
    assert!(limited > 0, "the limit was never met: {row}\n{}", rig.told());

    rig.exec.as_mut().unwrap().kill();
    rig.publish("1.1.0", &release("1.1.0"));
    let begun = Instant::now();
    rig.begin(&["1.1.0"]);
    // Unreachable: a minute's grace for a sidecar that restarts, and then a clear word.
    rig.until("it is told while it waits", |rig| rig.status()["next_action"].to_string().contains("cannot be reached"));
    rig.failed(&["the exec server at 127.0.0.1:", "cannot be reached", "TERMINAL_EXEC_UPSTREAM"]);
    assert!(begun.elapsed() < Duration::from_secs(110), "{:?}", begun.elapsed());
}

#[test]
fn a_wrong_token_is_told_at_once() {
    let rig = Rig::start(Options {
        env: vec![("EXEC_TOKEN", "another-token-of-the-channel".to_owned())],
        ..Options::default()
    });
    let row = rig.fails(&["1.0.0"], &["the exec server refuses the token", "the same EXEC_TOKEN"]);
    assert!(!row.to_string().contains("another-token"), "{row}");
}

/// The server's own binding is another one: it says so, and what to do.
#[test]
fn what_the_server_does_not_allow_is_told() {
    let rig =
        Rig::start(Options { exec_env: vec![("PLATFORM_ACR_NAME", "otheracr".to_owned())], ..Options::default() });
    rig.fails(&["1.0.0"], &["does not allow this", "the registry is not the configured one", "PLATFORM_ACR_NAME"]);
}

/// Busy: somebody else's program holds the only slot; the job waits for it and goes on.
#[test]
fn a_busy_server_is_waited_for() {
    let rig = Rig::start(Options { exec_env: vec![("EXEC_MAX_CONCURRENCY", "1".to_owned())], ..Options::default() });
    rig.az.set_mode("elb-busy", "detach").unwrap();
    // Another client of the same channel, with a long build.
    let clone = rig.clones.join("somebody-else");
    std::fs::create_dir_all(&clone).unwrap();
    std::fs::write(clone.join("Dockerfile"), "FROM scratch\n").unwrap();
    let body = serde_json::json!({
        "argv": ["az", "acr", "build", "--registry", crate::rig::ACR, "--image", "elb-busy:1", "--file", "Dockerfile", "."],
        "cwd": clone,
    })
    .to_string();
    let mut other = std::net::TcpStream::connect(("127.0.0.1", rig.exec_port)).unwrap();
    let head = format!(
        "POST /exec/stream HTTP/1.1\r\nHost: x\r\nX-Exec-Token: {}\r\nContent-Length: {}\r\n\r\n{body}",
        crate::rig::EXEC_TOKEN,
        body.len()
    );
    std::io::Write::write_all(&mut other, head.as_bytes()).unwrap();
    rig.az.until_builds(1, Duration::from_secs(20)).unwrap();
    rig.begin(&["1.0.0"]);
    rig.until("it says what it waits for", |rig| rig.status()["next_action"].to_string().contains("busy"));
    drop(other);
    let row = rig.end();
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
}

/// Whatever a release holds, nothing outside of it is built, and what is missing is named before any build.
#[test]
fn a_release_that_cannot_be_built_is_refused_before_any_build() {
    let mut rig = Rig::start(Options::default());
    rig.repo.remove(&["web/Dockerfile"], "gone").unwrap();
    rig.publish("1.0.1", &[]);
    rig.fails(&["1.0.1"], &["the Dockerfile of frontend", "web/Dockerfile", "is not in the release"]);
    let files = release("1.0.2");
    rig.publish("1.0.2", &files);
    std::fs::remove_file(rig.repo.tree().join("terminal/Dockerfile.runtime")).unwrap();
    std::fs::create_dir(rig.repo.tree().join("terminal/Dockerfile.runtime")).unwrap();
    rig.publish("1.0.3", &[Entry::file("terminal/Dockerfile.runtime/x", "x")]);
    rig.fails(&["1.0.3"], &["the Dockerfile of terminal", "is not a regular file"]);
    rig.publish(
        "1.0.4",
        &[Entry::file(".gitmodules", "[submodule \"x\"]\n\tpath = x\n\turl = https://git.example.com/x.git\n")],
    );
    rig.fails(&["1.0.4"], &["submodules are not supported"]);
    assert!(rig.az.builds().unwrap().is_empty(), "nothing was built");
    // A manifest is read, although the channel reads no file.
    std::fs::remove_dir_all(rig.repo.tree().join("terminal/Dockerfile.runtime")).unwrap();
    rig.repo.remove(&[".gitmodules"], "gone").unwrap();
    let mut files = release("1.0.5");
    files.push(Entry::file(".replank.toml", "[components.api]\nargs = { FLAVOUR = \"sweet\" }\n"));
    rig.publish("1.0.5", &files);
    rig.succeeds(&["1.0.5"]);
    assert!(rig.az.builds().unwrap()[0].arguments.contains(&"FLAVOUR=sweet".to_owned()));
    let mut files = release("1.0.6");
    files.push(Entry::file(".replank.toml", "mounts = []\n"));
    rig.publish("1.0.6", &files);
    // Looked at by the controller's own git, once the remote has shown the tag; the plan waits for that.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !String::from_utf8_lossy(&rig.cli(&["plan", "1.0.6"]).stdout).contains("a release may not set it") {
        assert!(std::time::Instant::now() < end, "the plan never shows it: {:?}", rig.cli(&["plan", "1.0.6"]));
    }
    rig.refuses(&["1.0.6"], "a release may not set it");
}
