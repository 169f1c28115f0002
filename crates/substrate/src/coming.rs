//! What has come of a substrate that is on its way here, kept through breaks and through the death
//! of the daemon that took it in.
//!
//! ```text
//! substrates/.coming-<id>   what it is a part of, the store's owner of the units that came, their size
//! ```
//!
//! Units are committed to the store every [`PART`] bytes, on behalf of an owner that is nobody's
//! substrate: all that this owner holds came from a supplier with its bytes, so the next try need
//! not ask for it again. The file is written before the first of them and goes after the last.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use godwit_store::{Effort, Encoding, Owner, Store, UNIT_HEAD, Writer};
use godwit_types::{Hash, SubstrateId};
use serde::{Deserialize, Serialize};

use crate::archive::Bundle;
use crate::error::SubstrateError;
use crate::pool::{Pool, names, write_synced};

/// What the name of each such file begins with.
const PREFIX: &str = ".coming-";

/// What the name of one that is being written begins with: until it has its own, it is none.
const NEW_PREFIX: &str = ".mark-";

/// How many bytes come between two commits: what a kill costs at most.
const PART: u64 = 4 << 20;

/// Substrates that came in part and are kept, at most.
const MOST_KEPT: usize = 4;

/// The longest of these files, in bytes.
const MAX_MARK: u64 = 4096;

/// What is written down of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    /// Hash of the small parts that the units belong to.
    of: Hash,
    /// The owner of what came, drawn for it.
    owner: SubstrateId,
    /// Bytes in the store of what came.
    bytes: u64,
}

/// The units of one substrate that have come so far.
pub(crate) struct Coming {
    store: Store,
    path: PathBuf,
    mark: Mark,
    /// What came since the last commit; none after an error.
    part: Option<Writer>,
    /// Those that the store had before for somebody else, in bytes.
    part_had: u64,
}

impl std::fmt::Debug for Coming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coming").field("path", &self.path).field("mark", &self.mark).finish()
    }
}

/// Where it is written down what has come of a substrate.
fn path(pool: &Pool, id: SubstrateId) -> PathBuf {
    pool.inner.dirs.substrates.join(format!("{PREFIX}{id}"))
}

fn digest(bundle: &Bundle) -> Hash {
    let mut hasher = blake3::Hasher::new();
    let Bundle { json, state, pages, disk } = bundle;
    for part in [Some(json), Some(state), Some(pages), disk.as_ref()] {
        let part = part.map_or(&[][..], Vec::as_slice);
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Hash(*hasher.finalize().as_bytes())
}

fn read(path: &Path) -> Option<Mark> {
    let small = std::fs::metadata(path).ok().is_some_and(|m| m.len() <= MAX_MARK);
    serde_json::from_slice(&std::fs::read(path).ok().filter(|_| small)?).ok()
}

/// Gives up what came by that file. Its space comes back with the next collection.
fn remove(store: &Store, path: &Path) -> Result<(), SubstrateError> {
    if let Some(mark) = read(path) {
        store.release(mark.owner.into())?;
    }
    unlink(path)
}

fn unlink(path: &Path) -> Result<(), SubstrateError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(SubstrateError::io("removing", path)(e))
        }
        _ => Ok(()),
    }
}

/// The files of `dir`, oldest first. What else has a name like theirs is none: what it says of an
/// owner may be what a good one says.
fn marks(dir: &Path) -> Result<Vec<(SystemTime, PathBuf, SubstrateId)>, SubstrateError> {
    let all = names(dir)?.into_iter().filter_map(|name| {
        let id = name.strip_prefix(PREFIX)?.parse().ok()?;
        let path = dir.join(&name);
        let at = std::fs::metadata(&path).and_then(|m| m.modified()).ok()?;
        Some((at, path, id))
    });
    let mut all: Vec<_> = all.collect();
    all.sort();
    Ok(all)
}

/// Removes, when a pool opens, what is of no use any more: it is too old, there is too much of it,
/// or its substrate is there.
pub(crate) fn sweep(dir: &Path, store: &Store, age: Duration) -> Result<(), SubstrateError> {
    for name in names(dir)? {
        let no_mark =
            name.strip_prefix(PREFIX).is_some_and(|id| id.parse::<SubstrateId>().is_err());
        if no_mark || name.starts_with(NEW_PREFIX) {
            unlink(&dir.join(name))?;
        }
    }
    let all = marks(dir)?;
    let spare = all.len().saturating_sub(MOST_KEPT);
    for (n, (at, path, id)) in all.iter().enumerate() {
        let there = dir.join(id.to_string()).exists();
        if n < spare || there || old(*at, age) {
            remove(store, path)?;
        } else {
            tracing::info!(file = %path.display(), "a part of a substrate has come, and is kept");
        }
    }
    Ok(())
}

fn old(at: SystemTime, age: Duration) -> bool {
    // One of the future is of a clock that was set.
    at.elapsed().map_or(true, |passed| passed >= age)
}

impl Coming {
    /// Goes on with what has come of that substrate, or begins. The units that came are the other
    /// answer. Whoever calls it has the substrate's turn.
    pub(crate) fn open(
        pool: &Pool,
        id: SubstrateId,
        bundle: &Bundle,
    ) -> Result<(Self, HashSet<Hash>), SubstrateError> {
        let (path, store) = (path(pool, id), pool.store().clone());
        let of = digest(bundle);
        let kept = read(&path).filter(|mark| mark.of == of);
        let came = match &kept {
            Some(mark) => store.owned(mark.owner.into())?,
            None => HashSet::new(),
        };
        let mark = match kept {
            Some(mark) => mark,
            None => {
                remove(&store, &path)?;
                let mark = Mark { of, owner: SubstrateId::new(), bytes: 0 };
                make_room(pool, MOST_KEPT - 1)?;
                write(&path, &mark)?;
                mark
            }
        };
        Ok((Self { store, path, mark, part: None, part_had: 0 }, came))
    }

    fn owner(&self) -> Owner {
        self.mark.owner.into()
    }

    /// Bytes that were written since the last commit.
    pub(crate) fn uncommitted(&self) -> u64 {
        self.part.as_ref().map_or(0, |part| part.stored().new_bytes)
    }

    /// Takes one unit in, after checking it. `had`: the store has it for somebody else.
    pub(crate) fn put(
        &mut self,
        (hash, encoding, raw_len): (Hash, Encoding, usize),
        body: &[u8],
        had: bool,
    ) -> Result<(), SubstrateError> {
        let mut part = match self.part.take() {
            Some(part) => part,
            None => self
                .store
                .writer(self.owner(), Effort::Small)
                .map_err(SubstrateError::store("opening the store"))?,
        };
        part.put_encoded(hash, encoding, raw_len, body)
            .map_err(SubstrateError::store("taking a unit in"))?;
        self.part = Some(part);
        if had {
            self.part_had += UNIT_HEAD + body.len() as u64;
        }
        if self.uncommitted() + self.part_had >= PART { self.commit() } else { Ok(()) }
    }

    /// Makes sure that what has come so far stays.
    pub(crate) fn commit(&mut self) -> Result<(), SubstrateError> {
        let Some(part) = self.part.take() else { return Ok(()) };
        let stored = part.commit().map_err(SubstrateError::store("keeping what has come"))?;
        self.mark.bytes += stored.new_bytes + std::mem::take(&mut self.part_had);
        // Its time tells when the last of it came.
        write(&self.path, &self.mark)?;
        godwit_hold::at_blocking("take.part");
        Ok(())
    }

    /// Bytes in the store of all that has come.
    pub(crate) const fn bytes(&self) -> u64 {
        self.mark.bytes
    }

    /// Nothing of it is wanted any more, or its substrate holds it.
    pub(crate) fn done(mut self) {
        // Pinned by it until now.
        drop(self.part.take());
        if let Err(error) = remove(&self.store, &self.path) {
            tracing::warn!(file = %self.path.display(), %error, "it goes when the pool opens next");
        }
    }
}

fn write(path: &Path, mark: &Mark) -> Result<(), SubstrateError> {
    let Some((dir, id)) = path.parent().zip(path.file_name().and_then(|name| name.to_str())) else {
        return Err(SubstrateError::damaged("a mark", "its file has no name".to_owned()));
    };
    let temp = dir.join(format!("{NEW_PREFIX}{}", id.trim_start_matches(PREFIX)));
    let text =
        serde_json::to_vec(mark).map_err(|e| SubstrateError::damaged("a mark", e.to_string()))?;
    write_synced(&temp, &text)?;
    std::fs::rename(&temp, path).map_err(SubstrateError::io("writing", path))?;
    crate::pool::sync_dir(dir)
}

/// Gives up the oldest that nobody takes in right now, until at most so many are left.
fn make_room(pool: &Pool, most: usize) -> Result<(), SubstrateError> {
    let all = marks(&pool.inner.dirs.substrates)?;
    for (_, path, id) in all.iter().take(all.len().saturating_sub(most)) {
        let _ = give_up(pool, path, *id)?;
    }
    Ok(())
}

/// Whether it was given up; not while somebody takes it in.
fn give_up(pool: &Pool, path: &Path, id: SubstrateId) -> Result<bool, SubstrateError> {
    let Some(_turn) = pool.try_turn(id) else { return Ok(false) };
    remove(pool.store(), path)?;
    Ok(true)
}

impl Pool {
    /// Gives up what has been kept of substrates that came in part for at least `age`. It blocks.
    pub fn forget_parts(&self, age: Duration) {
        let mut given_up = false;
        let done = marks(&self.inner.dirs.substrates).and_then(|all| {
            for (_, path, id) in all.iter().filter(|(at, _, _)| old(*at, age)) {
                given_up |= give_up(self, path, *id)?;
            }
            Ok(())
        });
        if let Err(error) = done {
            tracing::warn!(%error, "what came in part is not given up");
        }
        if given_up && let Err(error) = self.store().gc() {
            tracing::warn!(%error, "the space of a part that was kept is not given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use godwit_store::StoreOptions;

    use super::*;
    use crate::pool::PoolDirs;

    #[test]
    fn what_is_being_written_is_no_mark_and_its_owner_keeps_what_came() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = PoolDirs {
            substrates: dir.path().join("substrates"),
            memory: dir.path().join("memory"),
        };
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let store = Store::open(&dir.path().join("store"), options).expect("store");
        let pool = Pool::open(dirs, store, u64::MAX).expect("pool");
        let store = pool.store().clone();
        let (id, owner) = (SubstrateId::new(), SubstrateId::new());
        let held = Owner::from(owner);
        let raw = vec![7; 4096];
        let mut writer = store.writer(held, Effort::Small).expect("writer");
        let hash = writer.put(&raw).expect("put");
        writer.commit().expect("committed");
        let mark = Mark { of: Hash::of(b"parts"), owner, bytes: 4096 };
        write(&path(&pool, id), &mark).expect("written");
        let at = pool.inner.dirs.substrates.clone();
        assert_eq!(names(&at).expect("names"), [format!("{PREFIX}{id}")]);
        // A daemon that died while it wrote the next: under this name, and under that of before.
        let text = serde_json::to_vec(&mark).expect("text");
        let left = [format!("{NEW_PREFIX}{id}"), format!("{PREFIX}{id}.tmp")];
        for name in &left {
            std::fs::write(at.join(name), &text).expect("left");
        }
        assert_eq!(marks(&at).expect("marks").len(), 1);
        sweep(&at, &store, crate::exchange::KEPT).expect("swept");
        assert_eq!(names(&at).expect("names"), [format!("{PREFIX}{id}")]);
        assert!(store.owned(held).expect("owned").contains(&hash));
        // Its own mark gives it up.
        pool.forget_parts(Duration::ZERO);
        assert!(names(&at).expect("names").is_empty());
        assert!(store.owned(held).expect("owned").is_empty());
    }
}
