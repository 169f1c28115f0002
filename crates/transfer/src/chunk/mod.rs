//! Bringing units of the store (pages, blocks) from one site to another, by their hashes.
//!
//! ```text
//!  receiver                                                sender
//!   lane ChunkDemand  Want[..] ---------------------------> |  what somebody waits for
//!                     <------------------ Unit | Missing    |
//!   lane ChunkBulk    Want[..], Cancel[..] ---------------> |  the rest
//!                     <------------------ Unit | Missing    |
//! ```
//! The receiver decides: it asks its own store which of the hashes it lacks, asks for those only,
//! and has a bounded number of bytes asked for at any time, so that a demand never waits behind a
//! long list. A sender that knows what the receiver will want may first ask for what it lacks
//! ([`ChunkMsg::Have`], answered by [`ChunkMsg::Lack`]). The two lanes know nothing of each other at
//! the sender; duplicates that result are dropped at the receiver. After a cut the receiver opens
//! new lanes and asks again for what did not come.

mod pull;
mod skin;
mod supply;

use bytes::Bytes;
use godwit_types::{Code, CodedError, Hash};
use serde::{Deserialize, Serialize};

use crate::codec::CodecError;
use crate::link::LaneError;
use crate::wire::{WireError, decode};

pub use pull::{Effect, Puller, PullerConfig, Unit, Urgency};
pub use skin::{ChunkSink, ChunkSource, PullHandle, PullReport, ask_lacking, pull, supply_lane};
pub use supply::Supplier;

/// The most bytes in one unit: 64 KiB.
pub const MAX_UNIT: usize = 64 << 10;
/// The most hashes in one message.
pub const MAX_HASHES: usize = 8192;

/// A message of the chunk exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkMsg {
    /// The receiver asks for units.
    Want(Vec<Hash>),
    /// The receiver no longer needs units that it asked for.
    Cancel(Vec<Hash>),
    /// The sender gives a unit.
    Unit {
        /// Which one.
        hash: Hash,
        /// Its length in bytes.
        raw_len: u32,
        /// Packed by [`crate::codec`].
        packed: Bytes,
    },
    /// The sender does not have these.
    Missing(Vec<Hash>),
    /// Which of these do you have?
    Have(Vec<Hash>),
    /// Answer to [`ChunkMsg::Have`]: one bit a hash in its order, lowest bit first, set where the
    /// unit is lacking.
    Lack(Bytes),
}

impl ChunkMsg {
    /// Decodes and checks a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let message: Self = decode("chunk message", bytes)?;
        let bounds = |why| Err(WireError::Bounds { what: "chunk message", why });
        match &message {
            Self::Want(h) | Self::Cancel(h) | Self::Missing(h) | Self::Have(h)
                if h.len() > MAX_HASHES =>
            {
                bounds("it names more than 8192 units")
            }
            Self::Unit { raw_len, .. } if *raw_len as usize > MAX_UNIT => {
                bounds("a unit has at most 64 KiB")
            }
            Self::Lack(bits) if bits.len() > MAX_HASHES / 8 => bounds("it has too many bits"),
            _ => Ok(message),
        }
    }
}

/// What can go wrong while units are brought.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// A unit's content does not match its hash.
    #[error("the peer sent unit {0} with another content than its hash says")]
    Damaged(Hash),
    /// A unit does not unpack.
    #[error("unit {hash} from the peer does not unpack")]
    Codec {
        /// Which unit.
        hash: Hash,
        /// Why.
        #[source]
        source: CodecError,
    },
    /// The peer does not have what it should.
    #[error("the peer lacks {count} of the units asked for, the first is {first}")]
    Missing {
        /// How many.
        count: usize,
        /// One of them.
        first: Hash,
    },
    /// The peer sent what it may not.
    #[error("the chunk exchange broke the protocol")]
    Wire(#[from] WireError),
    /// The lane failed; a later pull on a new link goes on where this one stopped.
    #[error("the lane of the chunk exchange failed")]
    Lane(#[from] LaneError),
    /// The local store failed.
    #[error("the store failed while {doing}: {text}")]
    Store {
        /// What was being done.
        doing: &'static str,
        /// The store's class.
        code: Code,
        /// The store's words.
        text: String,
    },
    /// Stopped on request.
    #[error("bringing units was cancelled")]
    Cancelled,
}

impl CodedError for ChunkError {
    fn code(&self) -> Code {
        match self {
            Self::Damaged(_) | Self::Codec { .. } => Code::Damaged,
            Self::Missing { .. } => Code::NotFound,
            Self::Wire(e) => e.code(),
            Self::Lane(e) => e.code(),
            Self::Store { code, .. } => *code,
            Self::Cancelled => Code::Cancelled,
        }
    }
}
