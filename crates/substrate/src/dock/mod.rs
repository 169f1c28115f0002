//! Docking by conversion: a running machine becomes a substrate.
//!
//! ```text
//! quiesce --> STOP, device state --> memory --> disk --> commit --> release
//!    |              |                   |        |         |           (QEMU ends, its memory
//!    +--------------+-------------------+--------+---------+            file is sealed)
//!                         any failure
//!                              v
//!            cont, NICs plugged again, user programs thawed: it runs on
//! ```
//!
//! Each step is a type of its own that knows how it is taken back ([`steps`]).
//!
//! The same way back is taken when the process that docked is gone: [`run_on`] needs nothing of it.
//!
//! While the guest comes to rest its memory is stored already, as far as that gets: of a page that
//! does not change until the STOP only the hash is computed again while the machine stands.
//!
//! The commit is the rename of the substrate's directory. Before it the machine can go on and
//! nothing of the substrate is left; after it the machine is ended.

mod plan;
mod steps;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use godwit_image::Image;
use godwit_qemu::{Life, Machine, Nic, NicBackend};
use godwit_types::{DockReport, Name, Phases, SubstrateId, SubstrateKind};

use crate::agent::{
    AFTER_ACTIVATE, BEFORE_DOCK, CARD_KEPT, END_BEFORE_DOCK, GENERALISE, IS_NOBODY, KEEP_CARD,
    SCRIPT_WITHIN, SHELL, run_script,
};
use crate::async_pool::{AsyncPool, on_thread};
use crate::error::SubstrateError;
use crate::identity::{Identity, environment};
use crate::manifest::Substrate;
use crate::pool::Pool;
use plan::Plan;
pub(crate) use plan::next_data;
use steps::Docking;

/// How long the agent may take to answer at all before the machine counts as not dockable.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What a machine is to become.
#[derive(Debug, Clone)]
pub struct DockRequest {
    /// Id of the substrate.
    pub id: SubstrateId,
    /// Its name.
    pub name: Name,
    /// Who may use it. What is to be public is generalised: the machine's host name, machine-id and
    /// SSH host keys are taken from it before it is docked.
    pub kind: SubstrateKind,
    /// Whose it is.
    pub owner: Name,
    /// The image that the machine stands on.
    pub image: Image,
    /// By which it is stopped on request.
    pub stop: DockStop,
}

/// Stops a docking on request, as long as that is before its commit. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct DockStop(Arc<AtomicU8>);

impl DockStop {
    const WORKING: u8 = 0;
    const STOPPED: u8 = 1;
    const COMMITTED: u8 = 2;

    /// Wants it stopped; whether that came before its commit.
    pub fn stop(&self) -> bool {
        self.become_state(Self::STOPPED)
    }

    fn become_state(&self, state: u8) -> bool {
        let before =
            self.0.compare_exchange(Self::WORKING, state, Ordering::SeqCst, Ordering::SeqCst);
        before.is_ok() || before == Err(state)
    }

    fn check(&self) -> Result<(), SubstrateError> {
        match self.0.load(Ordering::SeqCst) {
            Self::STOPPED => Err(SubstrateError::Cancelled),
            _ => Ok(()),
        }
    }

    /// From here on it is not stopped any more.
    fn commit(&self) -> Result<(), SubstrateError> {
        match self.become_state(Self::COMMITTED) {
            true => Ok(()),
            false => Err(SubstrateError::Cancelled),
        }
    }
}

/// Converts `machine` into a substrate in `pool`. When this succeeds the machine has ended, its
/// memory file has become the substrate's sealed one, and its cow image may be removed. When it
/// fails the machine runs on and nothing is left in the pool. The work goes on to its end even
/// when the future is dropped.
///
/// Whoever may be killed meanwhile writes down before that the machine is being docked, as what,
/// and with which NICs. Afterwards it is a substrate if the pool has that; if not, [`run_on`] makes
/// it what it was.
///
/// # Errors
/// [`SubstrateError::NotRunningOn`] when it is to be called to run on again;
/// [`SubstrateError::Cancelled`], [`SubstrateError::AgentSilent`], [`SubstrateError::NoRoom`],
/// [`SubstrateError::Exists`], and what the machine, the disk and the store say.
pub async fn dock_convert(
    machine: &Machine,
    pool: &AsyncPool,
    request: DockRequest,
) -> Result<(Substrate, DockReport), SubstrateError> {
    let (machine, pool) = (machine.clone(), pool.inner().clone());
    let docking = tokio::spawn(async move { convert(machine, pool, request).await });
    // Of one that panicked nobody knows how far it has come.
    let unknown = || Box::new(SubstrateError::Worker("docking"));
    docking
        .await
        .unwrap_or_else(|_| Err(SubstrateError::NotRunningOn { why: unknown(), source: unknown() }))
}

async fn convert(
    machine: Machine,
    pool: Pool,
    request: DockRequest,
) -> Result<(Substrate, DockReport), SubstrateError> {
    let (launch, stop) = (machine.launch(), request.stop.clone());
    let nics = launch.nics.clone();
    let phases = Phases::start();
    let (of, into) = (machine.clone(), pool.clone());
    let plan = on_thread("planning a docking", move || Plan::of(&of, &launch, &into, &request));
    let planned = Docking::planned(machine, pool, nics, plan.await?, (stop, phases));
    let published = planned.quiesce().await?.stop().await?.store().await?.publish().await?;
    Ok(published.end().await)
}

/// Brings the guest to rest and takes its NICs out, but for one that its interface can be taken down
/// of instead: to find a new one takes an emulated guest more than all else in an activation. Gives
/// the port of that one. From a guest that is to be public what makes it itself is taken before.
async fn quiesce(
    machine: &Machine,
    nics: &[Nic],
    kind: SubstrateKind,
    listens: impl FnOnce(),
) -> Result<Option<u8>, SubstrateError> {
    let agent = machine.agent().connect("guest-exec", ANSWER_WITHIN).await;
    let mut agent = agent.map_err(|e| SubstrateError::AgentSilent(Box::new(e)))?;
    listens();
    if kind == SubstrateKind::Public {
        let done = run_script(&mut agent, SHELL, &GENERALISE, &[], SCRIPT_WITHIN).await;
        done.map_err(|e| SubstrateError::NotGeneralised(Box::new(e)))?;
        godwit_hold::at("dock.generalised").await;
    }
    // A TAP offers the guest more than a user network does.
    let may_stay = match nics {
        [nic] if !matches!(nic.backend, NicBackend::Tap(_)) => Some(nic.port),
        _ => None,
    };
    let env: Vec<String> = may_stay.iter().map(|_| KEEP_CARD.to_owned()).collect();
    let output = run_script(&mut agent, BEFORE_DOCK, &[], &env, SCRIPT_WITHIN).await?;
    let inside = may_stay.filter(|_| output.lines().any(|l| l == CARD_KEPT));
    for nic in nics.iter().filter(|n| Some(n.port) != inside) {
        let unplugged = machine.unplug_nic(nic.port).await;
        unplugged.map_err(SubstrateError::machine("unplugging the NIC"))?;
    }
    Ok(inside)
}

/// Lets a machine run on whose docking broke off, at whatever step and in whichever process: its
/// vCPUs run, its NICs are there, its user programs are thawed; one that was generalised already has
/// an identity again, a new one under its name. Called again it changes nothing.
///
/// # Errors
/// When QEMU or the guest does not do its part; what was done stays, and it may be called again.
pub async fn run_on(machine: &Machine, nics: &[Nic]) -> Result<(), SubstrateError> {
    const DOING: &str = "letting the machine run on";
    let run_on = SubstrateError::machine;
    let mut life = machine.life().await.map_err(run_on(DOING))?;
    if life == Life::Leaving {
        // A save that nobody waits for any more comes to its end by itself.
        let _ = machine.wait_life(DOING, Life::PostMigrate, SCRIPT_WITHIN).await;
        life = machine.life().await.map_err(run_on(DOING))?;
    }
    if life != Life::Running {
        machine.run().await.map_err(run_on(DOING))?;
    }
    for nic in nics {
        machine.replug_nic(nic.clone()).await.map_err(run_on("plugging the NIC again"))?;
    }
    let agent = machine.agent().connect("guest-exec", SCRIPT_WITHIN).await;
    let mut agent = agent.map_err(|e| run_on("talking to the guest")(e.into()))?;
    // What still brings the guest to rest would take from it again what it gets back here. A guest
    // without a shell has to do without.
    if let Err(error) = run_script(&mut agent, SHELL, &END_BEFORE_DOCK, &[], SCRIPT_WITHIN).await {
        tracing::debug!(%error, "not looked for what brings the guest to rest");
    }
    let nobody = run_script(&mut agent, SHELL, &IS_NOBODY, &[], SCRIPT_WITHIN).await.is_ok();
    let env = match nobody {
        true => environment(Some(&Identity::fresh(machine.launch().name)?), false)?,
        false => Vec::new(),
    };
    run_script(&mut agent, AFTER_ACTIVATE, &[], &env, SCRIPT_WITHIN).await.map(drop)
}
