//! Images that a container is to be made from: present on the engine, or pulled by digest.

use bollard::auth::DockerCredentials;
use bollard::query_parameters::CreateImageOptions;
use futures_util::TryStreamExt as _;
use replank_core::fault::{Class, Fault};
use replank_core::image::ImageId;
use replank_core::words::Digest;

use super::DockerPlatform;
use crate::engine::{Engine, classify, is_missing};
use crate::oci::{OciClient, registry_host};

const PROTECT: &str = "build the release again; protect images from `docker image prune` by their replank-keep tags";

/// The engine's id of an image. An image of a registry that the engine lacks is pulled by its digest; one that was only
/// ever in the engine cannot come back.
pub(super) async fn image_id(platform: &DockerPlatform, engine: &Engine, image: &ImageId) -> Result<String, Fault> {
    let reference = image.reference();
    if let Some(id) = present(engine, &reference).await? {
        return Ok(id);
    }
    let gone = || Fault::permanent(format!("the engine does not have the image {image}")).advice(PROTECT);
    match image {
        ImageId::Engine { .. } => Err(gone()),
        ImageId::Manifest { repository, digest } => {
            pull(platform, engine, repository, digest).await?;
            present(engine, &reference).await?.ok_or_else(gone)
        }
    }
}

async fn pull(platform: &DockerPlatform, engine: &Engine, repository: &str, digest: &Digest) -> Result<(), Fault> {
    let credentials = registry_host(repository).and_then(|host| {
        let found = platform.registries.credentials.get(host)?;
        Some(DockerCredentials {
            username: Some(found.username.clone()),
            password: Some(found.password.clone()),
            serveraddress: Some(host.to_owned()),
            ..DockerCredentials::default()
        })
    });
    let reference = format!("{repository}@{digest}");
    let options = CreateImageOptions { from_image: Some(reference.clone()), ..Default::default() };
    let pulled =
        engine.docker().create_image(Some(options), None, credentials).try_for_each(|_| async { Ok(()) }).await;
    let Err(error) = pulled else { return Ok(()) };
    let fault = classify(error, &format!("the image {reference} cannot be pulled"));
    // The engine wraps whatever a registry answers into its own errors, most of them as text alone: the registry is asked.
    let asked = match registry_host(repository) {
        Some(_) => OciClient::new(platform.registries.clone())?.head(repository, digest.as_str()).await,
        None => return Err(fault),
    };
    let with = |class, advice: String| Fault { class, advice, ..fault };
    Err(match asked {
        Err(told) => {
            let said = told.chain();
            with(told.class, told.advice.clone()).because(said)
        }
        Ok(None) => with(Class::Permanent, format!("the registry does not have it any more: {PROTECT}")),
        Ok(Some(_)) => with(Class::Transient, "look at the engine's log: the registry does have it".to_owned()),
    })
}

async fn present(engine: &Engine, reference: &str) -> Result<Option<String>, Fault> {
    match engine.docker().inspect_image(reference).await {
        Ok(image) => Ok(image.id),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(classify(error, &format!("the image {reference} cannot be inspected"))),
    }
}
