//! Pages that the destination has already: its relay puts them into the machine's memory itself.
//!
//! A machine that was activated from a substrate has the substrate's pages but for those that were
//! written to, and those the kernel knows. Where both sites hold the sealed memory, the source names
//! the others in a map, and the destination's relay copies them into the file that is its QEMU's
//! memory; no pass over memory is read or loaded for them.
//!
//! ```text
//! source:      MEM_SIZE, PING ->                Fill ... ->                    Stale, RAM_DISCARD, PACKAGED ->
//! destination:            <- PONG: QEMU has emptied its memory   <- Filled ... LISTEN
//!
//! frame of kind Fill:   u64 first page | u16 pages, at most 2048 | a bit for each | BLAKE3 of those named
//! frame of kind Stale:  u64 pages | bits: pages of which the source still sends the content
//! ```
//!
//! Between that PONG and LISTEN nothing watches the memory: what is written to the file is there, and
//! what is not will be asked for. A page that is neither there nor still to come is zero at both ends,
//! so this relay answers for it. What must not happen is that a page which is there is sent once more
//! after LISTEN.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{Content, Page, ReturnMessage};
use godwit_store::is_zero;
use godwit_types::PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};

use super::known::ReferError;
use super::pages::{PageSet, of_bits, runs};

/// PING of the source's relay, to whose answer the destination's memory is empty; QEMU uses 1 to 4.
pub(crate) const PING_EMPTIED: u32 = 0x676f_6477;
/// Pages that one frame covers.
const COVERED: u64 = 2048;
/// Pages that are copied at once.
const AT_ONCE: u64 = 256;
/// The most pages of a machine's memory: 1 TiB.
const MAX_PAGES: u64 = 1 << 28;
const PAGE: u64 = PAGE_SIZE as u64;
const HASH: usize = blake3::OUT_LEN;

const SHORT: ReferError = ReferError::Malformed("a map of pages ends too early");

/// Checks the size of a frame of kind Fill, before it is kept for later.
///
/// # Errors
/// [`ReferError::Malformed`].
pub(crate) fn check_size(raw: &Bytes) -> Result<(), ReferError> {
    let most = 10 + COVERED as usize / 8 + HASH;
    if raw.len() > most { Err(ReferError::Malformed("a map of too many pages")) } else { Ok(()) }
}

/// The pages of a memory file that are not holes, as far as its file system tells.
pub(crate) fn present(file: &File, pages: u64) -> std::io::Result<PageSet> {
    let mut set = PageSet::new(pages);
    let mut at = 0;
    while at < pages * PAGE {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) => from,
            // Only a hole follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let to = seek(file, SeekFrom::Hole(from))?;
        set.insert_range(from / PAGE, to.div_ceil(PAGE));
        at = to.max(from + 1);
    }
    Ok(set)
}

/// The frames that name those of the pages `which` of the sealed memory `file` that are not zero. A zero
/// one is a hole at the destination, too.
pub(crate) fn frames<'a>(
    which: &'a PageSet,
    file: &'a File,
) -> impl Iterator<Item = std::io::Result<Bytes>> + 'a {
    let firsts = (0..which.pages()).step_by(COVERED as usize);
    firsts.filter_map(move |first| frame(which, file, first).transpose())
}

/// The frame for pages from `first` on, if there is anything to be named.
fn frame(which: &PageSet, file: &File, first: u64) -> std::io::Result<Option<Bytes>> {
    let pages = COVERED.min(which.pages() - first);
    let mut named = PageSet::new(pages);
    let mut hasher = blake3::Hasher::new();
    for (from, to) in runs((first..first + pages).filter(|p| which.contains(*p)), AT_ONCE) {
        let mut read = vec![0; ((to - from) * PAGE) as usize];
        file.read_exact_at(&mut read, from * PAGE)?;
        let data = read.chunks_exact(PAGE_SIZE).zip(from..).filter(|(page, _)| !is_zero(page));
        let data = runs(data.map(|(_, page)| page), u64::MAX);
        for (a, b) in data {
            named.insert_range(a - first, b - first);
            hasher.update(&read[((a - from) * PAGE) as usize..((b - from) * PAGE) as usize]);
        }
    }
    if named.is_empty() {
        return Ok(None);
    }
    let bits = named.bits(0, pages);
    let mut raw = BytesMut::with_capacity(10 + bits.len() + HASH);
    raw.put_u64(first);
    raw.put_u16(pages as u16);
    raw.put_slice(&bits);
    raw.put_slice(hasher.finalize().as_bytes());
    Ok(Some(raw.freeze()))
}

/// How many pages a frame of kind Fill names.
pub(crate) fn named_in(frame: &Bytes) -> u64 {
    let bits = frame.get(10..frame.len().saturating_sub(HASH)).unwrap_or_default();
    bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

/// The frame that says which pages of the machine's memory are still to come.
pub(crate) fn stale_frame(stale: &PageSet) -> Bytes {
    let mut raw = BytesMut::new();
    raw.put_u64(stale.pages());
    raw.put_slice(&stale.bits(0, stale.pages()));
    raw.freeze()
}

/// A machine's memory at its destination, and what is held there of it.
#[derive(Debug)]
pub(crate) struct Filler {
    memory: File,
    held: File,
    pages: u64,
}

impl Filler {
    /// Over the file of the machine's memory and sealed memory of the same size.
    pub(crate) fn new(memory: File, held: File) -> std::io::Result<Self> {
        let pages = memory.metadata()?.len() / PAGE;
        if held.metadata()?.len() / PAGE != pages {
            let why = "what is held is not of the size of the machine's memory";
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, why));
        }
        Ok(Self { memory, held, pages })
    }

    /// Copies the pages that a frame of kind Fill names. Nothing of what was read for it is written
    /// before its hash was found to be that of the frame.
    ///
    /// # Errors
    /// [`ReferError`].
    pub(crate) fn fill(&self, raw: &Bytes) -> Result<(), ReferError> {
        let mut raw = raw.clone();
        let first = raw.try_get_u64().map_err(|_| SHORT)?;
        let pages = u64::from(raw.try_get_u16().map_err(|_| SHORT)?);
        let bits = pages.div_ceil(8) as usize;
        if raw.len() != bits + HASH {
            return Err(SHORT);
        }
        if pages > COVERED || first.checked_add(pages).is_none_or(|end| end > self.pages) {
            return Err(ReferError::Malformed("a map of pages beyond the end of memory"));
        }
        let bits = raw.split_to(bits);
        // The last bits of the last byte may name no page.
        let named = || of_bits(&bits, first).take_while(|p| *p < first + pages);
        let parts = runs(named(), AT_ONCE);
        let mut hasher = blake3::Hasher::new();
        let mut read = Vec::with_capacity(parts.len());
        for (from, to) in parts {
            let mut bytes = vec![0; ((to - from) * PAGE) as usize];
            self.held
                .read_exact_at(&mut bytes, from * PAGE)
                .map_err(|source| ReferError::Read { page: from, source })?;
            hasher.update(&bytes);
            read.push((from, bytes));
        }
        if hasher.finalize().as_bytes()[..] != raw[..] {
            let (from, to) = (named().next().unwrap_or(first), named().last().unwrap_or(first));
            return Err(ReferError::Differs { first: from, last: to });
        }
        for (from, bytes) in read {
            self.write(from, &bytes)?;
        }
        Ok(())
    }

    /// Writes pages; zero ones stay holes.
    fn write(&self, from: u64, bytes: &[u8]) -> Result<(), ReferError> {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let data = pages.iter().enumerate().filter(|(_, p)| !is_zero(&p[..]));
        for (a, b) in runs(data.map(|(n, _)| n as u64), u64::MAX) {
            let part = &bytes[(a * PAGE) as usize..(b * PAGE) as usize];
            self.memory
                .write_all_at(part, (from + a) * PAGE)
                .map_err(|source| ReferError::Fill { page: from + a, source })?;
        }
        Ok(())
    }
}

/// What the destination's relay answers its QEMU itself: pages that are zero at both ends.
#[derive(Debug, Default)]
pub(crate) struct Zeros {
    /// Pages of which the source still sends the content; none before it has said so.
    stale: Mutex<Option<PageSet>>,
}

impl Zeros {
    /// Takes a frame of kind Stale.
    ///
    /// # Errors
    /// [`ReferError::Malformed`].
    pub(crate) fn learn(&self, raw: &Bytes) -> Result<(), ReferError> {
        if self.is_known() {
            return Err(ReferError::Malformed("what is still to come is said twice"));
        }
        let mut raw = raw.clone();
        let pages = raw.try_get_u64().map_err(|_| SHORT)?;
        if pages > MAX_PAGES || raw.len() as u64 != pages.div_ceil(8) {
            return Err(SHORT);
        }
        let mut stale = PageSet::new(pages);
        for page in of_bits(&raw, 0) {
            stale.insert(page);
        }
        *self.stale.lock().unwrap_or_else(PoisonError::into_inner) = Some(stale);
        Ok(())
    }

    /// Whether the source has said what is still to come: nothing is filled in any more.
    pub(crate) fn is_known(&self) -> bool {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether a page of the machine's memory that its QEMU asks for is zero at the source, too.
    pub(crate) fn knows(&self, block: &Bytes, start: u64) -> bool {
        let stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        block == RAM_BLOCK
            && stale.as_ref().is_some_and(|s| start / PAGE < s.pages() && !s.contains(start / PAGE))
    }
}

/// QEMU's requests for pages: those that are answered here, and the others, each with its block's name.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    block: Option<Bytes>,
    answered: HashSet<u64>,
}

impl Requests {
    /// Takes the next message of the return path. Gives the record that answers it, or appends to `on`
    /// what goes to the source.
    pub(crate) fn take(
        &mut self,
        message: ReturnMessage,
        zeros: &Zeros,
        on: &mut Vec<u8>,
    ) -> Option<Vec<u8>> {
        let ReturnMessage::ReqPages { block, start, len } = message else {
            message.encode(on);
            return None;
        };
        if block.is_some() {
            self.block = block;
        }
        let Some(block) = self.block.clone() else {
            ReturnMessage::ReqPages { block: None, start, len }.encode(on);
            return None;
        };
        if u64::from(len) != PAGE || !zeros.knows(&block, start) {
            ReturnMessage::ReqPages { block: Some(block), start, len }.encode(on);
            return None;
        }
        // Twice would be a page that is there already.
        let mut raw = Vec::new();
        if self.answered.insert(start / PAGE) {
            let content = Content::Fill(0);
            Page { block, named: true, offset: start, content }.encode(&mut raw);
        }
        Some(raw)
    }
}

/// After a break: the pages of the machine's memory that are there are not sent again, whoever put
/// them there. `bitmap` is QEMU's own, of those that it was sent.
pub(crate) fn with_present(bitmap: &Bytes, memory: &File) -> std::io::Result<Bytes> {
    let there = present(memory, memory.metadata()?.len() / PAGE)?;
    let mut out = bitmap.to_vec();
    // Little-endian words: the lowest bit of the first byte is page 0.
    let bytes = there.bits(0, there.pages());
    out.iter_mut().zip(bytes).for_each(|(sent, there)| *sent |= there);
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 5000;

    fn file(pages: impl IntoIterator<Item = (u64, u8)>) -> File {
        let file = tempfile::tempfile_in("/dev/shm").expect("a file");
        file.set_len(PAGES * PAGE).expect("sized");
        for (page, fill) in pages {
            file.write_all_at(&[fill; PAGE_SIZE], page * PAGE).expect("written");
        }
        file
    }

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        pages.into_iter().for_each(|p| assert!(set.insert(p)));
        set
    }

    fn page(file: &File, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE];
        file.read_exact_at(&mut bytes, page * PAGE).expect("read");
        assert!(bytes.iter().all(|b| *b == bytes[0]));
        bytes[0]
    }

    #[test]
    fn what_both_hold_is_copied_and_zero_pages_stay_holes() {
        let sealed = [(0, 1), (1, 0), (2, 3), (700, 7), (2047, 9), (2048, 10), (4999, 11)];
        let (here, there, memory) = (file(sealed), file(sealed), file([]));
        assert_eq!(present(&here, PAGES).expect("sought").len(), 7);
        let filler = Filler::new(memory.try_clone().expect("a handle"), there).expect("a filler");
        let which = set([0, 1, 2, 2047, 2048, 4999]);
        let frames: Vec<Bytes> = frames(&which, &here).map(|f| f.expect("read")).collect();
        assert_eq!(frames.len(), 3);
        assert_eq!(frames.iter().map(named_in).sum::<u64>(), 5, "the zero one is not named");
        for frame in &frames {
            filler.fill(frame).expect("filled");
        }
        let there = present(&memory, PAGES).expect("sought");
        assert_eq!(there.iter().collect::<Vec<_>>(), [0, 2, 2047, 2048, 4999]);
        assert_eq!([0, 2, 700, 2047, 4999].map(|p| page(&memory, p)), [1, 3, 0, 9, 11]);
        // They are not sent again after a break.
        let bitmap = with_present(&vec![0b1000; PAGES.div_ceil(64) as usize * 8].into(), &memory);
        assert_eq!(bitmap.expect("read")[..2], [0b1101, 0b1000]);
    }

    #[test]
    fn a_copy_that_differs_is_found_before_anything_of_it_is_written() {
        let (here, there, memory) = (file([(3, 3), (4, 4)]), file([(3, 3), (4, 5)]), file([]));
        let filler = Filler::new(memory.try_clone().expect("a handle"), there).expect("a filler");
        let which = set([3, 4]);
        let frame = frames(&which, &here).next().expect("one").expect("read");
        let found = filler.fill(&frame).expect_err("another page");
        assert!(matches!(found, ReferError::Differs { first: 3, last: 4 }), "{found}");
        assert!(present(&memory, PAGES).expect("sought").is_empty());
        Filler::new(memory, tempfile::tempfile().expect("a file")).expect_err("another size");
    }

    #[test]
    fn a_map_that_names_what_is_not_there_is_refused() {
        let filler = Filler::new(file([]), file([(0, 1)])).expect("a filler");
        let frame = |first: u64, pages: u16, bits: &[u8]| {
            let mut raw = BytesMut::new();
            raw.put_u64(first);
            raw.put_u16(pages);
            raw.put_slice(bits);
            raw.put_slice(&[0; HASH]);
            raw.freeze()
        };
        for raw in [
            Bytes::new(),
            frame(0, 16, &[1]),
            frame(PAGES, 8, &[1]),
            frame(u64::MAX, 8, &[1]),
            frame(0, 4096, &[1; 512]),
        ] {
            let why = filler.fill(&raw).expect_err("refused");
            assert!(matches!(why, ReferError::Malformed(_)), "{why}");
        }
        let zeros = Zeros::default();
        for raw in [&[0; 7][..], &[0xff; 8], &[0, 0, 0, 0, 0, 0, 0, 64, 1]] {
            zeros.learn(&Bytes::copy_from_slice(raw)).expect_err("refused");
        }
        check_size(&frame(0, 2048, &[1; 256])).expect("the largest");
        check_size(&frame(0, 2048, &[1; 257])).expect_err("too large");
        zeros.learn(&stale_frame(&set([5]))).expect("once");
        zeros.learn(&stale_frame(&set([5]))).expect_err("twice");
    }

    #[test]
    fn what_is_zero_at_both_ends_is_answered_here_and_once() {
        let (zeros, mut requests) = (Zeros::default(), Requests::default());
        let ram = Bytes::from_static(RAM_BLOCK.as_bytes());
        let ask = |block: Option<&Bytes>, page: u64, len: u32| ReturnMessage::ReqPages {
            block: block.cloned(),
            start: page * PAGE,
            len,
        };
        let mut on = Vec::new();
        // Nothing is known yet.
        assert_eq!(requests.take(ask(Some(&ram), 5, 4096), &zeros, &mut on), None);
        zeros.learn(&stale_frame(&set([5, 7]))).expect("learnt");
        let mut zero = Vec::new();
        let content = Content::Fill(0);
        Page { block: ram.clone(), named: true, offset: 6 * PAGE, content }.encode(&mut zero);
        assert_eq!(requests.take(ask(None, 6, 4096), &zeros, &mut on), Some(zero));
        assert_eq!(requests.take(ask(None, 6, 4096), &zeros, &mut on), Some(Vec::new()));
        assert_eq!(requests.take(ask(None, 7, 4096), &zeros, &mut on), None);
        assert_eq!(requests.take(ask(None, PAGES, 4096), &zeros, &mut on), None);
        let rom = Bytes::from_static(b"rom");
        assert_eq!(requests.take(ask(Some(&rom), 6, 4096), &zeros, &mut on), None);
        assert_eq!(requests.take(ReturnMessage::Pong(3), &zeros, &mut on), None);
        let mut wanted = Vec::new();
        for (block, page) in [(&ram, 5), (&ram, 7), (&ram, PAGES), (&rom, 6)] {
            ask(Some(block), page, 4096).encode(&mut wanted);
        }
        ReturnMessage::Pong(3).encode(&mut wanted);
        assert_eq!(on, wanted);
    }
}
