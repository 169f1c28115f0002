//! One flipped bit in anything that a pool keeps: refused and named, mended, or without effect;
//! never a wrong byte in a machine.

#![allow(clippy::print_stderr, reason = "a test tells what it found")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{blocks, bundle, feed, files, fill, image, name, open, page, pages};
use godwit_disk::FrozenChain;
use godwit_image::Image;
use godwit_store::UNIT;
use godwit_substrate::{Import, ImportAs, Pool, Ready, SubstrateError};
use godwit_testkit::flip;
use godwit_types::{Code, CodedError, Mib, SubstrateId};

/// An error and its causes.
fn words(e: &SubstrateError) -> String {
    let mut text = e.to_string();
    let mut next = std::error::Error::source(e);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Whether what a machine would get is what was docked.
fn gives_what_was_docked(ready: &Ready, image: &Image) -> bool {
    let mut memory = vec![0; Mib(32).bytes() as usize];
    for (n, page) in pages() {
        memory[n as usize * UNIT..][..UNIT].copy_from_slice(&page);
    }
    let base = image.disk_path().expect("a disk");
    let layer = ready.layer().expect("a layer").to_owned();
    let chain = FrozenChain::open(&base, &[layer]).expect("a chain");
    let mut disk: Vec<Vec<u8>> = (0..common::BLOCKS).map(|n| page(5000 + n)).collect();
    for (n, block) in blocks() {
        disk[n as usize] = block;
    }
    std::fs::read(ready.memory.path()).expect("memory") == memory
        && disk.iter().enumerate().all(|(n, wanted)| {
            let mut found = vec![0; UNIT];
            chain.read_blocks(n as u64, &mut found).expect("readable");
            found == *wanted
        })
}

#[test]
fn one_bit_flipped_in_anything_stored_is_named_mended_or_without_effect() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("pool");
    let image = image(&dir.path().join("image"));
    let id = SubstrateId::new();
    {
        let pool = open(&root).expect("pool");
        fill(&pool, id, &image);
        let ready = pool.prepare(id, &image).expect("ready");
        assert!(gives_what_was_docked(&ready, &image));
        assert!(pool.check().expect("check").is_clean());
    }
    let sound = files(&root);
    let mut seen = std::collections::BTreeMap::<String, [u32; 3]>::new();
    for (path, bytes) in &sound {
        let here = path.strip_prefix(&root).expect("below").display().to_string();
        // Of the memory file only what is no hole; of a large file, places all over it.
        let places: Vec<usize> = if here.ends_with(".mem") {
            vec![5, 27 * UNIT + 17, 40 * UNIT, bytes.len() - 1]
        } else {
            let step = (bytes.len() / 12).max(1) | 1;
            (0..bytes.len()).step_by(step).chain([bytes.len() - 1]).collect()
        };
        for at in places {
            flip(path, at as u64);
            let what = format!("{here} at {at}");
            let finding = check_and_use(&root, id, &image, &what);
            let short = here.replace(&id.to_string(), "ID");
            seen.entry(short).or_default()[finding as usize] += 1;
            restore(&root, &sound);
        }
    }
    for (file, [named, mended, harmless]) in &seen {
        eprintln!("{file}: named {named}, mended {mended}, without effect {harmless}");
    }
    for file in
        [".pack", "substrate.json", "ID/state", "ID/pages", "ID/disk", ".mem", "layer.qcow2"]
    {
        let found: Vec<_> = seen.iter().filter(|(f, _)| f.contains(file)).collect();
        assert!(!found.is_empty(), "{file}");
        assert!(found.iter().all(|(_, [.., harmless])| *harmless == 0), "{file}: {found:?}");
    }
}

#[derive(Clone, Copy)]
enum Finding {
    Named,
    Mended,
    Harmless,
}

/// A daemon that starts on what is there: it opens, checks, activates.
fn check_and_use(root: &Path, id: SubstrateId, image: &Image, what: &str) -> Finding {
    let pool = match open(root) {
        Ok(pool) => pool,
        Err(e) => {
            assert!(words(&e).contains("index"), "{what}: {}", words(&e));
            return Finding::Named;
        }
    };
    let report = pool.check().expect("a check ends");
    let clean = report.is_clean();
    if !clean {
        let text = format!("{report:?}");
        assert!(
            ["clean", "pack", "unit", &id.to_string()].iter().any(|w| text.contains(w)),
            "{what}: {text}"
        );
        assert!(pool.damage(id).is_some() || report.broken.is_empty(), "{what}");
    }
    // Not by the daemon that has just read everything.
    drop(pool);
    let pool = open(root).expect("it opened before");
    match pool.prepare(id, image).and_then(|r| pool.bundle(id).map(|_| r)) {
        Ok(ready) => {
            assert!(gives_what_was_docked(&ready, image), "{what}: a wrong byte");
            if clean { Finding::Harmless } else { Finding::Mended }
        }
        Err(e) => {
            assert!(!clean, "{what}: not seen by the check, yet {}", words(&e));
            assert!(matches!(e.code(), Code::Damaged | Code::NotFound), "{what}: {}", words(&e));
            Finding::Named
        }
    }
}

fn restore(root: &Path, sound: &[(std::path::PathBuf, Vec<u8>)]) {
    std::fs::remove_dir_all(root).expect("removed");
    for (path, bytes) in sound {
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
        let file = std::fs::File::create(path).expect("made");
        file.set_len(bytes.len() as u64).expect("sized");
        for (n, page) in bytes.chunks(UNIT).enumerate().filter(|(_, p)| p.iter().any(|b| *b > 0)) {
            file.write_all_at(page, (n * UNIT) as u64).expect("written");
        }
        if path.extension().is_some_and(|e| e == "mem") {
            use std::os::unix::fs::PermissionsExt;
            let sealed = std::fs::Permissions::from_mode(0o400);
            std::fs::set_permissions(path, sealed).expect("sealed");
        }
    }
}

fn corrupt_a_unit(pool: &Pool, root: &Path) {
    let unit = pool.units(pool.list().expect("list")[0].id).expect("units")[7];
    let (path, bytes) = files(&root.join("store/packs")).remove(0);
    let at = bytes.windows(32).position(|w| w == unit.0).expect("the unit's head");
    flip(&path, at as u64 + 32 + 20);
}

#[test]
fn a_damaged_substrate_is_not_exported_and_says_substrate_unit_pack_and_offset() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = image(&dir.path().join("image"));
    let root = dir.path().join("pool");
    let pool = open(&root).expect("pool");
    let id = SubstrateId::new();
    fill(&pool, id, &image);
    pool.verify_units(id).expect("sound");
    assert_eq!(pool.damage(id), None);
    corrupt_a_unit(&pool, &root);
    let failures = [
        pool.verify_units(id).expect_err("damaged"),
        pool.export(id, std::io::sink()).expect_err("damaged"),
        pool.prepare(id, &image).expect_err("damaged"),
    ];
    for e in &failures {
        assert_eq!(e.code(), Code::Damaged);
        for part in ["substrate 'clean'", "unit ", "00000001.pack", "offset "] {
            assert!(words(e).contains(part), "{part}: {}", words(e));
        }
    }
    assert!(pool.damage(id).expect("noted").contains("00000001.pack"));
    let report = pool.check().expect("check");
    assert_eq!(report.broken.len(), 1);
    assert!(report.broken[0].1.contains("substrate 'clean'"), "{}", report.broken[0].1);
    assert!(report.broken[0].1.contains("offset"), "{}", report.broken[0].1);
}

#[test]
fn an_archive_with_something_behind_its_end_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = image(&dir.path().join("image"));
    let (here, there) = (
        open(&dir.path().join("here")).expect("pool"),
        open(&dir.path().join("there")).expect("pool"),
    );
    let id = SubstrateId::new();
    fill(&here, id, &image);
    let mut file = Vec::new();
    here.export(id, &mut file).expect("exported");
    let junk = [&file[..], b"junk"].concat();
    let e = there.import(&junk[..], ImportAs::default()).expect_err("refused");
    assert!(e.to_string().contains("behind its end"), "{e}");
    assert!(there.list().expect("list").is_empty());
    there.import(&file[..], ImportAs::default()).expect("the whole one");
}

#[test]
fn a_substrate_of_another_content_is_refused_under_the_id() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = image(&dir.path().join("image"));
    let (here, there) = (
        open(&dir.path().join("here")).expect("pool"),
        open(&dir.path().join("there")).expect("pool"),
    );
    let id = SubstrateId::new();
    let content = fill(&here, id, &image).content();
    let with = |content| ImportAs { content: Some(content), ..ImportAs::default() };
    let mut other = bundle(id, &image);
    let text = String::from_utf8(other.json.clone()).expect("text");
    other.json = text.replace("\"kind\":\"public\"", "\"kind\":\"private\"").into_bytes();
    let e = Import::begin(&there, other, with(content)).expect_err("another one");
    assert_eq!(e.code(), Code::Damaged);
    assert!(e.to_string().contains(&content.to_string()), "{e}");
    let mut file = Vec::new();
    here.export(id, &mut file).expect("exported");
    let came = there.import(&file[..], with(content)).expect("the same one");
    // What it cost to store differs, what it is does not.
    assert_eq!(came.content(), content);
}

#[test]
fn two_imports_of_one_substrate_take_turns_and_the_bytes_come_once() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = image(&dir.path().join("image"));
    let root = dir.path().join("pool");
    let pool = open(&root).expect("pool");
    let id = SubstrateId::new();
    let mut first = Import::begin(&pool, bundle(id, &image), ImportAs::default()).expect("first");
    let second = std::thread::spawn({
        let (pool, bundle) = (pool.clone(), bundle(id, &image));
        move || Import::begin(&pool, bundle, ImportAs::default()).map(|i| i.lacking().len())
    });
    assert_eq!(feed(&mut first), 80);
    assert!(!second.is_finished(), "two at once");
    first.finish().expect("published");
    let e = second.join().expect("no panic").expect_err("it is there");
    assert_eq!(e.code(), Code::Exists);

    // One under another name whose publishing fails takes nothing from the one that is there.
    let mut copy = Import::begin(
        &pool,
        bundle(id, &image),
        ImportAs { name: Some(name("copy")), ..ImportAs::default() },
    )
    .expect("a copy");
    assert_eq!(feed(&mut copy), 0);
    copy.finish().expect("published");
    let at_rest = |root: &Path| {
        let dirs = std::fs::read_dir(root.join("substrates")).expect("dir").flatten();
        dirs.filter(|e| e.file_name().to_string_lossy().starts_with('.')).count()
    };
    assert_eq!(at_rest(&root), 0);

    // What a crash of an import left, of one that has since been published.
    drop(pool);
    std::fs::create_dir(root.join(format!("substrates/.new-{id}"))).expect("mkdir");
    std::fs::create_dir(root.join(format!("substrates/.new-{id}.0123"))).expect("mkdir");
    let pool = open(&root).expect("pool");
    assert_eq!(at_rest(&root), 0);
    let freed = pool.store().gc().expect("gc");
    assert_eq!(pool.store().stats().expect("stats").units, 80, "{freed:?}");
    assert!(pool.check().expect("check").is_clean());
    assert!(gives_what_was_docked(&pool.prepare(id, &image).expect("ready"), &image));
}

#[test]
fn a_touched_ready_file_is_made_again_by_the_same_daemon() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = image(&dir.path().join("image"));
    let pool = open(&dir.path().join("pool")).expect("pool");
    let id = SubstrateId::new();
    fill(&pool, id, &image);
    let ready = pool.prepare(id, &image).expect("ready");
    let layer = ready.layer().expect("a layer").to_owned();
    let data = std::fs::metadata(&layer).expect("there").len() - 100;
    for (path, at) in [(layer.as_path(), data), (ready.memory.path(), 27 * 4096 + 9)] {
        flip(path, at);
        let report = pool.check().expect("check");
        let [(broken, why)] = &report.broken[..] else { panic!("{report:?}") };
        assert_eq!(*broken, id);
        assert!(why.contains(&path.display().to_string()), "{why}");
        assert!(pool.damage(id).is_some());
        let again = pool.prepare(id, &image).expect("made again");
        assert!(gives_what_was_docked(&again, &image));
        assert_eq!(pool.damage(id), None, "mended, and said so before the next check");
        assert!(pool.check().expect("check").is_clean());
        assert_eq!(pool.damage(id), None);
    }
}
