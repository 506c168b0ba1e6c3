//! The reader of `.replank.toml`, which whoever can push a tag writes: nothing gets through it that a release may not say.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;

#[path = "../settings.rs"]
mod settings;

use settings::config::manifest::Manifest;

fuzz_target!(|input: &[u8]| {
    let text = String::from_utf8_lossy(input);
    match Manifest::parse_bytes(input) {
        Ok(manifest) => {
            only_known_keys(&text.parse().expect("what was read is TOML"));
            check(&manifest);
            let written = manifest.to_json();
            let again: Manifest = serde_json::from_value(written).expect("what is stored is read again");
            assert_eq!(again, manifest);
        }
        Err(problems) => settings::told(&text, &problems),
    }
});

/// The trust boundary, said in another way than by the types that hold it.
fn only_known_keys(table: &toml::Table) {
    let inside = |table: &toml::Table, known: &[&str]| {
        for key in table.keys() {
            assert!(known.contains(&key.as_str()), "{key:?} got through");
        }
    };
    inside(table, &["components", "probes", "migrate", "schema", "back_to", "notes", "upgrade_from", "requires"]);
    let tables = |name: &str| table.get(name).and_then(toml::Value::as_table).into_iter().flat_map(toml::Table::values);
    for component in tables("components") {
        inside(component.as_table().expect("a table"), &["dockerfile", "context", "target", "args"]);
    }
    for probe in tables("probes") {
        inside(probe.as_table().expect("a table"), &["path", "expect_status", "version", "timeout_ms"]);
    }
    if let Some(requires) = table.get("requires").and_then(toml::Value::as_table) {
        inside(requires, &["environment", "replank"]);
    }
}

fn check(manifest: &Manifest) {
    let is_name = |text: &str| {
        !text.is_empty()
            && !text.starts_with(|c: char| c.is_ascii_digit())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    for component in manifest.components.values() {
        for path in [&component.dockerfile, &component.context].into_iter().flatten() {
            let stays = |part: Component<'_>| matches!(part, Component::CurDir | Component::Normal(_));
            assert!(!path.is_empty() && Path::new(path).components().all(stays), "{path:?}");
            assert!(!path.contains('\\') && !path.chars().any(char::is_control), "{path:?}");
        }
        for (name, value) in &component.args {
            assert!(is_name(name) && value.len() <= 4_096 && !value.contains('\0'), "{name:?}");
            let upper = name.to_uppercase();
            assert!(name != "APP_VERSION" && !name.starts_with("BUILDKIT_") && !upper.ends_with("_PROXY"), "{name}");
        }
    }
    for command in manifest.migrate.values() {
        let bytes: usize = command.iter().map(String::len).sum();
        assert!((1..=64).contains(&command.len()) && bytes <= 4_096 && command.iter().all(|word| !word.contains('\0')));
    }
    assert!(manifest.migrate.len() <= 64 && manifest.notes.len() <= 16_384);
    assert!(manifest.requires.environment.iter().all(|name| is_name(name)));
}
