//! Ways out of a move at this site: how a source ends its part, how a destination leaves no trace,
//! and how a person's word ends either whatever state it is in.

use std::time::Duration;

use godwit_migrate::hybrid::{DestinationFate, MoveError, Sent};
use godwit_qemu::Machine;
use godwit_types::Fault;
use tracing::{info, warn};

use super::LocalSite;
use super::moves::runs;
use super::moving::Ended;
use super::record::{DesiredState, End, MachineRecord};
use super::relays::MovePaths;

/// How long the task of a move may take to end once its QEMU and its relay are gone.
const FORCED_WITHIN: Duration = Duration::from_secs(10);

/// Why a machine did not leave, and whether the source may still be needed.
#[derive(Debug)]
pub(super) struct NotSent {
    fault: Fault,
    keep: bool,
    /// The machine runs at its destination.
    beyond: bool,
}

impl From<Fault> for NotSent {
    /// Before QEMU was asked for anything.
    fn from(fault: Fault) -> Self {
        Self { fault, keep: false, beyond: false }
    }
}

impl From<MoveError> for NotSent {
    fn from(e: MoveError) -> Self {
        let beyond = matches!(e, MoveError::Interrupted { .. });
        Self { keep: e.keeps_source(), fault: Fault::of(&e), beyond }
    }
}

impl LocalSite {
    /// What a source writes down when its part has ended, well or not.
    pub(super) async fn after_leaving(
        &self,
        record: &MachineRecord,
        machine: &Machine,
        done: Result<(), NotSent>,
        sent: Sent,
    ) -> Result<Ended, Fault> {
        // A machine that is still needed, or of which nobody knows where it runs, stays marked.
        let keep = match &done {
            Ok(()) => false,
            Err(e) => {
                warn!(vm = %record.name, error = %e.fault, "a machine did not leave whole");
                if e.beyond {
                    if sent.ran_on {
                        self.moves.mark_ran_on(record.vm).await;
                    }
                    self.moves.hold_still(record, machine).await;
                }
                e.keep && (e.beyond || !runs(Some(machine)).await)
            }
        };
        if keep {
            self.moves.keep_sent(record.vm, &sent).await;
        } else {
            self.moves.unmark(record.vm).await;
        }
        if let (Err(_), Some(m)) = (&done, &record.migration) {
            self.relays.end(m).await;
            self.doubt_memory_of(record);
        }
        if let (Some(m), false) = (&record.migration, keep) {
            self.relays.clear(m);
        }
        done.map(|()| Ended::Sent(Box::new(sent))).map_err(|e| e.fault)
    }

    /// A move failed, perhaps since the memory that both sites hold differs.
    fn doubt_memory_of(&self, record: &MachineRecord) {
        if let Some(id) = record.substrate {
            self.substrates.pool.doubt_memory(id);
        }
    }

    /// A machine never ran here: nothing of it stays.
    pub(super) async fn undo_arrival(&self, record: &MachineRecord) {
        let Ok(entry) = self.machines.entry(record.vm).await else { return };
        {
            let mut e = entry.lock().await;
            let id = |r: &MachineRecord| r.migration.as_ref().map(|m| m.id);
            if id(&e.record) != id(record) {
                // It has come back by another move since.
                return;
            }
            if let Some(m) = e.machine.take() {
                m.kill().await;
            }
        }
        if let Some(m) = &record.migration {
            self.relays.end(m).await;
            self.relays.clear(m);
        }
        self.doubt_memory_of(record);
        // Unless another has taken it back meanwhile: what is there now is of a later move.
        let mut e = entry.lock().await;
        if e.record.desired != DesiredState::Gone {
            e.record.desired = DesiredState::Gone;
            self.machines.unregister(record.vm).await;
        }
    }

    /// Ends this site's part of a machine's move because a person wants it off, started anew or gone,
    /// whatever state the move is in. The QEMU is killed: the disk of a source is whole, and of an
    /// arrival nothing stays.
    pub(super) async fn quit_move(
        &self,
        record: &MachineRecord,
        machine: Option<Machine>,
    ) -> Result<(), Fault> {
        let vm = record.vm;
        let Some(migration) = &record.migration else { return Ok(()) };
        info!(vm = %record.name, end = ?migration.end, "its move is ended by force");
        let moving = self.moves.get(migration.id);
        if let Some(moving) = &moving {
            moving.cancel.cancel();
        }
        if let Some(m) = &machine {
            m.kill().await;
        }
        super::relays::end_all_below(&MovePaths::of(&self.dirs.run, migration).dir).await;
        if let Some(moving) = &moving {
            moving.answer(DestinationFate::Dead);
            let ended = tokio::time::timeout(FORCED_WITHIN, self.moves.ended(migration.id)).await;
            if ended.is_err() {
                // Nothing is left that it could do; who follows it is told so.
                warn!(vm = %record.name, "the task of its move does not end");
                let words = format!("the move of '{}' was ended by force", record.name);
                moving.outcome.send_replace(Some(Err(Fault::conflict(words))));
            }
        }
        self.relays.clear(migration);
        // An arrival that never ran here is gone by now.
        if let Ok(entry) = self.machines.entry(vm).await {
            let mut e = entry.lock().await;
            let same = e.record.migration.as_ref().is_some_and(|m| m.id == migration.id);
            match migration.end {
                _ if !same => {}
                End::Source => {
                    e.machine = None;
                    self.moves.unmark_entry(&mut e);
                }
                End::Destination => self.end_arrival(&mut e, false).await?,
            }
        }
        Ok(())
    }
}
