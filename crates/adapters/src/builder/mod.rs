//! Builders: from a tree to an image.

pub mod az_exec;
pub mod docker;
