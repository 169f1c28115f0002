//! One machine of a site as its daemon has it, and the one way to come to change it.

use std::sync::Weak;

use godwit_qemu::Machine;
use godwit_types::{Fault, Generation, Name, VmId};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::LocalSite;
use super::allowed::{Action, First, Qemu, State};
use super::record::MachineRecord;
use super::table::Machines;

/// One machine of this site. Its lock is held while something changes it, so that two requests
/// for one machine take turns.
pub(super) struct Entry {
    pub(super) record: MachineRecord,
    pub(super) machine: Option<Machine>,
    /// It is being started, without the lock; cancelled when it is not wanted any more.
    pub(super) starting: Option<CancellationToken>,
    /// Somebody waits, without the lock, for its guest to power itself off.
    pub(super) stopping: Weak<()>,
}

impl Entry {
    pub(super) fn new(record: MachineRecord, machine: Option<Machine>) -> Self {
        Self { record, machine, starting: None, stopping: Weak::new() }
    }

    /// Its state at `site`, whose QEMU was not asked.
    pub(super) fn state(&self, site: &Name) -> State {
        let display = self.machine.as_ref().is_some_and(|m| m.launch().spec.display);
        let qemu = if self.machine.is_some() { Qemu::There } else { Qemu::Gone };
        let changes = (self.starting.is_some(), self.stopping.strong_count() > 0);
        State::of(&self.record, site, changes, (qemu, display))
    }

    /// Whether it has a QEMU, or is about to.
    pub(super) fn takes_memory(&self) -> bool {
        self.machine.is_some() || self.starting.is_some() || self.record.migration.is_some()
    }
}

/// A machine that is locked for what was asked, and what has to end before that.
pub(super) type Admitted = (OwnedMutexGuard<Entry>, First);

impl Machines {
    /// A machine locked for `action`, if its state allows that to one who knows of `generation`;
    /// `None` when there is no such machine. What has to end first has not ended yet.
    pub(super) async fn admit_if_here(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Option<Admitted>, Fault> {
        let Some(entry) = self.entry_if_here(vm).await else { return Ok(None) };
        let e = entry.lock_owned().await;
        let state = e.state(&self.site);
        state.fence(generation)?;
        let first = state.allows(action)?;
        Ok(Some((e, first)))
    }

    /// As [`Machines::admit_if_here`], where there has to be one.
    pub(super) async fn admit(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Admitted, Fault> {
        let admitted = self.admit_if_here(vm, generation, action).await?;
        admitted.ok_or_else(|| self.not_here(vm))
    }
}

impl LocalSite {
    /// A machine locked for `action`, if its state allows that to one who knows of `generation`. A
    /// move that has to end first has ended.
    pub(super) async fn admit(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Admitted, Fault> {
        let admitted = self.admit_if_here(vm, generation, action).await?;
        admitted.ok_or_else(|| self.machines.not_here(vm))
    }

    /// As [`LocalSite::admit`]; `None` when there is no such machine.
    pub(super) async fn admit_if_here(
        &self,
        vm: VmId,
        generation: Generation,
        action: Action,
    ) -> Result<Option<Admitted>, Fault> {
        loop {
            match self.machines.admit_if_here(vm, generation, action).await? {
                Some((e, First::Move)) => {
                    let (record, machine) = (e.record.clone(), e.machine.clone());
                    drop(e);
                    self.moves.quit(record, machine).await?;
                }
                admitted => return Ok(admitted),
            }
        }
    }
}
