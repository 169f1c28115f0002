//! Programs in the guests of this host.

use std::time::Duration;

use godwit_qemu::{AgentError, GuestCommand, Machine};
use godwit_types::{Fault, VmId};

use super::allowed::Action;
use super::faults::into_fault;
use super::table::Machines;
use crate::{GuestExec, GuestOutput, GuestProgram};

/// How long a guest may take to its agent's first answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

impl Machines {
    /// Starts a program in the guest, by its agent, and gives its process there. A failure of
    /// class [`Internal`](godwit_types::Code::Internal) leaves open whether it was started; after any other it was not.
    pub(super) async fn exec(&self, vm: VmId, p: GuestProgram) -> Result<u64, Fault> {
        let machine = self.awake(vm).await?;
        let args: Vec<&str> = p.args.iter().map(String::as_str).collect();
        let program =
            GuestCommand { path: &p.path, args: &args, input: &p.input, ..GuestCommand::default() };
        machine.agent().start(program, ANSWER_WITHIN).await.map_err(|e| match e {
            // The guest stands still, or has gone elsewhere meanwhile.
            e @ (AgentError::Io { .. } | AgentError::TimedOut { .. }) => {
                Fault::unavailable(format!("asking the guest: {}", godwit_types::chain(&e)))
            }
            e => into_fault(e),
        })
    }

    /// Waits until a program that [`Machines::exec`] started has ended.
    pub(super) async fn exec_wait(
        &self,
        vm: VmId,
        pid: u64,
        within_ms: u32,
    ) -> Result<GuestExec, Fault> {
        let machine = self.awake(vm).await?;
        let within = Duration::from_millis(u64::from(within_ms));
        match machine.agent().wait(pid, within).await {
            Ok(None) => Ok(GuestExec::Runs),
            Ok(Some(o)) => Ok(GuestExec::Ended(GuestOutput {
                exit: o.exit,
                signal: o.signal,
                stdout: o.stdout.into(),
                stderr: o.stderr.into(),
                truncated: o.truncated,
            })),
            Err(AgentError::Refused { .. }) => Ok(GuestExec::Unknown),
            Err(e) => {
                Err(Fault::unavailable(format!("asking the guest: {}", godwit_types::chain(&e))))
            }
        }
    }

    /// A machine whose guest can answer.
    async fn awake(&self, vm: VmId) -> Result<Machine, Fault> {
        let machine = self.qemu_for(vm, Action::Exec).await?;
        let life = machine.life().await.map_err(into_fault)?;
        // Of one that stands still the center may ask again: it goes on elsewhere, or will be known
        // to have ended.
        let state = self.owner(vm).await?.now().state(&self.site);
        let _ = state.asked(Some(life)).allows(Action::Exec)?;
        Ok(machine)
    }
}
