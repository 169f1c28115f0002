//! How long the destination's machine waits for pages that it asked for.
//!
//! A vCPU that touches a missing page stands still from its QEMU's request until the page is
//! written to that QEMU. Several may wait at once: what counts is the time during which anybody
//! waits, and the longest wait of one page.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_qemu::stream::Page;

/// The most pages that are followed at once; a guest has far fewer vCPUs.
const MAX_WAITING: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Waits {
    /// The block of the request before.
    block: Option<Bytes>,
    waiting: HashMap<(Bytes, u64), Instant>,
    /// When somebody waited for a page that came, in order and apart from each other. One that was
    /// on its way already when it was asked for may never be seen to come.
    spans: VecDeque<(Instant, Instant)>,
    /// The length of all, also of those that are so long ago that no wait reaches back to them.
    waited: Duration,
    longest: Duration,
}

impl Waits {
    /// QEMU has asked for the page at `start` of `block` (`None`: that of the request before).
    pub(crate) fn asked(&mut self, block: Option<&Bytes>, start: u64, now: Instant) {
        if let Some(name) = block {
            self.block = Some(name.clone());
        }
        let Some(name) = self.block.clone() else { return };
        if self.waiting.len() < MAX_WAITING {
            self.waiting.entry((name, start)).or_insert(now);
        }
    }

    /// Pages were written to QEMU.
    pub(crate) fn written(&mut self, pages: &[Page], now: Instant) {
        for page in pages {
            if self.waiting.is_empty() {
                return;
            }
            self.came(&(page.block.clone(), page.offset), now);
        }
    }

    fn came(&mut self, page: &(Bytes, u64), now: Instant) {
        let Some(asked) = self.waiting.remove(page) else { return };
        self.longest = self.longest.max(now.saturating_duration_since(asked));
        let mut begun = asked;
        while let Some((from, to)) = self.spans.back().copied()
            && to >= begun
        {
            begun = begun.min(from);
            self.waited = self.waited.saturating_sub(to.saturating_duration_since(from));
            self.spans.pop_back();
        }
        self.waited += now.saturating_duration_since(begun);
        self.spans.push_back((begun, now));
        if self.spans.len() > MAX_WAITING {
            self.spans.pop_front();
        }
    }

    /// Time during which anybody waited, and the longest wait of one page, both in microseconds.
    pub(crate) fn micros(&self) -> (u64, u64) {
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        (us(self.waited), us(self.longest))
    }
}

#[cfg(test)]
mod tests {
    use godwit_qemu::stream::Content;

    use super::*;

    #[test]
    fn time_counts_once_however_many_wait() {
        let mut w = Waits::default();
        let t = Instant::now();
        let at = |ms| t + Duration::from_millis(ms);
        let m0 = Bytes::from_static(b"m0");
        w.asked(None, 0, at(0));
        assert_eq!(w.micros(), (0, 0), "a request without a block");
        w.asked(Some(&m0), 4096, at(10));
        w.asked(None, 8192, at(20));
        w.asked(None, 8192, at(25));
        w.came(&(m0.clone(), 4096), at(40));
        w.came(&(m0.clone(), 1 << 30), at(45));
        assert_eq!(w.micros(), (30_000, 30_000));
        w.came(&(m0.clone(), 8192), at(70));
        assert_eq!(w.micros(), (60_000, 50_000));
        w.asked(None, 0, at(100));
        w.came(&(m0, 0), at(101));
        assert_eq!(w.micros(), (61_000, 50_000));
        // One that was on its way already is never seen to come, and hides nobody's wait.
        w.asked(None, 4096, at(200));
        w.asked(None, 8192, at(210));
        w.came(&(Bytes::from_static(b"m0"), 8192), at(215));
        assert_eq!(w.micros(), (66_000, 50_000));
    }

    #[test]
    fn pages_that_were_written_end_the_wait_for_them() {
        let mut w = Waits::default();
        let t = Instant::now();
        let m0 = Bytes::from_static(b"m0");
        w.asked(Some(&m0), 0x2000, t);
        let page = |offset| {
            let content = Content::Fill(0);
            Page { block: m0.clone(), named: true, offset, content }
        };
        w.written(&[page(0x1000), page(0x2000), page(0x3000)], t + Duration::from_millis(35));
        assert_eq!(w.micros(), (35_000, 35_000));
    }
}
