//! Machines that are made and started: booted from an image or from the disk that a substrate
//! stores ([`super::stored`]), or activated from a substrate ([`super::pool`]).

use std::sync::Arc;
use std::time::Duration;

use godwit_disk::image::{Backing, check_base, create_overlay};
use godwit_image::Image;
use godwit_qemu::MacAddress;
use godwit_types::{Code, Fault};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::Entry;
use super::look::{life_of, status_of};
use super::machines::{LOOK_EVERY, TOP, into_fault, join_error, remove_file};
use super::parts::Parts;
use super::pool::mac_seed;
use super::record::{DesiredState, DiskBase, MachineRecord};
use crate::{Call, MachineStatus, NewMachine, Origin, Progress};

/// How long a guest may take to its agent's first answer.
const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// How many activations go on at once: each waits for its guest half of the time.
fn at_once() -> usize {
    2 * std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The starts of one site.
pub(super) struct Starts {
    pub(super) parts: Arc<Parts>,
    /// Activations that go on at once.
    pub(super) turns: Arc<Semaphore>,
}

impl Starts {
    /// None yet.
    pub(super) fn new(parts: Arc<Parts>) -> Self {
        Self { parts, turns: Arc::new(Semaphore::new(at_once())) }
    }

    /// Makes a machine of what it is to be made of, and starts it.
    pub(super) async fn create(&self, new: NewMachine, call: Call) -> Result<MachineStatus, Fault> {
        self.parts.warrants.check(new.vm, new.generation, &new.warrant)?;
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
        let image = self.parts.images.newest(image).await?;
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
        self.parts.room.check_memory(record.memory)?;
        let (entry, wanted) = self.parts.machines.register_starting(record.clone()).await?;
        match self.boot_new(&entry, &record, &image, &call, &wanted).await {
            Ok(()) => self.started(&entry, &wanted).await,
            Err(f) => {
                self.parts.machines.withdraw(&entry, record.vm, &wanted).await;
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
        Ok(status_of(&self.parts.name, &mut e, life).await)
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
        let dir = self.parts.dirs.vm(record.vm);
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
        remove_file(&self.parts.dirs.vm_memory(record.vm))?;
        let machine =
            self.parts.launcher.launch(record, image)?.spawn().await.map_err(into_fault)?;
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
}
