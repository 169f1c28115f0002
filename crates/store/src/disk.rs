//! The tier of the packs: the index says where a unit lies, its record is read from there and checked
//! against its hash.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::encode::decode;
use crate::error::{Damage, StoreError};
use crate::index::{Index, Loc};
use crate::pack::{HEAD, Packs};
use crate::tier::{EncodedUnit, Tier, Wanted};
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
}

impl PackTier {
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
