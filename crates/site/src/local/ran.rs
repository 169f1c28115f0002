//! Whether a machine that comes has run here: from then on it is nobody else's to run. And whether
//! all of its memory is here: from then on its source has nothing that is worth going back to.
//!
//! Its relay writes that into a file beside the machine's record before the source hears of it; the
//! record says so a little later, and for longer. A host that dies in between is known by the file.
//! Until the file says so the machine has not run here, whatever its QEMU does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use godwit_migrate::relay::{NOT_COMMITTED, says_all_memory, says_committed, write_all_memory};
use godwit_types::Fault;

const FILE: &str = "ran";

/// Makes the file in a machine's directory, in place of what an earlier arrival has left. It is on
/// disk once the directory is.
pub(super) fn make(dir: &Path) -> Result<(), Fault> {
    forget(dir)?;
    let path = dir.join(FILE);
    let made = File::options().write(true).create_new(true).mode(0o600).open(&path);
    made.and_then(|mut file| {
        file.write_all(NOT_COMMITTED)?;
        file.sync_all()
    })
    .map_err(|e| Fault::io("making", &path, &e))
}

/// Opens it for the relay.
pub(super) fn open(dir: &Path) -> Result<File, Fault> {
    let path = dir.join(FILE);
    File::options().write(true).open(&path).map_err(|e| Fault::io("opening", &path, &e))
}

/// What the file says; `None` when there is none, as of an arrival that a daemon of the release
/// before has prepared.
pub(super) fn says(dir: &Path) -> Option<bool> {
    match read(dir) {
        Ok(bytes) => Some(says_committed(&bytes)),
        Err(e) if std::io::Error::kind(&e) == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            // Nobody takes a machine back on a guess.
            tracing::error!(dir = %dir.display(), %error, "whether a machine has run here is not to be read");
            Some(true)
        }
    }
}

/// Whether all of its memory has come; `None` when nobody has written that down, as of an arrival
/// that a daemon of a release before has prepared.
pub(super) fn had_all_memory(dir: &Path) -> Option<bool> {
    let read = read(dir).inspect_err(|error| {
        if error.kind() != std::io::ErrorKind::NotFound {
            tracing::error!(dir = %dir.display(), %error, "whether all of its memory has come is not to be read");
        }
    });
    says_all_memory(&read.ok()?)
}

fn read(dir: &Path) -> std::io::Result<Vec<u8>> {
    // Its relay may have made anything of it.
    let mut bytes = Vec::new();
    File::open(dir.join(FILE))?.take(2).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes down that all of its memory has come, as QEMU itself has told this daemon.
pub(super) fn note_all_memory(dir: &Path) -> Result<(), Fault> {
    if had_all_memory(dir) != Some(false) {
        return Ok(());
    }
    let path = dir.join(FILE);
    write_all_memory(&open(dir)?).map_err(|e| Fault::io("writing", &path, &e))
}

/// Removes the file, once the arrival is over.
pub(super) fn forget(dir: &Path) -> Result<(), Fault> {
    let path = dir.join(FILE);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::io("removing", &path, &e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_arrival_left_says_nothing_of_the_next() {
        let dir = tempfile::tempdir().expect("dir");
        let dir = dir.path();
        assert_eq!((says(dir), had_all_memory(dir)), (None, None));
        note_all_memory(dir).expect("nothing to write to");
        make(dir).expect("made");
        assert_eq!((says(dir), had_all_memory(dir)), (Some(false), Some(false)));
        note_all_memory(dir).expect("written");
        assert_eq!((says(dir), had_all_memory(dir)), (Some(false), Some(true)));
        make(dir).expect("made");
        let relay = open(dir).expect("opened");
        std::os::unix::fs::FileExt::write_all_at(&relay, b"1", 0).expect("written");
        assert_eq!(says(dir), Some(true));
        assert_eq!(had_all_memory(dir), Some(false));
        std::os::unix::fs::FileExt::write_all_at(&relay, b"1", 1).expect("written");
        assert_eq!(had_all_memory(dir), Some(true));
        std::fs::write(dir.join(FILE), "1\n").expect("as a release before has made it");
        assert_eq!((says(dir), had_all_memory(dir)), (Some(true), None));
        make(dir).expect("the next");
        std::os::unix::fs::FileExt::write_all_at(&relay, b"1", 0).expect("a late word");
        assert_eq!(says(dir), Some(false));
        for _ in 0..2 {
            forget(dir).expect("removed");
        }
        assert_eq!(says(dir), None);
    }
}
