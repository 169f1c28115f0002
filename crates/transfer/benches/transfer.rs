//! Packing and framing: what each page of a bulk transfer pays.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_transfer::codec::{Packer, unpack};
use godwit_transfer::wire::{FrameDecoder, frame_head};

fn noise(n: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let step = move |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..n).map(step).collect()
}

fn codec(c: &mut Criterion) {
    let text: Vec<u8> = (0..4096usize).map(|i| b"struct page *page = "[(i * i / 9) % 20]).collect();
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(4096));
    for (name, page) in [("text", text), ("noise", noise(4096))] {
        let mut packer = Packer::new();
        group.bench_function(format!("pack/{name}"), |b| b.iter(|| packer.pack(black_box(&page))));
        let packed = packer.pack(&page);
        group.bench_function(format!("unpack/{name}"), |b| {
            b.iter(|| unpack(black_box(&packed), 4096, 4096));
        });
    }
    group.finish();
}

fn frames(c: &mut Criterion) {
    let payload = noise(4200);
    let mut stream = Vec::new();
    for _ in 0..64 {
        stream.extend_from_slice(&frame_head(payload.len()).unwrap_or_default());
        stream.extend_from_slice(&payload);
    }
    let mut group = c.benchmark_group("frames");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("cut into 64", |b| {
        b.iter(|| {
            let mut decoder = FrameDecoder::new();
            let mut count = 0;
            for piece in stream.chunks(16 << 10) {
                decoder.push(piece);
                while let Ok(Some(frame)) = decoder.next_frame() {
                    count += usize::from(!frame.is_empty());
                }
            }
            count
        });
    });
    group.finish();
}

criterion_group!(benches, codec, frames);
criterion_main!(benches);
