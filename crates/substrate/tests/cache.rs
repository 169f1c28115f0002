//! Sealed memory as a cache: within its budget, the least recently used goes first, nothing in use.

mod common;

use common::{bundle, feed, image, memory_bytes, name, open};
use godwit_substrate::{Import, ImportAs, Pool};
use godwit_types::{Code, CodedError, Hash, PAGE_SIZE, SubstrateId, VmId};

/// A pool with `n` substrates, its sealed memory on tmpfs.
fn pool(n: usize) -> (Pool, Vec<SubstrateId>, godwit_image::Image, tempfile::TempDir) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("tempdir");
    let image = image(&dir.path().join("image"));
    let pool = open(&dir.path().join("pool")).expect("pool");
    let ids = (0..n).map(|n| {
        let becomes = ImportAs { name: Some(name(&format!("s{n}"))), ..ImportAs::default() };
        let bundle = bundle(SubstrateId::new(), &image);
        let mut import = Import::begin(&pool, bundle, becomes).expect("sound");
        feed(&mut import);
        import.finish().expect("published").id
    });
    let ids = ids.collect();
    (pool, ids, image, dir)
}

#[test]
fn more_substrates_than_the_budget_holds_are_all_prepared_within_it() {
    let (pool, ids, image, _dir) = pool(12);
    let one = memory_bytes();
    pool.set_memory_budget(3 * one);
    let mut memories = std::collections::HashSet::new();
    for round in 0..2 {
        for id in &ids {
            let ready = pool.prepare(*id, &image).expect("ready");
            let bytes = std::fs::read(ready.memory.path()).expect("memory");
            memories.insert(Hash::of(&bytes));
            let (all, _) = pool.sealed_bytes();
            assert!(all <= 3 * one, "{round}: {all} bytes");
        }
    }
    assert_eq!(memories.len(), 1, "all have the same pages");
    assert!(pool.check().expect("check").is_clean());
    // The next daemon finds three of them and keeps within the budget, too.
    assert_eq!(pool.sealed_bytes(), (3 * one, 3 * one));
}

#[test]
fn what_is_in_use_stays_and_the_least_recently_used_goes() {
    let (pool, ids, image, _dir) = pool(5);
    let one = memory_bytes();
    pool.set_memory_budget(3 * one);
    let there = |n: usize| pool.sealed_bytes().0 > 0 && memory_of(&pool, ids[n]).exists();
    let held = pool.prepare(ids[0], &image).expect("ready");
    let (machine, other) = (VmId::new(), VmId::new());
    pool.note_clone(ids[1], machine);
    for n in [1, 2, 3, 4] {
        pool.prepare(ids[n], &image).expect("ready");
    }
    assert_eq!([0, 1, 2, 3, 4].map(there), [true, true, false, false, true]);
    // All in use: an activation goes over the budget rather than fail, and is the first to shrink.
    pool.note_clone(ids[4], other);
    pool.prepare(ids[2], &image).expect("ready");
    assert_eq!(pool.sealed_bytes(), (4 * one, one));
    pool.prepare(ids[3], &image).expect("ready");
    assert_eq!([0, 1, 2, 3, 4].map(there), [true, true, false, true, true]);
    // What nobody uses any more can be given back on request.
    drop(held);
    pool.forget_clone(machine);
    assert_eq!(pool.reclaim(one + 1), 2 * one);
    assert_eq!(pool.sealed_bytes().0, 2 * one);
    assert!(there(4));
    assert_eq!(pool.reclaim(u64::MAX), one);
    assert!(there(4));
}

#[test]
fn memory_is_opened_within_the_budget_and_stays_while_it_is_open() {
    let (pool, ids, image, _dir) = pool(2);
    let content = pool.get(ids[0]).expect("there").content();
    let one = memory_bytes();
    let to_open = |n: usize| pool.memory_to_open(ids[n]).expect("there");
    let used = pool.prepare(ids[1], &image).expect("ready");
    assert_eq!([to_open(0), to_open(1)], [(one, one), (0, 0)]);
    pool.set_memory_budget(PAGE_SIZE as u64);
    let full = pool.open_memory(ids[0], content).expect_err("beyond the budget");
    assert_eq!(full.code(), Code::NoRoom);
    assert!(!memory_of(&pool, ids[0]).exists(), "nothing is laid out for it");
    pool.set_memory_budget(u64::MAX);
    drop(used);
    assert_eq!(to_open(1), (one, 0), "it is idle");
    let other = pool.open_memory(ids[0], Hash::of(b"other")).expect_err("another content");
    assert_eq!(other.code(), Code::NotFound);

    let open = pool.open_memory(ids[0], content).expect("made and opened");
    let read = |open: &godwit_substrate::OpenMemory| {
        let mut bytes = Vec::new();
        let mut file = open.file();
        std::io::Seek::rewind(&mut file).expect("rewound");
        std::io::Read::read_to_end(&mut file, &mut bytes).expect("read");
        Hash::of(&bytes)
    };
    let sound = read(&open);
    pool.prepare(ids[1], &image).expect("ready");
    assert!(pool.reclaim(u64::MAX) > 0, "the other one is idle");
    assert!(memory_of(&pool, ids[0]).exists() && !memory_of(&pool, ids[1]).exists());
    drop(open);
    assert!(pool.reclaim(u64::MAX) > 0);
    assert!(!memory_of(&pool, ids[0]).exists());

    // One that was touched is made again before it is given out; so is one that is doubted.
    drop(pool.prepare(ids[0], &image).expect("ready"));
    godwit_testkit::flip(&memory_of(&pool, ids[0]), 5);
    assert_eq!(read(&pool.open_memory(ids[0], content).expect("made again")), sound);
    pool.doubt_memory(ids[0]);
    assert_eq!(read(&pool.open_memory(ids[0], content).expect("read again")), sound);
}

fn memory_of(pool: &Pool, id: SubstrateId) -> std::path::PathBuf {
    pool.store().dir().parent().expect("root").join(format!("memory/{id}.mem"))
}
