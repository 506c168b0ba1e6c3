//! The reference application: its repository, its sidecar with the exec server, and Replank configured by the environment alone.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use replank_testbed::installed::free_port;
use replank_testbed::remains::Scratch;
use replank_testbed::repo::Entry;
use replank_testbed::{AzDouble, Engine, GitServer, GitServerOptions, Registry, Repo, process};
use serde_json::Value;

pub const REPLANK: &str = env!("CARGO_BIN_EXE_replank");
pub const EXEC_TOKEN: &str = "a-token-of-the-exec-channel";
pub const ACR: &str = "testacr";
pub const COMPONENTS: [&str; 3] = ["api", "frontend", "terminal"];
/// A job on a slow, shared machine.
const JOB_LIMIT: Duration = Duration::from_secs(120);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

#[derive(Default)]
pub struct Options {
    /// User and password of the remote, which go into its URL.
    pub sign_in: Option<(String, String)>,
    /// More of the controller's environment, and of the exec server's.
    pub env: Vec<(&'static str, String)>,
    pub exec_env: Vec<(&'static str, String)>,
    /// The registry refuses deletions.
    pub keeps_images: bool,
    /// A proxy of the test's own stands before the exec server: its port.
    pub upstream: Option<u16>,
}

/// A process that goes with its owner, and everything that it wrote.
pub struct Process {
    pub child: Child,
    log: PathBuf,
}

impl Process {
    fn start(command: &mut Command, log: PathBuf) -> Self {
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Self { child, log }
    }

    pub fn told(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn kill(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Rig {
    pub serving: Option<Process>,
    pub exec: Option<Process>,
    pub az: AzDouble,
    pub git: GitServer,
    pub repo: Repo,
    pub registry: Registry,
    pub engine: Engine,
    pub home: PathBuf,
    pub clones: PathBuf,
    pub exec_port: u16,
    port: u16,
    options: Options,
    scratch: Scratch,
}

/// The files of a release.
pub fn release(version: &str) -> Vec<Entry> {
    let file = |path: &str, text: String| Entry::file(path, text);
    vec![
        file("api/Dockerfile", "FROM testbed/busybox\nARG APP_VERSION\nLABEL version=$APP_VERSION\nCOPY api/files /files\n".to_owned()),
        file("api/files/version", format!("{version}\n")),
        file(
            "web/Dockerfile",
            "FROM testbed/busybox\nARG APP_VERSION\nARG GIT_COMMIT\nLABEL version=$APP_VERSION commit=$GIT_COMMIT\nCOPY web /web\n".to_owned(),
        ),
        file("web/index.html", format!("<p>{version}</p>\n")),
        file(
            "terminal/Dockerfile.runtime",
            "ARG TERMINAL_BASE_IMAGE\nFROM $TERMINAL_BASE_IMAGE\nARG APP_VERSION\nLABEL version=$APP_VERSION\nCOPY motd /etc/motd\n".to_owned(),
        ),
        file("terminal/motd", format!("welcome to {version}\n")),
    ]
}

impl Rig {
    /// Version 1.0.0 in the repository; the exec server and the controller run.
    pub fn start(options: Options) -> Self {
        let mut rig = Self::prepare(options);
        rig.start_exec();
        rig.serve();
        rig
    }

    /// Nothing runs yet but git server and registry.
    pub fn prepare(options: Options) -> Self {
        let scratch = Scratch::create().unwrap();
        let engine = Engine::from_env().unwrap();
        let loopback = Ipv4Addr::LOCALHOST.into();
        let registry =
            if options.keeps_images { Registry::start_without_deletion(loopback) } else { Registry::start(loopback) };
        let registry = registry.unwrap();
        let base = format!("{}/elb-terminal-base:latest", registry.name());
        engine.docker(&["tag", "testbed/busybox", &base]).unwrap();
        engine.docker(&["push", "--quiet", &base]).unwrap();
        engine.docker(&["rmi", &base]).unwrap();
        let mut repo = Repo::create(scratch.path(), "app").unwrap();
        let commit = repo.commit(&release("1.0.0"), "The first release").unwrap();
        repo.tag("v1.0.0", &commit, "The first release").unwrap();
        let git = GitServer::start(
            scratch.path(),
            &GitServerOptions { sign_in: options.sign_in.clone(), ..GitServerOptions::default() },
        )
        .unwrap();
        let az = AzDouble::create(&scratch.path().join("az")).unwrap();
        let rig = Self {
            serving: None,
            exec: None,
            az,
            git,
            repo,
            registry,
            engine,
            home: scratch.path().join("home"),
            clones: scratch.path().join("clones"),
            exec_port: free_port().unwrap(),
            port: free_port().unwrap(),
            options,
            scratch,
        };
        let made = rig.cli(&["token", "create", "admin", "--role", "admin"]);
        assert!(made.status.success(), "{}", said(&made));
        rig
    }

    /// The remote as it is configured: with the credential where there is one.
    pub fn remote(&self) -> String {
        let url = self.git.url("app");
        match &self.options.sign_in {
            Some((user, password)) => url.replace("http://", &format!("http://{user}:{password}@")),
            None => url,
        }
    }

    /// What both containers of the reference application are given.
    fn shared(&self) -> Vec<(String, String)> {
        [
            ("EXEC_TOKEN", EXEC_TOKEN.to_owned()),
            ("EXEC_CLONE_ROOT", self.clones.display().to_string()),
            ("UPGRADE_GIT_REMOTE", self.remote()),
            ("PLATFORM_ACR_NAME", ACR.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    pub fn start_exec(&mut self) {
        let mut command = Command::new(REPLANK);
        command.arg("exec-server").current_dir("/").env_clear().envs(self.shared());
        command.envs(self.az.environment(&self.engine, &self.registry.name(), PATH));
        command
            .env("HOME", "/nonexistent")
            .env("TMPDIR", self.scratch.path())
            .env("EXEC_PORT", self.exec_port.to_string())
            .env("EXEC_ALLOW_LOOPBACK_REMOTE", "true")
            .envs(self.options.exec_env.iter().cloned());
        self.exec = Some(Process::start(&mut command, self.scratch.path().join("exec.log")));
        self.until("the exec server answers", |rig| {
            get(rig.exec_port, "/healthz", "").is_some_and(|(code, _)| code == 200)
        });
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(REPLANK);
        let upstream = self.options.upstream.unwrap_or(self.exec_port);
        command
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .envs(self.shared())
            .env("PATH", PATH)
            .env("TZ", "UTC")
            .env("REPLANK_HOME", &self.home)
            .env("REPLANK_URL", format!("http://127.0.0.1:{}", self.port))
            .env("PLATFORM_ACR_LOGIN_SERVER", self.registry.name())
            .env("TERMINAL_EXEC_UPSTREAM", format!("http://127.0.0.1:{upstream}"))
            .env("UPGRADE_GIT_ALLOW_LOOPBACK", "true")
            .envs(self.options.env.iter().cloned());
        command
    }

    pub fn cli(&self, arguments: &[&str]) -> Output {
        process::output(&mut self.command(arguments), COMMAND_LIMIT).unwrap()
    }

    pub fn serve(&mut self) {
        let mut command = self.command(&["serve", "--listen", &format!("127.0.0.1:{}", self.port)]);
        self.serving = Some(Process::start(&mut command, self.scratch.path().join("serve.log")));
        self.until("the controller answers", |rig| get(rig.port, "/livez", "").is_some_and(|(code, _)| code == 200));
    }

    /// What controller and exec server wrote so far.
    pub fn told(&self) -> String {
        let of = |process: &Option<Process>| process.as_ref().map(Process::told).unwrap_or_default();
        format!("--- controller\n{}--- exec server\n{}", of(&self.serving), of(&self.exec))
    }

    #[track_caller]
    pub fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let end = Instant::now() + JOB_LIMIT;
        while !is(self) {
            assert!(Instant::now() < end, "never: {what}\n{}", self.told());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let token = std::fs::read_to_string(self.home.join("tokens/admin")).unwrap();
        get(self.port, path, token.trim()).unwrap_or_else(|| panic!("no answer to {path}: {}", self.told()))
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.get("/api/upgrade/status").1).unwrap()
    }

    pub fn events(&self, name: &str) -> Vec<Value> {
        let all: Value = serde_json::from_str(&self.get("/api/upgrade/history?limit=500").1).unwrap();
        all["events"].as_array().unwrap().iter().filter(|e| e["event"] == name).cloned().collect()
    }

    pub fn log(&self, row: &Value, component: &str) -> String {
        self.get(&format!("/api/upgrade/jobs/{}/build-log/{component}", row["job_id"].as_str().unwrap())).1
    }

    pub fn publish(&mut self, version: &str, files: &[Entry]) -> String {
        let commit = self.repo.commit(files, version).unwrap();
        self.repo.tag(&format!("v{version}"), &commit, version).unwrap();
        commit
    }

    /// A start that is accepted.
    #[track_caller]
    pub fn begin(&self, arguments: &[&str]) -> Value {
        let out = self.try_start(arguments);
        assert!(out.status.success(), "{}\n{}", said(&out), self.told());
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// A start that is refused before there is a job.
    #[track_caller]
    pub fn refuses(&self, arguments: &[&str], part: &str) {
        let out = self.try_start(arguments);
        assert!(out.status.code() == Some(3) && said(&out).contains(part), "{}\n{}", said(&out), self.told());
    }

    fn try_start(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["start"];
        all.extend(arguments);
        all.extend(["--yes", "--no-wait", "--json"]);
        // A look at the remote is shared for two seconds, and the tag may be younger.
        let end = Instant::now() + Duration::from_secs(4);
        let mut out = self.cli(&all);
        while out.status.code() == Some(3) && Instant::now() < end && said(&out).contains("offers no release") {
            std::thread::sleep(Duration::from_millis(200));
            out = self.cli(&all);
        }
        out
    }

    /// The row once the job rests.
    #[track_caller]
    pub fn end(&self) -> Value {
        self.until("the job ends", |rig| {
            ["succeeded", "failed_pre"].iter().any(|state| rig.status()["state"] == *state)
        });
        self.status()
    }

    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Value {
        self.begin(arguments);
        self.end()
    }

    #[track_caller]
    pub fn succeeds(&self, arguments: &[&str]) -> Value {
        let row = self.run(arguments);
        assert_eq!(row["state"], "succeeded", "{row}\n{}", self.told());
        row
    }

    /// The job fails before anything was touched, with one error that holds all of `parts` and says what to do.
    #[track_caller]
    pub fn fails(&self, arguments: &[&str], parts: &[&str]) -> Value {
        self.begin(arguments);
        self.failed(parts)
    }

    #[track_caller]
    pub fn failed(&self, parts: &[&str]) -> Value {
        let row = self.end();
        let detail = format!("{}; {}", row["failure"].as_str().unwrap_or(""), row["advice"].as_str().unwrap_or(""));
        eprintln!("{detail}");
        assert_eq!(row["state"], "failed_pre", "{detail}\n{}", self.told());
        for part in parts {
            assert!(detail.contains(part), "{part:?} is not in {detail:?}\n{}", self.told());
        }
        assert!(!row["advice"].as_str().unwrap_or("").is_empty(), "nothing says what to do next: {detail}");
        row
    }

    /// Tags of a repository and the digest under each, as the registry itself says.
    pub fn tags(&self, repository: &str) -> Vec<(String, String)> {
        let port = self.registry.address().port();
        let (_, body) = get(port, &format!("/v2/{repository}/tags/list"), "").unwrap();
        let list: Value = serde_json::from_str(&body).unwrap();
        let mut tags: Vec<String> =
            list["tags"].as_array().into_iter().flatten().map(|tag| tag.as_str().unwrap().to_owned()).collect();
        tags.sort();
        let digest = |tag: &String| {
            let image = format!("{}/{repository}:{tag}", self.registry.name());
            let mut inspect = self.engine.docker_command();
            inspect.args(["manifest", "inspect", "--insecure", "--verbose", &image]);
            match process::text(&mut inspect) {
                Ok(text) => {
                    let manifest: Value = serde_json::from_str(&text).unwrap();
                    Some((tag.clone(), manifest["Descriptor"]["digest"].as_str().unwrap().to_owned()))
                }
                // It went between listing and looking.
                Err(error) if format!("{error:#}").contains("no such manifest") => None,
                Err(error) => panic!("{error:#}"),
            }
        };
        tags.iter().filter_map(digest).collect()
    }
}

pub fn said(out: &Output) -> String {
    format!("{}: {}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
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
