//! Dock, pool and activate.
//!
//! A *substrate* is a docked machine in miniature: QEMU's device state, a page map of its memory,
//! a block map of what it wrote to its disk, and a manifest that says what machine and image they
//! belong to. Pages and blocks themselves are in the store, each once.
//!
//! - [`dock_convert`]: a running machine becomes a substrate, or runs on as before.
//! - [`Pool`]: the substrates of a site, whose calls block; [`AsyncPool`] is what async tasks have
//!   of it. [`Import`] and [`Pool::export`] carry substrates elsewhere as files, [`Pool::supply`] and
//!   [`Pool::take`] to another site, which asks for what it lacks.
//! - [`activate`]: a substrate becomes a running machine whose memory is a private mapping of
//!   one sealed file, several at once; [`Shells`] keeps QEMUs waiting for it.
//!
//! Architecture invariants: a substrate never changes; whatever comes from a file or a peer is
//! checked against its hash before QEMU sees it; a machine of another shape is refused here.
//!
//! # How it works
//!
//! Docking quiesces the guest, stops it, saves the device state, stores pages and blocks, and
//! publishes by one rename; before that rename the machine can run on. While the guest comes to
//! rest its memory is put into the store already, at a lower priority than the guest; after the
//! STOP everything is hashed again, and only what has changed is encoded and written while the
//! machine stands. What was stored too early is forgotten by the commit. The docked RAM file itself
//! becomes the sealed memory that clones map. A clone that is docked is its parent's page map and
//! the pages that it wrote, by the kernel's own list; its devices are saved alone and joined with
//! the RAM blocks beside the memory, so that nobody reads the parent's holes into being. A waiting
//! QEMU has the sealed memory mapped, the disk open and the device state loaded, its vCPUs standing
//! still; an activation verifies the state once more, renames the QEMU's directory and its top
//! image under it, and lets it run. A process that ran when the machine was docked (`godwit-guest
//! agent`, in front of qemu-ga) answers the one question of an activation: time, entropy, identity,
//! the card's address, thaw. Nothing is forked, because an emulated guest spends an activation on
//! translating what it executes for the first time; an older agent refuses the question, and a
//! program is started as before. At docking the card is taken off its network by its interface
//! going down; it stays in the machine, gets a new address at activation and comes up in the new
//! QEMU's network. A TAP, or one of several NICs, is unplugged and plugged anew. A daemon that is
//! killed in the midst finds the step in the machine's record: a docking before its commit is
//! undone (the machine runs on, thaws, gets its NIC back), after it done; an activation is undone.
//! Sealed memory is a cache with a budget: what no machine maps may go, and is made again from the
//! packs. Clones give no memory back (stock QEMU discards nothing in a file that it may not write),
//! so a site promises no more than there is: each machine counts with its RAM and what its QEMU
//! needs, and one beyond the promise is refused.
//!
//! A substrate goes to another site by the units that are lacking there (`exchange`): the taker
//! asks its own store, asks for the rest in the substrate's order, and takes nothing else; the
//! supplier gives nothing else. What came before a break is set aside for ten minutes, so the next
//! try asks for what did not come. This is here and not in `transfer`, because units travel as they
//! are stored, packed already, and in one order, which needs neither a second lane nor a window.
//! The center stands between the two sites and passes on what they send.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activate;
mod agent;
mod archive;
mod async_pool;
mod cache;
mod coming;
mod dock;
mod error;
mod exchange;
mod identity;
mod manifest;
mod memory;
mod network;
mod pool;
mod private;
mod ready;
mod shells;
mod stamp;
mod turns;

pub use activate::{ActivateRequest, Activated, Place, activate};
pub use archive::{ArchiveEnd, Bundle, Import, ImportAs};
pub use async_pool::AsyncPool;
pub use dock::{DockRequest, DockStop, dock_convert, run_on};
pub use error::SubstrateError;
pub use exchange::{KEPT, MAX_WANT, TakerMsg};
pub use identity::Identity;
pub use manifest::{Docked, Part, Shape, Sizes, Substrate};
pub use memory::SealedMemory;
pub use network::{GuestNetwork, set_network};
pub use pool::{Pool, PoolCheck, PoolDirs, Spare};
pub use ready::{OpenMemory, Ready};
pub use shells::{Places, Shells};
