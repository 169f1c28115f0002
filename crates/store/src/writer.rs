//! Putting units in: hash, drop what is known, encode, hand to each tier, commit.

use std::collections::HashSet;

use godwit_types::Hash;
use rayon::prelude::*;

use crate::disk::PackWrite;
use crate::encode::{Effort, Encoder, Encoding, decode};
use crate::error::StoreError;
use crate::memory::MemoryWrite;
use crate::pack::Records;
use crate::tier::{Tier, TierWrite};
use crate::{Owner, Store, UNIT, is_zero, lock, zero_hash};

/// Bytes of units that are hashed, encoded and written in one go.
const WINDOW: usize = 8 << 20;
/// Units that one task encodes.
const TASK: usize = 64;
/// What the index may grow by for one unit, in bytes.
const INDEX_BYTES: u64 = 160;

/// What a write added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Units put in, zero units and repetitions included.
    pub units: u64,
    /// Units that the store did not hold before.
    pub new_units: u64,
    /// Bytes that the pack files grew by, less those of units that were forgotten again.
    pub new_bytes: u64,
}

/// One write in progress. Dropped without [`Writer::commit`], it leaves nothing behind.
pub struct Writer {
    store: Store,
    owner: Option<Owner>,
    effort: Effort,
    // Given back before the pin ends.
    disk: PackWrite,
    memory: MemoryWrite,
    pin: Pin,
    held: HashSet<Hash>,
    ahead: HashSet<Hash>,
    units: u64,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("stored", &self.stored()).finish_non_exhaustive()
    }
}

/// Units that a writer relies on although no owner holds them yet; no sweep takes them.
struct Pin {
    store: Store,
    number: u64,
}

impl Pin {
    fn new(store: Store) -> Self {
        let number = {
            let mut pins = lock(&store.inner.pins);
            pins.next += 1;
            let number = pins.next;
            pins.by_writer.insert(number, HashSet::new());
            number
        };
        Self { store, number }
    }

    fn extend(&self, hashes: &[Hash]) {
        let mut pins = lock(&self.store.inner.pins);
        pins.by_writer.entry(self.number).or_default().extend(hashes);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        lock(&self.store.inner.pins).by_writer.remove(&self.number);
    }
}

impl Writer {
    pub(crate) fn new(
        store: Store,
        owner: Option<Owner>,
        effort: Effort,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            owner,
            effort,
            disk: store.inner.disk.begin(),
            memory: store.inner.memory.begin(),
            pin: Pin::new(store.clone()),
            store,
            held: HashSet::new(),
            ahead: HashSet::new(),
            units: 0,
        })
    }

    /// Puts in one unit of 1 to 4096 bytes.
    ///
    /// # Errors
    /// As [`Writer::put_units`].
    pub fn put(&mut self, unit: &[u8]) -> Result<Hash, StoreError> {
        if unit.is_empty() || unit.len() > UNIT {
            return Err(StoreError::BadUnit("has no bytes or more than 4096"));
        }
        let hash = Hash::of(unit);
        self.write(&[(hash, unit)])?;
        Ok(hash)
    }

    /// Puts in `bytes`, split into units of 4096 bytes (the last may be shorter), on all cores.
    /// Returns their hashes in order.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`] when the disk is full; [`StoreError::Io`], [`StoreError::Index`].
    /// The writer can only be dropped then.
    pub fn put_units(&mut self, bytes: &[u8]) -> Result<Vec<Hash>, StoreError> {
        let mut hashes = Vec::with_capacity(bytes.len().div_ceil(UNIT));
        for window in bytes.chunks(WINDOW) {
            let zero = zero_hash();
            let units: Vec<(Hash, &[u8])> = window
                .par_chunks(UNIT)
                .with_min_len(16)
                .map(|u| if u.len() == UNIT && is_zero(u) { (zero, u) } else { (Hash::of(u), u) })
                .collect();
            self.write(&units)?;
            hashes.extend(units.iter().map(|(h, _)| *h));
        }
        Ok(hashes)
    }

    /// Puts in a unit of `raw_len` bytes that is encoded already, after checking it.
    ///
    /// # Errors
    /// [`StoreError::BadUnit`] when the body does not decode to bytes of that hash; else as
    /// [`Writer::put_units`].
    pub fn put_encoded(
        &mut self,
        hash: Hash,
        encoding: Encoding,
        raw_len: usize,
        body: &[u8],
    ) -> Result<(), StoreError> {
        if raw_len == 0 || raw_len > UNIT || body.len() > UNIT {
            return Err(StoreError::BadUnit("has no bytes or more than 4096"));
        }
        let mut raw = [0; UNIT];
        decode(encoding, body, &mut raw[..raw_len])
            .map_err(|_| StoreError::BadUnit("has a body that cannot be decoded"))?;
        if Hash::of(&raw[..raw_len]) != hash {
            return Err(StoreError::BadUnit("does not have the hash it claims"));
        }
        self.units += 1;
        if self.unknown(&[hash])?.is_empty() {
            return Ok(());
        }
        let mut records = Records::default();
        records.push(hash, encoding, raw_len as u16, body);
        self.append(&[records])
    }

    /// Holds units that the store has already, without their bytes. Returns those that it lacks.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn hold(&mut self, hashes: &[Hash]) -> Result<Vec<Hash>, StoreError> {
        let lacking: Vec<Hash> = self.unknown(hashes)?.into_iter().map(|i| hashes[i]).collect();
        for h in &lacking {
            self.held.remove(h);
        }
        Ok(lacking)
    }

    /// Takes all that was put in so far for a guess: putting such a unit in again costs its hash
    /// and nothing more, and a unit that does not come again is forgotten by the commit. So the
    /// bulk of something that still changes can be written before it is at rest.
    pub fn start_over(&mut self) {
        if self.ahead.is_empty() {
            self.ahead = std::mem::take(&mut self.held);
        } else {
            self.ahead.extend(self.held.drain());
        }
    }

    /// Forgets what came before [`Writer::start_over`] and not again, as the commit does. Its
    /// bytes in the pack are unused space, for [`Store::gc`] to give back.
    pub fn forget_wrong_guesses(&mut self) {
        if std::mem::take(&mut self.ahead).is_empty() {
            return;
        }
        self.disk.retain(&self.held);
        self.memory.retain(&self.held);
    }

    /// The numbers of those of `hashes` that neither the store nor this writer has; all are held
    /// and pinned from now on, so that no sweep takes them.
    fn unknown(&mut self, hashes: &[Hash]) -> Result<Vec<usize>, StoreError> {
        let zero = zero_hash();
        let mut first: Vec<usize> = Vec::new();
        for (i, h) in hashes.iter().enumerate() {
            if *h != zero && self.held.insert(*h) && !self.ahead.contains(h) {
                first.push(i);
            }
        }
        if first.is_empty() {
            return Ok(first);
        }
        let asked: Vec<Hash> = first.iter().map(|i| hashes[*i]).collect();
        self.pin.extend(&asked);
        let sound = self.store.inner.disk.is_sound(&asked)?;
        Ok(first.into_iter().zip(sound).filter_map(|(i, sound)| (!sound).then_some(i)).collect())
    }

    fn write(&mut self, units: &[(Hash, &[u8])]) -> Result<(), StoreError> {
        self.units += units.len() as u64;
        let hashes: Vec<Hash> = units.iter().map(|(h, _)| *h).collect();
        let new = self.unknown(&hashes)?;
        if new.is_empty() {
            return Ok(());
        }
        let effort = self.effort;
        let encoded: Vec<Records> = new
            .par_chunks(TASK)
            .map_init(
                || Encoder::new(effort),
                |encoder, chunk| {
                    let mut records = Records::with_capacity(chunk.len());
                    for &i in chunk {
                        let (hash, unit) = units[i];
                        records.encode(hash, unit, encoder);
                    }
                    records
                },
            )
            .collect();
        self.append(&encoded)
    }

    /// Hands new units to each tier.
    fn append(&mut self, encoded: &[Records]) -> Result<(), StoreError> {
        let bytes: u64 = encoded.iter().map(|r| r.bytes() as u64).sum();
        let units: u64 = encoded.iter().map(|r| r.units() as u64).sum();
        self.store.room_for(bytes + (self.disk.added().0 + units) * INDEX_BYTES)?;
        for records in encoded {
            self.disk.put(records)?;
            self.memory.put(records)?;
        }
        Ok(())
    }

    /// What has been put in so far.
    #[must_use]
    pub const fn stored(&self) -> Stored {
        let (new_units, new_bytes) = self.disk.added();
        Stored { units: self.units, new_units, new_bytes }
    }

    /// Brings the packs to the disk and then makes everything visible at once.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`], [`StoreError::Io`], [`StoreError::Index`]; nothing was stored then.
    pub fn commit(mut self) -> Result<Stored, StoreError> {
        self.forget_wrong_guesses();
        let stored = self.stored();
        let mut held: Vec<Hash> = self.held.iter().copied().collect();
        held.sort_unstable();
        let held: Vec<u8> = held.iter().flat_map(|h| h.0).collect();
        let held = self.owner.map(|owner| (owner, &held[..]));
        // What does not last comes after what does: nothing is in memory only.
        self.disk.commit(held)?;
        self.memory.commit(held)?;
        Ok(stored)
    }
}

impl Store {
    /// Whether `bytes` more fit beside the reserve.
    pub(crate) fn room_for(&self, bytes: u64) -> Result<(), StoreError> {
        let dir = &self.inner.dir;
        let vfs = rustix::fs::statvfs(dir)
            .map_err(|e| StoreError::io("asking for room at", dir)(e.into()))?;
        if vfs.f_bavail.saturating_mul(vfs.f_frsize) < bytes + self.inner.options.reserve_bytes {
            return Err(StoreError::NoRoom {
                dir: dir.clone(),
                doing: "writing units",
                source: None,
            });
        }
        Ok(())
    }
}
