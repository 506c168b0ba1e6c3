//! Signed releases through the exec channel: the server's operator has the keys, and the controller tells what came of them.

use crate::rig::{Options, Rig, said};
use replank_testbed::keys::SshKey;

#[test]
fn only_a_signed_release_is_built_and_the_history_says_who_signed() {
    let keys = tempfile::tempdir().unwrap();
    let alice = SshKey::create(keys.path(), "alice").unwrap();
    let allowed = keys.path().join("allowed");
    std::fs::write(&allowed, format!("alice@example.com {}\n", alice.public)).unwrap();
    let mut rig = Rig::start(Options {
        env: vec![("UPGRADE_GIT_VERIFY", "signed-tags".to_owned())],
        exec_env: vec![("EXEC_ALLOWED_SIGNERS_FILE", allowed.display().to_string())],
        ..Options::default()
    });
    // The first release's tag is annotated and unsigned.
    rig.fails(&[], &["the tag v1.0.0 is refused: it is not signed", "EXEC_ALLOWED_SIGNERS_FILE"]);
    assert!(rig.az.builds().unwrap().is_empty(), "something was built");
    let commit = rig.publish("1.1.0", &crate::rig::release("1.1.0"));
    alice.tag(&rig.repo, "v1.1.0", &commit).unwrap();
    rig.succeeds(&["1.1.0"]);
    let fetched = rig.events("fetched");
    let signer = fetched.last().unwrap()["signed_by"].as_str().unwrap();
    assert!(signer.starts_with("alice@example.com (ED25519 key SHA256:"), "{signer}");
    // A lightweight tag is not even offered, and a commit is refused with the reason.
    rig.repo.light_tag("v1.2.0", &commit).unwrap();
    let refused = rig.cli(&["start", "--commit", &commit, "--yes", "--no-wait"]);
    assert!(
        !refused.status.success() && said(&refused).contains("only signed tags are accepted"),
        "{}",
        said(&refused)
    );
    rig.until("the lightweight tag is refused", |rig| {
        let candidates = rig.get("/api/upgrade/candidates").1;
        candidates.contains("the tag v1.2.0 is lightweight")
    });
}
