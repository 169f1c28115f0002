//! A machine that died at its destination before all of it was there: back to its source.
//!
//! ```text
//! arriving at B, g+1 --B: its QEMU is dead, and it never runs here again under g+1-->
//!   generation g+2, site A, failed, returning      (one change; from here on B has no say)
//!   A: runs on, in no move any more
//! running at A, with words of what is undone; B removes what is left
//!   or: A's QEMU is dead, too, and B's disk is whole
//!   -> generation g+3, site B, failed, to be started from that disk
//! ```
//!
//! Nobody guesses that a machine is dead: a destination that is only out of reach keeps it.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::{Call, Fell, MemoryStatus, MoveStatus, Request as _, SiteHost, verbs};
use godwit_types::{Code, Fault, Name, UnixMs, VmState};
use tokio::time::Instant;

use super::arrive::{PAUSE, no_move_goes_on, show};
use super::lifecycle::dry;
use super::moves::Move;
use super::{Accepted, MigrateVm, Mode, Sites, Warrants};
use crate::access::Principal;
use crate::ops::{OpHandle, OpKind, Ops};
use crate::registry::Registry;
use crate::registry::{Arriving, Returning, StepKind, StepName, VmRecord, registry_fault};

/// Why a machine that ended at its destination is not brought back to its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stays {
    /// Its QEMU is there.
    Lives,
    /// It never ran there: it has not left its source.
    NeverRan,
    /// All of its memory was there: its source is not asked for memory that is older.
    Independent,
    /// Its source has it no more, or not as it left.
    SourceGone,
    /// One of both sites does not know how.
    TooOld,
}

impl Stays {
    /// What people are told of it beside what was lost, where that says more.
    pub(super) const fn words(self) -> Option<&'static str> {
        match self {
            Self::Lives | Self::NeverRan | Self::Independent => None,
            Self::SourceGone => Some("its source cannot run it as it left"),
            Self::TooOld => Some("one of both sites is too old to bring it back to its source"),
        }
    }
}

/// Whether an end's QEMU is gone.
pub(super) const fn is_gone(memory: MemoryStatus) -> bool {
    matches!(memory, MemoryStatus::Gone | MemoryStatus::Fell)
}

/// Whether a machine is brought back that is `here` at its destination and `there` at its source.
/// `speaks`: the older protocol of both sites.
pub(super) fn may_return(here: &MoveStatus, there: &MoveStatus, speaks: u16) -> Result<(), Stays> {
    match here.memory {
        MemoryStatus::Whole | MemoryStatus::Partial => return Err(Stays::Lives),
        MemoryStatus::Gone if !here.runs => return Err(Stays::NeverRan),
        MemoryStatus::Gone if here.missing_pages == 0 => return Err(Stays::Independent),
        // What was given up once is, whatever is found of it now.
        MemoryStatus::Gone | MemoryStatus::Fell => {}
    }
    if there.over || is_gone(there.memory) {
        return Err(Stays::SourceGone);
    }
    if speaks < verbs::MigrateFell::SINCE.max(verbs::MigrateTakeBack::SINCE) {
        return Err(Stays::TooOld);
    }
    Ok(())
}

/// What of a machine's work is undone, for people.
pub(super) fn undone(m: &Move, fell: &Fell) -> String {
    let work = match fell.ran_ms {
        Some(ms) => {
            let tenths = ms.div_ceil(100);
            format!("up to {}.{} s of its work", tenths / 10, tenths % 10)
        }
        None => "its work since the switch".to_owned(),
    };
    format!(
        "died at '{}' before all of its memory was there ({}), and runs on at '{}' as it left: {work} \
         and all that it wrote to its disk meanwhile are undone",
        m.to, fell.why, m.from
    )
}

/// Machines that died where they moved to.
pub(super) struct WayBack {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
    pub(super) sites: Arc<Sites>,
    pub(super) warrants: Arc<Warrants>,
    /// How long a site that is away is waited for.
    pub(super) patience: Duration,
}

impl WayBack {
    /// Has the destination of a move give its dead machine up; `None` where it says that this machine
    /// is none to be brought back.
    pub(super) async fn ask_fell(
        &self,
        m: &Move,
        dst: &Arc<dyn SiteHost>,
    ) -> Result<Option<Fell>, Fault> {
        let generation = m.generation;
        let request = verbs::MigrateFell { migration: m.id, vm: m.vm.id, generation };
        match dst.ask(request, Call::quiet()).await {
            Ok(fell) => Ok(Some(fell)),
            // Fenced: it is known there under a newer generation, so its disk at least is brought.
            Err(f) if matches!(f.code, Code::Conflict | Code::Fenced) => {
                tracing::info!(vm = %m.vm.name, error = %f, "is not brought back to its source");
                Ok(None)
            }
            Err(f) => Err(f),
        }
    }

    /// Enters that a machine which fell at its destination is its source's again, under a generation
    /// of its own.
    pub(super) fn give_back(&self, m: &Move, fell: &Fell) -> Result<VmRecord, Fault> {
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        let undone = undone(m, fell);
        self.warrants.change_vm(&now, m.generation, |v| {
            if v.state != VmState::Failed {
                v.become_state(VmState::Failed, UnixMs::now())?;
            }
            v.reason = Some(format!("its QEMU at '{}' is dead; it is being brought back", m.to));
            let next = v.next_generation();
            v.reach(next);
            v.site = m.from.clone();
            v.arriving = None;
            let from = m.to.clone();
            v.returning = Some(Returning { migration: m.id, from, generation: next, undone });
            Ok(())
        })
    }

    /// Has the source of a machine that fell run it on, however often that takes; what is undone, or
    /// why it does not run there.
    pub(super) async fn bring_back(self: &Arc<Self>, op: &OpHandle, vm: VmRecord) -> Fault {
        match self.returned(op, &vm).await {
            Ok(undone) => Fault::unavailable(format!("machine '{}' {undone}", vm.name))
                .hint(format!("move it again: godwit vm migrate {}", vm.name)),
            Err(f) => f,
        }
    }

    async fn returned(self: &Arc<Self>, op: &OpHandle, vm: &VmRecord) -> Result<String, Fault> {
        // It ran elsewhere: nothing is left that a cancel could undo.
        let _ = op.commit();
        let back = vm.returning.clone();
        let back = back.ok_or_else(|| Fault::internal("a machine that is not brought back"))?;
        godwit_hold::at("back.raised").await;
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        loop {
            show(op, 0, format!("bringing it back to '{}'", vm.site));
            let Err(f) = self.take_back(op, vm).await else { break };
            // Whatever else its source says, it may say otherwise later, and both copies are kept.
            let last = f.code == Code::Damaged;
            if last || begun.elapsed() >= self.patience {
                return Err(self.not_back(vm, &back, f, last).await?);
            }
            tracing::warn!(vm = %vm.name, site = %vm.site, error = %f, "not brought back yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        op.undone(StepName::Send)?;
        self.warrants.change_vm(vm, vm.generation, |v| {
            if v.state != VmState::Running {
                v.become_state(VmState::Running, UnixMs::now())?;
            }
            v.is_back();
            Ok(())
        })?;
        self.remove_rest(vm, &back.from).await;
        Ok(back.undone)
    }

    async fn take_back(&self, op: &OpHandle, vm: &VmRecord) -> Result<(), Fault> {
        let src = match self.sites.host(&vm.site) {
            Ok(src) => src,
            Err(_) => {
                show(op, 0, format!("waiting for site '{}' to come back", vm.site));
                self.sites.await_host(&vm.site, self.patience).await?
            }
        };
        let Some(back) = &vm.returning else { return Ok(()) };
        let warrant = self.warrants.warrant(vm, vm.generation, &vm.site)?;
        let (migration, generation) = (back.migration, vm.generation);
        let request = verbs::MigrateTakeBack { migration, vm: vm.id, generation, warrant };
        src.ask(request, Call::quiet()).await
    }

    /// A machine that fell does not run at its source either. `for_good`: it never will, but from a
    /// disk: the one where it died, if that is whole, or the one that it left with. Neither is removed
    /// before it runs from the other.
    async fn not_back(
        &self,
        vm: &VmRecord,
        back: &Returning,
        why: Fault,
        for_good: bool,
    ) -> Result<Fault, Fault> {
        let words = format!("died at '{}', and does not run at '{}' yet", back.from, vm.site);
        let words = match for_good {
            true => format!("died at '{}': {}", back.from, why.message),
            false => format!("{words}: {}", why.message),
        };
        let has_disk = for_good && self.has_whole_disk(vm, back, &words).await;
        self.warrants.change_vm(vm, vm.generation, |v| {
            v.reason = Some(words.clone());
            if has_disk {
                let next = v.next_generation();
                v.reach(next);
                v.returning = None;
                let (migration, from) = (back.migration, v.site.clone());
                v.arriving = Some(Arriving { migration, from, note: None });
                v.site = back.from.clone();
            }
            Ok(())
        })?;
        let out = match (for_good, has_disk) {
            (true, true) => {
                format!("its disk is whole at '{}': godwit vm start {}", back.from, vm.name)
            }
            (true, false) => {
                format!("boot it from its disk as it left: godwit vm start {}", vm.name)
            }
            (false, _) => format!("try again with: godwit vm migrate {}", vm.name),
        };
        Ok(Fault { message: format!("machine '{}' {words}", vm.name), ..why }.hint(out))
    }

    /// Whether a machine may be started from its disk at the site where it died, which is told so.
    async fn has_whole_disk(&self, vm: &VmRecord, back: &Returning, why: &str) -> bool {
        let (migration, id) = (back.migration, vm.id);
        let asked = async {
            let dst = self.sites.host(&back.from)?;
            let status = verbs::MigrateStatus { migration, vm: id };
            let here = dst.ask(status, Call::quiet()).await?;
            if here.over || here.missing_blocks != Some(0) {
                return Ok(false);
            }
            let request = verbs::MigrateGiveUp { migration, vm: id, why: why.into() };
            dst.ask(request, Call::quiet()).await?;
            Ok::<_, Fault>(true)
        };
        asked.await.unwrap_or_else(|error| {
            tracing::warn!(vm = %vm.name, site = %back.from, %error, "its disk there is not known");
            false
        })
    }

    /// A machine was started from its disk at its source instead of being brought back: what is left
    /// where it died is of no use now.
    pub(super) async fn release_fallen(&self, vm: &VmRecord) {
        let Some(back) = &vm.returning else { return };
        let closed = self.warrants.change_vm(vm, vm.generation, |v| {
            v.is_back();
            Ok(())
        });
        if let Err(error) = closed {
            tracing::debug!(vm = %vm.name, %error, "it has gone on meanwhile");
        }
        self.remove_rest(vm, &back.from).await;
    }

    /// Has the site at which a machine fell remove what is left of it; a site that is away is told
    /// when it reports.
    async fn remove_rest(&self, vm: &VmRecord, at: &Name) {
        let request = verbs::MigrateRelease { vm: vm.id, generation: vm.generation };
        let told = match self.sites.host(at) {
            Ok(dst) => dst.ask(request, Call::quiet()).await,
            Err(f) => Err(f),
        };
        if let Err(error) = told {
            tracing::warn!(vm = %vm.name, site = %at, %error, "what fell there is not removed yet");
        }
    }

    /// Takes up the way back of a machine that was given up before it ran at its source.
    pub(super) fn migrate_back(
        self: &Arc<Self>,
        who: &Principal,
        vm: VmRecord,
        want: &MigrateVm,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let back = vm.returning.clone();
        let back = back.ok_or_else(|| Fault::internal("a machine that is not brought back"))?;
        no_move_goes_on(&self.ops, &vm, &back.from)?;
        if want.to.as_ref().is_some_and(|to| *to != vm.site) {
            return Err(Fault::conflict(format!(
                "machine '{}' died at '{}' and does not run at '{}' yet",
                vm.name, back.from, vm.site
            ))
            .hint(format!("bring it back first: godwit vm migrate {}", vm.name)));
        }
        let plan = format!("bring '{}' back to {} from where it died", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmMigrate {
            vm: vm.id,
            name: vm.name.clone(),
            from: back.from.clone(),
            to: vm.site.clone(),
            generation: vm.generation,
        };
        // It may have been tried to start it from its disk since.
        let vm = self.warrants.change_vm(&vm, vm.generation, |v| {
            let generation = v.generation;
            if let Some(back) = &mut v.returning {
                back.generation = generation;
            }
            Ok(())
        })?;
        let (me, name) = (Arc::clone(self), vm.name.to_string());
        let job = |op: OpHandle| async move {
            op.begin(StepKind::Send { migration: back.migration, from: back.from })?;
            Err(me.bring_back(&op, vm).await)
        };
        let op = self.ops.start(who, kind, job).map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(name) })
    }
}
