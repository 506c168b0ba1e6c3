//! Sequences of requests, and what a release, an earlier server or a neighbour may have left: with a real server and real git,
//! nothing of it runs a program, and nothing leads out of the clone root.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use support::{Nobody, Rig, script_at};

const REMOTE: &str = "https://git.example.com/acme/app.git";

/// A server, and one clone `job-1` as the policy's own `git clone` leaves it, made by hand since there is no network.
struct World {
    rig: Rig,
    /// Made by whatever manages to run.
    ran: PathBuf,
    /// Such a program.
    program: PathBuf,
}

impl World {
    async fn new() -> Self {
        let variables = [
            ("UPGRADE_GIT_REMOTE", REMOTE),
            ("PLATFORM_ACR_NAME", "acr"),
            ("CONTAINER_APP_NAME", "app"),
            ("AZURE_RESOURCE_GROUP", "rg"),
        ];
        // The server's own environment is an operator's, and yet none of this may count.
        let own = [("GIT_SSH_COMMAND", "false"), ("AZURE_CONFIG_DIR", "/home/x/.azure"), ("PYTHONPATH", "")];
        let rig = Rig::start_with(&variables, &own, Arc::new(Nobody)).await;
        let (ran, program) = (rig.place.path().join("ran"), rig.place.path().join("program"));
        script_at(&program, &format!("#!/bin/sh\ntouch '{}'\ncat\n", ran.display()));
        let world = Self { rig, ran, program };
        world.make_clone("job-1");
        world
    }

    fn clone(&self) -> PathBuf {
        self.rig.clones().join("job-1")
    }

    /// The author of a release, who writes what he likes; not the server's git.
    fn git(&self, directory: &Path, words: &[&str]) -> String {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.hooksPath=/dev/null"]);
        command
            .args(["-c", "init.defaultBranch=main", "-c", "core.fsmonitor=false"])
            .args(words)
            .current_dir(directory);
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
        let out = command.output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    fn make_clone(&self, name: &str) {
        let clone = self.rig.clones().join(name);
        std::fs::create_dir(&clone).unwrap();
        self.git(&clone, &["init", "-q"]);
        self.git(&clone, &["remote", "add", "origin", REMOTE]);
        self.write("Dockerfile", "FROM scratch\n");
        self.write("api/Dockerfile", "FROM scratch\n");
        self.commit();
        self.git(&clone, &["tag", "v1"]);
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.clone().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn commit(&self) {
        self.git(&self.clone(), &["add", "-A", "-f"]);
        self.git(&self.clone(), &["commit", "-q", "-m", "x"]);
    }

    /// Appends to the clone's settings; `PROGRAM` is one that must not run.
    fn set(&self, text: &str) {
        let path = self.clone().join(".git/config");
        let before = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("PROGRAM", &self.program.display().to_string());
        std::fs::write(path, format!("{before}{text}")).unwrap();
    }

    /// One request, `git …` or `az …` in the clone, or with more fields; `expect` is the refusal, or how the program ends.
    async fn check(&self, request: Value, expect: Result<i32, &str>) {
        for path in ["/exec", "/exec/stream"] {
            let (status, _, body) = self.rig.post(path, &request).await;
            match expect {
                Ok(exit_code) => {
                    let last: Value =
                        body.trim_end().lines().last().map(|line| serde_json::from_str(line).unwrap()).unwrap();
                    assert_eq!((status, &last["exit_code"]), (200, &json!(exit_code)), "{request}: {body}");
                }
                Err(why) => assert!(status == 403 && body.contains(why), "{request}: {status} {body}"),
            }
            assert!(!self.ran.exists(), "{request} ran a program: {body}");
        }
    }

    fn in_clone(&self, words: &str) -> Value {
        json!({"argv": words.split(' ').collect::<Vec<_>>(), "cwd": self.clone()})
    }

    fn build(&self, context: &str) -> Value {
        self.in_clone(&format!("az acr build --registry acr --image a:1 {context}"))
    }
}

/// The commands that are allowed in a clone and do not talk.
const LOCAL: [&str; 6] = [
    "git status",
    "git checkout --force --detach HEAD",
    "git clean -fdx",
    "git rev-parse HEAD",
    "git config --get remote.origin.url",
    "git verify-tag v1",
];
const NO_SIGNATURE: &str = "git verify-tag v1";
const TALKING: [&str; 2] = ["git fetch --depth 1 origin main", "git ls-remote origin"];
const SETTING: &str = "a setting that git does not write";

#[tokio::test]
async fn the_client_s_own_sequence_is_served() {
    let world = World::new().await;
    for words in LOCAL {
        let ends = i32::from(words == NO_SIGNATURE);
        world.check(world.in_clone(words), Ok(ends)).await;
    }
    world.check(world.in_clone(&format!("git config remote.origin.url {REMOTE}")), Ok(0)).await;
    world.check(world.in_clone("git checkout -q v1"), Ok(0)).await;
    // Nobody knows the host here, which is as far as these get.
    for words in TALKING {
        world.check(world.in_clone(words), Ok(128)).await;
    }
    let target = world.rig.clones().join("job-2");
    world.check(json!({"argv": ["git", "clone", "--depth", "1", REMOTE, target]}), Ok(128)).await;
    // The stand-in for az does as it is told; what counts is that it is started.
    for context in [".", "./", "api", "./api"] {
        let (status, _, body) = world.rig.post("/exec", &world.build(context)).await;
        assert_eq!(status, 200, "{context}: {body}");
    }
}

/// What the policy refuses cannot be written by it, and what it allows afterwards finds nothing.
#[tokio::test]
async fn no_setting_is_written_that_a_later_request_would_run() {
    let world = World::new().await;
    let program = world.program.display().to_string();
    let only = "remote.origin.url alone";
    let before = std::fs::read_to_string(world.clone().join(".git/config")).unwrap();
    for (setting, then) in [
        ("core.fsmonitor", "git status"),
        ("core.hooksPath", "git checkout --force --detach HEAD"),
        ("filter.x.smudge", "git checkout --force --detach HEAD"),
        ("core.sshCommand", "git fetch origin main"),
        ("gpg.program", NO_SIGNATURE),
        ("core.worktree", "git clean -fdx"),
        ("alias.status", "git status"),
        ("core.pager", "git status"),
        ("diff.external", "git status"),
        ("credential.helper", "git ls-remote origin"),
        ("core.gitProxy", "git fetch origin main"),
        ("remote.origin.vcs", "git fetch origin main"),
        ("remote.origin.uploadpack", "git fetch origin main"),
        ("core.alternateRefsCommand", "git fetch origin main"),
        ("include.path", "git status"),
        ("uploadpack.packObjectsHook", "git fetch origin main"),
        ("protocol.ext.allow", "git fetch origin main"),
        ("extensions.worktreeConfig", "git status"),
    ] {
        let argv = json!(["git", "config", setting, program]);
        world.check(json!({"argv": argv, "cwd": world.clone()}), Err(only)).await;
        let once = json!(["git", "-c", format!("{setting}={program}"), "status"]);
        world.check(json!({"argv": once, "cwd": world.clone()}), Err("may not be given this setting")).await;
        let ends = match then {
            "git fetch origin main" | "git ls-remote origin" => 128,
            NO_SIGNATURE => 1,
            _ => 0,
        };
        world.check(world.in_clone(then), Ok(ends)).await;
    }
    for url in [&format!("ext::{program}"), "https://evil.example.com/x.git", "/etc", "--global"] {
        let argv = json!(["git", "config", "remote.origin.url", url]);
        let (status, _, body) = world.rig.post("/exec", &json!({"argv": argv, "cwd": world.clone()})).await;
        assert_eq!(status, 403, "{body}");
    }
    assert_eq!(std::fs::read_to_string(world.clone().join(".git/config")).unwrap(), before);
}

/// A clone with settings that somebody else has written, before there was a policy or beside it.
#[tokio::test]
async fn a_clone_with_strange_settings_is_not_entered() {
    for (setting, why) in [
        ("[core]\n\tfsmonitor = PROGRAM\n", SETTING),
        ("[core]\n\tworktree = /\n", SETTING),
        ("[filter \"x\"]\n\tsmudge = PROGRAM\n\trequired = true\n", SETTING),
        ("[gpg]\n\tprogram = PROGRAM\n", SETTING),
        ("[protocol \"ext\"]\n\tallow = always\n", SETTING),
        ("[url \"ext::PROGRAM\"]\n\tinsteadOf = https://git.example.com/\n", SETTING),
        ("[remote \"origin\"]\n\turl = ext::PROGRAM\n", "of another remote"),
        ("[remote \"origin\"]\n\turl = https://evil.example.com/acme/app.git\n", "of another remote"),
        ("[http]\n\tproxy = http://evil.example.com\n", SETTING),
        ("[include]\n\tpath = /tmp/x\n", SETTING),
    ] {
        let world = World::new().await;
        world.write(".gitattributes", "* filter=x\n");
        world.commit();
        world.set(setting);
        for words in LOCAL.into_iter().chain(TALKING) {
            world.check(world.in_clone(words), Err(why)).await;
        }
        let command = json!({"argv": ["git", "-C", world.clone(), "status"], "cwd": world.rig.clones().join("job-1")});
        world.check(command, Err(why)).await;
        // Also as the place from where another clone is made.
        let target = world.rig.clones().join("job-2");
        world.check(json!({"argv": ["git", "clone", REMOTE, target], "cwd": world.clone()}), Err(why)).await;
    }
}

/// `.git` that is not the clone's own directory.
#[tokio::test]
async fn a_clone_is_where_it_is() {
    let not_its_own = ".git is not a plain directory of its own";
    type Change = fn(&World);
    let changes: [Change; 4] = [
        |world| {
            // a file
            let to = world.rig.place.path().join("elsewhere");
            std::fs::rename(world.clone().join(".git"), &to).unwrap();
            std::fs::write(world.clone().join(".git"), format!("gitdir: {}\n", to.display())).unwrap();
        },
        |world| {
            // a link
            let to = world.rig.place.path().join("elsewhere");
            std::fs::rename(world.clone().join(".git"), &to).unwrap();
            symlink(to, world.clone().join(".git")).unwrap();
        },
        |world| {
            // settings of another
            std::fs::write(world.clone().join(".git/commondir"), "/tmp\n").unwrap();
        },
        |world| {
            // linked settings
            let config = world.clone().join(".git/config");
            std::fs::rename(&config, world.rig.place.path().join("config")).unwrap();
            symlink(world.rig.place.path().join("config"), config).unwrap();
        },
    ];
    for change in changes {
        let world = World::new().await;
        change(&world);
        for words in LOCAL.into_iter().chain(TALKING) {
            world.check(world.in_clone(words), Err(not_its_own)).await;
        }
    }
}

/// A release's tree may hold whatever git can hold.
#[tokio::test]
async fn a_release_s_tree_runs_nothing() {
    let world = World::new().await;
    let clone = world.clone();
    let program = world.program.display().to_string();
    // Filters without a driver, attributes that name drivers, and a hook that is not git's business.
    world.write(".gitattributes", "* filter=x diff=x merge=x working-tree-encoding=UTF-8\n");
    world.write("hooks/post-checkout", &format!("#!/bin/sh\n{program}\n"));
    world.write(".gitconfig", &format!("[core]\n\tfsmonitor = {program}\n"));
    world.write(
        ".gitmodules",
        &format!(
            "[submodule \"s\"]\n\tpath = s\n\turl = ext::{program}\n\tfetchRecurseSubmodules = true\n\tignore = none\n"
        ),
    );
    // A whole repository inside, with settings.
    let inner = clone.join("vendor/inner");
    world.git(&clone, &["init", "-q", "--bare", inner.to_str().unwrap()]);
    let evil = format!(
        "[core]\n\trepositoryformatversion = 0\n\tbare = false\n\tworktree = .\n\tfsmonitor = {program}\n\
         [protocol \"ext\"]\n\tallow = always\n[url \"ext::{program}\"]\n\tinsteadOf = {REMOTE}\n"
    );
    std::fs::write(inner.join("config"), &evil).unwrap();
    std::fs::write(inner.join("refs/keep"), "").unwrap();
    std::fs::write(inner.join("objects/keep"), "").unwrap();
    world.commit();
    // A submodule's commit, which a checkout leaves as an empty directory.
    let head = world.git(&clone, &["rev-parse", "HEAD"]);
    world.git(&clone, &["update-index", "--add", "--cacheinfo", &format!("160000,{head},s")]);
    world.git(&clone, &["commit", "-q", "-m", "s"]);
    for words in LOCAL {
        world.check(world.in_clone(words), Ok(i32::from(words == NO_SIGNATURE))).await;
    }
    for words in TALKING {
        world.check(world.in_clone(words), Ok(128)).await;
    }
    // The repository inside is none that a request may enter, neither from within nor by a file that leads there.
    let deeper = "directly below the clone root";
    world.check(json!({"argv": ["git", "status"], "cwd": inner}), Err(deeper)).await;
    world.check(json!({"argv": ["git", "-C", inner, "status"]}), Err(deeper)).await;
    for file in [".git", "HEAD", ".gnupg/gpg.conf", ".netrc", "git/attributes", ".gitconfig"] {
        for argv in [json!(["git", "ls-remote", REMOTE]), json!(["git", "-C", clone, "verify-tag", "v1"])] {
            let text = format!("gitdir: {}\n", inner.display());
            let request = json!({"argv": argv, "stdin": text, "stdin_file": file});
            world.check(request, Err("git and az take no file")).await;
        }
    }
    // The job's directory itself looks like a repository, and is none: its tree was moved up, and its .git is gone.
    std::fs::remove_dir_all(clone.join(".git")).unwrap();
    for name in ["HEAD", "config", "objects", "refs"] {
        std::fs::rename(inner.join(name), clone.join(name)).unwrap();
    }
    for words in LOCAL {
        world.check(world.in_clone(words), Ok(if words.starts_with("git config") { 1 } else { 128 })).await;
    }
}

/// A repository around the clones, or around the requests' own directories, is not taken for theirs.
#[tokio::test]
async fn nothing_is_found_above() {
    let world = World::new().await;
    let program = world.program.display().to_string();
    let around = |rig: &Rig, settings: &str| {
        for directory in [rig.clones(), rig.place.path().join("requests"), rig.place.path().to_owned()] {
            world.git(&directory, &["init", "-q"]);
            std::fs::write(directory.join(".git/config"), format!("[core]\n\trepositoryformatversion = 0\n{settings}"))
                .unwrap();
        }
    };
    around(&world.rig, &format!("\tfsmonitor = {program}\n\tpager = {program}\n"));
    let empty = world.rig.clones().join("job-3");
    std::fs::create_dir(&empty).unwrap();
    world.check(json!({"argv": ["git", "status"], "cwd": empty}), Ok(128)).await;
    world.check(json!({"argv": ["git", "rev-parse", "HEAD"], "cwd": empty}), Ok(128)).await;
    // Where no clone is named, git is started in the request's directory. Settings found above it would send it elsewhere.
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let remote = format!("http://{closed}/a.git");
    let variables = [("UPGRADE_GIT_REMOTE", remote.as_str()), ("EXEC_ALLOW_LOOPBACK_REMOTE", "true")];
    let rig = Rig::start(&variables).await;
    let there = elsewhere.local_addr().unwrap();
    around(&rig, &format!("[url \"http://{there}/\"]\n\tinsteadOf = http://{closed}/\n"));
    for argv in [json!(["git", "ls-remote", remote]), json!(["git", "clone", remote, rig.clones().join("job-1")])] {
        let done = rig.exec(json!({"argv": argv})).await;
        assert!(done.exit_code == 128 && done.stderr.contains(&closed.to_string()), "{argv}: {done:?}");
        assert!(elsewhere.accept().is_err(), "{argv} went elsewhere");
    }
}

/// Links that a release brings, and what else az would read.
#[tokio::test]
async fn az_reads_the_clone_alone() {
    let world = World::new().await;
    let clone = world.clone();
    let link = "a link leads out of the clone root";
    symlink("/etc", clone.join("out")).unwrap();
    symlink("../../", clone.join("up")).unwrap();
    symlink("/etc/passwd", clone.join("Dockerfile.out")).unwrap();
    std::fs::create_dir_all(clone.join("ctx/deep")).unwrap();
    std::fs::create_dir_all(clone.join("odd/odd")).unwrap();
    std::fs::create_dir_all(clone.join("bare")).unwrap();
    std::fs::write(clone.join("odd/Dockerfile"), "").unwrap();
    symlink("/dev/zero", clone.join("ctx/.dockerignore")).unwrap();
    symlink("/dev/zero", clone.join("odd/odd/Dockerfile.dockerignore")).unwrap();
    symlink("/etc/passwd", clone.join("bare/Dockerfile")).unwrap();
    for (words, why) in [
        ("out", link),
        ("up", link),
        ("out/ssl", link),
        ("--file Dockerfile.out .", link),
        ("--file out/passwd .", link),
        ("ctx", link),
        ("odd", link),
        ("bare", link),
        // What is no directory is a remote repository to az.
        ("nothing", "no directory of the clone"),
        ("Dockerfile", "no directory of the clone"),
        ("github.example/evil/x.git", "no directory of the clone"),
        ("github.com/evil/x.git", "must be relative and stay in the clone"),
        ("GitHub.com/evil/x.git", "must be relative and stay in the clone"),
        ("git@evil.example/x.git", "must be relative and stay in the clone"),
        (".git", "must be relative and stay in the clone"),
        ("api/../.git", "must be relative and stay in the clone"),
    ] {
        world.check(world.build(words), Err(why)).await;
    }
    let mut elsewhere = world.build(".");
    for (cwd, why) in [
        (clone.join("out"), link),
        (world.rig.clones(), "below the clone root"),
        (PathBuf::from("/"), "below the clone root"),
    ] {
        elsewhere["cwd"] = json!(cwd);
        world.check(elsewhere.clone(), Err(why)).await;
    }
    for file in [".azure/config", "azure.py", "x"] {
        let show = json!(["az", "containerapp", "show", "-n", "app", "-g", "rg"]);
        let request = json!({"argv": show, "stdin": "[defaults]\n", "stdin_file": file});
        world.check(request, Err("git and az take no file")).await;
    }
    std::fs::create_dir(clone.join(".azure")).unwrap();
    let mut deeper = world.build(".");
    deeper["cwd"] = json!(clone.join("api"));
    for request in [world.build("."), deeper] {
        world.check(request, Err("az would take its settings from")).await;
    }
}

/// Clones go below the root and nowhere else, whatever stands there.
#[tokio::test]
async fn clones_go_where_they_belong() {
    let world = World::new().await;
    let root = world.rig.clones();
    symlink("/tmp", root.join("away")).unwrap();
    symlink("/nowhere/yet", root.join("later")).unwrap();
    for (target, why) in [
        (root.join("away"), "a link leads out of the clone root"),
        (root.join("later"), "a link leads out of the clone root"),
        (root.join("job-1/api"), "directly below the clone root"),
        (root.clone(), "below the clone root"),
        (PathBuf::from("/tmp/x"), "below the clone root"),
    ] {
        world.check(json!({"argv": ["git", "clone", REMOTE, target]}), Err(why)).await;
    }
    for cwd in [root.join("away"), root.join("later")] {
        world.check(json!({"argv": ["git", "status"], "cwd": cwd}), Err("a link leads out of the clone root")).await;
    }
}

/// A remote that sends without end does not fill the disk.
#[tokio::test]
async fn a_clone_has_its_room() {
    let variables = [("UPGRADE_GIT_REMOTE", REMOTE), ("EXEC_CLONE_MAX_BYTES", "1048576")];
    let rig = Rig::start(&variables).await;
    let fills = "#!/bin/sh\nhead -c 3000000 /dev/zero > large\nexec sleep 600\n";
    script_at(&rig.place.path().join("bin/git"), fills);
    let clone = rig.clones().join("job-1");
    std::fs::create_dir(&clone).unwrap();
    let request = json!({"argv": ["git", "checkout", "v1"], "cwd": clone});
    let done = rig.exec(request.clone()).await;
    assert!(done.exit_code == 128 && !done.timed_out && done.stderr.contains("EXEC_CLONE_MAX_BYTES"), "{done:?}");
    let (lines, summary) = rig.stream(request).await;
    assert!(summary.exit_code == 128 && lines.last().unwrap().1.contains("EXEC_CLONE_MAX_BYTES"), "{lines:?}");
}

/// Where enforcing is not on yet, the same is run, and what would have been refused is only reported.
#[tokio::test]
async fn audit_runs_what_enforce_refuses() {
    let rig = Rig::start(&[("EXEC_POLICY", "audit"), ("UPGRADE_GIT_REMOTE", REMOTE)]).await;
    let clone = rig.clones().join("job-1");
    std::fs::create_dir(&clone).unwrap();
    let git = |words: &[&str]| json!({"argv": ([&["git"], words].concat()), "cwd": clone});
    assert_eq!(rig.exec(git(&["init", "-q"])).await.exit_code, 0);
    assert_eq!(rig.exec(git(&["config", "core.fsmonitor", "false"])).await.exit_code, 0);
    assert_eq!(rig.exec(git(&["status"])).await.exit_code, 0);
}
