//! What an activation needs beside the substrate itself: its sealed memory and its disk layer.
//!
//! ```text
//! substrates/<id>/ready/layer.qcow2, top.qcow2    made from the store's units
//! substrates/<id>/ready/sealed.json               the hashes that both had then
//! <memory>/<id>.mem                               likewise; its hashes are in the page map
//! ```
//!
//! Each is read whole and verified once by a process, and again when it was touched. What is
//! damaged is made again from units that are checked one by one. A QEMU that waits with a damaged
//! file open is ended.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use godwit_disk::image::{Backing, create_overlay, inspect, materialise};
use godwit_image::Image;
use godwit_store::{Store, StoreError};
use godwit_types::{BLOCK_SIZE, Hash, SubstrateId, seal, unseal};
use rustix::fs::Advice;
use serde::{Deserialize, Serialize};

use crate::cache::{InUse, bytes_of};
use crate::error::SubstrateError;
use crate::manifest::{Docked, MAX_JSON, Part, read_bounded};
use crate::memory::SealedMemory;
use crate::pool::{Pool, lock, remove_tree, write_synced};
use crate::stamp::Stamp;

/// Units fetched from the store in one go when a disk layer is made.
const BATCH: usize = 256;

const LAYER: &str = "layer.qcow2";
const TOP: &str = "top.qcow2";
const SEAL: &str = "sealed.json";

/// What an activation needs, made and checked.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The substrate.
    pub docked: Docked,
    /// Its memory.
    pub memory: SealedMemory,
    /// Its disk layer and the empty image that is copied for each clone.
    pub(crate) disk: Option<ReadyDisk>,
    /// The files as they were when this was given out.
    opened: Vec<(PathBuf, Stamp)>,
    _in_use: InUse,
}

impl Ready {
    /// The disk layer on the base image, when the machine has a disk.
    #[must_use]
    pub fn layer(&self) -> Option<&Path> {
        self.disk.as_ref().map(|d| d.layer.as_path())
    }
}

/// Sealed memory that is open for reading.
#[derive(Debug)]
pub struct OpenMemory {
    file: File,
    memory: SealedMemory,
    _in_use: InUse,
}

impl OpenMemory {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.memory.path()
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[derive(Debug, Clone)]
pub(crate) struct ReadyDisk {
    pub(crate) base: PathBuf,
    pub(crate) layer: PathBuf,
    pub(crate) top: PathBuf,
}

/// The hashes of the disk files, as they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    layer: Part,
    top: Part,
}

/// Where a file is read from when it is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// As every reader gets it.
    Cache,
    /// From the disk, as far as the kernel lets go of what it holds of it.
    Disk,
}

impl Pool {
    /// Makes what is missing or damaged of a substrate's sealed memory and disk layer. Blocks;
    /// concurrent calls for one substrate do the work once.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`], a damaged or missing unit, no room, another image.
    pub fn prepare(&self, id: SubstrateId, image: &Image) -> Result<Ready, SubstrateError> {
        let docked = self.docked(id)?;
        let name = docked.substrate.name.clone();
        docked.substrate.spec(image)?;
        let one = Arc::clone(lock(&self.inner.making).entry(id).or_default());
        let _one = lock(&one);
        let in_use = self.inner.cache.used(id);
        let prepare = || {
            let memory = self.ready_memory(&docked)?;
            let disk = match docked.substrate.disk {
                Some(_) => Some(self.ready_disk(&docked, image)?),
                None => None,
            };
            let files = [Some(memory.path()), disk.as_ref().map(|d| d.layer.as_path())];
            let opened = files
                .into_iter()
                .flatten()
                .map(|p| Ok((p.to_owned(), Stamp::of(p)?)))
                .collect::<Result<_, SubstrateError>>()?;
            Ok(Ready { docked, memory, disk, opened, _in_use: in_use })
        };
        let done = prepare().map_err(|e: SubstrateError| e.of(&name));
        self.note_use(id, done.as_ref().err());
        done
    }

    /// Opens the sealed memory of a substrate of this `content`; what is missing or damaged of it is
    /// made, as far as the budget has room. It is in use as long as it is open.
    ///
    /// # Errors
    /// As [`Pool::prepare`]; [`SubstrateError::NoRoom`] beyond the budget; another content is
    /// [`SubstrateError::NotFound`].
    pub fn open_memory(
        &self,
        id: SubstrateId,
        content: Hash,
    ) -> Result<OpenMemory, SubstrateError> {
        let docked = self.docked(id)?;
        let name = docked.substrate.name.clone();
        if docked.substrate.content() != content {
            return Err(SubstrateError::NotFound(format!("{name} of content {content}")));
        }
        let one = Arc::clone(lock(&self.inner.making).entry(id).or_default());
        let _one = lock(&one);
        let in_use = self.inner.cache.used(id);
        let path = self.memory_path(id);
        let bytes = docked.substrate.shape.memory.bytes();
        if SealedMemory::find(&path, bytes).is_none() && !self.memory_fits(id) {
            return Err(SubstrateError::NoRoom {
                place: format!("for the memory of substrate {name} beside what is in use"),
                needed_bytes: bytes,
                free_bytes: self.memory_budget().saturating_sub(self.sealed_bytes().0),
            });
        }
        let opened = self.ready_memory(&docked).and_then(|memory| {
            let file =
                File::open(memory.path()).map_err(SubstrateError::io("opening", memory.path()))?;
            Ok(OpenMemory { file, memory, _in_use: in_use })
        });
        opened.map_err(|e| e.of(&name))
    }

    /// The sealed memory of a substrate may be damaged although nothing touched its file: it is read
    /// again before it is used next.
    pub fn doubt_memory(&self, id: SubstrateId) {
        self.inner.verified.forget(&self.memory_path(id));
    }

    /// Makes sure of the disk layer of a substrate whose clone is about to be read: docked, or
    /// moved elsewhere.
    ///
    /// # Errors
    /// As [`Pool::prepare`].
    pub fn prepare_layer(
        &self,
        id: SubstrateId,
        image: &Image,
    ) -> Result<Option<PathBuf>, SubstrateError> {
        let docked = self.docked(id)?;
        docked.substrate.spec(image)?;
        let one = Arc::clone(lock(&self.inner.making).entry(id).or_default());
        let _one = lock(&one);
        if docked.substrate.disk.is_none() {
            return Ok(None);
        }
        let done = self.ready_disk(&docked, image).map_err(|e| e.of(&docked.substrate.name));
        self.note_use(id, done.as_ref().err());
        Ok(Some(done?.layer))
    }

    /// Whether the files that were opened with `ready` are still what they were.
    pub(crate) fn is_still_sound(&self, ready: &Ready) -> bool {
        let sound = |(path, then): &(PathBuf, Stamp)| {
            if !Stamp::of(path).is_ok_and(|now| now.same_file(then)) {
                return false;
            }
            self.inner.verified.knows(path)
                || self.verify_file(&ready.docked, path, From::Cache).is_ok()
        };
        ready.opened.iter().all(sound)
    }

    /// Verifies what is there of a substrate's ready files, and has what is damaged made again
    /// before it is used next.
    pub(crate) fn check_ready(&self, docked: &Docked) -> Result<(), SubstrateError> {
        let dir = docked.dir.join("ready");
        let disk = dir.join(SEAL).exists();
        let files = [
            Some(self.memory_path(docked.substrate.id)),
            disk.then(|| dir.join(LAYER)),
            disk.then(|| dir.join(TOP)),
        ];
        for path in files.into_iter().flatten().filter(|p| p.exists()) {
            if self.verify_file(docked, &path, From::Disk).is_ok() {
                continue;
            }
            // Damaged, or replaced or dropped while it was read.
            let one = Arc::clone(lock(&self.inner.making).entry(docked.substrate.id).or_default());
            let _one = lock(&one);
            if path.exists() {
                self.verify_file(docked, &path, From::Disk)?;
            }
        }
        Ok(())
    }

    /// Reads one ready file whole and notes that it is sound, or not. Until then what is known of it
    /// stands.
    fn verify_file(&self, docked: &Docked, path: &Path, from: From) -> Result<(), SubstrateError> {
        let then = Stamp::of(path);
        let found = then.and_then(|then| self.read_whole(docked, path, from).map(|()| then));
        match found {
            Ok(then) => {
                self.inner.verified.note(path, then);
                Ok(())
            }
            Err(e) => {
                self.inner.verified.forget(path);
                Err(e)
            }
        }
    }

    /// Compares every byte of a ready file with what it was.
    fn read_whole(&self, docked: &Docked, path: &Path, from: From) -> Result<(), SubstrateError> {
        if path == self.memory_path(docked.substrate.id) {
            let memory = SealedMemory::find(path, docked.substrate.shape.memory.bytes());
            let Some(memory) = memory else { return Err(unsound(path, "it is not sealed")) };
            if let Some(page) = memory.first_damage(&docked.pages()?)? {
                return Err(unsound(path, format!("page {page} is not what it was")));
            }
        } else {
            let sealed = read_seal(&docked.dir.join("ready").join(SEAL))?;
            let wanted = if path.ends_with(LAYER) { sealed.layer } else { sealed.top };
            if part_of(path, from)? != wanted {
                return Err(unsound(path, "its bytes are not what they were when it was made"));
            }
        }
        Ok(())
    }

    fn ready_memory(&self, docked: &Docked) -> Result<SealedMemory, SubstrateError> {
        let path = self.memory_path(docked.substrate.id);
        if let Some(there) = SealedMemory::find(&path, docked.substrate.shape.memory.bytes()) {
            drop(self.make_room(docked.substrate.id, 0));
            if self.inner.verified.knows(&path) {
                return Ok(there);
            }
            // A damaged page map says nothing of the memory; then nothing here can be used.
            let pages = docked.pages()?;
            let then = Stamp::of(&path)?;
            match there.first_damage(&pages)? {
                None => {
                    self.inner.verified.note(&path, then);
                    return Ok(there);
                }
                Some(page) => {
                    tracing::error!(path = %path.display(), page, "sealed memory is damaged; it is made again");
                }
            }
        }
        let pages = docked.pages()?;
        let _room = self.make_room(docked.substrate.id, bytes_of(pages.entries().len()));
        let memory = SealedMemory::lay_out(&self.inner.store, &pages, &path)?;
        self.inner.verified.note(&path, Stamp::of(&path)?);
        Ok(memory)
    }

    fn ready_disk(&self, docked: &Docked, image: &Image) -> Result<ReadyDisk, SubstrateError> {
        let base = image.disk_path().ok_or_else(|| {
            SubstrateError::damaged(format!("image {}", image.name), "it has no disk")
        })?;
        let dir = docked.dir.join("ready");
        let ready = ReadyDisk { layer: dir.join(LAYER), top: dir.join(TOP), base };
        match self.verify_disk(docked, &ready) {
            Ok(()) => return Ok(ready),
            Err(error) if dir.exists() => {
                let why = crate::error::chain(&error);
                tracing::error!(dir = %dir.display(), why, "disk layer cannot be used; it is made again");
            }
            Err(_) => {}
        }
        remove_tree(&dir)?;
        std::fs::create_dir(&dir).map_err(SubstrateError::io("making", &dir))?;
        let map = docked.disk()?.unwrap_or_default();
        let bytes = map.units() * BLOCK_SIZE as u64;
        let blocks = Blocks { store: &self.inner.store, left: map.entries(), now: Vec::new() };
        materialise(&ready.layer, &ready.base, bytes, blocks)
            .map_err(SubstrateError::disk("making the disk layer"))?;
        create_overlay(&ready.top, Backing::Qcow2(&ready.layer), bytes)
            .map_err(SubstrateError::disk("making the empty top image"))?;
        let (layer_then, top_then) = (Stamp::of(&ready.layer)?, Stamp::of(&ready.top)?);
        let sealed = Sealed {
            layer: part_of(&ready.layer, From::Cache)?,
            top: part_of(&ready.top, From::Cache)?,
        };
        let text = serde_json::to_vec(&sealed).unwrap_or_default();
        write_synced(&dir.join(SEAL), &seal(text))?;
        self.inner.verified.note(&ready.layer, layer_then);
        self.inner.verified.note(&ready.top, top_then);
        Ok(ready)
    }

    fn verify_disk(&self, docked: &Docked, ready: &ReadyDisk) -> Result<(), SubstrateError> {
        let disk = SubstrateError::disk;
        inspect(&ready.layer, Backing::Raw(&ready.base)).map_err(disk("looking at the layer"))?;
        inspect(&ready.top, Backing::Qcow2(&ready.layer)).map_err(disk("looking at the top"))?;
        for path in [&ready.layer, &ready.top] {
            if !self.inner.verified.knows(path) {
                self.verify_file(docked, path, From::Cache)?;
            }
        }
        Ok(())
    }
}

fn unsound(path: &Path, why: impl Into<String>) -> SubstrateError {
    let again = "; it is made again at the next activation";
    SubstrateError::damaged(path.display().to_string(), why.into() + again)
}

fn read_seal(path: &Path) -> Result<Sealed, SubstrateError> {
    let bad = |why: String| SubstrateError::damaged(path.display().to_string(), why);
    let file = read_bounded(path, MAX_JSON)?;
    let text = unseal(&file).map_err(|e| bad(e.to_string()))?;
    serde_json::from_slice(text).map_err(|e| bad(e.to_string()))
}

/// Hash and length of a file.
fn part_of(path: &Path, from: From) -> Result<Part, SubstrateError> {
    let file = File::open(path).map_err(SubstrateError::io("opening", path))?;
    if from == From::Disk {
        // Advice: what is dirty or mapped stays.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    }
    let mut hasher = blake3::Hasher::new();
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let bytes =
        std::io::copy(&mut reader, &mut hasher).map_err(SubstrateError::io("reading", path))?;
    Ok(Part { hash: Hash(*hasher.finalize().as_bytes()), bytes })
}

/// The blocks of a disk map, fetched batch by batch.
struct Blocks<'a> {
    store: &'a Store,
    left: &'a [(u64, Hash)],
    now: Vec<(u64, Vec<u8>)>,
}

impl Iterator for Blocks<'_> {
    type Item = Result<(u64, Vec<u8>), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.now.is_empty() {
            let (batch, left) = self.left.split_at(self.left.len().min(BATCH));
            self.left = left;
            let hashes: Vec<Hash> = batch.iter().map(|(_, h)| *h).collect();
            let slots: Vec<Mutex<Vec<u8>>> = batch.iter().map(|_| Mutex::default()).collect();
            let done = self.store.get_many(&hashes, |i, bytes| {
                *lock(&slots[i]) = bytes.to_vec();
                Ok::<(), StoreError>(())
            });
            if let Err(e) = done {
                self.left = &[];
                return Some(Err(e));
            }
            let bytes = slots.into_iter().map(|m| m.into_inner().unwrap_or_default());
            self.now = batch.iter().map(|(n, _)| *n).zip(bytes).rev().collect();
        }
        self.now.pop().map(Ok)
    }
}
