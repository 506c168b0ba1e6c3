//! Whether a clone's own settings are such as git itself writes when it clones.
//!
//! No request that the policy allows can write others. A clone may be older than the policy, though, or somebody else may
//! have had the disk; and a setting can make git run a program, reach another host or work in another directory.

use std::fs::Metadata;
use std::io;
use std::path::Path;

use crate::policy::url;

/// git writes some 300 bytes.
const CONFIG_MAX: u64 = 64 * 1024;

/// What is wrong with a clone. Nothing of it is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Strange {
    #[error("the clone's .git is not a plain directory of its own; remove the clone and make it again")]
    Elsewhere,
    #[error("the clone has a setting that git does not write when it clones; remove the clone and make it again")]
    Setting,
    #[error("the clone is of another remote than the configured one; remove the clone and make it again")]
    Remote,
}

/// What is wrong with the clone in a directory, if there is one: without one git says so itself.
///
/// # Errors
/// When it cannot be read.
pub fn strange(directory: &Path, remote: Option<&str>) -> io::Result<Option<Strange>> {
    let git = directory.join(".git");
    let Some(meta) = look(&git)? else { return Ok(None) };
    // A file or a link leads to another directory, and `commondir` to another directory's settings.
    if !meta.is_dir() || look(&git.join("commondir"))?.is_some() {
        return Ok(Some(Strange::Elsewhere));
    }
    let config = git.join("config");
    let Some(meta) = look(&config)? else { return Ok(None) };
    if !meta.is_file() {
        return Ok(Some(Strange::Elsewhere));
    }
    if meta.len() > CONFIG_MAX {
        return Ok(Some(Strange::Setting));
    }
    let text = std::fs::read(&config)?;
    Ok(judge(&String::from_utf8_lossy(&text), remote).err())
}

fn look(path: &Path) -> io::Result<Option<Metadata>> {
    match path.symlink_metadata() {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the file in the one form that git writes. What it would read in another form is refused, so that nothing can mean one
/// thing here and another thing there.
fn judge(text: &str, remote: Option<&str>) -> Result<(), Strange> {
    let mut section = String::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix('[') {
            section = head.strip_suffix(']').ok_or(Strange::Setting)?.to_owned();
        } else if !line.is_empty() {
            let (key, value) =
                line.strip_prefix('\t').and_then(|line| line.split_once(" = ")).ok_or(Strange::Setting)?;
            setting(&section, key, unquoted(value).ok_or(Strange::Setting)?, remote)?;
        }
    }
    Ok(())
}

/// git quotes a value that has a `;` or `#`, such as a password in a URL may.
fn unquoted(value: &str) -> Option<&str> {
    let (inner, is_quoted) = match value.strip_prefix('"') {
        Some(rest) => (rest.strip_suffix('"')?, true),
        None => (value, false),
    };
    let fine = inner.chars().all(|c| !c.is_control() && !"\"\\".contains(c) && (is_quoted || !";#".contains(c)));
    fine.then_some(inner)
}

fn setting(section: &str, key: &str, value: &str, remote: Option<&str>) -> Result<(), Strange> {
    let word = || value.bytes().all(|b| b.is_ascii_alphanumeric());
    let branch = section.strip_prefix("branch \"").and_then(|rest| rest.strip_suffix('"'));
    let fine = match (section, key) {
        ("core", "bare") => value == "false",
        ("core", "repositoryformatversion" | "filemode" | "logallrefupdates" | "symlinks" | "ignorecase")
        | ("extensions", "objectformat" | "objectFormat" | "refstorage" | "refStorage")
        | ("core", "precomposeunicode") => word(),
        ("remote \"origin\"", "url") => {
            return match remote {
                Some(remote) if !url::same(remote, value) => Err(Strange::Remote),
                _ => Ok(()),
            };
        }
        ("remote \"origin\"", "fetch") => value.starts_with(['+', 'r']),
        ("remote \"origin\"", "tagOpt") => matches!(value, "--no-tags" | "--tags"),
        (_, "remote") if branch.is_some() => value == "origin",
        (_, "merge") if branch.is_some() => value.starts_with("refs/"),
        _ => false,
    };
    if fine { Ok(()) } else { Err(Strange::Setting) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REMOTE: &str = "https://git.example.com/acme/app.git";

    #[test]
    fn settings_are_judged() {
        #[track_caller]
        fn check(text: &str, expect: Result<(), Strange>) {
            assert_eq!(judge(text, Some(REMOTE)), expect, "{text}");
        }
        let core =
            "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n";
        check("", Ok(()));
        check(core, Ok(()));
        for url in [
            REMOTE,
            "https://user:secret@git.example.com/acme/app.git",
            "\"https://u:a;b@git.example.com/acme/app.git\"",
        ] {
            check(
                &format!(
                    "{core}[remote \"origin\"]\n\turl = {url}\n\ttagOpt = --no-tags\n\tfetch = +refs/heads/main:refs/remotes/origin/main\n\
                     [branch \"feature/x\"]\n\tremote = origin\n\tmerge = refs/heads/feature/x\n"
                ),
                Ok(()),
            );
        }
        check("[extensions]\n\tobjectformat = sha256\n", Ok(()));
        for url in
            ["https://evil.example.com/acme/app.git", "ext::id", "/etc", "https://git.example.com/acme/app.git x"]
        {
            check(&format!("[remote \"origin\"]\n\turl = {url}\n"), Err(Strange::Remote));
        }
        for text in [
            "[core]\n\tworktree = /\n",
            "[core]\n\tbare = true\n",
            "[core]\n\tfsmonitor = id\n",
            "[core]\n\tfilemode = a b\n",
            "[CORE]\n\thooksPath = /tmp\n",
            "[core] fsmonitor = id\n",
            "[core]\n\tbare = false\\\n\tfsmonitor = id\n",
            "[core]\nfsmonitor=id\n",
            "[core]\n\tfsmonitor\n",
            "[core]\n\tbare = false # [filter]\n",
            "\u{feff}[core]\n\tbare = false\n",
            "\tbare = false\n",
            "[core.x]\n\tbare = false\n",
            "[filter \"x\"]\n\tsmudge = id\n",
            "[alias]\n\tstatus = !id\n",
            "[include]\n\tpath = /tmp/x\n",
            "[includeIf \"gitdir:/\"]\n\tpath = /tmp/x\n",
            "[url \"https://evil.example.com/\"]\n\tinsteadOf = https://git.example.com/\n",
            "[http]\n\tproxy = http://evil.example.com\n",
            "[http \"https://git.example.com/\"]\n\tsslVerify = false\n",
            "[protocol \"ext\"]\n\tallow = always\n",
            "[credential]\n\thelper = !id\n",
            "[gpg]\n\tprogram = id\n",
            "[extensions]\n\tworktreeConfig = true\n",
            "[extensions]\n\tpartialClone = origin\n",
            "[remote \"origin\"]\n\tvcs = ext\n",
            "[remote \"origin\"]\n\tproxy = http://evil.example.com\n",
            "[remote \"origin\"]\n\tuploadpack = id\n",
            "[remote \"origin\"]\n\tpushurl = ext::id\n",
            "[remote \"origin\"]\n\ttagOpt = --upload-pack=id\n",
            "[remote \"other\"]\n\turl = https://git.example.com/acme/app.git\n",
            "[remote \"origin\"]\n\turl = \"https://git.example.com/acme/app.git\\n\"\n",
            "[branch \"main\"]\n\tremote = ext::id\n",
            "[branch \"main\"]\n\tpushRemote = origin\n",
            "[submodule \"x\"]\n\tupdate = !id\n",
            "[submodule]\n\tactive = .\n",
        ] {
            check(text, Err(Strange::Setting));
        }
    }
}
