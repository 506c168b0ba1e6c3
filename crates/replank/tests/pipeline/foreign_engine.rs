//! What the demo does on somebody else's engine: it takes away what it brought, and nothing else.

use std::collections::BTreeSet;

use replank_testbed::leftovers::Leftovers;
use replank_testbed::remains::Scratch;
use replank_testbed::{Engine, EngineOptions, cleanup, images};

use crate::world::{Moment, Options, World, base_images};

/// Everything that an engine keeps for its users, and what runs.
fn inventory(engine: &Engine) -> BTreeSet<String> {
    let kinds: [(&str, &[&str]); 4] = [
        ("container", &["ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.State}}"]),
        ("image", &["images", "--all", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"]),
        ("network", &["network", "ls", "--no-trunc", "--format", "{{.ID}} {{.Name}}"]),
        ("volume", &["volume", "ls", "--format", "{{.Name}}"]),
    ];
    let mut all = BTreeSet::new();
    for (kind, arguments) in kinds {
        all.extend(engine.docker(arguments).unwrap().lines().map(|line| format!("{kind} {line}")));
    }
    all
}

/// Somebody's container, image, network and volume; another application of Replank's, and an older demo of somebody else's.
fn strangers(engine: &Engine) {
    images::busybox(engine).unwrap();
    let docker = |line: &str| engine.docker(&line.split(' ').collect::<Vec<_>>()).unwrap();
    docker("network create theirs");
    docker("volume create theirs");
    let keeps = format!("{} sleep 100000", images::BUSYBOX);
    docker(&format!("run --detach --name theirs --network theirs --volume theirs:/theirs {keeps}"));
    docker("commit theirs theirs/app:1");
    for (name, installation, application) in [("shop", "s".repeat(16), "shop"), ("earlier", "e".repeat(16), "sample")] {
        let labels =
            format!("--label io.replank.installation={installation} --label io.replank.application={application}");
        docker(&format!("network create {labels} {name}"));
        docker(&format!("run --detach --name {name} --network {name} {labels} {keeps}"));
        let label = |name, value: &str| format!("LABEL io.replank.{name}={value}");
        let (ours, of) = (label("installation", &installation), label("application", application));
        engine.docker(&["commit", "--change", &ours, "--change", &of, name, &format!("{name}/app:1")]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipeline_a_demo_on_a_found_engine_leaves_it_as_it_was() {
    cleanup::on_signals().unwrap();
    let real = Engine::start(&EngineOptions::default()).unwrap();
    strangers(&real);
    let before = inventory(&real);

    let found = Engine::attach(real.socket()).unwrap();
    assert!(found.pid().is_none() && found.stop().is_err(), "a found engine is nobody's to stop");
    let scratch = Scratch::create().unwrap();
    let place = scratch.path().to_owned();
    let leftovers = Leftovers::watch(&found, scratch.path()).unwrap();
    base_images(&found);
    // `own_engine`, so that nothing but the leftovers cleans up.
    let options = Options { own_engine: true, ..Options::default() };
    let world = World::install(found, scratch, &options);
    // In the middle of a job there is most to clean up: two revisions, and a controller that makes more.
    let job = world.start_job("v0.2.0").await;
    world.until_event(&job, Moment("observed", Some("start-new"))).await;
    let brought = inventory(&real);
    for what in
        ["replank-sample-proxy", "replank-sample-v0-1-0-", "replank-sample-v0-2-0-", images::RUNTIME, images::CC]
    {
        assert!(brought.iter().any(|line| line.contains(what)), "no {what}: {brought:#?}");
    }
    // A base image of an earlier demo loses its name for the time of this one.
    let gone: Vec<_> = before.difference(&brought).collect();
    assert!(gone.len() <= 1 && gone.iter().all(|line| line.contains(images::BUSYBOX)), "{gone:#?}");

    drop(leftovers);
    let after = inventory(&real);
    assert_eq!(before.difference(&after).collect::<Vec<_>>(), Vec::<&String>::new(), "theirs, and gone");
    assert_eq!(after.difference(&before).collect::<Vec<_>>(), Vec::<&String>::new(), "ours, and left");
    // Containers left files of their own users here; what is not this user's to remove is gone by now.
    let names: Vec<String> = std::fs::read_dir(&place)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!names.iter().any(|name| name == "home"), "{names:?}");
    drop(world);
    assert!(!place.exists());
}
