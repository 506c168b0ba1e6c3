//! Whole jobs through a running exec server, against a real git server, a real registry, and an `az` that really builds.
#![allow(clippy::unwrap_used)]

mod credentials;
mod failures;
mod lost;
mod reference;
mod rig;
mod signed;
