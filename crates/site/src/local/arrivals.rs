//! The machines that come to a site. What belongs to an arrival is here: the state in its record
//! ([`Arrival`](super::course::Arrival)), the task that drives it, the directory in which its disk
//! is filled ([`filling`]), the word that it has run ([`ran`]), and what it has measured.

use std::net::SocketAddr;
use std::sync::Arc;

use godwit_migrate::RelayClient;
use godwit_migrate::hybrid::Received;
use godwit_migrate::relay::RelayCommand;
use godwit_qemu::Machine;
use godwit_types::{Fault, MigrationId, VmId};
use tracing::{info, warn};

use super::allowed::Refusal;
use super::course::{End, Migration, Step};
use super::drive::{
    Coming, Drives, FORCED_WITHIN, RECEIVED, RELEASE_WITHIN, UNDO_WITHIN, no_such_move,
};
use super::faults::into_fault;
use super::parts::Parts;
use super::record::MachineRecord;
use super::relays::MovePaths;
use super::steps::{ArrivalEnded, TakeDown, TakenBack};
use super::travellers::{Found, Travellers};
use super::{filling, ran};

/// The arrivals of one site.
pub(super) struct Arrivals {
    pub(super) parts: Arc<Parts>,
    pub(super) travellers: Arc<Travellers>,
    pub(super) drives: Drives<Coming>,
}

impl Arrivals {
    /// None that this daemon drives yet.
    pub(super) fn new(parts: Arc<Parts>, travellers: Arc<Travellers>) -> Self {
        let drives = Drives::new(parts.name.clone());
        Self { parts, travellers, drives }
    }

    /// Waits until a machine that comes in is whole; what was measured.
    pub(super) async fn received(&self, id: MigrationId) -> Result<Vec<u8>, Fault> {
        let received = self.drives.known(id)?.ended().await?;
        serde_json::to_vec(&received).map_err(|e| Fault::internal(e.to_string()))
    }

    /// Has the relay of a machine that arrives dial that of its source.
    pub(super) async fn dial(
        &self,
        id: MigrationId,
        vm: VmId,
        address: SocketAddr,
    ) -> Result<(), Fault> {
        let record = self.parts.machines.owner(vm).await?.now().record;
        let migration = record.migration.as_ref();
        let migration = migration
            .filter(|m| m.id == id && m.end() == End::Destination)
            .ok_or_else(|| no_such_move(&self.parts.name, id))?;
        let paths = MovePaths::of(&self.parts.dirs.run, migration);
        let relay = RelayClient::attach(&paths.control).await.map_err(into_fault)?;
        if relay.command(&RelayCommand::Dial { address }).await.map_err(into_fault)? {
            return Ok(());
        }
        Err(Fault::conflict("its relay has met the source's already, or has ended"))
    }

    /// Writes down that a machine has run here.
    pub(super) async fn mark_run(&self, record: &MachineRecord) {
        let Some(m) = &record.migration else { return };
        if let Err(f) = self.travellers.note(m.id, record.vm, Step::Ran).await {
            warn!(error = %f, "it was not written down that a machine runs");
        }
    }

    /// Keeps what was measured of a machine's arrival, unless that is over by now.
    pub(super) async fn keep_received(&self, id: MigrationId, vm: VmId, received: &Received) {
        let comes = move |m: &Migration| m.id == id && m.end() == End::Destination;
        self.travellers.keep(vm, comes, (RECEIVED, received)).await;
    }

    /// Ends what is left of the last attempt, and begins a new one.
    pub(super) async fn next_attempt(
        &self,
        record: &MachineRecord,
    ) -> Result<MachineRecord, Fault> {
        let migration = record.in_migration()?;
        self.parts.relays.end(migration).await;
        self.drives.ended_within(migration.id, RELEASE_WITHIN).await;
        self.travellers.note(migration.id, record.vm, Step::Resumed).await
    }

    /// Takes back the arrival of a machine that has not run here: its QEMU is gone for good then.
    pub(super) async fn take_back(
        &self,
        (record, machine): Found,
        migration: &Migration,
    ) -> Result<(), Fault> {
        let runs_here = || {
            let (machine, site) = (record.name.clone(), self.parts.name.clone());
            Refusal::RunsHere { machine, site }
        };
        if self.has_run(&record, machine.as_ref()).await {
            return Err(runs_here().into());
        }
        // Then no relay can say any more that it runs here.
        self.parts.relays.end(migration).await;
        if self.has_run(&record, machine.as_ref()).await {
            return Err(runs_here().into());
        }
        if let Some(m) = &machine {
            m.kill().await;
        }
        // The task that follows the arrival undoes it.
        self.drives.ended_within(migration.id, UNDO_WITHIN).await;
        self.undo(&record).await;
        Ok(())
    }

    /// A machine never ran here: nothing of it stays.
    pub(super) async fn undo(&self, record: &MachineRecord) {
        let Ok(owner) = self.parts.machines.owner(record.vm).await else { return };
        let id = record.migration.as_ref().map(|m| m.id);
        match owner.ask(TakeDown { dirs: self.parts.dirs.clone(), id }).await {
            Ok(true) => {}
            // It has come back by another move since.
            Ok(false) => return,
            Err(error) => return warn!(vm = %record.name, %error, "its arrival is not taken back"),
        }
        if let Some(m) = &record.migration {
            self.parts.relays.end(m).await;
            self.parts.relays.clear(m);
        }
        // Unless another has taken it back meanwhile: what is there now is of a later move.
        if let Err(error) = owner.ask(TakenBack { parts: Arc::clone(&self.parts) }).await {
            warn!(vm = %record.name, %error, "something of its arrival stays");
        }
    }

    /// Ends an arrival because a person wants its machine off or gone, whatever state it is in: its
    /// QEMU is killed, and nothing of it stays.
    pub(super) async fn quit(
        &self,
        (record, machine): Found,
        migration: &Migration,
    ) -> Result<(), Fault> {
        info!(vm = %record.name, "its arrival is ended by force");
        if let Some(m) = &machine {
            m.kill().await;
        }
        super::relays::end_all_below(&MovePaths::of(&self.parts.dirs.run, migration).dir).await;
        if let Some(coming) = self.drives.get(migration.id)
            && tokio::time::timeout(FORCED_WITHIN, coming.ended()).await.is_err()
        {
            coming.end(Err(ended_by_force(&record)));
        }
        self.parts.relays.clear(migration);
        // One that never ran here is gone by now.
        match self.parts.machines.owner_if_here(record.vm).await {
            Some(owner) => {
                let parts = Arc::clone(&self.parts);
                owner.ask(ArrivalEnded { parts, id: migration.id }).await
            }
            None => Ok(()),
        }
    }

    /// Removes what an arrival that has ended when its daemon did has left.
    pub(super) fn sweep(&self, record: &MachineRecord) {
        let dir = self.parts.dirs.vm(record.vm);
        for left in [filling::end(&dir), ran::forget(&dir)] {
            if let Err(error) = left {
                warn!(vm = %record.name, %error, "a file of its arrival stays");
            }
        }
    }

    /// Whether a machine has run here that comes. What is answered stays so: it is in the record
    /// before it is said.
    pub(super) async fn has_run(&self, record: &MachineRecord, machine: Option<&Machine>) -> bool {
        let Some(m) = record.migration.as_ref().filter(|m| m.end() == End::Destination) else {
            return false;
        };
        if m.has_run() {
            return true;
        }
        let refused = self.drives.get(m.id).is_some_and(|coming| {
            coming.shown.borrow().as_ref().is_some_and(|s| s.borrow().refused.is_some())
        });
        let has = match ran::says(&self.parts.dirs.vm(record.vm)) {
            Some(said) => said && !refused,
            None => super::progress::runs(machine).await,
        };
        if has {
            self.mark_run(record).await;
        }
        has
    }

    /// As [`Arrivals::has_run`], where there is such a file, once the relay has ended: it writes
    /// nothing any more.
    pub(super) async fn has_committed(&self, record: &MachineRecord) -> bool {
        if let Some(m) = &record.migration {
            self.parts.relays.end(m).await;
        }
        ran::says(&self.parts.dirs.vm(record.vm)) == Some(true)
    }
}

/// The end of a move that a person's word has ended while its task did not.
pub(super) fn ended_by_force(record: &MachineRecord) -> Fault {
    // Nothing is left that the task could do; who follows it is told so.
    warn!(vm = %record.name, "the task of its move does not end");
    Fault::conflict(format!("the move of '{}' was ended by force", record.name))
}
