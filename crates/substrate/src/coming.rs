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
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(SubstrateError::io("removing", path)(e))
        }
        _ => Ok(()),
    }
}

/// The files of `dir`, oldest first.
fn marks(dir: &Path) -> Result<Vec<(SystemTime, PathBuf, Option<SubstrateId>)>, SubstrateError> {
    let all = names(dir)?.into_iter().filter_map(|name| {
        let id = name.strip_prefix(PREFIX)?.parse().ok();
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
    let all = marks(dir)?;
    let spare = all.len().saturating_sub(MOST_KEPT);
    for (n, (at, path, id)) in all.iter().enumerate() {
        let there = id.is_none_or(|id| dir.join(id.to_string()).exists());
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
    let temp = path.with_extension("tmp");
    let text =
        serde_json::to_vec(mark).map_err(|e| SubstrateError::damaged("a mark", e.to_string()))?;
    write_synced(&temp, &text)?;
    std::fs::rename(&temp, path).map_err(SubstrateError::io("writing", path))?;
    let Some(dir) = path.parent() else { return Ok(()) };
    crate::pool::sync_dir(dir)
}

/// Gives up the oldest that nobody takes in right now, until at most so many are left.
fn make_room(pool: &Pool, most: usize) -> Result<(), SubstrateError> {
    let all = marks(&pool.inner.dirs.substrates)?;
    for (_, path, id) in all.iter().take(all.len().saturating_sub(most)) {
        give_up(pool, path, *id)?;
    }
    Ok(())
}

fn give_up(pool: &Pool, path: &Path, id: Option<SubstrateId>) -> Result<(), SubstrateError> {
    let turn = id.map(|id| pool.try_turn(id));
    // Somebody takes it in right now.
    if matches!(turn, Some(None)) {
        return Ok(());
    }
    remove(pool.store(), path)
}

impl Pool {
    /// Gives up what has been kept of substrates that came in part for at least `age`.
    pub fn forget_parts(&self, age: Duration) {
        let given_up = marks(&self.inner.dirs.substrates).and_then(|all| {
            let over = all.iter().filter(|(at, _, _)| old(*at, age));
            over.map(|(_, path, id)| give_up(self, path, *id)).collect::<Result<Vec<_>, _>>()
        });
        match given_up {
            Ok(all) if all.is_empty() => {}
            Ok(_) => {
                if let Err(error) = self.store().gc() {
                    tracing::warn!(%error, "the space of a part that was kept is not given back");
                }
            }
            Err(error) => tracing::warn!(%error, "what came in part is not given up"),
        }
    }
}
