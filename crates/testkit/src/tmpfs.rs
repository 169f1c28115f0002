//! A file system of a test's own that can be made full.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// How often a size may be overtaken by what is written meanwhile.
const TRIES: usize = 1000;

/// A tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// Mounts one of `mib` MiB at `path`, which is made.
    #[must_use]
    pub fn mount(path: &Path, mib: u64) -> Self {
        std::fs::create_dir_all(path).expect("a place to mount");
        let data = std::ffi::CString::new(format!("size={},mode=0700", mib << 20)).expect("words");
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), &*data)
            .unwrap_or_else(|e| panic!("mounting a tmpfs at {}: {e}", path.display()));
        Self { path: path.to_owned() }
    }

    /// Makes it larger or smaller, so that this much is left on it.
    pub fn leave(&self, mib: u64) {
        for _ in 0..TRIES {
            let now = rustix::fs::statvfs(&self.path).expect("asking for room");
            let used = (now.f_blocks - now.f_bfree) * now.f_frsize;
            // The size is counted in whole pages, and never none, which would mean no limit.
            let size = (used.max(4096) + (mib << 20)).next_multiple_of(4096);
            let data = std::ffi::CString::new(format!("size={size}")).expect("words");
            match mount_remount(&self.path, MountFlags::empty(), &*data) {
                Ok(()) => return,
                // More than that is used by now: somebody writes there.
                Err(rustix::io::Errno::INVAL) => {}
                Err(e) => panic!("leaving {mib} MiB at {}: {e}", self.path.display()),
            }
        }
        panic!("leaving {mib} MiB at {}: it grows each time", self.path.display());
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // What still has a file open there keeps it until it ends.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}
