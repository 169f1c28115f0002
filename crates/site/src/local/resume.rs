//! Migrations after a break: found again by a new daemon, taken up over new relays, given up.
//!
//! Beyond the commit point nothing is undone. Both QEMUs hold what they have, and the disk's blocks
//! are where they are; the center asks both ends how far they are ([`SiteRequest::MigrateStatus`]),
//! has the destination start a relay that waits, and the source one that goes on.
//!
//! [`SiteRequest::MigrateStatus`]: crate::SiteRequest::MigrateStatus

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use godwit_disk::image::FrozenChain;
use godwit_disk::{MidLayer, NbdServer};
use godwit_migrate::RelayClient;
use godwit_migrate::hybrid::{
    Asking, MoveError, Received, Sent, follow_outgoing, recover_disk, recover_incoming,
    recover_outgoing,
};
use godwit_migrate::relay::{RelayCommand, RelayDisk, RelayPhase};
use godwit_qemu::Machine;
use godwit_types::{Fault, Generation, MigrationId, VmId, chain};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::allowed::{Action, Activity, First};
use super::arrivals::Arrivals;
use super::course::{
    AfterRestart, End, Migration, Step, arrival_after_restart, departure_after_restart,
};
use super::departures::{Departures, NotSent};
use super::drive::{Drives, RECEIVED, RELEASE_WITHIN, SENT, measured};
use super::faults::into_fault;
use super::filling;
use super::filling::MID;
use super::moving::{Moves, memory_status};
use super::owner::{Look, Needs};
use super::progress::runs;
use super::ran;
use super::record::{DiskBase, MachineRecord};
use super::relays::{GuestMemory, MovePaths, Part};
use crate::{Call, Incoming, MemoryStatus, MoveStatus};

/// How long a QEMU that was told to switch may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Why a source has nothing any more that its machine could go on with.
const RAN_ON: &str = "it has run there after it had left";

impl Moves {
    /// After the daemon's return: takes up a machine that is in a migration.
    pub(super) async fn resume_after_restart(
        &self,
        record: MachineRecord,
        machine: Option<Machine>,
    ) {
        let Some(migration) = record.migration.clone() else { return };
        match migration.end() {
            End::Destination => {
                self.arrivals.resume_after_restart(record, migration, machine).await;
            }
            End::Source => {
                self.departures.resume_after_restart(record, migration, machine).await;
            }
        }
    }
}

impl Arrivals {
    async fn resume_after_restart(
        self: &Arc<Self>,
        record: MachineRecord,
        migration: Migration,
        machine: Option<Machine>,
    ) {
        let Some(machine) = machine else {
            self.parts.relays.end(&migration).await;
            if self.has_run(&record, None).await {
                let at = (record.vm, &record.name);
                self.drives.interrupted(migration.id, at, "its QEMU is gone");
            } else {
                warn!(vm = %record.name, "its QEMU is gone before it ran here");
                self.undo(&record).await;
            }
            return;
        };
        let paths = MovePaths::of(&self.parts.dirs.run, &migration);
        let relay = RelayClient::attach(&paths.control).await;
        if relay.is_err() {
            // One that does not answer could still write down that it runs.
            self.parts.relays.end(&migration).await;
        }
        let has_run = self.has_run(&record, Some(&machine)).await;
        if has_run {
            self.note_whole(&record, &machine).await;
        }
        let phase = relay.as_ref().ok().map(|r| r.status().phase);
        match (arrival_after_restart(has_run, phase), relay) {
            (AfterRestart::Follow, Ok(relay)) => {
                info!(vm = %record.name, "its arrival goes on");
                let received = measured(&self.parts.dirs.vm(record.vm), RECEIVED);
                self.spawn_arrival(record, machine, relay, received, has_run);
            }
            (AfterRestart::TakeBack, relay) => {
                let error = relay.err().map(|e| chain(&e));
                warn!(vm = %record.name, error, "it had not run here when the daemon ended");
                self.undo(&record).await;
            }
            (AfterRestart::Interrupted | AfterRestart::Follow, relay) => {
                let why = relay.err().map(|e| chain(&e)).unwrap_or_default();
                self.drives.interrupted(migration.id, (record.vm, &record.name), &why);
            }
        }
    }
}

impl Departures {
    async fn resume_after_restart(
        self: &Arc<Self>,
        record: MachineRecord,
        migration: Migration,
        machine: Option<Machine>,
    ) {
        let at = (record.vm, &record.name);
        let Some(machine) = machine else {
            self.parts.relays.end(&migration).await;
            self.drives.interrupted(migration.id, at, "its QEMU is gone");
            return;
        };
        if migration.returns() {
            return self.returns_after_restart(&record, &migration, &machine).await;
        }
        let paths = MovePaths::of(&self.parts.dirs.run, &migration);
        let relay = RelayClient::attach(&paths.control).await;
        // QEMU switches as soon as the relay has been told to read on.
        let switching = relay.as_ref().is_ok_and(|r| r.status().phase >= RelayPhase::Switching);
        if switching {
            let _ = tokio::time::timeout(STOP_WITHIN, async {
                while runs(Some(&machine)).await {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
            .await;
        }
        if migration.has_run() {
            self.hold_still(&record).await;
        }
        let at_home = !migration.has_run() && runs(Some(&machine)).await;
        let committed = relay.as_ref().ok().map(|r| r.status().committed);
        match (departure_after_restart(at_home, committed), relay) {
            (AfterRestart::TakeBack, relay) => {
                if let Ok(relay) = relay {
                    let why = "the daemon at the source was restarted".to_owned();
                    let _ = relay.command(&RelayCommand::Abort { why }).await;
                }
                self.stay(&record, &machine).await;
            }
            (AfterRestart::Follow, Ok(relay)) => {
                info!(vm = %record.name, "its departure goes on");
                let leaving = self.drives.register(migration.id, record.vm);
                leaving.shown.send_replace(Some(relay.watch()));
                let (me, mine) = (Arc::clone(self), Arc::clone(&leaving));
                Drives::drive(&leaving, async move {
                    let mut sent: Sent = measured(&me.parts.dirs.vm(record.vm), SENT);
                    let paths = MovePaths::of(&me.parts.dirs.run, &migration);
                    let steering = mine.steering();
                    let ask = || -> Asking {
                        let asking = Arc::clone(&mine);
                        Box::pin(async move { asking.ask_fate().await })
                    };
                    let socket = &paths.qemu;
                    let done =
                        follow_outgoing(&machine, &relay, socket, &mut sent, &steering, ask).await;
                    let done = done.map_err(NotSent::from);
                    if done.is_ok() {
                        let _ = relay.command(&RelayCommand::Finish).await;
                    }
                    me.after_leaving(&record, &machine, done, sent).await
                });
            }
            (AfterRestart::Interrupted | AfterRestart::Follow, relay) => {
                let why = relay.err().map(|e| chain(&e)).unwrap_or_default();
                self.drives.interrupted(migration.id, at, &why);
            }
        }
    }

    /// Brings a machine back to this site, its source, when its destination never ran it and no
    /// relay is left that could.
    pub(super) async fn reclaim(self: &Arc<Self>, id: MigrationId) -> Result<(), Fault> {
        let (record, machine) = self.travellers.find(id).await?;
        let Some(migration) = record.migration.clone().filter(|m| m.end() == End::Source) else {
            return Err(Fault::conflict("this site is not the source of that migration"));
        };
        let Some(machine) = machine else {
            if Machine::recorded(&self.parts.dirs.vm_run(record.vm)).is_some() {
                // It lives, and answers nobody yet.
                return Err(Fault::unavailable(format!(
                    "the QEMU of '{}' does not answer yet",
                    record.name
                )));
            }
            return Err(self.ended_here(&record).await);
        };
        if runs(Some(&machine)).await {
            self.travellers.unmark(id, record.vm).await;
            return Ok(());
        }
        self.parts.relays.end(&migration).await;
        let ran = self.run_on(&record, &machine, &migration).await;
        if let Err(MoveError::Stuck | MoveError::Ended { .. }) = &ran {
            // Nothing is left to decide: it may be started from its disk, or removed.
            self.travellers.unmark(id, record.vm).await;
        }
        ran.map_err(into_fault)
    }
}

impl Moves {
    /// How far a migration has come here.
    pub(super) async fn status(&self, id: MigrationId, vm: VmId) -> Result<MoveStatus, Fault> {
        let owner = self.parts.machines.owner(vm).await?;
        // One whose arrival is made ready is no word of what will be here.
        let now = owner.wait_for(|e| e.doing.activity() != Activity::Preparing).await;
        let (record, machine) = (now.record, now.machine);
        let Some(migration) = record.migration.clone().filter(|m| m.id == id) else {
            // What arrived or left whole is in no migration any more.
            let memory = match &machine {
                Some(_) => MemoryStatus::Whole,
                None => MemoryStatus::Gone,
            };
            return Ok(MoveStatus {
                memory,
                missing_pages: 0,
                missing_blocks: Some(0),
                runs: runs(machine.as_ref()).await,
                over: true,
                why: record.reason,
            });
        };
        if migration.ran_on() {
            return Ok(MoveStatus {
                memory: MemoryStatus::Gone,
                missing_pages: 0,
                missing_blocks: None,
                runs: false,
                over: true,
                why: Some(RAN_ON.into()),
            });
        }
        let (memory, why) = match &machine {
            // One that waits for a page answers nobody, and is there.
            None if Machine::recorded(&self.parts.dirs.vm_run(vm)).is_some() => {
                (MemoryStatus::Partial, None)
            }
            None if migration.fell() => (MemoryStatus::Fell, record.reason.clone()),
            None => (MemoryStatus::Gone, record.reason.clone()),
            Some(m) if self.departures.is_stuck(&migration, m).await => {
                let why = "its QEMU broke off in the hand-over and cannot take it back";
                (MemoryStatus::Gone, Some(why.into()))
            }
            Some(m) => memory_status(m, migration.end()).await,
        };
        let (missing_pages, missing_blocks) = match migration.end() {
            End::Source => (0, Some(0)),
            End::Destination => self.arrivals.missing(&record, memory).await?,
        };
        let runs = match migration.end() {
            End::Source => migration.has_run(),
            End::Destination => self.arrivals.has_run(&record, machine.as_ref()).await,
        };
        Ok(MoveStatus { memory, missing_pages, missing_blocks, runs, over: false, why })
    }
}

impl Arrivals {
    /// Pages that the memory of a machine which is not whole lacks here.
    pub(super) fn missing_pages(&self, record: &MachineRecord) -> u64 {
        // A page that has not come is a hole in the file.
        let there = std::fs::metadata(self.parts.dirs.vm_memory(record.vm));
        let there = there.map_or(0, |m| m.blocks() * 512);
        record.memory.bytes().saturating_sub(there).div_ceil(4096)
    }

    /// Whether all of its memory had come to a machine whose QEMU is gone, as its relay has written
    /// down; `None` where a relay of a release before had it come.
    pub(super) fn had_all_memory(&self, record: &MachineRecord) -> Option<bool> {
        ran::had_all_memory(&self.parts.dirs.vm(record.vm))
    }

    /// Pages and blocks that a destination lacks.
    async fn missing(
        &self,
        record: &MachineRecord,
        memory: MemoryStatus,
    ) -> Result<(u64, Option<u64>), Fault> {
        let pages = match memory {
            MemoryStatus::Whole => {
                // Its relay may have been lost before it could.
                let noted = ran::note_all_memory(&self.parts.dirs.vm(record.vm));
                if let Err(error) = noted {
                    warn!(vm = %record.name, %error, "that all of it is here is not written down");
                }
                0
            }
            // Pages that are zero may be holes as well.
            MemoryStatus::Gone if self.had_all_memory(record) == Some(true) => 0,
            MemoryStatus::Gone | MemoryStatus::Partial => self.missing_pages(record),
            // What was written down counts, whatever the file looks like.
            MemoryStatus::Fell => self.missing_pages(record).max(1),
        };
        let image = self.parts.images.of(record)?;
        if image.disk_path().is_none() || record.disk_base == DiskBase::Mid {
            return Ok((pages, Some(0)));
        }
        // A relay that lives knows better than what it last wrote down.
        let told = record
            .migration
            .as_ref()
            .and_then(|m| self.drives.get(m.id))
            .and_then(|m| m.shown.borrow().as_ref().map(|s| s.borrow().counts));
        let mid = filling::layer(&self.parts.dirs.vm(record.vm));
        let blocks = match MidLayer::missing(&mid) {
            Ok((_, true)) => Some(0),
            // Nobody starts from a layer that is not sealed, even if every block has come.
            Ok((left, false)) => {
                let counted = told.filter(|c| c.disk_blocks > 0);
                Some(counted.map_or(left, |c| left.min(c.disk_left)).max(1))
            }
            Err(_) if MidLayer::is_begun(&mid) => {
                return MidLayer::missing(&mid).map(|_| (pages, None)).map_err(into_fault);
            }
            Err(_) => None,
        };
        Ok((pages, blocks))
    }

    /// Starts a new relay for a machine that still needs its source: one that runs here, or one
    /// whose memory is lost and whose disk is brought.
    pub(super) async fn resume(
        self: &Arc<Self>,
        id: MigrationId,
        vm: VmId,
        memory: bool,
    ) -> Result<Incoming, Fault> {
        let (record, machine) = self.travellers.at_end(id, vm, End::Destination).await?;
        if memory && machine.is_none() {
            return Err(memory_is_gone(&record));
        }
        let record = self.next_attempt(&record).await?;
        let paths = MovePaths::of(&self.parts.dirs.run, record.in_migration()?);
        let image = self.parts.images.of(&record)?;
        let disk = match image.disk_path() {
            Some(base) => {
                let bytes = godwit_disk::image::check_base(&base).map_err(into_fault)?;
                let mid = filling::place(&self.parts.dirs.vm(vm));
                let (nbd, written) = (paths.nbd.clone(), paths.written.clone());
                Some(RelayDisk::Destination { base, mid, bytes, nbd, written })
            }
            None => None,
        };
        let has_disk = disk.is_some();
        let part = match memory {
            true => (Part::Rest, GuestMemory::of_file(&self.parts.dirs.vm_memory(vm))?),
            false => (Part::Disk, GuestMemory::Unseen),
        };
        let relay = self.parts.relays.start(&record, self.parts.reach.awaits(), disk, part).await?;
        let address = self.parts.reach.reported_address(&relay).await?;
        let received: Received = measured(&self.parts.dirs.vm(vm), RECEIVED);
        let mut whole = None;
        if let Some(machine) = machine {
            if has_disk {
                machine.let_connect(&paths.nbd).map_err(into_fault)?;
            }
            if memory {
                recover_incoming(&machine, &paths.qemu).await.map_err(into_fault)?;
                whole = Some(machine);
            } else if memory_status(&machine, End::Destination).await.0 == MemoryStatus::Whole {
                ran::note_all_memory(&self.parts.dirs.vm(vm))?;
                whole = Some(machine);
            }
        }
        match whole {
            Some(machine) => self.spawn_arrival(record, machine, relay, received, true),
            None => self.spawn_disk_arrival(record, relay, received),
        }
        Ok(Incoming { migration: id, address, peer: self.parts.name.clone() })
    }

    /// Ends the arrival of a machine whose memory and disk are all here.
    pub(super) async fn finish(&self, id: MigrationId, vm: VmId) -> Result<(), Fault> {
        let (record, machine) = self.travellers.at_end(id, vm, End::Destination).await?;
        let machine = machine.ok_or_else(|| memory_is_gone(&record))?;
        let record = self.next_attempt(&record).await?;
        if let Some(layers) = self.pivot_of(&record) {
            let paths = MovePaths::of(&self.parts.dirs.run, record.in_migration()?);
            let dir = self.parts.dirs.vm(vm);
            let mid = dir.join(MID);
            if filling::is_there(&dir) {
                MidLayer::take_over(&filling::place(&dir), &mid).map_err(into_fault)?;
            }
            let base = self.parts.images.of(&record)?.disk_path();
            let base = base.ok_or_else(|| Fault::internal("a disk without a base"))?;
            // What QEMU still reads through the link is answered from here until the pivot.
            let chain = FrozenChain::open(&base, &[mid]).map_err(into_fault)?;
            let server = NbdServer::bind(&paths.nbd, "").map_err(|e| {
                Fault::internal(format!("offering the disk on {}: {e}", paths.nbd.display()))
            })?;
            machine.let_connect(&paths.nbd).map_err(into_fault)?;
            let stop = CancellationToken::new();
            let served = server.serve(Arc::new(Arc::new(chain)), stop.clone());
            machine.withdraw_written().await;
            let pivot = machine.pivot_backing(layers);
            tokio::pin!(served, pivot);
            let took = tokio::select! {
                took = &mut pivot => took,
                ended = &mut served => {
                    return Err(Fault::internal(format!("offering the disk ended: {ended:?}")));
                }
            };
            stop.cancel();
            let _ = served.await;
            took.map_err(into_fault)?;
        }
        self.settle_arrival(&record).await
    }

    /// Follows the disk of a machine whose memory is lost: the disk at least is kept whole.
    fn spawn_disk_arrival(
        self: &Arc<Self>,
        record: MachineRecord,
        relay: RelayClient,
        received: Received,
    ) {
        let Some(migration) = record.migration.clone() else { return };
        let coming = self.drives.register(migration.id, record.vm);
        coming.shown.send_replace(Some(relay.watch()));
        let vm = record.vm;
        Drives::drive(&coming, async move {
            let last = relay.wait(|s| s.phase >= RelayPhase::Done).await.map_err(into_fault)?;
            if last.phase < RelayPhase::Done {
                let why = format!("{:?}", last.end);
                return Err(Fault::of(&MoveError::Interrupted { why }));
            }
            let _ = relay.command(&RelayCommand::Finish).await;
            info!(%vm, "its disk is whole");
            Ok(received)
        });
    }
}

impl Departures {
    /// Starts a new relay at the source and drives the rest of the migration through it.
    pub(super) async fn resume(
        self: &Arc<Self>,
        id: MigrationId,
        vm: VmId,
        to: Incoming,
        memory: bool,
        call: &Call,
    ) -> Result<Vec<u8>, Fault> {
        let (record, machine) = self.travellers.at_end(id, vm, End::Source).await?;
        let launch = machine.as_ref().map(Machine::launch);
        if memory && machine.is_none() {
            return Err(memory_is_gone(&record));
        }
        let record = self.next_attempt(&record).await?;
        let chain = match launch {
            Some(l) => l.disk,
            None => {
                let image = self.parts.images.of(&record)?;
                self.parts.launcher.launch(&record, &image).await?.disk
            }
        };
        let disk = self.source_disk(&record, chain)?;
        let meeting = self.parts.reach.meets(&to)?;
        let leaving = self.drives.register(id, vm);
        let (me, mine) = (Arc::clone(self), Arc::clone(&leaving));
        Drives::drive(&leaving, async move {
            let mut sent: Sent = measured(&me.parts.dirs.vm(vm), SENT);
            let paths = MovePaths::of(&me.parts.dirs.run, record.in_migration()?);
            let part = if memory { Part::Rest } else { Part::Disk };
            let part = (part, GuestMemory::Unseen);
            let relay = me.parts.relays.start(&record, meeting, disk, part).await?;
            mine.shown.send_replace(Some(relay.watch()));
            let done = match machine.as_ref().filter(|_| memory) {
                Some(machine) => {
                    let socket = &paths.qemu;
                    recover_outgoing(machine, &relay, socket, &mut sent, &mine.steering()).await
                }
                None => recover_disk(&relay, &mut sent).await,
            };
            let done = done.map_err(|e| Fault::of(&e));
            if done.is_ok() {
                let _ = relay.command(&RelayCommand::Finish).await;
            } else {
                // Nothing but the destination's word ends what the source keeps now.
                me.keep_sent(id, vm, &sent).await;
                if let Some(m) = &record.migration {
                    me.parts.relays.end(m).await;
                }
            }
            done.map(|()| sent)
        });
        self.follow(id, call).await
    }
}

impl Arrivals {
    /// What the machine lacks here is not waited for any more. Its QEMU is left as it is.
    pub(super) async fn abandon(
        &self,
        id: MigrationId,
        vm: VmId,
        why: String,
    ) -> Result<(), Fault> {
        let why: String = why.chars().take(1000).collect();
        let record = self.travellers.note(id, vm, Step::Abandoned(why)).await?;
        warn!(vm = %record.name, reason = ?record.migration.as_ref().and_then(Migration::abandoned), "given up");
        Ok(())
    }
}

impl Departures {
    /// A machine runs elsewhere for good: what was kept of it here is needed no more.
    pub(super) async fn release(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        let needs = Some(Needs::known(Action::Release, generation));
        let e = self.parts.machines.owner(vm).await?.ask(Look { needs }).await?;
        let first = e.state(&self.parts.name).allows(Action::Release)?;
        let migration = e.record.migration;
        if let Some(m) = migration.filter(|_| first == First::Move) {
            // What the destination may still need stays until it needs it no more.
            self.drives.ended_within(m.id, RELEASE_WITHIN).await;
            self.parts.relays.end(&m).await;
            self.parts.relays.clear(&m);
            self.travellers.unmark(m.id, vm).await;
        }
        Ok(())
    }
}

fn memory_is_gone(record: &MachineRecord) -> Fault {
    Fault::new(
        godwit_types::Code::Damaged,
        format!("the memory of machine '{}' is gone with its QEMU", record.name),
    )
}
