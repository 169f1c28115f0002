//! Sets of pages of one block of memory.

/// Pages below a bound, a bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// None of `pages` pages.
    pub(crate) fn new(pages: u64) -> Self {
        Self { pages, words: vec![0; pages.div_ceil(64) as usize] }
    }

    /// Of little-endian words, as QEMU writes them, a bit for each page: those whose bit is not set.
    pub(crate) fn not_in(words: &[[u8; 8]]) -> Self {
        let words: Vec<u64> = words.iter().map(|w| !u64::from_le_bytes(*w)).collect();
        Self { pages: words.len() as u64 * 64, words }
    }

    /// The bound.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 == 1)
    }

    /// Tells whether it was not there; a page beyond the bound never is.
    pub(crate) fn insert(&mut self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        match self.words.get_mut((page / 64) as usize).filter(|_| page < self.pages) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    /// Tells whether it was there.
    pub(crate) fn remove(&mut self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        match self.words.get_mut((page / 64) as usize) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                true
            }
            _ => false,
        }
    }

    /// All from `from` on that lie below `to`.
    pub(crate) fn insert_range(&mut self, from: u64, to: u64) {
        let to = to.min(self.pages);
        let mut page = from;
        while page < to {
            // Whole words at once: a range may be as long as the set.
            let (first, count) = (page % 64, (64 - page % 64).min(to - page));
            self.words[(page / 64) as usize] |= (u64::MAX >> (64 - count)) << first;
            page += count;
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// In ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                (bit < 64).then(|| {
                    left &= left - 1;
                    at as u64 * 64 + u64::from(bit)
                })
            })
        })
    }

    /// Runs of pages that follow each other, each `from..to`, in ascending order.
    pub(crate) fn runs(&self) -> Vec<(u64, u64)> {
        runs(self.iter(), u64::MAX)
    }

    /// Those of `first..first + pages`, a bit each in bytes, the lowest bit first.
    pub(crate) fn bits(&self, first: u64, pages: u64) -> Vec<u8> {
        let mut out = vec![0; pages.div_ceil(8) as usize];
        for page in (first..first + pages).filter(|p| self.contains(*p)) {
            out[((page - first) / 8) as usize] |= 1 << ((page - first) % 8);
        }
        out
    }
}

/// Runs of at most `most` of `pages`, which ascend.
pub(crate) fn runs(pages: impl Iterator<Item = u64>, most: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((from, to)) if *to == page && page - *from < most => *to += 1,
            _ => runs.push((page, page + 1)),
        }
    }
    runs
}

/// The pages of [`PageSet::bits`], from `first` on.
pub(crate) fn of_bits(bits: &[u8], first: u64) -> impl Iterator<Item = u64> + '_ {
    (first..)
        .zip(bits.iter().flat_map(|b| (0..8).map(move |n| b >> n & 1 == 1)))
        .filter_map(|(page, there)| there.then_some(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_and_go_and_are_listed_in_order() {
        let mut set = PageSet::new(130);
        assert!(set.insert(0) && set.insert(129) && !set.insert(129) && !set.insert(130));
        set.insert_range(62, 66);
        set.insert_range(128, 1000);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 62, 63, 64, 65, 128, 129]);
        assert_eq!(set.runs(), [(0, 1), (62, 66), (128, 130)]);
        assert_eq!(set.len(), 7);
        assert!(set.remove(63) && !set.remove(63) && !set.remove(1 << 40));
        assert!(!set.contains(63) && set.contains(64) && !set.contains(u64::MAX));
        assert!(PageSet::new(7).is_empty() && !set.is_empty());
        assert_eq!(runs(0..5, 2), [(0, 2), (2, 4), (4, 5)]);
    }

    #[test]
    fn bits_are_read_as_they_are_written() {
        let mut set = PageSet::new(100);
        for page in [3, 8, 21, 22, 99] {
            set.insert(page);
        }
        let bits = set.bits(8, 15);
        assert_eq!(bits.len(), 2);
        assert_eq!(of_bits(&bits, 8).collect::<Vec<_>>(), [8, 21, 22]);
    }
}
