//! The machines that leave a site. What belongs to a departure is here: the state in its record
//! ([`Departure`](super::course::Departure)), the task that drives it and what that asks, and what
//! it has measured.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use godwit_migrate::RelayClient;
use godwit_migrate::hybrid::{Asked, DestinationFate, MoveError, Sent};
use godwit_qemu::{Machine, MigrationStatus};
use godwit_types::{Code, Fault, MigrationId, VmId, chain};
use tracing::{info, warn};

use super::arrivals::ended_by_force;
use super::course::{End, Migration, Question, Step};
use super::drive::{Drives, FORCED_WITHIN, Leaving, RELEASE_WITHIN, SENT, UNDO_WITHIN};
use super::moving::ANSWER_WITHIN;
use super::parts::Parts;
use super::progress::{report_progress, runs};
use super::record::MachineRecord;
use super::relays::MovePaths;
use super::steps::{HoldStill, MoveOver};
use super::travellers::{Found, Travellers};
use crate::{Call, News, UNKNOWN_GENERATION};

/// How often the center is asked what became of a lost destination.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long a source's relay may take until it listens.
const LISTEN_WITHIN: Duration = Duration::from_secs(20);

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

/// The departures of one site.
pub(super) struct Departures {
    pub(super) parts: Arc<Parts>,
    pub(super) travellers: Arc<Travellers>,
    pub(super) drives: Drives<Leaving>,
}

impl Departures {
    /// None that this daemon drives yet.
    pub(super) fn new(parts: Arc<Parts>, travellers: Arc<Travellers>) -> Self {
        let drives = Drives::new(parts.name.clone());
        Self { parts, travellers, drives }
    }

    /// Tells the progress of a migration at its source, and ends as it ends. A caller that goes
    /// away stops nothing; one that cancels does.
    pub(super) async fn follow(&self, id: MigrationId, call: &Call) -> Result<Vec<u8>, Fault> {
        let asking = Asked::arrives();
        let leaving = self.drives.known(id)?;
        let owner = self.parts.machines.owner_if_here(leaving.vm()).await;
        let next = owner.and_then(|o| o.now().record.migration.as_ref().and_then(Migration::next));
        let switched = News::Switched { generation: next.unwrap_or(UNKNOWN_GENERATION) };
        let show = async {
            let mut shown = leaving.shown.subscribe();
            let status = shown.wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
            if let Some(status) = status {
                report_progress(status, call.clone(), switched.clone()).await;
            }
            std::future::pending::<()>().await;
        };
        let ask = async {
            let mut question = leaving.question();
            while question.wait_for(|q| *q == Question::Asked).await.is_ok() {
                call.news(News::Uncertain);
                // The question may be dropped on its way, and so may the answer.
                let settled = question.wait_for(|q| *q != Question::Asked);
                if let Ok(Err(_)) = tokio::time::timeout(ASK_EVERY, settled).await {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let cancel = async {
            call.cancel.cancelled().await;
            leaving.cancel();
            std::future::pending::<()>().await;
        };
        let sent = tokio::select! {
            ended = leaving.ended() => ended?,
            () = show => return Err(Fault::internal("a progress that ends")),
            () = ask => return Err(Fault::internal("a question that ends")),
            () = cancel => return Err(Fault::internal("a cancel that ends")),
        };
        // Told once more: the end may have come before the progress.
        call.news(switched.clone());
        let sent = Sent { asking: asking.replies(), ..sent };
        serde_json::to_vec(&sent).map_err(|e| Fault::internal(e.to_string()))
    }

    /// Where the relay of a machine that leaves listens; `None` once it has met the destination's.
    pub(super) async fn listening(&self, id: MigrationId) -> Result<Option<SocketAddr>, Fault> {
        let leaving = self.drives.known(id)?;
        if leaving.has_ended() {
            // That of the attempt before; the next is about to begin.
            return Err(Fault::unavailable("the source's relay has ended"));
        }
        let found = async {
            let mut shown = leaving.shown.subscribe();
            let mut relay = shown.wait_for(Option::is_some).await.ok()?.clone()?;
            let now = relay.wait_for(|s| s.listening.is_some() || s.met || s.end.is_some()).await;
            Some(now.ok()?.clone())
        };
        match tokio::time::timeout(LISTEN_WITHIN, found).await {
            Ok(Some(now)) if now.met => Ok(None),
            Ok(Some(now)) if now.end.is_none() => Ok(now.listening),
            _ => Err(Fault::unavailable("the source's relay does not listen")),
        }
    }

    /// The destination of a migration is lost, as the center knows before the relay.
    pub(super) fn mark_lost(&self, id: MigrationId, why: String) -> Result<(), Fault> {
        self.drives.known(id)?.mark_lost(why);
        Ok(())
    }

    /// Writes down that the machine has begun to run at its destination: from then on nobody else
    /// may.
    pub(super) async fn note_run(&self, record: &MachineRecord, relay: &RelayClient) {
        if !relay.wait(|s| s.committed).await.is_ok_and(|s| s.committed) {
            return;
        }
        let Some(m) = &record.migration else { return };
        if let Err(f) = self.travellers.note(m.id, record.vm, Step::Ran).await {
            warn!(error = %f, "it was not written down that a machine runs");
        }
    }

    /// A machine that has left has run here: its disk here is not what it left with.
    pub(super) async fn mark_ran_on(&self, record: &MachineRecord) {
        let Some(m) = &record.migration else { return };
        if let Err(f) = self.travellers.note(m.id, record.vm, Step::RanOn).await {
            warn!(error = %f, "it was not written down that a machine has run on");
        }
    }

    /// Keeps what was measured of a machine's departure, unless it is in another move by now.
    pub(super) async fn keep_sent(&self, id: MigrationId, vm: VmId, sent: &Sent) {
        self.travellers.keep(vm, move |m| m.id == id, (SENT, sent)).await;
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

    /// A machine that runs at its destination must not run here, whatever its QEMU thinks.
    pub(super) async fn hold_still(&self, record: &MachineRecord) {
        let Some(id) = record.migration.as_ref().map(|m| m.id) else { return };
        let held = match self.parts.machines.owner(record.vm).await {
            Ok(owner) => owner.ask(HoldStill { id }).await,
            Err(f) => Err(f),
        };
        if let Err(error) = held {
            warn!(vm = %record.name, %error, "it is not held");
        }
    }

    /// Whether the QEMU of a machine that has left broke off in the hand-over, and nobody drives that
    /// any more: QEMU 10.0 leads out of it by no command.
    pub(super) async fn is_stuck(&self, migration: &Migration, machine: &Machine) -> bool {
        let goes_on = self.drives.get(migration.id).is_some_and(|d| !d.has_ended());
        migration.end() == End::Source && migration.has_run() && !goes_on && {
            let asked = tokio::time::timeout(ANSWER_WITHIN, machine.query_migrate()).await;
            let status = asked.ok().and_then(Result::ok).map(|info| info.status);
            matches!(status, Some(MigrationStatus::Device | MigrationStatus::Cancelling))
        }
    }

    /// It stays: its move is over.
    pub(super) async fn stay(&self, record: &MachineRecord, machine: &Machine) {
        if let Err(e) = machine.migrate_cancel().await {
            info!(vm = %record.name, error = %chain(&e), "no migration to cancel");
        }
        self.end_move(record).await;
    }

    /// Its move is over, whatever became of it.
    pub(super) async fn end_move(&self, record: &MachineRecord) {
        if let Some(m) = &record.migration {
            self.travellers.unmark(m.id, record.vm).await;
            self.parts.relays.end(m).await;
            self.parts.relays.clear(m);
        }
    }

    /// What became of a source whose QEMU is gone, when the machine never ran elsewhere.
    pub(super) async fn ended_here(&self, record: &MachineRecord) -> Fault {
        self.end_move(record).await;
        let why = record.reason.clone().unwrap_or_else(|| "its QEMU is gone".into());
        Fault::new(
            Code::Damaged,
            format!(
                "machine '{}' ended at '{}' before it had moved: {why}",
                record.name, self.parts.name
            ),
        )
    }

    /// What a source writes down when its part has ended, well or not.
    pub(super) async fn after_leaving(
        &self,
        record: &MachineRecord,
        machine: &Machine,
        done: Result<(), NotSent>,
        sent: Sent,
    ) -> Result<Sent, Fault> {
        // A machine that is still needed, or of which nobody knows where it runs, stays marked.
        let keep = match &done {
            Ok(()) => false,
            Err(e) => {
                warn!(vm = %record.name, error = %e.fault, "a machine did not leave whole");
                if e.beyond {
                    if sent.ran_on {
                        self.mark_ran_on(record).await;
                    }
                    self.hold_still(record).await;
                }
                e.keep && (e.beyond || !runs(Some(machine)).await)
            }
        };
        // Before it is unmarked: whoever removes it then may keep its memory.
        if let (Ok(()), Some(m)) = (&done, &record.migration)
            && let Some(next) = m.next().filter(|_| m.attempt == 0 && !sent.ran_on)
        {
            self.parts.machines.visits.left(record.vm, next);
        }
        match &record.migration {
            Some(m) if keep => self.keep_sent(m.id, record.vm, &sent).await,
            Some(m) => self.travellers.unmark(m.id, record.vm).await,
            None => {}
        }
        if let (Err(_), Some(m)) = (&done, &record.migration) {
            self.parts.relays.end(m).await;
        }
        if let (Some(m), false) = (&record.migration, keep) {
            self.parts.relays.clear(m);
        }
        done.map(|()| sent).map_err(|e| e.fault)
    }

    /// Takes a departure back, as long as its machine has not left.
    pub(super) async fn take_back(
        &self,
        record: &MachineRecord,
        id: MigrationId,
    ) -> Result<(), Fault> {
        let Some(leaving) = self.drives.get(id) else { return Ok(()) };
        leaving.cancel();
        match tokio::time::timeout(UNDO_WITHIN, leaving.ended()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Fault::conflict(format!(
                "machine '{}' is in the switch; it is held until it is known where it runs",
                record.name
            ))),
        }
    }

    /// Ends a departure because a person wants its machine off, started anew or gone, whatever state
    /// it is in. The QEMU is killed: the disk is whole.
    pub(super) async fn quit(
        &self,
        (record, machine): Found,
        migration: &Migration,
    ) -> Result<(), Fault> {
        info!(vm = %record.name, "its departure is ended by force");
        let leaving = self.drives.get(migration.id);
        if let Some(leaving) = &leaving {
            leaving.cancel();
        }
        if let Some(m) = &machine {
            m.kill().await;
        }
        super::relays::end_all_below(&MovePaths::of(&self.parts.dirs.run, migration).dir).await;
        if let Some(leaving) = &leaving {
            leaving.answer(DestinationFate::Dead);
            if tokio::time::timeout(FORCED_WITHIN, leaving.ended()).await.is_err() {
                leaving.end(Err(ended_by_force(&record)));
            }
        }
        self.parts.relays.clear(migration);
        match self.parts.machines.owner_if_here(record.vm).await {
            Some(owner) => owner.ask(MoveOver { id: migration.id, is_dead: true }).await,
            None => Ok(()),
        }
    }
}
