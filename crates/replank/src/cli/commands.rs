//! What each command does: mostly one request, and its answer shown.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use replank_core::ports::{Clock as _, Role};
use replank_core::words::{Millis, Version};
use serde_json::{Value, json};

use super::client::Client;
use super::failure::{Code, Failure};
use super::show::{self, Style};
use super::watch::{Face, at_rest, watch};
use super::{
    Because, Command, DowngradeArgs, DriftArgs, Global, Logs, QuarantineArgs, RoleArg, RollbackArgs, Start,
    TokenCommand, Wait, tokens,
};
use crate::assemble::Between;
use crate::config::env::Environment;
use crate::config::{FILE, Settings};
use crate::http::row::Row;
use crate::plain::{self, Lines};
use crate::{verify, wiring};

pub(super) type Done = Result<ExitCode, Failure>;

/// Where the state is kept when the environment alone configures the service, and names no `REPLANK_HOME`.
const HOME: &str = "/var/lib/replank";
/// Longest token file: a token has 68 bytes.
const TOKEN_FILE_MAX: u64 = 4_096;

pub(super) struct Run<'a> {
    pub(super) global: Global,
    pub(super) env: &'a Environment,
    pub(super) style: Style,
    pub(super) between: Between,
}

pub async fn run(command: Command, global: Global, env: &Environment, between: Between) -> Done {
    let colours = std::io::stdout().is_terminal() && env.get("NO_COLOR").is_none();
    let run = Run { global, env, style: Style { colours, zone: TimeZone::system() }, between };
    match command {
        Command::Init(args) => run.init(args),
        Command::Doctor(args) => run.doctor(args).await,
        Command::Ledger(command) => run.ledger(command).await,
        Command::Serve(args) => run.serve(args).await,
        Command::Deploy(args) => run.deploy(args).await,
        Command::Status(args) => run.status(args).await,
        Command::Candidates => run.candidates().await,
        Command::Check => run.row("/api/upgrade/check", json!({})).await,
        Command::Plan(args) => run.plan(args).await,
        Command::Start(args) => run.start(args).await,
        Command::Rollback(args) => run.rollback(args).await,
        Command::Cancel(args) => run.because("/api/upgrade/cancel", args, "failed_pre").await,
        Command::Confirm(args) => run.row("/api/upgrade/confirm", reason(args.reason)).await,
        Command::Reset(args) => run.row("/api/upgrade/reset", json!({ "reason": args.reason })).await,
        Command::Quarantine(args) => run.quarantine(args).await,
        Command::Downgrade(args) => run.downgrade(args).await,
        Command::AcceptMovedTag(args) => {
            let body = json!({ "version": args.release, "commit_sha": args.commit, "reason": args.reason });
            run.row("/api/upgrade/moved-tag", body).await
        }
        Command::Drift(args) => run.drift(args).await,
        Command::Logs(args) => run.logs(args).await,
        Command::History(args) if args.verify => run.verify().await,
        Command::History(args) if args.refusals => run.refusals(args.limit).await,
        Command::History(args) => run.history(args.limit).await,
        Command::EscapeHatch => run.escape_hatch().await,
        Command::Token(command) => run.token(command).await,
        Command::Proxy(super::proxy::Proxy { command: Some(command), .. }) => run.proxy(command).await,
        Command::Proxy(_) | Command::ExecServer | Command::Openapi | Command::Completions { .. } => {
            Err(Failure::usage("this command runs without a runtime"))
        }
    }
}

impl Run<'_> {
    /// The configuration that somebody named.
    pub(super) fn named_config(&self) -> Option<PathBuf> {
        self.global.config.clone().or_else(|| self.env.get("REPLANK_CONFIG").map(PathBuf::from))
    }

    pub(super) fn home(&self) -> Option<PathBuf> {
        self.env.get("REPLANK_HOME").map(PathBuf::from)
    }

    pub(super) fn config_path(&self) -> PathBuf {
        self.named_config().or_else(|| self.home().map(|home| home.join(FILE))).unwrap_or_else(|| PathBuf::from(FILE))
    }

    /// No file was named, none is there, and the environment is meant to be all there is (contract §6).
    fn is_of_environment(&self) -> bool {
        self.named_config().is_none() && !self.config_path().exists() && Settings::is_in_environment(self.env)
    }

    pub(super) fn settings(&self) -> Result<Settings, Failure> {
        let settings = if self.is_of_environment() {
            Settings::of_environment(&self.home().unwrap_or_else(|| PathBuf::from(HOME)), self.env)
        } else {
            Settings::load(&self.config_path(), self.env)
        };
        settings.map_err(|problems| Failure::usage(problems.to_string()))
    }

    /// Where the service is and how to sign in. The configuration only fills in what neither flags nor environment say.
    pub(super) fn client(&self) -> Result<Client, Failure> {
        let has_settings = self.config_path().is_file() || self.is_of_environment();
        let settings = has_settings.then(|| self.settings().ok()).flatten();
        let url =
            self.global.url.clone().or_else(|| self.env.get("REPLANK_URL").map(str::to_owned)).unwrap_or_else(|| {
                let at = settings.as_ref().map_or(crate::config::LISTEN, Settings::reached_at);
                let host = if at.ip().is_unspecified() { "127.0.0.1".to_owned() } else { at.ip().to_string() };
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                format!("http://{host}:{}", at.port())
            });
        let uri: Option<http::Uri> = url.parse().ok();
        if !uri.is_some_and(|u| {
            matches!(u.scheme_str(), Some("http" | "https")) && u.host().is_some() && !url.contains('@')
        }) {
            return Err(Failure::usage(format!(
                "{url:?} is not an address of the service; write it as http://127.0.0.1:8086"
            )));
        }
        let named = self.global.token_file.clone().or_else(|| self.env.get("REPLANK_TOKEN_FILE").map(PathBuf::from));
        let file = named.or_else(|| settings.as_ref().and_then(|s| only_file(&s.tokens_dir())));
        let token = file.map(|file| read_token(&file)).transpose()?;
        Client::new(&url, token)
    }

    fn face(&self) -> Face {
        if self.global.json {
            Face::Json
        } else if std::io::stderr().is_terminal() {
            Face::Bars
        } else {
            Face::Lines
        }
    }

    pub(super) fn print(
        &self,
        value: &Value,
        human: impl FnOnce(&mut dyn std::io::Write, &Style) -> std::io::Result<()>,
    ) -> Done {
        let mut out = std::io::stdout().lock();
        if self.global.json {
            writeln!(out, "{value}")?
        } else {
            human(&mut out, &self.style)?
        }
        out.flush()?;
        Ok(ExitCode::SUCCESS)
    }

    fn print_row(&self, row: &Row) -> Done {
        let value = serde_json::to_value(row).unwrap_or_default();
        self.print(&value, |out, style| show::status(out, row, style))
    }

    async fn row(&self, path: &str, body: Value) -> Done {
        let row: Row = self.client()?.post(path, &body).await?;
        self.print_row(&row)
    }

    async fn serve(&self, args: super::Serve) -> Done {
        let settings = self.settings()?;
        let listen = args.listen.unwrap_or(settings.server.listen);
        let dev =
            crate::http::dev_bypass(args.dev, listen, settings.revision.as_deref(), settings.container_app.as_deref());
        let dev_bypass = dev.map_err(Failure::usage)?;
        if settings.auth_dev_bypass && !dev_bypass {
            tracing::warn!("AUTH_DEV_BYPASS does nothing without --dev");
        }
        Ok(wiring::serve(wiring::ServeArgs { settings, listen, dev_bypass, between: self.between }).await?)
    }

    async fn deploy(&self, args: super::Deploy) -> Done {
        let version =
            args.release.map(|v| v.parse::<Version>()).transpose().map_err(|e| Failure::usage(e.to_string()))?;
        let settings = self.settings()?;
        let actor = tokens::local_actor(self.env);
        Ok(wiring::deploy(wiring::DeployArgs { settings, version, json: self.global.json, actor }).await?)
    }

    async fn status(&self, args: super::Status) -> Done {
        let client = self.client()?;
        let row: Row = client.get("/api/upgrade/status").await?;
        if !args.watch || at_rest(&row.state) {
            return self.print_row(&row);
        }
        let expect = if row.state == "rolling_back" { "rolled_back" } else { "succeeded" };
        self.watch(&client, &row, expect, args.patience.timeout).await
    }

    async fn watch(&self, client: &Client, row: &Row, expect: &str, timeout: u64) -> Done {
        let last = watch(client, &row.job_id, self.face(), &self.style, Duration::from_secs(timeout)).await?;
        let well = last.state == expect;
        if !self.global.json {
            let mut out = std::io::stdout().lock();
            let told = match (last.failure.is_empty(), last.advice.is_empty()) {
                (true, _) => last.phase_detail.clone(),
                (false, true) => last.failure.clone(),
                (false, false) => format!("{}; {}", last.failure, last.advice),
            };
            let detail = plain::line(&told, false);
            let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
            let runs = if last.running_version.is_empty() {
                String::new()
            } else {
                format!(", {} runs", last.running_version)
            };
            writeln!(out, "{}{runs}{detail}", self.style.state(&last.state))?;
        }
        Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(Code::Failed as u8) })
    }

    async fn candidates(&self) -> Done {
        let found: Value = self.client()?.get("/api/upgrade/candidates").await?;
        self.print(&found, |out, style| show::candidates(out, &found, style))
    }

    async fn start(&self, args: Start) -> Done {
        let client = self.client()?;
        let version = match (&args.release, &args.commit) {
            (Some(version), _) => {
                Some(version.parse::<Version>().map_err(|e| Failure::usage(e.to_string()))?.to_string())
            }
            (None, Some(_)) => None,
            (None, None) => {
                let found: Value = client.get("/api/upgrade/candidates").await?;
                if let Some(error) = found["error"].as_str() {
                    return Err(Failure::new(
                        Code::Unreachable,
                        format!("the remote cannot be read: {}", plain::line(error, false)),
                    ));
                }
                let newest = found["candidates"][0]["name"].as_str().ok_or_else(|| {
                    Failure::new(
                        Code::Refused,
                        "nothing newer is offered; see `replank candidates`, or look again with `replank check`",
                    )
                })?;
                Some(newest.parse::<Version>().map_err(|e| Failure::new(Code::Failed, e.to_string()))?.to_string())
            }
        };
        let what = version.clone().or_else(|| args.commit.clone()).unwrap_or_default();
        if !args.yes {
            self.tell_before(&client, &args, version.as_deref()).await?;
            ask(&format!("Upgrade to {what}? Users may notice an interruption."))?;
        }
        let mut body = json!({ "confirm_downtime": true });
        let fields = [
            ("target_version", version),
            ("target_kind", args.commit.as_ref().map(|_| "commit".to_owned())),
            ("target_sha", args.commit),
            ("reason", args.reason),
            ("idempotency_key", args.idempotency_key),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                body[name] = value.into();
            }
        }
        for (name, on) in [
            ("override_quarantine", args.override_quarantine),
            ("build_only", args.build_only),
            ("accept_one_way", args.accept_one_way),
        ] {
            if on {
                body[name] = true.into();
            }
        }
        let row: Row = client.post("/api/upgrade/start", &body).await?;
        self.queued(&client, row, &args.wait, "succeeded").await
    }

    async fn rollback(&self, args: RollbackArgs) -> Done {
        let client = self.client()?;
        let mut body = reason(args.because.reason);
        if args.data_restored {
            body["data_restored"] = true.into();
        }
        let row: Row = client.post("/api/upgrade/rollback", &body).await?;
        self.queued(&client, row, &args.because.wait, "rolled_back").await
    }

    async fn quarantine(&self, args: QuarantineArgs) -> Done {
        const PATH: &str = "/api/upgrade/quarantine";
        if let Some(which) = args.lift {
            return self.row(PATH, json!({ "lift": which, "reason": args.reason })).await;
        }
        let found: Value = self.client()?.get(PATH).await?;
        self.print(&found, |out, style| show::quarantine(out, &found, style))
    }

    async fn downgrade(&self, args: DowngradeArgs) -> Done {
        let client = self.client()?;
        let version = args.release.parse::<Version>().map_err(|e| Failure::usage(e.to_string()))?;
        if !args.yes {
            ask(&format!(
                "Downgrade to {version}? It has to work with the data as they are now, and users may notice."
            ))?;
        }
        let body = json!({
            "target_version": version.to_string(),
            "confirm_downtime": true,
            "reason": args.reason,
            "idempotency_key": args.idempotency_key,
            "override_quarantine": args.override_quarantine,
            "data_restored": args.data_restored,
        });
        let row: Row = client.post("/api/upgrade/downgrade", &body).await?;
        self.queued(&client, row, &args.wait, "succeeded").await
    }

    /// What is accepted is what was just shown: the service refuses it where something else differs by then.
    async fn drift(&self, args: DriftArgs) -> Done {
        let client = self.client()?;
        let row: Row = client.get("/api/upgrade/status").await?;
        let row = match args.accept {
            true if row.drift.is_empty() => {
                return Err(Failure::new(Code::Refused, "what runs is what was recorded: there is nothing to accept"));
            }
            true => client.post("/api/upgrade/drift", &json!({ "accept": row.drift, "reason": args.reason })).await?,
            false => row,
        };
        let value = json!({ "drift": row.drift, "since": row.drift_since, "accepted": row.drift_accepted });
        self.print(&value, |out, style| show::drift(out, &row, style))
    }

    async fn because(&self, path: &str, args: Because, expect: &str) -> Done {
        let client = self.client()?;
        let row: Row = client.post(path, &reason(args.reason)).await?;
        self.queued(&client, row, &args.wait, expect).await
    }

    async fn queued(&self, client: &Client, row: Row, wait: &Wait, expect: &str) -> Done {
        if wait.no_wait || at_rest(&row.state) {
            return self.print_row(&row);
        }
        self.watch(client, &row, expect, wait.patience.timeout).await
    }

    async fn logs(&self, args: Logs) -> Done {
        let client = self.client()?;
        let job = match args.job {
            Some(job) => job,
            None => client.get::<Row>("/api/upgrade/status").await?.job_id,
        };
        if job.is_empty() {
            return Err(Failure::new(Code::Refused, "there was no job yet; start one with `replank start`"));
        }
        let fine = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !fine(&job) || !fine(&args.component) {
            return Err(Failure::usage("jobs and components are named with A-Z, a-z, 0-9, '.', '_' and '-'"));
        }
        let (mut lines, mut offset) = (Lines::default(), 0_u64);
        let follow = u8::from(args.follow);
        let mut wait = Duration::from_millis(250);
        loop {
            let path = format!("/api/upgrade/jobs/{job}/build-log/{}?follow={follow}&from={offset}", args.component);
            let lost = match client.stream(&path).await {
                Err(failure) if offset == 0 => return Err(failure),
                Err(failure) => failure,
                Ok(mut chunks) => loop {
                    match chunks.next().await {
                        Ok(Some(bytes)) => {
                            offset += bytes.len() as u64;
                            wait = Duration::from_millis(250);
                            lines.push(&bytes, |line| self.log_line(&args.component, line));
                        }
                        Ok(None) => {
                            lines.finish(|line| self.log_line(&args.component, line));
                            return Ok(ExitCode::SUCCESS);
                        }
                        Err(failure) => break failure,
                    }
                },
            };
            if lost.code != Code::Unreachable || !args.follow {
                return Err(lost);
            }
            // The service may be in the middle of its own replacement: what is stored is still there when it is back.
            tracing::warn!("{lost}; going on from byte {offset} when it is back");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(3));
        }
    }

    fn log_line(&self, component: &str, line: &str) {
        let text = if self.global.json {
            json!({ "component": component, "line": line }).to_string()
        } else {
            plain::line(line, self.style.colours)
        };
        // A closed pipe ends a log quietly, as with every other tool.
        if writeln!(std::io::stdout(), "{text}").is_err() {
            #[expect(clippy::disallowed_methods, reason = "the reader is gone, and nothing else is open")]
            std::process::exit(0);
        }
    }

    async fn history(&self, limit: usize) -> Done {
        let found: Value = self.client()?.get(&format!("/api/upgrade/history?limit={limit}")).await?;
        let events = found["events"].as_array().cloned().unwrap_or_default();
        self.print(&found, |out, style| show::history(out, &events, style))
    }

    async fn refusals(&self, limit: usize) -> Done {
        let store = wiring::tokens(&self.settings()?).await?;
        let failed = |e: replank_core::ports::LedgerError| Failure::from(anyhow::Error::new(e));
        let refusals = store.refusals(limit).await.map_err(failed)?;
        // A refusal keeps the token's id, and people know its name.
        let names: BTreeMap<String, String> =
            tokens::list(store.as_ref()).await?.into_iter().map(|t| (t.id, t.name)).collect();
        let shown: Vec<Value> = refusals
            .iter()
            .map(|r| json!({ "ts": r.at.rfc3339(), "actor": r.actor, "name": names.get(&r.actor).cloned().unwrap_or_default(),
                "from": r.from, "action": r.action, "why": r.why }))
            .collect();
        self.print(&json!({ "refusals": shown }), |out, style| show::refusals(out, &shown, style))
    }

    async fn verify(&self) -> Done {
        let ledger = wiring::ledger(&self.settings()?).await?;
        let verified = verify::history(ledger.as_ref()).await.map_err(|e| match e {
            verify::NotVerified::Ledger(error) => Failure::from(anyhow::Error::new(error)),
            broken @ verify::NotVerified::Broken(_) => Failure::new(Code::Failed, broken.to_string()),
        })?;
        let Some(lines) = verified else {
            return self
                .print(&json!({ "consistent": true, "lines": 0 }), |out, _| writeln!(out, "there is no history yet"));
        };
        self.print(&json!({ "consistent": true, "lines": lines }), |out, style| {
            let count = show::count(usize::try_from(lines).unwrap_or(usize::MAX), "event");
            writeln!(out, "{}: {count}", style.good("consistent with anchor"))
        })
    }

    async fn escape_hatch(&self) -> Done {
        let answer: Result<Value, Failure> = match self.client() {
            Ok(client) => client.get("/api/upgrade/escape-hatch").await,
            Err(failure) => Err(failure),
        };
        let found = match answer {
            Ok(found) => found,
            // This is wanted most when the service is gone: then the ledger answers.
            Err(failure) if failure.code == Code::Unreachable => {
                writeln!(std::io::stderr(), "the service does not answer; these come from the ledger")?;
                let hatch = wiring::escape_hatch(&self.settings()?).await?;
                let none = || Failure::new(Code::Refused, "there is no snapshot to go back to");
                serde_json::to_value(hatch.ok_or_else(none)?).unwrap_or_default()
            }
            Err(failure) => return Err(failure),
        };
        self.print(&found, |out, _| {
            for command in found["commands"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                writeln!(out, "{command}")?;
            }
            Ok(())
        })
    }

    async fn changes(&self, settings: &Settings, why: super::Reason) -> Result<tokens::Changes, Failure> {
        let (tokens, ledger) = wiring::token_changes(settings).await?;
        let (actor, reason) = (tokens::local_actor(self.env), why.reason.unwrap_or_default());
        Ok(tokens::Changes { tokens, ledger, clock: Arc::new(crate::system::SystemClock), actor, reason })
    }

    async fn token(&self, command: TokenCommand) -> Done {
        let settings = self.settings()?;
        match command {
            TokenCommand::Create { name, role, expires, out, why } => {
                let lives =
                    tokens::lifetime(&expires).map_err(|e| Failure::usage(format!("--expires {expires}: {e}")))?;
                let role = match role {
                    RoleArg::Reader => Role::Reader,
                    RoleArg::Admin => Role::Admin,
                };
                let out = match out {
                    Some(out) => out,
                    None => tokens::default_out(&settings.tokens_dir(), &name)?,
                };
                let token = self.changes(&settings, why).await?.create(&name, role, lives, &out).await?;
                let shown = json!({ "id": token.id, "name": token.name, "role": token.role, "file": out,
                    "expires_at": token.expires_at.map(Millis::rfc3339).unwrap_or_default() });
                self.print(&shown, |to, style| {
                    let until = style.millis(token.expires_at);
                    writeln!(to, "the token {name} is in {}, and nowhere else; it expires {until}", out.display())
                })
            }
            TokenCommand::List => {
                let all = tokens::list(wiring::tokens(&settings).await?.as_ref()).await?;
                let now = crate::system::SystemClock.now();
                let stamp = |at: Option<Millis>| at.map(Millis::rfc3339).unwrap_or_default();
                let shown: Vec<Value> = all
                    .iter()
                    .map(|t| json!({ "id": t.id, "name": t.name, "role": t.role, "created_at": t.created_at.rfc3339(),
                        "expires_at": stamp(t.expires_at), "revoked_at": stamp(t.revoked_at), "last_used_at": stamp(t.last_used_at) }))
                    .collect();
                self.print(&json!({ "tokens": shown }), |out, style| {
                    let mut rows = vec![["NAME", "ROLE", "LAST USED", "EXPIRES", ""].map(str::to_owned).to_vec()];
                    rows.extend(all.iter().map(|t| {
                        let role = if t.role == Role::Admin { "admin" } else { "reader" };
                        let dead = if t.revoked_at.is_some() {
                            "revoked"
                        } else if t.expires_at.is_some_and(|e| e <= now) {
                            "expired"
                        } else {
                            ""
                        };
                        vec![
                            t.name.clone(),
                            role.to_owned(),
                            style.millis(t.last_used_at),
                            style.millis(t.expires_at),
                            dead.to_owned(),
                        ]
                    }));
                    show::table(out, &rows)
                })
            }
            TokenCommand::Revoke { name, why } => {
                self.changes(&settings, why).await?.revoke(&name).await?;
                self.print(&json!({ "revoked": name }), |out, _| {
                    writeln!(out, "the token {name} opens nothing any more")
                })
            }
        }
    }
}

fn reason(reason: Option<String>) -> Value {
    reason.map_or_else(|| json!({}), |reason| json!({ "reason": reason }))
}

fn ask(question: &str) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage("users may notice an interruption: confirm with --yes"));
    }
    write!(std::io::stderr(), "{question} [y/N] ")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::new(Code::Refused, "nothing was started"))
    }
}

fn only_file(dir: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    let first = files.next()?;
    files.next().is_none().then_some(first)
}

fn read_token(file: &Path) -> Result<String, Failure> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(file).and_then(|f| f.take(TOKEN_FILE_MAX).read_to_string(&mut text)).map_err(|e| {
        Failure::usage(format!("the token file {} cannot be read: {e}; name another with --token-file", file.display()))
    })?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::usage(format!(
            "the file {} holds no token; make one with `replank token create`",
            file.display()
        )));
    }
    Ok(token.to_owned())
}
