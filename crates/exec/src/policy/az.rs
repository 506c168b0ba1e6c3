//! What the Azure CLI may be asked to do: build in the one registry, show and update the one app, sign in as the machine.

use std::path::Path;

use super::options::{Known, flag, read, value};
use super::{Allowed, Judged, Rules, below_root, bound, relative, rule};

/// What the CLI looks for when no Dockerfile is named.
const DOCKERFILE: &str = "Dockerfile";
const VALUE_MAX: usize = 4_096;

pub(super) fn judge(rules: &Rules, words: &[&str], cwd: Option<&Path>) -> Judged<Allowed> {
    // The CLI reads a file in place of any argument, or value after '=', that begins with '@'.
    if words.iter().any(|word| word.starts_with('@') || word.contains("=@")) {
        return rule("az reads a file in place of what begins with '@'");
    }
    if words.iter().any(|word| word.len() > VALUE_MAX || word.chars().any(char::is_control)) {
        return rule("an argument is too long or has control characters");
    }
    let mut allowed = Allowed::default();
    if let Some(cwd) = cwd {
        allowed.inside.push(below_root(rules, cwd)?.to_owned());
    }
    match words {
        ["acr", "build", rest @ ..] => {
            let Some(cwd) = cwd else { return rule("az acr build needs the clone's directory as cwd") };
            build(rules, rest, cwd, &mut allowed)?;
        }
        ["containerapp", "show", rest @ ..] => show(rules, rest)?,
        ["containerapp", "update", rest @ ..] => update(rules, rest)?,
        ["login", rest @ ..] => login(rules, rest)?,
        _ => return rule("az may not be asked for this command"),
    }
    Ok(allowed)
}

const QUIET: Known = flag(&["--only-show-errors"]);
const OUTPUT: Known = value(&["--output", "-o"], output);

fn build(rules: &Rules, words: &[&str], cwd: &Path, allowed: &mut Allowed) -> Judged<()> {
    const KNOWN: [Known; 13] = [
        value(&["--registry", "-r"], registry),
        value(&["--image", "-t"], image_in_registry),
        value(&["--file", "-f"], |_, path| relative(path)),
        value(&["--build-arg"], argument),
        value(&["--target"], stage),
        value(&["--platform"], platform),
        value(&["--timeout"], seconds),
        value(&["--resource-group", "-g"], group),
        flag(&["--no-format"]),
        flag(&["--no-logs"]),
        flag(&["--no-wait"]),
        QUIET,
        OUTPUT,
    ];
    let found = read(rules, &KNOWN, words)?;
    if !found.has("--registry") || !found.has("--image") {
        return rule("az acr build needs --registry and --image");
    }
    let [context] = found.words[..] else { return rule("az acr build needs one context, and no more") };
    relative(context)?;
    // All of these are read on this side: a link in the release's tree must not lead them elsewhere.
    let directory = cwd.join(context);
    let file = found.options.iter().rev().find(|(name, _)| *name == "--file").and_then(|(_, path)| *path);
    let (file, named) = match file {
        Some(path) => (cwd.join(path), Path::new(path).to_owned()),
        None => (directory.join(DOCKERFILE), Path::new(context).join(DOCKERFILE)),
    };
    let mut ignored = named.into_os_string();
    ignored.push(".dockerignore");
    allowed.inside.extend([directory.clone(), file, directory.join(".dockerignore"), directory.join(ignored)]);
    allowed.context = Some(directory);
    Ok(())
}

fn show(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 5] = [
        value(&["--name", "-n"], app),
        value(&["--resource-group", "-g"], group),
        value(&["--query"], query),
        QUIET,
        OUTPUT,
    ];
    named(&read(rules, &KNOWN, words)?)
}

fn update(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 7] = [
        value(&["--name", "-n"], app),
        value(&["--resource-group", "-g"], group),
        value(&["--image", "-i"], image_of_registry),
        value(&["--container-name"], container),
        value(&["--query"], query),
        QUIET,
        OUTPUT,
    ];
    let found = read(rules, &KNOWN, words)?;
    named(&found)?;
    if found.has("--image") { Ok(()) } else { rule("az containerapp update is for --image alone") }
}

/// Without both names the CLI would take them from its own defaults.
fn named(found: &super::options::Found<'_>) -> Judged<()> {
    if !found.words.is_empty() {
        return rule("az containerapp takes options alone");
    }
    if found.has("--name") && found.has("--resource-group") {
        Ok(())
    } else {
        rule("az containerapp needs --name and --resource-group")
    }
}

fn login(rules: &Rules, words: &[&str]) -> Judged<()> {
    const KNOWN: [Known; 5] = [
        flag(&["--identity", "-i"]),
        flag(&["--allow-no-subscriptions"]),
        value(&["--client-id"], guid),
        QUIET,
        OUTPUT,
    ];
    let found = read(rules, &KNOWN, words)?;
    if found.has("--identity") && found.words.is_empty() {
        Ok(())
    } else {
        rule("az login is for the machine's own identity alone")
    }
}

fn registry(rules: &Rules, name: &str) -> Judged<()> {
    let ours = bound(rules.registry.as_ref(), "PLATFORM_ACR_NAME is not set, so no registry is allowed")?;
    if name.eq_ignore_ascii_case(ours) { Ok(()) } else { rule("the registry is not the configured one") }
}

fn app(rules: &Rules, name: &str) -> Judged<()> {
    let ours = bound(rules.container_app.as_ref(), "CONTAINER_APP_NAME is not set, so no app is allowed")?;
    if name.eq_ignore_ascii_case(ours) { Ok(()) } else { rule("the app is not the configured one") }
}

fn group(rules: &Rules, name: &str) -> Judged<()> {
    let ours = bound(rules.resource_group.as_ref(), "AZURE_RESOURCE_GROUP is not set, so no group is allowed")?;
    if name.eq_ignore_ascii_case(ours) { Ok(()) } else { rule("the resource group is not the configured one") }
}

/// `repository:tag`, without a registry: the CLI puts the chosen one before it.
fn image_in_registry(_: &Rules, image: &str) -> Judged<()> {
    let (repository, tag) = image.split_once(':').unwrap_or((image, "latest"));
    if is_repository(repository) && is_tag(tag) { Ok(()) } else { rule("the image is not repository:tag") }
}

/// `<registry>.azurecr.io/repository:tag` or `@sha256:…`.
fn image_of_registry(rules: &Rules, image: &str) -> Judged<()> {
    let ours = bound(rules.registry.as_ref(), "PLATFORM_ACR_NAME is not set, so no image is allowed")?;
    let Some((host, rest)) = image.split_once('/') else { return rule("the image names no registry") };
    if !host.eq_ignore_ascii_case(&format!("{ours}.azurecr.io")) {
        return rule("the image is not in the configured registry");
    }
    let fine = match rest.split_once("@sha256:") {
        Some((repository, digest)) => {
            is_repository(repository) && digest.len() == 64 && digest.bytes().all(|b| b"0123456789abcdef".contains(&b))
        }
        None => rest.split_once(':').is_some_and(|(repository, tag)| is_repository(repository) && is_tag(tag)),
    };
    if fine { Ok(()) } else { rule("the image is not repository:tag or repository@sha256:digest") }
}

fn is_repository(text: &str) -> bool {
    let part = |part: &str| {
        part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    // A first part with a dot could be taken for a host.
    text.len() <= 255
        && text.split('/').all(part)
        && !(text.contains('/') && text.split('/').next().is_some_and(|p| p.contains('.')))
}

fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn argument(_: &Rules, text: &str) -> Judged<()> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    let plain = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    // Without a value it would be taken from the server's own environment.
    if plain && text.contains('=') { Ok(()) } else { rule("a build argument is not NAME=VALUE") }
}

fn stage(_: &Rules, text: &str) -> Judged<()> {
    plain(text, b"._-", "the stage is not a plain name")
}

fn platform(_: &Rules, text: &str) -> Judged<()> {
    let part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    let is_one = (1..=128).contains(&text.len()) && text.split('/').count() <= 3 && text.split('/').all(part);
    if is_one { Ok(()) } else { rule("the platform is not such as linux/amd64") }
}

fn container(_: &Rules, text: &str) -> Judged<()> {
    plain(text, b"-", "the container is not a plain name")
}

fn guid(_: &Rules, text: &str) -> Judged<()> {
    let parts: Vec<&str> = text.split('-').collect();
    let fine = parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12])
        && parts.iter().all(|part| part.bytes().all(|b| b.is_ascii_hexdigit()));
    if fine { Ok(()) } else { rule("the client id is not a GUID") }
}

fn seconds(_: &Rules, text: &str) -> Judged<()> {
    let digits = (1..=6).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    if digits { Ok(()) } else { rule("the time-out is not a number of seconds") }
}

fn output(_: &Rules, text: &str) -> Judged<()> {
    let known = ["json", "jsonc", "none", "table", "tsv", "yaml", "yamlc"].contains(&text);
    if known { Ok(()) } else { rule("this is not an output format") }
}

/// An expression over the answer, evaluated by the CLI itself.
fn query(_: &Rules, text: &str) -> Judged<()> {
    if text.is_empty() || text.len() > 512 { rule("the query is empty or too long") } else { Ok(()) }
}

fn plain(text: &str, also: &[u8], otherwise: &'static str) -> Judged<()> {
    let fine = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || also.contains(&b));
    if fine { Ok(()) } else { rule(otherwise) }
}
