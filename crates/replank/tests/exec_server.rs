//! `replank exec-server` as a process: what it needs to start, what it says on standard error, and what becomes of a credential,
//! with real git against a real git server.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use replank_exec::outbound::Resolver;
use replank_exec::server::config::Config;
use replank_exec::server::http::Server;
use replank_exec::server::place::{Places, make_private};
use replank_testbed::git::Fault;
use replank_testbed::repo::{Entry, Repo};
use replank_testbed::{GitServer, GitServerOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const TOKEN: &str = "an-exec-token-0123456789";
const SECRET: &str = "hunter2 %'$(id)";

/// The process, and everything that it has said so far.
struct Process {
    child: Child,
    address: SocketAddr,
    said: Arc<Mutex<String>>,
    place: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn command(place: &Path, variables: &[(&str, &str)]) -> Command {
    let bin = place.join("bin");
    let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
    command.arg("exec-server").env_clear().current_dir(place).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
    command.env("TMPDIR", place).env("EXEC_PORT", "0").env("EXEC_CLONE_ROOT", place.join("clones"));
    command.envs(variables.iter().copied());
    command
}

impl Process {
    fn start(variables: &[(&str, &str)]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let bin = place.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        script_at(&bin.join("kubectl"), "#!/bin/sh\nshift\nexec sh -c \"$@\"\n");
        let mut child = command(place.path(), variables).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = lines.next().expect("a first line").unwrap();
        let started: Value = serde_json::from_str(&first).unwrap_or_else(|_| panic!("{first}"));
        let address = started["listen"].as_str().unwrap().parse().unwrap();
        let said = Arc::new(Mutex::new(format!("{first}\n")));
        let all = said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *all.lock().unwrap() += &format!("{line}\n");
            }
        });
        Self { child, address, said, place }
    }

    fn said(&self) -> Vec<Value> {
        let said = self.said.lock().unwrap().clone();
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no event: {line}"))).collect()
    }

    async fn post(&self, path: &str, request: &Value) -> (u16, String) {
        post(self.address, path, TOKEN, &request.to_string()).await
    }
}

fn script_at(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

async fn post(address: SocketAddr, path: &str, token: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("POST {path} HTTP/1.0\r\nX-Exec-Token: {token}\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn until(is: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 30 s");
}

#[test]
fn it_does_not_start_without_what_it_needs() {
    let place = tempfile::tempdir().unwrap();
    let check = |variables: &[(&str, &str)], expect: &str| {
        let out = command(place.path(), variables).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{variables:?}: {said}");
        assert!(said.contains(expect) && !said.contains("hunter2"), "{variables:?}: {said}");
        assert!(!place.path().join("clones").exists() && !place.path().join("replank-exec").exists());
    };
    let token = ("EXEC_TOKEN", TOKEN);
    check(&[], "EXEC_TOKEN is not set");
    check(&[("EXEC_TOKEN", "hunter2")], "EXEC_TOKEN must have 16 to 1024 characters");
    check(&[token, ("CONTAINER_APP_NAME", "app"), ("EXEC_HOST", "0.0.0.0")], "EXEC_HOST must be a loopback address");
    check(
        &[token, ("UPGRADE_GIT_REMOTE", "http://u:hunter2@127.0.0.1/a.git")],
        "UPGRADE_GIT_REMOTE must begin with https://",
    );
    check(&[token, ("UPGRADE_GIT_REMOTE", "https://u:hunter2@localhost/a.git")], "this machine itself");
    // What is packed for a build must not hold what git is told in secret.
    for (root, tmp) in [(".", "."), ("replank-exec/x", "."), ("a", "a")] {
        let own = tempfile::tempdir().unwrap();
        std::fs::create_dir(own.path().join("a")).unwrap();
        let (root, tmp) = (own.path().join(root), own.path().join(tmp));
        let out = command(place.path(), &[token]).env("EXEC_CLONE_ROOT", root).env("TMPDIR", tmp).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("set EXEC_CLONE_ROOT to a directory of its own"), "{said}");
    }
    // The directory of requests is somebody else's, or none: nothing is run in it.
    std::fs::write(place.path().join("replank-exec"), "").unwrap();
    let out = command(place.path(), &[token]).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("set TMPDIR to another place"));
}

/// One JSON line for each event, with the contract's names; of a request only `argv[0]`.
#[tokio::test]
async fn the_audit_trail_says_what_happened_and_nothing_else() {
    let process = Process::start(&[
        ("EXEC_TOKEN", TOKEN),
        ("STRICT_EXEC_RATE_LIMIT", "true"),
        ("EXEC_RATE_LIMIT_PER_WINDOW", "3"),
        ("EXEC_MAX_CONCURRENCY", "1"),
        ("CONTAINER_APP_NAME", "app"),
    ]);
    let place = process.place.path().join("began");
    let run = |script: &str| json!({"argv": ["kubectl", "secret-word", script, "secret-word"], "stdin": "secret-input", "stdin_file": "secret-file", "git_credential": {"username": "secret-user", "password": "secret-password"}});
    let refused = post(process.address, "/exec", "secret-token-0123456789", "secret-body").await;
    assert_eq!(refused.0, 401);
    for (body, expect) in [
        (json!("secret-body"), 400),
        (json!({"argv": ["sh", "-c", "secret-word"]}), 403),
        (json!({"argv": ["secret word"]}), 403),
        (json!({"argv": ["secret".repeat(100)]}), 403),
        (json!({"argv": ["git", "push", "secret-word"]}), 403),
        (json!({"argv": ["az", "login", "secret-word"]}), 403),
        (json!({"argv": ["azcopy", "secret-word"]}), 200),
        (run("echo secret-output; exit 3"), 200),
    ] {
        assert_eq!(process.post("/exec", &body).await.0, expect, "{body}");
    }
    assert_eq!(process.post("/exec/stream", &run("echo secret-output")).await.0, 200);
    // The third start is held, asked for beside itself, and then left.
    let held = run(&format!("touch {}; sleep 600", place.display())).to_string();
    let mut stream = TcpStream::connect(process.address).await.unwrap();
    let head =
        format!("POST /exec HTTP/1.1\r\nHost: x\r\nX-Exec-Token: {TOKEN}\r\nContent-Length: {}\r\n\r\n", held.len());
    stream.write_all(format!("{head}{held}").as_bytes()).await.unwrap();
    until(|| place.exists()).await;
    assert_eq!(process.post("/exec", &run("true")).await.0, 503);
    drop(stream);
    let names = |said: &[Value]| said.iter().filter(|event| event["event"] == "exec_done").count();
    until(|| names(&process.said()) == 3).await;
    assert_eq!(process.post("/exec", &run("true")).await.0, 429);

    until(|| process.said().iter().any(|event| event["event"] == "exec_rate_limited")).await;
    let text = process.said.lock().unwrap().clone();
    for secret in ["secret", TOKEN] {
        assert!(!text.contains(secret), "{secret} is told:\n{text}");
    }
    let said = process.said();
    let found: Vec<&str> = said.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let expect = [
        "exec_server_started",
        "exec_error", // the token
        "exec_error", // the program, which may be told
        "exec_error", // and two that are no programs' names
        "exec_error",
        "exec_error", // git push
        "exec_error", // az login
        "exec_start",
        "exec_error", // azcopy does not start
        "exec_start",
        "exec_done",
        "exec_start",
        "exec_done",
        "exec_start",
        "exec_error", // busy
        "exec_done",
        "exec_rate_limited",
    ];
    assert_eq!(found, expect, "{text}");
    let known = BTreeSet::from([
        "event",
        "number",
        "program",
        "policy_would_refuse",
        "exit_code",
        "duration_ms",
        "timed_out",
        "client_aborted",
        "error",
    ]);
    for event in &said[1..] {
        let keys = event.as_object().unwrap().keys();
        assert!(keys.clone().all(|key| known.contains(key.as_str())), "{event}");
    }
    let done: Vec<Value> = said.iter().filter(|event| event["event"] == "exec_done").cloned().collect();
    assert_eq!((&done[0]["exit_code"], &done[0]["program"]), (&json!(3), &json!("kubectl")));
    assert_eq!((&done[0]["client_aborted"], &done[2]["client_aborted"]), (&json!(false), &json!(true)));
    let starts: BTreeSet<u64> =
        said.iter().filter(|e| e["event"] == "exec_start").map(|e| e["number"].as_u64().unwrap()).collect();
    assert_eq!(starts.len(), 4, "each start has its own number");
    let told: Vec<&Value> = said[2..5].iter().map(|event| &event["program"]).collect();
    assert_eq!(told, [&json!("sh"), &Value::Null, &Value::Null]);
    assert_eq!(said[0]["loopback_remote_allowed"], json!(false));
}

/// Before enforcing is switched on, an operator sees in the trail what it would refuse, and by which rule.
#[tokio::test]
async fn audit_tells_what_enforce_would_refuse() {
    let process = Process::start(&[("EXEC_TOKEN", TOKEN), ("EXEC_POLICY", "audit")]);
    assert_eq!(process.said()[0]["policy"], "audit", "{:?}", process.said()[0]);
    let starts = || {
        let said = process.said();
        said.into_iter().filter(|event| event["event"] == "exec_start").collect::<Vec<_>>()
    };
    for (number, (argv, expect)) in [
        (json!(["git", "push", "origin"]), json!("the directory of the clone is missing")),
        (json!(["az", "account", "get-access-token"]), json!("az may not be asked for this command")),
        (json!(["git", "-c", "core.fsmonitor=id", "version"]), json!("git may not be given this setting")),
        (json!(["kubectl", "run", "true"]), Value::Null),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(process.post("/exec", &json!({ "argv": argv })).await.0, 200, "{argv}: audit refuses nothing");
        until(|| starts().len() > number).await;
        assert_eq!(starts()[number]["policy_would_refuse"], expect, "{argv}");
    }
    // The programs that the operator allows are enforced in either mode.
    assert_eq!(process.post("/exec", &json!({ "argv": ["sh", "-c", "id"] })).await.0, 403);
}

/// Told to stop, it ends, and so does what runs; nobody reading its standard error is no reason to end.
#[tokio::test]
async fn it_stops_with_everything_and_runs_without_a_reader() {
    let mut process = Process::start(&[("EXEC_TOKEN", TOKEN)]);
    let marker = process.place.path().join("pid");
    let script = format!("trap '' TERM; echo $$ > {0}.new; mv {0}.new {0}; sleep 600", marker.display());
    let address = process.address;
    let asked = tokio::spawn(async move {
        let body = json!({"argv": ["kubectl", "run", script]}).to_string();
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /exec HTTP/1.1\r\nHost: x\r\nX-Exec-Token: {TOKEN}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.ok();
    });
    until(|| marker.exists()).await;
    let pid = std::fs::read_to_string(&marker).unwrap();
    let own = rustix::process::Pid::from_raw(i32::try_from(process.child.id()).unwrap()).unwrap();
    rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
    assert!(process.child.wait().unwrap().success());
    asked.await.unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
    until(|| std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "))).await;

    // A reader that has gone away.
    let place = tempfile::tempdir().unwrap();
    let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = probe.local_addr().unwrap();
    drop(probe);
    let port = address.port().to_string();
    let mut child = command(place.path(), &[("EXEC_TOKEN", TOKEN), ("EXEC_PORT", &port)]).spawn().unwrap();
    drop(child.stderr.take());
    while TcpStream::connect(address).await.is_err() {
        assert!(child.try_wait().unwrap().is_none(), "it ended for want of a reader");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(post(address, "/exec", "wrong", "").await.0, 401);
    assert_eq!(post(address, "/exec", TOKEN, r#"{"argv":["azcopy"]}"#).await.0, 200);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A remote that sends git into another network.
#[tokio::test]
async fn git_follows_no_redirect() {
    let upstream = upstream(None);
    let remote = upstream.server.url("app");
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let process = Process::start(&[
        ("EXEC_TOKEN", TOKEN),
        ("UPGRADE_GIT_REMOTE", &remote),
        ("EXEC_ALLOW_LOOPBACK_REMOTE", "true"),
    ]);
    upstream.server.set_fault(Fault::Redirect(format!("http://{}", elsewhere.local_addr().unwrap())));
    let clone = process.place.path().join("clones/job-1");
    for argv in [json!(["git", "ls-remote", remote]), json!(["git", "clone", "--depth", "1", remote, clone])] {
        let (status, body) = process.post("/exec", &json!({ "argv": argv, "timeout_seconds": 10 })).await;
        let done: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &done["exit_code"]), (200, &json!(128)), "{argv}: {body}");
        assert!(elsewhere.accept().is_err(), "{argv}: git went where it was sent: {body}");
    }
}

struct Upstream {
    _root: tempfile::TempDir,
    server: GitServer,
    commit: String,
}

/// A repository with a release, behind a sign-in or not.
fn upstream(sign_in: Option<(&str, &str)>) -> Upstream {
    let root = tempfile::tempdir().unwrap();
    let mut repo = Repo::create(root.path(), "app").unwrap();
    let commit = repo.commit(&[Entry::file("Dockerfile", "FROM scratch\n")], "first").unwrap();
    repo.tag("v1.2.3", &commit, "v1.2.3").unwrap();
    let sign_in = sign_in.map(|(user, password)| (user.to_owned(), password.to_owned()));
    let server = GitServer::start(root.path(), &GitServerOptions { sign_in, ..GitServerOptions::default() }).unwrap();
    Upstream { _root: root, server, commit }
}

/// Everything that any process here was started with and in, as far as it may be read.
fn everywhere() -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        for file in ["cmdline", "environ"] {
            let text = std::fs::read(entry.path().join(file)).unwrap_or_default();
            all.push_str(&String::from_utf8_lossy(&text));
            all.push('\n');
        }
    }
    all
}

/// The client's sequence for a release and for a commit, with a credential: it reaches the git server, and nothing else.
#[tokio::test]
async fn a_credential_reaches_the_remote_alone() {
    let upstream = upstream(Some(("alice", SECRET)));
    let remote = upstream.server.url("app");
    let process = Process::start(&[
        ("EXEC_TOKEN", TOKEN),
        ("UPGRADE_GIT_REMOTE", &remote),
        ("EXEC_ALLOW_LOOPBACK_REMOTE", "true"),
    ]);
    assert_eq!(process.said()[0]["loopback_remote_allowed"], json!(true));
    // What git is given, written down before it runs.
    let (record, bin) = (process.place.path().join("record"), process.place.path().join("bin"));
    let real =
        std::env::split_paths(&std::env::var_os("PATH").unwrap()).map(|p| p.join("git")).find(|p| p.exists()).unwrap();
    let wrapper = format!(
        "#!/bin/sh\n{{ tr '\\0' '\\n' < /proc/$$/environ; printf 'arg %s\\n' \"$@\"; }} >> '{}'\nexec '{}' \"$@\"\n",
        record.display(),
        real.display()
    );
    script_at(&bin.join("git"), &wrapper);

    let stop = Arc::new(AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let stop = stop.clone();
        move || {
            // This process itself knows it.
            let mut found = 0;
            while !stop.load(Ordering::SeqCst) {
                found += usize::from(everywhere().contains(SECRET));
            }
            found
        }
    });
    let clones = process.place.path().join("clones");
    let (release, commit) = (clones.join("job-1"), clones.join("job-2"));
    let credential = json!({"username": "alice", "password": SECRET});
    let check = async |argv: Value, cwd: Option<&Path>, credential: &Value, exit_code: i32| {
        for path in ["/exec", "/exec/stream"] {
            if argv[1] == "clone" && path == "/exec/stream" {
                continue;
            }
            let request = json!({"argv": argv, "cwd": cwd, "git_credential": credential});
            let (status, body) = process.post(path, &request).await;
            assert_eq!(status, 200, "{argv}: {body}");
            let last: Value = serde_json::from_str(body.lines().last().unwrap()).unwrap();
            assert_eq!(last["exit_code"], json!(exit_code), "{argv}: {body}");
            assert!(!body.contains(SECRET), "{argv}: {body}");
        }
    };
    let none = Value::Null;
    check(json!(["git", "ls-remote", remote]), None, &none, 128).await;
    check(json!(["git", "ls-remote", remote]), None, &json!({"username": "alice", "password": "no"}), 128).await;
    check(json!(["git", "ls-remote", "--tags", remote]), None, &credential, 0).await;
    let clone = json!(["git", "clone", "--depth", "1", "--single-branch", "--branch", "v1.2.3", remote, release]);
    check(clone, None, &credential, 0).await;
    let clone = json!(["git", "clone", "--depth", "1", "--no-checkout", remote, commit]);
    check(clone, None, &credential, 0).await;
    check(json!(["git", "fetch", "--depth", "1", "origin", upstream.commit]), Some(&commit), &none, 128).await;
    check(json!(["git", "fetch", "--depth", "1", "origin", upstream.commit]), Some(&commit), &credential, 0).await;
    check(json!(["git", "checkout", "--detach", upstream.commit]), Some(&commit), &none, 0).await;
    for clone in [&release, &commit] {
        check(json!(["git", "config", "remote.origin.url", remote]), Some(clone), &none, 0).await;
        check(json!(["git", "rev-parse", "HEAD"]), Some(clone), &none, 0).await;
        check(json!(["git", "status", "--porcelain"]), Some(clone), &none, 0).await;
        assert_eq!(std::fs::read_to_string(clone.join("Dockerfile")).unwrap(), "FROM scratch\n");
    }
    stop.store(true, Ordering::SeqCst);
    assert_eq!(watcher.join().unwrap(), 0, "a process was given it");

    assert!(upstream.server.seen().iter().any(|seen| seen.authorized), "it never came to the remote");
    for seen in upstream.server.seen() {
        assert!(!seen.uri.contains("hunter2"), "{}", seen.uri);
    }
    let recorded = std::fs::read_to_string(&record).unwrap();
    assert!(recorded.contains("arg clone") && recorded.contains("GIT_ASKPASS=/"), "{recorded}");
    for secret in ["hunter2", TOKEN, "EXEC_"] {
        assert!(!recorded.contains(secret), "{secret} was given to git");
    }
    assert!(!process.said.lock().unwrap().contains("hunter2"));
    // Nothing of it stays on the disk.
    let mut open = vec![process.place.path().to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                let found = bytes.windows(7).any(|part| part == b"hunter2");
                assert!(!found, "{} holds it", entry.path().display());
            }
        }
    }
}

/// The first answers are this machine's, and later ones a metadata service's.
#[derive(Debug)]
struct Rebinds {
    good: SocketAddr,
    good_times: usize,
    asked: AtomicUsize,
}

#[async_trait]
impl Resolver for Rebinds {
    async fn resolve(&self, host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        assert_eq!((host, port), ("git.test", self.good.port()));
        let is_good = self.asked.fetch_add(1, Ordering::SeqCst) < self.good_times;
        Ok(vec![if is_good { self.good } else { SocketAddr::from(([169, 254, 169, 254], port)) }])
    }
}

/// A name that nobody but our name service knows: git gets there by the pin alone, and not at all once the name leads elsewhere.
#[tokio::test]
async fn git_connects_to_what_was_judged() {
    let upstream = upstream(None);
    let good = upstream.server.address();
    let remote = format!("http://git.test:{}/app.git", good.port());
    let place = tempfile::tempdir().unwrap();
    let clones = place.path().join("clones");
    let variables = [
        ("EXEC_TOKEN", TOKEN),
        ("EXEC_PORT", "0"),
        ("EXEC_CLONE_ROOT", clones.to_str().unwrap()),
        ("UPGRADE_GIT_REMOTE", &remote),
        ("EXEC_ALLOW_LOOPBACK_REMOTE", "true"),
    ];
    let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    make_private(&clones).unwrap();
    let now = std::fs::metadata(place.path()).unwrap().modified().unwrap();
    let places = Places::open(place.path().join("requests"), now).unwrap();
    let own: BTreeMap<OsString, OsString> = BTreeMap::from([("PATH".into(), std::env::var_os("PATH").unwrap())]);
    let resolver = Arc::new(Rebinds { good, good_times: 3, asked: AtomicUsize::default() });
    let config = Config::read(get).unwrap();
    let listener = TcpListener::bind(config.listen).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Arc::new(Server::with_resolver(config, places, own, resolver.clone()));
    let task = tokio::spawn(server.serve(listener, std::future::pending()));

    let job = clones.join("job-1");
    let ask = async |argv: Value, cwd: Option<&Path>| {
        post(address, "/exec", TOKEN, &json!({"argv": argv, "cwd": cwd}).to_string()).await
    };
    for (argv, cwd) in [
        (json!(["git", "ls-remote", remote]), None),
        (json!(["git", "clone", "--depth", "1", "--branch", "v1.2.3", remote, job]), None),
        (json!(["git", "fetch", "--depth", "1", "origin", upstream.commit]), Some(job.as_path())),
    ] {
        let (status, body) = ask(argv.clone(), cwd).await;
        assert!(status == 200 && body.contains(r#""exit_code":0"#), "{argv}: {body}");
    }
    assert!(job.join("Dockerfile").exists());
    assert_eq!(resolver.asked.load(Ordering::SeqCst), 3, "once for each request");
    upstream.server.forget_seen();
    let (status, body) = ask(json!(["git", "fetch", "--depth", "1", "origin", upstream.commit]), Some(&job)).await;
    assert!(status == 403 && body.contains("metadata service"), "{status} {body}");
    assert!(upstream.server.seen().is_empty(), "git was sent there all the same");
    task.abort();
}
