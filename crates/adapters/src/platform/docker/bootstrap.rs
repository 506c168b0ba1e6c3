//! The proxy's container and image: made once at the first deployment, never touched by an application's upgrade.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::models::{
    ContainerCreateBody, EndpointSettings, HostConfig, Mount, MountType, NetworkingConfig, PortBinding,
    RestartPolicyNameEnum,
};
use bollard::query_parameters::{CreateContainerOptions, CreateImageOptions, LogsOptions, StartContainerOptions};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use replank_core::fault::Fault;
use replank_core::words::InstallationId;
use sha2::{Digest as _, Sha256};

use super::change::{Work, labels_of, look_alike};
use super::config::{DockerConfig, ListenerConfig};
use super::proxy_api::{self, Config, Listener, TlsFiles};
use super::{DockerPlatform, create, labels, names, renewal};
use crate::engine::{Engine, classify, is_missing};

/// Largest binary that is made into an image: it goes through memory. A debug build is far below this.
const BINARY_MAX: u64 = 512 * 1024 * 1024;
/// A proxy answers within milliseconds; a busy engine may take seconds to start its container.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_EVERY: Duration = Duration::from_millis(20);
/// Repository of images made from a binary.
const REPOSITORY: &str = "replank-proxy";
const UNCHANGED: &str = "a deployment never changes the proxy, as that would drop requests: leave [listeners], [proxy] and \
                         home as they were";

/// Where a listener's certificate and key are in the proxy's container: their directories are mounted, so that files
/// that are replaced there are seen.
fn tls_inside(name: &str, listener: &ListenerConfig) -> Option<(TlsFiles, [(PathBuf, String); 2])> {
    let tls = listener.tls.as_ref()?;
    let place = |path: &Path, what: &str| {
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let inside = format!("/tls/{name}/{what}");
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        (format!("{inside}/{file}"), (directory, inside))
    };
    let (certificate, first) = place(&tls.certificate, "certificate");
    let (key, second) = place(&tls.key, "key");
    Some((TlsFiles { certificate, key }, [first, second]))
}

fn proxy_config(config: &DockerConfig) -> Config {
    let listener = |(name, l): (&String, &ListenerConfig)| {
        let tls = tls_inside(name, l).map(|(files, _)| files);
        (name.clone(), Listener { port: l.inside(), protocol: l.protocol, tls })
    };
    Config { listeners: config.listeners.iter().map(listener).collect() }
}

/// What the proxy's container is made from, beside its image.
pub(super) fn fingerprint(config: &DockerConfig) -> Result<String, Fault> {
    let listeners: std::collections::BTreeMap<_, _> =
        config.listeners.iter().map(|(name, l)| (name, (l.bind, l.publish, l.inside(), l.protocol, &l.tls))).collect();
    let text = serde_json::to_vec(&(&listeners, &config.home, config.proxy.memory_bytes))
        .map_err(|error| Fault::permanent("the proxy's configuration cannot be written as JSON").because(error))?;
    Ok(hex::encode(Sha256::digest(text)))
}

/// The engine's id of an image. Permanent where the engine does not have it.
pub(super) async fn image_id(engine: &Engine, image: &str) -> Result<String, Fault> {
    match engine.docker().inspect_image(image).await {
        Ok(found) => Ok(found.id.unwrap_or_default()),
        Err(error) if is_missing(&error) => {
            Err(Fault::permanent(format!("the engine does not have the proxy's image {image}"))
                .advice("pull or load it, or leave `proxy.image` out to have it made from this binary"))
        }
        Err(error) => Err(classify(error, &format!("the image {image} cannot be inspected"))),
    }
}

pub(super) async fn ensure_proxy(platform: &DockerPlatform, image: &str) -> Result<(), Fault> {
    // An upgrade of it that was cut short comes to its end first.
    let _undisturbed = renewal::undisturbed(platform).await?;
    let engine = platform.engine()?;
    let work = Work { platform, engine: &engine };
    let config = &platform.config;
    let name = names::proxy(&config.application);
    let image_id = image_id(&engine, image).await?;
    let fingerprint = fingerprint(config)?;
    if let Some(found) = work.inspect(&name).await? {
        let labels = labels_of(&found);
        if !platform.owner.owns(&labels) || labels.get(labels::ROLE).is_none_or(|role| role != labels::ROLE_PROXY) {
            return Err(look_alike(&platform.owner, &name, &labels));
        }
        if labels.get(labels::CONFIG) != Some(&fingerprint) {
            return Err(Fault::permanent(format!("the proxy {name} was made from other listeners or another home"))
                .advice(UNCHANGED));
        }
        if found.image.as_ref() != Some(&image_id) {
            return Err(Fault::permanent(format!("the proxy {name} runs another image than {image}")).advice(
                "a deployment never changes the proxy: leave [proxy] image as it was, or run `replank proxy upgrade`",
            ));
        }
    } else {
        write_config(config)?;
        let network = names::proxy_network(&config.application);
        work.network(&network, platform.owner.labels(labels::ROLE_NETWORK)).await?;
        let body = body(platform, &image_id, &network, &fingerprint, user_of(&config.proxy_dir())?);
        let options = CreateContainerOptions { name: Some(name.clone()), ..Default::default() };
        engine
            .docker()
            .create_container(Some(options), body)
            .await
            .map_err(|error| classify(error, &format!("the proxy {name} cannot be created")))?;
    }
    for network in &config.networks {
        let aliases = work.aliases(network);
        if !aliases.is_empty() {
            work.join_proxy(network, &aliases).await?;
        }
    }
    engine.docker().start_container(&name, None::<StartContainerOptions>).await.map_err(|error| {
        classify(error, &format!("the proxy {name} cannot be started"))
            .advice("check that nothing else uses the published ports")
    })?;
    until_it_answers(platform, &engine, &name).await
}

/// A deployment without a proxy would find out much later, when its probes fail.
async fn until_it_answers(platform: &DockerPlatform, engine: &Engine, name: &str) -> Result<(), Fault> {
    let answers = async {
        while platform.proxy.state().await.is_err() {
            tokio::time::sleep(ANSWER_EVERY).await;
        }
    };
    if tokio::time::timeout(ANSWER_LIMIT, answers).await.is_ok() {
        return Ok(());
    }
    let said = last_words(engine, name).await;
    let socket = platform.proxy.socket().display();
    Err(Fault::permanent(format!("the proxy {name} was started and does not answer at {socket}; it said: {said}"))
        .advice(format!("mend what it says, remove it with `docker rm --force {name}`, and deploy again")))
}

/// The last lines that a proxy's container wrote.
pub(super) async fn last_words(engine: &Engine, name: &str) -> String {
    let options = LogsOptions { stdout: true, stderr: true, tail: "3".to_owned(), ..Default::default() };
    let mut words: Vec<String> = engine
        .docker()
        .logs(name, Some(options))
        .map_ok(|line| String::from_utf8_lossy(&line.into_bytes()).trim().to_owned())
        .try_collect()
        .await
        .unwrap_or_default();
    // It is started again and again, and says the same each time.
    words.dedup();
    if words.is_empty() { "nothing".to_owned() } else { words.join(" / ") }
}

/// The proxy runs as whoever owns its directory: it has none of root's powers to reach into somebody else's.
pub(super) fn user_of(directory: &Path) -> Result<String, Fault> {
    let owner = std::fs::metadata(directory).map_err(|error| {
        Fault::permanent(format!("the owner of the proxy's directory {} is not known", directory.display()))
            .because(error)
    })?;
    Ok(format!("{}:{}", owner.uid(), owner.gid()))
}

fn write_config(config: &DockerConfig) -> Result<(), Fault> {
    let directory = config.proxy_dir();
    let fault = |error: std::io::Error| {
        Fault::permanent(format!("the proxy's directory {} cannot be written", directory.display()))
            .advice("check that home is on a disk with room, and belongs to the user that runs Replank")
            .because(error)
    };
    std::fs::create_dir_all(&directory).map_err(fault)?;
    // Whoever can open the control socket in here moves the traffic.
    std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(fault)?;
    let text = serde_json::to_vec_pretty(&proxy_config(config))
        .map_err(|error| Fault::permanent("the proxy's configuration cannot be written as JSON").because(error))?;
    let (path, draft) = (directory.join(proxy_api::CONFIG), directory.join(format!("{}.new", proxy_api::CONFIG)));
    // Written beside and renamed, so that a crash leaves the old file or the new one.
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&draft)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&draft, &path)
    };
    write().map_err(fault)
}

pub(super) fn body(
    platform: &DockerPlatform,
    image_id: &str,
    network: &str,
    fingerprint: &str,
    user: String,
) -> ContainerCreateBody {
    let config = &platform.config;
    let directory = config.proxy_dir().display().to_string();
    let bind = |source: String, target: String, read_only: bool| Mount {
        typ: Some(MountType::BIND),
        source: Some(source),
        target: Some(target),
        read_only: Some(read_only),
        ..Default::default()
    };
    let mut mounts = vec![bind(directory.clone(), directory.clone(), false)];
    let mut ports: HashMap<String, Option<Vec<PortBinding>>> = HashMap::new();
    for (name, listener) in &config.listeners {
        for (source, target) in tls_inside(name, listener).into_iter().flat_map(|(_, directories)| directories) {
            mounts.push(bind(source.display().to_string(), target, true));
        }
        let published =
            PortBinding { host_ip: Some(listener.bind.to_string()), host_port: Some(listener.publish.to_string()) };
        ports.insert(format!("{}/tcp", listener.inside()), Some(vec![published]));
    }
    let mut labels = platform.owner.labels(labels::ROLE_PROXY);
    labels.insert(labels::CONFIG.to_owned(), fingerprint.to_owned());
    let host = HostConfig {
        mounts: Some(mounts),
        port_bindings: Some(ports.clone()),
        network_mode: Some(network.to_owned()),
        restart_policy: Some(create::restart(RestartPolicyNameEnum::ALWAYS)),
        // It asks for nothing but containers of its own networks. An upstream that refuses at once keeps unknown names short.
        dns: Some(vec!["127.0.0.1".to_owned()]),
        readonly_rootfs: Some(true),
        privileged: Some(false),
        cap_drop: Some(vec!["ALL".to_owned()]),
        // Ports below 1024, where it is root; for everybody else the engine opens them inside containers.
        cap_add: Some(vec!["NET_BIND_SERVICE".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        memory: config.proxy.memory_bytes.and_then(|bytes| i64::try_from(bytes).ok()),
        ..Default::default()
    };
    let endpoint = EndpointSettings::default();
    ContainerCreateBody {
        image: Some(image_id.to_owned()),
        user: Some(user),
        // The entry point is the image's: `replank`.
        cmd: Some(vec!["proxy".to_owned(), "--dir".to_owned(), directory]),
        labels: Some(labels.into_iter().collect()),
        exposed_ports: Some(ports.into_keys().collect()),
        host_config: Some(host),
        networking_config: Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(network.to_owned(), endpoint)])),
        }),
        ..Default::default()
    }
}

/// Makes an image of nothing but one static executable, whose name is its content: made twice it is the same one.
/// Returns the image's reference.
pub async fn proxy_image_from_binary(
    engine: &Engine,
    installation: &InstallationId,
    binary: &Path,
) -> Result<String, Fault> {
    let unreadable = |error: std::io::Error| {
        Fault::permanent(format!("the executable {} cannot be read", binary.display())).because(error)
    };
    let size = std::fs::metadata(binary).map_err(unreadable)?.len();
    if size > BINARY_MAX {
        return Err(Fault::permanent(format!("the executable {} is larger than {BINARY_MAX} bytes", binary.display())));
    }
    let bytes = std::fs::read(binary).map_err(unreadable)?;
    if needs_a_loader(&bytes) {
        return Err(Fault::permanent(format!(
            "the executable {} is not static: alone in an image it cannot run",
            binary.display()
        ))
        .advice("use a static build (-C target-feature=+crt-static), or name an image in [proxy] image"));
    }
    let tag = hex::encode(Sha256::digest(&bytes)).chars().take(16).collect::<String>();
    let reference = format!("{REPOSITORY}:{tag}");
    match engine.docker().inspect_image(&reference).await {
        Ok(_) => return Ok(reference),
        Err(error) if is_missing(&error) => {}
        Err(error) => return Err(classify(error, &format!("the image {reference} cannot be inspected"))),
    }
    let mut archive = tar::Builder::new(Vec::with_capacity(bytes.len() + 4096));
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o755);
    header.set_mtime(0);
    let archive = archive.append_data(&mut header, "replank", bytes.as_slice()).and_then(|()| archive.into_inner());
    let archive = archive.map_err(unreadable)?;
    let options = CreateImageOptions {
        from_src: Some("-".to_owned()),
        repo: Some(REPOSITORY.to_owned()),
        tag: Some(tag),
        changes: vec!["ENTRYPOINT [\"/replank\"]".to_owned(), format!("LABEL {}={installation}", labels::INSTALLATION)],
        ..Default::default()
    };
    let body = bollard::body_full(Bytes::from(archive));
    let import = engine.docker().create_image(Some(options), Some(body), None);
    import
        .try_for_each(|_| async { Ok(()) })
        .await
        .map_err(|error| classify(error, &format!("the image {reference} cannot be made")))?;
    Ok(reference)
}

/// Whether an ELF executable names a program interpreter (PT_INTERP), which an image of nothing else does not have.
/// What cannot be read as 64-bit little-endian ELF is left to the engine to judge.
fn needs_a_loader(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, n: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(n)?)?;
        bytes.iter().rev().try_fold(0_usize, |sum, b| sum.checked_mul(256)?.checked_add(usize::from(*b)))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else { return false };
    (0..count).any(|i| table.checked_add(i * size).and_then(|at| number(at, 4)) == Some(PT_INTERP as usize))
}
