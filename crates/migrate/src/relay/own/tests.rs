use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use godwit_qemu::stream::RamBlock;

use super::*;

pub(in crate::relay) const PAGES: u64 = 300;

/// A machine's memory beside what it was started from.
#[derive(Debug)]
struct Guest {
    sealed: File,
    now: Arc<Mutex<Vec<u8>>>,
    rom: Arc<Mutex<Vec<u8>>>,
}

impl GuestMemory for Guest {
    fn written(&self) -> io::Result<Vec<u64>> {
        let now = self.now.lock().expect("memory");
        let mut page = [0; PAGE_SIZE];
        let differs = |n: &u64| {
            self.sealed.read_exact_at(&mut page, n * PAGE).expect("read");
            now[(n * PAGE) as usize..][..PAGE_SIZE] != page
        };
        Ok((0..PAGES).filter(differs).collect())
    }

    fn read(&self, block: &Bytes, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let of = if block == RAM_BLOCK { &self.now } else { &self.rom };
        buf.copy_from_slice(&of.lock().expect("memory")[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn has(&self, block: &Bytes, bytes: u64) -> bool {
        match &block[..] {
            b"rom" => bytes == 2 * PAGE,
            name => name == RAM_BLOCK.as_bytes() && bytes == PAGES * PAGE,
        }
    }

    fn sealed(&self) -> &File {
        &self.sealed
    }
}

pub(in crate::relay) type Memory = Arc<Mutex<Vec<u8>>>;

/// Sealed memory with data in its first 200 pages, and a machine that has it.
pub(in crate::relay) fn guest() -> (OwnPages, Memory, Memory) {
    guest_of(true)
}

/// The same; `held` tells whether the destination holds the sealed memory.
fn guest_of(held: bool) -> (OwnPages, Memory, Memory) {
    let sealed = tempfile::tempfile_in("/dev/shm").expect("a file");
    sealed.set_len(PAGES * PAGE).expect("sized");
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    for page in 0..200 {
        bytes[page * PAGE_SIZE..][..PAGE_SIZE].fill(page as u8 + 1);
    }
    sealed.write_all_at(&bytes[..200 * PAGE_SIZE], 0).expect("written");
    let now = Arc::new(Mutex::new(bytes));
    let rom = Arc::new(Mutex::new(vec![0xee; 2 * PAGE_SIZE]));
    let guest = Guest { sealed, now: Arc::clone(&now), rom: Arc::clone(&rom) };
    (OwnPages::new(Box::new(guest), held), now, rom)
}

pub(in crate::relay) fn list(extra: &[(&'static str, u64)]) -> MemSize {
    let usual = [("m0", PAGES * PAGE), ("rom", 2 * PAGE)];
    let blocks = usual.iter().chain(extra).map(|(name, used)| RamBlock {
        name: Bytes::from_static(name.as_bytes()),
        used: *used,
        address: None,
    });
    let blocks: Vec<RamBlock> = blocks.collect();
    MemSize { total: blocks.iter().map(|b| b.used).sum(), blocks }
}

pub(in crate::relay) fn write(memory: &Memory, page: usize, fill: u8) {
    memory.lock().expect("memory")[page * PAGE_SIZE..][..PAGE_SIZE].fill(fill);
}

fn numbers(pages: &[Page]) -> Vec<(&str, u64)> {
    pages
        .iter()
        .map(|p| (std::str::from_utf8(&p.block).expect("a name"), p.offset / PAGE))
        .collect()
}

/// QEMU, which has read nothing of its pass: everything is dirty.
fn all_dirty(own: &mut OwnPages) {
    for (name, pages) in [("m0", PAGES), ("rom", 2)] {
        let ranges = [Discard { start: 0, len: pages * PAGE }];
        own.discarded(0, &Bytes::from_static(name.as_bytes()), &ranges);
    }
}

fn sent(own: &mut OwnPages) -> Vec<Page> {
    let mut all = Vec::new();
    while !own.all_sent() {
        all.extend(own.next().expect("read"));
    }
    all
}

fn page(block: &'static str, number: u64) -> Page {
    page_of(&Bytes::from_static(block.as_bytes()), number, vec![1; PAGE_SIZE].into())
}

#[test]
fn only_own_pages_are_sent_and_of_them_again_what_has_changed() {
    let (mut own, memory, rom) = guest();
    for page in [5, 6, 250] {
        write(&memory, page, 99);
    }
    write(&memory, 7, 0);
    assert!(own.begin(&list(&[])).expect("read"));
    let (fill, _) = own.to_fill().expect("a handle");
    assert_eq!(fill.runs(), [(0, 5), (8, 200)]);
    assert_eq!(own.progress(), (197 + 6, 6));
    let pages = sent(&mut own);
    let own_pages = [("m0", 5), ("m0", 6), ("m0", 7), ("m0", 250), ("rom", 0), ("rom", 1)];
    assert_eq!(numbers(&pages), own_pages);
    assert!(pages.iter().all(|p| p.named) && pages[2].content == Content::Fill(0));
    assert!(own.is_due(&page("m0", 5)), "before the switch all is");

    // One changes, one is new, one was filled in and changes, one of another block changes.
    for page in [6, 251, 100] {
        write(&memory, page, 77);
    }
    write(&rom, 1, 3);
    all_dirty(&mut own);
    let at_stop = own.stop().expect("read");
    assert!(at_stop.late.is_empty());
    assert_eq!(at_stop.stale.iter().collect::<Vec<_>>(), [6, 100, 251]);
    let discards: Vec<_> = at_stop
        .discards
        .iter()
        .map(|d| match d {
            Command::RamDiscard { block, ranges, version: 0 } => (block.clone(), ranges.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(discards, [(Bytes::from_static(b"m0"), 3), (Bytes::from_static(b"rom"), 1)]);
    // Of what QEMU sends then, only that goes on, and once.
    let due = |own: &mut OwnPages, block, n| own.is_due(&page(block, n));
    assert!(due(&mut own, "m0", 6) && !due(&mut own, "m0", 6));
    assert!(!due(&mut own, "m0", 5) && !due(&mut own, "m0", 0) && !due(&mut own, "m0", 299));
    assert!(due(&mut own, "rom", 1) && !due(&mut own, "rom", 0));
}

#[test]
fn what_the_destination_does_not_hold_is_sent_ahead_of_own_pages() {
    let (mut own, memory, _) = guest_of(false);
    write(&memory, 5, 99);
    let zero = vec![0; PAGE_SIZE];
    own.memory.sealed().write_all_at(&zero, 198 * PAGE).expect("written");
    write(&memory, 198, 0);
    assert!(own.begin(&list(&[])).expect("read"));
    assert!(own.to_fill().expect("a handle").0.is_empty());
    let pages = sent(&mut own);
    let sealed = (0..5).chain(6..198).chain([199]).map(|n| ("m0", n));
    let wanted: Vec<_> = sealed.chain([("m0", 5), ("rom", 0), ("rom", 1)]).collect();
    assert_eq!(numbers(&pages), wanted);
    assert_eq!(own.progress(), (202, 0));
    write(&memory, 8, 1);
    all_dirty(&mut own);
    assert_eq!(own.stop().expect("read").stale.runs(), [(8, 9)]);

    // Cut short, the rest of it is still to come.
    let (mut own, _, _) = guest_of(false);
    assert!(own.begin(&list(&[])).expect("read"));
    assert_eq!(own.next().expect("read").len(), 64);
    own.cut_short();
    all_dirty(&mut own);
    assert_eq!(own.stop().expect("read").stale.runs(), [(64, 200)]);
}

#[test]
fn what_qemu_read_itself_and_will_not_send_again_is_sent_in_its_place() {
    let (mut own, memory, _) = guest();
    write(&memory, 5, 99);
    assert!(own.begin(&list(&[])).expect("read"));
    let _ = sent(&mut own);
    // QEMU's pass brings page 5 of an earlier time, and page 9, which it has seen change.
    own.streamed(&Bytes::from_static(b"m0"), 5 * PAGE);
    write(&memory, 9, 88);
    let name = Bytes::from_static(b"m0");
    own.discarded(0, &name, &[Discard { start: 20 * PAGE, len: PAGE }]);
    let at_stop = own.stop().expect("read");
    assert_eq!(numbers(&at_stop.late), [("m0", 5), ("m0", 9)]);
    // A destination enters LISTEN only after a discard.
    assert_eq!(at_stop.stale.iter().collect::<Vec<_>>(), [20]);
    assert_eq!(at_stop.discards.len(), 1);
    assert!(own.is_due(&page("m0", 20)));
}

#[test]
fn a_machine_with_too_many_pages_of_its_own_is_read_by_the_usual_pass() {
    let (mut own, ..) = guest();
    assert!(!own.begin(&list(&[("vga", PAGE)])).expect("read"), "a block that cannot be read");
    let (mut own, ..) = guest();
    let mut odd = list(&[]);
    odd.blocks[0].used -= 1;
    assert!(!own.begin(&odd).expect("read"));
}

#[test]
fn an_end_before_everything_was_sent_leaves_the_rest_for_later() {
    let (mut own, memory, _) = guest();
    (0..150).for_each(|page| write(&memory, page, 0xaa));
    assert!(own.begin(&list(&[])).expect("read"));
    assert_eq!(own.next().expect("read").len(), 64);
    own.cut_short();
    assert!(own.all_sent() && own.next().expect("read").is_empty());
    all_dirty(&mut own);
    let at_stop = own.stop().expect("read");
    assert_eq!(at_stop.stale.runs(), [(64, 150)]);
}
