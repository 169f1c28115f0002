//! Activation: a substrate becomes a running machine.
//!
//! ```text
//! prepare: sealed memory and disk layer there?        (made at the first activation)
//! disk:    a fresh top image                           } done ahead
//! spawn:   QEMU in -incoming defer, memory mapped      } by a waiting shell
//! load:    device state                                privately
//! run:     cont                       <- vCPUs run here
//! renew:   identity, entropy, clock, the address of the NIC; then user programs go on, and the
//!          interface comes up
//! nic:     plugged, unless it was in the machine all the time
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_image::Image;
use godwit_qemu::{
    Accel, Confine, DiskChain, Launch, Layer, MacAddress, Machine, MemoryGroups, MemorySource, Nic,
    NicBackend, Start,
};
use godwit_types::{ActivateReport, Name, Phases, SubstrateId, SubstrateKind, VmId};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::agent::{AFTER_ACTIVATE, run_script};
use crate::async_pool::{AsyncPool, on_thread};
use crate::error::SubstrateError;
use crate::identity::{Identity, environment, fresh_mac};
use crate::manifest::{STATE, Substrate};
use crate::network::{GuestNetwork, set_network};
use crate::ready::Ready;
use crate::shells::Shells;

/// How long a restored guest may take to renew its identity.
const RENEW_WITHIN: Duration = Duration::from_secs(120);

/// Where a machine lives on its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which machine.
    pub vm: VmId,
    /// Directory for QEMU's sockets.
    pub run_dir: PathBuf,
    /// The image that the guest writes to; made by the activation.
    pub top: PathBuf,
    /// How its QEMU is kept apart from all else.
    pub confine: Option<Confine>,
    /// Where its QEMU gets a control group with a memory limit.
    pub groups: Option<MemoryGroups>,
}

/// What is to be activated, and how.
#[derive(Debug, Clone)]
pub struct ActivateRequest {
    /// The substrate.
    pub substrate: SubstrateId,
    /// The image under it.
    pub image: Image,
    /// Where the machine is to live; a waiting shell is moved there.
    pub place: Place,
    /// Name of the machine.
    pub name: Name,
    /// The identity. A machine from a private substrate keeps its own when this is `None`; any
    /// other gets a fresh one under `name`. The address of a NIC that waits in a QEMU already comes
    /// before the one here; see [`Activated::identity`].
    pub identity: Option<Identity>,
    /// What its NIC is joined to.
    pub nic: Option<NicBackend>,
    /// The network that its NIC is in, if it is to be told of one.
    pub network: Option<GuestNetwork>,
    /// The accelerator.
    pub accel: Accel,
    /// Fires when it is not wanted any more; nothing is left then.
    pub cancel: CancellationToken,
}

/// A machine that runs.
#[derive(Debug)]
pub struct Activated {
    /// The machine.
    pub machine: Machine,
    /// Where it lives.
    pub place: Place,
    /// The identity it was given, unless it kept its own.
    pub identity: Option<Identity>,
    /// What it took.
    pub report: ActivateReport,
}

/// A QEMU that was started for a substrate.
#[derive(Debug)]
pub(crate) struct Shell {
    pub(crate) machine: Machine,
    pub(crate) place: Place,
    /// Whether it has the substrate's device state already, its vCPUs standing still.
    loaded: bool,
}

impl Shell {
    /// Starts one, with a fresh top image.
    pub(crate) async fn start(
        ready: &Ready,
        image: &Image,
        place: Place,
        name: Name,
        accel: Accel,
        nic: Option<Nic>,
    ) -> Result<Self, SubstrateError> {
        let started = Self::spawn(ready, image, &place, name, accel, nic).await;
        if started.is_err() {
            clean(&place).await;
        }
        Ok(Self { machine: started?, place, loaded: false })
    }

    /// Loads the device state, so that nothing is left to do but to let the vCPUs run.
    pub(crate) async fn load(mut self, ready: &Ready) -> Result<Self, SubstrateError> {
        let loaded = async {
            let docked = ready.docked.clone();
            on_thread("verifying the device state", move || docked.state().map(drop)).await?;
            load(&self.machine, ready).await
        }
        .await;
        match loaded {
            Ok(()) => {
                self.loaded = true;
                Ok(self)
            }
            Err(e) => {
                self.end().await;
                Err(e)
            }
        }
    }

    async fn spawn(
        ready: &Ready,
        image: &Image,
        place: &Place,
        name: Name,
        accel: Accel,
        nic: Option<Nic>,
    ) -> Result<Machine, SubstrateError> {
        let substrate = &ready.docked.substrate;
        let spec = substrate.spec(image)?;
        let memory = MemorySource::PrivateOf { path: ready.memory.path().to_owned() };
        let mut launch = Launch::new(spec, place.run_dir.clone(), name, memory);
        launch.start = Start::Incoming;
        launch.accel = accel;
        launch.confine.clone_from(&place.confine);
        launch.groups.clone_from(&place.groups);
        launch.nics.extend(nic);
        if let Some(disk) = &ready.disk {
            let (empty, top) = (disk.top.clone(), place.top.clone());
            on_thread("making the top image", move || copy_new(&empty, &top)).await?;
            let layers = vec![
                Layer::Raw { path: disk.base.clone() },
                Layer::Qcow2 { path: disk.layer.clone() },
            ];
            launch.disk = Some(DiskChain::over(layers, &place.top));
        }
        let machine = launch.spawn().await.map_err(SubstrateError::machine("starting QEMU"))?;
        // Refused here, because QEMU loads a state of another shape without a word.
        if let Err(e) = substrate.fits(&machine.manifest()) {
            machine.kill().await;
            return Err(e);
        }
        if let Err(e) = machine.agent().attach().await {
            machine.kill().await;
            return Err(SubstrateError::machine("connecting to the guest agent")(e.into()));
        }
        Ok(machine)
    }

    /// Takes the name and the place of the machine that it is to be.
    async fn become_machine(self, request: &ActivateRequest) -> Result<Self, SubstrateError> {
        let Self { machine, place: old, loaded } = self;
        let (place, name) = (request.place.clone(), request.name.clone());
        let (from, to) = (old.clone(), place.clone());
        let renamed = on_thread("naming a waiting QEMU", move || {
            if let Some(dir) = to.top.parent()
                && let Err(e) = std::fs::create_dir_all(dir)
            {
                return Ok(Err((machine, SubstrateError::io("making", dir)(e))));
            }
            let top = machine.launch().disk.is_some().then_some(to.top.as_path());
            Ok(match machine.rehouse(&to.run_dir, name, top) {
                Ok(machine) => {
                    // Its old directory holds nothing any more.
                    let _ = from.top.parent().map(std::fs::remove_dir);
                    Ok(machine)
                }
                Err((machine, e)) => {
                    Err((machine, SubstrateError::machine("naming a waiting QEMU")(e)))
                }
            })
        });
        match renamed.await? {
            Ok(machine) => Ok(Self { machine, place, loaded }),
            Err((machine, e)) => {
                Self { machine, place: old, loaded }.end().await;
                clean(&place).await;
                Err(e)
            }
        }
    }

    /// Ends one that is not needed.
    pub(crate) async fn end(self) {
        self.machine.kill().await;
        clean(&self.place).await;
    }
}

/// Activates a substrate, from a waiting QEMU when `shells` has one. Several may be activated at
/// once. A machine that could not be given its identity is not left running.
///
/// # Errors
/// [`SubstrateError::NotFound`], [`SubstrateError::Shape`], [`SubstrateError::WrongImage`], a
/// damaged or missing page, [`SubstrateError::NoRoom`], [`SubstrateError::Cancelled`], and what the
/// machine says. Nothing is left then.
pub async fn activate(
    pool: &AsyncPool,
    shells: Option<&Shells>,
    request: ActivateRequest,
) -> Result<Activated, SubstrateError> {
    let (pool, shells) = (pool.clone(), shells.cloned());
    // On a task of its own, so that a caller who goes away does not leave half a machine.
    tokio::spawn(async move { activate_here(&pool, shells.as_ref(), request).await })
        .await
        .map_err(|_| SubstrateError::Worker("activating"))?
}

async fn activate_here(
    pool: &AsyncPool,
    shells: Option<&Shells>,
    request: ActivateRequest,
) -> Result<Activated, SubstrateError> {
    let mut phases = Phases::start();
    let id = request.substrate;
    let mut waiting = shells.and_then(|s| s.take(id));
    if let Some((shell, ready)) = &waiting
        && !still_sound(pool, ready).await
    {
        tracing::error!(%id, run_dir = %shell.place.run_dir.display(), "a waiting QEMU has damaged files open; it is ended");
        if let Some((shell, _)) = waiting.take() {
            shell.end().await;
        }
    }
    let vm = request.place.vm;
    pool.note_clone(id, vm);
    let done = async {
        let warm = waiting.is_some();
        let (shell, ready) = match waiting {
            // One that waits has its files open: nothing else would stop it.
            Some((shell, _)) if pool.is_going(id) => {
                shell.end().await;
                return Err(SubstrateError::NotFound(id.to_string()));
            }
            Some((shell, ready)) => {
                let shell = shell.become_machine(&request).await?;
                phases.end("rename");
                godwit_hold::at("activate.renamed").await;
                (shell, ready)
            }
            None => {
                let ready = prepare(pool, id, &request.image).await?;
                phases.end("prepare");
                let (place, name) = (request.place.clone(), request.name.clone());
                let mac = request.identity.as_ref().map(|i| i.mac);
                let nic = nic_inside(&ready.docked.substrate, mac, request.nic.as_ref())?;
                let shell =
                    Shell::start(&ready, &request.image, place, name, request.accel, nic).await?;
                phases.end("spawn");
                (shell, ready)
            }
        };
        let brought = tokio::select! {
            brought = bring_up(&shell, &ready, &request, &mut phases) => brought,
            () = request.cancel.cancelled() => Err(SubstrateError::Cancelled),
        };
        match brought {
            Ok((identity, running_ms, first_answer_ms)) => {
                let (phases, _) = phases.finish();
                let report = ActivateReport {
                    running_ms,
                    first_answer_ms: Some(first_answer_ms),
                    warm,
                    phases,
                };
                let Shell { machine, place, .. } = shell;
                Ok(Activated { machine, place, identity, report })
            }
            Err(e) => {
                shell.end().await;
                Err(e)
            }
        }
    };
    let result = done.await;
    if result.is_err() {
        pool.forget_clone(vm);
    }
    if let Some(shells) = shells {
        shells.refill(id);
    }
    result
}

async fn load(machine: &Machine, ready: &Ready) -> Result<(), SubstrateError> {
    machine
        .load_state(&ready.docked.dir.join(STATE))
        .await
        .map_err(SubstrateError::machine("loading the device state"))
}

/// Loads the state unless that is done, lets the vCPUs run, renews the identity, plugs the NIC. Gives
/// the identity and the times to running vCPUs and to the first answer in milliseconds.
async fn bring_up(
    shell: &Shell,
    ready: &Ready,
    request: &ActivateRequest,
    phases: &mut Phases,
) -> Result<(Option<Identity>, f64, f64), SubstrateError> {
    let substrate = &ready.docked.substrate;
    let identity = match (&request.identity, substrate.kind) {
        (Some(i), _) => Some(i.clone()),
        (None, SubstrateKind::Private) => None,
        (None, _) => Some(Identity::fresh(request.name.clone())?),
    };
    let machine = &shell.machine;
    let inside = machine.launch().nics.into_iter().next();
    // Its own address from its next reset on; until then the guest has to be told.
    let identity = match (identity, &inside) {
        (Some(i), Some(nic)) => Some(Identity { mac: nic.mac, ..i }),
        (identity, _) => identity,
    };
    // A substrate that went bad starts nothing, not even what was loaded when it was good.
    let docked = ready.docked.clone();
    on_thread("verifying the device state", move || docked.state().map(drop)).await?;
    if !shell.loaded {
        load(machine, ready).await?;
    }
    phases.end("load");
    godwit_hold::at("activate.loaded").await;
    machine.run().await.map_err(SubstrateError::machine("starting the vCPUs"))?;
    phases.end("run");
    godwit_hold::at("activate.running").await;
    let running_ms = phases.elapsed().as_secs_f64() * 1e3;
    let mut set = environment(identity.as_ref(), inside.is_some())?;
    // A card that comes later is brought up with it.
    set.extend(request.network.iter().flat_map(GuestNetwork::settings));
    let asked = machine.agent().renew(&set, RENEW_WITHIN).await;
    let agent = asked.map_err(|e| SubstrateError::machine("renewing the identity")(e.into()))?;
    let first_answer_ms = phases.elapsed().as_secs_f64() * 1e3;
    if let Some(mut agent) = agent {
        // Docked with an agent that has to start a program for it.
        phases.end("answer");
        run_script(&mut agent, AFTER_ACTIVATE, &[], &set, RENEW_WITHIN).await?;
    }
    phases.end("renew");
    godwit_hold::at("activate.identity").await;
    if inside.as_ref().map(|nic| &nic.backend) == request.nic.as_ref() {
        return Ok((identity, running_ms, first_answer_ms));
    }
    let (port, mac) = nic_of(identity.as_ref(), &substrate.macs);
    let mac = request.network.as_ref().map_or(mac, |network| network.mac);
    if inside.is_some() {
        let unplugged = machine.unplug_nic(port).await;
        unplugged.map_err(SubstrateError::machine("unplugging the NIC"))?;
    }
    // Its drivers take the only vCPU for a while when one appears, which user programs shall not
    // wait for.
    if let Some(backend) = &request.nic {
        machine
            .plug_nic(Nic { port, mac, backend: backend.clone() })
            .await
            .map_err(SubstrateError::machine("plugging the NIC"))?;
    }
    if let Some(network) = &request.network {
        set_network(machine, network, None).await?;
    }
    phases.end("nic");
    let identity = identity.map(|i| Identity { mac, ..i });
    Ok((identity, running_ms, first_answer_ms))
}

/// The NIC that stayed in the machine, as a QEMU for `substrate` has it from its start: on the user
/// network that is wanted, or on an isolated one. Its address is `mac`, else the machine's own if it
/// keeps that, else a fresh one.
pub(crate) fn nic_inside(
    substrate: &Substrate,
    mac: Option<MacAddress>,
    wanted: Option<&NicBackend>,
) -> Result<Option<Nic>, SubstrateError> {
    let Some(port) = substrate.nic_in else { return Ok(None) };
    let own = substrate.macs.iter().find(|(p, _)| *p == port).map(|(_, mac)| *mac);
    let own = own.filter(|_| substrate.kind == SubstrateKind::Private);
    let mac = mac.or(own).map_or_else(fresh_mac, Ok)?;
    let backend = wanted.filter(|b| !matches!(b, NicBackend::Tap(_))).cloned();
    Ok(Some(Nic { port, mac, backend: backend.unwrap_or(NicBackend::Isolated) }))
}

/// Port and address of the NIC: the new identity's, or those that the machine had.
fn nic_of(identity: Option<&Identity>, had: &[(u8, MacAddress)]) -> (u8, MacAddress) {
    let (port, old) = had.first().copied().unwrap_or((0, MacAddress([0x52, 0x54, 0, 0, 0, 1])));
    (port, identity.map_or(old, |i| i.mac))
}

pub(crate) async fn prepare(
    pool: &AsyncPool,
    id: SubstrateId,
    image: &Image,
) -> Result<Ready, SubstrateError> {
    let image = image.clone();
    pool.run("preparing a substrate", move |pool| pool.prepare(id, &image)).await
}

/// Whether what a waiting QEMU has open is untouched, or was touched and is sound.
async fn still_sound(pool: &AsyncPool, ready: &Ready) -> bool {
    let ready = ready.clone();
    pool.start(move |pool| pool.is_still_sound(&ready)).await.unwrap_or(false)
}

/// Copies a small file to a place where none may be yet.
fn copy_new(from: &Path, to: &Path) -> Result<(), SubstrateError> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir).map_err(SubstrateError::io("making", dir))?;
    }
    let mut source = std::fs::File::open(from).map_err(SubstrateError::io("opening", from))?;
    let mut new = std::fs::File::create_new(to).map_err(SubstrateError::io("making", to))?;
    std::io::copy(&mut source, &mut new).map(drop).map_err(|e| {
        let _ = std::fs::remove_file(to);
        SubstrateError::io("writing", to)(e)
    })
}

/// Removes what a machine that never ran left.
async fn clean(place: &Place) {
    let place = place.clone();
    let cleaned = on_thread("removing a machine's files", move || {
        let _ = std::fs::remove_file(&place.top);
        let _ = std::fs::remove_dir_all(&place.run_dir);
        Ok(())
    });
    let _ = cleaned.await;
}
