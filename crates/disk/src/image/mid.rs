//! The middle layer: what post-copy receives, written by this process alone.
//!
//! ```text
//! create --> write ... flush ... write --> finish --> QEMU opens it (read-only, below top)
//!    kill -9 at any point --> resume: blocks of the last flush are there, the rest comes again
//! ```
//!
//! Beside `mid.qcow2` lies `mid.qcow2.received`, replaced whole at each flush after the image is
//! durable, so that it never tells of a block that is not there.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use godwit_types::{BLOCK_SIZE, Hash};
use imago::FormatAccess;
use imago::file::File;
use serde::{Deserialize, Serialize};

use super::chain::{self, FrozenChain, open_base, open_layer};
use super::layer::{close, write_blocks};
use super::tool::{self, Backing};
use crate::bitmap::BlockBitmap;
use crate::error::{DiskError, io_error};

const MAGIC: &[u8; 8] = b"GWMID\0\0\x01";
/// Two bitmaps of the largest disk and some.
const MAX_RECORD: u64 = 80 << 20;

#[derive(Serialize, Deserialize)]
struct Record {
    sent: BlockBitmap,
    received: BlockBitmap,
    finished: bool,
}

/// The middle layer while it fills. All its functions block; reads and writes of different
/// blocks may run at the same time on several threads.
#[derive(Debug)]
pub struct MidLayer {
    path: PathBuf,
    image: FormatAccess<File>,
    bytes: u64,
    sent: BlockBitmap,
    received: Mutex<BlockBitmap>,
    finished: AtomicBool,
    /// One save at a time: they share a temporary file.
    saving: Mutex<()>,
}

/// What [`MidLayer::resume`] found.
#[derive(Debug)]
pub struct Resumed {
    /// The layer, ready to go on.
    pub layer: MidLayer,
    /// The bitmap with which the post-copy began.
    pub sent: BlockBitmap,
    /// Blocks that are there.
    pub received: BlockBitmap,
    /// It had been finished: QEMU may have it open, and it is read-only.
    pub finished: bool,
}

impl MidLayer {
    /// Creates an empty layer of `bytes` bytes on `base`; `sent` is the bitmap from the source.
    ///
    /// # Errors
    /// If it exists or can't be made; nothing is left then.
    pub fn create(
        path: &Path,
        base: &Path,
        bytes: u64,
        sent: &BlockBitmap,
    ) -> Result<Self, DiskError> {
        if sent.blocks() * BLOCK_SIZE as u64 != bytes {
            let why = "the block bitmap is of another size";
            return Err(DiskError::Unfit { path: path.to_path_buf(), why });
        }
        tool::create_overlay(path, Backing::Raw(base), bytes)?;
        let made = Self::open(path, base, bytes, sent.clone(), None).and_then(|layer| {
            layer.save(false)?;
            Ok(layer)
        });
        if made.is_err() {
            let _ = fs::remove_file(path);
            let _ = fs::remove_file(record_path(path));
        }
        made
    }

    fn open(
        path: &Path,
        base: &Path,
        bytes: u64,
        sent: BlockBitmap,
        record: Option<Record>,
    ) -> Result<Self, DiskError> {
        let finished = record.as_ref().is_some_and(|r| r.finished);
        let received = match record {
            Some(r) => r.received,
            None => BlockBitmap::new(sent.blocks())
                .map_err(|source| DiskError::Bitmap { path: path.to_path_buf(), source })?,
        };
        let image = open_layer(path, Some(open_base(base)?), !finished)?;
        Ok(Self {
            path: path.to_path_buf(),
            image,
            bytes,
            sent,
            received: Mutex::new(received),
            finished: AtomicBool::new(finished),
            saving: Mutex::new(()),
        })
    }

    /// Goes on after a crash. The image's reference counts, which a crash leaves behind the
    /// tables, are set right first, and what the record tells is checked against the tables. If
    /// the image can't be repaired it is made anew, and nothing counts as received.
    ///
    /// # Errors
    /// If the record beside it is damaged or the image can't be opened or made.
    pub fn resume(path: &Path, base: &Path) -> Result<Resumed, DiskError> {
        let mut record = read_record(path)?;
        let (sent, finished) = (record.sent.clone(), record.finished);
        let bytes = sent.blocks() * BLOCK_SIZE as u64;
        let sound = tool::inspect(path, Backing::Raw(base)).is_ok_and(|h| h.virtual_bytes == bytes)
            && (finished || tool::qemu_img_repair(path)?);
        if !sound {
            tracing::warn!(path = %path.display(), "the middle layer is unsound and begins anew");
            fs::remove_file(path).map_err(io_error("removing", path))?;
            let layer = Self::create(path, base, bytes, &sent)?;
            let received = layer.received();
            return Ok(Resumed { layer, sent, received, finished: false });
        }
        let there = FrozenChain::open(base, &[path.to_path_buf()])?.allocation()?;
        let fits = record.received.intersect_with(&there);
        fits.map_err(|source| DiskError::Bitmap { path: path.to_path_buf(), source })?;
        let layer = Self::open(path, base, bytes, sent.clone(), Some(record))?;
        let received = layer.received();
        Ok(Resumed { layer, sent, received, finished })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks written so far, durable or not.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn received(&self) -> BlockBitmap {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes whole blocks from `first` on.
    ///
    /// # Errors
    /// If they lie outside the disk, or the file can't be written.
    ///
    /// # Panics
    /// If `data` is not a whole number of blocks.
    pub fn write(&self, first: u64, data: &[u8]) -> Result<(), DiskError> {
        assert!(data.len().is_multiple_of(BLOCK_SIZE), "whole blocks are written");
        let count = (data.len() / BLOCK_SIZE) as u64;
        if first.checked_add(count).is_none_or(|end| end > self.sent.blocks()) {
            let why = "blocks past the end of the disk were to be written";
            return Err(DiskError::Unfit { path: self.path.clone(), why });
        }
        if self.finished.load(Ordering::SeqCst) {
            let why = "it is finished and can't be written";
            return Err(DiskError::Unfit { path: self.path.clone(), why });
        }
        write_blocks(&self.image, first, data).map_err(io_error("writing", &self.path))?;
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.set_range(first..first + count);
        Ok(())
    }

    /// Reads at any offset: what was received, and the base elsewhere.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        chain::read(&self.image, self.bytes, offset, data).map_err(io_error("reading", &self.path))
    }

    /// Makes everything written so far durable, then the record of it.
    ///
    /// # Errors
    /// If a file can't be written.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.finished.load(Ordering::SeqCst) { Ok(()) } else { self.save(false) }
    }

    fn save(&self, finished: bool) -> Result<(), DiskError> {
        let _one = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        // A flush that waited for a seal must not take the seal back.
        let finished = finished || self.finished.load(Ordering::SeqCst);
        let record = Record { sent: self.sent.clone(), received: self.received(), finished };
        close(&self.image, &self.path)?;
        let mut data = MAGIC.to_vec();
        data = postcard::to_extend(&record, data)
            .map_err(|_| DiskError::Record { path: record_path(&self.path) })?;
        data.extend(Hash::of(&data).0);
        let path = record_path(&self.path);
        let temp = tool::beside(&path, ".new");
        let write = || {
            let mut file = fs::File::create(&temp)?;
            file.write_all(&data)?;
            file.sync_all()
        };
        if let Err(e) = write() {
            let _ = fs::remove_file(&temp);
            return Err(io_error("writing", &path)(e));
        }
        tool::publish(&temp, &path)
    }

    /// Makes the layer durable and final, so that QEMU can open it (read-only) while this process
    /// may still read it. Further writes are refused. The record stays and says that the layer is
    /// finished, until [`MidLayer::forget`].
    ///
    /// # Errors
    /// If a file can't be written; the layer can then be resumed.
    pub fn seal(&self) -> Result<PathBuf, DiskError> {
        if !self.finished.swap(true, Ordering::SeqCst)
            && let Err(e) = self.save(true)
        {
            self.finished.store(false, Ordering::SeqCst);
            return Err(e);
        }
        Ok(self.path.clone())
    }

    /// Seals the layer and closes it.
    ///
    /// # Errors
    /// As [`MidLayer::seal`].
    pub fn finish(self) -> Result<PathBuf, DiskError> {
        self.seal()
    }

    /// How many blocks the layer at `path` still lacks by its record, and whether it is finished.
    ///
    /// # Errors
    /// If the record can't be read or is damaged.
    pub fn missing(path: &Path) -> Result<(u64, bool), DiskError> {
        let record = read_record(path)?;
        let mut left = record.sent;
        left.subtract(&record.received)
            .map_err(|source| DiskError::Bitmap { path: path.to_path_buf(), source })?;
        Ok((left.count(), record.finished))
    }

    /// Where the record of the layer at `path` is.
    #[must_use]
    pub fn record_of(path: &Path) -> PathBuf {
        record_path(path)
    }

    /// Gives the sealed layer at `from`, where another user may have filled it, the name `to` as a
    /// file of this process's user. What is at `to` goes; the layer is also at `from` after it.
    /// Again is the same as once.
    ///
    /// # Errors
    /// If it is no plain file, or cannot be moved or kept.
    pub fn take_over(from: &Path, to: &Path) -> Result<(), DiskError> {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
        let unfit = |why| DiskError::Unfit { path: from.to_path_buf(), why };
        let meta = fs::symlink_metadata(from).map_err(io_error("looking at", from))?;
        if !meta.is_file() {
            return Err(unfit("it is not a plain file"));
        }
        let same = fs::symlink_metadata(to)
            .is_ok_and(|there| (there.dev(), there.ino()) == (meta.dev(), meta.ino()));
        if !same {
            match fs::remove_file(to) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io_error("removing", to)(e));
                }
                _ => {}
            }
            fs::hard_link(from, to).map_err(io_error("taking over", from))?;
        }
        // Whoever owns `from` may have put a link there in between.
        if !fs::symlink_metadata(to).map_err(io_error("looking at", to))?.is_file() {
            return Err(unfit("it is not a plain file"));
        }
        let me = rustix::process::geteuid().as_raw();
        if meta.uid() != me {
            lchown(to, Some(me), None)
                .and_then(|()| fs::set_permissions(to, fs::Permissions::from_mode(0o640)))
                .map_err(io_error("taking over", to))?;
        }
        tool::sync_dir(to)
    }

    /// Removes the record beside a finished layer: it is now a layer like any other.
    ///
    /// # Errors
    /// If the record can't be removed.
    pub fn forget(path: &Path) -> Result<(), DiskError> {
        match fs::remove_file(record_path(path)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(io_error("removing the record of", path)(e))
            }
            _ => Ok(()),
        }
    }
}

fn record_path(path: &Path) -> PathBuf {
    tool::beside(path, ".received")
}

fn read_record(layer: &Path) -> Result<Record, DiskError> {
    let path = record_path(layer);
    let damaged = || DiskError::Record { path: path.clone() };
    // Another user may have made it: a link is not followed, and a pipe not waited for.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(&path)
        .map_err(io_error("reading", &path))?;
    if !file.metadata().map_err(io_error("reading", &path))?.is_file() {
        return Err(damaged());
    }
    let mut data = Vec::new();
    file.take(MAX_RECORD + 1).read_to_end(&mut data).map_err(io_error("reading", &path))?;
    if data.len() as u64 > MAX_RECORD {
        return Err(damaged());
    }
    let (body, sum) = data.split_last_chunk::<32>().ok_or_else(damaged)?;
    if Hash::of(body) != Hash(*sum) {
        return Err(damaged());
    }
    let body = body.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let record: Record = postcard::from_bytes(body).map_err(|_| damaged())?;
    if record.sent.blocks() != record.received.blocks() {
        return Err(damaged());
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_taken_over_only_if_it_is_a_plain_file() {
        use std::os::unix::fs::{MetadataExt, symlink};
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        symlink("/etc/passwd", &from).expect("a link");
        MidLayer::take_over(&from, &to).expect_err("a link");
        assert!(fs::symlink_metadata(&to).is_err());
        symlink("/etc/passwd", record_path(&from)).expect("a link");
        MidLayer::missing(&from).expect_err("a link");
        fs::remove_file(&from).expect("removed");
        fs::write(&from, b"blocks").expect("a file");
        fs::write(&to, b"of another move").expect("a file");
        let me = rustix::process::geteuid();
        if me.is_root() {
            std::os::unix::fs::chown(&from, Some(2_000_000_001), Some(2_000_000_001)).expect("its");
        }
        for _ in 0..2 {
            MidLayer::take_over(&from, &to).expect("a plain file");
            let meta = fs::symlink_metadata(&to).expect("there");
            assert_eq!((meta.uid(), meta.len()), (me.as_raw(), 6));
        }
    }
}
