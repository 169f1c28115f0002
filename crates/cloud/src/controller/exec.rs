//! Programs in guests, wherever the machine goes while they run.
//!
//! ```text
//! start at the machine's site -> pid -> wait there -> result
//!    ^                                   |   ^
//!    | not started: the guest stands     v   |
//!    +---- still, or is elsewhere      the machine moved: wait at its new site
//! ```
//!
//! What the guest's agent knows of a program is in the guest's memory, so it moves and is docked
//! with the machine.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::{Call, GuestExec, GuestOutput, GuestProgram, SiteHost, verbs};
use godwit_types::{Code, Fault, Name, OpState, VmId, VmState};
use tokio::time::Instant;

use super::{Accounts, Finder, Sites};
use crate::access::{Action, Principal};
use crate::ops::OpKind;
use crate::registry::Registry;
use crate::registry::{VmRecord, registry_fault};

/// How often a guest that stands still is asked again, and a machine's place is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long a site is asked to wait at once.
const SLICE: Duration = Duration::from_secs(10);

/// How much longer than asked a site may take: what a program printed may be on its way.
const GRACE: Duration = Duration::from_secs(30);

/// A program that was started in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestProcess {
    /// The machine.
    pub vm: VmId,
    /// The machine's name.
    pub name: Name,
    /// The program's process in the guest.
    pub pid: u64,
}

/// Programs in guests, wherever these go.
pub(crate) struct Programs {
    pub(super) registry: Arc<Registry>,
    pub(super) sites: Arc<Sites>,
    pub(super) finder: Arc<Finder>,
    pub(super) accounts: Arc<Accounts>,
}

impl Programs {
    /// A program that runs in the guest of the machine `key`.
    ///
    /// # Errors
    /// As [`Finder::vm_for`].
    pub(crate) fn exec_at(
        &self,
        who: &Principal,
        key: &str,
        pid: u64,
    ) -> Result<GuestProcess, Fault> {
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        Ok(GuestProcess { vm: vm.id, name: vm.name, pid })
    }

    /// Starts a program in the guest of the machine `key` (name or id). A guest that stands still
    /// is waited for, no longer than `within`.
    ///
    /// # Errors
    /// A machine that does not run, a program that the guest cannot start.
    pub(crate) async fn exec(
        &self,
        who: &Principal,
        key: &str,
        program: GuestProgram,
        within: Duration,
    ) -> Result<GuestProcess, Fault> {
        let until = Instant::now() + within;
        let first = self.finder.vm_for(who, Action::Use, key)?;
        self.accounts.note_begun(&who.at(&first.tenant), "vm exec", first.name.as_str());
        loop {
            let vm = self.registry.vm(&first.id.to_string()).map_err(registry_fault)?;
            if vm.state == VmState::Docking {
                return Err(Fault::conflict(format!("machine '{}' is being docked", vm.name))
                    .hint("wait for it or cancel it: godwit op list"));
            }
            let asked = async {
                let host = self.runs_at(&vm)?;
                let request = verbs::VmExec { vm: vm.id, program: program.clone() };
                host.ask(request, Call::quiet()).await
            };
            match asked.await {
                Ok(pid) => return Ok(GuestProcess { vm: vm.id, name: vm.name, pid }),
                Err(f) if Instant::now() < until && self.passing(&vm, &f) => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(f) => return Err(f),
            }
        }
    }

    /// Waits until a program that [`Programs::exec`] started has ended, also when its machine
    /// moves meanwhile. The guest tells its result once.
    ///
    /// # Errors
    /// Timed out when it still runs after `within`; conflict when its machine was stopped or
    /// docked; not found when the guest does not know it, or has told its result before.
    pub(crate) async fn exec_wait(
        &self,
        program: &GuestProcess,
        within: Duration,
    ) -> Result<GuestOutput, Fault> {
        let until = Instant::now() + within;
        let id = program.vm.to_string();
        loop {
            let vm = match self.registry.vm(&id) {
                Ok(vm) => vm,
                Err(crate::registry::RegistryError::NotFound { .. }) => {
                    return Err(self.what_became(program));
                }
                Err(e) => return Err(registry_fault(e)),
            };
            let left = until.saturating_duration_since(Instant::now());
            let slice = left.min(SLICE);
            let asked = tokio::select! {
                asked = self.exec_look(&vm, program.pid, slice) => asked,
                () = self.moved_from(&id, &vm.site) => continue,
                () = tokio::time::sleep(slice + GRACE) => {
                    Err(Fault::unavailable(format!("site '{}' does not answer", vm.site)))
                }
            };
            match asked {
                Ok(GuestExec::Ended(output)) => return Ok(output),
                Ok(GuestExec::Unknown) => return Err(unknown(program)),
                Ok(GuestExec::Runs) if left.is_zero() => return Err(runs_on(program, within)),
                Ok(GuestExec::Runs) => {}
                Err(f) if !self.passing(&vm, &f) => return Err(f),
                Err(_) if left.is_zero() => return Err(runs_on(program, within)),
                Err(_) => tokio::time::sleep(LOOK_EVERY.min(left)).await,
            }
        }
    }

    async fn exec_look(
        &self,
        vm: &VmRecord,
        pid: u64,
        within: Duration,
    ) -> Result<GuestExec, Fault> {
        let host = self.runs_at(vm)?;
        let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let request = verbs::VmExecWait { vm: vm.id, pid, within_ms };
        host.ask(request, Call::quiet()).await
    }

    /// The site of a machine whose guest can be asked.
    fn runs_at(&self, vm: &VmRecord) -> Result<Arc<dyn SiteHost>, Fault> {
        match vm.state {
            VmState::Stopped | VmState::Failed => {
                let f = Fault::conflict(format!("machine '{}' is {}", vm.name, vm.state));
                Err(f.hint(format!("start it: godwit vm start {}", vm.name)))
            }
            VmState::Starting => {
                Err(Fault::unavailable(format!("machine '{}' is still starting", vm.name)))
            }
            VmState::Running | VmState::Moving | VmState::Docking => self.sites.host(&vm.site),
        }
    }

    /// Whether it may pass: the guest stood still or was not reached, or the machine is on its way
    /// to another site or has gone there meanwhile.
    fn passing(&self, vm: &VmRecord, f: &Fault) -> bool {
        if f.code == Code::Unavailable {
            return true;
        }
        let away = matches!(f.code, Code::NotFound | Code::Fenced);
        (away || f.code == Code::Conflict)
            && match self.registry.vm(&vm.id.to_string()) {
                Ok(now) => {
                    let leaving = matches!(now.state, VmState::Moving | VmState::Docking);
                    // Its QEMU ends a moment before it is a substrate and no machine.
                    now.site != vm.site || away && leaving || now.state == VmState::Docking
                }
                // The next round says what became of it.
                Err(_) => true,
            }
    }

    /// Waits until a machine is at another site, or nowhere.
    async fn moved_from(&self, id: &str, site: &Name) {
        while self.registry.vm(id).is_ok_and(|now| &now.site == site) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Why a machine with a program in it is not there any more.
    fn what_became(&self, program: &GuestProcess) -> Fault {
        let GuestProcess { vm, name, pid } = program;
        let ops = self.registry.ops().all().unwrap_or_default();
        let docked = ops.iter().rev().find_map(|op| match &op.kind {
            OpKind::VmDock { vm: v, substrate, .. }
                if v == vm && !matches!(op.state, OpState::Failed | OpState::Cancelled) =>
            {
                self.registry.substrate(&substrate.to_string()).ok()
            }
            _ => None,
        });
        match docked {
            Some(s) => Fault::conflict(format!(
                "machine '{name}' was docked as substrate '{}' while the program ran (pid {pid}); \
                 it goes on in each machine that is activated from it",
                s.name
            ))
            .hint(format!("its result there: godwit vm exec MACHINE --pid {pid}")),
            None => Fault::conflict(format!(
                "machine '{name}' was deleted while the program ran (pid {pid})"
            )),
        }
    }
}

fn unknown(program: &GuestProcess) -> Fault {
    let GuestProcess { name, pid, .. } = program;
    Fault::not_found(format!(
        "the guest of '{name}' knows of no program {pid} whose result was not told yet"
    ))
}

fn runs_on(program: &GuestProcess, within: Duration) -> Fault {
    let GuestProcess { name, pid, .. } = program;
    Fault::new(
        Code::TimedOut,
        format!(
            "the program has not ended within {} s; it still runs in the guest (pid {pid})",
            within.as_secs()
        ),
    )
    .hint(format!("wait on for its result with: godwit vm exec {name} --pid {pid}"))
}
