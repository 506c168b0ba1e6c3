//! The bodies of the HTTP routes: what is taken has the contract's shapes, and what is not is sorted by whether it is JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../engine.rs"]
mod engine;
// All of it is used in the binary.
#[allow(dead_code)]
#[path = "../../../crates/replank/src/http/bodies.rs"]
mod bodies;

use bodies::{BadBody, Nothing, Reason, Wanted};

fuzz_target!(|input: &[u8]| {
    let is_json = serde_json::from_slice::<serde_json::Value>(input).is_ok();
    let sorted = |bad: &BadBody| match bad {
        BadBody::NotJson => assert!(!is_json, "JSON is said to be none"),
        BadBody::Invalid(why) => assert!(!why.is_empty()),
    };
    match bodies::start(input) {
        Ok(request) => {
            assert!(is_json && request.confirm_downtime);
            let hex = |text: &str, length: std::ops::RangeInclusive<usize>| {
                length.contains(&text.len()) && text.bytes().all(|b| b"0123456789abcdef".contains(&b))
            };
            assert!(request.target_sha.as_deref().is_none_or(|sha| hex(sha, 40..=40)));
            if let Some(version) = request.target_version.as_deref() {
                let bare = version.strip_prefix('v').unwrap_or(version);
                let (base, commit) = bare.split_once("-commit.").map_or((bare, None), |(a, b)| (a, Some(b)));
                assert!(commit.is_none_or(|commit| hex(commit, 7..=40)), "{version}");
                let numbers: Vec<&str> = base.split('.').collect();
                let fine = |n: &&str| {
                    !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) && (*n == "0" || !n.starts_with('0'))
                };
                assert!(numbers.len() == 3 && numbers.iter().all(fine), "{version}");
            }
            if let Some(key) = request.idempotency_key.as_deref() {
                let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
                assert!((1..=64).contains(&key.len()) && key.chars().all(plain), "{key:?}");
            }
            assert!(request.reason.as_deref().is_none_or(|reason| reason.chars().count() <= 280));
            let again = serde_json::to_vec(&request).expect("a request can be written");
            let again = bodies::start(&again).expect("what was taken is taken again");
            assert_eq!(format!("{again:?}"), format!("{request:?}"));
        }
        Err(bad) => sorted(&bad),
    }
    match bodies::optional::<Reason>(input).and_then(Reason::text) {
        Ok(reason) => assert!((is_json || input.is_empty()) && reason.chars().count() <= 280),
        Err(bad) => sorted(&bad),
    }
    match bodies::required::<Wanted>(input) {
        Ok(Wanted { track_commits }) => {
            assert!(is_json && String::from_utf8_lossy(input).contains(&track_commits.to_string()))
        }
        Err(bad) => sorted(&bad),
    }
    match bodies::optional::<Nothing>(input) {
        Ok(Nothing {}) => assert!(is_json || input.is_empty()),
        Err(bad) => sorted(&bad),
    }
});
