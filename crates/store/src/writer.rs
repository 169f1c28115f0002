//! Putting units in: hash, drop what is known, encode, append, commit.

use std::collections::HashSet;

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::encode::{Effort, Encoder, Encoding, decode};
use crate::error::StoreError;
use crate::index::Loc;
use crate::pack::{HEAD, OpenPack, head};
use crate::tier::EncodedUnit;
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
    pack: Option<OpenPack>,
    pin: u64,
    held: HashSet<Hash>,
    ahead: HashSet<Hash>,
    new: Vec<(Hash, Loc)>,
    fresh: Vec<(Hash, EncodedUnit)>,
    fresh_bytes: u64,
    stored: Stored,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("stored", &self.stored).finish_non_exhaustive()
    }
}

struct Batch {
    bytes: Vec<u8>,
    units: Vec<(Hash, Encoding, u16, u16)>,
}

impl Writer {
    pub(crate) fn new(
        store: Store,
        owner: Option<Owner>,
        effort: Effort,
    ) -> Result<Self, StoreError> {
        let pin = {
            let mut pins = lock(&store.inner.pins);
            pins.next += 1;
            let pin = pins.next;
            pins.by_writer.insert(pin, HashSet::new());
            pin
        };
        Ok(Self {
            store,
            owner,
            effort,
            pack: None,
            pin,
            held: HashSet::new(),
            ahead: HashSet::new(),
            new: Vec::new(),
            fresh: Vec::new(),
            fresh_bytes: 0,
            stored: Stored::default(),
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
        self.stored.units += 1;
        if self.unknown(&[hash])?.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(HEAD + body.len());
        bytes.extend_from_slice(&head(hash, encoding, raw_len as u16, body.len() as u16));
        bytes.extend_from_slice(body);
        let units = vec![(hash, encoding, raw_len as u16, body.len() as u16)];
        self.append(vec![Batch { bytes, units }])
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
        let (held, stored) = (&self.held, &mut self.stored);
        self.new.retain(|(h, loc)| {
            let kept = held.contains(h);
            if !kept {
                stored.new_units -= 1;
                stored.new_bytes -= HEAD as u64 + u64::from(loc.body);
            }
            kept
        });
        self.fresh.retain(|(h, _)| held.contains(h));
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
        {
            let mut pins = lock(&self.store.inner.pins);
            pins.by_writer.entry(self.pin).or_default().extend(first.iter().map(|i| hashes[*i]));
        }
        let asked: Vec<Hash> = first.iter().map(|i| hashes[*i]).collect();
        let found = self.store.inner.disk.index.lookup(&asked)?;
        let suspects = lock(&self.store.inner.disk.suspects);
        let has = |i: usize, loc: Option<Loc>| {
            loc.is_some_and(|l| self.store.inner.disk.packs.reaches(&l))
                && !suspects.contains(&hashes[i])
        };
        Ok(first.into_iter().zip(found).filter_map(|(i, f)| (!has(i, f)).then_some(i)).collect())
    }

    fn write(&mut self, units: &[(Hash, &[u8])]) -> Result<(), StoreError> {
        self.stored.units += units.len() as u64;
        let hashes: Vec<Hash> = units.iter().map(|(h, _)| *h).collect();
        let new = self.unknown(&hashes)?;
        if new.is_empty() {
            return Ok(());
        }
        let effort = self.effort;
        let batches: Vec<Batch> = new
            .par_chunks(TASK)
            .map_init(
                || Encoder::new(effort),
                |encoder, chunk| {
                    let mut b = Batch {
                        bytes: Vec::with_capacity(chunk.len() * (HEAD + UNIT / 2)),
                        units: Vec::with_capacity(chunk.len()),
                    };
                    for &i in chunk {
                        let (hash, unit) = units[i];
                        let at = b.bytes.len();
                        b.bytes.extend_from_slice(&[0; HEAD]);
                        let encoding = encoder.encode(unit, &mut b.bytes);
                        let body = (b.bytes.len() - at - HEAD) as u16;
                        let raw = unit.len() as u16;
                        b.bytes[at..at + HEAD].copy_from_slice(&head(hash, encoding, raw, body));
                        b.units.push((hash, encoding, raw, body));
                    }
                    b
                },
            )
            .collect();
        self.append(batches)
    }

    fn append(&mut self, batches: Vec<Batch>) -> Result<(), StoreError> {
        let total: u64 = batches.iter().map(|b| b.bytes.len() as u64).sum();
        let count: u64 = batches.iter().map(|b| b.units.len() as u64).sum();
        self.store.room_for(total + (self.new.len() as u64 + count) * INDEX_BYTES)?;
        if self.pack.is_none() {
            self.pack = Some(self.store.inner.disk.packs.take()?);
        }
        let Some(pack) = &mut self.pack else { return Ok(()) };
        for b in batches {
            let mut at = pack.len;
            let number = pack.number;
            if let Err(e) = pack.append(&b.bytes) {
                return Err(StoreError::io("writing", &self.store.inner.disk.packs.path(number))(
                    e,
                ));
            }
            let bytes = Bytes::from(b.bytes);
            let mut from = 0;
            for (hash, encoding, raw, body) in b.units {
                let loc = Loc { pack: pack.number, offset: at, body, raw, encoding };
                let end = from + HEAD + usize::from(body);
                if self.fresh_bytes < self.store.inner.options.memory_limit_bytes {
                    let body = Bytes::copy_from_slice(&bytes[from + HEAD..end]);
                    self.fresh_bytes += body.len() as u64;
                    let raw_len = usize::from(raw);
                    self.fresh.push((hash, EncodedUnit { encoding, raw_len, body }));
                }
                self.new.push((hash, loc));
                at += (end - from) as u64;
                from = end;
            }
        }
        self.stored.new_bytes += total;
        self.stored.new_units += count;
        Ok(())
    }

    /// What has been put in so far.
    #[must_use]
    pub const fn stored(&self) -> Stored {
        self.stored
    }

    /// Brings the packs to the disk and then makes everything visible at once.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`], [`StoreError::Io`], [`StoreError::Index`]; nothing was stored then.
    pub fn commit(mut self) -> Result<Stored, StoreError> {
        self.forget_wrong_guesses();
        if let Some(pack) = &self.pack {
            let path = self.store.inner.disk.packs.path(pack.number);
            pack.file.sync_data().map_err(StoreError::io("syncing", &path))?;
        }
        self.new.sort_unstable_by_key(|(h, _)| *h);
        let mut held: Vec<Hash> = self.held.iter().copied().collect();
        held.sort_unstable();
        let held: Vec<u8> = held.iter().flat_map(|h| h.0).collect();
        let replace = |h: &Hash, old: &Loc| {
            !self.store.inner.disk.packs.reaches(old)
                || lock(&self.store.inner.disk.suspects).contains(h)
        };
        let done = self.store.inner.disk.index.commit(
            &self.new,
            replace,
            self.pack.as_ref().map(|p| (p.number, p.len)),
            self.owner.map(|o| (o, &held[..])),
        );
        if let Err(e) = done {
            // Whether the commit reached the disk is for the index to say.
            if let Some(pack) = self.pack.take()
                && let Ok(packs) = self.store.inner.disk.index.packs()
            {
                let n = packs.iter().find(|(n, _)| *n == pack.number).map_or(0, |(_, len)| *len);
                self.store.inner.disk.packs.give_back(&pack, n);
            }
            return Err(e);
        }
        {
            let mut suspects = lock(&self.store.inner.disk.suspects);
            if !suspects.is_empty() {
                suspects.retain(|h| !self.new.iter().any(|(n, _)| n == h));
            }
        }
        for (hash, unit) in self.fresh.drain(..) {
            self.store.inner.memory.put(hash, unit);
        }
        if let Some(mut pack) = self.pack.take() {
            pack.base = pack.len;
            self.store.inner.disk.packs.give_back(&pack, pack.len);
        }
        Ok(self.stored)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(pack) = self.pack.take() {
            self.store.inner.disk.packs.give_back(&pack, pack.base);
        }
        lock(&self.store.inner.pins).by_writer.remove(&self.pin);
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
