//! What an upgrade is, and nothing about how it is carried out.
//!
//! This crate has the domain's words, the phases of an upgrade and the only function that moves between
//! them ([`transition::next`]), the function that decides what to do ([`decide::decide`]), and the ports
//! through which a shell does it. It performs no I/O, reads no clock and draws no randomness, so that every
//! decision can be replayed.

mod aftermath;
pub mod check;
pub mod data;
pub mod decide;
pub mod drift;
pub mod event;
pub mod fault;
pub mod format;
pub mod history;
pub mod image;
pub mod mask;
pub mod outline;
pub mod phase;
pub mod policy;
pub mod ports;
pub mod predict;
pub mod progress;
pub mod record;
pub mod swap;
pub mod transition;
pub mod words;
