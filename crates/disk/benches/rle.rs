//! How fast blocks are coded and decoded by run length.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_disk::rle;
use godwit_types::BLOCK_SIZE;

fn blocks() -> [(&'static str, Vec<u8>); 3] {
    let mut half: Vec<u8> = (0..BLOCK_SIZE / 2).map(|i| (i * 31 % 251) as u8).collect();
    half.resize(BLOCK_SIZE, 0);
    let noise =
        (0..BLOCK_SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    [("zero", vec![0; BLOCK_SIZE]), ("half", half), ("noise", noise)]
}

fn run(c: &mut Criterion) {
    let mut group = c.benchmark_group("rle");
    group.throughput(Throughput::Bytes(BLOCK_SIZE as u64));
    for (name, block) in blocks() {
        let mut coded = Vec::with_capacity(2 * BLOCK_SIZE);
        group.bench_function(format!("encode/{name}"), |b| {
            b.iter(|| {
                coded.clear();
                rle::encode(black_box(&block), &mut coded)
            });
        });
        let mut back = vec![0; BLOCK_SIZE];
        group.bench_function(format!("decode/{name}"), |b| {
            b.iter(|| rle::decode(black_box(&coded), &mut back));
        });
    }
    group.finish();
}

criterion_group!(benches, run);
criterion_main!(benches);
