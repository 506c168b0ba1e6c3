//! `docs/first-upgrade.md` is run as it stands: its shell blocks in their order, their output against what the document shows,
//! while a user writes rows and uploads all the time. Nothing that the user was told is saved may be missing at the end.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use replank_testbed::installed::free_port;
use replank_testbed::remains::Scratch;
use replank_testbed::{Engine, GitServer, GitServerOptions, cleanup, images, process};

use crate::rig::{REPLANK, get};

/// A block with a whole upgrade in it.
const BLOCK_LIMIT: Duration = Duration::from_secs(180);
const APPLICATION: &str = "guestbook";
const NETWORK: &str = "guestbook_default";
const VOLUMES: [&str; 3] = ["guestbook_data", "guestbook_uploads", "guestbook_backup"];
/// What the document says, and what is meant by it here.
const REMOTE: &str = "https://git.example.com/acme/guestbook.git";
const HOME: &str = "/srv/guestbook";
const WEB_PORT: &str = "8090";

/// A fenced block: its info string and its text.
struct Block {
    info: String,
    text: String,
    line: usize,
}

fn blocks(document: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut open = false;
    for (number, line) in document.lines().enumerate() {
        match (line.strip_prefix("```"), open) {
            (Some(info), false) => {
                found.push(Block { info: info.to_owned(), text: String::new(), line: number + 1 });
                open = true;
            }
            (Some(_), true) => open = false,
            (None, true) => {
                let block = found.last_mut().expect("an open block");
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, false) => {}
        }
    }
    assert!(!open, "a block is not closed");
    found
}

/// Whether the output is as shown: `…` stands for anything, on a line of its own also for any lines.
fn is_as_shown(shown: &str, output: &str) -> bool {
    let mut rest = output;
    let mut anchored = true;
    // Each piece between two `…` must follow, in this order.
    for (index, piece) in shown.trim_end().split('…').enumerate() {
        let piece = if index == 0 { piece } else { piece.trim_start_matches('\n') };
        let piece = if anchored { piece } else { piece.trim_end_matches('\n') };
        match rest.find(piece) {
            Some(0) => rest = &rest[piece.len()..],
            Some(at) if index > 0 => rest = &rest[at + piece.len()..],
            Some(_) | None => return false,
        }
        anchored = false;
    }
    shown.trim_end().ends_with('…') || rest.trim().is_empty()
}

#[test]
fn shown_output_is_compared_in_its_order() {
    assert!(is_as_shown("a\n…\nb …\n", "a\nx\ny\nb 1\n"));
    assert!(is_as_shown("…\nb\n", "a\nb\n"));
    assert!(!is_as_shown("a\n", "a\nb\n"), "more than is shown");
    assert!(!is_as_shown("…\nb\n", "a\n"), "less than is shown");
    assert!(!is_as_shown("…\nb\n…\na\n…\n", "a\nb\n"), "another order");
    assert!(!is_as_shown("b\n…\n", "a\nb\n"), "what comes first counts");
}

/// The machine of somebody who has the document before them. Fields are dropped in this order: the application before its files.
struct Newcomer {
    engine: Engine,
    _git: GitServer,
    remote: String,
    web: u16,
    upgrade: u16,
    scratch: Scratch,
}

impl Newcomer {
    fn arrive() -> Self {
        cleanup::on_signals().unwrap();
        let engine = Engine::from_env().unwrap();
        let gateway = engine.gateway().expect("an engine on this machine");
        let scratch = Scratch::create().unwrap();
        let root = scratch.path().to_owned();
        // Images that the document's Dockerfiles begin with, from what this machine has: nothing is pulled.
        let replank = format!("replank:{}", env!("CARGO_PKG_VERSION"));
        for (name, image) in
            [("busybox:1.36", images::BUSYBOX), ("gcc:13", images::CC), (replank.as_str(), images::RUNTIME)]
        {
            engine.docker(&["tag", image, name]).unwrap();
        }
        engine.docker(&["network", "create", NETWORK]).unwrap();
        process::run(Command::new("git").args(["init", "--quiet", "--bare"]).arg(root.join("guestbook.git"))).unwrap();
        let git = GitServer::start(&root, &GitServerOptions { bind: IpAddr::V4(gateway), sign_in: None }).unwrap();
        for directory in ["user/bin", "srv"] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        std::os::unix::fs::symlink(REPLANK, root.join("user/bin/replank")).unwrap();
        let config = format!(
            "[url \"{}/\"]\n\tpushInsteadOf = {}\n[user]\n\tname = Newcomer\n\temail = newcomer@example.com\n",
            root.display(),
            REMOTE.trim_end_matches("guestbook.git")
        );
        std::fs::write(root.join("user/.gitconfig"), config).unwrap();
        std::fs::write(root.join("state"), format!("cd {}\n", images::workspace().display())).unwrap();
        let remote = git.url(APPLICATION);
        Self { engine, _git: git, remote, web: free_port().unwrap(), upgrade: free_port().unwrap(), scratch }
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.scratch.path().join(inside)
    }

    fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments).unwrap()
    }

    /// The document's words for this machine.
    fn here(&self, text: &str) -> String {
        let home = self.path("srv/guestbook");
        text.replace(HOME, home.to_str().expect("a path")).replace(WEB_PORT, &self.web.to_string())
    }

    /// Runs a block in the directory and with the variables in which the one before ended; exit code and output.
    fn run(&self, text: &str) -> (i32, String) {
        let state = self.path("state");
        let script = format!(
            "exec 2>&1; . {state}; set -e; trap 'code=$?; {{ declare -px | grep REPLANK_ || :; echo \"cd $PWD\"; }} >{state}; exit $code' EXIT\n{text}",
            state = state.display()
        );
        let user = self.path("user");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command
            .args(["-uc", &script])
            .env_clear()
            .env("PATH", format!("{}:{path}", user.join("bin").display()))
            .env("HOME", &user)
            .env("DOCKER_HOST", self.engine.host())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .stdin(Stdio::null());
        let out = process::output(&mut command, BLOCK_LIMIT).expect("the block ends in time");
        (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What a `compose` block does, by its place: there is no compose plugin on test machines.
    fn compose(&self, text: &str) {
        if text.contains(" up ") {
            let volume = format!("{}:/data", VOLUMES[0]);
            let run = ["run", "--detach", "--name", "guestbook-db", "--network", NETWORK, "--network-alias", "db"];
            self.docker(&[&run[..], &["--volume", &volume, "appenddb:1"]].concat());
            let write = "until [ \"$(echo add 1 wrote hello | nc db 5432)\" = ok ]; do usleep 100000; done";
            self.docker(&["run", "--rm", "--network", NETWORK, images::BUSYBOX, "sh", "-c", write]);
        } else {
            // Its `web`, `worker` and `cron` were never started.
            assert!(text.contains(" stop "), "the test knows no {text}");
        }
    }

    /// Only what differs between the document's machine and this one: addresses.
    fn adapt(&self) {
        let file = self.path("srv/guestbook/replank.toml");
        let made = std::fs::read_to_string(&file).unwrap();
        let remote = format!("remote = \"{}\"\nallow_loopback = true\nallow_private = true", self.remote);
        let mut changed = made;
        for (from, to) in [
            (format!("remote = \"{REMOTE}\""), remote),
            (format!("publish = {WEB_PORT}\n"), format!("publish = {}\n", self.web)),
            ("publish = 8086\n".to_owned(), format!("publish = {}\n", self.upgrade)),
        ] {
            assert!(changed.contains(&from), "{from:?} is not in {changed}");
            changed = changed.replace(&from, &to);
        }
        changed.push_str(&format!("\n[docker]\nsocket = \"{}\"\n", self.engine.socket().display()));
        std::fs::write(&file, changed).unwrap();
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        let of = format!("label=io.replank.application={APPLICATION}");
        let list = |what: &[&str]| self.engine.docker(what).unwrap_or_default();
        // Controllers bring back what is taken from under them, so until nothing is left.
        for _ in 0..10 {
            let all = list(&["ps", "-aq", "--filter", &of]);
            if all.is_empty() {
                break;
            }
            let remove: Vec<&str> = ["rm", "-f"].into_iter().chain(all.lines()).collect();
            self.engine.docker(&remove).ok();
        }
        self.engine.docker(&["rm", "-f", "guestbook-db"]).ok();
        let networks = list(&["network", "ls", "-q", "--filter", &of]);
        for network in networks.lines().chain([NETWORK]) {
            self.engine.docker(&["network", "rm", network]).ok();
        }
        for volume in VOLUMES {
            self.engine.docker(&["volume", "rm", "-f", volume]).ok();
        }
    }
}

/// One request with a body; `None` where the connection fails.
fn send(port: u16, method: &str, path: &str, body: &str) -> Option<u16> {
    let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n{body}")
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_whitespace().nth(1)?.parse().ok()
}

/// A user who writes and reads all the time, and remembers what was accepted.
struct User {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    rows: Vec<String>,
    uploads: BTreeMap<String, String>,
    /// Requests for the page that did not answer 200.
    wrong: Vec<String>,
    /// Writes that were answered with anything but 201.
    refused: usize,
}

impl User {
    fn come(port: u16) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let (stopped, notes) = (stop.clone(), seen.clone());
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let row = format!("row-{number}");
                let (name, content) = (format!("file-{number}"), format!("content {number}\n").repeat(20));
                let (wrote, page) = (send(port, "POST", "/rows", &row), get(port, "/", ""));
                let uploaded = (number % 4 == 0).then(|| send(port, "PUT", &format!("/uploads/{name}"), &content));
                let mut seen = notes.lock().unwrap();
                match wrote {
                    Some(201) => seen.rows.push(row),
                    Some(_) | None => seen.refused += 1,
                }
                if uploaded == Some(Some(201)) {
                    seen.uploads.insert(name, content);
                }
                if page.as_ref().is_none_or(|(code, _)| *code != 200) {
                    seen.wrong.push(format!("{number}: {page:?}"));
                }
                drop(seen);
                std::thread::sleep(Duration::from_millis(60));
            }
        });
        Self { stop, seen, thread }
    }

    fn accepted(&self) -> (usize, usize) {
        let seen = self.seen.lock().unwrap();
        (seen.rows.len(), seen.uploads.len())
    }

    /// Each row that was accepted so far is there, once, whatever its form; each upload as it was sent.
    fn misses_nothing(&self, port: u16) {
        let seen = self.seen.lock().unwrap();
        let (code, rows) = get(port, "/rows", "").expect("the rows");
        assert_eq!(code, 200, "{rows}");
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        for row in rows.lines().filter_map(|line| line.trim_start_matches("2|").strip_prefix("wrote ")) {
            *count.entry(row).or_default() += 1;
        }
        for row in &seen.rows {
            assert_eq!(count.get(row.as_str()), Some(&1), "{row} was accepted: {rows}");
        }
        for (name, content) in &seen.uploads {
            let (code, found) = get(port, &format!("/uploads/{name}"), "").expect("an upload");
            assert_eq!((code, &found), (200, content), "{name}");
        }
    }

    fn leave(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

/// A WebSocket that stays open, spoken to without any of the product's code.
struct Socket(TcpStream);

impl Socket {
    fn open(port: u16) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The handshake of RFC 6455, section 1.3.
        write!(
            stream,
            "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101") && head.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        Self(stream)
    }

    /// What is answered, with the version before it; `None` once the connection has ended.
    fn say(&mut self, word: &str) -> Option<String> {
        let mask = [1, 2, 3, 4];
        let length = u8::try_from(word.len()).ok().filter(|length| *length < 126)?;
        let mut frame = vec![0x81, 0x80 | length];
        frame.extend(mask);
        frame.extend(word.bytes().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
        self.0.write_all(&frame).ok()?;
        let mut head = [0; 2];
        self.0.read_exact(&mut head).ok()?;
        let mut text = vec![0; usize::from(head[1])];
        self.0.read_exact(&mut text).ok()?;
        (head[0] == 0x81).then(|| String::from_utf8_lossy(&text).into_owned())
    }
}

fn document() -> String {
    std::fs::read_to_string(images::workspace().join("docs/first-upgrade.md")).unwrap()
}

/// Rows of a kind that nobody but the application writes come in.
fn until_rows(port: u16, wanted: &str) {
    let end = Instant::now() + Duration::from_secs(30);
    while !get(port, "/rows", "").is_some_and(|(_, rows)| rows.contains(wanted)) {
        assert!(Instant::now() < end, "{wanted:?} never comes");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_document_for_newcomers_is_true() {
    let newcomer = Newcomer::arrive();
    let (mut user, mut socket, mut output, mut ran): (Option<User>, Option<Socket>, _, _) = (None, None, None, 0);
    for block in blocks(&document()) {
        let words: Vec<&str> = block.info.split(' ').collect();
        let text = newcomer.here(&block.text);
        match words.as_slice() {
            ["sh", "compose"] => newcomer.compose(&block.text),
            ["output"] => {
                let said: String = output.take().expect("a block before it");
                // Init shows the port that the repository's file has.
                let shown = block.text.replace(HOME, newcomer.path("srv/guestbook").to_str().unwrap());
                assert!(is_as_shown(&shown, &said), "line {}: shown\n{shown}\nis\n{said}", block.line);
            }
            ["sh", "run", rest @ ..] => {
                let begun = Instant::now();
                let (code, said) = newcomer.run(&text);
                eprintln!("{text}{said}({code}, {:.1} s)\n", begun.elapsed().as_secs_f32());
                let is_wanted = match rest {
                    [] => code == 0,
                    ["fails"] => code != 0,
                    [word] => word.strip_prefix("exit=") == Some(code.to_string().as_str()),
                    more => panic!("line {}: {more:?}", block.line),
                };
                assert!(is_wanted, "line {}: {text}{said}({code})", block.line);
                ran += 1;
                around(&newcomer, &text, &said, &mut user, &mut socket);
                output = Some(said);
            }
            other => panic!("line {}: a block is either `sh run`, `sh compose` or `output`, not {other:?}", block.line),
        }
    }
    assert!(ran > 10, "{ran} blocks were run");
    let user = user.expect("a user came");
    user.misses_nothing(newcomer.web);
    let (rows, uploads) = user.accepted();
    let seen = user.leave();
    eprintln!("{rows} rows and {uploads} uploads were accepted, {} writes were not", seen.refused);
    assert!(rows > 100 && uploads > 20, "{rows} rows, {uploads} uploads");
    assert!(seen.refused > 0, "the backup has locked nothing");
    assert!(seen.wrong.is_empty(), "the page failed: {:?}", seen.wrong);
}

/// What the document says happens beside its commands.
fn around(newcomer: &Newcomer, text: &str, said: &str, user: &mut Option<User>, socket: &mut Option<Socket>) {
    let web = newcomer.web;
    let refused = |user: &Option<User>| user.as_ref().map_or(0, |user| user.seen.lock().unwrap().refused);
    if text.contains("replank init") {
        newcomer.adapt();
    } else if text.contains("replank deploy") {
        *user = Some(User::come(web));
        *socket = Some(Socket::open(web));
        until_rows(web, "worked hello");
        until_rows(web, "tick ");
    } else if text.contains("replank start --yes --reason") {
        assert_eq!(refused(user), 0, "a compatible upgrade refuses no write: {said}");
        // Drained: it ended with the old version, and the next one finds the new version.
        let end = Instant::now() + Duration::from_secs(30);
        while let Some(answer) = socket.as_mut().and_then(|open| open.say("still there")) {
            assert_eq!(answer, "1.0.0 still there");
            assert!(Instant::now() < end, "the old version's connection never ends");
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut again = Socket::open(web);
        assert_eq!(again.say("hi").as_deref(), Some("1.1.0 hi"));
        *socket = Some(again);
    } else if text.contains("replank start 2.0.0 --yes --accept-one-way") {
        // What serves goes on serving, the connection included.
        assert_eq!(socket.as_mut().and_then(|open| open.say("night")).as_deref(), Some("1.1.0 night"));
        assert_eq!(send(web, "POST", "/rows", "late"), Some(503), "migrated rows take no write of version 1");
    } else if text.contains("--data-restored") || text.contains("replank start 2.0.1") {
        user.as_ref().expect("a user").misses_nothing(web);
        let before = user.as_ref().expect("a user").accepted().0;
        let end = Instant::now() + Duration::from_secs(20);
        while user.as_ref().expect("a user").accepted().0 <= before {
            assert!(Instant::now() < end, "no row is accepted any more");
            std::thread::sleep(Duration::from_millis(50));
        }
        until_rows(web, "worked row-0");
    }
}

/// The paths that the document links to are there.
#[test]
fn the_document_for_newcomers_links_to_what_is_there() {
    let docs = images::workspace().join("docs");
    let text = document();
    let mut count = 0;
    for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        let path = link.split('#').next().unwrap_or_default();
        assert!(Path::new(&docs).join(path).exists(), "{link}");
        count += 1;
    }
    assert!(count > 4, "{count} links");
}
