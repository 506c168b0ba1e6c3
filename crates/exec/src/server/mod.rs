//! The server's parts.

pub mod audit;
pub mod child;
pub mod clone;
pub mod config;
pub mod connection;
pub mod environment;
pub mod http;
pub mod lines;
pub mod order;
pub mod place;
pub mod remote;
pub mod sinks;
