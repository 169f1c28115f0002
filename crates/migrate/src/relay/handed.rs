//! The end of memory, which QEMU is told only once it has all that came beside.
//!
//! QEMU reads its channels on two threads. At the end of the main one it waits for the pages that its
//! guest has asked for, and drops whatever else is still on the preempt channel: the neighbours of such
//! pages, and those that hold the virtio queues. So the end is given to it once all pages that it was
//! handed there are in the machine's memory. Only that can be looked into, not the memory of its display;
//! and a page that is still on its way on a link that has lost it is not known here.

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{Limits, Record, StreamParser};
use godwit_types::PAGE_SIZE;
use rustix::fs::SeekFrom;

use super::RelayError;

/// How long QEMU may take to put pages into memory that it was given.
const WITHIN: Duration = Duration::from_secs(10);
/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Of more pages than these it is seen now and then which are in memory.
const MANY: usize = 1024;

/// What was handed to QEMU on its preempt channel.
#[derive(Debug)]
pub(crate) struct Handed {
    /// The machine's memory; without it nothing is waited for.
    memory: Option<File>,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    preempt: Option<StreamParser>,
    /// Numbers of those that may not be in memory yet.
    numbers: Vec<u64>,
}

impl Handed {
    /// Nothing yet, to a QEMU whose machine has its memory in that file.
    pub(crate) fn new(memory: Option<File>) -> Self {
        let preempt = Some(StreamParser::preempt(Limits::default()));
        Self { memory, pages: Mutex::new(Pages { preempt, numbers: Vec::new() }) }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These bytes are about to be written to the channel.
    pub(crate) fn hand(&self, bytes: &[u8]) {
        let Some(memory) = &self.memory else { return };
        let mut pages = self.pages();
        let Some(parser) = &mut pages.preempt else { return };
        parser.push(bytes);
        let mut found = Vec::new();
        loop {
            match parser.next() {
                Ok(Some(Record::Page(page))) if page.block == RAM_BLOCK => {
                    found.push(page.offset / PAGE_SIZE as u64);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                // QEMU reads it as well, and says what is wrong.
                Err(_) => {
                    pages.preempt = None;
                    break;
                }
            }
        }
        pages.numbers.append(&mut found);
        if pages.numbers.len() > MANY {
            pages.numbers.retain(|page| !is_in(memory, *page));
        }
    }

    /// Waits until all that was handed over is in memory.
    ///
    /// # Errors
    /// [`RelayError::NotTaken`] when QEMU leaves pages out.
    pub(crate) async fn are_in_memory(&self) -> Result<(), RelayError> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let deadline = tokio::time::Instant::now() + WITHIN;
        loop {
            let missing = {
                let mut pages = self.pages();
                pages.numbers.retain(|page| !is_in(memory, *page));
                pages.numbers.len()
            };
            if missing == 0 {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(RelayError::NotTaken { missing });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Whether a page is in a memory file, be it of zeros.
fn is_in(memory: &File, page: u64) -> bool {
    let at = page * PAGE_SIZE as u64;
    rustix::fs::seek(memory, SeekFrom::Data(at)).is_ok_and(|found| found == at)
}

/// Sees where the main channel ends.
#[derive(Debug)]
pub(crate) struct MainEnd(Option<StreamParser>);

impl MainEnd {
    /// Of a stream from its beginning, or from where it was `resumed`.
    pub(crate) fn new(resumed: bool) -> Self {
        let limits = Limits::default();
        Self(Some(if resumed { StreamParser::resumed(limits) } else { StreamParser::main(limits) }))
    }

    /// Whether it ends in these bytes.
    pub(crate) fn is_in(&mut self, bytes: &[u8]) -> bool {
        let Some(parser) = &mut self.0 else { return false };
        parser.push(bytes);
        let mut ends = false;
        loop {
            match parser.next() {
                Ok(Some(Record::Eof)) => ends = true,
                Ok(Some(_)) => {}
                Ok(None) => return ends,
                // QEMU reads it as well, and says what is wrong.
                Err(_) => {
                    self.0 = None;
                    return ends;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use bytes::Bytes;
    use godwit_qemu::stream::{Content, Page};

    use super::*;

    fn memory() -> File {
        let file = tempfile::tempfile_in("/dev/shm").expect("a file on tmpfs");
        file.set_len(64 * PAGE_SIZE as u64).expect("long");
        file
    }

    fn page(number: u64, block: &'static [u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        let content = Content::Data(Bytes::from(vec![7; PAGE_SIZE]));
        let (block, offset) = (Bytes::from_static(block), number * PAGE_SIZE as u64);
        Page { block, offset, named: true, content }.encode(&mut raw);
        raw
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_pages_that_came_beside() {
        let file = memory();
        let handed = Handed::new(Some(file.try_clone().expect("the same")));
        handed.are_in_memory().await.expect("nothing came");
        handed.hand(&[page(3, RAM_BLOCK.as_bytes()), page(9, b"vga.vram")].concat());
        let waits = handed.are_in_memory();
        tokio::pin!(waits);
        let pause = tokio::time::sleep(Duration::from_secs(1));
        tokio::select! {
            ended = &mut waits => panic!("it is not in memory: {ended:?}"),
            () = pause => {}
        }
        file.write_all_at(&[0; PAGE_SIZE], 3 * PAGE_SIZE as u64).expect("placed");
        waits.await.expect("it is there, if of zeros");
    }

    #[tokio::test(start_paused = true)]
    async fn pages_that_qemu_leaves_out_are_an_error() {
        let file = memory();
        let handed = Handed::new(Some(file.try_clone().expect("the same")));
        handed.hand(&page(3, RAM_BLOCK.as_bytes()));
        let left = handed.are_in_memory().await.expect_err("left out");
        assert!(matches!(left, RelayError::NotTaken { missing: 1 }), "{left}");
        Handed::new(None).are_in_memory().await.expect("nothing can be looked into");
    }

    #[test]
    fn the_end_of_the_main_channel_is_seen_and_nonsense_is_not_read() {
        let mut whole = Vec::new();
        for record in [Record::Header, Record::Eof] {
            record.encode(&mut whole);
        }
        let (first, last) = whole.split_at(whole.len() - 1);
        let mut main = MainEnd::new(false);
        assert_eq!((main.is_in(first), main.is_in(last)), (false, true));
        let mut broken = MainEnd::new(false);
        assert_eq!((broken.is_in(&[0xff; 64]), broken.is_in(last)), (false, false));
    }
}
