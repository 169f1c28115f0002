//! Disk post-copy, CloudAP figures 4 to 6, as two state machines without I/O.
//!
//! ```text
//!  guest                          destination                     source
//!  write ---> top.qcow2           PostcopyDestination             PostcopySource
//!               | read                 |  bitmap                       |  bitmap, pivot, current
//!               v                      |                               |
//!             remote (NBD) --read----> |  bit 0: from mid or base      |
//!                                      |  bit 1: Pull ---------------> |  clear, send at once,
//!         blocks of top's own  ---> |  write: Syn ----------------> |  clear      pivot = it
//!                                      | <------- PullReply, Push ---- |  push what follows the
//!                                      v                               |  pivot, wrap around
//!                                  mid.qcow2 (on base)             frozen chain
//! ```
//!
//! The guest writes to `top` alone and what arrives is written to `mid` alone, which lies below
//! `top`. So a pushed block that crosses a local write can't overwrite it: `top` hides it.

mod destination;
mod source;

pub use destination::{PostcopyDestination, Read, Ticket};
pub use source::{PostcopySource, SourceCounts, ToSend};

#[cfg(test)]
mod tests;
