//! What each page of a move costs a relay, without its sockets: known pages, new ones, zeros.
#![allow(missing_docs)]

use std::fs::File;
use std::hint::black_box;
use std::io::Write as _;
use std::path::Path;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use godwit_migrate::relay::BothRelays;
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{Content, MemSize, Page, RamBlock, Record};

const PAGES: u64 = 4096;
/// QEMU is read in pieces of this many bytes.
const READ: usize = 256 << 10;

/// A page that packs to about a third, as a guest's do on average.
fn page_of(number: u64) -> Vec<u8> {
    let mut x = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut words = Vec::with_capacity(4096);
    while words.len() < 4096 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        // A pointer and small numbers: what a kernel's tables look like.
        words.extend_from_slice(&(0xffff_8880_0000_0000 | x & 0x3fff_f000).to_le_bytes());
        words.extend_from_slice(&(x & 3).to_le_bytes());
        words.extend_from_slice(&number.to_le_bytes());
    }
    words.truncate(4096);
    words
}

fn stream(content: impl Fn(u64) -> Content) -> Vec<u8> {
    let block = Bytes::from_static(RAM_BLOCK.as_bytes());
    let used = PAGES * 4096;
    let blocks = vec![RamBlock { name: block.clone(), used, address: None }];
    let head = [
        Record::Header,
        Record::Configuration { machine: Bytes::from_static(b"pc-q35-10.0") },
        Record::SectionStart { id: 2, instance: 0, version: 4 },
        Record::MemSize(MemSize { total: used, blocks }),
        Record::Eos,
        Record::Footer { id: 2 },
        Record::SectionPart { id: 2 },
    ];
    let mut out = Vec::new();
    head.iter().for_each(|r| r.encode(&mut out));
    for n in 0..PAGES {
        let (block, offset) = (block.clone(), n * 4096);
        Page { block, named: n == 0, offset, content: content(n) }.encode(&mut out);
    }
    out
}

fn pair(held: &Path, refers: bool) -> BothRelays {
    let open = || File::open(held).expect("held memory");
    BothRelays::new(refers.then(|| (open(), open()))).expect("relays")
}

fn relay(c: &mut Criterion) {
    let mut held = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file on tmpfs");
    (0..PAGES).for_each(|n| held.write_all(&page_of(n)).expect("written"));
    let data = |n: u64| Content::Data(page_of(n).into());
    let cases = [
        ("known", stream(data), true),
        ("new", stream(data), false),
        ("zero", stream(|_| Content::Fill(0)), true),
    ];
    let mut group = c.benchmark_group("relay");
    group.sample_size(20).throughput(Throughput::Bytes(PAGES * 4096));
    for (name, stream, refers) in &cases {
        let pair = || pair(held.path(), *refers);
        let send = |mut both: BothRelays| {
            let pieces = stream.chunks(READ).map(|piece| both.send(piece).expect("a stream"));
            let frames: Vec<Bytes> = pieces.flatten().collect();
            (both, frames)
        };
        group.bench_function(format!("source/{name}"), |b| {
            b.iter_batched(&pair, |both| black_box(send(both)), BatchSize::PerIteration);
        });
        group.bench_function(format!("destination/{name}"), |b| {
            let sent = || send(pair());
            let receive = |(mut both, frames): (BothRelays, Vec<Bytes>)| {
                let written = frames.iter().map(|f| both.receive(f).expect("a frame").len());
                black_box(written.sum::<usize>())
            };
            b.iter_batched(sent, receive, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, relay);
criterion_main!(benches);
