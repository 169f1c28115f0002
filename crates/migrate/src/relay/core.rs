//! The source relay's core: QEMU's bytes in, frames out. No clock of its own, and no I/O but reading the
//! memory of a machine whose own pages are sent ([`super::own`]).
//!
//! ```text
//! Waiting -> PreCopy -> RoundOver -> Drained -> Switching -> Stopped -> Committed -> MemoryDone
//!                         |            |           |            |           |
//!                         |   QEMU is not read     |            |           +- PONG 3 on the return path
//!                         +- all pages sent once,  |            +- SWITCHOVER_START, discards, PACKAGED
//!                            one came twice, or    +- the driver said `proceed`: SWITCHOVER_ACK
//!                            all own pages sent
//! ```
//!
//! Without SWITCHOVER_ACK QEMU neither switches nor ends by itself, so it may be left unread. From
//! its STOP until the device state has come whole it holds its main lock while it writes, so then it
//! is read whatever the link does. A QEMU that ends as pre-copy all the same is told at once that
//! this went well, and its stream becomes one of post-copy ([`super::handover`]).

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{
    Command, Content, Limits, PONG_COMMIT, Page, RamBlock, Record, ReturnMessage, ReturnPathParser,
    StreamError, StreamParser,
};

use super::RelayError;
use super::around::Around;
use super::frame::{Kind, MAX_RAW};
use super::handover::OpenState;
use super::known::{Batch, KnownBlocks, KnownMemory, Put};
use super::own::OwnPages;
use super::pacer::Pacer;
use super::round::Round;
use super::status::{Counts, RamSection, RelayPhase};
use super::visit::Visited;
use unread::{Fills, Place};

/// Raw bytes collected into one bulk frame.
const BATCH: usize = 64 << 10;
/// Largest received-pages bitmap: 1 TiB of memory.
pub(super) const MAX_BITMAP: u64 = 32 << 20;

/// On which lane a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Main,
    Preempt,
}

/// A frame to be sent, not packed yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) channel: Channel,
    pub(crate) kind: Kind,
    pub(crate) raw: Bytes,
    /// Bytes of QEMU's stream that it stands for; more than `raw` where pages are named.
    pub(crate) meant: u64,
}

#[derive(Debug)]
pub(crate) struct SourceCore {
    main: StreamParser,
    preempt: StreamParser,
    back: ReturnPathParser,
    round: Round,
    around: Around,
    pacer: Pacer,
    phase: RelayPhase,
    batch: Batch,
    out: VecDeque<Outgoing>,
    counts: Counts,
    shut: Option<u32>,
    ended: bool,
    /// Where QEMU is with the device state.
    state: DeviceState,
    /// The page that came last on the main channel.
    last: Option<Page>,
    /// Pages that the destination needs before all others.
    first: Vec<u64>,
    /// What QEMU is to read on its return path of the relay's own accord.
    asked: Vec<u8>,
    /// Number of the section of memory.
    section: Option<u32>,
    /// That, with the names of its blocks.
    ram: Option<RamSection>,
    /// Where in QEMU's stream it is.
    place: Place,
    /// The machine's own pages, where they alone are sent.
    own: Option<OwnPages>,
    /// The pages beside them.
    fills: Fills,
}

/// How far the device state has come from QEMU.
#[derive(Debug)]
enum DeviceState {
    /// The machine runs.
    Ahead,
    /// It stands still, and QEMU holds its main lock while it writes.
    Under,
    /// As [`DeviceState::Under`], and QEMU ends as pre-copy.
    Open(OpenState),
    /// It came in a package; QEMU sends the rest of memory.
    Packaged,
    /// It came in the open, and QEMU was told that the destination has everything: it keeps what it
    /// has, and can run the machine again.
    Released,
}

impl SourceCore {
    /// A core for a new migration, or one that goes on after a break, perhaps for the disk alone.
    pub(crate) fn new(resumed: bool, memory: bool) -> Self {
        let phase = match (resumed, memory) {
            (false, _) => RelayPhase::Waiting,
            (true, true) => RelayPhase::Committed,
            (true, false) => RelayPhase::MemoryDone,
        };
        let limits = Limits::default();
        Self {
            main: if resumed { StreamParser::resumed(limits) } else { StreamParser::main(limits) },
            preempt: StreamParser::preempt(limits),
            back: ReturnPathParser::new(MAX_BITMAP),
            round: Round::default(),
            around: Around::default(),
            pacer: Pacer::new(),
            phase,
            batch: Batch::default(),
            out: VecDeque::new(),
            counts: Counts::default(),
            shut: None,
            ended: false,
            state: if resumed { DeviceState::Packaged } else { DeviceState::Ahead },
            last: None,
            first: Vec::new(),
            asked: Vec::new(),
            section: None,
            ram: None,
            place: Place::Top,
            own: None,
            fills: Fills::default(),
        }
    }

    /// From now on pages are looked for in the base image.
    pub(crate) fn refer_to_blocks(&mut self, blocks: KnownBlocks) {
        self.batch.refer_to_blocks(blocks);
    }

    /// Whether a page was sent as one that the destination holds.
    pub(crate) fn has_referred(&self) -> bool {
        let c = &self.counts;
        self.fills.is_begun()
            || c.known_pages + c.changed_pages + c.base_pages + c.visited_pages > 0
    }

    /// From now on the destination holds `known`, too.
    pub(crate) fn refer_to(&mut self, known: KnownMemory) {
        self.batch.refer_to(known);
    }

    /// From now on pages are named that the machine left at its destination and still has.
    pub(crate) fn refer_to_visit(&mut self, visit: Visited) {
        self.batch.refer_to_visit(visit);
    }

    /// What the stream says of the machine's memory, once it has.
    pub(crate) fn ram(&self) -> Option<&RamSection> {
        self.ram.as_ref()
    }

    pub(crate) fn phase(&self) -> RelayPhase {
        self.phase
    }

    pub(crate) fn counts(&self) -> Counts {
        let (round_pages, round_left) =
            self.own.as_ref().map_or_else(|| self.round.progress(), OwnPages::progress);
        let repeated_pages = self.round.repeated();
        Counts { round_pages, round_left, repeated_pages, ..self.counts }
    }

    /// The value of SHUT once the destination has said that it is done; 0 is success.
    pub(crate) fn shut(&self) -> Option<u32> {
        self.shut
    }

    /// Whether QEMU's stream has come to its end.
    pub(crate) fn stream_ended(&self) -> bool {
        self.ended
    }

    /// Whether the whole device state has come from QEMU. Until then it must be read on.
    pub(crate) fn has_device_state(&self) -> bool {
        matches!(self.state, DeviceState::Packaged | DeviceState::Released)
    }

    /// Whether QEMU was told that the destination has everything, and needs no more words.
    pub(crate) fn released(&self) -> bool {
        matches!(self.state, DeviceState::Released)
    }

    /// Whether the main channel may be read: nothing is being drained, and the window has room or
    /// QEMU must not be kept waiting.
    pub(crate) fn may_read(&self) -> bool {
        match self.state {
            DeviceState::Under | DeviceState::Open(_) => true,
            _ => {
                let held = matches!(self.phase, RelayPhase::RoundOver | RelayPhase::Drained);
                !held && !self.leaves_unread() && self.pacer.has_room()
            }
        }
    }

    /// The machine stands still; its device state comes next.
    fn stopped(&mut self) {
        self.advance(RelayPhase::Stopped);
        if matches!(self.state, DeviceState::Ahead) {
            self.state = DeviceState::Under;
        }
    }

    fn advance(&mut self, to: RelayPhase) {
        self.phase = self.phase.max(to);
    }

    /// Bytes of the main channel.
    ///
    /// # Errors
    /// It is no such stream, or the memory that belongs to it cannot be read.
    pub(crate) fn on_main(&mut self, bytes: &[u8]) -> Result<(), RelayError> {
        self.advance(RelayPhase::PreCopy);
        self.main.push(bytes);
        while let Some(record) = self.main.next()? {
            match &record {
                Record::SectionStart { id, .. } => self.section = Some(*id),
                Record::MemSize(list) => {
                    let name = |b: &RamBlock| String::from_utf8_lossy(&b.name).into_owned();
                    self.ram = self.section.map(|section| RamSection {
                        section,
                        blocks: list.blocks.iter().map(name).collect(),
                    });
                    self.round.begin(list);
                    self.around.missing.begin(list);
                    self.begin_own(list);
                }
                Record::Page(page) => {
                    if !self.is_due(page) {
                        continue;
                    }
                    self.count_page(&page.content);
                    self.around.missing.came(&page.block, page.offset);
                    self.last = Some(page.clone());
                    let over = self.round.sent(&page.block, page.offset);
                    if self.phase == RelayPhase::PreCopy && over && !self.sends_own() {
                        self.advance(RelayPhase::RoundOver);
                    }
                    self.put_page(page);
                    continue;
                }
                Record::Command(Command::SwitchoverStart) => self.stopped(),
                Record::Command(Command::RamDiscard { version, block, ranges }) => {
                    if self.takes_for_unsent(*version, block, ranges) {
                        continue;
                    }
                    self.around.missing.discarded(block, ranges);
                    self.counts.discarded_bytes += ranges.iter().map(|r| r.len).sum::<u64>();
                }
                Record::Command(Command::Packaged(_)) => {
                    self.stopped();
                    self.stop_own()?;
                    self.state = DeviceState::Packaged;
                    self.flush(Kind::Memory);
                    self.batch.record(&record);
                    self.flush(Kind::Device);
                    // The destination asks for nothing before it has this; from now on QEMU
                    // answers.
                    let first = std::mem::take(&mut self.first);
                    for request in
                        self.around.first(&Bytes::from_static(RAM_BLOCK.as_bytes()), &first)
                    {
                        request.encode(&mut self.asked);
                    }
                    continue;
                }
                Record::SectionEnd { id } if !self.has_device_state() => {
                    // QEMU ends as pre-copy. Its destination is to have memory without an end yet.
                    self.stopped();
                    self.state = DeviceState::Open(OpenState::new(*id));
                    self.batch.record(&Record::SectionPart { id: *id });
                    continue;
                }
                Record::Opaque(piece) => {
                    self.on_open_state(piece)?;
                    continue;
                }
                Record::Eof => self.ended = true,
                _ => {}
            }
            self.batch.record(&record);
            self.note_place(&record);
            self.flush_full();
        }
        self.flush(Kind::Memory);
        Ok(())
    }

    fn put_page(&mut self, page: &Page) {
        let put = match self.own {
            // Whatever was sent before it, perhaps of another block.
            Some(_) => self.batch.page(&Page { named: true, ..page.clone() }),
            None => self.batch.page(page),
        };
        match put {
            Put::Whole => {}
            Put::Same => self.counts.known_pages += 1,
            Put::Changed => self.counts.changed_pages += 1,
            Put::Block => self.counts.base_pages += 1,
            Put::Visited => self.counts.visited_pages += 1,
        }
        self.flush_full();
    }

    fn flush_full(&mut self) {
        if self.batch.is_full(BATCH) {
            self.flush(Kind::Memory);
        }
    }

    /// Bytes behind memory that are no commands: device state in the open.
    fn on_open_state(&mut self, piece: &[u8]) -> Result<(), StreamError> {
        if matches!(self.state, DeviceState::Packaged) {
            // What follows the end of a stream of post-copy, if QEMU should send such a thing.
            self.batch.stream(piece);
            return Ok(());
        }
        let malformed = |what| StreamError::Malformed { at: 0, what };
        let (DeviceState::Open(state), Some(last)) = (&mut self.state, &self.last) else {
            return Err(malformed("a device's state where memory is expected"));
        };
        state.push(piece)?;
        let Some(handover) = state.finish(last) else { return Ok(()) };
        self.flush(Kind::Memory);
        self.batch.stream(&handover.memory);
        self.flush(Kind::Memory);
        // QEMU would have opened it in post-copy, and the destination waits for it at its end.
        self.on_preempt_open();
        let mut over = Vec::new();
        Record::Eos.encode(&mut over);
        self.demand(over);
        self.device_frames(handover.device.into());
        // Told before anything of it leaves: whatever happens from here on, QEMU does not run the
        // machine by itself.
        ReturnMessage::Shut(0).encode(&mut self.asked);
        self.state = DeviceState::Released;
        self.ended = true;
        Ok(())
    }

    /// Cuts device state into frames so that its end is parted by nothing: the last one is whole.
    fn device_frames(&mut self, mut raw: Bytes) {
        let first = raw.len() % MAX_RAW;
        let mut size = if first == 0 { MAX_RAW } else { first };
        while !raw.is_empty() {
            let piece = raw.split_to(size.min(raw.len()));
            let (channel, kind, meant) = (Channel::Main, Kind::Device, piece.len() as u64);
            self.out.push_back(Outgoing { channel, kind, raw: piece, meant });
            size = MAX_RAW;
        }
    }

    /// What QEMU is to read on its return path of the relay's own accord.
    pub(crate) fn take_asked(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.asked)
    }

    /// The preempt channel has been opened by QEMU.
    pub(crate) fn on_preempt_open(&mut self) {
        self.out.push_back(Outgoing {
            channel: Channel::Preempt,
            kind: Kind::Open,
            raw: Bytes::new(),
            meant: 0,
        });
    }

    /// Bytes of the preempt channel.
    pub(crate) fn on_preempt(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.preempt.push(bytes);
        let mut raw = Vec::new();
        while let Some(mut record) = self.preempt.next()? {
            if let Record::Page(page) = &mut record {
                if !self.is_due(page) {
                    continue;
                }
                page.named |= self.own.is_some();
                self.count_page(&page.content);
                self.counts.demanded_pages += 1;
                self.round.sent(&page.block, page.offset);
                self.around.missing.came(&page.block, page.offset);
            }
            record.encode(&mut raw);
            if raw.len() >= BATCH {
                self.demand(std::mem::take(&mut raw));
            }
        }
        if !raw.is_empty() {
            self.demand(raw);
        }
        Ok(())
    }

    fn demand(&mut self, raw: Vec<u8>) {
        let meant = raw.len() as u64;
        self.out.push_back(Outgoing {
            channel: Channel::Preempt,
            kind: Kind::Memory,
            raw: raw.into(),
            meant,
        });
    }

    fn count_page(&mut self, content: &Content) {
        match content {
            Content::Fill(_) => self.counts.zero_pages += 1,
            Content::Data(_) => self.counts.data_pages += 1,
        }
    }

    fn flush(&mut self, kind: Kind) {
        if self.batch.is_empty() {
            return;
        }
        let (collected, raw, meant) = self.batch.take();
        // One that refers to pages is not parted: it has one hash.
        let whole = collected == Kind::Referring;
        let (kind, most) = if whole { (collected, usize::MAX) } else { (kind, MAX_RAW) };
        let mut raw = Bytes::from(raw);
        while !raw.is_empty() {
            let piece = raw.split_to(raw.len().min(most));
            let meant = if whole { meant } else { piece.len() as u64 };
            self.out.push_back(Outgoing { channel: Channel::Main, kind, raw: piece, meant });
        }
    }

    /// The next frame to be sent; demanded pages first.
    pub(crate) fn next_frame(&mut self) -> Option<Outgoing> {
        let demand = self.out.iter().position(|o| o.channel == Channel::Preempt);
        self.out.remove(demand.unwrap_or(0))
    }

    /// A frame was handed to the link as `wire` bytes.
    pub(crate) fn on_sent(&mut self, out: &Outgoing, wire: u64, now: Instant) {
        if out.channel == Channel::Main {
            self.pacer.on_sent(wire, out.meant, now);
        }
        match out.kind {
            Kind::Device => self.counts.bytes.device_state += wire,
            Kind::Memory | Kind::Open | Kind::Referring | Kind::Fill | Kind::Stale => {
                self.counts.bytes.memory += wire;
            }
        }
    }

    /// The far relay has given `frames` more frames of the main channel to QEMU.
    pub(crate) fn on_ack(&mut self, frames: u64, now: Instant) {
        self.pacer.on_ack(frames, now);
        self.look_drained();
    }

    /// Looks whether a drain has come to its end; to be called after sending.
    pub(crate) fn look_drained(&mut self) {
        if self.phase == RelayPhase::RoundOver && self.out.is_empty() && self.pacer.in_flight() == 0
        {
            self.advance(RelayPhase::Drained);
        }
    }

    /// The driver wants to switch before the round is over, or at once.
    pub(crate) fn drain(&mut self) {
        if self.sends_own() {
            self.cut_own_short();
        } else if matches!(self.phase, RelayPhase::Waiting | RelayPhase::PreCopy) {
            self.advance(RelayPhase::RoundOver);
            self.look_drained();
        }
    }

    /// QEMU has been told to switch: read on.
    pub(crate) fn proceed(&mut self, first: Vec<u64>) -> bool {
        let held = matches!(self.phase, RelayPhase::RoundOver | RelayPhase::Drained);
        if held {
            self.first = first;
            ReturnMessage::SwitchoverAck.encode(&mut self.asked);
            self.batch.leave_blocks();
            self.batch.leave_visit();
            self.advance(RelayPhase::Switching);
        }
        held
    }

    /// Bytes of the return path; gives what the source QEMU is to read: the same messages, and
    /// behind a request for pages those that are asked for around it.
    pub(crate) fn on_back(&mut self, bytes: &[u8]) -> Result<Vec<u8>, StreamError> {
        self.back.push(bytes);
        let mut out = Vec::with_capacity(bytes.len());
        while let Some(message) = self.back.next()? {
            message.encode(&mut out);
            match message {
                ReturnMessage::Pong(PONG_COMMIT) => self.advance(RelayPhase::Committed),
                ReturnMessage::Shut(value) => {
                    self.shut = Some(value);
                    if value == 0 {
                        self.advance(RelayPhase::MemoryDone);
                    }
                }
                ReturnMessage::RecvBitmap { block, bitmap } if block == RAM_BLOCK => {
                    self.around.missing.received(&block, &bitmap);
                }
                ReturnMessage::ReqPages { block, start, .. } => {
                    self.counts.requests += 1;
                    for more in self.around.asked(block.as_ref(), start) {
                        more.encode(&mut out);
                    }
                }
                _ => {}
            }
        }
        Ok(out)
    }
}

mod unread;

#[cfg(test)]
mod tests;
