//! What follows a machine's memory when its QEMU ends as pre-copy.
//!
//! A QEMU that finds nothing dirty at its switch does not enter post-copy: it sends its device state
//! in the open, and there is neither PONG 3 nor anything to go back to. The relay turns that into
//! what post-copy looks like, so that a destination sees one form only, with one commit point.
//!
//! ```text
//! from QEMU                             to the destination
//! ram END { pages }                     ram PART { pages }
//! device sections                       RAM_DISCARD page, ram PART { the page }, PING 2
//! EOF, description of the machine       PACKAGED { LISTEN, device sections, PING 3, RUN }
//!                                       ram END { }, EOF
//! ```
//!
//! The destination enters LISTEN only after a discard, so the page that was sent last is discarded
//! and sent again. Device sections carry no length, and QEMU goes silent behind them: the end is
//! where a description of the machine ends with the bytes that have come.

use bytes::Bytes;
use godwit_qemu::stream::{Command, Discard, Limits, Page, Record, StreamError};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// End of the stream, and the byte before the length of the description.
const END: [u8; 2] = [0x00, 0x06];
const PAGE: u64 = godwit_types::PAGE_SIZE as u64;

/// Of QEMU's description of the machine, what must be there.
#[derive(Deserialize)]
struct Description {
    #[serde(rename = "page_size")]
    _page_size: u64,
    #[serde(rename = "devices")]
    _devices: Vec<IgnoredAny>,
}

/// Collects device state that comes in the open.
#[derive(Debug)]
pub(super) struct OpenState {
    /// Number of the RAM section.
    section: u32,
    bytes: Vec<u8>,
    limit: usize,
}

/// What a destination is given for it.
#[derive(Debug)]
pub(super) struct Handover {
    /// Up to PING 2.
    pub(super) memory: Vec<u8>,
    /// PACKAGED and the end of memory, which must not be parted: who has the one runs the machine,
    /// and nobody could send the other once more.
    pub(super) device: Vec<u8>,
}

impl OpenState {
    pub(super) fn new(section: u32) -> Self {
        let limit = Limits::default().packaged as usize;
        Self { section, bytes: Vec::new(), limit }
    }

    /// Takes the next bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let len = self.bytes.len() + bytes.len();
        if len > self.limit {
            return Err(StreamError::TooLarge {
                at: 0,
                what: "device state outside of a package",
                len: len as u64,
                limit: self.limit as u64,
            });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Where the device sections end, once everything has come.
    fn end(&self) -> Option<usize> {
        if self.bytes.last() != Some(&b'}') {
            return None;
        }
        let head = END.len() + 4;
        let starts = self.bytes.windows(head).enumerate().filter(|(_, w)| w.starts_with(&END));
        starts.map(|(at, _)| at).find(|at| {
            let length =
                self.bytes[at + END.len()..at + head].try_into().map_or(0, u32::from_be_bytes);
            let text = &self.bytes[at + head..];
            text.len() as u64 == u64::from(length)
                && serde_json::from_slice::<Description>(text).is_ok()
        })
    }

    /// What the destination is given, once everything has come. `last` is the page that was sent
    /// last of all.
    pub(super) fn finish(&self, last: &Page) -> Option<Handover> {
        let end = self.end()?;
        let id = self.section;
        let mut blob = Vec::with_capacity(end + 32);
        Command::PostcopyListen.encode(&mut blob);
        blob.extend_from_slice(&self.bytes[..end]);
        Command::Ping(godwit_qemu::stream::PONG_COMMIT).encode(&mut blob);
        Command::PostcopyRun.encode(&mut blob);
        let discard = Command::RamDiscard {
            version: 0,
            block: last.block.clone(),
            ranges: vec![Discard { start: last.offset, len: PAGE }],
        };
        let memory = [
            Record::Command(discard),
            Record::SectionPart { id },
            Record::Page(Page { named: true, ..last.clone() }),
            Record::Eos,
            Record::Footer { id },
            Record::Command(Command::Ping(2)),
        ];
        let device = [
            Record::Command(Command::Packaged(Bytes::from(blob))),
            Record::SectionEnd { id },
            Record::Eos,
            Record::Footer { id },
            Record::Eof,
        ];
        Some(Handover { memory: encode(&memory), device: encode(&device) })
    }
}

fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    records.iter().for_each(|r| r.encode(&mut out));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_qemu::stream::Content;

    pub(crate) fn tail(devices: &[u8]) -> Vec<u8> {
        let text = br#"{"configuration": {}, "page_size": 4096, "devices": [{"name": "timer"}]}"#;
        let mut out = devices.to_vec();
        out.extend_from_slice(&END);
        out.extend_from_slice(&(text.len() as u32).to_be_bytes());
        out.extend_from_slice(text);
        out
    }

    #[test]
    fn the_end_of_device_state_is_found_and_nothing_that_looks_like_it() {
        let last = Page {
            block: Bytes::from_static(b"m0"),
            named: false,
            offset: 4096,
            content: Content::Fill(0),
        };
        // Bytes of a device that look like an end: of the right length, but no description.
        let mut devices = vec![4, 0, 0, 0, 9];
        devices.extend_from_slice(&[0, 6, 0, 0, 0, 2, b'{', b'}', 7]);
        let wire = tail(&devices);
        let mut state = OpenState::new(2);
        for (i, byte) in wire.iter().enumerate() {
            assert!(state.finish(&last).is_none(), "after {i} bytes");
            state.push(&[*byte]).expect("small");
        }
        assert_eq!(state.end(), Some(devices.len()));
        let done = state.finish(&last).expect("complete");
        let at = done.device.windows(devices.len()).position(|w| w == devices);
        assert_eq!(at, Some(9 + 5), "behind PACKAGED and LISTEN");
    }

    #[test]
    fn device_state_without_an_end_is_not_kept_for_ever() {
        let mut state = OpenState::new(2);
        state.limit = 100;
        assert!(state.push(&[1; 100]).is_ok());
        assert!(matches!(state.push(&[1]), Err(StreamError::TooLarge { len: 101, .. })));
    }
}
