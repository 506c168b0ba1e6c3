//! A real engine: a proxy in an empty image finds containers by identity, and never their addresses' next owners.

use std::path::Path;
use std::process::Command;

use replank_adapters::platform::docker::proxy_api::{Backend, CONFIG, Config, Listener, Protocol, Routes, Side};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::rig::{put, soon, state, until};

/// A client of the engine named by the environment, and what it made, removed at the end.
struct Engine {
    socket: String,
    tag: String,
}

impl Engine {
    fn new() -> Self {
        let socket = std::env::var("REPLANK_TEST_DOCKER")
            .expect("REPLANK_TEST_DOCKER must name a Docker engine's socket; `cargo xtask test` sets it");
        Self { socket, tag: format!("replank-proxy-test-{}", std::process::id()) }
    }

    fn attempt(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("/usr/bin/docker")
            .args(["-H", &format!("unix://{}", self.socket)])
            .args(arguments)
            .env("DOCKER_BUILDKIT", "0")
            .output()
            .expect("the docker client starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn run(&self, arguments: &[&str]) -> String {
        self.attempt(arguments).unwrap_or_else(|error| panic!("docker {arguments:?}: {error}"))
    }

    fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.tag)
    }

    /// An image made of files only.
    fn image(&self, what: &str, files: &[(&Path, &str)], rest: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = "FROM scratch\n".to_owned();
        for (number, (from, to)) in files.iter().enumerate() {
            std::fs::copy(from, dir.path().join(number.to_string())).unwrap();
            recipe += &format!("COPY {number} {to}\n");
        }
        std::fs::write(dir.path().join("Dockerfile"), recipe + rest).unwrap();
        let name = self.name(what);
        self.run(&["build", "-q", "-t", &name, &dir.path().display().to_string()]);
        name
    }

    fn clean(&self) {
        let filter = format!("name={}", self.tag);
        let listed = self.attempt(&["ps", "-aq", "--filter", &filter]).unwrap_or_default();
        for container in listed.lines() {
            let _gone = self.attempt(&["rm", "-f", container]);
        }
        let _gone = self.attempt(&["network", "rm", &self.tag]);
        for image in ["app-a", "app-b", "app-stranger", "proxy"] {
            let _gone = self.attempt(&["rmi", "-f", &self.name(image)]);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.clean();
    }
}

async fn ask(address: &str) -> String {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /index.html HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    soon(exchange).await
}

#[tokio::test]
async fn a_stranger_at_a_removed_containers_address_gets_nothing() {
    let engine = Engine::new();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.exists())
        .expect("busybox-static");
    let dir = tempfile::tempdir().unwrap();
    let mut images = Vec::new();
    for page in ["a", "b", "stranger"] {
        let file = dir.path().join(page);
        std::fs::write(&file, format!("page of {page}")).unwrap();
        let files = [(busybox, "/bin/busybox"), (file.as_path(), "/www/index.html")];
        let entry = "ENTRYPOINT [\"/bin/busybox\", \"httpd\", \"-f\", \"-p\", \"80\", \"-h\", \"/www\"]\n";
        images.push(engine.image(&format!("app-{page}"), &files, entry));
    }
    let proxy =
        engine.image("proxy", &[(Path::new(env!("CARGO_BIN_EXE_replank")), "/replank")], "ENTRYPOINT [\"/replank\"]\n");

    // Only networks with a chosen range give chosen addresses: let the engine find a free range, then choose that one.
    let network = engine.tag.clone();
    engine.run(&["network", "create", &network]);
    let range = engine.run(&["network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", &network]);
    engine.run(&["network", "rm", &network]);
    engine.run(&["network", "create", "--subnet", &range, &network]);
    let base = range.split('.').take(3).collect::<Vec<_>>().join(".");
    let run = |image: &str, name: &str, last: u8| {
        let address = format!("{base}.{last}");
        engine.run(&["run", "-d", "--network", &network, "--ip", &address, "--name", &engine.name(name), image])
    };
    let (a, b) = (run(&images[0], "a", 10), run(&images[1], "b", 11));

    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let listeners = [("web".to_owned(), Listener { port: 8080, protocol: Protocol::Http, tls: None })].into();
    std::fs::write(data.join(CONFIG), serde_json::to_vec(&Config { listeners }).unwrap()).unwrap();
    let mount = format!("{}:/data", data.display());
    let at = format!("{base}.20");
    let name = engine.name("proxy");
    engine.run(&[
        "run",
        "-d",
        "--network",
        &network,
        "--ip",
        &at,
        "--name",
        &name,
        "-v",
        &mount,
        &proxy,
        "proxy",
        "--dir",
        "/data",
    ]);
    until("the proxy answers", async || {
        engine.attempt(&["exec", &name, "/replank", "proxy", "--check", "--dir", "/data"]).is_ok()
    })
    .await;

    let to = |generation: u64, container: &str| {
        let backends = [("web".to_owned(), Backend { container: container.to_owned(), port: 80 })].into();
        Routes { generation, primary: Side { revision: format!("rev-{generation}"), backends }, fallback: None }
    };
    let address = format!("{at}:8080");
    for (generation, container, page) in [(1, &a, "page of a"), (2, &b, "page of b"), (3, &a, "page of a")] {
        let (status, text) = put(&data, &to(generation, container)).await;
        assert_eq!(status, http::StatusCode::OK, "{text}");
        let answer = ask(&address).await;
        assert!(answer.ends_with(page), "{answer}\n{}", engine.run(&["logs", &name]));
    }
    let before = engine.run(&["inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", &a]);
    engine.run(&["rm", "-f", &a]);
    let stranger = run(&images[2], "stranger", 10);
    let after = engine.run(&["inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", &stranger]);
    assert_eq!(before, after, "the stranger must have the removed container's address");
    for _ in 0..20 {
        let answer = ask(&address).await;
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(!answer.contains(&before) && !answer.contains(&a[..12]), "{answer}");
    }
    // The proxy is restarted by the engine and remembers.
    engine.run(&["restart", "-t", "10", &name]);
    until("the proxy is back", async || tokio::net::UnixStream::connect(data.join("control.sock")).await.is_ok()).await;
    assert_eq!(state(&data).await.serving.as_deref(), Some("rev-3"));
    assert_eq!(put(&data, &to(4, &b)).await.0, http::StatusCode::OK);
    assert!(ask(&address).await.ends_with("page of b"));
}
