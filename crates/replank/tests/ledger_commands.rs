//! Commands that work on the ledger without a service: tokens with their audit lines, refusals, the check of the history; and
//! what a service refuses before it opens anything.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use replank_adapters::ledger::sqlite::SqliteLedger;
use replank_adapters::sqlite::Store;
use replank_core::ports::{Ledger as _, Refusal, Tokens as _};
use replank_core::record::{Deployment, Plan};
use replank_core::words::{AppName, CommitSha, JobId, Millis, Nonce, OpKey, RevisionId};
use serde_json::Value;

const CONFIG: &str = "application = \"shop\"\n[components.api]\n[containers.api]\ncomponent = \"api\"\n";

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("replank.toml"), CONFIG).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ledger_dir(&self) -> PathBuf {
        self.path().join("ledger")
    }

    fn run_with(&self, arguments: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replank"));
        command.args(arguments).env_clear().env("REPLANK_HOME", self.path()).env("TZ", "UTC").current_dir("/");
        command.envs(env.iter().copied()).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, &[("USER", "root"), ("SUDO_USER", "alice")])
    }

    /// It went well; what it printed.
    #[track_caller]
    fn well(&self, arguments: &[&str]) -> String {
        let out = self.run(arguments);
        assert!(out.status.success(), "{arguments:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.well(&[arguments, &["--json"]].concat())).unwrap()
    }

    fn database(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.ledger_dir().join("replank.db")).unwrap()
    }

    fn events(&self) -> Vec<Value> {
        let database = self.database();
        let mut select = database.prepare("SELECT bytes FROM history ORDER BY seq").unwrap();
        let lines = select.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        lines.map(|line| serde_json::from_slice(&line.unwrap()).unwrap()).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn changes_of_tokens_are_in_the_history_from_the_first_one_on() {
    let home = Home::new();
    let made = home.json(&["token", "create", "robot", "--role", "admin", "--reason", "night builds"]);
    home.well(&["token", "create", "page"]);
    // Refused: nothing happened, so nothing is told.
    let elsewhere = home.path().join("elsewhere");
    let taken = home.run(&["token", "create", "robot", "--out", elsewhere.to_str().unwrap()]);
    assert_eq!((taken.status.code(), elsewhere.exists()), (Some(3), false), "{}", text(&taken.stderr));
    assert_eq!(home.run(&["token", "revoke", "nobody"]).status.code(), Some(3));
    home.well(&["token", "revoke", "robot", "--reason", "it leaked"]);
    assert_eq!(home.run(&["token", "revoke", "robot"]).status.code(), Some(3));

    let events = home.events();
    let told: Vec<_> = events
        .iter()
        .map(|e| ["event", "change", "token", "role", "reason", "job_id"].map(|field| e[field].as_str().unwrap()))
        .collect();
    let expect = [
        ["token_changed", "created", "robot", "admin", "night builds", ""],
        ["token_changed", "created", "page", "reader", "", ""],
        ["token_changed", "revoked", "robot", "admin", "it leaked", ""],
    ];
    assert_eq!(told, expect);
    // Who, as the system knows it and as it is called; and the id under which the token's holder acts.
    let uid = rustix::process::getuid().as_raw();
    let actor = serde_json::json!({ "oid": format!("uid:{uid}"), "name": "alice", "from": "host" });
    assert!(events.iter().all(|e| e["actor"] == actor && e["ts"].as_str().unwrap().ends_with('Z')), "{events:?}");
    assert_eq!((&events[0]["token_id"], &events[2]["token_id"]), (&made["id"], &made["id"]));
    let secret = std::fs::read_to_string(home.path().join("tokens/robot")).unwrap();
    assert!(!format!("{events:?}").contains(secret.trim()));
    assert_eq!(home.json(&["history", "--verify"])["lines"], 3);
}

/// Whoever has a backup, a log or a screenshot has no token.
#[test]
fn a_token_s_secret_stands_in_its_file_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::new();
    let mut told = String::new();
    for command in [
        &["token", "create", "robot", "--role", "admin"][..],
        &["token", "create", "page", "--json"],
        &["token", "list"],
        &["token", "list", "--json"],
        &["token", "revoke", "page"],
        &["history", "--verify"],
    ] {
        let out = home.run_with(command, &[("USER", "root"), ("REPLANK_LOG", "trace")]);
        assert!(out.status.success(), "{command:?}: {}", text(&out.stderr));
        told += &format!("{}{}", text(&out.stdout), text(&out.stderr));
    }
    for name in ["robot", "page"] {
        let file = home.path().join("tokens").join(name);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let secret = std::fs::read_to_string(&file).unwrap();
        let secret = secret.trim();
        assert!(secret.starts_with("rpk_") && !told.contains(&secret[4..]), "{name}: {told}");
        // The ledger's file with its write-ahead log: the hash, and nothing to sign in with.
        let mut files = 0;
        for entry in std::fs::read_dir(home.ledger_dir()).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(!bytes.windows(secret.len() - 4).any(|part| part == &secret.as_bytes()[4..]), "{name}");
            files += 1;
        }
        let hash = replank::http::hash_secret(secret).to_string();
        let sql = "SELECT count(*) FROM token WHERE hash = ?1";
        let count: i64 = home.database().query_row(sql, [hash], |row| row.get(0)).unwrap();
        assert!(files > 0 && count == 1, "{name}: {files} files, {count} hashes");
    }
}

#[test]
fn a_changed_byte_of_the_history_is_not_consistent() {
    let home = Home::new();
    assert_eq!(home.well(&["history", "--verify"]), "there is no history yet\n");
    for name in ["one", "two", "three"] {
        home.well(&["token", "create", name]);
    }
    assert_eq!(home.well(&["history", "--verify"]), "consistent with anchor: 3 events\n");
    let refused = |why: &str| {
        let out = home.run(&["history", "--verify"]);
        let told = text(&out.stderr);
        assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""), "{told}");
        assert!(told.contains("NOT consistent") && told.contains(why) && told.contains("keep a copy"), "{told}");
        let out = home.run(&["history", "--verify", "--json"]);
        let error: Value = serde_json::from_slice(&out.stderr).unwrap();
        assert_eq!((out.status.code(), &error["code"]), (Some(1), &1.into()));
    };
    let lines = |sql: &str| assert_eq!(home.database().execute(sql, []).unwrap(), 1, "{sql}");
    let change = |seq: u8, from: &str, to: &str| {
        lines(&format!(
            "UPDATE history SET bytes = CAST(replace(CAST(bytes AS TEXT), '{from}', '{to}') AS BLOB) WHERE seq = {seq}"
        ));
    };
    // One byte, in a line that others follow, and in the last one.
    change(1, "reader", "readed");
    refused("line 2 does not follow");
    change(1, "readed", "reader");
    change(2, "created", "createt");
    refused("not the one that the record anchors");
    change(2, "createt", "created");
    assert_eq!(home.well(&["history", "--verify"]), "consistent with anchor: 3 events\n");
    lines("DELETE FROM history WHERE seq = 2");
    refused("anchors 3 lines and 2 were found");
}

#[tokio::test]
async fn refusals_can_be_read() {
    let home = Home::new();
    assert_eq!(home.well(&["history", "--refusals"]), "nothing was refused\n");
    let made = home.json(&["token", "create", "robot"]);
    let id = made["id"].as_str().unwrap();
    let ledger = SqliteLedger::new(Store::open(home.ledger_dir()).await.unwrap(), AppName::new("shop").unwrap());
    for (at, actor, why) in
        [(1, "", "this host name is not served here"), (2, id, "commit 0123 is quarantined\u{1b}[2J")]
    {
        let refusal = Refusal {
            at: Millis(at * 1_000),
            actor: actor.to_owned(),
            from: "10.0.0.7".to_owned(),
            action: "POST /api/upgrade/start".to_owned(),
            why: why.to_owned(),
        };
        ledger.refused(&refusal).await.unwrap();
    }
    let found = home.json(&["history", "--refusals"]);
    let expect = serde_json::json!({ "refusals": [
        { "ts": "1970-01-01T00:00:01.000Z", "actor": "", "name": "", "from": "10.0.0.7",
          "action": "POST /api/upgrade/start", "why": "this host name is not served here" },
        { "ts": "1970-01-01T00:00:02.000Z", "actor": id, "name": "robot", "from": "10.0.0.7",
          "action": "POST /api/upgrade/start", "why": "commit 0123 is quarantined\u{1b}[2J" },
    ] });
    assert_eq!(found, expect);
    let shown = home.well(&["history", "--refusals", "--limit", "1"]);
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 2, "{shown}");
    assert!(lines[0].starts_with("TIME") && lines[0].contains("WHY NOT"), "{shown}");
    assert!(lines[1].starts_with("1970-01-01 00:00:02 +00:00  robot  10.0.0.7  POST /api/upgrade/start"), "{shown}");
    assert!(lines[1].ends_with("commit 0123 is quarantined␛[2J"), "no tricks on the terminal: {shown}");
    assert_eq!(home.run(&["history", "--refusals", "--verify"]).status.code(), Some(2));
}

/// Nobody serves yet, or ever will: an auditor asks all the same who tried what.
#[tokio::test]
async fn a_deployment_that_is_refused_is_written_down_and_one_that_fails_is_not() {
    let home = Home::new();
    let socket = home.path().join("engine.sock");
    let engine = format!("[docker]\nsocket = \"{}\"\n", socket.display());
    let config = format!("{CONFIG}{engine}");
    std::fs::write(home.path().join("replank.toml"), &config).unwrap();
    // The engine is not there: that is no refusal.
    assert_eq!(home.run(&["deploy"]).status.code(), Some(1));
    assert_eq!(home.well(&["history", "--refusals"]), "nothing was refused\n");

    // Nobody answers there, and nobody is asked.
    let _engine = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let runs_nothing = format!("application = \"shop\"\n[components.api]\n{engine}");
    std::fs::write(home.path().join("replank.toml"), runs_nothing).unwrap();
    assert_eq!(home.run(&["deploy"]).status.code(), Some(1));
    std::fs::write(home.path().join("replank.toml"), &config).unwrap();
    deployed(&home).await;
    let out = home.run(&["deploy", "1.2.3"]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("deployed already"), "{}", text(&out.stderr));

    let found = home.json(&["history", "--refusals"]);
    let refusals = found["refusals"].as_array().unwrap();
    let told = |index: usize, name: &str| refusals[index][name].as_str().unwrap().to_owned();
    assert_eq!(refusals.len(), 2, "{found}");
    assert_eq!((told(0, "action"), told(1, "action")), ("deploy".to_owned(), "deploy 1.2.3".to_owned()));
    assert!(told(0, "why").contains("runs nothing") && told(1, "why").contains("0.1.0 runs as revision"), "{found}");
    for refusal in refusals {
        assert!(refusal["actor"].as_str().unwrap().starts_with("uid:") && refusal["from"] == "host", "{refusal}");
    }
    assert!(home.events().is_empty(), "nothing happened, so the history says nothing");
}

/// The record says that 0.1.0 runs.
async fn deployed(home: &Home) {
    let ledger = SqliteLedger::new(Store::open(home.ledger_dir()).await.unwrap(), AppName::new("shop").unwrap());
    let (record, etag) = ledger.load().await.unwrap().unwrap();
    let mut record = std::sync::Arc::unwrap_or_clone(record);
    record.running = Some(Deployment {
        revision: RevisionId::new("v0-1-0-abcdefgh").unwrap(),
        key: OpKey::derive(&JobId::new("job-1").unwrap(), "revision", 1, &Nonce::new("0".repeat(32)).unwrap()),
        version: "0.1.0".parse().unwrap(),
        commit: CommitSha::new("0".repeat(40)).unwrap(),
        images: BTreeMap::new(),
        plan: Plan::default(),
        reads_format: None,
    });
    ledger.commit(Some(&etag), &record, &[]).await.unwrap();
}

#[test]
fn a_deployment_that_cannot_begin_is_told_to_scripts_as_one_error() {
    let home = Home::new();
    let config = format!("{CONFIG}[docker]\nsocket = \"{}\"\n", home.path().join("no.sock").display());
    std::fs::write(home.path().join("replank.toml"), config).unwrap();
    let out = home.run(&["deploy", "--json"]);
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""), "{}", text(&out.stderr));
    let error: Value = serde_json::from_slice(&out.stderr).unwrap();
    assert!(error["error"].as_str().unwrap().contains("no.sock") && error["code"] == 1, "{error}");
}

#[test]
fn the_development_bypass_is_refused_where_the_application_is_deployed() {
    for (variable, value, parts) in [
        ("CONTAINER_APP_NAME", "shop", ["--dev is refused where CONTAINER_APP_NAME is set", "sign in with a token"]),
        ("REPLANK_REVISION", "v0-1-0-abcdef", ["--dev is refused inside a deployed revision", "sign in with a token"]),
    ] {
        for bypass in [vec![], vec![("AUTH_DEV_BYPASS", "true")]] {
            let home = Home::new();
            let out = home.run_with(&["serve", "--dev"], &[&bypass[..], &[(variable, value)]].concat());
            let told = text(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{variable}: {told}");
            let line = told.lines().find(|line| line.starts_with("replank: ")).unwrap_or_default();
            assert!(parts.iter().all(|part| line.contains(part)) && line.contains(variable), "{told}");
            assert!(!home.ledger_dir().exists(), "{variable}: something was made all the same");
        }
    }
    let home = Home::new();
    let out = home.run_with(&["serve", "--dev", "--listen", "0.0.0.0:0"], &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("--dev needs a loopback address"), "{}", text(&out.stderr));
}
