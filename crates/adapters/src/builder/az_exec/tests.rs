//! Ends of `az` that a test cannot bring about with a real one, and a registry that signs machines in.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use replank_core::fault::Class;
use replank_core::phase::Recipe;
use replank_core::ports::{NoLog, Tree};
use replank_core::words::{AppName, CommitSha, ComponentName, InstallationId, Nonce, Version};
use replank_testbed::answers::Answers;

use super::*;

fn spec(repository: &str) -> BuildSpec {
    let job = JobId::new("job-1").expect("job");
    BuildSpec {
        installation: InstallationId::new("a".repeat(16)).expect("id"),
        application: AppName::new("shop").expect("name"),
        key: OpKey::derive(&job, "build-api", 1, &Nonce::new("0".repeat(32)).expect("nonce")),
        job,
        attempt: 1,
        resumed: false,
        component: ComponentName::new("api").expect("name"),
        recipe: Recipe {
            dockerfile: "api/Dockerfile".to_owned(),
            context: ".".to_owned(),
            target: Some("final".to_owned()),
            args: BTreeMap::from([("GREETING".to_owned(), "it's here".to_owned())]),
            platform: Some("linux/amd64".to_owned()),
            secrets: vec![],
            repository: repository.to_owned(),
            unlabelled: true,
        },
        tree: Tree {
            path: PathBuf::from("/clones/job-1"),
            commit: CommitSha::new("c".repeat(40)).expect("commit"),
            signed_by: None,
        },
        version: Version::release(1, 0, 0),
        remote: "https://git.example/shop.git".to_owned(),
    }
}

fn builder(exec: SocketAddr) -> AzExecBuilder {
    let channel = Channel::new(&exec.to_string(), "0123456789abcdef").expect("channel");
    let config = AzExecConfig {
        registry: "shopacr".to_owned(),
        client_id: None,
        wait_out: Duration::ZERO,
        registries: OciConfig::default(),
    };
    AzExecBuilder::new(channel, config).expect("builder")
}

/// A registry that has nothing.
fn empty_registry() -> SocketAddr {
    Answers::start(|_, _| ("404 Not Found".to_owned(), "{}".to_owned())).expect("a server").address
}

#[tokio::test]
async fn ends_of_az_are_told_apart() {
    let summary = |code: i32, timed_out: bool| {
        format!("{{\"exit_code\":{code},\"duration_ms\":1,\"timed_out\":{timed_out},\"client_aborted\":false}}\n")
    };
    let said = "{\"stream\":\"stderr\",\"line\":\"the disk is full\"}\n";
    for (events, class, parts) in [
        (summary(124, true), Class::Permanent, ["took longer than 1800 s", "may go on"]),
        (summary(127, false), Class::Permanent, ["cannot run az", "install the Azure CLI"]),
        (summary(137, false), Class::Indeterminate, ["was killed (exit code 137)", "looked for before another"]),
        (format!("{said}{}", summary(1, false)), Class::Permanent, ["exit code 1", "the disk is full"]),
        (summary(0, false), Class::Permanent, ["without an error, but the registry has no image", "build log"]),
        (said.to_owned(), Class::Indeterminate, ["ended without a summary", "restarted"]),
    ] {
        let given = events.clone();
        let exec = Answers::start(move |asked, _| {
            let outcome = r#"{"exit_code":0,"stdout":"","stderr":"","stdout_truncated":false,"stderr_truncated":false,"duration_ms":1,"timed_out":false}"#;
            let body = if asked.first.contains("/stream") { given.clone() } else { outcome.to_owned() };
            ("200 OK".to_owned(), body)
        })
        .expect("a server");
        let repository = format!("{}/team/api", empty_registry());
        let fault = builder(exec.address).build(&spec(&repository), &NoLog).await.expect_err("no image");
        let told = format!("{}; {}", fault.chain(), fault.advice);
        assert_eq!(fault.class, class, "{events}: {told}");
        for part in parts {
            assert!(told.contains(part), "{events}: {told}");
        }
        let asked = exec.asked();
        let stream = asked.iter().find(|asked| asked.first.contains("/stream")).expect("a build");
        let sent: serde_json::Value = serde_json::from_str(&stream.body).expect("JSON");
        let key = spec("x").key;
        let tag = format!("team/api:v1.0.0-{key}");
        let words = [
            "az",
            "acr",
            "build",
            "--registry",
            "shopacr",
            "--image",
            "team/api:v1.0.0",
            "--image",
            &tag,
            "--file",
            "api/Dockerfile",
            "--build-arg",
            "GREETING=it's here",
            "--target",
            "final",
            "--platform",
            "linux/amd64",
            ".",
        ];
        assert_eq!(sent, serde_json::json!({"argv": words, "cwd": "/clones/job-1", "timeout_seconds": 1800}));
    }
}

#[tokio::test]
async fn a_build_secret_is_refused_before_anything_runs() {
    let exec = Answers::start(|_, _| ("200 OK".to_owned(), "{}".to_owned())).expect("a server");
    let mut spec = spec("shopacr.azurecr.io/api");
    spec.recipe.secrets = vec!["npm".to_owned()];
    let fault = builder(exec.address).build(&spec, &NoLog).await.expect_err("refused");
    assert!(fault.class == Class::Permanent && fault.what.contains("build secrets"), "{fault}");
    assert!(exec.asked().is_empty());
}

#[test]
fn commands_are_shown_as_they_would_be_typed() {
    let words = ["az", "--build-arg", "A=it's here", "", "x/y:1.0"].map(str::to_owned);
    assert_eq!(shown(&words), r"az --build-arg 'A=it'\''s here' '' x/y:1.0");
}
