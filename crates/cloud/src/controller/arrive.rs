//! The second half of a migration: from the switch until the machine no longer needs its source,
//! however often a relay, a link or a daemon is lost on the way.
//!
//! ```text
//! switched -> follow both ends -> whole -> release the source
//!               |   ^
//!        broken |   | both ends have new relays
//!               v   |
//!            recovering: wait for both sites, ask how far they are
//!               |
//!               +-> lost: what the source had is gone, or it does not come back
//!               +-> back: it died at its destination, and its source has all of it (`back`)
//! ```
//!
//! No QEMU is ended here: the destination's is the machine, for as long as it lives.

use std::sync::Arc;
use std::time::Duration;

use godwit_migrate::clock::{self, ClockId};
use godwit_migrate::hybrid::{Received, Request, Sent, report};
use godwit_site::{
    Asking, Call, Fell, MemoryStatus, MoveStatus, News, Progress, Request as _, SiteHost,
    UNKNOWN_GENERATION, verbs,
};
use godwit_types::{Code, Fault, MoveReport, Name, UnixMs, VmState, human_bytes};
use tokio::time::Instant;

use super::back::{is_gone, may_return};
use super::lifecycle::dry;
use super::meet::{can_be_dialled, may_dial};
use super::moves::{Move, measured};
use super::{Accepted, MigrateVm, Mode, Moves};
use crate::access::Principal;
use crate::ops::{OpHandle, OpKind, Ops};
use crate::registry::{StepKind, VmRecord, registry_fault};

/// The stage that an operation shows while a broken migration is taken up again.
pub(super) const RECOVERING: &str = "recovering";

/// The stage that an operation shows once the destination runs the machine.
const SWITCHED: &str = "switched";

/// The stage that it shows while it is not known where the machine runs.
pub(super) const UNCERTAIN: &str = "uncertain";

/// How long a machine is waited for that lacks something of a site that is away, or that breaks
/// off again and again.
pub(super) const RECOVER_LIMIT: Duration = Duration::from_secs(900);

/// First and longest pause between two tries.
pub(super) const PAUSE: (Duration, Duration) =
    (Duration::from_millis(250), Duration::from_secs(10));

/// How long a site may take to show that it is there.
const ALIVE_WITHIN: Duration = Duration::from_secs(10);

/// How long the source's last word is waited for when the destination is whole.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(20);

/// How long a source that seems to be gone is given for what it has sent to arrive.
const SECOND_LOOK: Duration = Duration::from_secs(3);

/// The version of the protocol in which a site brings the disk of a machine whose QEMU has ended.
const DISK_ALONE_SINCE: u16 = 2;

/// Why an attempt did not bring a machine to its end.
enum Broken {
    /// It may be tried again.
    Again(Fault),
    /// What is missing is gone for good.
    Lost(Fault),
    /// It died at its destination, and its source has it as it left.
    Back(Fell),
}

impl From<Fault> for Broken {
    fn from(f: Fault) -> Self {
        Self::Again(f)
    }
}

impl Moves {
    /// Follows both ends of a migration to their end: what they measured, or the first failure that
    /// one of them tells. An end whose site is away is asked again when that is back.
    pub(super) async fn follow(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        first: Asking<Vec<u8>>,
    ) -> Result<Option<MoveReport>, Fault> {
        let meeting = self.introduce(m, may_dial(&first));
        let sending = self.follow_source(op, m, first);
        let arriving = self.follow_destination(op, m);
        tokio::pin!(meeting, sending, arriving);
        let mut lost: Option<Fault> = None;
        let mut met = false;
        loop {
            tokio::select! {
                () = &mut meeting, if !met => met = true,
                sent = &mut sending => {
                    let (sent, request) = sent?;
                    if let Some(f) = lost {
                        // All of it had left, and the destination has failed all the same.
                        return Err(f);
                    }
                    let received = arriving.await?;
                    return Ok(report(m.from.as_str(), m.to.as_str(), &sent, &received, request));
                }
                received = &mut arriving, if lost.is_none() => match received {
                    Ok(received) => {
                        let sent = tokio::time::timeout(LAST_WORD_WITHIN, sending).await;
                        let Ok(Ok((sent, request))) = sent else { return Ok(None) };
                        let (from, to) = (m.from.as_str(), m.to.as_str());
                        return Ok(report(from, to, &sent, &received, request));
                    }
                    Err(f) if self.has_switched(m)? => return Err(f),
                    Err(f) => {
                        // Its relay may be killed, and then the source's finds out late.
                        let request =
                            verbs::MigrateLost { migration: m.id, why: f.message.clone() };
                        lost = Some(f);
                        let sent = match self.sites.host(&m.from) {
                            Ok(src) => src.ask(request, Call::quiet()).await,
                            Err(f) => Err(f),
                        };
                        if let Err(e) = sent {
                            tracing::info!(site = %m.from, error = %e, "not told of a loss");
                        }
                    }
                },
            }
        }
    }

    async fn follow_source(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        first: Asking<Vec<u8>>,
    ) -> Result<(Sent, Option<Request>), Fault> {
        let mut request = first;
        loop {
            let host = self.await_site(op, &m.from).await?;
            let call = self.call_of_move(op, m);
            let asked = clock::now();
            match self.while_there(&host, host.ask_any(request, call)).await? {
                Some(bytes) => {
                    let (returned, clock) = (clock::now(), ClockId::here());
                    let sent = measured(&host, &bytes)?;
                    let request =
                        m.requested.map(|began| Request { began, sent: asked, returned, clock });
                    return Ok((sent, request));
                }
                None => request = verbs::MigrateFollow { migration: m.id }.asking(),
            }
        }
    }

    async fn follow_destination(&self, op: &OpHandle, m: &Move) -> Result<Received, Fault> {
        loop {
            let host = self.await_site(op, &m.to).await?;
            let request = verbs::MigrateReceived { migration: m.id };
            let asked = host.ask(request, Call::quiet());
            if let Some(bytes) = self.while_there(&host, asked).await? {
                return measured(&host, &bytes);
            }
        }
    }

    /// Waits for a site's answer; `None` when it went away before it answered.
    async fn while_there<T>(
        &self,
        host: &Arc<dyn SiteHost>,
        asked: impl Future<Output = Result<T, Fault>>,
    ) -> Result<Option<T>, Fault> {
        let answer = tokio::select! {
            answer = asked => answer,
            () = self.sites.gone(host) => return Ok(None),
        };
        match answer {
            Ok(reply) => Ok(Some(reply)),
            Err(f) => {
                let alive = tokio::select! {
                    alive = tokio::time::timeout(ALIVE_WITHIN, host.report()) => {
                        matches!(alive, Ok(Ok(_)))
                    }
                    () = self.sites.gone(host) => false,
                };
                if alive {
                    return Err(f);
                }
                // Its link is down; it is taken away or replaced when that is noticed.
                tokio::time::timeout(self.patience, self.sites.gone(host)).await.map_err(|_| f)?;
                Ok(None)
            }
        }
    }

    /// Waits until a site is attached, and says so.
    pub(super) async fn await_site(
        &self,
        op: &OpHandle,
        name: &Name,
    ) -> Result<Arc<dyn SiteHost>, Fault> {
        if let Ok(host) = self.sites.host(name) {
            return Ok(host);
        }
        show(op, 0, format!("waiting for site '{name}' to come back"));
        self.sites.await_host(name, self.patience).await
    }

    fn call_of_move(self: &Arc<Self>, op: &OpHandle, m: &Move) -> Call {
        let (me, shown, at_switch) = (Arc::clone(self), op.clone(), m.clone());
        let deciding = Arc::new(tokio::sync::Mutex::new(()));
        Call::new(
            move |news| match news {
                News::Progress(p) => shown.progress(p),
                News::Uncertain => {
                    shown.progress(Progress {
                        stage: UNCERTAIN.into(),
                        note:
                            "the destination was lost during the switch; asking what became of it"
                                .into(),
                        ..Progress::default()
                    });
                    // It asks until it is answered; one answer at a time is looked for.
                    if let Ok(turn) = Arc::clone(&deciding).try_lock_owned() {
                        let (me, lost) = (me.clone(), at_switch.clone());
                        tokio::spawn(async move {
                            me.decide_fate(&lost).await;
                            drop(turn);
                        });
                    }
                }
                News::Switched { generation }
                    if ![at_switch.generation, UNKNOWN_GENERATION].contains(&generation) =>
                {
                    tracing::error!(
                        vm = %at_switch.vm.name, %generation, expected = %at_switch.generation,
                        "a source tells of a switch that is not this one"
                    );
                }
                News::Switched { .. } => {
                    // The site has passed the point; a cancel that came too late is not undone.
                    if let Err(f) = shown.commit() {
                        tracing::info!(op = %shown.id(), "a cancel came after the switch: {f}");
                    }
                    if let Err(f) = me.note_switch(&at_switch) {
                        tracing::error!(vm = %at_switch.vm.name, error = %f, "noting a switch");
                    }
                    shown.progress(Progress { stage: SWITCHED.into(), ..Progress::default() });
                }
            },
            op.cancel().clone(),
        )
    }

    /// Takes a machine that runs at its destination and lost its way to the source to its end.
    pub(super) async fn arrive(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        first: Fault,
    ) -> Result<Option<MoveReport>, Fault> {
        // It runs there: nothing is left that a cancel could undo.
        let _ = op.commit();
        let begun = Instant::now();
        let mut pause = PAUSE.0;
        let mut why = first;
        for attempt in 1.. {
            tracing::warn!(vm = %m.vm.name, attempt, error = %why, "a migration is taken up again");
            show(op, attempt, why.message.clone());
            self.note_arrival(m, Some(format!("recovering: {}", why.message)))?;
            let attempt_began = Instant::now();
            match self.attempt(op, m).await {
                Ok(report) => {
                    show(op, attempt, "the rest has come".into());
                    return Ok(report);
                }
                Err(Broken::Lost(f)) => {
                    self.abandon(m, &f, true).await?;
                    return Err(f);
                }
                Err(Broken::Back(fell)) => {
                    let vm = self.way_back.give_back(m, &fell)?;
                    return Err(self.way_back.bring_back(op, vm).await);
                }
                Err(Broken::Again(f)) => why = f,
            }
            if begun.elapsed() >= self.patience {
                break;
            }
            // One that went well for a while begins afresh.
            if attempt_began.elapsed() > PAUSE.1 * 3 {
                pause = PAUSE.0;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        let f = self.still_missing(m, &why).await;
        self.abandon(m, &f, false).await?;
        Err(f)
    }

    async fn attempt(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
    ) -> Result<Option<MoveReport>, Broken> {
        let dst = self.await_site(op, &m.to).await?;
        let mut here = match move_status(&dst, m).await {
            // Ended, and begun anew, before it had written down that it runs.
            Err(f) if f.code == Code::NotFound => return Err(Broken::Lost(unknown_there(m, &f))),
            status => status?,
        };
        if is_whole(&here) && !here.over {
            let request = verbs::MigrateFinish { migration: m.id, vm: m.vm.id };
            dst.ask(request, Call::quiet()).await?;
        }
        if is_whole(&here) {
            return Ok(None);
        }
        let goes_back = here.missing_pages > 0 && dst.speaks() >= verbs::MigrateFell::SINCE;
        if here.memory == MemoryStatus::Gone && here.missing_blocks == Some(0) && !goes_back {
            return Err(Broken::Lost(ended_there(m, &here)));
        }
        let src = self.await_site(op, &m.from).await?;
        let there = match move_status(&src, m).await {
            // It has let go of the machine.
            Ok(s) if s.over => MoveStatus { memory: MemoryStatus::Gone, ..s },
            Ok(s) => s,
            // Files of a machine that is not known there are not either.
            Err(f) if f.code == Code::NotFound => MoveStatus {
                memory: MemoryStatus::Gone,
                missing_pages: 0,
                missing_blocks: None,
                runs: false,
                over: true,
                why: Some(f.message),
            },
            Err(f) => return Err(f.into()),
        };
        let may_come = here.memory == MemoryStatus::Partial || there.over;
        if may_come && !is_gone(here.memory) && there.memory == MemoryStatus::Gone {
            // What it had sent may still be arriving.
            tokio::time::sleep(SECOND_LOOK).await;
            here = move_status(&dst, m).await?;
            if is_whole(&here) {
                return Err(Broken::Again(Fault::unavailable("the rest has come meanwhile")));
            }
        }
        // Memory that is lost leaves the disk to be brought: the source has all of it yet.
        let lost = match here.memory {
            MemoryStatus::Gone | MemoryStatus::Fell => {
                let stays = match may_return(&here, &there, src.speaks().min(dst.speaks())) {
                    Ok(()) => match self.way_back.ask_fell(m, &dst).await? {
                        Some(fell) => return Err(Broken::Back(fell)),
                        None => None,
                    },
                    Err(stays) => stays.words(),
                };
                let mut f = ended_there(m, &here);
                if let Some(words) = stays {
                    f.message = format!("{}; {words}", f.message);
                }
                Some(f)
            }
            MemoryStatus::Partial if there.memory == MemoryStatus::Gone => {
                Some(memory_lost(m, &here, &there))
            }
            MemoryStatus::Partial | MemoryStatus::Whole => None,
        };
        // A site of the release before brings no disk for a QEMU that has ended.
        let too_old = is_gone(here.memory) && dst.speaks() < DISK_ALONE_SINCE;
        if let Some(f) = &lost
            && (here.missing_blocks == Some(0) || there.over || too_old)
        {
            return Err(Broken::Lost(f.clone()));
        }
        if there.over && here.missing_blocks != Some(0) {
            return Err(Broken::Lost(disk_lost(m, &here, &there)));
        }
        // A source that has sent everything sends again what was lost on the way.
        let memory = here.memory == MemoryStatus::Partial && lost.is_none();
        show(op, 0, format!("still missing at '{}': {}", m.to, missing(&here)));
        let request = verbs::MigrateResumeIn { migration: m.id, vm: m.vm.id, memory };
        let to = dst.ask(request, Call::quiet()).await?;
        can_be_dialled(&src, &to)?;
        let request = verbs::MigrateResumeOut { migration: m.id, vm: m.vm.id, to, memory };
        let report = self.follow(op, m, request.asking()).await?;
        if lost.is_none() {
            return Ok(report);
        }
        let after = move_status(&dst, m).await.unwrap_or(here);
        Err(Broken::Lost(match after.memory {
            MemoryStatus::Gone | MemoryStatus::Fell => ended_there(m, &after),
            MemoryStatus::Partial | MemoryStatus::Whole => memory_lost(m, &after, &there),
        }))
    }

    /// What to say of a machine whose source cannot be had.
    async fn still_missing(&self, m: &Move, why: &Fault) -> Fault {
        let status = match self.sites.host(&m.to) {
            Ok(dst) => move_status(&dst, m).await.ok(),
            Err(_) => None,
        };
        let what = status.as_ref().map(missing);
        let what = what.unwrap_or_else(|| "part of its memory or disk".into());
        let state = match status {
            Some(s) if is_gone(s.memory) => "has ended at",
            _ => "runs as far as it can at",
        };
        Fault::unavailable(format!(
            "machine '{}' {state} '{}' without what only '{}' has, which is not to be had: {what} \
             ({})",
            m.vm.name, m.to, m.from, why.message
        ))
        .hint(format!("try again with: godwit vm migrate {}", m.vm.name))
    }

    /// A machine that will not become whole by itself: both the registry and its site say so. Its
    /// QEMU is left as it is.
    async fn abandon(&self, m: &Move, why: &Fault, for_good: bool) -> Result<(), Fault> {
        let request =
            verbs::MigrateGiveUp { migration: m.id, vm: m.vm.id, why: why.message.clone() };
        let asked = match self.sites.host(&m.to) {
            Ok(dst) => dst.ask(request, Call::quiet()).await,
            Err(f) => Err(f),
        };
        let known = match asked {
            Ok(()) => true,
            // It may be in no migration there any more, or not take that step.
            Err(f) if f.code == Code::Conflict => match self.sites.host(&m.to) {
                Ok(dst) => move_status(&dst, m).await.is_ok_and(|s| s.over),
                Err(_) => false,
            },
            Err(error) => {
                tracing::warn!(vm = %m.vm.name, %error, "its site does not know that it is given up");
                false
            }
        };
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        let vm = self.warrants.change_vm(&now, now.generation, |v| {
            if v.state != VmState::Failed {
                v.become_state(VmState::Failed, UnixMs::now())?;
            }
            v.reason = Some(why.message.clone());
            if let Some(a) = &mut v.arriving {
                a.note = None;
            }
            Ok(())
        })?;
        let whole_disk = match self.sites.host(&m.to) {
            Ok(dst) => move_status(&dst, m).await.is_ok_and(|s| s.missing_blocks == Some(0)),
            Err(_) => false,
        };
        // One that does not know it asks for what is missing once more.
        if for_good && whole_disk && known {
            // Nothing at the source can help any more.
            self.release_source(&vm).await;
        }
        Ok(())
    }

    /// Writes down what is known of a machine that runs and is not whole yet.
    pub(super) fn note_arrival(&self, m: &Move, note: Option<String>) -> Result<(), Fault> {
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        self.warrants.change_vm(&now, now.generation, |v| {
            if let Some(a) = &mut v.arriving {
                a.note = note;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Has the source of a machine remove what it kept, if there is one; it is tried once, and
    /// again whenever that site reports.
    pub(super) async fn release_source(&self, vm: &VmRecord) {
        let Some(a) = &vm.arriving else { return };
        let request = verbs::MigrateRelease { vm: vm.id, generation: vm.generation };
        let sent = match self.sites.host(&a.from) {
            Ok(src) => src.ask(request, Call::quiet()).await,
            Err(f) => Err(f),
        };
        if let Err(f) = sent {
            tracing::warn!(vm = %vm.name, site = %a.from, error = %f, "not released");
        }
        let cleared = self.warrants.change_vm(vm, vm.generation, |v| {
            v.arriving = None;
            Ok(())
        });
        if let Err(f) = cleared {
            tracing::debug!(vm = %vm.name, error = %f, "it has gone on meanwhile");
        }
    }

    /// Takes up a migration again that was given up beyond its switch.
    pub(super) fn migrate_on(
        self: &Arc<Self>,
        who: &Principal,
        vm: VmRecord,
        want: &MigrateVm,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let Some(arriving) = vm.arriving.clone() else {
            return Err(Fault::internal("a machine that does not arrive"));
        };
        no_move_goes_on(&self.ops, &vm, &arriving.from)?;
        if want.to.as_ref().is_some_and(|to| *to != vm.site) {
            return Err(Fault::conflict(format!(
                "machine '{}' is not whole at '{}': part of it is at '{}'",
                vm.name, vm.site, arriving.from
            ))
            .hint(format!("bring the rest first: godwit vm migrate {}", vm.name)));
        }
        let plan = format!("bring what '{}' lacks at {} from {}", vm.name, vm.site, arriving.from);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        let kind = OpKind::VmMigrate {
            vm: vm.id,
            name: vm.name.clone(),
            from: arriving.from.clone(),
            to: vm.site.clone(),
            generation: vm.generation,
            back: false,
        };
        let name = vm.name.to_string();
        let m = Move::beyond(&vm, arriving.from, arriving.migration);
        let me = Arc::clone(self);
        let op = self
            .ops
            .start(who, kind, |op| async move {
                op.begin(StepKind::Send { migration: m.id, from: m.from.clone() })?;
                let why = Fault::unavailable("asked for again");
                let report = me.arrive(&op, &m, why).await?;
                me.finish(&op, &m, report).await
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target: Some(name) })
    }
}

pub(super) fn show(op: &OpHandle, attempt: u64, note: String) {
    let unit = if attempt == 0 { "" } else { "attempts" };
    op.progress(Progress {
        stage: RECOVERING.into(),
        done: attempt,
        total: 0,
        unit: unit.into(),
        note,
    });
}

async fn move_status(host: &Arc<dyn SiteHost>, m: &Move) -> Result<MoveStatus, Fault> {
    let request = verbs::MigrateStatus { migration: m.id, vm: m.vm.id };
    host.ask(request, Call::quiet()).await
}

/// Refuses what an operation does already: a move of `vm`, of which part is at `from`.
pub(super) fn no_move_goes_on(ops: &Ops, vm: &VmRecord, from: &Name) -> Result<(), Fault> {
    let going = ops.list().map_err(registry_fault)?.into_iter().find(|o| {
        !o.state.is_final() && matches!(&o.kind, OpKind::VmMigrate { vm: v, .. } if *v == vm.id)
    });
    going.map_or(Ok(()), |op| {
        Err(Fault::conflict(format!(
            "machine '{}' is still moving to '{}': part of it is at '{from}'",
            vm.name, vm.site
        ))
        .hint(format!("wait for it: godwit op wait {}", op.id)))
    })
}

/// What a destination lacks, in words.
fn missing(s: &MoveStatus) -> String {
    let pages = match (s.memory, s.missing_pages) {
        (MemoryStatus::Whole, _) => "no memory".to_owned(),
        (_, n) => format!("{n} pages ({}) of its memory", human_bytes(n * 4096)),
    };
    let blocks = match s.missing_blocks {
        Some(0) => "nothing of its disk".to_owned(),
        Some(n) => format!("{n} blocks ({}) of its disk", human_bytes(n * 4096)),
        None => "all that was written to its disk".to_owned(),
    };
    format!("{pages} and {blocks}")
}

/// Whether a destination needs nothing more of its source.
fn is_whole(here: &MoveStatus) -> bool {
    here.memory == MemoryStatus::Whole && here.missing_blocks == Some(0)
}

/// A machine whose QEMU has ended at its destination while something of it was at its source.
fn ended_there(m: &Move, here: &MoveStatus) -> Fault {
    let why = here.why.clone().unwrap_or_else(|| "its QEMU is gone".into());
    let message = format!(
        "machine '{}' ended at '{}' before it needed '{}' no more: {why}; {}",
        m.vm.name,
        m.to,
        m.from,
        disk_left(here)
    );
    Fault::new(Code::Damaged, message).hint(way_on(m, here))
}

/// A machine that has all of its memory, and whose disk is not at its source any more.
fn disk_lost(m: &Move, here: &MoveStatus, there: &MoveStatus) -> Fault {
    let why = there.why.clone().unwrap_or_else(|| "it has let go of it".into());
    let message = format!(
        "machine '{}' lacks {}, which cannot be had of '{}': {why}",
        m.vm.name,
        missing(here),
        m.from
    );
    Fault::new(Code::Damaged, message)
        .hint(format!("save what is open in it, then: godwit vm delete {}", m.vm.name))
}

/// A machine that its destination does not know, although it was switched to it.
fn unknown_there(m: &Move, f: &Fault) -> Fault {
    Fault::new(
        Code::Damaged,
        format!(
            "machine '{}' ended at '{}' while it was switched to it: {}; '{}' keeps what it left with",
            m.vm.name, m.to, f.message, m.from
        ),
    )
    .hint(format!("remove it: godwit vm delete {}", m.vm.name))
}

/// What is known of the disk of a machine whose memory is lost.
fn disk_left(here: &MoveStatus) -> String {
    match here.missing_blocks {
        Some(0) => "its disk is whole".to_owned(),
        Some(n) => format!("and {n} blocks ({}) of its disk", human_bytes(n * 4096)),
        None => "and all that was written to its disk".to_owned(),
    }
}

/// What can be done with a machine whose memory is lost.
fn way_on(m: &Move, here: &MoveStatus) -> String {
    match here.missing_blocks {
        Some(0) => format!("start it from its disk: godwit vm start {}", m.vm.name),
        _ => format!("remove it: godwit vm delete {}", m.vm.name),
    }
}

fn memory_lost(m: &Move, here: &MoveStatus, there: &MoveStatus) -> Fault {
    let why = there.why.clone().unwrap_or_else(|| "its QEMU is gone".into());
    let disk = disk_left(here);
    Fault::new(
        Code::Damaged,
        format!(
            "machine '{}' lost {} pages ({}) of its memory with '{}', where {why}; {disk}",
            m.vm.name,
            here.missing_pages,
            human_bytes(here.missing_pages * 4096),
            m.from
        ),
    )
    .hint(way_on(m, here))
}
