//! Cargo as the product is built: static programs, which run in images made from scratch.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use replank_testbed::{images, process};

/// Where the static programs are, and how to call cargo for them.
#[derive(Debug)]
pub(crate) struct Build {
    triple: String,
}

impl Build {
    /// # Errors
    /// When rustc does not answer.
    pub(crate) fn new() -> Result<Self> {
        let version = process::text(Command::new("rustc").arg("-vV"))?;
        let triple =
            version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not name its host")?;
        Ok(Self { triple: triple.to_owned() })
    }

    /// `cargo <words> --target <host>` with the flags for static programs.
    #[must_use]
    pub(crate) fn cargo(&self, words: &[&str]) -> Command {
        self.cargo_with("-C target-feature=+crt-static", words)
    }

    /// `cargo <words> --target <host>` with these flags for the compiler. Naming the target keeps the flags away from build
    /// scripts and procedural macros, which can be neither static nor instrumented.
    #[must_use]
    pub(crate) fn cargo_with(&self, flags: &str, words: &[&str]) -> Command {
        let mut command = Command::new("cargo");
        command.args(words).args(["--target", &self.triple]).current_dir(images::workspace());
        let name = format!("CARGO_TARGET_{}_RUSTFLAGS", self.triple.to_uppercase().replace('-', "_"));
        command.env(name, flags);
        // Either would replace the flags above.
        command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        command
    }

    #[must_use]
    pub(crate) fn triple(&self) -> &str {
        &self.triple
    }

    /// Builds the one binary and answers its path.
    ///
    /// # Errors
    /// When it does not compile; cargo has said why by then.
    pub fn replank(&self, profile: Profile) -> Result<PathBuf> {
        let flags: &[&str] = match profile {
            Profile::Dev => &[],
            Profile::Release => &["--release"],
        };
        let status = self.cargo(&["build", "--package", "replank", "--bin", "replank"]).args(flags).status()?;
        if !status.success() {
            bail!("replank does not build");
        }
        Ok(self.program(profile))
    }

    /// The program that was named, else one that is built now.
    ///
    /// # Errors
    /// When there is none by that name, or it does not compile.
    pub(crate) fn replank_or(given: Option<&Path>, profile: Profile) -> Result<PathBuf> {
        match given {
            Some(path) => path.canonicalize().with_context(|| path.display().to_string()),
            None => Self::new()?.replank(profile),
        }
    }

    /// Where the one binary is once it was built.
    #[must_use]
    pub(crate) fn program(&self, profile: Profile) -> PathBuf {
        let directory = match profile {
            Profile::Dev => "debug",
            Profile::Release => "release",
        };
        images::target().join(&self.triple).join(directory).join("replank")
    }
}

/// The tests run what compiles fast, the demo and the benchmarks what runs fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Dev,
    Release,
}
