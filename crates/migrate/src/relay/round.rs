//! Finds out when the one pre-copy round is over.

use std::collections::HashMap;

use bytes::Bytes;
use godwit_qemu::stream::MemSize;
use godwit_types::PAGE_SIZE;

use super::pages::PageSet;

/// The most memory that is followed, in bytes: 1 TiB.
const MAX_TRACKED: u64 = 1 << 40;

/// Which pages have been sent: the round is over when every page was sent once, or when any page
/// comes for the second time.
#[derive(Debug, Default)]
pub(crate) struct Round {
    blocks: HashMap<Bytes, PageSet>,
    left: u64,
    total: u64,
    over: bool,
    repeated: u64,
}

impl Round {
    /// Learns the blocks. A machine too large to follow is treated as sent at once, so it goes
    /// to post-copy straight away.
    pub(crate) fn begin(&mut self, list: &MemSize) {
        let bytes: u64 = list.blocks.iter().map(|b| b.used).sum();
        if bytes > MAX_TRACKED {
            self.over = true;
            return;
        }
        for block in &list.blocks {
            let pages = block.used.div_ceil(PAGE_SIZE as u64);
            self.blocks.insert(block.name.clone(), PageSet::new(pages));
            self.total += pages;
        }
        self.left = self.total;
    }

    /// A page was sent; tells whether the round is over.
    pub(crate) fn sent(&mut self, block: &Bytes, offset: u64) -> bool {
        let page = offset / PAGE_SIZE as u64;
        if let Some(sent) = self.blocks.get_mut(block).filter(|s| page < s.pages()) {
            if sent.insert(page) {
                self.left = self.left.saturating_sub(1);
            } else {
                self.repeated += 1;
                self.over = true;
            }
            self.over |= self.left == 0;
        }
        self.over
    }

    /// How often a page was sent that had been sent before.
    pub(crate) fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Pages of the round in all, and those not sent yet.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.total, self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_qemu::stream::RamBlock;

    fn list() -> MemSize {
        let block = |name: &'static str, used| RamBlock {
            name: Bytes::from_static(name.as_bytes()),
            used,
            address: None,
        };
        MemSize { total: 5 * 4096, blocks: vec![block("m0", 3 * 4096), block("rom", 2 * 4096)] }
    }

    #[test]
    fn a_round_ends_with_the_last_page_or_the_first_repeated_one() {
        let (m0, rom) = (Bytes::from_static(b"m0"), Bytes::from_static(b"rom"));
        let mut round = Round::default();
        round.begin(&list());
        for offset in [0, 4096, 8192] {
            assert!(!round.sent(&m0, offset));
        }
        assert!(!round.sent(&rom, 0));
        assert_eq!(round.progress(), (5, 1));
        assert!(round.sent(&rom, 4096));

        let mut round = Round::default();
        round.begin(&list());
        assert!(!round.sent(&m0, 0));
        assert!(!round.sent(&m0, 1 << 50), "outside of the block: not counted");
        assert!(round.sent(&m0, 0));
        // Behind the round it goes on counting.
        assert!(round.sent(&m0, 4096) && round.sent(&m0, 4096));
        assert_eq!(round.repeated(), 2);
    }
}
