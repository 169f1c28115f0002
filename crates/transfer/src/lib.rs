//! The site-to-site protocol over QUIC: the only way by which sites speak with each other.
//!
//! - [`keys`]: the center's [`Authority`], [`JoinToken`]s, the [`Identity`] of a site, [`Trust`].
//! - [`link`]: [`Endpoint`], [`Link`] and its lanes.
//! - [`wire`]: frames, greeting, lane headers (sans-IO).
//! - [`rpc`]: typed calls.
//! - [`codec`]: compression of bulk, bounded on the way back.
//! - [`window`]: how much bulk may be in flight (sans-IO); [`BulkSender`] and [`BulkReceiver`] use
//!   it on a lane.
//! - [`chunk`]: bringing units of the store by their hashes, demanded ones first.
//!
//! The clock of the system matters to certificates and tokens only; everything else goes by
//! elapsed time.

pub mod chunk;
pub mod codec;
pub mod keys;
pub mod link;
pub mod rpc;
pub mod window;
pub mod wire;

pub use keys::{
    Authority, Expected, Identity, JoinToken, KeyError, Peer, PendingIdentity, Renewal,
    Revocations, Serial, Trust, Warrant, unix_now,
};
pub use link::{
    BulkReceiver, BulkSender, Endpoint, EndpointOptions, JoinError, JoinRefusal, Joined, Lane,
    LaneError, LaneReceiver, LaneSender, Link, LinkError, LinkStats, PATIENCE, join,
};
pub use rpc::{Fault, Router, RpcError};
pub use window::{Window, WindowConfig};
pub use wire::{LaneKind, MAX_FRAME, Priority, Versions, WireError};
