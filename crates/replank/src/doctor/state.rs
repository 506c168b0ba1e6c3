//! What Replank itself keeps and runs: the ledger, what is deployed, and the secrets that are handed on.

use std::sync::Arc;

use replank_adapters::platform::docker::spec;
use replank_adapters::platform::docker::{DockerPlatform, Vantage};
use replank_core::ports::{Ask, Ledger as _, Platform as _, Probed, RevisionSeen, Running};
use replank_core::record::{ControllerId, Deployment};

use super::{Finding, Patient};
use crate::system::SystemClock;
use crate::{assemble, verify};

/// Every secret is read from where the process that creates containers would read it.
pub async fn secrets(patient: Patient<'_>) -> Finding {
    let settings = patient.settings;
    let mut missing = Vec::new();
    let mut count = 0;
    for (name, container) in &settings.platform.containers {
        for (variable, from) in &container.secrets {
            count += 1;
            if let Err(fault) = spec::resolve(variable, from) {
                missing.push(format!("container {name}: {}", fault.told().what));
            }
        }
    }
    for (name, from) in &settings.build.secrets {
        count += 1;
        if let Err(fault) = assemble::secret(from, patient.env, &format!("build secret {name}")) {
            missing.push(fault.told().what);
        }
    }
    for listener in settings.platform.listeners.values() {
        for path in listener.tls.iter().flat_map(|tls| [&tls.certificate, &tls.key]) {
            count += 1;
            if let Err(error) = std::fs::File::open(path) {
                missing.push(format!("{} cannot be read: {error}", path.display()));
            }
        }
    }
    if missing.is_empty() {
        return Finding::ok(format!("{} can be read", crate::cli::count(count, "configured secret")));
    }
    let advice = match settings.revision {
        Some(_) => "make them available to the controller's container",
        None => {
            "make them available here; what only a controller has is seen by `docker exec CONTROLLER replank doctor`"
        }
    };
    Finding::failed(missing.join("; "), advice)
}

pub async fn ledger(patient: Patient<'_>) -> Finding {
    let directory = patient.settings.ledger_dir();
    if !directory.join(replank_adapters::sqlite::FILE).exists() {
        let place = if directory.exists() { &directory } else { &patient.settings.home };
        if let Err(fault) = replank_adapters::sqlite::check_place(place) {
            return fault.into();
        }
        // To open it would make it, and nothing is changed here.
        return Finding::warning(
            format!("there is no ledger in {} yet", directory.display()),
            "`replank deploy` or `replank serve` makes it",
        );
    }
    let (store, ledger) = match assemble::open_ledger(patient.settings).await {
        Ok(opened) => opened,
        Err(error) => return unusable(error),
    };
    if let Err(error) = store.check_whole().await {
        return unusable(error);
    }
    match verify::history(ledger.as_ref()).await {
        Ok(None) => Finding::ok("the ledger is whole and has no record yet"),
        Ok(Some(lines)) => {
            let count = crate::cli::count(usize::try_from(lines).unwrap_or(usize::MAX), "event");
            Finding::ok(format!("whole, and {count} consistent with anchor"))
        }
        Err(verify::NotVerified::Ledger(error)) => unusable(error),
        Err(broken @ verify::NotVerified::Broken(_)) => {
            Finding::failed(broken.to_string(), "see `replank history --verify`, and compare with a backup")
        }
    }
}

fn unusable(error: replank_core::ports::LedgerError) -> Finding {
    use replank_core::ports::LedgerError as E;
    match error {
        E::Unavailable(fault) | E::Indeterminate(fault) | E::Unreadable(fault) => fault.into(),
        E::Conflict => Finding::warning("the ledger changes too fast to be looked at", "look again in a moment"),
    }
}

pub async fn running(patient: Patient<'_>) -> Finding {
    let settings = patient.settings;
    if !settings.platform.runs {
        return Finding::ok("nothing is run by this configuration");
    }
    let nothing = || Finding::ok("nothing is deployed yet");
    if !settings.ledger_dir().join(replank_adapters::sqlite::FILE).exists() {
        return nothing();
    }
    let record = match assemble::open_ledger(settings).await {
        Ok((_, ledger)) => match ledger.load().await {
            Ok(Some((record, _))) => record,
            Ok(None) => return nothing(),
            Err(_) => return not_looked_at(),
        },
        Err(_) => return not_looked_at(),
    };
    let Some(running) = record.running.clone() else { return nothing() };
    let vantage = match assemble::me(settings) {
        Ok(ControllerId::Revision(revision)) => Vantage::Inside(revision),
        Ok(ControllerId::Host) | Err(_) => Vantage::Host,
    };
    let docker = DockerPlatform::new(settings.docker(record.installation.clone()), vantage, Arc::new(SystemClock));
    let ask = Ask { direct: vec![running.clone()], through: Some(running.clone()) };
    let seen = match docker {
        Ok(docker) => docker.observe(&ask).await,
        Err(fault) => Err(fault),
    };
    let seen = match seen {
        Ok(seen) => seen,
        Err(fault) => return fault.into(),
    };
    let mut wrong = Vec::new();
    match seen.revisions.get(&running.revision) {
        Some(revision) => wrong.extend(troubles(&running, revision)),
        None => wrong.push(format!("no container of revision {} is there", running.revision)),
    }
    if seen.traffic.revision.as_ref() != Some(&running.revision) {
        let to = seen.traffic.revision.as_ref().map_or("nowhere".to_owned(), |revision| format!("to {revision}"));
        wrong.push(format!("traffic goes {to}"));
    }
    if let Probed::Failed(why) = &seen.traffic.probed {
        wrong.push(format!("through the public port: {why}"));
    }
    let what = format!("{} {} as revision {}", settings.application, running.version, running.revision);
    if wrong.is_empty() {
        return Finding::ok(format!("{what} runs and answers"));
    }
    let told = format!("{what}: {}", wrong.join("; "));
    if record.phase.state().in_flight() {
        return Finding::warning(told, "a job is under way: see `replank status`");
    }
    Finding::failed(told, "look at the containers' logs with `docker logs`; `replank rollback` goes back")
}

fn not_looked_at() -> Finding {
    Finding::warning("not looked at: the ledger cannot be read", "see the check of the ledger")
}

fn troubles(running: &Deployment, seen: &RevisionSeen) -> Vec<String> {
    let mut wrong = Vec::new();
    for name in running.plan.containers.keys() {
        match seen.containers.get(name) {
            None => wrong.push(format!("container {name} is not there")),
            Some(container) if container.running != Running::Running => {
                wrong.push(format!("container {name} does not run"))
            }
            Some(container) => {
                wrong.extend(container.trouble.iter().map(|trouble| format!("container {name}: {trouble}")))
            }
        }
    }
    if let Probed::Failed(why) = &seen.probed {
        wrong.push(why.clone());
    }
    wrong
}
