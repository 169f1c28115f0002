//! Pages that are still to come, by block.

use std::collections::HashMap;

use bytes::Bytes;
use godwit_qemu::stream::{Discard, MemSize};
use godwit_types::PAGE_SIZE;

use super::pages::PageSet;

/// The most pages that are followed: 1 TiB. The list comes from the other site.
const MAX_PAGES: u64 = 1 << 28;
const PAGE: u64 = PAGE_SIZE as u64;

/// Knows which pages of the machine's memory are still to come: those that the destination is told to
/// forget at the switch, or says after a break that it has not received.
#[derive(Debug, Default)]
pub(crate) struct Missing {
    blocks: HashMap<Bytes, PageSet>,
}

impl Missing {
    /// Learns the blocks; of those that it knew before it knows nothing more.
    pub(crate) fn begin(&mut self, list: &MemSize) {
        self.blocks.clear();
        let mut left = MAX_PAGES;
        for block in &list.blocks {
            let pages = block.used / PAGE;
            if pages <= left {
                left -= pages;
                self.blocks.insert(block.name.clone(), PageSet::new(pages));
            }
        }
    }

    /// The destination is told to forget `ranges` of `block`: they will be sent again.
    pub(crate) fn discarded(&mut self, block: &Bytes, ranges: &[Discard]) {
        let Some(missing) = self.blocks.get_mut(block) else { return };
        for r in ranges {
            let from = r.start / PAGE;
            missing.insert_range(from, from.saturating_add(r.len / PAGE));
        }
    }

    /// After a break: the destination says which pages of `block` it has, a bit each in little-endian
    /// words. How long the block is it does not say: pages of the last word may lie beyond its end,
    /// unless it has a multiple of 64 pages, as the machine's memory does.
    pub(crate) fn received(&mut self, block: &Bytes, bitmap: &[u8]) {
        let (words, _) = bitmap.as_chunks::<8>();
        if words.len() as u64 * 64 <= MAX_PAGES {
            self.blocks.insert(block.clone(), PageSet::not_in(words));
        }
    }

    /// The page at `offset` of `block` has come, or is on its way.
    pub(crate) fn came(&mut self, block: &Bytes, offset: u64) {
        if let Some(missing) = self.blocks.get_mut(block) {
            missing.remove(offset / PAGE);
        }
    }

    /// Those of one block.
    pub(crate) fn of(&mut self, block: &Bytes) -> Option<&mut PageSet> {
        self.blocks.get_mut(block)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.blocks.values().map(PageSet::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use godwit_qemu::stream::RamBlock;

    use super::*;

    #[test]
    fn a_list_beyond_all_memory_takes_none_of_this_sites() {
        let block = |name: &'static str, pages: u64| {
            let name = Bytes::from_static(name.as_bytes());
            RamBlock { name, used: pages * PAGE, address: None }
        };
        let blocks =
            vec![block("a", MAX_PAGES - 64), block("b", 1 << 40), block("c", 65), block("d", 64)];
        let mut missing = Missing::default();
        missing.begin(&MemSize { total: 0, blocks });
        let followed = ["a", "b", "c", "d"].map(|n| missing.of(&Bytes::from(n)).is_some());
        assert_eq!(followed, [true, false, false, true]);
    }
}
