//! The engine: commands that record events, and the loop that carries them out.

pub mod api;
mod candidates;
mod clean_up;
mod commands;
mod execute;
mod fetch_log;
mod plan;
pub mod planned;
mod reconcile;
mod release;
mod room;
mod setup;

pub use commands::LocalEngine;
pub use reconcile::Reconciler;
pub(crate) use reconcile::describe;
pub use setup::{Ports, Reading, Recipes, Room, Setup, Shared};
