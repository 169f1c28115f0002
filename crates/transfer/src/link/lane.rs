//! A lane: frames both ways over one QUIC stream.

use bytes::Bytes;

use super::{LaneError, STOP_UNKNOWN, from_connection};
use crate::link::error::STOP_PROTOCOL;
use crate::wire::{FrameDecoder, LaneHeader, LaneKind, WireError, frame_head};

/// How much is taken from QUIC at once, in bytes.
const READ_CHUNK: usize = 64 << 10;

/// Frames both ways. Dropping it ends the sending side in good order and stops the receiving
/// one.
#[derive(Debug)]
pub struct Lane {
    header: LaneHeader,
    sender: LaneSender,
    receiver: LaneReceiver,
}

/// The sending half of a [`Lane`].
#[derive(Debug)]
pub struct LaneSender {
    stream: quinn::SendStream,
}

/// The receiving half of a [`Lane`].
#[derive(Debug)]
pub struct LaneReceiver {
    stream: quinn::RecvStream,
    decoder: FrameDecoder,
}

impl Lane {
    pub(crate) fn new(
        header: LaneHeader,
        send: quinn::SendStream,
        recv: quinn::RecvStream,
    ) -> Self {
        // A closed stream shows at the first use.
        let _ = send.set_priority(i32::from(u8::from(header.priority)));
        Self {
            header,
            sender: LaneSender { stream: send },
            receiver: LaneReceiver { stream: recv, decoder: FrameDecoder::new() },
        }
    }

    /// Reads the header of a stream that the peer opened.
    pub(crate) async fn accept(
        mut send: quinn::SendStream,
        recv: quinn::RecvStream,
    ) -> Result<Self, LaneError> {
        let mut receiver = LaneReceiver { stream: recv, decoder: FrameDecoder::new() };
        let first = receiver.recv().await?.ok_or(LaneError::Ended)?;
        match LaneHeader::decode(&first) {
            Ok(header) => {
                let _ = send.set_priority(i32::from(u8::from(header.priority)));
                Ok(Self { header, sender: LaneSender { stream: send }, receiver })
            }
            Err(error) => {
                let _ = send.reset(STOP_UNKNOWN.into());
                let _ = receiver.stream.stop(STOP_UNKNOWN.into());
                Err(error.into())
            }
        }
    }

    /// What it carries.
    #[must_use]
    pub fn kind(&self) -> LaneKind {
        self.header.kind
    }

    /// Which job it belongs to.
    #[must_use]
    pub fn about(&self) -> &Bytes {
        &self.header.about
    }

    /// See [`LaneSender::send`].
    ///
    /// # Errors
    /// As there.
    pub async fn send(&mut self, frame: &[u8]) -> Result<(), LaneError> {
        self.sender.send(frame).await
    }

    /// See [`LaneSender::send_bytes`].
    ///
    /// # Errors
    /// As there.
    pub async fn send_bytes(&mut self, frame: Bytes) -> Result<(), LaneError> {
        self.sender.send_bytes(frame).await
    }

    /// See [`LaneReceiver::recv`].
    ///
    /// # Errors
    /// As there.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, LaneError> {
        self.receiver.recv().await
    }

    /// See [`LaneSender::finish`].
    ///
    /// # Errors
    /// As there.
    pub async fn finish(&mut self) -> Result<(), LaneError> {
        self.sender.finish().await
    }

    /// Both halves, to be used by two tasks.
    #[must_use]
    pub fn split(self) -> (LaneSender, LaneReceiver) {
        (self.sender, self.receiver)
    }

    /// Ends both directions at once, with a reason.
    pub(crate) fn refuse(mut self, code: u32) {
        let _ = self.sender.stream.reset(code.into());
        let _ = self.receiver.stream.stop(code.into());
    }

    /// Ends both directions at once; what is not delivered yet is lost.
    pub fn abort(self) {
        self.refuse(0);
    }
}

impl LaneSender {
    /// Hands one frame to the link; waits while its buffer is full. Must not be cancelled half
    /// way, or the lane is broken.
    ///
    /// # Errors
    /// [`LaneError::Wire`] for a frame over 1 MiB (nothing is sent), [`LaneError::Stopped`],
    /// [`LaneError::Link`].
    pub async fn send(&mut self, frame: &[u8]) -> Result<(), LaneError> {
        self.send_bytes(Bytes::copy_from_slice(frame)).await
    }

    /// As [`LaneSender::send`], without copying.
    ///
    /// # Errors
    /// As [`LaneSender::send`].
    pub async fn send_bytes(&mut self, frame: Bytes) -> Result<(), LaneError> {
        let head = Bytes::copy_from_slice(&frame_head(frame.len())?);
        self.stream.write_all_chunks(&mut [head, frame]).await.map_err(write_error)
    }

    /// Ends this direction and waits until the peer has all of it.
    ///
    /// # Errors
    /// [`LaneError::Stopped`], [`LaneError::Link`]: then it is not known what arrived.
    pub async fn finish(&mut self) -> Result<(), LaneError> {
        // Fails only when ended before, which the wait below reports.
        let _ = self.stream.finish();
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(LaneError::Stopped(small(code))),
            Err(quinn::StoppedError::ConnectionLost(e)) => Err(from_connection(e, None).into()),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(LaneError::Ended),
        }
    }

    /// Ends this direction without waiting; the link still delivers what it holds.
    pub fn end(&mut self) {
        let _ = self.stream.finish();
    }

    /// Waits until the peer takes no more (it dropped or stopped its receiving half) or the link
    /// is gone.
    pub async fn stopped(&mut self) {
        let _ = self.stream.stopped().await;
    }
}

impl LaneReceiver {
    /// The next frame; `None` when the peer ended the lane in good order. Safe to cancel.
    ///
    /// # Errors
    /// [`LaneError::Wire`] for an oversized or cut frame, after which the lane is stopped;
    /// [`LaneError::Stopped`] when the peer gave the lane up; [`LaneError::Link`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, LaneError> {
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(error) => return Err(self.broken(error)),
            }
            match self.stream.read_chunk(READ_CHUNK, true).await {
                Ok(Some(chunk)) => self.decoder.push(&chunk.bytes),
                Ok(None) => {
                    return match self.decoder.finish() {
                        Ok(()) => Ok(None),
                        Err(error) => Err(self.broken(error)),
                    };
                }
                Err(quinn::ReadError::Reset(code)) => {
                    return Err(LaneError::Stopped(small(code)));
                }
                Err(quinn::ReadError::ConnectionLost(e)) => {
                    return Err(from_connection(e, None).into());
                }
                Err(_) => return Err(LaneError::Ended),
            }
        }
    }

    fn broken(&mut self, error: WireError) -> LaneError {
        let _ = self.stream.stop(STOP_PROTOCOL.into());
        error.into()
    }

    /// Tells the peer that no more is taken.
    pub fn stop(&mut self) {
        let _ = self.stream.stop(0u32.into());
    }
}

fn small(code: quinn::VarInt) -> u32 {
    u32::try_from(code.into_inner()).unwrap_or(u32::MAX)
}

fn write_error(error: quinn::WriteError) -> LaneError {
    match error {
        quinn::WriteError::Stopped(code) => LaneError::Stopped(small(code)),
        quinn::WriteError::ConnectionLost(e) => from_connection(e, None).into(),
        _ => LaneError::Ended,
    }
}
