//! The programs that the testbed needs: installs them on Debian and Ubuntu as root, elsewhere says what to do.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::engine::{Engine, EngineOptions};
use crate::process;

/// Where an engine listens that someone else installed.
const USUAL_SOCKET: &str = "/var/run/docker.sock";

/// A program or file whose presence proves that the package is there; several where distributions differ.
const NEEDED: [(&str, &[&str]); 15] = [
    ("docker.io", &["/usr/sbin/dockerd", "/usr/bin/dockerd"]),
    // Ubuntu and newer Debian have the client in a package of its own; see `packages`.
    ("docker-cli", &["/usr/bin/docker"]),
    ("docker-registry", &["/usr/bin/docker-registry"]),
    ("busybox-static", &["/usr/bin/busybox", "/bin/busybox"]),
    ("mmdebstrap", &["/usr/bin/mmdebstrap"]),
    ("iproute2", &["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip"]),
    ("iptables", &["/usr/sbin/iptables", "/sbin/iptables"]),
    ("git", &["/usr/bin/git"]),
    // Whoever asks for signed tags needs one of them beside git; the tests make keys with both.
    ("openssh-client", &["/usr/bin/ssh-keygen"]),
    ("gnupg", &["/usr/bin/gpg"]),
    // Two for tests alone: a damaged ledger, and one on a file system that is no place for it.
    ("sqlite3", &["/usr/bin/sqlite3"]),
    ("bindfs", &["/usr/bin/bindfs"]),
    // The fuzzer that the tests run is built from its C++ sources.
    ("g++", &["/usr/bin/g++", "/usr/bin/c++"]),
    // What the API's check runs in. The part of Python that is a package of its own lies below the version's directory.
    (
        "python3-venv",
        &[
            "/usr/lib/python3.11/ensurepip/__init__.py",
            "/usr/lib/python3.12/ensurepip/__init__.py",
            "/usr/lib/python3.13/ensurepip/__init__.py",
            "/usr/lib/python3.14/ensurepip/__init__.py",
        ],
    ),
    ("ca-certificates", &["/etc/ssl/certs/ca-certificates.crt"]),
];

/// What this machine offers after [`ensure`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Machine {
    /// Everything for private engines.
    Private,
    /// We are not root, or there is no apt: an engine that runs already, by its socket.
    Found(PathBuf),
}

impl Machine {
    /// A private engine, or the one that was found.
    ///
    /// # Errors
    /// When the private engine does not start or the found one no longer answers.
    pub fn engine(&self, options: &EngineOptions) -> Result<Engine> {
        match self {
            Self::Private => Engine::start(options),
            Self::Found(socket) => Engine::attach(socket),
        }
    }
}

/// Looks for the programs, installs what is missing where it can (and says so on standard error); what it installs stays.
///
/// # Errors
/// With what to install, where it cannot do so itself and finds no engine.
pub fn ensure() -> Result<Machine> {
    let missing = missing();
    let is_root = rustix::process::geteuid().is_root();
    let has_apt = Path::new("/usr/bin/apt-get").exists();
    if is_root && missing.is_empty() {
        return Ok(Machine::Private);
    }
    if is_root && has_apt {
        install(&missing)?;
        let still: Vec<_> = self::missing();
        if !still.is_empty() {
            bail!("these packages were installed but their programs are not where they belong: {}", still.join(" "));
        }
        return Ok(Machine::Private);
    }
    // Without root the bridge, the mounts and the engine itself are out of reach; git and the base images' programs are not.
    let without_engine = ["docker.io", "iproute2", "iptables"];
    let needed: Vec<_> = missing.into_iter().filter(|name| !without_engine.contains(name)).collect();
    let advice = "or run as root on Debian or Ubuntu, where everything missing is installed by itself";
    if !needed.is_empty() {
        bail!("please install {} (names of Debian's packages), {advice}", needed.join(", "));
    }
    let socket = found_socket();
    match Engine::attach(&socket) {
        Ok(_) => Ok(Machine::Found(socket)),
        Err(error) => {
            Err(error.context(format!("please install Docker and let this user use it (or set DOCKER_HOST), {advice}")))
        }
    }
}

fn found_socket() -> PathBuf {
    let named = std::env::var("DOCKER_HOST").unwrap_or_default();
    PathBuf::from(named.strip_prefix("unix://").unwrap_or(USUAL_SOCKET))
}

fn missing() -> Vec<&'static str> {
    NEEDED
        .iter()
        .filter(|(_, proofs)| !proofs.iter().any(|proof| Path::new(proof).exists()))
        .map(|(name, _)| *name)
        .collect()
}

fn install(missing: &[&str]) -> Result<()> {
    eprintln!("setup: apt-get update");
    let apt = |arguments: &[&str]| {
        process::run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update"]).context("cannot update the package lists")?;
    let packages = packages(missing);
    eprintln!("setup: apt-get install {} (they stay installed)", packages.join(" "));
    let _policy = NoServices::new()?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(&packages);
    apt(&arguments).with_context(|| format!("cannot install {}", packages.join(" ")))?;
    Ok(())
}

/// The client belongs to docker.io up to Debian 12 and is a package of its own from Debian 13 on.
fn packages<'a>(missing: &[&'a str]) -> Vec<&'a str> {
    let exists = |name: &str| process::run(Command::new("apt-cache").args(["show", "--no-all-versions", name])).is_ok();
    let mut packages: Vec<&str> =
        missing.iter().copied().filter(|name| *name != "docker-cli" || exists(name)).collect();
    if missing.contains(&"docker-cli") && !packages.contains(&"docker-cli") && !packages.contains(&"docker.io") {
        packages.push("docker.io");
    }
    packages
}

/// While this lives, installing a package starts no service: the packages bring an engine and a registry of their own that
/// nobody asked for, and the machine's engine stays as its owner wants it.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn new() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        if path.exists() {
            return Ok(Self(None));
        }
        std::fs::write(&path, "#!/bin/sh\nexit 101\n")?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self(Some(path)))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            eprintln!("setup: cannot remove {}: {error}", path.display());
        }
    }
}
