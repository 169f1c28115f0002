//! The index: which unit lies where, how much of each pack is committed, who holds what.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use godwit_types::Hash;
use rayon::prelude::*;
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition, WriteTransaction,
};

use crate::Owner;
use crate::encode::Encoding;
use crate::error::{StoreError, is_full};
use crate::mark::{CommitMark, Marked};

/// Unit hash -> [`Loc`].
const UNITS: TableDefinition<'_, &[u8; 32], &[u8; LOC_LEN]> = TableDefinition::new("units-1");
/// Pack number -> committed bytes.
const PACKS: TableDefinition<'_, u32, u64> = TableDefinition::new("packs-1");
/// Owner and sequence number -> the hashes of one commit, 32 bytes each.
const HELD: TableDefinition<'_, (&[u8; 16], u64), &[u8]> = TableDefinition::new("held-1");
/// What is known of the index itself: the number of its last commit.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta-1");
const LAST: &str = "last-commit";

/// Bytes of redb's own page cache.
const CACHE_BYTES: usize = 64 << 20;
/// An index of up to so many bytes is read whole and checked when it is opened; a larger one when
/// the store is checked.
const CHECKED_AT_OPEN: u64 = 128 << 20;
const LOC_LEN: usize = 17;

/// Where a unit's record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loc {
    pub(crate) pack: u32,
    /// Of the record's head in the pack, in bytes.
    pub(crate) offset: u64,
    /// Length of the encoded body.
    pub(crate) body: u16,
    /// Length of the unit.
    pub(crate) raw: u16,
    pub(crate) encoding: Encoding,
}

impl Loc {
    fn to_bytes(self) -> [u8; LOC_LEN] {
        let mut b = [0; LOC_LEN];
        b[..4].copy_from_slice(&self.pack.to_le_bytes());
        b[4..12].copy_from_slice(&self.offset.to_le_bytes());
        b[12..14].copy_from_slice(&self.body.to_le_bytes());
        b[14..16].copy_from_slice(&self.raw.to_le_bytes());
        b[16] = self.encoding as u8;
        b
    }

    fn from_bytes(hash: Hash, b: &[u8; LOC_LEN]) -> Result<Self, StoreError> {
        let &[p0, p1, p2, p3, o0, o1, o2, o3, o4, o5, o6, o7, b0, b1, r0, r1, e] = b;
        let raw = u16::from_le_bytes([r0, r1]);
        let (Some(encoding), true) =
            (Encoding::from_u8(e), usize::from(raw) <= crate::UNIT && raw > 0)
        else {
            return Err(StoreError::BadEntry(hash));
        };
        Ok(Self {
            pack: u32::from_le_bytes([p0, p1, p2, p3]),
            offset: u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            body: u16::from_le_bytes([b0, b1]),
            raw,
            encoding,
        })
    }
}

/// The database. After an input or output error redb wants to be opened anew, which happens here.
pub(crate) struct Index {
    path: PathBuf,
    db: RwLock<Option<Database>>,
    mark: CommitMark,
}

type Done<T> = Result<T, Box<redb::Error>>;

fn boxed<E: Into<redb::Error>>(e: E) -> Box<redb::Error> {
    Box::new(e.into())
}

impl Index {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let db = Self::open_db(path)?;
        let beside = path.with_extension("mark");
        let (mark, marked) =
            CommitMark::open(&beside).map_err(StoreError::io("opening", &beside))?;
        match marked {
            Marked::At(wanted) => Self::has_reached(path, &db, wanted)?,
            Marked::Nothing => {}
            Marked::Damaged => {
                tracing::warn!(path = %beside.display(), "is damaged: whether the index has fallen back is not known; written anew");
            }
        }
        let index = Self { path: path.to_owned(), db: RwLock::new(Some(db)), mark };
        index.write("making", |t| {
            t.open_table(UNITS).map_err(boxed)?;
            t.open_table(PACKS).map_err(boxed)?;
            t.open_table(HELD).map_err(boxed)?;
            Ok(())
        })?;
        Ok(index)
    }

    /// Refuses a database that lacks the last commit.
    fn has_reached(path: &Path, db: &Database, wanted: u64) -> Result<(), StoreError> {
        let found = last_commit(db).map_err(|e| Self::error(path, "reading the number of", *e))?;
        if found >= wanted {
            return Ok(());
        }
        let dir = path.parent().unwrap_or(path).to_owned();
        Err(StoreError::FellBack { dir, wanted, found })
    }

    fn open_db(path: &Path) -> Result<Database, StoreError> {
        // Every page has a checksum; without the check redb trusts what it reads.
        let small = std::fs::metadata(path).is_ok_and(|m| m.len() <= CHECKED_AT_OPEN);
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(small);
        builder.create(path).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::Busy(path.to_owned()),
            e => Self::error(path, "opening", e.into()),
        })
    }

    fn error(path: &Path, doing: &'static str, e: redb::Error) -> StoreError {
        match e {
            redb::Error::Io(source) if is_full(&source) => StoreError::NoRoom {
                dir: path.parent().unwrap_or(path).to_owned(),
                doing: "committing the index",
                source: Some(source),
            },
            e => StoreError::Index { doing, source: Box::new(e) },
        }
    }

    fn run<T>(
        &self,
        doing: &'static str,
        f: impl FnOnce(&Database) -> Done<T>,
    ) -> Result<T, StoreError> {
        let result = {
            let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
            match guard.as_ref() {
                Some(db) => f(db),
                None => Err(Box::new(redb::Error::PreviousIo)),
            }
        };
        result.map_err(|e| {
            if matches!(*e, redb::Error::Io(_) | redb::Error::PreviousIo) {
                self.reopen();
            }
            Self::error(&self.path, doing, *e)
        })
    }

    /// Opens the database anew; it comes up with the last commit that is whole. If that fails,
    /// the next call tries again.
    fn reopen(&self) {
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        drop(guard.take());
        let opened = Self::open_db(&self.path);
        let whole =
            |db: Database| Self::has_reached(&self.path, &db, self.mark.last()).map(|()| db);
        match opened.and_then(whole) {
            Ok(db) => *guard = Some(db),
            Err(e) => tracing::error!(index = %self.path.display(), error = %e, "index not usable"),
        }
    }

    /// Compares every page on the disk with its checksum, if the index is not a large one: of a copy,
    /// so that a damaged one stays usable as far as it is. Answers what is wrong. Writing waits while
    /// it is copied from memory, reading does not.
    pub(crate) fn check(&self) -> Result<Option<String>, StoreError> {
        let bytes = std::fs::metadata(&self.path).map_err(StoreError::io("reading", &self.path))?;
        if bytes.len() > CHECKED_AT_OPEN {
            return Ok(None);
        }
        let copy = self.path.with_extension("check");
        let found = self.check_copy(&copy);
        let _ = std::fs::remove_file(&copy);
        match found {
            Err(StoreError::NoRoom { .. }) => {
                tracing::warn!(index = %self.path.display(), "there is no room to check a copy of the index");
                Ok(None)
            }
            Err(e @ (StoreError::Index { .. } | StoreError::FellBack { .. })) => {
                let why =
                    std::error::Error::source(&e).map_or_else(|| e.to_string(), |s| s.to_string());
                Ok(Some(why))
            }
            Err(e) => Err(e),
            Ok(()) => Ok(None),
        }
    }

    fn check_copy(&self, copy: &Path) -> Result<(), StoreError> {
        use std::io::{Error, copy as pump, sink};
        let reading = StoreError::io("reading", &self.path);
        let from_disk = || -> Result<(), Error> {
            let mut file = std::fs::File::open(&self.path)?;
            // Advice. What the medium has now is read before anybody is held up.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            pump(&mut file, &mut sink()).map(drop)
        };
        from_disk().map_err(reading)?;
        let copied = self.run("checking", |db| {
            let still = db.begin_write().map_err(boxed)?;
            let last = match still.open_table(META) {
                Ok(t) => t.get(LAST).map_err(boxed)?.map_or(0, |n| n.value()),
                Err(e) => return Err(boxed(e)),
            };
            let done = std::fs::copy(&self.path, copy).map(|_| last);
            still.abort().map_err(boxed)?;
            Ok(done)
        })?;
        let last = copied.map_err(StoreError::io("copying", copy))?;
        let db = Self::open_db(copy)?;
        Self::has_reached(copy, &db, last)
    }

    fn read<T>(
        &self,
        doing: &'static str,
        f: impl FnOnce(&ReadTransaction) -> Done<T>,
    ) -> Result<T, StoreError> {
        self.run(doing, |db| f(&db.begin_read().map_err(boxed)?))
    }

    fn write<T>(
        &self,
        doing: &'static str,
        f: impl FnOnce(&WriteTransaction) -> Done<T>,
    ) -> Result<T, StoreError> {
        self.run(doing, |db| {
            let t = db.begin_write().map_err(boxed)?;
            let value = f(&t)?;
            let n = {
                let mut meta = t.open_table(META).map_err(boxed)?;
                let n = meta.get(LAST).map_err(boxed)?.map_or(0, |n| n.value()) + 1;
                meta.insert(LAST, n).map_err(boxed)?;
                n
            };
            t.commit().map_err(boxed)?;
            self.mark.set(n);
            Ok(value)
        })
    }

    pub(crate) fn packs(&self) -> Result<Vec<(u32, u64)>, StoreError> {
        self.read("reading", |t| {
            let table = t.open_table(PACKS).map_err(boxed)?;
            let mut out = Vec::new();
            for row in table.iter().map_err(boxed)? {
                let (k, v) = row.map_err(boxed)?;
                out.push((k.value(), v.value()));
            }
            Ok(out)
        })
    }

    pub(crate) fn unit_count(&self) -> Result<u64, StoreError> {
        self.read("reading", |t| t.open_table(UNITS).map_err(boxed)?.len().map_err(boxed))
    }

    /// Where each of `hashes` lies.
    pub(crate) fn lookup(&self, hashes: &[Hash]) -> Result<Vec<Option<Loc>>, StoreError> {
        let rows: Vec<Option<[u8; LOC_LEN]>> = self.read("reading", |t| {
            let table = t.open_table(UNITS).map_err(boxed)?;
            let find = |h: &Hash| -> Done<Option<[u8; LOC_LEN]>> {
                Ok(table.get(&h.0).map_err(boxed)?.map(|v| *v.value()))
            };
            if hashes.len() < 512 {
                hashes.iter().map(find).collect()
            } else {
                hashes.par_iter().with_min_len(256).map(find).collect()
            }
        })?;
        rows.into_iter()
            .zip(hashes)
            .map(|(row, h)| row.map(|b| Loc::from_bytes(*h, &b)).transpose())
            .collect()
    }

    /// Calls `each` with every unit.
    pub(crate) fn for_each(
        &self,
        mut each: impl FnMut(Hash, Result<Loc, StoreError>),
    ) -> Result<(), StoreError> {
        self.read("reading", |t| {
            let table = t.open_table(UNITS).map_err(boxed)?;
            for row in table.iter().map_err(boxed)? {
                let (k, v) = row.map_err(boxed)?;
                let hash = Hash(*k.value());
                each(hash, Loc::from_bytes(hash, v.value()));
            }
            Ok(())
        })
    }

    /// Makes the units of a finished write visible: one commit. A unit that has come to be known
    /// meanwhile keeps its place, unless `replace` says that the old place is lost. `held` is what
    /// the owner holds from now on, sorted.
    pub(crate) fn commit(
        &self,
        units: &[(Hash, Loc)],
        replace: impl Fn(&Hash, &Loc) -> bool,
        pack: Option<(u32, u64)>,
        held: Option<(Owner, &[u8])>,
    ) -> Result<(), StoreError> {
        self.write("committing", |t| {
            let mut table = t.open_table(UNITS).map_err(boxed)?;
            for (h, loc) in units {
                let old = table.get(&h.0).map_err(boxed)?.map(|v| *v.value());
                let keep = old
                    .and_then(|b| Loc::from_bytes(*h, &b).ok())
                    .is_some_and(|old| !replace(h, &old));
                if !keep {
                    table.insert(&h.0, &loc.to_bytes()).map_err(boxed)?;
                }
            }
            if let Some((pack, len)) = pack {
                t.open_table(PACKS).map_err(boxed)?.insert(pack, len).map_err(boxed)?;
            }
            if let Some((owner, hashes)) = held {
                let mut table = t.open_table(HELD).map_err(boxed)?;
                let last = table
                    .range((&owner.0, 0)..=(&owner.0, u64::MAX))
                    .map_err(boxed)?
                    .next_back()
                    .transpose()
                    .map_err(boxed)?
                    .map(|(k, _)| k.value().1);
                let seq = last.map_or(0, |n| n + 1);
                table.insert((&owner.0, seq), hashes).map_err(boxed)?;
            }
            Ok(())
        })
    }

    /// What `owner` holds, or what all owners hold.
    pub(crate) fn owned(&self, owner: Option<Owner>) -> Result<HashSet<Hash>, StoreError> {
        self.read("reading", |t| held(t, owner))
    }

    pub(crate) fn owners(&self) -> Result<Vec<Owner>, StoreError> {
        self.read("reading", |t| {
            let table = t.open_table(HELD).map_err(boxed)?;
            let mut owners: Vec<Owner> = Vec::new();
            for row in table.iter().map_err(boxed)? {
                owners.push(Owner(*row.map_err(boxed)?.0.value().0));
            }
            owners.dedup();
            Ok(owners)
        })
    }

    pub(crate) fn release(&self, owner: Owner) -> Result<bool, StoreError> {
        self.write("releasing an owner in", |t| {
            let mut table = t.open_table(HELD).map_err(boxed)?;
            let mut any = false;
            table
                .retain_in((&owner.0, 0)..=(&owner.0, u64::MAX), |_, _| {
                    any = true;
                    false
                })
                .map_err(boxed)?;
            Ok(any)
        })
    }

    /// The units that no owner holds and `pinned` does not name.
    pub(crate) fn unowned(&self, pinned: &HashSet<Hash>) -> Result<Vec<Hash>, StoreError> {
        self.read("reading", |t| {
            let owned = held(t, None)?;
            let table = t.open_table(UNITS).map_err(boxed)?;
            let mut found = Vec::new();
            for row in table.iter().map_err(boxed)? {
                let hash = Hash(*row.map_err(boxed)?.0.value());
                if !owned.contains(&hash) && !pinned.contains(&hash) {
                    found.push(hash);
                }
            }
            Ok(found)
        })
    }

    /// Removes units, whoever holds them.
    pub(crate) fn remove(&self, hashes: &[Hash]) -> Result<(), StoreError> {
        self.write("sweeping", |t| {
            let mut table = t.open_table(UNITS).map_err(boxed)?;
            for hash in hashes {
                table.remove(&hash.0).map_err(boxed)?;
            }
            Ok(())
        })
    }

    /// Moves units to their new places and forgets the packs they came from.
    pub(crate) fn relocate(
        &self,
        moved: &[(Hash, Loc)],
        new_pack: Option<(u32, u64)>,
        old_packs: &[u32],
    ) -> Result<(), StoreError> {
        self.write("compacting", |t| {
            let mut units = t.open_table(UNITS).map_err(boxed)?;
            for (h, loc) in moved {
                units.insert(&h.0, &loc.to_bytes()).map_err(boxed)?;
            }
            let mut packs = t.open_table(PACKS).map_err(boxed)?;
            if let Some((pack, len)) = new_pack {
                packs.insert(pack, len).map_err(boxed)?;
            }
            for p in old_packs {
                packs.remove(p).map_err(boxed)?;
            }
            Ok(())
        })
    }
}

/// The number of the last commit; none before there was such a thing.
fn last_commit(db: &Database) -> Done<u64> {
    let t = db.begin_read().map_err(boxed)?;
    match t.open_table(META) {
        Ok(meta) => Ok(meta.get(LAST).map_err(boxed)?.map_or(0, |n| n.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(0),
        Err(e) => Err(boxed(e)),
    }
}

fn held(t: &ReadTransaction, owner: Option<Owner>) -> Done<HashSet<Hash>> {
    let table = t.open_table(HELD).map_err(boxed)?;
    let rows = match &owner {
        Some(o) => table.range((&o.0, 0)..=(&o.0, u64::MAX)).map_err(boxed)?,
        None => table.range::<(&[u8; 16], u64)>(..).map_err(boxed)?,
    };
    let mut out = HashSet::new();
    for row in rows {
        let (_, v) = row.map_err(boxed)?;
        out.extend(v.value().as_chunks::<32>().0.iter().map(|h| Hash(*h)));
    }
    Ok(out)
}
