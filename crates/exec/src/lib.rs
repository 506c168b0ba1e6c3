//! The exec channel: a token-gated HTTP server on loopback that runs a few programs with policed arguments.
//!
//! [`protocol`] is what both ends say to each other, [`policy`] what may be run, [`outbound`] where git may connect to, [`signers`]
//! whose signatures count, [`server`] the parts of the end that runs it, [`client`] the end that asks.

pub mod client;
pub mod disk;
pub mod outbound;
pub mod policy;
pub mod protocol;
pub mod server;
pub mod signers;
