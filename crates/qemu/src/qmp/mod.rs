//! QMP: QEMU's control protocol, one JSON document a line.
//!
//! ```text
//!  caller --execute--> [ id -> waiting caller ] --line--> QEMU
//!                              ^                            |
//!  caller <--return/error------+------<-- line -------------+
//!  cursors <-- event log <-- event (with QEMU's time stamp) +
//! ```
//!
//! [`proto`] turns bytes into messages and does no I/O; [`Qmp`] is the async skin.

mod client;
mod events;
pub mod proto;

pub use client::{Qmp, QmpError};
pub use events::{Event, EventCursor, WaitError};
