//! The proxy against real sockets: what it must forward, refuse, keep and let go.
#![allow(clippy::unwrap_used)]

mod control_cases;
mod engine_case;
mod hostile_cases;
mod http_cases;
mod process_cases;
mod rig;
mod tls_cases;
