//! Content-addressed store of pages and disk blocks.
//!
//! A *unit* is 4096 bytes (the last one of a file may be shorter), named by the BLAKE3 hash of
//! its content. The zero unit is never stored; every store holds it.
//!
//! ```text
//!   put:  bytes -> hash -> known? -> encode -> pack file (fsync) -> index commit -> visible
//!   get:  hash -> memory tier -> index -> pack file -> decode -> hash again -> bytes
//! ```
//!
//! Units are in tiers (`tier`): read from the fastest that has them, written to all, lasting in one.
//!
//! * **Disk tier**: append-only pack files (`packs/00000001.pack`) and an index (`index.redb`). A
//!   pack is on the disk before the index names what is in it; what lies behind the length that
//!   the index has committed is a torn tail, cut off when the store is opened. The number of its
//!   last commit stands beside it (`index.mark`): an index that has fallen back is refused.
//! * **Memory tier**: encoded units, least recently used out first, within a byte limit.
//! * **Owners** (a substrate, a machine) hold units. What no owner holds is removed by
//!   [`Store::gc`].
//!
//! All calls block; an async caller runs them on a thread that may wait.

mod check;
mod disk;
mod encode;
mod error;
mod gc;
mod index;
mod mark;
mod memory;
mod pack;
mod pagemap;
mod read;
mod tier;
mod writer;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use godwit_types::{Hash, PAGE_SIZE, SubstrateId, VmId};

pub use check::CheckReport;
pub use encode::{DecodeError, Effort, Encoder, Encoding, decode};
pub use error::{Damage, DamagedUnit, StoreError};
pub use gc::GcReport;
pub use mark::{CommitMark, Marked};
pub use pagemap::{PageMap, PageMapError};
use tier::Tier;

pub use tier::EncodedUnit;
pub use writer::{Stored, Writer};

/// Bytes in a full unit.
pub const UNIT: usize = PAGE_SIZE;

/// Bytes that a pack file has in front of each unit.
pub const UNIT_HEAD: u64 = pack::HEAD as u64;

/// The hash of the full zero unit.
#[must_use]
pub fn zero_hash() -> Hash {
    static ZERO: OnceLock<Hash> = OnceLock::new();
    *ZERO.get_or_init(|| Hash::of(&[0; UNIT]))
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|c| c.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}

/// Who holds units: 16 bytes of the holder's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub [u8; 16]);

impl From<SubstrateId> for Owner {
    fn from(id: SubstrateId) -> Self {
        Self(*id.0.as_bytes())
    }
}

impl From<VmId> for Owner {
    fn from(id: VmId) -> Self {
        Self(*id.0.as_bytes())
    }
}

/// How a store is to behave.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Bytes of encoded units that the memory tier may hold.
    pub memory_limit_bytes: u64,
    /// A pack file that has reached this many bytes is not appended to any more.
    pub pack_limit_bytes: u64,
    /// Bytes of disk that writing never touches; the index needs room to commit and to shrink.
    pub reserve_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { memory_limit_bytes: 256 << 20, pack_limit_bytes: 256 << 20, reserve_bytes: 16 << 20 }
    }
}

/// What a store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Distinct units.
    pub units: u64,
    /// Bytes of the pack files, as far as committed.
    pub pack_bytes: u64,
    /// Number of pack files.
    pub packs: u64,
    /// Bytes in the memory tier.
    pub memory_bytes: u64,
    /// Units in the memory tier.
    pub memory_units: u64,
}

/// A content-addressed store in a directory. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    options: StoreOptions,
    memory: Arc<memory::MemoryTier>,
    disk: Arc<disk::PackTier>,
    pins: Mutex<Pins>,
}

/// Units that writers under way rely on although no owner holds them yet.
#[derive(Default)]
struct Pins {
    next: u64,
    by_writer: HashMap<u64, HashSet<Hash>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("dir", &self.inner.dir).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store in `dir`, making it if it is not there. Torn tails of pack files are cut.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when another process has it open; [`StoreError::Io`],
    /// [`StoreError::Index`].
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let packs_dir = dir.join("packs");
        std::fs::create_dir_all(&packs_dir).map_err(StoreError::io("making", &packs_dir))?;
        let index = index::Index::open(&dir.join("index.redb"))?;
        let packs = pack::Packs::open(packs_dir, &index.packs()?, options.pack_limit_bytes)?;
        Ok(Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                options,
                memory: Arc::new(memory::MemoryTier::new(options.memory_limit_bytes)),
                disk: Arc::new(disk::PackTier { index, packs, suspects: Mutex::default() }),
                pins: Mutex::default(),
            }),
        })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What is held.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn stats(&self) -> Result<StoreStats, StoreError> {
        let packs = self.inner.disk.index.packs()?;
        let (memory_units, memory_bytes) = self.inner.memory.used();
        Ok(StoreStats {
            units: self.inner.disk.index.unit_count()?,
            pack_bytes: packs.iter().map(|(_, len)| len).sum(),
            packs: packs.len() as u64,
            memory_bytes,
            memory_units,
        })
    }

    /// For each hash, whether the store holds it. The zero unit is always held.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn contains_many(&self, hashes: &[Hash]) -> Result<Vec<bool>, StoreError> {
        let found = self.inner.disk.contains(hashes)?;
        Ok(hashes.iter().zip(found).map(|(h, found)| found || *h == zero_hash()).collect())
    }

    /// The distinct units that `owner` holds.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn owned(&self, owner: Owner) -> Result<HashSet<Hash>, StoreError> {
        self.inner.disk.index.owned(Some(owner))
    }

    /// All owners.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn owners(&self) -> Result<Vec<Owner>, StoreError> {
        self.inner.disk.index.owners()
    }

    /// Ends all that `owner` holds; whether it held anything. Space comes back with [`Store::gc`].
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn release(&self, owner: Owner) -> Result<bool, StoreError> {
        self.inner.disk.index.release(owner)
    }

    /// Starts writing on behalf of `owner`. Nothing is visible before [`Writer::commit`].
    ///
    /// # Errors
    /// [`StoreError::Io`] when no pack file can be made.
    pub fn writer(&self, owner: Owner, effort: Effort) -> Result<Writer, StoreError> {
        Writer::new(self.clone(), Some(owner), effort)
    }

    /// Stores one unit at once and returns its hash. Many units go through [`Store::writer`].
    ///
    /// # Errors
    /// As [`Writer::put_units`] and [`Writer::commit`].
    pub fn put(&self, owner: Owner, unit: &[u8]) -> Result<Hash, StoreError> {
        let mut w = self.writer(owner, Effort::Fast)?;
        let hash = w.put(unit)?;
        w.commit()?;
        Ok(hash)
    }
}

/// A lock whose holder cannot leave the data half changed, so that poison means nothing.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
