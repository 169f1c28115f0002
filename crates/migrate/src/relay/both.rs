//! What a relay does with each page, without its sockets: for `benches/relay.rs`.

use std::fs::File;
use std::time::Instant;

use bytes::Bytes;
use godwit_transfer::codec::Packer;

use super::core::{Channel, SourceCore};
use super::frame::{Kind, open, seal};
use super::known::{HeldHere, KnownMemory, expand};
use super::passing::Reader;
use super::waits::Waits;

/// Both relays of a move, back to back.
#[derive(Debug)]
pub struct BothRelays {
    source: SourceCore,
    packer: Packer,
    here: HeldHere,
    reader: Reader,
    waits: Waits,
}

impl BothRelays {
    /// With memory that both hold, at the source and at the destination.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn new(held: Option<(File, File)>) -> std::io::Result<Self> {
        let mut source = SourceCore::new(false, true);
        let mut here = HeldHere::default();
        if let Some((at_source, at_destination)) = held {
            source.refer_to(KnownMemory::new(at_source)?);
            here.memory = Some(KnownMemory::new(at_destination)?);
        }
        let reader = Reader::new(Channel::Main, false);
        Ok(Self { source, packer: Packer::new(), here, reader, waits: Waits::default() })
    }

    /// Takes bytes of QEMU's stream as the source's relay does, and gives the frames of its main
    /// channel; `None` where the stream is none.
    pub fn send(&mut self, stream: &[u8]) -> Option<Vec<Bytes>> {
        self.source.on_main(stream).ok()?;
        let mut frames = Vec::new();
        while let Some(out) = self.source.next_frame() {
            if out.channel == Channel::Main {
                frames.push(seal(&mut self.packer, out.kind, &out.raw));
            }
        }
        Some(frames)
    }

    /// Makes of a frame what the destination's relay writes to QEMU; `None` where it is none.
    pub fn receive(&mut self, frame: &Bytes) -> Option<Bytes> {
        let (kind, raw) = open(frame).ok()?;
        let raw = match kind {
            Kind::Referring => expand(&raw, &mut self.here).ok()?,
            Kind::Memory | Kind::Device | Kind::Open => raw,
            // Those are for machines whose own pages are known.
            Kind::Fill | Kind::Stale => return None,
        };
        let passing = self.reader.read(&raw);
        self.waits.written(&passing.pages, Instant::now());
        Some(raw)
    }
}
