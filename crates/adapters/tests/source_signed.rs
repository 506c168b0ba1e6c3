//! Signed releases: both git sources against a real git server, with real keys, and against whoever can push but not sign.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use replank_adapters::exec_channel::Channel;
use replank_adapters::source::az_exec::AzExecSource;
use replank_adapters::source::git::{GitConfig, GitSource, Signers, Verify};
use replank_core::fault::Class;
use replank_core::ports::{Clock, NoLog, Source};
use replank_core::record::{Target, TargetKind};
use replank_core::words::{CommitSha, JobId, Millis, Version};
use replank_exec::server::config::Config;
use replank_exec::server::http::Server;
use replank_exec::server::place::{Places, make_private};
use replank_testbed::keys::{OpenPgpKey, SshKey};
use replank_testbed::repo::Entry;
use replank_testbed::{GitServer, GitServerOptions, Repo};

const TOKEN: &str = "0123456789abcdef";
const BY_SSH: &str = "alice@example.com (ED25519 key SHA256:";
const UNKNOWN: &str = "not among the allowed signers now (ED25519 key SHA256:";

/// gpg and ssh-keygen look at the machine's own clock, so this one shows the same.
#[derive(Debug)]
struct Watch;

impl Clock for Watch {
    #[expect(clippy::disallowed_methods, reason = "this is a clock")]
    fn now(&self) -> Millis {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time after 1970");
        Millis(i64::try_from(since.as_millis()).expect("milliseconds"))
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(Watch.now().0).expect("milliseconds"))
}

struct World {
    dir: tempfile::TempDir,
    repo: Repo,
    server: GitServer,
    alice: SshKey,
    commit: String,
    jobs: usize,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let mut repo = Repo::create(dir.path(), "app").expect("repository");
        let commit = repo.commit(&[Entry::file("Dockerfile", "FROM scratch\n")], "first").expect("commit");
        let server = GitServer::start(dir.path(), &GitServerOptions::default()).expect("server");
        let alice = SshKey::create(dir.path(), "alice").expect("key");
        let world = Self { dir, repo, server, alice, commit, jobs: 0 };
        world.allow(&format!("alice@example.com {}\n", world.alice.public));
        world
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn allow(&self, text: &str) {
        fs::write(self.file("allowed"), text).expect("file");
    }

    fn key(&self, name: &str) -> SshKey {
        SshKey::create(self.dir.path(), name).expect("key")
    }

    fn git(&self, words: &[&str]) -> String {
        self.repo.git(words).expect("git")
    }

    /// The files that exist are the keys that count.
    fn signers(&self) -> Signers {
        let of = |name: &str| Some(self.file(name)).filter(|path| path.exists());
        Signers { allowed: of("allowed"), revoked: of("revoked"), openpgp: of("keyring") }
    }

    fn config(&self, verify: Verify, work: &str) -> GitConfig {
        let mut config = GitConfig::new(self.server.url("app"), self.file(work));
        config.allow_loopback = true;
        config.verify = verify;
        config.clock = Some(Arc::new(Watch));
        config
    }

    fn local(&self) -> GitSource {
        GitSource::new(self.config(Verify::SignedTags(self.signers()), "work")).expect("source")
    }

    /// The other git of the machine, where there are two.
    fn local_by(&self, git: &str) -> GitSource {
        let config = self.config(Verify::SignedTags(self.signers()), "work");
        GitSource::new(GitConfig { git: git.into(), ..config }).expect("source")
    }

    /// A source whose git runs behind a real exec server, which is given the keys by its own environment.
    async fn through_exec(&mut self) -> AzExecSource {
        self.jobs += 1;
        let root = self.file(&format!("clones-{}", self.jobs));
        make_private(&root).expect("root");
        let signers = self.signers();
        let mut variables: BTreeMap<&str, String> = BTreeMap::from([
            ("EXEC_TOKEN", TOKEN.to_owned()),
            ("EXEC_PORT", "0".to_owned()),
            ("EXEC_CLONE_ROOT", root.display().to_string()),
            ("UPGRADE_GIT_REMOTE", self.server.url("app")),
            ("EXEC_ALLOW_LOOPBACK_REMOTE", "true".to_owned()),
        ]);
        for (name, file) in [
            ("EXEC_ALLOWED_SIGNERS_FILE", signers.allowed),
            ("EXEC_REVOKED_SIGNERS_FILE", signers.revoked),
            ("EXEC_OPENPGP_KEYRING_FILE", signers.openpgp),
        ] {
            variables.extend(file.map(|file| (name, file.display().to_string())));
        }
        let config = Config::read(|name| variables.get(name).cloned()).expect("config");
        let places = Places::open(self.file(&format!("requests-{}", self.jobs)), now()).expect("places");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let address = listener.local_addr().expect("address").to_string();
        let own = BTreeMap::from([(OsString::from("PATH"), OsString::from("/usr/local/bin:/usr/bin:/bin"))]);
        let server = Arc::new(Server::new(config, places, own).timed(now));
        tokio::spawn(server.serve(listener, std::future::pending()));
        let git = GitSource::new(self.config(Verify::SignedElsewhere, "work-here")).expect("source");
        AzExecSource::new(git, Channel::new(&address, TOKEN).expect("channel"), root, false)
    }

    fn job(&mut self) -> JobId {
        self.jobs += 1;
        JobId::new(format!("job-{}", self.jobs)).expect("job")
    }

    /// Fetches by both sources; a refusal is permanent, says what to do, and leaves no tree.
    async fn check(&mut self, tag: &str, commit: &str, expect: Result<&str, &str>) {
        let target = release(tag, commit);
        let sources: [Box<dyn Source>; 2] = [Box::new(self.local()), Box::new(self.through_exec().await)];
        for source in sources {
            let job = self.job();
            match (source.fetch(&job, &target, &NoLog).await, expect) {
                (Ok(tree), Ok(signer)) => {
                    assert!(tree.signed_by.as_ref().is_some_and(|by| by.contains(signer)), "{:?}", tree.signed_by);
                }
                (Err(fault), Err(part)) => {
                    let text = format!("{}; {}", fault.chain(), fault.advice);
                    assert!(fault.class == Class::Permanent && text.contains(part), "{part}: {:?} {text}", fault.class);
                    assert!(!fault.advice.is_empty() && !self.file("work").join(job.as_str()).join("src").exists());
                }
                (got, expect) => panic!("{source:?}: {expect:?} was expected: {got:?}"),
            }
        }
    }
}

fn release(tag: &str, commit: &str) -> Target {
    Target {
        kind: TargetKind::Release,
        version: tag.parse::<Version>().expect("version"),
        commit: CommitSha::new(commit).expect("commit"),
        raw_ref: format!("refs/tags/{tag}"),
    }
}

/// Puts a tag object of any content under a tag's name.
fn put(world: &World, tag: &str, object: &str) {
    let file = world.file("object");
    fs::write(&file, object).expect("file");
    let id = world.git(&["hash-object", "-t", "tag", "-w", "--literally", &file.display().to_string()]);
    world.git(&["update-ref", &format!("refs/tags/{tag}"), &id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_that_an_allowed_key_signed_is_fetched_and_its_signer_named() {
    let mut world = World::new();
    let commit = world.commit.clone();
    world.alice.tag(&world.repo, "v1.0.0", &commit).expect("tag");
    world.check("v1.0.0", &commit, Ok(BY_SSH)).await;
    // What was fetched before is looked at again, and the same on the other git of the machine.
    let (source, job, target) = (world.local_by("/usr/bin/git"), world.job(), release("v1.0.0", &commit));
    for _ in 0..2 {
        let tree = source.fetch(&job, &target, &NoLog).await.expect("tree");
        assert!(tree.signed_by.is_some_and(|by| by.starts_with(BY_SSH)));
    }
    // A key whose line is taken out counts no more from then on, not even for what lies there already.
    world.allow("");
    let fault = source.fetch(&job, &target, &NoLog).await.expect_err("refused");
    assert!(fault.chain().contains(UNKNOWN), "{}", fault.chain());
    // Without the rule nobody asks, and nobody is named.
    let source = GitSource::new(world.config(Verify::Nothing, "work")).expect("source");
    assert_eq!(source.fetch(&job, &target, &NoLog).await.expect("tree").signed_by, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_or_somebody_else_signed_is_refused() {
    let mut world = World::new();
    let commit = world.commit.clone();
    world.repo.tag("v1.0.0", &commit, "notes").expect("tag");
    world.check("v1.0.0", &commit, Err("the tag v1.0.0 is refused: it is not signed")).await;
    let mallory = world.key("mallory");
    mallory.tag(&world.repo, "v1.1.0", &commit).expect("tag");
    world.check("v1.1.0", &commit, Err(UNKNOWN)).await;
    world.repo.light_tag("v1.2.0", &commit).expect("tag");
    world.check("v1.2.0", &commit, Err("the tag v1.2.0 is lightweight")).await;
    // A signature that is none.
    let head = format!("object {commit}\ntype commit\ntag v1.3.0\ntagger a <a@b> 1767225600 +0000\n\nnotes\n");
    put(&world, "v1.3.0", &format!("{head}-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"));
    world.check("v1.3.0", &commit, Err("cannot be verified")).await;
    // A key of the operator's, with which something else than a tag was signed.
    let file = world.file("payload");
    fs::write(&file, head.replace("v1.3.0", "v1.4.0")).expect("file");
    let signature = world.alice.sign(&file, "file").expect("signature");
    put(&world, "v1.4.0", &format!("{}{signature}", head.replace("v1.3.0", "v1.4.0")));
    world.check("v1.4.0", &commit, Err("cannot be verified")).await;
    // X.509, which no key can be configured for.
    put(
        &world,
        "v1.5.0",
        &format!(
            "{}-----BEGIN SIGNED MESSAGE-----\nx\n-----END SIGNED MESSAGE-----\n",
            head.replace("v1.3.0", "v1.5.0")
        ),
    );
    world.check("v1.5.0", &commit, Err("cannot be verified")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_signature_under_another_name_or_over_another_commit_is_refused() {
    let mut world = World::new();
    let first = world.commit.clone();
    world.alice.tag(&world.repo, "v1.0.0", &first).expect("tag");
    let object = world.git(&["rev-parse", "refs/tags/v1.0.0"]);
    // The old release's object, pushed as a newer one: git verify-tag alone accepts it.
    world.git(&["update-ref", "refs/tags/v9.9.9", &object]);
    world.check("v9.9.9", &first, Err("its object says that it is v1.0.0")).await;
    // A tag of the signed tag.
    world.alice.tag(&world.repo, "v2.0.0", &object).expect("tag");
    world.check("v2.0.0", &first, Err("a tag of another tag")).await;
    // The signed object with another commit in it.
    let evil = world.repo.commit(&[Entry::file("evil", "x")], "evil").expect("commit");
    let text = world.git(&["cat-file", "tag", "v1.0.0"]);
    put(&world, "v1.0.0", &format!("{}\n", text.replace(&first, &evil)));
    world.check("v1.0.0", &evil, Err("cannot be verified")).await;
    // The tag was moved, with a good signature: still not what was chosen.
    world.alice.tag(&world.repo, "v1.0.0", &evil).expect("tag");
    world.check("v1.0.0", &first, Err(&format!("is at commit {evil}, and {first} was chosen"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_s_time_is_now_and_not_the_date_in_the_tag() {
    let mut world = World::new();
    let (commit, public) = (world.commit.clone(), world.alice.public.clone());
    // The testbed's tags are of 2026-01-01, when the key was good; git verify-tag alone accepts that.
    world.alice.tag(&world.repo, "v1.0.0", &commit).expect("tag");
    let line = |options: &str| format!("alice@example.com {options} {public}\n");
    for (options, expect) in [
        ("valid-before=\"20260601\"", Err("expired at 20260601000000 UTC")),
        ("valid-after=\"20990101\"", Err("is not valid before 20990101000000 UTC")),
        ("namespaces=\"file\"", Err("cannot be verified")),
        ("namespaces=\"git\",valid-after=\"20200101\",valid-before=\"20990101\"", Ok(BY_SSH)),
    ] {
        world.allow(&line(options));
        let job = world.job();
        let got = world.local().fetch(&job, &release("v1.0.0", &commit), &NoLog).await;
        match expect {
            Ok(signer) => assert!(got.expect("tree").signed_by.is_some_and(|by| by.starts_with(signer))),
            Err(part) => {
                let chain = got.expect_err("refused").chain();
                assert!(chain.contains(part), "{options}: {chain}");
            }
        }
        // The exec server knows the reason, and its client that it is refused.
        let expect = expect.map_err(|part| if part.contains("UTC") { UNKNOWN } else { part });
        let (source, job) = (world.through_exec().await, world.job());
        let got = source.fetch(&job, &release("v1.0.0", &commit), &NoLog).await;
        match (got, expect) {
            (Ok(tree), Ok(signer)) => assert!(tree.signed_by.is_some_and(|by| by.starts_with(signer))),
            (Err(fault), Err(part)) => assert!(fault.chain().contains(part), "{options}: {}", fault.chain()),
            (got, _) => panic!("{options}: {got:?}"),
        }
    }
    world.allow(&line(""));
    fs::write(world.file("revoked"), format!("{public}\n")).expect("file");
    world.check("v1.0.0", &commit, Err("cannot be verified")).await;
    fs::write(world.file("revoked"), format!("{}\n", world.key("other").public)).expect("file");
    world.check("v1.0.0", &commit, Ok(BY_SSH)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openpgp_keys_count_where_they_are_configured() {
    let mut world = World::new();
    let commit = world.commit.clone();
    let dir = world.dir.path().to_owned();
    let key = |name: &str, at, lifetime| OpenPgpKey::create(&dir, name, at, lifetime).expect("key");
    let bob = key("bob", None, "never");
    let old = key("old", Some("20240101T000000"), "1y");
    let gone = key("gone", None, "never");
    let other = key("other", None, "never");
    for (version, key) in [("v1.0.0", &bob), ("v1.1.0", &old), ("v1.2.0", &gone), ("v1.3.0", &other)] {
        key.tag(&world.repo, version, &commit).expect("tag");
    }
    // With SSH keys alone nobody is asked about OpenPGP, whatever the user's own keyring says.
    world.check("v1.0.0", &commit, Err("cannot be verified")).await;
    gone.revoke().expect("revoked");
    let keyring = [&bob, &old, &gone].map(|key| key.export(false).expect("export")).concat();
    fs::write(world.file("keyring"), keyring).expect("file");
    let named = format!("bob <bob@example.com> (OpenPGP key {})", bob.fingerprint);
    world.check("v1.0.0", &commit, Ok(&named)).await;
    world.check("v1.1.0", &commit, Err("a key that has expired")).await;
    world.check("v1.2.0", &commit, Err("a key that was revoked")).await;
    world.check("v1.3.0", &commit, Err("a key that is not in the keyring")).await;
    // Both kinds side by side, and an armored keyring alone.
    world.alice.tag(&world.repo, "v1.4.0", &commit).expect("tag");
    world.check("v1.4.0", &commit, Ok(BY_SSH)).await;
    fs::remove_file(world.file("allowed")).expect("removed");
    fs::write(world.file("keyring"), bob.export(true).expect("export")).expect("file");
    world.check("v1.0.0", &commit, Ok(&named)).await;
    world.check("v1.4.0", &commit, Err("cannot be verified")).await;
    // The replayed object, as with SSH.
    let object = world.git(&["rev-parse", "refs/tags/v1.0.0"]);
    world.git(&["update-ref", "refs/tags/v9.9.9", &object]);
    world.check("v9.9.9", &commit, Err("its object says that it is v1.0.0")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_a_clone_nor_a_user_names_the_programs_or_the_keys() {
    let mut world = World::new();
    let commit = world.commit.clone();
    world.key("mallory").tag(&world.repo, "v1.0.0", &commit).expect("tag");
    world.alice.tag(&world.repo, "v1.1.0", &commit).expect("tag");
    let (ran, program) = (world.file("ran"), world.file("program"));
    let script =
        format!("#!/bin/sh\ntouch '{}'\necho 'Good \"git\" signature for alice@example.com with X'\n", ran.display());
    fs::write(&program, script).expect("file");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
    // A tree that was fetched, whose settings somebody has changed since.
    let (source, job) = (world.local(), world.job());
    let tree = source.fetch(&job, &release("v1.1.0", &commit), &NoLog).await.expect("tree");
    let settings = tree.path.join(".git/config");
    let more = format!(
        "[gpg]\n\tformat = ssh\n\tprogram = {0}\n\tminTrustLevel = never\n[gpg \"ssh\"]\n\tprogram = {0}\n\tallowedSignersFile = {1}\n\
         [gpg \"openpgp\"]\n\tprogram = {0}\n[gpg \"x509\"]\n\tprogram = {0}\n[core]\n\tpager = {0}\n",
        program.display(),
        world.file("mallory.pub").display(),
    );
    fs::write(&settings, format!("{}{more}", fs::read_to_string(&settings).expect("settings"))).expect("settings");
    let again = source.fetch(&job, &release("v1.1.0", &commit), &NoLog).await.expect("tree");
    assert!(again.signed_by.is_some_and(|by| by.starts_with(BY_SSH)) && !ran.exists());
    // The same settings, and a tag of a key that they would accept.
    let bytes = fs::read(tree.path.join(".git/config")).expect("settings");
    let unsigned = GitSource::new(world.config(Verify::Nothing, "work")).expect("source");
    let (job, target) = (world.job(), release("v1.0.0", &commit));
    let tree = unsigned.fetch(&job, &target, &NoLog).await.expect("tree");
    fs::write(tree.path.join(".git/config"), bytes).expect("settings");
    let fault = source.fetch(&job, &target, &NoLog).await.expect_err("refused");
    assert!(fault.chain().contains(UNKNOWN) && !ran.exists(), "{}", fault.chain());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_signed_is_not_offered() {
    let mut world = World::new();
    let commit = world.commit.clone();
    world.alice.tag(&world.repo, "v1.0.0", &commit).expect("tag");
    world.repo.light_tag("v1.1.0", &commit).expect("tag");
    let target = Target {
        kind: TargetKind::Commit,
        version: Version::release(1, 0, 0).at_commit(&CommitSha::new(commit.as_str()).expect("commit")),
        raw_ref: "refs/heads/main".to_owned(),
        ..release("v1.0.0", &commit)
    };
    let sources: [Box<dyn Source>; 2] = [Box::new(world.local()), Box::new(world.through_exec().await)];
    for source in sources {
        let refs = source.refs().await.expect("refs");
        let refused: Vec<_> = refs.tags.iter().map(|t| (t.version.to_string(), t.refused.is_some())).collect();
        assert_eq!(refused, [("1.1.0".to_owned(), true), ("1.0.0".to_owned(), false)]);
        assert!(refs.tags[0].refused.as_ref().is_some_and(|why| why.contains("lightweight")));
        assert_eq!(refs.branch, None);
        assert!(source.refuses_commits().is_some_and(|why| why.contains("only signed tags")));
        let fault = source.fetch(&world.job(), &target, &NoLog).await.expect_err("refused");
        assert!(fault.class == Class::Permanent && fault.chain().contains("only signed tags"), "{}", fault.chain());
    }
    assert_eq!(GitSource::new(world.config(Verify::Nothing, "work")).expect("source").refuses_commits(), None);
}

#[test]
fn what_is_missing_is_told_before_anything_is_fetched() {
    let world = World::new();
    let fault = |verify| {
        let fault = GitSource::new(world.config(verify, "work")).expect_err("refused");
        assert_eq!(fault.class, Class::Permanent);
        format!("{}; {}", fault.chain(), fault.advice)
    };
    let of = |path: &Path| Verify::SignedTags(Signers { allowed: Some(path.to_owned()), ..Signers::default() });
    let told = fault(Verify::SignedTags(Signers::default()));
    assert!(told.contains("no key is configured"), "{told}");
    let told = fault(of(Path::new("/nonexistent/signers")));
    assert!(told.contains("allowed signers cannot be read (/nonexistent/signers)"), "{told}");
    world.allow("alice\n");
    let told = fault(of(&world.file("allowed")));
    assert!(told.contains("line 1: ") && told.contains("correct the file"), "{told}");
    world.allow(&format!("alice {}\n", world.alice.public));
    let missing = world.signers().check(OsStr::new("/nonexistent"), now()).expect_err("no program");
    assert_eq!(missing.to_string(), "ssh-keygen cannot be found, which checks the signatures");
    assert_eq!(missing.advice(), "install openssh-client where git runs (Debian's name)");
}
