//! What relays say to each other on the steering lane.

use std::time::Duration;

use bytes::Bytes;
use godwit_transfer::wire::{decode, encode};
use godwit_transfer::{LaneReceiver, LaneSender};
use godwit_types::{Generation, MigrationId};
use serde::{Deserialize, Serialize};

use super::RelayError;
use crate::clock::ClockId;

/// Version 1: first. 2: the clocks of both hosts are compared.
pub(crate) const VERSION: u16 = 2;
/// The longest reason that is passed on, in bytes.
const MAX_WHY: usize = 1000;

/// Who a migration's lanes belong to; the `about` of each lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) version: u16,
    pub(crate) migration: MigrationId,
    pub(crate) generation: Generation,
}

impl About {
    pub(crate) fn bytes(self) -> Result<Bytes, RelayError> {
        encode("migration", &self).map_err(|_| RelayError::Protocol("no name for the migration"))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Note {
    /// The destination has reached its QEMU.
    Ready,
    /// QEMU has taken this many more frames of the main channel.
    Ack(u32),
    /// This many more frames of pushed blocks are in the middle layer.
    DiskAck(u32),
    /// The destination has everything; nothing is needed of the source any more.
    Done,
    /// The migration ends here.
    Abort {
        why: String,
        /// Whether PONG 3 had been seen where this comes from.
        committed: bool,
    },
    /// What time is it there? Times are since 1970.
    Clock {
        /// When this was asked, by the clock of who asks.
        sent: Duration,
    },
    /// The answer to `Clock`.
    ClockIs {
        /// As it was asked.
        sent: Duration,
        /// When the question arrived, by the clock of who answers.
        arrived: Duration,
        /// When the answer left, by the same clock.
        replied: Duration,
        /// Which clock that is.
        clock: ClockId,
    },
}

pub(crate) async fn tell(lane: &mut LaneSender, note: Note) -> Result<(), RelayError> {
    let note = match note {
        Note::Abort { mut why, committed } => {
            let cut = (0..=MAX_WHY.min(why.len())).rev().find(|n| why.is_char_boundary(*n));
            why.truncate(cut.unwrap_or(0));
            Note::Abort { why, committed }
        }
        note => note,
    };
    let bytes =
        encode("relay note", &note).map_err(|_| RelayError::Protocol("a note has no form"))?;
    lane.send_bytes(bytes)
        .await
        .map_err(|source| RelayError::Lane { what: "steering the other relay", source })
}

pub(crate) async fn hear(lane: &mut LaneReceiver) -> Result<Option<Note>, RelayError> {
    let frame = lane
        .recv()
        .await
        .map_err(|source| RelayError::Lane { what: "hearing from the other relay", source })?;
    frame
        .map(|f| {
            decode("relay note", &f).map_err(|_| RelayError::Protocol("a note that has no meaning"))
        })
        .transpose()
}
