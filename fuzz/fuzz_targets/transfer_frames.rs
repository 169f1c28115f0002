//! Everything of the site-to-site protocol that is decoded from a peer or from an operator.
#![no_main]

use godwit_transfer::JoinToken;
use godwit_transfer::chunk::ChunkMsg;
use godwit_transfer::codec::unpack;
use godwit_transfer::keys::Peer;
use godwit_transfer::link::JoinRequest;
use godwit_transfer::rpc::{Answer, Call};
use godwit_transfer::wire::{FrameDecoder, Greeting, Hello, LaneHeader, MAX_FRAME, decode_open};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut frames = FrameDecoder::new();
    for piece in data.chunks(7) {
        frames.push(piece);
        while let Ok(Some(frame)) = frames.next_frame() {
            assert!(frame.len() <= MAX_FRAME);
        }
    }
    let _ = frames.finish();
    let _ = decode_open::<Hello>("greeting", data);
    let _ = decode_open::<Greeting>("greeting", data);
    let _ = decode_open::<JoinRequest>("join request", data);
    let _ = decode_open::<Answer>("answer", data);
    let _ = LaneHeader::decode(data);
    let _ = Call::decode(data);
    let _ = Peer::of_certificate(data);
    if let Ok(ChunkMsg::Unit { raw_len, packed, .. }) = ChunkMsg::decode(data)
        && let Ok(raw) = unpack(&packed, raw_len as usize, 64 << 10)
    {
        assert_eq!(raw.len(), raw_len as usize);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = text.parse::<JoinToken>()
    {
        assert_eq!(token.to_string().parse(), Ok(token));
    }
});
