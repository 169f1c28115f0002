//! Takes the pages of one RAM block out of a whole stream.
//!
//! A machine that maps its memory privately cannot leave it out of a stream itself. It is saved
//! with its memory, and this takes the memory out on the way: the pages go to a callback, and
//! what remains loads into a machine whose memory already holds them, with the same capabilities.

use super::{Content, Limits, PassReason, Record, StreamError, StreamParser};

/// What went where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StripTotals {
    /// Pages given to the callback.
    pub pages: u64,
    /// Of those, pages of one repeated byte.
    pub fill_pages: u64,
    /// Bytes of the remainder.
    pub kept_bytes: u64,
    /// Size of the block in bytes, once its size is known.
    pub block_bytes: Option<u64>,
}

/// Splits a saved machine into the pages of one block and a loadable remainder.
#[derive(Debug)]
pub struct BlockStripper {
    parser: StreamParser,
    block: Vec<u8>,
    totals: StripTotals,
    ended: bool,
}

impl BlockStripper {
    /// Takes out block `name` (the id of its memory backend, e.g. `m0`).
    #[must_use]
    pub fn new(name: &str, limits: Limits) -> Self {
        Self {
            parser: StreamParser::main(limits),
            block: name.as_bytes().to_vec(),
            totals: StripTotals::default(),
            ended: false,
        }
    }

    /// Reads the next bytes. The remainder is appended to `rest`; each page goes to `page` as
    /// (offset in the block in bytes, content). A later page at the same offset replaces the
    /// earlier one.
    ///
    /// # Errors
    /// [`StreamError`], [`StreamError::CannotStrip`] when device state comes before memory.
    pub fn push(
        &mut self,
        bytes: &[u8],
        rest: &mut Vec<u8>,
        mut page: impl FnMut(u64, &Content),
    ) -> Result<(), StreamError> {
        let start = rest.len();
        self.parser.push(bytes);
        while let Some(record) = self.parser.next()? {
            match &record {
                Record::Page(p) if p.block.as_ref() == self.block => {
                    let size = self.totals.block_bytes.unwrap_or(0);
                    if p.offset >= size {
                        return Err(self.cannot("a page lies outside it"));
                    }
                    self.totals.pages += 1;
                    self.totals.fill_pages += u64::from(matches!(p.content, Content::Fill(_)));
                    page(p.offset, &p.content);
                    // Records of another block name it when they follow one of this block, so
                    // leaving these out changes the meaning of none that stays.
                    continue;
                }
                Record::MemSize(list) => {
                    let found = list.blocks.iter().find(|b| b.name.as_ref() == self.block);
                    let found =
                        found.ok_or_else(|| self.cannot("the machine has no such block"))?;
                    self.totals.block_bytes = Some(found.used);
                }
                Record::SectionEnd { .. } => self.ended = true,
                Record::Opaque(_) if !self.ended => {
                    return Err(self.cannot("device state comes before the end of memory"));
                }
                _ => {}
            }
            record.encode(rest);
        }
        self.totals.kept_bytes += (rest.len() - start) as u64;
        Ok(())
    }

    /// Declares the end of the stream.
    ///
    /// # Errors
    /// [`StreamError::CannotStrip`] when it is no whole saved machine.
    pub fn finish(self) -> Result<StripTotals, StreamError> {
        self.parser.finish()?;
        let whole = self.ended
            && matches!(
                self.parser.passing_through(),
                Some(PassReason::DeviceSection | PassReason::Trailer)
            );
        if whole { Ok(self.totals) } else { Err(self.cannot("the stream ends too early")) }
    }

    fn cannot(&self, why: &'static str) -> StreamError {
        let block = String::from_utf8_lossy(&self.block).chars().take(64).collect();
        StreamError::CannotStrip { block, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{MemSize, Page, RamBlock};
    use bytes::Bytes;

    fn page(block: &'static str, named: bool, offset: u64, byte: u8) -> Record {
        let content =
            if byte == 0 { Content::Fill(0) } else { Content::Data(Bytes::from(vec![byte; 4096])) };
        Record::Page(Page { block: Bytes::from_static(block.as_bytes()), named, offset, content })
    }

    fn saved() -> Vec<Record> {
        let block = |name: &'static str, used| RamBlock {
            name: Bytes::from_static(name.as_bytes()),
            used,
            address: None,
        };
        let list =
            MemSize { total: 5 * 4096, blocks: vec![block("m0", 8192), block("rom", 12288)] };
        vec![
            Record::Header,
            Record::Configuration { machine: Bytes::from_static(b"pc-q35-10.0") },
            Record::SectionStart { id: 2, instance: 0, version: 4 },
            Record::MemSize(list),
            Record::Eos,
            Record::Footer { id: 2 },
            Record::SectionEnd { id: 2 },
            page("rom", true, 0, 7),
            page("m0", true, 0, 1),
            page("m0", false, 4096, 0),
            page("rom", true, 4096, 8),
            page("rom", false, 8192, 9),
            Record::Eos,
            Record::Footer { id: 2 },
            Record::Opaque(Bytes::from_static(b"\x04\0\0\0\x09\x04cpu0whatever\0\0\0\x01")),
        ]
    }

    fn encode(records: &[Record]) -> Vec<u8> {
        let mut out = Vec::new();
        records.iter().for_each(|r| r.encode(&mut out));
        out
    }

    #[test]
    fn pages_of_the_block_leave_and_the_rest_stays_as_it_was() {
        let whole = encode(&saved());
        let kept: Vec<Record> = saved()
            .into_iter()
            .filter(|r| !matches!(r, Record::Page(p) if p.block.as_ref() == b"m0"))
            .collect();
        let mut stripper = BlockStripper::new("m0", Limits::default());
        let (mut rest, mut pages) = (Vec::new(), Vec::new());
        for piece in whole.chunks(777) {
            stripper.push(piece, &mut rest, |at, c| pages.push((at, c.clone()))).expect("valid");
        }
        let totals = stripper.finish().expect("whole");
        assert_eq!(rest, encode(&kept));
        assert_eq!(pages.len(), 2);
        assert_eq!(pages[0].0, 0);
        assert_eq!(pages[1], (4096, Content::Fill(0)));
        assert_eq!((totals.pages, totals.fill_pages, totals.block_bytes), (2, 1, Some(8192)));
        assert_eq!(totals.kept_bytes, rest.len() as u64);
    }

    #[test]
    fn a_block_that_is_not_there_or_a_stream_cut_short_is_refused() {
        let whole = encode(&saved());
        let mut stripper = BlockStripper::new("m1", Limits::default());
        let err = stripper.push(&whole, &mut Vec::new(), |_, _| ()).expect_err("no m1");
        assert!(err.to_string().contains("no such block"), "{err}");
        for cut in [10, 60, 200, 5000] {
            let mut stripper = BlockStripper::new("m0", Limits::default());
            stripper.push(&whole[..cut], &mut Vec::new(), |_, _| ()).expect("valid so far");
            assert!(stripper.finish().is_err(), "cut at {cut}");
        }
    }
}
