//! Where releases come from: implementations of the `Source` port, and the suite that each of them passes.

pub mod az_exec;
pub mod conformance;
pub mod git;
mod signed;
