//! The reader of `replank.toml`: what it takes keeps the rules that everything behind it relies on, and what it refuses it tells.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;

#[path = "../settings.rs"]
mod settings;

use replank_adapters::source::git::Verify;
use settings::config::Settings;
use settings::config::env::Environment;

const WEEK_MS: u64 = 7 * 24 * 3_600 * 1_000;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let read = || Settings::parse("replank.toml", Path::new("/srv/shop/replank.toml"), text, &Environment::of(&[]));
    match read() {
        Ok(settings) => {
            check(&settings);
            assert_eq!(format!("{settings:?}"), format!("{:?}", read().expect("read twice")), "it depends on chance");
        }
        Err(problems) => settings::told(text, &problems),
    }
});

fn check(settings: &Settings) {
    let name = settings.application.as_str();
    assert!((1..=32).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_lowercase()), "{name:?}");
    assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{name:?}");
    assert!(!settings.components.is_empty());
    for component in settings.components.values() {
        for path in [&component.dockerfile, &component.context] {
            let stays = |part: Component<'_>| matches!(part, Component::CurDir | Component::Normal(_));
            assert!(!path.is_empty() && Path::new(path).components().all(stays), "{path:?}");
        }
        assert!(!component.repository.is_empty() && !component.repository.contains(char::is_whitespace));
    }
    if let Some(source) = &settings.source {
        let (scheme, rest) = source.remote.split_once("://").expect("a URL");
        assert!(scheme == "https" || (scheme == "http" && source.allow_loopback), "{scheme}");
        let authority = rest.split('/').next().unwrap_or_default();
        assert!(!authority.is_empty() && !authority.contains('@') && source.remote.ends_with(".git"));
        if let Verify::SignedTags(keys) = &source.verify {
            assert!(keys.allowed.is_some() || keys.openpgp.is_some(), "signatures without keys");
            let files = [&keys.allowed, &keys.revoked, &keys.openpgp];
            assert!(files.into_iter().flatten().all(|path| path.is_absolute()), "{keys:?}");
        }
    }
    assert!((1..=32).contains(&settings.build.parallel));
    let budgets = &settings.policy.budgets;
    for budget in [budgets.fetching, budgets.building, budgets.rolling_out, budgets.validating, budgets.confirm_window]
    {
        assert!((1..=WEEK_MS).contains(&budget), "{budgets:?}");
    }
    assert!(budgets.validating >= 60_000 && (1..=100).contains(&settings.policy.proofs));
    let platform = &settings.platform;
    for container in platform.containers.values() {
        assert!(settings.components.contains_key(&container.component), "an image that nobody builds");
        assert!(container.mounts.iter().all(|mount| Path::new(&mount.target).is_absolute()));
    }
    assert!(platform.listeners.values().all(|listener| platform.containers.contains_key(&listener.container)));
}
