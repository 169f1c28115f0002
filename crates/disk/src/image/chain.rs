//! Reading a chain of images that nobody writes any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::executor::block_on;
use godwit_types::BLOCK_SIZE;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping, Storage,
    StorageOpenOptions,
};

use super::layer::add_data_of;
use super::tool::{self, Backing};
use crate::bitmap::BlockBitmap;
use crate::error::{DiskError, io_error};

pub(super) type Access = Arc<FormatAccess<File>>;

/// A base and the layers on it, opened for reading in this process.
///
/// It takes no file locks, so that it works while a stopped QEMU, whose nodes are inactive and
/// flushed, still has the files open. Open it after the STOP: what it has read of a file's
/// tables it does not read again. All its functions block.
#[derive(Debug)]
pub struct FrozenChain {
    base: PathBuf,
    paths: Vec<PathBuf>,
    /// From the base upwards.
    levels: Vec<Access>,
    bytes: u64,
}

pub(super) fn open_file(path: &Path, write: bool) -> Result<File, DiskError> {
    let options = StorageOpenOptions::new().filename(path).write(write);
    block_on(File::open(options)).map_err(io_error("opening", path))
}

pub(super) fn open_base(path: &Path) -> Result<Access, DiskError> {
    tool::check_base(path)?;
    let open = Raw::builder(open_file(path, false)?).open(DenyImplicitOpenGate::default());
    Ok(Arc::new(FormatAccess::new(block_on(open).map_err(io_error("opening", path))?)))
}

/// Opens a qcow2 layer on `lower`; what its header names is never opened.
pub(super) fn open_layer(
    path: &Path,
    lower: Option<Access>,
    write: bool,
) -> Result<FormatAccess<File>, DiskError> {
    open_layer_in(open_file(path, write)?, path, lower, write)
}

fn open_layer_in(
    file: File,
    path: &Path,
    lower: Option<Access>,
    write: bool,
) -> Result<FormatAccess<File>, DiskError> {
    let builder: imago::qcow2::Qcow2OpenBuilder<File, Access> = Qcow2::builder(file);
    let open =
        builder.write(write).backing(lower).data_file(None).open(DenyImplicitOpenGate::default());
    Ok(FormatAccess::new(block_on(open).map_err(io_error("opening", path))?))
}

impl FrozenChain {
    /// Opens `base` and the `layers` on it, bottom to top. Each layer is inspected first; its
    /// header may name no other file than the one below it.
    ///
    /// # Errors
    /// If a file can't be opened or must not be used.
    pub fn open(base: &Path, layers: &[PathBuf]) -> Result<Self, DiskError> {
        let open = |path: &PathBuf| {
            let file = std::fs::File::open(path).map_err(io_error("opening", path))?;
            Ok((path.clone(), file))
        };
        Self::of_open(base, layers.iter().map(open).collect::<Result<_, DiskError>>()?)
    }

    /// As [`FrozenChain::open`], of layers that are open already, with their names.
    ///
    /// # Errors
    /// As there.
    pub fn of_open(base: &Path, layers: Vec<(PathBuf, std::fs::File)>) -> Result<Self, DiskError> {
        let mut bytes = tool::check_base(base)?;
        let mut levels = vec![open_base(base)?];
        let mut paths: Vec<PathBuf> = Vec::new();
        for (path, file) in layers {
            let below = paths.last().map_or(Backing::Raw(base), |p| Backing::Qcow2(p));
            bytes = tool::inspect_open(&file, &path, below)?.virtual_bytes;
            let lower = levels.last().map(Arc::clone);
            let file = File::try_from(file).map_err(io_error("opening", &path))?;
            levels.push(Arc::new(open_layer_in(file, &path, lower, false)?));
            paths.push(path);
        }
        Ok(Self { base: base.to_path_buf(), paths, levels, bytes })
    }

    /// The raw base.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The upmost file.
    #[must_use]
    pub fn top(&self) -> &Path {
        self.paths.last().unwrap_or(&self.base)
    }

    /// Bytes of the disk as the guest sees it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks of the disk.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.bytes / BLOCK_SIZE as u64
    }

    /// The blocks whose contents don't come from the base: written in some layer, or explicitly
    /// zero there (which hides the base's contents, unlike a hole). A block that is explicitly
    /// zero over a hole of the base reads as the base does and is left out: a guest that gives
    /// its free blocks back (TRIM) makes many of those.
    ///
    /// # Errors
    /// If a layer's tables can't be read.
    pub fn allocation(&self) -> Result<BlockBitmap, DiskError> {
        let empty = || {
            BlockBitmap::for_bytes(self.bytes)
                .map_err(|source| DiskError::Bitmap { path: self.top().to_path_buf(), source })
        };
        let (mut map, mut base) = (empty()?, empty()?);
        add_data_of(&self.base, &mut base)?;
        for (path, level) in self.paths.iter().zip(&self.levels[1..]) {
            let end = level.size().min(self.bytes);
            let mut at = 0;
            while at < end {
                let (mapping, len) = block_on(level.get_shallow_mapping(at, end - at))
                    .map_err(io_error("reading the tables of", path))?;
                if len == 0 {
                    break;
                }
                let (zero, hides) = match mapping {
                    ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } => (false, true),
                    ShallowMapping::Zero { explicit, .. } => (true, explicit),
                    _ => (false, false),
                };
                let block = BLOCK_SIZE as u64;
                let outer = at / block..(at + len).div_ceil(block);
                let inner = at.div_ceil(block)..(at + len) / block;
                if hides {
                    map.set_range(outer);
                }
                if hides && zero && inner.start < inner.end {
                    map.clear_range(inner.clone());
                    for run in base.runs_in(inner) {
                        map.set_range(run);
                    }
                }
                at += len;
            }
        }
        Ok(map)
    }

    /// Reads the blocks from `first` on into `data`, a whole number of blocks. What lies past
    /// the disk's end reads as zero.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn read_blocks(&self, first: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.read_at(first.saturating_mul(BLOCK_SIZE as u64), data)
    }

    /// Reads at any offset, as [`FrozenChain::read_blocks`] does.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let level = &self.levels[self.levels.len() - 1];
        read(level, self.bytes, offset, data).map_err(io_error("reading", self.top()))
    }

    /// The blocks of `which` with their contents, in order, read in runs of up to 64 KiB.
    pub fn export<'a>(
        &'a self,
        which: &'a BlockBitmap,
    ) -> impl Iterator<Item = Result<(u64, Vec<u8>), DiskError>> + 'a {
        let most = crate::msg::MAX_RUN;
        let pieces = which.runs().flat_map(move |r| {
            let end = r.end;
            r.step_by(most as usize).map(move |s| s..(s + most).min(end))
        });
        pieces.flat_map(move |r| {
            let mut data = vec![0; (r.end - r.start) as usize * BLOCK_SIZE];
            let read = self.read_blocks(r.start, &mut data);
            let blocks: Vec<_> = match read {
                Err(e) => vec![Err(e)],
                Ok(()) => data
                    .chunks(BLOCK_SIZE)
                    .zip(r)
                    .map(|(data, block)| Ok((block, data.to_vec())))
                    .collect(),
            };
            blocks
        })
    }
}

/// Reads at any offset; past `bytes` there are zeros.
pub(super) fn read(
    level: &FormatAccess<File>,
    bytes: u64,
    offset: u64,
    data: &mut [u8],
) -> std::io::Result<()> {
    let here = bytes.min(level.size()).saturating_sub(offset).min(data.len() as u64) as usize;
    let (data, past) = data.split_at_mut(here);
    past.fill(0);
    if data.is_empty() { Ok(()) } else { block_on(level.read(data, offset)) }
}
