//! The machines of a site that are in a move, by what their records say.

use std::sync::Arc;

use godwit_qemu::{Life, Machine};
use godwit_types::{Fault, MigrationId, VmId};
use serde::Serialize;
use tracing::warn;

use super::allowed::{Action, First};
use super::course::{End, Migration, Step};
use super::drive::{forget_measured, keep_measured, no_such_move};
use super::entry::Entry;
use super::machines::into_fault;
use super::moves::runs;
use super::parts::Parts;
use super::record::MachineRecord;

/// A machine as its move finds it: its record, and its QEMU if that lives.
pub(super) type Found = (MachineRecord, Option<Machine>);

/// The machines of one site that are in a move.
pub(super) struct Travellers {
    parts: Arc<Parts>,
}

impl Travellers {
    /// Those among the site's machines.
    pub(super) const fn new(parts: Arc<Parts>) -> Self {
        Self { parts }
    }

    /// Takes a step of a machine's move, and writes it down.
    pub(super) async fn note(
        &self,
        id: MigrationId,
        vm: VmId,
        step: Step,
    ) -> Result<MachineRecord, Fault> {
        let entry = self.parts.machines.entry(vm).await?;
        let mut e = entry.lock().await;
        let Some(m) = e.record.migration.as_ref().filter(|m| m.id == id) else {
            return Err(Fault::conflict(format!(
                "machine '{}' is in no migration at '{}'",
                e.record.name, self.parts.name
            )));
        };
        e.record.migration = Some(m.after(step).map_err(into_fault)?);
        e.record.save(&self.parts.dirs.vm(vm))?;
        Ok(e.record.clone())
    }

    /// The machine of a migration at this end, with its QEMU if that lives.
    pub(super) async fn at_end(&self, id: MigrationId, vm: VmId, end: End) -> Result<Found, Fault> {
        let entry = self.parts.machines.entry(vm).await?;
        let e = entry.lock().await;
        let action = match end {
            End::Source => Action::ResumeDeparture,
            End::Destination => Action::ResumeArrival,
        };
        let _ = e.state(&self.parts.name).in_move(&e.record, id).allows(action)?;
        Ok((e.record.clone(), e.machine.clone()))
    }

    /// The machine that is in that migration here.
    pub(super) async fn find(&self, id: MigrationId) -> Result<Found, Fault> {
        for (_, entry) in self.parts.machines.now().await {
            let e = entry.lock().await;
            if e.record.migration.as_ref().is_some_and(|m| m.id == id) {
                return Ok((e.record.clone(), e.machine.clone()));
            }
        }
        Err(no_such_move(&self.parts.name, id))
    }

    /// A machine whose move is to be taken back; `None` where nothing is left to take back.
    pub(super) async fn to_abort(
        &self,
        id: MigrationId,
        vm: VmId,
    ) -> Result<Option<(Found, Migration)>, Fault> {
        let Some(entry) = self.parts.machines.entry_if_here(vm).await else { return Ok(None) };
        let (record, machine, state) = {
            let e = entry.lock().await;
            let state = e.state(&self.parts.name).in_move(&e.record, id);
            (e.record.clone(), e.machine.clone(), state)
        };
        let mut first = state.allows(Action::Abort)?;
        if !state.leaves() {
            let life = runs(machine.as_ref()).await.then_some(Life::Running);
            first = state.asked(life).allows(Action::Abort)?;
        }
        Ok(match (first, record.migration.clone()) {
            (First::Move, Some(migration)) => Some(((record, machine), migration)),
            _ => None,
        })
    }

    /// The machine is in that move no more; one that is in another by now stays in it.
    pub(super) async fn unmark(&self, id: MigrationId, vm: VmId) {
        let Ok(entry) = self.parts.machines.entry(vm).await else { return };
        let mut e = entry.lock().await;
        if e.record.migration.as_ref().is_some_and(|m| m.id == id) {
            self.unmark_entry(&mut e);
        }
    }

    /// Keeps what was measured of the move of a machine that is in one for which `is` holds.
    pub(super) async fn keep<T: Serialize>(
        &self,
        vm: VmId,
        is: impl FnOnce(&Migration) -> bool,
        (file, value): (&str, &T),
    ) {
        let Ok(entry) = self.parts.machines.entry(vm).await else { return };
        let e = entry.lock().await;
        if e.record.migration.as_ref().is_some_and(is) {
            keep_measured(&self.parts.dirs.vm(vm), file, value);
        }
    }

    /// As [`Travellers::unmark`], of one that is locked.
    pub(super) fn unmark_entry(&self, e: &mut Entry) {
        e.record.migration = None;
        let dir = self.parts.dirs.vm(e.record.vm);
        if let Err(f) = e.record.save(&dir) {
            warn!(error = %f, "a record was not written");
        }
        forget_measured(&dir);
    }
}
