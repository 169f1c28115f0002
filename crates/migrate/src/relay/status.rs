//! What a relay tells its daemon.

use std::net::SocketAddr;

use godwit_types::{BytesMoved, MigrationId};
use serde::{Deserialize, Serialize};

use crate::clock::Offset;

/// How far a relay has come. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RelayPhase {
    /// The other relay is not there yet.
    Joining,
    /// Both relays are joined; QEMU may begin.
    Waiting,
    /// Memory comes in its one round.
    PreCopy,
    /// The round is over (source only): QEMU is not read until all that was sent has arrived.
    RoundOver,
    /// All that was sent has arrived; QEMU may be told to switch.
    Drained,
    /// QEMU is read on; it is about to stop the machine.
    Switching,
    /// The machine stands still; its device state is under way.
    Stopped,
    /// PONG 3 was seen: the destination runs the machine. The commit point.
    Committed,
    /// The destination has all of memory.
    MemoryDone,
    /// Both memory and disk are at the destination.
    Done,
}

/// What was counted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Bytes on the wire by kind (as packed, before QUIC's own overhead).
    pub bytes: BytesMoved,
    /// Pages sent with contents.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Of both, those sent on the preempt channel because a vCPU waited.
    pub demanded_pages: u64,
    /// Requests for pages by the destination.
    pub requests: u64,
    /// Bytes of memory that the guest had dirtied again at STOP.
    pub discarded_bytes: u64,
    /// Pages of the pre-copy round in all.
    pub round_pages: u64,
    /// Of those, pages not sent yet.
    pub round_left: u64,
    /// Blocks of the disk to be moved in all.
    pub disk_blocks: u64,
    /// Of those, blocks still missing at the destination.
    pub disk_left: u64,
    /// Of those, blocks that need not come, since the guest overwrote them first (destination
    /// only).
    #[serde(default)]
    pub disk_cancelled: u64,
    /// Pages sent that had been sent before (source only).
    #[serde(default)]
    pub repeated_pages: u64,
    /// Of the pages with content, those that were only named, since the destination held them
    /// (source only).
    #[serde(default)]
    pub known_pages: u64,
    /// Of the pages with content, those of which only what differs from what the destination held was sent (source
    /// only).
    #[serde(default)]
    pub changed_pages: u64,
    /// Of the pages with content, those that were named as blocks of the base image (source only).
    #[serde(default)]
    pub base_pages: u64,
    /// Of the pages with content, those that were only named, since the machine had left them at the
    /// destination when it was there (source only).
    #[serde(default)]
    pub visited_pages: u64,
    /// Time during which the machine waited for a page that it had asked for, in microseconds
    /// (destination only).
    #[serde(default)]
    pub waited_us: u64,
    /// The longest that one page was waited for, in microseconds (destination only).
    #[serde(default)]
    pub longest_wait_us: u64,
}

impl Counts {
    /// These and what `later` counted of the same migration.
    #[must_use]
    pub fn plus(&self, later: &Self) -> Self {
        let bytes = BytesMoved {
            memory: self.bytes.memory + later.bytes.memory,
            device_state: self.bytes.device_state + later.bytes.device_state,
            disk: self.bytes.disk + later.bytes.disk,
        };
        Self {
            bytes,
            data_pages: self.data_pages + later.data_pages,
            zero_pages: self.zero_pages + later.zero_pages,
            demanded_pages: self.demanded_pages + later.demanded_pages,
            requests: self.requests + later.requests,
            discarded_bytes: self.discarded_bytes + later.discarded_bytes,
            round_pages: self.round_pages.max(later.round_pages),
            round_left: if later.round_pages > 0 { later.round_left } else { self.round_left },
            disk_blocks: self.disk_blocks.max(later.disk_blocks),
            // A new relay finds again what was overwritten before.
            disk_cancelled: self.disk_cancelled.max(later.disk_cancelled),
            disk_left: if later.disk_blocks > 0 { later.disk_left } else { self.disk_left },
            repeated_pages: self.repeated_pages + later.repeated_pages,
            known_pages: self.known_pages + later.known_pages,
            changed_pages: self.changed_pages + later.changed_pages,
            base_pages: self.base_pages + later.base_pages,
            visited_pages: self.visited_pages + later.visited_pages,
            waited_us: self.waited_us + later.waited_us,
            longest_wait_us: self.longest_wait_us.max(later.longest_wait_us),
        }
    }
}

/// How a relay ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "as")]
pub enum RelayEnd {
    /// Everything is at the destination.
    Done,
    /// The destination was lost; QEMU's stream was taken to its end, and the machine can run on
    /// at the source.
    Reclaimed,
    /// On request, or because the other side asked for it.
    Aborted {
        /// Why.
        why: String,
    },
    /// A link or a QEMU was lost.
    Broken {
        /// What was lost.
        why: String,
    },
}

/// A machine's memory as a stream has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSection {
    /// Number of the section.
    pub section: u32,
    /// Names of its blocks.
    pub blocks: Vec<String>,
}

/// The whole state of a relay at one moment. Each change gives a new one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Which migration.
    pub migration: MigrationId,
    /// How far it has come.
    pub phase: RelayPhase,
    /// Where it waits, or waited, for the other relay, if it does not dial.
    pub listening: Option<SocketAddr>,
    /// Whether it has a link with the other relay.
    #[serde(default)]
    pub met: bool,
    /// Whether PONG 3 has been seen.
    pub committed: bool,
    /// The counts.
    pub counts: Counts,
    /// Smoothed round trip of the link in microseconds.
    pub rtt_us: u64,
    /// How far the destination's clock is ahead of the source's (source only).
    #[serde(default)]
    pub clock: Option<Offset>,
    /// Source only: the destination was lost while the machine stood still and before the commit
    /// point was seen. QEMU is held; [`super::RelayCommand::Reclaim`] brings the machine back.
    #[serde(default)]
    pub lost: Option<String>,
    /// Destination only: why it could not be written down that the machine runs here. The source was
    /// not told that it does, and never will be: it must not.
    #[serde(default)]
    pub refused: Option<String>,
    /// What both sites hold may not be the same: the destination has found that, or, at the source, has
    /// given up after it was referred to.
    #[serde(default)]
    pub doubt: bool,
    /// The relay's process.
    #[serde(default)]
    pub pid: Option<i32>,
    /// Source only: the number of its descriptor of QEMU's main channel.
    #[serde(default)]
    pub qemu_socket: Option<i32>,
    /// Source only: what QEMU's stream says of the machine's memory.
    #[serde(default)]
    pub ram: Option<RamSection>,
    /// Set when nothing more will happen.
    pub end: Option<RelayEnd>,
}

impl RelayStatus {
    /// The status of a relay that has just started.
    #[must_use]
    pub fn new(migration: MigrationId) -> Self {
        Self {
            migration,
            phase: RelayPhase::Joining,
            listening: None,
            met: false,
            committed: false,
            counts: Counts::default(),
            rtt_us: 0,
            clock: None,
            lost: None,
            refused: None,
            doubt: false,
            pid: i32::try_from(std::process::id()).ok(),
            qemu_socket: None,
            ram: None,
            end: None,
        }
    }
}
