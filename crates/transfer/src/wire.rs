//! What crosses a link, apart from the bytes of the users: frames, the greeting and lane headers.
//!
//! ```text
//!  connection (QUIC, mTLS, ALPN godwit/1)
//!   stream 0   initiator: Hello ------------------>
//!              <------------------ Hello | Refusal :acceptor
//!   stream n   opener: LaneHeader, then frames --->
//!              <--------------------------- frames :acceptor
//!  frame = u32 little-endian length, then that many bytes (at most 1 MiB)
//! ```
//!
//! Versions of the protocol (the greeting carries the range that a site speaks; the highest
//! common one is used, and a site speaks at least its own and the previous one):
//! - 1: the first.
//! - 2: center and site know by it which requests the other has, and relays which version of
//!   theirs; to a request that it does not know, a site answers in words.

use bytes::{Buf, Bytes, BytesMut};
use godwit_types::{Code, CodedError, Name};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The most bytes in one frame: 1 MiB.
pub const MAX_FRAME: usize = 1 << 20;

/// ALPN of links between sites that hold certificates.
pub const ALPN_LINK: &[u8] = b"godwit/1";

/// ALPN of the exchange by which a site obtains its first certificate.
pub const ALPN_JOIN: &[u8] = b"godwit-join/1";

/// The most bytes that a lane's `about` may have.
pub const MAX_ABOUT: usize = 256;

/// Bytes from a peer that are not what the protocol says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame announced or handed in with more than [`MAX_FRAME`] bytes.
    #[error("a frame of {bytes} bytes is over the limit of {MAX_FRAME}")]
    FrameTooLong {
        /// The announced length.
        bytes: usize,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame ({have} bytes of it came)")]
    Truncated {
        /// How many bytes of the frame, its length included, had come.
        have: usize,
    },
    /// A message does not decode.
    #[error("a {what} does not decode")]
    Malformed {
        /// Which message.
        what: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// A field of a message is out of its bounds.
    #[error("a {what} is out of bounds: {why}")]
    Bounds {
        /// Which message.
        what: &'static str,
        /// Which bound.
        why: &'static str,
    },
    /// No version of the protocol is spoken by both sides.
    #[error(
        "no common protocol version: this site speaks {ours}, the peer {theirs}; update the older one"
    )]
    NoCommonVersion {
        /// Our range.
        ours: Versions,
        /// The peer's range.
        theirs: Versions,
    },
}

impl CodedError for WireError {
    fn code(&self) -> Code {
        match self {
            Self::NoCommonVersion { .. } => Code::Conflict,
            _ => Code::Damaged,
        }
    }
}

/// Cuts a byte stream into frames. Sans-IO: bytes in, frames out.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: BytesMut,
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it is here.
    ///
    /// # Errors
    /// [`WireError::FrameTooLong`] as soon as the length is known; nothing after it is read.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, WireError> {
        let Some(length) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(WireError::FrameTooLong { bytes: length });
        }
        if self.buffer.len() < 4 + length {
            self.buffer.reserve(4 + length - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(4);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    /// To be called at the end of the stream.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when a frame had begun.
    pub fn finish(&self) -> Result<(), WireError> {
        match self.buffer.len() {
            0 => Ok(()),
            have => Err(WireError::Truncated { have }),
        }
    }
}

/// The four bytes that go before a frame's payload.
///
/// # Errors
/// [`WireError::FrameTooLong`].
pub fn frame_head(payload: usize) -> Result<[u8; 4], WireError> {
    match u32::try_from(payload) {
        Ok(n) if payload <= MAX_FRAME => Ok(n.to_le_bytes()),
        _ => Err(WireError::FrameTooLong { bytes: payload }),
    }
}

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest that is still spoken.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// What this build speaks.
    pub const OURS: Self = Self { min: 1, max: 7 };

    /// The version that both sides use: the highest common one.
    ///
    /// # Errors
    /// [`WireError::NoCommonVersion`], and [`WireError::Bounds`] for a range that is none.
    pub fn agree(self, theirs: Self) -> Result<u16, WireError> {
        if theirs.min == 0 || theirs.min > theirs.max {
            return Err(WireError::Bounds {
                what: "greeting",
                why: "the versions in it are no range that begins at 1 or later",
            });
        }
        let version = self.max.min(theirs.max);
        if version >= self.min.max(theirs.min) {
            Ok(version)
        } else {
            Err(WireError::NoCommonVersion { ours: self, theirs })
        }
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// The greeting: the first frame of each side. A later version may append fields; an older site
/// ignores them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which versions the sender speaks.
    pub versions: Versions,
    /// Who the sender says it is; must equal what its certificate says.
    pub name: Name,
    /// Drawn at random when the sender's endpoint was bound: a changed one means that the site
    /// was restarted.
    pub boot: u64,
}

/// The acceptor's answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Greeting {
    /// Welcome.
    Hello(Hello),
    /// No; in words for people, at most 400 characters.
    Refusal(String),
}

/// What a lane carries. The number is the wire form and never changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[repr(u8)]
pub enum LaneKind {
    /// One remote procedure call.
    Rpc = 1,
    /// Small messages that steer one job (a move, a transfer): typed by the room that opens it.
    Steering = 2,
    /// Memory pages that a vCPU waits for, and the requests for them.
    MemoryDemand = 4,
    /// Memory in the order of the sender's choice (a pre-copy round, an active push).
    MemoryBulk = 5,
    /// Disk blocks that a machine waits for, and the requests for them.
    DiskDemand = 6,
    /// Disk blocks in the order of the sender's choice.
    DiskBulk = 7,
    /// A byte stream that is passed on as it is (a console, a display).
    Pipe = 10,
}

impl LaneKind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Rpc,
        Self::Steering,
        Self::MemoryDemand,
        Self::MemoryBulk,
        Self::DiskDemand,
        Self::DiskBulk,
        Self::Pipe,
    ];

    /// The priority that suits the kind.
    #[must_use]
    pub const fn usual_priority(self) -> Priority {
        match self {
            Self::Rpc | Self::Steering => Priority::Control,
            Self::MemoryDemand | Self::DiskDemand => Priority::Demand,
            Self::Pipe => Priority::State,
            Self::MemoryBulk | Self::DiskBulk => Priority::Bulk,
        }
    }
}

impl From<LaneKind> for u8 {
    fn from(kind: LaneKind) -> Self {
        kind as Self
    }
}

impl TryFrom<u8> for LaneKind {
    type Error = &'static str;
    fn try_from(n: u8) -> Result<Self, Self::Error> {
        Self::ALL.into_iter().find(|k| *k as u8 == n).ok_or("unknown kind of lane")
    }
}

/// Who goes first when the link is busy. A lane with a higher priority sends all it has before
/// one with a lower priority sends anything; equals take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[repr(u8)]
pub enum Priority {
    /// Nobody waits for it.
    Background = 1,
    /// A job waits for all of it.
    Bulk = 2,
    /// A machine that stands still waits for it.
    State = 3,
    /// A running machine waits for this very piece.
    Demand = 4,
    /// Small, and everything else depends on it.
    Control = 5,
}

impl From<Priority> for u8 {
    fn from(p: Priority) -> Self {
        p as Self
    }
}

impl TryFrom<u8> for Priority {
    type Error = &'static str;
    fn try_from(n: u8) -> Result<Self, Self::Error> {
        Ok(match n {
            1 => Self::Background,
            2 => Self::Bulk,
            3 => Self::State,
            4 => Self::Demand,
            5 => Self::Control,
            _ => return Err("unknown priority"),
        })
    }
}

/// The first frame of a lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneHeader {
    /// What it carries.
    pub kind: LaneKind,
    /// How both directions are scheduled.
    pub priority: Priority,
    /// Which job it belongs to, in the terms of the room that opens it; at most [`MAX_ABOUT`]
    /// bytes.
    pub about: Bytes,
}

/// Encodes a message of the protocol.
///
/// # Errors
/// [`WireError::Malformed`] when the type cannot be expressed; [`WireError::FrameTooLong`].
pub fn encode<T: Serialize>(what: &'static str, message: &T) -> Result<Bytes, WireError> {
    let bytes =
        postcard::to_stdvec(message).map_err(|source| WireError::Malformed { what, source })?;
    frame_head(bytes.len())?;
    Ok(bytes.into())
}

/// Decodes a message whose later versions may be longer: bytes after it are ignored.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn decode_open<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    postcard::take_from_bytes(bytes)
        .map(|(message, _)| message)
        .map_err(|source| WireError::Malformed { what, source })
}

/// Decodes a message that fills `bytes` exactly.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(WireError::Bounds { what, why: "bytes after its end" }),
        Err(source) => Err(WireError::Malformed { what, source }),
    }
}

impl LaneHeader {
    /// Decodes and checks a lane's first frame.
    ///
    /// # Errors
    /// [`WireError::Malformed`], [`WireError::Bounds`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let header: Self = decode_open("lane header", bytes)?;
        if header.about.len() > MAX_ABOUT {
            return Err(WireError::Bounds { what: "lane header", why: "'about' is too long" });
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_highest_common_version_is_used() {
        let v = |min, max| Versions { min, max };
        assert_eq!(v(1, 1).agree(v(1, 2)), Ok(1), "a new site speaks with the previous one");
        assert_eq!(v(2, 3).agree(v(1, 2)), Ok(2));
        assert_eq!(v(1, 4).agree(v(2, 9)), Ok(4));
        assert!(matches!(v(3, 4).agree(v(1, 2)), Err(WireError::NoCommonVersion { .. })));
        assert_eq!(v(1, 2).agree(v(1, u16::MAX)), Ok(2), "however far ahead it is");
        for nonsense in [v(2, 1), v(0, 0), v(0, 2), v(u16::MAX, 0), v(u16::MAX, 2)] {
            assert!(matches!(v(1, 2).agree(nonsense), Err(WireError::Bounds { .. })), "{nonsense}");
        }
    }

    #[test]
    fn a_greeting_with_fields_of_a_later_version_is_understood() {
        let hello = Hello {
            versions: Versions { min: 1, max: 2 },
            name: Name::new("cafe").expect("name"),
            boot: 7,
        };
        let mut bytes = postcard::to_stdvec(&hello).expect("encodes");
        bytes.extend_from_slice(b"more");
        assert_eq!(decode_open::<Hello>("greeting", &bytes), Ok(hello.clone()));
        assert!(decode::<Hello>("greeting", &bytes).is_err());
    }

    #[test]
    fn kinds_and_priorities_keep_their_numbers() {
        for kind in LaneKind::ALL {
            assert_eq!(LaneKind::try_from(u8::from(kind)), Ok(kind));
        }
        assert!(LaneKind::try_from(0).is_err());
        for n in 1..=5 {
            assert_eq!(Priority::try_from(n).map(u8::from), Ok(n));
        }
        assert!(Priority::try_from(6).is_err());
    }

    #[test]
    fn an_oversized_frame_is_refused_by_its_length_alone() {
        let mut d = FrameDecoder::new();
        d.push(&((MAX_FRAME as u32) + 1).to_le_bytes());
        assert_eq!(d.next_frame(), Err(WireError::FrameTooLong { bytes: MAX_FRAME + 1 }));
        assert!(frame_head(MAX_FRAME).is_ok());
        assert!(frame_head(MAX_FRAME + 1).is_err());
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..12),
            cut in 1usize..64,
        ) {
            let mut stream = Vec::new();
            for f in &frames {
                stream.extend_from_slice(&frame_head(f.len()).expect("short"));
                stream.extend_from_slice(f);
            }
            let mut d = FrameDecoder::new();
            let mut out = Vec::new();
            for piece in stream.chunks(cut) {
                d.push(piece);
                while let Some(f) = d.next_frame().expect("valid") {
                    out.push(f.to_vec());
                }
            }
            prop_assert_eq!(out, frames);
            prop_assert!(d.finish().is_ok());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut d = FrameDecoder::new();
            d.push(&bytes);
            while let Ok(Some(_)) = d.next_frame() {}
            let _ = decode_open::<Hello>("greeting", &bytes);
            let _ = decode_open::<Greeting>("greeting", &bytes);
            let _ = LaneHeader::decode(&bytes);
        }
    }
}
