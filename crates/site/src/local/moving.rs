//! The moves that a site takes part in, by whichever end is here: [`Arrivals`] and [`Departures`].
//! What is done at either end is in [`super::moves`], and after a break in [`super::resume`].

use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::{Life, Machine, MigrationStatus};
use godwit_types::{Fault, MigrationId, VmId};
use tracing::info;

use super::arrivals::Arrivals;
use super::course::End;
use super::departures::Departures;
use super::parts::Parts;
use super::record::MachineRecord;
use super::relays::MovePaths;
use super::travellers::Travellers;
use crate::{Call, MemoryStatus};

/// How long QEMU may take to say how its migration stands.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The moves of one site.
pub(super) struct Moves {
    pub(super) arrivals: Arc<Arrivals>,
    pub(super) departures: Arc<Departures>,
    pub(super) travellers: Arc<Travellers>,
    pub(super) parts: Arc<Parts>,
}

impl Moves {
    /// None that this daemon drives yet.
    pub(super) fn new(parts: &Arc<Parts>) -> Self {
        let travellers = Arc::new(Travellers::new(Arc::clone(parts)));
        let arrivals = Arrivals::new(Arc::clone(parts), Arc::clone(&travellers));
        let departures = Departures::new(Arc::clone(parts), Arc::clone(&travellers));
        Self {
            arrivals: Arc::new(arrivals),
            departures: Arc::new(departures),
            travellers,
            parts: Arc::clone(parts),
        }
    }

    /// Follows a machine that leaves; one that comes is not followed.
    pub(super) async fn follow(&self, id: MigrationId, call: &Call) -> Result<Vec<u8>, Fault> {
        if self.arrivals.drives.get(id).is_some() {
            return Err(Fault::invalid("this site is the destination of that migration"));
        }
        self.departures.follow(id, call).await
    }

    /// Waits for a machine that comes; one that leaves is not waited for.
    pub(super) async fn received(&self, id: MigrationId) -> Result<Vec<u8>, Fault> {
        if self.departures.drives.get(id).is_some() {
            return Err(Fault::invalid("this site is the source of that migration"));
        }
        self.arrivals.received(id).await
    }

    /// Takes back what was done for a migration, as long as the machine does not run here because
    /// of it. At the destination this also fences: a QEMU that never ran is gone for good.
    pub(super) async fn abort(&self, id: MigrationId, vm: VmId) -> Result<(), Fault> {
        // Its relay may never have started.
        drop(self.parts.relays.held.take(id));
        let Some((found, migration)) = self.travellers.to_abort(id, vm).await? else {
            return Ok(());
        };
        match migration.end() {
            End::Destination => self.arrivals.take_back(found, &migration).await,
            End::Source => self.departures.take_back(&found.0, id).await,
        }
    }

    /// Ends this site's part of a machine's move because a person wants it off, started anew or gone,
    /// whatever state the move is in. The QEMU is killed: the disk of a source is whole, and of an
    /// arrival nothing stays.
    pub(super) async fn quit(
        &self,
        record: MachineRecord,
        machine: Option<Machine>,
    ) -> Result<(), Fault> {
        let Some(migration) = record.migration.clone() else { return Ok(()) };
        match migration.end() {
            End::Destination => self.arrivals.quit((record, machine), &migration).await,
            End::Source => self.departures.quit((record, machine), &migration).await,
        }
    }

    /// After a start: ends relays and removes files of moves that no machine here is in.
    pub(super) async fn sweep(&self) {
        let mut wanted = Vec::new();
        for owner in self.parts.machines.all().await {
            if let Some(m) = &owner.now().record.migration {
                wanted.push(MovePaths::of(&self.parts.dirs.run, m).dir);
            }
        }
        let Ok(found) = std::fs::read_dir(&self.parts.dirs.run) else { return };
        for dir in found.flatten().map(|f| f.path()) {
            let move_of =
                dir.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"mig-"));
            if move_of && !wanted.contains(&dir) {
                info!(dir = %dir.display(), "a move that is over left this behind");
                if super::relays::end_all_below(&dir).await {
                    let _ = std::fs::remove_dir_all(&dir);
                }
            }
        }
    }
}

/// What is here of the memory of a machine in a move, by its QEMU's word.
pub(super) async fn memory_status(m: &Machine, end: End) -> (MemoryStatus, Option<String>) {
    let life = tokio::time::timeout(ANSWER_WITHIN, m.life()).await;
    if matches!(life, Ok(Ok(Life::Exited))) {
        let exit = m.exited().await;
        let why = exit.signal.map_or_else(
            || "its QEMU has ended".to_owned(),
            |s| format!("its QEMU was ended by signal {s}"),
        );
        return (MemoryStatus::Gone, Some(why));
    }
    let status = match tokio::time::timeout(ANSWER_WITHIN, m.query_migrate()).await {
        Ok(Ok(info)) => info.status,
        // It waits for a page, so one is missing.
        Ok(Err(_)) | Err(_) => MigrationStatus::PostcopyPaused,
    };
    match (status, end) {
        (MigrationStatus::Completed, _) => (MemoryStatus::Whole, None),
        (MigrationStatus::Failed | MigrationStatus::Cancelled, _) => {
            let why = "its QEMU has ended the migration and cannot take it up again";
            (MemoryStatus::Gone, Some(why.into()))
        }
        _ => (MemoryStatus::Partial, None),
    }
}
