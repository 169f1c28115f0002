//! What the ends of a move ask the owner of its machine, and tell it.

use std::sync::Arc;

use godwit_disk::MidLayer;
use godwit_qemu::Machine;
use godwit_types::{Fault, Generation, MigrationId, Name, chain};
use serde::Serialize;
use tracing::warn;

use super::adopt::end_strays;
use super::allowed::{Action, First, Refusal};
use super::course::{Migration, Step};
use super::drive::{forget_measured, keep_measured};
use super::faults::into_fault;
use super::filling::MID;
use super::owner::{Ask, Needs, Owned};
use super::parts::Parts;
use super::progress::runs;
use super::record::{DesiredState, DiskBase, MachineRecord};
use super::{SiteDirs, filling, ran};

/// A machine is to leave; gives its record and its QEMU.
pub(super) struct Leave {
    pub(super) generation: Generation,
    pub(super) departure: Migration,
}

impl Ask for Leave {
    type Reply = (MachineRecord, Machine);
    const STEP: &'static str = "owner.leave";

    fn needs(&self) -> Option<Needs> {
        Some(Needs::known(Action::Leave, self.generation))
    }

    async fn answer(self, e: &mut Owned, _: First) -> Result<Self::Reply, Fault> {
        let machine = e.machine.clone();
        let machine = machine.ok_or_else(|| Refusal::NotRunning(e.record.name.clone()))?;
        e.record.migration = Some(self.departure);
        if let Err(f) = e.save() {
            e.record.migration = None;
            return Err(f);
        }
        Ok((e.record.clone(), machine))
    }
}

/// A step of a machine's move was taken; gives its record.
pub(super) struct Note {
    pub(super) site: Name,
    pub(super) id: MigrationId,
    pub(super) step: Step,
}

impl Ask for Note {
    type Reply = MachineRecord;
    const STEP: &'static str = "owner.note";

    async fn answer(self, e: &mut Owned, _: First) -> Result<MachineRecord, Fault> {
        let Self { site, id, step } = self;
        let Some(m) = e.record.migration.as_ref().filter(|m| m.id == id) else {
            return Err(Fault::conflict(format!(
                "machine '{}' is in no migration at '{site}'",
                e.record.name
            )));
        };
        let next = m.after(step).map_err(into_fault)?;
        e.record.migration = Some(next);
        e.save()?;
        Ok(e.record.clone())
    }
}

/// A machine that runs at its destination is held here; one that is brought back is not.
pub(super) struct HoldStill {
    pub(super) id: MigrationId,
}

impl Ask for HoldStill {
    type Reply = ();
    const STEP: &'static str = "owner.hold-still";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let stays_away = |m: &&Migration| m.id == self.id && !m.returns();
        let Some(m) = e.record.migration.as_ref().filter(stays_away) else { return Ok(()) };
        let Some(machine) = e.machine.clone() else { return Ok(()) };
        if !runs(Some(&machine)).await {
            return Ok(());
        }
        warn!(vm = %e.record.name, "it runs at its destination; it is held here");
        e.record.migration = Some(m.after(Step::RanOn).map_err(into_fault)?);
        let noted = e.save();
        machine.stop().await.map_err(into_fault)?;
        noted
    }
}

/// A move is over here; a machine that is in another by now stays in it.
pub(super) struct MoveOver {
    pub(super) id: MigrationId,
    /// Whether its QEMU was ended with it.
    pub(super) is_dead: bool,
}

impl Ask for MoveOver {
    type Reply = ();
    const STEP: &'static str = "owner.move-over";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.record.migration.as_ref().is_none_or(|m| m.id != self.id) {
            return Ok(());
        }
        if self.is_dead {
            e.machine = None;
        }
        e.record.migration = None;
        if let Err(f) = e.save() {
            warn!(error = %f, "a record was not written");
        }
        forget_measured(&e.dir);
        Ok(())
    }
}

/// Something was measured of a move: kept beside the record of a machine that is in one for which `is`
/// holds.
pub(super) struct Measured<T, F> {
    pub(super) is: F,
    pub(super) file: &'static str,
    pub(super) value: T,
}

impl<T, F> Ask for Measured<T, F>
where
    T: Serialize + Send + 'static,
    F: FnOnce(&Migration) -> bool + Send + 'static,
{
    type Reply = ();
    const STEP: &'static str = "owner.measured";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.record.migration.as_ref().is_some_and(self.is) {
            keep_measured(&e.dir, self.file, &self.value);
        }
        Ok(())
    }
}

/// A machine has come whole.
pub(super) struct Arrived {
    pub(super) parts: Arc<Parts>,
}

impl Ask for Arrived {
    type Reply = ();
    const STEP: &'static str = "owner.arrived";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let dir = e.dir.clone();
        let mid = dir.join(MID);
        let before = e.record.clone();
        if mid.exists() {
            e.record.disk_base = DiskBase::Mid;
        }
        e.record.migration = None;
        if let Err(f) = e.save() {
            e.record = before;
            return Err(f);
        }
        // Only then: without the record's word a layer that has no list of what came looks empty.
        if mid.exists()
            && let Err(error) = MidLayer::forget(&mid)
        {
            warn!(vm = %e.record.name, %error, "the list of what came stays beside the layer");
        }
        for left in [filling::end(&dir), ran::forget(&dir)] {
            if let Err(error) = left {
                warn!(vm = %e.record.name, %error, "a file of its arrival stays");
            }
        }
        forget_measured(&dir);
        if let Some(m) = &before.migration {
            let (whole, came) = (m.attempt == 0, (m.id, &m.peer));
            let of = (e.record.vm, e.record.generation);
            self.parts.machines.visits.arrived(of, came, whole);
        }
        Ok(())
    }
}

/// An arrival is taken back: its QEMU ends. Tells whether the machine is in that move still.
pub(super) struct TakeDown {
    pub(super) dirs: SiteDirs,
    pub(super) id: Option<MigrationId>,
}

impl Ask for TakeDown {
    type Reply = bool;
    const STEP: &'static str = "owner.take-down";

    async fn answer(self, e: &mut Owned, _: First) -> Result<bool, Fault> {
        if e.record.migration.as_ref().map(|m| m.id) != self.id {
            return Ok(false);
        }
        if let Some(m) = e.machine.take() {
            m.kill().await;
        }
        // One that was started when its arrival broke off.
        end_strays(&self.dirs, e.record.vm).await;
        Ok(true)
    }
}

/// Nothing is left that belongs to an arrival which is taken back: its machine goes, too.
pub(super) struct TakenBack {
    pub(super) parts: Arc<Parts>,
}

impl Ask for TakenBack {
    type Reply = ();
    const STEP: &'static str = "owner.taken-back";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.record.desired != DesiredState::Gone {
            e.record.desired = DesiredState::Gone;
            // Whoever waits for the end of its preparation goes on.
            e.doing.end();
            e.publish();
            self.parts.machines.visits.gone(e.record.vm);
            self.parts.machines.unregister(e.record.vm).await;
        }
        Ok(())
    }
}

/// A machine's arrival was ended by force: nothing of that move is left with it.
pub(super) struct ArrivalEnded {
    pub(super) parts: Arc<Parts>,
    pub(super) id: MigrationId,
}

impl Ask for ArrivalEnded {
    type Reply = ();
    const STEP: &'static str = "owner.arrival-ended";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        match &e.record.migration {
            Some(m) if m.id == self.id => end_arrival(&self.parts, e, false).await,
            _ => Ok(()),
        }
    }
}

/// Before a machine that arrived in part is started from its disk, or removed: ends what is
/// left of its migration. Only what was given up is taken away, or what is removed anyway.
pub(super) async fn end_arrival(
    parts: &Parts,
    e: &mut Owned,
    keep_disk: bool,
) -> Result<(), Fault> {
    let Some(m) = e.record.migration.clone() else { return Ok(()) };
    let why = m.abandoned().cloned().unwrap_or_default();
    let dir = e.dir.clone();
    let mid = dir.join(MID);
    if keep_disk && parts.images.of(&e.record)?.disk_path().is_some() {
        match MidLayer::missing(&filling::layer(&dir)) {
            Ok((_, true)) => {}
            Ok((left, false)) => {
                return Err(Fault::new(
                    godwit_types::Code::Damaged,
                    format!("{left} blocks of the disk of '{}' are missing: {why}", e.record.name),
                ));
            }
            Err(error) => {
                return Err(Fault::new(
                    godwit_types::Code::Damaged,
                    format!(
                        "the disk of '{}' never came: {why} ({})",
                        e.record.name,
                        chain(&error)
                    ),
                ));
            }
        }
        if filling::is_there(&dir) {
            MidLayer::take_over(&filling::place(&dir), &mid).map_err(into_fault)?;
        }
        e.record.disk_base = DiskBase::Mid;
        parts.machines.visits.forget(e.record.vm);
    }
    if let Some(m) = e.machine.take() {
        m.kill().await;
    }
    parts.relays.end(&m).await;
    parts.relays.clear(&m);
    e.record.migration = None;
    if e.record.desired != DesiredState::Gone {
        e.save()?;
    }
    if keep_disk {
        // Only then: without the record's word they tell of a layer that is still to be filled.
        MidLayer::forget(&mid).map_err(into_fault)?;
        filling::end(&dir)?;
        ran::forget(&dir)?;
    }
    Ok(())
}
