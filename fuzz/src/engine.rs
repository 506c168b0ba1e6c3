//! The words of the binary's engine that bodies are made of.

// All of it is used in the binary.
#[allow(dead_code)]
#[path = "../../crates/replank/src/engine/api.rs"]
pub mod api;

// The words of a plan, which the engine's interface names.
#[allow(dead_code)]
#[path = "../../crates/replank/src/engine/planned.rs"]
pub mod planned;
