//! Guest memory as a file: making it, and reading it from outside QEMU.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use godwit_types::{Mib, PAGE_SIZE};

use crate::error::QemuError;

/// A file on tmpfs that is a machine's memory.
#[derive(Debug)]
pub struct MemoryFile;

impl MemoryFile {
    /// Makes the file at `path`, all holes, readable by its owner alone. One that is there already
    /// with the right size is kept as it is.
    ///
    /// `user` is the uid of a confined QEMU whose file it may be, besides ours.
    ///
    /// # Errors
    /// A file of another size, or no room.
    pub fn create(path: &Path, size: Mib, user: Option<u32>) -> Result<(), QemuError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        if !is_descriptor(path) {
            options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        }
        let file = options.open(path).map_err(QemuError::file("making the memory file", path))?;
        let meta = file.metadata().map_err(QemuError::file("reading the size of", path))?;
        own(path, &meta, user)?;
        match meta.len() {
            0 => file.set_len(size.bytes()).map_err(QemuError::file("sizing", path)),
            _ => Self::check(path, size, user),
        }
    }

    /// Checks that the file at `path` has exactly `size`.
    ///
    /// `user` is the uid of a confined QEMU whose file it may be, besides ours.
    ///
    /// # Errors
    /// When it is not there or of another size.
    pub fn check(path: &Path, size: Mib, user: Option<u32>) -> Result<(), QemuError> {
        let meta = match is_descriptor(path) {
            true => std::fs::metadata(path),
            false => std::fs::symlink_metadata(path),
        };
        let meta = meta.map_err(QemuError::file("looking for the memory file", path))?;
        own(path, &meta, user)?;
        if meta.len() == size.bytes() {
            return Ok(());
        }
        Err(QemuError::Unexpected {
            what: "the size of the memory file",
            why: format!("{} holds {} bytes, not {size}", path.display(), meta.len()),
        })
    }
}

/// Whether a path leads to an open file of a process, by a link of the kernel's own.
fn is_descriptor(path: &Path) -> bool {
    path.starts_with("/proc")
}

/// Refuses what is no memory file of ours: something that another user has put there, or made
/// reachable under a second name.
fn own(path: &Path, meta: &std::fs::Metadata, user: Option<u32>) -> Result<(), QemuError> {
    let me = rustix::process::geteuid().as_raw();
    let why = if !meta.file_type().is_file() {
        "is no file"
    } else if meta.uid() != me && Some(meta.uid()) != user {
        "belongs to another user"
    } else if meta.mode() & 0o022 != 0 {
        "may be written by others"
    } else if meta.nlink() > 1 {
        "has a second name"
    } else {
        return Ok(());
    };
    Err(QemuError::Unexpected { what: "the memory file", why: format!("{} {why}", path.display()) })
}

/// Reads the memory of a machine from outside. What it gives is stable only while the machine is
/// stopped.
#[derive(Debug)]
pub struct MemoryReader {
    file: File,
    offset: u64,
    len: u64,
    /// `/proc/PID/pagemap` of a machine with a private mapping.
    pagemap: Option<File>,
}

impl MemoryReader {
    /// Over a shared memory file.
    pub(crate) fn shared(path: &Path, size: Mib, user: Option<u32>) -> Result<Self, QemuError> {
        MemoryFile::check(path, size, user)?;
        let file = File::open(path).map_err(QemuError::file("opening the memory file", path))?;
        Ok(Self { file, offset: 0, len: size.bytes(), pagemap: None })
    }

    /// Over the private mapping of `path` in process `pid`.
    pub(crate) fn private(path: &Path, size: Mib, pid: i32) -> Result<Self, QemuError> {
        let meta = std::fs::metadata(path)
            .map_err(QemuError::file("looking for the memory file", path))?;
        let maps_path = format!("/proc/{pid}/maps");
        let maps = std::fs::read_to_string(&maps_path)
            .map_err(QemuError::file("reading", Path::new(&maps_path)))?;
        let offset = maps
            .lines()
            .find_map(|line| mapping_of(line, meta.dev(), meta.ino(), size.bytes()))
            .ok_or_else(|| QemuError::Unexpected {
                what: "the memory map of QEMU",
                why: format!("process {pid} maps no {size} of {}", path.display()),
            })?;
        let open =
            |name: String| File::open(&name).map_err(QemuError::file("opening", Path::new(&name)));
        Ok(Self {
            file: open(format!("/proc/{pid}/mem"))?,
            offset,
            len: size.bytes(),
            pagemap: Some(open(format!("/proc/{pid}/pagemap"))?),
        })
    }

    /// Over what [`MemoryReader::files`] gave, in another process.
    #[must_use]
    pub const fn of_files(memory: File, pagemap: File, address: u64, len: u64) -> Self {
        Self { file: memory, offset: address, len, pagemap: Some(pagemap) }
    }

    /// What a private copy is read from: the memory of QEMU's process and its page map, with the address
    /// that it is at. `None` for a shared memory file.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn files(&self) -> std::io::Result<Option<(File, File, u64)>> {
        let Some(pagemap) = &self.pagemap else { return Ok(None) };
        Ok(Some((self.file.try_clone()?, pagemap.try_clone()?, self.offset)))
    }

    /// Size of the memory in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a machine always has memory")]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from guest RAM block offset `at` (bytes).
    ///
    /// # Errors
    /// A range outside the memory, or a machine that has ended.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "a range outside guest memory",
            ));
        }
        self.file.read_exact_at(buf, self.offset + at)
    }

    /// Fills `buf` from QEMU's own memory at `address`, where [`crate::Machine::ram_blocks`] says that
    /// a block is. Only of a machine with private memory.
    ///
    /// # Errors
    /// A machine with shared memory, one that has ended, or an address that QEMU does not have.
    pub fn read_block_at(&self, address: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if self.pagemap.is_none() {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        self.file.read_exact_at(buf, address)
    }

    /// The pages (by number) in which a private copy of a sealed file differs from that file, as
    /// far as the kernel knows: every page that was written to. `None` for a shared memory file.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn written_pages(&self) -> std::io::Result<Option<Vec<u64>>> {
        let Some(pagemap) = &self.pagemap else { return Ok(None) };
        let mut written = Vec::new();
        let mut entries = vec![0u8; 64 << 10];
        let (first, pages) = (self.offset / PAGE_SIZE as u64, self.len / PAGE_SIZE as u64);
        let mut page = 0;
        while page < pages {
            let n = (pages - page).min(entries.len() as u64 / 8);
            let part = &mut entries[..usize::try_from(n).unwrap_or(0) * 8];
            pagemap.read_exact_at(part, (first + page) * 8)?;
            for (i, entry) in part.chunks_exact(8).enumerate() {
                if is_own_page(u64::from_ne_bytes(entry.try_into().unwrap_or_default())) {
                    written.push(page + i as u64);
                }
            }
            page += n;
        }
        Ok(Some(written))
    }
}

/// Whether a pagemap entry is a page of the process's own: swapped out, or present and not of the
/// file (bit 61).
const fn is_own_page(entry: u64) -> bool {
    let (present, swapped, of_file) = (entry >> 63 & 1, entry >> 62 & 1, entry >> 61 & 1);
    swapped == 1 || (present == 1 && of_file == 0)
}

/// The start address, if a line of `/proc/PID/maps` maps that file from its start for `len` bytes.
fn mapping_of(line: &str, dev: u64, ino: u64, len: u64) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (range, _perms, offset, device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (start, end) = range.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    let (major, minor) = device.split_once(':')?;
    let number = rustix::fs::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    (hex(offset)? == 0 && inode.parse() == Ok(ino) && number == dev && end - start == len)
        .then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_found_by_file_and_size() {
        let line = "7f00-8f00 rw-p 00000000 00:1b 42    /dev/shm/x y";
        let dev = rustix::fs::makedev(0, 0x1b);
        assert_eq!(mapping_of(line, dev, 42, 0x1000), Some(0x7f00));
        assert_eq!(mapping_of(line, dev, 43, 0x1000), None);
        assert_eq!(mapping_of(line, dev, 42, 0x2000), None);
        assert_eq!(mapping_of("nonsense", dev, 42, 1), None);
    }

    #[test]
    fn a_memory_file_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        MemoryFile::create(&path, Mib(2), None).unwrap();
        MemoryFile::create(&path, Mib(2), None).unwrap();
        let err = MemoryFile::create(&path, Mib(4), None).expect_err("refused");
        assert!(err.to_string().contains("not 4 MiB"), "{err}");
        let reader = MemoryReader::shared(&path, Mib(2), None).unwrap();
        let mut page = [1u8; 16];
        reader.read_at(0, &mut page).unwrap();
        assert_eq!(page, [0; 16]);
        assert!(reader.read_at((2 << 20) - 8, &mut page).is_err());
        assert!(reader.read_at(u64::MAX, &mut page).is_err());
    }

    #[test]
    fn a_memory_file_that_another_put_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("m"));
        std::fs::write(&real, vec![0; 2 << 20]).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(MemoryFile::create(&link, Mib(2), None).is_err());
        let err = MemoryFile::check(&link, Mib(2), None).expect_err("a link");
        assert!(err.to_string().contains("is no file"), "{err}");
        let second = dir.path().join("n");
        std::fs::hard_link(&real, &second).unwrap();
        let err = MemoryFile::create(&second, Mib(2), None).expect_err("a second name");
        assert!(err.to_string().contains("second name"), "{err}");
        std::fs::remove_file(&real).unwrap();
        MemoryFile::check(&second, Mib(2), None).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&second, open).unwrap();
        let err = MemoryFile::create(&second, Mib(2), None).expect_err("open to others");
        assert!(err.to_string().contains("by others"), "{err}");
    }

    #[test]
    fn own_pages_are_distinguished_from_pages_of_the_file() {
        assert!(is_own_page(1 << 63));
        assert!(is_own_page(1 << 62));
        assert!(!is_own_page(1 << 63 | 1 << 61));
        assert!(!is_own_page(0));
    }
}
