//! Machines that are made and started: booted from an image or from the disk that a substrate
//! stores ([`super::stored`]), or activated from a substrate ([`super::pool`]).

use std::sync::Arc;
use std::time::Duration;

use godwit_disk::image::{Backing, check_base, create_overlay};
use godwit_image::Image;
use godwit_net::Attachment;
use godwit_qemu::{MacAddress, Machine};
use godwit_types::{Code, Fault};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::allowed::First;
use super::dirs::{TOP, remove_file};
use super::faults::{into_fault, join_error};
use super::machines::LOOK_EVERY;
use super::net::tell_guest;
use super::owner::{Ask, Owned, Owner};
use super::parts::Parts;
use super::record::{DesiredState, DiskBase, MachineRecord, mac_seed};
use crate::{Call, MachineStatus, NewMachine, Origin, Progress};

/// How long a guest may take to its agent's first answer.
pub(super) const BOOT_WITHIN: Duration = Duration::from_secs(300);

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
    pub(super) async fn create(
        &self,
        new: NewMachine,
        attachment: Option<Attachment>,
        call: Call,
    ) -> Result<MachineStatus, Fault> {
        self.parts.warrants.check(new.vm, new.generation, &new.warrant)?;
        if let Some(attachment) = &attachment {
            attachment.check().map_err(Fault::invalid)?;
        }
        let image = match &new.origin {
            Origin::Image(image) => image,
            Origin::Substrate(id) => {
                let id = *id;
                return self.activate(new, id, attachment, call).await;
            }
            Origin::StoredDisk(id) => {
                let id = *id;
                if attachment.is_some() {
                    return Err(Fault::invalid("a substrate's disk is booted without a network"));
                }
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
            mac: attachment
                .as_ref()
                .map_or_else(|| MacAddress::from_seed(mac_seed(new.vm)), |a| a.mac),
            disk_base: DiskBase::Image,
            migration: None,
            reason: None,
            unfinished: None,
            attachment,
            published: Vec::new(),
            back: None,
        };
        self.parts.room.check_memory(record.memory).await?;
        let (owner, wanted) = self.parts.machines.register_starting(record.clone()).await?;
        match self.boot_new(&owner, &record, &image, &call, &wanted).await {
            Ok(()) => self.started(&owner, &wanted).await,
            Err(f) => {
                self.withdraw(&owner, wanted).await;
                Err(f)
            }
        }
    }

    /// A machine that was being started runs.
    pub(super) async fn started(
        &self,
        owner: &Owner,
        wanted: &CancellationToken,
    ) -> Result<MachineStatus, Fault> {
        owner.ask(Started { wanted: wanted.clone() }).await?;
        let Parts { machines, room, .. } = &*self.parts;
        let status = machines.look_at(room, owner).await;
        status.ok_or_else(|| machines.not_here(owner.vm()))
    }

    /// A start did not come about: nothing of its machine stays.
    pub(super) async fn withdraw(&self, owner: &Owner, wanted: CancellationToken) {
        if let Err(error) = owner.ask(Withdraw { parts: Arc::clone(&self.parts), wanted }).await {
            tracing::error!(vm = %owner.vm(), %error, "what is left of a machine that did not start");
        }
    }

    /// Boots a machine from the disk that it has.
    pub(super) async fn boot_again(
        &self,
        owner: &Owner,
        record: &MachineRecord,
        call: &Call,
        wanted: &CancellationToken,
    ) -> Result<(), Fault> {
        let image = self.parts.images.sound(record).await?;
        self.boot(owner, record, &image, call, wanted).await
    }

    /// Writes a machine's record and an empty top layer, and boots it.
    pub(super) async fn boot_new(
        &self,
        owner: &Owner,
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
        self.boot(owner, record, image, call, wanted).await
    }

    /// Starts QEMU and waits for the guest's first answer; its screen and its console can be looked
    /// at meanwhile. On failure, or once it is not wanted any more, no QEMU is left.
    pub(super) async fn boot(
        &self,
        owner: &Owner,
        record: &MachineRecord,
        image: &Image,
        call: &Call,
        wanted: &CancellationToken,
    ) -> Result<(), Fault> {
        // Memory of an earlier run is of no use to a boot.
        remove_file(&self.parts.dirs.vm_memory(record.vm))?;
        self.parts.networks.ready_for(&self.parts.machines, record).await?;
        let machine =
            self.parts.launcher.launch(record, image).await?.spawn().await.map_err(into_fault)?;
        if let Err(f) = owner.ask(Booting::new(machine.clone(), wanted)).await {
            machine.kill().await;
            return Err(f);
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
        let outcome = match outcome {
            Ok(()) => {
                let (network, name) = (record.attachment.as_ref(), Some(&record.name));
                if let Err(error) = tell_guest(&machine, network, name).await {
                    // One whose scripts do not run asks by DHCP.
                    tracing::warn!(vm = %record.name, %error, "its guest was not told its network");
                }
                Ok(())
            }
            Err(f) => Err(f),
        };
        if outcome.is_err() {
            machine.kill().await;
            owner.ask(NotBooted { wanted: wanted.clone() }).await?;
        }
        outcome
    }
}

/// The QEMU of a machine that starts is there: its screen and its console can be looked at.
pub(super) struct Booting {
    machine: Machine,
    wanted: CancellationToken,
    /// What has been made of it by now; it is written down then that it is whole.
    activated: Option<MacAddress>,
}

impl Booting {
    fn new(machine: Machine, wanted: &CancellationToken) -> Self {
        Self { machine, wanted: wanted.clone(), activated: None }
    }

    /// One that was activated, and has this address.
    pub(super) fn activated(machine: Machine, wanted: &CancellationToken, mac: MacAddress) -> Self {
        Self { activated: Some(mac), ..Self::new(machine, wanted) }
    }
}

impl Ask for Booting {
    type Reply = ();
    const STEP: &'static str = "owner.booting";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if self.wanted.is_cancelled() {
            return Err(Fault::cancelled());
        }
        if let Some(mac) = self.activated {
            // Until this is written, a restart of the daemon takes the activation back.
            e.record.unfinished = None;
            e.record.mac = mac;
            e.save()?;
        }
        e.machine = Some(self.machine);
        Ok(())
    }
}

/// The QEMU of a start has ended before its guest answered.
struct NotBooted {
    wanted: CancellationToken,
}

impl Ask for NotBooted {
    type Reply = ();
    const STEP: &'static str = "owner.not-booted";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if !self.wanted.is_cancelled() {
            e.machine = None;
        }
        Ok(())
    }
}

/// A machine that was being started runs.
struct Started {
    wanted: CancellationToken,
}

impl Ask for Started {
    type Reply = ();
    const STEP: &'static str = "owner.started";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.doing.end_start(&self.wanted) { Ok(()) } else { Err(Fault::cancelled()) }
    }
}

/// A start did not come about: as [`Machines::unregister`], unless somebody has removed the machine
/// already, or has started it again since.
pub(super) struct Withdraw {
    pub(super) parts: Arc<Parts>,
    /// What the start was given.
    pub(super) wanted: CancellationToken,
}

impl Ask for Withdraw {
    type Reply = ();
    const STEP: &'static str = "owner.withdraw";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let Self { parts, wanted } = self;
        // Whoever cancels a start wants the machine off or gone; the next start wants it to run.
        let again = wanted.is_cancelled() && e.record.desired == DesiredState::Running;
        if e.doing.is_start_but(&wanted) || again || e.record.desired == DesiredState::Gone {
            return Ok(());
        }
        e.record.desired = DesiredState::Gone;
        e.doing.cancel_start();
        e.publish();
        parts.machines.unregister(e.record.vm).await;
        Ok(())
    }
}
