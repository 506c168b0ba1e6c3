//! Builders: from a tree to an image.

pub mod docker;
