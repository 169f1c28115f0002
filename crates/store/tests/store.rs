//! The store on real files: what goes in comes out, and what is damaged is named.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use godwit_store::{Damage, Effort, Owner, Store, StoreError, StoreOptions, UNIT, zero_hash};
use godwit_types::{Code, CodedError, Hash, SubstrateId};
use rand::{RngExt, SeedableRng};

fn options() -> StoreOptions {
    StoreOptions { memory_limit_bytes: 0, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}

fn owner() -> Owner {
    SubstrateId::new().into()
}

/// `n` units of mixed kinds, as guest memory has them.
fn memory(n: usize, seed: u64) -> Vec<u8> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let mut out = vec![0; n * UNIT];
    for unit in out.as_chunks_mut::<UNIT>().0 {
        match rng.random_range(0..4) {
            0 => {}
            1 => unit[8..40].fill(rng.random()),
            2 => rng.fill(&mut unit[..]),
            _ => {
                for (i, b) in unit.iter_mut().enumerate() {
                    *b = if i % 16 < 5 { rng.random() } else { b'g' };
                }
            }
        }
    }
    out
}

fn fill(store: &Store, owner: Owner, bytes: &[u8]) -> Vec<Hash> {
    let mut w = store.writer(owner, Effort::Fast).expect("writer");
    let hashes = w.put_units(bytes).expect("put");
    w.commit().expect("commit");
    hashes
}

fn assert_holds(store: &Store, hashes: &[Hash], bytes: &[u8]) {
    let mut out = vec![0xee; bytes.len()];
    let slots: Vec<std::sync::Mutex<&mut [u8]>> =
        out.chunks_mut(UNIT).map(std::sync::Mutex::new).collect();
    store
        .get_many(hashes, |i, unit| {
            slots[i].lock().expect("slot").copy_from_slice(unit);
            Ok::<(), StoreError>(())
        })
        .expect("all there");
    drop(slots);
    assert!(out == bytes, "the bytes differ");
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir.join("packs"))
        .expect("packs")
        .map(|e| e.expect("entry").path())
        .collect();
    all.sort();
    all
}

#[test]
fn what_was_put_in_comes_out_after_reopening() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut bytes = memory(3000, 1);
    bytes.truncate(bytes.len() - 100);
    let store = Store::open(dir.path(), options()).expect("open");
    let hashes = fill(&store, owner(), &bytes);
    assert_holds(&store, &hashes, &bytes);
    drop(store);
    for memory_limit_bytes in [0, 64 << 20] {
        let store = Store::open(dir.path(), StoreOptions { memory_limit_bytes, ..options() })
            .expect("open");
        assert_holds(&store, &hashes, &bytes);
        assert_holds(&store, &hashes, &bytes);
        assert!(store.stats().expect("stats").memory_bytes <= memory_limit_bytes);
        assert!(store.check().expect("check").is_clean());
        drop(store);
    }
}

#[test]
fn a_unit_is_stored_once_and_zero_never() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    let (a, b) = (owner(), owner());
    let bytes = memory(500, 2);
    fill(&store, a, &bytes);
    let before = store.stats().expect("stats");
    let mut w = store.writer(b, Effort::Small).expect("writer");
    w.put_units(&bytes).expect("put");
    assert_eq!(w.commit().expect("commit").new_bytes, 0);
    assert_eq!(store.stats().expect("stats"), before);
    assert_eq!(store.put(a, &[0; UNIT]).expect("zero"), zero_hash());
    assert_eq!(store.stats().expect("stats"), before);
    assert_eq!(
        store.contains_many(&[zero_hash(), Hash::of(b"no")]).expect("contains"),
        [true, false]
    );
}

#[test]
fn nothing_is_handed_over_when_a_unit_is_missing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bytes = memory(300, 3);
    let mut hashes = fill(&Store::open(dir.path(), options()).expect("open"), owner(), &bytes);
    let missing = Hash::of(b"nobody stored this");
    hashes.push(missing);
    // Of the units before it, some are in memory, some on the disk only, and some are zero.
    let store = Store::open(dir.path(), options()).expect("open");
    for hash in &hashes[..20] {
        store.get(hash, &mut [0; UNIT]).expect("stored");
    }
    let handed = std::sync::atomic::AtomicUsize::new(0);
    let read = store.get_many(&hashes, |_, _| {
        handed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok::<(), StoreError>(())
    });
    assert!(matches!(read, Err(StoreError::Missing(hash)) if hash == missing), "{read:?}");
    assert_eq!(handed.into_inner(), 0);
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    let bytes = memory(300, 3);
    let mut w = store.writer(owner(), Effort::Fast).expect("writer");
    let hashes = w.put_units(&bytes).expect("put");
    drop(w);
    assert_eq!(store.stats().expect("stats").units, 0);
    assert!(packs(dir.path()).iter().all(|p| p.metadata().expect("pack").len() == 0));
    assert!(
        matches!(store.get(&hashes[1], &mut [0; UNIT]), Err(StoreError::Missing(_)))
            || hashes[1] == zero_hash()
    );
    let hashes = fill(&store, owner(), &bytes);
    assert_holds(&store, &hashes, &bytes);
}

#[test]
fn a_flipped_bit_is_named_and_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bytes = memory(400, 4);
    let store = Store::open(dir.path(), options()).expect("open");
    let hashes = fill(&store, owner(), &bytes);
    let pack = packs(dir.path()).remove(0);
    let len = pack.metadata().expect("pack").len();
    let file = std::fs::File::options().read(true).write(true).open(&pack).expect("pack");
    let mut byte = [0];
    for at in [20, len / 3, len / 2, len - 1] {
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 4], at).expect("write");
        let report = store.check().expect("check");
        assert_eq!(report.damaged.len(), 1, "at {at}");
        let d = report.damaged[0];
        assert!(d.pack == 1 && d.offset <= at && at - d.offset < 44 + 4096);
        let err = store.get(&d.hash, &mut [0; UNIT]).expect_err("refused");
        assert_eq!(err.code(), Code::Damaged);
        let text = err.to_string();
        assert!(
            text.contains(&d.hash.to_string())
                && text.contains("00000001.pack")
                && text.contains(&d.offset.to_string()),
            "{text}"
        );
        let many = store.get_many(&hashes, |_, _| Ok::<(), StoreError>(()));
        assert!(matches!(many, Err(StoreError::Damaged(x)) if *x == d));
        file.write_all_at(&byte, at).expect("write");
    }
    assert_holds(&store, &hashes, &bytes);
}

#[test]
fn a_truncated_pack_loses_only_what_lay_behind_the_cut() {
    let dir = tempfile::tempdir().expect("tempdir");
    let bytes = memory(400, 5);
    let store = Store::open(dir.path(), options()).expect("open");
    let hashes = fill(&store, owner(), &bytes);
    drop(store);
    let pack = packs(dir.path()).remove(0);
    let file = std::fs::File::options().write(true).open(&pack).expect("pack");
    let len = file.metadata().expect("pack").len();
    file.set_len(len / 2).expect("cut");
    let store = Store::open(dir.path(), options()).expect("open");
    let report = store.check().expect("check");
    assert!(!report.damaged.is_empty() && report.damaged.len() < report.units as usize);
    assert!(
        report.damaged.iter().all(|d| d.damage == Damage::Missing && d.offset + 4140 > len / 2)
    );
    // What is put in afterwards goes elsewhere and is safe; putting in the lost ones heals them.
    let more = memory(50, 6);
    let hashes_more = fill(&store, owner(), &more);
    assert_holds(&store, &hashes_more, &more);
    assert!(!store.check().expect("check").is_clean());
    fill(&store, owner(), &bytes);
    assert_holds(&store, &hashes, &bytes);
    assert!(store.check().expect("check").is_clean());
}

/// The state of the files at each step of a write is what a power cut could leave.
#[test]
fn a_cut_at_any_point_leaves_the_last_commit_whole() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    let first = memory(300, 7);
    let first_hashes = fill(&store, owner(), &first);
    let mut w = store.writer(owner(), Effort::Fast).expect("writer");
    w.put_units(&memory(300, 8)).expect("put");
    // Written, not committed: copy the files as they lie, with tails of several lengths.
    let base: HashMap<PathBuf, Vec<u8>> = packs(dir.path())
        .into_iter()
        .chain([dir.path().join("index.redb")])
        .map(|p| (p.clone(), std::fs::read(&p).expect("read")))
        .collect();
    let committed = store.stats().expect("stats").pack_bytes as usize;
    for cut in [committed, committed + 1, committed + 1000, usize::MAX] {
        let copy = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(copy.path().join("packs")).expect("mkdir");
        for (path, bytes) in &base {
            let to = copy.path().join(path.strip_prefix(dir.path()).expect("inside"));
            let keep = if to.extension().is_some_and(|e| e == "pack") {
                cut.min(bytes.len())
            } else {
                bytes.len()
            };
            std::fs::write(&to, &bytes[..keep]).expect("write");
        }
        // A pack that nobody ever committed.
        std::fs::write(copy.path().join("packs/00000077.pack"), b"half a rec").expect("write");
        let store = Store::open(copy.path(), options()).expect("open");
        assert!(store.check().expect("check").is_clean());
        assert_holds(&store, &first_hashes, &first);
        assert_eq!(packs(copy.path()).len(), 1);
        assert_eq!(packs(copy.path())[0].metadata().expect("pack").len() as usize, committed);
        let again = fill(&store, owner(), &memory(300, 8));
        assert_holds(&store, &again, &memory(300, 8));
        assert!(store.check().expect("check").is_clean());
    }
}

#[test]
fn gc_gives_back_what_nobody_holds_and_keeps_the_rest() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), StoreOptions { pack_limit_bytes: 1 << 20, ..options() })
        .expect("open");
    let (a, b) = (owner(), owner());
    let shared = memory(600, 9);
    let only_a = memory(600, 10);
    let hashes = fill(&store, b, &shared);
    fill(&store, a, &[shared.clone(), only_a].concat());
    let before = store.stats().expect("stats");
    assert_eq!(store.gc().expect("gc").removed_units, 0);
    assert!(store.release(a).expect("release"));
    // A writer under way relies on a unit that nobody else holds any more.
    let kept = memory(600, 10)[5 * UNIT..6 * UNIT].to_vec();
    let mut w = store.writer(a, Effort::Fast).expect("writer");
    let kept_hash = w.put(&kept).expect("put");
    let report = store.gc().expect("gc");
    w.commit().expect("commit");
    assert!(report.removed_units > 100 && report.freed_bytes > 0, "{report:?}");
    let after = store.stats().expect("stats");
    assert!(after.pack_bytes < before.pack_bytes * 3 / 4, "{after:?}");
    assert_holds(&store, &hashes, &shared);
    assert_holds(&store, &[kept_hash], &kept);
    assert!(store.check().expect("check").is_clean());
    drop(store);
    let store = Store::open(dir.path(), options()).expect("open");
    assert!(store.check().expect("check").is_clean());
    assert_holds(&store, &hashes, &shared);
    for o in [a, b] {
        assert!(store.release(o).expect("release"));
    }
    store.gc().expect("gc");
    assert_eq!(store.stats().expect("stats").units, 0);
    assert_eq!(store.stats().expect("stats").pack_bytes, 0);
}

#[test]
fn units_from_a_peer_are_checked_before_they_are_taken() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    let bytes = memory(50, 11);
    let hashes = fill(&store, owner(), &bytes);
    let there = tempfile::tempdir().expect("tempdir");
    let peer = Store::open(there.path(), options()).expect("open");
    let mut w = peer.writer(owner(), Effort::Fast).expect("writer");
    for h in &hashes {
        let u = store.get_encoded(h).expect("get");
        w.put_encoded(*h, u.encoding, u.raw_len, &u.body).expect("put");
    }
    let u = store.get_encoded(&hashes[0]).expect("get");
    let err = w.put_encoded(Hash::of(b"else"), u.encoding, u.raw_len, &u.body);
    assert!(matches!(err, Err(StoreError::BadUnit(_))));
    assert_eq!(w.hold(&[hashes[0], Hash::of(b"no")]).expect("hold"), [Hash::of(b"no")]);
    w.commit().expect("commit");
    assert_holds(&peer, &hashes, &bytes);
}

#[test]
fn what_was_put_in_ahead_counts_when_it_comes_again_and_is_forgotten_when_not() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    let known = memory(40, 20);
    let known_hashes = fill(&store, owner(), &known);
    let before = store.stats().expect("stats");
    let (changed, stays, late) = (memory(200, 21), memory(120, 22), memory(30, 23));
    let o = owner();
    let mut w = store.writer(o, Effort::Fast).expect("writer");
    let guess = [&known[..], &changed, &stays].concat();
    let guessed = w.put_units(&guess).expect("put");
    let ahead = w.stored();
    w.start_over();
    let real = [&known[..], &late, &stays].concat();
    let hashes = w.put_units(&real).expect("put");
    let again = w.stored();
    w.forget_wrong_guesses();
    let kept = w.stored();
    let stored = w.commit().expect("commit");
    assert_eq!(stored, kept);
    assert_holds(&store, &hashes, &real);
    assert_holds(&store, &known_hashes, &known);
    // What came again cost nothing more, and only that and what was late is there.
    let same = fill_elsewhere(&[&known[..], &late, &stays].concat());
    let units = store.stats().expect("stats").units - before.units;
    assert_eq!(units, kept.new_units);
    assert_eq!(units + before.units, same.units);
    assert!(again.new_units < ahead.new_units + 30, "{again:?} after {ahead:?}");
    let wrong: Vec<Hash> = guessed.iter().copied().filter(|h| !hashes.contains(h)).collect();
    assert!(wrong.len() > 100, "{} wrong guesses", wrong.len());
    assert!(store.contains_many(&wrong).expect("asked").iter().all(|there| !there));
    assert!(store.owned(o).expect("owned").iter().all(|h| hashes.contains(h)));
    // Their bytes are unused space.
    let report = store.gc().expect("gc");
    assert_eq!(report.removed_units, 0);
    assert_eq!(report.packs, 1);
    assert_holds(&store, &hashes, &real);
    assert_holds(&store, &known_hashes, &known);
}

fn fill_elsewhere(bytes: &[u8]) -> godwit_store::StoreStats {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(dir.path(), options()).expect("open");
    fill(&store, owner(), bytes);
    store.stats().expect("stats")
}

#[test]
fn a_full_disk_is_refused_with_nothing_half_done() {
    let mount = match Tmpfs::mount(12 << 20) {
        Ok(m) => m,
        Err(e) => {
            eprintln!("SKIPPED: a small tmpfs cannot be mounted here: {e}");
            return;
        }
    };
    let store = Store::open(mount.path(), options()).expect("open");
    let small = memory(300, 12);
    let o = owner();
    let hashes = fill(&store, o, &small);
    let before = store.stats().expect("stats");
    // With its reserve the store sees it coming.
    let mut w = store.writer(o, Effort::Fast).expect("writer");
    let err = w.put_units(&memory(12_000, 13)).expect_err("full");
    assert_eq!(err.code(), Code::NoRoom, "{err}");
    drop(w);
    assert_eq!(store.stats().expect("stats"), before);
    // Without it the system says so.
    drop(store);
    let store =
        Store::open(mount.path(), StoreOptions { reserve_bytes: 0, ..options() }).expect("open");
    let filler = mount.path().join("filler");
    let free = rustix::fs::statvfs(mount.path()).expect("statvfs");
    let bytes = vec![1; (free.f_bavail * free.f_frsize) as usize];
    std::fs::write(&filler, &bytes).expect("fill the disk");
    let mut w = store.writer(o, Effort::Fast).expect("writer");
    let done = w.put_units(&memory(100, 14)).map(|_| ()).and_then(|()| w.commit().map(|_| ()));
    assert_eq!(done.expect_err("full").code(), Code::NoRoom);
    assert_holds(&store, &hashes, &small);
    std::fs::remove_file(&filler).expect("remove");
    // Room again: the same store goes on.
    let more = fill(&store, o, &memory(100, 14));
    assert_holds(&store, &more, &memory(100, 14));
    assert!(store.check().expect("check").is_clean());
}

/// The disk fills up while the index commits: the commit fails whole, and the store goes on.
#[test]
fn a_disk_that_fills_up_in_the_commit_fails_it_whole() {
    let mount = match Tmpfs::mount(48 << 20) {
        Ok(m) => m,
        Err(e) => {
            eprintln!("SKIPPED: a small tmpfs cannot be mounted here: {e}");
            return;
        }
    };
    let store =
        Store::open(mount.path(), StoreOptions { reserve_bytes: 0, ..options() }).expect("open");
    let o = owner();
    let small = memory(200, 20);
    let hashes = fill(&store, o, &small);
    let before = store.stats().expect("stats");
    let mut w = store.writer(o, Effort::Fast).expect("writer");
    // Many tiny distinct units: the index grows more than the pack.
    let bytes: Vec<u8> = (0..12_000u64)
        .flat_map(|n| {
            let mut u = [0u8; UNIT];
            u[..8].copy_from_slice(&(n + 1).to_le_bytes());
            u
        })
        .collect();
    w.put_units(&bytes).expect("put");
    let free = rustix::fs::statvfs(mount.path()).expect("statvfs");
    let filler = mount.path().join("filler");
    std::fs::write(&filler, vec![1; (free.f_bavail * free.f_frsize) as usize]).expect("fill");
    assert_eq!(w.commit().expect_err("full").code(), Code::NoRoom);
    assert_eq!(store.stats().expect("stats"), before);
    std::fs::remove_file(&filler).expect("remove");
    assert_holds(&store, &hashes, &small);
    let all = fill(&store, o, &bytes);
    assert_holds(&store, &all, &bytes);
    assert!(store.check().expect("check").is_clean());
}

#[test]
fn a_store_is_open_once() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _store = Store::open(dir.path(), options()).expect("open");
    let again = Store::open(dir.path(), options()).expect_err("busy");
    assert_eq!(again.code(), Code::Conflict);
}

/// A small tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(bytes: usize) -> std::io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let data = std::ffi::CString::new(format!("size={bytes},mode=0700"))?;
        rustix::mount::mount(
            "tmpfs",
            dir.path(),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            &*data,
        )?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// The database of the index takes the older of its two commits when the newer is damaged.
#[test]
fn a_flip_anywhere_in_the_head_of_the_index_loses_no_unit_unsaid() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), options()).expect("open");
    let hashes = [1, 2].map(|n: u8| store.put(owner(), &[n; UNIT]).expect("stored"));
    // As a daemon that is killed leaves it.
    let all = ["index.redb", "index.mark"].map(|n| dir.path().join(n));
    let sound = all.each_ref().map(|p| std::fs::read(p).expect("read"));
    let pack = dir.path().join("packs/00000001.pack");
    let packed = std::fs::read(&pack).expect("read");
    drop(store);
    let mut fell_back = 0;
    for at in 0..320 {
        for (path, bytes) in all.iter().zip(&sound) {
            std::fs::write(path, bytes).expect("written");
        }
        let mut bytes = sound[0].clone();
        bytes[at] ^= 1;
        std::fs::write(&all[0], bytes).expect("written");
        match Store::open(dir.path(), options()) {
            Ok(store) => {
                let found = store.contains_many(&hashes).expect("asked");
                assert_eq!(found, [true, true], "byte {at}: lost, and nothing said");
            }
            Err(e) => fell_back += u32::from(matches!(e, StoreError::FellBack { .. })),
        }
        assert_eq!(std::fs::read(&pack).expect("read"), packed, "byte {at}: a pack was cut");
    }
    assert!(fell_back > 0, "no flip reaches what this is about");
}

#[test]
fn an_index_found_damaged_on_the_disk_is_reported_and_the_store_goes_on() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::open(dir.path(), options()).expect("open");
    let mut hashes: Vec<Hash> =
        (0..50u8).map(|n| store.put(owner(), &[n + 1; UNIT]).expect("stored")).collect();
    assert!(store.check().expect("check").is_clean());
    let path = dir.path().join("index.redb");
    let sound = std::fs::read(&path).expect("read");
    // Where the entry of a unit is, in every version of its page.
    for (at, _) in sound.windows(32).enumerate().filter(|(_, w)| *w == hashes[0].0) {
        let file = std::fs::File::options().write(true).open(&path).expect("open");
        std::os::unix::fs::FileExt::write_all_at(&file, &[sound[at + 9] ^ 1], at as u64 + 9)
            .expect("flipped");
    }
    let report = store.check().expect("a check ends");
    assert!(report.index.is_some() && !report.is_clean(), "{report:?}");
    hashes.push(store.put(owner(), &[99; UNIT]).expect("it can be written"));
    assert!(store.contains_many(&hashes).expect("asked").iter().all(|f| *f));
    assert!(!dir.path().join("index.check").exists());
    // The commit has written that part of it anew, from what was read when it was sound.
    assert!(store.check().expect("and checked again").is_clean());
}
