//! Base and cow images, NBD, and the disk side of post-copy.
//!
//! - [`BlockBitmap`], [`rle`], [`msg`]: blocks as sets, coded, and in messages.
//! - [`postcopy`]: CloudAP figures 4 and 5 as state machines without I/O; [`live`] runs them on
//!   real files.
//! - [`nbd`]: what QEMU reads from while blocks are still on their way; [`overlay`]: which of them
//!   the guest has overwritten meanwhile.
//! - [`image`]: making, inspecting, reading, merging image files.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod bitmap;
mod error;
pub mod image;
pub mod live;
pub mod msg;
pub mod nbd;
mod nbd_wire;
pub mod overlay;
pub mod postcopy;
pub mod rle;

pub use bitmap::{BitmapError, BlockBitmap, MAX_BLOCKS};
pub use error::DiskError;
pub use image::{FrozenChain, LayerMap, MidLayer};
pub use live::{LiveError, RemoteDisk, SourceDisk};
pub use msg::{BitmapPart, BitmapParts, BlockRange, BlockRun, DiskMsg, MAX_RUN, MsgError};
pub use nbd::{BlockSource, NbdServer};
pub use overlay::OverlayWatch;
pub use postcopy::{PostcopyDestination, PostcopySource, Read, Ticket, ToSend};
