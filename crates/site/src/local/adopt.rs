//! What a daemon finds when it starts: machines that run on, those that were in the midst of a
//! change, and what is left of those that nobody knows.
//!
//! ```text
//! record     | QEMU  |
//! -----------+-------+---------------------------------------------------------------
//! good       | alive | adopted
//!   activating       | ended, all of it removed: nobody was told that it runs
//!   docking          | the pool has its substrate: ended and removed; else it runs on
//! good       | none  | stopped, or failed
//! damaged    | any   | failed; can only be deleted
//! none       | alive | ended, with its sockets and its memory
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{MacAddress, Machine, started_below};
use godwit_types::{Arch, Fault, Hash, Mib, Name, VmId, chain};

use super::allowed::First;
use super::entry::Entry;
use super::owner::{Ask, Owned, Owner};
use super::record::{DesiredState, DiskBase, MachineRecord, Unfinished};
use super::{LocalSite, SiteDirs};
use crate::UNKNOWN_GENERATION;

/// How long a machine in a move may take to be adopted before the site serves without it.
const ADOPT_WITHIN: Duration = Duration::from_secs(20);
/// The pause between two tries to adopt one that answers nobody.
const ADOPT_AGAIN: Duration = Duration::from_secs(2);

impl LocalSite {
    /// Takes over the machines that an earlier daemon left.
    pub(super) async fn adopt_all(self: &Arc<Self>) -> Result<(), Fault> {
        let dir = self.parts.dirs.data.join("vms");
        let list = std::fs::read_dir(&dir).map_err(|e| Fault::io("reading", &dir, &e))?;
        for item in list.flatten() {
            let path = item.path();
            let Some(vm) = vm_of(&item.file_name()) else {
                tracing::warn!(path = %path.display(), "no machine's directory is left alone");
                continue;
            };
            match MachineRecord::load(&path) {
                Ok(Some(record)) if record.vm == vm => self.adopt(record).await?,
                Ok(Some(_)) => self.adopt_damaged(vm, "it is another machine's").await,
                Ok(None) => {
                    // A machine that was being made when the daemon died: nothing knows it yet.
                    tracing::warn!(path = %path.display(), "removing an unfinished machine");
                    self.forget(vm).await;
                }
                Err(f) => self.adopt_damaged(vm, &f.message).await,
            }
        }
        self.moves.sweep().await;
        Ok(())
    }

    async fn adopt(self: &Arc<Self>, mut record: MachineRecord) -> Result<(), Fault> {
        let vm = record.vm;
        if record.desired == DesiredState::Gone {
            // Tombstones were records once.
            self.parts.machines.leaves(vm, record.generation)?;
        }
        if let Some(seen) = self.parts.machines.left(vm)
            && record.generation <= seen
        {
            if record.desired != DesiredState::Gone {
                tracing::warn!(vm = %record.name, %seen, "it has left at a later generation: removed");
            }
            self.forget(vm).await;
            return Ok(());
        }
        match record.unfinished {
            Some(Unfinished::Activating) => {
                tracing::warn!(vm = %record.name, "its activation broke off: removed");
                self.forget(vm).await;
                return Ok(());
            }
            Some(Unfinished::Docking { substrate, .. })
                if self.parts.substrates.has(substrate).await =>
            {
                tracing::info!(vm = %record.name, %substrate, "it was docked: removed");
                self.parts.machines.leaves(vm, record.generation)?;
                self.forget(vm).await;
                return Ok(());
            }
            Some(Unfinished::Docking { .. }) | None => {}
        }
        if record.migration.is_none() {
            // Left of an arrival that had ended when the daemon did.
            self.moves.arrivals.sweep(&record);
        }
        let run = self.parts.dirs.vm_run(vm);
        let moves = record.migration.is_some() && Machine::recorded(&run).is_some();
        let adopted = if moves {
            // One that waits for a page of its memory answers nobody until it has come.
            tokio::time::timeout(ADOPT_WITHIN, Machine::adopt(&run)).await.ok()
        } else {
            Some(Machine::adopt(&run).await)
        };
        let silent = moves && !matches!(adopted, Some(Ok(_)));
        let machine = match adopted {
            Some(Ok(m)) => Some(m),
            Some(Err(e)) => {
                tracing::debug!(vm = %record.name, error = %chain(&e), "not running");
                None
            }
            None => None,
        };
        if let DiskBase::Substrate(id) = record.disk_base {
            self.parts.substrates.pool.note_clone(id, vm);
        }
        if machine.is_none() && record.unfinished.take().is_some() {
            record.reason = Some("its QEMU ended while it was being docked".into());
            record.save(&self.parts.dirs.vm(vm))?;
        }
        let entry = Entry::new(record.clone(), machine.clone());
        self.parts.machines.insert(vm, entry).await;
        let Some(machine) = machine else {
            if silent {
                self.adopt_later(record);
            } else {
                self.moves.resume_after_restart(record, None).await;
            }
            return Ok(());
        };
        tracing::info!(vm = %record.name, pid = machine.process().pid, "adopted");
        if let Some(Unfinished::Docking { substrate, .. }) = record.unfinished {
            self.docks.bring_back(vm, substrate);
        } else if record.migration.is_some() {
            self.moves.resume_after_restart(record, Some(machine)).await;
        }
        Ok(())
    }

    /// Adopts a machine in a move once its QEMU answers, or finds it gone.
    fn adopt_later(self: &Arc<Self>, record: MachineRecord) {
        let me = Arc::clone(self);
        tokio::spawn(async move {
            let run = me.parts.dirs.vm_run(record.vm);
            while Machine::recorded(&run).is_some() {
                let Ok(machine) = Machine::adopt(&run).await else {
                    tokio::time::sleep(ADOPT_AGAIN).await;
                    continue;
                };
                let Ok(owner) = me.parts.machines.owner(record.vm).await else { return };
                let Ok(Some(now)) = owner.ask(AdoptedLate { machine: machine.clone() }).await
                else {
                    return;
                };
                tracing::info!(vm = %record.name, "adopted late");
                return me.moves.resume_after_restart(now, Some(machine)).await;
            }
            me.moves.resume_after_restart(record, None).await;
        });
    }

    /// A machine whose record cannot be read: its QEMU is let alone, so that it can still be
    /// looked at, and nothing but its deletion changes it.
    async fn adopt_damaged(&self, vm: VmId, why: &str) {
        tracing::error!(%vm, why, "the record of a machine is damaged");
        let machine = Machine::adopt(&self.parts.dirs.vm_run(vm)).await.ok();
        let launch = machine.as_ref().map(Machine::launch);
        let unknown = || Name::new("unknown").unwrap_or_else(|_| unreachable!("letters"));
        let record = MachineRecord {
            vm,
            name: launch.as_ref().map_or_else(unknown, |l| l.name.clone()),
            generation: UNKNOWN_GENERATION,
            warrant: None,
            desired: DesiredState::Running,
            image: unknown(),
            image_hash: Hash::of(b""),
            substrate: None,
            arch: launch.as_ref().map_or(Arch::X86_64, |l| l.spec.arch),
            memory: launch.as_ref().map_or(Mib(0), |l| l.spec.memory),
            vcpus: launch.as_ref().map_or(0, |l| l.spec.vcpus),
            mac: MacAddress([0; 6]),
            disk_base: DiskBase::Image,
            migration: None,
            reason: Some(format!("its record is damaged: {why}")),
            unfinished: None,
            attachment: None,
            published: Vec::new(),
            back: None,
        };
        self.parts.machines.insert(vm, Entry::new(record, machine)).await;
    }

    /// Ends a machine that is in no list, and removes all that it has.
    async fn forget(&self, vm: VmId) {
        if let Ok(m) = Machine::adopt(&self.parts.dirs.vm_run(vm)).await {
            m.kill().await;
        }
        end_strays(&self.parts.dirs, vm).await;
        self.parts.machines.clear(vm);
    }

    /// Ends every QEMU of this site that no record names, and removes sockets and memory files of
    /// machines that are not here.
    pub(super) async fn sweep_strays(&self) {
        let mut known = Vec::new();
        for e in self.parts.machines.all().await.iter().map(Owner::now) {
            known.extend(e.machine.as_ref().map(|m| m.process().clone()));
            // One that did not answer may still come to.
            known.extend(Machine::recorded(&self.parts.dirs.vm_run(e.record.vm)));
        }
        let strays = started_below(&[&self.parts.dirs.run, &self.parts.dirs.memory]);
        for p in strays.into_iter().filter(|p| !known.contains(p)) {
            tracing::warn!(pid = p.pid, "ending a QEMU that no record names");
            p.kill();
            p.ended().await;
        }
        for dir in [&self.parts.dirs.run, &self.parts.dirs.memory] {
            for item in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let Some(vm) = vm_of(&item.file_name()) else { continue };
                if self.parts.machines.owner_if_here(vm).await.is_none() {
                    tracing::warn!(path = %item.path().display(), "left by no machine: removed");
                    remove(&item.path());
                }
            }
        }
    }
}

/// The QEMU of a machine in a move, which answered nobody at first, does. Gives its record, if it is
/// still in its move.
struct AdoptedLate {
    machine: Machine,
}

impl Ask for AdoptedLate {
    type Reply = Option<MachineRecord>;
    const STEP: &'static str = "owner.adopted-late";

    async fn answer(self, e: &mut Owned, _: First) -> Result<Option<MachineRecord>, Fault> {
        if e.machine.is_some() || e.record.migration.is_none() {
            return Ok(None);
        }
        e.machine = Some(self.machine);
        Ok(Some(e.record.clone()))
    }
}

/// Ends every QEMU of a machine, also one that does not answer.
pub(super) async fn end_strays(dirs: &SiteDirs, vm: VmId) {
    let run = dirs.vm_run(vm);
    let named = Machine::recorded(&run);
    for p in started_below(&[&run]).into_iter().chain(named) {
        tracing::warn!(%vm, pid = p.pid, "ending a QEMU that is in the way");
        p.kill();
        p.ended().await;
    }
}

fn remove(path: &Path) {
    let is_dir = std::fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
    let removed = if is_dir { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "not removed");
    }
}

/// The machine whose directory or file has this name.
fn vm_of(name: &std::ffi::OsStr) -> Option<VmId> {
    let name = name.to_str().filter(|n| n.len() == 32)?;
    uuid::Uuid::try_parse(name).ok().map(VmId)
}
