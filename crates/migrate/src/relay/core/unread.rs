//! A machine's own pages in place of QEMU's pass over memory ([`super::super::own`]).

use std::fs::File;

use bytes::Bytes;
use godwit_qemu::stream::{Command, Discard, MemSize, Page, Record};

use super::{Channel, Outgoing, SourceCore};
use crate::relay::RelayError;
use crate::relay::fill::{PING_EMPTIED, named_in, stale_frame};
use crate::relay::frame::Kind;
use crate::relay::own::OwnPages;
use crate::relay::pages::PageSet;
use crate::relay::status::RelayPhase;

/// Where QEMU's stream stands after a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Between sections.
    Top,
    /// In a part of memory: page records may follow.
    Part,
    /// Behind the pages of a part, and its footer is still to come.
    Closing,
}

/// Pages that the destination fills in.
#[derive(Debug, Default)]
pub(super) struct Fills {
    /// They, and the sealed memory with them, before they were taken.
    wanted: Option<(PageSet, File)>,
    /// QEMU was asked to say when the destination's memory is empty.
    asked: bool,
    /// Frames that were sent, and those that the destination has done.
    sent: u64,
    done: u64,
    /// Every page was named.
    named: bool,
}

impl Fills {
    /// Whether a page was named that the destination fills in.
    pub(super) const fn is_begun(&self) -> bool {
        self.sent > 0
    }
}

impl SourceCore {
    /// From now on, if they are few enough, only the machine's own pages are sent before its switch.
    pub(crate) fn send_own(&mut self, own: OwnPages) {
        self.own = Some(own);
    }

    pub(super) fn begin_own(&mut self, list: &MemSize) {
        // Where it is to switch already nothing is sent before that.
        let own = self.own.as_mut().filter(|_| self.phase == RelayPhase::PreCopy);
        let Some(own) = own else {
            self.own = None;
            return;
        };
        let begun = own.begin(list).and_then(|few| few.then(|| own.to_fill()).transpose());
        match begun {
            Ok(Some(wanted)) => {
                self.fills.wanted = Some(wanted);
            }
            Ok(None) => self.own = None,
            Err(error) => {
                tracing::warn!(%error, "a machine's own pages cannot be found: all are looked at");
                self.own = None;
            }
        }
    }

    /// Whether the machine's own pages are sent, and nothing of QEMU's pass.
    pub(super) fn sends_own(&self) -> bool {
        self.own.as_ref().is_some_and(OwnPages::is_sending)
    }

    /// Whether QEMU's stream is left unread, up to its switch.
    pub(super) fn leaves_unread(&self) -> bool {
        let before = self.phase < RelayPhase::Switching;
        self.sends_own() && before && self.fills.asked && self.place != Place::Closing
    }

    pub(super) fn note_place(&mut self, record: &Record) {
        match record {
            Record::SectionStart { .. }
            | Record::SectionPart { .. }
            | Record::SectionEnd { .. } => {
                self.place = Place::Part;
            }
            Record::Eos => self.place = Place::Closing,
            Record::Footer { .. } => {
                self.place = Place::Top;
                if self.sends_own() && !self.fills.asked {
                    self.fills.asked = true;
                    self.batch.record(&Record::Command(Command::Ping(PING_EMPTIED)));
                }
            }
            _ => {}
        }
    }

    /// Which pages the destination is to fill in, with the memory that they are in; once.
    pub(crate) fn take_fills(&mut self) -> Option<(PageSet, File)> {
        self.fills.wanted.take_if(|_| self.fills.asked)
    }

    /// The next frame that names such pages; `None` behind the last.
    pub(crate) fn on_fill(&mut self, frame: Option<Bytes>) {
        match frame {
            Some(raw) => {
                self.fills.sent += 1;
                let pages = named_in(&raw);
                self.counts.data_pages += pages;
                self.counts.known_pages += pages;
                let meant = raw.len() as u64;
                self.out.push_back(Outgoing {
                    channel: Channel::Main,
                    kind: Kind::Fill,
                    raw,
                    meant,
                });
            }
            None => {
                self.fills.named = true;
                self.look_sent();
            }
        }
    }

    /// The destination has filled in the pages of `frames` more frames.
    pub(crate) fn on_filled(&mut self, frames: u32) {
        self.fills.done += u64::from(frames);
        self.look_sent();
    }

    /// Whether an own page may be sent now.
    pub(crate) fn may_put_own(&self) -> bool {
        self.leaves_unread()
            && self.phase == RelayPhase::PreCopy
            && self.own.as_ref().is_some_and(|own| !own.all_sent())
            && self.pacer.has_room()
    }

    /// Sends the next own pages.
    ///
    /// # Errors
    /// [`RelayError::GuestMemory`].
    pub(crate) fn put_own(&mut self) -> Result<(), RelayError> {
        let (Some(own), Some(id)) = (&mut self.own, self.section) else { return Ok(()) };
        let pages = own.next().map_err(RelayError::GuestMemory)?;
        self.put_pages(id, &pages);
        self.look_sent();
        Ok(())
    }

    fn put_pages(&mut self, id: u32, pages: &[Page]) {
        let alone = self.place == Place::Top;
        if alone {
            self.batch.record(&Record::SectionPart { id });
        }
        for page in pages {
            self.count_page(&page.content);
            self.put_page(page);
        }
        if alone {
            self.batch.record(&Record::Eos);
            self.batch.record(&Record::Footer { id });
        }
    }

    /// Looks whether everything was sent once that is sent before the switch.
    fn look_sent(&mut self) {
        let fills = self.fills.named && self.fills.done >= self.fills.sent;
        let all = self.own.as_ref().is_some_and(OwnPages::all_sent);
        if all {
            self.flush(Kind::Memory);
        }
        if all && fills && self.sends_own() && self.phase == RelayPhase::PreCopy {
            self.advance(RelayPhase::RoundOver);
        }
    }

    /// No more of them is sent before the switch.
    pub(super) fn cut_own_short(&mut self) {
        if let Some(own) = &mut self.own {
            own.cut_short();
        }
        self.look_sent();
    }

    /// What QEMU takes for unsent is nearly everything where its pass was left unread; `true` where this
    /// relay says itself what the destination has to forget.
    pub(super) fn takes_for_unsent(
        &mut self,
        version: u8,
        block: &Bytes,
        ranges: &[Discard],
    ) -> bool {
        match self.own.as_mut().filter(|own| own.is_sending()) {
            Some(own) => {
                own.discarded(version, block, ranges);
                true
            }
            None => false,
        }
    }

    /// The machine stands still, and its device state follows.
    pub(super) fn stop_own(&mut self) -> Result<(), RelayError> {
        let (Some(own), Some(id)) = (self.own.as_mut().filter(|o| o.is_sending()), self.section)
        else {
            return Ok(());
        };
        let at_stop = own.stop().map_err(RelayError::GuestMemory)?;
        if !at_stop.late.is_empty() {
            self.put_pages(id, &at_stop.late);
        }
        self.flush(Kind::Memory);
        let raw = stale_frame(&at_stop.stale);
        let meant = raw.len() as u64;
        self.out.push_back(Outgoing { channel: Channel::Main, kind: Kind::Stale, raw, meant });
        for discard in at_stop.discards {
            if let Command::RamDiscard { block, ranges, .. } = &discard {
                self.around.missing.discarded(block, ranges);
                self.counts.discarded_bytes += ranges.iter().map(|r| r.len).sum::<u64>();
            }
            self.batch.record(&Record::Command(discard));
        }
        self.flush(Kind::Memory);
        Ok(())
    }

    /// Whether a page that QEMU sends goes on to the destination.
    pub(super) fn is_due(&mut self, page: &Page) -> bool {
        let Some(own) = &mut self.own else { return true };
        if own.is_sending() {
            own.streamed(&page.block, page.offset);
        }
        own.is_due(page)
    }
}

#[cfg(test)]
mod tests;
