//! The destination's half: every read and write of the guest passes here (CloudAP, figure 4).

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::bitmap::BlockBitmap;
use crate::msg::{BitmapPart, BlockRange, DiskMsg, MAX_RUN, MAX_SYN_RANGES, MsgError};

/// A read that waits for blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What to do with a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Every block is here: handle it directly.
    Ready,
    /// A pull is queued; the ticket comes back from [`PostcopyDestination::stored`].
    Wait(Ticket),
}

/// The destination of a disk post-copy.
#[derive(Debug)]
pub struct PostcopyDestination {
    /// The bitmap of figure 4: dirty at the source, neither here nor cancelled.
    bitmap: BlockBitmap,
    /// Sent blocks that are in `mid`.
    received: BlockBitmap,
    /// Overwritten by the guest before they came.
    cancelled: BlockBitmap,
    /// Pulls on their way. A cancelled block in here was asked for again.
    asked: BlockBitmap,
    waiting: BTreeMap<Ticket, (Range<u64>, u64)>,
    next_ticket: u64,
    next_pull: u64,
    pulls: VecDeque<DiskMsg>,
    syns: Vec<BlockRange>,
    greeting: VecDeque<DiskMsg>,
    source_done: bool,
    done_sent: bool,
}

impl PostcopyDestination {
    /// Begins with the bitmap that the source sent at STOP.
    ///
    /// # Panics
    /// Never: an empty bitmap of the same size exists.
    #[must_use]
    pub fn new(bitmap: BlockBitmap) -> Self {
        let mut none = bitmap.clone();
        none.clear_range(0..bitmap.blocks());
        Self {
            received: none.clone(),
            cancelled: none.clone(),
            asked: none,
            bitmap,
            waiting: BTreeMap::new(),
            next_ticket: 0,
            next_pull: 0,
            pulls: VecDeque::new(),
            syns: Vec::new(),
            greeting: VecDeque::new(),
            source_done: false,
            done_sent: false,
        }
    }

    /// Goes on after a crash of the relay: `bitmap` as the source sent it, `received` as it was
    /// last made durable beside `mid`. A [`DiskMsg::Have`] is the first message to go out.
    ///
    /// # Errors
    /// If the two are of different disks.
    pub fn resume(mut bitmap: BlockBitmap, received: &BlockBitmap) -> Result<Self, MsgError> {
        bitmap.subtract(received)?;
        let mut out = Self::new(bitmap);
        out.received.union_with(received)?;
        out.reconnected();
        Ok(out)
    }

    /// Blocks that are still to come.
    #[must_use]
    pub fn missing(&self) -> &BlockBitmap {
        &self.bitmap
    }

    /// Blocks that came and are stored.
    #[must_use]
    pub fn received(&self) -> &BlockBitmap {
        &self.received
    }

    /// Blocks that the guest overwrote before they came.
    #[must_use]
    pub fn cancelled(&self) -> &BlockBitmap {
        &self.cancelled
    }

    /// Whether every block is here or cancelled and no read waits.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.bitmap.is_empty() && self.waiting.is_empty()
    }

    /// Whether the source said that it has sent everything, and yet blocks are missing. When
    /// nothing arrives any more, [`PostcopyDestination::reconnected`] asks for the rest.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.source_done && !self.is_complete()
    }

    /// A read of the blocks `range` (figure 4, lines 2, 3, 6 and 7). Blocks that the source never
    /// marked are in the base. A read of a cancelled block asks for it again: the guest's newer
    /// contents are in `top`, and whoever reads below `top` wants the old ones.
    pub fn read(&mut self, range: Range<u64>) -> Read {
        let range = range.start..range.end.min(self.bitmap.blocks());
        let mut left = 0;
        let missing: Vec<_> = self.bitmap.runs_in(range.clone()).collect();
        for run in missing {
            left += run.end - run.start;
            self.ask(run, false);
        }
        let cancelled: Vec<_> = self.cancelled.runs_in(range.clone()).collect();
        for run in cancelled {
            left += run.end - run.start;
            self.ask(run, true);
        }
        if left == 0 {
            return Read::Ready;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.waiting.insert(ticket, (range, left));
        Read::Wait(ticket)
    }

    /// Queues pulls for the blocks of `run` for which none is on its way.
    fn ask(&mut self, run: Range<u64>, again: bool) {
        let mut at = run.start;
        while at < run.end {
            if self.asked.contains(at) {
                at = self.asked.next_clear(at);
                continue;
            }
            let end = self.asked.next_set(at).unwrap_or(run.end).min(run.end).min(at + MAX_RUN);
            self.asked.set_range(at..end);
            let id = self.next_pull;
            self.next_pull += 1;
            self.pulls.push_back(DiskMsg::Pull { id, range: (at..end).into(), again });
            at = end;
        }
    }

    /// The guest overwrote all of the blocks `range` in `top` (figure 4, lines 4, 5 and 8): the
    /// bits are cleared and the source is told. A block that a read is waiting for still comes.
    pub fn write(&mut self, range: Range<u64>) {
        let dirty: Vec<_> = self.bitmap.runs_in(range).collect();
        for run in dirty {
            let mut at = run.start;
            while at < run.end {
                if self.asked.contains(at) {
                    at = self.asked.next_clear(at);
                    continue;
                }
                let end = self.asked.next_set(at).unwrap_or(run.end).min(run.end);
                self.bitmap.clear_range(at..end);
                self.cancelled.set_range(at..end);
                match self.syns.last_mut() {
                    Some(last) if last.first + last.count == at => last.count += end - at,
                    _ => self.syns.push((at..end).into()),
                }
                at = end;
            }
        }
    }

    /// Blocks arrived, pushed or pulled: which of them are to be written to `mid`. Those that
    /// are there already are left out.
    ///
    /// # Errors
    /// If the source never marked one of them: it would hide the base's contents.
    pub fn arrived(&self, range: BlockRange) -> Result<Vec<Range<u64>>, MsgError> {
        let r = range.blocks();
        let known = |b: &BlockBitmap| b.runs_in(r.clone()).map(|x| x.end - x.start).sum::<u64>();
        let (missing, cancelled) = (known(&self.bitmap), known(&self.cancelled));
        if missing + cancelled + known(&self.received) != range.count {
            return Err(MsgError::Refused("blocks came that were not in the bitmap"));
        }
        let mut fresh: Vec<Range<u64>> = Vec::new();
        for block in r.filter(|b| !self.received.contains(*b)) {
            match fresh.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => fresh.push(block..block + 1),
            }
        }
        Ok(fresh)
    }

    /// The blocks are in `mid` now (figure 4, line 8); returns the reads that need wait no more.
    pub fn stored(&mut self, range: Range<u64>) -> Vec<Ticket> {
        let range = range.start..range.end.min(self.bitmap.blocks());
        let mut fresh = self.bitmap.slice(range.clone());
        // Same size by construction.
        let _ = fresh.union_with(&self.cancelled.slice(range.clone()));
        self.bitmap.clear_range(range.clone());
        self.cancelled.clear_range(range.clone());
        self.asked.clear_range(range.clone());
        self.received.set_range(range.clone());
        let mut ready = Vec::new();
        self.waiting.retain(|ticket, (wanted, left)| {
            let from = wanted.start.max(range.start);
            let to = wanted.end.min(range.end);
            if from < to {
                let shift = range.start;
                let n: u64 = fresh.runs_in(from - shift..to - shift).map(|r| r.end - r.start).sum();
                *left = left.saturating_sub(n);
            }
            if *left == 0 {
                ready.push(*ticket);
            }
            *left != 0
        });
        ready
    }

    /// The source has nothing left to send.
    pub fn source_done(&mut self) {
        self.source_done = true;
    }

    /// A link to the source is there again: everything that was on its way is lost, so the source
    /// is told what is here, and the reads that wait are asked for anew.
    pub fn reconnected(&mut self) {
        let mut have = self.received.clone();
        // Same size by construction.
        let _ = have.union_with(&self.cancelled);
        self.greeting = BitmapPart::cut(&have).map(DiskMsg::Have).collect();
        self.syns.clear();
        self.pulls.clear();
        self.asked.clear_range(0..self.bitmap.blocks());
        self.source_done = false;
        self.done_sent = false;
        let ranges: Vec<_> = self.waiting.values().map(|(r, _)| r.clone()).collect();
        for range in ranges {
            let missing: Vec<_> = self.bitmap.runs_in(range.clone()).collect();
            missing.into_iter().for_each(|r| self.ask(r, false));
            let again: Vec<_> = self.cancelled.runs_in(range).collect();
            again.into_iter().for_each(|r| self.ask(r, true));
        }
    }

    /// The next message to the source: what the source must know first, then pulls, then syns.
    ///
    /// [`DiskMsg::Done`] is not among them: it may be sent only when `mid` is durable, see
    /// [`PostcopyDestination::finished`].
    pub fn next_message(&mut self) -> Option<DiskMsg> {
        if let Some(m) = self.greeting.pop_front().or_else(|| self.pulls.pop_front()) {
            return Some(m);
        }
        if self.syns.is_empty() {
            return None;
        }
        let n = self.syns.len().min(MAX_SYN_RANGES);
        Some(DiskMsg::Syn(self.syns.drain(..n).collect()))
    }

    /// `mid` is complete and durable: the [`DiskMsg::Done`] that releases the source, once for
    /// each link. `None` while blocks are missing.
    pub fn finished(&mut self) -> Option<DiskMsg> {
        if !self.is_complete() || std::mem::replace(&mut self.done_sent, true) {
            return None;
        }
        Some(DiskMsg::Done)
    }
}
