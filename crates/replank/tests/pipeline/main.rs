//! Whole upgrades of the sample application by the real program on a real engine, with faults at the worst moments.
#![allow(clippy::unwrap_used, reason = "tests")]

mod failing_releases;
mod flips_back;
mod foreign_engine;
mod inside;
mod killed_controller;
mod killed_engine;
mod proxy_upgrade;
mod retried_builds;
mod starts;
mod world;
