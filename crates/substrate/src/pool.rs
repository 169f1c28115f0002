//! The pool: substrates on disk, each a directory of small files, its pages and blocks in the
//! store.
//!
//! ```text
//! substrates/<id>/substrate.json state pages disk   the substrate, never changed
//! substrates/<id>/ready/         layer.qcow2 top.qcow2   made again when missing or damaged
//! substrates/.new-<id>/          one that is being docked; swept when the pool opens
//! substrates/.new-<id>.<random>/ one that is being imported; likewise
//! substrates/.coming-<id>        what has come of one from another site (`coming`)
//! <memory>/<id>.mem              its sealed memory file, made again likewise
//! ```
//!
//! A substrate is there once its directory has its name: that rename is the commit point. The
//! store holds its units on behalf of its id before that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use godwit_store::{CheckReport, PageMap, Store, Writer, zero_hash};
use godwit_types::{BLOCK_SIZE, Code, CodedError, Hash, Name, SubstrateId, VmId, seal};

use crate::cache::MemoryCache;
use crate::error::SubstrateError;
use crate::manifest::{DISK, Docked, JSON, PAGES, Part, STATE, Substrate};
use crate::stamp::Verified;
use crate::turns::{Turn, Turns};

/// Where a pool keeps things.
#[derive(Debug, Clone)]
pub struct PoolDirs {
    /// Substrates.
    pub substrates: PathBuf,
    /// Sealed memory files; on tmpfs, and on the same file system as the memory files of
    /// machines, so that docking can hand one over.
    pub memory: PathBuf,
}

/// The substrates of a site. Cheap to clone; all clones are one pool.
#[derive(Clone)]
pub struct Pool {
    pub(crate) inner: Arc<Inner>,
}

/// Frees so many bytes of tmpfs, if it can, and says how many.
pub type Spare = Box<dyn Fn(u64) -> u64 + Send + Sync>;

pub(crate) struct Inner {
    pub(crate) dirs: PoolDirs,
    pub(crate) store: Store,
    limit_bytes: u64,
    clones: Mutex<Clones>,
    /// One making of ready files at a time for each substrate.
    pub(crate) making: Mutex<HashMap<SubstrateId, Arc<Mutex<()>>>>,
    pub(crate) verified: Verified,
    pub(crate) cache: MemoryCache,
    pub(crate) spare: OnceLock<Spare>,
    damaged: Mutex<HashMap<SubstrateId, Finding>>,
    turns: Arc<Turns>,
    publishing: Mutex<()>,
}

/// Who runs from what. Its lock is taken by async tasks, so nobody waits for a disk while it is held.
#[derive(Default)]
struct Clones {
    of: HashMap<SubstrateId, HashSet<VmId>>,
    /// Substrates that are being deleted: nothing starts from them.
    going: HashSet<SubstrateId>,
}

/// What a walk through a pool found.
#[derive(Debug, Clone, Default)]
pub struct PoolCheck {
    /// What the store found.
    pub store: CheckReport,
    /// Substrates looked at.
    pub substrates: usize,
    /// Substrates that cannot be activated, and why.
    pub broken: Vec<(SubstrateId, String)>,
}

impl PoolCheck {
    /// Whether nothing was found wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.store.is_clean() && self.broken.is_empty()
    }
}

/// The small files of a substrate.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) state: Vec<u8>,
    pub(crate) pages: Vec<u8>,
    pub(crate) disk: Option<Vec<u8>>,
}

/// What was found wrong with a substrate, and when it counts as mended.
#[derive(Debug, Clone)]
struct Finding {
    why: String,
    /// Of what was docked: until all of it was read and found whole. Otherwise of what is made of
    /// that: until it can be used again.
    of_content: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("dirs", &self.inner.dirs).finish_non_exhaustive()
    }
}

impl Pool {
    /// Opens the pool, and removes what a crash left half done. `limit_bytes` bounds what the
    /// store may hold.
    ///
    /// # Errors
    /// [`SubstrateError::Io`], [`SubstrateError::Store`].
    pub fn open(dirs: PoolDirs, store: Store, limit_bytes: u64) -> Result<Self, SubstrateError> {
        for dir in [&dirs.substrates, &dirs.memory] {
            std::fs::create_dir_all(dir).map_err(SubstrateError::io("making", dir))?;
        }
        for name in names(&dirs.substrates)? {
            let half = name.strip_prefix(".new-").or_else(|| name.strip_prefix(".gone-"));
            if let Some(half) = half {
                tracing::info!(substrate = half, "left-over of an unfinished change removed");
                let id = half.split('.').next().and_then(|id| id.parse::<SubstrateId>().ok());
                // What a published one holds under the same id is its own.
                if let Some(id) = id.filter(|id| !dirs.substrates.join(id.to_string()).exists()) {
                    store.release(id.into())?;
                }
                remove_tree(&dirs.substrates.join(&name))?;
            }
        }
        crate::coming::sweep(&dirs.substrates, &store, crate::exchange::KEPT)?;
        for name in names(&dirs.memory)? {
            // Of a substrate that was deleted by a daemon that died before it removed this, too.
            let gone =
                name.strip_suffix(".mem").is_some_and(|id| !dirs.substrates.join(id).exists());
            if name.starts_with(".new-") || gone {
                let path = dirs.memory.join(&name);
                std::fs::remove_file(&path).map_err(SubstrateError::io("removing", &path))?;
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                dirs,
                store,
                limit_bytes,
                clones: Mutex::default(),
                making: Mutex::default(),
                verified: Verified::default(),
                cache: MemoryCache::default(),
                spare: OnceLock::new(),
                damaged: Mutex::default(),
                turns: Arc::default(),
                publishing: Mutex::new(()),
            }),
        })
    }

    /// The store under the pool.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Bytes that the store may hold.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.inner.limit_bytes
    }

    /// All substrates, by age. One that cannot be read is left out and logged.
    ///
    /// # Errors
    /// [`SubstrateError::Io`].
    pub fn list(&self) -> Result<Vec<Substrate>, SubstrateError> {
        let mut all = Vec::new();
        for id in self.ids()? {
            match self.docked(id) {
                Ok(d) => all.push(d.substrate),
                Err(error) => tracing::warn!(%id, %error, "substrate cannot be read"),
            }
        }
        Ok(all)
    }

    fn ids(&self) -> Result<Vec<SubstrateId>, SubstrateError> {
        let names = names(&self.inner.dirs.substrates)?;
        let mut ids: Vec<SubstrateId> = names.iter().filter_map(|n| n.parse().ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// The substrate with this id.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`], [`SubstrateError::Damaged`].
    pub fn get(&self, id: SubstrateId) -> Result<Substrate, SubstrateError> {
        self.docked(id).map(|d| d.substrate)
    }

    /// The substrate of this name.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`].
    pub fn find(&self, name: &Name) -> Result<Substrate, SubstrateError> {
        let found = self.list()?.into_iter().find(|s| s.name == *name);
        found.ok_or_else(|| SubstrateError::NotFound(name.to_string()))
    }

    pub(crate) fn docked(&self, id: SubstrateId) -> Result<Docked, SubstrateError> {
        let dir = self.dir(id);
        if self.is_going(id) || !dir.is_dir() {
            return Err(SubstrateError::NotFound(id.to_string()));
        }
        let docked = Docked::open(&dir)?;
        if docked.substrate.id != id {
            return Err(SubstrateError::damaged(
                dir.display().to_string(),
                "it holds a substrate of another id",
            ));
        }
        Ok(docked)
    }

    fn dir(&self, id: SubstrateId) -> PathBuf {
        self.inner.dirs.substrates.join(id.to_string())
    }

    pub(crate) fn new_dir(&self, id: SubstrateId) -> PathBuf {
        self.inner.dirs.substrates.join(format!(".new-{id}"))
    }

    /// A directory of its own for one import.
    pub(crate) fn import_dir(&self, id: SubstrateId) -> PathBuf {
        let random = uuid::Uuid::new_v4().simple();
        self.inner.dirs.substrates.join(format!(".new-{id}.{random}"))
    }

    pub(crate) fn memory_path(&self, id: SubstrateId) -> PathBuf {
        self.inner.dirs.memory.join(format!("{id}.mem"))
    }

    /// Notes that `vm` runs from substrate `id`. Activation does this itself; whoever adopts
    /// machines after a restart has to.
    pub fn note_clone(&self, id: SubstrateId, vm: VmId) {
        lock(&self.inner.clones).of.entry(id).or_default().insert(vm);
    }

    /// Notes that `vm` is gone.
    pub fn forget_clone(&self, vm: VmId) {
        let mut clones = lock(&self.inner.clones);
        for vms in clones.of.values_mut() {
            vms.remove(&vm);
        }
        clones.of.retain(|_, vms| !vms.is_empty());
    }

    /// Whether a substrate is being deleted. A machine that was noted as its clone while it was not
    /// keeps it.
    pub(crate) fn is_going(&self, id: SubstrateId) -> bool {
        lock(&self.inner.clones).going.contains(&id)
    }

    /// Machines that run from substrate `id`.
    #[must_use]
    pub fn clones(&self, id: SubstrateId) -> usize {
        lock(&self.inner.clones).of.get(&id).map_or(0, HashSet::len)
    }

    /// Removes a substrate and gives its space back.
    ///
    /// # Errors
    /// [`SubstrateError::InUse`] while machines run from it; [`SubstrateError::NotFound`].
    pub fn delete(&self, id: SubstrateId) -> Result<(), SubstrateError> {
        let dir = self.dir(id);
        let gone = self.inner.dirs.substrates.join(format!(".gone-{id}"));
        {
            let mut clones = lock(&self.inner.clones);
            let n = clones.of.get(&id).map_or(0, HashSet::len);
            if n > 0 {
                return Err(SubstrateError::InUse { id, clones: n });
            }
            if !clones.going.insert(id) {
                return Err(SubstrateError::NotFound(id.to_string()));
            }
        }
        // A clone that is noted from here on finds that it goes, or no directory.
        let renamed = std::fs::rename(&dir, &gone);
        lock(&self.inner.clones).going.remove(&id);
        match renamed {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(SubstrateError::NotFound(id.to_string()));
            }
            done => done.map_err(SubstrateError::io("removing", &dir))?,
        }
        sync_dir(&self.inner.dirs.substrates)?;
        self.inner.store.release(id.into())?;
        remove_tree(&gone)?;
        let _ = std::fs::remove_file(self.memory_path(id));
        lock(&self.inner.making).remove(&id);
        lock(&self.inner.damaged).remove(&id);
        self.inner.cache.forget(id);
        self.inner.store.gc().map_err(SubstrateError::store("giving space back"))?;
        Ok(())
    }

    /// Checks every unit of the store, every manifest, and that each substrate is whole.
    ///
    /// # Errors
    /// [`SubstrateError::Io`], [`SubstrateError::Store`]; damage is part of the report.
    pub fn check(&self) -> Result<PoolCheck, SubstrateError> {
        let store = self.inner.store.check().map_err(SubstrateError::store("checking"))?;
        let mut bad: HashMap<Hash, String> =
            store.damaged.iter().map(|d| (d.hash, d.to_string())).collect();
        bad.extend(
            store
                .bad_entries
                .iter()
                .map(|h| (*h, format!("unit {h}: its index entry is malformed"))),
        );
        let mut report = PoolCheck { store, ..PoolCheck::default() };
        for id in self.ids()? {
            report.substrates += 1;
            let found = self.check_one(id, &bad);
            if !self.dir(id).exists() {
                // Deleted meanwhile.
                report.substrates -= 1;
                continue;
            }
            let mut damaged = lock(&self.inner.damaged);
            match found {
                Ok(()) => {
                    damaged.remove(&id);
                }
                Err((found, e)) => {
                    let why = crate::error::chain(&e);
                    damaged.insert(id, Finding { why: why.clone(), of_content: found });
                    report.broken.push((id, why));
                }
            }
        }
        Ok(report)
    }

    /// What is wrong with one substrate, and whether that is of its content: what is made of it is
    /// made again when it is used.
    fn check_one(
        &self,
        id: SubstrateId,
        bad: &HashMap<Hash, String>,
    ) -> Result<(), (bool, SubstrateError)> {
        let docked = self.docked(id).map_err(|e| (true, e))?;
        let named = |e: SubstrateError| e.of(&docked.substrate.name);
        self.check_content(&docked, bad).map_err(|e| (true, named(e)))?;
        self.check_ready(&docked).map_err(|e| (false, named(e)))
    }

    fn check_content(
        &self,
        docked: &Docked,
        bad: &HashMap<Hash, String>,
    ) -> Result<(), SubstrateError> {
        docked.state()?;
        let held = self.inner.store.owned(docked.substrate.id.into())?;
        for map in [Some(docked.pages()?), docked.disk()?].into_iter().flatten() {
            let hashes: Vec<Hash> = map.entries().iter().map(|(_, h)| *h).collect();
            let found = self.inner.store.contains_many(&hashes)?;
            for (h, found) in hashes.iter().zip(found) {
                let why = match bad.get(h) {
                    Some(why) => why.clone(),
                    None if !found => format!("unit {h} is missing"),
                    None if *h != zero_hash() && !held.contains(h) => {
                        format!("unit {h} is not held for it and may be given up")
                    }
                    None => continue,
                };
                return Err(SubstrateError::damaged("its content", why));
            }
        }
        Ok(())
    }

    /// Whether the units of a substrate are all here and sound, so that it can be sent.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`]; what is damaged, by substrate, unit, pack and offset.
    pub fn verify_units(&self, id: SubstrateId) -> Result<(), SubstrateError> {
        let name = self.docked(id)?.substrate.name;
        let verify = || {
            self.bundle(id)?;
            let units = self.units(id)?;
            self.inner.store.get_many(&units, |_, _| Ok::<(), SubstrateError>(()))
        };
        let done = verify().map_err(|e| e.of(&name));
        if done.is_ok() {
            let mut damaged = lock(&self.inner.damaged);
            damaged.remove(&id).filter(|d| !d.of_content).map(|d| damaged.insert(id, d));
        }
        self.note_use(id, done.as_ref().err());
        done
    }

    /// Notes that a substrate could be used, or could not because it is damaged.
    pub(crate) fn note_use(&self, id: SubstrateId, failed: Option<&SubstrateError>) {
        let mut damaged = lock(&self.inner.damaged);
        match failed {
            None if damaged.get(&id).is_some_and(|d| !d.of_content) => {
                damaged.remove(&id);
            }
            Some(e) if e.code() == Code::Damaged => {
                let why = crate::error::chain(e);
                damaged.entry(id).or_insert(Finding { why, of_content: false });
            }
            _ => {}
        }
    }

    /// What was found wrong, of at most `most` substrates and cut to `chars` characters each.
    #[must_use]
    pub fn damaged(&self, most: usize, chars: usize) -> BTreeMap<SubstrateId, String> {
        let damaged = lock(&self.inner.damaged);
        damaged
            .iter()
            .take(most)
            .map(|(id, d)| (*id, d.why.chars().take(chars).collect()))
            .collect()
    }

    /// What was found wrong with a substrate when it was last checked or used; `None` when nothing
    /// was.
    #[must_use]
    pub fn damage(&self, id: SubstrateId) -> Option<String> {
        lock(&self.inner.damaged).get(&id).map(|d| d.why.clone())
    }

    /// Waits until nobody else imports the substrate `id`.
    pub(crate) fn turn(&self, id: SubstrateId) -> Turn {
        self.inner.turns.wait(id)
    }

    /// The same, if nobody does.
    pub(crate) fn try_turn(&self, id: SubstrateId) -> Option<Turn> {
        self.inner.turns.take(id)
    }

    /// Refuses when the store would hold more than the pool's limit with `more` bytes.
    pub(crate) fn room_for(&self, more: u64) -> Result<(), SubstrateError> {
        let used = self.inner.store.stats()?.pack_bytes;
        if used.saturating_add(more) > self.inner.limit_bytes {
            return Err(SubstrateError::NoRoom {
                place: format!(
                    "in the pool, which may hold {}",
                    godwit_types::human_bytes(self.inner.limit_bytes)
                ),
                needed_bytes: more,
                free_bytes: self.inner.limit_bytes.saturating_sub(used),
            });
        }
        Ok(())
    }

    /// Refuses a name or an id that is taken.
    pub(crate) fn is_free(&self, id: SubstrateId, name: &Name) -> Result<(), SubstrateError> {
        if self.dir(id).exists() {
            return Err(SubstrateError::Exists(id.to_string()));
        }
        match self.find(name) {
            Ok(_) => Err(SubstrateError::Exists(name.to_string())),
            Err(SubstrateError::NotFound(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Makes a docked substrate part of the pool. Nothing is left when it fails.
    pub(crate) fn publish(
        &self,
        substrate: Substrate,
        parts: &Parts,
        writer: Writer,
    ) -> Result<Substrate, SubstrateError> {
        let new = self.new_dir(substrate.id);
        self.publish_by(&new, substrate, parts, writer, 0)
    }

    /// As [`Pool::publish`], with files that are first written to the directory `new`. The
    /// substrate's size counts `stored_already` bytes too: of units that it brought and that the
    /// store had for others.
    pub(crate) fn publish_by(
        &self,
        new: &Path,
        mut substrate: Substrate,
        parts: &Parts,
        writer: Writer,
        stored_already: u64,
    ) -> Result<Substrate, SubstrateError> {
        let id = substrate.id;
        let publish = || {
            let grown = writer.stored().new_bytes;
            self.room_for(grown)?;
            let small =
                parts.state.len() + parts.pages.len() + parts.disk.as_ref().map_or(0, Vec::len);
            substrate.sizes.stored_bytes = grown + stored_already + small as u64;
            substrate.state = Part::of(&parts.state);
            substrate.pages = Part::of(&parts.pages);
            substrate.disk = parts.disk.as_deref().map(Part::of);
            std::fs::create_dir_all(new).map_err(SubstrateError::io("making", new))?;
            write_synced(&new.join(STATE), &parts.state)?;
            write_synced(&new.join(PAGES), &parts.pages)?;
            if let Some(disk) = &parts.disk {
                write_synced(&new.join(DISK), disk)?;
            }
            write_synced(&new.join(JSON), &seal(substrate.to_json()))?;
            sync_dir(new)?;
            writer.commit().map_err(SubstrateError::store("committing the pages"))?;
            godwit_hold::at_blocking("publish.stored");
            let _one = lock(&self.inner.publishing);
            self.is_free(id, &substrate.name)?;
            let dir = self.dir(id);
            std::fs::rename(new, &dir).map_err(SubstrateError::io("publishing", &dir))?;
            godwit_hold::at_blocking("publish.renamed");
            let Err(e) = sync_dir(&self.inner.dirs.substrates) else { return Ok(()) };
            match std::fs::rename(&dir, new) {
                Ok(()) => Err(e),
                // It is there, and cannot be taken back.
                Err(error) => {
                    tracing::error!(%id, %error, sync = %e, "published, and perhaps not on the disk yet");
                    Ok(())
                }
            }
        };
        let done = publish();
        if let Err(e) = done {
            self.undo_by(new, id);
            return Err(e);
        }
        Ok(substrate)
    }

    /// Removes every trace of a substrate that was not docked.
    pub(crate) fn undo(&self, id: SubstrateId) {
        self.undo_by(&self.new_dir(id), id);
    }

    fn undo_by(&self, new: &Path, id: SubstrateId) {
        let mut removed = remove_tree(new);
        // What a published one holds under the same id is its own.
        if removed.is_ok() && !self.dir(id).exists() {
            removed = self.inner.store.release(id.into()).map(drop).map_err(Into::into);
        }
        if let Err(error) = removed {
            tracing::error!(%id, %error, "a half-made substrate was not removed; it goes when the pool opens next");
        }
    }
}

/// The sizes that a map says: (units that are not zero) in bytes.
pub(crate) fn held_bytes(map: &PageMap) -> u64 {
    let zero = zero_hash();
    map.entries().iter().filter(|(_, h)| *h != zero).count() as u64 * BLOCK_SIZE as u64
}

pub(crate) fn write_synced(path: &Path, content: &[u8]) -> Result<(), SubstrateError> {
    use std::io::Write;
    let mut file = std::fs::File::create(path).map_err(SubstrateError::io("making", path))?;
    file.write_all(content).map_err(SubstrateError::io("writing", path))?;
    file.sync_all().map_err(SubstrateError::io("syncing", path))
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), SubstrateError> {
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(SubstrateError::io("syncing", dir))
}

pub(crate) fn remove_tree(dir: &Path) -> Result<(), SubstrateError> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(SubstrateError::io("removing", dir)(e))
        }
        _ => Ok(()),
    }
}

pub(crate) fn names(dir: &Path) -> Result<Vec<String>, SubstrateError> {
    let entries = std::fs::read_dir(dir).map_err(SubstrateError::io("listing", dir))?;
    Ok(entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use godwit_store::StoreOptions;

    use super::*;

    #[test]
    fn nothing_starts_from_a_substrate_that_is_being_deleted() {
        let dir = tempfile::tempdir().expect("dir");
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let store = Store::open(&dir.path().join("store"), options).expect("store");
        let (substrates, memory) = (dir.path().join("substrates"), dir.path().join("memory"));
        let pool = Pool::open(PoolDirs { substrates, memory }, store, u64::MAX).expect("pool");
        let (id, vm) = (SubstrateId::new(), VmId::new());
        std::fs::create_dir(pool.dir(id)).expect("a substrate");
        pool.note_clone(id, vm);
        assert!(matches!(pool.delete(id), Err(SubstrateError::InUse { clones: 1, .. })));
        assert!(!pool.is_going(id), "it was refused");
        pool.forget_clone(vm);

        // Between the mark and the rename, as another thread sees it.
        lock(&pool.inner.clones).going.insert(id);
        assert!(pool.dir(id).is_dir());
        assert!(matches!(pool.get(id), Err(SubstrateError::NotFound(_))));
        assert!(matches!(pool.delete(id), Err(SubstrateError::NotFound(_))));
        lock(&pool.inner.clones).going.remove(&id);
        pool.delete(id).expect("deleted");
        assert!(!pool.is_going(id), "it has gone");
        assert!(matches!(pool.delete(id), Err(SubstrateError::NotFound(_))));
        assert!(!pool.is_going(id), "there was none");
    }
}
