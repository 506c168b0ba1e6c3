//! Development only: the real parts that tests, the demo and the benchmarks run against.
//!
//! A private Docker engine, a registry, a git server, base images made without pulling, and the sample application's
//! repository. Nothing here is part of the product. Everything cleans up after itself: on drop, on a signal (see
//! [`cleanup`]), and, when the owner was killed with no chance to do so, at the next start (see [`remains`]).

pub mod answers;
pub mod az;
mod cgroup;
pub mod cleanup;
pub mod engine;
pub mod git;
pub mod images;
pub mod installed;
pub mod keys;
pub mod leftovers;
pub mod liar;
pub mod load;
mod net;
pub mod process;
pub mod registry;
pub mod remains;
pub mod repo;
pub mod sample;
pub mod setup;

pub use az::AzDouble;
pub use engine::{Engine, EngineOptions};
pub use git::{GitServer, GitServerOptions};
pub use registry::Registry;
pub use repo::Repo;
pub use sample::{Sample, SampleOptions};
