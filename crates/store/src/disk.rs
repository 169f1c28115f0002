//! The tier of the packs, the one that lasts: the index says where a unit lies, its record is read from
//! there and checked against its hash. A write appends to a pack of its own; its commit brings that to the
//! disk and then, in one transaction, says where the units are and who holds them.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::encode::decode;
use crate::error::{Damage, StoreError};
use crate::index::{Index, Loc};
use crate::pack::{HEAD, OpenPack, Packs, Records};
use crate::tier::{EncodedUnit, Held, Tier, TierWrite, Wanted};
use crate::{UNIT, lock};

/// Records that lie this close are read in one go, in bytes.
const GAP: u64 = 16 << 10;
/// The most that is read in one go, in bytes.
const SPAN: u64 = 1 << 20;

/// A unit that the index knows, and which of those wanted it is.
type Place = (Loc, usize, Hash);

pub(crate) struct PackTier {
    pub(crate) index: Index,
    pub(crate) packs: Packs,
    /// Units found damaged since the store was opened; putting one in again heals it.
    pub(crate) suspects: Mutex<HashSet<Hash>>,
}

impl Tier for PackTier {
    type Write = PackWrite;

    fn get(&self, hash: &Hash) -> Result<Option<EncodedUnit>, StoreError> {
        let mut was = None;
        loop {
            let Some(loc) = self.index.lookup(&[*hash])?.pop().flatten() else { return Ok(None) };
            match self.read_one(hash, &loc) {
                // A compaction may move the unit between the look-up and the read; look again.
                Err(StoreError::Damaged(_)) if was != Some(loc) => was = Some(loc),
                Err(StoreError::Damaged(d)) => {
                    lock(&self.suspects).insert(*hash);
                    return Err(StoreError::Damaged(d));
                }
                done => return done.map(Some),
            }
        }
    }

    fn get_many<E, F>(&self, wanted: Vec<Wanted>, each: &F) -> Result<Vec<Wanted>, E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync,
    {
        let asked: Vec<Hash> = wanted.iter().map(|(_, h)| *h).collect();
        let found = self.index.lookup(&asked)?;
        let mut lacking = Vec::new();
        let mut places: Vec<Place> = Vec::with_capacity(wanted.len());
        for ((i, h), loc) in wanted.into_iter().zip(found) {
            match loc {
                Some(loc) => places.push((loc, i, h)),
                None => lacking.push((i, h)),
            }
        }
        places.sort_unstable_by_key(|(l, ..)| (l.pack, l.offset));
        let gone = Mutex::new(lacking);
        spans(&places).into_par_iter().try_for_each(|span| self.read_places(span, each, &gone))?;
        let mut lacking = std::mem::take(&mut *lock(&gone));
        lacking.sort_unstable_by_key(|(i, _)| *i);
        Ok(lacking)
    }

    fn contains(&self, hashes: &[Hash]) -> Result<Vec<bool>, StoreError> {
        Ok(self.index.lookup(hashes)?.iter().map(Option::is_some).collect())
    }

    fn begin(self: &Arc<Self>) -> PackWrite {
        PackWrite { tier: Arc::clone(self), pack: None, new: Vec::new(), bytes: 0 }
    }

    fn remove(&self, hashes: &[Hash]) -> Result<(), StoreError> {
        self.index.remove(hashes)
    }
}

/// What a write adds to the packs: records at the end of one that no other write has meanwhile.
pub(crate) struct PackWrite {
    tier: Arc<PackTier>,
    /// None before the first record and after the end.
    pack: Option<OpenPack>,
    new: Vec<(Hash, Loc)>,
    /// Bytes of the records of `new`.
    bytes: u64,
}

impl TierWrite for PackWrite {
    fn put(&mut self, records: &Records) -> Result<(), StoreError> {
        let pack = match &mut self.pack {
            Some(pack) => pack,
            none => none.insert(self.tier.packs.take()?),
        };
        pack.append(records, &mut self.new)
            .map_err(StoreError::io("writing", &self.tier.packs.path(pack.number)))?;
        self.bytes += records.bytes() as u64;
        Ok(())
    }

    fn retain(&mut self, keep: &HashSet<Hash>) {
        // The records of the others are unused space of the pack, for a collection to give back.
        self.new.retain(|(hash, _)| keep.contains(hash));
        self.bytes = self.new.iter().map(|(_, loc)| HEAD as u64 + u64::from(loc.body)).sum();
    }

    fn commit(mut self, held: Option<Held<'_>>) -> Result<(), StoreError> {
        let tier = Arc::clone(&self.tier);
        let (new, pack) = self.on_disk()?;
        let lost =
            |h: &Hash, old: &Loc| !tier.packs.reaches(old) || lock(&tier.suspects).contains(h);
        let done = tier.index.commit(new, lost, pack, held);
        self.end(done)?;
        let mut suspects = lock(&tier.suspects);
        if !suspects.is_empty() {
            suspects.retain(|h| !self.new.iter().any(|(n, _)| n == h));
        }
        Ok(())
    }
}

impl PackWrite {
    /// Units and bytes of records that the commit will add.
    pub(crate) const fn added(&self) -> (u64, u64) {
        (self.new.len() as u64, self.bytes)
    }

    /// Ends a write of copies of all units that `old` holds: they are where the copies are from now
    /// on, and the index does not name `old` any more.
    pub(crate) fn relocate(mut self, old: u32) -> Result<(), StoreError> {
        let tier = Arc::clone(&self.tier);
        let (new, pack) = self.on_disk()?;
        let done = tier.index.relocate(new, pack, &[old]);
        self.end(done)
    }

    /// Brings the records to the disk; what the index is to learn of them: the units in order, and
    /// the pack with its new length.
    #[expect(clippy::type_complexity, reason = "what the index takes")]
    fn on_disk(&mut self) -> Result<(&[(Hash, Loc)], Option<(u32, u64)>), StoreError> {
        if let Some(pack) = &self.pack {
            let path = self.tier.packs.path(pack.number);
            pack.file.sync_data().map_err(StoreError::io("syncing", &path))?;
        }
        self.new.sort_unstable_by_key(|(h, _)| *h);
        Ok((&self.new, self.pack.as_ref().map(|p| (p.number, p.len))))
    }

    /// Gives the pack back as the index's transaction has left it.
    fn end(&mut self, done: Result<(), StoreError>) -> Result<(), StoreError> {
        let Some(pack) = self.pack.take() else { return done };
        let packs = &self.tier.packs;
        match &done {
            Ok(()) => packs.give_back(&pack, pack.len),
            // Whether the transaction reached the disk is for the index to say.
            Err(_) => {
                if let Ok(known) = self.tier.index.packs() {
                    let len =
                        known.iter().find(|(n, _)| *n == pack.number).map_or(0, |(_, len)| *len);
                    packs.give_back(&pack, len);
                }
            }
        }
        done
    }
}

impl Drop for PackWrite {
    fn drop(&mut self) {
        if let Some(pack) = self.pack.take() {
            self.tier.packs.give_back(&pack, pack.base);
        }
    }
}

impl PackTier {
    /// For each of `hashes`, whether it is here and sound, as far as is known: a write need not
    /// bring it.
    pub(crate) fn is_sound(&self, hashes: &[Hash]) -> Result<Vec<bool>, StoreError> {
        let found = self.index.lookup(hashes)?;
        let suspects = lock(&self.suspects);
        let sound = |h: &Hash, loc: &Loc| self.packs.reaches(loc) && !suspects.contains(h);
        Ok(hashes.iter().zip(found).map(|(h, loc)| loc.is_some_and(|l| sound(h, &l))).collect())
    }

    /// Checks one unit on the disk.
    pub(crate) fn read_checked(&self, hash: &Hash, loc: &Loc) -> Result<(), StoreError> {
        let Err(e) = self.read_one(hash, loc) else { return Ok(()) };
        match self.index.lookup(&[*hash])?.pop().flatten() {
            None => Err(StoreError::Missing(*hash)),
            Some(now) if now != *loc => self.read_one(hash, &now).map(|_| ()),
            Some(_) => {
                if matches!(e, StoreError::Damaged(_)) {
                    lock(&self.suspects).insert(*hash);
                }
                Err(e)
            }
        }
    }

    fn read_one(&self, hash: &Hash, loc: &Loc) -> Result<EncodedUnit, StoreError> {
        let mut record = vec![0; HEAD + usize::from(loc.body)];
        self.read_span(loc, &mut record, hash)?;
        let mut raw = [0; UNIT];
        check_record(hash, loc, &record, &mut raw)?;
        let body = Bytes::from(record).slice(HEAD..);
        Ok(EncodedUnit { encoding: loc.encoding, raw_len: usize::from(loc.raw), body })
    }

    fn read_span(&self, at: &Loc, out: &mut [u8], hash: &Hash) -> Result<(), StoreError> {
        let missing = || StoreError::damaged(*hash, at.pack, at.offset, Damage::Missing);
        let file = self.packs.file(at.pack).ok_or_else(missing)?;
        match file.read_exact_at(out, at.offset) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(missing()),
            done => done.map_err(StoreError::io("reading", &self.packs.path(at.pack))),
        }
    }

    fn read_places<E, F>(
        &self,
        span: &[Place],
        each: &F,
        gone: &Mutex<Vec<Wanted>>,
    ) -> Result<(), E>
    where
        E: From<StoreError>,
        F: Fn(usize, &[u8]) -> Result<(), E>,
    {
        let [(first, _, name), ..] = span else { return Ok(()) };
        let end = span.iter().map(|(l, ..)| end(l)).max().unwrap_or(first.offset);
        let mut bytes = vec![0; (end - first.offset) as usize];
        let whole = self.read_span(first, &mut bytes, name).is_ok();
        let mut raw = [0; UNIT];
        for (loc, i, hash) in span {
            let at = (loc.offset - first.offset) as usize;
            let record = &bytes[at..at + HEAD + usize::from(loc.body)];
            if whole && check_record(hash, loc, record, &mut raw).is_ok() {
                each(*i, &raw[..usize::from(loc.raw)])?;
                continue;
            }
            // Moved or given up by a collection, or damaged: the careful way says which.
            match self.get(hash)? {
                Some(unit) => each(*i, unit.decode(&mut raw)?)?,
                None => lock(gone).push((*i, *hash)),
            }
        }
        Ok(())
    }
}

fn end(l: &Loc) -> u64 {
    l.offset + HEAD as u64 + u64::from(l.body)
}

/// Splits sorted places into stretches that are read in one go.
fn spans(places: &[Place]) -> Vec<&[Place]> {
    let mut out = Vec::new();
    let mut from = 0;
    for i in 1..=places.len() {
        let cut = i == places.len() || {
            let (first, last, next) = (&places[from].0, &places[i - 1].0, &places[i].0);
            next.pack != first.pack
                || next.offset > end(last) + GAP
                || end(next) - first.offset > SPAN
        };
        if cut {
            out.push(&places[from..i]);
            from = i;
        }
    }
    out
}

/// Decodes the record at `loc` into the front of `raw` and checks it in full.
fn check_record(
    hash: &Hash,
    loc: &Loc,
    record: &[u8],
    raw: &mut [u8; UNIT],
) -> Result<(), StoreError> {
    let bad = |damage| StoreError::damaged(*hash, loc.pack, loc.offset, damage);
    if !Packs::head_matches(record, *hash, loc) {
        return Err(bad(Damage::Head));
    }
    let out = &mut raw[..usize::from(loc.raw)];
    decode(loc.encoding, &record[HEAD..], out).map_err(|_| bad(Damage::Body))?;
    if Hash::of(out) != *hash {
        return Err(bad(Damage::Content));
    }
    Ok(())
}
