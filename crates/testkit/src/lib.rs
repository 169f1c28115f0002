//! What the tests of several rooms need: guests, places, relays, and waiting for states.
//!
//! A dev-dependency, for tests in a crate's `tests/`: a crate's unit tests are built with another
//! copy of the crate than the one that is used here.
//!
//! Panics are how a harness of tests says that something is not as it must be.
#![allow(clippy::missing_panics_doc)]

#[cfg(feature = "guests")]
mod guest;
mod leftover;
mod lock;
#[cfg(feature = "guests")]
mod place;
pub mod process;
#[cfg(feature = "relays")]
mod sites;
mod tmpfs;
mod wait;
mod world;

#[cfg(feature = "guests")]
pub use guest::{Guarded, Guest, LONG, RESEEDED, console, guest, incoming, sh, start, tiny, up};
pub use leftover::{EndsGuests, MemoryOf};
pub use lock::{lock, shared, turn};
#[cfg(feature = "guests")]
pub use place::{Place, qemu_img, serve};
#[cfg(feature = "relays")]
pub use sites::{Relay, Sites, give};
pub use tmpfs::Tmpfs;
pub use wait::within;
pub use world::World;

use std::path::PathBuf;

/// Where the guest images of this host are.
#[must_use]
pub fn images() -> PathBuf {
    std::env::var_os("GODWIT_IMAGES")
        .map_or_else(|| PathBuf::from("/var/cache/godwit/images"), PathBuf::from)
}

/// Whether an image has been built; only `tiny` always is.
#[must_use]
pub fn has_image(name: &str) -> bool {
    images().join(name).exists()
}

/// Turns one bit of the byte at `at` of a file over, whoever may write it; called twice, the file
/// is as it was.
pub fn flip(path: &std::path::Path, at: u64) {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    let was = std::fs::metadata(path).expect("a file to harm").permissions();
    let mut rights = was.clone();
    rights.set_mode(rights.mode() | 0o600);
    std::fs::set_permissions(path, rights).expect("writable");
    let file = std::fs::File::options().read(true).write(true).open(path).expect("opened");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("a byte");
    std::fs::set_permissions(path, was).expect("as before");
}
