//! The machines of this host: made, started, stopped, removed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_disk::image::{Backing, check_base, create_overlay};
use godwit_image::Image;
use godwit_qemu::{Layer, MacAddress, Machine};
use godwit_transfer::Warrant;
use godwit_types::{Code, Fault, Generation, VmId};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;

use super::allowed::{Action, First};
use super::look::{life_of, status_of};
use super::pool::mac_seed;
use super::record::{DesiredState, DiskBase, MachineRecord};
use super::{Entry, LocalSite};
use crate::Progress;
use crate::{Call, MachineStatus, NewMachine, Origin};

/// How long a guest may take to its agent's first answer.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// How often a boot is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The file that a machine writes its disk to.
pub(super) const TOP: &str = "top.qcow2";

pub(super) fn into_fault<E: godwit_types::CodedError>(e: E) -> Fault {
    Fault::of(&e)
}

pub(super) fn join_error(e: tokio::task::JoinError) -> Fault {
    Fault::internal(format!("a job ended by a panic: {e}"))
}

impl LocalSite {
    pub(super) async fn create(&self, new: NewMachine, call: Call) -> Result<MachineStatus, Fault> {
        self.warrants.check(new.vm, new.generation, &new.warrant)?;
        let image = match &new.origin {
            Origin::Image(image) => image,
            Origin::Substrate(id) => {
                let id = *id;
                return self.activate(new, id, call).await;
            }
            Origin::StoredDisk(id) => {
                let id = *id;
                return self.boot_stored(new, id, call).await;
            }
        };
        let image = self.images.newest(image).await?;
        let record = MachineRecord {
            vm: new.vm,
            name: new.name,
            generation: new.generation,
            warrant: Some(new.warrant),
            desired: DesiredState::Running,
            image: image.name.clone(),
            image_hash: image.hash,
            substrate: None,
            arch: image.arch,
            memory: new.memory.unwrap_or(image.memory),
            vcpus: new.vcpus.unwrap_or(image.vcpus),
            mac: MacAddress::from_seed(mac_seed(new.vm)),
            disk_base: DiskBase::Image,
            migration: None,
            reason: None,
            unfinished: None,
        };
        self.room.check_memory(record.memory)?;
        let (entry, wanted) = self.machines.register_starting(record.clone()).await?;
        match self.boot_new(&entry, &record, &image, &call, &wanted).await {
            Ok(()) => self.started(&entry, &wanted).await,
            Err(f) => {
                self.machines.withdraw(&entry, record.vm).await;
                Err(f)
            }
        }
    }

    /// A machine that was being started runs.
    pub(super) async fn started(
        &self,
        entry: &Mutex<Entry>,
        wanted: &CancellationToken,
    ) -> Result<MachineStatus, Fault> {
        let mut e = entry.lock().await;
        if !e.doing.end_start(wanted) {
            return Err(Fault::cancelled());
        }
        let life = life_of(&e).await;
        Ok(status_of(&self.name, &mut e, life).await)
    }

    /// Writes a machine's record and an empty top layer, and boots it.
    pub(super) async fn boot_new(
        &self,
        entry: &Mutex<Entry>,
        record: &MachineRecord,
        image: &Image,
        call: &Call,
        wanted: &CancellationToken,
    ) -> Result<(), Fault> {
        let dir = self.dirs.vm(record.vm);
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io("making", &dir, &e))?;
        record.save(&dir)?;
        if let Some(base) = image.disk_path() {
            let top = dir.join(TOP);
            tokio::task::spawn_blocking(move || {
                let bytes = check_base(&base)?;
                create_overlay(&top, Backing::None, bytes)
            })
            .await
            .map_err(join_error)?
            .map_err(into_fault)?;
        }
        self.boot(entry, record, image, call, wanted).await
    }

    /// Starts QEMU and waits for the guest's first answer; its screen and its console can be looked
    /// at meanwhile. On failure, or once it is not wanted any more, no QEMU is left.
    pub(super) async fn boot(
        &self,
        entry: &Mutex<Entry>,
        record: &MachineRecord,
        image: &Image,
        call: &Call,
        wanted: &CancellationToken,
    ) -> Result<(), Fault> {
        // Memory of an earlier run is of no use to a boot.
        remove_file(&self.dirs.vm_memory(record.vm))?;
        let machine = self.launcher.launch(record, image)?.spawn().await.map_err(into_fault)?;
        {
            let mut e = entry.lock().await;
            if wanted.is_cancelled() {
                drop(e);
                machine.kill().await;
                return Err(Fault::cancelled());
            }
            e.machine = Some(machine.clone());
        }
        let began = std::time::Instant::now();
        if !image.agent {
            return Ok(());
        }
        let outcome = loop {
            call.progress(Progress {
                stage: "boot".into(),
                done: began.elapsed().as_secs(),
                total: 0,
                unit: "seconds".into(),
                note: "waiting for the guest's first answer".into(),
            });
            tokio::select! {
                () = call.cancel.cancelled() => break Err(Fault::cancelled()),
                () = wanted.cancelled() => break Err(Fault::cancelled()),
                exit = machine.exited() => {
                    break Err(Fault::internal(format!("QEMU ended during the boot: {}", exit.log)));
                }
                answer = machine.agent().ping(LOOK_EVERY * 8) => match answer {
                    Ok(()) => break Ok(()),
                    Err(_) if began.elapsed() < BOOT_WITHIN => {
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                    Err(e) => break Err(Fault::new(
                        Code::TimedOut,
                        format!("the guest did not answer within {} s: {e}", BOOT_WITHIN.as_secs()),
                    )),
                },
            }
        };
        if outcome.is_err() {
            machine.kill().await;
            let mut e = entry.lock().await;
            if !wanted.is_cancelled() {
                e.machine = None;
            }
        }
        outcome
    }

    pub(super) async fn restart(
        &self,
        vm: VmId,
        generation: Generation,
        warrant: Warrant,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        self.warrants.check(vm, generation, &warrant)?;
        let (mut e, first) = self.admit(vm, generation, Action::Start).await?;
        if first == First::Arrival {
            self.moves.arrivals.end_arrival(&mut e, true).await?;
        }
        if let Some(m) = e.machine.clone() {
            let life = m.life().await.map_err(into_fault)?;
            let _ = e.state(&self.name).asked(Some(life)).allows(Action::Start)?;
            m.quit().await.map_err(into_fault)?;
            e.machine = None;
        }
        e.record.generation = generation;
        e.record.warrant = Some(warrant);
        {
            let _one = match self.machines.promise(vm, e.record.memory).await {
                Ok(one) => one,
                Err(f) => {
                    // It stays stopped, at the generation at which it was asked.
                    e.record.save(&self.dirs.vm(vm))?;
                    return Err(f);
                }
            };
            e.record.desired = DesiredState::Running;
            e.record.reason = None;
            e.record.unfinished = None;
            e.record.save(&self.dirs.vm(vm))?;
        }
        let image = self.images.sound(&e.record).await?;
        // One that did not answer when this daemon came.
        self.end_strays(vm).await;
        let wanted = e.doing.start();
        let record = e.record.clone();
        // Not held while the guest boots: whoever looks at it need not wait.
        let entry = Arc::clone(OwnedMutexGuard::mutex(&e));
        drop(e);
        match self.boot(&entry, &record, &image, &call, &wanted).await {
            Ok(()) => self.started(&entry, &wanted).await,
            Err(f) => {
                let mut e = entry.lock().await;
                if e.doing.end_start(&wanted) {
                    e.record.reason = Some(f.message.clone());
                    e.record.save(&self.dirs.vm(vm))?;
                }
                Err(f)
            }
        }
    }

    /// Ends a machine and removes what it has; its generation is kept as a tombstone.
    pub(super) async fn remove(&self, vm: VmId, generation: Generation) -> Result<(), Fault> {
        let Some((mut e, first)) = self.admit_if_here(vm, generation, Action::Delete).await? else {
            return self.machines.remove_again(vm, generation);
        };
        if e.record.desired == DesiredState::Gone {
            return self.machines.remove_again(vm, generation);
        }
        if first == First::Start {
            e.doing.cancel_start();
        }
        if let Some(m) = e.machine.take() {
            m.kill().await;
        }
        self.end_strays(vm).await;
        e.record.generation = generation;
        self.machines.bury(&mut e).await
    }
}

/// Bytes on the disk of what a machine has above its base image.
pub(super) fn layer_bytes(machine: &Machine) -> Result<u64, Fault> {
    use std::os::unix::fs::MetadataExt;
    let Some(chain) = machine.launch().disk else { return Ok(0) };
    let layers = chain.layers.iter().filter_map(|l| match &l.layer {
        Layer::Qcow2 { path } => Some(path),
        Layer::Raw { .. } | Layer::Nbd { .. } => None,
    });
    layers.chain([&chain.top]).try_fold(0, |sum, path| {
        let meta = std::fs::metadata(path).map_err(|e| Fault::io("reading", path, &e))?;
        Ok(sum + meta.blocks() * 512)
    })
}

pub(super) fn remove_file(path: &Path) -> Result<(), Fault> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Fault::internal(format!("removing {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}
