//! The git source against a real git server, and against attackers.

#[path = "support/git_server.rs"]
mod git_server;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use git_server::{Mode, Server};
use replank_adapters::source::conformance;
use replank_adapters::source::git::outbound::Resolver;
use replank_adapters::source::git::{Credential, GitConfig, GitSource};
use replank_core::fault::{Class, Fault};
use replank_core::ports::{Log, NoLog, Progress, Source, Stream, Tree};
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, JobId, Version};

/// Runs git as the release's author and returns what it prints.
fn git(dir: &Path, args: &[&str]) -> String {
    let out = std::process::Command::new("git")
        .args([
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@example.com",
            "-c",
            "init.defaultBranch=main",
            "-c",
            "protocol.file.allow=always",
        ])
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .expect("git");
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

struct World {
    dir: tempfile::TempDir,
    server: Server,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let root = dir.path().join("srv");
        fs::create_dir_all(root.join("repo.git")).expect("directory");
        git(&root.join("repo.git"), &["init", "-q"]);
        let server = Server::start(&root).await;
        let world = Self { dir, server };
        world.commit("Dockerfile", "FROM scratch\n");
        world
    }

    fn repo(&self) -> PathBuf {
        self.dir.path().join("srv/repo.git")
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn git(&self, args: &[&str]) -> String {
        git(&self.repo(), args)
    }

    fn commit(&self, file: &str, content: &str) -> CommitSha {
        let path = self.repo().join(file);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, content).expect("file");
        self.commit_all()
    }

    fn commit_all(&self) -> CommitSha {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", "x"]);
        self.head("HEAD")
    }

    fn head(&self, of: &str) -> CommitSha {
        CommitSha::new(self.git(&["rev-parse", &format!("{of}^{{commit}}")])).expect("sha")
    }

    fn tag(&self, name: &str) -> CommitSha {
        self.git(&["tag", name]);
        self.head(name)
    }

    fn config(&self) -> GitConfig {
        let remote = format!("http://127.0.0.1:{}/repo.git", self.server.port);
        let mut config = GitConfig::new(remote, self.work());
        config.allow_loopback = true;
        config.limits.refs_time = Duration::from_secs(20);
        config
    }

    fn source(&self) -> GitSource {
        GitSource::new(self.config()).expect("source")
    }
}

fn version(text: &str) -> Version {
    text.parse().expect("version")
}

fn release(tag: &str, commit: &CommitSha) -> Target {
    Target {
        kind: TargetKind::Release,
        version: version(tag),
        commit: commit.clone(),
        raw_ref: format!("refs/tags/{tag}"),
    }
}

fn job() -> JobId {
    JobId::new("job-1").expect("job")
}

#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl Log for Memory {
    fn write(&self, _: Stream, bytes: &[u8]) {
        self.0.lock().expect("lock").extend_from_slice(bytes);
    }
    fn progress(&self, _: Progress) {}
}

impl Memory {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("lock")).into_owned()
    }
}

fn told(result: Result<impl std::fmt::Debug, Fault>) -> (Class, String) {
    let fault = result.expect_err("a fault");
    (fault.class, format!("{}; {}", fault.chain(), fault.advice))
}

/// Nothing of a fetch is left that could be taken for a tree.
fn assert_no_tree(world: &World) {
    let left: Vec<_> =
        fs::read_dir(world.work().join("job-1")).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn conforms_to_the_port() {
    let world = World::new().await;
    let one = world.tag("v1.0.0");
    let middle = world.commit("a/b.txt", "middle");
    world.git(&["tag", "-a", "-m", "t", "v1.1.0"]);
    let two = world.commit("a/b.txt", "two");
    world.git(&["tag", "-a", "-m", "t", "inner"]);
    world.git(&["tag", "-a", "-m", "a tag of a tag", "v1.2.0", "inner"]);
    world.git(&["tag", "not-a-release"]);
    let head = world.commit("a/b.txt", "three");
    let expect = conformance::World {
        releases: vec![(version("1.2.0"), two), (version("1.1.0"), middle), (version("1.0.0"), one)],
        branch: ("refs/heads/main".to_owned(), head),
        file: ("a/b.txt".to_owned(), b"two".to_vec()),
    };
    conformance::check(&world.source(), &expect).await.expect("conforms");
    // The same on the other git of the machine, where there is one.
    let mut config = world.config();
    config.git = "/usr/bin/git".into();
    conformance::check(&GitSource::new(config).expect("source"), &expect).await.expect("conforms");
}

#[tokio::test]
async fn a_commit_of_the_branch_is_fetched_by_its_id() {
    let world = World::new().await;
    let older = world.commit("f", "older");
    world.commit("f", "newer");
    let target = Target {
        kind: TargetKind::Commit,
        version: version("1.0.0").at_commit(&older),
        commit: older.clone(),
        raw_ref: "refs/heads/main".to_owned(),
    };
    let log = Memory::default();
    let tree = world.source().fetch(&job(), &target, &log).await.expect("tree");
    assert_eq!(fs::read(tree.path.join("f")).expect("file"), b"older");
    assert!(log.text().contains("checkout --detach"), "{}", log.text());
    let gone = Target { commit: CommitSha::new("1".repeat(40)).expect("sha"), ..target };
    told(world.source().fetch(&JobId::new("job-2").expect("job"), &gone, &NoLog).await);
}

#[tokio::test]
async fn bad_answers_are_sorted() {
    let world = World::new().await;
    world.tag("v1.0.0");
    let mut config = world.config();
    config.limits.refs_time = Duration::from_secs(2);
    let source = GitSource::new(config).expect("source");
    let advert = "application/x-git-upload-pack-advertisement";
    for (mode, class, part) in [
        (Mode::Status(401, ""), Class::Permanent, "wants a credential"),
        (Mode::Status(403, ""), Class::Permanent, "forbids"),
        (Mode::Status(404, ""), Class::Permanent, "no such repository"),
        (Mode::Status(429, ""), Class::Transient, "patience"),
        (Mode::Status(500, ""), Class::Transient, "internal problem"),
        (Mode::Status(503, ""), Class::Transient, "internal problem"),
        (Mode::Status(418, ""), Class::Permanent, "refuses the request"),
        (Mode::Status(204, ""), Class::Permanent, "refuses the request"),
        (
            Mode::Status(302, "location: http://u:hunter2@127.0.0.1:1/x.git?token=hunter2\r\n"),
            Class::Permanent,
            "(http://127.0.0.1/x.git)",
        ),
        (Mode::Body("text/html", b"<html>".to_vec()), Class::Permanent, "does not answer as a git server"),
        (Mode::Body(advert, b"<html>".to_vec()), Class::Permanent, "does not answer as a git server"),
        (Mode::Body(advert, b"".to_vec()), Class::Permanent, "does not answer as a git server"),
        (Mode::Body(advert, b"000cERR gone".to_vec()), Class::Permanent, "refuses to list"),
        (Mode::Body(advert, b"000eversion 2\n0018object-format=sha256".to_vec()), Class::Permanent, "not a SHA-1"),
        (Mode::Body(advert, vec![b'0'; 5 * 1024 * 1024]), Class::Permanent, "larger than 4194304 bytes"),
        (Mode::OldProtocol, Class::Permanent, "old version of git's protocol"),
        (Mode::Hang, Class::Transient, "did not answer in time"),
    ] {
        world.server.set(mode.clone());
        let (got, text) = told(source.refs().await);
        assert!(got == class && text.contains(part), "{class:?} {part}: {got:?} {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    world.server.set(Mode::Honest);
    let mut closed = world.config();
    closed.remote = "http://127.0.0.1:1/repo.git".to_owned();
    let (class, text) = told(GitSource::new(closed).expect("source").refs().await);
    assert!(class == Class::Transient && text.contains("cannot be reached"), "{text}");
    let mut absent = world.config();
    absent.remote = absent.remote.replace("repo.git", "absent.git");
    let (class, text) = told(GitSource::new(absent).expect("source").refs().await);
    assert!(class == Class::Permanent && text.contains("no such repository"), "{text}");
}

#[tokio::test]
async fn many_tags_and_evil_names() {
    let world = World::new().await;
    let head = world.head("HEAD");
    let mut packed = "# pack-refs with: peeled fully-peeled sorted \n".to_owned();
    let mut names: Vec<String> = (0..5_000).map(|n| format!("refs/tags/v0.{n}.0")).collect();
    names.extend(
        ["refs/tags/v9.9.9\u{202e}", "refs/tags/v01.0.0", "refs/tags/v9.9", "refs/tags/v$(touch x).1.1"]
            .map(str::to_owned),
    );
    names.sort();
    for name in names {
        packed.push_str(&format!("{head} {name}\n"));
    }
    fs::write(world.repo().join(".git/packed-refs"), packed).expect("refs");
    let begun = Instant::now();
    let refs = world.source().refs().await.expect("refs");
    assert_eq!(refs.tags.len(), 1_000);
    assert_eq!(refs.tags[0].version, version("0.4999.0"));
    assert!(refs.tags.iter().all(|t| t.refused.is_none()));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_moved_tag_names_both_commits() {
    let world = World::new().await;
    let chosen = world.tag("v1.0.0");
    let moved = world.commit("f", "evil");
    world.git(&["tag", "-f", "v1.0.0"]);
    let (class, text) = told(world.source().fetch(&job(), &release("v1.0.0", &chosen), &NoLog).await);
    assert_eq!(class, Class::Permanent);
    assert!(text.contains(chosen.as_str()) && text.contains(moved.as_str()), "{text}");
    assert_no_tree(&world);
}

#[tokio::test]
async fn a_branch_of_the_tags_name_is_refused() {
    let world = World::new().await;
    let chosen = world.tag("v1.0.0");
    world.commit("f", "evil");
    world.git(&["branch", "v1.0.0"]);
    let refs = world.source().refs().await.expect("refs");
    assert!(refs.tags[0].refused.is_some());
    let (class, text) = told(world.source().fetch(&job(), &release("v1.0.0", &chosen), &NoLog).await);
    assert!(class == Class::Permanent && text.contains("a branch named v1.0.0"), "{text}");
    let (class, text) = told(world.source().fetch(&job(), &release("v1.0.1", &chosen), &NoLog).await);
    assert!(class == Class::Permanent && text.contains("no longer on the remote"), "{text}");
    let odd = Target { raw_ref: "refs/heads/v1.0.0".to_owned(), ..release("v1.0.0", &chosen) };
    assert_eq!(told(world.source().fetch(&job(), &odd, &NoLog).await).0, Class::Permanent);
}

#[tokio::test]
async fn a_tag_of_no_commit_is_refused() {
    let world = World::new().await;
    for (tag, what) in [("v1.0.0", "HEAD^{tree}"), ("v2.0.0", "HEAD:Dockerfile")] {
        for annotated in [true, false] {
            let object = world.git(&["rev-parse", what]);
            let args: &[&str] =
                if annotated { &["tag", "-f", "-a", "-m", "t", tag, &object] } else { &["tag", "-f", tag, &object] };
            world.git(args);
            let sha = CommitSha::new(object.clone()).expect("sha");
            let (class, text) = told(world.source().fetch(&job(), &release(tag, &sha), &NoLog).await);
            let fits = class == Class::Permanent && text.contains("not a commit");
            assert!(fits, "{tag} annotated={annotated}: {class:?} {text}");
            assert_no_tree(&world);
        }
    }
}

#[tokio::test]
async fn submodules_and_lfs_are_refused_by_name() {
    for (file, content, part) in [
        (".gitmodules", "[submodule \"x\"]\n\tpath = x\n\turl = ../x.git\n", "submodules are not supported"),
        (".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n", "LFS is not supported"),
        ("deep/er/.gitattributes", "* filter=lfs\n", "LFS is not supported (deep/er/.gitattributes)"),
    ] {
        let world = World::new().await;
        world.commit(file, content);
        let sha = world.tag("v1.0.0");
        let (class, text) = told(world.source().fetch(&job(), &release("v1.0.0", &sha), &NoLog).await);
        assert!(class == Class::Permanent && text.contains(part), "{text}");
        assert_no_tree(&world);
    }
    let world = World::new().await;
    let head = world.head("HEAD");
    world.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{head},sub")]);
    world.git(&["commit", "-q", "-m", "gitlink"]);
    let sha = world.tag("v1.0.0");
    let (class, text) = told(world.source().fetch(&job(), &release("v1.0.0", &sha), &NoLog).await);
    assert!(class == Class::Permanent && text.contains("submodules are not supported (sub)"), "{text}");
}

#[tokio::test]
async fn paths_are_checked_in_the_commit_and_on_disk() {
    let world = World::new().await;
    world.commit("api/Dockerfile", "FROM scratch\n");
    symlink("/etc/passwd", world.repo().join("api/Passwd")).expect("link");
    symlink("../..", world.repo().join("api/up")).expect("link");
    symlink("api", world.repo().join("link")).expect("link");
    fs::write(world.repo().join(".gitattributes"), "* filter=evil diff=evil\n").expect("file");
    world.commit_all();
    let sha = world.tag("v1.0.0");
    let source = world.source();
    let tree = source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await.expect("tree");
    fs::write(tree.path.join("api/Late"), "FROM scratch\n").expect("file");
    for (dockerfile, context, expect) in [
        ("Dockerfile", ".", None),
        ("api/Dockerfile", "api", None),
        ("link/Dockerfile", "link", None),
        ("web/Dockerfile", ".", Some("the Dockerfile of api, \"web/Dockerfile\", is not in the release")),
        ("api", ".", Some("is not a regular file")),
        ("Dockerfile", "web", Some("the build context of api, \"web\", is not in the release")),
        ("Dockerfile", "Dockerfile", Some("is not a directory")),
        ("api/Passwd", ".", Some("out of the tree")),
        ("Dockerfile", "api/up", Some("out of the tree")),
        ("../x", ".", Some("'..'")),
        ("/etc/passwd", ".", Some("absolute")),
        (".git/config", ".", Some("git's own")),
        ("api/Late", ".", Some("not in the commit")),
    ] {
        match (source.check_paths(&tree, "api", dockerfile, context).await, expect) {
            (Ok(()), None) => {}
            (Err(fault), Some(part)) => {
                assert!(
                    fault.class == Class::Permanent && fault.chain().contains(part),
                    "{dockerfile}: {}",
                    fault.chain()
                );
            }
            (got, _) => panic!("{dockerfile} {context}: {got:?}"),
        }
    }
}

/// Command lines of processes that mention `text`.
fn processes(text: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").expect("proc").flatten();
    let lines = all
        .filter_map(|e| fs::read(e.path().join("cmdline")).ok())
        .map(|c| String::from_utf8_lossy(&c).replace('\0', " "));
    lines.filter(|line| line.contains(text)).collect()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not in time: {what}");
}

#[tokio::test]
async fn the_credential_is_nowhere() {
    let world = World::new().await;
    let sha = world.tag("v1.0.0");
    // "bob:hunter2hunter2" in base64.
    let basic = "Ym9iOmh1bnRlcjJodW50ZXIy";
    world.server.set(Mode::Auth(format!("Basic {basic}")));
    let url = format!("http://bob:hunter2hunter2@127.0.0.1:{}/repo.git", world.server.port);
    let source = GitSource::new(GitConfig { remote: url, ..world.config() }).expect("source");
    assert!(!format!("{source:?}").contains("hunter2") && !source.remote().contains("bob"));
    let log = Memory::default();
    let tree = source.fetch(&job(), &release("v1.0.0", &sha), &log).await.expect("tree");
    let config = fs::read_to_string(tree.path.join(".git/config")).expect("config");
    for text in [config, log.text()] {
        assert!(!text.contains("hunter2") && !text.contains(basic) && !text.contains("bob"), "{text}");
    }
    for file in ["FETCH_HEAD", "logs/HEAD", "packed-refs"] {
        let text = fs::read_to_string(tree.path.join(".git").join(file)).unwrap_or_default();
        assert!(!text.contains("hunter2") && !text.contains("bob"), "{text}");
    }
    let wrong = Credential { username: "bob".to_owned(), password: "wrong-secret".to_owned() };
    let source = GitSource::new(GitConfig { credential: Some(wrong), ..world.config() }).expect("source");
    let (class, text) = told(source.refs().await);
    assert!(
        class == Class::Permanent && text.contains("does not accept the credential") && !text.contains("wrong-secret"),
        "{text}"
    );

    // While the pack hangs, the children can be looked at; dropping the future ends them all.
    world.server.set(Mode::HangPack);
    let right = Credential { username: "bob".to_owned(), password: "hunter2hunter2".to_owned() };
    let source = GitSource::new(GitConfig { credential: Some(right), ..world.config() }).expect("source");
    let place = format!("127.0.0.1:{}", world.server.port);
    let target = release("v1.0.0", &sha);
    let task = tokio::spawn(async move { source.fetch(&JobId::new("job-2").expect("job"), &target, &NoLog).await });
    until("git-remote-http runs", || processes(&place).iter().any(|l| l.contains("remote-http"))).await;
    for line in processes(&place) {
        assert!(!line.contains("hunter2") && !line.contains(basic) && !line.contains("bob"), "{line}");
    }
    task.abort();
    until("the children are gone", || processes(&place).is_empty()).await;
}

#[tokio::test]
async fn children_start_from_an_empty_environment() {
    let world = World::new().await;
    let sha = world.tag("v1.0.0");
    let script = world.dir.path().join("git");
    let seen = world.dir.path().join("seen");
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = version ]; then echo git version 2.40.0; exit 0; fi\nenv > {}\nexit 128\n",
        seen.display()
    );
    fs::write(&script, text).expect("script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("mode");
    let source = GitSource::new(GitConfig { git: script.clone(), ..world.config() }).expect("source");
    let (class, text) = told(source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await);
    assert_eq!(class, Class::Transient, "{text}");
    let env = fs::read_to_string(&seen).expect("environment");
    let allowed =
        ["PATH=", "HOME=", "XDG_CONFIG_HOME=", "TMPDIR=", "LC_ALL=", "GIT_", "PWD=", "OLDPWD=", "SHLVL=", "_="];
    for line in env.lines() {
        assert!(allowed.iter().any(|a| line.starts_with(a)), "{line}");
    }
    for part in [
        "GIT_CONFIG_NOSYSTEM=1",
        "GIT_CONFIG_GLOBAL=/dev/null",
        "GIT_TERMINAL_PROMPT=0",
        "core.hooksPath",
        "http.followRedirects",
    ] {
        assert!(env.contains(part), "{part}: {env}");
    }
    fs::write(&script, "#!/bin/sh\necho git version 2.30.2\n").expect("script");
    let (class, text) = told(source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await);
    assert!(class == Class::Permanent && text.contains("too old"), "{text}");
    let source = GitSource::new(GitConfig { git: "/nonexistent/git".into(), ..world.config() }).expect("source");
    let (class, text) = told(source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await);
    assert!(class == Class::Permanent && text.contains("cannot be run"), "{text}");
}

#[tokio::test]
async fn a_fetch_has_limits() {
    let world = World::new().await;
    world.commit("zeros", &"0".repeat(64 * 1024 * 1024));
    let sha = world.tag("v1.0.0");
    let target = release("v1.0.0", &sha);

    let mut config = world.config();
    config.limits.disk_bytes = 1024 * 1024;
    // The checkout of the zeros has to last until the directory is measured.
    let slow = world.dir.path().join("git");
    let text = "#!/bin/sh\nif [ \"$1\" = clone ]; then git \"$@\"; sleep 60; else exec git \"$@\"; fi\n";
    fs::write(&slow, text).expect("script");
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).expect("mode");
    config.git = slow;
    let (class, text) = told(GitSource::new(config).expect("source").fetch(&job(), &target, &NoLog).await);
    assert!(class == Class::Permanent && text.contains("more than 1 MiB"), "{text}");
    assert_no_tree(&world);

    world.server.set(Mode::HangPack);
    let mut config = world.config();
    config.limits.clone_time = Duration::from_secs(1);
    let (class, text) = told(GitSource::new(config).expect("source").fetch(&job(), &target, &NoLog).await);
    assert!(class == Class::Transient && text.contains("longer than 1 s"), "{text}");
    assert_no_tree(&world);
    let place = format!("127.0.0.1:{}", world.server.port);
    until("the children are gone", || processes(&place).is_empty()).await;

    let mut config = world.config();
    config.limits.quiet_time = Duration::from_secs(1);
    let (class, text) = told(GitSource::new(config).expect("source").fetch(&job(), &target, &NoLog).await);
    assert!(class == Class::Transient && text.contains("git clone failed"), "{text}");

    world.server.set(Mode::CutPack);
    let (class, text) = told(world.source().fetch(&job(), &target, &NoLog).await);
    assert!(class == Class::Transient && text.contains("git clone failed"), "{text}");
    assert_no_tree(&world);

    world.server.set(Mode::Honest);
    // What a killed controller left behind is neither taken for a tree nor in the way.
    fs::create_dir_all(world.work().join("job-1/tmp-99/src")).expect("directory");
    fs::create_dir_all(world.work().join("job-1/src/.git")).expect("directory");
    world.source().fetch(&job(), &target, &NoLog).await.expect("tree");
    let left: Vec<_> =
        fs::read_dir(world.work().join("job-1")).expect("dir").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["src"]);
}

/// Answers the first time with loopback (allowed here), and ever after with a metadata service.
#[derive(Debug, Default)]
struct Rebinding(AtomicUsize);

#[async_trait::async_trait]
impl Resolver for Rebinding {
    async fn resolve(&self, _: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let first = self.0.fetch_add(1, Ordering::SeqCst) == 0;
        Ok(vec![SocketAddr::new(if first { [127, 0, 0, 1].into() } else { [169, 254, 169, 254].into() }, port)])
    }
}

#[tokio::test]
async fn a_name_is_resolved_once_and_pinned() {
    let world = World::new().await;
    let sha = world.tag("v1.0.0");
    // Nobody but the resolver above knows this name: a child that resolves for itself fails.
    let remote = format!("http://git.example.invalid:{}/repo.git", world.server.port);
    let config = GitConfig { remote, ..world.config() };
    let resolver = Arc::new(Rebinding::default());
    let source = GitSource::with_resolver(config.clone(), resolver.clone()).expect("source");
    let tree: Tree = source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await.expect("tree");
    assert!(tree.path.join("Dockerfile").exists());
    assert_eq!(resolver.0.load(Ordering::SeqCst), 1);
    let (class, text) = told(source.refs().await);
    assert!(class == Class::Permanent && text.contains("metadata service"), "{text}");

    let https = GitConfig { remote: config.remote.replace("http:", "https:"), allow_loopback: false, ..config };
    let source = GitSource::with_resolver(https, Arc::new(Rebinding::default())).expect("source");
    let (class, text) = told(source.refs().await);
    assert!(class == Class::Permanent && text.contains("loopback remotes are not allowed"), "{text}");
}

/// The look before the fetch sees an honest server, and git is then sent elsewhere: into the private network, for example.
#[tokio::test]
async fn git_follows_no_redirect() {
    let world = World::new().await;
    let sha = world.tag("v1.0.0");
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    elsewhere.set_nonblocking(true).expect("not blocking");
    world.server.set(Mode::RedirectGit(format!("http://{}", elsewhere.local_addr().expect("address"))));
    let mut config = world.config();
    config.limits.clone_time = Duration::from_secs(10);
    let source = GitSource::new(config).expect("source");
    let commit = Target {
        kind: TargetKind::Commit,
        version: version("1.0.0").at_commit(&sha),
        commit: sha.clone(),
        raw_ref: "refs/heads/main".to_owned(),
    };
    for target in [release("v1.0.0", &sha), commit] {
        let (class, text) = told(source.fetch(&job(), &target, &NoLog).await);
        assert!(class == Class::Transient && text.contains("git clone failed"), "{text}");
        assert!(elsewhere.accept().is_err(), "git went where it was sent: {text}");
        assert_no_tree(&world);
    }
}

/// How the child of the next test knows what to fetch: address, commit and work directory.
const FETCH: &str = "REPLANK_TEST_FETCH";

#[tokio::test]
#[ignore = "a part of the next test, run by it in an environment of its own"]
async fn fetches_what_it_is_told() {
    let Ok(told) = std::env::var(FETCH) else { return };
    let [remote, sha, work] = told.split(' ').collect::<Vec<_>>()[..] else { panic!("{told}") };
    let mut config = GitConfig::new(remote, work);
    config.allow_loopback = true;
    let sha = CommitSha::new(sha).expect("sha");
    let source = GitSource::new(config).expect("source");
    source.fetch(&job(), &release("v1.0.0", &sha), &NoLog).await.expect("tree");
}

/// What stands in the controller's own environment, and in its user's settings, reaches no git: no program, no other place.
#[tokio::test]
async fn a_hostile_environment_reaches_no_child() {
    let world = World::new().await;
    world.commit(".gitattributes", "* filter=evil diff=evil\n");
    let sha = world.tag("v1.0.0");
    let (dir, home) = (world.dir.path(), world.dir.path().join("home"));
    let (ran, program, trace) = (dir.join("ran"), dir.join("program"), dir.join("trace"));
    fs::create_dir_all(home.join("template/hooks")).expect("directories");
    let hook = home.join("template/hooks/post-checkout");
    for script in [&program, &hook] {
        fs::write(script, format!("#!/bin/sh\ntouch '{}'\ncat\n", ran.display())).expect("script");
        fs::set_permissions(script, fs::Permissions::from_mode(0o755)).expect("mode");
    }
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    elsewhere.set_nonblocking(true).expect("not blocking");
    let there = format!("http://{}/", elsewhere.local_addr().expect("address"));
    let (run, hooks) = (program.display().to_string(), home.join("template/hooks").display().to_string());
    let remote = format!("http://127.0.0.1:{}/repo.git", world.server.port);
    let settings = format!(
        "[core]\n\tfsmonitor = {run}\n\thooksPath = {hooks}\n\tsshCommand = {run}\n[filter \"evil\"]\n\tsmudge = {run}\n\
         [credential]\n\thelper = !{run}\n[init]\n\ttemplateDir = {0}\n[http]\n\tproxy = {there}\n\
         [url \"{there}\"]\n\tinsteadOf = http://127.0.0.1\n",
        home.join("template").display()
    );
    let file = home.join(".gitconfig");
    fs::write(&file, settings).expect("settings");
    let text = |path: &Path| path.display().to_string();
    let mut command = tokio::process::Command::new(std::env::current_exe().expect("this binary"));
    command
        .args(["--exact", "fetches_what_it_is_told", "--ignored", "--nocapture"])
        .env(FETCH, format!("{remote} {sha} {}", text(&world.work())))
        .kill_on_drop(true);
    for (name, value) in [
        ("HOME", text(&home)),
        ("XDG_CONFIG_HOME", text(&home)),
        ("GIT_CONFIG", text(&file)),
        ("GIT_CONFIG_GLOBAL", text(&file)),
        ("GIT_CONFIG_SYSTEM", text(&file)),
        ("GIT_CONFIG_PARAMETERS", format!("'core.fsmonitor'='{run}' 'filter.evil.smudge'='{run}'")),
        ("GIT_CONFIG_COUNT", "2".to_owned()),
        ("GIT_CONFIG_KEY_0", "core.hooksPath".to_owned()),
        ("GIT_CONFIG_VALUE_0", hooks.clone()),
        ("GIT_CONFIG_KEY_1", "http.proxy".to_owned()),
        ("GIT_CONFIG_VALUE_1", there.clone()),
        ("GIT_TEMPLATE_DIR", text(&home.join("template"))),
        ("GIT_SSH_COMMAND", run.clone()),
        ("GIT_PROXY_COMMAND", run.clone()),
        ("GIT_ASKPASS", run.clone()),
        ("GIT_EXTERNAL_DIFF", run.clone()),
        ("GIT_DIR", text(&home)),
        ("GIT_WORK_TREE", text(&home)),
        ("GIT_OBJECT_DIRECTORY", text(&home)),
        ("GIT_ALLOW_PROTOCOL", "ext:file".to_owned()),
        ("GIT_TRACE", text(&trace)),
        ("http_proxy", there.clone()),
        ("HTTP_PROXY", there.clone()),
        ("ALL_PROXY", there.clone()),
    ] {
        command.env(name, value);
    }
    let out = tokio::time::timeout(Duration::from_secs(60), command.output()).await.expect("in time").expect("child");
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.contains("1 passed"), "{said}");
    assert!(!ran.exists(), "a program of the environment ran: {said}");
    assert!(!trace.exists() && elsewhere.accept().is_err(), "{said}");
    assert!(world.work().join("job-1/src/Dockerfile").exists());
}
