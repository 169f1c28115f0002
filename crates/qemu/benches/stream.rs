//! Throughput of the migration stream parser.
#![allow(missing_docs, clippy::expect_used, reason = "a benchmark")]

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_qemu::stream::{Content, Limits, Page, Record, StreamParser};

/// 16 MiB of full pages, or as many records of zero pages, as one preempt channel.
fn wire(zero: bool) -> Vec<u8> {
    let mut out = Vec::new();
    for n in 0..4096u64 {
        let content =
            if zero { Content::Fill(0) } else { Content::Data(Bytes::from(vec![n as u8; 4096])) };
        let page =
            Page { block: Bytes::from_static(b"m0"), named: n == 0, offset: n << 12, content };
        Record::Page(page).encode(&mut out);
    }
    out
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("stream-parse");
    for (name, zero) in [("data-pages", false), ("zero-pages", true)] {
        let wire = wire(zero);
        group.throughput(Throughput::Bytes(4096 * 4096));
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut parser = StreamParser::preempt(Limits::default());
                let mut pages = 0;
                for piece in wire.chunks(64 << 10) {
                    parser.push(piece);
                    while let Some(record) = parser.next().expect("valid") {
                        pages += usize::from(matches!(record, Record::Page(_)));
                    }
                }
                assert_eq!(pages, 4096);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, parse);
criterion_main!(benches);
