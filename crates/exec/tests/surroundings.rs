//! What programs find around them: their environment, their directories, and the clones that they may enter.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use replank_exec::server::environment::{Surroundings, of};
use replank_exec::server::place::{Places, azure_settings, is_inside, sweep_clones};

fn own() -> BTreeMap<OsString, OsString> {
    [
        ("PATH", std::env::var("PATH").unwrap().as_str()),
        ("HOME", "/root"),
        ("EXEC_TOKEN", "0123456789abcdef"),
        ("EXEC_PORT", "7682"),
        ("IDENTITY_ENDPOINT", "http://169.254.169.254/"),
        ("GIT_SSH_COMMAND", "id"),
        ("GIT_CONFIG_PARAMETERS", "'core.fsmonitor'='id'"),
        ("LD_PRELOAD", "/tmp/x.so"),
        ("https_proxy", "http://proxy:3128"),
    ]
    .into_iter()
    .map(|(name, value)| (name.into(), value.into()))
    .collect()
}

fn environment(program: &str, fresh: &Path) -> BTreeMap<OsString, OsString> {
    let own = own();
    of(
        program,
        &Surroundings {
            own: &own,
            fresh,
            clone_root: Path::new("/tmp/elb-upgrade"),
            remote_is_plain: false,
            allowed_signers: None,
            askpass: None,
        },
    )
}

#[test]
fn no_program_gets_the_channel_s_own_variables() {
    for program in ["git", "az", "azcopy", "kubectl", "elb", "elastic-blast"] {
        let found = environment(program, Path::new("/tmp"));
        assert!(found.keys().all(|name| !name.to_str().unwrap().starts_with("EXEC_")), "{program}: {found:?}");
        assert!(found.contains_key(OsStr::new("PATH")), "{program}");
        let signs_in = found.contains_key(OsStr::new("IDENTITY_ENDPOINT"));
        assert_eq!(signs_in, program != "git", "{program}: the machine's identity is not git's affair");
    }
}

/// A clone that a release and an intruder have prepared: whatever stands in its settings, git runs nothing of it.
#[test]
fn git_runs_no_program_that_somebody_left() {
    let place = tempfile::tempdir().unwrap();
    let (fresh, clone, marker) = (place.path().join("fresh"), place.path().join("clone"), place.path().join("ran"));
    std::fs::create_dir(&fresh).unwrap();
    let git = |arguments: &[&str], cwd: &Path| {
        let mut command = Command::new("git");
        command.args(arguments).current_dir(cwd).env_clear().envs(environment("git", &fresh));
        command.output().unwrap()
    };
    assert!(git(&["init", "-q", clone.to_str().unwrap()], place.path()).status.success());
    let who = ["-c", "user.name=x", "-c", "user.email=x@example.org"];
    assert!(git(&[&who[..], &["commit", "-q", "--allow-empty", "-m", "x"]].concat(), &clone).status.success());
    // Another place than the one remote, which is neither https nor anybody's business.
    assert!(!git(&["ls-remote", clone.to_str().unwrap()], place.path()).status.success());
    let run = format!("touch {}", marker.display());
    let hook = clone.join(".git/hooks/post-checkout");
    std::fs::create_dir_all(hook.parent().unwrap()).unwrap();
    std::fs::write(&hook, format!("#!/bin/sh\n{run}\n")).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let settings = format!(
        "[core]\n\tfsmonitor = {run}; true\n\tsshCommand = {run}\n\tpager = {run}\n[credential]\n\thelper = !{run}\n\
         [remote \"origin\"]\n\turl = ext::sh -c '{run}'\n[alias]\n\tstatus = !{run}\n"
    );
    let file = clone.join(".git/config");
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{before}{settings}")).unwrap();
    std::fs::write(clone.join("a"), "a").unwrap();
    for arguments in [
        &["status", "--porcelain"][..],
        &["fetch", "origin"],
        &["ls-remote", "origin"],
        &["checkout", "--detach", "HEAD"],
        &["clean", "-fdx"],
        &["rev-parse", "HEAD"],
    ] {
        let out = git(arguments, &clone);
        assert!(!marker.exists(), "{arguments:?} ran a program: {out:?}");
    }
    assert!(git(&["status", "--porcelain"], &clone).status.success());
    // The same, inside a tree: a whole repository that a release brought along.
    let bare = clone.join("vendor");
    assert!(git(&["init", "-q", "--bare", bare.to_str().unwrap()], place.path()).status.success());
    std::fs::write(
        bare.join("config"),
        format!("[core]\n\trepositoryformatversion = 0\n\tbare = false\n\tworktree = .\n\tfsmonitor = {run}; true\n"),
    )
    .unwrap();
    let out = git(&["status"], &bare);
    assert!(!marker.exists() && !out.status.success(), "{out:?}");
}

#[test]
fn links_lead_nowhere_but_inside() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    std::fs::create_dir_all(root.join("job/api")).unwrap();
    std::fs::create_dir(place.path().join("elsewhere")).unwrap();
    symlink("/etc", root.join("job/out")).unwrap();
    symlink("../../elsewhere", root.join("job/up")).unwrap();
    symlink("api", root.join("job/in")).unwrap();
    symlink("/nowhere/at/all", root.join("job/later")).unwrap();
    symlink("job", root.join("twin")).unwrap();
    for (path, expect) in [
        ("job", true),
        ("job/api", true),
        ("job/in", true),
        ("job/api/Dockerfile", true),
        ("new", true),
        ("twin", true),
        (".", false),
        ("job/out", false),
        ("job/out/passwd", false),
        ("job/up", false),
        ("job/up/new", false),
        ("job/later", false),
        ("job/later/x", false),
        ("../elsewhere", false),
    ] {
        assert_eq!(is_inside(&root, &root.join(path)).unwrap(), expect, "{path}");
    }
}

#[test]
fn fresh_directories_are_private_and_go_and_stale_ones_are_swept() {
    let place = tempfile::tempdir().unwrap();
    let parent = place.path().join("requests");
    let now = std::fs::metadata(place.path()).unwrap().modified().unwrap();
    let places = Places::open(parent.clone(), now).unwrap();
    let fresh = places.fresh().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&parent), mode(fresh.path())), (0o700, 0o700));
    std::fs::write(fresh.path().join("x"), "x").unwrap();
    let gone = fresh.path().to_owned();
    drop(fresh);
    assert!(!gone.exists());

    let (old, young) = (places.fresh().unwrap().keep(), places.fresh().unwrap().keep());
    let long_ago = now - Duration::from_secs(3 * 3_600);
    std::fs::File::open(&old).unwrap().set_modified(long_ago).unwrap();
    Places::open(parent.clone(), now).unwrap();
    assert!(!old.exists() && young.exists());

    let file = place.path().join("file");
    std::fs::write(&file, "").unwrap();
    symlink(place.path(), place.path().join("link")).unwrap();
    for wrong in [file, place.path().join("link")] {
        assert!(Places::open(wrong, now).is_err());
    }
}

#[test]
fn clones_that_no_job_can_need_are_swept() {
    let place = tempfile::tempdir().unwrap();
    let (old, young) = (place.path().join("job-1"), place.path().join("job-2"));
    for clone in [&old, &young] {
        std::fs::create_dir_all(clone.join("api")).unwrap();
    }
    symlink(&young, place.path().join("link")).unwrap();
    let now = std::fs::metadata(&young).unwrap().modified().unwrap();
    std::fs::File::open(&old).unwrap().set_modified(now - Duration::from_secs(25 * 3_600)).unwrap();
    sweep_clones(place.path(), now).unwrap();
    assert!(!old.exists() && young.join("api").exists());
    // A day later, a link goes and not what it leads to.
    std::fs::File::open(&young).unwrap().set_modified(now + Duration::from_secs(48 * 3_600)).unwrap();
    sweep_clones(place.path(), now + Duration::from_secs(49 * 3_600)).unwrap();
    assert!(place.path().join("link").symlink_metadata().is_err() && young.join("api").exists());
}

#[test]
fn settings_that_a_release_brought_for_az_are_found() {
    let place = tempfile::tempdir().unwrap();
    let root: PathBuf = place.path().join("root");
    std::fs::create_dir_all(root.join("job/api")).unwrap();
    std::fs::create_dir(place.path().join(".azure")).unwrap();
    assert_eq!(azure_settings(&root, &root.join("job/api")), None, "what lies above the root is the operator's");
    std::fs::create_dir(root.join("job/.azure")).unwrap();
    assert_eq!(azure_settings(&root, &root.join("job/api")), Some(root.join("job/.azure")));
    assert_eq!(azure_settings(&root, &root.join("job")), Some(root.join("job/.azure")));
}
