//! Keys that releases are signed with, made on the spot by the programs that people use: `ssh-keygen` and `gpg`.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{Repo, process};

/// An SSH key without a passphrase.
#[derive(Debug, Clone)]
pub struct SshKey {
    path: PathBuf,
    /// `ssh-ed25519 AAAA…`
    pub public: String,
}

impl SshKey {
    /// # Errors
    /// When ssh-keygen is missing or fails.
    pub fn create(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        let mut make = Command::new("ssh-keygen");
        make.args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&path);
        process::run(&mut make).context("cannot make an SSH key")?;
        let public = fs::read_to_string(path.with_extension("pub"))?;
        let public: Vec<&str> = public.split(' ').take(2).collect();
        Ok(Self { path, public: public.join(" ") })
    }

    /// A signed tag on any object; replaces one of the same name.
    ///
    /// # Errors
    /// When git fails.
    pub fn tag(&self, repo: &Repo, name: &str, object: &str) -> Result<()> {
        let key = format!("user.signingkey={}", self.path.display());
        repo.git(&["-c", "gpg.format=ssh", "-c", &key, "tag", "--force", "--sign", "-m", name, name, object]).map(drop)
    }

    /// The armored signature over a file, for any purpose.
    ///
    /// # Errors
    /// When ssh-keygen fails.
    pub fn sign(&self, file: &Path, namespace: &str) -> Result<String> {
        let mut sign = Command::new("ssh-keygen");
        process::run(sign.args(["-q", "-Y", "sign", "-n", namespace, "-f"]).arg(&self.path).arg(file))?;
        let mut signature = file.as_os_str().to_owned();
        signature.push(".sig");
        Ok(fs::read_to_string(signature)?)
    }
}

/// An OpenPGP key in a home of its own.
#[derive(Debug)]
pub struct OpenPgpKey {
    home: PathBuf,
    program: PathBuf,
    pub fingerprint: String,
}

impl OpenPgpKey {
    /// Made at, and used as if it were always, `at` (`20240101T000000`); now where it is not given. It ends after `lifetime` (`1y`,
    /// `never`).
    ///
    /// # Errors
    /// When gpg is missing or fails.
    pub fn create(directory: &Path, name: &str, at: Option<&str>, lifetime: &str) -> Result<Self> {
        let home = directory.join(name);
        fs::DirBuilder::new().mode(0o700).create(&home)?;
        let program = directory.join(format!("{name}.sh"));
        let time = at.map(|at| format!("--faked-system-time {at}!")).unwrap_or_default();
        fs::write(&program, format!("#!/bin/sh\nexec gpg --quiet --homedir '{}' {time} \"$@\"\n", home.display()))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let user = format!("{name} <{name}@example.com>");
        let mut make = Command::new(&program);
        make.args(["--batch", "--passphrase", "", "--quick-gen-key", &user, "ed25519", "sign", lifetime]);
        process::run(&mut make).context("cannot make an OpenPGP key")?;
        let listed = process::text(Command::new(&program).args(["--with-colons", "--list-keys"]))?;
        let fingerprint = listed.lines().find_map(|line| line.strip_prefix("fpr:::::::::"));
        let fingerprint = fingerprint.context("gpg lists no key")?.trim_end_matches(':').to_owned();
        Ok(Self { home, program, fingerprint })
    }

    /// As [`SshKey::tag`].
    ///
    /// # Errors
    /// When git fails.
    pub fn tag(&self, repo: &Repo, name: &str, object: &str) -> Result<()> {
        let program = format!("gpg.program={}", self.program.display());
        let key = format!("user.signingkey={}", self.fingerprint);
        repo.git(&["-c", &program, "-c", &key, "tag", "--force", "--sign", "-m", name, name, object]).map(drop)
    }

    /// From here on the key says of itself that it is revoked.
    ///
    /// # Errors
    /// When gpg fails.
    pub fn revoke(&self) -> Result<()> {
        let file = self.home.join("openpgp-revocs.d").join(format!("{}.rev", self.fingerprint));
        // A colon keeps people from importing it by mistake.
        let certificate = fs::read_to_string(&file)?.replace(":-----BEGIN", "-----BEGIN");
        let usable = self.home.join("revocation.asc");
        fs::write(&usable, certificate)?;
        process::run(Command::new(&self.program).args(["--batch", "--import"]).arg(&usable)).map(drop)
    }

    /// The public key, armored or binary.
    ///
    /// # Errors
    /// When gpg fails.
    pub fn export(&self, armored: bool) -> Result<Vec<u8>> {
        let mut export = Command::new(&self.program);
        export.arg("--export");
        if armored {
            export.arg("--armor");
        }
        let output = export.output()?;
        anyhow::ensure!(output.status.success(), "gpg does not export its key");
        Ok(output.stdout)
    }
}

impl Drop for OpenPgpKey {
    fn drop(&mut self) {
        // The agent that gpg has started would outlive its home.
        let mut kill = Command::new("gpgconf");
        if let Err(error) = process::run(kill.arg("--homedir").arg(&self.home).args(["--kill", "all"])) {
            eprintln!("testbed: an agent of gpg stays behind: {error:#}");
        }
    }
}
