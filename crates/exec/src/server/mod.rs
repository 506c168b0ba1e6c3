//! The server's parts.

pub mod config;
pub mod lines;
