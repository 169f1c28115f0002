//! The memory of a clone. It maps its parent's sealed memory privately, so that what it has not
//! written to is what the parent's page map says, without a look at it: reading a hole of a sealed
//! file through a mapping fills it. Only the pages that it has written are read.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use godwit_qemu::stream::{blocks_beside, join_devices};
use godwit_qemu::{BlockInUse, Machine, MemoryReader, RAM_BLOCK};
use godwit_store::{PageMap, Writer, zero_hash};
use godwit_types::{Hash, PAGE_SIZE, SubstrateId};

use crate::error::SubstrateError;
use crate::manifest::{MAX_STATE, Substrate, read_bounded};
use crate::pool::Pool;

/// Pages read and stored in one go.
const BATCH: usize = 1024;
/// Units that are looked for in the store in one go.
const HELD: usize = 8192;

/// The memory of a machine that maps it privately, and what it is told from.
#[derive(Debug)]
pub(crate) struct PrivateMemory {
    reader: MemoryReader,
    /// The file that it maps.
    sealed: PathBuf,
    /// What is in that file.
    parent: PageMap,
    /// The device state that the machine began with.
    template: Vec<u8>,
}

impl PrivateMemory {
    /// Of `machine`, which maps the sealed file at `path` and will be `substrate`.
    ///
    /// # Errors
    /// A parent that is not in the pool any more, is damaged, or is of another shape.
    pub(crate) fn open(
        machine: &Machine,
        pool: &Pool,
        path: &Path,
        substrate: &Substrate,
    ) -> Result<Self, SubstrateError> {
        let id = path.file_stem().and_then(|s| s.to_str()?.parse::<SubstrateId>().ok());
        let id = id.filter(|id| pool.memory_path(*id) == path).ok_or_else(|| {
            SubstrateError::damaged(
                path.display().to_string(),
                "it is no sealed memory of this pool",
            )
        })?;
        let parent = pool.docked(id)?;
        let of_parent = || {
            parent.substrate.fits(&substrate.machine)?;
            Ok((parent.pages()?, parent.state()?))
        };
        let (pages, template) =
            of_parent().map_err(|e: SubstrateError| e.of(&parent.substrate.name))?;
        let reader = machine.memory().map_err(SubstrateError::machine("finding its memory"))?;
        Ok(Self { reader, sealed: path.to_owned(), parent: pages, template })
    }

    /// Stores what the machine has written, and holds what its parent has. Goes on as long as
    /// `go_on` allows; `None` when it did not. What is given is right only of a machine that stands
    /// still.
    ///
    /// # Errors
    /// What the store says, a page of the parent's that is nowhere, or a machine that has ended.
    pub(crate) fn store(
        &self,
        writer: &mut Writer,
        mut go_on: impl FnMut() -> Result<bool, SubstrateError>,
    ) -> Result<Option<PageMap>, SubstrateError> {
        let reading = || SubstrateError::io("reading the memory over", &self.sealed);
        let written = self.reader.written_pages().map_err(reading())?.unwrap_or_default();
        let mut kept = self.parent.entries().to_vec();
        kept.retain(|(n, _)| written.binary_search(n).is_err());
        for some in kept.chunks(HELD) {
            if !go_on()? {
                return Ok(None);
            }
            self.hold(writer, some)?;
        }
        let mut own: Vec<(u64, Hash)> = Vec::with_capacity(written.len());
        let mut bytes = vec![0; BATCH * PAGE_SIZE];
        for some in written.chunks(BATCH) {
            if !go_on()? {
                return Ok(None);
            }
            let mut at = 0;
            for run in some.chunk_by(|a, b| a + 1 == *b) {
                let to = at + run.len() * PAGE_SIZE;
                let from = run[0] * PAGE_SIZE as u64;
                self.reader.read_at(from, &mut bytes[at..to]).map_err(reading())?;
                at = to;
            }
            let hashes = writer
                .put_units(&bytes[..at])
                .map_err(SubstrateError::store("storing the memory"))?;
            own.extend(some.iter().copied().zip(hashes));
        }
        own.retain(|(_, h)| *h != zero_hash());
        kept.extend(own);
        kept.sort_unstable_by_key(|(n, _)| *n);
        let mut map = PageMap::new(self.parent.units());
        for (n, h) in kept {
            map.push(n, h).map_err(|source| SubstrateError::Pages {
                what: "the machine".to_owned(),
                source,
            })?;
        }
        Ok(Some(map))
    }

    /// Holds units of the parent's; one that the store has lost is in the sealed file yet.
    fn hold(&self, writer: &mut Writer, pages: &[(u64, Hash)]) -> Result<(), SubstrateError> {
        let holding = || SubstrateError::store("holding the parent's memory");
        let hashes: Vec<Hash> = pages.iter().map(|(_, h)| *h).collect();
        let lacking = writer.hold(&hashes).map_err(holding())?;
        if lacking.is_empty() {
            return Ok(());
        }
        let places: HashMap<Hash, u64> = pages.iter().map(|(n, h)| (*h, *n)).collect();
        let sealed = &self.sealed;
        let file = File::open(sealed).map_err(SubstrateError::io("opening", sealed))?;
        let mut page = vec![0; PAGE_SIZE];
        for hash in lacking {
            let number = places.get(&hash).copied().unwrap_or_default();
            file.read_exact_at(&mut page, number * PAGE_SIZE as u64)
                .map_err(SubstrateError::io("reading", sealed))?;
            if Hash::of(&page) != hash {
                let why = format!("page {number} is not what it was, and the store lacks it");
                return Err(SubstrateError::damaged(sealed.display().to_string(), why));
            }
            let _ = writer.put(&page).map_err(holding())?;
        }
        Ok(())
    }

    /// The whole device state of the machine, which stands still, of its devices in the file at
    /// `devices` and of `blocks`, its RAM blocks.
    ///
    /// # Errors
    /// Blocks that its parent did not have, or too large ones; a machine that has ended.
    pub(crate) fn state(
        &self,
        devices: &Path,
        blocks: &[BlockInUse],
    ) -> Result<Vec<u8>, SubstrateError> {
        let stream = |e| SubstrateError::Stream(Box::new(e));
        let devices = read_bounded(devices, MAX_STATE)?;
        let mut contents = Vec::new();
        let mut left = MAX_STATE;
        for name in blocks_beside(&self.template, RAM_BLOCK).map_err(stream)? {
            let lacks =
                || SubstrateError::damaged("the machine", format!("it has no block {name}"));
            let block = blocks.iter().find(|b| b.name == name).ok_or_else(lacks)?;
            left = left.checked_sub(block.used_bytes).ok_or_else(|| {
                SubstrateError::damaged("the machine", "its devices have too much memory")
            })?;
            let mut bytes = vec![0; usize::try_from(block.used_bytes).unwrap_or(0)];
            self.reader
                .read_block_at(block.host_address, &mut bytes)
                .map_err(SubstrateError::io("reading the devices over", &self.sealed))?;
            contents.push((name, bytes));
        }
        join_devices(&self.template, RAM_BLOCK, &contents, &devices).map_err(stream)
    }
}
