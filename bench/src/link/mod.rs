//! The WAN link emulator: two network namespaces joined by a pair of TUN devices whose packets a
//! thread of this process carries through a [`Model`] of rate, delay, jitter, loss and outages.
//!
//! ```text
//!   namespace gw-NAME-a                                  namespace gw-NAME-b
//!   processes -- wan0 (TUN) -- thread: Model<packet> -- wan0 (TUN) -- processes
//!   10.77.0.1                                                        10.77.0.2
//! ```
//!
//! The kernel's own netem is not needed. Root is.

mod control;
mod engine;
mod error;
mod handle;
mod model;
mod netns;
mod spec;
mod tun;

pub use control::{ControlError, Reply, Request, control_path, request, serve};
pub use error::LinkError;
pub use handle::{Link, LinkHandle};
pub use model::{Counters, LaneCounters, Model, Side};
pub use netns::{Within, sweep};
pub use spec::{LaneSpec, LinkSpec, Outage};
