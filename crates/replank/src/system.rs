//! The real clock and the real randomness.

use replank_core::ports::{Clock, Ids};
use replank_core::words::Millis;

/// Wall time.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> Millis {
        Millis(jiff::Timestamp::now().as_millisecond())
    }
}

/// The operating system's random bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemIds;

impl Ids for SystemIds {
    fn random(&self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        // Without randomness there are no keys and no tokens: nothing that could go on safely.
        getrandom::fill(&mut bytes).expect("the operating system has no random numbers");
        bytes
    }
}
