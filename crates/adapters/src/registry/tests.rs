//! One conformance suite, run against the engine and against a real registry.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use replank_core::fault::Class;
use replank_core::image::{ImageId, attempt_tag};
use replank_core::phase::Recipe;
use replank_core::ports::{BuildSpec, Builder as _, Discarded, NoLog, Registry, Tree};
use replank_core::words::{AppName, CommitSha, ComponentName, Digest, InstallationId, JobId, Nonce, OpKey, Version};

use super::*;
use crate::builder::docker::{DockerBuilder, DockerBuilderConfig};
use crate::engine::Engine;
use crate::labels;
use crate::oci::OciConfig;

/// Images of `ours` and of another installation, all in one repository.
struct World {
    repository: String,
    ours: Vec<ImageId>,
    foreign: ImageId,
}

fn installation(c: &str) -> InstallationId {
    InstallationId::new(c.repeat(16)).expect("id")
}

fn engine() -> Engine {
    let socket = std::env::var_os("REPLANK_TEST_DOCKER")
        .expect("REPLANK_TEST_DOCKER must name the socket of a Docker engine for tests; `cargo xtask test` sets it");
    Engine::connect(&PathBuf::from(socket)).expect("engine")
}

async fn build(repository: &str, name: &str, installation: &InstallationId, push: bool) -> ImageId {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\nCOPY name /\n").expect("file");
    std::fs::write(dir.path().join("name"), format!("{name} {repository}")).expect("file");
    let job = JobId::new(format!("job-{name}")).expect("job");
    let spec = BuildSpec {
        installation: installation.clone(),
        application: AppName::new("shop").expect("name"),
        key: key(name),
        job,
        attempt: 1,
        resumed: false,
        component: ComponentName::new("api").expect("name"),
        recipe: Recipe {
            dockerfile: "Dockerfile".to_owned(),
            context: ".".to_owned(),
            target: None,
            args: BTreeMap::new(),
            platform: None,
            secrets: Vec::new(),
            repository: repository.to_owned(),
            unlabelled: false,
        },
        tree: Tree {
            path: dir.path().to_owned(),
            commit: CommitSha::new("c".repeat(40)).expect("commit"),
            signed_by: None,
        },
        version: Version::release(1, 0, 0),
        remote: "https://git.example/shop.git".to_owned(),
    };
    let config = DockerBuilderConfig { push, ..DockerBuilderConfig::default() };
    let builder = DockerBuilder::new(engine(), config).expect("builder");
    let built = builder.build(&spec, &NoLog).await.unwrap_or_else(|fault| panic!("{}", fault.chain()));
    if push {
        // Gone from the engine: the registry's is adopted, without a tree.
        std::fs::remove_dir_all(dir.path()).expect("removed");
        let again = builder.build(&spec, &NoLog).await.unwrap_or_else(|fault| panic!("{}", fault.chain()));
        assert!(again.adopted && again.image == built.image);
    }
    built.image
}

async fn world(repository: String, push: bool) -> World {
    let mut ours = Vec::new();
    for name in ["first", "second", "third"] {
        ours.push(build(&repository, name, &installation("a"), push).await);
    }
    let foreign = build(&repository, "foreign", &installation("b"), push).await;
    World { repository, ours, foreign }
}

/// What every registry must do.
async fn conforms(registry: &dyn Registry, world: &World) {
    let us = installation("a");
    let [first, second, third] = &world.ours[..] else { panic!("three images") };

    let stored = registry.resolve(first).await.expect("resolve").expect("there");
    assert_eq!(stored.image, *first);
    assert!(stored.created_at.is_some_and(|at| at.0 > 1_500_000_000_000));
    assert_eq!(stored.labels.get(labels::INSTALLATION).map(String::as_str), Some(us.as_str()));
    let none = Digest::new(format!("sha256:{}", "0".repeat(64))).expect("digest");
    let missing = match first {
        ImageId::Manifest { repository, .. } => ImageId::Manifest { repository: repository.clone(), digest: none },
        ImageId::Engine { name, .. } => ImageId::Engine { id: none, name: name.clone() },
    };
    assert!(registry.resolve(&missing).await.expect("resolve").is_none());
    registry.release(&missing, &us).await.expect("nothing to release");
    registry.delete(&missing, &us).await.expect("nothing to delete");
    assert!(registry.protect(&missing, &us, "x").await.is_err());

    let listed = registry.list(&world.repository, &us).await.expect("list");
    let mut images: Vec<_> = listed.iter().map(|(stored, _)| stored.image.clone()).collect();
    images.sort();
    let mut expected = world.ours.clone();
    expected.sort();
    assert_eq!(images, expected, "ours, and only ours");

    for _ in 0..2 {
        registry.protect(first, &us, "snapshot/old one").await.expect("protect");
    }
    registry.protect(first, &us, "other").await.expect("protect");
    let keeps = |listed: &[(replank_core::ports::Stored, Vec<String>)]| {
        let tags = listed.iter().find(|(s, _)| s.image == *first).map(|(_, tags)| tags.clone()).unwrap_or_default();
        tags.iter().filter(|t| t.starts_with(labels::KEEP_TAG)).count()
    };
    assert_eq!(keeps(&registry.list(&world.repository, &us).await.expect("list")), 2);
    let refused = registry.delete(first, &us).await.expect_err("protected");
    assert_eq!(refused.class, Class::Permanent);
    let them = installation("b");
    registry.protect(first, &them, "other").await.expect("protect");
    for _ in 0..2 {
        registry.release(first, &us).await.expect("release");
        assert_eq!(keeps(&registry.list(&world.repository, &us).await.expect("list")), 1);
    }
    assert!(registry.delete(first, &us).await.is_err(), "still protected by another installation");
    registry.release(first, &them).await.expect("release");
    assert!(registry.resolve(first).await.expect("resolve").is_some(), "releasing is not deleting");

    assert_eq!(registry.delete(&world.foreign, &us).await.expect_err("foreign").class, Class::Permanent);
    for _ in 0..2 {
        registry.delete(first, &us).await.expect("delete");
    }
    assert!(registry.resolve(first).await.expect("resolve").is_none());
    assert!(registry.resolve(second).await.expect("resolve").is_some());
    assert!(registry.resolve(&world.foreign).await.expect("resolve").is_some());

    let tag = |name: &str| attempt_tag(&Version::release(1, 0, 0), &key(name));
    let discard = async |tag: &str, needed: &[&ImageId]| {
        let needed = needed.iter().map(|image| image.digest().clone()).collect();
        registry.discard(&world.repository, tag, "v0.0.1", &needed).await.expect("discard")
    };
    assert_eq!(discard("v1.0.0-nothing", &[]).await, Discarded::Absent);
    assert_eq!(discard(&tag("second"), &[second]).await, Discarded::Removed);
    assert!(registry.resolve(second).await.expect("resolve").is_some(), "what is needed stays");
    assert_eq!(discard(&tag("third"), &[second]).await, Discarded::Removed);
    assert!(registry.resolve(third).await.expect("resolve").is_none(), "nothing else led to it");
    assert_eq!(discard(&tag("third"), &[]).await, Discarded::Absent);
}

fn key(name: &str) -> OpKey {
    let job = JobId::new(format!("job-{name}")).expect("job");
    OpKey::derive(&job, "build", 1, &Nonce::new("0".repeat(32)).expect("nonce"))
}

#[tokio::test]
async fn the_engine_conforms() {
    let world = world(format!("replank-test/registry-{}", std::process::id()), false).await;
    let registry = EngineRegistry::new(engine());
    conforms(&registry, &world).await;
    for (image, of) in world.ours.iter().map(|i| (i, "a")).chain([(&world.foreign, "b")]) {
        registry.delete(image, &installation(of)).await.expect("cleaned");
    }
}

/// Debian's docker-registry on a port of its own, ended with the test.
struct Server {
    child: Child,
    _dir: tempfile::TempDir,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

async fn server() -> Server {
    let dir = tempfile::tempdir().expect("directory");
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let address = format!("127.0.0.1:{port}");
    let config = dir.path().join("config.yml");
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n",
        dir.path().join("data").display()
    );
    std::fs::write(&config, text).expect("configuration");
    let child = Command::new("/usr/bin/docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("docker-registry (Debian: docker-registry)");
    let server = Server { child, _dir: dir, address };
    let deadline = Instant::now() + Duration::from_secs(30);
    while tokio::net::TcpStream::connect(&server.address).await.is_err() {
        assert!(Instant::now() < deadline, "the registry does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server
}

#[tokio::test]
async fn a_real_registry_conforms() {
    let server = server().await;
    let world = world(format!("{}/shop/api", server.address), true).await;
    conforms(&OciRegistry::new(OciConfig::default()).expect("registry"), &world).await;
}

#[tokio::test]
async fn a_registry_that_is_not_there_may_come_back() {
    let server = server().await;
    let address = server.address.clone();
    drop(server);
    let digest = Digest::new(format!("sha256:{}", "0".repeat(64))).expect("digest");
    let image = ImageId::Manifest { repository: format!("{address}/a"), digest };
    let fault = OciRegistry::new(OciConfig::default()).expect("registry").resolve(&image).await.expect_err("gone");
    assert_eq!(fault.class, Class::Transient, "{}", fault.chain());
}
