//! Migration as this site does it: one end each time.
//!
//! ```text
//! source:       MigrateManifest -> MigrateSend ............ [switched] ...... sent -> MigrateRelease
//! destination:            MigratePrepare -> (relay, waiting QEMU) -> runs ... whole -> MigrateReceived
//! ```
//!
//! The relay of each end is a process of its own, and the machine's record says which migration it
//! is in, so that a daemon that comes back finds both again.

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use godwit_disk::image::{Backing, check_base, create_overlay};
use godwit_migrate::hybrid::{
    Asking, DestinationFate, MoveError, Received, Sent, prepare_incoming, receive, send,
};
use godwit_migrate::relay::{RelayCommand, RelayDisk, RelayPhase, RelayRole, RelayStatus};
use godwit_migrate::{RelayClient, RelayConfig};
use godwit_qemu::{
    DiskChain, DiskLayer, Layer, Life, Machine, Manifest, MemorySource, Node, Start, VmGenId,
};
use godwit_types::{Code, Generation, Hash, MigrationId, Name, VmId};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

use super::LocalSite;
use super::machines::{TOP, coded, joined, layer_bytes};
use super::record::{Below, End, MachineRecord, Meant, Migration};
use crate::error::{Fault, chain};
use crate::ops::Progress;
use crate::site::{Call, Incoming, MachineStatus, SWITCHED, UNCERTAIN};

/// How long a relay may take until it can be steered.
const RELAY_WITHIN: Duration = Duration::from_secs(20);
/// How long a source waits for the center's word on a lost destination.
const FATE_WITHIN: Duration = Duration::from_secs(120);
/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// The longest manifest that is read, in bytes.
const MAX_MANIFEST: usize = 256 << 10;

/// What the destination must know of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MoveManifest {
    /// Form of this manifest. 1: the first.
    format: u32,
    image_hash: Hash,
    substrate: Option<godwit_types::SubstrateId>,
    machine: Manifest,
    mac: godwit_qemu::MacAddress,
    disk_bytes: Option<u64>,
    /// Bytes that its layers above the base image take: what the destination needs room for.
    layer_bytes: u64,
    /// Its generation GUID, which it keeps: a guest that only moves has no reason to reseed.
    generation_id: Option<uuid::Uuid>,
}

const FORMAT: u32 = 1;

/// A migration that this daemon drives at one of its ends.
#[derive(Debug)]
pub(super) struct Moving {
    vm: VmId,
    /// How it ended here; `None` while it goes on.
    outcome: watch::Sender<Option<Result<Ended, Fault>>>,
    /// Where the center's word on a lost destination goes.
    fate: StdMutex<Option<oneshot::Sender<DestinationFate>>>,
}

/// How one end of a migration ended well.
#[derive(Debug, Clone)]
pub(super) enum Ended {
    Sent,
    Received(Box<Received>),
}

pub(super) type Moves = StdMutex<HashMap<MigrationId, Arc<Moving>>>;

impl LocalSite {
    fn moving(&self, id: MigrationId) -> Option<Arc<Moving>> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    fn enter_move(&self, id: MigrationId, vm: VmId) -> Arc<Moving> {
        let moving =
            Arc::new(Moving { vm, outcome: watch::Sender::new(None), fate: StdMutex::default() });
        let mut all = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        // Ended ones are kept until their machine moves again, so that a late question is answered.
        all.retain(|_, m| m.vm != vm || m.outcome.borrow().is_none());
        all.insert(id, Arc::clone(&moving));
        moving
    }

    /// The manifest of a machine that is to move.
    pub(super) async fn manifest(
        &self,
        vm: VmId,
        generation: Generation,
    ) -> Result<Vec<u8>, Fault> {
        let entry = self.entry(vm).await?;
        let e = entry.lock().await;
        Self::fence(&e.record, generation)?;
        let machine = super::running(&e)?;
        let image = self.image_by_hash(&e.record)?;
        let disk_bytes = match image.disk_path() {
            Some(base) => Some(check_base(&base).map_err(coded)?),
            None => None,
        };
        let manifest = MoveManifest {
            format: FORMAT,
            image_hash: e.record.image_hash,
            substrate: e.record.substrate,
            machine: machine.manifest(),
            mac: e.record.mac,
            disk_bytes,
            layer_bytes: layer_bytes(machine)?,
            generation_id: machine.generation_id().await.map_err(coded)?,
        };
        serde_json::to_vec(&manifest).map_err(|e| Fault::internal(e.to_string()))
    }

    /// Makes ready for a machine: a relay that listens, a QEMU that waits.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        id: MigrationId,
        machine: MachineStatus,
        generation: Generation,
        from: Name,
        manifest: &[u8],
    ) -> Result<Incoming, Fault> {
        let manifest = parse_manifest(manifest)?;
        self.check_room(machine.memory)?;
        self.check_disk_room(manifest.layer_bytes)?;
        let record = MachineRecord {
            vm: machine.vm,
            name: machine.name,
            generation,
            meant: Meant::Running,
            image: machine.image,
            image_hash: manifest.image_hash,
            substrate: manifest.substrate,
            arch: machine.arch,
            memory: machine.memory,
            vcpus: machine.vcpus,
            mac: manifest.mac,
            below: Below::Image,
            migration: Some(Migration { id, end: End::Destination, peer: from }),
            reason: None,
        };
        let image = self.sound_image(&record).await?;
        let here = Manifest::of(&self.spec_of(&record, &image), &self.qemu);
        manifest.machine.check(&here).map_err(coded)?;
        let entry = self.enter(record.clone()).await?;
        let mut e = entry.lock().await;
        match self.prepare_entered(&record, &image, &manifest).await {
            Ok((qemu, relay, address)) => {
                e.machine = Some(qemu.clone());
                drop(e);
                self.take_in(id, record, qemu, relay, false);
                Ok(Incoming { migration: id, address, peer: self.name.clone() })
            }
            Err(f) => {
                drop(e);
                self.end_relay(id).await;
                self.leave(record.vm).await;
                Err(f)
            }
        }
    }

    async fn prepare_entered(
        &self,
        record: &MachineRecord,
        image: &godwit_image::Image,
        manifest: &MoveManifest,
    ) -> Result<(Machine, RelayClient, std::net::SocketAddr), Fault> {
        let dir = self.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        record.save(&dir)?;
        let paths = self.move_paths(record)?;
        let disk = match (image.disk_path(), manifest.disk_bytes) {
            (Some(base), Some(bytes)) => {
                let top = dir.join(TOP);
                tokio::task::spawn_blocking(move || create_overlay(&top, Backing::None, bytes))
                    .await
                    .map_err(joined)?
                    .map_err(coded)?;
                let mid = dir.join(MID);
                Some(RelayDisk::Destination { base, mid, bytes, nbd: paths.nbd.clone() })
            }
            _ => None,
        };
        let has_disk = disk.is_some();
        let role = RelayRole::Destination { listen: (self.options.relay_address, 0).into() };
        let relay = self.start_relay(record, role, disk, false).await?;
        let listening =
            relay.wait(|s| s.listening.is_some() || s.end.is_some()).await.map_err(coded)?;
        let address = listening
            .listening
            .ok_or_else(|| Fault::internal(format!("the relay ended: {:?}", listening.end)))?;
        let mut launch = self.launch(record, image)?;
        launch.start = Start::Incoming;
        if let Some(id) = manifest.generation_id {
            launch.vmgenid = VmGenId::Keep(id);
        }
        launch.memory = MemorySource::Shared { path: self.dirs.vm_memory(record.vm) };
        if has_disk {
            let remote = Layer::Nbd { socket: paths.nbd.clone() };
            launch.disk = Some(DiskChain::over(vec![remote], dir.join(TOP)));
        }
        let machine = launch.spawn().await.map_err(coded)?;
        match prepare_incoming(&machine, &paths.qemu).await {
            Ok(()) => Ok((machine, relay, address)),
            Err(e) => {
                machine.kill().await;
                Err(Fault::of(&e))
            }
        }
    }

    /// Follows a machine that comes in, to its end, on a task of its own.
    fn take_in(
        self: &Arc<Self>,
        id: MigrationId,
        record: MachineRecord,
        machine: Machine,
        relay: RelayClient,
        resumed: bool,
    ) {
        let moving = self.enter_move(id, record.vm);
        let me = Arc::clone(self);
        tokio::spawn(async move {
            let pivot = me.pivot_of(&record);
            let outcome = match receive(&machine, &relay, pivot, resumed).await {
                Ok(received) => {
                    let _ = relay.command(&RelayCommand::Finish).await;
                    me.settle_in(&record).await.map(|()| Ended::Received(Box::new(received)))
                }
                Err(e @ MoveError::Cancelled { .. }) => {
                    let fault = me.blame_room(Fault::of(&e));
                    me.end_relay(id).await;
                    me.undo_in(&record).await;
                    Err(fault)
                }
                // The machine runs here and still needs its source.
                Err(e) => Err(Fault::of(&e)),
            };
            if let Err(f) = &outcome {
                warn!(vm = %record.name, error = %f, "a machine did not arrive whole");
            }
            moving.outcome.send_replace(Some(outcome));
        });
    }

    /// A machine has arrived and needs its source no more.
    async fn settle_in(&self, record: &MachineRecord) -> Result<(), Fault> {
        let entry = self.entry(record.vm).await?;
        let mut e = entry.lock().await;
        let dir = self.dirs.vm(record.vm);
        let mid = dir.join(MID);
        if mid.exists() {
            e.record.below = Below::Mid;
            godwit_disk::MidLayer::forget(&mid).map_err(coded)?;
        }
        e.record.migration = None;
        e.record.save(&dir)?;
        if let Ok(paths) = self.move_paths(record) {
            let _ = std::fs::remove_dir_all(&paths.dir);
        }
        info!(vm = %record.name, "has arrived");
        Ok(())
    }

    /// A machine never ran here: nothing of it stays.
    async fn undo_in(&self, record: &MachineRecord) {
        if let Ok(entry) = self.entry(record.vm).await {
            let machine = entry.lock().await.machine.take();
            if let Some(m) = machine {
                m.kill().await;
            }
        }
        self.leave(record.vm).await;
        if let Ok(paths) = self.move_paths(record) {
            let _ = std::fs::remove_dir_all(&paths.dir);
        }
    }

    /// Waits until a machine that comes in is whole.
    pub(super) async fn received(&self, id: MigrationId) -> Result<Vec<u8>, Fault> {
        match self.ended(id).await? {
            Ended::Received(r) => {
                serde_json::to_vec(&*r).map_err(|e| Fault::internal(e.to_string()))
            }
            Ended::Sent => Err(Fault::invalid("this site is the source of that migration")),
        }
    }

    async fn ended(&self, id: MigrationId) -> Result<Ended, Fault> {
        let moving = self.moving(id).ok_or_else(|| {
            Fault::not_found(format!("site '{}' has no migration {id}", self.name))
        })?;
        let mut outcome = moving.outcome.subscribe();
        let ended = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Fault::internal("a migration ended without a word"))?;
        ended.clone().unwrap_or_else(|| Err(Fault::internal("a migration without an end")))
    }

    /// Sends a machine. Returns when its destination needs nothing more of this site.
    pub(super) async fn send(
        self: &Arc<Self>,
        vm: VmId,
        generation: Generation,
        to: Incoming,
        call: Call,
    ) -> Result<Vec<u8>, Fault> {
        let entry = self.entry(vm).await?;
        let (record, machine) = {
            let mut e = entry.lock().await;
            Self::fence(&e.record, generation)?;
            Self::steady(&e.record)?;
            let machine = super::running(&e)?.clone();
            e.record.migration =
                Some(Migration { id: to.migration, end: End::Source, peer: to.peer.clone() });
            e.record.save(&self.dirs.vm(vm))?;
            (e.record.clone(), machine)
        };
        let moving = self.enter_move(to.migration, vm);
        let outcome = self.send_entered(&record, &machine, &to, &moving, &call).await;
        let ended = outcome.as_ref().map(|_| Ended::Sent).map_err(Clone::clone);
        moving.outcome.send_replace(Some(ended));
        {
            let mut e = entry.lock().await;
            // A machine that is still needed, or of which nobody knows where it runs, stays marked.
            let keep = matches!(&outcome, Err(f) if f.code == Code::Unavailable)
                && machine.life().await.is_ok_and(|l| l != Life::Running);
            if !keep {
                e.record.migration = None;
                e.record.save(&self.dirs.vm(vm))?;
            }
        }
        if outcome.is_err() {
            self.end_relay(to.migration).await;
        }
        let sent = outcome?;
        serde_json::to_vec(&sent).map_err(|e| Fault::internal(e.to_string()))
    }

    async fn send_entered(
        self: &Arc<Self>,
        record: &MachineRecord,
        machine: &Machine,
        to: &Incoming,
        moving: &Arc<Moving>,
        call: &Call,
    ) -> Result<Sent, Fault> {
        let image = self.image_by_hash(record)?;
        let disk = match (image.disk_path(), machine.launch().disk) {
            (Some(base), Some(chain)) => {
                let mut layers: Vec<PathBuf> = chain
                    .layers
                    .iter()
                    .filter_map(|l| match &l.layer {
                        Layer::Qcow2 { path } => Some(path.clone()),
                        Layer::Raw { .. } | Layer::Nbd { .. } => None,
                    })
                    .collect();
                layers.push(chain.top);
                Some(RelayDisk::Source { base, layers })
            }
            _ => None,
        };
        let role = RelayRole::Source { destination: to.address };
        let relay = self.start_relay(record, role, disk, false).await?;
        let paths = self.move_paths(record)?;
        let told = tokio::spawn(tell(relay.watch(), call.clone()));
        let (asking, asked) = (Arc::clone(moving), call.clone());
        let ask = move || -> Asking {
            let (moving, call) = (Arc::clone(&asking), asked.clone());
            Box::pin(async move { fate(&moving, &call).await })
        };
        let sent = send(machine, &relay, &paths.qemu, &call.cancel, ask).await;
        told.abort();
        match sent {
            Ok(sent) => {
                // The switch is told once more: the task above may have been ended before.
                call.progress(Progress { stage: SWITCHED.into(), ..Progress::default() });
                let _ = relay.command(&RelayCommand::Finish).await;
                let _ = std::fs::remove_dir_all(&paths.dir);
                Ok(sent)
            }
            Err(e) => Err(Fault::of(&e)),
        }
    }

    /// The center's word on a destination that was lost during the switch.
    pub(super) fn tell_fate(&self, id: MigrationId, dead: bool) -> Result<(), Fault> {
        let moving = self.moving(id).ok_or_else(|| {
            Fault::not_found(format!("site '{}' has no migration {id}", self.name))
        })?;
        let waiting = moving.fate.lock().unwrap_or_else(PoisonError::into_inner).take();
        let fate = if dead { DestinationFate::Dead } else { DestinationFate::Runs };
        match waiting {
            Some(tell) => {
                let _ = tell.send(fate);
                Ok(())
            }
            None => Err(Fault::conflict("the source of that migration does not ask")),
        }
    }

    /// Takes back what was done for a migration, as long as the machine does not run here because
    /// of it. At the destination this also fences: a QEMU that never ran is gone for good.
    pub(super) async fn abort(&self, id: MigrationId, vm: VmId) -> Result<(), Fault> {
        let Ok(entry) = self.entry(vm).await else { return Ok(()) };
        let (record, machine) = {
            let e = entry.lock().await;
            (e.record.clone(), e.machine.clone())
        };
        match &record.migration {
            Some(m) if m.id == id && m.end == End::Destination => {
                if let Some(m) = &machine
                    && m.life().await.is_ok_and(|l| l == Life::Running)
                {
                    return Err(Fault::conflict(format!(
                        "machine '{}' runs at '{}' already",
                        record.name, self.name
                    )));
                }
                if let Some(m) = &machine {
                    m.kill().await;
                }
                self.end_relay(id).await;
                if self.moving(id).is_some() {
                    // The task that follows the arrival undoes it.
                    let _ = self.ended(id).await;
                }
                self.undo_in(&record).await;
                Ok(())
            }
            Some(m) if m.id == id => {
                self.end_relay(id).await;
                if self.moving(id).is_some() {
                    let _ = self.ended(id).await;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Waits until this site's end of the machine's migration is over, if it is in one.
    pub(super) async fn await_move(&self, vm: VmId) {
        let Ok(entry) = self.entry(vm).await else { return };
        let id = entry.lock().await.record.migration.as_ref().map(|m| m.id);
        if let Some(id) = id
            && self.moving(id).is_some()
        {
            let _ = self.ended(id).await;
        }
    }

    /// After the daemon's return: finds the relay of a machine that is in a migration.
    pub(super) async fn find_again(self: &Arc<Self>, record: MachineRecord, machine: Machine) {
        let Some(migration) = record.migration.clone() else { return };
        let Ok(paths) = self.move_paths(&record) else { return };
        let life = machine.life().await.unwrap_or(Life::Exited);
        let relay = RelayClient::attach(&paths.control).await;
        match (migration.end, relay) {
            (End::Destination, Ok(relay)) => {
                info!(vm = %record.name, "its arrival goes on");
                self.take_in(migration.id, record, machine, relay, life == Life::Running);
            }
            (End::Destination, Err(e)) if life != Life::Running => {
                warn!(vm = %record.name, error = %chain(&e), "its relay is gone before it ran here");
                self.undo_in(&record).await;
            }
            (End::Source, Ok(relay)) if life == Life::Running => {
                // Nobody drives it any more, and nothing has left: it is given up.
                let why = "the daemon at the source was restarted".to_owned();
                let _ = relay.command(&RelayCommand::Abort { why }).await;
                self.stay(&record, &machine).await;
            }
            (End::Source, Ok(relay)) => {
                info!(vm = %record.name, "its departure goes on");
                let moving = self.enter_move(migration.id, record.vm);
                let me = Arc::clone(self);
                tokio::spawn(async move {
                    let last = relay.wait(|s| s.end.is_some()).await;
                    let outcome = match last {
                        Ok(s) if matches!(s.end, Some(godwit_migrate::relay::RelayEnd::Done)) => {
                            let _ = relay.command(&RelayCommand::Finish).await;
                            me.unmark(record.vm).await;
                            Ok(Ended::Sent)
                        }
                        Ok(s) => Err(Fault::unavailable(format!("its relay ended: {:?}", s.end))),
                        Err(e) => Err(Fault::of(&e)),
                    };
                    moving.outcome.send_replace(Some(outcome));
                });
            }
            (End::Source, Err(_)) if life == Life::Running => self.stay(&record, &machine).await,
            (_, Err(e)) => {
                warn!(vm = %record.name, error = %chain(&e), "its relay is gone and it still needs the other end");
            }
        }
    }

    async fn stay(&self, record: &MachineRecord, machine: &Machine) {
        if let Err(e) = machine.migrate_cancel().await {
            info!(vm = %record.name, error = %chain(&e), "no migration to cancel");
        }
        self.unmark(record.vm).await;
        if let Some(m) = &record.migration {
            self.end_relay(m.id).await;
        }
    }

    async fn unmark(&self, vm: VmId) {
        let Ok(entry) = self.entry(vm).await else { return };
        let mut e = entry.lock().await;
        e.record.migration = None;
        if let Err(f) = e.record.save(&self.dirs.vm(vm)) {
            warn!(error = %f, "a record was not written");
        }
    }

    fn pivot_of(&self, record: &MachineRecord) -> Option<Vec<DiskLayer>> {
        let image = self.image_by_hash(record).ok()?;
        let base = image.disk_path()?;
        Some(vec![
            DiskLayer { node: Node::Base, layer: Layer::Raw { path: base } },
            DiskLayer {
                node: Node::Mid,
                layer: Layer::Qcow2 { path: self.dirs.vm(record.vm).join(MID) },
            },
        ])
    }

    fn move_paths(&self, record: &MachineRecord) -> Result<MovePaths, Fault> {
        let id = record
            .migration
            .as_ref()
            .ok_or_else(|| Fault::internal("a machine that is in no migration"))?
            .id;
        Ok(MovePaths::of(&self.dirs.run, id))
    }

    /// Starts the relay of this end, as a process that outlives this one.
    async fn start_relay(
        &self,
        record: &MachineRecord,
        role: RelayRole,
        disk: Option<RelayDisk>,
        resume: bool,
    ) -> Result<RelayClient, Fault> {
        let migration = record
            .migration
            .clone()
            .ok_or_else(|| Fault::internal("a relay for a machine that is in no migration"))?;
        let paths = MovePaths::of(&self.dirs.run, migration.id);
        let generation = match migration.end {
            End::Source => record.generation.next(),
            End::Destination => record.generation,
        };
        let config = RelayConfig {
            role,
            migration: migration.id,
            generation,
            peer: migration.peer,
            keys: self.dirs.keys().join("identity"),
            revoked: (*self.trust.revocations()).clone(),
            control: paths.control.clone(),
            qemu: paths.qemu.clone(),
            resume,
            disk,
        };
        let fail = |what: &str, e: &std::io::Error| {
            Fault::internal(format!("{what} in {}: {e}", paths.dir.display()))
        };
        std::fs::create_dir_all(&paths.dir).map_err(|e| fail("making a place for a relay", &e))?;
        let text =
            serde_json::to_vec_pretty(&config).map_err(|e| Fault::internal(e.to_string()))?;
        std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&paths.config)
            .and_then(|mut f| std::io::Write::write_all(&mut f, &text))
            .map_err(|e| fail("writing a relay's configuration", &e))?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&paths.log)
            .map_err(|e| fail("making a relay's log", &e))?;
        let err = log.try_clone().map_err(|e| fail("sharing a relay's log", &e))?;
        let mut command = tokio::process::Command::new(&self.options.relay_program);
        command
            .arg("relay")
            .arg(&paths.config)
            .stdin(std::process::Stdio::null())
            .stdout(log)
            .stderr(err)
            .process_group(0)
            .kill_on_drop(false);
        let mut child = command.spawn().map_err(|e| fail("starting a relay", &e))?;
        let attach = RelayClient::attach_within(&paths.control, RELAY_WITHIN);
        let client = tokio::select! {
            client = attach => client.map_err(coded),
            status = child.wait() => Err(Fault::internal(format!(
                "the relay ended at its start ({}): {}",
                status.map_or_else(|e| e.to_string(), |s| s.to_string()),
                last_line(&paths.log),
            ))),
        };
        if client.is_ok() {
            // Reaped when it ends; it is not this task's to end.
            tokio::spawn(async move { child.wait().await });
        } else {
            let _ = child.start_kill();
        }
        client
    }

    /// Ends this site's relay of a migration, if it is there.
    async fn end_relay(&self, id: MigrationId) {
        let paths = MovePaths::of(&self.dirs.run, id);
        let Ok(relay) = RelayClient::attach(&paths.control).await else { return };
        let why = "the migration was given up".to_owned();
        let _ = relay.command(&RelayCommand::Abort { why }).await;
        let _ = tokio::time::timeout(RELAY_WITHIN, relay.wait(|s| s.end.is_some())).await;
        let _ = relay.command(&RelayCommand::Finish).await;
    }
}

/// Asks the center, through the call's progress, what became of a lost destination.
async fn fate(moving: &Moving, call: &Call) -> DestinationFate {
    let (tell, told) = oneshot::channel();
    *moving.fate.lock().unwrap_or_else(PoisonError::into_inner) = Some(tell);
    call.progress(Progress {
        stage: UNCERTAIN.into(),
        note: "the destination was lost during the switch; asking what became of it".into(),
        ..Progress::default()
    });
    match tokio::time::timeout(FATE_WITHIN, told).await {
        Ok(Ok(fate)) => fate,
        _ => DestinationFate::Unknown,
    }
}

/// The layer that post-copied blocks arrive in.
pub(super) const MID: &str = "mid.qcow2";

struct MovePaths {
    dir: PathBuf,
    control: PathBuf,
    qemu: PathBuf,
    nbd: PathBuf,
    config: PathBuf,
    log: PathBuf,
}

impl MovePaths {
    fn of(run: &Path, id: MigrationId) -> Self {
        let text = id.0.simple().to_string();
        // The last digits of a version 7 id are its random ones; socket paths are short.
        let dir = run.join(format!("mig-{}", &text[20..]));
        let at = |name: &str| dir.join(name);
        Self {
            control: at("control"),
            qemu: at("qemu"),
            nbd: at("nbd"),
            config: at("relay.json"),
            log: at("relay.log"),
            dir,
        }
    }
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    text.trim().lines().last().unwrap_or("it said nothing").to_owned()
}

fn parse_manifest(bytes: &[u8]) -> Result<MoveManifest, Fault> {
    let bad = |why: String| Fault::new(Code::Damaged, format!("the manifest of a move: {why}"));
    if bytes.len() > MAX_MANIFEST {
        return Err(bad(format!("it has more than {MAX_MANIFEST} bytes")));
    }
    let manifest: MoveManifest = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if manifest.format != FORMAT {
        return Err(bad(format!("form {} is not known here", manifest.format)));
    }
    Ok(manifest)
}

/// Tells the progress of a migration as its relay counts it.
async fn tell(mut status: watch::Receiver<RelayStatus>, call: Call) {
    let mut switched = false;
    loop {
        let s = status.borrow_and_update().clone();
        for p in progress(&s) {
            call.progress(p);
        }
        if !switched && s.committed {
            switched = true;
            call.progress(Progress { stage: SWITCHED.into(), ..Progress::default() });
        }
        if s.end.is_some() || status.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(TELL_EVERY).await;
    }
}

fn progress(s: &RelayStatus) -> Vec<Progress> {
    let c = &s.counts;
    let mut out = Vec::new();
    if s.phase >= RelayPhase::PreCopy {
        out.push(Progress {
            stage: "memory".into(),
            done: c.round_pages.saturating_sub(c.round_left) * 4096,
            total: c.round_pages * 4096,
            unit: "bytes".into(),
            note: format!("sent {}", godwit_types::human_bytes(c.bytes.memory)),
        });
    }
    if c.disk_blocks > 0 {
        out.push(Progress {
            stage: "disk".into(),
            done: c.disk_blocks.saturating_sub(c.disk_left) * 4096,
            total: c.disk_blocks * 4096,
            unit: "bytes".into(),
            note: format!("sent {}", godwit_types::human_bytes(c.bytes.disk)),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_from_a_peer_is_bounded_and_strict() {
        assert_eq!(parse_manifest(b"{}").expect_err("refused").code, Code::Damaged);
        assert_eq!(
            parse_manifest(&vec![b' '; MAX_MANIFEST + 1]).expect_err("long").code,
            Code::Damaged
        );
    }

    #[test]
    fn sockets_of_a_migration_fit() {
        let name: Name = "a".repeat(Name::MAX_LEN).parse().expect("valid");
        let run = super::super::SiteDirs::usual(&name).run;
        let paths = MovePaths::of(&run, MigrationId::new());
        assert!(paths.control.as_os_str().len() <= 107);
    }
}
