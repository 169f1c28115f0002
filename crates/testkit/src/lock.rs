//! What the tests of this host share, one at a time.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Clouds of tests that there are at once on this host, however many test runners it has.
const CLOUDS: u32 = 2;

/// A directory that the tests of this host share.
#[must_use]
pub fn shared() -> PathBuf {
    let dir = std::env::temp_dir().join("godwit-tests");
    std::fs::create_dir_all(&dir).expect("a place for what tests share");
    dir
}

fn lock_file(name: &str) -> File {
    let path = shared().join(name);
    OpenOptions::new().create(true).append(true).open(&path).expect("a lock")
}

/// Takes the named lock for as long as the file is held.
#[must_use]
pub fn lock(name: &str) -> File {
    let file = lock_file(name);
    flock(&file, FlockOperation::LockExclusive).expect("locking");
    file
}

/// Waits until there are fewer than two clouds of tests: the turn is held with the file.
#[must_use]
pub fn turn() -> File {
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
