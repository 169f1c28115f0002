//! What machines that have left are kept of, so that they come back by what has changed.
//!
//! ```text
//! it leaves:   its memory as it was at STOP is kept here      (here: `kept`)
//!              its pages are marked at the destination        (there: `coming`, then `marks`)
//! it returns:  the relay there names what still has its mark, the one here has it
//! ```
//!
//! What is kept is the first to go when anything else needs memory. It is at most one visit of each
//! machine, for a day, and nothing of it outlives the daemon. Of a machine that shares a substrate's
//! memory only its own pages are kept: the others are in the sealed memory, which is a cache of the
//! pool's, and is opened when the machine comes back.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, Permissions};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_migrate::relay::{Visit, marks_bytes};
use godwit_qemu::MemoryReader;
use godwit_store::is_zero;
use godwit_substrate::OpenMemory;
use godwit_types::{Fault, Generation, Hash, Mib, MigrationId, Name, PAGE_SIZE, SubstrateId, VmId};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use tracing::{info, warn};

/// How long the memory of a machine that does not come back is kept.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);

/// Pages that are copied in one go.
const COPIED_AT_ONCE: usize = 256;

/// The visits to one site, and those from which machines came here.
#[derive(Debug)]
pub(super) struct Visits {
    dir: PathBuf,
    /// Bytes that may be kept.
    budget: u64,
    inner: Mutex<Inner>,
    /// Held while one is made: two at once would each find the room of both.
    entering: Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Machines that have left whole and are not removed yet, with the generation that they have
    /// where they are.
    left: HashMap<VmId, Generation>,
    /// What is kept, the oldest first.
    kept: VecDeque<Kept>,
    /// Where the pages of machines that come are marked.
    coming: HashMap<VmId, (MigrationId, File)>,
    /// Those of machines that are here.
    marks: HashMap<VmId, Marks>,
}

/// The substrate whose sealed memory a machine was a copy of, and its content.
pub(super) type Under = (SubstrateId, Hash);

/// The memory of a machine that has left.
#[derive(Debug)]
struct Kept {
    visit: Visit,
    path: PathBuf,
    bytes: u64,
    /// Where the pages are that are not in the file, of a machine of which only its own are.
    under: Option<Under>,
    /// More than one while a relay reads it.
    users: Arc<()>,
}

impl Kept {
    fn in_use(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }
}

/// The marks of a machine that came from a site, under a generation.
#[derive(Debug)]
struct Marks {
    generation: Generation,
    from: Name,
    list: File,
}

/// What a relay is lent of a visit, until this is dropped.
#[derive(Debug)]
pub(super) struct Lent {
    pub(super) visit: Visit,
    pub(super) file: File,
    /// The sealed memory whose pages are those that are not in `file`.
    pub(super) under: Option<OpenMemory>,
    _in_use: Arc<()>,
}

impl Visits {
    /// None yet, of at most `budget` bytes in `dir`, which is emptied.
    pub(super) fn open(dir: PathBuf, budget: u64) -> Result<Self, Fault> {
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Fault::io("emptying", &dir, &e));
            }
            _ => {}
        }
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(|e| Fault::io("making", &dir, &e))?;
        Ok(Self { dir, budget, inner: Mutex::default(), entering: Mutex::default() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine has left whole and stands still: it has `generation` where it is.
    pub(super) fn left(&self, vm: VmId, generation: Generation) {
        if self.budget > 0 {
            self.inner().left.insert(vm, generation);
        }
    }

    /// Whether a machine has left whole for that generation, so that its memory may be kept.
    pub(super) fn has_left(&self, vm: VmId, generation: Generation) -> bool {
        self.inner().left.get(&vm) == Some(&generation)
    }

    /// Keeps the memory of a machine that has left and whose QEMU has ended, out of its file at `ram`,
    /// if it left whole for that generation. No more than `room` bytes are kept in all then.
    pub(super) fn keep(
        self: &Arc<Self>,
        (vm, generation): (VmId, Generation),
        ram: &Path,
        room: u64,
    ) {
        if !self.has_left(vm, generation) || !ram.exists() {
            return;
        }
        match free_zeros(ram) {
            Ok(bytes) => {
                let visit = Visit { vm, generation };
                self.enter((visit, None), bytes, room, |path| take_over(ram, path));
            }
            Err(error) => warn!(%vm, %error, "its memory is not kept"),
        }
    }

    /// As [`Visits::keep`], of a machine that shares the memory `under` it and whose QEMU stands still:
    /// the pages that are its own.
    pub(super) fn keep_own(
        self: &Arc<Self>,
        (vm, generation): (VmId, Generation),
        (memory, under): (&MemoryReader, Option<Under>),
        room: u64,
    ) {
        if !self.has_left(vm, generation) {
            return;
        }
        let own = match memory.written_pages() {
            Ok(Some(own)) => own,
            Ok(None) => return,
            Err(error) => return warn!(%vm, %error, "its own pages are not kept"),
        };
        let visit = Visit { vm, generation };
        let bytes = own.len() as u64 * PAGE_SIZE as u64;
        self.enter((visit, under), bytes, room, |path| copy_pages(memory, &own, path));
    }

    /// Keeps a visit of `bytes`, which `make` puts at a path.
    fn enter(
        self: &Arc<Self>,
        (visit, under): (Visit, Option<Under>),
        bytes: u64,
        room: u64,
        make: impl FnOnce(&Path) -> std::io::Result<()>,
    ) {
        let (vm, generation, most) = (visit.vm, visit.generation, room.min(self.budget));
        let _one = self.entering.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner().left.remove(&vm);
        self.forget_kept(vm);
        self.fit(most.saturating_sub(bytes));
        // What relays read stays.
        if self.bytes().saturating_add(bytes) > most {
            info!(%vm, bytes, most, "its memory is not kept");
            return;
        }
        let path = self.dir.join(format!("{}.mem", vm.0.simple()));
        if let Err(error) = make(&path) {
            warn!(%vm, %error, "its memory is not kept");
            let _ = std::fs::remove_file(&path);
            return;
        }
        info!(%vm, bytes, "its memory is kept until it comes back");
        self.inner().kept.push_back(Kept { visit, path, bytes, under, users: Arc::default() });
        let me = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(KEPT_FOR).await;
            if let Some(me) = me.upgrade() {
                me.drop_kept(|k| k.visit.vm == vm && k.visit.generation == generation);
            }
        });
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.inner().kept.iter().map(|k| k.bytes).sum()
    }

    /// The machines of which memory is kept.
    pub(super) fn machines(&self) -> Vec<VmId> {
        self.inner().kept.iter().map(|k| k.visit.vm).collect()
    }

    /// Drops what was kept first until `bytes` are free; how many came free. What a relay reads
    /// stays.
    pub(super) fn free(&self, bytes: u64) -> u64 {
        let mut freed = 0;
        self.drop_kept(|k| {
            let goes = freed < bytes && !k.in_use();
            freed += if goes { k.bytes } else { 0 };
            goes
        });
        freed
    }

    /// As [`Visits::free`], until no more than `bytes` are kept.
    pub(super) fn fit(&self, bytes: u64) {
        self.free(self.bytes().saturating_sub(bytes));
    }

    fn forget_kept(&self, vm: VmId) {
        self.drop_kept(|k| k.visit.vm == vm);
    }

    fn drop_kept(&self, mut goes: impl FnMut(&Kept) -> bool) {
        self.inner().kept.retain(|kept| {
            let goes = goes(kept);
            if goes && let Err(error) = std::fs::remove_file(&kept.path) {
                warn!(path = %kept.path.display(), %error, "kept memory is not removed");
            }
            !goes
        });
    }

    /// A machine is gone for good, or nothing of what is known of its visits is to be used.
    pub(super) fn forget(&self, vm: VmId) {
        self.forget_kept(vm);
        self.gone(vm);
    }

    /// A machine is not here any more: what is known of where it came from is of no use.
    pub(super) fn gone(&self, vm: VmId) {
        let mut inner = self.inner();
        inner.left.remove(&vm);
        inner.coming.remove(&vm);
        inner.marks.remove(&vm);
    }

    /// The substrate under what was kept of a machine.
    pub(super) fn under(&self, vm: VmId) -> Option<SubstrateId> {
        let inner = self.inner();
        let kept = inner.kept.iter().find(|k| k.visit.vm == vm)?;
        kept.under.map(|(id, _)| id)
    }

    /// What was kept of a machine that comes back, for its relay, and what is to be opened under it.
    pub(super) fn lend(&self, vm: VmId) -> Option<(Lent, Option<Under>)> {
        let inner = self.inner();
        let kept = inner.kept.iter().find(|k| k.visit.vm == vm)?;
        let file = File::open(&kept.path)
            .inspect_err(|error| warn!(%vm, %error, "what was kept of it is of no use"))
            .ok()?;
        let (visit, _in_use) = (kept.visit.clone(), Arc::clone(&kept.users));
        Some((Lent { visit, file, under: None, _in_use }, kept.under))
    }

    /// The marks of a machine that goes back to the site `to` from which it came.
    pub(super) fn marks(&self, vm: VmId, to: &Name) -> Option<(Visit, File)> {
        let inner = self.inner();
        let marks = inner.marks.get(&vm).filter(|m| m.from == *to)?;
        let visit = Visit { vm, generation: marks.generation };
        Some((visit, marks.list.try_clone().ok()?))
    }

    /// Where the relay of a machine that comes is to mark its pages.
    pub(super) fn comes(&self, vm: VmId, migration: MigrationId, memory: Mib) -> Option<File> {
        let bytes = marks_bytes(memory.bytes())?;
        let made = || {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let fd = rustix::fs::memfd_create(c"marks", flags)?;
            rustix::fs::ftruncate(&fd, bytes)?;
            rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK)?;
            let file = File::from(fd);
            Ok::<_, std::io::Error>((file.try_clone()?, file))
        };
        let failed = |error: &_| warn!(%vm, %error, "its pages are not marked");
        let (file, given) = made().inspect_err(failed).ok()?;
        self.inner().coming.insert(vm, (migration, file));
        Some(given)
    }

    /// A machine has come from the site `from` and is whole: what was kept of it here is of no use any
    /// more, and its marks are, if all of it came by one relay.
    pub(super) fn arrived(
        &self,
        (vm, generation): (VmId, Generation),
        (migration, from): (MigrationId, &Name),
        by_one_relay: bool,
    ) {
        self.forget_kept(vm);
        let mut inner = self.inner();
        inner.marks.remove(&vm);
        let Some((of, list)) = inner.coming.remove(&vm) else { return };
        // Its relay writes no more; whatever is in it, it stays that.
        let sealed = rustix::fs::fcntl_add_seals(&list, SealFlags::WRITE | SealFlags::SEAL);
        if of == migration && by_one_relay && sealed.is_ok() {
            inner.marks.insert(vm, Marks { generation, from: from.clone(), list });
        }
    }
}

/// Makes holes of a memory file's zero pages, which QEMU has touched as it read them; the bytes that it
/// takes then.
fn free_zeros(ram: &Path) -> std::io::Result<u64> {
    let file = File::options().read(true).write(true).open(ram)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (len, mut at) = (file.metadata()?.len(), 0);
    let mut buffer = vec![0; COPIED_AT_ONCE * PAGE_SIZE];
    while at < len {
        let part = &mut buffer[..(len - at).min((COPIED_AT_ONCE * PAGE_SIZE) as u64) as usize];
        file.read_exact_at(part, at)?;
        let mut first = at;
        let alike = |a: &&[u8], b: &&[u8]| is_zero(a) == is_zero(b);
        let pages: Vec<&[u8]> = part.chunks(PAGE_SIZE).collect();
        for run in pages.chunk_by(alike) {
            let bytes = run.iter().map(|page| page.len() as u64).sum();
            if is_zero(run[0]) {
                rustix::fs::fallocate(&file, punch, first, bytes)?;
            }
            first += bytes;
        }
        at = first;
    }
    Ok(file.metadata()?.blocks() * 512)
}

/// Makes a machine's memory file at `ram` ours at `path`: the uid under which its QEMU ran will be
/// another's.
fn take_over(ram: &Path, path: &Path) -> std::io::Result<()> {
    let file = File::open(ram)?;
    let (me, group) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(&file, Some(me), Some(group))?;
    file.set_permissions(Permissions::from_mode(0o400))?;
    std::fs::rename(ram, path)
}

/// Writes these pages of a machine's memory to a file at `path`, each at its place.
fn copy_pages(memory: &MemoryReader, pages: &[u64], path: &Path) -> std::io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o400).open(path)?;
    file.set_len(memory.len())?;
    let mut buffer = vec![0; COPIED_AT_ONCE * PAGE_SIZE];
    let follows = |a: &u64, b: &u64| a + 1 == *b;
    for run in pages.chunk_by(follows).flat_map(|run| run.chunks(COPIED_AT_ONCE)) {
        let (at, part) = (run[0] * PAGE_SIZE as u64, &mut buffer[..run.len() * PAGE_SIZE]);
        memory.read_at(at, part)?;
        file.write_all_at(part, at)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u64 = 1 << 20;

    struct Place {
        visits: Arc<Visits>,
        dir: tempfile::TempDir,
    }

    fn place(budget: u64) -> Place {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
        let visits = Visits::open(dir.path().join("visits"), budget).expect("opened");
        Place { visits: Arc::new(visits), dir }
    }

    impl Place {
        /// A machine with 1 MiB of content that has left for generation 7.
        fn leave(&self) -> VmId {
            let (vm, ram) = (VmId::new(), self.dir.path().join("ram"));
            std::fs::write(&ram, [vec![7; ONE as usize], vec![0; ONE as usize]].concat())
                .expect("written");
            self.visits.left(vm, Generation(7));
            self.visits.keep((vm, Generation(7)), &ram, u64::MAX);
            vm
        }

        fn files(&self) -> usize {
            std::fs::read_dir(self.dir.path().join("visits")).expect("a directory").count()
        }
    }

    #[tokio::test]
    async fn what_was_kept_first_goes_first_and_what_is_read_stays() {
        let place = place(2 * ONE);
        let (a, b) = (place.leave(), place.leave());
        assert_eq!((place.visits.machines(), place.files()), (vec![a, b], 2));
        let (lent, under) = place.visits.lend(a).expect("kept");
        assert_eq!(under, None, "it is whole");
        let mut zeros = vec![1; ONE as usize];
        lent.file.read_exact_at(&mut zeros, ONE).expect("read");
        assert_eq!(zeros, vec![0; ONE as usize]);
        assert_eq!(lent.visit, Visit { vm: a, generation: Generation(7) });
        let c = place.leave();
        assert_eq!(place.visits.machines(), [a, c], "a is read");
        drop(lent);
        assert_eq!(place.visits.free(1), ONE);
        assert_eq!((place.visits.machines(), place.files()), (vec![c], 1));
        place.visits.fit(ONE);
        assert_eq!(place.visits.bytes(), ONE);
        place.visits.forget(c);
        assert_eq!((place.visits.bytes(), place.files()), (0, 0));
        place.leave();
        let again = Visits::open(place.dir.path().join("visits"), ONE).expect("opened");
        assert_eq!((again.bytes(), place.files()), (0, 0), "nothing outlives the daemon");
    }

    #[tokio::test]
    async fn nothing_is_kept_of_who_did_not_leave_whole_or_has_no_room() {
        let place = place(ONE);
        let ram = place.dir.path().join("ram");
        std::fs::write(&ram, vec![7; ONE as usize]).expect("written");
        let vm = VmId::new();
        place.visits.keep((vm, Generation(7)), &ram, u64::MAX);
        place.visits.left(vm, Generation(6));
        place.visits.keep((vm, Generation(7)), &ram, u64::MAX);
        place.visits.left(vm, Generation(7));
        place.visits.keep((vm, Generation(7)), &ram, ONE - 1);
        assert_eq!((place.visits.bytes(), place.files()), (0, 0));
        assert!(ram.exists(), "it is not this one's to remove");
        let none = super::tests::place(0);
        none.leave();
        assert_eq!((none.visits.bytes(), none.files()), (0, 0));
    }

    #[tokio::test]
    async fn marks_are_of_one_move_and_for_the_site_it_came_from() {
        let place = place(ONE);
        let (vm, id) = (VmId::new(), MigrationId::new());
        let [cafe, bar]: [Name; 2] = ["cafe", "bar"].map(|n| n.parse().expect("name"));
        let visits = &place.visits;
        let list = visits.comes(vm, id, Mib(1)).expect("made");
        list.write_all_at(&[9; 16], 16).expect("written");
        list.write_all_at(&[9], 256 * 16).expect_err("beyond its end");
        assert!(visits.marks(vm, &cafe).is_none(), "it comes");
        visits.arrived((vm, Generation(3)), (id, &cafe), true);
        list.write_all_at(&[8; 16], 16).expect_err("it is as it was");
        let (visit, marks) = visits.marks(vm, &cafe).expect("it came from there");
        assert_eq!(visit, Visit { vm, generation: Generation(3) });
        assert_eq!(marks.metadata().expect("open").len(), 256 * 16);
        assert!(visits.marks(vm, &bar).is_none());
        for (of, whole) in [(MigrationId::new(), true), (id, false)] {
            visits.comes(vm, id, Mib(1)).expect("made");
            visits.arrived((vm, Generation(4)), (of, &cafe), whole);
            assert!(visits.marks(vm, &cafe).is_none());
        }
    }
}
