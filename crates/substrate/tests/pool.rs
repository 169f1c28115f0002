//! The pool without a machine: what comes in is checked, what goes out comes back.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use godwit_qemu::{BootFile, MachineSpec, Manifest};
use godwit_store::{Effort, Owner, PageMap, Store, StoreOptions, UNIT};
use godwit_substrate::{
    Bundle, Import, ImportAs, Part, Pool, PoolDirs, SealedMemory, Shape, Sizes, Substrate,
    SubstrateError,
};
use godwit_types::{Arch, Code, CodedError, Hash, Mib, Name, SubstrateId, SubstrateKind};

fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

struct Site {
    pool: Pool,
    _dir: tempfile::TempDir,
}

fn site(limit_bytes: u64) -> Site {
    let dir = tempfile::tempdir().expect("tempdir");
    let options =
        StoreOptions { reserve_bytes: 0, memory_limit_bytes: 0, ..StoreOptions::default() };
    let store = Store::open(&dir.path().join("store"), options).expect("store");
    let dirs =
        PoolDirs { substrates: dir.path().join("substrates"), memory: dir.path().join("memory") };
    Site { pool: Pool::open(dirs, store, limit_bytes).expect("pool"), _dir: dir }
}

/// A memory of 32 MiB with some pages in it.
fn memory() -> Vec<(u64, Vec<u8>)> {
    (0..300u64)
        .map(|n| {
            let mut page = vec![n as u8; UNIT];
            for (i, b) in page.iter_mut().enumerate().step_by(3) {
                *b = ((i as u64 * (n + 7)) >> 3) as u8;
            }
            (n * 27, page)
        })
        .collect()
}

fn bundle(id: SubstrateId) -> Bundle {
    let file = BootFile { path: "/none".into(), hash: Hash::of(b"kernel") };
    let spec = MachineSpec {
        arch: Arch::X86_64,
        memory: Mib(32),
        vcpus: 1,
        kernel: file,
        initrd: None,
        cmdline: "quiet".into(),
        display: false,
        disk: false,
        nic_ports: 1,
    };
    let mut map = PageMap::new(Mib(32).bytes() / UNIT as u64);
    for (n, page) in memory() {
        map.push(n, Hash::of(&page)).expect("in order");
    }
    let (pages, state) = (map.encode(), b"device state".to_vec());
    let part = |b: &[u8]| Part { hash: Hash::of(b), bytes: b.len() as u64 };
    let substrate = Substrate {
        format: 1,
        id,
        name: name("clean"),
        kind: SubstrateKind::Public,
        owner: name("operator"),
        image: name("tiny"),
        image_hash: Hash::of(b"image"),
        shape: Shape {
            arch: Arch::X86_64,
            memory: Mib(32),
            vcpus: 1,
            display: false,
            disk: false,
            nic_ports: 1,
        },
        cmdline: "quiet".into(),
        machine: Manifest::of(&spec, "10.0.2"),
        macs: Vec::new(),
        nic_in: None,
        generalised: false,
        agent: true,
        state: part(&state),
        pages: part(&pages),
        disk: None,
        docked_unix_ms: 1,
        sizes: Sizes::default(),
    };
    let json = serde_json::to_vec(&substrate).expect("json");
    Bundle { json, state, pages, disk: None }
}

fn fill(pool: &Pool, id: SubstrateId) -> Result<Substrate, SubstrateError> {
    let mut import = Import::begin(pool, bundle(id), ImportAs::default())?;
    let mut encoder = godwit_store::Encoder::new(Effort::Fast);
    for (_, page) in memory() {
        let mut body = Vec::new();
        let encoding = encoder.encode(&page, &mut body);
        import.put(Hash::of(&page), encoding, page.len(), &body)?;
    }
    import.finish()
}

#[test]
fn an_archive_carries_a_substrate_to_another_pool() {
    let (here, there) = (site(1 << 30), site(1 << 30));
    let id = SubstrateId::new();
    fill(&here.pool, id).expect("filled");
    let mut file = Vec::new();
    let bytes = here.pool.export(id, &mut file).expect("exported");
    assert_eq!(bytes, file.len() as u64);
    let came = there
        .pool
        .import(&file[..], ImportAs { owner: Some(name("ann")), ..ImportAs::default() })
        .expect("imported");
    assert_eq!((came.id, came.name.as_str(), came.owner.as_str()), (id, "clean", "ann"));
    assert_eq!(there.pool.list().expect("list").len(), 1);
    assert!(there.pool.check().expect("check").is_clean());
    assert_eq!(there.pool.units(id).expect("units"), here.pool.units(id).expect("units"));
    let again = there.pool.import(&file[..], ImportAs::default()).expect_err("there already");
    assert_eq!(again.code(), Code::Exists);

    // Under a name of its own it is another substrate, made of the same units.
    let copied = ImportAs { name: Some(name("copy")), ..ImportAs::default() };
    let copy = there.pool.import(&file[..], copied.clone()).expect("imported");
    assert_eq!(copy.name.as_str(), "copy");
    assert_ne!(copy.id, id);
    let units = there.pool.store().stats().expect("stats").units;
    assert_eq!(units, here.pool.store().stats().expect("stats").units);
    let taken = there.pool.import(&file[..], copied).expect_err("the name is taken");
    assert_eq!(taken.code(), Code::Exists);
}

/// The file of [`fill`]'s substrate with every unit left out: it only names them.
fn hollow(file: &[u8], pool: &Pool, id: SubstrateId) -> Vec<u8> {
    let b = pool.bundle(id).expect("bundle");
    let head = 4 + 2 + 4 + b.json.len() + b.state.len() + b.pages.len();
    let mut out = file[..head].to_vec();
    out.extend_from_slice(&0u64.to_le_bytes());
    let sum = Hash::of(&out);
    out.extend_from_slice(&sum.0);
    out
}

#[test]
fn a_file_is_public_only_if_its_machine_was_generalised() {
    for generalised in [false, true] {
        let there = site(1 << 30);
        let id = SubstrateId::new();
        let mut bundle = bundle(id);
        let mut record: Substrate = serde_json::from_slice(&bundle.json).expect("json");
        record.generalised = generalised;
        bundle.json = serde_json::to_vec(&record).expect("json");
        let wants = ImportAs { not_public_as_it_was: true, ..ImportAs::default() };
        let import = Import::begin(&there.pool, bundle, wants).expect("begun");
        let kind = if generalised { SubstrateKind::Public } else { SubstrateKind::Restricted };
        assert_eq!(import.substrate().kind, kind);
    }
}

#[test]
fn whoever_names_somebody_elses_units_must_bring_them() {
    let here = site(1 << 30);
    let id = SubstrateId::new();
    fill(&here.pool, id).expect("filled");
    let mut file = Vec::new();
    here.pool.export(id, &mut file).expect("exported");
    let names_only = hollow(&file, &here.pool, id);
    let becomes = |n: &str, among: &[SubstrateId]| ImportAs {
        name: Some(name(n)),
        id: Some(SubstrateId::new()),
        not_public: true,
        owner: Some(name("bob")),
        among: Some(among.to_vec()),
        ..ImportAs::default()
    };
    // Among nothing, and among a substrate that is not here.
    for among in [&[][..], &[SubstrateId::new()][..]] {
        let e = here.pool.import(&names_only[..], becomes("thief", among)).expect_err("refused");
        assert_eq!(e.code(), Code::Damaged, "{e}");
        assert!(e.to_string().contains("units are missing"), "{e}");
    }
    assert_eq!(here.pool.list().expect("list").len(), 1);
    // Its own, or a public one's.
    let want = becomes("copy", &[id]);
    let made = here.pool.import(&names_only[..], want.clone()).expect("taken");
    assert_eq!((Some(made.id), made.kind), (want.id, SubstrateKind::Restricted));
    // Who brings them may name what it likes; they are stored once. What they take says nothing of
    // whether somebody else had them: it is what they take where nobody has.
    let before = here.pool.store().stats().expect("stats").units;
    let brought = here.pool.import(&file[..], becomes("brought", &[])).expect("taken");
    assert_eq!(here.pool.store().stats().expect("stats").units, before);
    let alone = site(1 << 30);
    let alone = alone.pool.import(&file[..], becomes("brought", &[])).expect("taken");
    assert_eq!(brought.sizes.stored_bytes, alone.sizes.stored_bytes);
    assert!(made.sizes.stored_bytes < brought.sizes.stored_bytes, "its own are counted once");
}

#[test]
fn a_truncated_a_changed_and_a_foreign_archive_are_refused_and_leave_nothing() {
    let (here, there) = (site(1 << 30), site(1 << 30));
    let id = SubstrateId::new();
    fill(&here.pool, id).expect("filled");
    let mut file = Vec::new();
    here.pool.export(id, &mut file).expect("exported");
    let mut bad: Vec<Vec<u8>> = [0, 3, 5, 100, 2000, file.len() / 2, file.len() - 1]
        .iter()
        .map(|n| file[..*n].to_vec())
        .collect();
    for at in (0..file.len()).step_by(file.len() / 97).chain([file.len() - 1]) {
        let mut changed = file.clone();
        changed[at] ^= 0x10;
        bad.push(changed);
    }
    bad.push(vec![7; 1 << 16]);
    for (n, file) in bad.iter().enumerate() {
        let err = there.pool.import(&file[..], ImportAs::default()).expect_err("refused");
        assert!(
            matches!(err.code(), Code::Damaged | Code::Invalid | Code::NotFound),
            "{n}: {err}: {:?}",
            err.code()
        );
    }
    assert!(there.pool.list().expect("list").is_empty());
    assert_eq!(there.pool.store().stats().expect("stats").units, 0);
    assert!(there.pool.store().owners().expect("owners").is_empty());
    there.pool.import(&file[..], ImportAs::default()).expect("the whole one is taken");
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    let there = site(1 << 30);
    let id = SubstrateId::new();
    let spoil: [(&str, &str); 4] = [
        ("\"format\":1,\"id\"", "\"format\":2,\"id\""),
        ("\"memory\":32,\"vcpus\"", "\"memory\":64,\"vcpus\""),
        ("\"name\":\"clean\"", "\"name\":\"../clean\""),
        ("\"agent\":true", "\"agent\":true,\"more\":1"),
    ];
    for (from, to) in spoil {
        let mut b = bundle(id);
        let text = String::from_utf8(b.json.clone()).expect("text");
        assert!(text.contains(from), "{from}");
        b.json = text.replace(from, to).into_bytes();
        let err = Import::begin(&there.pool, b, ImportAs::default()).expect_err("refused");
        assert_eq!(err.code(), Code::Damaged, "{to}: {err}");
    }
    let mut b = bundle(id);
    b.state.push(0);
    assert_eq!(
        Import::begin(&there.pool, b, ImportAs::default()).expect_err("refused").code(),
        Code::Damaged
    );
    // A unit short of the bundle.
    let import = Import::begin(&there.pool, bundle(id), ImportAs::default()).expect("sound");
    assert_eq!(import.lacking().len(), 300);
    assert!(import.finish().expect_err("refused").to_string().contains("missing"));
    assert!(there.pool.list().expect("list").is_empty());
}

#[test]
fn a_full_pool_refuses_and_keeps_nothing() {
    let there = site(100 << 10);
    let err = fill(&there.pool, SubstrateId::new()).expect_err("full");
    assert_eq!(err.code(), Code::NoRoom, "{err}");
    assert!(there.pool.list().expect("list").is_empty());
    assert_eq!(there.pool.store().stats().expect("stats").units, 0);
}

#[test]
fn what_a_crash_left_half_done_goes_when_the_pool_opens() {
    let dir = tempfile::tempdir().expect("tempdir");
    let dirs =
        PoolDirs { substrates: dir.path().join("substrates"), memory: dir.path().join("memory") };
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).expect("store");
    let id = SubstrateId::new();
    store.put(Owner::from(id), b"a unit of it").expect("put");
    std::fs::create_dir_all(dirs.substrates.join(format!(".new-{id}"))).expect("mkdir");
    std::fs::create_dir_all(&dirs.memory).expect("mkdir");
    std::fs::write(dirs.memory.join(format!(".new-{id}.mem")), b"x").expect("write");
    let pool = Pool::open(dirs.clone(), store, u64::MAX).expect("open");
    assert!(pool.store().owners().expect("owners").is_empty());
    assert_eq!(std::fs::read_dir(&dirs.substrates).expect("dir").count(), 0);
    assert_eq!(std::fs::read_dir(&dirs.memory).expect("dir").count(), 0);
}

fn map_of(store: &Store) -> PageMap {
    let mut w = store.writer(Owner([3; 16]), Effort::Fast).expect("writer");
    let mut map = PageMap::new(Mib(32).bytes() / UNIT as u64);
    for (n, page) in memory() {
        map.push(n, w.put(&page).expect("put")).expect("in order");
    }
    w.commit().expect("commit");
    map
}

#[test]
fn a_sealed_memory_file_holds_the_pages_and_is_written_by_nobody() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).expect("store");
    let map = map_of(&store);
    let path = dir.path().join("m/x.mem");
    let sealed = SealedMemory::lay_out(&store, &map, &path).expect("laid out");
    let meta = std::fs::metadata(sealed.path()).expect("file");
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (Mib(32).bytes(), 0o444));
    let bytes = std::fs::read(&path).expect("read");
    let mut wanted = vec![0; bytes.len()];
    for (n, page) in memory() {
        wanted[n as usize * UNIT..][..UNIT].copy_from_slice(&page);
    }
    assert!(bytes == wanted);
}

#[test]
fn a_damaged_page_is_named_and_no_memory_file_appears() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = StoreOptions { memory_limit_bytes: 0, ..StoreOptions::default() };
    let store = Store::open(&dir.path().join("store"), options).expect("store");
    let map = map_of(&store);
    let pack = dir.path().join("store/packs/00000001.pack");
    let file = std::fs::File::options().read(true).write(true).open(pack).expect("pack");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).expect("read");
    file.write_all_at(&[!byte[0]], 5000).expect("write");
    let path = dir.path().join("m/x.mem");
    let err = SealedMemory::lay_out(&store, &map, &path).expect_err("refused");
    assert_eq!(err.code(), Code::Damaged);
    let source = std::error::Error::source(&err).expect("the unit").to_string();
    assert!(source.contains("00000001.pack"), "{source}");
    assert_eq!(std::fs::read_dir(dir.path().join("m")).expect("dir").count(), 0);
}

#[test]
fn a_full_tmpfs_refuses_a_memory_file_and_keeps_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("mkdir");
    let size = std::ffi::CString::new("size=512k").expect("text");
    let flags = rustix::mount::MountFlags::empty();
    if let Err(e) = rustix::mount::mount("tmpfs", &small, "tmpfs", flags, &*size) {
        eprintln!("SKIPPED: a small tmpfs cannot be mounted here: {e}");
        return;
    }
    let _mounted = Unmount(&small);
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).expect("store");
    let map = map_of(&store);
    let err = SealedMemory::lay_out(&store, &map, &small.join("x.mem")).expect_err("full");
    assert_eq!(err.code(), Code::NoRoom, "{err}");
    assert_eq!(std::fs::read_dir(&small).expect("dir").count(), 0);
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}
