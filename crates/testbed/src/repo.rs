//! Git repositories made by the git binary, with a fixed identity and fixed times, so that commits are the same everywhere.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;

/// 2026-01-01T00:00:00Z; each commit or tag is one minute later than the one before.
const FIRST_TIME: u64 = 1_767_225_600;
const STEP_SECONDS: u64 = 60;

/// A file of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: String,
    pub content: Vec<u8>,
    pub executable: bool,
}

impl Entry {
    /// An ordinary file.
    pub fn file(path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), content: content.into(), executable: false }
    }

    /// A file that can be run.
    pub fn script(path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        Self { executable: true, ..Self::file(path, content) }
    }
}

/// A bare repository, served as it is, with a working tree beside it.
#[derive(Debug)]
pub struct Repo {
    bare: PathBuf,
    tree: PathBuf,
    time: u64,
}

impl Repo {
    /// Makes `<root>/<name>.git`, with `main` as its branch.
    ///
    /// # Errors
    /// When it exists or git fails.
    pub fn create(root: &Path, name: &str) -> Result<Self> {
        let bare = root.join(format!("{name}.git"));
        ensure!(!bare.exists(), "{} exists already", bare.display());
        // Beside the served directory's repositories, under a name that no URL reaches as a repository.
        let tree = root.join(format!(".{name}.tree"));
        fs::create_dir_all(&tree)?;
        let repo = Self { bare, tree, time: FIRST_TIME };
        let mut init = isolated();
        process::run(init.args(["init", "--quiet", "--bare", "--initial-branch=main"]).arg(&repo.bare))?;
        // As the usual hosts do: a commit can be fetched by its id.
        repo.git(&["config", "uploadpack.allowAnySHA1InWant", "true"])?;
        Ok(repo)
    }

    /// The bare repository.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.bare
    }

    /// Commits `entries` on the current branch, over the files that are there, and answers the commit's id.
    ///
    /// # Errors
    /// When a path leaves the tree or git fails.
    pub fn commit(&mut self, entries: &[Entry], message: &str) -> Result<String> {
        for entry in entries {
            let inside = Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_)));
            ensure!(inside, "{} is not a path inside the tree", entry.path);
            let path = self.tree.join(&entry.path);
            fs::create_dir_all(path.parent().context("an entry's path has a directory")?)?;
            fs::write(&path, &entry.content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(if entry.executable { 0o755 } else { 0o644 }))?;
        }
        self.commit_tree(message)
    }

    /// Removes files and commits that.
    ///
    /// # Errors
    /// When one does not exist or git fails.
    pub fn remove(&mut self, paths: &[&str], message: &str) -> Result<String> {
        for path in paths {
            fs::remove_file(self.tree.join(path)).with_context(|| (*path).to_owned())?;
        }
        self.commit_tree(message)
    }

    /// Commits what stands in the working tree (see [`Self::tree`]), also when nothing changed.
    ///
    /// # Errors
    /// When git fails.
    pub fn commit_tree(&mut self, message: &str) -> Result<String> {
        self.git(&["add", "--all", "--force", "."])?;
        self.tick();
        self.git(&["commit", "--quiet", "--allow-empty", "--no-gpg-sign", "-m", message])?;
        self.git(&["rev-parse", "HEAD"])
    }

    /// The working tree, for what [`Self::commit`] cannot make, such as symbolic links.
    #[must_use]
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    /// An annotated tag on `commit`; replaces one of the same name. Answers the tag object's id.
    ///
    /// # Errors
    /// When git fails.
    pub fn tag(&mut self, name: &str, commit: &str, message: &str) -> Result<String> {
        self.tick();
        self.git(&["tag", "--force", "--annotate", "--no-sign", "-m", message, name, commit])?;
        self.git(&["rev-parse", &format!("refs/tags/{name}")])
    }

    /// A lightweight tag on `commit`; replaces one of the same name.
    ///
    /// # Errors
    /// When git fails.
    pub fn light_tag(&self, name: &str, commit: &str) -> Result<()> {
        self.git(&["update-ref", &format!("refs/tags/{name}"), commit]).map(drop)
    }

    /// A branch at `commit`, whatever its name; moves one of the same name.
    ///
    /// # Errors
    /// When git fails.
    pub fn branch(&self, name: &str, commit: &str) -> Result<()> {
        self.git(&["update-ref", &format!("refs/heads/{name}"), commit]).map(drop)
    }

    /// Deletes a ref by its full name, such as `refs/tags/v1.0.0`.
    ///
    /// # Errors
    /// When git fails.
    pub fn delete_ref(&self, name: &str) -> Result<()> {
        self.git(&["update-ref", "-d", name]).map(drop)
    }

    /// Any git command on this repository; answers its trimmed output.
    ///
    /// # Errors
    /// With the end of git's error output.
    pub fn git(&self, arguments: &[&str]) -> Result<String> {
        let date = format!("{} +0000", self.time);
        let mut command = isolated();
        command
            .args(arguments)
            .current_dir(&self.tree)
            .env("GIT_DIR", &self.bare)
            .env("GIT_WORK_TREE", &self.tree)
            .env("GIT_AUTHOR_DATE", &date)
            .env("GIT_COMMITTER_DATE", &date);
        process::text(&mut command)
    }

    fn tick(&mut self) {
        self.time += STEP_SECONDS;
    }
}

/// The git binary without the machine's or the user's configuration, with our identity.
#[must_use]
pub fn isolated() -> Command {
    let mut command = Command::new("git");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GIT_")) {
        command.env_remove(name);
    }
    for role in ["AUTHOR", "COMMITTER"] {
        command
            .env(format!("GIT_{role}_NAME"), "Replank Testbed")
            .env(format!("GIT_{role}_EMAIL"), "testbed@replank.invalid");
    }
    command
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("HOME", "/nonexistent");
    command
}
