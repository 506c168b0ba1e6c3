//! One module per technology behind the ports of `replank-core`. Modules never import each other sideways.

pub mod builder;
pub mod engine;
pub mod exec_channel;
mod http_date;
pub mod labels;
pub mod ledger;
pub mod logs;
pub mod oci;
pub mod platform;
pub mod registry;
pub mod source;
pub mod sqlite;
