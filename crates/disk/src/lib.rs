//! Base and cow images, NBD, and the disk side of post-copy.
//!
//! - [`BlockBitmap`], [`rle`], [`msg`]: blocks as sets, coded, and in messages.
//! - [`postcopy`]: CloudAP figures 4 and 5 as state machines without I/O; [`live`] runs them on
//!   real files.
//! - [`nbd`]: what QEMU reads from while blocks are still on their way; [`overlay`]: which of them
//!   the guest has overwritten meanwhile.
//! - [`blocks`]: which block of a base image has given content.
//! - [`image`]: making, inspecting, reading, merging image files.
//!
//! # How it works
//!
//! What a chain holds above its base is what differs from it: a block that a guest gave back (TRIM)
//! over a hole of the base is the base's. The paper's block bitmap, pivot, pull and push are two
//! state machines; their skins fill an immutable middle layer while QEMU reads through an NBD
//! server of ours. Blocks are 4 KiB and so are the clusters of a top layer, so that a guest's write
//! of a whole block needs nothing from below. Such a block is cancelled: the destination's relay
//! asks its QEMU over NBD which blocks the top layer has of its own (`qemu:allocation-depth`), has
//! them flushed, and only then tells the source that they need not come. A QEMU that dies can lose
//! nothing by it that the disk had before.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod bitmap;
pub mod blocks;
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
pub use blocks::BlockIndex;
pub use error::DiskError;
pub use image::{FrozenChain, LayerMap, MidLayer};
pub use live::{LiveError, RemoteDisk, SourceDisk};
pub use msg::{BitmapPart, BitmapParts, BlockRange, BlockRun, DiskMsg, MAX_RUN, MsgError};
pub use nbd::{BlockSource, NbdServer};
pub use overlay::OverlayWatch;
pub use postcopy::{PostcopyDestination, PostcopySource, Read, Ticket, ToSend};
