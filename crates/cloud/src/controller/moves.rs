//! Migration: the order of its steps between two sites.

use std::sync::Arc;
use std::time::Duration;

use godwit_migrate::hybrid::{Received, Sent, report};
use godwit_types::{Code, MigrationId, MoveReport, VmState};
use serde_json::json;

use super::lifecycle::{call_of, dry, state_fault};
use super::{Accepted, Controller, MigrateVm, Mode, registry_fault};
use crate::clock::UnixMs;
use crate::error::Fault;
use crate::ops::{OpHandle, OpKind};
use crate::placement::{Demand, Source, place};
use crate::registry::VmRecord;
use crate::site::{Call, MachineStatus, SWITCHED, SiteHost, SiteReply, SiteRequest, UNCERTAIN};

/// How long a destination that was lost during the switch is asked for.
const FATE_LIMIT: Duration = Duration::from_secs(100);

/// The pause between two questions.
const FATE_PAUSE: Duration = Duration::from_secs(1);

struct Move {
    vm: VmRecord,
    src: Arc<dyn SiteHost>,
    dst: Arc<dyn SiteHost>,
    id: MigrationId,
    scheme: String,
}

impl Move {
    fn again(&self) -> Self {
        Self {
            vm: self.vm.clone(),
            src: self.src.clone(),
            dst: self.dst.clone(),
            id: self.id,
            scheme: self.scheme.clone(),
        }
    }
}

impl Controller {
    /// Moves a running environment to another site.
    ///
    /// # Errors
    /// What refuses it: its state, the sites, no room.
    pub fn migrate(
        self: &Arc<Self>,
        key: &str,
        want: MigrateVm,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let vm = self.registry.vm(key).map_err(registry_fault)?;
        vm.state.to(VmState::Moving).map_err(|e| state_fault(&vm, &e))?;
        let scheme = want.scheme.unwrap_or_else(|| "hybrid".into());
        if scheme != "hybrid" {
            return Err(Fault::invalid(format!("no scheme '{}'", scheme.escape_debug()))
                .hint("the schemes are: hybrid"));
        }
        let demand = Demand {
            memory: vm.memory,
            vcpus: vm.vcpus,
            source: Source::Live(vm.image.clone()),
            only: want.to,
            not: Some(vm.site.clone()),
        };
        let sites = self.registry.sites().map_err(registry_fault)?;
        let to = place(&demand, &sites, UnixMs::now())
            .map_err(|r| {
                let mut f = Fault::of(&r);
                f.hint = r.hint();
                f
            })?
            .site;
        let (src, dst) = (self.host(&vm.site)?, self.host(&to)?);
        let plan = format!("move '{}' from {} to {to} by scheme {scheme}", vm.name, vm.site);
        if mode == Mode::DryRun {
            return Ok(dry(plan, &vm));
        }
        // From here on a second migration is refused by the state.
        let vm = self.change_vm(&vm, vm.generation, |v| {
            v.become_state(VmState::Moving, UnixMs::now())?;
            v.moving_to = Some(to.clone());
            Ok(())
        })?;
        let kind = OpKind::VmMigrate {
            vm: vm.id,
            name: vm.name.clone(),
            from: vm.site.clone(),
            to,
            generation: vm.generation.next(),
        };
        let name = vm.name.to_string();
        let (me, back) = (self.clone(), vm.clone());
        let started = self.ops.start(kind, |op| async move {
            let id = MigrationId::new();
            let m = Move { vm, src, dst, id, scheme };
            me.run_move(&op, m).await
        });
        match started {
            Ok(op) => Ok(Accepted { op: Some(op), plan, target: Some(name) }),
            Err(e) => {
                self.change_vm(&back, back.generation, |v| {
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
        match self.send(op, &m).await {
            Ok(report) => {
                self.note_switch(&m)?;
                op.done("send")?;
                self.release(op, &m).await?;
                Ok(json!({ "move": report }))
            }
            Err(f) => {
                let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
                if now.generation == m.vm.generation {
                    // Not switched as far as the center knows; the sites know better.
                    for host in [&m.dst, &m.src] {
                        let abort = SiteRequest::MigrateAbort { migration: m.id, vm: m.vm.id };
                        if let Err(e) = host.tell(abort, Call::quiet()).await {
                            tracing::warn!(site = %host.name(), error = %e, "abort of a migration");
                        }
                    }
                    let f = Self::explained(&m, f).await;
                    self.settle_vm(&m.vm, &f).await?;
                    op.undone("send")?;
                    return Err(f);
                }
                Err(f)
            }
        }
    }

    /// The failure as the destination tells it, where that says more: it was full.
    async fn explained(m: &Move, f: Fault) -> Fault {
        let whole = SiteRequest::MigrateReceived { migration: m.id };
        match m.dst.ask(whole, Call::quiet()).await {
            Err(there) if there.code == Code::NoRoom => there,
            _ => f,
        }
    }

    async fn send(self: &Arc<Self>, op: &OpHandle, m: &Move) -> Result<MoveReport, Fault> {
        let (vm, generation) = (m.vm.id, m.vm.generation);
        let request = SiteRequest::MigrateManifest { vm, generation };
        let manifest = match m.src.ask(request, Call::quiet()).await? {
            SiteReply::Manifest(bytes) => bytes,
            other => return Err(odd(&m.src, &other)),
        };
        op.check()?;
        op.begin("prepare", json!({ "migration": m.id, "at": m.dst.name() }))?;
        let request = SiteRequest::MigratePrepare {
            migration: m.id,
            machine: status_of(&m.vm),
            generation: generation.next(),
            from: m.src.name().clone(),
            manifest,
        };
        let to = match m.dst.ask(request, call_of(op)).await? {
            SiteReply::Incoming(i) => i,
            other => return Err(odd(&m.dst, &other)),
        };
        op.done("prepare")?;
        op.check()?;
        op.begin("send", json!({ "migration": m.id, "from": m.src.name() }))?;
        let request = SiteRequest::MigrateSend { vm, generation, to, scheme: m.scheme.clone() };
        let (me, shown) = (self.clone(), op.clone());
        let at_switch = m.again();
        let call = Call::new(
            move |p| {
                if p.stage == UNCERTAIN {
                    let (me, lost) = (me.clone(), at_switch.again());
                    tokio::spawn(async move { me.decide_fate(&lost).await });
                }
                if p.stage == SWITCHED {
                    // The site has passed the point; a cancel that came too late is not undone.
                    if let Err(f) = shown.commit() {
                        tracing::info!(op = %shown.id(), "a cancel came after the switch: {f}");
                    }
                    if let Err(f) = me.note_switch(&at_switch) {
                        tracing::error!(vm = %at_switch.vm.name, error = %f, "noting a switch");
                    }
                }
                shown.progress(p);
            },
            op.cancel().clone(),
        );
        let sent = match m.src.ask(request, call).await? {
            SiteReply::Sent(bytes) => measured::<Sent>(&m.src, &bytes)?,
            other => return Err(odd(&m.src, &other)),
        };
        let whole = SiteRequest::MigrateReceived { migration: m.id };
        let received = match m.dst.ask(whole, Call::quiet()).await? {
            SiteReply::Received(bytes) => measured::<Received>(&m.dst, &bytes)?,
            other => return Err(odd(&m.dst, &other)),
        };
        report(m.src.name().as_str(), m.dst.name().as_str(), &sent, &received)
            .ok_or_else(|| Fault::internal("the sites did not measure the whole migration"))
    }

    /// Tells a source that lost its destination during the switch what became of it. Whoever
    /// answers first that the machine never ran there has made sure that it never will.
    async fn decide_fate(&self, m: &Move) {
        let deadline = tokio::time::Instant::now() + FATE_LIMIT;
        let dead = loop {
            let abort = SiteRequest::MigrateAbort { migration: m.id, vm: m.vm.id };
            match m.dst.tell(abort, Call::quiet()).await {
                Ok(()) => break true,
                Err(f) if f.code == Code::Conflict => break false,
                Err(error) if tokio::time::Instant::now() < deadline => {
                    tracing::info!(site = %m.dst.name(), %error, "asked for a lost machine");
                    tokio::time::sleep(FATE_PAUSE).await;
                }
                Err(error) => {
                    tracing::error!(vm = %m.vm.name, %error, "nobody knows whether it runs");
                    return;
                }
            }
        };
        let fate = SiteRequest::MigrateFate { migration: m.id, dead };
        if let Err(error) = m.src.tell(fate, Call::quiet()).await {
            tracing::warn!(vm = %m.vm.name, %error, "the source could not be told");
        }
    }

    /// Enters the switch: from now on the machine is at the destination. May be called twice.
    fn note_switch(&self, m: &Move) -> Result<(), Fault> {
        let now = self.registry.vm(&m.vm.id.to_string()).map_err(registry_fault)?;
        if now.generation > m.vm.generation {
            return Ok(());
        }
        self.change_vm(&m.vm, m.vm.generation, |v| {
            v.become_state(VmState::Running, UnixMs::now())?;
            v.site = m.dst.name().clone();
            v.generation = v.generation.next();
            Ok(())
        })?;
        Ok(())
    }

    /// After the move: the destination is whole, the source gives up what it kept.
    async fn release(&self, op: &OpHandle, m: &Move) -> Result<(), Fault> {
        op.begin("release", json!({ "at": m.src.name() }))?;
        let generation = m.vm.generation.next();
        let release = SiteRequest::MigrateRelease { vm: m.vm.id, generation };
        m.src.tell(release, Call::quiet()).await?;
        op.done("release")
    }
}

fn measured<T: serde::de::DeserializeOwned>(
    host: &Arc<dyn SiteHost>,
    bytes: &[u8],
) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|e| {
        Fault::new(Code::Damaged, format!("what site '{}' measured: {e}", host.name()))
    })
}

fn odd(host: &Arc<dyn SiteHost>, reply: &SiteReply) -> Fault {
    Fault::internal(format!("site '{}' answered {} out of turn", host.name(), reply.label()))
}

fn status_of(vm: &VmRecord) -> MachineStatus {
    MachineStatus {
        vm: vm.id,
        name: vm.name.clone(),
        generation: vm.generation,
        state: vm.state,
        image: vm.image.clone(),
        arch: vm.arch,
        memory: vm.memory,
        vcpus: vm.vcpus,
        reason: None,
        activate: None,
    }
}
