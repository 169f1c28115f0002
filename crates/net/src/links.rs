//! The pairs of addresses between the namespaces of networks and their host: `/31`s of a range that
//! no host routes to.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// The range: the last part of the space for carriers' NAT (RFC 6598).
pub(crate) const RANGE: &str = "100.127.0.0/16";
const FIRST: u32 = u32::from_be_bytes([100, 127, 0, 0]);
const PAIRS: u32 = 1 << 15;

/// The two ends of a way: the host's, and the namespace's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) host: Ipv4Addr,
    pub(crate) inside: Ipv4Addr,
}

impl Link {
    fn nth(n: u32) -> Self {
        let at = FIRST + 2 * (n % PAIRS);
        Self { host: Ipv4Addr::from_bits(at), inside: Ipv4Addr::from_bits(at + 1) }
    }

    /// The one with that end on the host.
    pub(crate) fn with_host_end(host: Ipv4Addr) -> Option<Self> {
        let n = host.to_bits().checked_sub(FIRST).filter(|n| n % 2 == 0)? / 2;
        (n < PAIRS).then(|| Self::nth(n))
    }

    /// The first that nobody uses, from `hint` on.
    pub(crate) fn free(hint: u32, used: &BTreeSet<Ipv4Addr>) -> Option<Self> {
        (0..PAIRS)
            .map(|n| Self::nth(hint.wrapping_add(n)))
            .find(|l| !used.contains(&l.host) && !used.contains(&l.inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_link_is_nobody_elses_and_is_found_again() {
        let mut used = BTreeSet::new();
        for _ in 0..100 {
            let link = Link::free(32_760, &used).expect("free");
            assert_eq!(Link::with_host_end(link.host), Some(link));
            assert!(used.insert(link.host), "{link:?}");
        }
        assert_eq!(Link::with_host_end(Ipv4Addr::new(10, 0, 0, 1)), None);
        assert_eq!(Link::with_host_end(Ipv4Addr::new(100, 127, 0, 1)), None);
    }

    #[test]
    fn when_all_are_used_there_is_none() {
        let used = (0..PAIRS).map(|n| Link::nth(n).inside).collect();
        assert_eq!(Link::free(7, &used), None);
    }
}
