//! The steps of a docking. Each consumes the one before, and each knows how it is taken back: no way
//! leads past that but the publication, after which nothing is.
//!
//! ```text
//! Planned --quiesce--> Quiesced --stop--> Stopped --store--> Stored --publish--> Published --end-->
//!    | undo               |                  |                  |           (it has become the
//!    v                    +------------------+------------------+            substrate)
//! nothing was                       | undo
//! touched                           v
//!                  nothing is left in the pool; it runs on, with its NICs, thawed
//! ```
//!
//! What is done to the machine itself stands behind [`Subject`]. What becomes of it once it is
//! published is [`Docking::end`] alone, so whatever lets it run on from there is another method of
//! [`Published`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_qemu::{BlockInUse, Machine, Nic};
use godwit_store::{PageMap, Writer};
use godwit_types::{DockReport, Phases, SubstrateId, SubstrateKind};

use super::plan::{Ahead, Plan, StoredParts};
use super::{DockStop, quiesce, run_on};
use crate::async_pool::on_thread;
use crate::error::SubstrateError;
use crate::manifest::Substrate;
use crate::memory::SealedMemory;
use crate::pool::Pool;

/// What a docking does to the machine itself.
pub(super) trait Subject: Send + Sync {
    /// Brings its guest to rest and takes its NICs off the network; gives the port of one that
    /// stays in. `listens` is called when the guest does: before that nothing is done to it.
    fn rest(
        &self,
        nics: &[Nic],
        kind: SubstrateKind,
        listens: impl FnOnce() + Send,
    ) -> impl Future<Output = Result<Option<u8>, SubstrateError>> + Send;

    /// Stops it and has its devices saved; gives the RAM blocks that QEMU has not saved.
    fn save(
        &self,
        plan: &Plan,
    ) -> impl Future<Output = Result<Vec<BlockInUse>, SubstrateError>> + Send;

    /// Lets it run on as it was, at whatever step it is.
    fn run_on(&self, nics: &[Nic]) -> impl Future<Output = Result<(), SubstrateError>> + Send;

    /// Ends it: from then on it does not touch its memory any more.
    fn kill(&self) -> impl Future<Output = ()> + Send;
}

impl Subject for Machine {
    async fn rest(
        &self,
        nics: &[Nic],
        kind: SubstrateKind,
        listens: impl FnOnce() + Send,
    ) -> Result<Option<u8>, SubstrateError> {
        quiesce(self, nics, kind, listens).await
    }

    async fn save(&self, plan: &Plan) -> Result<Vec<BlockInUse>, SubstrateError> {
        plan.save(self).await
    }

    async fn run_on(&self, nics: &[Nic]) -> Result<(), SubstrateError> {
        run_on(self, nics).await
    }

    async fn kill(&self) {
        let _ = Machine::kill(self).await;
    }
}

/// A docking at one of its steps.
#[must_use = "a docking goes on or is undone"]
pub(super) struct Docking<M, S> {
    machine: M,
    pool: Pool,
    id: SubstrateId,
    nics: Vec<Nic>,
    stop: DockStop,
    phases: Phases,
    step: S,
}

/// What a step still does, and has done, that is to be taken back.
pub(super) trait Step: Send {
    /// Whether something was done to the machine.
    const TOUCHED: bool = true;

    /// Awaits the end of what works for it: what that writes is there to be removed.
    fn cease(self) -> impl Future<Output = ()> + Send
    where
        Self: Sized,
    {
        std::future::ready(())
    }
}

/// All is known that can be before the machine is touched; the pool has a directory for it.
pub(super) struct Planned {
    plan: Plan,
}

/// The guest is at rest, or comes to it. What is stored of its memory already may be wrong.
pub(super) struct Quiesced {
    plan: Plan,
    ahead: Ahead,
}

/// It stands still, and its devices are saved.
pub(super) struct Stopped {
    plan: Plan,
    writer: Writer,
    blocks: Vec<BlockInUse>,
    pause: Pause,
}

/// It stands still, and a worker has what was known of it.
struct Still;

/// The store has every unit.
pub(super) struct Stored {
    parts: StoredParts,
    writer: Writer,
    memory: Option<PathBuf>,
    pause: Pause,
}

/// The pool has the substrate. The machine stands still.
pub(super) struct Published {
    substrate: Substrate,
    pages: PageMap,
    /// The file of its memory, if that is its own.
    memory: Option<PathBuf>,
    pause: Pause,
}

/// When it was stopped, from the beginning of the docking.
#[derive(Clone, Copy)]
struct Pause(Duration);

impl Step for Planned {
    const TOUCHED: bool = false;
}

impl Step for Quiesced {
    async fn cease(self) {
        let written = self.ahead.end().await;
        // A writer that is dropped gives its pack's room back on the disk.
        let dropped = on_thread("undoing a docking", move || {
            drop(written);
            Ok(())
        });
        let _ = dropped.await;
    }
}

impl Step for Stopped {}
impl Step for Still {}
impl Step for Stored {}

impl<M, S> Docking<M, S> {
    /// The same docking, and what its step had.
    fn split_step(self) -> (Docking<M, Still>, S) {
        let Self { machine, pool, id, nics, stop, phases, step } = self;
        (Docking { machine, pool, id, nics, stop, phases, step: Still }, step)
    }

    /// The same docking at another step.
    fn with_step<T>(self, step: T) -> Docking<M, T> {
        let Self { machine, pool, id, nics, stop, phases, .. } = self;
        Docking { machine, pool, id, nics, stop, phases, step }
    }
}

impl<M: Subject, S: Step> Docking<M, S> {
    /// Takes it back because of `why`: nothing is left in the pool, and the machine runs on as it
    /// was. Gives the reason, and whether the machine does not run on yet.
    pub(super) async fn undo(self, why: SubstrateError) -> SubstrateError {
        self.step.cease().await;
        let (pool, id) = (self.pool.clone(), self.id);
        let undone = on_thread("undoing a docking", move || {
            pool.undo(id);
            Ok(())
        });
        if let Err(error) = undone.await {
            tracing::error!(%id, %error, "what is left of it goes when the pool opens next");
        }
        if !S::TOUCHED {
            return why;
        }
        match self.machine.run_on(&self.nics).await {
            Ok(()) => why,
            Err(source) => {
                SubstrateError::NotRunningOn { why: Box::new(why), source: Box::new(source) }
            }
        }
    }

    /// Goes on with what was done, or is undone.
    async fn or_undo<T>(
        self,
        done: Result<T, SubstrateError>,
    ) -> Result<(Self, T), SubstrateError> {
        match done {
            Ok(done) => Ok((self, done)),
            Err(why) => Err(self.undo(why).await),
        }
    }
}

impl<M: Subject> Docking<M, Planned> {
    /// Of a machine with these NICs.
    pub(super) fn planned(
        machine: M,
        pool: Pool,
        nics: Vec<Nic>,
        plan: Plan,
        (stop, phases): (DockStop, Phases),
    ) -> Self {
        let id = plan.id();
        Self { machine, pool, id, nics, stop, phases, step: Planned { plan } }
    }

    /// Brings the guest to rest; its memory is stored meanwhile, as far as that gets.
    pub(super) async fn quiesce(self) -> Result<Docking<M, Quiesced>, SubstrateError> {
        let mut ahead = None;
        let listens = || ahead = Some(Ahead::start(&self.pool, &self.step.plan));
        let kind = self.step.plan.substrate.kind;
        let rested = self.machine.rest(&self.nics, kind, listens).await;
        let Some(ahead) = ahead else {
            let why = rested.err().unwrap_or(SubstrateError::Worker("quiescing"));
            return Err(self.undo(why).await);
        };
        let (me, Planned { plan }) = self.split_step();
        let (mut me, inside) = me.with_step(Quiesced { plan, ahead }).or_undo(rested).await?;
        me.step.plan.nic_stays(inside);
        godwit_hold::at("dock.quiesced").await;
        let wanted = me.stop.check();
        let (mut me, ()) = me.or_undo(wanted).await?;
        me.phases.end("quiesce");
        Ok(me)
    }
}

impl<M: Subject> Docking<M, Quiesced> {
    /// Stops the machine and has its devices saved.
    pub(super) async fn stop(self) -> Result<Docking<M, Stopped>, SubstrateError> {
        let pause = Pause(self.phases.elapsed());
        self.step.ahead.enough();
        let saved = self.machine.save(&self.step.plan).await;
        let (mut me, blocks) = self.or_undo(saved).await?;
        me.phases.end("device state");
        godwit_hold::at("dock.stopped").await;
        let (me, Quiesced { plan, ahead }) = me.split_step();
        let (me, writer) = me.or_undo(ahead.end().await).await?;
        Ok(me.with_step(Stopped { plan, writer, blocks, pause }))
    }
}

impl<M: Subject> Docking<M, Stopped> {
    /// Hashes everything, and stores what is not there yet.
    pub(super) async fn store(self) -> Result<Docking<M, Stored>, SubstrateError> {
        let stop = self.stop.clone();
        let (me, Stopped { plan, mut writer, blocks, pause }) = self.split_step();
        let stored = on_thread("docking", move || {
            let memory = plan.own_memory();
            let (parts, memory_at) = plan.store(&mut writer, &blocks, &stop)?;
            Ok((Stored { parts, writer, memory, pause }, memory_at))
        });
        let (mut me, (step, memory_at)) = me.or_undo(stored.await).await?;
        me.phases.end_at("memory", memory_at);
        me.phases.end("disk");
        godwit_hold::at("dock.saved").await;
        Ok(me.with_step(step))
    }
}

impl<M: Subject> Docking<M, Stored> {
    /// Makes the substrate part of the pool: the commit.
    pub(super) async fn publish(self) -> Result<Docking<M, Published>, SubstrateError> {
        let (stop, pool) = (self.stop.clone(), self.pool.clone());
        let (me, Stored { parts, writer, memory, pause }) = self.split_step();
        let published = on_thread("docking", move || {
            stop.commit()?;
            let StoredParts { substrate, pages, parts } = parts;
            let substrate = pool.publish(substrate, &parts, writer)?;
            Ok(Published { substrate, pages, memory, pause })
        });
        let (mut me, step) = me.or_undo(published.await).await?;
        me.phases.end("commit");
        godwit_hold::at("dock.published").await;
        Ok(me.with_step(step))
    }
}

/// Makes the memory file of a machine that has ended the sealed one of substrate `id`, which takes
/// `bytes`.
fn seal_memory(
    pool: &Pool,
    (id, bytes): (SubstrateId, u64),
    path: &Path,
    pages: &PageMap,
) -> Result<(), SubstrateError> {
    // As an idle one's, it goes to where others have to give way; else it is laid out when it is
    // needed.
    let _room = pool.make_room(id, bytes);
    if !pool.memory_fits(id) {
        tracing::info!(%id, "memory file not taken over: it is over the budget");
        return Ok(());
    }
    SealedMemory::hand_over(path, pages, &pool.memory_path(id)).map(drop)
}

impl<M: Subject> Docking<M, Published> {
    /// Ends the machine; a memory file of its own becomes the substrate's sealed one.
    pub(super) async fn end(self) -> (Substrate, DockReport) {
        let Self { machine, pool, mut phases, step, .. } = self;
        let Published { substrate, pages, memory, pause } = step;
        // Killed, not asked to quit: after its STOP it must not touch its memory any more.
        machine.kill().await;
        godwit_hold::at("dock.ended").await;
        if let Some(path) = memory {
            let (id, bytes) = (substrate.id, substrate.sizes.memory_bytes);
            let sealing = on_thread("sealing the memory", move || {
                seal_memory(&pool, (id, bytes), &path, &pages)
            });
            if let Err(error) = sealing.await {
                tracing::info!(%id, %error, "memory file not taken over; it is laid out at the first activation");
            }
        }
        phases.end("release");
        let pause_ms = phases.elapsed().saturating_sub(pause.0).as_secs_f64() * 1e3;
        let (phases, total_ms) = phases.finish();
        let report = DockReport {
            total_ms,
            pause_ms,
            device_state_bytes: substrate.state.bytes,
            raw_bytes: substrate.sizes.raw_bytes,
            stored_bytes: substrate.sizes.stored_bytes,
            phases,
        };
        (substrate, report)
    }
}

#[cfg(test)]
#[path = "tests_steps.rs"]
mod tests;
