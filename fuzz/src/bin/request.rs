//! The reader of requests on any body: what it takes keeps the rules that the server relies on, and means the same when it
//! is written and read again.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use replank_exec::policy::{Rules, judge};
use replank_exec::protocol::{Request, TIMEOUT_SECONDS};

fuzz_target!(|body: &[u8]| {
    let Ok(request) = Request::read(body) else { return };
    let program = request.argv.first().map(String::as_str).unwrap_or_default();
    assert_eq!(Path::new(program).file_name().and_then(|name| name.to_str()), Some(program), "no bare name");
    assert!(request.argv.iter().all(|word| !word.contains('\0')), "a zero byte would end the word");
    assert!(TIMEOUT_SECONDS.contains(&request.timeout()));
    assert!(request.cwd.as_deref().is_none_or(|cwd| Path::new(cwd).is_absolute() && !cwd.contains('\0')));
    if let Some(file) = &request.stdin_file {
        let fresh = Path::new("/fresh");
        let path = fresh.join(file);
        let stays = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        assert!(path.starts_with(fresh) && path != fresh && path.components().all(stays), "{path:?}");
        assert!(request.stdin.is_some());
    }
    let written = serde_json::to_vec(&request).expect("a request can be written");
    assert!(Request::read(&written).is_ok_and(|again| again == request), "it does not come back");
    // Nothing is configured: all that matters is that it comes to a judgement.
    let _judged = judge(&Rules::default(), &request);
});
