//! Replank, the upgrade button for self-hosted container applications: the library behind the one binary.

pub mod assemble;
pub mod build_log;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod engine;
pub mod exec_server;
pub mod http;
pub mod init;
pub mod ledger_file;
pub mod lock;
pub mod plain;
pub mod proxy;
pub mod proxy_upgrade;
pub mod refusals;
pub mod system;
pub mod telemetry;
pub mod verify;
pub mod webhooks;
pub mod wiring;
