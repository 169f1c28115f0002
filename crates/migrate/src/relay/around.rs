//! Fault-around: what else to ask for when the destination asks for a page.
//!
//! A vCPU that waits for one page soon wants its neighbours, and each of them costs a round trip.
//! The pages that are still to come are known: the source has the destination discard them at the
//! switch. QEMU answers a request for several pages page by page and leaves out those that the
//! destination has; so the source relay adds requests for the nearest missing pages behind and
//! before the wanted one. Nothing is sent that would not be sent anyway, only sooner.

use bytes::Bytes;
use godwit_qemu::stream::ReturnMessage;
use godwit_types::PAGE_SIZE;

use super::missing::Missing;

/// How far away a neighbour may be, in pages: within the same 2 MiB.
const REGION: u64 = 512;
/// How many missing pages behind the wanted one are asked for, and how many before it. Packed as
/// usual they keep a link of 100 Mbit/s busy for 6 ms.
const BEHIND: usize = 20;
const BEFORE: usize = 4;
/// Requests this near to each other become one; what lies between is skipped by QEMU.
const JOIN: u64 = 8;
const PAGE: u64 = PAGE_SIZE as u64;

/// Knows what else to ask for.
#[derive(Debug, Default)]
pub(crate) struct Around {
    pub(crate) missing: Missing,
    last: Option<Bytes>,
}

impl Around {
    /// Requests for those of `pages` (in order) of `block` that are missing, before anybody has
    /// asked for one; the first names the block.
    pub(crate) fn first(&mut self, block: &Bytes, pages: &[u64]) -> Vec<ReturnMessage> {
        let Some(missing) = self.missing.of(block) else { return Vec::new() };
        let mut out = Vec::new();
        for page in pages {
            if *page < missing.pages() && missing.contains(*page) {
                missing.remove(*page);
                let name = out.is_empty().then(|| block.clone());
                let len = PAGE as u32;
                out.push(ReturnMessage::ReqPages { block: name, start: page * PAGE, len });
            }
        }
        if !out.is_empty() {
            self.last = Some(block.clone());
        }
        out
    }

    /// The destination asked for `start` (in bytes) of `block` (`None`: that of the request
    /// before). Gives the requests to be added behind it; they name no block.
    pub(crate) fn asked(&mut self, block: Option<&Bytes>, start: u64) -> Vec<ReturnMessage> {
        if let Some(name) = block {
            self.last = Some(name.clone());
        }
        let Some(missing) = self.last.as_ref().and_then(|n| self.missing.of(n)) else {
            return Vec::new();
        };
        let page = start / PAGE;
        if page >= missing.pages() {
            return Vec::new();
        }
        missing.remove(page);
        let region = page / REGION * REGION;
        let end = (region + REGION).min(missing.pages());
        let behind = (page + 1..end).filter(|p| missing.contains(*p)).take(BEHIND);
        let mut wanted: Vec<u64> = behind.collect();
        wanted.extend((region..page).rev().filter(|p| missing.contains(*p)).take(BEFORE));
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for p in wanted {
            missing.remove(p);
            match ranges.last_mut() {
                Some((_, to)) if p >= *to && p - *to <= JOIN => *to = p + 1,
                Some((from, _)) if p < *from && *from - p <= JOIN => *from = p,
                _ => ranges.push((p, p + 1)),
            }
        }
        ranges
            .into_iter()
            .map(|(from, to)| ReturnMessage::ReqPages {
                block: None,
                start: from * PAGE,
                len: ((to - from) * PAGE) as u32,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_qemu::stream::{Discard, MemSize, RamBlock};

    fn around(pages: u64, missing: &[(u64, u64)]) -> (Around, Bytes) {
        let name = Bytes::from_static(b"m0");
        let mut a = Around::default();
        let block = RamBlock { name: name.clone(), used: pages * PAGE, address: None };
        a.missing.begin(&MemSize { total: pages * PAGE, blocks: vec![block] });
        let ranges: Vec<Discard> = missing
            .iter()
            .map(|(from, to)| Discard { start: from * PAGE, len: (to - from) * PAGE })
            .collect();
        a.missing.discarded(&name, &ranges);
        (a, name)
    }

    fn pages(messages: &[ReturnMessage]) -> Vec<(u64, u64)> {
        messages
            .iter()
            .map(|m| match m {
                ReturnMessage::ReqPages { block: None, start, len } => {
                    (start / PAGE, (start + u64::from(*len)) / PAGE)
                }
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn the_nearest_missing_pages_are_asked_for_once() {
        let (mut a, m0) = around(2000, &[(90, 95), (100, 110), (112, 113), (300, 301), (600, 700)]);
        let first = a.asked(Some(&m0), 102 * PAGE);
        // Those behind first; a small gap is bridged, another 2 MiB is left alone.
        assert_eq!(pages(&first), [(103, 113), (300, 301), (93, 102)]);
        assert_eq!(pages(&a.asked(None, 104 * PAGE)), [(90, 93)]);
        assert_eq!(pages(&a.asked(None, 104 * PAGE)), []);
        let dense = a.asked(None, 620 * PAGE);
        assert_eq!(pages(&dense), [(620 - BEFORE as u64, 621 + BEHIND as u64)]);
    }

    #[test]
    fn the_first_pages_are_asked_for_when_they_are_missing() {
        let (mut a, m0) = around(20, &[(3, 6), (18, 20)]);
        let asked = a.first(&m0, &[1, 4, 5, 19, 20, u64::MAX]);
        let block = |m: &ReturnMessage| match m {
            ReturnMessage::ReqPages { block, start, len } => (block.clone(), start / PAGE, *len),
            other => panic!("{other:?}"),
        };
        let asked: Vec<_> = asked.iter().map(block).collect();
        assert_eq!(asked, [(Some(m0.clone()), 4, 4096), (None, 5, 4096), (None, 19, 4096)]);
        assert!(a.first(&m0, &[4, 5, 19]).is_empty(), "once");
        assert!(a.first(&Bytes::from_static(b"x"), &[1]).is_empty());
        assert_eq!(pages(&a.asked(Some(&m0), 3 * PAGE)), [(18, 19)]);
    }

    #[test]
    fn after_a_break_what_the_destination_lacks_is_known_from_its_own_word() {
        let (m0, mut a) = (Bytes::from_static(b"m0"), Around::default());
        // Pages 70 and 71 of 128 are missing.
        let words = [u64::MAX, !(0b11 << 6)];
        let bitmap: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        a.missing.received(&m0, &bitmap);
        assert_eq!(pages(&a.asked(Some(&m0), 70 * PAGE)), [(71, 72)]);
        assert_eq!(pages(&a.asked(None, 127 * PAGE)), []);
    }

    #[test]
    fn what_was_sent_or_lies_elsewhere_is_not_asked_for() {
        let (mut a, m0) = around(20, &[(3, 6), (18, 40)]);
        a.missing.came(&m0, 4 * PAGE);
        assert_eq!(pages(&a.asked(Some(&m0), 3 * PAGE)), [(5, 6), (18, 20)]);
        assert_eq!(pages(&a.asked(None, 5 * PAGE)), []);
        assert_eq!(pages(&a.asked(None, u64::MAX)), []);
        assert_eq!(pages(&a.asked(Some(&Bytes::from_static(b"x")), 0)), []);
        assert_eq!(pages(&Around::default().asked(None, 0)), []);
    }
}
