//! Which unit stands where: the memory of a machine, or the blocks that a disk layer holds.
//!
//! File form (little-endian, `v` a LEB128 number):
//!
//! ```text
//! "GWPM" u16 version(1) u64 units | v runs | runs x { v gap, v length } | hashes, 32 bytes each
//! | 32 bytes BLAKE3 of all before
//! ```

use godwit_types::Hash;

use crate::zero_hash;

const MAGIC: &[u8; 4] = b"GWPM";
const VERSION: u16 = 1;

/// A file that is not a page map, or one that this site will not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageMapError {
    /// Not a page map at all.
    #[error("not a page map")]
    Foreign,
    /// Written by another version.
    #[error("page map version {0} is not known here (1 is)")]
    Version(u16),
    /// Its checksum does not match: cut or changed.
    #[error("the page map is truncated or changed: its checksum does not match")]
    Checksum,
    /// The checksum matches, but the content contradicts itself.
    #[error("the page map contradicts itself")]
    Malformed,
    /// It describes more than allowed.
    #[error("the page map describes {units} units, at most {max} are allowed here")]
    TooLarge {
        /// Units it describes.
        units: u64,
        /// Units allowed.
        max: u64,
    },
}

impl godwit_types::CodedError for PageMapError {
    fn code(&self) -> godwit_types::Code {
        match self {
            Self::Foreign | Self::Version(_) | Self::TooLarge { .. } => godwit_types::Code::Invalid,
            Self::Checksum | Self::Malformed => godwit_types::Code::Damaged,
        }
    }
}

/// The units of a memory or of a disk layer by number. A number without an entry is the zero page
/// in a memory, and a block that shows the layer below in a disk layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageMap {
    units: u64,
    /// Sorted by number, each number once and below `units`.
    entries: Vec<(u64, Hash)>,
}

impl PageMap {
    /// An empty map of `units` units.
    #[must_use]
    pub const fn new(units: u64) -> Self {
        Self { units, entries: Vec::new() }
    }

    /// A map of a memory from the hashes of its pages in order; zero pages get no entry.
    #[must_use]
    pub fn of_memory(hashes: &[Hash]) -> Self {
        let zero = zero_hash();
        let entries = (0..).zip(hashes.iter().copied()).filter(|(_, h)| *h != zero).collect();
        Self { units: hashes.len() as u64, entries }
    }

    /// Adds an entry behind all others.
    ///
    /// # Errors
    /// [`PageMapError::Malformed`] when `number` is not above the last one and below the size.
    pub fn push(&mut self, number: u64, hash: Hash) -> Result<(), PageMapError> {
        if number >= self.units || self.entries.last().is_some_and(|(last, _)| *last >= number) {
            return Err(PageMapError::Malformed);
        }
        self.entries.push((number, hash));
        Ok(())
    }

    /// Number of units, with and without an entry.
    #[must_use]
    pub const fn units(&self) -> u64 {
        self.units
    }

    /// The entries, sorted by number.
    #[must_use]
    pub fn entries(&self) -> &[(u64, Hash)] {
        &self.entries
    }

    /// The entry of unit `number`.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Hash> {
        let at = self.entries.binary_search_by_key(&number, |(n, _)| *n).ok()?;
        Some(self.entries[at].1)
    }

    /// The file form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut next = 0;
        for &(n, _) in &self.entries {
            match runs.last_mut() {
                Some((_, len)) if n == next => *len += 1,
                _ => runs.push((n - next, 1)),
            }
            next = n + 1;
        }
        let mut out = Vec::with_capacity(64 + runs.len() * 4 + self.entries.len() * 32);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.units.to_le_bytes());
        put_varint(&mut out, runs.len() as u64);
        for (gap, len) in runs {
            put_varint(&mut out, gap);
            put_varint(&mut out, len);
        }
        for (_, h) in &self.entries {
            out.extend_from_slice(&h.0);
        }
        let sum = Hash::of(&out);
        out.extend_from_slice(&sum.0);
        out
    }

    /// Reads the file form. Memory use is bounded by the length of `file`; `max_units` bounds
    /// what the map may describe.
    ///
    /// # Errors
    /// [`PageMapError`], by what is wrong.
    pub fn decode(file: &[u8], max_units: u64) -> Result<Self, PageMapError> {
        let (all, sum) = file.split_last_chunk::<32>().ok_or(PageMapError::Foreign)?;
        let body = all.strip_prefix(MAGIC).ok_or(PageMapError::Foreign)?;
        let (version, body) = body.split_first_chunk::<2>().ok_or(PageMapError::Foreign)?;
        let version = u16::from_le_bytes(*version);
        if version != VERSION {
            return Err(PageMapError::Version(version));
        }
        if Hash::of(all).0 != *sum {
            return Err(PageMapError::Checksum);
        }
        Self::decode_body(body, max_units)
    }

    fn decode_body(body: &[u8], max: u64) -> Result<Self, PageMapError> {
        let bad = PageMapError::Malformed;
        let (units, mut body) = body.split_first_chunk::<8>().ok_or(bad.clone())?;
        let units = u64::from_le_bytes(*units);
        if units > max {
            return Err(PageMapError::TooLarge { units, max });
        }
        let runs = take_varint(&mut body).ok_or(bad.clone())?;
        // Each run takes at least two bytes of head and one hash.
        if runs > body.len() as u64 / 34 {
            return Err(bad);
        }
        let mut spans = Vec::with_capacity(runs as usize);
        let (mut next, mut total) = (0u64, 0u64);
        for _ in 0..runs {
            let gap = take_varint(&mut body).ok_or(bad.clone())?;
            let len = take_varint(&mut body).ok_or(bad.clone())?;
            let first = next.checked_add(gap).ok_or(bad.clone())?;
            next = first.checked_add(len).filter(|n| *n <= units && len > 0).ok_or(bad.clone())?;
            total += len;
            spans.push(first..next);
        }
        let (hashes, rest) = body.as_chunks::<32>();
        if !rest.is_empty() || hashes.len() as u64 != total {
            return Err(bad);
        }
        let entries = spans.into_iter().flatten().zip(hashes.iter().map(|h| Hash(*h))).collect();
        Ok(Self { units, entries })
    }
}

fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take_varint(from: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = from.split_first()?;
        *from = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        n |= bits << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> PageMap {
        let mut m = PageMap::new(1 << 20);
        for n in [0, 1, 2, 700, 701, (1 << 20) - 1] {
            m.push(n, Hash::of(&[n as u8])).expect("in order");
        }
        m
    }

    #[test]
    fn a_flipped_bit_a_cut_and_another_file_are_distinguished() {
        let file = sample().encode();
        assert!(file.len() < 300, "compact: {}", file.len());
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(PageMap::decode(&bad, u64::MAX).is_err(), "byte {at}");
        }
        assert_eq!(PageMap::decode(&file[..file.len() - 1], u64::MAX), Err(PageMapError::Checksum));
        assert_eq!(PageMap::decode(&[0; 100], u64::MAX), Err(PageMapError::Foreign));
        assert_eq!(
            PageMap::decode(&file, 100),
            Err(PageMapError::TooLarge { units: 1 << 20, max: 100 })
        );
    }

    #[test]
    fn entries_must_rise() {
        let mut m = PageMap::new(10);
        m.push(3, zero_hash()).expect("first");
        assert!(m.push(3, zero_hash()).is_err());
        assert!(m.push(10, zero_hash()).is_err());
        assert_eq!(m.get(3), Some(zero_hash()));
        assert_eq!(m.get(4), None);
    }

    proptest! {
        #[test]
        fn the_file_form_round_trips(mut numbers in proptest::collection::btree_set(0u64..5000, 0..300)) {
            numbers.insert(4999);
            let mut m = PageMap::new(5000);
            for n in numbers {
                m.push(n, Hash::of(&n.to_le_bytes())).expect("in order");
            }
            prop_assert_eq!(PageMap::decode(&m.encode(), 5000), Ok(m));
        }

        #[test]
        fn hostile_files_never_panic(body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut file = [&MAGIC[..], &VERSION.to_le_bytes(), &body].concat();
            let sum = Hash::of(&file);
            file.extend_from_slice(&sum.0);
            if let Ok(m) = PageMap::decode(&file, 1 << 20) {
                prop_assert!(m.units() <= 1 << 20);
            }
        }
    }
}
