//! Layers as sets of blocks: hashed, exported, made anew.

use std::error::Error;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use futures::executor::block_on;
use godwit_types::{BLOCK_SIZE, Hash};
use imago::FormatAccess;
use imago::file::File;
use serde::{Deserialize, Serialize};

use super::chain::{FrozenChain, open_base, open_layer};
use super::tool::{self, Backing};
use crate::bitmap::BlockBitmap;
use crate::error::{DiskError, io_error};

/// What a chain holds above its base, by content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMap {
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Each block that doesn't come from the base, in order, with the hash of its 4096 bytes.
    pub blocks: Vec<(u64, Hash)>,
}

impl LayerMap {
    /// Hashes every allocated block of `chain`.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn of(chain: &FrozenChain) -> Result<Self, DiskError> {
        let map = chain.allocation()?;
        let blocks = chain
            .export(&map)
            .map(|b| b.map(|(block, data)| (block, Hash::of(&data))))
            .collect::<Result<_, _>>()?;
        Ok(Self { disk_bytes: chain.bytes(), blocks })
    }

    /// Checks that `chain` holds exactly these contents above its base.
    ///
    /// # Errors
    /// Names the first block that differs, or is missing or too many.
    pub fn verify(&self, chain: &FrozenChain) -> Result<(), DiskError> {
        let damaged = |block| DiskError::Damaged { path: chain.top().to_path_buf(), block };
        let found = chain.allocation()?;
        let mut at = self.blocks.iter();
        for block in chain.export(&found) {
            let (block, data) = block?;
            match at.next() {
                Some((wanted, hash)) if *wanted == block && *hash == Hash::of(&data) => {}
                Some((wanted, _)) => return Err(damaged(block.min(*wanted))),
                None => return Err(damaged(block)),
            }
        }
        at.next().map_or(Ok(()), |(block, _)| Err(damaged(*block)))
    }
}

/// Writes whole blocks; blocks of zeros become explicit zero clusters, which take no space and
/// still hide what is below.
pub(super) fn write_blocks(
    image: &FormatAccess<File>,
    first: u64,
    data: &[u8],
) -> std::io::Result<()> {
    let is_zero = |b: &[u8]| b.iter().all(|x| *x == 0);
    let mut at = 0;
    while at < data.len() {
        let zero = is_zero(&data[at..at + BLOCK_SIZE]);
        let mut end = at + BLOCK_SIZE;
        while end < data.len() && is_zero(&data[end..end + BLOCK_SIZE]) == zero {
            end += BLOCK_SIZE;
        }
        let offset = first * BLOCK_SIZE as u64 + at as u64;
        if zero {
            block_on(image.write_zeroes(offset, (end - at) as u64))?;
        } else {
            block_on(image.write(&data[at..end], offset))?;
        }
        at = end;
    }
    Ok(())
}

/// Makes a qcow2 layer of `disk_bytes` bytes on `base` from blocks in any order, such as a store
/// returns them. It appears under `path` only when it is whole and durable. Returns the number
/// of blocks.
///
/// # Errors
/// If a block lies outside the disk or is not [`BLOCK_SIZE`] long, the supplier fails, or the
/// file can't be written; nothing is left then.
pub fn materialise<B, E>(
    path: &Path,
    base: &Path,
    disk_bytes: u64,
    blocks: impl IntoIterator<Item = Result<(u64, B), E>>,
) -> Result<u64, DiskError>
where
    B: AsRef<[u8]>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    if path.exists() {
        return Err(DiskError::Unfit { path: path.to_path_buf(), why: "it exists already" });
    }
    let temp = tool::beside(path, ".part");
    let _ = fs::remove_file(&temp);
    let result = fill(&temp, path, base, disk_bytes, blocks);
    match result {
        Ok(n) => tool::publish(&temp, path).map(|()| n),
        Err(e) => {
            let _ = fs::remove_file(&temp);
            Err(e)
        }
    }
}

fn fill<B, E>(
    temp: &Path,
    path: &Path,
    base: &Path,
    disk_bytes: u64,
    blocks: impl IntoIterator<Item = Result<(u64, B), E>>,
) -> Result<u64, DiskError>
where
    B: AsRef<[u8]>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    tool::create_overlay(temp, Backing::Raw(base), disk_bytes)?;
    let image = open_layer(temp, Some(open_base(base)?), true)?;
    let unfit = |why| DiskError::Unfit { path: path.to_path_buf(), why };
    let mut seen = BlockBitmap::for_bytes(disk_bytes)
        .map_err(|source| DiskError::Bitmap { path: path.to_path_buf(), source })?;
    for item in blocks {
        let (block, data) =
            item.map_err(|e| DiskError::Supply { path: path.to_path_buf(), source: e.into() })?;
        if data.as_ref().len() != BLOCK_SIZE {
            return Err(unfit("a block that is not 4096 bytes long was supplied"));
        }
        if !seen.insert(block) {
            return Err(unfit("a block was supplied twice or lies outside the disk"));
        }
        write_blocks(&image, block, data.as_ref()).map_err(io_error("writing", temp))?;
    }
    close(&image, temp)?;
    Ok(seen.count())
}

/// Flushes tables and data to stable storage.
pub(super) fn close(image: &FormatAccess<File>, path: &Path) -> Result<(), DiskError> {
    block_on(image.flush()).map_err(io_error("flushing", path))?;
    block_on(image.sync()).map_err(io_error("syncing", path))
}

/// Merges all layers of `chain` into one new layer at `path` on the same base. Returns the
/// number of blocks.
///
/// # Errors
/// As [`materialise`].
pub fn flatten(chain: &FrozenChain, path: &Path) -> Result<u64, DiskError> {
    let map = chain.allocation()?;
    materialise(path, chain.base(), chain.bytes(), chain.export(&map))
}

/// Duplicates the base and merges all layers of `chain` into the duplicate: a raw image at
/// `path` that depends on nothing. Holes of the base stay holes. It appears under its name only
/// when it is whole and durable. Returns the bytes written.
///
/// # Errors
/// If it exists, the chain can't be read or the file can't be written; nothing is left then.
pub fn duplicate(chain: &FrozenChain, path: &Path) -> Result<u64, DiskError> {
    tool::plain(path)?;
    if path.exists() {
        return Err(DiskError::Unfit { path: path.to_path_buf(), why: "it exists already" });
    }
    let temp = tool::beside(path, ".part");
    let result = copy_whole(chain, &temp).and_then(|n| tool::publish(&temp, path).map(|()| n));
    if result.is_err() {
        let _ = fs::remove_file(&temp);
    }
    result
}

fn copy_whole(chain: &FrozenChain, temp: &Path) -> Result<u64, DiskError> {
    let mut which = chain.allocation()?;
    add_data_of(chain.base(), &mut which)?;
    let file = fs::File::create(temp).map_err(io_error("creating", temp))?;
    file.set_len(chain.bytes()).map_err(io_error("sizing", temp))?;
    let mut written = 0;
    for block in chain.export(&which) {
        let (block, data) = block?;
        if data.iter().all(|b| *b == 0) {
            continue;
        }
        file.write_all_at(&data, block * BLOCK_SIZE as u64).map_err(io_error("writing", temp))?;
        written += data.len() as u64;
    }
    file.sync_all().map_err(io_error("syncing", temp))?;
    Ok(written)
}

/// Sets the blocks of a raw file that are not holes.
pub(super) fn add_data_of(path: &Path, which: &mut BlockBitmap) -> Result<(), DiskError> {
    use rustix::fs::{SeekFrom, seek};
    let file = fs::File::open(path).map_err(io_error("opening", path))?;
    let end = file.metadata().map_err(io_error("inspecting", path))?.len();
    let block = BLOCK_SIZE as u64;
    let mut at = 0;
    while at < end {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(io_error("mapping", path)(e.into())),
        };
        let hole =
            seek(&file, SeekFrom::Hole(start)).map_err(|e| io_error("mapping", path)(e.into()))?;
        which.set_range(start / block..hole.div_ceil(block));
        at = hole.max(start + 1);
    }
    Ok(())
}
