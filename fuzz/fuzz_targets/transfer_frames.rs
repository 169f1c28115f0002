//! Everything of the site-to-site protocol that is decoded from a peer or from an operator.
#![no_main]

use godwit_transfer::JoinToken;
use godwit_transfer::codec::unpack;
use godwit_transfer::keys::Peer;
use godwit_transfer::link::JoinRequest;
use godwit_transfer::rpc::{Answer, Call};
use godwit_transfer::wire::{
    FrameDecoder, Greeting, Hello, LaneHeader, MAX_FRAME, Versions, decode_open,
};
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
    if let Ok(hello) = decode_open::<Hello>("greeting", data)
        && let Ok(version) = Versions::OURS.agree(hello.versions)
    {
        assert!((Versions::OURS.min..=Versions::OURS.max).contains(&version));
        assert!((hello.versions.min..=hello.versions.max).contains(&version));
    }
    let _ = decode_open::<Greeting>("greeting", data);
    let _ = decode_open::<JoinRequest>("join request", data);
    let _ = decode_open::<Answer>("answer", data);
    let _ = LaneHeader::decode(data);
    let _ = Call::decode(data);
    let _ = Peer::of_certificate(data);
    if let Some((len, packed)) = data.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len));
        if let Ok(raw) = unpack(&packed.to_vec().into(), len, 64 << 10) {
            assert_eq!(raw.len(), len);
        }
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = text.parse::<JoinToken>()
    {
        assert_eq!(token.to_string().parse(), Ok(token));
    }
});
