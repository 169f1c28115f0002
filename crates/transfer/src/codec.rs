//! Compression of bulk: raw, lz4 or zstd level 1, whichever is worth its time.
//!
//! A packed unit is one byte of [`Coding`] followed by the coded bytes; the reader knows the raw
//! length from elsewhere (a unit's size, a length in the message) and never produces more.

use bytes::{BufMut, Bytes, BytesMut};
use godwit_types::{Code, CodedError};

/// How a unit is coded. The number is the wire form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Coding {
    /// As it is.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
}

/// Bytes that do not unpack to what was announced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The unit has not even a coding byte.
    #[error("a packed unit is empty")]
    Empty,
    /// A coding that this build does not know.
    #[error("a packed unit has the unknown coding {0}")]
    UnknownCoding(u8),
    /// The unit unpacks to another length than announced, or not at all.
    #[error("a packed unit ({coding:?}) does not unpack to {wanted} bytes")]
    WrongLength {
        /// Its coding.
        coding: Coding,
        /// The announced length in bytes.
        wanted: usize,
    },
    /// More is announced than the caller allows.
    #[error("a packed unit of {wanted} bytes is over the limit of {limit}")]
    OverLimit {
        /// The announced length in bytes.
        wanted: usize,
        /// The limit in bytes.
        limit: usize,
    },
}

impl CodedError for CodecError {
    fn code(&self) -> Code {
        Code::Damaged
    }
}

/// Packs units; keeps its working memory between calls.
pub struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("zstd", &self.zstd.is_some()).finish_non_exhaustive()
    }
}

impl Default for Packer {
    fn default() -> Self {
        Self::new()
    }
}

/// A unit shorter than this many bytes is sent raw: the gain cannot pay for its handling.
const WORTH_TRYING: usize = 64;

impl Packer {
    /// Makes a packer. Where zstd cannot be set up, lz4 alone is used.
    #[must_use]
    pub fn new() -> Self {
        Self { zstd: zstd::bulk::Compressor::new(1).ok(), scratch: Vec::new() }
    }

    /// Packs `raw`. lz4 first, as a probe: when it finds nothing (less than 1/16 saved), the
    /// unit goes raw; otherwise zstd level 1 is tried too, and kept when it saves at least 1/16
    /// more than lz4.
    pub fn pack(&mut self, raw: &[u8]) -> Bytes {
        self.pack_with_coding(raw).1
    }

    /// As [`Packer::pack`], and tells which coding was chosen.
    pub fn pack_with_coding(&mut self, raw: &[u8]) -> (Coding, Bytes) {
        if raw.len() < WORTH_TRYING {
            return (Coding::Raw, tagged(Coding::Raw, raw));
        }
        let bound = lz4_flex::block::get_maximum_output_size(raw.len());
        self.scratch.resize(bound, 0);
        let lz4 = match lz4_flex::block::compress_into(raw, &mut self.scratch) {
            Ok(n) if n + raw.len() / 16 < raw.len() => n,
            _ => return (Coding::Raw, tagged(Coding::Raw, raw)),
        };
        let packed = tagged(Coding::Lz4, &self.scratch[..lz4]);
        if let Some(zstd) = &mut self.zstd {
            // Room for no more than would be worth taking: a worse result fails at once.
            let room = lz4 - lz4 / 16;
            if self.scratch.len() < room {
                self.scratch.resize(room, 0);
            }
            if let Ok(n) = zstd.compress_to_buffer(raw, &mut self.scratch[..room]) {
                return (Coding::Zstd, tagged(Coding::Zstd, &self.scratch[..n]));
            }
        }
        (Coding::Lz4, packed)
    }
}

fn tagged(coding: Coding, bytes: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + bytes.len());
    out.put_u8(coding as u8);
    out.extend_from_slice(bytes);
    out.freeze()
}

/// Unpacks a unit that is announced to have `raw_len` bytes, at most `limit`. No more than
/// `raw_len` bytes are ever produced, whatever `packed` says.
///
/// # Errors
/// [`CodecError`]; the content is checked by the caller against its hash.
pub fn unpack(packed: &Bytes, raw_len: usize, limit: usize) -> Result<Bytes, CodecError> {
    if raw_len > limit {
        return Err(CodecError::OverLimit { wanted: raw_len, limit });
    }
    let (&tag, body) = packed.split_first().ok_or(CodecError::Empty)?;
    let wrong = |coding| CodecError::WrongLength { coding, wanted: raw_len };
    match tag {
        0 if body.len() == raw_len => Ok(packed.slice(1..)),
        0 => Err(wrong(Coding::Raw)),
        1 => {
            let mut out = vec![0; raw_len];
            match lz4_flex::block::decompress_into(body, &mut out) {
                Ok(n) if n == raw_len => Ok(out.into()),
                _ => Err(wrong(Coding::Lz4)),
            }
        }
        2 => {
            // Made once a thread: to make one takes longer than to unpack a page.
            thread_local! {
                static ZSTD: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
                    const { std::cell::RefCell::new(None) };
            }
            let mut out = vec![0; raw_len];
            let unpacked = ZSTD.with_borrow_mut(|z| {
                if z.is_none() {
                    *z = Some(zstd::bulk::Decompressor::new()?);
                }
                z.as_mut().map_or(Ok(0), |z| z.decompress_to_buffer(body, &mut out))
            });
            match unpacked {
                Ok(n) if n == raw_len => Ok(out.into()),
                _ => Err(wrong(Coding::Zstd)),
            }
        }
        other => Err(CodecError::UnknownCoding(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(n: usize) -> Vec<u8> {
        (0..n).map(|i| b"the quick brown fox "[(i * i / 7) % 20]).collect()
    }

    fn noise(n: usize) -> Vec<u8> {
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect()
    }

    #[test]
    fn what_does_not_shrink_goes_raw_and_the_rest_shrinks() {
        let mut p = Packer::new();
        assert_eq!(p.pack_with_coding(&noise(4096)).0, Coding::Raw);
        let (coding, packed) = p.pack_with_coding(&text(4096));
        assert_ne!(coding, Coding::Raw);
        assert!(packed.len() < 2048, "{}", packed.len());
        assert_eq!(p.pack_with_coding(b"short").0, Coding::Raw);
    }

    #[test]
    fn a_bomb_makes_no_more_than_was_announced() {
        let bomb =
            tagged(Coding::Zstd, &zstd::bulk::compress(&vec![0; 64 << 20], 1).expect("zstd"));
        assert!(matches!(unpack(&bomb, 4096, 4096), Err(CodecError::WrongLength { .. })));
        assert!(matches!(unpack(&bomb, 64 << 20, 1 << 20), Err(CodecError::OverLimit { .. })));
        let bomb = tagged(Coding::Lz4, &lz4_flex::block::compress(&vec![0; 1 << 20]));
        assert!(matches!(unpack(&bomb, 4096, 4096), Err(CodecError::WrongLength { .. })));
    }

    proptest! {
        #[test]
        fn packing_loses_nothing(
            seed in proptest::collection::vec(any::<u8>(), 0..500), repeat in 1usize..20,
        ) {
            let raw: Vec<u8> = seed.iter().copied().cycle().take(seed.len() * repeat).collect();
            let packed = Packer::new().pack(&raw);
            prop_assert!(packed.len() <= raw.len() + 1);
            prop_assert_eq!(&unpack(&packed, raw.len(), 1 << 20).expect("unpacks")[..], &raw[..]);
        }

        #[test]
        fn hostile_units_never_panic(
            packed in proptest::collection::vec(any::<u8>(), 0..200), n in 0usize..5000,
        ) {
            let _ = unpack(&packed.into(), n, 4096);
        }
    }
}
