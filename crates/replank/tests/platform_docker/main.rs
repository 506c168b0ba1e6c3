//! The platform port's conformance suite, against a real engine and the real proxy.

mod fixture;
mod inside;
mod registry;
mod rules;
mod steps;

use std::collections::BTreeSet;

use fixture::{App, docker_in, engine_socket};
use replank_adapters::platform::docker::config::{MountConfig, SecretSource};
use replank_adapters::platform::docker::{DockerPlatform, Vantage, names};
use replank_core::fault::Class;
use replank_core::ports::{Ask, Change, Observation, Platform as _, Probed, Running};
use replank_core::record::{Deployment, Overlap};
use replank_core::words::{ContainerName, RevisionId};
use replank_testbed::{Engine, EngineOptions};

pub(crate) fn all(deployment: &Deployment) -> BTreeSet<ContainerName> {
    deployment.plan.containers.keys().cloned().collect()
}

pub(crate) fn start(deployment: &Deployment) -> Change {
    Change::Start { deployment: deployment.clone(), containers: all(deployment) }
}

pub(crate) fn stop(deployment: &Deployment) -> Change {
    Change::Stop { deployment: deployment.clone(), containers: all(deployment) }
}

pub(crate) fn shift(to: &Deployment, generation: u64, fallback: Option<&Deployment>) -> Change {
    Change::Shift { to: to.clone(), generation, fallback: fallback.cloned() }
}

pub(crate) fn settle(deployment: &Deployment, not: &[&Deployment], generation: u64) -> Change {
    let not = not.iter().map(|d| d.revision.clone()).collect();
    Change::Settle { deployment: deployment.clone(), not, generation }
}

pub(crate) fn name(text: &str) -> ContainerName {
    ContainerName::new(text).expect("name")
}

#[tokio::test(flavor = "multi_thread")]
async fn started_twice_is_started_once_and_seen_as_it_is() {
    let app = App::new("once").await;
    let blue = app.deployment("r1", "0.1.0").await;
    app.does(&start(&blue)).await;
    let ids = app.state("{{.Id}} {{.State.StartedAt}}", &blue);
    app.does(&start(&blue)).await;
    assert_eq!(app.state("{{.Id}} {{.State.StartedAt}}", &blue), ids);
    app.does(&shift(&blue, 1, None)).await;

    let seen = app.until_passed(&blue).await;
    assert_eq!(seen.traffic.revision.as_ref(), Some(&blue.revision));
    assert_eq!((seen.traffic.generation, seen.traffic.fallback), (1, None));
    let revision = &seen.revisions[&blue.revision];
    assert_eq!(revision.key.as_ref(), Some(&blue.key));
    assert_eq!(revision.commit.as_ref(), Some(&blue.commit));
    assert_eq!(revision.containers.len(), 2);
    for (name, container) in &revision.containers {
        assert_eq!(container.image, blue.images[&blue.plan.containers[name].component]);
        assert_eq!((container.running, &container.trouble), (Running::Running, &None));
    }
    assert!(!revision.returns_alone && revision.stopped_at.is_none());

    // The same look with another version expected is a failure that names both.
    let wrong = Deployment { version: "0.9.0".parse().expect("version"), ..blue.clone() };
    let ask = Ask { direct: vec![wrong.clone()], through: Some(wrong) };
    let seen = app.platform.observe(&ask).await.expect("observe");
    for probed in [&seen.revisions[&blue.revision].probed, &seen.traffic.probed] {
        assert!(matches!(probed, Probed::Failed(why) if why.contains("version 0.1.0, expected 0.9.0")), "{probed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_stale_change_of_traffic_is_refused() {
    let app = App::new("stale").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&blue, 4, None)).await;
    app.does(&shift(&green, 5, Some(&blue))).await;
    for late in [shift(&blue, 4, None), shift(&blue, 5, None), settle(&blue, &[&green], 4), settle(&blue, &[], 5)] {
        let fault = app.platform.change(&late).await.expect_err("stale");
        assert_eq!(fault.class, Class::Conflict, "{}", fault.chain());
    }
    assert_eq!(app.serves().await, "0.2.0");
    app.does(&shift(&green, 5, Some(&blue))).await;
    app.does(&settle(&green, &[&blue], 6)).await;
    let seen = app.until_passed(&green).await;
    assert_eq!((seen.traffic.generation, seen.traffic.fallback), (6, None));
    assert!(seen.revisions[&green.revision].returns_alone);
    assert!(!seen.revisions[&blue.revision].returns_alone);
    // Settled again is settled once.
    app.does(&settle(&green, &[&blue], 6)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_alike_is_never_replaced() {
    let app = App::new("alike").await;
    let blue = app.deployment("r1", "0.1.0").await;
    let taken = names::container(&app.config.application, &blue.revision, &name("web"));
    let foreign = app.docker(&["create", "--name", &taken, &app.image("0.1.0"), "sleep", "60"]);
    for change in [start(&blue), stop(&blue), shift(&blue, 1, None)] {
        let fault = app.platform.change(&change).await.expect_err("look-alike");
        assert_eq!(fault.class, Class::Conflict, "{}", fault.chain());
        assert!(fault.what.contains(&taken), "{fault}");
    }
    // Neither seen nor removed.
    app.does(&Change::Remove { revision: blue.revision.clone() }).await;
    assert!(app.platform.observe(&Ask::default()).await.expect("observe").revisions.is_empty());
    assert_eq!(app.docker(&["inspect", "-f", "{{.Id}}", &taken]), foreign);
    app.docker(&["rm", "-f", &taken]);

    // Ours by installation, but of another operation.
    app.does(&start(&blue)).await;
    let other = app.deployment_with("r1", "0.1.0", "another-job").await;
    let fault = app.platform.change(&start(&other)).await.expect_err("another key");
    assert_eq!(fault.class, Class::Conflict);
    // A network under our name that is not ours.
    let green = app.deployment("r2", "0.2.0").await;
    let network = names::network(&app.config.application, &green.revision);
    app.docker(&["network", "create", &network]);
    let fault = app.platform.change(&start(&green)).await.expect_err("foreign network");
    assert!(fault.class == Class::Conflict && fault.what.contains(&network), "{fault}");
    app.docker(&["network", "rm", &network]);
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_takes_a_revision_and_nothing_else() {
    let app = App::new("gone").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&green, 2, Some(&blue))).await;
    // What takes traffic, or would after a restart, stays.
    for revision in [&blue.revision, &green.revision] {
        let fault = app.platform.change(&Change::Remove { revision: revision.clone() }).await.expect_err("routed");
        assert_eq!(fault.class, Class::Conflict);
    }
    app.does(&shift(&green, 3, None)).await;
    let inside = app.platform_at(Vantage::Inside(blue.revision.clone()));
    let fault = inside.change(&Change::Remove { revision: blue.revision.clone() }).await.expect_err("myself");
    assert_eq!(fault.class, Class::Conflict);
    // Labelled like ours, of another installation.
    let label = |key: &str, value: &str| format!("io.replank.{key}={value}");
    let application = app.config.application.to_string();
    let foreign = app.docker(&[
        "create",
        "--label",
        &label("installation", "someoneelse00000"),
        "--label",
        &label("application", &application),
        "--label",
        &label("revision", "r1"),
        "--label",
        &label("role", "app"),
        &app.image("0.1.0"),
        "sleep",
        "1",
    ]);
    // One that was under way when a rollback began comes late: what that started stays.
    let late = app.platform.change(&Change::Remove { revision: blue.revision.clone() }).await.expect_err("it runs");
    assert_eq!(late.class, Class::Conflict, "{}", late.chain());
    assert_eq!(app.state("{{.State.Running}}", &blue), ["true", "true"]);
    app.does(&stop(&blue)).await;
    for _ in 0..2 {
        app.does(&Change::Remove { revision: blue.revision.clone() }).await;
    }
    let left = app.platform.observe(&Ask::default()).await.expect("observe");
    assert_eq!(left.revisions.keys().collect::<Vec<_>>(), [&green.revision]);
    assert_eq!(app.serves().await, "0.2.0");
    assert_eq!(app.docker(&["inspect", "-f", "{{.Id}}", &foreign]), foreign);
    app.docker(&["rm", &foreign]);
    let networks = app.docker(&["network", "ls", "--format", "{{.Name}}"]);
    assert!(!networks.lines().any(|n| n == names::network(&app.config.application, &blue.revision)), "{networks}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_seen_is_what_the_engine_says() {
    let app = App::with("seen", |config| {
        let run = config.containers.get_mut(&name("worker")).expect("worker");
        run.command = Some(vec!["sh".into(), "-c".into(), "exit 3".into()]);
    })
    .await;
    let blue = app.deployment("r1", "0.1.0").await;
    let seen = app.platform.observe(&Ask { direct: vec![blue.clone()], through: None }).await.expect("observe");
    assert!(seen.revisions.is_empty() && seen.traffic.revision.is_none());
    app.does(&start(&blue)).await;
    app.until_exited(&blue, "worker").await;
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    let worker = &seen.revisions[&blue.revision].containers[&name("worker")];
    assert_eq!((worker.running, worker.exit_code), (Running::Stopped, Some(3)));
    assert!(worker.trouble.as_ref().is_some_and(|t| t.contains("code 3")), "{worker:?}");
    assert_eq!(seen.revisions[&blue.revision].stopped_at, None, "one still runs");

    let before = seen.at;
    for _ in 0..2 {
        app.does(&stop(&blue)).await;
    }
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    let revision = &seen.revisions[&blue.revision];
    let web = &revision.containers[&name("web")];
    assert_eq!((web.running, &web.trouble), (Running::Stopped, &None));
    assert!(revision.stopped_at.is_some_and(|at| at >= before), "{revision:?}");
    // What is stopped is started again, not made again.
    let ids = app.state("{{.Id}}", &blue);
    app.does(&start(&blue)).await;
    assert_eq!(app.state("{{.Id}}", &blue), ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_given_to_the_container_and_to_nobody_else() {
    const VALUE: &str = "hunter2-very-secret";
    let secrets = tempfile::tempdir().expect("directory");
    let file = secrets.path().join("token");
    std::fs::write(&file, format!("{VALUE}\n")).expect("write");
    let source = SecretSource::File(file.clone());
    let app = App::with("secret", |config| {
        let run = config.containers.get_mut(&name("web")).expect("web");
        run.secrets.insert("TOKEN".to_owned(), source);
    })
    .await;
    let blue = app.deployment("r1", "0.1.0").await;
    app.does(&start(&blue)).await;
    let web = names::container(&app.config.application, &blue.revision, &name("web"));
    assert_eq!(app.docker(&["exec", &web, "sh", "-c", "echo $TOKEN"]), VALUE);
    let hatch = app.platform.escape_hatch(&blue, None, 1);
    let told = [
        serde_json::to_string(&blue).expect("json"),
        app.docker(&["inspect", "-f", "{{json .Config.Labels}}", &web]),
        format!("{hatch:?}"),
        format!("{:?}", app.platform.observe(&Ask::default()).await.expect("observe")),
    ];
    for text in told {
        assert!(!text.contains(VALUE), "{text}");
    }
    assert!(blue.plan.spec.to_string().contains("token"), "the reference is stored");
    std::fs::remove_file(&file).expect("remove");
    let green = Deployment { revision: RevisionId::new("r2").expect("revision"), ..blue };
    let fault = app.platform.change(&start(&green)).await.expect_err("no secret");
    assert!(fault.class == Class::Permanent && fault.what.contains("TOKEN"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_escape_hatch_works_with_replank_gone() {
    let app = App::new("hatch").await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&green, 2, None)).await;
    app.does(&settle(&green, &[&blue], 3)).await;
    app.does(&stop(&blue)).await;
    let hatch = app.platform.escape_hatch(&blue, Some(&green), 3);
    for round in ["stopped", "gone"] {
        for command in &hatch.commands {
            app.shell(command);
        }
        assert_eq!(app.serves().await, "0.1.0", "{round}");
        // What was made by hand is recognized as what it is.
        let seen = app.until_passed(&blue).await;
        assert!(seen.revisions[&blue.revision].returns_alone, "{round}");
        let green_seen = &seen.revisions[&green.revision];
        assert!(!green_seen.returns_alone && green_seen.stopped_at.is_some(), "{round}: {green_seen:?}");
        let next = seen.traffic.generation + 1;
        app.does(&start(&green)).await;
        app.does(&shift(&green, next, None)).await;
        app.does(&settle(&green, &[&blue], next + 1)).await;
        for container in all(&blue) {
            app.docker(&["rm", "-f", &names::container(&app.config.application, &blue.revision, &container)]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_inside_are_the_revision_s_own_and_outside_what_serves() {
    // A name that sorts before everything that a private network could be called without care.
    let shared = format!("aaa-{}", std::process::id());
    let socket = engine_socket();
    docker_in(&socket, &["network", "create", &shared]);
    let with = shared.clone();
    let app = App::with("names", move |config| {
        config.networks.insert(with.clone());
        for run in config.containers.values_mut() {
            run.networks.insert(with.clone());
        }
        // On a shared network the component answers on the listener's port inside the proxy.
        config.listeners.get_mut("web").expect("web").listen = Some(8080);
    })
    .await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&start(&green)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.until_passed(&blue).await;
    let get = ["wget", "-q", "-O", "-", "http://web:8080/version.json"];
    for deployment in [&blue, &green] {
        let worker = names::container(&app.config.application, &deployment.revision, &name("worker"));
        for _ in 0..5 {
            let answer = app.docker(&[&["exec", &worker], &get[..]].concat());
            assert!(answer.contains(&deployment.version.to_string()), "{}: {answer}", deployment.revision);
        }
    }
    let image = app.image("0.1.0");
    let outside = [&["run", "--rm", "--network", &shared, &image][..], &get[..]].concat();
    assert!(app.docker(&outside).contains("0.1.0"));
    app.does(&shift(&green, 2, None)).await;
    assert!(app.docker(&outside).contains("0.2.0"));
    drop(app);
    docker_in(&socket, &["network", "rm", &shared]);
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_come_and_go_without_a_failed_request() {
    let app = App::new("calm").await;
    let blue = app.deployment("r1", "0.1.0").await;
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.until_passed(&blue).await;
    let load = app.load();
    let mut generation = 1;
    for round in 2..4_u32 {
        let next = app.deployment(&format!("r{round}"), "0.2.0").await;
        app.does(&start(&next)).await;
        app.until_direct(&next).await;
        generation += 1;
        app.does(&shift(&next, generation, Some(&blue))).await;
        generation += 1;
        app.does(&shift(&blue, generation, None)).await;
        app.does(&stop(&next)).await;
        app.does(&Change::Remove { revision: next.revision }).await;
    }
    let (sent, failed) = load.finish();
    assert!(sent > 50, "only {sent} requests");
    assert_eq!(failed, Vec::<String>::new(), "of {sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_engine_died_the_proxy_and_what_was_settled_return_alone() {
    let engine = Engine::start(&EngineOptions::default()).expect("engine");
    let app = App::on(engine.socket(), "reboot", |_| ()).await;
    let (blue, green) = (app.deployment("r1", "0.1.0").await, app.deployment("r2", "0.2.0").await);
    app.does(&start(&blue)).await;
    app.does(&shift(&blue, 1, None)).await;
    app.does(&settle(&blue, &[], 2)).await;
    app.does(&start(&green)).await;
    // Inside a confirm window: green takes the traffic, blue is what a reboot brings back.
    app.does(&shift(&green, 3, Some(&blue))).await;
    app.until_passed(&green).await;
    // Only the engine's own processes end: it finds containers that ran on without it.
    engine.kill().and_then(|()| engine.start_again()).expect("engine again");
    app.until_serves("0.1.0").await;
    // What serves may be there before the rest of its revision.
    let whole =
        |seen: &Observation| seen.revisions[&blue.revision].containers.values().all(|c| c.running == Running::Running);
    let seen = app.until_seen(&Ask::default(), whole).await;
    let any = |seen: &Observation, d: &Deployment| {
        seen.revisions[&d.revision].containers.values().any(|c| c.running == Running::Running)
    };
    assert!(!any(&seen, &green), "{seen:?}");
    assert_eq!(seen.traffic.fallback.as_ref(), Some(&blue.revision));
    assert_eq!(seen.traffic.revision.as_ref(), Some(&blue.revision));
    // A settle after it makes green the one that returns.
    app.does(&start(&green)).await;
    app.does(&shift(&green, 4, Some(&blue))).await;
    app.does(&settle(&green, &[&blue], 5)).await;
    // As if the power had gone.
    engine.kill_everything().and_then(|()| engine.start_again()).expect("engine again");
    app.until_serves("0.2.0").await;
    let seen = app.platform.observe(&Ask::default()).await.expect("observe");
    assert!(any(&seen, &green) && !any(&seen, &blue), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_made_once_and_never_changed_by_the_way() {
    let app = App::new("proxy").await;
    let proxy = names::proxy(&app.config.application);
    let id = app.docker(&["inspect", "-f", "{{.Id}}", &proxy]);
    app.platform.ensure_proxy(&app.proxy_image).await.expect("again");
    assert_eq!(app.docker(&["inspect", "-f", "{{.Id}}", &proxy]), id);
    let facts = app.docker(&[
        "inspect", "-f",
        "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}} {{.HostConfig.Privileged}} {{len .Mounts}}",
        &proxy,
    ]);
    assert_eq!(facts, "true [ALL] [NET_BIND_SERVICE] false 1");
    let mut other = app.config.clone();
    other.listeners.get_mut("web").expect("web").publish += 1;
    let other = DockerPlatform::new(other, Vantage::Host, app.clock()).expect("platform");
    let fault = other.ensure_proxy(&app.proxy_image).await.expect_err("other listeners");
    assert!(
        fault.class == Class::Permanent && fault.advice.contains("leave [listeners], [proxy] and home as they were"),
        "{}",
        fault.chain()
    );
    let fault = app.platform.ensure_proxy(&app.image("0.1.0")).await.expect_err("other image");
    assert!(fault.advice.contains("replank proxy upgrade"), "{}", fault.chain());
    assert_eq!(app.docker(&["inspect", "-f", "{{.Id}}", &proxy]), id);

    // A home that is not root's: the proxy runs as its owner, as it has no power to reach into another's directory.
    app.docker(&["rm", "--force", &proxy]);
    let directory = app.config.proxy_dir();
    std::fs::remove_dir_all(&directory).expect("removed");
    std::fs::create_dir(&directory).expect("made");
    std::os::unix::fs::chown(&directory, Some(4242), Some(4243)).expect("given away");
    app.platform.ensure_proxy(&app.proxy_image).await.expect("it answers");
    assert_eq!(app.docker(&["inspect", "-f", "{{.Config.User}}", &proxy]), "4242:4243");

    // One that cannot answer is told at once, with its own words.
    app.docker(&["rm", "--force", &proxy]);
    std::fs::remove_file(app.config.control_socket()).expect("removed");
    std::fs::create_dir(app.config.control_socket()).expect("in its way");
    let fault = app.platform.ensure_proxy(&app.proxy_image).await.expect_err("no proxy");
    println!("{}", fault.chain());
    assert!(fault.what.contains("does not answer") && fault.what.contains("control.sock"), "{}", fault.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_bends_its_probes_and_nothing_else() {
    let app = App::new("bend").await;
    let check = |manifest: serde_json::Value| app.plan_of(manifest);
    let spec = check(serde_json::json!({"probes": {"web": {"path": "/x", "expect_status": 204}}, "notes": "n"}));
    assert!(spec.await.expect("plan").spec.to_string().contains("\"/x\""));
    for (manifest, word) in [
        (serde_json::json!({"probes": {"web": {"port": 1}}}), "may not"),
        (serde_json::json!({"probes": {"worker": {"path": "/"}}}), "worker"),
        (serde_json::json!({"probes": {"nobody": {"path": "/"}}}), "nobody"),
        (serde_json::json!({"probes": {"web": {"path": "x"}}}), "path"),
        (serde_json::json!({"probes": {"web": {"path": "/a\r\nb"}}}), "path"),
        (serde_json::json!({"probes": {"web": {"expect_status": 500}}}), "may not"),
        (serde_json::json!({"probes": {"web": {"version": "none"}}}), "proof"),
        (serde_json::json!({"probes": {"web": {"timeout_ms": 1}}}), "timeout"),
    ] {
        let fault = check(manifest.clone()).await.expect_err("refused");
        assert!(fault.class == Class::Permanent && fault.chain().contains(word), "{manifest}: {}", fault.chain());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overlap_follows_from_what_a_container_can_do_twice() {
    let app = App::new("overlap").await;
    let web = &app.config.containers[&name("web")];
    let mount = |read_only| MountConfig { source: "/srv".into(), target: "/srv".into(), read_only };
    let mut writes = web.clone();
    writes.mounts.push(mount(false));
    let mut reads = web.clone();
    reads.mounts.push(mount(true));
    let mut controller = writes.clone();
    controller.controller = true;
    let mut told = writes.clone();
    told.overlap = Some(Overlap::StartAfterCutover);
    for (run, expect) in [
        (web, Overlap::Allowed),
        (&writes, Overlap::StopOldFirst),
        (&reads, Overlap::Allowed),
        (&controller, Overlap::Allowed),
        (&told, Overlap::StartAfterCutover),
        (&app.config.containers[&name("worker")], Overlap::StopOldFirst),
    ] {
        assert_eq!(run.overlap_rule(), expect);
    }
}
