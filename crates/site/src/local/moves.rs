//! Migration as this site does it: one end each time.
//!
//! ```text
//! source:       MigrateManifest -> MigrateSend ............ [switched] ...... sent -> MigrateRelease
//! destination:            MigratePrepare -> relay, waiting QEMU -> runs ... whole -> MigrateReceived
//! ```
//!
//! The destination answers once its relay listens: the relays meet while its QEMU is started.
//!
//! The relay of each end is a process of its own, and the machine's record says which migration it
//! is in, so that a daemon that comes back finds both again ([`super::resume`]). Each end is driven
//! by a task of its own; who asks only listens, and may come back when its link was cut.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use godwit_disk::image::{Backing, check_base, create_overlay};
use godwit_image::Image;
use godwit_migrate::RelayClient;
use godwit_migrate::hybrid::{
    self, ArrivingDisk, AskCommitted, Asking, Committed, DestinationFate, MoveError, Received,
    Sent, prepare_incoming, receive,
};
use godwit_migrate::relay::{Meeting, RelayCommand, RelayDisk};
use godwit_net::{Attachment, PublishedPort};
use godwit_qemu::{
    DiskChain, DiskLayer, Layer, Machine, Manifest, MemorySource, Node, Start, VmGenId,
};
use godwit_transfer::Warrant;
use godwit_types::{Code, Fault, Generation, Hash, MigrationId, Name, VmId};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::allowed::{Action, First};
use super::arrivals::Arrivals;
use super::course::{End, Migration};
use super::departures::{Departures, NotSent};
use super::dirs::TOP;
use super::drive::{Drives, Leaving, UNDO_WITHIN};
use super::entry::Doing;
use super::faults::{into_fault, join_error};
use super::filling::MID;
use super::launch::Launcher;
use super::machines::layer_bytes;
use super::moving::memory_status;
use super::owner::{Ask, Look, Needs, Owned};
use super::record::{DesiredState, DiskBase, MachineRecord};
use super::relays::{GuestMemory, Listens, MovePaths, Part};
use super::steps::{Arrived, Leave};
use super::{filling, ran};
use crate::{Call, Incoming, MachineStatus, MemoryStatus};

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
    /// What its NIC is joined to: the state of the one does not fit the other. In a manifest of format
    /// 2 alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nic: Option<NicJoins>,
    /// Its generation GUID, which it keeps: a guest that only moves has no reason to reseed.
    generation_id: Option<uuid::Uuid>,
}

/// The form of a manifest of a machine in no network, as every release reads it.
const FORMAT: u32 = 1;
/// That of one in a network.
const FORMAT_NETWORK: u32 = 2;

/// What the NIC of a machine that moves is joined to, where that is not QEMU's own network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum NicJoins {
    /// A TAP in a network of the site.
    Tap,
}

/// Refuses a machine whose NIC is not joined to what the center says that it is in.
fn fits(
    nic: Option<NicJoins>,
    mac: godwit_qemu::MacAddress,
    attachment: Option<&Attachment>,
) -> Result<(), Fault> {
    match (nic, attachment) {
        (None, None) => Ok(()),
        (Some(NicJoins::Tap), Some(a)) if a.mac == mac => a.check().map_err(Fault::invalid),
        _ => Err(Fault::conflict("its source and the center do not agree on its network")),
    }
}

/// A machine that is to come, as the center tells it.
pub(super) struct Comes {
    pub(super) migration: MigrationId,
    pub(super) machine: MachineStatus,
    pub(super) generation: Generation,
    pub(super) warrant: Warrant,
    pub(super) from: Name,
    pub(super) attachment: Option<Attachment>,
    pub(super) published: Vec<PublishedPort>,
}

impl Departures {
    /// The manifest of a machine that is to move.
    pub(super) async fn manifest(
        &self,
        vm: VmId,
        generation: Generation,
    ) -> Result<Vec<u8>, Fault> {
        let needs = Some(Needs::known(Action::Leave, generation));
        let e = self.parts.machines.owner(vm).await?.ask(Look { needs }).await?;
        let machine = e.machine.as_ref().ok_or_else(|| self.parts.machines.not_here(vm))?;
        let image = self.parts.substrates.sound_disk(&self.parts.images, &e.record).await?;
        let disk_bytes = match image.disk_path() {
            Some(base) => Some(check_base(&base).map_err(into_fault)?),
            None => None,
        };
        let manifest = MoveManifest {
            format: if e.record.attachment.is_some() { FORMAT_NETWORK } else { FORMAT },
            nic: e.record.attachment.as_ref().map(|_| NicJoins::Tap),
            image_hash: e.record.image_hash,
            substrate: e.record.substrate,
            machine: machine.manifest(),
            mac: e.record.mac,
            disk_bytes,
            layer_bytes: layer_bytes(machine)?,
            generation_id: machine.generation_id().await.map_err(into_fault)?,
        };
        serde_json::to_vec(&manifest).map_err(|e| Fault::internal(e.to_string()))
    }
}

impl Arrivals {
    /// Makes ready for a machine: a relay that listens when this returns, and then a QEMU that waits.
    /// When that does not start the relay tells the source.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        comes: Comes,
        manifest: &[u8],
    ) -> Result<Incoming, Fault> {
        let Comes { migration: id, machine, generation, warrant, from, attachment, published } =
            comes;
        self.parts.warrants.check(machine.vm, generation, &warrant)?;
        let manifest = parse_manifest(manifest)?;
        fits(manifest.nic, manifest.mac, attachment.as_ref())?;
        if let Err(full) = self.parts.room.check_memory(machine.memory).await {
            // What only saves time gives way to the machine itself.
            drop(self.parts.relays.held.take(id).ok_or(full)?);
            self.parts.room.check_memory(machine.memory).await?;
        }
        self.parts.room.check_disk(manifest.layer_bytes)?;
        self.parts.networks.ports.take(attachment.as_ref(), &published)?;
        let record = MachineRecord {
            vm: machine.vm,
            name: machine.name,
            generation,
            warrant: Some(warrant),
            desired: DesiredState::Running,
            image: machine.image,
            image_hash: manifest.image_hash,
            substrate: manifest.substrate,
            arch: machine.arch,
            memory: machine.memory,
            vcpus: machine.vcpus,
            mac: manifest.mac,
            disk_base: DiskBase::Image,
            migration: Some(Migration::arrival(id, from)),
            reason: None,
            unfinished: None,
            attachment,
            published,
            back: None,
        };
        self.supersede(&record).await?;
        let image = self.parts.images.sound(&record).await?;
        let here = Manifest::of(&Launcher::spec_of(&record, &image), &self.parts.launcher.qemu);
        manifest.machine.check(&here).map_err(into_fault)?;
        let owner = self.parts.machines.register(record.clone(), Doing::Preparing).await?;
        let (met, meets) = oneshot::channel();
        let arrivals = Arc::clone(self);
        let asked = Prepare { arrivals, record: record.clone(), image, manifest, met };
        let coming = self.drives.register(id, record.vm);
        let (me, shown) = (Arc::clone(self), coming.shown.clone());
        Drives::drive(&coming, async move {
            match owner.ask(asked).await {
                Ok((qemu, relay)) => {
                    shown.send_replace(Some(relay.watch()));
                    me.follow_arrival(record, qemu, relay, Received::default(), false).await
                }
                Err(f) => {
                    me.undo(&record).await;
                    Err(f)
                }
            }
        });
        match meets.await {
            Ok(address) => Ok(Incoming { migration: id, address, peer: self.parts.name.clone() }),
            Err(_) => {
                let ended = coming.ended().await.map(drop);
                ended.and(Err(Fault::internal("a machine came that nobody had met")))
            }
        }
    }

    /// Takes back an earlier arrival of the same machine that never ran: its move is over, since the
    /// center gives each generation to one move only, and this site may have been away then.
    pub(super) async fn supersede(&self, comes: &MachineRecord) -> Result<(), Fault> {
        let Some(owner) = self.parts.machines.owner_if_here(comes.vm).await else { return Ok(()) };
        let there = owner.ask(Look { needs: None }).await?.record;
        match there.migration {
            Some(m) if m.end() == End::Destination && there.generation < comes.generation => {
                info!(vm = %comes.name, generation = %there.generation, "an arrival that is over");
                match self.travellers.to_abort(m.id, comes.vm).await? {
                    Some((found, migration)) => self.take_back(found, &migration).await,
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Makes ready for the machine of `record`. The source's relay may come, to the address that `met`
    /// takes, while QEMU is started.
    pub(super) async fn prepare_registered(
        &self,
        record: &MachineRecord,
        image: &godwit_image::Image,
        manifest: &MoveManifest,
        met: oneshot::Sender<SocketAddr>,
    ) -> Result<(Machine, RelayClient), Fault> {
        let dir = self.parts.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        // Before the record: it is on disk with it, and says nothing of an earlier arrival.
        ran::make(&dir)?;
        record.save(&dir)?;
        let paths = MovePaths::of(&self.parts.dirs.run, record.in_migration()?);
        let disk = match (image.disk_path(), manifest.disk_bytes) {
            (Some(base), Some(bytes)) => {
                let top = dir.join(TOP);
                tokio::task::spawn_blocking(move || create_overlay(&top, Backing::None, bytes))
                    .await
                    .map_err(join_error)?
                    .map_err(into_fault)?;
                let mid = filling::place(&dir);
                let (nbd, written) = (paths.nbd.clone(), paths.written.clone());
                Some(RelayDisk::Destination { base, mid, bytes, nbd, written })
            }
            _ => None,
        };
        let has_disk = disk.is_some();
        let memory = self.parts.dirs.vm_memory(record.vm);
        let left = self.parts.machines.lend_visit(record).await;
        let part = (Part::Whole, GuestMemory::of_arrival(&memory, record.memory, left)?);
        let (listens, told) = Listens::new()?;
        let meeting = self.parts.reach.awaits();
        let relays = &self.parts.relays;
        let relay = relays.start_before(record, meeting, disk, part, Some(told)).await?;
        let address = self.parts.reach.reported_address(&relay).await?;
        // Who has asked may be gone; the source comes, or the center takes this back.
        let _ = met.send(address);
        match self.start_incoming(record, image, manifest, has_disk).await {
            Ok(machine) => {
                godwit_hold::at("move.prepared").await;
                listens.announce();
                Ok((machine, relay))
            }
            Err(f) => {
                let why = f.message.clone();
                let _ = relay.command(&RelayCommand::Abort { why }).await;
                Err(f)
            }
        }
    }

    /// Starts the QEMU of a machine that comes, up to where it listens for its relay.
    async fn start_incoming(
        &self,
        record: &MachineRecord,
        image: &godwit_image::Image,
        manifest: &MoveManifest,
        has_disk: bool,
    ) -> Result<Machine, Fault> {
        let paths = MovePaths::of(&self.parts.dirs.run, record.in_migration()?);
        self.parts.networks.ready_for(&self.parts.machines, record).await?;
        let mut launch = self.parts.launcher.launch(record, image).await?;
        launch.start = Start::Incoming;
        if let Some(id) = manifest.generation_id {
            launch.vmgenid = VmGenId::Keep(id);
        }
        launch.memory = MemorySource::Shared { path: self.parts.dirs.vm_memory(record.vm) };
        if has_disk {
            let remote = Layer::Nbd { socket: paths.nbd.clone() };
            let top = self.parts.dirs.vm(record.vm).join(TOP);
            launch.disk = Some(DiskChain::over(vec![remote], top));
        }
        let machine = launch.spawn().await.map_err(into_fault)?;
        match prepare_incoming(&machine, &paths.qemu).await {
            Ok(()) => Ok(machine),
            Err(e) => {
                machine.kill().await;
                Err(Fault::of(&e))
            }
        }
    }

    /// Follows a machine that comes in, to its end, on a task of its own. `received` is what was
    /// measured before a break.
    pub(super) fn spawn_arrival(
        self: &Arc<Self>,
        record: MachineRecord,
        machine: Machine,
        relay: RelayClient,
        received: Received,
        resumed: bool,
    ) {
        let Some(migration) = &record.migration else { return };
        let coming = self.drives.register(migration.id, record.vm);
        coming.shown.send_replace(Some(relay.watch()));
        let me = Arc::clone(self);
        Drives::drive(&coming, async move {
            me.follow_arrival(record, machine, relay, received, resumed).await
        });
    }

    /// Follows a machine that comes in, to its end.
    async fn follow_arrival(
        self: &Arc<Self>,
        record: MachineRecord,
        machine: Machine,
        relay: RelayClient,
        mut received: Received,
        resumed: bool,
    ) -> Result<Received, Fault> {
        let migration = record.in_migration()?.clone();
        let written = MovePaths::of(&self.parts.dirs.run, &migration).written;
        let dir = self.parts.dirs.vm(record.vm);
        let filled = filling::is_there(&dir).then(|| filling::place(&dir));
        let disk = self.pivot_of(&record).map(|layers| ArrivingDisk { layers, filled, written });
        let outcome = {
            let noted = async {
                if relay.wait(|s| s.committed).await.is_ok_and(|s| s.committed) {
                    godwit_hold::at("move.ran").await;
                    self.mark_run(&record).await;
                }
            };
            let (asked, about) = (Arc::clone(self), record.clone());
            let committed = move || -> Committed {
                let (me, record) = (Arc::clone(&asked), about.clone());
                Box::pin(async move { me.has_committed(&record).await })
            };
            let committed: Option<AskCommitted<'_>> =
                ran::says(&dir).is_some().then_some(&committed);
            let arriving = receive(&machine, &relay, disk, &mut received, resumed, committed);
            tokio::pin!(arriving);
            tokio::select! {
                outcome = &mut arriving => outcome,
                () = noted => arriving.await,
            }
        };
        let outcome = match outcome {
            Ok(()) => {
                let _ = relay.command(&RelayCommand::Finish).await;
                self.settle_arrival(&record).await.map(|()| received)
            }
            Err(e @ MoveError::Cancelled { .. }) => {
                let fault = self.parts.room.blame(Fault::of(&e));
                if relay.status().doubt {
                    self.parts.doubt(&record);
                }
                self.undo(&record).await;
                Err(fault)
            }
            // The machine runs here and still needs its source.
            Err(e) => {
                self.mark_run(&record).await;
                self.note_whole(&record, &machine).await;
                self.keep_received(migration.id, record.vm, &received).await;
                Err(Fault::of(&e))
            }
        };
        if let Err(f) = &outcome {
            warn!(vm = %record.name, error = %f, "a machine did not arrive whole");
        }
        outcome
    }

    /// Writes down that all of a machine's memory is here, if that is so: its relay may have been lost
    /// before it could.
    pub(super) async fn note_whole(&self, record: &MachineRecord, machine: &Machine) {
        if memory_status(machine, End::Destination).await.0 == MemoryStatus::Whole
            && let Err(error) = ran::note_all_memory(&self.parts.dirs.vm(record.vm))
        {
            warn!(vm = %record.name, %error, "that all of its memory is here is not written down");
        }
    }

    /// A machine has arrived and no longer needs its source.
    pub(super) async fn settle_arrival(&self, record: &MachineRecord) -> Result<(), Fault> {
        let owner = self.parts.machines.owner(record.vm).await?;
        owner.ask(Arrived { parts: Arc::clone(&self.parts) }).await?;
        if let Some(m) = &record.migration {
            self.parts.relays.clear(m);
        }
        info!(vm = %record.name, "has arrived");
        Ok(())
    }
}

impl Departures {
    /// Sends a machine. Returns when its destination needs nothing more of this site.
    pub(super) async fn send(
        self: &Arc<Self>,
        vm: VmId,
        (generation, next): (Generation, Generation),
        to: Incoming,
        call: Call,
    ) -> Result<Vec<u8>, Fault> {
        if next <= generation || !next.is_sane() {
            return Err(Fault::invalid(format!(
                "a machine of generation {generation} does not leave as generation {next}"
            )));
        }
        let meeting = self.parts.reach.meets(&to)?;
        let departure = Migration::departure(to.migration, to.peer.clone(), Some(next));
        let owner = self.parts.machines.owner(vm).await?;
        let (record, machine) = owner.ask(Leave { generation, departure }).await?;
        let leaving = self.drives.register(to.migration, vm);
        let (me, mine) = (Arc::clone(self), Arc::clone(&leaving));
        let id = to.migration;
        Drives::drive(&leaving, async move {
            let mut sent = Sent::default();
            let done = me.send_registered(&record, &machine, meeting, &mine, &mut sent).await;
            me.after_leaving(&record, &machine, done, sent).await
        });
        self.follow(id, &call).await
    }

    async fn send_registered(
        self: &Arc<Self>,
        record: &MachineRecord,
        machine: &Machine,
        meeting: Meeting,
        leaving: &Arc<Leaving>,
        sent: &mut Sent,
    ) -> Result<(), NotSent> {
        let disk = self.source_disk(record, machine.launch().disk)?;
        let part = (Part::Whole, GuestMemory::of_departure(machine).await);
        let relay = self.parts.relays.start(record, meeting, disk, part).await?;
        let paths = MovePaths::of(&self.parts.dirs.run, record.in_migration()?);
        leaving.shown.send_replace(Some(relay.watch()));
        let asking = Arc::clone(leaving);
        let ask = move || -> Asking {
            let asking = Arc::clone(&asking);
            Box::pin(async move { asking.ask_fate().await })
        };
        {
            let steering = leaving.steering();
            let sending = hybrid::send(machine, &relay, &paths.qemu, sent, &steering, ask);
            let noted = self.note_run(record, &relay);
            tokio::pin!(sending);
            let moved = tokio::select! {
                done = &mut sending => done,
                () = noted => sending.await,
            };
            if moved.is_err() && relay.status().doubt {
                self.parts.doubt(record);
            }
            moved?;
        }
        let _ = relay.command(&RelayCommand::Finish).await;
        Ok(())
    }

    /// The disk of a machine that leaves, as its relay reads it.
    pub(super) fn source_disk(
        &self,
        record: &MachineRecord,
        chain: Option<DiskChain>,
    ) -> Result<Option<RelayDisk>, Fault> {
        let image = self.parts.images.of(record)?;
        let (Some(base), Some(chain)) = (image.disk_path(), chain) else {
            return Ok(None);
        };
        let mut layers: Vec<PathBuf> = chain
            .layers
            .iter()
            .filter_map(|l| match &l.layer {
                Layer::Qcow2 { path } => Some(path.clone()),
                Layer::Raw { .. } | Layer::Nbd { .. } => None,
            })
            .collect();
        layers.push(chain.top);
        let index = self.parts.images.index_of(&image);
        Ok(Some(RelayDisk::Source { base, index, layers }))
    }

    /// The center's word on a destination that was lost during the switch.
    pub(super) async fn deliver_fate(
        self: &Arc<Self>,
        id: MigrationId,
        dead: bool,
    ) -> Result<(), Fault> {
        let fate = if dead { DestinationFate::Dead } else { DestinationFate::Runs };
        let leaving = self.drives.get(id);
        if leaving.as_ref().is_some_and(|l| l.answer(fate)) {
            return Ok(());
        }
        if let Some(l) = leaving.filter(|l| dead && !l.has_ended()) {
            // Its driver lives and has not noticed yet. It brings the machine back, nobody else.
            l.mark_lost("its destination is gone".into());
            let _ = tokio::time::timeout(UNDO_WITHIN, l.asks_or_has_ended()).await;
            if l.answer(fate) || l.has_ended() {
                return Ok(());
            }
            return Err(Fault::unavailable(
                "the source of that move does not ask yet where the machine runs",
            ));
        }
        if dead {
            return self.reclaim(id).await;
        }
        Err(Fault::conflict("the source of that move does not ask where the machine runs"))
    }
}

impl Arrivals {
    pub(super) fn pivot_of(&self, record: &MachineRecord) -> Option<Vec<DiskLayer>> {
        let image = self.parts.images.of(record).ok()?;
        let base = image.disk_path()?;
        Some(vec![
            DiskLayer { node: Node::Base, layer: Layer::Raw { path: base } },
            DiskLayer {
                node: Node::Mid,
                layer: Layer::Qcow2 { path: self.parts.dirs.vm(record.vm).join(MID) },
            },
        ])
    }
}

/// A machine is to come: a relay that listens, at the address that `met` takes, and a QEMU that waits
/// are made for it.
struct Prepare {
    arrivals: Arc<Arrivals>,
    record: MachineRecord,
    image: Image,
    manifest: MoveManifest,
    met: oneshot::Sender<SocketAddr>,
}

impl Ask for Prepare {
    type Reply = (Machine, RelayClient);
    const STEP: &'static str = "owner.prepare";

    async fn answer(self, e: &mut Owned, _: First) -> Result<Self::Reply, Fault> {
        let Self { arrivals, record, image, manifest, met } = self;
        if e.record.desired == DesiredState::Gone {
            return Err(Fault::conflict(format!("the move of '{}' was taken back", record.name)));
        }
        let prepared = arrivals.prepare_registered(&record, &image, &manifest, met).await?;
        e.machine = Some(prepared.0.clone());
        e.doing.end();
        Ok(prepared)
    }
}

fn parse_manifest(bytes: &[u8]) -> Result<MoveManifest, Fault> {
    let bad = |why: String| Fault::new(Code::Damaged, format!("the manifest of a move: {why}"));
    if bytes.len() > MAX_MANIFEST {
        return Err(bad(format!("it has more than {MAX_MANIFEST} bytes")));
    }
    let manifest: MoveManifest = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    let format = if manifest.nic.is_some() { FORMAT_NETWORK } else { FORMAT };
    if manifest.format != format {
        return Err(bad(format!("form {} is not known here", manifest.format)));
    }
    Ok(manifest)
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
    fn the_center_alone_says_which_network_a_machine_comes_into() {
        use godwit_net::{Network, NetworkKind, Prefix};
        let mac = godwit_qemu::MacAddress([0x52, 0, 0, 0, 0, 1]);
        let network = Network {
            id: godwit_types::NetworkId::new(),
            name: Name::new("lab").expect("name"),
            kind: NetworkKind::Nat,
            prefix: Prefix::DEFAULT,
        };
        let address = std::net::Ipv4Addr::new(10, 80, 0, 2);
        let place = Attachment { network, mac, address };
        let other =
            Attachment { mac: godwit_qemu::MacAddress([0x52, 0, 0, 0, 0, 2]), ..place.clone() };
        let outside =
            Attachment { address: std::net::Ipv4Addr::new(10, 80, 0, 1), ..place.clone() };
        let tap = Some(NicJoins::Tap);
        assert_eq!(fits(tap, mac, Some(&place)), Ok(()));
        assert_eq!(fits(None, mac, None), Ok(()));
        for (nic, place) in
            [(tap, None), (None, Some(&place)), (tap, Some(&other)), (tap, Some(&outside))]
        {
            let _ = fits(nic, mac, place).expect_err("refused");
        }
    }
}
