//! Images made, inspected, read and merged, against QEMU's own tools.
#![allow(missing_docs)]

mod common;

use common::{MIB, base, qemu_io, run, s, same};
use godwit_disk::image::{self, Backing, LayerMap, MidLayer};
use godwit_disk::{BlockBitmap, DiskError, FrozenChain};
use godwit_types::{Code, CodedError};

#[test]
fn allocation_distinguishes_zeros_from_holes_and_layers_merge() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 8);
    image::create_overlay(&at("l0.qcow2"), Backing::Raw(&at("base.raw")), 8 * MIB).expect("l0");
    qemu_io(
        &at("l0.qcow2"),
        "qcow2",
        &["write -P 17 64k 12k", "write -z 1M 8k", "write -P 3 5M 4k"],
    );
    let l0 = at("l0.qcow2");
    image::create_overlay(&at("l1.qcow2"), Backing::Qcow2(&l0), 8 * MIB).expect("l1");
    qemu_io(
        &at("l1.qcow2"),
        "qcow2",
        &["write -P 99 68k 4k", "write -z 5M 4k", "write -P 8 7M 4k"],
    );

    let layers = [at("l0.qcow2"), at("l1.qcow2")];
    let chain = FrozenChain::open(&at("base.raw"), &layers).expect("opens");
    let map = chain.allocation().expect("maps");
    let runs: Vec<_> = map.runs().collect();
    assert_eq!(runs, [16..19, 256..258, 1280..1281, 1792..1793]);
    let mut block = vec![1; 4096];
    chain.read_blocks(256, &mut block).expect("reads");
    assert!(block.iter().all(|b| *b == 0), "a zero that hides the base");

    let hashes = LayerMap::of(&chain).expect("hashes");
    image::flatten(&chain, &at("flat.qcow2")).expect("merges");
    same((&at("flat.qcow2"), "qcow2"), (&at("l1.qcow2"), "qcow2"));
    run("qemu-img", &["check", &s(&at("flat.qcow2"))]);
    image::duplicate(&chain, &at("whole.raw")).expect("duplicates");
    same((&at("whole.raw"), "raw"), (&at("l1.qcow2"), "qcow2"));
    assert!(image::duplicate(&chain, &at("whole.raw")).is_err(), "nothing is overwritten");
    let flat = FrozenChain::open(&at("base.raw"), &[at("flat.qcow2")]).expect("opens");
    assert_eq!(flat.allocation().expect("maps"), map);
    hashes.verify(&flat).expect("the same contents");
    drop(flat);

    qemu_io(&at("flat.qcow2"), "qcow2", &["write -P 98 72k 1"]);
    let flat = FrozenChain::open(&at("base.raw"), &[at("flat.qcow2")]).expect("opens");
    match hashes.verify(&flat) {
        Err(DiskError::Damaged { block: 18, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn zeros_over_a_hole_of_the_base_are_the_bases() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    let file = std::fs::File::create(at("base.raw")).expect("a base");
    file.set_len(8 * MIB).expect("a sparse one");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 64 << 10], 0).expect("some data");
    image::create_overlay(&at("l0.qcow2"), Backing::Raw(&at("base.raw")), 8 * MIB).expect("l0");
    qemu_io(&at("l0.qcow2"), "qcow2", &["write -z 0 8k", "write -z 4M 2M", "write -P 5 7M 12k"]);
    let l0 = at("l0.qcow2");
    image::create_overlay(&at("l1.qcow2"), Backing::Qcow2(&l0), 8 * MIB).expect("l1");
    qemu_io(&at("l1.qcow2"), "qcow2", &["write -P 9 5M 4k", "write -z 7172k 4k"]);
    let chain = FrozenChain::open(&at("base.raw"), &[l0, at("l1.qcow2")]).expect("opens");
    let runs: Vec<_> = chain.allocation().expect("maps").runs().collect();
    assert_eq!(runs, [0..2, 1280..1281, 1792..1793, 1794..1795]);
    image::flatten(&chain, &at("flat.qcow2")).expect("merges");
    same((&at("flat.qcow2"), "qcow2"), (&at("l1.qcow2"), "qcow2"));
}

#[test]
fn hostile_images_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 1);
    let create = |name: &str, extra: &[&str]| {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(extra);
        let path = s(&at(name));
        args.extend([path.as_str(), "1M"]);
        run("qemu-img", &args);
    };
    create("foreign", &["-u", "-b", "/etc/shadow", "-F", "raw"]);
    create("json", &["-u", "-b", r#"json:{"driver":"nbd","host":"10.0.0.1"}"#, "-F", "raw"]);
    let data = format!("data_file={}", s(&at("data")));
    create("external", &["-o", &data]);
    create("extended", &["-o", "extended_l2=on,cluster_size=128k"]);
    create("zstd", &["-o", "compression_type=zstd"]);
    for name in ["foreign", "json", "external", "extended", "zstd"] {
        let e = FrozenChain::open(&at("base.raw"), &[at(name)]).expect_err(name);
        assert!(matches!(e, DiskError::Refused { .. }), "{name}: {e:?}");
        assert_eq!(e.code(), Code::Invalid);
    }
    create("plain", &[]);
    FrozenChain::open(&at("base.raw"), &[at("plain")]).expect("a plain one is fine");
    assert!(image::check_base(&at("plain")).is_err(), "qcow2 is no raw base");
    let whole = std::fs::read(at("plain")).expect("reads");
    std::fs::write(at("cut"), &whole[..whole.len() / 2]).expect("writes");
    assert!(FrozenChain::open(&at("base.raw"), &[at("cut")]).is_err());
    let relative = image::create_overlay("x.qcow2".as_ref(), Backing::None, MIB);
    assert!(matches!(relative, Err(DiskError::Path { .. })));
}

#[test]
fn materialise_leaves_nothing_when_its_supplier_fails() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 1);
    let items: [Result<(u64, Vec<u8>), std::io::Error>; 2] =
        [Ok((3, vec![7; 4096])), Err(std::io::Error::other("the store is gone"))];
    let e = image::materialise(&at("new.qcow2"), &at("base.raw"), MIB, items).expect_err("fails");
    assert!(matches!(e, DiskError::Supply { .. }));
    let names: Vec<_> = std::fs::read_dir(dir.path()).expect("lists").collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn a_chain_is_read_while_a_stopped_qemu_has_it_open() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 2);
    image::create_overlay(&at("top.qcow2"), Backing::Raw(&at("base.raw")), 2 * MIB).expect("top");
    qemu_io(&at("top.qcow2"), "qcow2", &["write -P 42 1M 64k"]);
    // qemu-nbd holds the image's write lock as QEMU does.
    let socket = at("nbd.sock");
    let mut holder = std::process::Command::new("qemu-nbd")
        .args(["-f", "qcow2", "-t", "-k", &s(&socket), &s(&at("top.qcow2"))])
        .spawn()
        .expect("qemu-nbd starts");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(std::time::Instant::now() < deadline, "qemu-nbd does not listen");
        std::thread::yield_now();
    }
    let chain = FrozenChain::open(&at("base.raw"), &[at("top.qcow2")]).expect("opens");
    assert_eq!(
        chain.allocation().expect("maps").iter().collect::<Vec<_>>(),
        (256..272).collect::<Vec<_>>()
    );
    let mut data = vec![0; 65536];
    chain.read_blocks(256, &mut data).expect("reads");
    assert!(data.iter().all(|b| *b == 42));
    holder.kill().expect("ends");
    holder.wait().expect("ends");
}

#[test]
fn a_full_file_system_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("a directory");
    base(&dir.path().join("base.raw"), 8);
    run("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", &s(&small)]);
    let blocks = (0..2048u64).map(|b| Ok::<_, std::io::Error>((b, vec![b as u8 | 1; 4096])));
    let result =
        image::materialise(&small.join("new.qcow2"), &dir.path().join("base.raw"), 8 * MIB, blocks);
    let left = std::fs::read_dir(&small).expect("lists").count();
    run("umount", &[&s(&small)]);
    let e = result.expect_err("one MiB can't hold eight");
    assert_eq!(e.code(), Code::NoRoom, "{e:?}");
    assert!(e.to_string().contains("new.qcow2"), "{e}");
    assert_eq!(left, 0);
}

/// Whoever makes a layer may be killed between its file and its record.
#[test]
fn a_middle_layer_without_a_record_has_not_begun_and_is_made_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 4);
    let mut sent = BlockBitmap::for_bytes(4 * MIB).expect("small");
    sent.set_range(10..40);
    let (path, below) = (at("mid.qcow2"), at("base.raw"));
    assert!(!MidLayer::is_begun(&path));
    image::create_overlay(&path, Backing::Raw(&below), 4 * MIB).expect("its file");
    assert!(!MidLayer::is_begun(&path));
    assert!(MidLayer::create(&path, &below, 4 * MIB, &sent).is_err(), "another's");
    let made = MidLayer::create_again(&path, &below, 4 * MIB, &sent).expect("made");
    assert!(MidLayer::is_begun(&path));
    assert_eq!(made.received().count(), 0);
    drop(made);
    assert_eq!(MidLayer::missing(&path).expect("a record"), (30, false));
    // One that has begun is nobody's to make again.
    assert!(MidLayer::create_again(&path, &below, 4 * MIB, &sent).is_err());
}

#[test]
fn the_middle_layer_survives_a_kill_and_is_sealed_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    base(&at("base.raw"), 4);
    let mut sent = BlockBitmap::for_bytes(4 * MIB).expect("small");
    sent.set_range(10..40);
    let mid = MidLayer::create(&at("mid.qcow2"), &at("base.raw"), 4 * MIB, &sent).expect("new");
    mid.write(10, &[5; 3 * 4096]).expect("writes");
    mid.flush().expect("flushes");
    mid.write(20, &[6; 4096]).expect("writes");
    // As after kill -9: nothing that the process still held is written.
    std::mem::forget(mid);

    let resumed = MidLayer::resume(&at("mid.qcow2"), &at("base.raw")).expect("resumes");
    assert_eq!(resumed.sent, sent);
    assert_eq!(resumed.received.iter().collect::<Vec<_>>(), [10, 11, 12]);
    let mid = resumed.layer;
    mid.write(13, &[7; 27 * 4096]).expect("writes");
    mid.write(14, &[0; 4096]).expect("zeros too");
    mid.seal().expect("seals");
    assert!(mid.write(10, &[1; 4096]).is_err(), "a sealed layer is not written");
    drop(mid);
    run("qemu-img", &["check", &s(&at("mid.qcow2"))]);
    qemu_io(
        &at("mid.qcow2"),
        "qcow2",
        &["read -P 5 40k 12k", "read -P 7 52k 4k", "read -P 0 56k 4k", "read -P 7 60k 100k"],
    );
    let chain = FrozenChain::open(&at("base.raw"), &[at("mid.qcow2")]).expect("opens");
    assert_eq!(chain.allocation().expect("maps"), sent);
    assert!(MidLayer::resume(&at("mid.qcow2"), &at("base.raw")).expect("resumes").finished);
    MidLayer::forget(&at("mid.qcow2")).expect("forgets");
    assert!(MidLayer::resume(&at("mid.qcow2"), &at("base.raw")).is_err());
}

const CHILD: &str = "GODWIT_TEST_FILLS_LAYER_IN";

fn stamp(block: u64) -> Vec<u8> {
    (0..512u64).flat_map(|i| (block << 32 | i).to_le_bytes()).collect()
}

/// Runs only as the child of the test below: fills a layer until it is killed.
#[test]
fn child_that_fills_a_layer() {
    use std::io::Write as _;
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let at = |n: &str| std::path::Path::new(&dir).join(n);
    let mut sent = BlockBitmap::for_bytes(64 * MIB).expect("small");
    sent.set_range(0..16384);
    let mid = MidLayer::create(&at("mid.qcow2"), &at("base.raw"), 64 * MIB, &sent).expect("new");
    for i in 0..16384u64 {
        // An order that jumps about, as pulls do.
        let block = i * 5 % 16384;
        mid.write(block, &stamp(block)).expect("writes");
        if i % 300 == 299 {
            mid.flush().expect("flushes");
            writeln!(std::io::stdout(), "flushed {}", i + 1).expect("speaks");
        }
    }
}

#[test]
fn a_killed_writer_loses_nothing_that_was_flushed() {
    use std::io::{BufRead as _, BufReader};
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |n: &str| dir.path().join(n);
    let base = std::fs::File::create(at("base.raw")).expect("creates");
    base.set_len(64 * MIB).expect("sparse");
    let mut child = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_that_fills_a_layer", "--nocapture"])
        .env(CHILD, dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let flushed = out
        .lines()
        .map_while(Result::ok)
        .filter_map(|l| l.split_once("flushed ").and_then(|(_, n)| n.trim().parse::<u64>().ok()))
        .find(|n| *n >= 3000)
        .expect("it flushes ten times");
    child.kill().expect("kill -9");
    child.wait().expect("ends");

    let resumed = MidLayer::resume(&at("mid.qcow2"), &at("base.raw")).expect("resumes");
    assert!(resumed.received.count() >= flushed, "{} of {flushed}", resumed.received.count());
    let check = |mid: &MidLayer, map: &BlockBitmap| {
        let mut data = vec![0; 4096];
        for block in map.iter() {
            mid.read(block * 4096, &mut data).expect("reads");
            assert_eq!(data, stamp(block), "block {block}");
        }
    };
    check(&resumed.layer, &resumed.received);
    let mut rest = resumed.sent.clone();
    rest.subtract(&resumed.received).expect("one disk");
    for block in rest.iter() {
        resumed.layer.write(block, &stamp(block)).expect("writes");
    }
    check(&resumed.layer, &resumed.sent);
    let mid = resumed.layer.finish().expect("finishes");
    run("qemu-img", &["check", &s(&mid)]);
}
