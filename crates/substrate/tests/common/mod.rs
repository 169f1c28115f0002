//! A pool without a machine, and an image and a substrate that fit each other.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};

use godwit_image::Image;
use godwit_qemu::{BootFile, MachineSpec, Manifest};
use godwit_store::{Effort, Encoder, PageMap, Store, StoreOptions, UNIT};
use godwit_substrate::{
    Bundle, Import, ImportAs, Part, Pool, PoolDirs, Shape, Sizes, Substrate, SubstrateError,
};
use godwit_types::{Arch, Hash, Mib, Name, SubstrateId, SubstrateKind};

/// Blocks of the disk.
pub(crate) const BLOCKS: u64 = 64;

pub(crate) fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

/// Opens the pool below `dir` as a new daemon does.
pub(crate) fn open(dir: &Path) -> Result<Pool, SubstrateError> {
    let options =
        StoreOptions { reserve_bytes: 0, memory_limit_bytes: 0, ..StoreOptions::default() };
    let store = Store::open(&dir.join("store"), options)?;
    let dirs = PoolDirs { substrates: dir.join("substrates"), memory: dir.join("memory") };
    Pool::open(dirs, store, 1 << 30)
}

/// Contents that compress badly and differ by `seed`.
pub(crate) fn page(seed: u64) -> Vec<u8> {
    let mut page = vec![seed as u8; UNIT];
    for (i, b) in page.iter_mut().enumerate().step_by(3) {
        *b = ((i as u64 * (seed + 7)) >> 3) as u8;
    }
    page
}

/// Pages of a memory of 32 MiB.
pub(crate) fn pages() -> Vec<(u64, Vec<u8>)> {
    (0..60u64).map(|n| (n * 27, page(n))).collect()
}

/// What they take in sealed memory.
pub(crate) fn memory_bytes() -> u64 {
    (pages().len() * godwit_types::PAGE_SIZE) as u64
}

/// Blocks above the base.
pub(crate) fn blocks() -> Vec<(u64, Vec<u8>)> {
    (0..20u64).map(|n| (n * 3, page(1000 + n))).collect()
}

/// An image in `dir`, of the form that builds publish.
pub(crate) fn image(dir: &Path) -> Image {
    let files = [
        ("kernel", b"not much of a kernel".repeat(20)),
        ("disk", (0..BLOCKS).flat_map(|n| page(5000 + n)).collect()),
    ];
    let mut refs = Vec::new();
    std::fs::create_dir_all(dir).expect("mkdir");
    for (file, content) in &files {
        std::fs::write(dir.join(file), content).expect("write");
        let (hash, bytes) = (Hash::of(content), content.len());
        refs.push(format!(r#"{{"file":"{file}","hash":"{hash}","bytes":{bytes}}}"#));
    }
    let recipe = Hash::of(b"recipe");
    let contents = format!(
        r#"{{"format":1,"name":"tiny","arch":"x86-64","kernel":{},"initrd":null,"disk":{},"cmdline":"quiet","memory":32,"vcpus":1,"display":false,"agent":true,"app":null,"recipe":"{recipe}"}}"#,
        refs[0], refs[1]
    );
    let hash = Hash::of(contents.as_bytes());
    let text = format!(r#"{{"hash":"{hash}","contents":{contents}}}"#);
    std::fs::write(dir.join("image.json"), text).expect("write");
    Image::open(dir).expect("an image")
}

/// The substrate `clean` on `image`.
pub(crate) fn bundle(id: SubstrateId, image: &Image) -> Bundle {
    let file = BootFile { path: "/none".into(), hash: image.kernel.hash };
    let spec = MachineSpec {
        arch: Arch::X86_64,
        memory: Mib(32),
        vcpus: 1,
        kernel: file,
        initrd: None,
        cmdline: "quiet".into(),
        display: false,
        disk: true,
        nic_ports: 1,
    };
    let map = |units: u64, content: Vec<(u64, Vec<u8>)>| {
        let mut map = PageMap::new(units);
        for (n, page) in content {
            map.push(n, Hash::of(&page)).expect("in order");
        }
        map.encode()
    };
    let pages = map(Mib(32).bytes() / UNIT as u64, pages());
    let disk = map(BLOCKS, blocks());
    let state = b"device state".repeat(10);
    let part = |b: &[u8]| Part { hash: Hash::of(b), bytes: b.len() as u64 };
    let substrate = Substrate {
        format: 1,
        id,
        name: name("clean"),
        kind: SubstrateKind::Public,
        owner: name("operator"),
        image: name("tiny"),
        image_hash: image.hash,
        shape: Shape {
            arch: Arch::X86_64,
            memory: Mib(32),
            vcpus: 1,
            display: false,
            disk: true,
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
        disk: Some(part(&disk)),
        docked_unix_ms: 1,
        sizes: Sizes { memory_bytes: memory_bytes(), ..Sizes::default() },
    };
    let json = serde_json::to_vec(&substrate).expect("json");
    Bundle { json, state, pages, disk: Some(disk) }
}

/// Hands an import all that it lacks; how many units that were.
pub(crate) fn feed(import: &mut Import) -> usize {
    let mut encoder = Encoder::new(Effort::Fast);
    let lacking = import.lacking();
    for (_, page) in pages().into_iter().chain(blocks()) {
        let hash = Hash::of(&page);
        if lacking.contains(&hash) {
            let mut body = Vec::new();
            let encoding = encoder.encode(&page, &mut body);
            import.put(hash, encoding, page.len(), &body).expect("put");
        }
    }
    lacking.len()
}

pub(crate) fn fill(pool: &Pool, id: SubstrateId, image: &Image) -> Substrate {
    let mut import = Import::begin(pool, bundle(id, image), ImportAs::default()).expect("sound");
    feed(&mut import);
    import.finish().expect("published")
}

/// All files below `dir`, with their bytes.
pub(crate) fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        if entry.path().is_dir() {
            out.extend(files(&entry.path()));
        } else {
            out.push((entry.path(), std::fs::read(entry.path()).expect("readable")));
        }
    }
    out.sort();
    out
}
