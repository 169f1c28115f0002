//! What QEMU still has to be given before it is told that memory ends.
//!
//! QEMU reads its channels on two threads. At the end of the main one it waits for the pages that its
//! guest has asked for, and drops whatever else is still on the preempt channel or has not even come:
//! the neighbours of such pages, and those that hold the virtio queues. So the end is passed on once
//! every page that QEMU was told to forget has been given to it again ([`Due`]) and it has taken all of
//! those on the preempt channel ([`super::preempt`]).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::Page;
use tokio::sync::Notify;

use super::RelayError;
use super::core::Channel;
use super::missing::Missing;
use super::passing::Passing;

/// How long no page may come while memory is to end: longer than a link of the usual patience is silent.
const STILL: Duration = Duration::from_secs(60);

/// The pages that are still to be given to QEMU.
#[derive(Debug)]
pub(crate) struct Due {
    pages: Mutex<Pages>,
    came: Notify,
}

#[derive(Debug, Default)]
struct Pages {
    missing: Missing,
    /// Pages that have passed beside the main channel before the machine's state has: QEMU reads them
    /// behind what it is told to forget.
    ahead: Vec<(Bytes, u64)>,
    /// The state has passed.
    switched: bool,
}

impl Due {
    /// None yet, of a move from its beginning or of one that was `resumed` behind the switch.
    pub(crate) fn new(resumed: bool) -> Self {
        let pages = Pages { switched: resumed, ..Pages::default() };
        Self { pages: Mutex::new(pages), came: Notify::new() }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This has passed on a channel, or is ahead of what is asked next on the main one.
    pub(crate) fn passed(&self, channel: Channel, passing: &Passing) {
        let mut pages = self.pages();
        let Pages { missing, ahead, switched } = &mut *pages;
        if let Some(sizes) = &passing.sizes {
            missing.begin(sizes);
        }
        let mut seen = 0;
        for (before, block, ranges) in &passing.discards {
            come(missing, &passing.pages[seen..*before]);
            missing.discarded(block, ranges);
            seen = *before;
        }
        come(missing, &passing.pages[seen..]);
        match channel {
            Channel::Main => {
                *switched |= passing.state;
                ahead.iter().for_each(|(block, offset)| missing.came(block, *offset));
                if *switched {
                    ahead.clear();
                }
            }
            Channel::Preempt if !*switched => {
                ahead.extend(passing.pages.iter().map(|p| (p.block.clone(), p.offset)));
            }
            Channel::Preempt => {}
        }
        drop(pages);
        if !passing.pages.is_empty() {
            self.came.notify_one();
        }
    }

    /// After a break, QEMU says which pages of `block` it has.
    pub(crate) fn received(&self, block: &Bytes, bitmap: &Bytes) {
        // Of other blocks the last bits may name no pages, so those are not waited for.
        let sure = if block == RAM_BLOCK { bitmap.len() } else { bitmap.len().saturating_sub(8) };
        self.pages().missing.received(block, &bitmap[..sure]);
    }

    /// Waits until all have been given to QEMU.
    ///
    /// # Errors
    /// [`RelayError::Incomplete`] when they do not come.
    pub(crate) async fn all_passed(&self) -> Result<(), RelayError> {
        loop {
            let missing = self.pages().missing.len();
            if missing == 0 {
                return Ok(());
            }
            if tokio::time::timeout(STILL, self.came.notified()).await.is_err() {
                return Err(RelayError::Incomplete { missing });
            }
        }
    }
}

fn come(missing: &mut Missing, pages: &[Page]) {
    for page in pages {
        missing.came(&page.block, page.offset);
    }
}

#[cfg(test)]
mod tests {
    use godwit_qemu::stream::{Command, Record};

    use super::super::core::Channel;
    use super::super::passing::Reader;
    use super::super::passing::tests::{encoded, forgetting, page};
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_every_page_that_was_to_be_forgotten() {
        let (due, mut main) = (Due::new(false), Reader::new(Channel::Main, false));
        let mut preempt = Reader::new(Channel::Preempt, false);
        due.all_passed().await.expect("nothing is to come");
        due.passed(Channel::Main, &main.read(&encoded(&forgetting("vga.vram", 3, 5))));
        due.passed(
            Channel::Preempt,
            &preempt.read(&encoded(&[page("vga.vram", 4), page("other", 3)])),
        );
        let waits = due.all_passed();
        tokio::pin!(waits);
        let pause = tokio::time::sleep(Duration::from_secs(1));
        tokio::select! {
            ended = &mut waits => panic!("a page has not come: {ended:?}"),
            () = pause => {}
        }
        due.passed(Channel::Preempt, &preempt.read(&encoded(&[page("vga.vram", 3)])));
        waits.await.expect("all have come");
    }

    #[tokio::test(start_paused = true)]
    async fn pages_that_do_not_come_are_an_error() {
        let (due, mut main) = (Due::new(false), Reader::new(Channel::Main, false));
        due.passed(Channel::Main, &main.read(&encoded(&forgetting(RAM_BLOCK, 3, 6))));
        let missing = due.all_passed().await.expect_err("they do not come");
        assert!(matches!(missing, RelayError::Incomplete { missing: 3 }), "{missing}");
    }

    /// As the pages of the queues do, which are asked for as the state leaves.
    #[tokio::test(start_paused = true)]
    async fn pages_that_overtake_the_state_are_not_waited_for() {
        let (due, mut main) = (Due::new(false), Reader::new(Channel::Main, false));
        let mut preempt = Reader::new(Channel::Preempt, false);
        due.passed(Channel::Preempt, &preempt.read(&encoded(&[page(RAM_BLOCK, 3)])));
        let state = Record::Command(Command::Packaged(Bytes::from_static(b"state")));
        let mut records = forgetting(RAM_BLOCK, 3, 5);
        records.push(state);
        due.passed(Channel::Main, &main.read(&encoded(&records)));
        due.passed(Channel::Preempt, &preempt.read(&encoded(&[page(RAM_BLOCK, 4)])));
        due.all_passed().await.expect("all have come");
    }

    /// As those at the end of the pass that are written to once more before the machine stops.
    #[tokio::test(start_paused = true)]
    async fn a_page_that_is_forgotten_behind_its_first_content_is_waited_for() {
        let (due, mut main) = (Due::new(false), Reader::new(Channel::Main, false));
        let mut records = forgetting(RAM_BLOCK, 3, 5);
        let forget = records.pop().expect("the last one");
        records.extend([Record::SectionPart { id: 2 }, page(RAM_BLOCK, 3), Record::Eos]);
        records.extend([Record::Footer { id: 2 }, forget]);
        due.passed(Channel::Main, &main.read(&encoded(&records)));
        let missing = due.all_passed().await.expect_err("they do not come");
        assert!(matches!(missing, RelayError::Incomplete { missing: 2 }), "{missing}");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_break_qemu_says_what_is_due() {
        let due = Due::new(true);
        let (ram, rom) = (Bytes::from_static(RAM_BLOCK.as_bytes()), Bytes::from_static(b"rom"));
        // Pages 1 and 64 of the machine's memory; the bits of a small ROM say nothing for sure.
        let bits = [!2u64, !1].map(u64::to_le_bytes).concat();
        due.received(&ram, &bits.into());
        due.received(&rom, &Bytes::from_static(&[0; 8]));
        let missing = due.all_passed().await.expect_err("they do not come");
        assert!(matches!(missing, RelayError::Incomplete { missing: 2 }), "{missing}");
    }
}
