//! The first customer's build path, unchanged, with only the environment of the contract set.

use crate::rig::{ACR, COMPONENTS, EXEC_TOKEN, Options, Rig, release, said};

#[test]
fn the_reference_application_builds_from_its_environment_alone() {
    let mut rig = Rig::start(Options {
        env: vec![
            ("AZURE_CLIENT_ID", "11111111-2222-3333-4444-555555555555".to_owned()),
            ("APP_VERSION", "0.9.0".to_owned()),
        ],
        ..Options::default()
    });
    let row = rig.succeeds(&["1.0.0"]);
    let job = row["job_id"].as_str().unwrap().to_owned();
    let clone = rig.clones.join(&job);

    // What was asked of az, word by word (contract §5); nothing of the channel's own reaches it.
    let calls = rig.az.calls().unwrap();
    let words: Vec<Vec<&str>> = calls.iter().map(|c| c.arguments.iter().map(String::as_str).collect()).collect();
    assert_eq!(
        words[0],
        ["login", "--identity", "--allow-no-subscriptions", "--client-id", "11111111-2222-3333-4444-555555555555"]
    );
    let base = format!("TERMINAL_BASE_IMAGE={}/elb-terminal-base:latest", rig.registry.name());
    let expect = [
        ("elb-api", "api/Dockerfile", vec!["APP_VERSION=1.0.0"], "."),
        ("elb-frontend", "web/Dockerfile", vec!["APP_VERSION=1.0.0"], "."),
        ("elb-terminal", "terminal/Dockerfile.runtime", vec!["APP_VERSION=1.0.0", &base], "terminal"),
    ];
    assert_eq!(words.len(), 1 + expect.len(), "one sign-in, one build each: {words:?}");
    for ((image, file, args, context), (call, words)) in expect.iter().zip(calls.iter().zip(&words).skip(1)) {
        let attempt = words[7].strip_prefix(&format!("{image}:v1.0.0-")).unwrap_or_else(|| panic!("{words:?}"));
        assert_eq!(attempt.len(), 20, "the attempt's own tag: {words:?}");
        let version = format!("{image}:v1.0.0");
        let mut wanted =
            vec!["acr", "build", "--registry", ACR, "--image", &version, "--image", words[7], "--file", file];
        for arg in args {
            wanted.extend(["--build-arg", arg]);
        }
        wanted.push(context);
        assert_eq!(*words, wanted);
        assert_eq!(call.directory, clone, "az runs in the clone");
        assert!(!call.environment.contains(EXEC_TOKEN), "{}", call.environment);
        // Both tags lead to one image, which is the recorded one.
        let tags = rig.tags(image);
        assert_eq!(tags.len(), 2, "{tags:?}");
        assert_eq!(tags[0].1, tags[1].1, "{tags:?}");
        let component = image.trim_start_matches("elb-");
        let built: Vec<_> = rig.events("built").into_iter().filter(|e| e["component"] == component).collect();
        assert_eq!(built[0]["image"], format!("{}/{image}@{}", rig.registry.name(), tags[0].1));
        let log = rig.log(&row, component);
        let second = log.lines().nth(1).unwrap_or_default();
        assert_eq!(second, format!("az {}", words.join(" ")), "the exact command comes first: {log}");
        assert!(log.contains("Step 1/") && log.contains("Waiting for an agent"), "{log}");
    }
    // Nothing was run: what runs is what it was, and where it came from is not known.
    assert_eq!((row["running_version"].as_str(), row["build_only"].as_bool()), (Some("0.9.0"), Some(true)), "{row}");
    assert_eq!((row["running_sha"].as_str(), row["rollback_target"].as_object().map(|m| m.len())), (Some(""), Some(0)));
    assert_eq!(row["phase_progress"], 100, "{row}");

    // The same again takes what is there.
    let row = rig.succeeds(&["1.0.0"]);
    assert_ne!(row["job_id"], job.as_str());
    assert_eq!(rig.az.builds().unwrap().len(), 3, "nothing is built twice");
    for component in COMPONENTS {
        let log = rig.log(&row, component);
        assert!(log.contains("made of the same commit by an earlier job"), "{log}");
    }

    // A commit of the branch: shallow, detached, and the frontend is told which.
    let old = rig.publish("0.8.0", &release("0.8.0"));
    let commit = rig.publish("1.1.0", &release("1.1.0"));
    let next = rig.repo.commit(&release("1.1.0-next"), "next").unwrap();
    assert!(rig.cli(&["check"]).status.code().is_some());
    rig.until("the branch's head is seen", |rig| {
        let out = rig.cli(&["check"]);
        out.status.success() && rig.status()["latest_commit_sha"] == next.as_str()
    });
    let out = rig.cli(&["start", "0.8.0", "--yes", "--no-wait"]);
    assert!(said(&out).contains("0.8.0 is not newer than what runs (0.9.0)"), "{} {old}", said(&out));
    let row = rig.succeeds(&["--commit", &next]);
    assert!(row["target_version"].as_str().unwrap().starts_with("0.9.0-commit."), "{row}");
    let builds = rig.az.builds().unwrap();
    let frontend = &builds[4].arguments;
    let short = row["target_version"].as_str().unwrap().rsplit_once('.').unwrap().1.to_owned();
    assert!(frontend.contains(&format!("GIT_COMMIT={short}")) && next.starts_with(&short), "{frontend:?}");
    assert!(!builds[3].arguments.iter().any(|word| word.starts_with("GIT_COMMIT")), "the frontend alone");
    assert_ne!(commit, next);
    let verified = rig.cli(&["history", "--verify"]);
    assert!(verified.status.success(), "{}", said(&verified));
}

/// What the environment lacks is named, all of it, before anything runs.
#[test]
fn what_the_environment_lacks_is_named() {
    let rig = Rig::prepare(Options::default());
    let out = rig.command(&["serve"]).env_remove("EXEC_TOKEN").env_remove("PLATFORM_ACR_NAME").output().unwrap();
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{told}");
    for part in ["EXEC_TOKEN: is not set", "PLATFORM_ACR_NAME: is not set"] {
        assert!(told.contains(part), "{told}");
    }
    let out = rig
        .command(&["serve"])
        .env("UPGRADE_GIT_REMOTE_ALLOWLIST", "github.com,https://git.example.com/acme/")
        .output();
    let told = String::from_utf8_lossy(&out.unwrap().stderr).into_owned();
    assert!(told.contains("UPGRADE_GIT_REMOTE_ALLOWLIST: the git remote is not in it"), "{told}");
    let out = rig.cli(&["deploy"]);
    assert!(!out.status.success() && said(&out).contains("runs nothing"), "{}", said(&out));
}

/// Side by side, each of the three waits for the two others.
#[test]
fn builds_run_side_by_side_where_that_is_wanted() {
    let mut rig = Rig::prepare(Options::default());
    let component = |name: &str, dockerfile: &str| {
        format!("[components.{name}]\nrepository = \"elb-{name}\"\ndockerfile = \"{dockerfile}\"\n")
    };
    let config = format!(
        "application = \"plane\"\n[build]\nbuilder = \"az-exec\"\nparallel = 3\n{}{}{}",
        component("api", "api/Dockerfile"),
        component("second", "api/Dockerfile"),
        component("web", "web/Dockerfile")
    );
    std::fs::write(rig.home.join("replank.toml"), config).unwrap();
    rig.az.set_mode("", "together").unwrap();
    rig.start_exec();
    rig.serve();
    rig.succeeds(&["1.0.0"]);
    let calls = rig.az.calls().unwrap();
    assert_eq!(calls.iter().filter(|call| call.arguments[0] == "login").count(), 1, "one sign-in for all");
    assert_eq!(calls.len(), 4);
}
