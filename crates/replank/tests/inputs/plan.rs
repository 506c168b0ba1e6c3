//! What is known of a release before there is a job: the plan, and starts that are refused by it.

use replank_testbed::repo::Entry;
use serde_json::Value;

use crate::rig::{Options, Rig, refused, release, said};

fn plan(rig: &Rig, arguments: &[&str], code: i32) -> Value {
    let out = rig.cli(&[&["plan"], arguments, &["--json"]].concat());
    assert_eq!(out.status.code(), Some(code), "{}", said(&out));
    serde_json::from_slice(&out.stdout).expect("a plan")
}

/// A release with this manifest is planned and started: both are refused with all of `parts`, and no job begins.
fn stands_against(rig: &mut Rig, version: &str, manifest: &str, parts: &[&str]) {
    let mut files = release(version);
    files.push(Entry::file(".replank.toml", manifest));
    rig.publish(version, &files);
    rig.until_offered(version);
    let shown = plan(rig, &[version], 3);
    let told = shown["refused"].to_string();
    parts.iter().for_each(|part| assert!(told.contains(part), "{version}: {part:?} is not in {told}"));
    let job = rig.status()["job_id"].clone();
    let why = refused(&rig.cli(&["start", version, "--yes", "--no-wait"]), 3, &[]);
    parts
        .iter()
        .for_each(|part| assert!(why.contains(&part.replace("\\\"", "\"")), "{version}: {part:?} is not in {why}"));
    assert_eq!(rig.status()["job_id"], job, "no job was begun");
}

#[test]
fn what_a_release_says_of_itself_refuses_a_start_before_there_is_a_job() {
    let mut rig = Rig::start(Options::default());
    let odd = "mounts = [\"/:/host\"]\nnotes = 7\n";
    stands_against(&mut rig, "0.1.1", odd, &["0.1.1", "mounts", "; and .replank.toml:2:", "notes"]);
    let needs = "[requires]\nenvironment = [\"NO_SUCH_KEY\"]\nreplank = \"99.0.0\"\n";
    stands_against(&mut rig, "0.1.2", needs, &["NO_SUCH_KEY", "needs Replank 99.0.0"]);
    stands_against(&mut rig, "0.1.3", "upgrade_from = \"0.1.2\"\n", &["upgrade to 0.1.2 first"]);
    stands_against(&mut rig, "0.1.4", "schema = \"one-way\"\n", &["closes the way back to 0.1.0", "--accept-one-way"]);
    plan(&rig, &["0.1.4", "--accept-one-way"], 0);

    // One that nothing stands against, with words that would like to steer a terminal.
    let hostile = "token=hunter2hunter2 \u{1b}[2Jand \u{202e}more";
    let manifest = format!(
        "notes = {}\n[components.app]\nargs = {{ FLAVOUR = \"sweet\" }}\n[probes.app]\ntimeout_ms = 4321\n",
        serde_json::to_string(hostile).unwrap()
    );
    let mut files = release("0.1.5");
    files.push(Entry::file(".replank.toml", manifest));
    rig.publish("0.1.5", &files);
    rig.until_offered("0.1.5");
    let shown = plan(&rig, &[], 0);
    assert_eq!((&shown["from_version"], &shown["to_version"]), (&"0.1.0".into(), &"0.1.5".into()), "{shown}");
    let changes = shown["changes"].to_string();
    assert!(changes.contains("timeout_ms") && changes.contains("4321") && changes.contains("FLAVOUR"), "{changes}");
    assert!(!shown.to_string().contains("hunter2"), "{shown}");
    assert!(shown["commits"]["list"].as_array().is_some_and(|all| all.len() == 5), "{}", shown["commits"]);
    assert_eq!(shown["images"][0]["dockerfile"], "app/Dockerfile", "{shown}");
    let kinds: Vec<&str> = shown["steps"].as_array().unwrap().iter().filter_map(|s| s["kind"].as_str()).collect();
    assert_eq!(kinds, ["start", "prove", "cut_over", "retire"], "{shown}");
    assert_eq!((&shown["downtime"]["p50_ms"], &shown["prediction"]["total_p50_ms"]), (&0.into(), &Value::Null));
    let out = rig.cli(&["plan"]);
    let text = said(&out);
    eprintln!("{text}");
    assert!(out.status.success() && text.contains("0.1.0 → 0.1.5") && !text.contains(['\u{1b}', '\u{202e}']), "{text}");
    // Nothing of the looks is left.
    let left = std::fs::read_dir(rig.home.join("work/@look")).map(|all| all.count()).unwrap_or_default();
    assert_eq!(left, 0);
    rig.repo.remove(&[".replank.toml"], "no manifest").unwrap();
    rig.goes_on("0.2.0");
}
