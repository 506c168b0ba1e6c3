//! Whose signature on a tag counts: the operator's keys, laid out in a private directory for one run of `git verify-tag`.
//!
//! Shared by the two that run git. git takes keys and programs from settings, so all of them are given here, above whatever a
//! clone says, and what is not configured is a program that always refuses. The files are read each time: a key that is taken
//! out counts no more from then on.

mod allowed;
mod openpgp;

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub use allowed::Unfit;

/// Largest file of keys: some thousand people's.
const FILE_MAX: u64 = 4 * 1024 * 1024;
/// Stands for every program that no key is configured for. Nobody can run it, which git takes for a bad signature; one that ran
/// and did not read would kill git, whose end would then be no verdict.
const REFUSE: &str = "/dev/null";
const SSH: (&str, &str) = ("ssh-keygen", "openssh-client");
const OPENPGP: (&str, &str) = ("gpg", "gpg");
/// Where gpg looks for its settings below a home.
const GNUPG: &str = ".gnupg";

/// Files of the operator's own choosing: never a release's, a user's or the system's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signers {
    /// SSH keys, as `ssh-keygen -Y verify` takes them (ALLOWED SIGNERS in ssh-keygen(1)).
    pub allowed: Option<PathBuf>,
    /// SSH keys that count no more: a list of public keys, or a KRL.
    pub revoked: Option<PathBuf>,
    /// OpenPGP keys, as `gpg --export` writes them, armored or not.
    pub openpgp: Option<PathBuf>,
}

/// What a run of `git verify-tag` is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ready {
    /// git's settings; they must win over the clone's own.
    pub settings: Vec<(&'static str, OsString)>,
    /// Keys that are configured and whose time is not now.
    pub unfit: Vec<Unfit>,
}

/// Why no signature can be checked.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("no key is configured that a tag could be signed with")]
    NoKeys,
    #[error("{program} cannot be found, which checks the signatures")]
    Program { program: &'static str, package: &'static str },
    #[error("{what} cannot be read ({})", path.display())]
    Read { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{what} cannot be used ({}): {why}", path.display())]
    Content { what: &'static str, path: PathBuf, why: String },
    #[error("the keys cannot be laid out for git")]
    Write(#[source] io::Error),
}

impl Unusable {
    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::NoKeys => "configure a file of allowed signers, or a keyring".to_owned(),
            Self::Program { package, .. } => format!("install {package} where git runs (Debian's name)"),
            Self::Read { .. } => "name a file that the process which runs git can read".to_owned(),
            Self::Content { .. } => "correct the file; nothing is accepted until it can be read as a whole".to_owned(),
            Self::Write(_) => "check the disk and its permissions where git runs".to_owned(),
        }
    }
}

const ALLOWED: &str = "the file of allowed signers";
const REVOKED: &str = "the file of revoked signers";
const KEYRING: &str = "the OpenPGP keyring";

impl Signers {
    /// Lays the keys out in `home`, which is git's home and nobody else's, and answers what git must be told. `search` is
    /// git's search path.
    ///
    /// # Errors
    /// When a file or a program cannot be used: then nobody's signature counts.
    pub fn prepare(&self, home: &Path, search: &OsStr, now: SystemTime) -> Result<Ready, Unusable> {
        if self.allowed.is_none() && self.openpgp.is_none() {
            return Err(Unusable::NoKeys);
        }
        let mut ready = Ready { settings: nobody(), unfit: Vec::new() };
        if let Some(path) = &self.allowed {
            let text = String::from_utf8(read(ALLOWED, path)?).map_err(|_| content(ALLOWED, path, "it is not text"))?;
            let kept = allowed::fit_at(&text, now).map_err(|why| content(ALLOWED, path, why))?;
            let file = home.join("allowed_signers");
            write(&file, kept.text.as_bytes())?;
            ready.unfit = kept.unfit;
            ready.set("gpg.ssh.program", find(SSH, search)?);
            ready.set("gpg.ssh.allowedSignersFile", file);
        }
        if let Some(path) = &self.revoked {
            let file = home.join("revoked_signers");
            // git goes on with a warning where the file that it is told of is missing; so it gets one that is there.
            write(&file, &read(REVOKED, path)?)?;
            ready.set("gpg.ssh.revocationFile", file);
        }
        if let Some(path) = &self.openpgp {
            let keys = openpgp::keyring(&read(KEYRING, path)?).map_err(|why| content(KEYRING, path, why))?;
            let own = home.join(GNUPG);
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&own).map_err(Unusable::Write)?;
            let file = own.join("keyring.gpg");
            write(&file, &keys)?;
            write(&own.join("gpg.conf"), openpgp::settings(&file).as_bytes())?;
            let program = find(OPENPGP, search)?;
            // With trust in each of these keys by its settings, gpg says none at all.
            ready.set("gpg.minTrustLevel", "undefined");
            ready.set("gpg.program", program.clone());
            ready.set("gpg.openpgp.program", program);
        }
        Ok(ready)
    }

    /// Whether the files can be used as they are now, without laying anything out: for a word at the start of a service.
    ///
    /// # Errors
    /// As [`Signers::prepare`].
    pub fn check(&self, search: &OsStr, now: SystemTime) -> Result<(), Unusable> {
        let place = tempfile::tempdir().map_err(Unusable::Write)?;
        self.prepare(place.path(), search, now).map(drop)
    }
}

impl Ready {
    fn set(&mut self, key: &'static str, value: impl Into<OsString>) {
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.into()));
    }
}

/// Settings under which no signature is good.
#[must_use]
pub fn nobody() -> Vec<(&'static str, OsString)> {
    [
        ("gpg.format", "ssh"),
        ("gpg.program", REFUSE),
        ("gpg.openpgp.program", REFUSE),
        ("gpg.x509.program", REFUSE),
        ("gpg.ssh.program", REFUSE),
        ("gpg.ssh.allowedSignersFile", "/dev/null"),
        // What git says of an SSH key that stands among the allowed signers; one that does not has less.
        ("gpg.minTrustLevel", "fully"),
    ]
    .map(|(key, value)| (key, value.into()))
    .to_vec()
}

fn content(what: &'static str, path: &Path, why: impl Into<String>) -> Unusable {
    Unusable::Content { what, path: path.to_owned(), why: why.into() }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, Unusable> {
    let failed = |source| Unusable::Read { what, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(content(what, path, format!("it has more than {FILE_MAX} bytes")));
    }
    Ok(bytes)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Unusable> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(Unusable::Write)
}

/// By its whole path, so that it is the one that was looked for.
fn find((program, package): (&'static str, &'static str), search: &OsStr) -> Result<PathBuf, Unusable> {
    std::env::split_paths(search)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .ok_or(Unusable::Program { program, package })
}
