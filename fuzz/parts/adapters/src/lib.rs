//! The adapters' own files that decide on bytes alone, as they stand in `crates/adapters`, and a way in for the fuzz targets.

// All of it is used where it belongs.
#![allow(dead_code)]

pub mod platform;
pub mod source;
