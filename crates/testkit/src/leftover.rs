//! Nothing outlives the test that started it, however the test ends.

use std::path::{Path, PathBuf};

use crate::process;

/// On its drop every QEMU ends whose command line names a file in the directory.
#[derive(Debug)]
pub struct EndsGuests(PathBuf);

impl EndsGuests {
    /// Those with files in `dir`.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        Self(dir.to_owned())
    }
}

impl Drop for EndsGuests {
    fn drop(&mut self) {
        let inside = format!("{}/", self.0.display());
        for pid in process::with_word(|w| w.contains(&inside)) {
            if process::is_qemu(pid) {
                process::kill(pid);
            }
        }
    }
}

/// Where the sites below a `--root` keep the memory of their machines, on tmpfs: removed when
/// dropped, whatever is in it.
#[derive(Debug)]
pub struct MemoryOf(PathBuf);

impl MemoryOf {
    /// That of the sites below `root`.
    #[must_use]
    pub fn root(root: &Path) -> Self {
        let of = godwit_types::Hash::of(root.as_os_str().as_encoded_bytes());
        Self(PathBuf::from(format!("/dev/shm/godwit-{}", of.short())))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for MemoryOf {
    fn drop(&mut self) {
        // Of a site that never started there is nothing.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
