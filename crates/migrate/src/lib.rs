//! Migration of execution environments between sites: the relays at both ends, the schemes that
//! drive them, and what they measure.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clock;
pub mod hybrid;
pub mod relay;

pub use relay::{RelayClient, RelayConfig, RelayError, run_relay};
