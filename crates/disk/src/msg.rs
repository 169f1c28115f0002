//! The messages of disk post-copy.
//!
//! ```text
//! source                                   destination
//!   | --- Bitmap (parts, at STOP) -----------> |
//!   | --- Push ------------------------------> |   active push from the pivot
//!   | <-- Pull{id, range} -------------------- |   a read of dirty blocks
//!   | --- PullReply{id} ---------------------> |
//!   | <-- Syn{ranges} ------------------------ |   a write: the source may forget these
//!   |                ... link lost ...         |
//!   | <-- Have (parts) ----------------------- |   what need not be sent again
//!   | --- Done ------------------------------> |   nothing is left to push
//!   | <-- Done ------------------------------- |   everything is on the destination's disk
//! ```
//!
//! On the wire: one byte of version, then postcard. Each message fits one frame of 1 MiB.

use std::ops::Range;

use bytes::Bytes;
use godwit_types::{BLOCK_SIZE, Code, CodedError, Hash};
use serde::{Deserialize, Serialize};

use crate::bitmap::{BitmapError, BlockBitmap, MAX_BLOCKS};
use crate::rle::{self, RleError};

/// The version that this build speaks. 1: first.
pub const DISK_PROTOCOL: u8 = 1;
/// The most blocks in one run: 64 KiB.
pub const MAX_RUN: u64 = 16;
/// The most ranges in one [`DiskMsg::Syn`].
pub const MAX_SYN_RANGES: usize = 4096;
/// The longest encoded message.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Blocks in one part of a bitmap; raw they take 512 KiB.
const PART: u64 = 1 << 22;

/// Neighbouring blocks, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// The first block.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl BlockRange {
    /// As a range of block numbers.
    #[must_use]
    pub fn blocks(self) -> Range<u64> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl From<Range<u64>> for BlockRange {
    fn from(r: Range<u64>) -> Self {
        Self { first: r.start, count: r.end.saturating_sub(r.start) }
    }
}

/// Neighbouring blocks with their contents, each coded by run length, with a check sum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRun {
    first: u64,
    count: u8,
    sum: u64,
    coded: Bytes,
}

fn sum_of(data: &[u8]) -> u64 {
    let Hash(h) = Hash::of(data);
    u64::from_le_bytes([h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]])
}

impl BlockRun {
    /// Codes `data`, the contents of the blocks from `first` on.
    ///
    /// # Panics
    /// If `data` is not 1 to [`MAX_RUN`] whole blocks.
    #[must_use]
    pub fn encode(first: u64, data: &[u8]) -> Self {
        let count = data.len() / BLOCK_SIZE;
        assert!(
            data.len().is_multiple_of(BLOCK_SIZE) && (1..=MAX_RUN as usize).contains(&count),
            "a run has 1 to {MAX_RUN} whole blocks"
        );
        let mut coded = Vec::with_capacity(data.len() / 2);
        for block in data.chunks(BLOCK_SIZE) {
            let at = coded.len();
            coded.extend([0; 2]);
            let n = rle::encode(block, &mut coded) as u16;
            coded[at..at + 2].copy_from_slice(&n.to_le_bytes());
        }
        Self { first, count: count as u8, sum: sum_of(data), coded: coded.into() }
    }

    /// Which blocks these are.
    #[must_use]
    pub fn range(&self) -> BlockRange {
        BlockRange { first: self.first, count: u64::from(self.count) }
    }

    /// Bytes that the contents take on the wire.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        self.coded.len()
    }

    /// The contents.
    ///
    /// # Errors
    /// If they are damaged; the error names the blocks.
    pub fn decode(&self) -> Result<Vec<u8>, MsgError> {
        let damaged = |source| MsgError::DamagedRun { range: self.range(), source };
        let mut out = vec![0; usize::from(self.count) * BLOCK_SIZE];
        let mut rest = &self.coded[..];
        for block in out.chunks_mut(BLOCK_SIZE) {
            let (len, tail) = rest.split_first_chunk::<2>().ok_or(damaged(RleError::Short))?;
            let len = usize::from(u16::from_le_bytes(*len));
            let (coded, tail) = tail.split_at_checked(len).ok_or(damaged(RleError::Short))?;
            rle::decode(coded, block).map_err(damaged)?;
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(damaged(RleError::WrongLength));
        }
        if sum_of(&out) != self.sum {
            return Err(MsgError::WrongSum { range: self.range() });
        }
        Ok(out)
    }
}

/// One part of a bitmap that may be too long for one message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapPart {
    /// Blocks of the whole disk.
    pub disk_blocks: u64,
    /// The block that bit 0 of `bits` stands for.
    pub first: u64,
    /// The bits.
    pub bits: BlockBitmap,
}

impl BitmapPart {
    /// Cuts a bitmap into parts that fit a message each, in order. There is at least one.
    pub fn cut(bitmap: &BlockBitmap) -> impl Iterator<Item = Self> + '_ {
        let blocks = bitmap.blocks();
        (0..blocks.div_ceil(PART).max(1)).map(move |i| {
            let r = i * PART..((i + 1) * PART).min(blocks);
            Self { disk_blocks: blocks, first: r.start, bits: bitmap.slice(r) }
        })
    }

    /// Whether no part follows.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.first + self.bits.blocks() >= self.disk_blocks
    }
}

/// Puts the parts of a bitmap together again. They come in order.
#[derive(Debug, Default)]
pub struct BitmapParts {
    so_far: Option<(BlockBitmap, u64)>,
}

impl BitmapParts {
    /// Takes the next part; the whole bitmap once it is complete.
    ///
    /// # Errors
    /// If a part is out of order or of another disk; the collection then begins anew.
    pub fn take(&mut self, part: &BitmapPart) -> Result<Option<BlockBitmap>, MsgError> {
        let (mut whole, next) = match self.so_far.take() {
            Some(s) => s,
            None => (BlockBitmap::new(part.disk_blocks)?, 0),
        };
        let end = part.first.checked_add(part.bits.blocks());
        let whole_or_full = part.bits.blocks() == PART || end == Some(part.disk_blocks);
        if part.disk_blocks != whole.blocks()
            || part.first != next
            || end.is_none_or(|e| e > whole.blocks())
            || !whole_or_full
        {
            return Err(MsgError::BitmapOrder);
        }
        for r in part.bits.runs() {
            whole.set_range(part.first + r.start..part.first + r.end);
        }
        if part.is_last() {
            return Ok(Some(whole));
        }
        self.so_far = Some((whole, part.first + part.bits.blocks()));
        Ok(None)
    }
}

/// A message of disk post-copy. See the module's head for who sends which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskMsg {
    /// Source: the blocks that the destination lacks, sent when the machine has stopped.
    Bitmap(BitmapPart),
    /// Source: blocks that nobody asked for (active push).
    Push(BlockRun),
    /// Destination: a read needs these blocks (at most [`MAX_RUN`]).
    Pull {
        /// Comes back in the reply.
        id: u64,
        /// The blocks.
        range: BlockRange,
        /// The destination cancelled these blocks and needs them all the same; the source sends
        /// them although their bits are clear.
        again: bool,
    },
    /// Source: blocks that a [`DiskMsg::Pull`] asked for. Blocks that are already on their way
    /// are not sent twice, so that a reply may be missing or cover a part.
    PullReply {
        /// The id of the pull.
        id: u64,
        /// The blocks.
        run: BlockRun,
    },
    /// Destination: the guest has overwritten these blocks whole (at most [`MAX_SYN_RANGES`]).
    Syn(Vec<BlockRange>),
    /// Destination, after the link came back: blocks that need not be sent.
    Have(BitmapPart),
    /// Nothing is left to send (source), or everything is on disk (destination).
    Done,
}

/// A message that can't be read, or that a state machine refuses.
#[derive(Debug, thiserror::Error)]
pub enum MsgError {
    /// The peer speaks another version.
    #[error("the peer speaks version {0} of disk post-copy, this build {DISK_PROTOCOL}")]
    Version(u8),
    /// Longer than a message may be.
    #[error("a disk message of {0} bytes was refused: at most {MAX_MESSAGE} are allowed")]
    TooLong(usize),
    /// Not a message.
    #[error("a disk message can't be read")]
    Unreadable(#[source] postcard::Error),
    /// A field has a value that no peer of ours sends.
    #[error("a disk message was refused: {0}")]
    Refused(&'static str),
    /// The contents of blocks can't be decoded.
    #[error("blocks {}..{} arrived damaged", range.first, range.first + range.count)]
    DamagedRun {
        /// The blocks.
        range: BlockRange,
        /// Why.
        source: RleError,
    },
    /// The contents of blocks don't match their check sum.
    #[error("blocks {}..{} don't match their check sum", range.first, range.first + range.count)]
    WrongSum {
        /// The blocks.
        range: BlockRange,
    },
    /// Parts of a bitmap came out of order.
    #[error("the parts of a block bitmap came out of order")]
    BitmapOrder,
    /// A bitmap doesn't fit the disk.
    #[error("a block bitmap from the peer was refused")]
    Bitmap(#[from] BitmapError),
}

impl CodedError for MsgError {
    fn code(&self) -> Code {
        match self {
            Self::Version(_) => Code::Conflict,
            Self::TooLong(_) | Self::Refused(_) | Self::BitmapOrder => Code::Invalid,
            Self::Unreadable(_) | Self::DamagedRun { .. } | Self::WrongSum { .. } => Code::Damaged,
            Self::Bitmap(e) => e.code(),
        }
    }
}

impl DiskMsg {
    /// The form on the wire.
    ///
    /// # Errors
    /// If it would be longer than [`MAX_MESSAGE`].
    pub fn encode(&self) -> Result<Vec<u8>, MsgError> {
        let out = postcard::to_extend(self, vec![DISK_PROTOCOL]).map_err(MsgError::Unreadable)?;
        if out.len() > MAX_MESSAGE { Err(MsgError::TooLong(out.len())) } else { Ok(out) }
    }

    /// Reads a message. Every count is checked against its bound; whether blocks lie on the disk
    /// is checked by the state machine that takes the message.
    ///
    /// # Errors
    /// If it is too long, of another version, unreadable or out of bounds.
    pub fn decode(data: &[u8]) -> Result<Self, MsgError> {
        if data.len() > MAX_MESSAGE {
            return Err(MsgError::TooLong(data.len()));
        }
        let (version, body) = data.split_first().ok_or(MsgError::Refused("it is empty"))?;
        if *version != DISK_PROTOCOL {
            return Err(MsgError::Version(*version));
        }
        let msg: Self = postcard::from_bytes(body).map_err(MsgError::Unreadable)?;
        msg.check()?;
        Ok(msg)
    }

    fn check(&self) -> Result<(), MsgError> {
        let range_ok = |r: &BlockRange, most: u64| {
            (1..=most).contains(&r.count) && r.first < MAX_BLOCKS && r.count <= MAX_BLOCKS - r.first
        };
        match self {
            Self::Push(run) | Self::PullReply { run, .. } if !range_ok(&run.range(), MAX_RUN) => {
                Err(MsgError::Refused("a run of blocks is out of bounds"))
            }
            Self::Pull { range, .. } if !range_ok(range, MAX_RUN) => {
                Err(MsgError::Refused("a pull is out of bounds"))
            }
            Self::Syn(ranges)
                if ranges.len() > MAX_SYN_RANGES
                    || !ranges.iter().all(|r| range_ok(r, MAX_BLOCKS)) =>
            {
                Err(MsgError::Refused("a syn is out of bounds"))
            }
            Self::Bitmap(p) | Self::Have(p)
                if p.disk_blocks > MAX_BLOCKS || p.first > p.disk_blocks =>
            {
                Err(MsgError::Refused("a part of a bitmap is out of bounds"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flipped_bit_is_named() {
        let mut data = vec![0; 2 * BLOCK_SIZE];
        data[100..200].fill(9);
        let run = BlockRun::encode(70, &data);
        assert!(run.wire_bytes() < 40);
        assert_eq!(run.decode().expect("whole"), data);
        for i in 0..run.coded.len() {
            let mut coded = run.coded.to_vec();
            coded[i] ^= 4;
            let bad = BlockRun { coded: coded.into(), ..run.clone() };
            let e = bad.decode().expect_err("damaged").to_string();
            assert!(e.contains("70..72"), "{e}");
        }
    }

    #[test]
    fn a_large_bitmap_travels_in_parts() {
        let mut b = BlockBitmap::new(3 * PART + 5).expect("fits");
        (0..b.blocks()).step_by(3).for_each(|i| {
            b.insert(i);
        });
        let mut parts = BitmapParts::default();
        let mut whole = None;
        for part in BitmapPart::cut(&b) {
            assert!(whole.is_none());
            let wire = DiskMsg::Bitmap(part).encode().expect("fits a message");
            let DiskMsg::Bitmap(part) = DiskMsg::decode(&wire).expect("reads") else {
                panic!("another message")
            };
            whole = parts.take(&part).expect("in order");
        }
        assert_eq!(whole, Some(b.clone()));
        let second = BitmapPart::cut(&b).nth(1).expect("four parts");
        assert!(matches!(parts.take(&second), Err(MsgError::BitmapOrder)));
    }

    #[test]
    fn hostile_messages_are_refused() {
        let range = |first, count| BlockRange { first, count };
        for m in [
            DiskMsg::Pull { id: 1, range: range(0, 0), again: false },
            DiskMsg::Pull { id: 1, range: range(0, MAX_RUN + 1), again: false },
            DiskMsg::Pull { id: 1, range: range(u64::MAX, 1), again: false },
            DiskMsg::Syn(vec![range(MAX_BLOCKS, 1)]),
            DiskMsg::Syn(vec![range(5, u64::MAX)]),
        ] {
            let wire = m.encode().expect("encodes");
            assert!(matches!(DiskMsg::decode(&wire), Err(MsgError::Refused(_))), "{m:?}");
        }
        assert!(matches!(DiskMsg::decode(&[9, 0]), Err(MsgError::Version(9))));
        assert!(matches!(DiskMsg::decode(&vec![1; MAX_MESSAGE + 1]), Err(MsgError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut data in prop::collection::vec(any::<u8>(), 0..200)) {
            data.insert(0, DISK_PROTOCOL);
            if let Ok(DiskMsg::Push(run) | DiskMsg::PullReply { run, .. }) = DiskMsg::decode(&data) {
                let _ = run.decode();
            }
        }
    }
}
