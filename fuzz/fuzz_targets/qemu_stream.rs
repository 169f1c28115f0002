//! The parsers of QEMU's migration stream and return path: no input panics, and whatever comes
//! out encodes to the bytes that went in. The first byte chooses the parser, the second how the
//! rest is cut into pieces.
#![no_main]

use godwit_qemu::stream::{Limits, ReturnPathParser, StreamParser, blocks_beside, join_devices};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [kind, cut, bytes @ ..] = data else { return };
    let cut = usize::from(*cut).max(1);
    let limits = Limits { packaged: 1 << 16, ..Limits::default() };
    let mut out = Vec::new();
    if kind % 5 == 3 {
        let mut parser = ReturnPathParser::new(1 << 16);
        for piece in bytes.chunks(cut) {
            parser.push(piece);
            while let Ok(Some(message)) = parser.next() {
                message.encode(&mut out);
            }
        }
    } else if kind % 5 == 4 {
        // The same bytes as the state of one machine and as the devices of another.
        let (template, devices) = bytes.split_at(bytes.len().min(cut * 8));
        let names = blocks_beside(template, "m0").unwrap_or_default();
        let blocks: Vec<_> = names.into_iter().map(|n| (n, vec![0; 4096])).collect();
        let _ = join_devices(template, "m0", &blocks, devices);
        return;
    } else {
        let mut parser = match kind % 5 {
            0 => StreamParser::main(limits),
            1 => StreamParser::resumed(limits),
            _ => StreamParser::preempt(limits),
        };
        for piece in bytes.chunks(cut) {
            parser.push(piece);
            while let Ok(Some(record)) = parser.next() {
                record.encode(&mut out);
            }
        }
    }
    assert_eq!(out, &bytes[..out.len()]);
});
