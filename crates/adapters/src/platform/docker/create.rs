//! From a stored run spec to what the engine is asked to create.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{
    ContainerCreateBody, EndpointSettings, HostConfig, Mount, MountType, NetworkingConfig, RestartPolicy,
    RestartPolicyNameEnum,
};
use replank_core::fault::Fault;
use replank_core::image::ImageId;
use replank_core::record::Deployment;
use replank_core::words::{ComponentName, ContainerName};

use super::config::{ContainerConfig, DockerConfig};
use super::spec::{self, ContainerSpec};
use super::{DockerPlatform, labels, names};

/// Environment that tells a controller who and where it is.
pub(super) fn controller_env(
    config: &DockerConfig,
    deployment: &Deployment,
    container: &ContainerName,
) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("REPLANK_APPLICATION", config.application.to_string()),
        ("REPLANK_INSTALLATION", config.installation.to_string()),
        ("REPLANK_REVISION", deployment.revision.to_string()),
        ("REPLANK_CONTAINER", container.to_string()),
        ("REPLANK_HOME", config.home.display().to_string()),
        ("REPLANK_SOCKET", config.socket.display().to_string()),
    ])
}

/// A mount as (source, target, read only); a source that begins with '/' is a host path.
pub(super) type MountPlan = (String, String, bool);

/// The container's own mounts, and a controller's two: the engine's socket and the state directory, at the same paths, so
/// that a path means the same inside and outside.
pub(super) fn mounts(config: &DockerConfig, run: &ContainerConfig) -> Vec<MountPlan> {
    let mut mounts: Vec<MountPlan> =
        run.mounts.iter().map(|m| (m.source.clone(), m.target.clone(), m.read_only)).collect();
    if run.controller {
        for path in [&config.socket, &config.home] {
            let path = path.display().to_string();
            if mounts.iter().all(|(_, target, _)| *target != path) {
                mounts.push((path.clone(), path, false));
            }
        }
    }
    mounts
}

pub(super) fn image<'a>(deployment: &'a Deployment, component: &ComponentName) -> Result<&'a ImageId, Fault> {
    deployment.images.get(component).ok_or_else(|| {
        Fault::permanent(format!("revision {} has no image of {component}", deployment.revision))
            .advice("the record is inconsistent; start the upgrade again")
    })
}

pub(super) fn restart(name: RestartPolicyNameEnum) -> RestartPolicy {
    RestartPolicy { name: Some(name), maximum_retry_count: None }
}

/// The engine's request for one container. Secrets are read here, at the last moment.
pub(super) fn body(
    platform: &DockerPlatform,
    deployment: &Deployment,
    name: &ContainerName,
    spec: &ContainerSpec,
    image_id: &str,
) -> Result<ContainerCreateBody, Fault> {
    let (config, run) = (&platform.config, &spec.run);
    let intended = image(deployment, &run.component)?;
    let mut env: Vec<String> = run.env.iter().map(|(key, value)| format!("{key}={value}")).collect();
    for (key, source) in &run.secrets {
        let value = spec::resolve(key, source)?;
        let hash = spec::hash(&config.installation, key, &value);
        if spec.secret_hashes.get(key).is_some_and(|planned| *planned != hash) {
            // Not an error: an old revision must work with today's password, not with the one of its day.
            tracing::warn!(secret = %key, container = %name, "the secret has changed since the revision was planned");
        }
        env.push(format!("{key}={value}"));
    }
    if run.controller {
        env.extend(controller_env(config, deployment, name).iter().map(|(key, value)| format!("{key}={value}")));
    }
    let mut labels = platform.owner.container(deployment, name, &run.component, intended);
    labels.insert(labels::IMAGE_ID.to_owned(), image_id.to_owned());
    let mounts = mounts(config, run).into_iter().map(|(source, target, read_only)| Mount {
        typ: Some(if source.starts_with('/') { MountType::BIND } else { MountType::VOLUME }),
        source: Some(source),
        target: Some(target),
        read_only: Some(read_only),
        ..Default::default()
    });
    let host = HostConfig {
        mounts: Some(mounts.collect()),
        // What is not settled does not return after a reboot (lesson 38).
        restart_policy: Some(restart(RestartPolicyNameEnum::NO)),
        network_mode: Some(names::network(&config.application, &deployment.revision)),
        nano_cpus: run.cpu_millis.map(|millis| i64::from(millis) * 1_000_000),
        memory: run.memory_bytes.and_then(|bytes| i64::try_from(bytes).ok()),
        cap_add: (!run.cap_add.is_empty()).then(|| run.cap_add.iter().cloned().collect()),
        privileged: Some(false),
        readonly_rootfs: Some(run.read_only_root),
        tmpfs: (!run.tmpfs.is_empty()).then(|| run.tmpfs.iter().map(|path| (path.clone(), String::new())).collect()),
        ..Default::default()
    };
    let endpoint = EndpointSettings { aliases: Some(vec![name.to_string()]), ..Default::default() };
    let network = names::network(&config.application, &deployment.revision);
    Ok(ContainerCreateBody {
        image: Some(intended.reference()),
        env: Some(env),
        entrypoint: run.entrypoint.clone(),
        cmd: run.command.clone(),
        user: run.user.clone(),
        labels: Some(labels.into_iter().collect()),
        stop_timeout: Some(i64::from(run.stop_grace_seconds)),
        host_config: Some(host),
        networking_config: Some(NetworkingConfig { endpoints_config: Some(HashMap::from([(network, endpoint)])) }),
        ..Default::default()
    })
}
