//! A small application of one component, deployed and served with the real binary on an engine of its own.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use replank_testbed::installed::free_port;
use replank_testbed::remains::Scratch;
use replank_testbed::repo::Entry;
use replank_testbed::{Engine, EngineOptions, GitServer, GitServerOptions, Repo, images, process};
use serde_json::Value;

pub const REPLANK: &str = env!("CARGO_BIN_EXE_replank");
/// A job on a slow, shared machine.
pub const JOB_LIMIT: Duration = Duration::from_secs(120);
/// A command that only asks.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);

pub const DOCKERFILE: &str =
    "FROM testbed/busybox\nCOPY www /www\nCMD [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n";

/// What differs between the cases.
#[derive(Default)]
pub struct Options {
    pub engine: EngineOptions,
    /// More lines of `[policy]`.
    pub policy: &'static str,
    /// Lines of `[policy.budgets]`.
    pub budgets: &'static str,
    /// More lines of `[source]` and `[components.app]`, and whole tables.
    pub source: String,
    pub component: String,
    pub tables: String,
    pub sign_in: Option<(String, String)>,
    /// Where the state lies instead of in the scratch directory.
    pub home: Option<PathBuf>,
    /// More of the environment of each `replank`.
    pub env: Vec<(String, String)>,
}

/// Fields are dropped in this order: the engine before the files that its containers use.
pub struct Rig {
    pub serving: Option<Serving>,
    pub watch: Option<Watch>,
    pub engine: Engine,
    pub git: GitServer,
    pub repo: Repo,
    pub home: PathBuf,
    pub stderr: PathBuf,
    pub web: u16,
    upgrade: u16,
    env: Vec<(String, String)>,
    _scratch: Scratch,
}

/// A controller on this machine; killed when dropped.
pub struct Serving(pub Child);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The files of a working release.
pub fn release(version: &str) -> Vec<Entry> {
    vec![
        Entry::file("app/Dockerfile", DOCKERFILE),
        Entry::file("app/www/version", format!("version={version};\n")),
        Entry::file("app/www/index.html", format!("<p>{version}</p>\n")),
    ]
}

impl Rig {
    /// Everything prepared; nothing deployed, nothing served.
    pub fn prepare(options: Options) -> Self {
        let scratch = Scratch::create().expect("a directory");
        let engine = Engine::start(&options.engine).expect("an engine");
        images::busybox(&engine).expect("the busybox image");
        let mut repo = Repo::create(scratch.path(), "app").expect("a repository");
        let commit = repo.commit(&release("0.1.0"), "The first release").expect("a commit");
        repo.tag("v0.1.0", &commit, "The first release").expect("a tag");
        let sign_in = options.sign_in.clone();
        let git = GitServer::start(scratch.path(), &GitServerOptions { sign_in, ..GitServerOptions::default() });
        let git = git.expect("a git server");
        let home = options.home.clone().unwrap_or_else(|| scratch.path().join("home"));
        std::fs::create_dir_all(&home).expect("a home");
        let (web, upgrade) = (free_port().expect("a port"), free_port().expect("a port"));
        let config = format!(
            "application = \"inputs\"\n\n[source]\nremote = \"{}\"\nallow_loopback = true\n{}\n\n\
             [server]\nlisten = \"127.0.0.1:{upgrade}\"\n\n[docker]\nsocket = \"{}\"\n\n\
             [policy]\nmode = \"single\"\nproofs = 2\n{}\n\n[policy.budgets]\n{}\n\n\
             [components.app]\ndockerfile = \"app/Dockerfile\"\ncontext = \"app\"\n{}\n\n\
             [containers.app]\ncomponent = \"app\"\nstop_grace_seconds = 1\n\
             probe = {{ port = 8080, path = \"/version\", version = {{ pattern = \"version={{version}};\" }} }}\n\n\
             [listeners.web]\npublish = {web}\ncontainer = \"app\"\nport = 8080\n\n{}\n",
            git.url("app"),
            options.source,
            engine.socket().display(),
            options.policy,
            options.budgets,
            options.component,
            options.tables,
        );
        std::fs::write(home.join("replank.toml"), config).expect("the configuration is written");
        let stderr = scratch.path().join("stderr");
        let env = options.env;
        let rig =
            Self { serving: None, watch: None, engine, git, repo, home, stderr, web, upgrade, env, _scratch: scratch };
        let made = rig.cli(&["token", "create", "admin", "--role", "admin"]);
        assert!(made.status.success(), "{}", said(&made));
        rig
    }

    /// Version 0.1.0 deployed, watched and served.
    pub fn start(options: Options) -> Self {
        let mut rig = Self::prepare(options);
        let deployed = rig.cli(&["deploy", "0.1.0"]);
        assert!(deployed.status.success(), "{}", said(&deployed));
        rig.serve();
        rig.watch = Some(Watch::start(rig.web));
        rig
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(REPLANK);
        command
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", "/nonexistent")
            .env("TZ", "UTC")
            .env("REPLANK_HOME", &self.home)
            .env("REPLANK_URL", self.url(""))
            .envs(self.env.iter().cloned());
        command
    }

    pub fn cli(&self, arguments: &[&str]) -> Output {
        process::output(&mut self.command(arguments), COMMAND_LIMIT).expect("the command ends in time")
    }

    /// Starts the controller and waits until it answers.
    pub fn serve(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(&self.stderr).expect("a log");
        let mut command = self.command(&["serve"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.serving = Some(Serving(command.spawn().expect("replank starts")));
        let end = Instant::now() + Duration::from_secs(20);
        while get(self.upgrade, "/livez", "").is_none_or(|(code, _)| code != 200) {
            assert!(Instant::now() < end, "serve does not answer: {}", self.told());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the controller wrote so far.
    pub fn told(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    pub fn pid(&self) -> u32 {
        self.serving.as_ref().expect("a controller").0.id()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.upgrade)
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.home.join("tokens/admin")).expect("a token").trim().to_owned()
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        get(self.upgrade, path, &self.token()).unwrap_or_else(|| panic!("no answer to {path}: {}", self.told()))
    }

    pub fn status(&self) -> Value {
        let (code, body) = self.get("/api/upgrade/status");
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).expect("a row")
    }

    pub fn history(&self) -> Vec<Value> {
        let (_, body) = self.get("/api/upgrade/history?limit=500");
        let all: Value = serde_json::from_str(&body).expect("events");
        all["events"].as_array().cloned().unwrap_or_default()
    }

    pub fn log(&self, row: &Value) -> (u16, String) {
        self.get(&format!("/api/upgrade/jobs/{}/build-log/app", row["job_id"].as_str().expect("a job")))
    }

    /// Commits on top of what is there and tags it.
    pub fn publish(&mut self, version: &str, files: &[Entry]) -> String {
        let commit = self.repo.commit(files, version).expect("a commit");
        self.repo.tag(&format!("v{version}"), &commit, version).expect("a tag");
        commit
    }

    /// Waits until a look at the remote shows a release: one is shared for some seconds.
    pub fn until_offered(&self, version: &str) {
        let end = Instant::now() + Duration::from_secs(30);
        while !self.get("/api/upgrade/candidates").1.contains(&format!("v{version}")) {
            assert!(Instant::now() < end, "{version} is never offered: {}", self.told());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A start that is accepted; the row.
    pub fn begin(&self, version: &str) -> Value {
        // A look at the remote is shared for two seconds, and the tag may be younger.
        let end = Instant::now() + Duration::from_secs(4);
        let mut out = self.cli(&["start", version, "--yes", "--no-wait", "--json"]);
        while out.status.code() == Some(3) && Instant::now() < end && said(&out).contains("offers no release") {
            std::thread::sleep(Duration::from_millis(200));
            out = self.cli(&["start", version, "--yes", "--no-wait", "--json"]);
        }
        assert!(out.status.success(), "{}", said(&out));
        serde_json::from_slice(&out.stdout).expect("a row")
    }

    /// The row of a job at its end.
    pub fn end(&self, limit: Duration) -> Value {
        let end = Instant::now() + limit;
        loop {
            let row = self.status();
            let state = row["state"].as_str().unwrap_or_default();
            if ["succeeded", "failed_pre", "failed_rollout", "rolled_back"].contains(&state) {
                return row;
            }
            assert!(Instant::now() < end, "the job does not end: {row}\n{}", self.told());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn run(&self, version: &str) -> Value {
        self.begin(version);
        self.end(JOB_LIMIT)
    }

    /// The release fails before anything is touched, with one error that holds all of `parts`.
    pub fn fails(&self, version: &str, parts: &[&str]) -> Value {
        let row = self.run(version);
        self.failed(&row, version, parts);
        row
    }

    /// A row is that of a job that failed before the swap, told once, clearly, everywhere.
    pub fn failed(&self, row: &Value, version: &str, parts: &[&str]) {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        let detail = format!("{}; {}", text("failure"), text("advice"));
        eprintln!("{version}: {detail}\n  in short: {}", text("phase_detail"));
        assert_eq!(row["state"], "failed_pre", "{version}: {detail}\n{}", self.told());
        for part in parts {
            assert!(detail.contains(part), "{version}: {part:?} is not in {detail:?}");
        }
        assert!(!detail.contains('\n') && detail.len() < 2_500, "{version}: {detail}");
        assert!(!text("advice").is_empty(), "{version}: nothing says what to do next: {detail}");
        // Clients of the contract see the short form alone: the advice is in it, or at least its beginning.
        let start: String = text("advice").chars().take(60).collect();
        assert!(text("phase_detail").contains(&start) && text("phase_detail").chars().count() <= 240, "{row}");
        let job = &row["job_id"];
        let failed: Vec<_> =
            self.history().into_iter().filter(|e| e["job_id"] == *job && e["event"] == "failed").collect();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(row["running_version"], "0.1.0", "{row}");
        // A person who looks sees the same.
        let out = self.cli(&["status"]);
        assert!(out.status.success(), "{}", said(&out));
        let shown = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(shown.contains("failed_pre") && shown.contains(&text("advice")), "{shown}");
    }

    /// Whatever went before: nothing was lost, the history is whole, and the next good release goes through.
    pub fn goes_on(&mut self, version: &str) {
        if let Some(watch) = self.watch.take() {
            watch.flawless();
        }
        self.publish(version, &release(version));
        let row = self.run(version);
        assert_eq!(row["state"], "succeeded", "{row}\n{}", self.told());
        assert_eq!(row["running_version"], version);
        let (code, body) = get(self.web, "/version", "").expect("the application answers");
        assert_eq!((code, body.trim()), (200, format!("version={version};").as_str()));
        let verified = self.cli(&["history", "--verify"]);
        assert!(verified.status.success(), "{}", said(&verified));
    }
}

pub fn said(out: &Output) -> String {
    format!("{}: {}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// A command failed with this code and one line that holds all of `parts`.
#[track_caller]
pub fn refused(out: &Output, code: i32, parts: &[&str]) -> String {
    let all = said(out);
    eprintln!("{}", all.trim());
    assert_eq!(out.status.code(), Some(code), "{all}");
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    let lines: Vec<&str> = told.lines().filter(|line| line.starts_with("replank: ")).collect();
    assert_eq!(lines.len(), 1, "not one line: {all}");
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is not in {:?}", lines[0]);
    }
    lines[0].to_owned()
}

/// One request over a connection of its own, without any of the product's code. `None` where nothing answers.
pub fn get(port: u16, path: &str, token: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    let bearer = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{bearer}\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let at = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..at]).into_owned();
    let code = head.split_whitespace().nth(1)?.parse().ok()?;
    Some((code, String::from_utf8_lossy(&answer[at + 4..]).into_owned()))
}

/// Asks the application all the time; every answer must be version 0.1.0's.
pub struct Watch {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    thread: JoinHandle<Vec<String>>,
}

impl Watch {
    fn start(port: u16) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), asked.clone());
        let thread = std::thread::spawn(move || {
            let mut wrong = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                match get(port, "/version", "") {
                    Some((200, body)) if body.trim() == "version=0.1.0;" => {}
                    other => wrong.push(format!("{other:?}")),
                }
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(50));
            }
            wrong
        });
        Self { stop, asked, thread }
    }

    pub fn flawless(self) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.asked.load(Ordering::Relaxed) < 20 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.stop.store(true, Ordering::Relaxed);
        let wrong = self.thread.join().expect("the watch ends");
        let asked = self.asked.load(Ordering::Relaxed);
        assert!(asked >= 20, "only {asked} requests were made");
        assert!(wrong.is_empty(), "{} of {asked} requests failed: {:?}", wrong.len(), wrong.first());
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// In memory, of so many bytes.
    pub fn in_memory(at: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(at).expect("a mount point");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "replank-test"]).arg(at);
        process::run(&mut mount).expect("the mount");
        Self(at.to_owned())
    }

    /// Another directory, seen through FUSE.
    pub fn through_fuse(real: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(real).expect("a directory");
        std::fs::create_dir_all(at).expect("a mount point");
        process::run(Command::new("bindfs").arg(real).arg(at)).expect("the mount");
        Self(at.to_owned())
    }

    /// Fills it up to the last block, and answers the file that does so.
    pub fn fill(&self) -> PathBuf {
        let path = self.0.join("ballast");
        let mut file = std::fs::File::create(&path).expect("a file");
        let mut block = vec![7u8; 1024 * 1024];
        while !block.is_empty() {
            match file.write(&block) {
                Ok(0) | Err(_) => block.truncate(block.len() / 2),
                Ok(_) => {}
            }
        }
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: an engine that is being removed may still hold it.
        process::run(Command::new("umount").arg("--lazy").arg(&self.0)).ok();
    }
}
