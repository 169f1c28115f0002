//! Where units are: in tiers, the fastest first. The last one lasts, those above it are as fast as they
//! are because they may lose anything at any time.
//!
//! ```text
//! read:    memory --what it lacks--> packs --what they lack, too--> StoreError::Missing
//!             ^                        |
//!             +-- a unit read alone ---+
//! write:   records --> packs, memory            nobody sees them
//! commit:  packs: on the disk, with who holds them; then memory: as much as there is room for
//! remove:  packs, then memory
//! ```
//!
//! A tier is read, written and emptied in one way (`Tier`, `TierWrite`). What only the packs have, since
//! nothing else outlives the process, is `PackTier`'s own: owners, damage, compaction.
//!
//! Every call of a tier blocks: whoever calls the store from an async task does so by a thread that
//! may wait (`godwit_substrate::AsyncPool`).

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use godwit_types::Hash;

use crate::Owner;
use crate::encode::{Encoding, decode};
use crate::error::StoreError;
use crate::pack::Records;

/// A unit as the store holds it, for sending on without decoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedUnit {
    /// How the body is encoded.
    pub encoding: Encoding,
    /// Bytes of the decoded unit.
    pub raw_len: usize,
    /// The encoded bytes.
    pub body: Bytes,
}

impl EncodedUnit {
    /// Decodes it into the front of `out`.
    pub(crate) fn decode<'a>(&self, out: &'a mut [u8]) -> Result<&'a [u8], StoreError> {
        let Some(out) = out.get_mut(..self.raw_len) else {
            return Err(StoreError::BadUnit("is longer than the space given for it"));
        };
        decode(self.encoding, &self.body, out)
            .map_err(|_| StoreError::BadUnit("cannot be decoded"))?;
        Ok(out)
    }
}

/// A unit that is asked for, and its place among those that the caller named.
pub(crate) type Wanted = (usize, Hash);

/// Who holds the units of a write from its commit on, and all their hashes, sorted.
pub(crate) type Held<'a> = (Owner, &'a [u8]);

/// One place that units are in. What it gives was checked against its hash when it came from a medium.
pub(crate) trait Tier {
    /// A write under way.
    type Write: TierWrite;

    /// The unit of that hash, if this tier holds it.
    fn get(&self, hash: &Hash) -> Result<Option<EncodedUnit>, StoreError>;

    /// Hands those of `wanted` that this tier holds to `each`, decoded, in any order, from several
    /// threads. Gives back those that it lacks.
    fn get_many<E, F>(&self, wanted: Vec<Wanted>, each: &F) -> Result<Vec<Wanted>, E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync;

    /// For each of `hashes`, whether this tier holds it. No unit is read.
    fn contains(&self, hashes: &[Hash]) -> Result<Vec<bool>, StoreError>;

    /// Begins a write. Several may be under way.
    fn begin(self: &Arc<Self>) -> Self::Write;

    /// Gives up units, whoever holds them; those that it lacks are none of its concern.
    fn remove(&self, hashes: &[Hash]) -> Result<(), StoreError>;
}

/// A write to one tier, seen by nobody before its commit. Dropped, it leaves nothing behind.
pub(crate) trait TierWrite: Sized {
    /// Takes units in, which were checked against their hashes. After an error it can only be dropped.
    fn put(&mut self, records: &Records) -> Result<(), StoreError>;

    /// Forgets those put in so far that `keep` does not name.
    fn retain(&mut self, keep: &HashSet<Hash>);

    /// Makes all units visible. A tier that lasts has them on its medium then, all or none of them, and
    /// has written down who holds them; another one keeps what it has room for.
    fn commit(self, held: Option<Held<'_>>) -> Result<(), StoreError>;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;
    use crate::disk::PackTier;
    use crate::encode::{Effort, Encoder};
    use crate::memory::MemoryTier;
    use crate::{Store, StoreOptions, UNIT, lock, zero_hash};

    const OWNER: Owner = Owner([1; 16]);

    fn options() -> StoreOptions {
        StoreOptions { reserve_bytes: 0, ..StoreOptions::default() }
    }

    fn packs(dir: &std::path::Path) -> Arc<PackTier> {
        Arc::clone(&Store::open(dir, options()).expect("store").inner.disk)
    }

    /// Units of two lengths, from `first` on.
    fn units(first: u32) -> Vec<(Hash, Vec<u8>)> {
        (first..first + 600)
            .map(|n| n.to_le_bytes().repeat(if n % 7 == 0 { 100 } else { UNIT / 4 }))
            .map(|raw| (Hash::of(&raw), raw))
            .filter(|(hash, _)| *hash != zero_hash())
            .collect()
    }

    fn hashes(units: &[(Hash, Vec<u8>)]) -> Vec<Hash> {
        units.iter().map(|(hash, _)| *hash).collect()
    }

    fn put(write: &mut impl TierWrite, units: &[(Hash, Vec<u8>)]) {
        let mut encoder = Encoder::new(Effort::Fast);
        for some in units.chunks(64) {
            let mut records = Records::default();
            for (hash, raw) in some {
                records.encode(*hash, raw, &mut encoder);
            }
            write.put(&records).expect("put");
        }
    }

    /// A tier that holds `units` gives them and names what it lacks, which `absent` is.
    fn gives_what_it_holds(tier: &impl Tier, units: &[(Hash, Vec<u8>)], absent: Hash) {
        let mut out = [0; UNIT];
        for (hash, raw) in units {
            let unit = tier.get(hash).expect("read").expect("held");
            assert_eq!(unit.decode(&mut out).expect("decoded"), &raw[..]);
        }
        assert_eq!(tier.get(&absent).expect("asked"), None);

        // Two of each, what it lacks in between.
        let named = hashes(units);
        let named = [&named[..], &[absent], &named[..]].concat();
        let mut held = vec![true; named.len()];
        held[units.len()] = false;
        assert_eq!(tier.contains(&named).expect("asked"), held);
        let found = Mutex::new(BTreeMap::new());
        let each = |i: usize, raw: &[u8]| {
            assert!(lock(&found).insert(i, raw.to_vec()).is_none(), "{i} twice");
            Ok::<(), StoreError>(())
        };
        let lacking = tier.get_many((0..).zip(named).collect(), &each).expect("read");
        assert_eq!(lacking, [(units.len(), absent)]);
        let twice: Vec<&[u8]> = units.iter().chain(units).map(|(_, raw)| &raw[..]).collect();
        let found = lock(&found);
        assert_eq!(found.values().map(|raw| &raw[..]).collect::<Vec<_>>(), twice);

        let refuse = |_: usize, _: &[u8]| Err(StoreError::BadUnit("is not wanted"));
        let refused = tier.get_many(vec![(0, units[0].0)], &refuse).expect_err("refused");
        assert!(matches!(refused, StoreError::BadUnit("is not wanted")), "{refused}");
    }

    fn holds_none(tier: &impl Tier, units: &[(Hash, Vec<u8>)]) {
        assert!(tier.contains(&hashes(units)).expect("asked").iter().all(|held| !held));
        assert!(units.iter().all(|(hash, _)| tier.get(hash).expect("asked").is_none()));
    }

    /// What every tier promises, of one that is empty and has room.
    fn keeps_its_promises<T: Tier>(tier: &Arc<T>) {
        let (first, second, third) = (units(0), units(10_000), units(20_000));

        // Two writes at once; one is dropped, of the other a part is forgotten again.
        let mut dropped = tier.begin();
        put(&mut dropped, &first);
        let mut kept = tier.begin();
        put(&mut kept, &second);
        put(&mut kept, &third);
        kept.retain(&hashes(&second).into_iter().collect());
        put(&mut kept, &first[..1]);
        for some in [&first, &second, &third] {
            holds_none(&**tier, some);
        }
        drop(dropped);
        kept.commit(Some((OWNER, &[]))).expect("committed");
        holds_none(&**tier, &first[1..]);
        holds_none(&**tier, &third);
        gives_what_it_holds(&**tier, &[&second[..], &first[..1]].concat(), third[0].0);

        // What was dropped or forgotten comes in by a later write, beside what is there already.
        let mut again = tier.begin();
        put(&mut again, &[&first[..], &second[..1], &third[..]].concat());
        again.commit(None).expect("committed");
        gives_what_it_holds(&**tier, &[&first[..], &second, &third].concat(), Hash::of(b"absent"));

        // What it gives up, some of it twice, is gone and can come again.
        tier.remove(&[hashes(&first), hashes(&first[..9])].concat()).expect("removed");
        holds_none(&**tier, &first);
        gives_what_it_holds(&**tier, &[&second[..], &third].concat(), first[0].0);
        let mut back = tier.begin();
        put(&mut back, &first);
        back.commit(None).expect("committed");
        gives_what_it_holds(&**tier, &first, Hash::of(b"absent"));
        tier.begin().commit(None).expect("a write of nothing");
    }

    #[test]
    fn memory_and_packs_are_read_written_and_emptied_in_one_way() {
        keeps_its_promises(&Arc::new(MemoryTier::new(64 << 20)));
        let dir = tempfile::tempdir().expect("dir");
        keeps_its_promises(&packs(dir.path()));
    }

    #[test]
    fn what_a_commit_put_into_the_packs_lasts_and_who_holds_it_too() {
        let dir = tempfile::tempdir().expect("dir");
        let all = units(0);
        let mut write = packs(dir.path()).begin();
        put(&mut write, &all);
        write.commit(Some((OWNER, &all[0].0.0))).expect("committed");
        let tier = packs(dir.path());
        gives_what_it_holds(&*tier, &all, Hash::of(b"absent"));
        assert_eq!(tier.index.owned(Some(OWNER)).expect("read"), HashSet::from([all[0].0]));
    }

    #[test]
    fn what_a_collection_removes_leaves_memory_too() {
        let dir = tempfile::tempdir().expect("dir");
        let store = Store::open(dir.path(), options()).expect("store");
        let (gone, kept) = ([7; UNIT], [8; UNIT]);
        let gone = store.put(OWNER, &gone).expect("stored");
        let kept = store.put(Owner([2; 16]), &kept).expect("stored");
        assert!(store.release(OWNER).expect("released"));
        assert_eq!(store.gc().expect("collected").removed_units, 1);
        let mut out = [0; UNIT];
        let lost = store.get(&gone, &mut out).expect_err("removed");
        assert!(matches!(lost, StoreError::Missing(hash) if hash == gone), "{lost}");
        assert_eq!(store.get(&kept, &mut out).expect("held"), UNIT);
        assert_eq!(store.stats().expect("stats").memory_units, 1);
    }

    #[test]
    fn what_memory_lacks_comes_from_the_packs_and_stays_in_memory_when_it_was_read_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let raw = [7; UNIT];
        let hash = Store::open(dir.path(), options())
            .and_then(|store| store.put(OWNER, &raw))
            .expect("stored");
        // Another process: its memory holds nothing yet.
        let store = Store::open(dir.path(), options()).expect("store");
        let same = |i: usize, found: &[u8]| {
            assert_eq!(found, [raw, [0; UNIT]][i]);
            Ok::<(), StoreError>(())
        };
        store.get_many(&[hash, zero_hash()], same).expect("read");
        assert_eq!(store.stats().expect("stats").memory_units, 0, "a scan fills no memory");
        let mut out = [0; UNIT];
        assert_eq!(store.get(&hash, &mut out).expect("read"), UNIT);
        assert_eq!(store.inner.memory.get(&hash).expect("asked").map(|u| u.raw_len), Some(UNIT));
    }
}
