//! Substrates between two pools by the units that one lacks.

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use godwit_store::UNIT;
use godwit_substrate::{ImportAs, Pool, Substrate, SubstrateError, TakerMsg};
use godwit_types::{Code, CodedError, SubstrateId};

mod common;
use common::{fill, image, name, open};

/// One direction of a stream between two threads, which counts and may break.
struct Pipe {
    to: mpsc::Sender<Vec<u8>>,
    /// Bytes that still get through.
    left: usize,
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = buf.len().min(self.left);
        if n == 0 && !buf.is_empty() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        self.left -= n;
        self.to.send(buf[..n].to_vec()).map_err(|_| ErrorKind::BrokenPipe)?;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Out {
    from: mpsc::Receiver<Vec<u8>>,
    held: Vec<u8>,
    bytes: usize,
    /// How it ends.
    end: ErrorKind,
}

impl Read for Out {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.held.is_empty() {
            match self.from.recv() {
                Ok(part) => self.held = part,
                Err(_) if self.end == ErrorKind::UnexpectedEof => return Ok(0),
                Err(_) => return Err(self.end.into()),
            }
        }
        let n = buf.len().min(self.held.len());
        buf[..n].copy_from_slice(&self.held[..n]);
        self.held.drain(..n);
        self.bytes += n;
        Ok(n)
    }
}

fn pipe(left: usize, end: ErrorKind) -> (Pipe, Out) {
    let (to, from) = mpsc::channel();
    (Pipe { to, left }, Out { from, held: Vec::new(), bytes: 0, end })
}

/// Brings a substrate; at most `left` bytes get through. The bytes that came.
fn bring(
    from: &Pool,
    to: &Pool,
    id: SubstrateId,
    left: usize,
    end: ErrorKind,
) -> (Result<Substrate, SubstrateError>, usize) {
    bring_as(from, to, id, left, end, ImportAs::default())
}

/// As [`bring`]; what it becomes there.
fn bring_as(
    from: &Pool,
    to: &Pool,
    id: SubstrateId,
    left: usize,
    end: ErrorKind,
    becomes: ImportAs,
) -> (Result<Substrate, SubstrateError>, usize) {
    let (out, mut data) = pipe(left, end);
    let (mut control, wants) = pipe(usize::MAX, ErrorKind::UnexpectedEof);
    std::thread::scope(|s| {
        let supplier = s.spawn(move || from.supply(id, wants, out));
        let taken = to.take(becomes, &mut data, &mut control);
        if taken.is_ok() {
            control.write_all(&TakerMsg::Enough.encode()).expect("it listens");
        }
        drop(control);
        let supplied = supplier.join().expect("no panic");
        assert_eq!(supplied.is_ok(), taken.is_ok(), "{supplied:?} {taken:?}");
        (taken, data.bytes)
    })
}

/// Bytes of what is no unit.
fn small_parts(pool: &Pool, id: SubstrateId) -> usize {
    let small = pool.bundle(id).expect("a bundle");
    let disk = small.disk.map_or(0, |d| d.len());
    small.json.len() + small.state.len() + small.pages.len() + disk
}

/// Bytes that come when nothing is there yet.
fn whole_size(from: &Pool, id: SubstrateId, dir: &Path) -> usize {
    let empty = open(&dir.join("empty")).expect("pool");
    bring(from, &empty, id, usize::MAX, ErrorKind::UnexpectedEof).1
}

fn places(dir: &Path) -> (Pool, Pool, godwit_image::Image) {
    let image = image(&dir.join("image"));
    (open(&dir.join("here")).expect("pool"), open(&dir.join("there")).expect("pool"), image)
}

#[test]
fn only_what_the_other_lacks_travels() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there, image) = places(dir.path());
    let id = SubstrateId::new();
    let docked = fill(&here, id, &image);
    let (taken, all) = bring(&here, &there, id, usize::MAX, ErrorKind::UnexpectedEof);
    assert_eq!(taken.expect("brought").content(), docked.content());
    assert!(there.check().expect("check").is_clean());
    assert!(there.verify_units(id).is_ok());

    // The same memory under another id: its units are there.
    let mut copy = Vec::new();
    here.export(id, &mut copy).expect("exported");
    let named = ImportAs { name: Some(name("copy")), ..ImportAs::default() };
    let copied = here.import(&copy[..], named).expect("a copy");
    let (taken, little) = bring(&here, &there, copied.id, usize::MAX, ErrorKind::UnexpectedEof);
    taken.expect("brought");
    let head = small_parts(&here, copied.id);
    assert!(little < head + 256, "{little} bytes, its small parts have {head}");
    assert!(all > little + 70 * 100, "{all} and {little} bytes");
    let (again, _) = bring(&here, &there, id, usize::MAX, ErrorKind::UnexpectedEof);
    assert_eq!(again.expect_err("it is there").code(), Code::Exists);
}

#[test]
fn after_a_break_nothing_travels_twice() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there, image) = places(dir.path());
    let id = SubstrateId::new();
    fill(&here, id, &image);
    let whole = whole_size(&here, id, dir.path());
    let head = small_parts(&here, id);
    let cut = head + (whole - head) / 2;
    let (taken, first) = bring(&here, &there, id, cut, ErrorKind::UnexpectedEof);
    let e = taken.expect_err("cut");
    assert_eq!(e.code(), Code::Unavailable, "{e}");
    // In the midst of it nothing is in the pool; and the daemon that took it in may end.
    assert!(there.get(id).is_err());
    drop(there);
    let there = open(&dir.path().join("there")).expect("pool");
    let (taken, second) = bring(&here, &there, id, usize::MAX, ErrorKind::UnexpectedEof);
    taken.expect("it goes on");
    // The small parts come again, and at most the unit that was cut.
    assert!(first + second < whole + head + UNIT, "{first} + {second} bytes of {whole}");
    // What it is told to have stored does not depend on the break.
    let empty = open(&dir.path().join("empty")).expect("pool");
    let sizes = |pool: &Pool| pool.get(id).expect("there").sizes;
    assert_eq!(sizes(&there), sizes(&empty));
    assert_eq!(there.store().owners().expect("owners"), [id.into()], "and nobody else's");
    assert!(there.check().expect("check").is_clean());
}

#[test]
fn what_is_given_up_or_kept_too_long_is_gone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there, image) = places(dir.path());
    let id = SubstrateId::new();
    fill(&here, id, &image);
    let whole = whole_size(&here, id, dir.path());
    let cut = whole - 2000;
    let (taken, _) = bring(&here, &there, id, cut, ErrorKind::ConnectionAborted);
    taken.expect_err("given up");
    let (taken, _) = bring(&here, &there, id, cut, ErrorKind::UnexpectedEof);
    taken.expect_err("cut");
    there.forget_parts(Duration::ZERO);
    let (taken, bytes) = bring(&here, &there, id, usize::MAX, ErrorKind::UnexpectedEof);
    taken.expect("brought");
    assert_eq!(bytes, whole, "all of it came again");
    // So it is for what a daemon left that was away for too long.
    let late = dir.path().join("late");
    let third = open(&late).expect("pool");
    bring(&here, &third, id, cut, ErrorKind::UnexpectedEof).0.expect_err("cut");
    drop(third);
    let mark = late.join("substrates").join(format!(".coming-{id}"));
    let old = std::time::SystemTime::now() - 2 * godwit_substrate::KEPT;
    let file = std::fs::File::options().write(true).open(&mark).expect("a mark");
    file.set_modified(old).expect("its time");
    let third = open(&late).expect("pool");
    assert!(!mark.exists() && third.store().owners().expect("owners").is_empty());
    // What is set aside keeps nobody from importing the same.
    let third = open(&dir.path().join("fourth")).expect("pool");
    bring(&here, &third, id, cut, ErrorKind::UnexpectedEof).0.expect_err("cut");
    let mut file = Vec::new();
    here.export(id, &mut file).expect("exported");
    third.import(&file[..], ImportAs::default()).expect("from a file");
    let (taken, _) = bring(&here, &third, id, usize::MAX, ErrorKind::UnexpectedEof);
    assert_eq!(taken.expect_err("it is there").code(), Code::Exists);
    assert!(third.check().expect("check").is_clean());
}

#[test]
fn a_forged_supplier_cannot_have_a_substrate_made_of_somebody_elses_pages() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there, image) = places(dir.path());
    let id = SubstrateId::new();
    fill(&here, id, &image);
    let (_, whole) = bring(&here, &there, id, usize::MAX, ErrorKind::UnexpectedEof);
    // A substrate that only names the same pages: its supplier has none of them.
    let mut file = Vec::new();
    here.export(id, &mut file).expect("exported");
    let named = ImportAs { name: Some(name("copy")), ..ImportAs::default() };
    let copied = here.import(&file[..], named).expect("a copy");
    let mut hollow = Vec::new();
    here.supply(copied.id, &TakerMsg::Enough.encode()[..], &mut hollow).expect("its small parts");
    let among = |all: &[SubstrateId]| ImportAs { among: Some(all.to_vec()), ..ImportAs::default() };
    let e = there.take(among(&[]), &hollow[..], Vec::new()).expect_err("not made");
    assert_eq!(e.code(), Code::Unavailable, "it waits for the pages: {e}");
    assert_eq!(there.list().expect("list").len(), 1, "nothing is there");
    let e = there.take(among(&[]), &hollow[..], Vec::new()).expect_err("not made");
    assert_eq!(e.code(), Code::Unavailable, "what was kept of it is nothing: {e}");
    there.forget_parts(Duration::ZERO);
    // From an honest supplier all of them come, though they are here.
    let (taken, came) =
        bring_as(&here, &there, copied.id, usize::MAX, ErrorKind::UnexpectedEof, among(&[]));
    taken.expect("brought");
    assert!(came + 4096 > whole, "{came} bytes came of {whole}");
    there.delete(copied.id).expect("deleted");
    // Whoever may read the other has to bring nothing.
    there.take(among(&[id]), &hollow[..], Vec::new()).expect("made of what it may read");
    assert!(there.check().expect("check").is_clean());
}

#[test]
fn a_supplier_gives_nothing_else_and_a_taker_takes_nothing_else() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there, image) = places(dir.path());
    let id = SubstrateId::new();
    fill(&here, id, &image);
    let secret = here.store().put(godwit_store::Owner([7; 16]), b"of another").expect("stored");
    let wants = TakerMsg::Want(vec![secret]).encode();
    let mut out = Vec::new();
    let e = here.supply(id, &wants[..], &mut out).expect_err("foreign");
    assert_eq!(e.code(), Code::Damaged, "{e}");
    assert!(!out.windows(10).any(|w| w == b"of another"));

    let unit = here.units(id).expect("units")[0];
    let twice = TakerMsg::Want(vec![unit, unit]).encode();
    let e = here.supply(id, &twice[..], Vec::new()).expect_err("twice");
    assert_eq!(e.code(), Code::Damaged, "{e}");

    // Units that come unasked, or in another order, are refused and leave nothing.
    let mut stream = Vec::new();
    let wanted = here.units(id).expect("units");
    let mut wants = TakerMsg::Want(vec![wanted[1], wanted[0]]).encode();
    wants.extend(TakerMsg::Enough.encode());
    here.supply(id, &wants[..], &mut stream).expect("supplied");
    let e = there.take(ImportAs::default(), &stream[..], Vec::new()).expect_err("not in its turn");
    assert_eq!(e.code(), Code::Damaged, "{e}");
    assert_eq!(there.store().stats().expect("stats").units, 0);
}
