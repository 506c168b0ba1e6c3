//! Development only: the production loop under virtual time.
//!
//! A universe is one application with its ledger, its platform, its registry and its remote, all of them made up and all of them
//! apt to fail at any call; the controllers in it are the production loop and the production commands. Everything in
//! a universe follows from one number, so that a failure can be played again.

mod chance;
mod ledger;
mod operators;
mod platform;
mod ports;
mod process;
mod universe;
mod world;

pub use universe::{Outcome, play};
pub use world::Mutant;
