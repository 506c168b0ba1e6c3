//! The sample application installed with Replank: its configuration, its first deployment, and a client of its API.

use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process;

/// The application's name.
pub const APPLICATION: &str = "sample";

/// What an installation is made of.
#[derive(Debug, Clone)]
pub struct InstallOptions {
    /// The engine's socket.
    pub socket: PathBuf,
    /// The remote, as containers and this machine reach it.
    pub remote: String,
    /// The static `replank` binary.
    pub replank: PathBuf,
    /// Directory to make and keep the state in.
    pub home: PathBuf,
    /// `single` or `blue-green`.
    pub mode: &'static str,
    pub confirm_window_seconds: u64,
    /// `host:port` of a registry to push to.
    pub registry: Option<String>,
    /// More lines for `[policy]`, such as `on_rollout_failure = "rollback"`.
    pub policy: Vec<String>,
}

/// Host ports of the installation.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    pub frontend: u16,
    pub api: u16,
    pub upgrade: u16,
}

#[derive(Debug, Clone)]
pub struct Installed {
    pub options: InstallOptions,
    pub ports: Ports,
    pub token_file: PathBuf,
    token: String,
    client: reqwest::Client,
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// An HTTP client with this machine's TLS set-up and a bound on every request.
pub fn client(limit: Duration) -> Result<reqwest::Client> {
    // Somebody else in this process may have installed the same provider.
    let _already = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder().no_proxy().timeout(limit).build()?)
}

impl Installed {
    /// Writes the configuration and an admin token. Nothing runs yet.
    pub fn prepare(options: InstallOptions) -> Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&options.home)?;
        let ports = Ports { frontend: free_port()?, api: free_port()?, upgrade: free_port()? };
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(options.home.join("replank.toml"))
            .and_then(|mut file| std::io::Write::write_all(&mut file, configuration(&options, ports).as_bytes()))?;
        let token_file = options.home.join("tokens").join("admin");
        let mut this =
            Self { options, ports, token_file, token: String::new(), client: client(Duration::from_secs(20))? };
        let file = this.token_file.display().to_string();
        process::run(this.command(&["token", "create", "admin", "--role", "admin", "--out", &file]).env_remove("CI"))?;
        this.token = std::fs::read_to_string(&this.token_file)?.trim().to_owned();
        Ok(this)
    }

    /// The `replank` command for this installation.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.options.replank);
        command
            .args(arguments)
            .env("REPLANK_HOME", &self.options.home)
            .env("REPLANK_URL", self.url(""))
            .env("REPLANK_TOKEN_FILE", &self.token_file);
        command
    }

    /// The first deployment, with the binary that an operator would use.
    pub fn deploy(&self, version: &str) -> Result<String> {
        let config = self.options.home.join("replank.toml");
        process::text(&mut self.command(&["deploy", "--config", &config.display().to_string(), version]))
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.ports.upgrade)
    }

    /// One request with the admin token; the status and the JSON body, or `null` where it is none.
    pub async fn call(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Result<(u16, Value)> {
        let mut request = self.client.request(method, self.url(path)).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    async fn expect(&self, method: reqwest::Method, path: &str, body: Option<Value>, want: u16) -> Result<Value> {
        let (status, answer) = self.call(method.clone(), path, body).await?;
        if status != want {
            bail!("{method} {path} answered {status} instead of {want}: {answer}");
        }
        Ok(answer)
    }

    pub async fn status(&self) -> Result<Value> {
        self.expect(reqwest::Method::GET, "/api/upgrade/status", None, 200).await
    }

    pub async fn start(&self, version: &str, override_quarantine: bool) -> Result<Value> {
        let body = json!({
            "target_version": version, "confirm_downtime": true, "override_quarantine": override_quarantine,
            "reason": "as an operator would",
        });
        self.expect(reqwest::Method::POST, "/api/upgrade/start", Some(body), 202).await
    }

    pub async fn rollback(&self, reason: &str) -> Result<Value> {
        self.expect(reqwest::Method::POST, "/api/upgrade/rollback", Some(json!({ "reason": reason })), 202).await
    }

    pub async fn history(&self) -> Result<Vec<Value>> {
        let answer = self.expect(reqwest::Method::GET, "/api/upgrade/history?limit=500", None, 200).await?;
        Ok(answer["events"].as_array().cloned().unwrap_or_default())
    }

    /// Follows the state until `wanted` says so; gives the row, and every state on the way to `states`. A server that is being
    /// replaced is waited for.
    pub async fn until(
        &self,
        limit: Duration,
        states: &mut Vec<String>,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let end = Instant::now() + limit;
        let mut last = Value::Null;
        let mut error = None;
        while Instant::now() < end {
            match self.status().await {
                Ok(row) => {
                    let state = row["state"].as_str().unwrap_or_default().to_owned();
                    if states.last() != Some(&state) {
                        states.push(state);
                    }
                    if wanted(&row) {
                        return Ok(row);
                    }
                    last = row;
                }
                Err(e) => error = Some(e),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(error.unwrap_or_else(|| anyhow::anyhow!("the last row was {last}")))
            .with_context(|| format!("not reached within {} s", limit.as_secs()))
    }

    /// Follows the state to one of `names`.
    pub async fn until_state(&self, limit: Duration, states: &mut Vec<String>, names: &[&str]) -> Result<Value> {
        self.until(limit, states, |row| names.iter().any(|name| row["state"] == *name))
            .await
            .with_context(|| format!("waiting for state {}", names.join(" or ")))
    }
}

fn configuration(options: &InstallOptions, ports: Ports) -> String {
    let component =
        |name: &str| format!("[components.{name}]\ndockerfile = \"{name}/Dockerfile\"\ncontext = \".\"\n\n");
    let probe = "probe = { port = 8080, path = \"/healthz\", version = { header = \"X-App-Version\" } }";
    let registry = options
        .registry
        .as_ref()
        .map_or(String::new(), |host| format!("[registry]\nhost = \"{host}\"\npush = true\ninsecure = true\n\n"));
    let policy: String = options.policy.iter().map(|line| format!("{line}\n")).collect();
    let listener = |name: &str, publish: u16, container: &str, port: u16| {
        format!("[listeners.{name}]\npublish = {publish}\ncontainer = \"{container}\"\nport = {port}\n\n")
    };
    [
        format!("application = \"{APPLICATION}\"\n\n"),
        format!(
            "[source]\nremote = \"{}\"\nbranch = \"main\"\nallow_loopback = true\nallow_private = true\n\n",
            options.remote
        ),
        "[server]\nlisten = \"0.0.0.0:8086\"\n\n".to_owned(),
        format!("[docker]\nsocket = \"{}\"\n\n", options.socket.display()),
        registry,
        format!(
            "[policy]\nmode = \"{}\"\nconfirm_window_seconds = {}\n{policy}\n",
            options.mode, options.confirm_window_seconds
        ),
        ["api", "controller", "frontend", "worker"].into_iter().map(component).collect(),
        format!("[containers.api]\ncomponent = \"api\"\n{probe}\n\n"),
        format!("[containers.frontend]\ncomponent = \"frontend\"\n{probe}\n\n"),
        "[containers.worker]\ncomponent = \"worker\"\n\n".to_owned(),
        "[containers.controller]\ncomponent = \"controller\"\ncontroller = true\ncommand = [\"serve\"]\n\
         probe = { port = 8086, path = \"/livez\" }\n\n"
            .to_owned(),
        listener("frontend", ports.frontend, "frontend", 8080),
        listener("api", ports.api, "api", 8080),
        listener("upgrade", ports.upgrade, "controller", 8086),
    ]
    .concat()
}

/// The state directory of an installation inside `root`.
pub fn home_in(root: &Path) -> PathBuf {
    root.join("home")
}
