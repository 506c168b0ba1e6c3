//! The server's parts.

pub mod audit;
pub mod child;
pub mod config;
pub mod environment;
pub mod http;
pub mod lines;
pub mod place;
pub mod sinks;
