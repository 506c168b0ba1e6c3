//! The time of day as another server's answer gives it.

use replank_core::words::Millis;

/// The `Date` of an answer, to a second; `None` where there is none that can be read.
pub(crate) fn of(headers: &http::HeaderMap) -> Option<Millis> {
    let at = jiff::fmt::rfc2822::parse(headers.get("date")?.to_str().ok()?).ok()?;
    Some(Millis(at.timestamp().as_millisecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_servers_are_read() {
        let of = |text: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("date", text.parse().expect("a header"));
            super::of(&headers)
        };
        assert_eq!(of("Tue, 14 Nov 2023 22:13:20 GMT"), Some(Millis(1_700_000_000_000)));
        assert_eq!(of("yesterday"), None);
    }
}
