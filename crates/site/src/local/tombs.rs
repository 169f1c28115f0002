//! Which machines have left this site, each with the highest generation seen: an older one is
//! refused for good.
//!
//! One small file, to which one entry is added when a machine leaves: its id, the generation, and
//! the first bytes of their BLAKE3 hash. In memory it is a map that only questions about one machine
//! look into. The file is written anew when it is opened and holds more entries than machines.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use godwit_types::{Fault, Generation, VmId};

/// Bytes of an id, a generation and their check.
const ENTRY: usize = 16 + 8 + 8;

/// The tombstones of a site.
#[derive(Debug)]
pub(super) struct Tombs {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    seen: HashMap<VmId, Generation>,
    file: File,
    /// Bytes of it that are whole entries.
    len: u64,
}

impl Tombs {
    /// Opens the file at `path`; makes it when it is not there.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn open(path: PathBuf) -> Result<Self, Fault> {
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Fault::io("reading", &path, &e)),
        };
        let mut seen = HashMap::new();
        let mut entries = 0;
        for bytes in bytes.chunks(ENTRY) {
            match decode(bytes) {
                Some((vm, generation)) => {
                    let known = seen.entry(vm).or_insert(generation);
                    *known = generation.max(*known);
                    entries += 1;
                }
                // The last one is cut when the host crashed while it was written.
                None => tracing::warn!(path = %path.display(), "a damaged entry is left out"),
            }
        }
        if entries != seen.len() || bytes.len() != entries * ENTRY {
            write_anew(&path, &seen).map_err(|e| Fault::io("writing", &path, &e))?;
        }
        let file = options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| Fault::io("opening", &path, &e))?;
        let len = (seen.len() * ENTRY) as u64;
        Ok(Self { path, inner: Mutex::new(Inner { seen, file, len }) })
    }

    /// The highest generation of a machine that has left.
    pub(super) fn get(&self, vm: VmId) -> Option<Generation> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).seen.get(&vm).copied()
    }

    /// A machine has left at `generation`. On disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written; it is not known then.
    pub(super) fn add(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        let fail = |e: std::io::Error| Fault::io("writing", &self.path, &e);
        let (file, before) = {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            if inner.seen.get(&vm).is_some_and(|g| *g >= generation) {
                return Ok(());
            }
            // Over what an entry that did not fit has left.
            inner.file.write_all_at(&encode(vm, generation), inner.len).map_err(fail)?;
            inner.len += ENTRY as u64;
            let file = inner.file.try_clone().map_err(fail)?;
            (file, inner.seen.insert(vm, generation))
        };
        // Several that leave at once are synced side by side.
        file.sync_data().map_err(|e| {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            match before {
                Some(before) => inner.seen.insert(vm, before),
                None => inner.seen.remove(&vm),
            };
            fail(e)
        })
    }
}

fn options() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

fn write_anew(path: &Path, seen: &HashMap<VmId, Generation>) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let bytes: Vec<u8> = seen.iter().flat_map(|(vm, g)| encode(*vm, *g)).collect();
    let mut file = options().write(true).create(true).truncate(true).open(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    File::open(dir)?.sync_all()
}

fn check(entry: &[u8]) -> [u8; 8] {
    let hash = blake3::hash(entry);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    first
}

fn encode(vm: VmId, generation: Generation) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..16].copy_from_slice(vm.0.as_bytes());
    entry[16..24].copy_from_slice(&generation.0.to_le_bytes());
    let check = check(&entry[..24]);
    entry[24..].copy_from_slice(&check);
    entry
}

fn decode(entry: &[u8]) -> Option<(VmId, Generation)> {
    let (what, sum) = entry.split_at_checked(24)?;
    if sum != check(what) {
        return None;
    }
    let (vm, generation) = what.split_first_chunk::<16>()?;
    let generation = u64::from_le_bytes(generation.try_into().ok()?);
    Some((VmId(uuid::Uuid::from_bytes(*vm)), Generation(generation)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_generation_of_each_machine_outlives_the_daemon() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("left");
        let (a, b) = (VmId::new(), VmId::new());
        let tombs = Tombs::open(path.clone()).expect("opened");
        assert_eq!(tombs.get(a), None);
        for (vm, generation) in [(a, 2), (b, 1), (a, 5), (a, 3)] {
            tombs.add(vm, Generation(generation)).expect("written");
        }
        assert_eq!(tombs.get(a), Some(Generation(5)));
        drop(tombs);
        let tombs = Tombs::open(path.clone()).expect("opened");
        assert_eq!((tombs.get(a), tombs.get(b)), (Some(Generation(5)), Some(Generation(1))));
        let bytes = std::fs::metadata(&path).expect("file").len();
        assert_eq!(bytes, 2 * ENTRY as u64, "one entry for each machine");
    }

    #[test]
    fn a_cut_or_flipped_entry_costs_no_other() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("left");
        let vms: Vec<VmId> = (0..3).map(|_| VmId::new()).collect();
        let tombs = Tombs::open(path.clone()).expect("opened");
        for vm in &vms {
            tombs.add(*vm, Generation(7)).expect("written");
        }
        drop(tombs);
        let mut bytes = std::fs::read(&path).expect("file");
        bytes[ENTRY + 20] ^= 1;
        bytes.extend_from_slice(&[1, 2, 3]);
        std::fs::write(&path, bytes).expect("written");
        let tombs = Tombs::open(path.clone()).expect("opened");
        assert_eq!(tombs.get(vms[0]), Some(Generation(7)));
        assert_eq!(tombs.get(vms[1]), None);
        assert_eq!(tombs.get(vms[2]), Some(Generation(7)));
        tombs.add(vms[1], Generation(8)).expect("written");
        drop(tombs);
        assert_eq!(Tombs::open(path).expect("opened").get(vms[1]), Some(Generation(8)));
    }
}
