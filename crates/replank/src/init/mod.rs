//! `replank init`: a repository's Dockerfiles and compose file as a configuration of Replank.
//!
//! Each key of the compose file is mapped, left out with a note in the result, or refused by name: what is silently dropped is
//! missed in production. Nothing of the repository is run, links are not followed out of it, and every input has a limit.

mod bare;
mod build;
mod compose;
mod dockerfile;
mod environment;
mod files;
mod health;
mod mounts;
mod plan;
mod ports;
mod reading;
mod repo;
mod service;
mod vars;
mod write;
mod yaml;

use std::path::{Path, PathBuf};

use replank_core::words::{AppName, ComponentName, ContainerName};
use serde_json::json;

use crate::config::env::Environment;
use crate::config::{FILE, Settings};
pub use files::{NotSaved, Written, save};
use plan::{Controller, Plan, Service, label};
use reading::{Reading, Refusal};
use repo::Repo;

/// Names of the container and the directory that Replank's own image may have, the first that is free.
const CONTROLLER_NAMES: [&str; 3] = ["controller", "replank", "replank-controller"];
/// Where the upgrade page is published, or the next free port.
const CONTROLLER_PUBLISH: u16 = 8086;

/// What to read, and what the person knows better than the repository.
#[derive(Debug, Clone)]
pub struct Wishes {
    pub repository: PathBuf,
    /// The compose file, relative to the repository.
    pub compose: Option<String>,
    pub application: Option<String>,
    pub project: Option<String>,
    /// The image that the controller's Dockerfile begins with.
    pub image: String,
    /// The file to be written; relative paths in it begin at its directory.
    pub target: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    plan: Plan,
    pub refused: Vec<Refusal>,
    notes: Vec<(String, Vec<String>)>,
    /// The configuration, for [`Settings::load`].
    pub toml: String,
    root: PathBuf,
    dockerfile: String,
}

/// Reads the repository. The error is one sentence with advice, for what cannot even be looked at.
pub fn read(wishes: &Wishes) -> Result<Outcome, String> {
    let repo = Repo::open(&wishes.repository)?;
    let file = compose_file(&repo, wishes)?;
    let (dockerfiles, whole) = repo.dockerfiles();
    if file.is_none() && dockerfiles.is_empty() {
        return Err(format!(
            "{} has neither a compose file nor a Dockerfile; name the repository's directory, or a compose file with --file",
            repo.root().display()
        ));
    }
    let shown = file.clone().unwrap_or_else(|| ".".to_owned());
    let mut reading = Reading::new(&repo, &shown, vars::Vars::new());
    read_env(&mut reading);
    let root = match &file {
        Some(file) => Some(parse(&repo, file)?),
        None => None,
    };
    let empty = yaml::Node { line: 0, value: yaml::Value::Null };
    reading.project = compose::project(&reading, root.as_ref().unwrap_or(&empty), wishes.project.as_deref());
    let application = application(wishes, &reading.project)?;
    let composed = match &root {
        Some(root) => compose::read(&reading, root),
        None => bare::read(&reading, &dockerfiles, &application),
    };
    if !whole {
        reading.note("", "the repository is too large to be searched as a whole for Dockerfiles");
    }
    let controller = controller(&repo, &composed.services)?;
    let remote = repo.origin();
    let https = remote.as_deref().and_then(repo::https_remote);
    if https.is_some() && !remote.as_deref().is_some_and(|remote| remote.starts_with("https://")) {
        reading.note("", "git reaches the remote in another way: see whether it answers over https too");
    }
    let used = write::used(&composed.components);
    let is_other = |path: &&String| !used.contains(path.as_str()) && **path != controller.dockerfile();
    let unused = dockerfiles.iter().filter(is_other).cloned().collect();
    let plan = Plan {
        application,
        project: reading.project.clone(),
        compose: file,
        remote: https,
        branch: repo.branch().filter(|branch| branch == "master"),
        unused,
        controller,
        components: composed.components,
        services: composed.services,
        networks: composed.networks,
        build_secrets: composed.build_secrets,
        secret_files: composed.secret_files,
    };
    if plan.components.is_empty() && reading.refused().is_empty() {
        let advice = "give the service that is developed here a `build`; Replank upgrades nothing else";
        reading.refuse(0, "", "nothing is built from this repository", advice);
    }
    let toml = write::toml(&plan, &reading);
    check(&reading, wishes, &toml);
    let notes = std::iter::once("").chain(plan.services.iter().map(|s| s.name.as_str()));
    let notes =
        notes.map(|name| (name.to_owned(), reading.notes(name))).filter(|(_, notes)| !notes.is_empty()).collect();
    let dockerfile = write::dockerfile(&wishes.image);
    Ok(Outcome { refused: reading.refused(), notes, toml, root: repo.root().to_path_buf(), dockerfile, plan })
}

fn compose_file(repo: &Repo, wishes: &Wishes) -> Result<Option<String>, String> {
    match &wishes.compose {
        Some(file) => match repo.inside(".", file) {
            Ok(path) if repo.is_file(&path) => Ok(Some(path)),
            Ok(path) => {
                Err(format!("there is no {path} in {}; give its path in the repository", repo.root().display()))
            }
            Err(why) => Err(format!("the compose file {file:?} {why}; give its path in the repository")),
        },
        None => Ok(compose::FILES.iter().find(|file| repo.is_file(file)).map(|file| (*file).to_owned())),
    }
}

fn parse(repo: &Repo, file: &str) -> Result<yaml::Node, String> {
    let text = match repo.read(file) {
        Ok(text) => text.unwrap_or_default(),
        Err(why) => return Err(format!("{file} {why}; name the right file with --file")),
    };
    yaml::parse(&text).map_err(|unreadable| {
        let place = if unreadable.line > 0 { format!(":{}", unreadable.line) } else { String::new() };
        format!(
            "{file}{place}: this cannot be read: {}; mend the file, `docker compose config` shows what is wrong",
            unreadable.what
        )
    })
}

/// `.env` beside the compose file, as compose reads it.
fn read_env(reading: &mut Reading<'_>) {
    let path = if reading.base == "." { ".env".to_owned() } else { format!("{}/.env", reading.base) };
    match reading.repo.read(&path) {
        Ok(Some(text)) => match vars::parse_env(&text) {
            Ok(file) => {
                for (line, what) in file.without {
                    reading.note("", format!("{path}, line {line}: {what}"));
                }
                reading.vars = file.vars;
            }
            Err((line, what)) => reading.refuse(0, path, format!("line {line}: {what}"), "mend the file"),
        },
        Ok(None) => {}
        Err(why) => reading.refuse(0, path, why, "mend the file, or take it out of the repository"),
    }
}

fn application(wishes: &Wishes, project: &str) -> Result<AppName, String> {
    let advice = "give a name with --application: 1 to 32 of a-z, 0-9 and '-', beginning with a letter";
    match &wishes.application {
        Some(name) => {
            AppName::new(name.clone()).map_err(|_| format!("{name:?} is not an application's name; {advice}"))
        }
        None => AppName::new(label(project))
            .map_err(|_| format!("the project is called {project:?}, which is not an application's name; {advice}")),
    }
}

fn controller(repo: &Repo, services: &[Service]) -> Result<Controller, String> {
    let is_free = |name: &&&str| {
        let path = format!("{name}/Dockerfile");
        let is_ours = || repo.dockerfile(&path).ok().flatten().is_some_and(|d| d.is_controller);
        !services.iter().any(|service| label(&service.name) == ***name) && (!repo.is_file(&path) || is_ours())
    };
    let name = CONTROLLER_NAMES
        .iter()
        .find(is_free)
        .ok_or_else(|| format!("{} are all taken by services; rename one of them", CONTROLLER_NAMES.join(", ")))?;
    let published = |port: u16| services.iter().flat_map(|s| &s.ports).any(|p| p.publish == port);
    let publish = (CONTROLLER_PUBLISH..).find(|port| !published(*port)).unwrap_or(CONTROLLER_PUBLISH);
    let bad = |e: replank_core::words::BadWord| e.to_string();
    Ok(Controller {
        name: ContainerName::new(*name).map_err(bad)?,
        component: ComponentName::new(*name).map_err(bad)?,
        publish,
    })
}

/// What was made is read as `replank deploy` will read it: rules that were not thought of here speak up now.
fn check(reading: &Reading<'_>, wishes: &Wishes, toml: &str) {
    if !reading.refused().is_empty() {
        // It lacks what was refused, so most of what would be said is not the person's doing.
        return;
    }
    let target = wishes.target.clone().unwrap_or_else(|| Path::new("/").join(FILE));
    if let Err(problems) = Settings::parse(FILE, &target, toml, &Environment::default()) {
        for problem in problems.0 {
            let advice =
                if problem.advice.is_empty() { "change it in the compose file".to_owned() } else { problem.advice };
            reading.refuse(
                0,
                problem.key,
                format!("the configuration made of this is refused: {}", problem.what),
                advice,
            );
        }
    }
}

impl Outcome {
    /// For scripts.
    pub fn json(&self) -> serde_json::Value {
        let notes =
            |name: &str| self.notes.iter().find(|(n, _)| n == name).map(|(_, all)| all.clone()).unwrap_or_default();
        let service = |s: &Service| {
            let run = s.container.as_ref().map(|(_, run)| run);
            json!({
                "service": s.name, "line": s.line, "kind": s.kind, "runs": s.container.is_some(), "image": s.image,
                "container": s.container.as_ref().map(|(name, _)| name), "component": run.map(|r| &r.component),
                "ports": s.ports, "probe": run.and_then(|r| r.probe.as_ref()),
                "overlap": run.map(|r| r.overlap_rule()), "notes": notes(&s.name),
            })
        };
        json!({
            "application": self.plan.application, "project": self.plan.project, "compose": self.plan.compose,
            "services": self.plan.services.iter().map(service).collect::<Vec<_>>(),
            "components": self.plan.components.iter().map(|(name, b)| json!({ "component": name, "dockerfile": b.dockerfile, "context": b.context })).collect::<Vec<_>>(),
            "controller": { "container": self.plan.controller.name, "dockerfile": self.plan.controller.dockerfile() },
            "networks": self.plan.networks, "secret_files": self.plan.secret_files.keys().collect::<Vec<_>>(),
            "unused_dockerfiles": self.plan.unused, "notes": notes(""), "refused": self.refused, "configuration": self.toml,
        })
    }

    /// For people: a line for each service.
    pub fn summary(&self) -> Vec<(String, String)> {
        let line = |s: &Service| {
            let mut text = s.kind.words().to_owned();
            if s.kind == plan::Kind::ThirdParty {
                text = format!("{text}: {}", s.image);
            }
            for port in &s.ports {
                text.push_str(&format!(", {} → {}", port.publish, port.port));
            }
            if s.container.is_some() && s.ports.is_empty() && s.kind == plan::Kind::Web {
                text.push_str(", no port");
            }
            (s.name.clone(), text)
        };
        self.plan.services.iter().map(line).collect()
    }

    pub fn left_alone(&self) -> Vec<&str> {
        self.plan.of_kind(|kind| kind == plan::Kind::ThirdParty).map(|s| s.name.as_str()).collect()
    }

    /// Services that compose runs so far and Replank takes over; none where there is no compose file.
    pub fn taken_over(&self) -> Vec<&str> {
        if self.plan.compose.is_none() {
            return Vec::new();
        }
        self.plan.of_kind(plan::Kind::is_run).map(|s| s.name.as_str()).collect()
    }

    pub fn has_remote(&self) -> bool {
        self.plan.remote.is_some()
    }

    /// In the repository.
    pub fn controller_dockerfile(&self) -> String {
        self.plan.controller.dockerfile()
    }

    /// What is written beside the configuration: secrets in its directory, and the controller's Dockerfile in the repository.
    pub fn other_files(&self) -> impl Iterator<Item = String> {
        self.plan.secret_files.keys().cloned().chain([self.controller_dockerfile()])
    }
}
