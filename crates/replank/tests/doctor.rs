//! `replank doctor` as people run it, where something is missing. With a real engine it is looked at in `inputs/tour.rs`.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const RUNS: &str = "
[components.api]
[containers.api]
component = \"api\"
";
const SECRET: &str = "hunter2-hunter2-hunter2";

struct Home(tempfile::TempDir);

impl Home {
    fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("replank.toml"), format!("application = \"shop\"\n{config}")).unwrap();
        Self(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("replank.toml")
    }

    fn command(&self, args: &[&str], env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
        command.args(args).arg("--config").arg(self.file()).env_clear().envs(env.iter().copied()).current_dir("/");
        command.env("PATH", std::env::var("PATH").unwrap());
        command
    }

    /// Exit code and the answer for scripts, which shows no secret.
    fn doctor(&self, env: &[(&str, &str)]) -> (i32, Checks) {
        let out = self.command(&["doctor", "--timeout", "5", "--json"], env).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(!text.contains(SECRET), "{text}");
        let answer =
            serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&out.stderr)));
        (out.status.code().unwrap(), Checks(answer))
    }
}

struct Checks(Value);

impl Checks {
    #[track_caller]
    fn has(&self, name: &str, verdict: &str, words: &str) {
        let all = self.0["checks"].as_array().unwrap();
        let check = all.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {all:?}"));
        assert_eq!(check["verdict"], verdict, "{check}");
        let told = format!("{}; {}", check["what"].as_str().unwrap(), check["advice"].as_str().unwrap());
        assert!(told.contains(words), "{name}: {told}");
        assert!(verdict == "ok" || !check["advice"].as_str().unwrap().is_empty(), "advice: {check}");
    }
}

/// A server that answers every request with the same head.
fn server(head: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                    line.clear();
                }
                write!(&stream, "HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok();
            });
        }
    });
    port
}

#[test]
fn what_is_missing_is_named_and_nothing_is_made() {
    let home = Home::new(&format!(
        "[source]\nremote = \"http://127.0.0.1:1/x.git\"\nallow_loopback = true\n[docker]\nsocket = \"none.sock\"\n{RUNS}"
    ));
    let (code, checks) = home.doctor(&[]);
    assert_eq!(code, 1);
    checks.has("remote", "failed", "git remote");
    checks.has("engine", "failed", "none.sock");
    checks.has("registry", "ok", "images stay in the engine");
    checks.has("exec", "ok", "not used");
    checks.has("ledger", "warning", "there is no ledger");
    checks.has("running", "ok", "nothing is deployed");
    checks.has("clock", "warning", "NTP");
    checks.has("secrets", "ok", "0 configured secrets");
    assert_eq!((&checks.0["ok"], checks.0["failed"].as_u64()), (&Value::Bool(false), Some(2)), "{}", checks.0);
    let left: Vec<_> = std::fs::read_dir(home.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["replank.toml"]);

    // For people, and never in colours where there is no terminal.
    let out = home.command(&["doctor", "--timeout", "5"], &[]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("failed   engine") && text.contains("→ ") && text.contains("2 checks failed"), "{text}");
    assert!(!text.contains('\u{1b}'));

    let home = Home::new("nonsense = 1\n");
    assert_eq!(home.command(&["doctor"], &[]).output().unwrap().status.code(), Some(2));
}

#[test]
fn a_registry_that_takes_nothing_and_a_clock_that_is_wrong_are_told() {
    let remote = server("404 Not Found\r\nDate: Tue, 14 Nov 2023 22:13:20 GMT");
    let registry = server("405 Method Not Allowed");
    let home = Home::new(&format!(
        "[source]\nremote = \"http://127.0.0.1:{remote}/x.git\"\nallow_loopback = true\n[registry]\nhost = \"127.0.0.1:{registry}\"\n{RUNS}"
    ));
    let (code, checks) = home.doctor(&[]);
    assert_eq!(code, 1);
    checks.has("remote", "failed", "");
    checks.has("registry", "failed", "takes no uploads");
    checks.has("clock", "failed", "ahead of the remote's");
    // One that hangs fails alone, in its time.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = silent.local_addr().unwrap();
    let home = Home::new(&format!("[registry]\nhost = \"{host}\"\n{RUNS}"));
    let begun = std::time::Instant::now();
    let (_, checks) = home.doctor(&[]);
    checks.has("registry", "failed", "did not end within 5 s");
    checks.has("home", "ok", "");
    assert!(begun.elapsed().as_secs() < 30);
    // A registry that takes uploads: begun, and given up.
    let registry = server("202 Accepted\r\nLocation: /v2/shop-api/blobs/uploads/1");
    let home = Home::new(&format!("[registry]\nhost = \"127.0.0.1:{registry}\"\n{RUNS}"));
    home.doctor(&[]).1.has("registry", "ok", "takes uploads to 127.0.0.1:");
}

#[test]
fn secrets_are_looked_for_where_the_work_is_done() {
    let config = "
[source]
remote = \"http://127.0.0.1:1/x.git\"
allow_loopback = true
credential = { username = \"bot\", password_env = \"GIT_PASSWORD\" }
[build.secrets]
NPM = { env = \"NPM_TOKEN\" }
[components.api]
[containers.api]
component = \"api\"
secrets = { DB = { env = \"DB_PASSWORD\" }, KEY = { file = \"key\" } }
";
    let home = Home::new(config);
    let (_, checks) = home.doctor(&[("DB_PASSWORD", SECRET)]);
    checks.has("remote", "failed", "GIT_PASSWORD");
    checks.has("secrets", "failed", "NPM_TOKEN");
    checks.has("secrets", "failed", "secret KEY cannot be read");
    std::fs::write(home.0.path().join("key"), SECRET).unwrap();
    let all = [("DB_PASSWORD", SECRET), ("NPM_TOKEN", SECRET), ("GIT_PASSWORD", SECRET)];
    let (_, checks) = home.doctor(&all);
    checks.has("secrets", "ok", "3 configured secrets");
}

#[test]
fn a_ledger_that_was_changed_is_not_consistent() {
    let home = Home::new(RUNS);
    let out: Output = home.command(&["token", "create", "me"], &[]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    home.doctor(&[]).1.has("ledger", "ok", "1 event consistent with anchor");
    let file = home.0.path().join("ledger/replank.db");
    let database = rusqlite::Connection::open(&file).unwrap();
    database
        .execute("UPDATE history SET bytes = CAST(replace(CAST(bytes AS TEXT), 'shop', 'ship') || ' ' AS BLOB)", [])
        .unwrap();
    drop(database);
    let (code, checks) = home.doctor(&[]);
    assert_eq!(code, 1);
    checks.has("ledger", "failed", "NOT consistent");
    std::fs::write(&file, "this is no database, and long enough to be looked at as one: ".repeat(200)).unwrap();
    home.doctor(&[]).1.has("ledger", "failed", "");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    home.doctor(&[]).1.has("ledger", "failed", "not a plain file");
}

#[test]
fn a_home_that_cannot_be_written_is_told() {
    let home = Home::new(RUNS);
    std::fs::set_permissions(home.0.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = home.command(&["doctor", "--json", "--timeout", "5"], &[]);
    if rustix::process::getuid().is_root() {
        // Permissions mean nothing to root; and nobody can reach the usual place of the binary.
        let binary = home.0.path().join("replank");
        std::fs::copy(env!("CARGO_BIN_EXE_replank"), &binary).unwrap();
        command = Command::new(binary);
        command
            .args(["doctor", "--json", "--timeout", "5", "--config"])
            .arg(home.file())
            .env_clear()
            .current_dir("/")
            .uid(65_534)
            .gid(65_534);
    }
    let out = command.output().unwrap();
    let checks = Checks(serde_json::from_slice(&out.stdout).unwrap());
    checks.has("home", "failed", "cannot be written by this user");
    std::fs::set_permissions(home.0.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
}

struct ExecServer(Child, String);

impl Drop for ExecServer {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl ExecServer {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_replank"))
            .arg("exec-server")
            .env_clear()
            .env("EXEC_PORT", "0")
            .env("EXEC_TOKEN", SECRET)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut first = String::new();
        errors.read_line(&mut first).unwrap();
        std::thread::spawn(move || errors.read_to_string(&mut String::new()));
        let started: Value = serde_json::from_str(&first).unwrap_or_else(|_| panic!("{first}"));
        Self(child, format!("http://{}", started["listen"].as_str().unwrap()))
    }
}

#[test]
fn the_exec_server_and_its_token_are_tried() {
    let server = ExecServer::start();
    let home = Home::new("[build]\nbuilder = \"az-exec\"\n[registry]\nhost = \"127.0.0.1:1\"\n[components.api]\n");
    let env = |token| {
        [
            ("TERMINAL_EXEC_UPSTREAM", server.1.as_str()),
            ("EXEC_TOKEN", token),
            ("PLATFORM_ACR_NAME", "acmeregistry"),
            ("PLATFORM_ACR_LOGIN_SERVER", "127.0.0.1:1"),
        ]
    };
    let (_, checks) = home.doctor(&env(SECRET));
    checks.has("exec", "ok", "takes the token");
    checks.has("engine", "ok", "no engine is needed");
    checks.has("git", "ok", "exec server");
    let (_, checks) = home.doctor(&env("another-token-of-some-length"));
    checks.has("exec", "failed", "refuses the token");
    let gone = [("TERMINAL_EXEC_UPSTREAM", "http://127.0.0.1:1"), env(SECRET)[1], env(SECRET)[2], env(SECRET)[3]];
    home.doctor(&gone).1.has("exec", "failed", "cannot be reached");
}
