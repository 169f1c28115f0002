//! The rest of a machine's memory, sent in place of a QEMU that has sent everything.
//!
//! What a relay had read and not delivered when it was killed is in no QEMU's list of pages any
//! more. It is still in the memory of the source's QEMU, which stands still for good. So the
//! destination, whose post-copy is paused, is met as its source would meet it after a break:
//!
//! ```text
//! to the destination                           from the destination
//! RECV_BITMAP of each block          ---->     bitmaps: what has come
//! POSTCOPY_RESUME                    ---->     RESUME_ACK
//! ram PART { pages that are missing } ...      (requests: those pages first, on the preempt channel)
//! ram END { }, EOF                   ---->     SHUT 0
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use godwit_qemu::stream::{
    Command, Content, Page, Record, ReturnMessage, ReturnPathParser, StreamError,
};
use godwit_qemu::{BlockInUse, Machine};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::MoveError;
use super::run::qemu;
use crate::relay::{RamSection, RelayError};

const PAGE: u64 = godwit_types::PAGE_SIZE as u64;
/// Pages that are sent before the return path is looked at.
const AT_ONCE: usize = 64;
/// The largest bitmap of one block, in bytes: that of 1 TiB.
const MAX_BITMAP: u64 = 32 << 20;

/// A block with what of it is missing at the destination.
#[derive(Debug)]
struct Block {
    name: Bytes,
    used: u64,
    address: u64,
    /// As the destination told: a bit for each page that it has.
    received: Option<Bytes>,
}

impl Block {
    fn is_missing(&self, page: u64) -> bool {
        let Some(received) = &self.received else { return false };
        let byte = usize::try_from(page / 8).ok().and_then(|at| received.get(at));
        page < self.used / PAGE && byte.is_some_and(|b| b & (1 << (page % 8)) == 0)
    }
}

/// What is asked of whoever holds the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    block: usize,
    page: u64,
    address: u64,
}

/// What is sent and when. No I/O.
#[derive(Debug)]
struct Teller {
    section: u32,
    blocks: Vec<Block>,
    back: ReturnPathParser,
    /// The block of the request before.
    asked_of: Option<usize>,
    urgent: Vec<(usize, u64)>,
    sent_early: HashSet<(usize, u64)>,
    next: (usize, u64),
    resumed: bool,
    told: bool,
    shut: Option<u32>,
}

impl Teller {
    fn new(section: u32, blocks: Vec<Block>) -> Self {
        Self {
            section,
            blocks,
            back: ReturnPathParser::new(MAX_BITMAP),
            asked_of: None,
            urgent: Vec::new(),
            sent_early: HashSet::new(),
            next: (0, 0),
            resumed: false,
            told: false,
            shut: None,
        }
    }

    /// The first words.
    fn begin(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for b in &self.blocks {
            Command::RecvBitmap { block: b.name.clone() }.encode(&mut out);
        }
        out
    }

    /// Takes bytes of the return path; gives those of the main channel.
    fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, StreamError> {
        let mut out = Vec::new();
        self.back.push(bytes);
        while let Some(message) = self.back.next()? {
            match message {
                ReturnMessage::RecvBitmap { block, bitmap } => {
                    if let Some(b) = self.blocks.iter_mut().find(|b| b.name == block) {
                        b.received = Some(bitmap);
                    }
                    let all = self.blocks.iter().all(|b| b.received.is_some());
                    if all && !std::mem::replace(&mut self.told, true) {
                        Command::PostcopyResume.encode(&mut out);
                    }
                }
                ReturnMessage::ResumeAck(_) => self.resumed = true,
                ReturnMessage::ReqPages { block, start, len } => {
                    if let Some(name) = block {
                        self.asked_of = self.blocks.iter().position(|b| b.name == name);
                    }
                    let pages = start / PAGE..start.saturating_add(len.into()).div_ceil(PAGE);
                    if let Some(of) = self.asked_of {
                        self.urgent.extend(pages.take(AT_ONCE).map(|page| (of, page)));
                    }
                }
                ReturnMessage::Shut(value) => self.shut = Some(value),
                _ => {}
            }
        }
        Ok(out)
    }

    fn wanted(&self, block: usize, page: u64) -> Option<Wanted> {
        let b = self.blocks.get(block).filter(|b| b.is_missing(page))?;
        Some(Wanted { block, page, address: b.address + page * PAGE })
    }

    /// Pages that somebody waits for.
    fn urgent(&mut self) -> Vec<Wanted> {
        if !self.resumed {
            return Vec::new();
        }
        let mut out = Vec::new();
        for (block, page) in std::mem::take(&mut self.urgent) {
            // Its turn may have come before.
            if (block, page) >= self.next
                && let Some(wanted) = self.wanted(block, page)
                && self.sent_early.insert((block, page))
            {
                out.push(wanted);
            }
        }
        out
    }

    /// The next pages in their order; none when all have been sent.
    fn following(&mut self) -> Vec<Wanted> {
        let mut out = Vec::new();
        while let Some(block) = self.blocks.get(self.next.0) {
            if self.next.1 >= block.used / PAGE {
                self.next = (self.next.0 + 1, 0);
                continue;
            }
            if out.len() == AT_ONCE {
                break;
            }
            let at = self.next;
            self.next.1 += 1;
            if !self.sent_early.contains(&at) {
                out.extend(self.wanted(at.0, at.1));
            }
        }
        out
    }

    fn page(&self, wanted: Wanted, bytes: Vec<u8>) -> Record {
        let content = if bytes.iter().all(|b| *b == 0) {
            Content::Fill(0)
        } else {
            Content::Data(bytes.into())
        };
        let block = self.blocks[wanted.block].name.clone();
        Record::Page(Page { block, named: true, offset: wanted.page * PAGE, content })
    }

    /// A part of the section of memory with these pages.
    fn part(&self, pages: Vec<(Wanted, Vec<u8>)>) -> Vec<u8> {
        let mut out = Vec::new();
        Record::SectionPart { id: self.section }.encode(&mut out);
        for (wanted, bytes) in pages {
            self.page(wanted, bytes).encode(&mut out);
        }
        Record::Eos.encode(&mut out);
        Record::Footer { id: self.section }.encode(&mut out);
        out
    }

    /// The last words, on the preempt channel and on the main one.
    fn end(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut preempt, mut main) = (Vec::new(), Vec::new());
        Record::Eos.encode(&mut preempt);
        let id = self.section;
        for r in [Record::SectionEnd { id }, Record::Eos, Record::Footer { id }, Record::Eof] {
            r.encode(&mut main);
        }
        (preempt, main)
    }
}

/// The blocks that the stream named, as they lie in QEMU.
fn blocks(ram: &RamSection, there: &[BlockInUse]) -> Result<Vec<Block>, String> {
    let found = ram.blocks.iter().map(|name| {
        let b = there.iter().find(|b| b.name == *name);
        let b = b.ok_or_else(|| format!("its QEMU has no block '{name}'"))?;
        let name = Bytes::from(name.clone());
        Ok(Block { name, used: b.used_bytes, address: b.host_address, received: None })
    });
    found.collect()
}

/// The memory of a QEMU that stands still for good.
#[derive(Debug)]
pub(super) struct Rest {
    teller: Teller,
    memory: Arc<File>,
}

impl Rest {
    /// That of `machine`, as its stream described it.
    pub(super) async fn of(machine: &Machine, ram: Option<&RamSection>) -> Result<Self, MoveError> {
        const DOING: &str = "reading the memory of a machine that has left";
        let there = machine.ram_blocks().await.map_err(qemu(DOING))?;
        let pid = machine.process().pid;
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(|e| e.to_string());
        // The number may be another's by now; what was opened stays.
        let memory = memory.and_then(|file| {
            if machine.process().is_alive() { Ok(file) } else { Err("its QEMU has ended".into()) }
        });
        let ram = ram.ok_or_else(|| "its relay never told of it".to_owned());
        let blocks = ram.and_then(|r| Ok((r.section, blocks(r, &there)?)));
        let both = blocks.and_then(|(section, blocks)| Ok((section, blocks, memory?)));
        let interrupted = |why: String| MoveError::Interrupted { why: format!("{DOING}: {why}") };
        let (section, blocks, memory) = both.map_err(interrupted)?;
        Ok(Self { teller: Teller::new(section, blocks), memory: Arc::new(memory) })
    }

    /// Sends it to the relay that listens on `socket`, in place of QEMU.
    pub(super) async fn send(self, socket: PathBuf) {
        match self.run(&socket).await {
            Ok(()) => tracing::info!("the rest of a machine's memory was read from its QEMU"),
            // The relay sees its channel end, and says so.
            Err(e) => tracing::warn!(error = %e.in_full(), "the rest of a machine's memory"),
        }
    }

    async fn run(mut self, socket: &Path) -> Result<(), RelayError> {
        let fail = |source| RelayError::Qemu { what: "sending memory in place of QEMU", source };
        let mut main = UnixStream::connect(socket).await.map_err(fail)?;
        let mut preempt = UnixStream::connect(socket).await.map_err(fail)?;
        main.write_all(&self.teller.begin()).await.map_err(fail)?;
        let mut buf = BytesMut::new();
        let mut ended = false;
        loop {
            let goes_on = self.teller.resumed && !ended;
            // The return path first: somebody waits for what is asked there.
            buf.reserve(64 << 10);
            let read = tokio::select! {
                biased;
                read = main.read_buf(&mut buf) => Some(read.map_err(fail)?),
                () = std::future::ready(()), if goes_on => None,
            };
            match read {
                Some(0) => return Err(RelayError::QemuClosed("the relay")),
                Some(_) => {
                    let words = self.teller.take(&buf.split())?;
                    main.write_all(&words).await.map_err(fail)?;
                }
                None => {}
            }
            match self.teller.shut {
                Some(0) => return Ok(()),
                Some(_) => return Err(RelayError::QemuClosed("the destination QEMU")),
                None => {}
            }
            let urgent = self.teller.urgent();
            for (wanted, bytes) in self.read(urgent).await.map_err(fail)? {
                let mut out = Vec::new();
                self.teller.page(wanted, bytes).encode(&mut out);
                preempt.write_all(&out).await.map_err(fail)?;
            }
            if !goes_on {
                continue;
            }
            let pages = self.teller.following();
            if pages.is_empty() {
                let (last, over) = self.teller.end();
                preempt.write_all(&last).await.map_err(fail)?;
                main.write_all(&over).await.map_err(fail)?;
                ended = true;
            } else {
                let pages = self.read(pages).await.map_err(fail)?;
                main.write_all(&self.teller.part(pages)).await.map_err(fail)?;
            }
        }
    }

    async fn read(&self, pages: Vec<Wanted>) -> std::io::Result<Vec<(Wanted, Vec<u8>)>> {
        if pages.is_empty() {
            return Ok(Vec::new());
        }
        let memory = Arc::clone(&self.memory);
        let read = tokio::task::spawn_blocking(move || {
            let one = |wanted: Wanted| {
                let mut page = vec![0; godwit_types::PAGE_SIZE];
                memory.read_exact_at(&mut page, wanted.address)?;
                Ok((wanted, page))
            };
            pages.into_iter().map(one).collect::<std::io::Result<Vec<_>>>()
        });
        read.await.map_err(std::io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_qemu::stream::{Limits, StreamParser};

    fn block(name: &'static str, pages: u64, address: u64) -> Block {
        let name = Bytes::from_static(name.as_bytes());
        Block { name, used: pages * PAGE, address, received: None }
    }

    fn bitmap(name: &'static str, words: &[u8]) -> Vec<u8> {
        let (mut out, block) = (Vec::new(), Bytes::from_static(name.as_bytes()));
        ReturnMessage::RecvBitmap { block, bitmap: Bytes::copy_from_slice(words) }.encode(&mut out);
        out
    }

    fn encoded(message: &ReturnMessage) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    fn pages(all: &[Wanted]) -> Vec<(usize, u64, u64)> {
        all.iter().map(|w| (w.block, w.page, w.address)).collect()
    }

    #[test]
    fn what_the_destination_lacks_is_sent_once_and_what_it_asks_for_first() {
        let mut t = Teller::new(2, vec![block("m0", 10, 0x10000), block("rom", 3, 0x90000)]);
        let mut main = StreamParser::resumed(Limits::default());
        main.push(&t.begin());
        for name in ["m0", "rom"] {
            let block = Bytes::from_static(name.as_bytes());
            let wanted = Record::Command(Command::RecvBitmap { block });
            assert_eq!(main.next().expect("a stream"), Some(wanted));
        }
        // All but 1, 4 and 9 have come; of the other block nothing but 0.
        let first = t.take(&bitmap("m0", &[0b1110_1101, 0b1, 0, 0, 0, 0, 0, 0])).expect("fine");
        assert!(first.is_empty(), "one bitmap is missing");
        let resume = t.take(&bitmap("rom", &[1, 0, 0, 0, 0, 0, 0, 0])).expect("fine");
        main.push(&resume);
        assert_eq!(main.next().expect("a stream"), Some(Record::Command(Command::PostcopyResume)));
        let m0 = Some(Bytes::from_static(b"m0"));
        let _ =
            t.take(&encoded(&ReturnMessage::ReqPages { block: m0, start: 9 * PAGE, len: 4096 }));
        assert!(t.urgent().is_empty(), "not resumed yet");
        let _ = t.take(&encoded(&ReturnMessage::ResumeAck(1)));
        assert_eq!(pages(&t.urgent()), [(0, 9, 0x10000 + 9 * PAGE)]);
        let rest = t.following();
        let expected = [(0, 1), (0, 4), (1, 1), (1, 2)];
        assert_eq!(rest.iter().map(|w| (w.block, w.page)).collect::<Vec<_>>(), expected);
        main.push(&t.part(rest.iter().map(|w| (*w, vec![w.page as u8; 4096])).collect()));
        assert_eq!(main.next().expect("a stream"), Some(Record::SectionPart { id: 2 }));
        let mut came = Vec::new();
        while let Some(r) = main.next().expect("a stream") {
            if let Record::Page(p) = r {
                came.push((p.block, p.offset / PAGE));
            }
        }
        assert_eq!(came.len(), 4);
        assert!(t.following().is_empty());
        // Asked for again, although it is on its way.
        let _ = t.take(&encoded(&ReturnMessage::ReqPages { block: None, start: PAGE, len: 4096 }));
        assert!(t.urgent().is_empty());
        let (preempt, over) = t.end();
        assert_eq!(preempt.len(), 8);
        main.push(&over);
        let mut last = None;
        while let Some(r) = main.next().expect("a stream") {
            last = Some(r);
        }
        assert_eq!(last, Some(Record::Eof));
        let _ = t.take(&encoded(&ReturnMessage::Shut(0)));
        assert_eq!(t.shut, Some(0));
    }
}
