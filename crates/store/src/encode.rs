//! Encodings of one unit.
//!
//! The rule (its thresholds are not tuned by measurement): a unit of few runs becomes RLE,
//! which is the fastest to undo; the rest goes through lz4 while somebody waits ([`Effort::Fast`])
//! and through zstd when nobody does ([`Effort::Small`]); what does not shrink by a sixteenth
//! stays raw.
//!
//! RLE body: tokens of a little-endian `u16`, low 15 bits a count n in 8-byte words (n >= 1), top
//! bit set: one word follows and stands n times, clear: n words follow.

use serde::{Deserialize, Serialize};

use crate::UNIT;

/// How a unit's bytes are held or sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Encoding {
    /// All zero; no body.
    Zero = 0,
    /// As it is.
    Raw = 1,
    /// Runs of 8-byte words.
    Rle = 2,
    /// An lz4 block.
    Lz4 = 3,
    /// A zstd frame.
    Zstd = 4,
}

impl Encoding {
    /// The encoding with this number.
    #[must_use]
    pub const fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Rle,
            3 => Self::Lz4,
            4 => Self::Zstd,
            _ => return None,
        })
    }
}

/// What an encoder may spend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Somebody waits: lz4.
    Fast,
    /// Nobody waits: zstd.
    Small,
}

/// A body that is not what its encoding and length say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0:?} body")]
pub struct DecodeError(pub Encoding);

/// The longest RLE body that is taken in place of a stronger encoding, in bytes.
const RLE_LIMIT: usize = 384;
/// The level of zstd for [`Effort::Small`].
const ZSTD_LEVEL: i32 = 3;

/// Encodes units; holds the tables that are costly to make.
pub struct Encoder {
    effort: Effort,
    lz4: lz4_flex::block::CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("effort", &self.effort).finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder that spends `effort` on each unit.
    #[must_use]
    pub fn new(effort: Effort) -> Self {
        Self {
            effort,
            lz4: lz4_flex::block::CompressTable::small(),
            zstd: match effort {
                Effort::Fast => None,
                Effort::Small => zstd::bulk::Compressor::new(ZSTD_LEVEL).ok(),
            },
            scratch: vec![0; lz4_flex::block::get_maximum_output_size(UNIT)],
        }
    }

    /// Appends the encoded form of `unit` (1 to 4096 bytes) to `out` and says which it is.
    pub fn encode(&mut self, unit: &[u8], out: &mut Vec<u8>) -> Encoding {
        if crate::is_zero(unit) {
            return Encoding::Zero;
        }
        if rle_encode(unit, out) {
            return Encoding::Rle;
        }
        let worth = unit.len() - unit.len() / 16;
        let (n, encoding) = self.squeeze(unit);
        if n < worth {
            out.extend_from_slice(&self.scratch[..n]);
            encoding
        } else {
            out.extend_from_slice(unit);
            Encoding::Raw
        }
    }

    fn squeeze(&mut self, unit: &[u8]) -> (usize, Encoding) {
        if let Some(z) = &mut self.zstd
            && let Ok(n) = z.compress_to_buffer(unit, &mut self.scratch[..])
        {
            return (n, Encoding::Zstd);
        }
        match lz4_flex::block::compress_into_with_table(unit, &mut self.scratch, &mut self.lz4) {
            Ok(n) => (n, Encoding::Lz4),
            Err(_) => (usize::MAX, Encoding::Raw),
        }
    }
}

/// Decodes `body` into `out`, which must have the unit's exact length (at most 4096 bytes).
///
/// # Errors
/// [`DecodeError`] when the body is not one of that encoding and length.
pub fn decode(encoding: Encoding, body: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let bad = DecodeError(encoding);
    let whole = |n: usize, out: &[u8]| if n == out.len() { Ok(()) } else { Err(bad) };
    match encoding {
        Encoding::Zero if body.is_empty() => {
            out.fill(0);
            Ok(())
        }
        Encoding::Raw if body.len() == out.len() => {
            out.copy_from_slice(body);
            Ok(())
        }
        Encoding::Zero | Encoding::Raw => Err(bad),
        Encoding::Rle => rle_decode(body, out).ok_or(bad),
        Encoding::Lz4 => {
            let n = lz4_flex::block::decompress_into(body, out).map_err(|_| bad)?;
            whole(n, out)
        }
        Encoding::Zstd => {
            thread_local! {
                static ZSTD: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
                    const { std::cell::RefCell::new(None) };
            }
            let n = ZSTD.with_borrow_mut(|z| {
                if z.is_none() {
                    *z = zstd::bulk::Decompressor::new().ok();
                }
                z.as_mut().ok_or(bad)?.decompress_to_buffer(body, out).map_err(|_| bad)
            })?;
            whole(n, out)
        }
    }
}

/// Appends the RLE form if it stays within the limit; leaves `out` as it was otherwise.
fn rle_encode(unit: &[u8], out: &mut Vec<u8>) -> bool {
    let (words, rest) = unit.as_chunks::<8>();
    if !rest.is_empty() {
        return false;
    }
    let start = out.len();
    let mut i = 0;
    while i < words.len() {
        let mut j = i + 1;
        while j < words.len() && words[j] == words[i] {
            j += 1;
        }
        if j - i >= 2 {
            out.extend_from_slice(&(0x8000 | (j - i) as u16).to_le_bytes());
            out.extend_from_slice(&words[i]);
            i = j;
        } else {
            // A literal ends where the next run of at least two words begins.
            while j < words.len() && (j + 1 == words.len() || words[j] != words[j + 1]) {
                j += 1;
                if out.len() - start + (j - i) * 8 > RLE_LIMIT {
                    out.truncate(start);
                    return false;
                }
            }
            out.extend_from_slice(&((j - i) as u16).to_le_bytes());
            out.extend_from_slice(words[i..j].as_flattened());
            i = j;
        }
        if out.len() - start > RLE_LIMIT {
            out.truncate(start);
            return false;
        }
    }
    true
}

fn rle_decode(mut body: &[u8], out: &mut [u8]) -> Option<()> {
    let (mut words, rest) = out.as_chunks_mut::<8>();
    if !rest.is_empty() {
        return None;
    }
    while let Some((token, after)) = body.split_first_chunk::<2>() {
        let token = u16::from_le_bytes(*token);
        let n = usize::from(token & 0x7fff);
        if n == 0 || n > words.len() {
            return None;
        }
        let (now, later) = words.split_at_mut(n);
        if token & 0x8000 != 0 {
            let (word, after) = after.split_first_chunk::<8>()?;
            now.fill(*word);
            body = after;
        } else {
            let (bytes, after) = after.split_at_checked(n * 8)?;
            now.as_flattened_mut().copy_from_slice(bytes);
            body = after;
        }
        words = later;
    }
    (body.is_empty() && words.is_empty()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(unit: &[u8], effort: Effort) -> Encoding {
        let mut body = vec![7];
        let e = Encoder::new(effort).encode(unit, &mut body);
        let mut out = vec![0xaa; unit.len()];
        decode(e, &body[1..], &mut out).expect("own body decodes");
        assert_eq!(out, unit);
        e
    }

    #[test]
    fn each_kind_of_unit_gets_its_encoding() {
        let mut sparse = [0u8; UNIT];
        sparse[1000..1024].copy_from_slice(b"somewhere in the middle!");
        let text: Vec<u8> = b"the guest wrote this line, number 42\n"
            .iter()
            .copied()
            .cycle()
            .enumerate()
            .map(|(i, b)| if i % 37 == 36 { (i / 37) as u8 } else { b })
            .take(UNIT)
            .collect();
        let noise: Vec<u8> = (0..UNIT as u32)
            .map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes().first().expect("byte"))
            .collect();
        assert_eq!(round_trip(&[0; UNIT], Effort::Fast), Encoding::Zero);
        assert_eq!(round_trip(&[9; UNIT], Effort::Fast), Encoding::Rle);
        assert_eq!(round_trip(&sparse, Effort::Fast), Encoding::Rle);
        assert_eq!(round_trip(&text, Effort::Fast), Encoding::Lz4);
        assert_eq!(round_trip(&text, Effort::Small), Encoding::Zstd);
        assert_eq!(round_trip(&noise, Effort::Fast), Encoding::Raw);
        assert_eq!(round_trip(&noise, Effort::Small), Encoding::Raw);
        assert_eq!(round_trip(b"x", Effort::Small), Encoding::Raw);
    }

    fn units() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            (any::<[u8; 8]>(), 1usize..300).prop_map(|(w, n)| w.repeat(n)),
            proptest::collection::vec(any::<u8>(), 0..600),
        ];
        proptest::collection::vec(piece, 1..12).prop_map(|p| {
            let mut all = p.concat();
            all.resize(all.len().clamp(1, UNIT), 0);
            all
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(unit in units(), small: bool) {
            round_trip(&unit, if small { Effort::Small } else { Effort::Fast });
            let mut full = unit;
            full.resize(UNIT, 0);
            round_trip(&full, if small { Effort::Small } else { Effort::Fast });
        }

        #[test]
        fn hostile_bodies_never_panic(n in 0u8..5, body in proptest::collection::vec(any::<u8>(), 0..600), len in 0usize..=UNIT) {
            let e = Encoding::from_u8(n).expect("known");
            let mut out = vec![0; len];
            let _ = decode(e, &body, &mut out);
        }
    }
}
