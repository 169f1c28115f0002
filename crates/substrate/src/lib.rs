//! Dock, pool and activate.
//!
//! A *substrate* is a docked machine in miniature: QEMU's device state, a page map of its memory,
//! a block map of what it wrote to its disk, and a manifest that says what machine and image they
//! belong to. Pages and blocks themselves are in the store, each once.
//!
//! - [`dock_convert`]: a running machine becomes a substrate, or runs on as before.
//! - [`Pool`]: the substrates of a site; [`Import`] and [`Pool::export`] carry them
//!   elsewhere as files, [`Pool::supply`] and [`Pool::take`] to another site, which asks for what it
//!   lacks.
//! - [`activate`]: a substrate becomes a running machine whose memory is a private mapping of
//!   one sealed file, several at once; [`Shells`] keeps QEMUs waiting for it.
//!
//! Architecture invariants: a substrate never changes; whatever comes from a file or a peer is
//! checked against its hash before QEMU sees it; a machine of another shape is refused here.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activate;
mod agent;
mod archive;
mod cache;
mod dock;
mod error;
mod exchange;
mod identity;
mod manifest;
mod memory;
mod pool;
mod private;
mod ready;
mod shells;
mod stamp;
mod turns;

pub use activate::{ActivateRequest, Activated, Place, activate};
pub use archive::{ArchiveEnd, Becomes, Bundle, Import};
pub use dock::{DockRequest, DockStop, dock_convert, run_on};
pub use error::SubstrateError;
pub use exchange::{KEPT, MAX_WANT, TakerMsg};
pub use identity::Identity;
pub use manifest::{Docked, Part, Shape, Sizes, Substrate};
pub use memory::SealedMemory;
pub use pool::{Pool, PoolCheck, PoolDirs};
pub use ready::Ready;
pub use shells::{Places, Shells};
