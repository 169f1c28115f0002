//! The moves that a site takes part in: how each goes on, what the record of its machine says of it,
//! and what it has measured. What is done at either end is not here ([`super::moves`]).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use godwit_migrate::RelayClient;
use godwit_migrate::hybrid::{Asked, DestinationFate, MoveError, Received, Sent, Steering};
use godwit_migrate::relay::{RelayCommand, RelayStatus};
use godwit_qemu::{Life, Machine, MigrationStatus};
use godwit_types::{Code, Fault, MigrationId, Name, VmId, chain};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

use super::SiteDirs;
use super::allowed::Action;
use super::entry::Entry;
use super::machines::into_fault;
use super::moves::{report_progress, runs};
use super::record::{End, MachineRecord, Migration};
use super::relays::{MovePaths, Relays};
use super::table::Machines;
use crate::{Call, MemoryStatus, News, UNKNOWN_GENERATION};

/// How often the center is asked what became of a lost destination.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long it is asked for once the move was asked to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);
/// How long QEMU may take to say how its migration stands.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a source's end may take to come to its end once it is needed no more.
pub(super) const RELEASE_WITHIN: Duration = Duration::from_secs(30);
/// How long a source's relay may take until it listens.
const LISTEN_WITHIN: Duration = Duration::from_secs(20);

/// What an end measured before a break, beside its machine's record.
pub(super) const SENT: &str = "sent.json";
pub(super) const RECEIVED: &str = "received.json";

fn put<T: Serialize>(dir: &Path, name: &str, value: &T) {
    let written = serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|bytes| std::fs::write(dir.join(name), bytes));
    if let Err(e) = written {
        // Only a report is poorer for it.
        warn!(dir = %dir.display(), error = %e, "what was measured is not kept");
    }
}

pub(super) fn measured<T: DeserializeOwned + Default>(dir: &Path, name: &str) -> T {
    let bytes = std::fs::read(dir.join(name)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// A migration is over: what was measured of it is in its report.
pub(super) fn forget_measured(dir: &Path) {
    for name in [SENT, RECEIVED] {
        // Mostly there is none.
        let _ = std::fs::remove_file(dir.join(name));
    }
}

/// A migration that this daemon drives at one of its ends.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) vm: VmId,
    /// How it ended here; `None` while it goes on.
    pub(super) outcome: watch::Sender<Option<Result<Ended, Fault>>>,
    /// The relay's status, once there is one.
    pub(super) shown: watch::Sender<Option<watch::Receiver<RelayStatus>>>,
    /// The source asks what became of its destination.
    pub(super) asking: watch::Sender<bool>,
    /// Where the center's word on a lost destination goes.
    fate: StdMutex<Option<oneshot::Sender<DestinationFate>>>,
    pub(super) cancel: tokio_util::sync::CancellationToken,
    pub(super) lost: watch::Sender<Option<String>>,
}

impl Moving {
    pub(super) fn steering(&self) -> Steering {
        Steering { cancel: self.cancel.clone(), lost: self.lost.subscribe() }
    }

    /// Asks the center, through whoever follows, what became of a lost destination. The machine is
    /// held until somebody knows; the question is put again and again until it is answered.
    pub(super) async fn ask_fate(&self) -> DestinationFate {
        let (tell, told) = oneshot::channel();
        *self.fate.lock().unwrap_or_else(PoisonError::into_inner) = Some(tell);
        self.asking.send_replace(true);
        let tired = async {
            self.cancel.cancelled().await;
            tokio::time::sleep(CANCEL_LIMIT).await;
        };
        let fate = tokio::select! {
            fate = told => fate.unwrap_or(DestinationFate::Unknown),
            () = tired => DestinationFate::Unknown,
        };
        self.asking.send_replace(false);
        fate
    }

    /// Answers that question; tells whether it was put.
    pub(super) fn answer(&self, fate: DestinationFate) -> bool {
        let waiting = self.fate.lock().unwrap_or_else(PoisonError::into_inner).take();
        waiting.is_some_and(|tell| tell.send(fate).is_ok())
    }
}

/// Ends a migration's story even when the task that drives it panics.
struct Ending(Arc<Moving>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.outcome.send_if_modified(|o| {
            let unsaid = o.is_none();
            if unsaid {
                *o = Some(Err(Fault::internal("a migration's end failed; see the site's log")));
            }
            unsaid
        });
    }
}

/// How one end of a migration ended well.
#[derive(Debug, Clone)]
pub(super) enum Ended {
    Sent(Box<Sent>),
    Received(Box<Received>),
}

/// The moves of one site.
pub(super) struct Moves {
    site: Name,
    dirs: SiteDirs,
    machines: Arc<Machines>,
    relays: Arc<Relays>,
    all: StdMutex<HashMap<MigrationId, Arc<Moving>>>,
}

impl Moves {
    /// None that this daemon drives yet.
    pub(super) fn new(
        site: Name,
        dirs: SiteDirs,
        machines: Arc<Machines>,
        relays: Arc<Relays>,
    ) -> Self {
        Self { site, dirs, machines, relays, all: StdMutex::default() }
    }

    /// One that this daemon drives, or has driven lately.
    pub(super) fn get(&self, id: MigrationId) -> Option<Arc<Moving>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub(super) fn register(&self, id: MigrationId, vm: VmId) -> Arc<Moving> {
        let moving = Arc::new(Moving {
            vm,
            outcome: watch::Sender::new(None),
            shown: watch::Sender::new(None),
            asking: watch::Sender::new(false),
            fate: StdMutex::default(),
            cancel: tokio_util::sync::CancellationToken::new(),
            lost: watch::Sender::new(None),
        });
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // Ended ones are kept until their machine moves again, so that a late question is answered.
        all.retain(|_, m| m.vm != vm || m.outcome.borrow().is_none());
        all.insert(id, Arc::clone(&moving));
        moving
    }

    /// Drives one end on a task of its own.
    pub(super) fn drive(
        moving: &Arc<Moving>,
        work: impl Future<Output = Result<Ended, Fault>> + Send + 'static,
    ) {
        let ending = Ending(Arc::clone(moving));
        tokio::spawn(async move {
            let outcome = work.await;
            ending.0.outcome.send_replace(Some(outcome));
        });
    }

    pub(super) async fn ended(&self, id: MigrationId) -> Result<Ended, Fault> {
        let moving = self.get(id).ok_or_else(|| self.no_such_move(id))?;
        let mut outcome = moving.outcome.subscribe();
        let ended = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Fault::internal("a migration ended without a word"))?;
        ended.clone().unwrap_or_else(|| Err(Fault::internal("a migration without an end")))
    }

    /// Waits until a machine that comes in is whole.
    pub(super) async fn received(&self, id: MigrationId) -> Result<Vec<u8>, Fault> {
        match self.ended(id).await? {
            Ended::Received(r) => {
                serde_json::to_vec(&*r).map_err(|e| Fault::internal(e.to_string()))
            }
            Ended::Sent(_) => Err(Fault::invalid("this site is the source of that migration")),
        }
    }

    /// Tells the progress of a migration at its source, and ends as it ends. A caller that goes
    /// away stops nothing; one that cancels does.
    pub(super) async fn follow(&self, id: MigrationId, call: &Call) -> Result<Vec<u8>, Fault> {
        let asking = Asked::arrives();
        let moving = self.get(id).ok_or_else(|| self.no_such_move(id))?;
        let next = match self.machines.entry(moving.vm).await {
            Ok(e) => e.lock().await.record.migration.as_ref().and_then(|m| m.next),
            Err(_) => None,
        };
        let switched = News::Switched { generation: next.unwrap_or(UNKNOWN_GENERATION) };
        let show = async {
            let mut shown = moving.shown.subscribe();
            let status = shown.wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
            if let Some(status) = status {
                report_progress(status, call.clone(), switched.clone()).await;
            }
            std::future::pending::<()>().await;
        };
        let ask = async {
            let mut asking = moving.asking.subscribe();
            while asking.wait_for(|a| *a).await.is_ok() {
                call.news(News::Uncertain);
                // The question may be dropped on its way, and so may the answer.
                if let Ok(Err(_)) = tokio::time::timeout(ASK_EVERY, asking.wait_for(|a| !*a)).await
                {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let cancel = async {
            call.cancel.cancelled().await;
            moving.cancel.cancel();
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = self.ended(id) => ended?,
            () = show => return Err(Fault::internal("a progress that ends")),
            () = ask => return Err(Fault::internal("a question that ends")),
            () = cancel => return Err(Fault::internal("a cancel that ends")),
        };
        match ended {
            Ended::Sent(sent) => {
                // Told once more: the end may have come before the progress.
                call.news(switched.clone());
                let sent = Sent { asking: asking.replies(), ..*sent };
                serde_json::to_vec(&sent).map_err(|e| Fault::internal(e.to_string()))
            }
            Ended::Received(_) => {
                Err(Fault::invalid("this site is the destination of that migration"))
            }
        }
    }

    /// Where the relay of a machine that leaves listens; `None` once it has met the destination's.
    pub(super) async fn listening(&self, id: MigrationId) -> Result<Option<SocketAddr>, Fault> {
        let moving = self.get(id).ok_or_else(|| self.no_such_move(id))?;
        if moving.outcome.borrow().is_some() {
            // That of the attempt before; the next is about to begin.
            return Err(Fault::unavailable("the source's relay has ended"));
        }
        let found = async {
            let mut shown = moving.shown.subscribe();
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

    /// Has the relay of a machine that arrives dial that of its source.
    pub(super) async fn dial(
        &self,
        id: MigrationId,
        vm: VmId,
        address: SocketAddr,
    ) -> Result<(), Fault> {
        let record = self.machines.entry(vm).await?.lock().await.record.clone();
        let migration = record.migration.as_ref();
        let migration = migration
            .filter(|m| m.id == id && m.end == End::Destination)
            .ok_or_else(|| self.no_such_move(id))?;
        let paths = MovePaths::of(&self.dirs.run, migration);
        let relay = RelayClient::attach(&paths.control).await.map_err(into_fault)?;
        if relay.command(&RelayCommand::Dial { address }).await.map_err(into_fault)? {
            return Ok(());
        }
        Err(Fault::conflict("its relay has met the source's already, or has ended"))
    }

    /// The destination of a migration is lost, as the center knows before the relay.
    pub(super) fn mark_lost(&self, id: MigrationId, why: String) -> Result<(), Fault> {
        let moving = self.get(id).ok_or_else(|| self.no_such_move(id))?;
        moving.lost.send_replace(Some(why));
        Ok(())
    }

    /// Why this site can't follow a move.
    pub(super) fn no_such_move(&self, id: MigrationId) -> Fault {
        Fault::unavailable(format!(
            "the move was given up: the daemon of site '{}' was restarted before the switch ({id})",
            self.site
        ))
        .hint("see where the machine runs: godwit vm list")
    }

    /// Writes down that the machine has begun to run at its destination: from then on nobody else
    /// may.
    pub(super) async fn note_run(&self, record: &MachineRecord, relay: &RelayClient) {
        if !relay.wait(|s| s.committed).await.is_ok_and(|s| s.committed) {
            return;
        }
        self.mark_run(record.vm).await;
    }

    /// Changes what the record says of a machine's migration, and writes it down.
    pub(super) async fn change_migration(
        &self,
        vm: VmId,
        change: impl FnOnce(&mut Migration),
    ) -> Result<MachineRecord, Fault> {
        let entry = self.machines.entry(vm).await?;
        let mut e = entry.lock().await;
        let Some(m) = &mut e.record.migration else {
            return Err(Fault::conflict(format!(
                "machine '{}' is in no migration at '{}'",
                e.record.name, self.site
            )));
        };
        change(m);
        e.record.save(&self.dirs.vm(vm))?;
        Ok(e.record.clone())
    }

    pub(super) async fn mark_run(&self, vm: VmId) {
        if let Err(f) = self.change_migration(vm, |m| m.runs = true).await {
            warn!(error = %f, "it was not written down that a machine runs");
        }
    }

    /// A machine that has left has run here: its disk here is not what it left with.
    pub(super) async fn mark_ran_on(&self, vm: VmId) {
        if let Err(f) = self.change_migration(vm, |m| m.ran_on = true).await {
            warn!(error = %f, "it was not written down that a machine has run on");
        }
    }

    pub(super) async fn keep_sent(&self, vm: VmId, sent: &Sent) {
        put(&self.dirs.vm(vm), SENT, sent);
    }

    pub(super) async fn keep_received(&self, vm: VmId, received: &Received) {
        put(&self.dirs.vm(vm), RECEIVED, received);
    }

    /// The machine of a migration at this end, with its QEMU if that lives.
    pub(super) async fn at_end(
        &self,
        id: MigrationId,
        vm: VmId,
        end: End,
    ) -> Result<(MachineRecord, Option<Machine>), Fault> {
        let entry = self.machines.entry(vm).await?;
        let e = entry.lock().await;
        let action = match end {
            End::Source => Action::ResumeDeparture,
            End::Destination => Action::ResumeArrival,
        };
        let _ = e.state(&self.site).in_move(&e.record, id).allows(action)?;
        Ok((e.record.clone(), e.machine.clone()))
    }

    /// Ends what is left of the last attempt, and begins a new one.
    pub(super) async fn next_attempt(
        &self,
        record: &MachineRecord,
    ) -> Result<MachineRecord, Fault> {
        if let Some(m) = &record.migration {
            self.relays.end(m).await;
            if self.get(m.id).is_some() {
                let _ = tokio::time::timeout(RELEASE_WITHIN, self.ended(m.id)).await;
            }
        }
        self.change_migration(record.vm, |m| {
            m.attempt += 1;
            m.given_up = None;
        })
        .await
    }

    /// The machine that is in that migration here.
    pub(super) async fn traveller(
        &self,
        id: MigrationId,
    ) -> Result<(MachineRecord, Option<Machine>), Fault> {
        let entries: Vec<_> = self.machines.now().await.into_iter().map(|(_, e)| e).collect();
        for entry in entries {
            let e = entry.lock().await;
            if e.record.migration.as_ref().is_some_and(|m| m.id == id) {
                return Ok((e.record.clone(), e.machine.clone()));
            }
        }
        Err(self.no_such_move(id))
    }

    /// Enters a migration that goes on only over new relays.
    pub(super) fn interrupted(&self, record: &MachineRecord, migration: &Migration, why: &str) {
        warn!(vm = %record.name, error = %why, "its relay is gone and it still needs the other end");
        let moving = self.register(migration.id, record.vm);
        let e = MoveError::Interrupted { why: why.to_owned() };
        moving.outcome.send_replace(Some(Err(Fault::of(&e))));
    }

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

    pub(super) fn paths(&self, record: &MachineRecord) -> Result<MovePaths, Fault> {
        let migration = record
            .migration
            .as_ref()
            .ok_or_else(|| Fault::internal("a machine that is in no migration"))?;
        Ok(MovePaths::of(&self.dirs.run, migration))
    }

    /// A machine that runs at its destination must not run here, whatever its QEMU thinks.
    pub(super) async fn hold_still(&self, record: &MachineRecord, machine: &Machine) {
        if !runs(Some(machine)).await {
            return;
        }
        warn!(vm = %record.name, "it runs at its destination; it is held here");
        self.mark_ran_on(record.vm).await;
        if let Err(e) = machine.stop().await {
            warn!(vm = %record.name, error = %godwit_types::chain(&e), "it is not held");
        }
    }

    /// The machine is in no move any more.
    pub(super) async fn unmark(&self, vm: VmId) {
        let Ok(entry) = self.machines.entry(vm).await else { return };
        self.unmark_entry(&mut *entry.lock().await);
    }

    pub(super) fn unmark_entry(&self, e: &mut Entry) {
        e.record.migration = None;
        let dir = self.dirs.vm(e.record.vm);
        if let Err(f) = e.record.save(&dir) {
            warn!(error = %f, "a record was not written");
        }
        forget_measured(&dir);
    }

    pub(super) async fn stay(&self, record: &MachineRecord, machine: &Machine) {
        if let Err(e) = machine.migrate_cancel().await {
            info!(vm = %record.name, error = %chain(&e), "no migration to cancel");
        }
        self.unmark(record.vm).await;
        if let Some(m) = &record.migration {
            self.relays.end(m).await;
            self.relays.clear(m);
        }
    }

    /// What became of a source whose QEMU is gone, when the machine never ran elsewhere.
    pub(super) async fn ended_here(&self, record: &MachineRecord) -> Fault {
        self.unmark(record.vm).await;
        if let Some(m) = &record.migration {
            self.relays.end(m).await;
            self.relays.clear(m);
        }
        let why = record.reason.clone().unwrap_or_else(|| "its QEMU is gone".into());
        Fault::new(
            Code::Damaged,
            format!(
                "machine '{}' ended at '{}' before it had moved: {why}",
                record.name, self.site
            ),
        )
    }

    /// After a start: ends relays and removes files of moves that no machine here is in.
    pub(super) async fn sweep(&self) {
        let mut wanted = Vec::new();
        for entry in self.machines.read().await.values() {
            if let Some(m) = &entry.lock().await.record.migration {
                wanted.push(MovePaths::of(&self.dirs.run, m).dir);
            }
        }
        let Ok(found) = std::fs::read_dir(&self.dirs.run) else { return };
        for dir in found.flatten().map(|f| f.path()) {
            let move_of =
                dir.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"mig-"));
            if move_of && !wanted.contains(&dir) {
                info!(dir = %dir.display(), "a move that is over left this behind");
                super::relays::end_all_below(&dir).await;
                let _ = std::fs::remove_dir_all(&dir);
            }
        }
    }
}
