//! Ways out of a move, whatever state it is in: for a person who wants the machine off or gone.
//!
//! ```text
//! ask the move to stop -> it ends by itself ------------------------------> the machine is settled
//!                          |                                                 ^
//!                          +-> it does not: fence the destination, end the --+
//!                              source by force; the move has nothing left
//! ```

use std::sync::Arc;
use std::time::Duration;

use godwit_site::{Call, Progress, verbs};
use godwit_types::{Code, Fault, MigrationId, Name, OpId, UnixMs, VmState};
use serde_json::json;
use tokio::time::Instant;

use super::lifecycle::{call_of, dry};
use super::{Accepted, Mode, Moves};
use crate::access::Principal;
use crate::ops::{OpHandle, OpKind};
use crate::registry::{
    MoveReached, Returning, StepKind, StepName, VmRecord, move_reached, registry_fault,
};

/// How long a move that was asked to stop may take to end by itself.
const CANCEL_WITHIN: Duration = Duration::from_secs(20);
/// How long a site may take to end its part by force.
const FORCE_WITHIN: Duration = Duration::from_secs(90);
/// How long a move may take to notice that nothing of it is left.
const NOTICE_WITHIN: Duration = Duration::from_secs(60);
/// How often a move is looked at while its end is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is wanted of a machine whose move is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Its disk, whole; it will be powered off.
    Disk,
    /// Nothing: it is deleted.
    Nothing,
}

/// The newest move of a machine, as its operation has it.
#[derive(Debug, Clone, Copy)]
struct LastMove {
    op: OpId,
    goes_on: bool,
    migration: Option<MigrationId>,
}

impl Moves {
    /// Powers a machine off by force that is moving.
    pub(super) fn stop_moving(
        self: &Arc<Self>,
        who: &Principal,
        vm: VmRecord,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let plan = format!("end the move of '{}' and stop it where it then is", vm.name);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmStop { vm: vm.id, name: vm.name.clone() };
        let (me, name) = (Arc::clone(self), vm.name.to_string());
        let op = self
            .ops
            .start(who, kind, |op| async move {
                let now = me.end_move(&op, &vm, Wanted::Disk).await?;
                if now.state == VmState::Stopped {
                    return Ok(json!({}));
                }
                op.begin(StepKind::VmStop { site: now.site.clone(), generation: now.generation })?;
                let (vm, generation) = (now.id, now.generation);
                let request = verbs::VmStop { vm, generation, force: true };
                me.sites.host(&now.site)?.ask(request, call_of(&op)).await?;
                me.become_stopped(&now)?;
                op.done(StepName::VmStop)?;
                Ok(json!({}))
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(name) })
    }

    fn become_stopped(&self, vm: &VmRecord) -> Result<VmRecord, Fault> {
        self.warrants.change_vm(vm, vm.generation, |v| {
            if v.state != VmState::Stopped {
                v.become_state(VmState::Stopped, UnixMs::now())?;
            }
            v.reason = None;
            v.moving_to = None;
            Ok(())
        })
    }

    /// Whether a machine is in a move, or an operation says so.
    pub(super) fn is_moving(&self, vm: &VmRecord) -> Result<bool, Fault> {
        let goes_on = || Ok::<_, Fault>(self.last_move(vm)?.is_some_and(|m| m.goes_on));
        Ok(vm.state == VmState::Moving || vm.arriving.is_some() && goes_on()?)
    }

    /// The newest move of a machine.
    fn last_move(&self, vm: &VmRecord) -> Result<Option<LastMove>, Fault> {
        let all = self.ops.list().map_err(registry_fault)?;
        let moves = |k: &OpKind| matches!(k, OpKind::VmMigrate { vm: v, .. } if *v == vm.id);
        Ok(all.into_iter().rev().find(|o| moves(&o.kind)).map(|o| LastMove {
            op: o.id,
            goes_on: !o.state.is_final(),
            migration: match move_reached(&o.journal) {
                MoveReached::Nothing => None,
                MoveReached::Prepare(id) | MoveReached::Send(id) => Some(id),
            },
        }))
    }

    /// Ends the move that a machine is in, whatever state it is in; gives the machine as it is then.
    /// Beyond the switch the move is waited for when the disk is wanted: a part of it is still at
    /// the source.
    pub(super) async fn end_move(
        self: &Arc<Self>,
        op: &OpHandle,
        vm: &VmRecord,
        wanted: Wanted,
    ) -> Result<VmRecord, Fault> {
        let last = self.last_move(vm)?;
        if let Some(m) = last.filter(|m| m.goes_on) {
            // Refused beyond the switch; then it ends by itself.
            if let Err(f) = self.ops.cancel(m.op) {
                tracing::info!(vm = %vm.name, error = %f, "its move is not cancelled");
            }
            self.await_move(op, vm, m.op, wanted).await?;
        }
        let now = self.registry.vm(&vm.id.to_string()).map_err(registry_fault)?;
        let now = match now.state {
            VmState::Moving => self.cut_move(op, now, last).await?,
            _ => now,
        };
        match (&now.arriving, &now.returning, wanted) {
            (Some(a), _, Wanted::Disk) => Err(half_here(&now, &a.from)),
            (None, Some(back), Wanted::Disk) if now.state == VmState::Failed => {
                Err(comes_back(&now, back))
            }
            _ => Ok(now),
        }
    }

    async fn await_move(
        &self,
        op: &OpHandle,
        vm: &VmRecord,
        id: OpId,
        wanted: Wanted,
    ) -> Result<(), Fault> {
        let begun = Instant::now();
        let ended = self.ops.wait(id);
        tokio::pin!(ended);
        loop {
            op.progress(Progress {
                stage: "move".into(),
                note: "waiting for its move to end".into(),
                ..Progress::default()
            });
            if tokio::time::timeout(LOOK_EVERY, &mut ended).await.is_ok() {
                return Ok(());
            }
            op.check()?;
            let now = self.registry.vm(&vm.id.to_string()).map_err(registry_fault)?;
            let elsewhere = now.arriving.is_some() || now.returning.is_some();
            let whole_wanted = elsewhere && wanted == Wanted::Disk;
            let limit = if whole_wanted { self.patience } else { CANCEL_WITHIN };
            if begun.elapsed() >= limit {
                return Ok(());
            }
        }
    }

    /// Ends a move that does not end by itself: where its machine runs is decided here. A destination
    /// that runs it keeps it; else the source's part is ended by force, and what a destination that
    /// cannot be reached may have is of an older generation from now on.
    async fn cut_move(
        self: &Arc<Self>,
        op: &OpHandle,
        vm: VmRecord,
        last: Option<LastMove>,
    ) -> Result<VmRecord, Fault> {
        op.progress(Progress {
            stage: "move".into(),
            note: "its move does not end; it is ended by force".into(),
            ..Progress::default()
        });
        let fenced = match (vm.moving_to.clone(), last.and_then(|m| m.migration)) {
            (Some(to), Some(migration)) => self.fence_arrival(&vm, &to, migration).await?,
            (to, _) => to.is_none(),
        };
        let src = self.sites.host(&vm.site)?;
        let stop = |generation| verbs::VmStop { vm: vm.id, generation, force: true };
        let asked = src.ask(stop(vm.generation), Call::quiet());
        match tokio::time::timeout(FORCE_WITHIN, asked).await {
            // A machine that is not there any more is as good as off.
            Ok(Err(f)) if f.code != Code::NotFound => return Err(f),
            Ok(_) => {}
            Err(_) => {
                let words = format!("site '{}' does not end its part of the move", vm.site);
                return Err(Fault::new(Code::TimedOut, words)
                    .hint("restart its daemon: what it left is found and ended then"));
            }
        }
        if let Some(m) = last.filter(|m| m.goes_on) {
            // It finds out that nothing is left to move. If not, it has nothing to say any more.
            let _ = tokio::time::timeout(NOTICE_WITHIN, self.ops.wait(m.op)).await;
        }
        let now = self.registry.vm(&vm.id.to_string()).map_err(registry_fault)?;
        if now.generation > vm.generation {
            // It had switched: it runs at its destination.
            return Ok(now);
        }
        if fenced {
            return if now.state == VmState::Moving { self.become_stopped(&now) } else { Ok(now) };
        }
        let generation = now.next_generation().next();
        let now = self.warrants.change_vm(&now, now.generation, |v| {
            v.generation = generation;
            Ok(())
        })?;
        match tokio::time::timeout(FORCE_WITHIN, src.ask(stop(generation), Call::quiet())).await {
            Ok(answer) => answer?,
            Err(_) => {
                let words = format!("site '{}' does not end its part of the move", vm.site);
                return Err(Fault::new(Code::TimedOut, words));
            }
        }
        self.become_stopped(&now)
    }

    /// Makes sure that a machine never runs at its destination; `false` when that can't be asked.
    async fn fence_arrival(
        &self,
        vm: &VmRecord,
        to: &Name,
        migration: MigrationId,
    ) -> Result<bool, Fault> {
        let Ok(dst) = self.sites.host(to) else { return Ok(false) };
        let abort = verbs::MigrateAbort { migration, vm: vm.id };
        match tokio::time::timeout(CANCEL_WITHIN, dst.ask(abort, Call::quiet())).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(f)) if f.code == Code::Conflict => Err(f.hint("it has just arrived; ask again")),
            Ok(Err(_)) | Err(_) => Ok(false),
        }
    }
}

/// That a machine cannot be turned off: its source may be the only one to have its memory.
pub(super) fn comes_back(vm: &VmRecord, back: &Returning) -> Fault {
    let (name, site) = (&vm.name, &vm.site);
    let words = format!("machine '{name}' died at '{}' and is brought back to '{site}'", back.from);
    Fault::conflict(words).hint(format!(
        "wait for that: godwit op list; ask for it again: godwit vm migrate {name}; or give it up: \
         godwit vm delete {name}"
    ))
}

/// That a machine cannot be turned off: it is not whole where it is, and what it has written is
/// nowhere else.
pub(super) fn half_here(vm: &VmRecord, from: &Name) -> Fault {
    let (name, site) = (&vm.name, &vm.site);
    let words = match vm.state {
        VmState::Running => {
            format!("machine '{name}' runs at '{site}', and part of its disk is still at '{from}'")
        }
        state => format!("machine '{name}' is {state} at '{site}', and part of it is at '{from}'"),
    };
    Fault::conflict(words).hint(format!(
        "bring the rest: godwit vm migrate {name}; or give it up: godwit vm delete {name}"
    ))
}
