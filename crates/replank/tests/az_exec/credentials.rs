//! A credential in the configured remote shows nowhere: not in the clone, a log, the row, the history or a process list.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use crate::rig::{COMPONENTS, EXEC_TOKEN, Options, Rig, said};
use replank_testbed::installed::free_port;
use serde_json::Value;

/// One for each test: they run side by side, and look at all processes of this machine.
const APART: &str = "hunter2-remote-credential-2f9c";
const IN_ADDRESS: &str = "hunter3-remote-credential-8d1e";

fn with_password(password: &str) -> Options {
    Options { sign_in: Some(("robot".to_owned(), password.to_owned())), ..Options::default() }
}

/// Everything that a person, a file or a process could show, once the job has ended.
fn looked_into(rig: &Rig, row: &Value) -> Vec<(String, Vec<u8>)> {
    let mut seen = vec![("row".to_owned(), row.to_string().into_bytes()), ("told".to_owned(), rig.told().into_bytes())];
    for component in COMPONENTS {
        seen.push((format!("log of {component}"), rig.log(row, component).into_bytes()));
    }
    for path in ["status", "candidates", "history?limit=500"] {
        seen.push((path.to_owned(), rig.get(&format!("/api/upgrade/{path}")).1.into_bytes()));
    }
    for command in [&["status"][..], &["candidates"], &["history"]] {
        seen.push((command.join(" "), said(&rig.cli(command)).into_bytes()));
    }
    let files = seen.len();
    collect(&rig.home, &mut seen);
    collect(&rig.clones, &mut seen);
    assert!(seen.iter().skip(files).any(|(name, _)| name.ends_with("replank.db")));
    assert!(seen.iter().skip(files).any(|(name, _)| name.ends_with(".git/config")), "there is no clone to look at");
    seen
}

fn collect(dir: &Path, into: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            collect(&path, into);
        } else if kind.is_file() {
            into.push((path.display().to_string(), std::fs::read(&path).unwrap_or_default()));
        }
    }
}

#[track_caller]
fn show_nothing(seen: &[(String, Vec<u8>)], password: &str) {
    for secret in [password, EXEC_TOKEN] {
        for (name, bytes) in seen {
            let found = bytes.windows(secret.len()).position(|w| w == secret.as_bytes());
            if let Some(at) = found {
                let around = &bytes[at.saturating_sub(120)..(at + 20).min(bytes.len())];
                panic!("a secret shows in {name}: {}", String::from_utf8_lossy(around));
            }
        }
    }
}

#[test]
fn a_credential_goes_beside_the_address() {
    let rig = Rig::start(with_password(APART));
    let row = rig.succeeds(&["1.0.0"]);
    assert_eq!(row["git_remote"], rig.git.url("app"), "shown without its user");
    let mut seen = looked_into(&rig, &row);
    for call in rig.az.calls().unwrap() {
        seen.push(("the processes while az ran".to_owned(), call.processes.into_bytes()));
    }
    show_nothing(&seen, APART);
}

/// A server from before credentials could be given apart: refused unless the operator allows it, and then nothing is kept.
#[test]
fn an_older_server_gets_it_in_the_address_only_where_that_is_allowed() {
    let port = free_port().unwrap();
    let mut rig = Rig::prepare(Options { upstream: Some(port), ..with_password(IN_ADDRESS) });
    rig.start_exec();
    older_server(port, rig.exec_port);
    rig.serve();
    let row = rig.fails(&["1.0.0"], &["too old to be given the remote's credential apart", "EXEC_CREDENTIAL_IN_URL"]);
    show_nothing(&[("row".to_owned(), row.to_string().into_bytes())], IN_ADDRESS);

    let port = free_port().unwrap();
    let env = vec![("EXEC_CREDENTIAL_IN_URL", "true".to_owned())];
    let mut rig = Rig::prepare(Options { upstream: Some(port), env, ..with_password(IN_ADDRESS) });
    rig.start_exec();
    older_server(port, rig.exec_port);
    rig.serve();
    let row = rig.succeeds(&["1.0.0"]);
    let mut seen = looked_into(&rig, &row);
    for call in rig.az.builds().unwrap() {
        // The clone is over by then.
        seen.push(("the processes while az ran".to_owned(), call.processes.into_bytes()));
    }
    show_nothing(&seen, IN_ADDRESS);
}

/// Stands before a server of today and takes away what an older one does not have: the feature it names, and the field that it
/// would not look at.
fn older_server(port: u16, real: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || pass(client, real));
        }
    });
}

fn pass(mut client: TcpStream, real: u16) -> Option<()> {
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    let (head, length) = loop {
        let count = client.read(&mut buffer).ok().filter(|count| *count > 0)?;
        got.extend_from_slice(&buffer[..count]);
        if let Some(at) = got.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&got[..at]).into_owned();
            let length =
                head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            break (head, at + 4 + length.unwrap_or(0));
        }
    };
    while got.len() < length {
        let count = client.read(&mut buffer).ok().filter(|count| *count > 0)?;
        got.extend_from_slice(&buffer[..count]);
    }
    let mut body = got[head.len() + 4..].to_vec();
    if let Ok(Value::Object(mut request)) = serde_json::from_slice::<Value>(&body) {
        request.remove("git_credential");
        body = serde_json::to_vec(&request).ok()?;
    }
    let kept: Vec<&str> = head.lines().filter(|l| !l.to_ascii_lowercase().starts_with("content-length")).collect();
    let mut server = TcpStream::connect(("127.0.0.1", real)).ok()?;
    write!(server, "{}\r\nContent-Length: {}\r\n\r\n", kept.join("\r\n"), body.len()).ok()?;
    server.write_all(&body).ok()?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).ok()?;
    let text = String::from_utf8_lossy(&answer).replace("x-exec-features: git-credential\r\n", "");
    client.write_all(text.as_bytes()).ok()
}
