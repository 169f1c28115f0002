//! A machine's own pages: those of a private copy that were written to.
//!
//! Of a machine that was activated from a substrate the kernel knows which pages of the sealed memory
//! it has written to. They are read from outside QEMU while the machine runs, and the others, which do
//! not change, from the sealed file, or not at all where the destination holds it; QEMU's pass over
//! memory is begun and left unread. So there is no dirty log either: what became of a page since it was
//! sent is found when the machine stands still, by reading its own pages once more.
//!
//! ```text
//! Ahead -> Sending ............................... -> Over
//!   |        |  sealed pages, unless the destination   |  machine stands still: own pages whose hash is
//!   |        |  fills them in; own ones as they are    |  another now are stale, and nothing else is
//!   |        +- QEMU waits for its stream to be read
//!   +- MEM_SIZE, or a machine with too many of them: the usual pass
//! ```
//!
//! QEMU takes nearly all of memory for unsent, and its post-copy phase sends it. What is not stale is
//! taken out of that stream: the destination has it, and a page that is there must not come again.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{Command, Content, Discard, MemSize, Page};
use godwit_store::is_zero;
use godwit_types::PAGE_SIZE;

use super::fill::present;
use super::pages::{PageSet, runs};

/// The most pages that are followed this way (96 MiB): all that were sent are read once more while the
/// machine stands still, 2.5 us each.
const MOST_OWN: usize = 24 << 10;
/// The largest block that is followed this way, in pages: 4 GiB. To bring a machine back whose
/// destination is lost in the switch QEMU's stream is taken to its end, with all that was left unread.
const MOST_PAGES: u64 = 1 << 20;
/// Pages that are read at once.
const AT_ONCE: u64 = 64;
/// Ranges in one discard, as QEMU has it.
const RANGES: usize = 12;
const PAGE: u64 = PAGE_SIZE as u64;

/// The memory of a machine with a private copy of sealed memory, read beside its QEMU.
pub(crate) trait GuestMemory: Send + Sync + std::fmt::Debug {
    /// The pages of its memory that it has written to, ascending.
    fn written(&self) -> io::Result<Vec<u64>>;
    /// Fills `buf` from byte `offset` of `block` on.
    fn read(&self, block: &Bytes, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Whether `block` can be read, and `bytes` of it.
    fn has(&self, block: &Bytes, bytes: u64) -> bool;
    /// The sealed memory that it is a copy of.
    fn sealed(&self) -> &std::fs::File;
}

/// What of a page is compared.
type Digest = [u8; 16];

fn digest(page: &[u8]) -> Digest {
    let hash = blake3::hash(page);
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

#[derive(Debug)]
struct Block {
    name: Bytes,
    pages: u64,
    /// Pages that QEMU will send of its own accord; known once the machine stands still.
    dirty: PageSet,
    /// What the destination had last of each page that was sent.
    sent: HashMap<u64, Digest>,
}

/// Pages that follow each other, to be sent.
#[derive(Debug)]
struct Run {
    /// Number of the block.
    block: usize,
    from: u64,
    to: u64,
    /// They were not written to when this was found out.
    sealed: bool,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Ahead,
    Sending,
    Over,
}

/// The source's side of it, without I/O of its own but reading memory.
#[derive(Debug)]
pub(crate) struct OwnPages {
    memory: Box<dyn GuestMemory>,
    stage: Stage,
    blocks: Vec<Block>,
    queue: std::collections::VecDeque<Run>,
    /// Whether the destination holds the sealed memory.
    held: bool,
    total: u64,
    left: u64,
    /// Pages that the destination fills in.
    filled: PageSet,
    /// Sealed pages that were to be sent and were not.
    left_out: Vec<u64>,
    /// What is still to be sent when the machine has stopped, by block.
    stale: HashMap<Bytes, PageSet>,
    version: u8,
}

/// What the destination has to know at the switch.
#[derive(Debug)]
pub(crate) struct AtStop {
    /// Pages that QEMU will not send, and of which the destination does not have the last content.
    pub(crate) late: Vec<Page>,
    /// What of the machine's memory is still to come.
    pub(crate) stale: PageSet,
    /// The destination forgets these.
    pub(crate) discards: Vec<Command>,
}

impl OwnPages {
    /// Of a machine with that memory; `held` tells whether the destination holds what it is a copy of.
    pub(crate) fn new(memory: Box<dyn GuestMemory>, held: bool) -> Self {
        Self {
            memory,
            held,
            stage: Stage::Ahead,
            blocks: Vec::new(),
            queue: std::collections::VecDeque::new(),
            total: 0,
            left: 0,
            filled: PageSet::default(),
            left_out: Vec::new(),
            stale: HashMap::new(),
            version: 0,
        }
    }

    /// Learns the blocks, and which pages are the machine's own; `false` where the usual pass has to be
    /// made.
    pub(crate) fn begin(&mut self, list: &MemSize) -> io::Result<bool> {
        if list.blocks.iter().any(|b| !self.memory.has(&b.name, b.used)) {
            return Ok(false);
        }
        let written = self.memory.written()?;
        let mut sealed = PageSet::default();
        let mut own = 0;
        for (n, block) in list.blocks.iter().enumerate() {
            let pages = block.used / PAGE;
            if block.used % PAGE != 0 || pages > MOST_PAGES {
                return Ok(false);
            }
            let of_block = if block.name == RAM_BLOCK {
                sealed = present(self.memory.sealed(), pages)?;
                for page in &written {
                    sealed.remove(*page);
                }
                runs(written.iter().copied(), AT_ONCE)
            } else {
                runs(0..pages, AT_ONCE)
            };
            own += of_block.iter().map(|(from, to)| to - from).sum::<u64>();
            if own > MOST_OWN as u64 {
                return Ok(false);
            }
            let run = |(from, to)| Run { block: n, from, to, sealed: false };
            self.queue.extend(of_block.into_iter().map(run));
            if !self.held && block.name == RAM_BLOCK {
                // Ahead of those that may change meanwhile.
                for (from, to) in runs(sealed.iter(), AT_ONCE).into_iter().rev() {
                    self.queue.push_front(Run { block: n, from, to, sealed: true });
                }
            }
            let dirty = PageSet::new(pages);
            let (name, sent) = (block.name.clone(), HashMap::new());
            self.blocks.push(Block { name, pages, dirty, sent });
        }
        self.left = self.queue.iter().map(|r| r.to - r.from).sum();
        self.filled = if self.held { sealed } else { PageSet::new(sealed.pages()) };
        self.total = self.left + self.filled.len();
        self.stage = Stage::Sending;
        Ok(true)
    }

    /// Pages that the destination is to fill in, and the memory that they are in.
    pub(crate) fn to_fill(&self) -> io::Result<(PageSet, std::fs::File)> {
        Ok((self.filled.clone(), self.memory.sealed().try_clone()?))
    }

    /// Whether QEMU's pass is left unread.
    pub(crate) fn is_sending(&self) -> bool {
        self.stage == Stage::Sending
    }

    /// Whether every own page was sent once.
    pub(crate) fn all_sent(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends no more of them before the machine stops.
    ///
    /// Sealed pages that were not sent are stale then, like the others.
    pub(crate) fn cut_short(&mut self) {
        for run in self.queue.drain(..).filter(|r| r.sealed) {
            self.left_out.extend(run.from..run.to);
        }
        self.left = 0;
    }

    /// Pages in all, and those not sent yet.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.total, self.left)
    }

    /// The next pages as they are now; sealed ones that are zero are left out.
    pub(crate) fn next(&mut self) -> io::Result<Vec<Page>> {
        let Some(Run { block, from, to, sealed }) = self.queue.pop_front() else {
            return Ok(Vec::new());
        };
        self.left -= to - from;
        let block = &mut self.blocks[block];
        let mut bytes = vec![0; ((to - from) * PAGE) as usize];
        if sealed {
            self.memory.sealed().read_exact_at(&mut bytes, from * PAGE)?;
        } else {
            self.memory.read(&block.name, from * PAGE, &mut bytes)?;
        }
        let bytes = Bytes::from(bytes);
        let mut out = Vec::with_capacity((to - from) as usize);
        for page in from..to {
            let at = ((page - from) * PAGE) as usize;
            let data = bytes.slice(at..at + PAGE_SIZE);
            if !sealed {
                block.sent.insert(page, digest(&data));
            }
            let page = page_of(&block.name, page, data);
            if !sealed || page.content != Content::Fill(0) {
                out.push(page);
            }
        }
        Ok(out)
    }

    /// A page of QEMU's pass was sent, which it read at a time of its own.
    pub(crate) fn streamed(&mut self, name: &Bytes, offset: u64) {
        if let Some(block) = self.blocks.iter_mut().find(|b| b.name == *name) {
            block.sent.remove(&(offset / PAGE));
        }
    }

    /// QEMU tells what it takes for unsent.
    pub(crate) fn discarded(&mut self, version: u8, name: &Bytes, ranges: &[Discard]) {
        self.version = version;
        if let Some(block) = self.blocks.iter_mut().find(|b| b.name == *name) {
            for r in ranges {
                let from = r.start / PAGE;
                block.dirty.insert_range(from, from.saturating_add(r.len / PAGE));
            }
        }
    }

    /// The machine stands still: finds what has changed since it was sent.
    pub(crate) fn stop(&mut self) -> io::Result<AtStop> {
        self.cut_short();
        let written = self.memory.written()?;
        let mut late = Vec::new();
        let mut bytes = Vec::new();
        for block in &mut self.blocks {
            let mut own = PageSet::new(block.pages);
            if block.name == RAM_BLOCK {
                written.iter().chain(block.sent.keys()).chain(&self.left_out).for_each(|page| {
                    own.insert(*page);
                });
            } else {
                own.insert_range(0, block.pages);
            }
            let mut stale = PageSet::new(block.pages);
            // What was not sent, and will be, need not be looked at.
            let unsent = |p: &u64| block.dirty.contains(*p) && !block.sent.contains_key(p);
            for page in own.iter().filter(unsent) {
                stale.insert(page);
            }
            let looked_at: Vec<u64> = own.iter().filter(|p| !stale.contains(*p)).collect();
            for (from, to) in runs(looked_at.into_iter(), AT_ONCE) {
                bytes.resize(((to - from) * PAGE) as usize, 0);
                self.memory.read(&block.name, from * PAGE, &mut bytes)?;
                for (page, now) in (from..to).zip(bytes.chunks_exact(PAGE_SIZE)) {
                    if block.sent.get(&page).is_some_and(|sent| *sent == digest(now)) {
                        continue;
                    }
                    if block.dirty.contains(page) {
                        stale.insert(page);
                    } else {
                        late.push(page_of(&block.name, page, Bytes::copy_from_slice(now)));
                    }
                }
            }
            self.stale.insert(block.name.clone(), stale);
        }
        self.make_one_stale();
        self.stage = Stage::Over;
        let stale = self.stale.get(RAM_BLOCK.as_bytes()).cloned().unwrap_or_default();
        Ok(AtStop { late, stale, discards: self.discards() })
    }

    /// A destination enters LISTEN only after a discard.
    fn make_one_stale(&mut self) {
        if self.stale.values().any(|s| !s.is_empty()) {
            return;
        }
        for block in &self.blocks {
            if let Some(page) = block.dirty.iter().next() {
                if let Some(stale) = self.stale.get_mut(&block.name) {
                    stale.insert(page);
                }
                return;
            }
        }
    }

    fn discards(&self) -> Vec<Command> {
        let mut out = Vec::new();
        for block in &self.blocks {
            let runs = self.stale.get(&block.name).map(PageSet::runs).unwrap_or_default();
            for part in runs.chunks(RANGES) {
                let ranges = part
                    .iter()
                    .map(|(from, to)| Discard { start: from * PAGE, len: (to - from) * PAGE })
                    .collect();
                let (version, block) = (self.version, block.name.clone());
                out.push(Command::RamDiscard { version, block, ranges });
            }
        }
        out
    }

    /// Whether a page that QEMU sends behind the device state goes on to the destination; once.
    pub(crate) fn is_due(&mut self, page: &Page) -> bool {
        match self.stage {
            Stage::Ahead | Stage::Sending => true,
            Stage::Over => {
                self.stale.get_mut(&page.block).is_some_and(|s| s.remove(page.offset / PAGE))
            }
        }
    }
}

/// QEMU's record of a page.
fn page_of(block: &Bytes, page: u64, data: Bytes) -> Page {
    let content = if is_zero(&data) { Content::Fill(0) } else { Content::Data(data) };
    Page { block: block.clone(), named: true, offset: page * PAGE, content }
}

#[cfg(test)]
pub(super) mod tests;
