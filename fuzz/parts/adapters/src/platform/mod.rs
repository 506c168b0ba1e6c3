//! What `replank.toml` says of platforms.

pub mod docker;
