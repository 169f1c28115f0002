//! Which files were read whole and found sound, and have not been touched since.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::SubstrateError;
use crate::pool::lock;

/// What changes when somebody writes to a file, or puts another in its place. A bit that the
/// medium turns over by itself changes none of it: that is what the background check is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    dev: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Result<Self, SubstrateError> {
        let m = std::fs::metadata(path).map_err(SubstrateError::io("looking at", path))?;
        Ok(Self {
            dev: m.dev(),
            inode: m.ino(),
            bytes: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        })
    }

    /// Whether both are of one file, changed or not.
    pub(crate) fn same_file(&self, other: &Self) -> bool {
        (self.dev, self.inode) == (other.dev, other.inode)
    }
}

/// The files that this process has verified. Empty at its start, so that each is read once.
#[derive(Debug, Default)]
pub(crate) struct Verified(Mutex<HashMap<PathBuf, Stamp>>);

impl Verified {
    /// Whether the file at `path` is one that was verified and is untouched.
    pub(crate) fn knows(&self, path: &Path) -> bool {
        let then = lock(&self.0).get(path).copied();
        then.is_some() && then == Stamp::of(path).ok()
    }

    /// Notes that the file at `path` is sound as it was at `then`, before it was read.
    pub(crate) fn note(&self, path: &Path, then: Stamp) {
        lock(&self.0).insert(path.to_owned(), then);
    }

    /// The file at `path` is to be read again before it is used.
    pub(crate) fn forget(&self, path: &Path) {
        lock(&self.0).remove(path);
    }
}
