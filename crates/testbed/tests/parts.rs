//! The testbed's parts against their promises: a real engine, git server and registry.

use std::process::Command;
use std::time::{Duration, Instant};

use replank_testbed::git::Fault;
use replank_testbed::repo::{self, Entry};
use replank_testbed::{
    Engine, EngineOptions, GitServer, GitServerOptions, Registry, Repo, Sample, SampleOptions, images, process, sample,
};

type Outcome = anyhow::Result<()>;

/// Bounded waiting for something that a server does in its own time.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come about in 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether the process still runs: a killed one may wait, dead, for its parent to notice.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

#[test]
fn a_private_engine_runs_survives_a_power_cut_and_leaves_nothing() -> Outcome {
    let begin = Instant::now();
    let registry = Registry::start("127.0.0.1".parse()?)?;
    let engine = Engine::start(&EngineOptions::default())?;
    eprintln!("engine and registry up after {:?}", begin.elapsed());
    let begin = Instant::now();
    images::busybox(&engine)?;
    eprintln!("busybox image after {:?}", begin.elapsed());
    assert_eq!(engine.docker(&["run", "--rm", images::BUSYBOX, "echo", "hello"])?, "hello");

    let name = format!("{}/team/box:1", registry.name());
    engine.docker(&["tag", images::BUSYBOX, &name])?;
    engine.docker(&["push", "--quiet", &name])?;
    engine.docker(&["rmi", &name])?;
    engine.docker(&["pull", "--quiet", &name])?;
    registry.stop()?;
    assert!(engine.docker(&["push", "--quiet", &name]).is_err(), "a stopped registry takes nothing");
    registry.start_again()?;
    engine.docker(&["push", "--quiet", &name])?;

    let sleep = ["sleep", "1000"];
    let run = |name: &str, policy: &str| {
        let arguments = ["run", "-d", "--name", name, "--restart", policy, images::BUSYBOX];
        engine.docker(&[&arguments[..], &sleep[..]].concat())
    };
    run("stays", "always")?;
    run("goes", "no")?;
    let running = || engine.docker(&["ps", "--format", "{{.Names}}"]).unwrap_or_default();
    let pid_of = |name: &str| engine.docker(&["inspect", "-f", "{{.State.Pid}}", name]);

    let before = pid_of("stays")?;
    engine.kill()?;
    assert!(runs(&before), "a container outlives its engine");
    engine.start_again()?;
    eventually("the restart of what always restarts", || running() == "stays");

    let before = pid_of("stays")?;
    engine.kill_everything()?;
    assert!(!runs(&before), "a power cut takes containers too");
    engine.start_again()?;
    eventually("the restart of what always restarts", || running() == "stays");
    engine.restart()?;
    eventually("the restart of what always restarts", || running() == "stays");

    let directory = engine.directory().expect("a private engine has a directory");
    let gateway = engine.gateway().expect("a private engine has a gateway").to_string();
    let last = pid_of("stays")?;
    let begin = Instant::now();
    drop(engine);
    eprintln!("engine removed after {:?}", begin.elapsed());
    assert!(!directory.exists());
    assert!(!runs(&last), "the container is gone with its engine");
    assert!(!std::fs::read_to_string("/proc/self/mounts")?.contains(&*directory.to_string_lossy()));
    assert!(!process::text(Command::new("ip").arg("addr"))?.contains(&gateway));
    Ok(())
}

#[test]
fn the_git_server_speaks_protocol_2_and_misbehaves_on_demand() -> Outcome {
    let root = tempfile::tempdir()?;
    let mut sample = Repo::create(root.path(), "sample")?;
    // Does not get smaller by compression.
    let noise: Vec<u8> = (0..4_096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let files = [Entry::file("a/b.txt", "one"), Entry::script("run.sh", "#!/bin/sh\n"), Entry::file("noise", noise)];
    let first = sample.commit(&files, "one")?;
    sample.tag("v1.0.0", &first, "one")?;
    sample.branch("side", &first)?;
    let sign_in = Some(("user".to_owned(), "secret".to_owned()));
    let server = GitServer::start(root.path(), &GitServerOptions { sign_in, ..GitServerOptions::default() })?;
    let url = server.url("sample").replace("http://", "http://user:secret@");
    let list = || {
        process::text(repo::isolated().args([
            "-c",
            "http.lowSpeedTime=2",
            "-c",
            "http.lowSpeedLimit=1",
            "ls-remote",
            &url,
        ]))
    };

    let refs = list()?;
    assert!(refs.contains(&format!("{first}\trefs/heads/side")), "{refs}");
    assert!(refs.contains(&format!("{first}\trefs/tags/v1.0.0^{{}}")), "{refs}");
    let seen = server.seen();
    assert!(!seen[0].authorized, "git asks without credentials first");
    assert!(
        seen.iter()
            .any(|seen| seen.method == "POST" && seen.protocol.as_deref() == Some("version=2") && seen.authorized)
    );

    let clone = root.path().join("clone");
    process::run(repo::isolated().args(["clone", "--quiet", "--depth", "1", "--branch", "v1.0.0", &url]).arg(&clone))?;
    assert_eq!(std::fs::read_to_string(clone.join("a/b.txt"))?, "one");

    let elsewhere = Fault::Redirect("http://127.0.0.1:1".to_owned());
    for fault in [Fault::Status(500), Fault::Hang, elsewhere, Fault::HugeBody(1 << 20), Fault::CutAfter(10)] {
        server.set_fault(fault.clone());
        assert!(list().is_err(), "{fault:?}");
    }
    // Refs pass, a clone stands still in the middle.
    server.set_fault(Fault::StallAfter(1_000));
    list()?;
    assert_eq!(server.stalled(), 0);
    let again = root.path().join("again");
    let args = ["-c", "http.lowSpeedTime=2", "-c", "http.lowSpeedLimit=1", "clone", "--quiet", &url];
    assert!(process::run(repo::isolated().args(args).arg(&again)).is_err());
    assert_eq!(server.stalled(), 1);
    server.set_fault(Fault::None);
    server.stop();
    assert!(list().is_err());
    server.start_again()?;
    list()?;
    Ok(())
}

#[test]
fn every_component_of_the_sample_builds_and_shows_its_version() -> Outcome {
    let engine = Engine::start(&EngineOptions::default())?;
    let timed = |what: &str, outcome: Outcome, begin: Instant| {
        eprintln!("{what} image after {:?}", begin.elapsed());
        outcome
    };
    let begin = Instant::now();
    timed("busybox", images::busybox(&engine), begin)?;
    let begin = Instant::now();
    timed("cc", images::cc(&engine), begin)?;
    // A static program stands in for Replank itself.
    let begin = Instant::now();
    let program = process::find("busybox", &["/usr/bin/busybox", "/bin/busybox"]).expect("busybox is installed");
    timed("runtime", images::runtime(&engine, &program, 1), begin)?;
    let git = engine.docker(&["run", "--rm", "--entrypoint", "git", images::RUNTIME, "--version"])?;
    assert!(git.starts_with("git version"), "{git}");

    let root = tempfile::tempdir()?;
    let sample = Sample::create(root.path(), SampleOptions::small())?;
    let again = tempfile::tempdir()?;
    assert_eq!(
        Sample::create(again.path(), SampleOptions::small())?.releases,
        sample.releases,
        "commits are the same everywhere"
    );
    let ask = |name: &str, path: &str| {
        let address = engine.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", name])?;
        let url = format!("http://{address}:8080{path}");
        engine.docker(&["run", "--rm", images::BUSYBOX, "wget", "-q", "-O-", &url])
    };
    for release in &sample.releases {
        let tree = root.path().join(&release.version);
        process::run(
            repo::isolated().args(["clone", "--quiet", "-b", &release.tag]).arg(sample.repo.path()).arg(&tree),
        )?;
        for component in sample::COMPONENTS {
            let (image, argument) =
                (format!("{component}:{}", release.version), format!("APP_VERSION={}", release.version));
            let file = tree.join(component).join("Dockerfile");
            let (file, tree) = (file.to_string_lossy(), tree.to_string_lossy());
            let begin = Instant::now();
            engine.docker(&["build", "-q", "-t", &image, "--build-arg", &argument, "-f", &file, &tree])?;
            eprintln!("{image} built in {:?}", begin.elapsed());
            if component != "controller" {
                engine.docker(&["run", "-d", "--name", component, &image])?;
            }
        }
        let version = format!("\"version\":\"{}\"", release.version);
        eventually("the page", || ask("frontend", "/version.json").is_ok_and(|answer| answer.contains(&version)));
        eventually("the api", || ask("api", "/").is_ok_and(|answer| answer.contains(&version)));
        assert_eq!(ask("api", "/healthz").is_ok(), release.version != "0.3.0");
        assert_eq!(ask("frontend", "/")?.contains("teak"), release.version != "0.1.0");
        let beat = format!("worker {} heartbeat", release.version);
        eventually("the heartbeat", || engine.docker(&["logs", "worker"]).is_ok_and(|log| log.contains(&beat)));
        let begin = Instant::now();
        engine.docker(&["stop", "-t", "9", "api", "frontend", "worker"])?;
        assert!(begin.elapsed() < Duration::from_secs(8), "every component ends on SIGTERM");
        engine.docker(&["rm", "api", "frontend", "worker"])?;
    }
    let label = engine.docker(&[
        "inspect",
        "-f",
        "{{index .Config.Labels \"io.replank.reads-format\"}}",
        "controller:0.1.0",
    ])?;
    assert_eq!(label, "1");
    Ok(())
}

/// Not a test of its own: the process that the next test starts and kills.
#[test]
#[ignore = "started by the test of killed owners"]
fn owner_of_an_engine() -> Outcome {
    replank_testbed::cleanup::on_signals()?;
    let engine = Engine::start(&EngineOptions::default())?;
    let registry = Registry::start("127.0.0.1".parse()?)?;
    images::busybox(&engine)?;
    engine.docker(&["run", "-d", images::BUSYBOX, "sleep", "1000"])?;
    let container = engine.docker(&["inspect", "-f", "{{.State.Pid}}", &engine.docker(&["ps", "-q"])?])?;
    let directory = engine.directory().expect("a private engine has a directory");
    println!("ready {} {} {container} {}", directory.display(), engine.pid().expect("it runs"), registry.address());
    std::thread::sleep(Duration::from_secs(60));
    anyhow::bail!("nobody killed the owner")
}

#[test]
fn a_killed_owner_leaves_nothing_for_long() -> Outcome {
    use std::io::{BufRead, BufReader};
    for signal in ["TERM", "KILL"] {
        let mut owner = Command::new(std::env::current_exe()?)
            .args(["--exact", "owner_of_an_engine", "--ignored", "--nocapture"])
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let output = BufReader::new(owner.stdout.take().expect("it is piped"));
        let lines = output.lines().map_while(Result::ok);
        let ready =
            lines.into_iter().find_map(|line| Some(line.split_once("ready ")?.1.to_owned())).expect("it gets ready");
        let words: Vec<&str> = ready.split(' ').collect();
        let [directory, engine, container, registry] = words[..] else { panic!("{ready}") };
        assert!(runs(engine) && runs(container));
        process::run(Command::new("kill").args([&format!("-{signal}"), &owner.id().to_string()]))?;
        owner.wait()?;
        eventually("the engine's end", || !runs(engine));
        eventually("the registry's end", || std::net::TcpStream::connect(registry).is_err());
        if signal == "KILL" {
            // The kernel takes the servers; what they started goes when the next owner starts.
            replank_testbed::remains::sweep();
        }
        assert!(!runs(container), "after SIG{signal} the container is gone");
        assert!(!std::path::Path::new(directory).exists(), "after SIG{signal} the directory is gone");
    }
    Ok(())
}
