//! Where units are: in tiers, the fastest first. A read asks each for what those above it lack.
//!
//! ```text
//! read:    memory --what it lacks--> packs --what they lack, too--> StoreError::Missing
//!             ^                        |
//!             +-- a unit read alone ---+
//! commit:  packs; what was committed then goes to memory, too
//! ```
//!
//! Every call of a tier blocks: whoever calls the store from an async task does so by a thread that
//! may wait (`godwit_substrate::AsyncPool`).

use bytes::Bytes;
use godwit_types::Hash;

use crate::encode::{Encoding, decode};
use crate::error::StoreError;

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

/// One place that units are read from. What it gives was checked against its hash when it came from a
/// medium.
pub(crate) trait Tier {
    /// The unit of that hash, if this tier holds it.
    fn get(&self, hash: &Hash) -> Result<Option<EncodedUnit>, StoreError>;

    /// Hands those of `wanted` that this tier holds to `each`, decoded, in any order, from several
    /// threads. Gives back those that it lacks.
    fn get_many<E, F>(&self, wanted: Vec<Wanted>, each: &F) -> Result<Vec<Wanted>, E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;
    use crate::{Effort, Owner, Store, StoreOptions, UNIT, lock};

    /// What every tier promises, of one that holds `units` and nothing else.
    fn keeps_its_promises(tier: &impl Tier, units: &[(Hash, Vec<u8>)]) {
        let absent = Hash::of(b"nobody has it");
        let mut out = [0; UNIT];
        for (hash, raw) in units {
            let unit = tier.get(hash).expect("read").expect("held");
            assert_eq!(unit.decode(&mut out).expect("decoded"), &raw[..]);
        }
        assert_eq!(tier.get(&absent).expect("asked"), None);

        // Two of each, what it lacks in between.
        let named = units.iter().map(|(hash, _)| *hash);
        let named: Vec<Hash> = named.clone().chain([absent]).chain(named).collect();
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

    #[test]
    fn memory_and_packs_give_what_they_hold_and_name_what_they_lack() {
        let dir = tempfile::tempdir().expect("dir");
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let units: Vec<(Hash, Vec<u8>)> = (0..600_u32)
            .map(|n| n.to_le_bytes().repeat(if n % 7 == 0 { 100 } else { UNIT / 4 }))
            .map(|raw| (Hash::of(&raw), raw))
            .filter(|(hash, _)| *hash != crate::zero_hash())
            .collect();
        let store = Store::open(dir.path(), options).expect("store");
        let mut writer = store.writer(Owner([1; 16]), Effort::Fast).expect("writer");
        for (hash, raw) in &units {
            assert_eq!(writer.put(raw).expect("put"), *hash);
        }
        writer.commit().expect("committed");
        keeps_its_promises(&store.inner.memory, &units);
        keeps_its_promises(&store.inner.disk, &units);
    }

    #[test]
    fn what_memory_lacks_comes_from_the_packs_and_stays_in_memory_when_it_was_read_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let raw = [7; UNIT];
        let hash = Store::open(dir.path(), options)
            .and_then(|store| store.put(Owner([1; 16]), &raw))
            .expect("stored");
        // Another process: its memory holds nothing yet.
        let store = Store::open(dir.path(), options).expect("store");
        let same = |i: usize, found: &[u8]| {
            assert_eq!(found, [raw, [0; UNIT]][i]);
            Ok::<(), StoreError>(())
        };
        store.get_many(&[hash, crate::zero_hash()], same).expect("read");
        assert_eq!(store.stats().expect("stats").memory_units, 0, "a scan fills no memory");
        let mut out = [0; UNIT];
        assert_eq!(store.get(&hash, &mut out).expect("read"), UNIT);
        assert_eq!(store.inner.memory.get(&hash).expect("asked").map(|u| u.raw_len), Some(UNIT));
    }
}
