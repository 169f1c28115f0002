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
//! Nobody guesses that a machine is dead: a destination that is only out of reach keeps it. Nor that it
//! cannot be brought back: only what its source itself says of its QEMU, its record or that move.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::{Call, Fell, MemoryStatus, MoveStatus, Request as _, SiteHost, TookBack, verbs};
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
            let why = match self.take_back(op, vm).await {
                Ok(TookBack::Runs) => break,
                Ok(TookBack::Never { why }) => {
                    return Err(self.lost_there(vm, &back, &why).await?);
                }
                Err(f) => f,
            };
            // Whatever its source says, it may say otherwise later, and both copies are kept.
            if begun.elapsed() >= self.patience {
                return Err(self.not_yet(vm, &back, why)?);
            }
            tracing::warn!(vm = %vm.name, site = %vm.site, error = %why, "not brought back yet");
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

    async fn take_back(&self, op: &OpHandle, vm: &VmRecord) -> Result<TookBack, Fault> {
        let src = match self.sites.host(&vm.site) {
            Ok(src) => src,
            Err(_) => {
                show(op, 0, format!("waiting for site '{}' to come back", vm.site));
                self.sites.await_host(&vm.site, self.patience).await?
            }
        };
        let Some(back) = &vm.returning else { return Ok(TookBack::Runs) };
        let warrant = self.warrants.warrant(vm, vm.generation, &vm.site)?;
        let (migration, generation) = (back.migration, vm.generation);
        let request = verbs::MigrateTakeBack { migration, vm: vm.id, generation, warrant };
        match src.ask(request, Call::quiet()).await {
            // It has no such machine, or that has been in no such move since: it says so itself.
            Err(f) if f.code == Code::NotFound => Ok(TookBack::Never { why: f.message }),
            Err(f) if f.code == Code::Conflict => {
                let status = verbs::MigrateStatus { migration, vm: vm.id };
                match src.ask(status, Call::quiet()).await {
                    Ok(there) if there.over => Ok(TookBack::Never { why: f.message }),
                    _ => Err(f),
                }
            }
            took => took,
        }
    }

    /// A machine that fell does not run at its source yet: it is asked again by whoever wants it.
    fn not_yet(&self, vm: &VmRecord, back: &Returning, why: Fault) -> Result<Fault, Fault> {
        let words = format!(
            "died at '{}', and does not run at '{}' yet: {}",
            back.from, vm.site, why.message
        );
        self.warrants.change_vm(vm, vm.generation, |v| {
            v.reason = Some(words.clone());
            Ok(())
        })?;
        let (name, from) = (&vm.name, &back.from);
        let mut out = format!("try again with: godwit vm migrate {name}");
        if self.sites.host(&vm.site).is_err() {
            out = format!(
                "{out}; or, where '{}' never comes back, give up what it has: godwit vm migrate \
                 {name} --to {from}",
                vm.site
            );
        }
        Ok(Fault { message: format!("machine '{name}' {words}"), ..why }.hint(out))
    }

    /// A machine that fell never runs at its source either, but from a disk: the one where it died, if
    /// that is whole, or the one that it left with. Neither is removed before it runs from the other.
    async fn lost_there(&self, vm: &VmRecord, back: &Returning, why: &str) -> Result<Fault, Fault> {
        let (name, from, site) = (&vm.name, &back.from, &vm.site);
        let words = format!("died at '{from}', and cannot be brought back to '{site}': {why}");
        let as_it_left = format!("boot it from its disk as it left: godwit vm start {name}");
        let out = match self.disk_there(vm, back, &words).await {
            Ok(true) => {
                self.start_there(vm, back, &words)?;
                format!("its disk is whole at '{from}': godwit vm start {name}")
            }
            Ok(false) => {
                self.warrants.change_vm(vm, vm.generation, |v| {
                    v.reason = Some(words.clone());
                    Ok(())
                })?;
                as_it_left
            }
            Err(f) => {
                tracing::warn!(vm = %name, site = %from, error = %f, "its disk there is not known");
                self.warrants.change_vm(vm, vm.generation, |v| {
                    v.reason = Some(words.clone());
                    Ok(())
                })?;
                format!(
                    "'{from}' may have its disk whole, and does not say: once it does, godwit vm \
                     migrate {name}; or {as_it_left}"
                )
            }
        };
        Ok(Fault::new(Code::Damaged, format!("machine '{name}' {words}")).hint(out))
    }

    /// Enters that a machine is to be started from its disk at the site where it died; its source has
    /// no say from here on.
    fn start_there(&self, vm: &VmRecord, back: &Returning, why: &str) -> Result<VmRecord, Fault> {
        self.warrants.change_vm(vm, vm.generation, |v| {
            v.reason = Some(why.into());
            let next = v.next_generation();
            v.reach(next);
            v.returning = None;
            let (migration, from) = (back.migration, v.site.clone());
            v.arriving = Some(Arriving { migration, from, note: None });
            v.site = back.from.clone();
            Ok(())
        })
    }

    /// Whether a machine may be started from its disk at the site where it died, which is told so.
    ///
    /// # Errors
    /// Where that site does not answer.
    async fn disk_there(&self, vm: &VmRecord, back: &Returning, why: &str) -> Result<bool, Fault> {
        let (migration, id) = (back.migration, vm.id);
        let dst = self.sites.host(&back.from)?;
        let status = verbs::MigrateStatus { migration, vm: id };
        let here = match dst.ask(status, Call::quiet()).await {
            Err(f) if f.code == Code::NotFound => return Ok(false),
            here => here?,
        };
        if here.over || here.missing_blocks != Some(0) {
            return Ok(false);
        }
        let request = verbs::MigrateGiveUp { migration, vm: id, why: why.into() };
        dst.ask(request, Call::quiet()).await?;
        Ok(true)
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

    /// Takes up the way back of a machine that was given up before it ran at its source; or, to where
    /// it died and only while its source is away, gives up what that has: the machine is started from
    /// its disk then.
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
        let gives_up = want.to.as_ref() == Some(&back.from) && self.sites.host(&vm.site).is_err();
        if !gives_up && want.to.as_ref().is_some_and(|to| *to != vm.site) {
            return Err(Fault::conflict(format!(
                "machine '{}' died at '{}' and does not run at '{}' yet",
                vm.name, back.from, vm.site
            ))
            .hint(format!("bring it back first: godwit vm migrate {}", vm.name)));
        }
        let (name, site, from) = (&vm.name, &vm.site, &back.from);
        let plan = match gives_up {
            false => format!("bring '{name}' back to {site} from where it died"),
            true => format!(
                "give up what {site}, which is away, has of '{name}', for its disk at {from}"
            ),
        };
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmMigrate {
            vm: vm.id,
            name: name.clone(),
            from: from.clone(),
            to: if gives_up { from.clone() } else { site.clone() },
            generation: vm.generation,
            back: true,
        };
        // It may have been tried to start it from its disk since.
        let vm = self.warrants.change_vm(&vm, vm.generation, |v| {
            let generation = v.generation;
            if let Some(back) = &mut v.returning {
                back.generation = generation;
            }
            Ok(())
        })?;
        let (me, target) = (Arc::clone(self), vm.name.to_string());
        let job = move |op: OpHandle| async move {
            if gives_up {
                return me.give_source_up(&op, &vm, &back).await;
            }
            op.begin(StepKind::Send { migration: back.migration, from: back.from })?;
            Err(me.bring_back(&op, vm).await)
        };
        let op = self.ops.start(who, kind, job).map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(target) })
    }

    /// A machine whose source does not come back is to be started from its disk where it died.
    async fn give_source_up(
        &self,
        op: &OpHandle,
        vm: &VmRecord,
        back: &Returning,
    ) -> Result<serde_json::Value, Fault> {
        let (name, from, site) = (&vm.name, &back.from, &vm.site);
        show(op, 0, format!("asking '{from}' whether its disk is whole"));
        let words = format!("died at '{from}', and what '{site}' has of it was given up");
        if !self.disk_there(vm, back, &words).await? {
            return Err(Fault::new(
                Code::Damaged,
                format!("machine '{name}' died at '{from}', and its disk there is not whole"),
            )
            .hint(format!("wait for '{site}', and then: godwit vm migrate {name}")));
        }
        let vm = self.start_there(vm, back, &words)?;
        Ok(serde_json::json!({ "site": vm.site, "next": format!("godwit vm start {}", vm.name) }))
    }
}
