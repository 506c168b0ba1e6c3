//! `cargo xtask api`: schemathesis sends what the API's document allows, and what it forbids, to a real server, and compares the
//! answers with the document.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replank_testbed::installed::free_port;
use replank_testbed::remains::Scratch;
use replank_testbed::{GitServer, GitServerOptions, Sample, SampleOptions, cleanup, images, process, sample};

use crate::build::{Build, Profile};
use crate::tied::tied;

/// Long enough for each operation's boundaries and some hundreds of random requests.
const SECONDS: u64 = 40;
/// What the run may take beyond its time: the requests under way, and what it says in the end.
const GRACE: Duration = Duration::from_secs(20);
/// Packages come from the network, or from pip's cache.
const INSTALL_LIMIT: Duration = Duration::from_secs(240);
/// A debug build on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds of attack.
    #[arg(long, default_value_t = SECONDS)]
    seconds: u64,
    /// Where its random numbers begin: a failure is repeated by the seed that it names.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Attack this program instead of building replank.
    #[arg(long)]
    replank: Option<PathBuf>,
}

/// `cargo xtask api`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    cleanup::on_signals()?;
    let replank = Build::replank_or(options.replank.as_deref(), Profile::Dev)?;
    check(&replank, options.seconds, options.seed)?;
    Ok(ExitCode::SUCCESS)
}

/// The step of `cargo xtask test`.
pub(crate) fn step(replank: &Path) -> Result<()> {
    eprintln!("checking the API against its document");
    check(replank, SECONDS, 1)
}

fn check(replank: &Path, seconds: u64, seed: u64) -> Result<()> {
    let schemathesis = schemathesis()?;
    let server = Server::start(replank)?;
    let begun = Instant::now();
    let mut command = Command::new(&schemathesis);
    command
        .arg("--config-file")
        .arg(files().join("schemathesis.toml"))
        .args(["--no-color", "run"])
        .arg(format!("{}/openapi.json", server.url))
        .args(["--mode", "all", "--continue-on-failure", "--report-dir"])
        .arg(server.scratch.path().join("report"))
        .args(["--max-time", &seconds.to_string(), "--seed", &seed.to_string()])
        .env("REPLANK_API_TOKEN", &server.token)
        // Its own notes of earlier failures would make two runs differ.
        .current_dir(server.scratch.path());
    let output = process::output(&mut tied(&command), Duration::from_secs(seconds) + GRACE)?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let log = server.end()?;
    if !output.status.success() {
        bail!(
            "the API and its document differ; schemathesis says:\n{told}\nrepeat it with `cargo xtask api --seed {seed}`"
        );
    }
    ensure!(!log.contains("panicked at"), "the server panicked under the API's check:\n{log}");
    let summary =
        told.lines().rev().find(|line| line.contains("generated")).unwrap_or("it does not say how many cases");
    eprintln!("api: {}, {:.0} s", summary.trim(), begun.elapsed().as_secs_f64());
    Ok(())
}

fn files() -> PathBuf {
    images::workspace().join("xtask/api")
}

/// The program, in an environment of its own below the build's directory, made anew where the list of packages has changed.
fn schemathesis() -> Result<PathBuf> {
    let list = files().join("requirements.txt");
    let wanted = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    let directory = images::target().join("schemathesis");
    let (program, made) = (directory.join("bin/schemathesis"), directory.join("made-of.txt"));
    if program.exists() && fs::read_to_string(&made).is_ok_and(|have| have == wanted) {
        return Ok(program);
    }
    eprintln!("api: making a Python environment for schemathesis in {}", directory.display());
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    let python = process::find("python3", &["/usr/bin/python3"]).context(
        "there is no python3, which the API's check needs: install python3 and python3-venv (Debian's names)",
    )?;
    process::run(Command::new(python).args(["-m", "venv"]).arg(&directory))
        .context("no Python environment can be made: install python3-venv (Debian's name)")?;
    let mut pip = Command::new(directory.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]);
    pip.args(["--timeout", "15", "--retries", "2", "-r"]).arg(&list);
    let output = process::output(&mut tied(&pip), INSTALL_LIMIT)?;
    ensure!(
        output.status.success(),
        "the packages of {} cannot be installed; the API's check needs PyPI, or a mirror that pip is configured for, once:\n{}",
        list.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    fs::write(made, wanted)?;
    Ok(program)
}

/// A service with a real remote and an exec server that is away: jobs begin, wait, and can be cancelled and reset, and nothing
/// is ever built. It goes with its owner.
struct Server {
    child: Child,
    url: String,
    token: String,
    log: PathBuf,
    _git: GitServer,
    scratch: Scratch,
}

impl Server {
    fn start(replank: &Path) -> Result<Self> {
        let scratch = Scratch::create()?;
        Sample::create(scratch.path(), SampleOptions::small())?;
        let bind = Ipv4Addr::LOCALHOST.into();
        let git = GitServer::start(scratch.path(), &GitServerOptions { bind, sign_in: None })?;
        let home = scratch.path().join("home");
        fs::create_dir_all(&home)?;
        let (port, nobody) = (free_port()?, free_port()?);
        let config = home.join("replank.toml");
        fs::write(&config, configuration(&git.url(sample::NAME), port, nobody))?;
        let token = home.join("tokens/api");
        process::run(
            Command::new(replank)
                .args(["token", "create", "api", "--role", "admin", "--config"])
                .arg(&config)
                .env("EXEC_TOKEN", "0123456789abcdef"),
        )
        .context("no token can be made for the API's check")?;
        let log = scratch.path().join("serve.log");
        let mut serve = Command::new(replank);
        serve.args(["serve", "--config"]).arg(&config).env("EXEC_TOKEN", "0123456789abcdef");
        let child = tied(&serve).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?).spawn()?;
        let token = fs::read_to_string(token)?.trim().to_owned();
        let server = Self { child, url: format!("http://127.0.0.1:{port}"), token, log, _git: git, scratch };
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let told = fs::read_to_string(&server.log).unwrap_or_default();
            ensure!(begun.elapsed() < START_LIMIT, "the server for the API's check does not start:\n{told}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    /// Ends it and answers its log.
    fn end(mut self) -> Result<String> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the server ended under the API's check ({status}):\n{}", fs::read_to_string(&self.log)?);
        }
        Ok(fs::read_to_string(&self.log)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it is gone already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn configuration(remote: &str, port: u16, nobody: u16) -> String {
    format!(
        r#"application = "shop"
platform = "none"

[source]
remote = "{remote}"
allow_loopback = true

[server]
listen = "127.0.0.1:{port}"

[build]
builder = "az-exec"

[registry]
acr = "nobody"

[exec]
url = "http://127.0.0.1:{nobody}"

[components.api]
dockerfile = "api/Dockerfile"
"#
    )
}
