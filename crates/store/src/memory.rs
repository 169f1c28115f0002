//! The memory tier: encoded units within a byte limit. A unit that was read since the hand last
//! passed gets another round (CLOCK), so that one long scan does not drive out what is in use.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;

use godwit_types::Hash;
use rayon::prelude::*;

use crate::error::StoreError;
use crate::tier::{EncodedUnit, Tier, Wanted};
use crate::{UNIT, lock};

const SHARDS: usize = 16;
/// What an entry costs beside its body, in bytes (map and queue).
const OVERHEAD: u64 = 112;

struct Entry {
    unit: EncodedUnit,
    used: bool,
}

#[derive(Default)]
struct Shard {
    map: HashMap<Hash, Entry>,
    queue: VecDeque<Hash>,
    bytes: u64,
}

pub(crate) struct MemoryTier {
    shards: Vec<Mutex<Shard>>,
    limit_per_shard: u64,
}

impl MemoryTier {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            limit_per_shard: limit_bytes / SHARDS as u64,
        }
    }

    fn shard(&self, hash: &Hash) -> &Mutex<Shard> {
        &self.shards[usize::from(hash.0[0]) % SHARDS]
    }

    fn find(&self, hash: &Hash) -> Option<EncodedUnit> {
        let mut s = lock(self.shard(hash));
        let e = s.map.get_mut(hash)?;
        e.used = true;
        Some(e.unit.clone())
    }

    /// Whether it is here; that does not count as a use.
    pub(crate) fn contains(&self, hash: &Hash) -> bool {
        lock(self.shard(hash)).map.contains_key(hash)
    }

    /// Keeps a unit that the packs hold, as long as there is room.
    pub(crate) fn put(&self, hash: Hash, unit: EncodedUnit) {
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

impl Tier for MemoryTier {
    fn get(&self, hash: &Hash) -> Result<Option<EncodedUnit>, StoreError> {
        Ok(self.find(hash))
    }

    fn get_many<E, F>(&self, wanted: Vec<Wanted>, each: &F) -> Result<Vec<Wanted>, E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync,
    {
        let hits: Vec<Option<EncodedUnit>> =
            wanted.par_iter().with_min_len(256).map(|(_, h)| self.find(h)).collect();
        wanted.par_iter().zip(&hits).with_min_len(64).try_for_each(|((i, _), hit)| match hit {
            Some(unit) => each(*i, unit.decode(&mut [0; UNIT])?),
            None => Ok(()),
        })?;
        let asked = wanted.into_iter().zip(hits);
        Ok(asked.filter(|(_, hit)| hit.is_none()).map(|(wanted, _)| wanted).collect())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::encode::Encoding;

    fn unit(n: u32) -> (Hash, EncodedUnit) {
        let body = Bytes::from(vec![n as u8; 1000]);
        let unit = EncodedUnit { encoding: Encoding::Raw, raw_len: 1000, body };
        (Hash::of(&n.to_le_bytes()), unit)
    }

    #[test]
    fn the_limit_holds_and_what_is_in_use_stays() {
        let limit = 400 * 1112;
        let memory = MemoryTier::new(limit);
        let (hot, u) = unit(0);
        memory.put(hot, u);
        for n in 1..5000 {
            let (h, u) = unit(n);
            memory.put(h, u);
            assert!(memory.find(&hot).is_some(), "after {n}");
            assert!(memory.used().1 <= limit);
        }
        assert!(memory.find(&unit(1).0).is_none());
    }
}
