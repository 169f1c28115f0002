//! Sealed memory as a cache: within its budget, the least recently used goes first, nothing in use.

mod common;

use common::{bundle, feed, image, name, open, pages};
use godwit_substrate::{Becomes, Import, Pool};
use godwit_types::{Hash, PAGE_SIZE, SubstrateId, VmId};

/// A pool with `n` substrates, its sealed memory on tmpfs.
fn pool(n: usize) -> (Pool, Vec<SubstrateId>, godwit_image::Image, tempfile::TempDir) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("tempdir");
    let image = image(&dir.path().join("image"));
    let pool = open(&dir.path().join("pool")).expect("pool");
    let ids = (0..n).map(|n| {
        let becomes = Becomes { name: Some(name(&format!("s{n}"))), ..Becomes::default() };
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
    let one = pages().len() as u64 * PAGE_SIZE as u64;
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
    let one = pages().len() as u64 * PAGE_SIZE as u64;
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

fn memory_of(pool: &Pool, id: SubstrateId) -> std::path::PathBuf {
    pool.store().dir().parent().expect("root").join(format!("memory/{id}.mem"))
}
