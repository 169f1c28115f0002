//! Frames of the memory lanes: what they hold, and their raw length before packing.

use bytes::{BufMut, Bytes, BytesMut};
use godwit_transfer::codec::{CodecError, Packer, unpack};

/// The most raw bytes in one frame.
pub(crate) const MAX_RAW: usize = 512 << 10;

/// What the bytes of a frame are, for the accounts; the bytes themselves are QEMU's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Page records and what belongs to them.
    Memory = 1,
    /// Device state.
    Device = 2,
    /// The preempt channel is open; no bytes.
    Open = 3,
    /// As `Memory`, with pages that the destination holds ([`super::known`]); since version 3.
    Referring = 4,
    /// Pages that the destination puts into memory itself ([`super::fill`]).
    Fill = 5,
    /// Pages that are still to come ([`super::fill`]).
    Stale = 6,
}

/// A frame that is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a memory frame is too short")]
    Short,
    #[error("a memory frame has the unknown kind {0}")]
    Kind(u8),
    #[error("unpacking a memory frame")]
    Codec(#[source] CodecError),
}

pub(crate) fn seal(packer: &mut Packer, kind: Kind, raw: &[u8]) -> Bytes {
    let packed = packer.pack(raw);
    let mut out = BytesMut::with_capacity(5 + packed.len());
    out.put_u8(kind as u8);
    out.put_u32(raw.len() as u32);
    out.extend_from_slice(&packed);
    out.freeze()
}

pub(crate) fn open(frame: &Bytes) -> Result<(Kind, Bytes), FrameError> {
    let (head, _) = frame.split_first_chunk::<5>().ok_or(FrameError::Short)?;
    let kind = match head[0] {
        1 => Kind::Memory,
        2 => Kind::Device,
        3 => Kind::Open,
        4 => Kind::Referring,
        5 => Kind::Fill,
        6 => Kind::Stale,
        other => return Err(FrameError::Kind(other)),
    };
    let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let raw = unpack(&frame.slice(5..), len, MAX_RAW).map_err(FrameError::Codec)?;
    Ok((kind, raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_opens_to_what_was_sealed_and_nothing_larger() {
        let mut packer = Packer::new();
        for (kind, raw) in
            [(Kind::Memory, vec![7u8; 70_000]), (Kind::Device, vec![]), (Kind::Open, vec![])]
        {
            let frame = seal(&mut packer, kind, &raw);
            let (k, r) = open(&frame).expect("opens");
            assert_eq!((k, r.as_ref()), (kind, raw.as_slice()));
        }
        let big = seal(&mut packer, Kind::Memory, &vec![0; MAX_RAW + 1]);
        assert!(open(&big).is_err());
        assert!(open(&Bytes::from_static(&[9, 0, 0, 0, 0, 0])).is_err());
        assert!(open(&Bytes::from_static(&[1, 0])).is_err());
    }
}
