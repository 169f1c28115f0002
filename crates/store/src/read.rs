//! Getting units out, from whichever tier holds them.

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::encode::Encoding;
use crate::error::StoreError;
use crate::tier::{EncodedUnit, Tier, Wanted};
use crate::{Store, UNIT, zero_hash};

impl Store {
    /// Reads one unit into `out`; its length.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], [`StoreError::BadUnit`] when `out` is
    /// too short, [`StoreError::Io`], [`StoreError::Index`].
    pub fn get(&self, hash: &Hash, out: &mut [u8]) -> Result<usize, StoreError> {
        self.get_encoded(hash)?.decode(out).map(<[u8]>::len)
    }

    /// Reads one unit as it is held. It has been decoded and checked once.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn get_encoded(&self, hash: &Hash) -> Result<EncodedUnit, StoreError> {
        if *hash == zero_hash() {
            return Ok(EncodedUnit { encoding: Encoding::Zero, raw_len: UNIT, body: Bytes::new() });
        }
        if let Some(unit) = self.inner.memory.get(hash)? {
            return Ok(unit);
        }
        let unit = self.inner.disk.get(hash)?.ok_or(StoreError::Missing(*hash))?;
        self.inner.memory.put(*hash, unit.clone());
        Ok(unit)
    }

    /// Reads many units on all cores and hands each to `each` with its place in `hashes`, in any
    /// order, from several threads. Repeated hashes are read once for each time they are named.
    /// Nothing is handed over when the store lacks one from the start.
    ///
    /// # Errors
    /// As [`Store::get`], by the first unit found; or the first error of `each`.
    pub fn get_many<E, F>(&self, hashes: &[Hash], each: F) -> Result<(), E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync,
    {
        let zero = zero_hash();
        let (zeros, wanted): (Vec<Wanted>, Vec<Wanted>) =
            hashes.iter().copied().enumerate().partition(|(_, hash)| *hash == zero);
        let named: Vec<Hash> = wanted.iter().map(|(_, hash)| *hash).collect();
        let below = lacking(&*self.inner.memory, named)?;
        if let Some(hash) = lacking(&*self.inner.disk, below)?.first() {
            return Err(StoreError::Missing(*hash).into());
        }
        zeros.par_iter().with_min_len(256).try_for_each(|(i, _)| each(*i, &[0; UNIT]))?;
        let lacking = self.inner.memory.get_many(wanted, &each)?;
        let lacking = self.inner.disk.get_many(lacking, &each)?;
        match lacking.first() {
            None => Ok(()),
            Some((_, hash)) => Err(StoreError::Missing(*hash).into()),
        }
    }
}

/// Those of `hashes` that `tier` does not hold.
fn lacking(tier: &impl Tier, hashes: Vec<Hash>) -> Result<Vec<Hash>, StoreError> {
    let held = tier.contains(&hashes)?;
    Ok(hashes.into_iter().zip(held).filter(|(_, held)| !held).map(|(hash, _)| hash).collect())
}
