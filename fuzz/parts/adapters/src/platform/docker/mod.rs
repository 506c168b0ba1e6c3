//! What `replank.toml` says of the Docker platform.

#[path = "../../../../../../crates/adapters/src/platform/docker/config.rs"]
pub mod config;
#[path = "../../../../../../crates/adapters/src/platform/docker/names.rs"]
mod names;
#[path = "../../../../../../crates/adapters/src/platform/docker/proxy_api.rs"]
pub mod proxy_api;
