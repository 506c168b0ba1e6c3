//! What a repository becomes: components to build, containers to run, and what is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use replank_adapters::platform::docker::config::ContainerConfig;
use replank_adapters::platform::docker::proxy_api::Protocol;
use replank_core::words::{AppName, ComponentName, ContainerName};
use serde::Serialize;

/// What a service is to Replank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Built here, with published ports.
    Web,
    /// Built here, answers other containers only.
    Internal,
    /// Built here, answers nobody.
    Worker,
    /// Built here, starts its work by the clock.
    Cron,
    /// Runs once and ends: not run by Replank.
    Job,
    /// Somebody else's image: stays with compose.
    ThirdParty,
}

impl Kind {
    pub fn words(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Internal => "internal service",
            Self::Worker => "worker",
            Self::Cron => "cron",
            Self::Job => "one-off job, not run by Replank",
            Self::ThirdParty => "third-party image, left alone",
        }
    }

    pub fn is_run(self) -> bool {
        match self {
            Self::Web | Self::Internal | Self::Worker | Self::Cron => true,
            Self::Job | Self::ThirdParty => false,
        }
    }
}

/// One port that users reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Port {
    pub bind: IpAddr,
    pub publish: u16,
    pub port: u16,
    pub protocol: Protocol,
}

#[derive(Debug, Clone)]
pub struct Service {
    /// As the compose file, or the Dockerfile's directory, calls it.
    pub name: String,
    /// Counted from 1; 0 without a compose file.
    pub line: u64,
    pub kind: Kind,
    /// The image, as written, of what is not built here.
    pub image: String,
    /// Present where it is run.
    pub container: Option<(ContainerName, ContainerConfig)>,
    pub ports: Vec<Port>,
    /// An address that a check which is not understood might mean, for a comment.
    pub hint: Option<u16>,
}

/// How an image is built; equal ones are one component.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BuildPlan {
    pub dockerfile: String,
    pub context: String,
    pub target: Option<String>,
    pub args: BTreeMap<String, String>,
    pub platform: Option<String>,
    pub secrets: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub application: AppName,
    /// What compose calls it.
    pub project: String,
    /// The compose file's path in the tree, where there is one.
    pub compose: Option<String>,
    pub remote: Option<String>,
    pub branch: Option<String>,
    pub components: BTreeMap<ComponentName, BuildPlan>,
    pub services: Vec<Service>,
    pub networks: BTreeSet<String>,
    /// Build secrets by name: the absolute path of the file.
    pub build_secrets: BTreeMap<String, String>,
    /// Values that must not stand in the file: by path below the home.
    pub secret_files: BTreeMap<String, String>,
    pub controller: Controller,
    /// Dockerfiles that no service names.
    pub unused: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Controller {
    /// Also the component's name, and the directory of its Dockerfile.
    pub name: ContainerName,
    pub component: ComponentName,
    pub publish: u16,
}

impl Controller {
    pub fn dockerfile(&self) -> String {
        format!("{}/Dockerfile", self.name)
    }
}

impl Plan {
    pub fn of_kind(&self, wanted: impl Fn(Kind) -> bool) -> impl Iterator<Item = &Service> {
        self.services.iter().filter(move |service| wanted(service.kind))
    }
}

/// A name as Replank takes it (1 to 32 of a-z, 0-9 and '-', beginning with a letter), made from any other in one way only.
pub fn label(name: &str) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    plain.trim_matches('-').to_owned()
}
