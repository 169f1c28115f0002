//! The machines that are at a site, and those that have left it for good.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_qemu::Machine;
use godwit_substrate::AsyncPool;
use godwit_types::{Fault, Generation, Mib, Name, SubstrateId, VmId};
use tokio::sync::{Mutex, MutexGuard, Notify, RwLock};
use tokio_util::sync::CancellationToken;

use super::SiteDirs;
use super::allowed::{Action, Activity, First, Refusal};
use super::dirs::remove_file;
use super::entry::{Doing, Entry};
use super::net::check_place;
use super::owner::{Look, Needs, Owner};
use super::ports;
use super::record::{DesiredState, DiskBase, MachineRecord};
use super::tombs::Tombs;
use super::visits::Visits;

/// Every machine by its id.
type All = BTreeMap<VmId, Owner>;

/// The machines of one site, each with an owner of its own, and what they are promised.
pub(super) struct Machines {
    pub(super) site: Name,
    pub(super) dirs: SiteDirs,
    pub(super) pool: AsyncPool,
    all: RwLock<All>,
    tombs: Tombs,
    /// One promise of memory at a time, until its machine is entered.
    promising: Mutex<()>,
    /// Bytes of memory that may be promised; what the host has, less a reserve, when left out.
    pub(super) promise_bytes: Option<u64>,
    /// What is kept of those that have left.
    pub(super) visits: Arc<Visits>,
    /// Told when other ports of the host lead to one of them.
    pub(super) ports_changed: Arc<Notify>,
}

impl Machines {
    /// None yet; those that have left are read.
    pub(super) fn open(
        site: Name,
        dirs: SiteDirs,
        pool: AsyncPool,
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
            promise_bytes,
            visits,
            ports_changed: Arc::default(),
        })
    }

    /// All of them at this moment.
    pub(super) async fn all(&self) -> Vec<Owner> {
        self.all.read().await.values().cloned().collect()
    }

    /// Adopts a machine that is here.
    pub(super) async fn insert(&self, vm: VmId, entry: Entry) {
        let owner = self.begin(vm, entry);
        self.all.write().await.insert(vm, owner);
    }

    fn begin(&self, vm: VmId, entry: Entry) -> Owner {
        let owner = Owner::begin(self.site.clone(), self.dirs.vm(vm), entry);
        ports::watch(owner.watch(), Arc::clone(&self.ports_changed));
        owner
    }

    /// At which generation a machine left for good, if it did.
    pub(super) fn left(&self, vm: VmId) -> Option<Generation> {
        self.tombs.get(vm)
    }

    /// Writes down that a machine has left at that generation.
    pub(super) fn leaves(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        self.tombs.add(vm, generation)
    }

    /// Nothing is promised, and nothing kept, while this is held.
    pub(super) async fn promising(&self) -> MutexGuard<'_, ()> {
        self.promising.lock().await
    }

    /// Promises a machine that is here its memory. What is returned is kept until its record says
    /// so: nobody who makes a promise waits for a machine.
    pub(super) async fn promise(&self, vm: VmId, memory: Mib) -> Result<MutexGuard<'_, ()>, Fault> {
        let one = self.promising().await;
        self.check_promise(vm, memory).await?;
        Ok(one)
    }

    /// The owner of a machine that is here.
    pub(super) async fn owner(&self, vm: VmId) -> Result<Owner, Fault> {
        self.owner_if_here(vm).await.ok_or_else(|| self.not_here(vm))
    }

    /// As [`Machines::owner`]; `None` when there is no such machine.
    pub(super) async fn owner_if_here(&self, vm: VmId) -> Option<Owner> {
        self.all.read().await.get(&vm).cloned()
    }

    pub(super) fn not_here(&self, vm: VmId) -> Fault {
        Fault::not_found(format!("site '{}' does not have machine {vm}", self.site))
            .hint("see where it runs: godwit vm list")
    }

    /// A machine's QEMU, if its state allows `action`, which changes nothing of it. One that is being
    /// docked is waited for where that matters.
    pub(super) async fn qemu_for(&self, vm: VmId, action: Action) -> Result<Machine, Fault> {
        let owner = self.owner(vm).await?;
        let mut e = owner.now();
        if e.state(&self.site).allows(action)? == First::Docking {
            e = owner.wait_for(|e| e.doing.activity() != Activity::Docking).await;
            let _ = e.state(&self.site).allows(action)?;
        }
        e.machine.ok_or_else(|| Refusal::NotRunning(e.record.name).into())
    }

    /// Enters a machine that is being made, and promises it its memory; nobody else can make it
    /// meanwhile. No machine is waited for while the list of all is locked, or a promise is being
    /// made.
    pub(super) async fn register(
        &self,
        record: MachineRecord,
        doing: Doing,
    ) -> Result<Owner, Fault> {
        let (vm, generation) = (record.vm, record.generation);
        let there = {
            let _one = self.promise(vm, record.memory).await?;
            let mut all = self.all.write().await;
            match all.get(&vm) {
                Some(there) => there.clone(),
                None => {
                    // One that left at this generation or a later one does not come back by it.
                    if let Some(seen) = self.tombs.get(vm)
                        && generation <= seen
                    {
                        let (machine, site) = (record.name.to_string(), self.site.clone());
                        return Err(Refusal::Left { machine, site, seen, given: generation }.into());
                    }
                    check_place(&record, all.values().map(|owner| owner.now().record))?;
                    let owner = self.begin(vm, Entry { doing, ..Entry::new(record, None) });
                    all.insert(vm, owner.clone());
                    return Ok(owner);
                }
            }
        };
        let needs = Some(Needs::known(Action::Arrive, generation));
        there.ask(Look { needs }).await.map(|_| there)
    }

    /// As [`Machines::register`], a machine that starts until it has started; what is also
    /// returned is cancelled once it is not wanted any more.
    pub(super) async fn register_starting(
        &self,
        record: MachineRecord,
    ) -> Result<(Owner, CancellationToken), Fault> {
        let mut doing = Doing::Nothing;
        let wanted = doing.start();
        let owner = self.register(record, doing).await?;
        Ok((owner, wanted))
    }

    /// Takes back [`Machines::register`] with all files; what is known of earlier generations stays.
    pub(super) async fn unregister(&self, vm: VmId) {
        self.clear(vm);
        self.delist(vm).await;
    }

    /// Takes a machine off the list of all.
    pub(super) async fn delist(&self, vm: VmId) {
        self.all.write().await.remove(&vm);
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

    /// The machines that are here.
    pub(super) async fn entries(&self) -> Vec<Entry> {
        let all = self.all().await.into_iter().map(|owner| owner.now());
        all.filter(|e| e.record.desired != DesiredState::Gone).collect()
    }

    /// Their records.
    pub(super) async fn records(&self) -> Vec<MachineRecord> {
        self.entries().await.into_iter().map(|e| e.record).collect()
    }

    /// The machines whose disk stands on a substrate. One that came from it and has moved or was
    /// merged since is none of them.
    pub(super) async fn substrate_users(&self, id: SubstrateId) -> Vec<Name> {
        let all = self.records().await.into_iter();
        all.filter(|r| r.disk_base == DiskBase::Substrate(id)).map(|r| r.name).collect()
    }
}
