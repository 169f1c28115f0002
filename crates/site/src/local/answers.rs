//! What this site does for each verb: a handler a verb, and none can be left out.

use godwit_types::Fault;

use super::LocalSite;
use super::allowed::Action;
use super::dock::Dock;
use super::moves::Comes;
use super::neighbours::Offered;
use super::net;
use crate::verbs::{
    Disk, ImageBuild, ImageDelete, Images, Machines, MigrateAbort, MigrateDial, MigrateFate,
    MigrateFell, MigrateFinish, MigrateFollow, MigrateGiveUp, MigrateHold, MigrateListening,
    MigrateLost, MigrateManifest, MigratePrepare, MigratePrepareOn, MigratePreparePublishing,
    MigrateReceived, MigrateRelease, MigrateResumeIn, MigrateResumeOut, MigrateSend, MigrateStatus,
    MigrateTakeBack, NetworksLack, Ping, Pool, PoolCheck, Report, Request, Revoke, SiteReply,
    SiteRequest, SubstrateDelete, SubstrateFetch, SubstrateOffer, SubstrateUsers, Substrates,
    Visits, VmConsole, VmDelete, VmDock, VmExec, VmExecWait, VmNew, VmNewOn, VmPublish,
    VmScreenshot, VmStart, VmStatus, VmStop, VmType,
};
use crate::{Call, ConsoleTail};

/// Makes one match of handlers `Verb { fields } => reply`, each wrapped as its verb's reply.
macro_rules! handlers {
    ($request:expr; $( $verb:ident { $($field:ident),* } => $reply:expr; )*) => {
        match $request {
            $( SiteRequest::$verb($verb { $($field),* }) => $verb::answer($reply), )*
        }
    };
}

impl LocalSite {
    pub(super) async fn handle(
        &self,
        request: SiteRequest,
        call: Call,
    ) -> Result<SiteReply, Fault> {
        Ok(handlers! { request;
            Report {} => self.report().await?;
            Images {} => self.parts.images.list().await?;
            ImageBuild { name } => self.parts.images.build(name, call).await?;
            ImageDelete { name } => {
                let users = self.image_users(&name).await?;
                self.parts.images.remove(name, &users).await?
            };
            Machines {} => self.parts.machines.list(&self.parts.room).await;
            VmNew { machine } => self.starts.create(machine, None, call).await?;
            VmStart { vm, generation, warrant } => {
                self.restart(vm, generation, warrant, call).await?
            };
            VmStop { vm, generation, force } => self.power_off(vm, generation, force, call).await?;
            VmDelete { vm, generation } => {
                let had = net::is_in_one(&self.parts, vm).await;
                self.remove(vm, generation).await?;
                net::tidy_after(&self.parts, had).await
            };
            VmDock { vm, generation, substrate, name, kind, owner } => {
                let want = Dock { vm, generation, substrate, name, kind, owner };
                let had = net::is_in_one(&self.parts, vm).await;
                let docked = self.docks.dock(want, call).await?;
                net::tidy_after(&self.parts, had).await;
                docked
            };
            VmStatus { vm } => self.parts.machines.status(&self.parts.room, vm).await?;
            VmConsole { vm, max_bytes } => {
                let bytes = self.parts.machines.console_log(vm, max_bytes as usize).await?;
                let text = String::from_utf8_lossy(&bytes).into_owned();
                ConsoleTail { bytes: bytes.len() as u64, text }
            };
            VmScreenshot { vm } => {
                let machine = self.parts.machines.qemu_for(vm, Action::Screen).await?;
                machine.screenshot().await.map_err(|e| Fault::of(&e))?.png
            };
            VmType { vm, text } => {
                let machine = self.parts.machines.qemu_for(vm, Action::Screen).await?;
                machine.send_text(&text).await.map_err(|e| Fault::of(&e))?
            };
            VmExec { vm, program } => self.parts.machines.exec(vm, program).await?;
            VmExecWait { vm, pid, within_ms } => self.parts.machines.exec_wait(vm, pid, within_ms).await?;
            MigrateManifest { vm, generation } => self.moves.departures.manifest(vm, generation).await?;
            MigratePrepare { migration, machine, generation, warrant, from, manifest } => {
                let arrivals = &self.moves.arrivals;
                let comes = Comes { migration, machine, generation, warrant, from, attachment: None, published: Vec::new() };
                arrivals.prepare(comes, &manifest).await?
            };
            MigrateSend { vm, generation, next, to, scheme } => {
                if scheme != godwit_migrate::hybrid::SCHEME {
                    return Err(Fault::invalid(format!("no scheme '{}'", scheme.escape_debug())));
                }
                self.moves.departures.send(vm, (generation, next), to, call).await?
            };
            MigrateFollow { migration } => self.moves.follow(migration, &call).await?;
            MigrateFate { migration, dead } => {
                self.moves.departures.deliver_fate(migration, dead).await?
            };
            MigrateLost { migration, why } => self.moves.departures.mark_lost(migration, why)?;
            MigrateStatus { migration, vm } => self.moves.status(migration, vm).await?;
            MigrateResumeIn { migration, vm, memory } => {
                self.moves.arrivals.resume(migration, vm, memory).await?
            };
            MigrateResumeOut { migration, vm, to, memory } => {
                self.moves.departures.resume(migration, vm, to, memory, &call).await?
            };
            MigrateFinish { migration, vm } => self.moves.arrivals.finish(migration, vm).await?;
            MigrateGiveUp { migration, vm, why } => self.moves.arrivals.abandon(migration, vm, why).await?;
            MigrateReceived { migration } => self.moves.received(migration).await?;
            MigrateRelease { vm, generation } => {
                let had = net::is_in_one(&self.parts, vm).await;
                self.moves.departures.release(vm, generation).await?;
                self.remove_left(vm, generation).await?;
                net::tidy_after(&self.parts, had).await
            };
            MigrateAbort { migration, vm } => {
                let had = net::is_in_one(&self.parts, vm).await;
                self.moves.abort(migration, vm).await?;
                net::tidy_after(&self.parts, had).await
            };
            Substrates {} => self.parts.substrates.list().await?;
            SubstrateUsers { id } => self.parts.machines.substrate_users(id).await;
            SubstrateDelete { id } => self.parts.substrates.delete(id).await?;
            Pool {} => self.parts.substrates.report().await?;
            PoolCheck {} => self.parts.substrates.check(&self.parts.images).await?;
            Revoke { list } => self.accept_revocations(list)?;
            Ping {} => ();
            NetworksLack {} => godwit_net::lacking_parts();
            SubstrateOffer { id, to } => self.neighbours.offer(id, to);
            SubstrateFetch { id, name, content, among, from, address } => {
                let at = Offered { id, name, content, among, from, address };
                self.fetch(at, call).await?
            };
            MigrateListening { migration } => self.moves.departures.listening(migration).await?;
            MigrateDial { migration, vm, address } => {
                self.moves.arrivals.dial(migration, vm, address).await?
            };
            MigrateHold { migration, substrate, content } => {
                let held = &self.parts.relays.held;
                held.hold(migration, (substrate, content)).await?
            };
            Disk { of } => self.disk_of(of).await?;
            Visits {} => self.parts.machines.visits.machines();
            MigrateFell { migration, vm, generation } => {
                self.moves.arrivals.fell(migration, vm, generation).await?
            };
            MigrateTakeBack { migration, vm, generation, warrant } => {
                let departures = &self.moves.departures;
                departures.bring_back(migration, vm, generation, warrant).await?
            };
            VmNewOn { machine, attachment } => {
                self.starts.create(machine, Some(attachment), call).await?
            };
            MigratePrepareOn { migration, machine, generation, warrant, from, manifest, attachment } => {
                let attachment = Some(attachment);
                let comes = Comes { migration, machine, generation, warrant, from, attachment, published: Vec::new() };
                self.moves.arrivals.prepare(comes, &manifest).await?
            };
            VmPublish { vm, generation, ports } => self.publish(vm, generation, ports).await?;
            MigratePreparePublishing { migration, machine, generation, warrant, from, manifest, attachment, published } => {
                let attachment = Some(attachment);
                let comes = Comes { migration, machine, generation, warrant, from, attachment, published };
                self.moves.arrivals.prepare(comes, &manifest).await?
            };
        })
    }
}
