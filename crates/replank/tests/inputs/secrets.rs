//! Values that must never show: a remote's credential, a build secret, a token.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use replank_testbed::repo::Entry;

use crate::rig::{JOB_LIMIT, Options, Rig, said};

const PASSWORD: &str = "hunter2-remote-credential-2f9c";
const BUILD_SECRET: &str = "build-secret-value-7d1e";

#[test]
fn secrets_show_nowhere() {
    let place = tempfile::tempdir().unwrap();
    let password = place.path().join("password");
    std::fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    let mut rig = Rig::prepare(Options {
        source: format!("credential = {{ username = \"robot\", password_file = \"{}\" }}", password.display()),
        component: "secrets = [\"npm\"]".to_owned(),
        tables: "[build.secrets]\nnpm = { env = \"NPM_TOKEN\" }\n".to_owned(),
        sign_in: Some(("robot".to_owned(), PASSWORD.to_owned())),
        env: vec![("NPM_TOKEN".to_owned(), BUILD_SECRET.to_owned()), ("REPLANK_LOG".to_owned(), "debug".to_owned())],
        ..Options::default()
    });
    // A careless release that prints its secret, whole and in pieces, and fails.
    let leak = "FROM testbed/busybox\nRUN --mount=type=secret,id=npm sleep 1 && cat /run/secrets/npm && \
                echo \"token is $(cat /run/secrets/npm)\" >&2 && exit 7\n";
    rig.publish("0.1.1", &[Entry::file("app/Dockerfile", leak)]);
    let uses = "FROM testbed/busybox\nRUN --mount=type=secret,id=npm test -s /run/secrets/npm && sleep 1 && \
                cat /run/secrets/npm | wc -c\nCOPY www /www\nCMD [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n";
    let mut files = crate::rig::release("0.1.2");
    files[0] = Entry::file("app/Dockerfile", uses);
    rig.publish("0.1.2", &files);

    let spy = Spy::start();
    let mut seen: Vec<(String, Vec<u8>)> = Vec::new();
    let deployed = rig.cli(&["deploy", "0.1.0"]);
    assert!(deployed.status.success(), "{}", said(&deployed));
    seen.push(("deploy".to_owned(), said(&deployed).into_bytes()));
    rig.serve();
    let failed = rig.run("0.1.1");
    assert_eq!(failed["state"], "failed_pre", "{failed}");
    let (code, log) = rig.log(&failed);
    assert!(code == 200 && log.contains("token is ***"), "{log}");
    seen.push(("log of the failed build".to_owned(), log.into_bytes()));
    seen.push(("row of the failed job".to_owned(), failed.to_string().into_bytes()));
    rig.begin("0.1.2");
    // While it builds the clone is there; once the job is over it goes by itself.
    let end = Instant::now() + JOB_LIMIT;
    while rig.status()["state"] != "building" {
        assert!(Instant::now() < end, "it never builds: {}", rig.told());
        std::thread::sleep(Duration::from_millis(5));
    }
    let clone = seen.len();
    collect(&rig.home, &mut seen);
    assert!(seen.iter().skip(clone).any(|(name, _)| name.ends_with(".git/config")), "there is no clone to look at");
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    let (_, log) = rig.log(&row);
    assert!(log.contains(&BUILD_SECRET.len().to_string()), "the build did not get its secret: {log}");
    seen.push(("log".to_owned(), log.into_bytes()));
    seen.push(("the processes' command lines".to_owned(), spy.end()));

    for path in ["status", "candidates", "history?limit=500", "escape-hatch", "rollback-preflight"] {
        seen.push((path.to_owned(), rig.get(&format!("/api/upgrade/{path}")).1.into_bytes()));
    }
    for command in [&["status"][..], &["candidates"], &["history"], &["escape-hatch"], &["token", "list"]] {
        seen.push((command.join(" "), said(&rig.cli(command)).into_bytes()));
    }
    seen.push(("the controller's log".to_owned(), rig.told().into_bytes()));
    let docker = |arguments: &[&str]| rig.engine.docker(arguments).unwrap();
    for id in docker(&["ps", "-aq"]).lines() {
        seen.push((format!("container {id}"), docker(&["inspect", id]).into_bytes()));
        let out = rig.engine.docker_command().args(["logs", id]).output().unwrap();
        seen.push((format!("output of container {id}"), [out.stdout, out.stderr].concat()));
    }
    for id in docker(&["images", "-aq"]).lines() {
        seen.push((format!("image {id}"), docker(&["image", "inspect", id]).into_bytes()));
        seen.push((format!("history of image {id}"), docker(&["history", "--no-trunc", id]).into_bytes()));
    }
    // Everything on disk: the ledger with its write-ahead log, the proxy's files.
    let files = seen.len();
    collect(&rig.home, &mut seen);
    assert!(seen.iter().skip(files).any(|(name, _)| name.ends_with("replank.db")));
    let log = std::fs::read(rig.engine.directory().unwrap().join("engine.log")).unwrap();
    seen.push(("the engine's log".to_owned(), log));
    eprintln!("looked into {} places", seen.len());

    let token = std::fs::read_to_string(rig.home.join("tokens/admin")).unwrap().trim().to_owned();
    let basic = base64(&format!("robot:{PASSWORD}"));
    for (name, bytes) in &seen {
        for (what, secret) in [
            ("credential", PASSWORD),
            ("encoded credential", &basic),
            ("build secret", BUILD_SECRET),
            ("token", &token),
        ] {
            // The token's own file is where it belongs.
            if what == "token" && name.ends_with("tokens/admin") {
                continue;
            }
            let found = bytes.windows(secret.len()).position(|w| w == secret.as_bytes());
            if let Some(at) = found {
                let around = &bytes[at.saturating_sub(120)..(at + 20).min(bytes.len())];
                panic!("the {what} shows in {name}: {}", String::from_utf8_lossy(around));
            }
        }
    }
}

fn collect(dir: &Path, into: &mut Vec<(String, Vec<u8>)>) {
    // What goes while it is looked at is no place where anything shows.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&path, into);
        } else if kind.is_file() {
            into.push((path.display().to_string(), std::fs::read(&path).unwrap_or_default()));
        }
    }
}

/// Reads every command line on this machine, over and over.
struct Spy {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<u8>>,
}

impl Spy {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut seen = std::collections::BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    seen.insert(std::fs::read(entry.path().join("cmdline")).unwrap_or_default());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            seen.into_iter().flatten().collect()
        });
        Self { stop, thread }
    }

    fn end(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.thread.join().unwrap();
        assert!(seen.windows(5).any(|w| w == b"clone" || w == b"fetch"), "git was never seen at work");
        seen
    }
}

fn base64(text: &str) -> String {
    let out = Command::new("sh").args(["-c", "printf %s \"$0\" | base64 -w0", text]).output().unwrap();
    String::from_utf8(out.stdout).unwrap()
}
