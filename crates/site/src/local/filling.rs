//! The directory in which a relay fills the disk of a machine that arrives, as its own user.
//!
//! ```text
//! vms/ID/in/mid.qcow2   the relay's, from its first block to the seal
//! vms/ID/mid.qcow2      the same file under a second name, the site's, from the pivot on
//! vms/ID/in             gone once the record says that the machine has arrived
//! ```
//!
//! A daemon that comes back goes by whether `in` is there. Nothing in it is opened by the site but
//! the list of what came, and that only when it is a plain file.

use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::{Path, PathBuf};

use godwit_disk::MidLayer;
use godwit_types::Fault;

/// The layer that post-copied blocks arrive in.
pub(super) const MID: &str = "mid.qcow2";

const IN: &str = "in";
/// The same before all is in it.
const NEW: &str = "in.new";

/// Where a relay fills the layer of the machine whose directory is `dir`.
pub(super) fn place(dir: &Path) -> PathBuf {
    dir.join(IN).join(MID)
}

/// Whether a relay fills it there, and not where relays of earlier versions did.
pub(super) fn is_there(dir: &Path) -> bool {
    dir.join(IN).is_dir()
}

/// Where the middle layer of an arrival is just now, if there is one.
pub(super) fn layer(dir: &Path) -> PathBuf {
    if is_there(dir) { place(dir) } else { dir.join(MID) }
}

/// Makes the place, with what an earlier relay has left of the layer, and gives it to `uid`. No
/// relay works there.
pub(super) fn make(dir: &Path, uid: Option<u32>) -> Result<(), Fault> {
    let (at, new) = (dir.join(IN), dir.join(NEW));
    if !at.is_dir() {
        end_at(&new)?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&new)
            .map_err(|e| Fault::io("making", &new, &e))?;
        let mid = dir.join(MID);
        for from in [mid.clone(), MidLayer::record_of(&mid)] {
            if let Some(name) = from.file_name().filter(|_| from.exists()) {
                std::fs::hard_link(&from, new.join(name))
                    .map_err(|e| Fault::io("handing over", &from, &e))?;
            }
        }
        std::fs::rename(&new, &at).map_err(|e| Fault::io("making", &at, &e))?;
    }
    let owner = uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let found = std::fs::read_dir(&at).map_err(|e| Fault::io("reading", &at, &e))?;
    for path in found.flatten().map(|f| f.path()).chain([at.clone()]) {
        let given = std::fs::symlink_metadata(&path).and_then(|meta| match meta.uid() == owner {
            true => Ok(()),
            false => lchown(&path, Some(owner), Some(owner)),
        });
        given.map_err(|e| Fault::io("handing over", &path, &e))?;
    }
    Ok(())
}

/// Removes the place, once nobody needs it any more.
pub(super) fn end(dir: &Path) -> Result<(), Fault> {
    end_at(&dir.join(IN))
}

fn end_at(at: &Path) -> Result<(), Fault> {
    match std::fs::remove_dir_all(at) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::io("removing", at, &e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_relay_left_is_found_in_the_place() {
        let dir = tempfile::tempdir().expect("dir");
        let dir = dir.path();
        let mid = dir.join(MID);
        std::fs::write(&mid, b"blocks").expect("a layer");
        std::fs::write(MidLayer::record_of(&mid), b"list").expect("its list");
        assert_eq!(layer(dir), mid);
        // Cut off in the midst of it.
        std::fs::create_dir(dir.join(NEW)).expect("half");
        assert_eq!(layer(dir), mid);
        for _ in 0..2 {
            make(dir, None).expect("made");
            assert_eq!(layer(dir), place(dir));
            assert_eq!(std::fs::read(place(dir)).expect("there"), b"blocks");
            let list = MidLayer::record_of(&place(dir));
            assert_eq!(std::fs::read(list).expect("there"), b"list");
        }
        MidLayer::take_over(&place(dir), &mid).expect("again is as once");
        end(dir).expect("removed");
        end(dir).expect("again");
        assert_eq!(std::fs::read(layer(dir)).expect("still there"), b"blocks");
    }
}
