//! Scheme `hybrid`, the CloudAP paper's (section IV): memory in one pre-copy round and then
//! post-copy, the disk post-copied as a cow image on a base that both sites hold.
//!
//! ```text
//!            round over     drained     armed      PONG 3       memory there      disk there
//! Prepare -> PreCopy -----> Drain ------> Arm --> Freeze ----> PostCopy ----> Release --> (moved)
//!    |          |             |            |        |  lost       | lost
//!    +----------+-------------+------------+        v             v
//!               | cancel, lost                    Uncertain     (interrupted: new relays are started)
//!               v                                   | the destination is dead
//!           Cancelling -> (runs at source)          v
//!                                               Reclaiming -> (runs at source, as it was at STOP)
//! ```
//!
//! [`SourceDriver`] and [`DestinationDriver`] are tables without I/O; [`send`] and [`receive`]
//! carry out what they ask for. A cancel before the switch leaves the machine running at the
//! source and nothing at the destination; after it, it is refused.

mod arrive;
mod destination;
mod keeper;
mod measure;
mod recover;
mod rest;
mod run;
mod source;

pub use arrive::{ArrivingDisk, AskCommitted, Committed, receive};
pub use destination::{DestinationDriver, DestinationEffect, DestinationEvent, DestinationState};
pub use measure::{Asked, Received, Request, Sent, Timeline, report};
pub use recover::{follow_outgoing, reclaim, recover_disk, recover_incoming, recover_outgoing};
pub use run::{Asking, DestinationFate, MoveError, Steering, prepare_incoming, send};
pub use source::{SourceDriver, SourceEffect, SourceEnd, SourceEvent, SourceState};

/// Name of the scheme.
pub const SCHEME: &str = "hybrid";
