//! What both sites of a move hold, and frames that refer to it.
//!
//! An environment that was activated from a substrate still has most of the substrate's pages. Where
//! both sites have its sealed memory and their relays the same content open (`Note::Holds`), a page
//! that is as it was there is only named, and one that differs by little is sent as what differs.
//! Much of the rest was read from the disk: a page that is a block of the base image, which both
//! sites have, is named by the number of that block.
//!
//! ```text
//! frame of kind Referring:  BLAKE3 of all pages that it does not spell out (32) | step ...
//! step 0 bytes:    u32 length | bytes of QEMU's stream
//! step 1 same:     u8 named | u64 first page | u32 pages
//! step 2 changed:  u8 named | u64 page | u16 length | { u16 words to skip | u16 words | words }
//! step 3 block:    u8 named | u64 page | u32 block of the base image
//! step 4 visited:  as 1, of the memory that the machine left there ([`super::visit`]); since version 4
//! ```
//!
//! The destination makes QEMU's own page records of it. The hash is what finds a copy that is not
//! what it should be, at either end, before QEMU is given a byte of the frame.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::{Buf, BufMut, Bytes};
use godwit_disk::BlockIndex;
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{Content, Page, Record};
use godwit_types::{BLOCK_SIZE, PAGE_SIZE};

use super::frame::Kind;
use super::visit::{Left, Visited};

/// Pages of a memory file that are read at once.
const WINDOW: u64 = 16;
/// The most pages that one frame refers to.
const MAX_PAGES: u32 = 1024;
/// The most bytes that a change of one page takes; beyond that the page is spelled out.
const MAX_CHANGE: usize = 1024;
/// A word of a page, in bytes: what is compared at once.
const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;
const HASH: usize = blake3::OUT_LEN;
/// Bytes of pages that are hashed in one go.
const HASHED_AT_ONCE: usize = 64 << 10;

const STEP_BYTES: u8 = 0;
const STEP_SAME: u8 = 1;
const STEP_CHANGED: u8 = 2;
const STEP_BLOCK: u8 = 3;
pub(super) const STEP_VISITED: u8 = 4;

/// Why a frame's references cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ReferError {
    /// It is no such frame, or asks for more than it may.
    #[error("a frame refers to pages in a way that has no meaning: {0}")]
    Malformed(&'static str),
    /// Nothing is held here.
    #[error("a frame refers to pages, and nothing is held here that it could mean")]
    Nothing,
    /// The file cannot be read.
    #[error("reading page {page} of what is held here")]
    Read {
        /// Number of the page.
        page: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A page cannot be put into the machine's memory.
    #[error("putting page {page} into the machine's memory")]
    Fill {
        /// Number of the page.
        page: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What the pages hash to is not what the source says.
    #[error(
        "what both sites hold is not the same: of pages {first} to {last} at least one is another here"
    )]
    Differs {
        /// The first page of the machine that was referred to.
        first: u64,
        /// The last.
        last: u64,
    },
}

/// A memory file, read a few pages at a time.
#[derive(Debug)]
pub(crate) struct KnownMemory {
    file: File,
    pages: u64,
    /// The pages that were read last, from page `first` on.
    window: Vec<u8>,
    first: u64,
}

impl KnownMemory {
    pub(crate) fn new(file: File) -> std::io::Result<Self> {
        let pages = file.metadata()?.len() / PAGE_SIZE as u64;
        Ok(Self { file, pages, window: Vec::new(), first: 0 })
    }

    /// The file itself.
    pub(crate) fn file(&self) -> std::io::Result<File> {
        self.file.try_clone()
    }

    /// Page `number`; `None` beyond the end.
    pub(crate) fn page(&mut self, number: u64) -> std::io::Result<Option<&[u8]>> {
        if number >= self.pages {
            return Ok(None);
        }
        let have = self.first..self.first + (self.window.len() / PAGE_SIZE) as u64;
        if !have.contains(&number) {
            let count = WINDOW.min(self.pages - number);
            self.window.resize(count as usize * PAGE_SIZE, 0);
            self.first = number;
            let read = self.file.read_exact_at(&mut self.window, number * PAGE_SIZE as u64);
            if let Err(e) = read {
                self.window.clear();
                return Err(e);
            }
        }
        let at = (number - self.first) as usize * PAGE_SIZE;
        Ok(Some(&self.window[at..at + PAGE_SIZE]))
    }
}

/// The base image, whose blocks are found by their content.
#[derive(Debug)]
pub(crate) struct KnownBlocks {
    index: BlockIndex,
    base: File,
    block: Box<[u8; BLOCK_SIZE]>,
}

impl KnownBlocks {
    pub(crate) fn new(index: BlockIndex, base: File) -> Self {
        Self { index, base, block: Box::new([0; BLOCK_SIZE]) }
    }

    /// The number of a block that has the content `page`.
    fn find(&mut self, page: &[u8]) -> Option<u32> {
        let number = self.index.find(page)?;
        read_block(&self.base, number, &mut self.block).ok()?;
        (self.block[..] == *page).then_some(number)
    }
}

fn read_block(base: &File, number: u32, block: &mut [u8; BLOCK_SIZE]) -> std::io::Result<()> {
    base.read_exact_at(block, u64::from(number) * BLOCK_SIZE as u64)
}

/// What the destination holds of what frames may refer to.
#[derive(Debug, Default)]
pub(crate) struct HeldHere {
    pub(crate) memory: Option<KnownMemory>,
    pub(crate) base: Option<File>,
    /// What the machine left here when it was here last.
    pub(crate) visit: Option<Left>,
}

/// How a page was put into a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is spelled out.
    Whole,
    /// The destination has it.
    Same,
    /// The destination has one that differs by little.
    Changed,
    /// It is a block of the base image.
    Block,
    /// The destination has it since the machine was there.
    Visited,
}

/// Pages that follow each other and are the same at the destination.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Where they are the same: one of the steps.
    step: u8,
    named: bool,
    first: u64,
    pages: u32,
}

/// The hash of pages one behind the other. Many at once are hashed in a third of the time.
#[derive(Debug, Default)]
struct PagesHash {
    hasher: blake3::Hasher,
    pending: Vec<u8>,
}

impl PagesHash {
    fn page(&mut self, page: &[u8]) {
        self.pending.extend_from_slice(page);
        if self.pending.len() >= HASHED_AT_ONCE {
            self.hasher.update(&self.pending);
            self.pending.clear();
        }
    }

    /// Of all pages since the last time.
    fn finish(&mut self) -> [u8; HASH] {
        let hash = *self.hasher.update(&self.pending).finalize().as_bytes();
        self.pending.clear();
        self.hasher.reset();
        hash
    }
}

/// Collects records of QEMU's stream for one frame.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    known: Option<KnownMemory>,
    blocks: Option<KnownBlocks>,
    visit: Option<Visited>,
    /// Steps that are complete.
    steps: Vec<u8>,
    run: Option<Run>,
    /// Bytes of the stream behind them.
    bytes: Vec<u8>,
    hash: PagesHash,
    /// Pages that are referred to.
    pages: u32,
}

impl Batch {
    /// From now on pages are compared with `known`, which the destination holds, too.
    pub(crate) fn refer_to(&mut self, known: KnownMemory) {
        self.known = Some(known);
    }

    /// From now on pages are looked for in the base image, which the destination has, too.
    pub(crate) fn refer_to_blocks(&mut self, blocks: KnownBlocks) {
        self.blocks = Some(blocks);
    }

    /// From now on pages are compared with those that the machine left at its destination.
    pub(crate) fn refer_to_visit(&mut self, visit: Visited) {
        self.visit = Some(visit);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.run.is_none() && self.bytes.is_empty()
    }

    /// Whether it holds what a frame is to hold: `most` bytes, or as many pages as it may refer to.
    pub(crate) fn is_full(&self, most: usize) -> bool {
        self.steps.len() + self.bytes.len() >= most || self.pages >= MAX_PAGES
    }

    /// Appends a record as it is.
    pub(crate) fn record(&mut self, record: &Record) {
        self.close_run();
        record.encode(&mut self.bytes);
    }

    /// Appends bytes of the stream as they are.
    pub(crate) fn stream(&mut self, bytes: &[u8]) {
        self.close_run();
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a page, by reference where that is possible.
    pub(crate) fn page(&mut self, page: &Page) -> Put {
        let number = page.offset / PAGE_SIZE as u64;
        let data = match &page.content {
            Content::Data(data) if page.block == RAM_BLOCK => data,
            Content::Data(_) | Content::Fill(_) => return self.whole(page),
        };
        // What cannot be read here is not referred to.
        let there = self.known.as_mut().and_then(|known| known.page(number).ok().flatten());
        if there.is_some_and(|there| *there == data[..]) {
            self.hash.page(data);
            self.same(STEP_SAME, page.named, number);
            return Put::Same;
        }
        if self.visit.as_ref().is_some_and(|visit| visit.has(number, data)) {
            self.hash.page(data);
            self.same(STEP_VISITED, page.named, number);
            return Put::Visited;
        }
        match there.and_then(|there| change(there, data)) {
            Some(change) => {
                self.hash.page(data);
                self.changed(page.named, number, &change);
                Put::Changed
            }
            None => self.block_or_whole(page),
        }
    }

    fn block_or_whole(&mut self, page: &Page) -> Put {
        let found = match (&mut self.blocks, &page.content) {
            (Some(blocks), Content::Data(data)) if page.block == RAM_BLOCK => {
                blocks.find(data).map(|block| (data, block))
            }
            _ => None,
        };
        let Some((data, block)) = found else { return self.whole(page) };
        self.hash.page(data);
        self.close_run();
        self.close_bytes();
        self.pages += 1;
        self.steps.put_u8(STEP_BLOCK);
        self.steps.put_u8(u8::from(page.named));
        self.steps.put_u64(page.offset / PAGE_SIZE as u64);
        self.steps.put_u32(block);
        Put::Block
    }

    fn whole(&mut self, page: &Page) -> Put {
        self.close_run();
        page.encode(&mut self.bytes);
        Put::Whole
    }

    fn same(&mut self, step: u8, named: bool, number: u64) {
        self.close_bytes();
        self.pages += 1;
        match &mut self.run {
            Some(run)
                if !named && step == run.step && number == run.first + u64::from(run.pages) =>
            {
                run.pages += 1;
            }
            _ => {
                self.close_run();
                self.run = Some(Run { step, named, first: number, pages: 1 });
            }
        }
    }

    fn changed(&mut self, named: bool, number: u64, change: &[u8]) {
        self.close_run();
        self.close_bytes();
        self.pages += 1;
        self.steps.put_u8(STEP_CHANGED);
        self.steps.put_u8(u8::from(named));
        self.steps.put_u64(number);
        self.steps.put_u16(change.len() as u16);
        self.steps.put_slice(change);
    }

    fn close_run(&mut self) {
        if let Some(run) = self.run.take() {
            self.steps.put_u8(run.step);
            self.steps.put_u8(u8::from(run.named));
            self.steps.put_u64(run.first);
            self.steps.put_u32(run.pages);
        }
    }

    fn close_bytes(&mut self) {
        if !self.bytes.is_empty() {
            self.steps.put_u8(STEP_BYTES);
            self.steps.put_u32(self.bytes.len() as u32);
            self.steps.append(&mut self.bytes);
        }
    }

    /// No page is looked for in the base image any more: to read that may take time.
    pub(crate) fn leave_blocks(&mut self) {
        self.blocks = None;
    }

    /// No page is named any more as one that the machine left: what was kept there may be damaged, and
    /// from now on that would be found too late.
    pub(crate) fn leave_visit(&mut self) {
        self.visit = None;
    }

    /// What was collected, whether it refers to pages, and how many bytes of QEMU's stream it means.
    pub(crate) fn take(&mut self) -> (Kind, Vec<u8>, u64) {
        self.close_run();
        if self.pages == 0 {
            let bytes = std::mem::take(&mut self.bytes);
            let meant = bytes.len() as u64;
            return (Kind::Memory, bytes, meant);
        }
        self.close_bytes();
        let mut raw = Vec::with_capacity(HASH + self.steps.len());
        raw.extend_from_slice(&self.hash.finish());
        raw.append(&mut self.steps);
        let meant = raw.len() as u64 + u64::from(self.pages) * PAGE_SIZE as u64;
        self.pages = 0;
        (Kind::Referring, raw, meant)
    }
}

/// What must be written over `old` to have `new`; `None` when that is not worth it.
fn change(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let (old, _) = old.as_chunks::<WORD>();
    let (new, _) = new.as_chunks::<WORD>();
    let mut out = Vec::new();
    let (mut at, mut from) = (0, 0);
    while at < WORDS {
        if old[at] == new[at] {
            at += 1;
            continue;
        }
        let start = at;
        while at < WORDS && old[at] != new[at] {
            at += 1;
        }
        if out.len() + 4 + (at - start) * WORD > MAX_CHANGE {
            return None;
        }
        out.put_u16((start - from) as u16);
        out.put_u16((at - start) as u16);
        out.extend_from_slice(new[start..at].as_flattened());
        from = at;
    }
    Some(out)
}

/// Writes a change over `page`.
fn apply(mut change: &[u8], page: &mut [u8]) -> Result<(), ReferError> {
    let bad = || ReferError::Malformed("a change of a page");
    let mut at = 0;
    while !change.is_empty() {
        let skip = usize::from(change.try_get_u16().map_err(|_| bad())?) * WORD;
        let len = usize::from(change.try_get_u16().map_err(|_| bad())?) * WORD;
        let (words, rest) = change.split_at_checked(len).ok_or_else(bad)?;
        let to = page.get_mut(at + skip..at + skip + len).ok_or_else(bad)?;
        to.copy_from_slice(words);
        at += skip + len;
        change = rest;
    }
    Ok(())
}

/// QEMU's stream as a frame of kind [`Kind::Referring`] means it.
///
/// # Errors
/// [`ReferError`]; nothing of the frame may be given to QEMU then.
pub(crate) fn expand(raw: &Bytes, held: &mut HeldHere) -> Result<Bytes, ReferError> {
    let mut raw = raw.clone();
    if raw.len() < HASH {
        return Err(ReferError::Malformed("it has no hash"));
    }
    let wanted = raw.split_to(HASH);
    let mut out = Expanded {
        stream: Vec::new(),
        hash: PagesHash::default(),
        pages: 0,
        first: u64::MAX,
        last: 0,
    };
    while raw.has_remaining() {
        out.step(&mut raw, held)?;
    }
    if out.hash.finish()[..] == wanted[..] {
        Ok(out.stream.into())
    } else {
        let (first, last) = (out.first, out.last);
        Err(ReferError::Differs { first, last })
    }
}

/// What has been made of a frame so far.
struct Expanded {
    stream: Vec<u8>,
    hash: PagesHash,
    pages: u32,
    /// The lowest and the highest page that was referred to.
    first: u64,
    last: u64,
}

impl Expanded {
    fn step(&mut self, raw: &mut Bytes, held: &mut HeldHere) -> Result<(), ReferError> {
        let step = raw.get_u8();
        if step == STEP_BYTES {
            let len = raw.try_get_u32().map_err(|_| SHORT)? as usize;
            self.stream.extend_from_slice(&cut(raw, len)?);
            return Ok(());
        }
        let named = raw.try_get_u8().map_err(|_| SHORT)? != 0;
        let first = raw.try_get_u64().map_err(|_| SHORT)?;
        match step {
            STEP_SAME | STEP_VISITED => {
                let count = u64::from(raw.try_get_u32().map_err(|_| SHORT)?);
                let end = first.checked_add(count).ok_or(BEYOND)?;
                for number in first..end {
                    let page = match step {
                        STEP_SAME => held.memory.as_mut().map(|memory| memory.page(number)),
                        _ => held.visit.as_mut().map(|left| left.page(number)),
                    };
                    let page = held_page(page, number)?;
                    // Only the first record may name the block.
                    self.page(named && number == first, number, &page)?;
                }
                Ok(())
            }
            STEP_CHANGED => {
                let len = usize::from(raw.try_get_u16().map_err(|_| SHORT)?);
                let change = cut(raw, len)?;
                let page = held.memory.as_mut().map(|memory| memory.page(first));
                let mut page = held_page(page, first)?;
                apply(&change, &mut page)?;
                self.page(named, first, &page)
            }
            STEP_BLOCK => {
                let block = raw.try_get_u32().map_err(|_| SHORT)?;
                let base = held.base.as_ref().ok_or(ReferError::Nothing)?;
                let mut page = [0; BLOCK_SIZE];
                read_block(base, block, &mut page)
                    .map_err(|source| ReferError::Read { page: block.into(), source })?;
                self.page(named, first, &page)
            }
            _ => Err(ReferError::Malformed("an unknown step")),
        }
    }

    /// Appends QEMU's record of a page.
    fn page(&mut self, named: bool, number: u64, page: &[u8]) -> Result<(), ReferError> {
        self.pages += 1;
        if self.pages > 2 * MAX_PAGES {
            return Err(ReferError::Malformed("it refers to too many pages"));
        }
        let offset = number.checked_mul(PAGE_SIZE as u64).ok_or(BEYOND)?;
        (self.first, self.last) = (self.first.min(number), self.last.max(number));
        self.hash.page(page);
        let block = Bytes::from_static(RAM_BLOCK.as_bytes());
        let content = Content::Data(Bytes::copy_from_slice(page));
        Page { block, named, offset, content }.encode(&mut self.stream);
        Ok(())
    }
}

const SHORT: ReferError = ReferError::Malformed("it ends in the midst of a step");
const BEYOND: ReferError = ReferError::Malformed("a page beyond the end of memory");

/// Page `number`, as it was `found` in what is held here.
fn held_page(
    found: Option<std::io::Result<Option<&[u8]>>>,
    number: u64,
) -> Result<Vec<u8>, ReferError> {
    let page = found
        .ok_or(ReferError::Nothing)?
        .map_err(|source| ReferError::Read { page: number, source })?;
    page.map(<[u8]>::to_vec).ok_or(BEYOND)
}

/// The next `len` bytes of a frame.
fn cut(raw: &mut Bytes, len: usize) -> Result<Bytes, ReferError> {
    if len > raw.len() { Err(SHORT) } else { Ok(raw.split_to(len)) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    /// Memory whose page `n` is filled with `n`.
    fn memory() -> Vec<u8> {
        (0..PAGES).flat_map(|n| vec![n as u8; PAGE_SIZE]).collect()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    fn open(bytes: &[u8]) -> KnownMemory {
        KnownMemory::new(file(bytes)).expect("opened")
    }

    /// A destination that holds this memory, and the base image.
    fn here(bytes: &[u8]) -> HeldHere {
        HeldHere { memory: Some(open(bytes)), base: Some(file(&base())), visit: None }
    }

    /// A base image of two blocks: 200 and 201.
    fn base() -> Vec<u8> {
        [200, 201].iter().flat_map(|fill| vec![*fill; BLOCK_SIZE]).collect()
    }

    fn page(number: u64, named: bool, data: Vec<u8>) -> Page {
        let block = Bytes::from_static(RAM_BLOCK.as_bytes());
        let offset = number * PAGE_SIZE as u64;
        Page { block, named, offset, content: Content::Data(data.into()) }
    }

    /// Puts what is to be sent into a batch and gives QEMU's own bytes beside the frame.
    fn both(pages: &[Page]) -> (Vec<u8>, Vec<Put>, Kind, Bytes) {
        let (mut plain, mut batch) = (Vec::new(), Batch::default());
        batch.refer_to(open(&memory()));
        let blocks = BlockIndex::build(&file(&base())).expect("indexed");
        batch.refer_to_blocks(KnownBlocks::new(blocks, file(&base())));
        let mut put = Vec::new();
        for p in pages {
            p.encode(&mut plain);
            put.push(batch.page(p));
        }
        batch.record(&Record::Eos);
        Record::Eos.encode(&mut plain);
        let (kind, raw, _) = batch.take();
        assert!(batch.is_empty());
        (plain, put, kind, raw.into())
    }

    #[test]
    fn what_both_hold_is_named_and_comes_out_as_qemu_sent_it() {
        let mut near = vec![7; PAGE_SIZE];
        near[100] = 1;
        near[4095] = 2;
        let strange: Vec<u8> = (0..PAGE_SIZE).map(|i| (i % 251) as u8).collect();
        let mut rom = page(3, true, vec![3; PAGE_SIZE]);
        rom.block = Bytes::from_static(b"rom");
        let zero = Page { content: Content::Fill(0), ..page(9, false, Vec::new()) };
        let pages = [
            page(5, true, vec![5; PAGE_SIZE]),
            page(6, false, vec![6; PAGE_SIZE]),
            page(7, false, near),
            page(8, false, strange),
            page(30, false, vec![201; PAGE_SIZE]),
            zero,
            rom,
            page(10, true, vec![10; PAGE_SIZE]),
            page(PAGES, false, vec![1; PAGE_SIZE]),
        ];
        let (plain, put, kind, raw) = both(&pages);
        use Put::{Block, Changed, Same, Whole};
        assert_eq!(put, [Same, Same, Changed, Whole, Block, Whole, Whole, Same, Whole]);
        assert_eq!(kind, Kind::Referring);
        assert!(raw.len() < plain.len() * 2 / 3);
        assert_eq!(expand(&raw, &mut here(&memory())).expect("expands"), plain);
    }

    #[test]
    fn a_copy_that_differs_in_a_page_that_was_named_is_found() {
        let pages = [page(5, true, vec![5; PAGE_SIZE]), page(6, false, vec![6; PAGE_SIZE])];
        let (_, _, _, raw) = both(&pages);
        let mut other = memory();
        other[6 * PAGE_SIZE + 17] ^= 1;
        let found = expand(&raw, &mut here(&other)).expect_err("another page");
        assert!(matches!(found, ReferError::Differs { first: 5, last: 6 }), "{found}");
        other[6 * PAGE_SIZE + 17] ^= 1;
        other[8 * PAGE_SIZE] ^= 1;
        expand(&raw, &mut here(&other)).expect("that page was not named");
        let short = expand(&raw, &mut here(&memory()[..6 * PAGE_SIZE])).expect_err("short");
        assert!(matches!(short, ReferError::Malformed(_)), "{short}");
        assert!(matches!(expand(&raw, &mut HeldHere::default()), Err(ReferError::Nothing)));
    }

    #[test]
    fn a_base_image_that_differs_in_a_block_that_was_named_is_found() {
        let (_, put, _, raw) = both(&[page(30, true, vec![201; PAGE_SIZE])]);
        assert_eq!(put, [Put::Block]);
        let with = |bytes: &[u8]| HeldHere { base: Some(file(bytes)), ..HeldHere::default() };
        expand(&raw, &mut with(&base())).expect("expands");
        let mut other = base();
        other[BLOCK_SIZE + 9] ^= 1;
        let found = expand(&raw, &mut with(&other)).expect_err("another block");
        assert!(matches!(found, ReferError::Differs { first: 30, last: 30 }), "{found}");
        let short = expand(&raw, &mut with(&other[..BLOCK_SIZE])).expect_err("cut off");
        assert!(matches!(short, ReferError::Read { page: 1, .. }), "{short}");
    }

    #[test]
    fn without_a_memory_to_refer_to_a_batch_is_qemus_bytes() {
        let mut batch = Batch::default();
        let (p, mut plain) = (page(5, true, vec![5; PAGE_SIZE]), Vec::new());
        assert_eq!(batch.page(&p), Put::Whole);
        p.encode(&mut plain);
        let meant = plain.len() as u64;
        assert_eq!(batch.take(), (Kind::Memory, plain, meant));
    }

    #[test]
    fn a_frame_that_asks_for_more_than_it_may_is_refused() {
        let mut raw = vec![0; HASH];
        raw.extend([STEP_SAME, 0]);
        raw.extend(0_u64.to_be_bytes());
        raw.extend(u32::MAX.to_be_bytes());
        let big = vec![0; (3 * MAX_PAGES) as usize * PAGE_SIZE];
        let refused = expand(&raw.into(), &mut here(&big)).expect_err("too many");
        assert!(refused.to_string().contains("too many pages"), "{refused}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_change_of_a_page_is_written_over_it_or_spelled_out(
            edits in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..80),
        ) {
            let (old, mut new) = (vec![9_u8; PAGE_SIZE], vec![9_u8; PAGE_SIZE]);
            for (at, byte) in edits {
                new[at] = byte;
            }
            if let Some(change) = change(&old, &new) {
                prop_assert!(change.len() <= MAX_CHANGE);
                let mut there = old;
                apply(&change, &mut there).expect("applies");
                prop_assert_eq!(there, new);
            }
        }

        #[test]
        fn no_bytes_make_it_fail_otherwise_than_by_an_error(
            raw in prop::collection::vec(any::<u8>(), 0..200),
            step in 0_u8..5,
        ) {
            let mut known = here(&memory());
            let _ = expand(&raw.clone().into(), &mut known);
            let mut framed = vec![0; HASH];
            framed.push(step);
            framed.extend(&raw);
            let _ = expand(&framed.into(), &mut known);
        }
    }
}
