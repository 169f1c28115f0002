//! A bulk lane that keeps no more in flight than the path holds.
//!
//! The receiving side answers with the number of bytes that it has taken, one small frame for
//! each 16 KiB; the sending side feeds them to a [`Window`]. A lane used in this way carries
//! nothing else in that direction.

use bytes::Bytes;
use futures::FutureExt;
use tokio::time::Instant;

use super::{Lane, LaneError, LaneReceiver, LaneSender};
use crate::window::{Window, WindowConfig};
use crate::wire::WireError;

/// An acknowledgement goes out when this many bytes came since the last one.
const ACK_EVERY: u64 = 16 << 10;
/// The length before each frame's payload, in bytes.
const FRAME_HEAD: u64 = 4;

/// Sends bulk at the pace of the path.
#[derive(Debug)]
pub struct BulkSender {
    sender: LaneSender,
    acks: LaneReceiver,
    window: Window,
    began: Instant,
    sent: u64,
}

/// Receives bulk and acknowledges it.
#[derive(Debug)]
pub struct BulkReceiver {
    receiver: LaneReceiver,
    acks: LaneSender,
    taken: u64,
    acked: u64,
}

impl BulkSender {
    /// Paces `lane`, whose other end must be a [`BulkReceiver`].
    #[must_use]
    pub fn new(lane: Lane, config: WindowConfig) -> Self {
        let (sender, acks) = lane.split();
        Self { sender, acks, window: Window::new(config), began: Instant::now(), sent: 0 }
    }

    /// Sends one frame once the window has room for it (a frame goes out whole: one larger than
    /// the window goes when nothing is in flight). Must not be cancelled half way.
    ///
    /// # Errors
    /// As [`LaneSender::send_bytes`].
    pub async fn send(&mut self, frame: Bytes) -> Result<(), LaneError> {
        self.ready(frame.len()).await?;
        self.put(frame).await
    }

    /// Waits until a frame of `bytes` may go. Safe to cancel: whoever waits here may choose
    /// again what to send.
    ///
    /// # Errors
    /// As [`LaneReceiver::recv`].
    pub async fn ready(&mut self, bytes: usize) -> Result<(), LaneError> {
        let bytes = bytes as u64 + FRAME_HEAD;
        // What has come is taken at once, so that its time is right.
        while let Some(ack) = self.acks.recv().now_or_never() {
            self.take_ack(ack?)?;
        }
        if self.window.in_flight() < ACK_EVERY {
            self.window.on_starved();
        }
        // The last bytes below ACK_EVERY are not acknowledged, so nothing may wait for them.
        while self.window.in_flight() >= ACK_EVERY && self.window.room() < bytes {
            let ack = self.acks.recv().await?;
            self.take_ack(ack)?;
        }
        Ok(())
    }

    /// Sends one frame without asking the window.
    ///
    /// # Errors
    /// As [`LaneSender::send_bytes`].
    pub async fn put(&mut self, frame: Bytes) -> Result<(), LaneError> {
        let bytes = frame.len() as u64 + FRAME_HEAD;
        self.window.on_sent(bytes, self.began.elapsed());
        self.sent += bytes;
        self.sender.send_bytes(frame).await
    }

    fn take_ack(&mut self, ack: Option<Bytes>) -> Result<(), LaneError> {
        let ack = ack.ok_or(LaneError::Ended)?;
        let total = <[u8; 8]>::try_from(&ack[..])
            .map(u64::from_le_bytes)
            .map_err(|_| WireError::Bounds { what: "acknowledgement", why: "it has 8 bytes" })?;
        if total > self.sent {
            return Err(WireError::Bounds {
                what: "acknowledgement",
                why: "it names more bytes than were sent",
            }
            .into());
        }
        self.window.on_acked(total, self.began.elapsed());
        Ok(())
    }

    /// What is known about the path.
    #[must_use]
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Ends the lane and waits until the peer has all of it.
    ///
    /// # Errors
    /// As [`LaneSender::finish`].
    pub async fn finish(mut self) -> Result<(), LaneError> {
        self.sender.finish().await
    }
}

impl BulkReceiver {
    /// Receives from `lane`, whose other end must be a [`BulkSender`].
    #[must_use]
    pub fn new(lane: Lane) -> Self {
        let (acks, receiver) = lane.split();
        Self { receiver, acks, taken: 0, acked: 0 }
    }

    /// The next frame; `None` at the end. The frame before counts as taken.
    ///
    /// # Errors
    /// As [`LaneReceiver::recv`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, LaneError> {
        let Some(frame) = self.receiver.recv().await? else { return Ok(None) };
        self.taken += frame.len() as u64 + FRAME_HEAD;
        if self.taken - self.acked >= ACK_EVERY {
            self.acked = self.taken;
            match self.acks.send_bytes(Bytes::copy_from_slice(&self.taken.to_le_bytes())).await {
                // A sender that has sent all it had no longer listens.
                Ok(()) | Err(LaneError::Stopped(_) | LaneError::Ended) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(frame))
    }
}
