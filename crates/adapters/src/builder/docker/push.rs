//! Pushes a built image; its digest is what the registry says under the attempt's tag, and the engine must agree.

use bollard::auth::DockerCredentials;
use bollard::errors::Error;
use bollard::query_parameters::PushImageOptionsBuilder;
use futures_util::StreamExt as _;
use replank_core::fault::Fault;
use replank_core::ports::{BuildSpec, Log, Stream};
use replank_core::words::Digest;

use super::{DockerBuilder, Names};
use crate::engine::classify;
use crate::oci::registry_host;

impl DockerBuilder {
    pub(super) async fn push(&self, spec: &BuildSpec, names: &Names, log: &dyn Log) -> Result<Digest, Fault> {
        let repository = &spec.recipe.repository;
        let say = |text: String| log.write(Stream::Stdout, format!("{text}\n").as_bytes());
        say(format!("POST /images/{repository}/push tag={}", names.attempt_tag));
        let credentials = registry_host(repository).and_then(|host| {
            let found = self.registry.credentials().get(host)?;
            Some(DockerCredentials {
                username: Some(found.username.clone()),
                password: Some(found.password.clone()),
                serveraddress: Some(host.to_owned()),
                ..DockerCredentials::default()
            })
        });
        let options = PushImageOptionsBuilder::default().tag(&names.attempt_tag).build();
        let mut messages = std::pin::pin!(self.engine.docker().push_image(repository, Some(options), credentials));
        while let Some(message) = messages.next().await {
            let message = match message {
                Ok(message) => message,
                Err(Error::DockerStreamError { error }) => return Err(self.push_failure(spec, error).await),
                Err(error) => {
                    // Pushing again is harmless, so what may have happened need not be told from what did not.
                    let mut fault =
                        classify(error, &format!("the push of {} to {repository} broke off", spec.component));
                    if fault.class == replank_core::fault::Class::Indeterminate {
                        fault.class = replank_core::fault::Class::Transient;
                    }
                    return Err(fault);
                }
            };
            // Layer states come many times a second; those with numbers are only progress.
            let moving = message.progress_detail.is_some_and(|p| p.current.is_some());
            if let Some(status) = message.status.filter(|_| !moving) {
                let text: String = status.chars().take(200).collect();
                say(format!("push: {text}"));
            }
        }
        self.agree(spec, names, &say).await
    }

    /// Compares what registry and engine say, and gives the version's tag to the image for people.
    async fn agree(&self, spec: &BuildSpec, names: &Names, say: &(dyn Fn(String) + Sync)) -> Result<Digest, Fault> {
        let repository = &spec.recipe.repository;
        let Some(manifest) = self.registry.manifest(repository, &names.attempt_tag).await? else {
            return Err(Fault::transient(format!("the registry does not have {} after the push", names.attempt)));
        };
        let expected = format!("{repository}@{}", manifest.digest);
        let local = self.inspect(&names.attempt).await?;
        let digests = local.map(|l| l.digests).unwrap_or_default();
        if !digests.contains(&expected) {
            return Err(Fault::permanent(format!(
                "the registry has {} as {}, but the engine pushed {}",
                names.attempt,
                manifest.digest,
                digests.join(", ")
            ))
            .advice(
                "somebody else writes to this repository under unguessable names, or the registry is damaged: check it",
            ));
        }
        let tagged =
            self.registry.put_manifest(repository, &names.version_tag, &manifest.media_type, &manifest.bytes).await;
        if let Err(fault) = tagged {
            say(format!("the tag {} could not be set, which does no harm: {}", names.version_tag, fault.chain()));
        }
        Ok(manifest.digest)
    }

    /// The engine reports a refused push as text alone, so the registry is asked itself, with a push that is given up.
    async fn push_failure(&self, spec: &BuildSpec, error: String) -> Fault {
        let what = format!("the push of {} to {} failed", spec.component, spec.recipe.repository);
        match self.registry.try_upload(&spec.recipe.repository).await {
            Err(asked) => Fault { class: asked.class, what, advice: asked.advice.clone(), source: None }
                .because(format!("{error}; {}", asked.chain())),
            Ok(()) => Fault::transient(what).because(error),
        }
    }
}
