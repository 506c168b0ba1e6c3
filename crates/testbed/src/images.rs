//! Base images made on this machine, without pulling: from its own packages and from static programs.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::engine::Engine;
use crate::process;

/// A static busybox with its applets, and nothing else.
pub const BUSYBOX: &str = "testbed/busybox";
/// gcc, make, the C library's headers and static archive, a shell.
pub const CC: &str = "testbed/cc";
/// What a controller runs on: git and the certificates of the usual authorities. [`RUNTIME`] adds the program.
pub const RUNTIME_BASE: &str = "testbed/runtime-base";
/// The image that an application's controller component is made from.
pub const RUNTIME: &str = "replank-runtime";
/// All of them, those first that others stand on.
pub const ALL: [&str; 4] = [BUSYBOX, CC, RUNTIME_BASE, RUNTIME];

/// Counted up when what is done to the packages changes, so that older cached roots are not used.
const CACHE_FORMAT: u32 = 1;

/// A root file system of packages from this machine's own sources.
struct Root {
    name: &'static str,
    packages: &'static [&'static str],
    /// Removed from the root, by shell pattern: what a package brings and an image like this never needs. Halves the import.
    unneeded: &'static [&'static str],
}

const CC_ROOT: Root = Root {
    name: "cc",
    packages: &["gcc", "libc6-dev", "make", "dash", "busybox-static"],
    unneeded: &[
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
        "usr/lib/gcc/*/*/lto1",
        "usr/bin/*lto-dump*",
        "usr/bin/*gold",
        "usr/bin/*dwp",
        "usr/bin/*gprofng*",
        "usr/bin/*gp-*",
        "usr/lib/*/lib[atlu]*san.so*",
        "usr/lib/gcc/*/*/lib[atlu]*san*",
        "usr/lib/*/libgprofng*",
        "usr/lib/*/perl*",
        "usr/share/perl*",
    ],
};

const RUNTIME_ROOT: Root = Root {
    name: "runtime",
    // The shell is for git's askpass scripts.
    packages: &["git", "ca-certificates", "dash"],
    unneeded: &[
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
        "usr/lib/*/perl*",
        "usr/share/perl*",
        "usr/bin/perl*",
        "usr/lib/*/libperl*",
        "usr/share/git-core/contrib",
    ],
};

/// Makes [`BUSYBOX`].
///
/// # Errors
/// When busybox-static is missing or the engine refuses.
pub fn busybox(engine: &Engine) -> Result<()> {
    let program = process::find("busybox", &["/usr/bin/busybox", "/bin/busybox"])
        .context("there is no busybox; install busybox-static")?;
    let applets = process::text(Command::new(&program).arg("--list"))?;
    let root = tempfile::tempdir()?;
    let bin = root.path().join("bin");
    for directory in ["bin", "etc", "proc", "root", "sys", "tmp", "usr", "var"] {
        fs::create_dir(root.path().join(directory))?;
    }
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(root.path().join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    fs::write(root.path().join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::copy(&program, bin.join("busybox"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", bin.join(applet))?;
    }
    let tar = tempfile::NamedTempFile::new()?;
    process::run(
        Command::new("tar")
            .args(["--numeric-owner", "--owner=0", "--group=0", "-C"])
            .arg(root.path())
            .arg("-cf")
            .arg(tar.path())
            .arg("."),
    )?;
    import(engine, tar.path(), BUSYBOX, &["ENV PATH=/bin", "CMD [\"/bin/sh\"]"])
}

/// Makes [`CC`]; the first time on a machine this takes the time to fetch the packages.
///
/// # Errors
/// When the packages cannot be fetched or the engine refuses.
pub fn cc(engine: &Engine) -> Result<()> {
    import(engine, &root_tar(&CC_ROOT)?, CC, &["ENV PATH=/usr/bin:/bin"])
}

/// Makes [`RUNTIME`] with the static program at `replank` in it, which reads record formats up to `reads_format`.
///
/// # Errors
/// When the packages cannot be fetched or the engine refuses.
pub fn runtime(engine: &Engine, replank: &Path, reads_format: u32) -> Result<()> {
    runtime_as(engine, RUNTIME, replank, reads_format)
}

/// The same under another name, for another program.
///
/// # Errors
/// As [`runtime`].
pub fn runtime_as(engine: &Engine, name: &str, replank: &Path, reads_format: u32) -> Result<()> {
    if engine.docker(&["image", "inspect", "--format", "{{.Id}}", RUNTIME_BASE]).is_err() {
        import(engine, &root_tar(&RUNTIME_ROOT)?, RUNTIME_BASE, &["ENV PATH=/usr/local/bin:/usr/bin:/bin"])?;
    }
    let context = tempfile::tempdir()?;
    fs::copy(replank, context.path().join("replank")).with_context(|| format!("cannot read {}", replank.display()))?;
    let dockerfile = format!(
        "FROM {RUNTIME_BASE}\nLABEL io.replank.reads-format={reads_format}\nCOPY replank /usr/local/bin/replank\n\
         ENTRYPOINT [\"/usr/local/bin/replank\"]\n"
    );
    fs::write(context.path().join("Dockerfile"), dockerfile)?;
    engine.docker(&["build", "--quiet", "--tag", name, &context.path().to_string_lossy()]).map(drop)
}

/// Where the roots of packages are kept between runs: `testbed` in cargo's target directory.
#[must_use]
pub fn cache() -> PathBuf {
    target().join("testbed")
}

/// The workspace's directory, as it was when this was compiled.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Cargo's target directory.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn import(engine: &Engine, tar: &Path, name: &str, changes: &[&str]) -> Result<()> {
    let mut command = engine.docker_command();
    command.arg("import");
    for change in changes {
        command.args(["--change", change]);
    }
    let file = File::open(tar).with_context(|| tar.display().to_string())?;
    process::run(command.args(["-", name]).stdin(Stdio::from(file))).map(drop)
}

/// The cached root, made when it is not there.
fn root_tar(root: &Root) -> Result<PathBuf> {
    let release = fs::read_to_string("/etc/os-release").context("this machine does not say what it is")?;
    let suite = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no release: base images are made on Debian or Ubuntu")?
        .trim_matches('"')
        .to_owned();
    let mut key = DefaultHasher::new();
    (CACHE_FORMAT, std::env::consts::ARCH, &suite, root.packages, root.unneeded).hash(&mut key);
    fs::create_dir_all(cache())?;
    let tar = cache().join(format!("{}-{:016x}.tar", root.name, key.finish()));
    if tar.exists() {
        return Ok(tar);
    }
    let sources = sources()?;
    let scratch = tempfile::tempdir()?;
    let options = scratch.path().join("apt.conf");
    fs::write(&options, apt_options()?)?;
    let fresh = tempfile::Builder::new().prefix(root.name).suffix(".tar").tempfile_in(cache())?;
    let mut command = Command::new("mmdebstrap");
    command
        // Extracted, not configured: half the time, and nothing here needs a package's scripts but what the hooks do.
        .args(["--quiet", "--variant=extract"])
        .arg(format!("--include={}", root.packages.join(",")))
        .arg(format!("--aptopt={}", options.display()));
    let merged = Path::new("/usr/share/mmdebstrap/hooks/merged-usr");
    if merged.exists() {
        command.arg(format!("--hook-dir={}", merged.display()));
    }
    let patterns: Vec<_> = root.unneeded.iter().map(|pattern| format!("\"$1\"/{pattern}")).collect();
    command.arg(format!("--extract-hook=rm -rf {}", patterns.join(" ")));
    if root.packages.contains(&"ca-certificates") {
        // What the package's own script would do.
        command.arg(
            "--extract-hook=mkdir -p \"$1\"/etc/ssl/certs && \
             cat \"$1\"/usr/share/ca-certificates/mozilla/*.crt > \"$1\"/etc/ssl/certs/ca-certificates.crt",
        );
    }
    if root.packages.contains(&"busybox-static") {
        command.arg("--extract-hook=for a in $(\"$1\"/usr/bin/busybox --list 2>/dev/null || \"$1\"/bin/busybox --list); do \
                     [ -e \"$1\"/usr/bin/$a ] || ln -s busybox \"$1\"/usr/bin/$a; done; mkdir -p \"$1\"/tmp; chmod 1777 \"$1\"/tmp");
    }
    eprintln!(
        "images: making the {} root from this machine's package sources (kept in {})",
        root.name,
        cache().display()
    );
    command.arg(&suite).arg(fresh.path()).args(&sources);
    process::run(&mut command).context("cannot make a root of packages; does `apt-get update` work here?")?;
    // Complete, or not there at all: another run may look at the same time.
    fresh.persist(&tar)?;
    Ok(tar)
}

/// This machine's package sources, as files for mmdebstrap.
fn sources() -> Result<Vec<PathBuf>> {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut sources: Vec<PathBuf> = [PathBuf::from("/etc/apt/sources.list")]
        .into_iter()
        .chain(parts)
        .filter(|path| path.extension().is_some_and(|extension| extension == "list" || extension == "sources"))
        .filter(|path| {
            // Comments alone are not a source, and mmdebstrap refuses them.
            fs::read_to_string(path).is_ok_and(|text| {
                text.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
            })
        })
        .collect();
    sources.sort();
    if sources.is_empty() {
        bail!("there are no package sources in /etc/apt");
    }
    Ok(sources)
}

/// How this machine's apt reaches its sources: proxies, certificates, checks.
fn apt_options() -> Result<String> {
    let all = process::text(Command::new("apt-config").arg("dump"))?;
    let mut options: String = all
        .lines()
        .filter(|line| {
            let name = line.split([' ', ':']).nth(2).unwrap_or_default();
            line.starts_with("Acquire::")
                && (["http", "https", "Retries", "ForceIPv4", "ForceIPv6"].contains(&name)
                    || name.starts_with("Check-")
                    || name.starts_with("Allow"))
        })
        .map(|line| format!("{line}\n"))
        .collect();
    options.push_str("Dir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n");
    Ok(options)
}
