//! The parsers of QEMU's migration stream and return path: no input panics, and whatever comes
//! out encodes to the bytes that went in. The first byte chooses the parser, the second how the
//! rest is cut into pieces.
#![no_main]

use godwit_qemu::stream::{BlockStripper, Limits, ReturnPathParser, StreamParser};
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
        let mut stripper = BlockStripper::new("m0", limits);
        for piece in bytes.chunks(cut) {
            if stripper.push(piece, &mut out, |_, _| ()).is_err() {
                return;
            }
        }
        let _ = stripper.finish();
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
