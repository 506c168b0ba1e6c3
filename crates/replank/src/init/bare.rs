//! A repository without a compose file: each Dockerfile is an image with one container.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use replank_adapters::platform::docker::config::{ContainerConfig, ProbeConfig};
use replank_adapters::platform::docker::proxy_api::Protocol;
use replank_core::words::{AppName, ComponentName, ContainerName};

use super::compose::Composed;
use super::health::Check;
use super::plan::{BuildPlan, Kind, Port, Service, label};
use super::reading::Reading;

pub fn read(reading: &Reading<'_>, dockerfiles: &[String], application: &AppName) -> Composed {
    let mut composed = Composed::default();
    let mut published = BTreeSet::new();
    for path in dockerfiles {
        let image = match reading.repo.dockerfile(path) {
            Ok(Some(image)) => image,
            Ok(None) => continue,
            Err(why) => {
                reading.refuse(0, path.clone(), why, "mend the file, or take it out of the repository");
                continue;
            }
        };
        if image.is_controller {
            continue;
        }
        let made = label(&name_of(path, application));
        let (Ok(component), Ok(container)) = (ComponentName::new(made.clone()), ContainerName::new(made.clone()))
        else {
            let advice = "rename its directory: 1 to 32 of a-z, 0-9 and '-', beginning with a letter";
            reading.refuse(0, path.clone(), format!("{made:?} cannot be a component's name"), advice);
            continue;
        };
        let context = path.rsplit_once('/').map_or(".", |(directory, _)| directory).to_owned();
        if context != "." {
            let note = format!(
                "the context is taken to be {context}; write context = \".\" if the Dockerfile copies from the root"
            );
            reading.note(&made, note);
        }
        let build = BuildPlan { dockerfile: path.clone(), context, ..BuildPlan::default() };
        if composed.components.insert(component.clone(), build).is_some() {
            reading.refuse(
                0,
                path.clone(),
                format!("two images would both be component {component}"),
                "rename a directory",
            );
            continue;
        }
        let mut run = ContainerConfig::of(component);
        match image.check {
            Some(Check::Http { port, path }) => run.probe = Some(ProbeConfig::http(port, &path)),
            Some(Check::Tcp { port }) => {
                run.probe = Some(ProbeConfig { tcp: true, ..ProbeConfig::http(port, "/") });
            }
            Some(Check::Other(command)) => {
                reading.note(&made, format!("its health check is left out, as no probe can ask this: {command}"));
            }
            Some(Check::Off) | None => {}
        }
        // Loopback: nothing said that anybody else shall reach it.
        let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut ports = Vec::new();
        for port in &image.ports {
            let publish = (*port..=u16::MAX).find(|p| !published.contains(p)).unwrap_or(*port);
            published.insert(publish);
            ports.push(Port { bind, publish, port: *port, protocol: Protocol::Http });
        }
        let kind = if ports.is_empty() { Kind::Worker } else { Kind::Web };
        let hint = image.ports.first().copied();
        composed.services.push(Service {
            name: made,
            line: 0,
            kind,
            image: String::new(),
            container: Some((container, run)),
            ports,
            hint,
        });
    }
    composed
}

/// `api/Dockerfile` is api, `Dockerfile.worker` is worker, and the one at the root is the application itself.
fn name_of(path: &str, application: &AppName) -> String {
    let (directory, file) = path.rsplit_once('/').unwrap_or(("", path));
    let variant = file.strip_prefix("Dockerfile.").or_else(|| file.strip_suffix(".Dockerfile"));
    let place = directory.replace('/', "-");
    match (place.is_empty(), variant) {
        (true, None) => application.to_string(),
        (true, Some(variant)) => variant.to_owned(),
        (false, None) => place,
        (false, Some(variant)) => format!("{place}-{variant}"),
    }
}
