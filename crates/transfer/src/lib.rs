//! The site-to-site protocol over QUIC: the only way by which sites speak with each other.
//!
//! - [`keys`]: the center's [`Authority`], [`JoinToken`]s, the [`Identity`] of a site, [`Trust`].
//! - [`link`]: [`Endpoint`], [`Link`] and its lanes.
//! - [`wire`]: frames, greeting, lane headers (sans-IO).
//! - [`rpc`]: typed calls.
//! - [`codec`]: compression of bulk, bounded on the way back.
//!
//! The clock of the system matters to certificates and tokens only; everything else goes by
//! elapsed time.

pub mod codec;
pub mod keys;
pub mod link;
pub mod rpc;
pub mod wire;

pub use keys::{
    Authority, Expected, Identity, JoinToken, KeyError, Peer, PendingIdentity, Renewal,
    Revocations, Serial, Trust, Warrant, unix_now,
};
pub use link::{
    Congestion, Endpoint, EndpointOptions, JoinError, JoinRefusal, Joined, Lane, LaneError,
    LaneReceiver, LaneSender, Link, LinkError, PATIENCE, join,
};
pub use rpc::{Fault, Router, RpcError};
pub use wire::{LaneKind, MAX_FRAME, Priority, Versions, WireError};
