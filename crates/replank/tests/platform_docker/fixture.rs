//! An application on a real engine with the real proxy, made for one test and removed with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use replank_adapters::platform::docker::config::{
    ContainerConfig, DockerConfig, ListenerConfig, ProbeConfig, ProxyConfig, VersionProof,
};
use replank_adapters::platform::docker::proxy_api::{Protocol, State};
use replank_adapters::platform::docker::traffic::Proxy;
use replank_adapters::platform::docker::{DockerPlatform, Vantage, names};
use replank_core::fault::Fault;
use replank_core::image::{ImageId, Images};
use replank_core::phase::Fetched;
use replank_core::ports::{Ask, Change, Clock, Observation, Platform as _, Probed, Running};
use replank_core::record::{Deployment, Plan};
use replank_core::words::{
    AppName, CommitSha, ComponentName, ContainerName, Digest, InstallationId, JobId, Millis, Nonce, OpKey, RevisionId,
};
use tempfile::TempDir;

/// Longest wait for anything that this machine does by itself.
const PATIENCE: Duration = Duration::from_secs(60);
const DOCKER: &str = "/usr/bin/docker";

#[derive(Debug)]
pub(crate) struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Millis {
        #[expect(clippy::disallowed_methods, reason = "this is a clock")]
        Millis(jiff::Timestamp::now().as_millisecond())
    }
}

/// The engine that tests share.
pub(crate) fn engine_socket() -> PathBuf {
    match std::env::var_os("REPLANK_TEST_DOCKER") {
        Some(path) => PathBuf::from(path.to_string_lossy().trim_start_matches("unix://")),
        None => panic!("REPLANK_TEST_DOCKER names no engine socket; `cargo xtask test` starts an engine and sets it"),
    }
}

pub(crate) fn docker_in(socket: &Path, arguments: &[&str]) -> String {
    let output = Command::new(DOCKER)
        .env("DOCKER_HOST", format!("unix://{}", socket.display()))
        .env("DOCKER_BUILDKIT", "1")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the docker client runs");
    assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub(crate) struct App {
    socket: PathBuf,
    pub(crate) config: DockerConfig,
    pub(crate) platform: DockerPlatform,
    pub(crate) proxy_image: String,
    _home: TempDir,
}

impl App {
    pub(crate) async fn new(application: &str) -> Self {
        Self::with(application, |_| ()).await
    }

    pub(crate) async fn with(application: &str, edit: impl FnOnce(&mut DockerConfig)) -> Self {
        Self::on(&engine_socket(), application, edit).await
    }

    pub(crate) async fn on(socket: &Path, application: &str, edit: impl FnOnce(&mut DockerConfig)) -> Self {
        let home = tempfile::Builder::new().prefix("rp").tempdir().expect("home");
        let application = format!("{application}-{:x}", std::process::id());
        let component = ComponentName::new("web").expect("component");
        let mut web = ContainerConfig::of(component.clone());
        web.probe = Some(ProbeConfig {
            version: VersionProof::JsonPointer("/version".to_owned()),
            ..ProbeConfig::http(8080, "/version.json")
        });
        web.stop_grace_seconds = 1;
        let mut worker = ContainerConfig::of(component);
        worker.command = Some(vec!["sleep".to_owned(), "100000".to_owned()]);
        worker.depends_on = BTreeSet::from([ContainerName::new("web").expect("name")]);
        worker.stop_grace_seconds = 1;
        let listener = ListenerConfig {
            publish: free_port(),
            bind: Ipv4Addr::LOCALHOST.into(),
            listen: None,
            container: ContainerName::new("web").expect("name"),
            port: 8080,
            protocol: Protocol::Http,
            tls: None,
        };
        let mut config = DockerConfig {
            socket: socket.to_owned(),
            home: home.path().to_owned(),
            application: AppName::new(application.as_str()).expect("application"),
            installation: InstallationId::new(format!("test{:012}", std::process::id())).expect("installation"),
            containers: [("web", web), ("worker", worker)]
                .map(|(name, run)| (ContainerName::new(name).expect("name"), run))
                .into(),
            listeners: BTreeMap::from([("web".to_owned(), listener)]),
            networks: BTreeSet::new(),
            proxy: ProxyConfig::default(),
            data: Default::default(),
        };
        edit(&mut config);
        for version in ["0.1.0", "0.2.0"] {
            make_image(socket, version);
        }
        let platform = DockerPlatform::new(config.clone(), Vantage::Host, Arc::new(WallClock)).expect("platform");
        // One image for all tests, made once: two that make it at once would each take the name from the other's.
        let once = std::fs::File::create(socket.with_extension("proxy-image")).expect("a file to lock");
        once.lock().expect("a lock");
        let proxy_image = platform.proxy_image(Path::new(env!("CARGO_BIN_EXE_replank"))).await.expect("proxy image");
        drop(once);
        let app = Self { socket: socket.to_owned(), config, platform, proxy_image, _home: home };
        app.platform.ensure_proxy(&app.proxy_image).await.expect("proxy");
        // The first request must find its socket.
        let socket = app.config.control_socket();
        until("the proxy's socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
        app
    }

    pub(crate) fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(WallClock)
    }

    pub(crate) fn platform_at(&self, vantage: Vantage) -> DockerPlatform {
        DockerPlatform::new(self.config.clone(), vantage, self.clock()).expect("platform")
    }

    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        docker_in(&self.socket, arguments)
    }

    /// One of the escape hatch's commands, with nothing in its environment but the way to the tools.
    pub(crate) fn shell(&self, command: &str) {
        let output = Command::new("/bin/sh")
            .args(["-euc", command])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .output()
            .expect("a shell runs");
        assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn image(&self, version: &str) -> String {
        image_name(version)
    }

    pub(crate) async fn deployment(&self, revision: &str, version: &str) -> Deployment {
        self.deployment_with(revision, version, "the-job").await
    }

    pub(crate) async fn deployment_with(&self, revision: &str, version: &str, job: &str) -> Deployment {
        let plan = self.plan(version, serde_json::Value::Null).await.expect("plan");
        Deployment {
            revision: RevisionId::new(revision).expect("revision"),
            key: OpKey::derive(
                &JobId::new(job).expect("job"),
                revision,
                1,
                &Nonce::new("0".repeat(32)).expect("nonce"),
            ),
            version: version.parse().expect("version"),
            commit: CommitSha::new("1".repeat(40)).expect("commit"),
            images: self.images(version),
            plan,
            reads_format: None,
        }
    }

    pub(crate) async fn plan_of(&self, manifest: serde_json::Value) -> Result<Plan, Fault> {
        self.plan("0.1.0", manifest).await
    }

    async fn plan(&self, version: &str, manifest: serde_json::Value) -> Result<Plan, Fault> {
        let fetched = Fetched { manifest, ..Fetched::default() };
        self.platform.plan(&fetched, &self.images(version), &version.parse().expect("version")).await
    }

    fn images(&self, version: &str) -> Images {
        let name = image_name(version);
        let id = Digest::new(self.docker(&["image", "inspect", "-f", "{{.Id}}", &name])).expect("id");
        Images::from([(ComponentName::new("web").expect("component"), ImageId::Engine { id, name })])
    }

    pub(crate) fn full_name(&self, deployment: &Deployment, container: &str) -> String {
        let container = ContainerName::new(container).expect("name");
        names::container(&self.config.application, &deployment.revision, &container)
    }

    pub(crate) async fn proxy_state(&self) -> State {
        Proxy::new(self.config.control_socket()).state().await.expect("the proxy's state")
    }

    /// The whole answer to a request from outside, however long it takes.
    pub(crate) fn get(&self, path: &'static str) -> JoinHandle<String> {
        let port = self.published();
        std::thread::spawn(move || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
            let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).expect("write");
            let mut text = Vec::new();
            if let Err(error) = stream.read_to_end(&mut text) {
                text.extend_from_slice(format!("<{error}>").as_bytes());
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    }

    pub(crate) async fn does(&self, change: &Change) {
        if let Err(fault) = self.platform.change(change).await {
            panic!("{change:?}\n{}", fault.chain());
        }
    }

    /// The engine's own words about a deployment's containers.
    pub(crate) fn state(&self, format: &str, deployment: &Deployment) -> Vec<String> {
        let full = |name: &ContainerName| names::container(&self.config.application, &deployment.revision, name);
        deployment.plan.containers.keys().map(|name| self.docker(&["inspect", "-f", format, &full(name)])).collect()
    }

    pub(crate) async fn until_passed(&self, deployment: &Deployment) -> Observation {
        let ask = Ask { direct: vec![deployment.clone()], through: Some(deployment.clone()) };
        self.until_seen(&ask, |seen| {
            seen.traffic.probed == Probed::Passed && direct(seen, deployment) == Some(&Probed::Passed)
        })
        .await
    }

    pub(crate) async fn until_direct(&self, deployment: &Deployment) {
        let ask = Ask { direct: vec![deployment.clone()], through: None };
        self.until_seen(&ask, |seen| direct(seen, deployment) == Some(&Probed::Passed)).await;
    }

    pub(crate) async fn until_exited(&self, deployment: &Deployment, name: &str) {
        let name = ContainerName::new(name).expect("name");
        let stopped = |seen: &Observation| {
            seen.revisions.get(&deployment.revision).and_then(|r| r.containers.get(&name)).map(|c| c.running)
                == Some(Running::Stopped)
        };
        self.until_seen(&Ask::default(), stopped).await;
    }

    pub(crate) async fn until_seen(&self, ask: &Ask, wanted: impl Fn(&Observation) -> bool) -> Observation {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = self.platform.observe(ask).await.expect("observe");
            if wanted(&seen) {
                return seen;
            }
            assert!(Instant::now() < end, "not seen in time: {seen:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) fn published(&self) -> u16 {
        self.config.listeners["web"].publish
    }

    /// The version that answers on the published port.
    pub(crate) async fn serves(&self) -> String {
        version_at(self.published()).expect("an answer")
    }

    pub(crate) async fn until_serves(&self, version: &str) {
        let port = self.published();
        until(version, || version_at(port).is_ok_and(|found| found == version)).await;
    }

    /// Requests one after another from outside, until it is finished.
    pub(crate) fn load(&self) -> Load {
        let port = self.published();
        let (end, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stop, failures) = (end.clone(), failed.clone());
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                sent += 1;
                if let Err(error) = version_at(port) {
                    failures.lock().expect("lock").push(error);
                }
            }
            sent
        });
        Load { end, failed, thread }
    }
}

fn direct<'a>(seen: &'a Observation, deployment: &Deployment) -> Option<&'a Probed> {
    seen.revisions.get(&deployment.revision).map(|r| &r.probed)
}

impl Drop for App {
    fn drop(&mut self) {
        let application = format!("label=io.replank.application={}", self.config.application);
        for (list, remove) in [
            (vec!["ps", "-aq", "--filter", &application], vec!["rm", "-f", "-v"]),
            (vec!["network", "ls", "-q", "--filter", &application], vec!["network", "rm"]),
        ] {
            let docker = |arguments: &[&str]| {
                let host = format!("unix://{}", self.socket.display());
                Command::new(DOCKER).env("DOCKER_HOST", host).args(arguments).output().map(|o| o.stdout)
            };
            let found = docker(&list).unwrap_or_default();
            let found = String::from_utf8_lossy(&found).into_owned();
            let ids: Vec<&str> = found.split_whitespace().collect();
            if !ids.is_empty() && docker(&[&remove[..], &ids[..]].concat()).is_err() {
                eprintln!("{ids:?} could not be removed");
            }
        }
    }
}

pub(crate) struct Load {
    end: Arc<AtomicBool>,
    failed: Arc<Mutex<Vec<String>>>,
    thread: JoinHandle<u64>,
}

impl Load {
    pub(crate) fn finish(self) -> (u64, Vec<String>) {
        self.end.store(true, Ordering::Relaxed);
        let sent = self.thread.join().expect("load");
        (sent, std::mem::take(&mut *self.failed.lock().expect("lock")))
    }
}

fn version_at(port: u16) -> Result<String, String> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /version.json HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = ask().map_err(|error| error.to_string())?;
    let (_, rest) = text.split_once("{\"version\":\"").ok_or_else(|| format!("{text:.200}"))?;
    Ok(rest.split('"').next().unwrap_or_default().to_owned())
}

pub(crate) async fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a port").port()
}

fn image_name(version: &str) -> String {
    format!("replank-test-web:{version}")
}

/// A web server that tells its version, from nothing but a static busybox.
fn make_image(socket: &Path, version: &str) {
    // Two builds of the same at the same time would make two images of one name.
    static ONE: OnceLock<Mutex<()>> = OnceLock::new();
    let _one = ONE.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let present = Command::new(DOCKER)
        .env("DOCKER_HOST", format!("unix://{}", socket.display()))
        .args(["image", "inspect", &image_name(version)])
        .output()
        .expect("the docker client runs");
    if !present.status.success() {
        let context = image_context(version);
        docker_in(socket, &["build", "-q", "-t", &image_name(version), context.path().to_str().expect("path")]);
    }
}

/// What the image is built from.
pub(crate) fn image_context(version: &str) -> TempDir {
    let context = tempfile::tempdir().expect("context");
    let write = |name: &str, text: &str| std::fs::write(context.path().join(name), text).expect("write");
    std::fs::copy("/bin/busybox", context.path().join("busybox")).expect("busybox-static is installed");
    write("version.json", &format!("{{\"version\":\"{version}\"}}"));
    // One answer that takes a second, and one that never ends.
    write("slow", "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\nbegun\\n'\nsleep 1\necho done\n");
    write(
        "stream",
        "#!/bin/sh\nprintf 'Content-Type: text/event-stream\\r\\n\\r\\n'\nwhile printf 'data: x\\n\\n'; do sleep 0.1; done\n",
    );
    for script in ["slow", "stream"] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(context.path().join(script), mode).expect("mode");
    }
    write(
        "Dockerfile",
        "FROM scratch\nCOPY busybox /bin/busybox\nCOPY busybox /bin/sh\nCOPY busybox /bin/sleep\nCOPY busybox /bin/wget\n\
         COPY version.json /www/version.json\nCOPY slow stream /www/cgi-bin/\nENV PATH=/bin\nCMD [\"busybox\",\"httpd\",\"-f\",\"-p\",\"8080\",\"-h\",\"/www\"]\n",
    );
    context
}
