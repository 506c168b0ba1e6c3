//! The builder against a real engine: good builds, bad Dockerfiles, adoption, cancelling.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bollard::query_parameters::RemoveImageOptionsBuilder;
use replank_core::fault::{Class, Fault};
use replank_core::phase::{Built, Recipe};
use replank_core::ports::{NoLog, Progress, Tree};
use replank_core::words::{AppName, CommitSha, ComponentName, InstallationId, JobId, Nonce, OpKey, Version};

use super::*;

/// Keeps the last of a log and counts the rest, as the real one does.
#[derive(Default)]
struct Kept {
    text: Mutex<Vec<u8>>,
    bytes: AtomicU64,
    progress: Mutex<Vec<Progress>>,
    wake: tokio::sync::Notify,
}

impl Log for Kept {
    fn write(&self, _: Stream, bytes: &[u8]) {
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut text = self.text.lock().expect("lock");
        if text.len() < 1 << 20 {
            text.extend_from_slice(bytes);
        }
        self.wake.notify_waiters();
    }
    fn progress(&self, progress: Progress) {
        self.progress.lock().expect("lock").push(progress);
    }
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("lock")).into_owned()
    }
}

fn engine() -> Engine {
    let socket = std::env::var_os("REPLANK_TEST_DOCKER")
        .expect("REPLANK_TEST_DOCKER must name the socket of a Docker engine for tests; `cargo xtask test` sets it");
    Engine::connect(&PathBuf::from(socket)).expect("engine")
}

fn builder(config: DockerBuilderConfig) -> DockerBuilder {
    DockerBuilder::new(engine(), config).expect("builder")
}

/// A tree with a static busybox, and one build of it under a name of its own.
struct Case {
    dir: tempfile::TempDir,
    spec: BuildSpec,
}

static COUNT: AtomicU64 = AtomicU64::new(0);

impl Case {
    fn new(dockerfile: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        fs::copy("/bin/busybox", dir.path().join("busybox")).expect("a static busybox (Debian: busybox-static)");
        let unique = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let job = JobId::new(format!("job-{unique}")).expect("job");
        let nonce = Nonce::new("0123456789abcdef0123456789abcdef").expect("nonce");
        let recipe = Recipe {
            dockerfile: "Dockerfile".to_owned(),
            context: ".".to_owned(),
            target: None,
            args: BTreeMap::from([("APP_VERSION".to_owned(), "1.2.3".to_owned())]),
            platform: None,
            secrets: Vec::new(),
            repository: format!("replank-test/builder-{unique}"),
            unlabelled: false,
        };
        let spec = BuildSpec {
            installation: InstallationId::new("abcdefghij0123456789").expect("id"),
            application: AppName::new("shop").expect("name"),
            key: OpKey::derive(&job, "build-api", 1, &nonce),
            job,
            attempt: 1,
            resumed: false,
            component: ComponentName::new("api").expect("name"),
            recipe,
            tree: Tree {
                path: dir.path().to_owned(),
                commit: CommitSha::new("a".repeat(40)).expect("commit"),
                signed_by: None,
            },
            version: Version::release(1, 2, 3),
            remote: "https://git.example/shop.git".to_owned(),
        };
        let case = Self { dir, spec };
        case.write("Dockerfile", dockerfile);
        case
    }

    /// `FROM scratch` with a shell, then `rest`.
    fn with_shell(rest: &str) -> Self {
        // Steps that were run for an earlier test say nothing: each case is new to the engine's cache.
        #[expect(clippy::disallowed_methods, reason = "a test that needs a number nobody used before")]
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("clock").as_nanos();
        Self::new(&format!("{SHELL}ENV UNIQUE={now}-{}\n{rest}\n", COUNT.fetch_add(1, Ordering::Relaxed)))
    }

    fn write(&self, path: &str, text: &str) {
        let full = self.dir.path().join(path);
        fs::create_dir_all(full.parent().expect("parent")).expect("directories");
        fs::write(full, text).expect("file");
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    async fn clean(&self) {
        let names = Names::of(&self.spec);
        for name in [names.attempt, names.version] {
            let options = RemoveImageOptionsBuilder::default().force(true).build();
            // Not built is as good as removed.
            engine().docker().remove_image(&name, Some(options), None).await.map(drop).unwrap_or_default();
        }
    }
}

const SHELL: &str = "FROM scratch\nCOPY busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\n";

async fn build(case: &Case, config: DockerBuilderConfig) -> (Result<Built, Fault>, Kept) {
    let log = Kept::default();
    let built = builder(config).build(&case.spec, &log).await;
    (built, log)
}

/// Prints files of a built image by building on it.
async fn look(case: &Case, command: &str) -> String {
    let viewer = Case::with_shell(&format!(
        "COPY --from={} / /seen\nRUN cd /seen && busybox() {{ /bin/busybox \"$@\"; }} && {command}\n",
        Names::of(&case.spec).attempt
    ));
    let (built, log) = build(&viewer, DockerBuilderConfig::default()).await;
    viewer.clean().await;
    built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    log.text()
}

#[tokio::test]
async fn a_build_is_labelled_logged_and_adopted() {
    let case = Case::with_shell("ARG APP_VERSION\nLABEL io.replank.key=forged\nRUN echo version is $APP_VERSION");
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    let built = built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    assert!(!built.adopted);
    let ImageId::Engine { id, name } = &built.image else { panic!("{:?}", built.image) };
    assert_eq!(*name, format!("{}:v1.2.3-{}", case.spec.recipe.repository, case.spec.key));

    let text = log.text();
    assert!(text.starts_with("POST /build version=2 "), "{text}");
    for part in ["version is 1.2.3", "DONE", "RUN echo version"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let progress = log.progress.lock().expect("lock").clone();
    assert!(progress.last().is_some_and(|p| p.done == p.total && p.total >= 3), "{progress:?}");

    let image = engine().docker().inspect_image(id.as_str()).await.expect("image");
    let labels = image.config.and_then(|c| c.labels).expect("labels");
    for (name, value) in labels_of(&case.spec) {
        assert_eq!(labels.get(name), Some(&value), "{name}");
    }
    assert!(image.repo_tags.expect("tags").contains(&format!("{}:v1.2.3", case.spec.recipe.repository)));

    // The same key again: found, not built, even though the tree is gone.
    let mut again = case.spec.clone();
    again.tree.path = PathBuf::from("/nonexistent");
    let log = Kept::default();
    let adopted = builder(DockerBuilderConfig::default()).build(&again, &log).await.expect("adopted");
    assert!(adopted.adopted);
    assert_eq!(adopted.image, built.image);

    // Under the same name, but of another commit: not ours to take, not ours to replace.
    again.tree.commit = CommitSha::new("b".repeat(40)).expect("commit");
    let fault = builder(DockerBuilderConfig::default()).build(&again, &NoLog).await.expect_err("conflict");
    assert_eq!(fault.class, Class::Conflict, "{}", fault.chain());
    case.clean().await;
}

#[tokio::test]
async fn the_context_is_what_docker_would_send() {
    let case = Case::with_shell("COPY . /app");
    case.write(
        ".dockerignore",
        "# comment\n*.log\n!keep.log\nnode_modules\nDockerfile\n.dockerignore\nsecret/**\n!secret/public\n",
    );
    for path in ["a.log", "keep.log", "node_modules/x/y", "src/main.c", "secret/key", "secret/public"] {
        case.write(path, path);
    }
    std::os::unix::fs::symlink("/etc/shadow", case.path().join("link")).expect("link");
    std::os::unix::fs::symlink("src", case.path().join("srclink")).expect("link");
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    let text =
        look(&case, "cd app && busybox find . | busybox sort | busybox sed s/^/FOUND:/ && busybox readlink link").await;
    let found: Vec<&str> =
        text.lines().filter(|l| !l.contains("RUN ")).filter_map(|l| l.split_once("FOUND:").map(|(_, p)| p)).collect();
    assert_eq!(
        found,
        [".", "./busybox", "./keep.log", "./link", "./secret", "./secret/public", "./src", "./src/main.c", "./srclink"],
        "{text}"
    );
    assert!(text.contains(" /etc/shadow"), "the link is stored: {text}");
    case.clean().await;
}

#[tokio::test]
async fn a_dockerfile_may_lie_outside_of_its_context() {
    let case = Case::new("not this one");
    case.write("ctx/file", "inside");
    fs::copy("/bin/busybox", case.path().join("ctx/busybox")).expect("busybox");
    case.write("docker/api.Dockerfile", &format!("{SHELL}COPY . /app\n"));
    case.write("docker/api.Dockerfile.dockerignore", "dropped\n");
    case.write("ctx/dropped", "x");
    let mut case = case;
    case.spec.recipe.context = "ctx".to_owned();
    case.spec.recipe.dockerfile = "docker/api.Dockerfile".to_owned();
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    let text = look(&case, "busybox ls app | busybox tr '\\n' ','").await;
    assert!(text.contains(" busybox,file,"), "{text}");
    case.clean().await;
}

#[tokio::test]
async fn bad_dockerfiles_fail_with_their_reason() {
    let shell = |rest: &str| format!("{SHELL}{rest}\n");
    for (name, dockerfile, target, expect) in [
        (
            "fails",
            shell("RUN echo before; echo the reason >&2; exit 3"),
            None,
            &["failed at step", "exit 3", "the reason"][..],
        ),
        ("copies what is not there", shell("COPY nothing /"), None, &["failed at step", "nothing"]),
        ("copies from outside", shell("COPY ../../../etc/passwd /"), None, &["failed at step", "passwd"]),
        ("is not one", "FROM\n".to_owned(), None, &["refused", "FROM"]),
        ("is empty", String::new(), None, &["refused", "empty"]),
        ("has no such target", shell(""), Some("nowhere"), &["refused", "nowhere"]),
        (
            "wants a secret that is not its own",
            shell("RUN --mount=type=secret,id=other,required=true echo x"),
            None,
            &["wants secrets", "other"],
        ),
    ] {
        let mut case = Case::new(&dockerfile);
        case.spec.recipe.target = target.map(str::to_owned);
        let (built, log) = build(&case, DockerBuilderConfig::default()).await;
        let fault = built.expect_err(name);
        assert_eq!(fault.class, Class::Permanent, "{name}: {}", fault.chain());
        let told = fault.told();
        for part in expect {
            assert!(told.what.contains(part), "{name}: {part:?} in {:?}\n{}", told.what, log.text());
        }
        assert!(!told.advice.is_empty(), "{name}");
        case.clean().await;
    }
}

#[tokio::test]
async fn a_platform_is_built_for_when_it_is_the_engine_s_and_refused_clearly_when_it_is_none() {
    let mut case = Case::with_shell("ARG TARGETPLATFORM\nRUN echo built for $TARGETPLATFORM");
    let version = engine().docker().version().await.expect("version");
    let own = format!("{}/{}", version.os.expect("os"), version.arch.expect("architecture"));
    case.spec.recipe.platform = Some(own.clone());
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    let built = built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    assert!(log.text().contains(&format!("platform={own}")), "{}", log.text());
    assert!(log.text().contains(&format!("built for {own}")), "{}", log.text());
    let image = engine().docker().inspect_image(&built.image.reference()).await.expect("image");
    assert_eq!(format!("{}/{}", image.os.expect("os"), image.architecture.expect("architecture")), own);
    case.clean().await;

    for (platform, expect) in [
        ("linux/nonsense/of/parts", "cannot parse platform"),
        ("banana", "banana"),
        ("plan9/amd64", "operating system is not supported"),
    ] {
        let mut case = Case::with_shell("RUN echo built all the same");
        case.spec.recipe.platform = Some(platform.to_owned());
        let (built, log) = build(&case, DockerBuilderConfig::default()).await;
        let fault = built.expect_err(platform);
        assert_eq!(fault.class, Class::Permanent, "{platform}: {}", fault.chain());
        let told = fault.told();
        eprintln!("{platform}: {}", told.sentence());
        assert!(told.what.contains("api") && told.what.contains(expect), "{platform}: {:?}\n{}", told.what, log.text());
        assert!(!told.advice.is_empty(), "{platform}: nothing says what to do");
        case.clean().await;
    }
}

#[tokio::test]
async fn a_missing_dockerfile_or_a_huge_context_is_refused_before_anything_is_sent() {
    let mut case = Case::with_shell("");
    let limits = ContextLimits { entries: 100, bytes: 1000 };
    let config = DockerBuilderConfig { context: limits, ..DockerBuilderConfig::default() };
    let (built, log) = build(&case, config).await;
    assert!(built.expect_err("too large").what.contains("larger than"));
    assert_eq!(log.text(), "");
    case.spec.recipe.dockerfile = "nowhere/Dockerfile".to_owned();
    let (built, _) = build(&case, DockerBuilderConfig::default()).await;
    let fault = built.expect_err("missing");
    assert_eq!(fault.class, Class::Permanent);
    assert!(fault.what.contains("no Dockerfile"), "{}", fault.what);
}

/// A builder whose engine is not there, and the directory of the socket that it was at.
fn offline(config: DockerBuilderConfig) -> (tempfile::TempDir, DockerBuilder) {
    let dir = tempfile::tempdir().expect("directory");
    let socket = dir.path().join("docker.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("socket");
    let engine = Engine::connect(&socket).expect("engine");
    drop(listener);
    (dir, DockerBuilder::new(engine, config).expect("builder"))
}

/// The request holds nothing by which a build would leave its sandbox, whatever a recipe says, and all of the operator's limits.
#[tokio::test]
async fn a_build_is_asked_for_with_the_operator_s_limits_and_without_the_host_s_network() {
    let mut case = Case::new("FROM scratch\n");
    let words = [("networkmode", "host"), ("NETWORK", "host"), ("entitlements", "security.insecure")];
    case.spec.recipe.args = words.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let config =
        DockerBuilderConfig { memory: Some(512 << 20), milli_cpus: Some(1_500), ..DockerBuilderConfig::default() };
    let query = offline(config).1.query(&case.spec, &Names::of(&case.spec), "Dockerfile");
    let mut names: Vec<&str> = query.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    let expect = [
        "buildargs",
        "cpuperiod",
        "cpuquota",
        "dockerfile",
        "labels",
        "memory",
        "memswap",
        "networkmode",
        "remote",
        "rm",
        "t",
        "t",
        "version",
    ];
    assert_eq!(names, expect, "what is new here may be a way out");
    for (name, value) in [
        ("networkmode", "default"),
        ("memory", "536870912"),
        ("memswap", "536870912"),
        ("cpuperiod", "100000"),
        ("cpuquota", "150000"),
    ] {
        assert!(query.contains(&(name, value.to_owned())), "{name}: {query:?}");
    }
}

/// Another component's secret is configured too, and this one's Dockerfile may ask for it as it likes.
#[tokio::test]
async fn a_build_is_given_the_secrets_of_its_own_component_alone() {
    let mut case = Case::new("FROM scratch\n");
    case.spec.recipe.secrets = vec!["own".to_owned()];
    let file = |text: &str| {
        let file = tempfile::NamedTempFile::new().expect("file");
        fs::write(file.path(), text).expect("secret");
        file
    };
    let (own, other) = (file("of-this-one"), file("of-another"));
    let source = |file: &tempfile::NamedTempFile| SecretSource::File(file.path().to_owned());
    let secrets = BTreeMap::from([("own".to_owned(), source(&own)), ("other".to_owned(), source(&other))]);
    let (_dir, builder) = offline(DockerBuilderConfig { secrets, ..DockerBuilderConfig::default() });
    let given = builder.secrets(&case.spec).await.expect("secrets");
    assert_eq!(given, BTreeMap::from([("own".to_owned(), b"of-this-one".to_vec())]));
    case.spec.recipe.secrets = vec![];
    assert!(builder.secrets(&case.spec).await.expect("none").is_empty());
}

/// A step that speaks as the engine would, of another image and of another base.
#[tokio::test]
async fn what_a_build_prints_decides_nothing() {
    let lie = format!("sha256:{}", "e".repeat(64));
    let case = Case::with_shell(&format!(
        "RUN echo '[1/1] FROM docker.io/library/trusted@{lie}'; echo '{{\"aux\":{{\"ID\":\"{lie}\"}}}}'; \
         echo 'Successfully built {lie}'; echo 'exporting manifest {lie} done'; echo 'digest: {lie} size: 7'"
    ));
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    let built = built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    assert!(log.text().contains(&format!("digest: {lie} size: 7")), "{}", log.text());
    let ImageId::Engine { id, name } = &built.image else { panic!("{:?}", built.image) };
    let there = engine().docker().inspect_image(name).await.expect("image").id;
    assert_eq!((Some(id.to_string()), id.as_str() != lie), (there, true));
    assert!(!format!("{:?}", built.bases).contains("trusted"), "a base was made up: {:?}", built.bases);
    case.clean().await;
}

#[tokio::test]
async fn secrets_reach_the_step_and_nothing_else() {
    const VALUE: &str = "correct-horse-battery";
    let mut case = Case::with_shell(
        "RUN --mount=type=secret,id=token cat() { /bin/busybox cat \"$@\"; }; s=$(cat /run/secrets/token); \
         echo length ${#s}; echo shown: $s; echo $s >&2; printf 'correct-horse-'; /bin/busybox sleep 0.3; printf 'battery\\n'; \
         test ${#s} = 21",
    );
    let file = case.path().join("../secret-of-the-operator");
    let file = tempfile::NamedTempFile::new_in(file.parent().expect("parent")).expect("file");
    fs::write(file.path(), format!("{VALUE}\n")).expect("secret");
    case.spec.recipe.secrets = vec!["token".to_owned()];
    let secrets = BTreeMap::from([("token".to_owned(), SecretSource::File(file.path().to_owned()))]);
    let config = DockerBuilderConfig { secrets, ..DockerBuilderConfig::default() };
    let (built, log) = build(&case, config).await;
    let built = built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    let text = log.text();
    assert!(text.contains("length 21") && text.contains("shown: ***"), "{text}");
    assert!(!text.contains(VALUE), "{text}");
    let id = built.image.reference();
    let image = format!("{:?}", engine().docker().inspect_image(&id).await.expect("image"));
    let history = format!("{:?}", engine().docker().image_history(&id).await.expect("history"));
    assert!(!image.contains(VALUE) && !history.contains(VALUE));

    // Named by the recipe, not known to the operator.
    case.spec.recipe.secrets = vec!["unknown".to_owned()];
    case.clean().await;
    let (built, _) = build(&case, DockerBuilderConfig::default()).await;
    let fault = built.expect_err("unknown secret");
    assert!(fault.class == Class::Permanent && fault.what.contains("unknown"), "{}", fault.chain());
}

#[tokio::test]
async fn much_and_strange_output_passes_in_bounded_memory() {
    let case = Case::with_shell(
        "RUN /bin/busybox printf '\\377\\376 not text\\n'; /bin/busybox yes 0123456789012345678901234567890 | /bin/busybox head -c 200000000; echo; echo the end",
    );
    let before = peak_memory();
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    let bytes = log.text.lock().expect("lock").clone();
    assert!(bytes.windows(3).any(|w| w == b"\xff\xfe "), "bytes are passed as they are");
    let grown = peak_memory().saturating_sub(before);
    assert!(grown < 100 << 20, "{grown} bytes more at the peak for {} of log", log.bytes.load(Ordering::Relaxed));
    case.clean().await;
}

fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") * 1024
}

/// Processes on this machine whose command line has `mark`: the engine runs builds on this machine.
fn processes(mark: &str) -> usize {
    let mark = mark.as_bytes();
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|e| fs::read(e.ok()?.path().join("cmdline")).ok())
        .filter(|line| line.windows(mark.len()).any(|w| w == mark))
        .count()
}

#[tokio::test]
async fn dropping_the_future_ends_the_build_in_the_engine() {
    let mark = format!("7{}", std::process::id());
    let case = Case::with_shell(&format!("RUN echo it hangs; exec /bin/busybox sleep {mark}"));
    let log = Kept::default();
    let sleeping = format!("sleep\0{mark}");
    {
        let builder = builder(DockerBuilderConfig::default());
        let mut build = std::pin::pin!(builder.build(&case.spec, &log));
        let deadline = Instant::now() + Duration::from_secs(60);
        while processes(&sleeping) == 0 {
            assert!(Instant::now() < deadline, "the step did not begin: {}", log.text());
            tokio::select! {
                built = &mut build => panic!("{built:?}"),
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while processes(&sleeping) > 0 {
        assert!(Instant::now() < deadline, "the build goes on in the engine");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    case.clean().await;
}

#[tokio::test]
async fn lines_are_there_while_the_build_runs() {
    let case = Case::with_shell("RUN echo now; /bin/busybox sleep 5; echo later");
    let log = Kept::default();
    let builder = builder(DockerBuilderConfig::default());
    let mut build = std::pin::pin!(builder.build(&case.spec, &log));
    loop {
        // The command's own line names both words; only its output begins like this.
        let text = log.text();
        let output = |word: &str| {
            text.lines().any(|l| !l.contains("RUN ") && l.starts_with('#') && l.ends_with(&format!(" {word}")))
        };
        assert!(!output("later"), "both came at once");
        if output("now") {
            break;
        }
        tokio::select! {
            built = &mut build => panic!("{built:?}\n{}", log.text()),
            () = log.wake.notified() => {}
        }
    }
    build.await.expect("built");
    case.clean().await;
}

#[tokio::test]
async fn an_engine_that_is_not_there_may_come_back() {
    let case = Case::with_shell("");
    let (_dir, builder) = offline(DockerBuilderConfig::default());
    let fault = builder.build(&case.spec, &NoLog).await.expect_err("no engine");
    assert_eq!(fault.class, Class::Transient, "{}", fault.chain());
}

/// Stands between a builder and the engine, and cuts every build session off as soon as the engine has opened it: what the
/// engine does to a builder that stood still for long.
async fn cuts_sessions_off(listener: tokio::net::UnixListener) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let socket = engine().socket().to_owned();
    loop {
        let (mut client, _) = listener.accept().await.expect("a builder");
        let mut engine = tokio::net::UnixStream::connect(&socket).await.expect("engine");
        tokio::spawn(async move {
            let mut begin = vec![0; 4096];
            let read = client.read(&mut begin).await.expect("a request");
            engine.write_all(&begin[..read]).await.expect("passed on");
            if String::from_utf8_lossy(&begin[..read]).contains("/session") {
                let read = engine.read(&mut begin).await.expect("an answer");
                client.write_all(&begin[..read]).await.expect("passed back");
            } else {
                // Either side ends it as it likes.
                tokio::io::copy_bidirectional(&mut client, &mut engine).await.ok();
            }
        });
    }
}

#[tokio::test]
async fn a_build_whose_session_the_engine_dropped_is_tried_again_and_one_that_fails_by_itself_is_not() {
    let dir = tempfile::tempdir().expect("directory");
    let socket = dir.path().join("docker.sock");
    let relay = tokio::spawn(cuts_sessions_off(tokio::net::UnixListener::bind(&socket).expect("socket")));
    let case = Case::with_shell("COPY . /app");
    let cut = DockerBuilder::new(Engine::connect(&socket).expect("engine"), DockerBuilderConfig::default());
    let fault = cut.expect("builder").build(&case.spec, &NoLog).await.expect_err("no session");
    assert_eq!(fault.class, Class::Transient, "{}", fault.chain());
    relay.abort();
    let (built, log) = build(&case, DockerBuilderConfig::default()).await;
    built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
    case.clean().await;

    let case = Case::with_shell("COPY . /app\nRUN exit 3");
    let (failed, log) = build(&case, DockerBuilderConfig::default()).await;
    let fault = failed.expect_err("a failing command");
    assert_eq!(fault.class, Class::Permanent, "{}\n{}", fault.chain(), log.text());
}

/// Prints medians; the ratio belongs into a report, since a loaded machine makes any bound a lie.
#[tokio::test]
#[ignore = "a measurement: run it alone"]
async fn overhead_against_the_docker_client() {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let rest = "RUN for i in 1 2 3; do echo $i; done\nCOPY . /app\nRUN /bin/busybox ls /app";
        let case = Case::with_shell(rest);
        let begun = Instant::now();
        let (built, log) = build(&case, DockerBuilderConfig::default()).await;
        ours.push(begun.elapsed());
        built.unwrap_or_else(|fault| panic!("{}\n{}", fault.chain(), log.text()));
        case.clean().await;
        let case = Case::with_shell(rest);
        let begun = Instant::now();
        let socket = format!("unix://{}", engine().socket().display());
        let done = tokio::process::Command::new("/usr/bin/docker")
            .args(["--host", &socket, "build", "-q", "-t", &Names::of(&case.spec).attempt, "."])
            .env("DOCKER_BUILDKIT", "1")
            .current_dir(case.path())
            .output()
            .await
            .expect("docker client");
        theirs.push(begun.elapsed());
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        case.clean().await;
    }
    ours.sort();
    theirs.sort();
    println!("median ours {:?}, docker build {:?}", ours[2], theirs[2]);
}
