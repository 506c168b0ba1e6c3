//! Platforms: where revisions run and traffic goes.

pub mod docker;
