//! The command line: what can be typed, and how it becomes typed arguments.

mod client;
mod commands;
mod doctor;
pub(crate) mod failure;
mod init;
mod ledger;
mod plan;
mod proxy;
mod show;
pub mod tokens;
mod watch;

pub(crate) use show::count;

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::assemble::{self, Between};
use crate::config::env::Environment;
use failure::{Code, Failure};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the job ended failed, or something broke here
  2    wrong usage or configuration
  3    refused: wrong state, nothing newer, quarantined, drifted, asked too soon
  4    the service cannot be reached, or cannot answer now
  5    not signed in, or not allowed
  6    timed out while watching; the job goes on
  130  Ctrl-C while watching; the job goes on

Environment:
  REPLANK_URL         where the service answers (--url)
  REPLANK_TOKEN_FILE  file with a token (--token-file)
  REPLANK_CONFIG      path of replank.toml (--config)
  REPLANK_LOG         log filter, such as debug or replank=trace
  REPLANK_LOG_FORMAT  human or json (--log-format)
  NO_COLOR            no colours";

const EXAMPLES: &str = "\
A first time, on the machine that runs the application:
  replank init . --output /srv/shop      write replank.toml from the repository's compose file
  cd /srv/shop
  replank deploy                         start the application from replank.toml
  replank token create me --role admin   make a token, into tokens/me
  replank status
  replank start                          upgrade to the newest release, and watch";

/// The upgrade button for self-hosted container applications.
#[derive(Debug, Parser)]
#[command(name = "replank", version, propagate_version = true, after_help = EXAMPLES, after_long_help = const_format(), max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

fn const_format() -> String {
    format!("{EXAMPLES}\n\n{EXIT_CODES}")
}

#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Path of replank.toml [default: ./replank.toml, or in REPLANK_HOME]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub config: Option<PathBuf>,
    /// Where the service answers [default: from the configuration, or http://127.0.0.1:8086]
    #[arg(long, global = true, value_name = "URL", help_heading = "Everywhere")]
    pub url: Option<String>,
    /// File with the token to sign in with [default: the only file in tokens/ beside the configuration]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub token_file: Option<PathBuf>,
    /// Write stable JSON instead of text for people
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
    /// How log lines on standard error look [default: human]
    #[arg(long, global = true, value_enum, help_heading = "Everywhere")]
    pub log_format: Option<LogFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write replank.toml for a repository, from its compose file and Dockerfiles.
    #[command(after_help = init::HELP)]
    Init(init::Init),
    /// Run the service: the engine, and the API that this command line speaks to.
    Serve(Serve),
    /// Deploy an application for the first time, from its configuration.
    #[command(after_help = "Example: replank deploy --config /srv/shop/replank.toml 1.4.0")]
    Deploy(Deploy),
    /// Show what runs, what is newest and what is going on.
    Status(Status),
    /// List the releases that can be started, and those that are refused with the reason.
    Candidates,
    /// Look at the git remote now.
    Check,
    /// Show what an upgrade would do, and what stands against it; change nothing.
    #[command(after_help = plan::HELP)]
    Plan(plan::PlanArgs),
    /// Upgrade: build a release from its pinned commit, swap to it, prove it.
    #[command(
        after_help = "Examples:\n  replank start                      the newest release\n  replank start 1.4.0 --yes          without a question, for scripts\n  replank start --commit 4f2a…       a commit of the tracking branch\n  replank start 1.4.0 --build-only   build and push, touch nothing that runs\n  replank start --no-wait --json     queue it and print the row"
    )]
    Start(Start),
    /// Go back to what ran before; needs neither git nor a build.
    Rollback(RollbackArgs),
    /// Build and swap to a release that is older than what runs; `rollback` is the faster way to what ran before.
    #[command(
        after_help = "An older release changes no data: its migrations are not run, and it has to read what the newer one wrote.\n\nExample: replank downgrade 1.3.0 --reason \"1.4 loses orders, and so does the fix\""
    )]
    Downgrade(DowngradeArgs),
    /// End a job that has not touched anything yet.
    Cancel(Because),
    /// End the confirm window early: keep the new version.
    Confirm(Reason),
    /// Give up a stuck job.
    Reset(ResetArgs),
    /// List the commits that are not started again without an override, or let one be started again.
    #[command(
        after_help = "Examples:\n  replank quarantine\n  replank quarantine --lift 1.4.0 --reason \"it was the registry, not the release\""
    )]
    Quarantine(QuarantineArgs),
    /// Let a release be started although its tag was moved: at exactly the commit that you name.
    #[command(
        after_help = "A moved tag is a release that somebody changed after it was published. See where it is now with `replank candidates`,\nlook at what that commit holds, and name it.\n\nExample: replank accept-moved-tag 1.4.0 --commit 4f2a… --reason \"the tag was on the wrong branch\""
    )]
    AcceptMovedTag(AcceptMovedTagArgs),
    /// Show how what runs differs from what was recorded, or accept it as it is so that an upgrade can start.
    #[command(
        after_help = "Examples:\n  replank drift\n  replank drift --accept --reason \"the worker is stopped until the queue is mended\""
    )]
    Drift(DriftArgs),
    /// Print a component's build log.
    Logs(Logs),
    /// Show what happened, check that nobody edited it, or show what was refused.
    History(History),
    /// Print the commands that restore the old version with Replank gone.
    EscapeHatch,
    /// Look at everything that an upgrade needs, from here: remote, registry, engine, ledger, disk, clock.
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Doctor),
    /// Make, list and revoke tokens; needs the ledger, not the service.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Copy the ledger while it is in use, or put a copy back; needs no service.
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Own the application's public ports and send their traffic where the controller says; or replace the one that does.
    Proxy(proxy::Proxy),
    /// Run git, az and a few other programs for whoever holds a token, with policed arguments: for builds in another container.
    #[command(after_help = crate::exec_server::ENVIRONMENT)]
    ExecServer,
    /// Print the description of the service's API (OpenAPI 3.1), as it serves it at /openapi.json.
    Openapi,
    /// Print a completion script for a shell.
    #[command(after_help = "Example: replank completions bash > /etc/bash_completion.d/replank")]
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
pub struct Serve {
    /// Address and port to listen on [default: from the configuration, or 127.0.0.1:8086]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Development: requests from this machine need no token. Loopback only, never inside a deployed revision
    #[arg(long)]
    pub dev: bool,
}

#[derive(Debug, Args)]
pub struct Deploy {
    /// Release to deploy, such as 1.4.0 [default: the newest]
    #[arg(value_name = "VERSION")]
    pub release: Option<String>,
}

#[derive(Debug, Args)]
pub struct Status {
    /// Watch the running job to its end
    #[arg(long, short)]
    pub watch: bool,
    #[command(flatten)]
    pub patience: Patience,
}

#[derive(Debug, Args)]
pub struct Patience {
    /// Stop watching after this many seconds; the job goes on
    #[arg(long, value_name = "SECONDS", default_value_t = 7_200)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub struct Start {
    /// Release to upgrade to, such as 1.4.0 [default: the newest]
    #[arg(value_name = "VERSION", conflicts_with = "commit")]
    pub release: Option<String>,
    /// Full id of a commit of the tracking branch
    #[arg(long, value_name = "SHA")]
    pub commit: Option<String>,
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: Option<String>,
    /// Makes a repeated start harmless: the same key and target give the same job
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// Confirm that users may notice, without a question
    #[arg(long, short)]
    pub yes: bool,
    /// Start a commit that failed before, knowingly; needs --reason
    #[arg(long)]
    pub override_quarantine: bool,
    /// Start a release after which the version before it cannot use the data, knowingly
    #[arg(long)]
    pub accept_one_way: bool,
    /// Build and push the images, and touch nothing that runs
    #[arg(long)]
    pub build_only: bool,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// Return as soon as the job is queued
    #[arg(long)]
    pub no_wait: bool,
    /// Watch the job to its end (the default)
    #[arg(long, conflicts_with = "no_wait")]
    pub wait: bool,
    #[command(flatten)]
    pub patience: Patience,
}

#[derive(Debug, Args)]
pub struct Because {
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: Option<String>,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The data are those of the version to restore: goes back although a one-way data step has run
    #[arg(long)]
    pub data_restored: bool,
    #[command(flatten)]
    pub because: Because,
}

#[derive(Debug, Args)]
pub struct DowngradeArgs {
    /// Release to go down to, such as 1.3.0
    #[arg(value_name = "VERSION")]
    pub release: String,
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: String,
    /// Makes a repeated request harmless: the same key and target give the same job
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// Confirm that users may notice, without a question
    #[arg(long, short)]
    pub yes: bool,
    /// Start a commit that failed before, knowingly
    #[arg(long)]
    pub override_quarantine: bool,
    /// The data are those of that version: goes down although what ran since has changed them for good
    #[arg(long)]
    pub data_restored: bool,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct Reason {
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: Option<String>,
}

#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: String,
}

#[derive(Debug, Args)]
pub struct QuarantineArgs {
    /// Version, or commit of 40 hex digits, that may be started again
    #[arg(long, value_name = "WHICH", requires = "reason")]
    pub lift: Option<String>,
    /// Why, for the history; at most 280 characters
    #[arg(long, requires = "lift")]
    pub reason: Option<String>,
}

#[derive(Debug, Args)]
pub struct AcceptMovedTagArgs {
    /// Release whose tag was moved, such as 1.4.0
    #[arg(value_name = "VERSION")]
    pub release: String,
    /// Full id of the commit that it is at now
    #[arg(long, value_name = "SHA")]
    pub commit: String,
    /// Why, for the history; at most 280 characters
    #[arg(long)]
    pub reason: String,
}

#[derive(Debug, Args)]
pub struct DriftArgs {
    /// Let upgrades start all the same: what differs now, and nothing that differs later
    #[arg(long, requires = "reason")]
    pub accept: bool,
    /// Why, for the history; at most 280 characters
    #[arg(long, requires = "accept")]
    pub reason: Option<String>,
}

#[derive(Debug, Args)]
pub struct Logs {
    pub component: String,
    /// Job [default: the current one]
    #[arg(long)]
    pub job: Option<String>,
    /// Go on until the build ends
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, Args)]
pub struct History {
    /// How many of the newest
    #[arg(long, default_value_t = 50)]
    pub limit: usize,
    /// Check the whole chain against its anchor, straight in the ledger
    #[arg(long)]
    pub verify: bool,
    /// Show requests that were refused instead: who tried what, from where, and why not; straight in the ledger
    #[arg(long, conflicts_with = "verify")]
    pub refusals: bool,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token. The secret goes into a new file that only its owner can read, and nowhere else.
    #[command(after_help = "Example: replank token create alice --role admin --expires 90d --out alice.token")]
    Create {
        name: String,
        #[arg(long, value_enum, default_value_t)]
        role: RoleArg,
        /// 90d, 12h, 30m or never
        #[arg(long, default_value = "90d", value_name = "TIME")]
        expires: String,
        /// New file for the secret [default: tokens/NAME beside the configuration]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        why: Reason,
    },
    /// List tokens: names, roles and times, never secrets.
    List,
    /// Make a token useless, at once.
    Revoke {
        name: String,
        #[command(flatten)]
        why: Reason,
    },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    /// May look
    #[default]
    Reader,
    /// May start, roll back, cancel, confirm and reset
    Admin,
}

/// Parses, runs, reports. Everything that fails ends here as one line and an exit code.
pub fn main(args: impl Iterator<Item = OsString>, env: &Environment) -> ExitCode {
    main_with(args, env, assemble::as_they_are)
}

/// The same for a program that puts something of its own between the service and its ports, as one of the tests does: the one
/// binary has no way to do so.
pub fn main_with(args: impl Iterator<Item = OsString>, env: &Environment, between: Between) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come here too, with their own streams and codes.
            let code = u8::try_from(error.exit_code()).unwrap_or(Code::Usage as u8);
            return if error.print().is_ok() { ExitCode::from(code) } else { ExitCode::from(Code::Failed as u8) };
        }
    };
    // A service's log is its voice; a command speaks for itself, and only trouble may break in.
    let usual = if matches!(cli.command, Command::Serve(_) | Command::Proxy(proxy::Proxy { command: None, .. })) {
        "info"
    } else {
        "warn"
    };
    let named = env.get("REPLANK_LOG_FORMAT");
    let unknown = named.filter(|name| LogFormat::from_str(name, true).is_err());
    let format = cli.global.log_format.or_else(|| LogFormat::from_str(named?, true).ok());
    log(format.unwrap_or(LogFormat::Human), env, usual);
    if let Some(unknown) = unknown {
        tracing::warn!("REPLANK_LOG_FORMAT is {unknown:?}, which is no log format; write human or json");
    }
    // Refuses a second provider only, and then the first one serves.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed before");
    }
    let json = cli.global.json;
    let outcome = match cli.command {
        // It makes its own, smaller runtime.
        Command::Proxy(proxy::Proxy { command: None, run: Some(args) }) => {
            crate::proxy::run(args).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        Command::ExecServer => crate::exec_server::run(env),
        Command::Openapi => std::io::stdout()
            .write_all(&crate::http::document_text())
            .map(|()| ExitCode::SUCCESS)
            .map_err(Failure::from),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "replank", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        command => tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::from(anyhow::Error::new(e).context("the program's threads could not be started")))
            .and_then(|runtime| runtime.block_on(commands::run(command, cli.global, env, between))),
    };
    outcome.unwrap_or_else(|failure| {
        let line = if json {
            serde_json::json!({ "error": failure.message, "code": failure.code as u8 }).to_string()
        } else {
            format!("replank: {failure}")
        };
        if writeln!(std::io::stderr(), "{line}").is_err() {
            return ExitCode::from(Code::Failed as u8);
        }
        failure.exit()
    })
}

fn log(format: LogFormat, env: &Environment, usual: &str) {
    let filter = env.get("REPLANK_LOG").unwrap_or(usual);
    let filter =
        tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    let colours = std::io::stderr().is_terminal() && env.get("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let set = match format {
        LogFormat::Human => builder.with_ansi(colours).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // Only a second initialisation fails, and then the first one stands.
    drop(set);
}
