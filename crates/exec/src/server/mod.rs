//! The server's parts.

pub mod child;
pub mod config;
pub mod environment;
pub mod lines;
pub mod place;
