//! Signatures as the Standard Webhooks specification has them: `v1,` and the base64 of an HMAC-SHA256 over id, time and body.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

const PREFIX: &str = "whsec_";
/// The specification's bounds for a key, in bytes.
const KEY: std::ops::RangeInclusive<usize> = 24..=64;

/// A receiver's key. Shown by nothing.
#[derive(Clone)]
pub struct Secret(hmac::Key);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// From its written form. The error says what that is, and nothing of what was given.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let key = text.trim().strip_prefix(PREFIX).and_then(|text| STANDARD.decode(text).ok());
        match key {
            Some(key) if KEY.contains(&key.len()) => Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key))),
            Some(_) | None => Err("a webhook's secret is whsec_ and the base64 of 24 to 64 random bytes"),
        }
    }
}

/// The value of the header `webhook-signature`. `time` is the one in `webhook-timestamp`, in seconds.
pub fn signature(secret: &Secret, id: &str, time: i64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(&secret.0);
    context.update(format!("{id}.{time}.").as_bytes());
    context.update(body);
    format!("v1,{}", STANDARD.encode(context.sign()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's own libraries.
    #[test]
    fn the_specification_s_example_comes_out() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a key");
        let signed = signature(&secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn only_keys_of_the_specification_are_taken() {
        for bad in ["", "whsec_", "whsec_c2hvcnQ=", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_?"] {
            assert!(Secret::parse(bad).is_err(), "{bad}");
        }
    }
}
