//! Getting units out, each checked against its hash when it comes from the disk.

use std::os::unix::fs::FileExt;

use bytes::Bytes;
use godwit_types::Hash;
use rayon::prelude::*;

use crate::cache::Cached;
use crate::encode::{Encoding, decode};
use crate::error::{Damage, StoreError};
use crate::index::Loc;
use crate::pack::{HEAD, Packs};
use crate::{Store, UNIT, lock, zero_hash};

/// Records that lie this close are read in one go, in bytes.
const GAP: u64 = 16 << 10;
/// The most that is read in one go, in bytes.
const SPAN: u64 = 1 << 20;

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

impl Store {
    /// Reads one unit into `out`; its length.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], [`StoreError::BadUnit`] when `out` is
    /// too short, [`StoreError::Io`], [`StoreError::Index`].
    pub fn get(&self, hash: &Hash, out: &mut [u8]) -> Result<usize, StoreError> {
        let unit = self.get_encoded(hash)?;
        let Some(out) = out.get_mut(..unit.raw_len) else {
            return Err(StoreError::BadUnit("is longer than the space given for it"));
        };
        // It was decoded and checked when it came from the disk.
        decode(unit.encoding, &unit.body, out)
            .map_err(|_| StoreError::BadUnit("cannot be decoded"))?;
        Ok(out.len())
    }

    /// Reads one unit as it is held. It has been decoded and checked once.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn get_encoded(&self, hash: &Hash) -> Result<EncodedUnit, StoreError> {
        if *hash == zero_hash() {
            return Ok(EncodedUnit { encoding: Encoding::Zero, raw_len: UNIT, body: Bytes::new() });
        }
        let encoded = |c: Cached| EncodedUnit {
            encoding: c.encoding,
            raw_len: usize::from(c.raw),
            body: c.body,
        };
        if let Some(c) = self.inner.cache.get(hash) {
            return Ok(encoded(c));
        }
        let mut was = None;
        loop {
            let Some(loc) = self.inner.index.lookup(&[*hash])?.pop().flatten() else {
                return Err(StoreError::Missing(*hash));
            };
            match self.read_one(hash, &loc) {
                // A compaction may move the unit between the look-up and the read; look again.
                Err(StoreError::Damaged(_)) if was != Some(loc) => was = Some(loc),
                Err(StoreError::Damaged(d)) => {
                    lock(&self.inner.suspects).insert(*hash);
                    return Err(StoreError::Damaged(d));
                }
                done => return done.map(encoded),
            }
        }
    }

    /// Checks one unit on the disk, past the memory tier.
    pub(crate) fn read_checked(&self, hash: &Hash, loc: &Loc) -> Result<(), StoreError> {
        let Err(e) = self.read_one(hash, loc) else { return Ok(()) };
        match self.inner.index.lookup(&[*hash])?.pop().flatten() {
            None => Err(StoreError::Missing(*hash)),
            Some(now) if now != *loc => self.read_one(hash, &now).map(|_| ()),
            Some(_) => {
                if matches!(e, StoreError::Damaged(_)) {
                    lock(&self.inner.suspects).insert(*hash);
                }
                Err(e)
            }
        }
    }

    fn read_one(&self, hash: &Hash, loc: &Loc) -> Result<Cached, StoreError> {
        let mut record = vec![0; HEAD + usize::from(loc.body)];
        self.read_span(loc, &mut record, hash)?;
        let mut raw = [0; UNIT];
        check_record(hash, loc, &record, &mut raw)?;
        let body = Bytes::from(record).slice(HEAD..);
        let unit = Cached { encoding: loc.encoding, raw: loc.raw, body };
        self.inner.cache.put(*hash, unit.clone());
        Ok(unit)
    }

    fn read_span(&self, at: &Loc, out: &mut [u8], hash: &Hash) -> Result<(), StoreError> {
        let missing = || StoreError::damaged(*hash, at.pack, at.offset, Damage::Missing);
        let file = self.inner.packs.file(at.pack).ok_or_else(missing)?;
        match file.read_exact_at(out, at.offset) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(missing()),
            done => done.map_err(StoreError::io("reading", &self.inner.packs.path(at.pack))),
        }
    }

    /// Reads many units on all cores and hands each to `each` with its place in `hashes`, in any
    /// order, from several threads. Repeated hashes are read once for each time they are named.
    ///
    /// # Errors
    /// As [`Store::get`], by the first unit found; or the first error of `each`.
    pub fn get_many<E, F>(&self, hashes: &[Hash], each: F) -> Result<(), E>
    where
        E: From<StoreError> + Send,
        F: Fn(usize, &[u8]) -> Result<(), E> + Sync,
    {
        let zero = zero_hash();
        let mut wanted: Vec<(usize, Hash)> = Vec::with_capacity(hashes.len());
        let cached = |h: &Hash| self.inner.cache.get(h);
        let hits: Vec<Option<Cached>> = hashes.par_iter().with_min_len(256).map(cached).collect();
        hits.par_iter().enumerate().with_min_len(64).try_for_each(|(i, hit)| {
            let mut raw = [0; UNIT];
            match hit {
                Some(c) => {
                    let out = &mut raw[..usize::from(c.raw)];
                    decode(c.encoding, &c.body, out)
                        .map_err(|_| StoreError::BadUnit("cannot be decoded"))?;
                    each(i, out)
                }
                None if hashes[i] == zero => each(i, &raw),
                None => Ok(()),
            }
        })?;
        wanted.extend(
            (0..)
                .zip(hashes)
                .filter(|(i, h)| hits[*i].is_none() && **h != zero)
                .map(|(i, h)| (i, *h)),
        );
        drop(hits);
        let asked: Vec<Hash> = wanted.iter().map(|(_, h)| *h).collect();
        let found = self.inner.index.lookup(&asked)?;
        let mut places: Vec<(Loc, usize, Hash)> = Vec::with_capacity(wanted.len());
        for ((i, h), loc) in wanted.into_iter().zip(found) {
            places.push((loc.ok_or(StoreError::Missing(h))?, i, h));
        }
        places.sort_unstable_by_key(|(l, ..)| (l.pack, l.offset));
        spans(&places).into_par_iter().try_for_each(|span| self.read_places(span, &each))
    }

    fn read_places<E, F>(&self, span: &[(Loc, usize, Hash)], each: &F) -> Result<(), E>
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
            } else {
                // Moved by a compaction, or damaged: the careful way says which.
                let n = self.get(hash, &mut raw)?;
                each(*i, &raw[..n])?;
            }
        }
        Ok(())
    }
}

fn end(l: &Loc) -> u64 {
    l.offset + HEAD as u64 + u64::from(l.body)
}

/// Splits sorted places into stretches that are read in one go.
fn spans(places: &[(Loc, usize, Hash)]) -> Vec<&[(Loc, usize, Hash)]> {
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
pub(crate) fn check_record(
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
