//! One docked `tiny` machine with a witness in it, made once for all tests of a build.

use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A directory that the tests of a build share, on this host.
fn shared() -> PathBuf {
    let dir = std::env::temp_dir().join("godwit-tests");
    std::fs::create_dir_all(&dir).expect("a place for what tests share");
    dir
}

/// Clouds of tests that there are at once on this host, however many test runners it has.
const CLOUDS: u32 = 2;

fn lock_file(name: &str) -> File {
    let path = shared().join(name);
    OpenOptions::new().create(true).append(true).open(&path).expect("a lock")
}

/// Takes the named lock for as long as the file is held.
pub(crate) fn lock(name: &str) -> File {
    let file = lock_file(name);
    flock(&file, FlockOperation::LockExclusive).expect("locking");
    file
}

/// Waits until there are fewer than [`CLOUDS`] clouds of tests: the turn is held with the file.
pub(crate) fn turn() -> File {
    let name = |n| format!("turn-{n}");
    for n in 0..CLOUDS {
        let file = lock_file(&name(n));
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return file,
            Err(Errno::WOULDBLOCK) => {}
            Err(e) => panic!("locking: {e}"),
        }
    }
    lock(&name(std::process::id() % CLOUDS))
}

/// Where the substrate of this `program` and image is kept.
pub(crate) fn path(program: &Path, image: &Path) -> PathBuf {
    let mut key = DefaultHasher::new();
    let meta = std::fs::metadata(program).expect("the program");
    (meta.mtime(), meta.mtime_nsec(), meta.len(), program).hash(&mut key);
    std::fs::canonicalize(image).expect("the image").hash(&mut key);
    shared().join(format!("tiny-{:016x}.gwsa", key.finish()))
}

/// Removes the substrates of earlier builds of `program`.
pub(crate) fn forget_others(keep: &Path) {
    for entry in std::fs::read_dir(shared()).expect("reading").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "gwsa") && path != keep {
            // Another build's, which makes it again when it needs it.
            let _ = std::fs::remove_file(path);
        }
    }
}
