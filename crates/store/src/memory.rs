//! The memory tier: encoded units within a byte limit. A unit that was read since the hand last
//! passed gets another round (CLOCK), so that one long scan does not drive out what is in use.
//!
//! Nothing lasts here: what a write has put in may be dropped as soon as others need the room, so
//! nobody writes here what a tier below does not keep.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::error::StoreError;
use crate::pack::Records;
use crate::tier::{EncodedUnit, Held, Tier, TierWrite, Wanted};
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

fn shard_of(hash: &Hash) -> usize {
    usize::from(hash.0[0]) % SHARDS
}

pub(crate) struct MemoryTier {
    shards: Vec<Mutex<Shard>>,
    limit_bytes: u64,
}

impl MemoryTier {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), limit_bytes }
    }

    const fn limit_per_shard(&self) -> u64 {
        self.limit_bytes / SHARDS as u64
    }

    fn shard(&self, hash: &Hash) -> &Mutex<Shard> {
        &self.shards[shard_of(hash)]
    }

    fn find(&self, hash: &Hash) -> Option<EncodedUnit> {
        let mut s = lock(self.shard(hash));
        let e = s.map.get_mut(hash)?;
        e.used = true;
        Some(e.unit.clone())
    }

    /// Keeps a unit that the packs hold, as long as there is room.
    pub(crate) fn put(&self, hash: Hash, unit: EncodedUnit) {
        let cost = unit.body.len() as u64 + OVERHEAD;
        let limit = self.limit_per_shard();
        if cost > limit {
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
        while s.bytes > limit {
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

/// What a write brings to memory: no more than may stay there.
pub(crate) struct MemoryWrite {
    tier: Arc<MemoryTier>,
    units: Vec<(Hash, EncodedUnit)>,
    bytes: u64,
}

impl TierWrite for MemoryWrite {
    fn put(&mut self, records: &Records) -> Result<(), StoreError> {
        for (record, body) in records.iter() {
            if self.bytes >= self.tier.limit_bytes {
                break;
            }
            self.bytes += body.len() as u64;
            let (encoding, raw_len) = (record.encoding, usize::from(record.raw));
            // A copy: a part of the records would keep all of them in memory.
            let body = Bytes::copy_from_slice(body);
            self.units.push((record.hash, EncodedUnit { encoding, raw_len, body }));
        }
        Ok(())
    }

    fn retain(&mut self, keep: &HashSet<Hash>) {
        self.units.retain(|(hash, _)| keep.contains(hash));
        self.bytes = self.units.iter().map(|(_, unit)| unit.body.len() as u64).sum();
    }

    fn commit(self, _: Option<Held<'_>>) -> Result<(), StoreError> {
        for (hash, unit) in self.units {
            self.tier.put(hash, unit);
        }
        Ok(())
    }
}

impl Tier for MemoryTier {
    type Write = MemoryWrite;

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

    /// That does not count as a use.
    fn contains(&self, hashes: &[Hash]) -> Result<Vec<bool>, StoreError> {
        let here = |hash: &Hash| lock(self.shard(hash)).map.contains_key(hash);
        Ok(hashes.par_iter().with_min_len(256).map(here).collect())
    }

    fn begin(self: &Arc<Self>) -> MemoryWrite {
        MemoryWrite { tier: Arc::clone(self), units: Vec::new(), bytes: 0 }
    }

    fn remove(&self, hashes: &[Hash]) -> Result<(), StoreError> {
        let mut changed = HashSet::new();
        for hash in hashes {
            let mut s = lock(self.shard(hash));
            if let Some(old) = s.map.remove(hash) {
                s.bytes -= old.unit.body.len() as u64 + OVERHEAD;
                changed.insert(shard_of(hash));
            }
        }
        for shard in changed {
            let s = &mut *lock(&self.shards[shard]);
            s.queue.retain(|hash| s.map.contains_key(hash));
        }
        Ok(())
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

    #[test]
    fn a_write_keeps_no_more_than_may_stay() {
        let limit = 400 * 1112;
        let memory = Arc::new(MemoryTier::new(limit));
        let mut write = memory.begin();
        for n in 0..5000 {
            let (hash, unit) = unit(n);
            let mut records = Records::default();
            records.push(hash, unit.encoding, 1000, &unit.body);
            write.put(&records).expect("put");
        }
        assert!(write.bytes <= limit + 1000);
        assert_eq!(
            write.units.iter().map(|(_, unit)| unit.body.len() as u64).sum::<u64>(),
            write.bytes
        );
        write.commit(None).expect("committed");
        let (units, bytes) = memory.used();
        assert!(units > 300 && bytes <= limit, "{units} units of {bytes} bytes");
    }
}
