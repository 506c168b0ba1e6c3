//! A registry that refuses, and an engine that goes away in the middle of a build.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::process::Output;
use std::time::Duration;

use replank_testbed::Registry;
use replank_testbed::liar::Liar;
use replank_testbed::repo::Entry;
use serde_json::Value;

use crate::rig::{JOB_LIMIT, Options, Rig, get, refused, release, said};

fn with_registry(host: &str, budgets: &'static str) -> Options {
    Options {
        tables: format!("[registry]\nhost = \"{host}\"\npush = true\ninsecure = true\n"),
        budgets,
        ..Options::default()
    }
}

#[test]
fn a_registry_that_is_away_is_waited_for_inside_the_budget() {
    let registry = Registry::start(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let mut rig = Rig::start(with_registry(&registry.name(), "building_seconds = 12"));
    registry.stop().unwrap();
    rig.publish("0.1.1", &release("0.1.1"));
    rig.fails("0.1.1", &["'building' took longer than its budget of 12 s", "app", &registry.name()]);

    // Back within the budget: nobody notices.
    rig.publish("0.1.2", &release("0.1.2"));
    rig.begin("0.1.2");
    std::thread::sleep(Duration::from_secs(3));
    registry.start_again().unwrap();
    if let Some(watch) = rig.watch.take() {
        drop(watch);
    }
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    rig.goes_on("0.2.0");
}

#[test]
fn a_registry_that_wants_a_sign_in_is_told_at_once() {
    // Takes the first deployment's build nowhere: the very first job must say so too, on the command line of `deploy`.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 2048];
            // Whatever is asked; a client that hangs up is none of ours.
            if stream.read(&mut head).is_ok() {
                let body = "{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"authentication required\"}]}";
                write!(
                    stream,
                    "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"registry\"\r\nContent-Type: \
                     application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                )
                .ok();
            }
        }
    });
    let rig = Rig::prepare(with_registry(&host, ""));
    let out = rig.cli(&["deploy", "0.1.0"]);
    refused(&out, 1, &["failed_pre", &host, "401", "credentials"]);
    // A script reads the same in rows, as from `start --json`. Standard error ends with the one error; nothing there is told
    // to people but warnings.
    let out = rig.cli(&["deploy", "0.1.0", "--json"]);
    assert_eq!(out.status.code(), Some(1), "{}", said(&out));
    let rows = rows(&out);
    let (first, last) = (&rows[0], &rows[rows.len() - 1]);
    assert!(rows.len() > 2 && first["state"] == "queued", "{rows:?}");
    assert_eq!((&last["state"], &last["target_version"]), (&"failed_pre".into(), &"0.1.0".into()), "{last}");
    assert!(last["failure"].as_str().unwrap().contains("401") && last["running_version"] == "", "{last}");
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!told.contains(" s  building"), "{told}");
    let error: Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert!(error["code"] == 1 && error["error"].as_str().unwrap().contains("credentials"), "{error}");
    // Mended, the same command goes through.
    let config = rig.home.join("replank.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("push = true", "push = false")).unwrap();
    let out = rig.cli(&["deploy", "0.1.0", "--json"]);
    assert!(out.status.success() && !said(&out).contains("runs as revision"), "{}", said(&out));
    let rows = self::rows(&out);
    let last = &rows[rows.len() - 1];
    assert_eq!((&last["state"], &last["running_version"]), (&"succeeded".into(), &"0.1.0".into()), "{last}");
    assert!(last["running_revision"].as_str().is_some_and(|revision| !revision.is_empty()), "{last}");
}

/// Standard output as rows, one on each line.
fn rows(out: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_rollback_needs_no_registry_until_an_image_is_gone_everywhere() {
    let registry = Registry::start(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let mut rig = Rig::start(with_registry(&registry.name(), ""));
    // It wants 0.1.0 all the time.
    rig.watch = None;
    rig.publish("0.2.0", &release("0.2.0"));
    let row = rig.run("0.2.0");
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    let preflight =
        |rig: &Rig| -> Value { serde_json::from_str(&rig.get("/api/upgrade/rollback-preflight").1).unwrap() };

    registry.stop().unwrap();
    let found = preflight(&rig);
    assert!(found["available"] == true && found["images"][0]["exists"] == true, "{found}");
    let out = rig.cli(&["rollback", "--reason", "the registry is away"]);
    assert!(out.status.success() && said(&out).contains("0.1.0 runs"), "{}\n{}", said(&out), rig.told());
    let (code, body) = get(rig.web, "/version", "").unwrap();
    assert_eq!((code, body.trim()), (200, "version=0.1.0;"));

    registry.start_again().unwrap();
    let out = rig.cli(&["start", "0.2.0", "--yes", "--override-quarantine", "--reason", "it is there again"]);
    assert!(out.status.success(), "{}\n{}", said(&out), rig.told());
    let image = preflight(&rig)["images"][0]["image_ref"].as_str().unwrap().to_owned();
    // Gone from the registry alone: this machine can still start it.
    registry.stop().unwrap();
    std::fs::remove_dir_all(registry.storage().unwrap().join("docker")).unwrap();
    registry.start_again().unwrap();
    assert_eq!(preflight(&rig)["available"], true);
    let docker = |arguments: &[&str]| rig.engine.docker(arguments).unwrap();
    let id = docker(&["image", "inspect", "-f", "{{.Id}}", &image]);
    for container in docker(&["ps", "-aq", "--filter", &format!("ancestor={id}")]).lines() {
        docker(&["rm", "-f", container]);
    }
    docker(&["rmi", "-f", &id]);
    let found = preflight(&rig);
    let gone = &found["images"][0];
    assert!(found["available"] == false && gone["exists"] == false && gone["error"] == "", "{found}");
    let line = refused(&rig.cli(&["rollback"]), 3, &["0.1.0 is gone", &image]);
    assert!(line.contains(found["reason"].as_str().unwrap()), "{line}");
    // Nothing was touched, and whoever tried is written down.
    let (_, body) = get(rig.web, "/version", "").unwrap();
    assert_eq!((body.trim(), &rig.status()["state"]), ("version=0.2.0;", &"succeeded".into()));
    let told = said(&rig.cli(&["history", "--refusals"]));
    assert!(told.contains("admin") && told.contains("POST /api/upgrade/rollback") && told.contains(&image), "{told}");
}

#[test]
fn a_registry_in_maintenance_is_told_at_once() {
    let registry = Registry::start(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let mut rig = Rig::start(with_registry(&registry.name(), ""));
    registry.set_read_only(true).unwrap();
    rig.publish("0.1.1", &release("0.1.1"));
    // Long before the budget of half an hour: waiting would not help.
    let row = rig.fails("0.1.1", &["the push of app", &registry.name(), "405", "takes no uploads"]);
    let (_, log) = rig.log(&row);
    assert!(log.contains("takes no uploads"), "{log}");
    registry.set_read_only(false).unwrap();
    rig.goes_on("0.2.0");
}

#[test]
fn a_registry_that_shows_another_image_than_was_pushed_fails_the_job_and_both_are_named() {
    let registry = Registry::start(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let liar = Liar::start(&registry).unwrap();
    let mut rig = Rig::start(with_registry(&liar.name(), ""));
    liar.lie(true);
    rig.publish("0.1.1", &release("0.1.1"));
    let row = rig.fails("0.1.1", &["the registry has ", "but the engine pushed", "check it"]);
    // At once, and not tried again: a registry that disagrees once is not believed the second time.
    let shown = liar.shown();
    assert_eq!(shown.len(), 1, "{shown:?}");
    let told = format!("{row}");
    let (truth, lie) = &shown[0];
    assert!(told.contains(truth.as_str()) && told.contains(lie.as_str()), "{shown:?} are not both in {told}");
    liar.lie(false);
    rig.goes_on("0.2.0");
}

#[test]
fn an_engine_that_goes_away_in_a_build_is_waited_for() {
    let mut rig = Rig::start(Options::default());
    // The watch asks through the engine's own forwarder, which dies with it.
    rig.watch = None;
    let slow = "FROM testbed/busybox\nRUN sleep 6\nCOPY www /www\nCMD [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/www\"]\n";
    let mut files = release("0.1.1");
    files[0] = Entry::file("app/Dockerfile", slow);
    rig.publish("0.1.1", &files);
    rig.begin("0.1.1");
    until_state(&rig, "building");
    std::thread::sleep(Duration::from_secs(1));
    rig.engine.kill().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    // While it is away, people are told.
    let row = rig.status();
    assert_eq!(row["state"], "building", "{row}");
    eprintln!("while the engine is away: {} / {}", row["phase_detail"], row["next_action"]);
    assert!(format!("{row}").contains("the Docker engine cannot be reached"), "{row}");
    rig.engine.start_again().unwrap();
    let row = rig.end(JOB_LIMIT);
    assert_eq!(row["state"], "succeeded", "{row}\n{}", rig.told());
    let (code, body) = get(rig.web, "/version", "").unwrap();
    assert_eq!((code, body.trim()), (200, "version=0.1.1;"));
    rig.goes_on("0.2.0");
}

fn until_state(rig: &Rig, state: &str) {
    let end = std::time::Instant::now() + JOB_LIMIT;
    while rig.status()["state"] != state {
        assert!(std::time::Instant::now() < end, "never {state}: {}", rig.status());
        std::thread::sleep(Duration::from_millis(20));
    }
}
