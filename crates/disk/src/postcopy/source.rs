//! The source's half: active push and pull service (CloudAP, figure 5).

use std::collections::VecDeque;

use crate::bitmap::BlockBitmap;
use crate::msg::{BlockRange, MAX_RUN, MsgError};

/// What the source sends next. The caller reads the blocks and makes the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToSend {
    /// Answer a pull: before all else.
    PullReply {
        /// The id of the pull.
        id: u64,
        /// The blocks, at most [`MAX_RUN`].
        range: BlockRange,
    },
    /// Active push.
    Push(BlockRange),
    /// Tell that nothing is left. Comes once after the last block, and again after a
    /// [`PostcopySource::have`].
    Done,
}

/// What the source did so far, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Sent because a read asked for them.
    pub pulled: u64,
    /// Sent by active push.
    pub pushed: u64,
    /// Never sent, because the guest overwrote them first.
    pub cancelled: u64,
}

/// The source of a disk post-copy.
///
/// It runs no faster than its caller asks: take [`PostcopySource::next_demanded`] whenever there
/// is one, and [`PostcopySource::next_push`] when the lane has room for bulk.
#[derive(Debug)]
pub struct PostcopySource {
    all: BlockBitmap,
    bitmap: BlockBitmap,
    pivot: u64,
    pivot_changed: bool,
    current: u64,
    pulls: VecDeque<(u64, BlockRange)>,
    /// A new link is there and the destination has not said yet what it has.
    waits_for_have: bool,
    done_sent: bool,
    released: bool,
    counts: SourceCounts,
}

impl PostcopySource {
    /// Begins with the blocks that the destination lacks: the allocated blocks of the cow image.
    #[must_use]
    pub fn new(bitmap: BlockBitmap) -> Self {
        Self {
            all: bitmap.clone(),
            bitmap,
            pivot: 0,
            pivot_changed: false,
            current: 0,
            pulls: VecDeque::new(),
            waits_for_have: false,
            done_sent: false,
            released: false,
            counts: SourceCounts::default(),
        }
    }

    /// The blocks that are still to be sent.
    #[must_use]
    pub fn bitmap(&self) -> &BlockBitmap {
        &self.bitmap
    }

    /// The location of the last pulled block.
    #[must_use]
    pub fn pivot(&self) -> u64 {
        self.pivot
    }

    /// The location that active push looks at next.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.current
    }

    /// What was sent so far.
    #[must_use]
    pub fn counts(&self) -> SourceCounts {
        self.counts
    }

    /// Pull service, a pull: clears the bits, queues the blocks ahead of all pushes and shifts
    /// the pivot. Blocks whose bit is clear are on their way already and are not sent twice,
    /// unless `again` asks for it.
    ///
    /// # Errors
    /// If the range leaves the disk or is longer than [`MAX_RUN`].
    pub fn pull(&mut self, id: u64, range: BlockRange, again: bool) -> Result<(), MsgError> {
        self.on_disk(range)?;
        if range.count > MAX_RUN {
            return Err(MsgError::Refused("a pull is longer than a run"));
        }
        // A peer that asks over and over without reading must not grow the queue without end.
        if self.pulls.len() as u64 > self.all.blocks() {
            return Err(MsgError::Refused("more pulls are waiting than the disk has blocks"));
        }
        let sent: Vec<_> = if again {
            self.all.runs_in(range.blocks()).collect()
        } else {
            self.bitmap.runs_in(range.blocks()).collect()
        };
        for run in sent {
            self.bitmap.clear_range(run.clone());
            self.pivot = run.end - 1;
            self.pivot_changed = true;
            self.counts.pulled += run.end - run.start;
            self.pulls.push_back((id, run.into()));
        }
        Ok(())
    }

    /// Pull service, a syn: the guest overwrote these blocks, so their bits are cleared and
    /// nothing is sent.
    ///
    /// # Errors
    /// If a range leaves the disk; nothing is changed then.
    pub fn syn(&mut self, ranges: &[BlockRange]) -> Result<(), MsgError> {
        for r in ranges {
            self.on_disk(*r)?;
        }
        let before = self.bitmap.count();
        for r in ranges {
            self.bitmap.clear_range(r.blocks());
        }
        self.counts.cancelled += before - self.bitmap.count();
        Ok(())
    }

    /// The link was lost: what was queued for it is dropped, and nothing is sent until the
    /// destination says what it has ([`PostcopySource::have`]).
    pub fn link_lost(&mut self) {
        self.pulls.clear();
        self.waits_for_have = true;
    }

    /// A destination attached anew and has (or does not need) `have`: everything else is armed
    /// again. What was queued for the lost link is dropped.
    ///
    /// # Errors
    /// If `have` covers another disk; nothing is changed then.
    pub fn have(&mut self, have: &BlockBitmap) -> Result<(), MsgError> {
        let mut left = self.all.clone();
        left.subtract(have)?;
        self.bitmap = left;
        self.pulls.clear();
        self.waits_for_have = false;
        self.done_sent = false;
        Ok(())
    }

    /// The destination says that it has everything on disk.
    ///
    /// # Errors
    /// If blocks were never sent: then it lies or is confused, and the source must be kept.
    pub fn released(&mut self) -> Result<(), MsgError> {
        if self.waits_for_have || !self.bitmap.is_empty() || !self.pulls.is_empty() {
            return Err(MsgError::Refused("the destination is done before everything was sent"));
        }
        self.released = true;
        Ok(())
    }

    /// Whether the destination has everything, so that the source may be removed.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// The next blocks that a read is waiting for.
    pub fn next_demanded(&mut self) -> Option<ToSend> {
        if self.waits_for_have {
            return None;
        }
        let (id, range) = self.pulls.pop_front()?;
        Some(ToSend::PullReply { id, range })
    }

    /// The next run of active push: from `current` (or the pivot, if it moved) onwards to the
    /// next dirty block, around the disk's end, until no dirty block is left.
    pub fn next_push(&mut self) -> Option<ToSend> {
        if self.waits_for_have {
            return None;
        }
        if self.bitmap.is_empty() {
            if self.done_sent || !self.pulls.is_empty() {
                return None;
            }
            self.done_sent = true;
            return Some(ToSend::Done);
        }
        if std::mem::take(&mut self.pivot_changed) {
            self.current = self.pivot;
        }
        let start = self.bitmap.next_set(self.current).or_else(|| self.bitmap.next_set(0))?;
        let end = self.bitmap.next_clear(start).min(start + MAX_RUN);
        self.bitmap.clear_range(start..end);
        self.current = if end >= self.bitmap.blocks() { 0 } else { end };
        self.counts.pushed += end - start;
        Some(ToSend::Push((start..end).into()))
    }

    /// Takes back what was given out and could not be sent after all.
    pub fn put_back(&mut self, unsent: ToSend) {
        match unsent {
            ToSend::PullReply { id, range } => self.pulls.push_front((id, range)),
            ToSend::Push(range) => {
                self.bitmap.set_range(range.blocks());
                self.counts.pushed -= range.count;
            }
            ToSend::Done => self.done_sent = false,
        }
    }

    /// Whatever is next: pulls first, then pushes.
    pub fn next_send(&mut self) -> Option<ToSend> {
        self.next_demanded().or_else(|| self.next_push())
    }

    fn on_disk(&self, range: BlockRange) -> Result<(), MsgError> {
        let blocks = self.all.blocks();
        if range.first > blocks || range.count > blocks - range.first {
            return Err(MsgError::Refused("blocks past the disk's end are named"));
        }
        Ok(())
    }
}
