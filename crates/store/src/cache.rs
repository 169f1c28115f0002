//! The memory tier: encoded units within a byte limit. A unit that was read since the hand last
//! passed gets another round (CLOCK), so that one long scan does not drive out what is in use.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;

use bytes::Bytes;
use godwit_types::Hash;

use crate::encode::Encoding;
use crate::lock;

const SHARDS: usize = 16;
/// What an entry costs beside its body, in bytes (map and queue).
const OVERHEAD: u64 = 112;

#[derive(Clone)]
pub(crate) struct Cached {
    pub(crate) encoding: Encoding,
    pub(crate) raw: u16,
    pub(crate) body: Bytes,
}

struct Entry {
    unit: Cached,
    used: bool,
}

#[derive(Default)]
struct Shard {
    map: HashMap<Hash, Entry>,
    queue: VecDeque<Hash>,
    bytes: u64,
}

pub(crate) struct Cache {
    shards: Vec<Mutex<Shard>>,
    limit_per_shard: u64,
}

impl Cache {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            limit_per_shard: limit_bytes / SHARDS as u64,
        }
    }

    fn shard(&self, hash: &Hash) -> &Mutex<Shard> {
        &self.shards[usize::from(hash.0[0]) % SHARDS]
    }

    pub(crate) fn get(&self, hash: &Hash) -> Option<Cached> {
        let mut s = lock(self.shard(hash));
        let e = s.map.get_mut(hash)?;
        e.used = true;
        Some(e.unit.clone())
    }

    pub(crate) fn put(&self, hash: Hash, unit: Cached) {
        let cost = unit.body.len() as u64 + OVERHEAD;
        if cost > self.limit_per_shard {
            return;
        }
        let mut guard = lock(self.shard(&hash));
        let s = &mut *guard;
        if s.map.contains_key(&hash) {
            return;
        }
        s.map.insert(hash, Entry { unit, used: false });
        s.queue.push_back(hash);
        s.bytes += cost;
        while s.bytes > self.limit_per_shard {
            let Some(old) = s.queue.pop_front() else { break };
            match s.map.get_mut(&old) {
                Some(e) if e.used => {
                    e.used = false;
                    s.queue.push_back(old);
                }
                Some(e) => {
                    s.bytes -= e.unit.body.len() as u64 + OVERHEAD;
                    s.map.remove(&old);
                }
                None => {}
            }
        }
    }

    /// Units and bytes held.
    pub(crate) fn used(&self) -> (u64, u64) {
        self.shards.iter().map(lock).fold((0, 0), |(n, b), s| (n + s.map.len() as u64, b + s.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(n: u32) -> (Hash, Cached) {
        let body = Bytes::from(vec![n as u8; 1000]);
        (Hash::of(&n.to_le_bytes()), Cached { encoding: Encoding::Raw, raw: 1000, body })
    }

    #[test]
    fn the_limit_holds_and_what_is_in_use_stays() {
        let limit = 400 * 1112;
        let cache = Cache::new(limit);
        let (hot, u) = unit(0);
        cache.put(hot, u);
        for n in 1..5000 {
            let (h, u) = unit(n);
            cache.put(h, u);
            assert!(cache.get(&hot).is_some(), "after {n}");
            assert!(cache.used().1 <= limit);
        }
        assert!(cache.get(&unit(1).0).is_none());
    }
}
