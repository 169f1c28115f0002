//! Places to start machines in.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_qemu::{DiskChain, Launch, Layer, MemorySource};

use crate::guest::{Guest, LONG};
use crate::leftover::EndsGuests;

/// A place for one test, gone afterwards with all machines in it. Memory files lie on tmpfs.
#[derive(Debug)]
pub struct Place {
    // Before the directories, so that nobody writes there any more when they go.
    _guests: EndsGuests,
    /// For files and sockets.
    pub dir: tempfile::TempDir,
    /// For memory.
    pub shm: tempfile::TempDir,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self {
            _guests: EndsGuests::of(dir.path()),
            dir,
            shm: tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs"),
        }
    }

    /// A file or socket of that name.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A memory file of that name.
    #[must_use]
    pub fn memory(&self, name: &str) -> PathBuf {
        self.shm.path().join(name)
    }

    /// A fresh cow image for `base`, without any path in its header.
    #[must_use]
    pub fn cow(&self, name: &str, base: &Path) -> PathBuf {
        let path = self.path(name);
        let bytes = std::fs::metadata(base).expect("a base image").len().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().expect("UTF-8"), &bytes]);
        path
    }

    /// A launch of `guest` with memory of its own over its disk.
    #[must_use]
    pub fn launch(&self, name: &str, guest: &Guest) -> Launch {
        let top = self.cow(&format!("{name}.qcow2"), &guest.base);
        let base = Layer::Raw { path: guest.base.clone() };
        Launch {
            disk: Some(DiskChain::over(vec![base], top)),
            ..Launch::new(
                guest.spec.clone(),
                self.path(name),
                name.parse().expect("a name"),
                MemorySource::Shared { path: self.memory(name) },
            )
        }
    }
}

/// Runs `qemu-img` to its end, which must be a good one.
pub fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).status().expect("qemu-img");
    assert!(done.success(), "qemu-img {args:?}");
}

/// A read-only NBD server of what `image` says, listening on `socket` until it is dropped.
pub async fn serve(socket: &Path, image: &[&str]) -> tokio::process::Child {
    let server = tokio::process::Command::new("qemu-nbd")
        .args(["-r", "-t", "-k"])
        .arg(socket)
        .args(image)
        .kill_on_drop(true)
        .spawn()
        .expect("qemu-nbd");
    let deadline = Instant::now() + LONG;
    while tokio::net::UnixStream::connect(socket).await.is_err() {
        assert!(Instant::now() < deadline, "qemu-nbd does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server
}
