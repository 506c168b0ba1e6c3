//! The static checks: what the core may depend on, which way imports run, how large files are, and that the attacks which the
//! security notes name are there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use replank_testbed::images;

use crate::named;

/// What the core may depend on: no clock, network, file system, database or asynchronous runtime behind any of them.
const CORE_DEPENDENCIES: [&str; 8] =
    ["async-trait", "hex", "jiff", "regex", "serde", "serde_json", "sha2", "thiserror"];

/// Paths that must not appear in the core's own code, tests excepted.
const CORE_FORBIDDEN: [&str; 5] = ["std::fs", "std::net", "std::process", "std::env", "tokio::"];

/// One module for each port in the adapters; none may use another.
const PORTS: [&str; 7] = ["source", "builder", "registry", "platform", "ledger", "logs", "identity"];

/// Beyond this a file has more than one responsibility, as a rule: warned about, not refused.
const LINES_WARNED: usize = 600;

/// Answers failure when anything is wrong, having printed it all.
pub(crate) fn run() -> Result<ExitCode> {
    let root = images::workspace();
    let mut problems = core_dependencies(&fs::read_to_string(root.join("crates/core/Cargo.toml"))?)?;
    problems.extend(named::problems(&root)?);
    for path in sources(&root)? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().into_owned();
        problems.extend(imports(&name, &text));
        if !text.starts_with("//!") && !name.contains("/sample/") {
            problems.push(format!("{name}: the first line must say, after //!, what the file is for"));
        }
        let lines = text.lines().count();
        if lines > LINES_WARNED {
            eprintln!("warning: {name} has {lines} lines, more than {LINES_WARNED}");
        }
    }
    for problem in &problems {
        eprintln!("error: {problem}");
    }
    eprintln!("tidy: {} problems", problems.len());
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn core_dependencies(manifest: &str) -> Result<Vec<String>> {
    let manifest: toml::Table = manifest.parse().context("the core's Cargo.toml")?;
    let named =
        ["dependencies", "build-dependencies"].into_iter().filter_map(|section| manifest.get(section)?.as_table());
    let problems =
        named.flat_map(toml::Table::keys).filter(|name| !CORE_DEPENDENCIES.contains(&name.as_str())).map(|name| {
            format!("crates/core/Cargo.toml: the core must not depend on {name}; the list is in xtask/src/tidy.rs")
        });
    Ok(problems.collect())
}

/// The imports of one file that run the wrong way. `name` is the path from the workspace's root.
fn imports(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let parts: Vec<&str> = name.split('/').collect();
    let own_port = match parts.as_slice() {
        ["crates", "adapters", "src", port, ..] => Some(port.trim_end_matches(".rs")),
        _ => None,
    };
    // A port's conformance suite may be run from another's tests.
    let is_test_file = name.contains("/tests/") || name.ends_with("tests.rs") || name.contains("conformance");
    for (number, line) in text.lines().enumerate() {
        // Test modules come last in a file, by this repository's habit.
        if line.trim_start().starts_with("#[cfg(test)]")
            && text.lines().nth(number + 1).is_some_and(|next| next.contains("mod ") && next.ends_with('{'))
        {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        let mut refuse = |what: String| problems.push(format!("{name}:{}: {what}", number + 1));
        if let Some(own) = own_port.filter(|own| PORTS.contains(own) && !is_test_file) {
            for other in PORTS.iter().filter(|other| **other != own) {
                if code.contains(&format!("crate::{other}::")) {
                    refuse(format!("{own} uses {other}: adapters never import sideways"));
                }
            }
        }
        if name.starts_with("crates/core/src/") && !is_test_file {
            for path in CORE_FORBIDDEN.iter().filter(|path| code.contains(**path)) {
                refuse(format!("the core uses {path}"));
            }
        }
        let backwards: &[&str] = match parts.as_slice() {
            ["crates", "core", ..] => &["replank_adapters::", "replank_exec::", "replank::"],
            ["crates", "exec", ..] => &["replank_core::", "replank_adapters::", "replank::"],
            ["crates", "adapters", ..] => &["replank::"],
            _ => &[],
        };
        for path in backwards.iter().filter(|path| code.contains(**path)) {
            refuse(format!("uses {path}, which runs backwards"));
        }
    }
    problems
}

/// Every Rust file of the workspace.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![root.join("crates"), root.join("fuzz/src"), root.join("xtask")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else if entry.path().extension().is_some_and(|extension| extension == "rs") {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_imports_are_seen() {
        let check =
            |name: &str, line: &str, expect: usize| assert_eq!(imports(name, line).len(), expect, "{name}: {line}");
        check("crates/adapters/src/platform/docker/plan.rs", "use crate::ledger::Store;", 1);
        check("crates/adapters/src/platform/docker/plan.rs", "use crate::platform::docker::x;", 0);
        check("crates/adapters/src/platform/docker/plan.rs", "use crate::engine::Engine;", 0);
        check("crates/adapters/src/platform/docker/plan.rs", "// as crate::ledger::Store does", 0);
        check("crates/adapters/src/builder.rs", "fn f() { crate::registry::g() }", 1);
        check("crates/adapters/src/engine.rs", "use crate::registry::G;", 0);
        check("crates/core/src/decide.rs", "use std::fs::File;", 1);
        check("crates/core/src/decide.rs", "#[cfg(test)]\nmod tests {\n    use std::fs;\n}", 0);
        check("crates/core/src/decide.rs", "use replank_adapters::x;", 1);
        check("crates/adapters/src/oci.rs", "use replank_core::fault::Fault;", 0);
    }

    #[test]
    fn the_core_cannot_take_a_runtime() -> Result<()> {
        let check = |manifest: &str| core_dependencies(manifest).map(|problems| problems.len());
        assert_eq!(check("[dependencies]\nserde.workspace = true\n[dev-dependencies]\ntokio = \"1\"")?, 0);
        assert_eq!(check("[dependencies]\ntokio = \"1\"")?, 1);
        Ok(())
    }
}
