//! What passes on its way to QEMU, read once for all that this relay wants to know of it.

use bytes::Bytes;
use godwit_qemu::stream::{Command, Discard, Limits, MemSize, Page, Record, StreamParser};

use super::core::Channel;

/// Reads one channel.
#[derive(Debug)]
pub(crate) struct Reader {
    channel: Channel,
    /// None once it could not be read: QEMU reads it as well, and says what is wrong.
    parser: Option<StreamParser>,
}

/// What some bytes of a channel complete.
#[derive(Debug, Default)]
pub(crate) struct Passing {
    pub(crate) pages: Vec<Page>,
    /// The list of the blocks of memory.
    pub(crate) sizes: Option<MemSize>,
    /// What QEMU is told to forget, by block, and how many of the pages come before.
    pub(crate) discards: Vec<(usize, Bytes, Vec<Discard>)>,
    /// The machine's device state, behind which nothing is forgotten.
    pub(crate) state: bool,
    /// The channel ends.
    pub(crate) ends: bool,
    /// It cannot be read, now or since earlier.
    pub(crate) unread: bool,
}

impl Reader {
    /// Of a channel from its beginning, or from where it was `resumed`.
    pub(crate) fn new(channel: Channel, resumed: bool) -> Self {
        let limits = Limits::default();
        let parser = match (channel, resumed) {
            (Channel::Main, false) => StreamParser::main(limits),
            (Channel::Main, true) => StreamParser::resumed(limits),
            (Channel::Preempt, _) => StreamParser::preempt(limits),
        };
        Self { channel, parser: Some(parser) }
    }

    /// Whether what was read so far ends with a record.
    pub(crate) fn is_between_records(&self) -> bool {
        self.parser.as_ref().is_some_and(|p| p.pending() == 0)
    }

    /// Reads on.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Passing {
        let mut passing = Passing::default();
        let Some(parser) = &mut self.parser else {
            passing.unread = true;
            return passing;
        };
        parser.push(bytes);
        loop {
            match parser.next() {
                Ok(Some(Record::Page(page))) => passing.pages.push(page),
                Ok(Some(Record::MemSize(sizes))) => passing.sizes = Some(sizes),
                Ok(Some(Record::Command(Command::RamDiscard { block, ranges, .. }))) => {
                    passing.discards.push((passing.pages.len(), block, ranges));
                }
                Ok(Some(Record::Command(Command::Packaged(_)))) => passing.state = true,
                Ok(Some(Record::Eof)) => passing.ends = true,
                // On the main channel it only ends a section.
                Ok(Some(Record::Eos)) => passing.ends |= self.channel == Channel::Preempt,
                Ok(Some(_)) => {}
                Ok(None) => return passing,
                Err(_) => {
                    self.parser = None;
                    passing.unread = true;
                    return passing;
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use godwit_qemu::stream::{Content, RamBlock};
    use godwit_types::PAGE_SIZE;

    use super::*;

    /// QEMU's record of a page.
    pub(crate) fn page(block: &'static str, number: u64) -> Record {
        let content = Content::Data(Bytes::from(vec![7; PAGE_SIZE]));
        let (block, offset) = (Bytes::from_static(block.as_bytes()), number * PAGE_SIZE as u64);
        Record::Page(Page { block, offset, named: true, content })
    }

    /// Memory of one block of 64 pages, of which the destination is to forget `from..to`, as QEMU writes
    /// it up to the device state.
    pub(crate) fn forgetting(block: &'static str, from: u64, to: u64) -> Vec<Record> {
        let (name, page) = (Bytes::from_static(block.as_bytes()), PAGE_SIZE as u64);
        let blocks = vec![RamBlock { name: name.clone(), used: 64 * page, address: None }];
        let ranges = vec![Discard { start: from * page, len: (to - from) * page }];
        vec![
            Record::Header,
            Record::SectionStart { id: 2, instance: 0, version: 4 },
            Record::MemSize(MemSize { total: 64 * page, blocks }),
            Record::Eos,
            Record::Footer { id: 2 },
            Record::Command(Command::RamDiscard { version: 0, block: name, ranges }),
        ]
    }

    pub(crate) fn encoded(records: &[Record]) -> Vec<u8> {
        let mut raw = Vec::new();
        records.iter().for_each(|r| r.encode(&mut raw));
        raw
    }

    #[test]
    fn a_channel_is_read_in_whatever_parts_it_comes() {
        let mut records = forgetting("m0", 3, 5);
        records.extend([Record::SectionPart { id: 2 }, page("m0", 3), page("m0", 4), Record::Eos]);
        records.extend([Record::Footer { id: 2 }, Record::Eof]);
        let raw = encoded(&records);
        for part in [1, 13, 4096, raw.len()] {
            let mut main = Reader::new(Channel::Main, false);
            let mut all = Passing::default();
            let parts = raw.chunks(part).collect::<Vec<_>>();
            for (n, bytes) in parts.iter().enumerate() {
                let passing = main.read(bytes);
                assert_eq!((passing.ends, passing.unread), (n + 1 == parts.len(), false));
                all.pages.extend(passing.pages);
                all.discards.extend(passing.discards);
                all.sizes = all.sizes.or(passing.sizes);
            }
            assert_eq!((all.pages.len(), all.discards.len()), (2, 1));
            assert_eq!(all.sizes.expect("listed").blocks.len(), 1);
            assert!(main.is_between_records());
        }
        let mut preempt = Reader::new(Channel::Preempt, true);
        let one = encoded(&[page("m0", 3)]);
        assert!(preempt.read(&one[..9]).pages.is_empty() && !preempt.is_between_records());
        assert_eq!(preempt.read(&one[9..]).pages.len(), 1);
        assert!(preempt.read(&encoded(&[Record::Eos])).ends);
    }

    #[test]
    fn nonsense_is_not_read() {
        let mut main = Reader::new(Channel::Main, false);
        assert!(main.read(&[0xff; 64]).unread);
        let passing = main.read(&encoded(&[Record::Header, Record::Eof]));
        assert!(passing.unread && !passing.ends && !main.is_between_records());
    }
}
