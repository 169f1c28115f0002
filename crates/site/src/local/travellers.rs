//! The machines of a site that are in a move, by what their records say.

use std::sync::Arc;

use godwit_qemu::{Life, Machine};
use godwit_types::{Fault, MigrationId, VmId};
use serde::Serialize;
use tracing::warn;

use super::allowed::{Action, First};
use super::course::{End, Migration, Step};
use super::drive::no_such_move;
use super::owner::{Look, Needs, Owner};
use super::parts::Parts;
use super::progress::runs;
use super::record::MachineRecord;
use super::steps::{Measured, MoveOver, Note};

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
        let site = self.parts.name.clone();
        self.parts.machines.owner(vm).await?.ask(Note { site, id, step }).await
    }

    /// The machine of a migration at this end, with its QEMU if that lives.
    pub(super) async fn at_end(&self, id: MigrationId, vm: VmId, end: End) -> Result<Found, Fault> {
        let action = match end {
            End::Source => Action::ResumeDeparture,
            End::Destination => Action::ResumeArrival,
        };
        let needs = Some(Needs::in_move(action, id));
        let e = self.parts.machines.owner(vm).await?.ask(Look { needs }).await?;
        Ok((e.record, e.machine))
    }

    /// The machine that is in that migration here.
    pub(super) async fn find(&self, id: MigrationId) -> Result<Found, Fault> {
        let all = self.parts.machines.all().await;
        let found = all
            .iter()
            .map(Owner::now)
            .find(|e| e.record.migration.as_ref().is_some_and(|m| m.id == id));
        let e = found.ok_or_else(|| no_such_move(&self.parts.name, id))?;
        Ok((e.record, e.machine))
    }

    /// A machine whose move is to be taken back; `None` where nothing is left to take back.
    pub(super) async fn to_abort(
        &self,
        id: MigrationId,
        vm: VmId,
    ) -> Result<Option<(Found, Migration)>, Fault> {
        let Some(owner) = self.parts.machines.owner_if_here(vm).await else { return Ok(None) };
        let e = owner.ask(Look { needs: None }).await?;
        let state = e.state(&self.parts.name).in_move(&e.record, id);
        let mut first = state.allows(Action::Abort)?;
        if !state.leaves() {
            let life = runs(e.machine.as_ref()).await.then_some(Life::Running);
            first = state.asked(life).allows(Action::Abort)?;
        }
        Ok(match (first, e.record.migration.clone()) {
            (First::Move, Some(migration)) => Some(((e.record, e.machine), migration)),
            _ => None,
        })
    }

    /// The machine is in that move no more; one that is in another by now stays in it.
    pub(super) async fn unmark(&self, id: MigrationId, vm: VmId) {
        let Ok(owner) = self.parts.machines.owner(vm).await else { return };
        if let Err(error) = owner.ask(MoveOver { id, is_dead: false }).await {
            warn!(%vm, %error, "it is in its move still");
        }
    }

    /// Keeps what was measured of the move of a machine that is in one for which `is` holds.
    pub(super) async fn keep<T: Serialize + Clone + Send + 'static>(
        &self,
        vm: VmId,
        is: impl FnOnce(&Migration) -> bool + Send + 'static,
        (file, value): (&'static str, &T),
    ) {
        let Ok(owner) = self.parts.machines.owner(vm).await else { return };
        if let Err(error) = owner.ask(Measured { is, file, value: value.clone() }).await {
            warn!(%vm, %error, "what was measured is not kept");
        }
    }
}
