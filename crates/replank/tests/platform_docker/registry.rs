//! Registry mode: images are deployed by digest, seen by the same digest, and pulled again when the engine lost them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use replank_adapters::builder::docker::{DockerBuilder, DockerBuilderConfig};
use replank_adapters::engine::Engine;
use replank_adapters::oci::{Credentials, OciConfig};
use replank_adapters::platform::docker::{DockerPlatform, Vantage, names};
use replank_core::fault::Class;
use replank_core::image::ImageId;
use replank_core::phase::Recipe;
use replank_core::ports::{Ask, BuildSpec, Builder as _, Change, NoLog, Platform as _, Tree};
use replank_core::record::Deployment;
use replank_core::words::{ComponentName, JobId};
use replank_testbed::registry::{PASSWORD, Registry, USER};

use crate::fixture::{App, image_context};
use crate::{shift, start};

/// Builds and pushes a release's only component, and gives the deployment of it.
async fn pushed(app: &App, registries: &OciConfig, host: &str) -> Deployment {
    let mut deployment = app.deployment("r1", "0.1.0").await;
    let context = image_context("0.1.0");
    let config = DockerBuilderConfig { push: true, registries: registries.clone(), ..DockerBuilderConfig::default() };
    let builder = DockerBuilder::new(Engine::connect(&app.config.socket).expect("engine"), config).expect("builder");
    let component = ComponentName::new("web").expect("component");
    let spec = BuildSpec {
        installation: app.config.installation.clone(),
        application: app.config.application.clone(),
        job: JobId::new("the-job").expect("job"),
        key: deployment.key.clone(),
        attempt: 1,
        resumed: false,
        component: component.clone(),
        recipe: Recipe {
            dockerfile: "Dockerfile".to_owned(),
            context: ".".to_owned(),
            target: None,
            args: BTreeMap::new(),
            platform: None,
            secrets: vec![],
            repository: format!("{host}/{}/web", app.config.application),
            unlabelled: false,
        },
        tree: Tree { path: PathBuf::from(context.path()), commit: deployment.commit.clone(), signed_by: None },
        version: deployment.version.clone(),
        remote: "https://git.example.org/app.git".to_owned(),
    };
    let built = builder.build(&spec, &NoLog).await.unwrap_or_else(|fault| panic!("{}", fault.chain()));
    assert!(matches!(built.image, ImageId::Manifest { .. }), "{:?}", built.image);
    deployment.images.insert(component, built.image);
    deployment
}

/// What the containers of a deployment really run is what was intended, in the same words.
async fn runs_as_intended(app: &App, deployment: &Deployment) {
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    let containers = &seen.revisions[&deployment.revision].containers;
    assert_eq!(containers.len(), 2);
    for (name, container) in containers {
        assert_eq!(container.image, deployment.images[&deployment.plan.containers[name].component], "{name}");
    }
}

/// The engine forgets the image under all its names.
fn lose(app: &App, image: &ImageId) {
    let id = app.docker(&["image", "inspect", "-f", "{{.Id}}", &image.reference()]);
    app.docker(&["rmi", "-f", &id]);
    let left = app.docker(&["images", "--digests", "--format", "{{.Repository}}@{{.Digest}}"]);
    assert!(!left.contains(&image.reference()), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_pushed_runs_by_digest_and_is_pulled_again() {
    let registry = Registry::start_with_sign_in(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("registry");
    let credentials = Credentials { username: USER.to_owned(), password: PASSWORD.to_owned() };
    let registries =
        OciConfig { credentials: BTreeMap::from([(registry.name(), credentials)]), ..OciConfig::default() };
    let app = App::new("digest").await;
    let blue = pushed(&app, &registries, &registry.name()).await;
    let image = blue.images.values().next().expect("image").clone();

    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.until_passed(&blue).await;
    runs_as_intended(&app, &blue).await;
    assert_eq!(app.state("{{.Config.Image}}", &blue), vec![image.reference(); 2]);

    // Made by hand there is no note of the engine's id: the engine's own list of digests tells.
    let hatch = app.platform.escape_hatch(&blue, None, 1);
    for container in ["web", "worker"] {
        app.docker(&["rm", "-f", &app.full_name(&blue, container)]);
    }
    for command in &hatch.commands {
        app.shell(command);
    }
    app.until_passed(&blue).await;
    runs_as_intended(&app, &blue).await;

    // Gone from the engine, as a careless prune would have it.
    app.docker(&["stop", "-t", "1", &names::proxy(&app.config.application)]);
    for container in ["web", "worker"] {
        app.docker(&["rm", "-f", &app.full_name(&blue, container)]);
    }
    app.docker(&["start", &names::proxy(&app.config.application)]);
    lose(&app, &image);
    let fault = app.platform.change(&start(&blue)).await.expect_err("nobody said who pulls");
    assert!(fault.class == Class::Permanent && fault.advice.contains("credentials"), "{}", fault.chain());
    let again = |registries: &OciConfig| {
        let platform = DockerPlatform::new(app.config.clone(), Vantage::Host, app.clock()).expect("platform");
        platform.with_registries(registries.clone())
    };
    registry.stop().expect("stop");
    let fault = again(&registries).change(&start(&blue)).await.expect_err("the registry is down");
    assert_eq!(fault.class, Class::Transient, "{}", fault.chain());
    assert!(!fault.chain().contains(PASSWORD));
    registry.start_again().expect("start");
    again(&registries).change(&start(&blue)).await.unwrap_or_else(|fault| panic!("{}", fault.chain()));
    app.does(&shift(&blue, 9, None)).await;
    app.until_passed(&blue).await;
    runs_as_intended(&app, &blue).await;
    let hidden = format!("{:?}", again(&registries));
    assert!(!hidden.contains(PASSWORD), "{hidden}");

    // An image that nobody has any more.
    let mut gone = app.deployment("r2", "0.1.0").await;
    if let ImageId::Manifest { repository, .. } = &image {
        let digest = format!("sha256:{}", "0".repeat(64)).parse().expect("digest");
        gone.images.insert(
            ComponentName::new("web").expect("component"),
            ImageId::Manifest { repository: repository.clone(), digest },
        );
    }
    let fault = again(&registries).change(&start(&gone)).await.expect_err("nowhere");
    assert!(fault.class == Class::Permanent && fault.advice.contains("build the release again"), "{}", fault.chain());
    app.does(&Change::Remove { revision: gone.revision }).await;
    lose_at_the_end(&app, &image);
}

/// The shared engine keeps nothing of this test but its layers.
fn lose_at_the_end(app: &App, image: &ImageId) {
    for container in ["web", "worker"] {
        let name = format!("replank-{}-r1-{container}", app.config.application);
        app.docker(&["rm", "-f", &name]);
    }
    lose(app, image);
}
