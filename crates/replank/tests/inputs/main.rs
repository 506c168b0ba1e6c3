//! Bad input through the real static binary with real parts: each gives one clear error, leaves a state that can be started
//! from, loses nothing, and what runs goes on serving.
#![allow(clippy::unwrap_used)]

mod build_only;
mod builds;
mod clean_up;
mod config;
mod disk;
mod downgrade;
mod drift;
mod first_upgrade;
mod init;
mod ledger;
mod parts;
mod plan;
mod progress;
mod remote;
mod rig;
mod secrets;
mod tour;
