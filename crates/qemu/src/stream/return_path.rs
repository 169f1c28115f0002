//! The return path: what a destination QEMU tells the source.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::StreamError;
use super::parse::Peek;
use super::record::put_name;

/// PONG with this value: the destination has loaded every device and is about to run. It is the
/// commit point of a migration.
pub const PONG_COMMIT: u32 = 3;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
/// QEMU's own bound on a message's length.
const MAX_MESSAGE: u64 = 512;

/// One message of the return path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The destination is done; not 0 is an error.
    Shut(u32),
    /// Answer to PING.
    Pong(u32),
    /// Pages are wanted now.
    ReqPages {
        /// The block; `None` means that of the request before.
        block: Option<Bytes>,
        /// Offset in the block in bytes.
        start: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Which pages of a block have been received: bit per page, little-endian 64-bit words.
    RecvBitmap {
        /// The block.
        block: Bytes,
        /// The bitmap.
        bitmap: Bytes,
    },
    /// The destination is ready to go on after a break.
    ResumeAck(u32),
    /// The destination is ready to switch over.
    SwitchoverAck,
    /// A message that nothing here needs to understand.
    Other {
        /// Its type.
        kind: u16,
        /// Its payload.
        payload: Bytes,
    },
}

impl ReturnMessage {
    /// Appends the message's bytes: exactly those it was parsed from.
    pub fn encode(&self, out: &mut Vec<u8>) {
        fn head(out: &mut Vec<u8>, kind: u16, len: usize) {
            out.put_u16(kind);
            out.put_u16(u16::try_from(len).unwrap_or(u16::MAX));
        }
        match self {
            Self::Shut(value) => {
                head(out, SHUT, 4);
                out.put_u32(*value);
            }
            Self::Pong(value) => {
                head(out, PONG, 4);
                out.put_u32(*value);
            }
            Self::ReqPages { block: Some(block), start, len } => {
                head(out, REQ_PAGES_ID, 13 + block.len());
                out.put_u64(*start);
                out.put_u32(*len);
                put_name(out, block);
            }
            Self::ReqPages { block: None, start, len } => {
                head(out, REQ_PAGES, 12);
                out.put_u64(*start);
                out.put_u32(*len);
            }
            Self::RecvBitmap { block, bitmap } => {
                head(out, RECV_BITMAP, 1 + block.len());
                put_name(out, block);
                out.put_u64(bitmap.len() as u64);
                out.put_slice(bitmap);
                out.put_u64(BITMAP_END);
            }
            Self::ResumeAck(value) => {
                head(out, RESUME_ACK, 4);
                out.put_u32(*value);
            }
            Self::SwitchoverAck => head(out, SWITCHOVER_ACK, 0),
            Self::Other { kind, payload } => {
                head(out, *kind, payload.len());
                out.put_slice(payload);
            }
        }
    }
}

/// Incremental parser of a return path.
#[derive(Debug)]
pub struct ReturnPathParser {
    buf: BytesMut,
    at: u64,
    bitmap_limit: u64,
    failed: Option<StreamError>,
}

impl ReturnPathParser {
    /// A parser that accepts received-page bitmaps of at most `bitmap_limit` bytes (one bit a page).
    #[must_use]
    pub fn new(bitmap_limit: u64) -> Self {
        Self { buf: BytesMut::new(), at: 0, bitmap_limit, failed: None }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Bytes that have been pushed and not yet come out.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buf.len()
    }

    /// The next message, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`StreamError`] when the bytes are no return path; every further call returns the same.
    #[allow(clippy::should_implement_trait, reason = "an iterator ends at None; this waits")]
    pub fn next(&mut self) -> Result<Option<ReturnMessage>, StreamError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        let before = self.buf.len();
        let result = self.message();
        self.at += (before - self.buf.len()) as u64;
        if let Err(e) = &result {
            self.failed = Some(e.clone());
        }
        result
    }

    fn message(&mut self) -> Result<Option<ReturnMessage>, StreamError> {
        let at = self.at;
        let malformed = |what| StreamError::Malformed { at, what };
        let mut peek = Peek(&self.buf);
        let (Some(kind), Some(len)) = (peek.u16(), peek.u16()) else { return Ok(None) };
        if u64::from(len) > MAX_MESSAGE {
            let what = "a return path message";
            return Err(StreamError::TooLarge { at, what, len: len.into(), limit: MAX_MESSAGE });
        }
        let len = usize::from(len);
        let Some(mut body) = peek.take(len).map(Peek) else { return Ok(None) };
        let bad_length = malformed("a return path message's length does not fit it");
        let word =
            |mut body: Peek<'_>| body.u32().filter(|_| len == 4).ok_or_else(|| bad_length.clone());
        let message = match kind {
            SHUT => ReturnMessage::Shut(word(body)?),
            PONG => ReturnMessage::Pong(word(body)?),
            RESUME_ACK => ReturnMessage::ResumeAck(word(body)?),
            SWITCHOVER_ACK if len == 0 => ReturnMessage::SwitchoverAck,
            SWITCHOVER_ACK => return Err(bad_length),
            REQ_PAGES | REQ_PAGES_ID => {
                let (Some(start), Some(bytes)) = (body.u64(), body.u32()) else {
                    return Err(bad_length);
                };
                let block = if kind == REQ_PAGES_ID {
                    Some(Bytes::copy_from_slice(body.name().ok_or(bad_length.clone())?))
                } else {
                    None
                };
                if !body.0.is_empty() {
                    return Err(bad_length);
                }
                ReturnMessage::ReqPages { block, start, len: bytes }
            }
            RECV_BITMAP => {
                let name = body.name().filter(|n| n.len() + 1 == len).ok_or(bad_length)?;
                let Some(size) = peek.u64() else { return Ok(None) };
                if size > self.bitmap_limit {
                    let what = "a received-pages bitmap";
                    return Err(StreamError::TooLarge {
                        at,
                        what,
                        len: size,
                        limit: self.bitmap_limit,
                    });
                }
                let (Some(bits), Some(end)) = (peek.take(size as usize), peek.u64()) else {
                    return Ok(None);
                };
                if end != BITMAP_END {
                    return Err(malformed("a received-pages bitmap without its end mark"));
                }
                ReturnMessage::RecvBitmap {
                    block: Bytes::copy_from_slice(name),
                    bitmap: Bytes::copy_from_slice(bits),
                }
            }
            kind => ReturnMessage::Other { kind, payload: Bytes::copy_from_slice(body.0) },
        };
        let rest = peek.0.len();
        self.buf.advance(self.buf.len() - rest);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = ReturnMessage> {
        let name = || proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        prop_oneof![
            any::<u32>().prop_map(ReturnMessage::Shut),
            any::<u32>().prop_map(ReturnMessage::Pong),
            any::<u32>().prop_map(ReturnMessage::ResumeAck),
            Just(ReturnMessage::SwitchoverAck),
            (proptest::option::of(name()), any::<u64>(), any::<u32>())
                .prop_map(|(block, start, len)| ReturnMessage::ReqPages { block, start, len }),
            (name(), proptest::collection::vec(any::<u8>(), 0..100).prop_map(Bytes::from))
                .prop_map(|(block, bitmap)| ReturnMessage::RecvBitmap { block, bitmap }),
            (8u16.., name()).prop_map(|(kind, payload)| ReturnMessage::Other { kind, payload }),
        ]
    }

    proptest! {
        #[test]
        fn messages_survive_any_cutting_of_the_bytes(
            messages in proptest::collection::vec(message(), 0..20),
            cut in 1usize..60,
        ) {
            let mut wire = Vec::new();
            messages.iter().for_each(|m| m.encode(&mut wire));
            let mut parser = ReturnPathParser::new(1 << 20);
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                parser.push(piece);
                while let Some(m) = parser.next().expect("valid") {
                    seen.push(m);
                }
            }
            prop_assert_eq!(parser.pending(), 0);
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut parser = ReturnPathParser::new(64);
            parser.push(&noise);
            while let Ok(Some(_)) = parser.next() {}
        }
    }

    #[test]
    fn a_huge_bitmap_is_refused_before_it_is_held() {
        let mut parser = ReturnPathParser::new(16);
        parser.push(&[0, 5, 0, 2, 1, b'm']);
        parser.push(&17u64.to_be_bytes());
        let err = parser.next().expect_err("too large");
        assert!(matches!(err, StreamError::TooLarge { len: 17, limit: 16, .. }), "{err}");
    }
}
