//! Data steps: a container that runs once, found again by its key. Nothing else on this platform looks at it: it is no part of what
//! a revision runs, and goes when the revision is removed.

use std::time::Duration;

use bollard::container::LogOutput;
use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum};
use bollard::query_parameters::{
    CreateContainerOptions, LogsOptionsBuilder, StartContainerOptions, StopContainerOptions,
};
use futures_util::StreamExt as _;
use replank_core::data::{DataStep, StepKind};
use replank_core::fault::Fault;
use replank_core::ports::{Log, Stream};
use replank_core::record::Deployment;
use replank_core::words::{Millis, OpKey};
use serde::Deserialize as _;
use tokio::time::{Instant, sleep, sleep_until};

use super::change::{Work, labels_of, look_alike};
use super::spec::ContainerSpec;
use super::{DockerPlatform, create, labels, names, pull};
use crate::engine::{classify, is_missing};

/// Between two looks at a container whose log has ended: it is about to end, or the engine was restarted.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(
    platform: &DockerPlatform,
    deployment: &Deployment,
    step: &DataStep,
    key: &OpKey,
    until: Millis,
    log: &dyn Log,
) -> Result<i64, Fault> {
    let engine = platform.engine()?;
    let work = Work { platform, engine: &engine };
    let full = full_name(platform, deployment, step, key);
    let deadline = Instant::now() + Duration::from_millis(until.since(platform.clock.now()));
    let found = match find(&work, &full, key).await? {
        Some(found) => found,
        None => create(&work, deployment, step, key, &full).await?,
    };
    let id = found.id.clone().unwrap_or_default();
    // Only what never ran is started: what ran and was ended, by a reboot too, has an exit code to tell.
    if status(&found) == Some(ContainerStateStatusEnum::CREATED) {
        let started = engine.docker().start_container(&id, None::<StartContainerOptions>).await;
        started.map_err(|error| classify(error, &format!("data step {full} cannot be started")))?;
    }
    follow(&work, &full, &id, deadline, log).await
}

/// A backup runs in the revision that serves, which may see many a job: each has a container of its own there. A migration runs in
/// its own job's revision.
fn full_name(platform: &DockerPlatform, deployment: &Deployment, step: &DataStep, key: &OpKey) -> String {
    let name = names::container(&platform.config.application, &deployment.revision, &step.name);
    match step.kind {
        StepKind::Backup => format!("{name}-{key}"),
        StepKind::Migrate => name,
    }
}

/// Passes the log on until the container has ended.
async fn follow(work: &Work<'_>, full: &str, id: &str, deadline: Instant, log: &dyn Log) -> Result<i64, Fault> {
    let docker = work.engine.docker();
    let options = LogsOptionsBuilder::new().follow(true).stdout(true).stderr(true).build();
    let mut lines = std::pin::pin!(docker.logs(id, Some(options)));
    let mut is_open = true;
    loop {
        tokio::select! {
            line = lines.next(), if is_open => match line {
                Some(Ok(LogOutput::StdErr { message })) => log.write(Stream::Stderr, &message),
                Some(Ok(LogOutput::StdOut { message } | LogOutput::Console { message })) => {
                    log.write(Stream::Stdout, &message);
                }
                Some(Ok(LogOutput::StdIn { .. })) => {}
                // The exit code decides; a log that breaks off does not.
                Some(Err(_)) | None => is_open = false,
            },
            () = sleep(LOOK_EVERY), if !is_open => {
                let Some(found) = work.inspect(id).await? else {
                    return Err(Fault::permanent(format!("data step {full} was removed while it ran"))
                        .advice("look at the data: nobody knows how far it came"));
                };
                let state = found.state.unwrap_or_default();
                if !state.running.unwrap_or(false) {
                    return Ok(state.exit_code.unwrap_or(-1));
                }
            }
            () = sleep_until(deadline) => {
                let options = StopContainerOptions { signal: None, t: Some(10) };
                match docker.stop_container(id, Some(options)).await {
                    Ok(()) => {}
                    Err(error) if is_missing(&error) => {}
                    Err(error) => return Err(classify(error, &format!("data step {full} cannot be stopped"))),
                }
                return Err(Fault::permanent(format!("data step {full} did not end within its budget and was stopped"))
                    .advice("raise policy.budgets.data_seconds, or look at why it takes so long"));
            }
        }
    }
}

/// The container of this very step. A conflict where something else stands under its name.
async fn find(work: &Work<'_>, full: &str, key: &OpKey) -> Result<Option<ContainerInspectResponse>, Fault> {
    let Some(found) = work.inspect(full).await? else { return Ok(None) };
    let carried = labels_of(&found);
    let is = |name: &str, value: &str| carried.get(name).is_some_and(|found| found == value);
    if work.platform.owner.owns(&carried) && is(labels::ROLE, labels::ROLE_STEP) && is(labels::KEY, key.as_str()) {
        Ok(Some(found))
    } else {
        Err(look_alike(&work.platform.owner, full, &carried))
    }
}

async fn create(
    work: &Work<'_>,
    deployment: &Deployment,
    step: &DataStep,
    key: &OpKey,
    full: &str,
) -> Result<ContainerInspectResponse, Fault> {
    let platform = work.platform;
    let spec = ContainerSpec::deserialize(&step.spec).map_err(|error| {
        Fault::permanent("the stored data step is not one that this Replank understands")
            .advice("use the Replank version that wrote it, or a newer one")
            .because(error)
    })?;
    work.private_network(&deployment.revision).await?;
    let image = create::image(deployment, &spec.run.component)?;
    let image_id = pull::image_id(platform, work.engine, image).await?;
    let mut body = create::body(platform, deployment, &step.name, &spec, &image_id)?;
    let carried = body.labels.get_or_insert_default();
    carried.insert(labels::ROLE.to_owned(), labels::ROLE_STEP.to_owned());
    carried.insert(labels::KEY.to_owned(), key.to_string());
    let options = CreateContainerOptions { name: Some(full.to_owned()), ..Default::default() };
    if let Err(error) = work.engine.docker().create_container(Some(options), body).await {
        // Somebody was faster under this name: it is adopted if it is this step.
        return match find(work, full, key).await? {
            Some(found) => Ok(found),
            None => Err(classify(error, &format!("data step {full} cannot be created"))),
        };
    }
    let gone = || Fault::conflict(format!("data step {full} was removed as soon as it was created"));
    let found = find(work, full, key).await?.ok_or_else(gone)?;
    for network in &spec.run.networks {
        work.join(network, found.id.as_deref().unwrap_or_default(), &[]).await?;
    }
    Ok(found)
}

fn status(found: &ContainerInspectResponse) -> Option<ContainerStateStatusEnum> {
    found.state.as_ref().and_then(|state| state.status)
}
