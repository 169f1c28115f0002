//! Migration: the order of its steps between two sites.

use std::sync::Arc;
use std::time::Duration;

use godwit_migrate::clock;
use godwit_migrate::hybrid::SCHEME;
use godwit_site::{Asking, Call, MachineStatus, Progress, Request, SiteHost, verbs};
use godwit_types::{Code, Fault, Generation, MigrationId, MoveReport, Name, UnixMs, VmState};
use serde_json::json;

use super::authorize::allow;
use super::back::WayBack;
use super::lifecycle::{call_of, dry, state_fault};
use super::meet::can_be_dialled;
use super::{Accepted, Finder, MigrateVm, Mode, Settler, Sites, Warrants};
use crate::access::{Action, Object, Principal};
use crate::ops::Ops;
use crate::ops::{OpHandle, OpKind};
use crate::placement::{Demand, Source};
use crate::registry::Registry;
use crate::registry::{Arriving, StepKind, StepName, VmRecord, registry_fault};

/// How long a destination that was lost during the switch is asked for.
const FATE_LIMIT: Duration = Duration::from_secs(600);

/// How long sites may take to make memory ready that only saves time.
const HOLD_WITHIN: Duration = Duration::from_secs(5);

/// How long a site may take to take its part back.
const ABORT_WITHIN: Duration = Duration::from_secs(60);
/// How long a destination may take to say why its end of a migration was given up.
const EXPLAIN_WITHIN: Duration = Duration::from_secs(5);

/// How long such a destination is asked for once the move was asked to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);

/// The pause between two questions.
const FATE_PAUSE: Duration = Duration::from_secs(1);

/// A migration as the center drives it. `vm` is the record from before the switch.
#[derive(Clone)]
pub(super) struct Move {
    pub(super) vm: VmRecord,
    pub(super) from: Name,
    pub(super) to: Name,
    pub(super) id: MigrationId,
    /// The generation that the machine has at its destination.
    pub(super) generation: Generation,
    /// When the user asked for it, by the center's clock; since 1970. Unknown to a center that
    /// came back in between.
    pub(super) requested: Option<Duration>,
    scheme: String,
}

impl Move {
    /// A migration that has passed its switch; `vm` is the record from after it.
    pub(super) fn beyond(vm: &VmRecord, from: Name, id: MigrationId) -> Self {
        let before = VmRecord {
            generation: Generation(vm.generation.0.saturating_sub(1)),
            site: from.clone(),
            ..vm.clone()
        };
        let (to, generation) = (vm.site.clone(), vm.generation);
        Self { vm: before, from, to, id, generation, requested: None, scheme: SCHEME.into() }
    }

    /// A migration that an earlier daemon began, and whose switch it may not have seen.
    pub(super) fn found(
        vm: &VmRecord,
        from: Name,
        to: Name,
        generation: Generation,
        id: MigrationId,
    ) -> Self {
        // Below that of the destination, and the registry's if that has not seen the switch.
        let at_source = vm.generation.min(Generation(generation.0.saturating_sub(1)));
        let before = VmRecord { generation: at_source, site: from.clone(), ..vm.clone() };
        Self { vm: before, from, to, id, generation, requested: None, scheme: SCHEME.into() }
    }
}

/// Machines on their way from one site to another.
pub(crate) struct Moves {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
    pub(super) sites: Arc<Sites>,
    pub(super) warrants: Arc<Warrants>,
    pub(super) finder: Arc<Finder>,
    pub(super) settler: Arc<Settler>,
    pub(super) way_back: Arc<WayBack>,
    /// How long a machine is waited for that lacks something of a site that is away.
    pub(super) patience: Duration,
}

impl Moves {
    /// Moves a running environment to another site.
    ///
    /// # Errors
    /// What refuses it: its state, the sites, no room.
    pub(crate) fn migrate(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        want: MigrateVm,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let requested = Some(clock::now());
        let vm = self.finder.vm_for(who, Action::Use, key)?;
        if let Some(site) = &want.to {
            allow(who, Action::Use, &Object::Site, ("site", site.as_str()))?;
        }
        let who = &who.at(&vm.tenant);
        if vm.state == VmState::Starting {
            // Also of one that did not come whole: it is started from its disk.
            vm.state.to(VmState::Moving).map_err(|e| state_fault(&vm, &e))?;
        }
        if vm.arriving.is_some() {
            return self.migrate_on(who, vm, &want, mode);
        }
        if vm.returning.is_some() {
            return self.way_back.migrate_back(who, vm, &want, mode);
        }
        vm.state.to(VmState::Moving).map_err(|e| state_fault(&vm, &e))?;
        let scheme = want.scheme.unwrap_or_else(|| SCHEME.into());
        if scheme != SCHEME {
            return Err(Fault::invalid(format!("no scheme '{}'", scheme.escape_debug()))
                .hint("the schemes are: hybrid"));
        }
        let demand = Demand {
            memory: vm.memory,
            vcpus: vm.vcpus,
            source: Source::Live(vm.image.clone()),
            only: want.to,
            not: Some(vm.site.clone()),
            barred: self.sites.barred(vm.network.is_some()),
        };
        let to = self.sites.choose(&demand, None)?.site;
        for site in [&vm.site, &to] {
            let _ = self.sites.host(site)?;
        }
        let plan = format!("move '{}' from {} to {to} by scheme {scheme}", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        // From here on a second migration is refused by the state.
        let vm = self.warrants.change_vm(&vm, vm.generation, |v| {
            v.become_state(VmState::Moving, UnixMs::now())?;
            v.moving_to = Some(to.clone());
            Ok(())
        })?;
        let kind = OpKind::VmMigrate {
            vm: vm.id,
            name: vm.name.clone(),
            from: vm.site.clone(),
            to: to.clone(),
            generation: vm.next_generation(),
            back: false,
        };
        let name = vm.name.to_string();
        let (me, back) = (self.clone(), vm.clone());
        let started = self.ops.start(who, kind, |op| async move {
            let (from, id) = (vm.site.clone(), MigrationId::new());
            let generation = vm.next_generation();
            let m = Move { vm, from, to, id, generation, requested, scheme };
            me.run_move(&op, m).await
        });
        match started {
            Ok(op) => Ok(Accepted { op: Some(op), plan, target: Some(name) }),
            Err(e) => {
                self.warrants.change_vm(&back, back.generation, |v| {
                    Ok(v.become_state(VmState::Running, UnixMs::now())?)
                })?;
                Err(registry_fault(e))
            }
        }
    }

    async fn run_move(
        self: &Arc<Self>,
        op: &OpHandle,
        m: Move,
    ) -> Result<serde_json::Value, Fault> {
        let request = match self.prepare(op, &m).await {
            Ok(request) => request,
            Err(f) => {
                // Nothing was sent yet.
                self.warrants.void_warrant(&m.vm, m.generation, &m.to);
                for site in [&m.to, &m.from] {
                    let Ok(host) = self.sites.host(site) else { continue };
                    let abort = verbs::MigrateAbort { migration: m.id, vm: m.vm.id };
                    if let Err(e) = host.ask(abort, Call::quiet()).await {
                        tracing::warn!(%site, error = %e, "abort of a migration");
                    }
                }
                self.settler.settle_vm(&m.vm, &f).await?;
                return Err(f);
            }
        };
        op.begin(StepKind::Send { migration: m.id, from: m.from.clone() })?;
        let first = self.follow(op, &m, request).await;
        self.conclude(op, &m, first).await
    }

    /// The failure as the destination tells it, where that says more: it was full.
    async fn explained(&self, m: &Move, f: Fault) -> Fault {
        let Ok(dst) = self.sites.host(&m.to) else { return f };
        let whole = verbs::MigrateReceived { migration: m.id };
        match tokio::time::timeout(EXPLAIN_WITHIN, dst.ask(whole, Call::quiet())).await {
            Ok(Err(there)) if there.code == Code::NoRoom => there,
            _ => f,
        }
    }

    async fn prepare(self: &Arc<Self>, op: &OpHandle, m: &Move) -> Result<Asking<Vec<u8>>, Fault> {
        let (src, dst) = (self.sites.host(&m.from)?, self.sites.host(&m.to)?);
        let (vm, generation) = (m.vm.id, m.vm.generation);
        let request = verbs::MigrateManifest { vm, generation };
        let (manifest, ()) =
            tokio::join!(src.ask(request, Call::quiet()), self.hold_memory(op, m, [&src, &dst]));
        let manifest = manifest?;
        op.check()?;
        op.begin(StepKind::Prepare { migration: m.id, at: m.to.clone() })?;
        let warrant = self.warrants.warrant(&m.vm, m.generation, &m.to)?;
        let (migration, machine, next) = (m.id, status_of(&m.vm), m.generation);
        let from = m.from.clone();
        let attachment = self.registry.networks().attachment(&m.vm).map_err(registry_fault)?;
        // They change no more while it moves.
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        let to = match attachment {
            Some(attachment) if !now.published.is_empty() => {
                let request = verbs::MigratePreparePublishing {
                    migration,
                    machine,
                    generation: next,
                    warrant,
                    from,
                    manifest,
                    attachment,
                    published: now.published,
                };
                dst.ask(request, call_of(op)).await?
            }
            Some(attachment) => {
                let request = verbs::MigratePrepareOn {
                    migration,
                    machine,
                    generation: next,
                    warrant,
                    from,
                    manifest,
                    attachment,
                };
                dst.ask(request, call_of(op)).await?
            }
            None => {
                let request = verbs::MigratePrepare {
                    migration,
                    machine,
                    generation: next,
                    warrant,
                    from,
                    manifest,
                };
                dst.ask(request, call_of(op)).await?
            }
        };
        can_be_dialled(&src, &to)?;
        op.done(StepName::Prepare)?;
        op.check()?;
        let (next, scheme) = (m.generation, m.scheme.clone());
        Ok(verbs::MigrateSend { vm, generation, next, to, scheme }.asking())
    }

    /// Has both sites of a move make the memory ready that they hold of the substrate which the machine comes
    /// from, by this registry's word. What comes of it only saves time and bytes.
    async fn hold_memory(&self, op: &OpHandle, m: &Move, sites: [&Arc<dyn SiteHost>; 2]) {
        let from = m.vm.substrate.and_then(|id| self.registry.substrate(&id.to_string()).ok());
        let Some((id, content)) = from.and_then(|s| {
            let both = sites.iter().all(|site| s.holders.contains(site.name()));
            s.content.filter(|_| both).map(|content| (s.id, content))
        }) else {
            return;
        };
        if sites.iter().any(|site| site.speaks() < verbs::MigrateHold::SINCE) {
            return;
        }
        let asked = sites.map(|site| {
            let hold = verbs::MigrateHold { migration: m.id, substrate: id, content };
            site.ask(hold, Call::quiet())
        });
        let asked = futures::future::join_all(asked);
        let answers = tokio::select! {
            answers = tokio::time::timeout(HOLD_WITHIN, asked) => answers,
            () = op.cancel().cancelled() => return,
        };
        match answers {
            Ok(answers) => {
                for refused in answers.into_iter().filter_map(Result::err) {
                    tracing::info!(vm = %m.vm.name, error = %refused, "moves without held memory");
                }
            }
            Err(_) => tracing::info!(vm = %m.vm.name, "moves without held memory: too slow"),
        }
    }

    /// From the first end of a migration, good or bad, to its last.
    pub(super) async fn conclude(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        first: Result<Option<MoveReport>, Fault>,
    ) -> Result<serde_json::Value, Fault> {
        let report = match first {
            Ok(report) => report,
            Err(f) => {
                if !self.has_switched(m)? && !self.find_out(op, m, &f).await? {
                    self.warrants.void_warrant(&m.vm, m.generation, &m.to);
                    let f = self.explained(m, f).await;
                    self.settler.settle_vm(&m.vm, &f).await?;
                    op.undone(StepName::Send)?;
                    return Err(f);
                }
                self.note_switch(m)?;
                self.arrive(op, m, f).await?
            }
        };
        self.finish(op, m, report).await
    }

    /// Whether the center knows that the machine runs at its destination.
    pub(super) fn has_switched(&self, m: &Move) -> Result<bool, Fault> {
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        Ok(now.generation > m.vm.generation)
    }

    /// Finds out, after a failure that does not say it, where a machine runs: `true` when it is the
    /// destination. When this answers `false`, the machine never ran there and never will.
    async fn find_out(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        why: &Fault,
    ) -> Result<bool, Fault> {
        let deadline = tokio::time::Instant::now() + FATE_LIMIT;
        let mut reported = false;
        let mut asked: Option<tokio::time::Instant> = None;
        loop {
            let abort = verbs::MigrateAbort { migration: m.id, vm: m.vm.id };
            let home = self.state_at_source(m).await;
            let at_home = home.is_some();
            let fenced = match self.sites.host(&m.to) {
                Ok(dst) => tokio::time::timeout(ABORT_WITHIN, dst.ask(abort, Call::quiet())).await,
                Err(f) => Ok(Err(f)),
            };
            match fenced {
                Ok(Ok(())) if home == Some(VmState::Running) => return Ok(false),
                Ok(Ok(())) => {
                    // The source waits for this word, or has nobody left who could take it.
                    if let Ok(src) = self.sites.host(&m.from) {
                        let fate = verbs::MigrateFate { migration: m.id, dead: true };
                        match src.ask(fate, Call::quiet()).await {
                            // It has ended, and its site has cleared up after the move.
                            Err(_) if at_home => return Ok(false),
                            Ok(()) if at_home => return Ok(false),
                            Err(e) if e.code == Code::Damaged => return Err(self.cut_off(m, e)?),
                            Err(e) => {
                                tracing::info!(vm = %m.vm.name, error = %e, "telling its fate");
                            }
                            Ok(()) => {}
                        }
                    }
                    if reported {
                        tokio::time::sleep(FATE_PAUSE).await;
                    }
                    reported = true;
                }
                Ok(Err(f)) if f.code == Code::Conflict => return Ok(true),
                // It runs where it was, and a destination that comes back is told then.
                Ok(Err(_)) | Err(_) if at_home => return Ok(false),
                Ok(Err(f)) => {
                    tracing::info!(vm = %m.vm.name, error = %f, "where it runs is not known");
                    tokio::time::sleep(FATE_PAUSE).await;
                }
                Err(_) => {}
            }
            op.progress(Progress {
                stage: super::arrive::UNCERTAIN.into(),
                note: format!("finding out where it runs: {}", why.message),
                ..Progress::default()
            });
            // Who wants it ended does not wait for a site that may never come back.
            let tired = op.cancel().is_cancelled()
                && asked.get_or_insert_with(tokio::time::Instant::now).elapsed() >= CANCEL_LIMIT;
            if tired || tokio::time::Instant::now() >= deadline {
                return if reported {
                    Ok(false)
                } else {
                    Err(Fault::unavailable(format!(
                        "site '{}' is away, and only it can tell whether machine '{}' runs there: {}",
                        m.to, m.vm.name, why.message
                    ))
                    .hint(format!(
                        "wait for that site, or stop it where it was: godwit vm stop --force {}",
                        m.vm.name
                    )))
                };
            }
        }
    }

    /// A machine that was lost in the switch itself, at its source.
    fn cut_off(&self, m: &Move, why: Fault) -> Result<Fault, Fault> {
        self.warrants.change_vm(&m.vm, m.vm.generation, |v| {
            v.become_state(VmState::Failed, UnixMs::now())?;
            v.reason = Some(why.message.clone());
            Ok(())
        })?;
        Ok(why.hint(format!("start it from its disk: godwit vm start {}", m.vm.name)))
    }

    /// What a machine is at its source, if it is there and settled.
    async fn state_at_source(&self, m: &Move) -> Option<VmState> {
        let src = self.sites.host(&m.from).ok()?;
        let asked = tokio::time::timeout(ABORT_WITHIN, src.machine(m.vm.id)).await;
        let there = asked.ok()?.ok()??;
        let state = (there.generation == m.vm.generation).then_some(there.state)?;
        matches!(state, VmState::Running | VmState::Failed | VmState::Stopped).then_some(state)
    }

    /// Tells a source that lost its destination during the switch what became of it. Whoever
    /// answers first that the machine never ran there has made sure that it never will.
    pub(super) async fn decide_fate(&self, m: &Move) {
        let deadline = tokio::time::Instant::now() + FATE_LIMIT;
        let dead = loop {
            let abort = verbs::MigrateAbort { migration: m.id, vm: m.vm.id };
            let outcome = match self.sites.host(&m.to) {
                Ok(dst) => dst.ask(abort, Call::quiet()).await,
                Err(f) => Err(f),
            };
            match outcome {
                Ok(()) => break true,
                Err(f) if f.code == Code::Conflict => break false,
                Err(error) if tokio::time::Instant::now() < deadline => {
                    tracing::info!(site = %m.to, %error, "asked for a lost machine");
                    tokio::time::sleep(FATE_PAUSE).await;
                }
                Err(error) => {
                    tracing::error!(vm = %m.vm.name, %error, "nobody knows whether it runs");
                    return;
                }
            }
        };
        let fate = verbs::MigrateFate { migration: m.id, dead };
        let sent = match self.sites.host(&m.from) {
            Ok(src) => src.ask(fate, Call::quiet()).await,
            Err(f) => Err(f),
        };
        if let Err(error) = sent {
            tracing::warn!(vm = %m.vm.name, %error, "the source could not be told");
        }
    }

    /// Enters the switch: from now on the machine is at the destination. May be called twice.
    pub(super) fn note_switch(&self, m: &Move) -> Result<(), Fault> {
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        if now.generation > m.vm.generation {
            return Ok(());
        }
        self.warrants.change_vm(&m.vm, m.vm.generation, |v| {
            v.become_state(VmState::Running, UnixMs::now())?;
            v.site = m.to.clone();
            v.reach(m.generation);
            v.arriving = Some(Arriving { migration: m.id, from: m.from.clone(), note: None });
            Ok(())
        })?;
        Ok(())
    }

    /// After the move: the destination is whole, the source gives up what it kept.
    pub(super) async fn finish(
        self: &Arc<Self>,
        op: &OpHandle,
        m: &Move,
        report: Option<MoveReport>,
    ) -> Result<serde_json::Value, Fault> {
        self.note_switch(m)?;
        op.done(StepName::Send)?;
        op.begin(StepKind::Release { at: m.from.clone() })?;
        let mut vm = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        if vm.state == VmState::Failed {
            // It had been given up.
            vm = self.warrants.change_vm(&vm, vm.generation, |v| {
                Ok(v.become_state(VmState::Running, UnixMs::now())?)
            })?;
        }
        self.release_source(&vm).await;
        op.done(StepName::Release)?;
        Ok(json!({ "move": report }))
    }
}

pub(super) fn measured<T: serde::de::DeserializeOwned>(
    host: &Arc<dyn SiteHost>,
    bytes: &[u8],
) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|e| {
        Fault::new(Code::Damaged, format!("what site '{}' measured: {e}", host.name()))
    })
}

fn status_of(vm: &VmRecord) -> MachineStatus {
    MachineStatus {
        vm: vm.id,
        name: vm.name.clone(),
        generation: vm.generation,
        warrant: None,
        state: vm.state,
        image: vm.image.clone(),
        arch: vm.arch,
        memory: vm.memory,
        vcpus: vm.vcpus,
        reason: None,
        activate: None,
    }
}
