//! Records as the first build of each format wrote them, in every state: they stay readable for ever, and nothing in them is lost.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use replank_core::event::Event;
use replank_core::format;
use replank_core::phase::State;
use replank_core::record::Actor;
use replank_core::transition::apply;
use replank_core::words::Millis;
use serde_json::Value;

fn golden(of: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/format-{of}"))
}

/// Everything that `old` says, `new` says too; it may say more.
fn is_kept(old: &Value, new: &Value, at: &str) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in old {
                let there = new.get(key).unwrap_or_else(|| panic!("{at}.{key} was lost"));
                is_kept(value, there, &format!("{at}.{key}"));
            }
        }
        _ => assert_eq!(old, new, "{at}"),
    }
}

#[test]
fn records_of_every_format_stay_readable() {
    for of in format::FIRST..=format::FORMAT {
        let mut states = Vec::new();
        for entry in fs::read_dir(golden(of)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let bytes = fs::read(&path).unwrap();
            let record = format::read(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            let (state, _) = name.split_once('-').unwrap();
            assert_eq!(record.phase.state().name(), state);
            states.push(record.phase.state());
            let old: Value = serde_json::from_slice(&bytes).unwrap();
            let new: Value = serde_json::from_slice(&format::write(&record).unwrap()).unwrap();
            is_kept(&old, &new, &name);
            // It can be gone on from, in the format that its readers know.
            let actor = Actor { oid: "op".to_owned(), name: String::new(), from: String::new() };
            let next = apply(&record, &Event::TrackCommits { actor, on: false }, Millis(7)).unwrap().record;
            assert_eq!((next.format, next.min_reader), (of, of), "{name}");
        }
        assert!(State::ALL.iter().all(|state| states.contains(state)), "format {of}: {states:?}");
    }
}

#[test]
fn a_record_is_raised_only_when_everybody_who_may_drive_reads_it() {
    let bytes = fs::read(golden(1).join("rolling_out-single.json")).unwrap();
    let mut record = format::read(&bytes).unwrap();
    let newer = format::FIRST + 1;
    assert_eq!(
        format::level(&record, newer),
        format::FIRST,
        "what runs and what is started say nothing of what they read"
    );
    let raise = |deployment: &mut Option<replank_core::record::Deployment>| {
        if let Some(deployment) = deployment {
            deployment.reads_format = Some(newer);
        }
    };
    raise(&mut record.running);
    raise(&mut record.serving);
    if let Some(snapshot) = &mut record.snapshot {
        snapshot.deployment.reads_format = Some(newer);
    }
    assert_eq!(format::level(&record, newer), format::FIRST, "the new side may have to drive too");
    let replank_core::phase::Phase::RollingOut(swap) = &mut record.phase else { panic!() };
    raise(&mut swap.from);
    swap.to.reads_format = Some(newer);
    assert_eq!(format::level(&record, newer), newer);
    assert_eq!(format::level(&record, format::FIRST), format::FIRST, "an older build writes what it knows");
    // There is no way down.
    record.min_reader = newer;
    assert_eq!(format::level(&record, format::FIRST), newer);
}
