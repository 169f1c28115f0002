//! The machines that are at a site, and those that have left it for good.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use godwit_qemu::Machine;
use godwit_substrate::Pool;
use godwit_types::{Fault, Generation, Mib, Name, SubstrateId, VmId};
use tokio::sync::{Mutex, MutexGuard, RwLock};
use tokio_util::sync::CancellationToken;

use super::SiteDirs;
use super::allowed::{Action, Refusal};
use super::entry::{Doing, Entry};
use super::machines::remove_file;
use super::record::{DesiredState, DiskBase, MachineRecord};
use super::tombs::Tombs;
use super::visits::Visits;

/// Every machine by its id.
pub(super) type All = BTreeMap<VmId, Arc<Mutex<Entry>>>;

/// The machines of one site, each under a lock of its own, and what they are promised.
pub(super) struct Machines {
    pub(super) site: Name,
    pub(super) dirs: SiteDirs,
    pub(super) pool: Pool,
    all: RwLock<All>,
    tombs: Tombs,
    /// One promise of memory at a time, until its machine is entered.
    promising: Mutex<()>,
    /// The memory of machines made by this daemon: their records may not be written yet.
    pub(super) sizes: std::sync::Mutex<HashMap<VmId, Mib>>,
    /// Bytes of memory that may be promised; what the host has, less a reserve, when left out.
    pub(super) promise_bytes: Option<u64>,
    /// What is kept of those that have left.
    pub(super) visits: Arc<Visits>,
}

impl Machines {
    /// None yet; those that have left are read.
    pub(super) fn open(
        site: Name,
        dirs: SiteDirs,
        pool: Pool,
        (promise_bytes, visits): (Option<u64>, Arc<Visits>),
    ) -> Result<Self, Fault> {
        let tombs = Tombs::open(dirs.tombs())?;
        Ok(Self {
            site,
            dirs,
            pool,
            all: RwLock::default(),
            tombs,
            promising: Mutex::default(),
            sizes: std::sync::Mutex::default(),
            promise_bytes,
            visits,
        })
    }

    /// All of them at this moment.
    pub(super) async fn now(&self) -> Vec<(VmId, Arc<Mutex<Entry>>)> {
        self.all.read().await.iter().map(|(vm, e)| (*vm, Arc::clone(e))).collect()
    }

    /// Adopts a machine that is here.
    pub(super) async fn insert(&self, vm: VmId, entry: Entry) {
        self.all.write().await.insert(vm, Arc::new(Mutex::new(entry)));
    }

    /// At which generation a machine left for good, if it did.
    pub(super) fn left(&self, vm: VmId) -> Option<Generation> {
        self.tombs.get(vm)
    }

    /// Writes down that a machine has left at that generation.
    pub(super) fn leaves(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.tombs.add(vm, generation)
    }

    /// Promises a machine that is here its memory. What is returned is kept until its record says
    /// so: nobody who makes a promise waits for a machine's lock.
    pub(super) async fn promise(&self, vm: VmId, memory: Mib) -> Result<MutexGuard<'_, ()>, Fault> {
        let one = self.promising.lock().await;
        self.check_promise(vm, memory).await?;
        Ok(one)
    }

    pub(super) async fn entry(&self, vm: VmId) -> Result<Arc<Mutex<Entry>>, Fault> {
        self.entry_if_here(vm).await.ok_or_else(|| self.not_here(vm))
    }

    pub(super) async fn entry_if_here(&self, vm: VmId) -> Option<Arc<Mutex<Entry>>> {
        self.all.read().await.get(&vm).cloned()
    }

    pub(super) fn not_here(&self, vm: VmId) -> Fault {
        Fault::not_found(format!("site '{}' does not have machine {vm}", self.site))
            .hint("see where it runs: godwit vm list")
    }

    /// A machine's QEMU, if its state allows `action`, which changes nothing of it.
    pub(super) async fn qemu_for(&self, vm: VmId, action: Action) -> Result<Machine, Fault> {
        let entry = self.entry(vm).await?;
        let e = entry.lock().await;
        let _ = e.state(&self.site).allows(action)?;
        let machine = e.machine.clone();
        machine.ok_or_else(|| Refusal::NotRunning(e.record.name.clone()).into())
    }

    /// Enters a machine that is being made, and promises it its memory; nobody else can make it
    /// meanwhile. No machine's lock is waited for while the list of all is locked, or a promise is
    /// being made.
    pub(super) async fn register(
        &self,
        record: MachineRecord,
        doing: Doing,
    ) -> Result<Arc<Mutex<Entry>>, Fault> {
        let entry = Arc::new(Mutex::new(Entry { doing, ..Entry::new(record.clone(), None) }));
        let there = {
            let _one = self.promise(record.vm, record.memory).await?;
            let mut all = self.all.write().await;
            match all.get(&record.vm) {
                Some(e) => Some(Arc::clone(e)),
                None => {
                    // One that left at this generation or a later one does not come back by it.
                    if let Some(seen) = self.tombs.get(record.vm)
                        && record.generation <= seen
                    {
                        let (machine, site) = (record.name.to_string(), self.site.clone());
                        let given = record.generation;
                        return Err(Refusal::Left { machine, site, seen, given }.into());
                    }
                    all.insert(record.vm, Arc::clone(&entry));
                    self.remember_size(record.vm, record.memory);
                    None
                }
            }
        };
        let Some(there) = there else { return Ok(entry) };
        let state = there.lock().await.state(&self.site);
        state.fence(record.generation)?;
        let _ = state.allows(Action::Arrive)?;
        Ok(there)
    }

    /// As [`Machines::register`], a machine that starts until it has started; what is also
    /// returned is cancelled once it is not wanted any more.
    pub(super) async fn register_starting(
        &self,
        record: MachineRecord,
    ) -> Result<(Arc<Mutex<Entry>>, CancellationToken), Fault> {
        let mut doing = Doing::Nothing;
        let wanted = doing.start();
        let entry = self.register(record, doing).await?;
        Ok((entry, wanted))
    }

    /// Takes back [`Machines::register`] with all files; what is known of earlier generations stays.
    pub(super) async fn unregister(&self, vm: VmId) {
        self.clear(vm);
        self.delist(vm).await;
    }

    /// The start that was given `wanted` did not come about: as [`Machines::unregister`], unless
    /// somebody has removed the machine already, or has started it again since.
    pub(super) async fn withdraw(
        &self,
        entry: &Mutex<Entry>,
        vm: VmId,
        wanted: &CancellationToken,
    ) {
        let mut e = entry.lock().await;
        // Whoever cancels a start wants the machine off or gone; the next start wants it to run.
        let again = wanted.is_cancelled() && e.record.desired == DesiredState::Running;
        if e.doing.is_start_but(wanted) || again || e.record.desired == DesiredState::Gone {
            return;
        }
        e.record.desired = DesiredState::Gone;
        e.doing.cancel_start();
        self.unregister(vm).await;
    }

    /// Takes a machine off the list of all.
    pub(super) async fn delist(&self, vm: VmId) {
        self.all.write().await.remove(&vm);
        self.sizes().remove(&vm);
    }

    /// Removes every file of a machine. What cannot be removed is told in the log: nothing else
    /// depends on it.
    pub(super) fn clear(&self, vm: VmId) {
        for dir in [self.dirs.vm(vm), self.dirs.vm_run(vm)] {
            if let Err(e) = std::fs::remove_dir_all(&dir)
                && e.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %dir.display(), error = %e, "not removed");
            }
        }
        if let Err(f) = remove_file(&self.dirs.vm_memory(vm)) {
            tracing::warn!(error = %f, "not removed");
        }
    }

    /// Writes a machine's tombstone, removes all its files and forgets it; its QEMU has ended. When
    /// the tombstone can't be written the machine stays as it is.
    pub(super) async fn bury(&self, e: &mut Entry) -> Result<(), Fault> {
        self.tombs.add(e.record.vm, e.record.generation)?;
        e.record.desired = DesiredState::Gone;
        e.record.migration = None;
        self.pool.forget_clone(e.record.vm);
        self.visits.gone(e.record.vm);
        self.clear(e.record.vm);
        self.delist(e.record.vm).await;
        Ok(())
    }

    /// One that has left already may be removed again, by whoever knows of its last generation.
    pub(super) fn remove_again(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        match self.tombs.get(vm) {
            Some(seen) if generation < seen => {
                let (machine, site) = (vm.to_string(), self.site.clone());
                Err(Refusal::Left { machine, site, seen, given: generation }.into())
            }
            Some(_) => self.tombs.add(vm, generation),
            None => Err(self.not_here(vm)),
        }
    }

    /// The records of the machines that are here, as they are kept: nobody is waited for.
    pub(super) async fn kept_records(&self) -> Vec<MachineRecord> {
        let ids: Vec<_> = self.all.read().await.keys().copied().collect();
        let kept = ids.into_iter().filter_map(|vm| {
            // One that is being made has no record yet; it is refused what it needs when that is gone.
            MachineRecord::load(&self.dirs.vm(vm)).ok().flatten()
        });
        kept.filter(|r| r.desired != DesiredState::Gone).collect()
    }

    /// The machines whose disk stands on a substrate. One that came from it and has moved or was
    /// merged since is none of them.
    pub(super) async fn substrate_users(&self, id: SubstrateId) -> Vec<Name> {
        let all = self.kept_records().await.into_iter();
        all.filter(|r| r.disk_base == DiskBase::Substrate(id)).map(|r| r.name).collect()
    }
}
