//! Sealed memory as a cache on tmpfs: what no machine maps is dropped, least recently used first, and
//! made again from the store at the next activation.
//!
//! ```text
//! in use: a machine maps it, or a QEMU that waits, or one is being started from it
//! idle  --- the budget is exceeded, or tmpfs is full ---> dropped --- activation ---> made again
//! ```
//!
//! The budget bounds what is idle: memory that is in use is never taken away, and counts. What clones
//! have filled of its holes, which reads as zeros with it and without it, goes before anything idle.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use godwit_types::{PAGE_SIZE, SubstrateId};

use crate::error::SubstrateError;
use crate::manifest::Substrate;
use crate::memory::SealedMemory;
use crate::pool::{Pool, Spare, lock};
use crate::stamp::Stamp;

/// The part of its own size by which sealed memory has grown before that is worth to be freed.
const WORTH: u64 = 8;

/// Which sealed memory was used when, and what is in use now.
#[derive(Debug)]
pub(crate) struct MemoryCache {
    budget_bytes: AtomicU64,
    uses: Mutex<Uses>,
    /// Bytes of what is being laid out at this moment.
    coming: Mutex<HashMap<SubstrateId, u64>>,
}

/// Room for memory that is being laid out, until it is there.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    cache: &'a MemoryCache,
    id: SubstrateId,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        lock(&self.cache.coming).remove(&self.id);
    }
}

#[derive(Debug, Default)]
struct Uses {
    count: u64,
    by_id: HashMap<SubstrateId, Use>,
}

#[derive(Debug, Default)]
struct Use {
    last: u64,
    users: Arc<()>,
}

/// Keeps the sealed memory of one substrate from being dropped.
#[derive(Debug, Clone)]
pub(crate) struct InUse(#[allow(dead_code, reason = "it is counted")] Arc<()>);

impl Default for MemoryCache {
    fn default() -> Self {
        Self {
            budget_bytes: AtomicU64::new(u64::MAX),
            uses: Mutex::default(),
            coming: Mutex::default(),
        }
    }
}

impl MemoryCache {
    /// Notes a use, which lasts until what is given is dropped.
    pub(crate) fn used(&self, id: SubstrateId) -> InUse {
        let mut uses = lock(&self.uses);
        uses.count += 1;
        let count = uses.count;
        let one = uses.by_id.entry(id).or_default();
        one.last = count;
        InUse(Arc::clone(&one.users))
    }

    /// Bytes of what is being laid out of others than `id`.
    fn coming_beside(&self, id: SubstrateId) -> u64 {
        lock(&self.coming).iter().filter(|(other, _)| **other != id).map(|(_, bytes)| bytes).sum()
    }

    pub(crate) fn forget(&self, id: SubstrateId) {
        lock(&self.uses).by_id.remove(&id);
    }

    /// When it was last used, and whether it is in use.
    fn state(&self, id: SubstrateId) -> (u64, bool) {
        let uses = lock(&self.uses);
        uses.by_id.get(&id).map_or((0, false), |u| (u.last, Arc::strong_count(&u.users) > 1))
    }
}

/// The sealed memory of one substrate.
struct Sealed {
    id: SubstrateId,
    bytes: u64,
    last: u64,
    idle: bool,
}

impl Pool {
    /// Sets how many bytes sealed memory may take before idle ones are dropped.
    pub fn set_memory_budget(&self, bytes: u64) {
        self.inner.cache.budget_bytes.store(bytes, Ordering::Relaxed);
    }

    /// How many bytes sealed memory may take before idle ones are dropped.
    #[must_use]
    pub fn memory_budget(&self) -> u64 {
        self.inner.cache.budget_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that sealed memory takes now, and how many of them are idle.
    #[must_use]
    pub fn sealed_bytes(&self) -> (u64, u64) {
        self.sealed()
            .iter()
            .fold((0, 0), |(all, idle), s| (all + s.bytes, idle + if s.idle { s.bytes } else { 0 }))
    }

    /// Bytes that sealed memory takes beyond its budget; what is in use may.
    #[must_use]
    pub fn over_budget(&self) -> u64 {
        self.sealed_bytes().0.saturating_sub(self.memory_budget())
    }

    /// Has `spare` free what is worth less than idle sealed memory, whenever tmpfs lacks room; only the
    /// first that is given counts.
    pub fn gives_way_first(&self, spare: Spare) {
        let _ = self.inner.spare.set(spare);
    }

    fn free_spare(&self, bytes: u64) -> u64 {
        if bytes == 0 { 0 } else { self.inner.spare.get().map_or(0, |free| free(bytes)) }
    }

    /// Drops idle sealed memory, least recently used first and after what gives way first, until
    /// `bytes` are free; how many came free.
    pub fn reclaim(&self, bytes: u64) -> u64 {
        let freed = self.free_spare(bytes);
        let freed = freed + self.free_filled(bytes.saturating_sub(freed), None);
        freed + self.drop_idle(bytes.saturating_sub(freed), None)
    }

    fn sealed(&self) -> Vec<Sealed> {
        let names = std::fs::read_dir(&self.inner.dirs.memory).into_iter().flatten().flatten();
        names
            .filter_map(|entry| {
                let name = entry.file_name();
                let id: SubstrateId = name.to_str()?.strip_suffix(".mem")?.parse().ok()?;
                // One that goes away meanwhile takes nothing.
                let bytes = entry.metadata().ok()?.blocks() * 512;
                let (last, in_use) = self.inner.cache.state(id);
                Some(Sealed { id, bytes, last, idle: !in_use && self.clones(id) == 0 })
            })
            .collect()
    }

    /// Whether the sealed memory of a substrate, made or not, is within the budget beside what is in
    /// use. One that is not here is not.
    #[must_use]
    pub fn memory_fits(&self, id: SubstrateId) -> bool {
        let Ok(substrate) = self.get(id) else { return false };
        let others = self.sealed().into_iter().filter(|s| s.id != id && !s.idle);
        let others = others.map(|s| s.bytes).sum::<u64>() + self.inner.cache.coming_beside(id);
        others.saturating_add(substrate.sizes.memory_bytes) <= self.memory_budget()
    }

    /// How many bytes more are in use once the sealed memory of a substrate is opened, and how many of
    /// them are to be made first.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`], a damaged manifest.
    pub fn memory_to_open(&self, id: SubstrateId) -> Result<(u64, u64), SubstrateError> {
        let bytes = self.get(id)?.sizes.memory_bytes;
        let there = self.sealed().into_iter().find(|s| s.id == id);
        let lacks = |there: bool| if there { 0 } else { bytes };
        Ok((lacks(there.as_ref().is_some_and(|s| !s.idle)), lacks(there.is_some())))
    }

    /// Makes room for `more` bytes of sealed memory of a substrate, or for the one it has, within the
    /// budget and on tmpfs, and keeps that until what is given is dropped. What is in use stays;
    /// whether that leaves room shows when it is made.
    pub(crate) fn make_room(&self, id: SubstrateId, more: u64) -> Room<'_> {
        let cache = &self.inner.cache;
        // First, so that of two at the same time each sees the other.
        lock(&cache.coming).insert(id, more);
        let here: u64 = self.sealed().iter().map(|s| s.bytes).sum();
        let wanted = more + cache.coming_beside(id);
        let over = (here + wanted).saturating_sub(self.memory_budget());
        let free = rustix::fs::statvfs(&self.inner.dirs.memory)
            .map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
        let lacking = more.saturating_sub(free);
        let lacking = lacking.saturating_sub(self.free_spare(lacking));
        let needed = over.max(lacking);
        let filled = self.free_filled(needed, Some(id));
        self.drop_idle(needed.saturating_sub(filled), Some(id));
        Room { cache, id }
    }

    /// Frees the zero pages that clones have filled in sealed memory, most first, until `bytes` are
    /// free; how many came free. A file of which little would come is left alone.
    fn free_filled(&self, bytes: u64, but: Option<SubstrateId>) -> u64 {
        if bytes == 0 {
            return 0;
        }
        let filled = |s: Sealed| {
            let docked = self.docked(s.id).ok()?;
            let more = s.bytes.saturating_sub(docked.substrate.sizes.memory_bytes);
            (more > docked.substrate.sizes.memory_bytes / WORTH).then_some((more, docked))
        };
        let others = self.sealed().into_iter().filter(|s| Some(s.id) != but);
        let mut all: Vec<_> = others.filter_map(filled).collect();
        all.sort_by_key(|(more, _)| std::cmp::Reverse(*more));
        let mut freed = 0;
        for (more, docked) in all {
            if freed >= bytes {
                break;
            }
            let Substrate { id, shape, .. } = docked.substrate;
            let path = self.memory_path(id);
            let Some(memory) = SealedMemory::find(&path, shape.memory.bytes()) else { continue };
            let known = self.inner.verified.knows(&path);
            match docked.pages().and_then(|pages| memory.free_filled(&pages)) {
                Ok(()) => {
                    // What was sound is: no byte is another.
                    if known && let Ok(now) = Stamp::of(&path) {
                        self.inner.verified.note(&path, now);
                    }
                    tracing::info!(%id, bytes = more, "zero pages of sealed memory freed");
                    freed += more;
                }
                Err(error) => tracing::warn!(%id, %error, "its zero pages were not freed"),
            }
        }
        freed
    }

    fn drop_idle(&self, bytes: u64, but: Option<SubstrateId>) -> u64 {
        if bytes == 0 {
            return 0;
        }
        let mut all = self.sealed();
        all.retain(|s| s.idle && Some(s.id) != but);
        all.sort_by_key(|s| (s.last, s.id));
        let mut freed = 0;
        for s in all {
            if freed >= bytes {
                break;
            }
            // Held until it is gone: one that is being prepared at this moment, also for the first
            // time, is about to be used.
            let making = Arc::clone(lock(&self.inner.making).entry(s.id).or_default());
            let one = making.try_lock();
            if matches!(one, Err(TryLockError::WouldBlock)) || self.inner.cache.state(s.id).1 {
                continue;
            }
            let path = self.memory_path(s.id);
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    tracing::info!(id = %s.id, bytes = s.bytes, "idle sealed memory dropped");
                    freed += s.bytes;
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "not dropped"),
            }
            self.inner.verified.forget(&path);
            self.inner.cache.forget(s.id);
        }
        freed
    }
}

/// Bytes that the sealed memory with `pages` pages takes.
pub(crate) fn bytes_of(pages: usize) -> u64 {
    pages as u64 * PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use godwit_store::{Store, StoreOptions};

    use super::*;
    use crate::pool::PoolDirs;

    #[test]
    fn two_that_are_laid_out_at_once_both_count() {
        const ONE: u64 = 1 << 20;
        let dir = tempfile::tempdir().expect("a directory");
        let dirs = PoolDirs {
            substrates: dir.path().join("substrates"),
            memory: dir.path().join("memory"),
        };
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).expect("open");
        let pool = Pool::open(dirs, store, u64::MAX).expect("open");
        pool.set_memory_budget(2 * ONE);
        let idle = pool.memory_path(SubstrateId::new());
        std::fs::create_dir_all(&pool.inner.dirs.memory).expect("a directory");
        std::fs::write(&idle, vec![1; ONE as usize]).expect("written");
        let first = pool.make_room(SubstrateId::new(), ONE);
        assert!(idle.exists(), "there is room for both");
        let _second = pool.make_room(SubstrateId::new(), ONE);
        assert!(!idle.exists(), "each would have taken the room of the other");
        drop(first);
        assert_eq!(pool.inner.cache.coming_beside(SubstrateId::new()), ONE);
    }
}
