//! Configurations with mistakes, as an operator meets them: all at once, each with its line and what to do.

use std::process::{Command, Output};

use crate::rig::REPLANK;

fn run(config: &str, command: &str) -> (Output, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("replank.toml");
    std::fs::write(&file, config).unwrap();
    let out = Command::new(REPLANK).args([command, "--config"]).arg(&file).env_clear().output().unwrap();
    assert!(!dir.path().join("ledger").exists(), "something was made in spite of a wrong configuration");
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    (out, told)
}

const GOOD: &str = "application = \"shop\"\n[source]\nremote = \"https://git.example.org/shop.git\"\n\
[components.api]\ndockerfile = \"api/Dockerfile\"\ncontext = \".\"\n[containers.api]\ncomponent = \"api\"\n";

#[test]
fn a_wrong_configuration_is_refused_with_line_and_advice() {
    let check = |config: String, parts: &[&str]| {
        for command in ["serve", "deploy"] {
            let (out, told) = run(&config, command);
            eprintln!("{told}");
            assert_eq!(out.status.code(), Some(2), "{config}\n{told}");
            for part in parts {
                assert!(told.contains(part), "{part:?} is not told for\n{config}\n{told}");
            }
            assert!(!told.contains("panicked"), "{told}");
        }
    };
    check(format!("nonsense = 1\n{GOOD}"), &["nonsense", ":1:"]);
    check(format!("{GOOD}probe = 7\n"), &["containers.api.probe", ":9"]);
    check(format!("{GOOD}comand = [\"x\"]\n"), &["comand", "command", ":9"]);
    check(GOOD.replace("component = \"api\"", "component = \"apo\""), &["apo", "api", ":8"]);
    check(GOOD.replace("\"shop\"\n[", "7\n["), &["application", ":1"]);
    check("application = \"shop\"\n".to_owned(), &["component"]);
    check("application = \n".to_owned(), &[":1"]);
    check(String::new(), &["application"]);
    // All of them in one go.
    let many =
        format!("nonsense = 1\n{GOOD}comand = [\"x\"]\nstop_grace_seconds = \"long\"\n[policy]\nmode = \"blue\"\n");
    check(many, &["nonsense", "comand", "stop_grace_seconds", "mode"]);
}

#[test]
fn no_configuration_at_all_says_where_one_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["serve", "deploy"] {
        let out = Command::new(REPLANK).arg(command).current_dir(dir.path()).env_clear().output().unwrap();
        let told = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{told}");
        assert!(told.contains("replank.toml") && told.contains("--config"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}
