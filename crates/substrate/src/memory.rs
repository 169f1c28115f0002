//! Sealed memory files: a substrate's memory, laid out once, mapped privately by every clone.
//! They are on tmpfs, where nothing but this process and whoever may do everything writes; what
//! they hold is still compared with the page map before it is used.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use godwit_store::{PageMap, Store, is_zero, zero_hash};
use godwit_types::{Hash, PAGE_SIZE};
use rayon::prelude::*;
use rustix::fs::FallocateFlags;

use crate::dock::next_data;
use crate::error::SubstrateError;

/// Bytes read in one go when a memory file is verified.
const WINDOW: u64 = 4 << 20;

/// A memory file that nobody writes any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedMemory {
    path: PathBuf,
}

impl SealedMemory {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sealed file at `path` if it is there and has `bytes` bytes.
    pub(crate) fn find(path: &Path, bytes: u64) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        let sealed = meta.permissions().mode() & 0o222 == 0;
        (meta.len() == bytes && sealed).then(|| Self { path: path.to_owned() })
    }

    /// Lays `map` out from `store` on all cores, each page checked. It appears at `path` only
    /// when it is whole; zero pages are holes.
    ///
    /// # Errors
    /// [`SubstrateError::NoRoom`] before a byte is written, when the file system lacks room;
    /// [`SubstrateError::Store`] for a page that is damaged or missing. Nothing is left then.
    pub fn lay_out(store: &Store, map: &PageMap, path: &Path) -> Result<Self, SubstrateError> {
        let temp = temp_beside(path);
        let _ = std::fs::remove_file(&temp);
        let done = Self::fill(store, map, &temp, path);
        if done.is_err() {
            let _ = std::fs::remove_file(&temp);
        }
        done
    }

    fn fill(
        store: &Store,
        map: &PageMap,
        temp: &Path,
        path: &Path,
    ) -> Result<Self, SubstrateError> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(SubstrateError::io("making", dir))?;
            room(dir, map.entries().len() as u64 * PAGE_SIZE as u64, "a memory file")?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(temp)
            .map_err(SubstrateError::io("making the memory file", temp))?;
        file.set_len(map.units() * PAGE_SIZE as u64).map_err(SubstrateError::io("sizing", temp))?;
        let hashes: Vec<Hash> = map.entries().iter().map(|(_, h)| *h).collect();
        store.get_many(&hashes, |i, page| {
            let (number, hash) = map.entries()[i];
            if page.len() != PAGE_SIZE {
                return Err(SubstrateError::damaged(
                    format!("page {number} ({hash})"),
                    "it is shorter than a page",
                ));
            }
            file.write_all_at(page, number * PAGE_SIZE as u64)
                .map_err(SubstrateError::io("writing", temp))
        })?;
        Self::seal(&file, temp, path)
    }

    /// Compares every page with `map`; the number of the first that differs.
    ///
    /// # Errors
    /// [`SubstrateError::Io`] when the file cannot be read.
    pub(crate) fn first_damage(&self, map: &PageMap) -> Result<Option<u64>, SubstrateError> {
        const PAGE: u64 = PAGE_SIZE as u64;
        let path = &self.path;
        let reading = || SubstrateError::io("reading", path);
        let file = File::open(path).map_err(SubstrateError::io("opening", path))?;
        let len = file.metadata().map_err(reading())?.len();
        if len != map.units() * PAGE {
            return Ok(Some(map.units().min(len / PAGE)));
        }
        let (zero, entries) = (zero_hash(), map.entries());
        // A page that should have content and is in a hole.
        let lost = |from: usize, to: usize| {
            entries[from..to].iter().find(|(_, h)| *h != zero).map(|(number, _)| *number)
        };
        let mut buffer = vec![0; WINDOW as usize];
        let (mut at, mut passed) = (0, 0);
        while let Some((from, to)) = next_data(&file, at, len).map_err(reading())? {
            let part = &mut buffer[..(to - from).min(WINDOW) as usize];
            file.read_exact_at(part, from).map_err(reading())?;
            at = from + part.len() as u64;
            let (first, end) = (from / PAGE, at.div_ceil(PAGE));
            let low = entries.partition_point(|(n, _)| *n < first);
            let high = entries.partition_point(|(n, _)| *n < end);
            let wanted = &entries[low..high];
            let differs = |(i, page): (usize, &[u8])| {
                let number = first + i as u64;
                let sound = match wanted.binary_search_by_key(&number, |(n, _)| *n) {
                    Ok(k) => Hash::of(page) == wanted[k].1,
                    Err(_) => is_zero(page),
                };
                (!sound).then_some(number)
            };
            let here = part.par_chunks(PAGE_SIZE).enumerate().with_min_len(32);
            if let Some(number) = lost(passed, low).or_else(|| here.find_map_first(differs)) {
                return Ok(Some(number));
            }
            passed = high;
        }
        Ok(lost(passed, entries.len()))
    }

    /// Makes the memory file of a machine that has ended, whose pages are those of `map`, the
    /// sealed file at `path`. Both must be on the same file system.
    pub(crate) fn hand_over(
        ram: &Path,
        map: &PageMap,
        path: &Path,
    ) -> Result<Self, SubstrateError> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(SubstrateError::io("making", dir))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(ram)
            .map_err(SubstrateError::io("opening", ram))?;
        free_zero_pages(&file, map, ram)?;
        Self::seal(&file, ram, path)
    }

    /// Frees the zero pages that clones have read or written into being: what they wrote is a copy
    /// of their own. No byte that anybody reads changes.
    pub(crate) fn free_filled(&self, map: &PageMap) -> Result<(), SubstrateError> {
        let file = OpenOptions::new()
            .write(true)
            .open(&self.path)
            .map_err(SubstrateError::io("opening", &self.path))?;
        free_zero_pages(&file, map, &self.path)
    }

    fn seal(file: &File, from: &Path, path: &Path) -> Result<Self, SubstrateError> {
        // Readable for every uid to which it is shown; nobody else comes to where it is.
        let (me, group) = (rustix::process::geteuid(), rustix::process::getegid());
        rustix::fs::fchown(file, Some(me), Some(group))
            .map_err(|e| SubstrateError::io("taking over", from)(e.into()))?;
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(SubstrateError::io("sealing", from))?;
        std::fs::rename(from, path).map_err(SubstrateError::io("renaming to", path))?;
        Ok(Self { path: path.to_owned() })
    }
}

/// Makes a hole of every page of the memory file at `path` that `map` has not.
fn free_zero_pages(file: &File, map: &PageMap, path: &Path) -> Result<(), SubstrateError> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let mut next = 0;
    let ends = map.entries().iter().map(|(n, _)| *n).chain([map.units()]);
    for number in ends {
        if number > next {
            let (at, len) = (next * PAGE_SIZE as u64, (number - next) * PAGE_SIZE as u64);
            rustix::fs::fallocate(file, punch, at, len)
                .map_err(|e| SubstrateError::io("freeing zero pages of", path)(e.into()))?;
        }
        next = number + 1;
    }
    Ok(())
}

/// Refuses when the file system of `dir` has less than `bytes` free for `what`.
pub(crate) fn room(dir: &Path, bytes: u64, what: &str) -> Result<(), SubstrateError> {
    let vfs = rustix::fs::statvfs(dir)
        .map_err(|e| SubstrateError::io("asking for room at", dir)(e.into()))?;
    let free_bytes = vfs.f_bavail.saturating_mul(vfs.f_frsize);
    if free_bytes < bytes {
        return Err(SubstrateError::NoRoom {
            place: format!("for {what} on the file system of {}", dir.display()),
            needed_bytes: bytes,
            free_bytes,
        });
    }
    Ok(())
}

fn temp_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".new-");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}
