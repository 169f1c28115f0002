//! Hash, encodings, put and get on units as guest memory has them.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use godwit_store::{Effort, Encoder, Owner, Store, StoreError, StoreOptions, UNIT, decode};
use godwit_types::Hash;
use rand::{RngExt, SeedableRng};

/// Units like the non-zero pages of a small Linux guest: code and tables that lz4 halves, a
/// quarter of sparse ones, a few of noise.
fn units(n: usize) -> Vec<u8> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
    let mut out = vec![0; n * UNIT];
    for unit in out.as_chunks_mut::<UNIT>().0 {
        match rng.random_range(0..16) {
            0..4 => unit[64..96].fill(rng.random_range(1..255)),
            4 => rng.fill(&mut unit[..]),
            _ => {
                for w in unit.as_chunks_mut::<8>().0 {
                    w[..3].copy_from_slice(&rng.random::<[u8; 3]>());
                    w[3..5].copy_from_slice(&[0x48, 0x8b]);
                }
            }
        }
        unit[..8].copy_from_slice(&rng.random::<[u8; 8]>());
    }
    out
}

fn encodings(c: &mut Criterion) {
    let memory = units(1024);
    let mut g = c.benchmark_group("unit");
    g.throughput(Throughput::Bytes(memory.len() as u64));
    g.bench_function("hash", |b| {
        b.iter(|| {
            memory.chunks(UNIT).for_each(|u| {
                black_box(Hash::of(u));
            })
        });
    });
    for (name, effort) in [("encode/fast", Effort::Fast), ("encode/small", Effort::Small)] {
        let mut encoder = Encoder::new(effort);
        let mut out = Vec::with_capacity(memory.len() * 2);
        g.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                memory.chunks(UNIT).for_each(|u| {
                    black_box(encoder.encode(u, &mut out));
                });
            });
        });
        let bodies: Vec<_> = memory
            .chunks(UNIT)
            .map(|u| {
                let mut body = Vec::new();
                (encoder.encode(u, &mut body), body)
            })
            .collect();
        let mut raw = [0; UNIT];
        g.bench_function(name.replace("encode", "decode"), |b| {
            b.iter(|| {
                bodies.iter().for_each(|(e, body)| {
                    let _ = black_box(decode(*e, body, &mut raw));
                })
            });
        });
    }
    g.finish();
}

fn tiers(c: &mut Criterion) {
    let memory = units(15_360);
    let mut g = c.benchmark_group("60 MiB");
    g.sample_size(10).throughput(Throughput::Bytes(memory.len() as u64));
    g.bench_function("put and commit", |b| {
        b.iter_batched(
            || {
                let dir = tempfile::tempdir().expect("tempdir");
                let store = Store::open(dir.path(), StoreOptions::default()).expect("open");
                (dir, store)
            },
            |(dir, store)| {
                let mut w = store.writer(Owner([1; 16]), Effort::Fast).expect("writer");
                w.put_units(&memory).expect("put");
                w.commit().expect("commit");
                (dir, store)
            },
            BatchSize::PerIteration,
        );
    });
    for (name, memory_limit_bytes) in [("get from disk", 0), ("get from memory", 256 << 20)] {
        let dir = tempfile::tempdir().expect("tempdir");
        let options = StoreOptions { memory_limit_bytes, ..StoreOptions::default() };
        let store = Store::open(dir.path(), options).expect("open");
        let mut w = store.writer(Owner([1; 16]), Effort::Fast).expect("writer");
        let hashes = w.put_units(&memory).expect("put");
        w.commit().expect("commit");
        g.bench_function(name, |b| {
            b.iter(|| {
                store
                    .get_many(&hashes, |_, u| {
                        black_box(u);
                        Ok::<(), StoreError>(())
                    })
                    .expect("get")
            });
        });
    }
    g.finish();
}

criterion_group!(benches, encodings, tiers);
criterion_main!(benches);
