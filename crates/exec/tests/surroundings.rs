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
        ("PYTHONPATH", ""),
        ("LD_LIBRARY_PATH", "/opt/lib::./lib:/usr/local/lib:"),
    ]
    .into_iter()
    .map(|(name, value)| (name.into(), value.into()))
    .collect()
}

fn environment(program: &str, home: &Path, own: &BTreeMap<OsString, OsString>) -> BTreeMap<OsString, OsString> {
    of(
        program,
        &Surroundings {
            own,
            home,
            work: &home.join("../work"),
            clone_root: Path::new("/tmp/elb-upgrade"),
            remote_is_plain: false,
            pin: Some("git.example.com:443:192.0.2.1"),
            signers: None,
            askpass: None,
        },
    )
}

#[test]
fn no_program_gets_the_channel_s_own_variables() {
    for program in ["git", "az", "azcopy", "kubectl", "elb", "elastic-blast"] {
        let found = environment(program, Path::new("/tmp"), &own());
        assert!(found.keys().all(|name| !name.to_str().unwrap().starts_with("EXEC_")), "{program}: {found:?}");
        assert!(found.contains_key(OsStr::new("PATH")), "{program}");
        let signs_in = found.contains_key(OsStr::new("IDENTITY_ENDPOINT"));
        assert_eq!(signs_in, program != "git", "{program}: the machine's identity is not git's affair");
    }
}

/// An entry that is empty or relative means the directory that a program is started in, which is a release's.
#[test]
fn lists_of_directories_hold_no_current_one() {
    #[track_caller]
    fn check(name: &str, value: &str, expect: Option<&str>) {
        let own = BTreeMap::from([(OsString::from(name), OsString::from(value))]);
        let found = environment("az", Path::new("/tmp"), &own);
        assert_eq!(found.get(OsStr::new(name)).map(|value| value.to_str().unwrap()), expect, "{name}={value}");
    }
    for name in ["PATH", "LD_LIBRARY_PATH", "PYTHONPATH"] {
        check(name, "/a:/b", Some("/a:/b"));
        check(name, ":/a::/b:", Some("/a:/b"));
        check(name, ".:/a:b/c", Some("/a"));
        check(name, "", None);
        check(name, ".", None);
    }
    check("OTHER", ":", Some(":"));
    let own = BTreeMap::from([(OsString::from("PATH"), OsString::from(".:/usr/bin"))]);
    assert_eq!(environment("git", Path::new("/tmp"), &own)[OsStr::new("PATH")], "/usr/bin");
    // What az packs goes with the request.
    assert_eq!(environment("az", Path::new("/tmp/x"), &own)[OsStr::new("TMPDIR")], "/tmp/x");
}

/// A clone that a release and an intruder have prepared: whatever stands in its settings, git runs nothing of it.
#[test]
fn git_runs_no_program_that_somebody_left() {
    let place = tempfile::tempdir().unwrap();
    let (fresh, clone, marker) = (place.path().join("fresh"), place.path().join("clone"), place.path().join("ran"));
    std::fs::create_dir(&fresh).unwrap();
    let git = |arguments: &[&str], cwd: &Path| {
        let mut command = Command::new("git");
        command.args(arguments).current_dir(cwd).env_clear().envs(environment("git", &fresh, &own()));
        command.output().unwrap()
    };
    assert!(git(&["init", "-q", clone.to_str().unwrap()], place.path()).status.success());
    let who = ["-c", "user.name=x", "-c", "user.email=x@example.org"];
    assert!(git(&[&who[..], &["commit", "-q", "--allow-empty", "-m", "x"]].concat(), &clone).status.success());
    let head = String::from_utf8(git(&["rev-parse", "HEAD"], &clone).stdout).unwrap();
    let tag = format!(
        "object {}\ntype commit\ntag v1\ntagger x <x@example.org> 1700000000 +0000\n\nx\n-----BEGIN PGP SIGNATURE-----\n\n\
         x\n-----END PGP SIGNATURE-----\n",
        head.trim()
    );
    std::fs::write(place.path().join("tag"), tag).unwrap();
    let file = place.path().join("tag");
    let made = git(&["hash-object", "-t", "tag", "-w", "--literally", file.to_str().unwrap()], &clone);
    std::fs::write(clone.join(".git/refs/tags/v1"), made.stdout).unwrap();
    // Another place than the one remote, which is neither https nor anybody's business.
    assert!(!git(&["ls-remote", clone.to_str().unwrap()], place.path()).status.success());
    let run = format!("touch {}", marker.display());
    let hook = clone.join(".git/hooks/post-checkout");
    std::fs::create_dir_all(hook.parent().unwrap()).unwrap();
    std::fs::write(&hook, format!("#!/bin/sh\n{run}\n")).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let settings = format!(
        "[core]\n\tfsmonitor = {run}; true\n\tsshCommand = {run}\n\tpager = {run}\n[credential]\n\thelper = !{run}\n\
         [remote \"origin\"]\n\turl = ext::{run}\n[alias]\n\tstatus = !{run}\n[protocol \"ext\"]\n\tallow = always\n\
         [protocol]\n\tallow = always\n[gpg]\n\tprogram = {}\n",
        hook.display()
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
        &["verify-tag", "v1"],
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
    for path in [&parent, &fresh.work, &fresh.own, fresh.work.parent().unwrap()] {
        assert_eq!(mode(path), 0o700, "{path:?}");
    }
    std::fs::write(fresh.work.join("x"), "x").unwrap();
    let gone = fresh.work.parent().unwrap().to_owned();
    drop(fresh);
    assert!(!gone.exists());

    // A server that is killed leaves its directories, open and closed ones.
    let (old, young) = (parent.join("request-old"), parent.join("request-young"));
    for left in [&old, &young] {
        std::fs::create_dir_all(left.join("work/x")).unwrap();
    }
    std::fs::set_permissions(&parent, std::fs::Permissions::from_mode(0o777)).unwrap();
    let long_ago = now - Duration::from_secs(3 * 3_600);
    std::fs::File::open(&old).unwrap().set_modified(long_ago).unwrap();
    Places::open(parent.clone(), now).unwrap();
    assert!(!old.exists() && young.exists());
    assert_eq!(mode(&parent), 0o700, "others could put their own in its place");

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
    assert_eq!(azure_settings(&root, &root.join("job/api"), None), None, "what lies above the root is the operator's");
    std::fs::create_dir(root.join("job/.azure")).unwrap();
    assert_eq!(azure_settings(&root, &root.join("job/api"), None), Some(root.join("job/.azure")));
    assert_eq!(azure_settings(&root, &root.join("job"), None), Some(root.join("job/.azure")));
    // It is the name of its own directory that az looks for.
    let chosen = Some(Path::new("/home/x/settings"));
    assert_eq!(azure_settings(&root, &root.join("job/api"), chosen), None);
    std::fs::create_dir(root.join("job/settings")).unwrap();
    assert_eq!(azure_settings(&root, &root.join("job/api"), chosen), Some(root.join("job/settings")));
}
