//! The argument policy on requests as lines of its table: whatever it allows names no way out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use replank_exec::policy::judge;

// All of it is used by the policy's own tests.
#[allow(dead_code)]
#[path = "../../../crates/exec/tests/table/mod.rs"]
mod table;

fuzz_target!(|input: &[u8]| {
    let Some(request) = table::request(&String::from_utf8_lossy(input)) else { return };
    // The server has checked a request before it is judged.
    if request.check().is_ok()
        && let Ok(allowed) = judge(&table::rules(), &request)
        && let Some(wrong) = table::way_out(&request, &allowed)
    {
        panic!("allowed: {wrong} in {:?} with cwd {:?}", request.argv, request.cwd);
    }
});
