//! The block bitmap of CloudAP, figures 4 and 5: one bit for each 4 KiB block of a disk.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use godwit_types::{BLOCK_SIZE, Code, CodedError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most blocks a bitmap may cover: 1 TiB of disk, 32 MiB of bits.
pub const MAX_BLOCKS: u64 = 1 << 28;

/// A set of blocks of one disk.
///
/// Kept as plain words in memory; in files and messages as alternating run lengths, or as raw
/// bits where those are shorter.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockBitmap {
    words: Vec<u64>,
    blocks: u64,
    set: u64,
}

/// A bitmap that can't be decoded or doesn't fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// More blocks than a bitmap may cover.
    #[error("a block bitmap for {0} blocks was refused: at most {MAX_BLOCKS} are allowed")]
    TooLarge(u64),
    /// The encoded form is cut short, too long or unknown.
    #[error("an encoded block bitmap is damaged: {0}")]
    Damaged(&'static str),
    /// Two bitmaps that must cover the same disk don't.
    #[error("a block bitmap for {found} blocks was given for a disk of {wanted}")]
    WrongDisk {
        /// Blocks of the disk.
        wanted: u64,
        /// Blocks that the bitmap covers.
        found: u64,
    },
}

impl CodedError for BitmapError {
    fn code(&self) -> Code {
        match self {
            Self::TooLarge(_) | Self::WrongDisk { .. } => Code::Invalid,
            Self::Damaged(_) => Code::Damaged,
        }
    }
}

const RUNS: u8 = 0;
const RAW: u8 = 1;

impl BlockBitmap {
    /// No block set, on a disk of `blocks` blocks.
    ///
    /// # Errors
    /// Above [`MAX_BLOCKS`].
    pub fn new(blocks: u64) -> Result<Self, BitmapError> {
        if blocks > MAX_BLOCKS {
            return Err(BitmapError::TooLarge(blocks));
        }
        Ok(Self { words: vec![0; blocks.div_ceil(64) as usize], blocks, set: 0 })
    }

    /// Every block set, on a disk of `blocks` blocks.
    ///
    /// # Errors
    /// Above [`MAX_BLOCKS`].
    pub fn full(blocks: u64) -> Result<Self, BitmapError> {
        let mut b = Self::new(blocks)?;
        b.set_range(0..blocks);
        Ok(b)
    }

    /// No block set, on a disk of `bytes` bytes (a last part of a block counts as one).
    ///
    /// # Errors
    /// Above [`MAX_BLOCKS`].
    pub fn for_bytes(bytes: u64) -> Result<Self, BitmapError> {
        Self::new(bytes.div_ceil(BLOCK_SIZE as u64))
    }

    /// Blocks of the disk, set or not.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks that are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether no block is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Whether `block` is set. Blocks past the end are not.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Sets one block; true if it was clear. Past the end nothing happens.
    pub fn insert(&mut self, block: u64) -> bool {
        if block >= self.blocks || self.contains(block) {
            return false;
        }
        self.words[(block / 64) as usize] |= 1 << (block % 64);
        self.set += 1;
        true
    }

    /// Clears one block; true if it was set.
    pub fn remove(&mut self, block: u64) -> bool {
        if !self.contains(block) {
            return false;
        }
        self.words[(block / 64) as usize] &= !(1 << (block % 64));
        self.set -= 1;
        true
    }

    /// Sets the blocks of `range`; the part past the end is left out.
    pub fn set_range(&mut self, range: Range<u64>) {
        self.each_word(range, |w, mask| *w |= mask);
    }

    /// Clears the blocks of `range`.
    pub fn clear_range(&mut self, range: Range<u64>) {
        self.each_word(range, |w, mask| *w &= !mask);
    }

    fn each_word(&mut self, range: Range<u64>, f: impl Fn(&mut u64, u64)) {
        let (mut at, end) = (range.start, range.end.min(self.blocks));
        while at < end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let n = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - n)) << bit;
            let before = self.words[word].count_ones();
            f(&mut self.words[word], mask);
            self.set = self.set - u64::from(before) + u64::from(self.words[word].count_ones());
            at += n;
        }
    }

    /// The number of set blocks below `block`.
    #[must_use]
    pub fn rank(&self, block: u64) -> u64 {
        let block = block.min(self.blocks);
        let whole = (block / 64) as usize;
        let mut n: u64 = self.words[..whole].iter().map(|w| u64::from(w.count_ones())).sum();
        if !block.is_multiple_of(64) {
            n += u64::from((self.words[whole] & ((1 << (block % 64)) - 1)).count_ones());
        }
        n
    }

    /// The first set block at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.find(from, |w| w)
    }

    /// The first clear block at or after `from`, at most the disk's end.
    #[must_use]
    pub fn next_clear(&self, from: u64) -> u64 {
        self.find(from, |w| !w).unwrap_or(self.blocks)
    }

    fn find(&self, from: u64, f: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= self.blocks {
            return None;
        }
        let mut i = (from / 64) as usize;
        let mut w = f(self.words[i]) & (u64::MAX << (from % 64));
        loop {
            if w != 0 {
                let at = i as u64 * 64 + u64::from(w.trailing_zeros());
                return (at < self.blocks).then_some(at);
            }
            i += 1;
            w = f(*self.words.get(i)?);
        }
    }

    /// The runs of neighbouring set blocks, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs_in(0..self.blocks)
    }

    /// The runs of set blocks within `range`, cut to it.
    pub fn runs_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = self.next_set(at).filter(|s| *s < range.end)?;
            let end = self.next_clear(start).min(range.end);
            at = end;
            Some(start..end)
        })
    }

    /// The set blocks, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs().flatten()
    }

    /// Sets every block that `other` has.
    ///
    /// # Errors
    /// If the two cover disks of different sizes.
    pub fn union_with(&mut self, other: &Self) -> Result<(), BitmapError> {
        self.merge(other, |a, b| a | b)
    }

    /// Clears every block that `other` has.
    ///
    /// # Errors
    /// If the two cover disks of different sizes.
    pub fn subtract(&mut self, other: &Self) -> Result<(), BitmapError> {
        self.merge(other, |a, b| a & !b)
    }

    /// Clears every block that `other` lacks.
    ///
    /// # Errors
    /// If the two cover disks of different sizes.
    pub fn intersect_with(&mut self, other: &Self) -> Result<(), BitmapError> {
        self.merge(other, |a, b| a & b)
    }

    fn merge(&mut self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Result<(), BitmapError> {
        if self.blocks != other.blocks {
            return Err(BitmapError::WrongDisk { wanted: self.blocks, found: other.blocks });
        }
        let mut set = 0;
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a = f(*a, *b);
            set += u64::from(a.count_ones());
        }
        self.set = set;
        Ok(())
    }

    /// A bitmap of the blocks in `range` alone, renumbered from 0.
    #[must_use]
    pub fn slice(&self, range: Range<u64>) -> Self {
        let end = range.end.min(self.blocks);
        let start = range.start.min(end);
        let blocks = end - start;
        let mut out = Self { words: vec![0; blocks.div_ceil(64) as usize], blocks, set: 0 };
        for r in self.runs_in(start..end) {
            out.set_range(r.start - start..r.end - start);
        }
        out
    }

    /// The compact form: a tag, then run lengths (clear, set, clear, ...) as LEB128 numbers, or
    /// the raw bits, whichever is shorter.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = self.blocks.div_ceil(8) as usize;
        let mut out = vec![RUNS];
        let mut at = 0;
        for r in self.runs() {
            put_number(&mut out, r.start - at);
            put_number(&mut out, r.end - r.start);
            at = r.end;
            if out.len() > raw {
                out.clear();
                out.push(RAW);
                out.extend(self.words.iter().flat_map(|w| w.to_le_bytes()).take(raw));
                break;
            }
        }
        out
    }

    /// Reads the compact form of a bitmap of `blocks` blocks.
    ///
    /// # Errors
    /// If it is too large, cut short, or speaks of blocks that the disk lacks.
    pub fn decode(blocks: u64, data: &[u8]) -> Result<Self, BitmapError> {
        let mut out = Self::new(blocks)?;
        match data.split_first() {
            Some((&RUNS, mut rest)) => {
                let mut at = 0u64;
                while !rest.is_empty() {
                    let gap = take_number(&mut rest)?;
                    let len = take_number(&mut rest)?;
                    let start = at.checked_add(gap);
                    let end = start.and_then(|s| s.checked_add(len));
                    let (Some(start), Some(end)) = (start, end) else {
                        return Err(BitmapError::Damaged("a run is too long"));
                    };
                    if len == 0 || end > blocks {
                        return Err(BitmapError::Damaged("a run leaves the disk"));
                    }
                    out.set_range(start..end);
                    at = end;
                }
                Ok(out)
            }
            Some((&RAW, rest)) if rest.len() as u64 == blocks.div_ceil(8) => {
                for (word, bytes) in out.words.iter_mut().zip(rest.chunks(8)) {
                    let mut raw = [0; 8];
                    raw[..bytes.len()].copy_from_slice(bytes);
                    *word = u64::from_le_bytes(raw);
                    out.set += u64::from(word.count_ones());
                }
                match out.words.last() {
                    Some(last) if !blocks.is_multiple_of(64) && last >> (blocks % 64) != 0 => {
                        Err(BitmapError::Damaged("bits are set past the disk's end"))
                    }
                    _ => Ok(out),
                }
            }
            Some((&RAW, _)) => Err(BitmapError::Damaged("the raw bits have the wrong length")),
            _ => Err(BitmapError::Damaged("unknown form")),
        }
    }
}

fn put_number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take_number(data: &mut &[u8]) -> Result<u64, BitmapError> {
    let mut n = 0u64;
    for shift in (0..35).step_by(7) {
        let Some((byte, rest)) = data.split_first() else {
            return Err(BitmapError::Damaged("it ends within a number"));
        };
        *data = rest;
        n |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(n);
        }
    }
    Err(BitmapError::Damaged("a number is too long"))
}

impl fmt::Debug for BlockBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockBitmap({} of {} blocks)", self.set, self.blocks)
    }
}

impl Serialize for BlockBitmap {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        (self.blocks, Bytes::from(self.encode())).serialize(s)
    }
}

impl<'de> Deserialize<'de> for BlockBitmap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (blocks, data) = <(u64, Bytes)>::deserialize(d)?;
        Self::decode(blocks, &data).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(blocks: u64, set: &[u64]) -> BlockBitmap {
        let mut b = BlockBitmap::new(blocks).expect("small");
        for s in set {
            b.insert(*s);
        }
        b
    }

    #[test]
    fn an_allocated_image_is_a_few_bytes_on_the_wire() {
        let mut b = BlockBitmap::for_bytes(10 << 30).expect("10 GiB");
        for r in 0..100 {
            b.set_range(r * 20_000..r * 20_000 + 640);
        }
        assert!(b.encode().len() < 600, "{}", b.encode().len());
        assert_eq!(b.count(), 64_000);
    }

    #[test]
    fn hostile_forms_are_refused() {
        assert!(matches!(BlockBitmap::new(MAX_BLOCKS + 1), Err(BitmapError::TooLarge(_))));
        for bad in [&[][..], &[9], &[RUNS, 0], &[RUNS, 0, 0], &[RUNS, 0, 65], &[RAW, 0]] {
            assert!(BlockBitmap::decode(64, bad).is_err(), "{bad:?}");
        }
        assert!(BlockBitmap::decode(60, &[RAW, 0, 0, 0, 0, 0, 0, 0, 0xff]).is_err());
        assert!(BlockBitmap::decode(64, &[RUNS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err());
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(
            blocks in 1u64..400,
            ops in prop::collection::vec((any::<bool>(), 0u64..420, 0u64..90), 0..40),
        ) {
            let mut b = BlockBitmap::new(blocks).expect("small");
            let mut model = vec![false; blocks as usize];
            for (set, start, len) in ops {
                let r = start..start + len;
                for i in r.clone().filter(|i| *i < blocks) {
                    model[i as usize] = set;
                }
                if set { b.set_range(r) } else { b.clear_range(r) }
            }
            let want: Vec<u64> = (0..blocks).filter(|i| model[*i as usize]).collect();
            prop_assert_eq!(b.iter().collect::<Vec<_>>(), want.clone());
            prop_assert_eq!(b.count(), want.len() as u64);
            prop_assert_eq!(&of(blocks, &want), &b);
            for at in 0..blocks {
                prop_assert_eq!(b.rank(at), want.iter().filter(|w| **w < at).count() as u64);
            }
            prop_assert_eq!(&BlockBitmap::decode(blocks, &b.encode()).expect("own form"), &b);
            let wire = postcard::to_stdvec(&b).expect("encodes");
            prop_assert_eq!(&postcard::from_bytes::<BlockBitmap>(&wire).expect("decodes"), &b);
            let cut = b.slice(blocks / 3..blocks);
            prop_assert_eq!(cut.count(), b.count() - b.rank(blocks / 3));
        }

        #[test]
        fn random_bytes_never_panic(blocks in 0u64..5000, data in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(b) = BlockBitmap::decode(blocks, &data) {
                prop_assert!(b.iter().all(|i| i < blocks));
            }
        }
    }
}
