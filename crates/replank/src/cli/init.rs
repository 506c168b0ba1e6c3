//! `replank init` as it is typed, and what it tells.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::commands::{Done, Run};
use super::failure::{Code, Failure};
use crate::config::FILE;
use crate::init::{self, Outcome, Wishes, Written};
use crate::plain;

pub const HELP: &str = "\
Each service of the compose file is one of these:
  built here (`build`)   becomes a component and a container: web, internal, worker or cron
  a ready image          is left alone: databases and the like stay with compose, on a
                         network that the application joins
  a one-off job          is not run: another service waits for it to complete, or it has a
                         profile

Every key is mapped, left out with a comment in the result, or refused by name at its line.
When something is refused nothing is written, and the exit code is 2. Variables are taken
from .env and from their defaults. Values that look like secrets go into files of their
own, secrets/NAME beside replank.toml. A Dockerfile for Replank's own image is put into
controller/ of the repository, for you to commit. Nothing of the repository is run.

Examples:
  replank init --stdout                     look first: print the configuration, write nothing
  replank init . --output /srv/shop         write /srv/shop/replank.toml
  replank init . --json                     what each service was taken for, for scripts
  replank init . --file deploy/compose.yaml --project shop --output /srv/shop";

#[derive(Debug, Args)]
pub struct Init {
    /// The repository's directory
    #[arg(default_value = ".", value_name = "REPOSITORY")]
    pub repository: PathBuf,
    /// Directory for replank.toml, the application's home [default: that of --config, REPLANK_HOME, or the current one outside of the repository]
    #[arg(long, short, visible_alias = "home", value_name = "DIRECTORY")]
    pub output: Option<PathBuf>,
    /// Compose file, by its path in the repository [default: the one that compose takes]
    #[arg(long, short, value_name = "FILE")]
    pub file: Option<String>,
    /// Name of the application [default: the project's]
    #[arg(long, value_name = "NAME")]
    pub application: Option<String>,
    /// Name of the compose project, as in the names of its volumes [default: as compose takes it]
    #[arg(long, value_name = "NAME")]
    pub project: Option<String>,
    /// Image that holds replank, for the controller's Dockerfile
    #[arg(long, value_name = "IMAGE", default_value = concat!("replank:", env!("CARGO_PKG_VERSION")))]
    pub replank_image: String,
    /// Replace files that exist
    #[arg(long)]
    pub force: bool,
    /// Print the configuration and write nothing
    #[arg(long, visible_alias = "dry-run", conflicts_with = "force")]
    pub stdout: bool,
}

impl Run<'_> {
    pub(super) fn init(&self, args: Init) -> Done {
        let target = self.init_target(&args)?;
        let wishes = Wishes {
            repository: args.repository,
            compose: args.file,
            application: args.application,
            project: args.project,
            image: args.replank_image,
            target: target.clone(),
        };
        let outcome = init::read(&wishes).map_err(|e| Failure::usage(plain::line(&e, false)))?;
        if !outcome.refused.is_empty() {
            if self.global.json {
                writeln!(std::io::stdout(), "{}", outcome.json())?;
            }
            return Err(Failure::usage(refusals(&outcome)));
        }
        let written = match &target {
            Some(target) => init::save(&outcome, target, args.force).map_err(|e| {
                Failure::new(
                    if matches!(e, init::NotSaved::Exists(_)) { Code::Refused } else { Code::Failed },
                    e.to_string(),
                )
            })?,
            None => Vec::new(),
        };
        let mut shown = outcome.json();
        shown["files"] = json!(written);
        match target {
            Some(target) => self.print(&shown, |out, _| told(out, &outcome, &target, &written)),
            None => {
                if !self.global.json {
                    for path in outcome.other_files() {
                        writeln!(std::io::stderr(), "not written: {path}")?;
                    }
                }
                self.print(&shown, |out, _| write!(out, "{}", outcome.toml))
            }
        }
    }

    /// The file to write; `None` where there is only something to look at.
    fn init_target(&self, args: &Init) -> Result<Option<PathBuf>, Failure> {
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).map_err(|e| Failure::usage(format!("{} cannot be used: {e}", path.display())))
        };
        if args.stdout {
            return Ok(None);
        }
        if let Some(directory) = &args.output {
            return absolute(directory.join(FILE)).map(Some);
        }
        if let Some(file) = self.named_config().or_else(|| self.home().map(|home| home.join(FILE))) {
            return absolute(file).map(Some);
        }
        let here = absolute(PathBuf::from("."))?;
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        if !real(&here).starts_with(real(&args.repository)) {
            return Ok(Some(here.join(FILE)));
        }
        if self.global.json {
            return Ok(None);
        }
        Err(Failure::usage(
            "the home of an application keeps its ledger and its tokens, so it is no place inside of the checkout; \
             name a directory with --output /srv/NAME, or look first with --stdout",
        ))
    }
}

fn refusals(outcome: &Outcome) -> String {
    let mut text: Vec<String> = outcome.refused.iter().map(|r| plain::line(&r.to_string(), false)).collect();
    let count = text.len();
    text.push(format!("nothing was written: {} cannot be reproduced as it stands", super::show::count(count, "thing")));
    text.join("\n")
}

fn told(out: &mut dyn std::io::Write, outcome: &Outcome, target: &Path, written: &[Written]) -> std::io::Result<()> {
    for (service, what) in outcome.summary() {
        writeln!(out, "  {:<16} {}", plain::line(&service, false), plain::line(&what, false))?;
    }
    writeln!(out)?;
    for file in written {
        writeln!(out, "{} {}", if file.written { "wrote" } else { "kept " }, file.path.display())?;
    }
    writeln!(out, "\nNext:")?;
    let dockerfile = outcome.controller_dockerfile();
    let mut steps = vec![
        format!("read {}: comments say what was left out", target.display()),
        format!("commit {dockerfile}, with an image of Replank in its FROM, and tag a release such as v1.0.0"),
    ];
    if !outcome.has_remote() {
        steps.push("write the git remote's https address into [source]".to_owned());
    }
    let left = outcome.left_alone();
    if !left.is_empty() {
        steps.push(format!(
            "keep with compose what is not built here: docker compose up -d --no-deps {}",
            left.join(" ")
        ));
    }
    let taken = outcome.taken_over();
    if !taken.is_empty() {
        steps.push(format!(
            "end what compose runs of it, as both want the same ports: docker compose stop {}",
            taken.join(" ")
        ));
    }
    steps.push(format!("replank deploy --config {}", target.display()));
    for (index, step) in steps.iter().enumerate() {
        writeln!(out, "  {}. {}", index + 1, plain::line(step, false))?;
    }
    Ok(())
}
