//! What a person sees of a running job: bars on a terminal, plain lines elsewhere, steps in the status.

use std::process::{Command, Stdio};

use replank_testbed::repo::Entry;

use crate::rig::{DOCKERFILE, JOB_LIMIT, Options, REPLANK, Rig, release, said};

/// Steps that last, so that there is something to see, and that no earlier release has done.
fn slow(version: &str) -> Vec<Entry> {
    let mut files = release(version);
    let steps = format!("\nENV VERSION={version}\nRUN sleep 1\nRUN sleep 2\n");
    files[0] = Entry::file("app/Dockerfile", DOCKERFILE.replacen('\n', &steps, 1));
    files
}

#[test]
fn a_running_job_is_shown_as_bars_on_a_terminal_and_as_plain_lines_elsewhere() {
    let mut rig = Rig::start(Options::default());
    // The releases of this test do not fail.
    drop(rig.watch.take());
    rig.publish("0.1.1", &slow("0.1.1"));

    let plain = rig.command(&[]);
    let mut terminal = Command::new("script");
    let line = format!("stty rows 30 columns 100; exec '{REPLANK}' start 0.1.1 --yes");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env_clear().env("TERM", "xterm");
    terminal.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    terminal.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut shown = terminal.spawn().unwrap();
    let (mut total, mut done) = (0, 0);
    while shown.try_wait().unwrap().is_none() {
        let row = rig.status();
        if row["state"] == "building" {
            let app = &row["components"]["app"];
            total = total.max(app["total"].as_u64().unwrap());
            done = done.max(app["done"].as_u64().unwrap());
            assert!(app["done"].as_u64() <= app["total"].as_u64(), "{row}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let out = shown.wait_with_output().unwrap();
    let seen = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{}", said(&out));
    // FROM, two steps that sleep, COPY.
    assert!(total >= 4 && done >= 2, "steps in the status: {done} of {total}");

    let whole = bars(&seen, "building");
    assert!(whole.iter().any(|(bar, _)| bar.contains('━')), "no bar of the whole job: {seen:?}");
    // Not the last steps: they may be over between two looks at the job.
    let app = bars(&seen, "app");
    let moves = app.iter().any(|(bar, steps)| {
        let counts = steps.split_once('/').and_then(|(d, t)| Some((d.parse::<u64>().ok()?, t.parse::<u64>().ok()?)));
        bar.contains(['━', '╸']) && counts.is_some_and(|(d, t)| 0 < d && d <= t && t >= 4)
    });
    assert!(moves, "no bar of the component that moves: {app:?} in {seen:?}");
    assert!(seen.contains("\u{1b}[32m"), "no colour on a terminal: {seen:?}");
    assert!(seen.contains("0.1.1 runs"), "{seen:?}");

    rig.publish("0.1.2", &slow("0.1.2"));
    let out = rig.cli(&["start", "0.1.2", "--yes"]);
    let told = said(&out);
    assert!(out.status.success(), "{told}");
    // Whether "app is built" is shown depends on whether that row was seen before the next state's.
    assert!(told.contains("  building ") && told.contains("0.1.2 runs"), "{told}");
    let lasted = told.split("✓ building ").nth(1).and_then(|rest| rest.split_once(" s")).map(|(s, _)| s.parse::<u64>());
    // The two steps that sleep, and as much more as a busy machine takes.
    assert!(matches!(lasted, Some(Ok(3..))), "how long building took: {lasted:?} in {told}");
    assert!(!told.contains(['\u{1b}', '\r', '━', '─']), "{told:?}");
    assert_eq!(rig.end(JOB_LIMIT)["running_version"], "0.1.2");
}

/// The bars behind a name, each with the figure behind it.
fn bars(seen: &str, name: &str) -> Vec<(String, String)> {
    let is_bar = |c: &char| ['━', '╸', '─'].contains(c);
    let after = seen.split(name).skip(1).map(|rest| rest.trim_start_matches(' '));
    let found = after.filter_map(|rest| {
        let bar: String = rest.chars().take_while(is_bar).collect();
        let figure = rest[bar.len()..].split_whitespace().next()?.to_owned();
        (bar.chars().count() >= 10).then_some((bar, figure))
    });
    found.collect()
}
